// The frame of the combine kernels, all but what their workers do: that is in combine.cu and combine_rows.cu, which
// have the same protocol with the peers. docs/protocol.md draws it.
//
//   warps         role        waits for                      signals
//   all but last  worker      peers' progress (sums only)    shared.next, its place in the block's list of items
//   last          publisher   shared.next of all workers     progress in every rank's window; then leaves
//
// A worker has told of all its pushes so far when it waits for peers, who may be waiting for them.
// Neighbours: lane.cuh, how a block meets the peers and leaves; clear.cuh, the results of a call that failed.
#pragma once

#include "combine/clear.cuh"
#include "combine/combine.h"
#include "combine/lane.cuh"
#include "device/wait.cuh"

namespace jax_ep {

constexpr int kWorkers = 15, kThreads = 32 * (kWorkers + 1), kLag = 2;
constexpr uint32_t kNoItem = ~0u;

// What a rank posts of its arrays.
enum Address { kY, kScratch, kCarried, kNumCombineAddresses };

struct CombineShared {
  uint64_t address[kMaxRanks][kNumCombineAddresses];
  uint32_t next[kWorkers];  // all items of the worker before this one are done; kNoItem: all
};

// The list of items of a block: num_steps + lag steps of num_pushes pushes and num_groups sums. A step is a token of
// every rank: first the sums to be pushed there, then the sum of this rank's own token of `lag` steps before, for which
// the peers have pushed meanwhile. A row is num_groups items of group_bytes. Worker w has items w, w + kWorkers, ...
struct Steps {
  int num_steps, num_groups, group_bytes, num_pushes, items_per_step, lag;

  __device__ Steps(int num_steps, int num_groups, int group_bytes, int num_pushes)
      : num_steps(num_steps),
        num_groups(num_groups),
        group_bytes(group_bytes),
        num_pushes(num_pushes),
        items_per_step(num_pushes + num_groups),
        // A few times what the workers are busy with: ranks do not run in step, and a worker that waits pushes nothing.
        lag(num_pushes > 0 ? kLag * kWorkers / items_per_step + 4 : 0) {}

  __device__ uint32_t num_items() const {
    return num_steps > 0 ? static_cast<uint32_t>(num_steps + lag) * items_per_step : 0;
  }
};

// All items of this worker before item `index` are done. Called by the whole worker; PublishSteps acquires it.
__device__ __forceinline__ void TellPublisher(CombineShared& shared, uint32_t index) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) StoreReleaseShared(&shared.next[threadIdx.x / 32], index);
}

// Carries the workers' progress into the windows of all ranks, then leaves the lane. Called by the last warp.
__device__ __forceinline__ void PublishSteps(const Call& call, const Steps& steps, CombineShared& shared, bool met) {
  const int lane = threadIdx.x % 32;
  uint32_t published = 0;
  while (met) {
    const uint32_t next = __reduce_min_sync(~0u, lane < kWorkers ? LoadAcquireShared(&shared.next[lane]) : kNoItem);
    if (next == kNoItem) break;
    // All items before `next` are done; the sums of a step come last and need not be.
    const uint32_t pushed =
        min((next + steps.num_groups) / steps.items_per_step, static_cast<uint32_t>(steps.num_steps));
    if (steps.num_pushes == 0 || pushed == published) {
      __nanosleep(100);
      continue;
    }
    TellPeers(call, pushed);
    published = pushed;
  }
  LeaveLane(call, met);
}

// A block of a combine, by all its threads. `work` does the items of one worker, and tells the publisher.
template <class Work>
__device__ __forceinline__ void RunCombine(const CombineParams& p, const Call& call, const Steps& steps,
                                           CombineShared& shared, const Work& work) {
  if (threadIdx.x < kWorkers) shared.next[threadIdx.x] = threadIdx.x;
  bool met = TakesPart(call, p.refused);
  if (met && threadIdx.x < 32) {
    PostAddresses(call, {p.y, p.scratch, p.carried});  // as in Address
    met = MeetPeers(call, shared.address);
  }
  met = __syncthreads_and(met);
  if (threadIdx.x / 32 < kWorkers) {
    if (met) work();
  } else {
    PublishSteps(call, steps, shared, met);
  }
  EndLane(call, [&] { ClearResults(p, threadIdx.x, kThreads); });
}

}  // namespace jax_ep
