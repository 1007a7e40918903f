// What a warp does together. All 32 lanes call these.
#pragma once

#include <cuda_runtime.h>

#include "device/ptx.cuh"

namespace jax_ep {

// A counter in shared memory, acquired by lane 0 for all.
__device__ __forceinline__ uint32_t WarpLoadAcquireShared(const uint32_t* counter) {
  const uint32_t value = __shfl_sync(~0u, threadIdx.x % 32 == 0 ? LoadAcquireShared(counter) : 0, 0);
  __syncwarp();
  return value;
}

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

}  // namespace jax_ep
