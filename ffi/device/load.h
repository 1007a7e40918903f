// Makes a kernel ready to be launched, on the current device.
#pragma once

#include <cuda_runtime.h>

namespace jax_ep {

// Before the first launch, which then allocates nothing: an allocation waits for kernels that wait for a peer, whose
// own launch may be behind this one. `dynamic_shared_bytes` is the most that a launch asks for.
template <class... Params>
cudaError_t LoadKernel(void (*kernel)(Params...), int64_t dynamic_shared_bytes = 0) {
  const auto* const function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, function); error != cudaSuccess) return error;
  if (dynamic_shared_bytes == 0) return cudaSuccess;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(dynamic_shared_bytes));
}

}  // namespace jax_ep
