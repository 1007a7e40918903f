// A lane of a combine or a combine_grad: how a block begins a call, meets the same block of every peer and ends.
// docs/protocol.md, "Phases". Block b has lane b of the flags, and the tokens b, b + B, ... of every rank.
//
// Neighbours: device/wait.cuh has the waits, and how such a block tells its peers and leaves; frame.cuh what combine
// does between meeting and leaving.
#pragma once

#include <algorithm>

#include "combine/combine.h"
#include "device/wait.cuh"

namespace jax_ep {

inline int NumLanes(const CombineConfig& config) { return std::max(1, std::min(config.num_sms, kMaxLanes)); }

// Tokens of each rank that are this block's.
__device__ __forceinline__ int NumTokensOfLane(int num_tokens) {
  const int num_blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return (num_tokens - block + num_blocks - 1) / num_blocks;
}

// Whether this rank takes part in the call. By all threads of the block, for which it is a barrier.
__device__ __forceinline__ bool TakesPart(const Call& call, bool refused) {
  if (refused && threadIdx.x == 0) Refuse(call);
  return __syncthreads_and(!refused && !HasFailed(call) && !call.IsDead(call.rank));
}

// Tells every peer where these arrays of this rank are. Called by the first warp; the peer's MeetPeers acquires it.
template <int N>
__device__ __forceinline__ void PostAddresses(const Call& call, const void* const (&arrays)[N]) {
  static_assert(N <= kNumAddresses);
  const int peer = threadIdx.x;
  if (call.Reaches(peer)) {
    Mail* const mail = &call.Peer(peer)->mail[call.parity][call.rank][blockIdx.x];
#pragma unroll
    for (int i = 0; i < N; ++i) mail->address[i] = reinterpret_cast<uint64_t>(arrays[i]);
  }
  __syncwarp();
  Post(call, blockIdx.x);
}

// Waits for the post of every peer and takes the addresses it has posted. Called by the first warp, each lane for one
// peer. False: that peer's will not come.
template <int N>
__device__ __forceinline__ bool MeetPeers(const Call& call, uint64_t (&address)[kMaxRanks][N]) {
  const int peer = threadIdx.x;
  if (!call.Reaches(peer)) return true;
  const bool met = Await(call, &call.window->post[call.parity][peer][blockIdx.x], kPosted, kMeet, peer, blockIdx.x);
  const Mail& mail = call.window->mail[call.parity][peer][blockIdx.x];
#pragma unroll
  for (int i = 0; i < N; ++i) address[peer][i] = Translate(call, peer, mail.address[i]);
  return met;
}

// The last thing a block does, by all its threads. `clear`, for all threads of one block, clears the results.
template <class Clear>
__device__ __forceinline__ void EndLane(const Call& call, const Clear& clear) {
  if (!IsLastBlock(call)) return;
  if (HasFailed(call) || call.IsDead(call.rank)) clear();
  EndCall(call);
}

}  // namespace jax_ep
