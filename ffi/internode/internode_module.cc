// The extension jax_ep._internode: kernels that link NVSHMEM, for jax_ep/_src/internode.py to load where nodes must
// talk and to hand to jax_ep._core, whose handlers call them. No logic here.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>

#include "internode/attach.h"
#include "internode/internode.h"

namespace nb = nanobind;

namespace {

cudaError_t Load() {
  if (cudaError_t error = jax_ep::LoadInternodeDispatch(); error != cudaSuccess) return error;
  if (cudaError_t error = jax_ep::LoadInternodeCombine(); error != cudaSuccess) return error;
  return jax_ep::LoadInternodeBarrier();
}

const jax_ep::InternodeKernels kKernels = {&Load, &jax_ep::LaunchInternodeDispatch, &jax_ep::LaunchInternodeCombine,
                                           &jax_ep::LaunchInternodeBarrier};

nb::tuple InTuple(const jax_ep::NvshmemVersion& version) {
  return nb::make_tuple(version.major, version.minor, version.patch);
}

}  // namespace

NB_MODULE(_internode, module) {
  module.def("kernels", [] { return nb::capsule(&kKernels, "jax_ep.InternodeKernels"); });
  module.def("use_device", [](int device) { return cudaSetDevice(device) == cudaSuccess; }, nb::arg("device"));
  module.def(
      "clear",
      [](uint64_t address, size_t num_bytes) {
        return cudaMemset(reinterpret_cast<void*>(address), 0, num_bytes) == cudaSuccess &&
               cudaDeviceSynchronize() == cudaSuccess;
      },
      nb::arg("address"), nb::arg("num_bytes"));
  module.def("attach", &jax_ep::AttachNvshmem, nb::arg("device"));
  module.def("status", &jax_ep::NvshmemStatus);
  module.def("loaded_nvshmem", [] { return InTuple(jax_ep::LoadedNvshmem()); });
  module.attr("built_nvshmem") = InTuple(jax_ep::BuiltNvshmem());
}
