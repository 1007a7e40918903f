// When the blocks of the last dispatch on a device reached its moments, for `low_latency clocks`
// (tests/gpu/kernels/low_latency.cu). Only with -DJAX_EP_CLOCKS; else Mark is nothing.
#pragma once

#include <cstdint>

namespace jax_ep {

enum class Moment : int {
  kBegan,
  kEpochKnown,
  kTableSent,
  kTablesHere,
  kPlacesKnown,
  kRowsSent,
  kJoined,
  kLastJob,
  kLeft,
  kCount
};
constexpr const char* kMomentNames[] = {"began",     "epoch known",  "table sent",    "tables here", "places known",
                                        "rows sent", "senders join", "last job done", "left"};

constexpr int kClockBlocks = 256, kNumMoments = static_cast<int>(Moment::kCount);

#ifdef JAX_EP_CLOCKS
static __device__ unsigned long long g_clocks[kClockBlocks][kNumMoments];

// The latest warp's time counts.
__device__ __forceinline__ void Mark(Moment moment) {
  if (threadIdx.x % 32 != 0 || blockIdx.x >= kClockBlocks) return;
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  unsigned long long* const clocks = g_clocks[blockIdx.x];
  if (moment == Moment::kBegan) {
    if (threadIdx.x == 0) clocks[0] = now;
  } else {
    atomicMax(&clocks[static_cast<int>(moment)], now);
  }
}

// Of the current device: [kClockBlocks][kNumMoments] ns, 0 where nothing was marked.
cudaError_t ReadDispatchClocks(unsigned long long* clocks);
#else
__device__ __forceinline__ void Mark(Moment) {}
#endif

}  // namespace jax_ep
