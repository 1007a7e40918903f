// What a warp does together. All 32 lanes call these.
#pragma once

#include <cuda_runtime.h>

namespace jax_ep {

// Exclusive prefix sum over a warp.
__device__ __forceinline__ int WarpScan(int value, int* sum) {
  const int lane = threadIdx.x % 32;
  int inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  *sum = __shfl_sync(~0u, inclusive, 31);
  return inclusive - value;
}

// Which row of `rank` this token has, from slot[t, lane] of every lane: its first choice there, or -1.
__device__ __forceinline__ int FirstRowOn(int rank, int slot, int num_topk, int max_recv_tokens) {
  int row = -1;
  for (int k = num_topk - 1; k >= 0; --k) {
    const int other = __shfl_sync(~0u, slot, k);
    if (other >= 0 && other / max_recv_tokens == rank) row = other % max_recv_tokens;
  }
  return row;
}

}  // namespace jax_ep
