// The windows of halves on the device: where parts lie, how a stage begins and releases its chunks, how a done acquires
// the peers' and gives the window back. Neighbours: group/landing.h is the layout, low_latency/call.cuh the calls.
#pragma once

#include "group/landing.h"
#include "halves/halves.h"
#include "low_latency/call.cuh"

namespace jax_ep {

// A stage or a done has 14 warps of at most 128 registers a thread (which is what kHalfBounds asks for), so that there
// is room for a push kernel beside it.
constexpr int kHalfWarps = 14, kHalfThreads = 32 * kHalfWarps, kHalfBounds = 512;

// What the kernels of a half are told; `call` as BeginArenaCall takes it.
template <class Params>
struct HalfWork {
  Params params;
  LowLatencyParams call;
  uint64_t number;
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

// The part of its own window that a rank pushes to `peer`; its own where the peer is itself.
__device__ __forceinline__ int OutPart(const ArenaCall& call, const LandingLayout& layout, int peer) {
  if (peer == call.rank || layout.num_parts == call.num_ranks) return call.rank;
  return call.num_ranks + (peer < call.rank ? peer : peer - 1);
}

// u32[T]: the ranks that get each token of this rank (of a combine: whose tokens of that number have rows here).
__device__ __forceinline__ uint32_t* TargetsOf(const ArenaCall& call, const LandingLayout& layout) {
  return reinterpret_cast<uint32_t*>(PartOf(call, layout, call.rank, 0) + layout.targets_offset());
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

// The begin of a stage, by all threads of a block: the order to the push kernel, what is in flight, and the window's
// reuse. False: nothing is to be staged.
__device__ __forceinline__ bool BeginStage(const ArenaCall& call, uint64_t number, uint64_t* in_flight) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    Order* const order = &LandingOf(call, call.rank)->orders[number % kLandingDepth];
    StoreRelaxedSys(&order->epoch, call.epoch);
    StoreRelaxedSys(&order->goes, call.takes_part);
    StoreRelaxedSys(&order->dead, call.dead);
    __threadfence();  // acquired with `number` by AwaitOrder
    StoreRelaxedSys(&order->number, number);
    in_flight[0] = call.epoch, in_flight[1] = ~call.epoch;
  }
  bool ready = call.takes_part;
  if (ready && threadIdx.x < 32) ready = AwaitReuse(call);
  return __syncthreads_and(ready);
}

// A chunk that all threads of this block have staged, for the push kernel, which acquires it in AwaitStaged.
__device__ __forceinline__ void ReleaseChunk(const ArenaCall& call, int chunk) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  StoreRelaxedSys(&LandingOf(call, call.rank)->staged[call.slot][chunk], call.epoch);
}

// Waits until `flag`, which `peer` stores, says this call. Each lane of the warp that calls it acquires what was stored
// before. False: it will not come.
__device__ __forceinline__ bool AwaitChunk(const ArenaCall& call, const uint64_t* flag, Phase phase, int peer,
                                           int chunk) {
  Patience patience;
  while (true) {
    const uint64_t seen = LoadAcquireSys(flag);
    if (__all_sync(~0u, seen == call.epoch)) return true;
    if (!patience.WaitOn(call, phase, peer, chunk, call.Tag(kPosted), __shfl_sync(~0u, seen, 0))) return false;
  }
}

__device__ __forceinline__ bool AwaitArrived(const ArenaCall& call, int source, int chunk) {
  return AwaitChunk(call, &LandingOf(call, call.rank)->arrived[call.slot][source][chunk], kRows, source, chunk);
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

// For kernels beside which the push kernel must find room on any multiprocessor: its shared memory is not to be L1
// cache.
inline cudaError_t LoadWithRoomBeside(const void* kernel) {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

}  // namespace jax_ep
