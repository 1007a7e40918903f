// The extension jax_ep._core: XLA FFI handlers by target name, for jax_ep/_src/targets.py to register, and the groups
// of ffi/group/group.h, for jax_ep/_src/group.py. No logic here.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/vector.h>

#include "group/group.h"
#include "group/shared_memory.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

extern "C" XLA_FFI_Error* JaxEpBarrier(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombine(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatch(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchCached(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchLayout(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpNotify(XLA_FFI_CallFrame*);

namespace {

nb::dict Handlers() {
  nb::dict handlers;
  const auto add = [&](const char* target, XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
    handlers[target] = nb::capsule(reinterpret_cast<void*>(handler));
  };
  add("jax_ep_barrier", JaxEpBarrier);
  add("jax_ep_combine", JaxEpCombine);
  add("jax_ep_dispatch", JaxEpDispatch);
  add("jax_ep_dispatch_cached", JaxEpDispatchCached);
  add("jax_ep_dispatch_layout", JaxEpDispatchLayout);
  add("jax_ep_notify", JaxEpNotify);
  return handlers;
}

}  // namespace

NB_MODULE(_core, module) {
  module.def("handlers", &Handlers);
  module.def(
      "make_group", [](const std::vector<int>& devices) { jax_ep::Group::OfDevices(devices); }, nb::arg("devices"));
  nb::class_<jax_ep::Place>(module, "Place")
      .def(nb::init<int, int, uint64_t, uint64_t, uint64_t, uint64_t>(), nb::arg("process"), nb::arg("device"),
           nb::arg("window"), nb::arg("shared_begin"), nb::arg("shared_bytes"), nb::arg("shift"));
  module.def("make_spanning_group", &jax_ep::Group::MakeSpanning, nb::arg("devices"), nb::arg("places"));
  module.def("set_ordinals", &jax_ep::Group::SetOrdinals, nb::arg("ordinal_by_device"));
  module.def("has_failed_spanning", &jax_ep::Group::HasFailedSpanning);
  module.def("spanning_generation", &jax_ep::Group::SpanningGeneration);
  module.def("resume", &jax_ep::Group::Resume, nb::arg("generation"));
  module.attr("window_bytes") = sizeof(jax_ep::Window);
  nb::class_<jax_ep::SharedMemory>(module, "SharedMemory")
      .def_ro("fd", &jax_ep::SharedMemory::fd)
      .def_ro("begin", &jax_ep::SharedMemory::begin)
      .def_ro("bytes", &jax_ep::SharedMemory::bytes);
  module.def("make_shared_memory", &jax_ep::MakeSharedMemory, nb::arg("device"), nb::arg("bytes"), nb::arg("devices"));
  module.def("export_allocation", &jax_ep::ExportAllocation, nb::arg("device"), nb::arg("address"));
  module.def("import_memory", &jax_ep::ImportMemory, nb::arg("fd"), nb::arg("bytes"), nb::arg("devices"));
  module.def("have_peer_access", &jax_ep::Group::HavePeerAccess, nb::arg("devices"));
  module.def("set_timeout", &jax_ep::Group::SetTimeout, nb::arg("seconds"));
  module.attr("cuda_version") = nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  module.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
