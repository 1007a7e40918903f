// A kernel's place in its group, and every wait for a peer: bounded by the group's timeout, told in a sentence.
// docs/protocol.md, "Deadlines". Neighbours: ptx.cuh, group/window.h.
#pragma once

#include "device/ptx.cuh"
#include "group/window.h"

namespace jax_ep {

// One call of one rank, as each thread sees it, through whatever memory.
struct AnyCall {
  const GroupView* group;
  Ledger* ledger;
  uint64_t epoch;
  Operation operation;
  int rank, num_ranks;
  uint32_t dead;  // a bit for each masked rank; all bits if this rank is masked itself

  __device__ uint64_t Tag(uint32_t state) const { return epoch << kStateBits | state; }
  __device__ bool IsDead(int peer) const { return (dead >> peer & 1) != 0; }
  // Whether this rank and `peer` have to do with each other: neither waits for a masked rank or stores into its memory,
  // and a masked rank does so with none.
  __device__ bool Reaches(int peer) const { return peer < num_ranks && !IsDead(peer); }
};

// AnyCall::dead of `rank`.
__device__ __forceinline__ uint32_t DeadRanks(const GroupView* group, int rank) {
  const auto dead = static_cast<uint32_t>(LoadRelaxedSys(&group->membership));
  return (dead >> rank & 1) != 0 ? ~0u : dead;
}

// A call through the window. Made by BeginCall, ended by EndCall.
struct Call : AnyCall {
  Window* window;
  int parity;

