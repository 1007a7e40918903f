// A low-latency call on the device: how it begins and ends, and every wait for a peer. Nothing at its end is on the way
// of its peers: what it has read is told to them by the next kernel's begin, when this one is over as a whole.
// Neighbours: lines.cuh waits for lines, device/wait.cuh is the same for calls through the window.
#pragma once

#include "device/wait.cuh"
#include "low_latency/low_latency.h"

namespace jax_ep {

constexpr int kSenders = 7, kReceivers = 8;  // warps of a block; one more keeps the books
constexpr int kKeeper = kSenders + kReceivers;
constexpr int kLowLatencyThreads = 32 * (kKeeper + 1);

struct ArenaCall : AnyCall {
  const ArenaView* arenas;
  uint64_t generation_begin;  // the epoch with which the generation of this kernel began
  unsigned int turn;
  int slot;  // of the window
  bool sends, receives;
  bool takes_part;  // else it gives zeros: it has failed, or there is no call
  bool failed;      // before it began
  bool of_this_generation;
  bool window_is_free;  // as the begin saw it: then nobody need wait for its reuse

  __device__ Arena* At(int peer) const { return reinterpret_cast<Arena*>(arenas->arena[peer]); }
  __device__ Arena* Own() const { return At(rank); }
  __device__ int SlotOf(uint64_t of) const { return static_cast<int>(static_cast<uint32_t>(of) & (arenas->depth - 1)); }
  // What every peer must have read, or for the first calls of a generation begun, before this call's lines are stored.
  __device__ uint64_t ReuseNeeds() const {
    return CountOf(epoch) > static_cast<uint64_t>(arenas->depth) ? epoch - arenas->depth : generation_begin;
  }
  // What `source` sends to `owner` in this call.
  __device__ char* Lines(int owner, int source, int64_t source_bytes) const {
    return arenas->arena[owner] + kArenaHeaderBytes + slot * arenas->window_bytes + source * source_bytes;
  }
};

// In an error's words an epoch is a flag with a state.
constexpr __device__ uint64_t FlagOf(uint64_t epoch, uint32_t state) { return epoch << kStateBits | state; }
constexpr __device__ uint64_t GenerationOf(uint64_t epoch) { return epoch >> kCountBits; }

// `epoch` and `turn` advance when all blocks have entered (Keep), so every block of a kernel reads the same values
// here. Called by all threads of a block; ends with the block synchronised. One warp reads, all at once: hundreds of
// warps that read the same words would wait for each other.
template <int kReader = kKeeper>
__device__ __forceinline__ ArenaCall BeginArenaCall(const LowLatencyParams& params, Operation operation, bool refused) {
  __shared__ struct {
    uint64_t epoch, generation_begin;
    unsigned int turn;
    uint32_t dead;
    bool none, failed, of_this_generation, window_is_free;
  } begun;
  ArenaCall call;
  call.arenas = &params.arenas;
  call.group = params.arenas.group;
  call.rank = params.arenas.rank;
  call.num_ranks = params.arenas.num_ranks;
  call.operation = operation;
  call.ledger = call.Own();
  call.sends = params.half != Half::kDone;
  if (threadIdx.x / 32 == kReader) {
    const int lane = threadIdx.x % 32, acked_slot = lane % kDepth, acked_by = lane / kDepth;
    const Arena* const own = call.Own();
    call.dead = DeadRanks(call.group, call.rank);
    const uint64_t epoch = LoadRelaxedSys(&own->epoch), failed_epoch = LoadRelaxedSys(&own->failed_epoch);
    const unsigned int turn = *const_cast<const volatile unsigned int*>(&own->turn);
    const uint64_t gone = lane < call.num_ranks ? LoadRelaxedSys(&own->gone[lane]) : 0;
    uint64_t begun_epoch = 0, complement = 0;
    uint64_t masked_since = 0;
    if (params.half == Half::kDone) {
      begun_epoch = params.in_flight[0], complement = params.in_flight[1];
      masked_since = LoadRelaxedSys(&call.group->masked_since);
    }
    const uint64_t ack = acked_by < call.num_ranks ? LoadAcquireSys(&own->acks[acked_slot][acked_by]) : ~0ull;
    const uint64_t finished = call.sends ? LoadRelaxedSys(&own->finished[acked_slot]) : 0;
    call.epoch = epoch + 1;
    call.of_this_generation = true;
    bool failed = refused, none = false;
    if (params.half == Half::kDone) {
      none = begun_epoch == 0 && complement == 0;
      call.of_this_generation = GenerationOf(begun_epoch) == GenerationOf(epoch);
      // Told are failures; a mask ends a generation without one.
      const bool untold = GenerationOf(begun_epoch) < masked_since &&
                          (failed_epoch == 0 || GenerationOf(failed_epoch) < GenerationOf(begun_epoch));
      if (complement == ~begun_epoch && !untold) {
        call.epoch = begun_epoch;
        failed |= !call.of_this_generation;  // told when that generation failed
      } else if (!none) {
        call.epoch = epoch > 0 ? epoch : 1;
        call.of_this_generation = true;
        failed = true;
        if (lane == 0) Fail(call, kInFlight, call.rank, 0, 0, 0);
      }
    }
    // A peer that has failed in this generation may have missed calls: what it has sent under this epoch may be
    // another's.
    if (gone != 0 && call.Reaches(lane) && GenerationOf(gone) == GenerationOf(call.epoch) && call.of_this_generation &&
        !none) {
      Fail(call, kReuse, lane, 0, call.Tag(kPosted), call.Tag(kGone));
      failed = true;
    }
    if (refused && lane == 0 && call.of_this_generation && !none) Refuse(call);
    // Calls of a rank run one after another, so a done that has not begun yet never will while this call waits for it.
    const auto depth = static_cast<uint64_t>(call.arenas->depth);
    if (call.sends && CountOf(call.epoch) > depth && lane == call.SlotOf(call.epoch) && finished < call.epoch - depth) {
      if (!refused) Fail(call, kFull, call.rank, call.arenas->depth, 0, 0);
      failed = true;
    }
    failed |= call.of_this_generation && failed_epoch != 0 && GenerationOf(failed_epoch) == GenerationOf(call.epoch);
    failed = __any_sync(~0u, failed) && !none;
    call.generation_begin = GenerationOf(epoch) << kCountBits;
    const bool late = acked_slot == call.SlotOf(call.epoch) && call.Reaches(acked_by) && ack < call.ReuseNeeds();
    const bool window_is_free = !__any_sync(~0u, late) && call.num_ranks <= 32 / kDepth;
    if (lane == 0) {
      begun.epoch = call.epoch, begun.generation_begin = call.generation_begin, begun.turn = turn;
      begun.none = none, begun.failed = failed, begun.of_this_generation = call.of_this_generation;
      begun.window_is_free = window_is_free;
      begun.dead = call.dead;
    }
  }
  __syncthreads();
  call.epoch = begun.epoch;
  call.turn = begun.turn;
  call.dead = begun.dead;
  call.generation_begin = begun.generation_begin;
  call.slot = call.SlotOf(call.epoch);
  call.of_this_generation = begun.of_this_generation;
  call.window_is_free = begun.window_is_free;
  call.failed = begun.failed;
  call.receives = params.half != Half::kStart && !begun.none;
  call.takes_part = !call.failed && !begun.none && !call.IsDead(call.rank);
  return call;
}

// The books of a call, by one warp of each block. Tells the peers which windows have been read: all that kernels before
// this one have, and whatever calls of earlier generations have filled. A peer's AwaitReuse acquires it; the kernel's
// begin has ordered it after their loads.
__device__ inline void Keep(const ArenaCall& call) {
  const int lane = threadIdx.x % 32;
  Arena* const arena = call.Own();
  if (blockIdx.x == 0) {
    if (call.Reaches(lane)) {
      FenceSys();
      for (int slot = 0; slot < kDepth; ++slot) {
        const uint64_t finished = max(LoadRelaxedSys(&arena->finished[slot]), call.generation_begin);
        StoreRelaxedSys(&call.At(lane)->acks[slot][call.rank], finished);
      }
    }
    __syncwarp();
    if (lane == 0 && call.receives && call.of_this_generation) arena->finished[call.slot] = call.epoch;
  }
  if (lane == 0 && atomicAdd(&arena->entered, 1u) + 1 == gridDim.x) {
    // All blocks have read what changes here; the next kernel reads it.
    arena->entered = 0;
    arena->left[~call.turn & 1] = 0;
    arena->turn = call.turn + 1;
    if (call.sends) arena->epoch = CountCall(call);
  }
}

// The last thing a block does, by all its threads. True if the call failed here: then all blocks of the grid are
// through, the peers know, and the results are to be cleared.
__device__ __forceinline__ bool LeaveFailed(const ArenaCall& call, bool failed) {
  failed = __syncthreads_or(failed);
  unsigned int* const left = &call.Own()->left[call.turn & 1];
  if (threadIdx.x == 0) {
    __threadfence();  // released with the block's results, acquired by those who clear them
    atomicAdd(left, 1u);
  }
  if (!failed) return false;
  if (call.Reaches(threadIdx.x) && call.of_this_generation) {
    FenceSys();
    StoreRelaxedSys(&call.At(threadIdx.x)->gone[call.rank], call.epoch);
  }
  if (threadIdx.x == 0) {
    const uint64_t start = NanoSeconds();
    const uint64_t limit = 3 * *const_cast<const volatile uint64_t*>(&call.group->timeout_ns);
    while (atomicAdd(left, 0u) < gridDim.x && NanoSeconds() - start < limit) __nanosleep(200);
    __threadfence();
  }
  __syncthreads();
  return true;
}

// ---- waiting. One whole warp calls these.

// Looks up from polling, rarely: has the call failed meanwhile, or its time run out? True: wait on.
__device__ __noinline__ static bool LookUp(const ArenaCall& call, uint64_t* start, Phase phase, int peer, int item,
                                           uint64_t expected, uint64_t seen) {
  bool wait_on = true;
  if (threadIdx.x % 32 == 0) {
    const uint64_t gone = LoadRelaxedSys(&call.Own()->gone[peer]), now = NanoSeconds();
    if (*start == 0) *start = now;
    if (HasFailed(call)) {
      wait_on = false;
    } else if (gone != 0 && GenerationOf(gone) == GenerationOf(call.epoch)) {
      Fail(call, phase, peer, item, expected, call.Tag(kGone));
      wait_on = false;
    } else if (seen > call.epoch || now - *start > *const_cast<const volatile uint64_t*>(&call.group->timeout_ns)) {
      Fail(call, phase, peer, item, expected, FlagOf(seen, phase == kReuse ? kDone : kPosted));
      wait_on = false;
    }
  }
  return __shfl_sync(~0u, wait_on, 0);
}

class Patience {
 public:
  // After a try in which `peer` was late; `seen` is the epoch that stood there.
  __device__ __forceinline__ bool WaitOn(const ArenaCall& call, Phase phase, int peer, int item, uint64_t expected,
                                         uint64_t seen) {
    ++tries_;
    if (tries_ > 16) __nanosleep(20);
    return tries_ % 32 != 0 || LookUp(call, &start_, phase, peer, item, expected, seen);
  }

