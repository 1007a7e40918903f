// Rows into dispatch's wire formats: e4m3 values and a scale for each group of columns, in shared memory.
// jax_ep/_src/quantized.py is the meaning, docs/wire-formats.md the arithmetic; every bit agrees with both.
// EncodeRow is the warp's call. All below it compiles on the host too, where tests/gpu/kernels/formats.cu runs the
// lanes one after another. Neighbour: logfmt.cuh, combine's format.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace jax_ep {

enum class Wire : int { kFp8, kFp8Ue8m0, kMxfp8 };

constexpr __host__ __device__ int GroupColumns(Wire wire) { return wire == Wire::kMxfp8 ? 32 : 128; }
constexpr __host__ __device__ int ScaleBytes(Wire wire) { return wire == Wire::kFp8 ? 4 : 1; }
constexpr __host__ __device__ int NumGroups(Wire wire, int hidden) {
  return (hidden + GroupColumns(wire) - 1) / GroupColumns(wire);
}

constexpr uint32_t kF32One = 0x3F800000, kF32Inf = 0x7F800000, kF32Nan = 0x7FC00000, kF32MinNormal = 0x00800000;

// Not by memcpy on the device: where _FORTIFY_SOURCE is a default, as on Ubuntu, it is a wrapper that nvcc does not see
// through.
__host__ __device__ __forceinline__ float AsFloat(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}
__host__ __device__ __forceinline__ uint32_t AsBits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}
__host__ __device__ __forceinline__ uint32_t Greater(uint32_t a, uint32_t b) { return a > b ? a : b; }
__host__ __device__ __forceinline__ uint32_t Lesser(uint32_t a, uint32_t b) { return a < b ? a : b; }

// ---- a row's dtype: words of one f32 or two 16-bit numbers

template <class T>
struct Source;

template <>
struct Source<__nv_bfloat16> {
  static constexpr int kPerWord = 2;
  // Of each half the larger magnitude, under any sign; a NaN stays one.
  static __host__ __device__ __forceinline__ uint32_t Max(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t max;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
#else
    return Greater(a & 0x7FFF0000, b & 0x7FFF0000) | Greater(a & 0x7FFF, b & 0x7FFF);
#endif
  }
  // The f32 bits of the larger magnitude of a word.
  static __host__ __device__ __forceinline__ uint32_t Magnitude(uint32_t word) {
    return Greater(word & 0x7FFF0000, word << 16 & 0x7FFF0000);
  }
  static __host__ __device__ __forceinline__ void Unpack(uint32_t word, float* values) {
    values[0] = AsFloat(word << 16), values[1] = AsFloat(word & 0xFFFF0000);
  }

  // The same of the smaller one, where neither is a NaN.
  static constexpr uint32_t kLargest = 0x7F7F7F7F;
  static __host__ __device__ __forceinline__ uint32_t Min(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t min;
    asm("min.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(min) : "r"(a), "r"(b));
    return min;
#else
    return Lesser(a & 0x7FFF0000, b & 0x7FFF0000) | Lesser(a & 0x7FFF, b & 0x7FFF);
#endif
  }
  static __host__ __device__ __forceinline__ uint32_t LesserMagnitude(uint32_t word) {
    return Lesser(word & 0x7FFF0000, word << 16 & 0x7FFF0000);
  }
  // Two finite f32, given as bits, rounded to nearest even into a word.
  static __host__ __device__ __forceinline__ uint32_t Round(const uint32_t (&bits)[2]) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(AsFloat(bits[1])), "f"(AsFloat(bits[0])));
    return word;
#else
    return (bits[0] + 0x7FFF + (bits[0] >> 16 & 1)) >> 16 | ((bits[1] + 0x7FFF + (bits[1] >> 16 & 1)) & 0xFFFF0000);
#endif
  }
};