  __device__ Window* Peer(int peer) const { return group->window[peer]; }
  // Later than every call of this generation: who reads it as a post knows that this rank takes part in none of them.
  __device__ uint64_t Farewell() const { return (epoch | kMaxCount) << kStateBits | kGone; }
};

// An address from the mail of `peer`, which may be another process's: where this process maps the same memory.
__device__ __forceinline__ uint64_t Translate(const Call& call, int peer, uint64_t address) {
  return address + call.group->shift[peer];
}

// `epoch` advances when the last block of a call leaves, so every block of a call reads the same value here.
__device__ __forceinline__ Call BeginCall(const GroupView* group, Operation operation) {
  Call call;
  call.group = group;
  call.rank = group->rank;
  call.num_ranks = group->num_ranks;
  call.window = group->window[call.rank];
  call.ledger = call.window;
  call.epoch = LoadRelaxedSys(&call.window->epoch) + 1;
  call.dead = DeadRanks(group, call.rank);
  call.operation = operation;
  call.parity = static_cast<int>(call.epoch & 1);
  return call;
}

__device__ __forceinline__ bool HasFailed(const AnyCall& call) {
  const uint64_t failed = LoadRelaxedSys(&call.ledger->failed_epoch);
  return failed != 0 && failed >> kCountBits == call.epoch >> kCountBits;
}

// The first failure of a generation is the one told: what follows is its consequence.
__device__ __noinline__ static void Fail(const AnyCall& call, Phase phase, int peer, int lane, uint64_t expected,
                                         uint64_t seen) {
  auto* failed = reinterpret_cast<unsigned long long*>(&call.ledger->failed_epoch);
  const uint64_t before = atomicMax(failed, static_cast<unsigned long long>(call.epoch));
  if (before != 0 && before >> kCountBits == call.epoch >> kCountBits) return;
  Status* status = call.group->status;
  status->operation = call.operation;
  status->phase = phase;
  status->rank = call.rank;
  status->peer = peer;
  status->lane = lane;
  status->epoch = call.epoch;
  status->expected = expected;
  status->seen = seen;
  __threadfence_system();
  status->failures = status->failures + 1;
  __threadfence_system();
}

__device__ __forceinline__ bool Reached(const AnyCall& call, uint64_t value, uint32_t state) {
  return value >= call.Tag(state) && value >> kStateBits == call.epoch && (value & kGone) != kGone;
}

// The waiting proper, apart from the test that mostly succeeds. Returns the last value seen.
// With `regardless` neither the peer's giving up nor this rank's earlier failure ends the wait early, and nothing is
// reported.
__device__ __noinline__ static uint64_t Poll(const Call& call, const uint64_t* flag, uint32_t state, Phase phase,
                                             int peer, int lane, bool regardless) {
  const uint64_t start = NanoSeconds();
  const uint64_t expected = call.Tag(state);
  for (uint32_t tries = 1;; ++tries) {
    const uint64_t value = LoadAcquireSys(flag);
    if (value >= expected) {
      if (!regardless && !Reached(call, value, state)) Fail(call, phase, peer, lane, expected, value);
      return value;
    }
    if (tries > 8) __nanosleep(20);
    if (tries % 32 != 0) continue;
    if (!regardless && HasFailed(call)) return value;
    if (NanoSeconds() - start > *const_cast<const volatile uint64_t*>(&call.group->timeout_ns)) {
      if (!regardless) Fail(call, phase, peer, lane, expected, value);
      return value;
    }
  }
}

// Waits until `flag`, written by `peer`, says at least `state` in this epoch; acquires what its release covers.
// Any thread may call it. False: it will not come.
__device__ __forceinline__ bool Await(const Call& call, const uint64_t* flag, uint32_t state, Phase phase, int peer,
                                      int lane, uint64_t* seen = nullptr) {
  uint64_t value = LoadAcquireSys(flag);
  if (value < call.Tag(state)) {
    value = Poll(call, flag, state, phase, peer, lane, false);
  } else if (!Reached(call, value, state)) {
    Fail(call, phase, peer, lane, call.Tag(state), value);
  }
  if (seen != nullptr) *seen = value;
  return Reached(call, value, state);
}

// Tells every peer that the mail and counts of `lane` lie in its window. Called by one whole warp, after a barrier
// behind the threads that wrote them. The second fence is half of the deadline protocol: it orders this post before
// reading the peer's.
__device__ __forceinline__ void Post(const Call& call, int lane) {
  const int peer = threadIdx.x % 32;
  if (call.Reaches(peer)) {
    FenceSys();
    StoreRelaxedSys(&call.Peer(peer)->post[call.parity][call.rank][lane], call.Tag(kPosted));
    FenceSeqCstSys();
  }
  __syncwarp();
}

// Leaves a lane: waits until every peer is done with it. Called by one whole warp, after this rank's own `done` has
// been published.
__device__ __forceinline__ void Leave(const Call& call, int post_lane, int progress_lane) {
  const int peer = threadIdx.x % 32;
  const uint64_t* progress = &call.window->progress[peer][progress_lane];
  if (call.Reaches(peer) && !HasFailed(call)) Await(call, progress, kDone, kLeave, peer, progress_lane);
  __syncwarp();
  if (call.Reaches(peer) && HasFailed(call)) {
    StoreRelaxedSys(&call.Peer(peer)->post[call.parity][call.rank][post_lane], call.Farewell());
    FenceSeqCstSys();
    if (LoadAcquireSys(&call.window->post[call.parity][peer][post_lane]) == call.Tag(kPosted)) {
      Poll(call, progress, kDone, kLeave, peer, progress_lane, true);
    }
  }
  __syncwarp();
}

// Where each block is a lane: tells every peer how far this one is. Called by one whole warp, after it has acquired
// what other warps did.
__device__ __forceinline__ void TellPeers(const Call& call, uint32_t state) {
  const int peer = threadIdx.x % 32;
  FenceSys();  // what this block has stored and read is before the flag
  if (call.Reaches(peer)) StoreRelaxedSys(&call.Peer(peer)->progress[call.rank][blockIdx.x], call.Tag(state));
}

// This rank is done with its peers in this lane, or gives up; waits until they are done with it. Called as TellPeers.
__device__ __forceinline__ void LeaveLane(const Call& call, bool met) {
  TellPeers(call, met ? kDone : kGone);
  Leave(call, blockIdx.x, blockIdx.x);
}

// A call that this rank's host has refused runs as one that has failed; its reason was told before.
__device__ __forceinline__ void Refuse(const AnyCall& call) {
  atomicMax(reinterpret_cast<unsigned long long*>(&call.ledger->failed_epoch),
            static_cast<unsigned long long>(call.epoch));
}

// What `epoch` becomes with this call. The last of a generation is told as a failure, on every rank alike, and calls
// that come before the next generation have its number again: they fail.
__device__ __forceinline__ uint64_t CountCall(const AnyCall& call) {
  if (CountOf(call.epoch) < kMaxCount) return call.epoch;
  Fail(call, kCounted, call.rank, 0, 0, 0);
  return call.epoch - 1;
}

// The last thing a block does, by all its threads. True for the last block of the grid to arrive, in all its threads,
// which then clears the results if HasFailed and calls EndCall.
__device__ __forceinline__ bool IsLastBlock(const Call& call) {
  bool is_last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&call.window->exits, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

__device__ __forceinline__ void EndCall(const Call& call) {
  __syncthreads();
  if (threadIdx.x == 0) {
    call.window->exits = 0;
    __threadfence();
    call.window->epoch = CountCall(call);
  }
}

}  // namespace jax_ep
