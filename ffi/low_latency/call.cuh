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

// What one warp of a block reads of its call, all at once: hundreds of warps that read the same words would wait for
// each other.
struct Begun {
  uint64_t epoch, generation_begin;
  unsigned int turn;
  uint32_t dead;
  bool none, failed, of_this_generation, window_is_free;
};

// What every call reads, all at once; some of it of each lane's peer, or of each lane's window and peer.
struct BegunWords {
  uint64_t epoch, failed_epoch, gone, finished, ack;
  unsigned int turn;
  uint32_t dead;

  static __device__ __forceinline__ int AckedSlot() { return threadIdx.x % 32 % kDepth; }
  static __device__ __forceinline__ int AckedBy() { return threadIdx.x % 32 / kDepth; }

  __device__ __forceinline__ explicit BegunWords(const ArenaCall& call) {
    const Arena* const own = call.Own();
    const int lane = threadIdx.x % 32;
    dead = DeadRanks(call.group, call.rank);
    epoch = LoadRelaxedSys(&own->epoch), failed_epoch = LoadRelaxedSys(&own->failed_epoch);
    turn = *const_cast<const volatile unsigned int*>(&own->turn);
    gone = lane < call.num_ranks ? LoadRelaxedSys(&own->gone[lane]) : 0;
    finished = LoadRelaxedSys(&own->finished[AckedSlot()]);
    // Last: what comes after an acquire waits for it.
    ack = AckedBy() < call.num_ranks ? LoadAcquireSys(&own->acks[AckedSlot()][AckedBy()]) : ~0ull;
  }
  // This lane's part of `window_is_free`, which is asked of few ranks only.
  __device__ __forceinline__ bool IsLate(const ArenaCall& call) const {
    const bool late = AckedSlot() == call.SlotOf(call.epoch) && call.Reaches(AckedBy()) && ack < call.ReuseNeeds();
    return late || call.num_ranks > 32 / kDepth;
  }
  // Calls of a rank run one after another, so a done that has not begun yet never will while this call waits for it.
  __device__ __forceinline__ bool IsFull(const ArenaCall& call) const {
    const auto depth = static_cast<uint64_t>(call.arenas->depth);
    return call.sends && CountOf(call.epoch) > depth && threadIdx.x % 32 == call.SlotOf(call.epoch) &&
           finished < call.epoch - depth;
  }
};

// The begin of nearly every whole call: nothing has failed. False: something has. Few instructions, as each is fetched
// anew and all of the block waits for them.
__device__ __forceinline__ bool BeginAtOnce(ArenaCall& call, bool refused, Begun* begun) {
  const BegunWords words(call);
  call.dead = words.dead;
  call.epoch = words.epoch + 1;
  call.generation_begin = GenerationOf(words.epoch) << kCountBits;
  bool usual = !refused && !words.IsFull(call);
  usual &= words.gone == 0 || GenerationOf(words.gone) != GenerationOf(call.epoch);
  usual &= words.failed_epoch == 0 || GenerationOf(words.failed_epoch) != GenerationOf(call.epoch);
  const bool window_is_free = !__any_sync(~0u, words.IsLate(call));
  if (!__all_sync(~0u, usual)) return false;
  if (threadIdx.x % 32 == 0)
    *begun = {call.epoch, call.generation_begin, words.turn, words.dead, false, false, true, window_is_free};
  return true;
}

// The same of every call.
__device__ __noinline__ static void BeginWithCare(ArenaCall call, const LowLatencyParams& params, bool refused,
                                                  Begun* begun) {
  const int lane = threadIdx.x % 32;
  const BegunWords words(call);
  uint64_t begun_epoch = 0, complement = 0, masked_since = 0;
  if (params.half == Half::kDone) {
    begun_epoch = params.in_flight[0], complement = params.in_flight[1];
    masked_since = LoadRelaxedSys(&call.group->masked_since);
  }
  call.dead = words.dead;
  call.epoch = words.epoch + 1;
  call.of_this_generation = true;
  bool failed = refused, none = false;
  if (params.half == Half::kDone) {
    none = begun_epoch == 0 && complement == 0;
    call.of_this_generation = GenerationOf(begun_epoch) == GenerationOf(words.epoch);
    // Told are failures; a mask ends a generation without one.
    const bool untold = GenerationOf(begun_epoch) < masked_since &&
                        (words.failed_epoch == 0 || GenerationOf(words.failed_epoch) < GenerationOf(begun_epoch));
    if (complement == ~begun_epoch && !untold) {
      call.epoch = begun_epoch;
      failed |= !call.of_this_generation;  // told when that generation failed
    } else if (!none) {
      call.epoch = words.epoch > 0 ? words.epoch : 1;
      call.of_this_generation = true;
      failed = true;
      if (lane == 0) Fail(call, kInFlight, call.rank, 0, 0, 0);
    }
  }
  // A peer that has failed in this generation may have missed calls: what it has sent under this epoch may be
  // another's.
  if (words.gone != 0 && call.Reaches(lane) && GenerationOf(words.gone) == GenerationOf(call.epoch) &&
      call.of_this_generation && !none) {
    Fail(call, kReuse, lane, 0, call.Tag(kPosted), call.Tag(kGone));
    failed = true;
  }
  if (refused && lane == 0 && call.of_this_generation && !none) Refuse(call);
  if (words.IsFull(call)) {
    if (!refused) Fail(call, kFull, call.rank, call.arenas->depth, 0, 0);
    failed = true;
  }
  failed |= call.of_this_generation && words.failed_epoch != 0 &&
            GenerationOf(words.failed_epoch) == GenerationOf(call.epoch);
  failed = __any_sync(~0u, failed) && !none;
  call.generation_begin = GenerationOf(words.epoch) << kCountBits;
  const bool window_is_free = !__any_sync(~0u, words.IsLate(call));
  if (lane == 0) {
    *begun = {call.epoch, call.generation_begin,   words.turn,    words.dead, none,
              failed,     call.of_this_generation, window_is_free};
  }
}

// `epoch` and `turn` advance when all blocks have entered (Keep), so every block of a kernel reads the same values
// here. Called by all threads of a block; ends with the block synchronised. The other warps do `meanwhile`.
template <int kReader = kKeeper, class Meanwhile>
__device__ __forceinline__ ArenaCall BeginArenaCall(const LowLatencyParams& params, Operation operation, bool refused,
                                                    const Meanwhile& meanwhile) {
  __shared__ Begun begun;
  ArenaCall call;
  call.arenas = &params.arenas;
  call.group = params.arenas.group;
  call.rank = params.arenas.rank;
  call.num_ranks = params.arenas.num_ranks;
  call.operation = operation;
  call.ledger = call.Own();
  call.sends = params.half != Half::kDone;
  if (threadIdx.x / 32 == kReader) {
    const bool begun_at_once = params.half == Half::kBoth && BeginAtOnce(call, refused, &begun);
    if (!begun_at_once) BeginWithCare(call, params, refused, &begun);
  } else {
    meanwhile();
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

template <int kReader = kKeeper>
__device__ __forceinline__ ArenaCall BeginArenaCall(const LowLatencyParams& params, Operation operation, bool refused) {
  return BeginArenaCall<kReader>(params, operation, refused, [] {});
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
  if (threadIdx.x == 0) AddRelease(left);  // with the block's results; acquired by those who clear them
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
