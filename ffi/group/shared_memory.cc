// CUDA's virtual memory management, found in the driver at run time: the extension imports where there is none.
#include "group/shared_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace jax_ep {
namespace {

constexpr unsigned int kDriverVersion = 12000;

[[noreturn]] void Throw(const std::string& what, const std::string& why) {
  throw std::runtime_error("jax_ep: sharing memory between processes: " + what + ": " + why);
}

void Check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  Throw(what, cudaGetErrorString(error));
}

template <class Function>
Function* Find(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  Check(name, cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || function == nullptr) Throw(name, "the driver does not have it");
  return reinterpret_cast<Function*>(function);
}

void Check(const char* what, CUresult result) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  Find<decltype(cuGetErrorString)>("cuGetErrorString")(result, &text);
  Throw(what, text != nullptr ? text : "error " + std::to_string(result));
}

#define CALL_DRIVER(function, ...) Check(#function, Find<decltype(function)>(#function)(__VA_ARGS__))

// `device` is current, with a context, until this goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    Check("cudaGetDevice", cudaGetDevice(&before_));
    Check("cudaSetDevice", cudaSetDevice(device));
    Check("cudaFree", cudaFree(nullptr));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Holds the allocation until this goes; mappings and descriptors hold it as well.
struct Handle {
  decltype(&cuMemRelease) release = Find<decltype(cuMemRelease)>("cuMemRelease");
  CUmemGenericAllocationHandle value = 0;
  ~Handle() {
    if (value != 0) release(value);
  }
};

uint64_t Map(const Handle& handle, uint64_t bytes, const std::vector<int>& devices) {
  CUdeviceptr address = 0;
  CALL_DRIVER(cuMemAddressReserve, &address, bytes, 0, 0, 0);
  const auto give_back = [&](bool mapped) {
    if (mapped) Find<decltype(cuMemUnmap)>("cuMemUnmap")(address, bytes);
    Find<decltype(cuMemAddressFree)>("cuMemAddressFree")(address, bytes);
  };
  bool mapped = false;
  try {
    CALL_DRIVER(cuMemMap, address, bytes, 0, handle.value, 0);
    mapped = true;
    std::vector<CUmemAccessDesc> access;
    access.reserve(devices.size());
    for (int device : devices) {
      access.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, {device}}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
    }
    CALL_DRIVER(cuMemSetAccess, address, bytes, access.data(), access.size());
  } catch (...) {
    give_back(mapped);
    throw;
  }
  return address;
}

int Export(const Handle& handle) {
  int fd = -1;
  CALL_DRIVER(cuMemExportToShareableHandle, &fd, handle.value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  return fd;
}

}  // namespace

SharedMemory MakeSharedMemory(int device, uint64_t bytes, const std::vector<int>& devices) {
  DeviceGuard guard(device);
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  size_t granularity = 0;
  CALL_DRIVER(cuMemGetAllocationGranularity, &granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  bytes = (bytes + granularity - 1) / granularity * granularity;
  Handle handle;
  CALL_DRIVER(cuMemCreate, &handle.value, bytes, &properties, 0);
  const uint64_t begin = Map(handle, bytes, devices);
  cudaStream_t aside = nullptr;  // kernels may be running that wait for those of whoever asks for this memory
  Check("cudaStreamCreate", cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking));
  cudaError_t zeroed = cudaMemsetAsync(ToPointer(begin), 0, bytes, aside);
  if (zeroed == cudaSuccess) zeroed = cudaStreamSynchronize(aside);
  cudaStreamDestroy(aside);
  Check("cudaMemset", zeroed);
  return {Export(handle), begin, bytes};
}

SharedMemory ExportAllocation(int device, uint64_t address) {
  DeviceGuard guard(device);
  CUdeviceptr begin = 0;
  size_t bytes = 0;
  CALL_DRIVER(cuPointerGetAttribute, &begin, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address);
  CALL_DRIVER(cuPointerGetAttribute, &bytes, CU_POINTER_ATTRIBUTE_RANGE_SIZE, address);
  Handle handle;
  CALL_DRIVER(cuMemRetainAllocationHandle, &handle.value, ToPointer(begin));
  return {Export(handle), begin, bytes};
}

uint64_t ImportMemory(int fd, uint64_t bytes, const std::vector<int>& devices) {
  if (devices.empty()) Throw("import", "no devices to map it for");
  DeviceGuard guard(devices[0]);
  Handle handle;
  CALL_DRIVER(cuMemImportFromShareableHandle, &handle.value, ToPointer(static_cast<uint64_t>(fd)),
              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  return Map(handle, bytes, devices);
}

}  // namespace jax_ep
