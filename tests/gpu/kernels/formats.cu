// The wire formats' device code against the reference: test_formats.py writes the reference's answers to a file.
//
//   formats host FILE      the lanes one after another on the host; needs no GPU
//   formats device FILE    on the GPU, two warps a row; every division as well
//   formats ranges         on the host, the code of every boundary in the ranges of a logfmt10 group
//
// FILE: cases of int32 {format, dtype, rows, hidden} (format: a Wire, or 3 for logfmt10; dtype: bf16, f16, f32), then
// arrays as they lie in memory. Quantized: x, values, scales. logfmt10: x, what arrives, codes u16[rows, hidden],
// encoded u8[rows, pieces].
//
// nvcc -O3 -std=c++17 -Iffi -gencode arch=compute_90a,code=sm_90a -o formats tests/gpu/kernels/formats.cu
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "device/ptx.cuh"
#include "logfmt_host.h"

using namespace jax_ep;

namespace {

#define CHECK_CUDA(call)                                                                    \
  do {                                                                                      \
    const cudaError_t error_ = (call);                                                      \
    if (error_ != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(2);                                                                         \
    }                                                                                       \
  } while (0)

using Bytes = std::vector<char>;
constexpr int kLogfmt = 3;

struct Case {
  int format, dtype, rows, hidden;
  int item() const { return dtype == 2 ? 4 : 2; }
  int pieces() const { return (hidden + LogfmtPieceColumns(hidden) - 1) / LogfmtPieceColumns(hidden); }
};

int g_wrong = 0;

void Compare(const Case& c, const char* what, const Bytes& got, const Bytes& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i]) continue;
    ++g_wrong;
    std::printf("format %d dtype %d hidden %d: %s differs first at byte %zu of row %zu: %02x, not %02x\n", c.format,
                c.dtype, c.hidden, what, i % (want.size() / c.rows), i / (want.size() / c.rows),
                static_cast<uint8_t>(got[i]), static_cast<uint8_t>(want[i]));
    return;
  }
}

// ---- quantized rows. Aligned places, poisoned, so that a byte written past the end of a row shows.

constexpr __host__ __device__ int RoundUp(int bytes) { return (bytes + 63) / 64 * 64; }

template <Wire kWire, class T>
struct Place {
  explicit __host__ __device__ Place(int hidden)
      : values(RoundUp(hidden * static_cast<int>(sizeof(T)))),
        scales(values + RoundUp(hidden + 1)),
        bytes(scales + RoundUp(NumGroups(kWire, hidden) * ScaleBytes(kWire) + 1)) {}
  int values, scales, bytes;
};

template <Wire kWire, class T>
void EncodeOnHost(const Case& c, const char* x, char* out) {
  const Place<kWire, T> place(c.hidden);
  for (int row = 0; row < c.rows; ++row) {
    char* const here = out + static_cast<int64_t>(row) * place.bytes;
    std::memcpy(here, x + static_cast<int64_t>(row) * c.hidden * sizeof(T), c.hidden * sizeof(T));
    for (int step = 0; step * kStepColumns < c.hidden; ++step) {
      const bool whole = (step + 1) * kStepColumns <= c.hidden;
      std::vector<LaneEncoder<kWire, T>> lanes;
      uint32_t amax[32];
      for (int i = 0; i < 32; ++i) {
        lanes.emplace_back(here, c.hidden, here + place.values, here + place.scales, i, step % 2);
        lanes[i].Advance(step - step % 2);
        whole ? lanes[i].template Load<true>() : lanes[i].template Load<false>();
        amax[i] = lanes[i].Amax();
      }
      constexpr int kLanes = GroupColumns(kWire) / kLaneColumns;
      for (int i = 0; i < 32; ++i) {
        uint32_t most = 0;
        for (int j = i / kLanes * kLanes; j < (i / kLanes + 1) * kLanes; ++j) most = Greater(most, amax[j]);
        whole ? lanes[i].template Store<true>(most) : lanes[i].template Store<false>(most);
      }
    }
  }
}

