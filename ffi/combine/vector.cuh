// 16 bytes of a row as f32, and back. Products are rounded before they are added: the contract's arithmetic has no FMA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_ep {

template <class T>
struct Vector;

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kSize = 8;
  __device__ static void Unpack(const int4& bits, float (&values)[kSize]) {
    const uint32_t words[4] = {uint32_t(bits.x), uint32_t(bits.y), uint32_t(bits.z), uint32_t(bits.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ static int4 Pack(const float (&values)[kSize]) {
    int4 bits;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __float22bfloat162_rn(make_float2(values[2 * i], values[2 * i + 1]));
    return bits;
  }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  __device__ static void Unpack(const int4& bits, float (&values)[kSize]) {
    const auto* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  __device__ static int4 Pack(const float (&values)[kSize]) {
    int4 bits;
    auto* pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __float22half2_rn(make_float2(values[2 * i], values[2 * i + 1]));
    return bits;
  }
};

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  __device__ static void Unpack(const int4& bits, float (&values)[kSize]) {
    values[0] = __int_as_float(bits.x), values[1] = __int_as_float(bits.y);
    values[2] = __int_as_float(bits.z), values[3] = __int_as_float(bits.w);
  }
  __device__ static int4 Pack(const float (&values)[kSize]) {
    return make_int4(__float_as_int(values[0]), __float_as_int(values[1]), __float_as_int(values[2]),
                     __float_as_int(values[3]));
  }
};

// From L2: rows are read once, and some were written by peers while this kernel ran.
__device__ __forceinline__ int4 LoadRow(const char* row) { return __ldcg(reinterpret_cast<const int4*>(row)); }

// sum += y, or sum += round(weight * y).
template <class T, bool kWeighted>
__device__ __forceinline__ void Accumulate(float (&sum)[Vector<T>::kSize], const int4& bits, float weight) {
  float values[Vector<T>::kSize];
  Vector<T>::Unpack(bits, values);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    sum[i] = __fadd_rn(sum[i], kWeighted ? __fmul_rn(weight, values[i]) : values[i]);
  }
}

}  // namespace jax_ep
