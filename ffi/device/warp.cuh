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

// Which row the token has on `rank`: that of the first choice whose owner it is, or -1. Lane k holds choice k's owner
// and row.
__device__ __forceinline__ int FirstRowOn(int rank, int owner, int row, int num_topk) {
  int found = -1;
  for (int k = num_topk - 1; k >= 0; --k) {
    const int other = __shfl_sync(~0u, owner, k), other_row = __shfl_sync(~0u, row, k);
    if (other == rank) found = other_row;
  }
  return found;
}

}  // namespace jax_ep
