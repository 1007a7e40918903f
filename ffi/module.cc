// The extension jax_ep._core: XLA FFI handlers by target name, for jax_ep/_src/targets.py to register, and the groups
// of ffi/group/group.h, for jax_ep/_src/group.py. No logic here.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/vector.h>

#include "group/group.h"
#include "group/shared_memory.h"
#include "low_latency/low_latency.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

extern "C" XLA_FFI_Error* JaxEpBarrier(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombine(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatch(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchCached(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchLayout(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpIsDead(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpIsDeadOnHost(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyCombine(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyCombineDone(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyCombineStart(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyDispatch(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyDispatchCached(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyDispatchDone(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyDispatchStart(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpLowLatencyNotify(XLA_FFI_CallFrame*);
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
  add("jax_ep_is_dead", JaxEpIsDead);
  add("jax_ep_low_latency_combine", JaxEpLowLatencyCombine);
  add("jax_ep_low_latency_combine_done", JaxEpLowLatencyCombineDone);
  add("jax_ep_low_latency_combine_start", JaxEpLowLatencyCombineStart);
  add("jax_ep_low_latency_dispatch", JaxEpLowLatencyDispatch);
  add("jax_ep_low_latency_dispatch_cached", JaxEpLowLatencyDispatchCached);
  add("jax_ep_low_latency_dispatch_done", JaxEpLowLatencyDispatchDone);
  add("jax_ep_low_latency_dispatch_start", JaxEpLowLatencyDispatchStart);
  add("jax_ep_low_latency_notify", JaxEpLowLatencyNotify);
  add("jax_ep_notify", JaxEpNotify);
  return handlers;
}

// Bytes of a window that a low-latency dispatch needs, 0 where it does not fit; `row_bytes` of each array of rows.
int64_t LowLatencyDispatchBytes(int num_ranks, int num_experts, int layout, int num_tokens, int num_topk,
                                int max_recv_tokens, const std::vector<int64_t>& row_bytes, bool has_weights,
                                bool is_routed, bool encodes) {
  if (row_bytes.size() > jax_ep::kMaxRowArrays) return 0;
  static const float weight = 1;
  jax_ep::DispatchParams p{};
  p.operation = is_routed ? jax_ep::kDispatchCached : jax_ep::kDispatch;
  p.layout = static_cast<jax_ep::Layout>(layout);
  p.num_experts = num_experts, p.num_tokens = num_tokens, p.num_topk = num_topk, p.max_recv_tokens = max_recv_tokens;
  p.topk_weights = has_weights ? &weight : nullptr;
  for (int64_t bytes : row_bytes) p.rows[p.num_row_arrays++].row_bytes = bytes;
  return jax_ep::LowLatencyDispatchBytes(p, num_ranks, encodes);
}

// The same of a low-latency combine; no rows have 0 bytes. `logfmt_item_bytes`: of a number, if sums travel in
// LogFMT-10; else 0.
int64_t LowLatencyCombineBytes(int num_ranks, int num_tokens, int num_topk, int max_recv_tokens, int64_t row_bytes,
                               bool has_carried, int logfmt_item_bytes) {
  static const float carried = 0;
  jax_ep::CombineParams p{};
  p.dtype = logfmt_item_bytes == 4 ? jax_ep::RowDtype::kFloat32 : jax_ep::RowDtype::kBfloat16;
  p.num_tokens = num_tokens, p.num_topk = num_topk, p.max_recv_tokens = max_recv_tokens, p.row_bytes = row_bytes;
  p.carried = has_carried ? &carried : nullptr;
  return jax_ep::LowLatencyCombineBytes(p, num_ranks, logfmt_item_bytes != 0);
}

}  // namespace

NB_MODULE(_core, module) {
  module.def("handlers", &Handlers);
  module.def("host_handlers", [] {
    nb::dict handlers;
    handlers["jax_ep_is_dead"] = nb::capsule(reinterpret_cast<void*>(JaxEpIsDeadOnHost));
    return handlers;
  });
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
  module.def(
      "make_arenas",
      [](const std::vector<int>& devices, int64_t window_bytes) {
        jax_ep::Group::OfDevices(devices).MakeArenas(window_bytes);
      },
      nb::arg("devices"), nb::arg("window_bytes"));
  module.def("low_latency_dispatch_bytes", &LowLatencyDispatchBytes, nb::arg("num_ranks"), nb::arg("num_experts"),
             nb::arg("layout"), nb::arg("num_tokens"), nb::arg("num_topk"), nb::arg("max_recv_tokens"),
             nb::arg("row_bytes"), nb::arg("has_weights"), nb::arg("is_routed"), nb::arg("encodes"));
  module.def("low_latency_combine_bytes", &LowLatencyCombineBytes, nb::arg("num_ranks"), nb::arg("num_tokens"),
             nb::arg("num_topk"), nb::arg("max_recv_tokens"), nb::arg("row_bytes"), nb::arg("has_carried"),
             nb::arg("logfmt_item_bytes"));
  module.def("have_peer_access", &jax_ep::Group::HavePeerAccess, nb::arg("devices"));
  module.def("set_dead", &jax_ep::Group::SetDead, nb::arg("devices"));
  module.def("set_timeout", &jax_ep::Group::SetTimeout, nb::arg("seconds"));
  module.attr("cuda_version") = nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  module.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
