// How a handler reports: what the operation is, what went wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Success, or the CUDA error in words.
inline xla::ffi::Error FromCuda(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string(operation) + ": " + cudaGetErrorName(error) + ": " +
                                   cudaGetErrorString(error));
}

inline xla::ffi::Error InvalidArgument(const char* operation, const std::string& what) {
  return xla::ffi::Error::InvalidArgument(std::string(operation) + ": " + what);
}

}  // namespace jax_ep