template <>
struct Source<__half> {
  static constexpr int kPerWord = 2;
  static __host__ __device__ __forceinline__ uint32_t Max(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t max;
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
    return max;
#else
    return Source<__nv_bfloat16>::Max(a, b);
#endif
  }
  static __host__ __device__ __forceinline__ uint32_t Magnitude(uint32_t word) {
    return AsBits(Float(Greater(word & 0x7FFF, word >> 16 & 0x7FFF))) & 0x7FFFFFFF;
  }
  static __host__ __device__ __forceinline__ void Unpack(uint32_t word, float* values) {
    values[0] = Float(word & 0xFFFF), values[1] = Float(word >> 16);
  }

  static constexpr uint32_t kLargest = 0x7BFF7BFF;
  static __host__ __device__ __forceinline__ uint32_t Min(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t min;
    asm("min.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(min) : "r"(a), "r"(b));
    return min;
#else
    return Source<__nv_bfloat16>::Min(a, b);
#endif
  }
  static __host__ __device__ __forceinline__ uint32_t LesserMagnitude(uint32_t word) {
    return AsBits(Float(Lesser(word & 0x7FFF, word >> 16 & 0x7FFF))) & 0x7FFFFFFF;
  }
  static __host__ __device__ __forceinline__ uint32_t Round(const uint32_t (&bits)[2]) {
    return Half(bits[0]) | Half(bits[1]) << 16;
  }

 private:
  static __host__ __device__ __forceinline__ float Float(uint32_t half) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(half);
    return __half2float(__half(raw));
  }
  static __host__ __device__ __forceinline__ uint32_t Half(uint32_t bits) {
    return static_cast<__half_raw>(__float2half_rn(AsFloat(bits))).x;
  }
};

template <>
struct Source<float> {
  static constexpr int kPerWord = 1;
  static __host__ __device__ __forceinline__ uint32_t Max(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    uint32_t max;
    asm("{ .reg .f32 x, y;\n  mov.b32 x, %1;\n  mov.b32 y, %2;\n"
        "  max.NaN.xorsign.abs.f32 x, x, y;\n  mov.b32 %0, x; }"
        : "=r"(max)
        : "r"(a), "r"(b));
    return max;
#else
    return Greater(a & 0x7FFFFFFF, b & 0x7FFFFFFF);
#endif
  }
  static __host__ __device__ __forceinline__ uint32_t Magnitude(uint32_t word) { return word & 0x7FFFFFFF; }
  static __host__ __device__ __forceinline__ void Unpack(uint32_t word, float* values) { values[0] = AsFloat(word); }

  static constexpr uint32_t kLargest = 0x7F7FFFFF;
  static __host__ __device__ __forceinline__ uint32_t Min(uint32_t a, uint32_t b) {
    return Lesser(a & 0x7FFFFFFF, b & 0x7FFFFFFF);
  }
  static __host__ __device__ __forceinline__ uint32_t LesserMagnitude(uint32_t word) { return word; }
  static __host__ __device__ __forceinline__ uint32_t Round(const uint32_t (&bits)[1]) { return bits[0]; }
};

// ---- arithmetic of one group

// 448 * 2**-117: no scale is below 2**-117.
constexpr uint32_t kAmaxFloor = 0x09600000;

// a / 448, correctly rounded, for f32 bits from kAmaxFloor to below inf. The remainder of the first quotient is exact.
__host__ __device__ __forceinline__ float DivideBy448(uint32_t a_bits) {
  constexpr float kInverse = 1 / 448.f;
  const float a = AsFloat(a_bits);
#ifdef __CUDA_ARCH__
  const float quotient = __fmul_rn(a, kInverse);
  return __fmaf_rn(__fmaf_rn(quotient, -448.f, a), kInverse, quotient);
#else
  const float quotient = a * kInverse;
  return std::fmaf(std::fmaf(quotient, -448.f, a), kInverse, quotient);
#endif
}

