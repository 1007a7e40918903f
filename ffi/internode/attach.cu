// Gives the host library of NVSHMEM, which somebody has initialised, this module's copy of the device state.
#include <cuda.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include "internode/attach.h"

namespace jax_ep {
namespace {

__global__ void AnchorKernel() {}  // of whose library the state is

}  // namespace

std::string AttachNvshmem(int device) {
  const auto failed = [](const char* what, cudaError_t error) {
    return std::string(what) + ": " + cudaGetErrorString(error);
  };
  if (cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return failed("cudaSetDevice", error);
  if (nvshmemx_init_status() < NVSHMEM_STATUS_IS_INITIALIZED) return "NVSHMEM is not initialised";
  cudaKernel_t kernel;
  if (cudaError_t error = cudaGetKernel(&kernel, reinterpret_cast<const void*>(&AnchorKernel)); error != cudaSuccess) {
    return failed("cudaGetKernel", error);
  }
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuKernelGetLibrary", &entry, 12050, cudaEnableDefault, &found);
  if (error != cudaSuccess || entry == nullptr) return failed("cuKernelGetLibrary is not in this driver", error);
  CUlibrary library;
  if (reinterpret_cast<CUresult (*)(CUlibrary*, CUkernel)>(entry)(&library, reinterpret_cast<CUkernel>(kernel)) !=
      CUDA_SUCCESS) {
    return "cuKernelGetLibrary failed";
  }
  const int status = nvshmemx_culibrary_init(library);
  return status == 0 ? "" : "nvshmemx_culibrary_init returned " + std::to_string(status);
}

int NvshmemStatus() { return nvshmemx_init_status(); }

NvshmemVersion LoadedNvshmem() {
  NvshmemVersion version{};
  nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
  return version;
}

NvshmemVersion BuiltNvshmem() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

}  // namespace jax_ep
