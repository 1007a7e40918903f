// What the links of this host give to kernels: every GPU pushes rows to all others at once, as plain stores and as bulk
// copies with few and with many rows in flight. Prints "SMs bytes GB/s" a line, bytes those of a row, GB/s leaving each
// GPU the best of the ways: the ceiling that benchmarks divide by. benchmarks/kernels.py builds and runs it.
//
//   p2p_ceiling [gpus=N] [rows=BYTES,BYTES] [SMs ...]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device/ptx.cuh"

namespace {

#define CHECK_CUDA(call)                                                                  \
  do {                                                                                    \
    const cudaError_t error_ = (call);                                                    \
    if (error_ != cudaSuccess) {                                                          \
      std::fprintf(stderr, "%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(error_)); \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (0)

constexpr int kMaxGpus = 8, kMaxWarps = 7, kMaxStages = 8, kMaxSharedBytes = 200704;
constexpr size_t kBytes = size_t{1} << 28;  // leave each GPU, in equal parts to its peers

struct Pointers {
  char* of[kMaxGpus];
};

__global__ void __launch_bounds__(1024) PushStores(const char* source, Pointers target, int me, int n, size_t bytes) {
  const int num_peers = n - 1, index = blockIdx.x % num_peers, peer = (me + 1 + index) % n;
  const size_t blocks = (gridDim.x - index + num_peers - 1) / num_peers, stride = blocks * blockDim.x,
               count = bytes / 16;
  const auto* in = reinterpret_cast<const int4*>(source + peer * bytes);
  auto* out = reinterpret_cast<int4*>(target.of[peer] + me * bytes);
  size_t i = static_cast<size_t>(blockIdx.x / num_peers) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const int4 a = __ldcs(in + i), b = __ldcs(in + i + stride), c = __ldcs(in + i + 2 * stride),
               d = __ldcs(in + i + 3 * stride);
    out[i] = a, out[i + stride] = b, out[i + 2 * stride] = c, out[i + 3 * stride] = d;
  }
  for (; i < count; i += stride) out[i] = in[i];
}

// Warps of one lane each, `stages` rows of shared memory a warp, all but one of them being loaded.
__global__ void PushBulk(const char* source, Pointers target, int me, int n, size_t bytes, int row_bytes, int stages) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[kMaxWarps][kMaxStages];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  char* stage = shared + warp * stages * row_bytes;
  for (int s = 0; s < stages; ++s) jax_ep::InitMbarrier(&full[warp][s]);
  jax_ep::FenceMbarrierInit();
  const long rows = bytes / row_bytes, total = rows * (n - 1), step = gridDim.x * (blockDim.x / 32l);
  const auto peer_of = [&](long i) { return (me + 1 + static_cast<int>(i % (n - 1))) % n; };
  const auto load = [&](long i, int s) {
    if (i >= total) return;
    jax_ep::ExpectBytes(&full[warp][s], row_bytes);
    jax_ep::BulkLoad(stage + s * row_bytes, source + (peer_of(i) * rows + i / (n - 1)) * row_bytes, row_bytes,
                     &full[warp][s]);
  };
  const long first = static_cast<long>(blockIdx.x) * (blockDim.x / 32) + warp;
  for (int s = 0; s + 1 < stages; ++s) load(first + s * step, s);
  long count = 0;
  for (long i = first; i < total; i += step, ++count) {
    const int s = count % stages;
    jax_ep::WaitMbarrier(&full[warp][s], count / stages % 2);
    jax_ep::BulkStore(target.of[peer_of(i)] + (me * rows + i / (n - 1)) * row_bytes, stage + s * row_bytes, row_bytes);
    jax_ep::CommitBulkGroup();
    jax_ep::WaitBulkRead<1>();
    load(i + (stages - 1) * step, (count + stages - 1) % stages);
  }
  jax_ep::WaitBulkDone<0>();
}

// Slowest GPU's milliseconds a launch.
template <class F>
float Time(int n, const std::vector<cudaStream_t>& stream, F launch) {
  constexpr int kWarmUps = 2, kLaunches = 8;
  std::vector<cudaEvent_t> begin(n), end(n);
  for (int k = 0; k < kWarmUps + kLaunches; ++k) {
    for (int i = 0; i < n; ++i) {
      CHECK_CUDA(cudaSetDevice(i));
      if (k == kWarmUps) {
        CHECK_CUDA(cudaEventCreate(&begin[i]));
        CHECK_CUDA(cudaEventRecord(begin[i], stream[i]));
      }
      launch(i);
      CHECK_CUDA(cudaGetLastError());
    }
  }
  float slowest = 0;
  for (int i = 0; i < n; ++i) {
    CHECK_CUDA(cudaSetDevice(i));
    CHECK_CUDA(cudaEventCreate(&end[i]));
    CHECK_CUDA(cudaEventRecord(end[i], stream[i]));
  }
  for (int i = 0; i < n; ++i) {
    CHECK_CUDA(cudaSetDevice(i));
    CHECK_CUDA(cudaStreamSynchronize(stream[i]));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, begin[i], end[i]));
    slowest = std::max(slowest, ms / kLaunches);
  }
  return slowest;
}

}  // namespace

