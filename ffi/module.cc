// The extension jax_ep._core: XLA FFI handlers by target name, for jax_ep/_src/targets.py to register, and the groups
// of ffi/group/group.h, for jax_ep/_src/group.py. No logic here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "group/group.h"
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
  module.def("have_peer_access", &jax_ep::Group::HavePeerAccess, nb::arg("devices"));
  module.def("set_timeout", &jax_ep::Group::SetTimeout, nb::arg("seconds"));
  module.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
