// How the kernels of a group over nodes begin, wait and end. Nobody writes into XLA's memory but its owner, so a rank
// that fails leaves without asking anybody. Neighbours: ring.cuh moves chunks, device/wait.cuh is the same over NVLink.
#pragma once

#include "device/wait.cuh"
#include "internode/room.h"
#include "internode/transport.cuh"

namespace jax_ep {

// Whether stores reach that rank's room: it is on this node, or NVLink goes beyond.
__device__ __forceinline__ bool IsMapped(const InternodeView& view, int peer) { return view.room_of[peer] != nullptr; }

// What is at `own` in this rank's room, in the room of a rank that is mapped here.
template <class T>
__device__ __forceinline__ T* In(const InternodeView& view, int peer, T* own) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(view.room_of[peer]) +
                              (reinterpret_cast<const char*>(own) - reinterpret_cast<const char*>(view.room)));
}

__device__ __forceinline__ char* Inbox(const InternodeView& view) {
  return reinterpret_cast<char*>(view.room) + kRoomHeaderBytes;
}
__device__ __forceinline__ char* Outbox(const InternodeView& view) { return Inbox(view) + view.box_bytes; }

// Stores `value` into `flag` of `peer`; by one thread, after a system fence.
__device__ __forceinline__ void Signal(const InternodeView& view, int peer, uint64_t* flag, uint64_t value) {
  if (IsMapped(view, peer)) {
    StoreRelaxedSys(In(view, peer, flag), value);
  } else {
    SignalOverNetwork(view, peer, flag, value);
  }
}

// `gone` is the first call of a generation that failed at a peer: has it left this one? It may have failed in the next
// one already, having done its part in this.
__device__ __forceinline__ bool HasLeft(const Call& call, uint64_t gone) {
  return gone != 0 && gone >> kCountBits == call.epoch >> kCountBits && gone <= call.epoch;
}

// Looks up from polling, rarely: has the call failed meanwhile, here or anywhere, or its time run out? True: wait on.
// A rank that has left is everybody's failure: what it should have sent on may be another's.
__device__ __noinline__ static bool LookUpFromPolling(const Call& call, const InternodeView& view, uint64_t start,
                                                      Phase phase, int peer, int lane, uint64_t expected,
                                                      uint64_t seen) {
  if (HasFailed(call)) return false;
  for (int rank = 0; rank < call.num_ranks; ++rank) {
    if (!HasLeft(call, LoadRelaxedSys(&view.room->gone[rank]))) continue;
    Fail(call, phase, rank, lane, expected, call.Tag(kGone));
    return false;
  }
  if (NanoSeconds() - start <= *const_cast<const volatile uint64_t*>(&call.group->timeout_ns)) return true;
  Fail(call, phase, peer, lane, expected, seen);
  return false;
}

// Waits until `flag`, in this rank's room, says at least `state` in this epoch; acquires what came with it. Any thread
// may call it. False: it will not come. `peer` and `lane` are what an error names.
template <bool kBringsBytes = true>
__device__ __noinline__ bool AwaitOverNodes(const Call& call, const InternodeView& view, uint64_t* flag, uint32_t state,
                                            Phase phase, int peer, int lane) {
  const uint64_t expected = call.Tag(state);
  uint64_t start = 0;
  for (uint32_t tries = 1;; ++tries) {
    const uint64_t value = LoadAcquireSys(flag);
    if (value >= expected) {
      if (Reached(call, value, state)) {
        if (kBringsBytes) SettleArrival(flag, expected);
        return true;
      }
      Fail(call, phase, peer, lane, expected, value);
      return false;
    }
    if (tries > 8) __nanosleep(20);
    if (tries % 32 != 0) continue;
    if (start == 0) start = NanoSeconds();
    if (!LookUpFromPolling(call, view, start, phase, peer, lane, expected, value)) return false;
  }
}

// Whether this rank takes part in the call; by all threads of a block.
__device__ __forceinline__ bool TakesPart(const Call& call, const InternodeView& view, bool refused) {
  bool failed = refused || HasFailed(call);
  if (refused && threadIdx.x == 0) Refuse(call);
  const int peer = threadIdx.x;
  if (peer < call.num_ranks && HasLeft(call, LoadRelaxedSys(&view.room->gone[peer]))) {
    if (!failed) Fail(call, kMeet, peer, 0, call.Tag(kPosted), call.Tag(kGone));
    failed = true;
  }
  return !__syncthreads_or(failed);
}

// Waits until every rank has begun this call, so has ended the one before: until then its boxes may be in use. Block 0
// tells that this rank has. By all threads of a block. False: some rank did not come.
__device__ __forceinline__ bool MeetOverNodes(const Call& call, const InternodeView& view) {
  const int peer = threadIdx.x;
  bool met = true;
  if (peer < 32) {
    if (blockIdx.x == 0 && peer < call.num_ranks) {
      FenceSys();
      Signal(view, peer, &view.room->post[call.parity][call.rank][0], call.Tag(kPosted));
    }
    __syncwarp();
    if (peer < call.num_ranks)
      met = AwaitOverNodes<false>(call, view, &view.room->post[call.parity][peer][0], kPosted, kMeet, peer, 0);
  }
  return __syncthreads_and(met);
}

// The end of a call, by the last block of its last kernel, which has cleared the results of a failed one.
__device__ __forceinline__ void EndOverNodes(const Call& call, const InternodeView& view) {
  const int peer = threadIdx.x;
  if (__syncthreads_or(HasFailed(call))) {
    // Its own room has the same word, so that what fails as a consequence does not take the first one's place: a peer
    // that comes to that one late would wait for what has been missed.
    uint64_t* const gone = &view.room->gone[call.rank];
    const uint64_t before = LoadRelaxedSys(gone);
    const uint64_t first = before != 0 && before >> kCountBits == call.epoch >> kCountBits ? before : call.epoch;
    __syncthreads();
    if (peer == call.rank) {
      StoreRelaxedSys(gone, first);
    } else if (peer < call.num_ranks) {
      FenceSys();
      Signal(view, peer, gone, first);
    }
  }
  EndCall(call);
}

}  // namespace jax_ep