// 448 / a, correctly rounded, for the same a: the mantissa is divided as __fdiv_rn does it, without its test for the
// exponents that cannot come here; then the exponent is put right.
__host__ __device__ __forceinline__ float Divide448By(uint32_t a_bits) {
  const float b = AsFloat((a_bits & 0x7FFFFF) | kF32One);
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  inverse = __fmaf_rn(__fmaf_rn(-b, inverse, 1.f), inverse, inverse);
  float quotient = __fmul_rn(448.f, inverse);
  quotient = __fmaf_rn(__fmaf_rn(-b, quotient, 448.f), inverse, quotient);
  quotient = __fmaf_rn(__fmaf_rn(-b, quotient, 448.f), inverse, quotient);
#else
  const float quotient = 448.f / b;
#endif
  return AsFloat(AsBits(quotient) + kF32One - (a_bits & kF32Inf));
}

struct Scale {
  uint32_t stored;  // f32 bits or the e8m0 byte
  float inverse;    // what values are multiplied by
  bool finite;      // else scale and values are NaN
};

// Of a group whose largest magnitude has these f32 bits.
template <Wire kWire>
__host__ __device__ __forceinline__ Scale ScaleOf(uint32_t amax) {
  const bool zero = amax < kF32MinNormal, finite = amax < kF32Inf;
  const uint32_t a = Greater(amax, kAmaxFloor);
  if constexpr (kWire == Wire::kFp8) {
    const uint32_t scale = zero ? kF32One : AsBits(DivideBy448(a));
    return {finite ? scale : kF32Nan, Divide448By(a), finite};
  } else {  // 448 = 1.75 * 2**8: a mantissa above 1.75, 0x600000, carries into the exponent
    const uint32_t carried = a + 0x1FFFFF, exponent = (carried >> 23) - 8;
    return {finite ? (zero ? 127 : exponent) : 0xFF, AsFloat((262u << 23) - (carried & kF32Inf)), finite};
  }
}

// The e4m3 nearest to value * inverse, ties to even, saturating at 448; f32 subnormals count as zero.
__host__ __forceinline__ uint32_t E4m3(float value, float inverse) {
  const uint32_t sign = AsBits(value) >> 31 << 7, magnitude = AsBits(value) & 0x7FFFFFFF;
  const float product = AsFloat(magnitude < kF32MinNormal ? 0 : magnitude) * inverse;
  const uint32_t bits = AsBits(product < 448 ? product : 448);
  if (bits >= 0x3C800000) return sign | (((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3));
  // Below 2**-6 e4m3 counts in steps of 2**-9; nearbyint rounds ties to even.
  return sign | static_cast<uint32_t>(std::nearbyint(AsFloat(bits) * 512));
}

__host__ __device__ __forceinline__ uint32_t E4m3x4(const float (&values)[4], float inverse) {
  uint32_t codes;
#ifdef __CUDA_ARCH__
  float product[4];  // .ftz takes a subnormal for a zero of its sign
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product[i]) : "f"(values[i]), "f"(inverse));
  }
  asm("{ .reg .b16 low, high;\n"
      "  cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "  cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "  mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(product[0]), "f"(product[1]), "f"(product[2]), "f"(product[3]));
#else
  codes = 0;
  for (int i = 0; i < 4; ++i) codes |= E4m3(values[i], inverse) << 8 * i;
#endif
  return codes;
}

// ---- 16 bytes of a row, as words[4]; codes[0 .. kPerWord - 1] get their e4m3

template <class T>
__host__ __device__ __forceinline__ void EncodeVector(const uint32_t (&words)[4], float inverse, uint32_t* codes) {
  constexpr int kPerWord = Source<T>::kPerWord;
#pragma unroll
  for (int i = 0; i < kPerWord; ++i) {
    float values[4];
#pragma unroll
    for (int j = 0; j < 4 / kPerWord; ++j) Source<T>::Unpack(words[i * 4 / kPerWord + j], values + j * kPerWord);
    codes[i] = E4m3x4(values, inverse);
  }
}