int main(int argc, char** argv) {
  int n = 0;
  CHECK_CUDA(cudaGetDeviceCount(&n));
  n = std::min(n, kMaxGpus);
  std::vector<int> sms, rows;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "gpus=", 5) == 0) {
      n = std::min(n, std::atoi(argv[i] + 5));
    } else if (std::strncmp(argv[i], "rows=", 5) == 0) {
      for (const char* at = argv[i] + 5; *at != '\0'; at += std::strcspn(at, ","), at += *at == ',') {
        rows.push_back(std::atoi(at));
      }
    } else {
      sms.push_back(std::atoi(argv[i]));
    }
  }
  if (n < 2) return std::fprintf(stderr, "needs two GPUs\n"), 1;
  if (sms.empty()) sms = {4, 8, 12, 16, 20, 24, 32, 64, 132};
  if (rows.empty()) rows = {7168};
  for (int bytes : rows) {
    if (bytes < 16 || bytes % 16 != 0 || 2 * bytes > kMaxSharedBytes) {
      return std::fprintf(stderr, "rows must be multiples of 16 bytes up to %d, got %d\n", kMaxSharedBytes / 2, bytes),
             1;
    }
  }
  const size_t bytes_per_peer = kBytes / (n - 1) / 16 * 16;
  std::vector<cudaStream_t> stream(n);
  Pointers source{}, target{};
  for (int i = 0; i < n; ++i) {
    CHECK_CUDA(cudaSetDevice(i));
    for (int peer = 0; peer < n; ++peer) {
      if (peer != i) CHECK_CUDA(cudaDeviceEnablePeerAccess(peer, 0));
    }
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream[i], cudaStreamNonBlocking));
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&source.of[i]), bytes_per_peer * n));
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&target.of[i]), bytes_per_peer * n));
    CHECK_CUDA(cudaMemset(source.of[i], i + 1, bytes_per_peer * n));
    CHECK_CUDA(cudaFuncSetAttribute(PushBulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  for (int blocks : sms) {
    double stores = 0;  // a block writes to one peer
    if (blocks >= n - 1) {
      stores = bytes_per_peer * (n - 1) / 1e6 / Time(n, stream, [&](int i) {
                 PushStores<<<blocks, 1024, 0, stream[i]>>>(source.of[i], target, i, n, bytes_per_peer);
               });
    }
    for (int bytes : rows) {
      double best = stores;
      std::fprintf(stderr, "%3d SMs, rows of %5d: stores %.1f", blocks, bytes, best);
      for (int warps : {1, 2, 3, kMaxWarps}) {
        // Just enough in flight fills a link; more makes the receivers' links clog.
        for (int in_flight : {43008, 86016, kMaxSharedBytes}) {
          const int stages = std::min(in_flight / warps / bytes, kMaxStages);
          if (stages < 2) continue;
          const float bulk = Time(n, stream, [&](int i) {
            PushBulk<<<blocks, 32 * warps, warps * stages * bytes, stream[i]>>>(source.of[i], target, i, n,
                                                                                bytes_per_peer, bytes, stages);
          });
          const double moved = static_cast<double>(bytes_per_peer / bytes) * bytes * (n - 1);
          std::fprintf(stderr, ", %dx%d %.1f", warps, stages, moved / 1e6 / bulk);
          best = std::max(best, moved / 1e6 / bulk);
        }
      }
      std::fprintf(stderr, " GB/s leaving each of %d GPUs\n", n);
      std::printf("%d %d %.1f\n", blocks, bytes, best);
      std::fflush(stdout);
    }
  }
  return 0;
}
