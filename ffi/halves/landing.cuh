// The windows of halves on the device: where parts lie, how a stage begins, how a done acquires what peers have pushed
// and gives the window back. Neighbours: group/landing.h is the layout, push.cc the push, low_latency/call.cuh the
// calls.
#pragma once

#include "group/landing.h"
#include "halves/halves.h"
#include "low_latency/call.cuh"

namespace jax_ep {

constexpr int kHalfWarps = 12, kHalfThreads = 32 * kHalfWarps;  // three a scheduler: 168 registers a thread

// What the kernels of a half are told; `call` as BeginArenaCall takes it.
template <class Params>
struct HalfWork {
  Params params;
  LowLatencyParams call;
  int slot;  // of a start: the window that the push of this call takes, see Fork
  LandingLayout layout;
  int num_groups;       // that a row is cut into, for the warps of a block to share
  int64_t group_bytes;  // a multiple of 512
};

__device__ __forceinline__ Landing* LandingOf(const ArenaCall& call, int rank) {
  return reinterpret_cast<Landing*>(call.At(rank));
}

__device__ __forceinline__ char* PartOf(const ArenaCall& call, const LandingLayout& layout, int owner, int part) {
  return call.arenas->arena[owner] + kLandingHeaderBytes + call.slot * call.arenas->window_bytes +
         part * layout.part_bytes;
}

// Both begin at multiples of 16 bytes. From L2: other kernels and ranks write windows.
__device__ __forceinline__ void CopyBytes(char* to, const char* from, int64_t num_bytes, int thread, int num_threads) {
  constexpr int kAtOnce = 8;
  const int64_t num_vectors = num_bytes / 16;
  for (int64_t base = thread; base < num_vectors; base += kAtOnce * num_threads) {
    int4 bits[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (base + i * num_threads < num_vectors)
        bits[i] = __ldcg(reinterpret_cast<const int4*>(from) + base + i * num_threads);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (base + i * num_threads < num_vectors) reinterpret_cast<int4*>(to)[base + i * num_threads] = bits[i];
    }
  }
  if (num_vectors * 16 + thread < num_bytes) to[num_vectors * 16 + thread] = __ldcg(from + num_vectors * 16 + thread);
}

// The last warp of a block keeps the books at its begin.
__device__ __forceinline__ void KeepBooks(const ArenaCall& call) {
  if (threadIdx.x / 32 == kHalfWarps - 1) Keep(call);
}

// The begin of a stage, by all threads of a block: what its push tells the peers, what is in flight, and the window's
// reuse. False: nothing is to be staged.
__device__ __forceinline__ bool BeginStage(const ArenaCall& call, int slot, uint64_t* in_flight) {
  bool ready = call.takes_part;
  if (ready && call.slot != slot) {  // host and device count alike, or rows would go where others lie
    if (threadIdx.x == 0) Fail(call, kInFlight, call.rank, 0, 0, 0);
    ready = false;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    LandingOf(call, call.rank)->told[slot] = ready ? call.epoch : 0;
    in_flight[0] = call.epoch, in_flight[1] = ~call.epoch;
  }
  if (ready && threadIdx.x < 32) ready = AwaitReuse(call);
  return __syncthreads_and(ready);
}

// Waits for `source`'s push of a chunk's piece and acquires it. By a whole warp. False: it will not come.
__device__ __forceinline__ bool AwaitArrived(const ArenaCall& call, const LandingLayout& layout, int source,
                                             int chunk) {
  const uint64_t* const flag = &LandingOf(call, call.rank)->arrived[call.slot][source][layout.PieceOf(chunk)];
  Patience patience;
  while (true) {
    const uint64_t seen = LoadAcquireSys(flag);
    if (__all_sync(~0u, seen == call.epoch)) return true;
    if (!patience.WaitOn(call, kRows, source, chunk, call.Tag(kPosted), __shfl_sync(~0u, seen, 0))) return false;
  }
}

// By all threads of a block that have read what they need of the window: whether it was theirs to the end. The push of
// a start that has failed, which the host does not know, may have come into a window that was not free; its rank had
// said that it is gone before, so who has read such rows sees that now.
__device__ __forceinline__ bool WasKept(const ArenaCall& call) {
  bool kept = true;
  __syncthreads();
  if (threadIdx.x < 32) {
    FenceSys();  // what has been read, before what is asked
    const int lane = threadIdx.x;
    const uint64_t gone = call.Reaches(lane) ? LoadRelaxedSys(&call.Own()->gone[lane]) : 0;
    // In a later generation too: a start that fails there may push before this rank has begun it.
    const bool has_gone = gone != 0 && GenerationOf(gone) >= GenerationOf(call.epoch);
    if (has_gone) Fail(call, kRows, lane, 0, call.Tag(kPosted), call.Tag(kGone));
    kept = !__any_sync(~0u, has_gone);
  }
  return __syncthreads_and(kept);
}

// The end of a done, by all threads of every block: when all have read the window, the peers may fill it again. Their
// AwaitReuse acquires it.
__device__ __forceinline__ void AckRead(const ArenaCall& call) {
  __shared__ bool is_last;
  Landing* const own = LandingOf(call, call.rank);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&own->read, 1u) + 1 == gridDim.x;
    if (is_last) own->read = 0;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || !call.receives || !call.of_this_generation) return;
  if (call.Reaches(threadIdx.x)) {
    FenceSys();
    StoreRelaxedSys(&call.At(threadIdx.x)->acks[call.slot][call.rank], call.epoch);
  }
}

// Rows are cut so that a chunk from `num_sources` ranks gives each warp something.
inline void CutRows(const LandingLayout& layout, int64_t num_sources, int* num_groups, int64_t* group_bytes) {
  const int64_t most = DivideUp(layout.row_bytes, 2048);
  const int64_t wanted = DivideUp(2 * kHalfWarps, layout.chunk_tokens * num_sources);
  *num_groups = static_cast<int>(most < 1 ? 1 : wanted < most ? wanted : most);
  *group_bytes = RoundUpTo(DivideUp(layout.row_bytes, *num_groups), 512);
}

}  // namespace jax_ep