 private:
  uint64_t start_ = 0;  // of lane 0
  uint32_t tries_ = 0;
};

// Waits until every peer has read what this window held `depth` calls before; for the first calls of a generation,
// until every peer has begun it, so that no call of the one before still reads or pushes. Acquires their `acks`, so
// that the stores that follow come after their loads, here or in the begin. False: it will not come.
__device__ __forceinline__ bool AwaitReuse(const ArenaCall& call) {
  if (call.window_is_free) return true;
  const int lane = threadIdx.x % 32;
  const uint64_t need = call.ReuseNeeds();
  Patience patience;
  while (true) {
    uint64_t ack = ~0ull, gone = 0;
    if (call.Reaches(lane)) {
      ack = LoadAcquireSys(&call.Own()->acks[call.slot][lane]);
      gone = LoadRelaxedSys(&call.Own()->gone[lane]);
    }
    const bool has_gone = gone != 0 && GenerationOf(gone) == GenerationOf(call.epoch);
    const uint32_t late = __ballot_sync(~0u, ack < need), quitters = __ballot_sync(~0u, has_gone);
    if (quitters != 0) {
      if (lane == 0) Fail(call, kReuse, __ffs(quitters) - 1, 0, FlagOf(need, kDone), call.Tag(kGone));
      return false;
    }
    if (late == 0) return true;
    const int peer = __ffs(late) - 1;
    if (!patience.WaitOn(call, kReuse, peer, 0, FlagOf(need, kDone), __shfl_sync(~0u, ack, peer))) return false;
  }
}

}  // namespace jax_ep