// One block a row, two warps that share it.
template <Wire kWire, class T>
__global__ void EncodeKernel(int hidden, const char* x, char* out) {
  extern __shared__ __align__(128) char shared[];
  const Place<kWire, T> place(hidden);
  out += static_cast<int64_t>(blockIdx.x) * place.bytes;
  x += static_cast<int64_t>(blockIdx.x) * hidden * sizeof(T);
  for (int i = threadIdx.x; i < place.bytes; i += blockDim.x) shared[i] = out[i];
  __syncthreads();
  for (int i = threadIdx.x; i < hidden * static_cast<int>(sizeof(T)); i += blockDim.x) shared[i] = x[i];
  __syncthreads();
  EncodeRow<kWire, T>(shared, hidden, shared + place.values, shared + place.scales, threadIdx.x / 32, blockDim.x / 32);
  __syncthreads();
  for (int i = threadIdx.x; i < place.bytes; i += blockDim.x) out[i] = shared[i];
}

template <class T>
T* ToDevice(const std::vector<T>& host) {
  void* p = nullptr;
  CHECK_CUDA(cudaMalloc(&p, host.size() * sizeof(T)));
  CHECK_CUDA(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(p);
}

template <class T>
void ToHost(std::vector<T>& host, T* device) {
  CHECK_CUDA(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
  CHECK_CUDA(cudaFree(device));
}

template <Wire kWire, class T>
void CheckQuantized(const Case& c, bool on_device, const Bytes& x, const Bytes& values, const Bytes& scales) {
  const Place<kWire, T> place(c.hidden);
  Bytes out(static_cast<int64_t>(c.rows) * place.bytes, 0x55);
  if (on_device) {
    char *const d_x = ToDevice(x), *const d_out = ToDevice(out);
    CHECK_CUDA(cudaFuncSetAttribute(EncodeKernel<kWire, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, place.bytes));
    EncodeKernel<kWire, T><<<c.rows, 64, place.bytes>>>(c.hidden, d_x, d_out);
    CHECK_CUDA(cudaGetLastError());
    ToHost(out, d_out);
    CHECK_CUDA(cudaFree(d_x));
  } else {
    EncodeOnHost<kWire, T>(c, x.data(), out.data());
  }
  const int groups = NumGroups(kWire, c.hidden) * ScaleBytes(kWire);
  Bytes got_values, got_scales;
  int past = 0;
  for (int row = 0; row < c.rows; ++row) {
    const char* const here = &out[static_cast<int64_t>(row) * place.bytes];
    got_values.insert(got_values.end(), here + place.values, here + place.values + c.hidden);
    got_scales.insert(got_scales.end(), here + place.scales, here + place.scales + groups);
    for (int i = place.values + c.hidden; i < place.scales; ++i) past += here[i] != 0x55;
    for (int i = place.scales + groups; i < place.bytes; ++i) past += here[i] != 0x55;
  }
  Compare(c, "values", got_values, values);
  Compare(c, "scales", got_scales, scales);
  if (past > 0)
    std::printf("format %d dtype %d hidden %d: writes past a row\n", c.format, c.dtype, c.hidden), ++g_wrong;
}

// ---- logfmt10

// One warp a block; block x is a row, y a step.
template <class T>
__global__ void LogfmtKernel(Case c, int piece_columns, const char* x, LogfmtStep<T>* out) {
  __shared__ LogTable logs;
  __shared__ ExpTable exps;
  FillTable(&logs);
  FillTable(&exps);
  __syncthreads();
  out += blockIdx.x * gridDim.y + blockIdx.y;
  const int lane = threadIdx.x;
  LogfmtLane<T> words;
  const int columns =
      LoadLogfmtLane(x + blockIdx.x * c.hidden * static_cast<int64_t>(sizeof(T)), c.hidden, blockIdx.y, lane, &words);
  uint32_t codes[kLogfmtLaneWords], amax, amin;
  const bool encoded = EncodePieces<T>(words, columns, piece_columns, logs, codes, &amax, &amin);
  out->encoded[lane] = encoded;
  for (int i = 0; i < kLogfmtLaneWords; ++i) out->codes[lane][i] = codes[i];
  out->arrived[lane] = encoded ? DecodeLane<T>(codes, amax, amin, logs, exps) : words;
}

template <class T>
void CheckLogfmt(const Case& c, bool on_device, const Bytes& x, const Bytes& arrived, const Bytes& codes,
                 const Bytes& encoded) {
  const int steps = (c.hidden + kStepColumns - 1) / kStepColumns;
  std::vector<LogfmtStep<T>> out(static_cast<int64_t>(c.rows) * steps);
  if (on_device) {
    char* const d_x = ToDevice(x);
    LogfmtStep<T>* const d_out = ToDevice(out);
    LogfmtKernel<T><<<dim3(c.rows, steps), 32>>>(c, LogfmtPieceColumns(c.hidden), d_x, d_out);
    CHECK_CUDA(cudaGetLastError());
    ToHost(out, d_out);
    CHECK_CUDA(cudaFree(d_x));
  } else {
    for (int i = 0; i < c.rows * steps; ++i)
      LogfmtOnHost(&x[i / steps * c.hidden * static_cast<int64_t>(sizeof(T))], c.hidden, i % steps, &out[i]);
  }
  Bytes got_arrived(arrived.size()), got_codes(codes.size()), got_encoded(encoded.size());
  for (int row = 0; row < c.rows; ++row) {
    for (int column = 0; column < c.hidden; ++column) {
      const LogfmtStep<T>& step = out[row * steps + column / kStepColumns];
      const int lane = column % kStepColumns / kLaneColumns, i = column % kLaneColumns, bit = 10 * i;
      const int64_t at = static_cast<int64_t>(row) * c.hidden + column;
      const bool is_encoded = step.encoded[lane];
      got_encoded[row * c.pieces() + column / LogfmtPieceColumns(c.hidden)] = is_encoded;
      const uint32_t* const words = step.codes[lane] + bit / 32;
      const uint64_t two =
          bit / 32 + 1 < kLogfmtLaneWords ? words[0] | static_cast<uint64_t>(words[1]) << 32 : words[0];
      const uint16_t code = is_encoded ? two >> bit % 32 & 0x3FF : 0;
      std::memcpy(&got_codes[at * 2], &code, 2);
      const char* const from = reinterpret_cast<const char*>(step.arrived[lane].x) + i * sizeof(T);
      std::memcpy(&got_arrived[at * sizeof(T)], from, sizeof(T));
    }
  }
  Compare(c, "encoded", got_encoded, encoded);
  Compare(c, "codes", got_codes, codes);
  Compare(c, "what arrives", got_arrived, arrived);
}

// ---- divisions

__global__ void DivideKernel(int* wrong) {
  const uint32_t mantissa = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t exponent = kAmaxFloor >> 23; exponent < 255; ++exponent) {
    const uint32_t bits = exponent << 23 | mantissa;
    if (bits < kAmaxFloor) continue;
    const float a = AsFloat(bits);
    if (DivideBy448(bits) != __fdiv_rn(a, 448.f) || Divide448By(bits) != __fdiv_rn(448.f, a)) atomicAdd(wrong, 1);
  }
}

void CheckDivisions() {
  std::vector<int> wrong(1, 0);
  int* const d_wrong = ToDevice(wrong);
  DivideKernel<<<(1 << 23) / 256, 256>>>(d_wrong);
  CHECK_CUDA(cudaGetLastError());
  ToHost(wrong, d_wrong);
  if (wrong[0] > 0) std::printf("%d divisions by or of 448 are not correctly rounded\n", wrong[0]), ++g_wrong;
}

// Rounding of factors must never show: every code's boundary, and the step before it, of this range.
void CheckRange(int range) {
  const LogScale scale{1 << 16, range};
  const CodeRule rule = CodeRuleOf(scale);
  const int64_t bias = 3 * static_cast<int64_t>(range) / 2 - static_cast<int64_t>(range / 64) * (range / 64) / 94180;
  const uint64_t exact = ((510ull << rule.shift) + range - 1) / range;
  bool wrong = rule.factor != exact;
  for (int64_t code = 1; code <= 511; ++code) {
    const int64_t first = (code * range - bias) / 510;
    for (int64_t distance = first - 2; distance <= first + 2; ++distance) {
      if (distance > range || (distance < 0 && range < kWidest)) continue;  // only then is lmin not the least
      const int64_t log = scale.lmin + distance, numerator = 510 * distance + bias;
      const uint64_t far = log > rule.least ? log - rule.least : 0;
      const int64_t got = static_cast<int64_t>(static_cast<uint32_t>((far * rule.factor + rule.offset) >> rule.shift));
      wrong = wrong || got != (numerator < 0 ? 0 : numerator / range);
    }
    const ValueRule value = ValueRuleOf(scale);
    const uint64_t log = (16ull * code * value.step + value.start) >> 23;
    wrong = wrong || log != static_cast<uint64_t>(scale.lmin + ((code - 1) * range + 255) / 510);
  }
  if (wrong && ++g_wrong <= 5) std::printf("range %d: codes or values are rounded wrongly\n", range);
}

Bytes Read(std::ifstream& file, int64_t count) {
  Bytes bytes(count);
  if (!file.read(bytes.data(), count)) std::printf("the file ends early\n"), std::exit(2);
  return bytes;
}

template <class T>
void CheckCase(const Case& c, bool on_device, std::ifstream& file) {
  const int64_t count = static_cast<int64_t>(c.rows) * c.hidden;
  const Bytes x = Read(file, count * c.item());
  if (c.format == kLogfmt) {
    const Bytes arrived = Read(file, count * c.item()), codes = Read(file, count * 2);
    return CheckLogfmt<T>(c, on_device, x, arrived, codes, Read(file, static_cast<int64_t>(c.rows) * c.pieces()));
  }
  const Wire wire = static_cast<Wire>(c.format);
  const Bytes values = Read(file, count);
  const Bytes scales = Read(file, static_cast<int64_t>(c.rows) * NumGroups(wire, c.hidden) * ScaleBytes(wire));
  if (wire == Wire::kFp8) CheckQuantized<Wire::kFp8, T>(c, on_device, x, values, scales);
  if (wire == Wire::kFp8Ue8m0) CheckQuantized<Wire::kFp8Ue8m0, T>(c, on_device, x, values, scales);
  if (wire == Wire::kMxfp8) CheckQuantized<Wire::kMxfp8, T>(c, on_device, x, values, scales);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string where = argc > 1 ? argv[1] : "";
  if (where == "ranges") {
    for (int range = 1; range <= kWidest; range += range < 5000 || range > kWidest - 100 ? 1 : 97) CheckRange(range);
    return g_wrong > 0;
  }
  if ((where != "host" && where != "device") || argc != 3) {
    std::printf("usage: formats host|device FILE, formats ranges\n");
    return 2;
  }
  const bool on_device = where == "device";
  std::ifstream file(argv[2], std::ios::binary);
  int num_cases = 0;
  for (Case c; file.read(reinterpret_cast<char*>(&c), sizeof(c)); ++num_cases) {
    if (c.dtype == 0) CheckCase<__nv_bfloat16>(c, on_device, file);
    if (c.dtype == 1) CheckCase<__half>(c, on_device, file);
    if (c.dtype == 2) CheckCase<float>(c, on_device, file);
  }
  if (on_device) CheckDivisions();
  if (num_cases == 0 || g_wrong > 0) {
    std::printf("%d checks of %d cases failed\n", g_wrong, num_cases);
    return 1;
  }
  std::printf("%d cases on the %s: every bit as the reference\n", num_cases, where.c_str());
  return 0;
}