// NaNs with the signs of the row.
template <class T>
__host__ __device__ __forceinline__ void EncodeNans(const uint32_t (&words)[4], uint32_t* codes) {
  constexpr int kPerWord = Source<T>::kPerWord, kPerCodes = 4 / kPerWord;
#pragma unroll
  for (int i = 0; i < kPerWord; ++i) {
    codes[i] = 0x7F7F7F7F;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = words[i * kPerCodes + j / kPerWord];
      const uint32_t sign = kPerWord == 2 && j % 2 == 0 ? word << 16 & 0x80000000 : word & 0x80000000;
      codes[i] |= sign >> (24 - 8 * j);
    }
  }
}

// ---- a lane of EncodeRow: 32 consecutive columns of each step of 1024, one group of mxfp8, a quarter of the others

constexpr int kLaneColumns = 32;
constexpr int kStepColumns = 32 * kLaneColumns;

template <Wire kWire, class T>
class LaneEncoder {
 public:
  // hidden * sizeof(T) is a multiple of 16. Alignment: row 16 bytes, values 16 / sizeof(T), scales ScaleBytes.
  __host__ __device__ __forceinline__ LaneEncoder(const char* row, int hidden, char* values, char* scales, int lane,
                                                  int step)
      : row_(row), values_(values), scales_(scales), hidden_(hidden) {
    first_ = step * kStepColumns + lane * kLaneColumns;
    // In this order no two lanes that shared memory serves together want the same bank, in Load or in Store.
    const int swizzle = (kVectors == 4 ? lane / 2 + lane / 8 : lane + lane / 8) % kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) column_[i] = first_ + (i ^ swizzle) * kVectorColumns;
  }

  // Takes the lane's columns of a step; columns past the end of the row count as zeros, kWhole says there are none.
  template <bool kWhole>
  __host__ __device__ __forceinline__ void Load() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (kWhole || column_[i] < hidden_) {
        bits = *reinterpret_cast<const uint4*>(row_ + column_[i] * static_cast<int>(sizeof(T)));
      }
      x_[i][0] = bits.x, x_[i][1] = bits.y, x_[i][2] = bits.z, x_[i][3] = bits.w;
    }
  }

  // f32 bits of the largest magnitude loaded; anything above the finite numbers where one is inf or NaN.
  __host__ __device__ __forceinline__ uint32_t Amax() const {
    uint32_t max[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      max[i] = Source<T>::Max(Source<T>::Max(x_[i][0], x_[i][1]), Source<T>::Max(x_[i][2], x_[i][3]));
    }
#pragma unroll
    for (int distance = kVectors / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < distance; ++i) max[i] = Source<T>::Max(max[i], max[i + distance]);
    }
    return Source<T>::Magnitude(max[0]);
  }

  // Writes what was loaded as values, and the group's scale; `amax` is that of the whole group.
  template <bool kWhole>
  __host__ __device__ __forceinline__ void Store(uint32_t amax) {
    if (kWhole || first_ < hidden_) Store<kWhole>(ScaleOf<kWire>(amax));
  }
  template <bool kWhole>
  __host__ __device__ __forceinline__ void Store(const Scale& scale) {
    uint32_t codes[kVectors][kPerWord];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) EncodeVector<T>(x_[i], scale.inverse, codes[i]);
    if (!scale.finite) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) EncodeNans<T>(x_[i], codes[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!kWhole && column_[i] >= hidden_) continue;
      char* const place = values_ + column_[i];
      if constexpr (kPerWord == 2) {
        *reinterpret_cast<uint2*>(place) = make_uint2(codes[i][0], codes[i][1]);
      } else {
        *reinterpret_cast<uint32_t*>(place) = codes[i][0];
      }
    }
    constexpr uint32_t kGroup = GroupColumns(kWire);
    const uint32_t column = first_;
    if (column % kGroup != 0) return;
    if constexpr (kWire == Wire::kFp8) {
      *reinterpret_cast<uint32_t*>(scales_ + column / kGroup * 4) = scale.stored;
    } else {
      *reinterpret_cast<uint8_t*>(scales_ + column / kGroup) = static_cast<uint8_t>(scale.stored);
    }
  }

  __host__ __device__ __forceinline__ void Advance(int steps) {
    first_ += steps * kStepColumns;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) column_[i] += steps * kStepColumns;
  }

 private:
  static constexpr int kPerWord = Source<T>::kPerWord;
  static constexpr int kVectorColumns = 4 * kPerWord;
  static constexpr int kVectors = kLaneColumns / kVectorColumns;

  const char* row_;
  char* values_;
  char* scales_;
  int hidden_, first_;
  int column_[kVectors];  // of the vector that x_[i] holds
  uint32_t x_[kVectors][4];
};

