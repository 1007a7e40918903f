// The extension jax_ep._core: XLA FFI handlers by target name, for jax_ep/_src/targets.py to register. No logic here.
#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

extern "C" XLA_FFI_Error* JaxEpDispatchLayout(XLA_FFI_CallFrame*);

namespace {

nb::dict Handlers() {
  nb::dict handlers;
  const auto add = [&](const char* target, XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
    handlers[target] = nb::capsule(reinterpret_cast<void*>(handler));
  };
  add("jax_ep_dispatch_layout", JaxEpDispatchLayout);
  return handlers;
}

}  // namespace

NB_MODULE(_core, module) {
  module.def("handlers", &Handlers);
  module.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
