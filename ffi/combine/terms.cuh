// What is added for one token, as terms of a SumPipe: a rank's own rows, and the sums that other ranks have of it. Each
// of these is called by a whole warp, puts terms into their place and returns how many. Neighbour: sum.cuh adds them.
#pragma once

#include "combine/sum.cuh"

namespace jax_ep {

// The rows that the lanes name (`row`; null: none), in lane order; `then` follows the last.
template <int V>
__device__ __forceinline__ int PutOwnTerms(SumShared<V>& memory, const char* row, float weight, uint32_t then) {
  const int lane = threadIdx.x % 32;
  const uint32_t own = __ballot_sync(~0u, row != nullptr), lower = own & ((1u << lane) - 1);
  const int count = __popc(own), at = __popc(lower);
  if (row != nullptr) memory.terms[at] = {row, weight, at == count - 1 ? then : 0};
  return count;
}

// The same rows, whose sum is that of `rank`, and the sums of `peers` (a bit a rank), each at its lane's `sum`: all in
// rank order.
template <int V>
__device__ __forceinline__ int PutSumsOfRanks(SumShared<V>& memory, const char* row, float weight, int rank,
                                              uint32_t peers, const char* sum) {
  const int lane = threadIdx.x % 32;
  const uint32_t before = peers & ((1u << rank) - 1);
  // Two sums may be added in either order.
  const bool sets_aside = before != 0 && (peers & (peers - 1)) != 0;
  const int num_own = PutOwnTerms(memory, row, weight, (sets_aside ? kSetAside : kRound) | (peers == 0 ? kStore : 0));
  if (peers >> lane & 1) {
    uint32_t then = kOfRank | (peers >> lane == 1 ? kStore : 0);
    if (sets_aside && num_own > 0 && before >> lane == 1) then |= kTakeBack;
    memory.terms[num_own + __popc(peers & ((1u << lane) - 1))] = {sum, weight, then};
  }
  return num_own + __popc(peers);
}

}  // namespace jax_ep