// The group's, of a step that has been loaded.
template <Wire kWire, class T>
__device__ __forceinline__ uint32_t GroupAmax(const LaneEncoder<kWire, T>& lane) {
  uint32_t amax = lane.Amax();
#pragma unroll
  for (int distance = GroupColumns(kWire) / kLaneColumns / 2; distance > 0; distance /= 2) {
    amax = Greater(amax, __shfl_xor_sync(~0u, amax, distance));
  }
  return amax;
}

template <bool kWhole, Wire kWire, class T>
__device__ __forceinline__ void EncodeLoaded(LaneEncoder<kWire, T>& lane) {
  lane.template Store<kWhole>(GroupAmax(lane));
}

template <bool kWhole, Wire kWire, class T>
__device__ __forceinline__ void EncodeStep(LaneEncoder<kWire, T>& lane) {
  lane.template Load<kWhole>();
  EncodeLoaded<kWhole>(lane);
}

// The same address, known to be one of shared memory, so that loads and stores are that memory's. By conversion: of an
// assumption (__builtin_assume) that it takes for false a compiler makes unreachable code, and of the wait before it a
// loop without an end.
template <class T>
__device__ __forceinline__ T* InShared(T* pointer) {
  return static_cast<T*>(__cvta_shared_to_generic(__cvta_generic_to_shared(pointer)));
}

// Encodes T[hidden] at `row` into e4m3[hidden] at `values` and NumGroups scales at `scales`, all in shared memory.
// Called by one whole warp; several warps may share a row, each with its own `part`. What it wrote is visible to other
// threads after __syncwarp or __syncthreads, to bulk stores after FenceProxyAsyncShared as well.
template <Wire kWire, class T>
__device__ __forceinline__ void EncodeRow(const char* row, int hidden, char* values, char* scales, int part = 0,
                                          int num_parts = 1) {
  LaneEncoder<kWire, T> lane(InShared(row), hidden, InShared(values), InShared(scales), threadIdx.x % 32, part);
  int step = part;
  // Two steps side by side: what waits for the one is filled by the other.
  for (; (step + num_parts + 1) * kStepColumns <= hidden; step += 2 * num_parts) {
    LaneEncoder<kWire, T> next = lane;
    next.Advance(num_parts);
    lane.template Load<true>();
    next.template Load<true>();
    const uint32_t amax = GroupAmax(lane), next_amax = GroupAmax(next);
    const Scale scale = ScaleOf<kWire>(amax), next_scale = ScaleOf<kWire>(next_amax);
    lane.template Store<true>(scale);
    next.template Store<true>(next_scale);
    lane.Advance(2 * num_parts);
  }
  for (; (step + 1) * kStepColumns <= hidden; step += num_parts) {
    EncodeStep<true>(lane);
    lane.Advance(num_parts);
  }
  if (step * kStepColumns < hidden) EncodeStep<false>(lane);
}

}  // namespace jax_ep
