// What the links of this host give to kernels: every GPU pushes to all others at once, as plain stores and as bulk
// copies. Prints "SMs GB/s" a line, the better of the two, GB/s leaving each GPU: the ceiling that benchmarks divide
// by.
//
//   nvcc -O3 -std=c++17 -Iffi -gencode arch=compute_90a,code=sm_90a benchmarks/p2p_ceiling.cu -o p2p_ceiling &&
//   ./p2p_ceiling 8 12 24
#include <algorithm>
#include <cstdio>
#include <cstdlib>
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

constexpr int kMaxGpus = 8, kRowBytes = 7168, kWarps = 7, kStages = 4;
constexpr size_t kBytesPerPeer = size_t{7168} * 37449;  // 256 MB

struct Pointers {
  char* of[kMaxGpus];
};

__global__ void __launch_bounds__(1024) PushStores(const char* source, Pointers target, int me, int n) {
  const int num_peers = n - 1, index = blockIdx.x % num_peers, peer = (me + 1 + index) % n;
  const size_t blocks = (gridDim.x - index + num_peers - 1) / num_peers, stride = blocks * blockDim.x,
               count = kBytesPerPeer / 16;
  const auto* in = reinterpret_cast<const int4*>(source + peer * kBytesPerPeer);
  auto* out = reinterpret_cast<int4*>(target.of[peer] + me * kBytesPerPeer);
  size_t i = static_cast<size_t>(blockIdx.x / num_peers) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const int4 a = __ldcs(in + i), b = __ldcs(in + i + stride), c = __ldcs(in + i + 2 * stride),
               d = __ldcs(in + i + 3 * stride);
    out[i] = a, out[i + stride] = b, out[i + 2 * stride] = c, out[i + 3 * stride] = d;
  }
  for (; i < count; i += stride) out[i] = in[i];
}

__global__ void PushBulk(const char* source, Pointers target, int me, int n) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[kWarps][kStages];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  char* stage = shared + warp * kStages * kRowBytes;
  for (int s = 0; s < kStages; ++s) jax_ep::InitMbarrier(&full[warp][s]);
  jax_ep::FenceMbarrierInit();
  const long rows = kBytesPerPeer / kRowBytes, total = rows * (n - 1), step = static_cast<long>(gridDim.x) * kWarps;
  const auto peer_of = [&](long i) { return (me + 1 + static_cast<int>(i % (n - 1))) % n; };
  const auto load = [&](long i, int s) {
    if (i >= total) return;
    jax_ep::ExpectBytes(&full[warp][s], kRowBytes);
    jax_ep::BulkLoad(stage + s * kRowBytes, source + (peer_of(i) * rows + i / (n - 1)) * kRowBytes, kRowBytes,
                     &full[warp][s]);
  };
  const long first = static_cast<long>(blockIdx.x) * kWarps + warp;
  for (int s = 0; s + 1 < kStages; ++s) load(first + s * step, s);
  long count = 0;
  for (long i = first; i < total; i += step, ++count) {
    const int s = count % kStages;
    jax_ep::WaitMbarrier(&full[warp][s], count / kStages % 2);
    jax_ep::BulkStore(target.of[peer_of(i)] + (me * rows + i / (n - 1)) * kRowBytes, stage + s * kRowBytes, kRowBytes);
    jax_ep::CommitBulkGroup();
    jax_ep::WaitBulkRead<1>();
    load(i + (kStages - 1) * step, (count + kStages - 1) % kStages);
  }
  jax_ep::WaitBulkDone<0>();
}

// Slowest GPU's milliseconds a launch.
template <class F>
float Time(int n, const std::vector<cudaStream_t>& stream, F launch) {
  constexpr int kWarmUps = 3, kLaunches = 10;
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
  if (n < 2) return std::fprintf(stderr, "needs two GPUs\n"), 1;
  std::vector<cudaStream_t> stream(n);
  Pointers source{}, target{};
  for (int i = 0; i < n; ++i) {
    CHECK_CUDA(cudaSetDevice(i));
    for (int peer = 0; peer < n; ++peer) {
      if (peer != i) CHECK_CUDA(cudaDeviceEnablePeerAccess(peer, 0));
    }
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream[i], cudaStreamNonBlocking));
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&source.of[i]), kBytesPerPeer * n));
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&target.of[i]), kBytesPerPeer * n));
    CHECK_CUDA(cudaMemset(source.of[i], i + 1, kBytesPerPeer * n));
    CHECK_CUDA(
        cudaFuncSetAttribute(PushBulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kWarps * kStages * kRowBytes));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  std::vector<int> sms;
  for (int i = 1; i < argc; ++i) sms.push_back(std::atoi(argv[i]));
  if (sms.empty()) sms = {4, 8, 12, 16, 20, 24, 32, 64, 132};
  for (int blocks : sms) {
    const float stores =
        Time(n, stream, [&](int i) { PushStores<<<blocks, 1024, 0, stream[i]>>>(source.of[i], target, i, n); });
    const float bulk = Time(n, stream, [&](int i) {
      PushBulk<<<blocks, 32 * kWarps, kWarps * kStages * kRowBytes, stream[i]>>>(source.of[i], target, i, n);
    });
    const double gigabytes = kBytesPerPeer * (n - 1) / 1e9;
    std::printf("%d %.1f\n", blocks, gigabytes / std::min(stores, bulk) * 1e3);
    std::fprintf(stderr, "%3d SMs: stores %.1f, bulk %.1f GB/s leaving each of %d GPUs\n", blocks,
                 gigabytes / stores * 1e3, gigabytes / bulk * 1e3, n);
    std::fflush(stdout);
  }
  return 0;
}
