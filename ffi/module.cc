// The extension jax_ep._core: XLA FFI handlers by target name, for jax_ep/_src/targets.py to register, and the groups
// of ffi/group/group.h, for jax_ep/_src/group.py. No logic here.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/vector.h>

#include "group/group.h"
#include "group/shared_memory.h"
#include "halves/halves.h"
#include "internode/internode_group.h"
#include "internode/plan.h"
#include "low_latency/low_latency.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

extern "C" XLA_FFI_Error* JaxEpBarrier(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpBeginRun(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombine(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombineDone(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombineStart(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpCombineGrad(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatch(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchCached(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchDone(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchLayout(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpDispatchStart(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpInternodeBarrier(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpInternodeCombine(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpInternodeDispatch(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpInternodeDispatchCached(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* JaxEpInternodeNotify(XLA_FFI_CallFrame*);
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

// By target, then by stage; those of calls through a group have two.
nb::dict Handlers() {
  using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);
  nb::dict handlers;
  const auto capsule = [](Handler handler) { return nb::capsule(reinterpret_cast<void*>(handler)); };
  const auto add = [&](const char* target, Handler execute, Handler initialize = JaxEpBeginRun) {
    nb::dict stages;
    stages["execute"] = capsule(execute);
    if (initialize != nullptr) stages["initialize"] = capsule(initialize);
    handlers[target] = stages;
  };
  add("jax_ep_barrier", JaxEpBarrier);
  add("jax_ep_combine", JaxEpCombine);
  add("jax_ep_combine_done", JaxEpCombineDone);
  add("jax_ep_combine_start", JaxEpCombineStart);
  add("jax_ep_combine_grad", JaxEpCombineGrad);
  add("jax_ep_dispatch", JaxEpDispatch);
  add("jax_ep_dispatch_cached", JaxEpDispatchCached);
  add("jax_ep_dispatch_done", JaxEpDispatchDone);
  add("jax_ep_dispatch_layout", JaxEpDispatchLayout, nullptr);
  add("jax_ep_dispatch_start", JaxEpDispatchStart);
  add("jax_ep_internode_barrier", JaxEpInternodeBarrier);
  add("jax_ep_internode_combine", JaxEpInternodeCombine);
  add("jax_ep_internode_dispatch", JaxEpInternodeDispatch);
  add("jax_ep_internode_dispatch_cached", JaxEpInternodeDispatchCached);
  add("jax_ep_internode_notify", JaxEpInternodeNotify);
  add("jax_ep_is_dead", JaxEpIsDead, nullptr);
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

// A dispatch's sizes, `row_bytes` of each array of rows, and what kind it is.
jax_ep::DispatchParams DispatchSizes(int num_experts, int layout, int num_tokens, int num_topk, int max_recv_tokens,
                                     const std::vector<int64_t>& row_bytes, bool has_weights, bool is_routed) {
  static const float weight = 1;
  jax_ep::DispatchParams p{};
  p.operation = is_routed ? jax_ep::kDispatchCached : jax_ep::kDispatch;
  p.layout = static_cast<jax_ep::Layout>(layout);
  p.num_experts = num_experts, p.num_tokens = num_tokens, p.num_topk = num_topk, p.max_recv_tokens = max_recv_tokens;
  p.topk_weights = has_weights ? &weight : nullptr;
  for (int64_t bytes : row_bytes) p.rows[p.num_row_arrays++].row_bytes = bytes;
  return p;
}

// A combine's; no rows have 0 bytes.
jax_ep::CombineParams CombineSizes(int num_tokens, int num_topk, int max_recv_tokens, int64_t row_bytes,
                                   bool has_carried) {
  static const float carried = 0;
  jax_ep::CombineParams p{};
  p.num_tokens = num_tokens, p.num_topk = num_topk, p.max_recv_tokens = max_recv_tokens, p.row_bytes = row_bytes;
  p.carried = has_carried ? &carried : nullptr;
  return p;
}

// Bytes of a window that a call needs, 0 where it does not fit.
int64_t LowLatencyDispatchBytes(int num_ranks, int num_experts, int layout, int num_tokens, int num_topk,
                                int max_recv_tokens, const std::vector<int64_t>& row_bytes, bool has_weights,
                                bool is_routed, bool encodes) {
  if (row_bytes.size() > jax_ep::kMaxRowArrays) return 0;
  static const char row = 0;
  jax_ep::DispatchParams p =
      DispatchSizes(num_experts, layout, num_tokens, num_topk, max_recv_tokens, row_bytes, has_weights, is_routed);
  p.encoding.x = encodes ? &row : nullptr;
  return jax_ep::LowLatencyDispatchBytes(p, num_ranks);
}

int64_t DispatchLandingBytes(int num_ranks, int num_experts, int layout, int num_tokens, int num_topk,
                             int max_recv_tokens, const std::vector<int64_t>& row_bytes, bool has_weights) {
  if (row_bytes.size() > jax_ep::kMaxRowArrays) return 0;
  return jax_ep::DispatchLandingBytes(
      DispatchSizes(num_experts, layout, num_tokens, num_topk, max_recv_tokens, row_bytes, has_weights, true),
      num_ranks);
}

// `logfmt_item_bytes`: of a number, if sums travel in LogFMT-10; else 0.
int64_t LowLatencyCombineBytes(int num_ranks, int num_tokens, int num_topk, int max_recv_tokens, int64_t row_bytes,
                               bool has_carried, int logfmt_item_bytes) {
  jax_ep::CombineParams p = CombineSizes(num_tokens, num_topk, max_recv_tokens, row_bytes, has_carried);
  p.dtype = logfmt_item_bytes == 4 ? jax_ep::RowDtype::kFloat32 : jax_ep::RowDtype::kBfloat16;
  return jax_ep::LowLatencyCombineBytes(p, num_ranks, logfmt_item_bytes != 0);
}

int64_t CombineLandingBytes(int num_ranks, int num_tokens, int num_topk, int max_recv_tokens, int64_t row_bytes,
                            bool has_carried) {
  return jax_ep::CombineLandingBytes(CombineSizes(num_tokens, num_topk, max_recv_tokens, row_bytes, has_carried),
                                     num_ranks);
}

// How a dispatch over nodes is cut, for tests and docs: {blocks, lanes, bytes of a ring, of a slot, of a message,
// pieces of a row, messages of a chunk}.
nb::tuple InternodePlanOf(int num_nodes, int ranks_per_node, int num_tokens, int num_topk, int64_t row_bytes,
                          int64_t second_bytes, int num_sms, int num_processes) {
  const int64_t box = jax_ep::BoxBytes(num_processes);
  const int num_tasks = jax_ep::DispatchTasksOf(num_nodes, ranks_per_node).count();
  const int num_rings = jax_ep::DispatchRings(num_nodes, ranks_per_node);
  const jax_ep::Lanes lanes = jax_ep::PlanLanes(num_sms, num_tasks, num_tokens, num_rings, box);
  const jax_ep::Messages messages =
      jax_ep::PlanMessages(row_bytes, second_bytes, jax_ep::DispatchHeaderBytes(num_topk), lanes, num_rings, box);
  return nb::make_tuple(lanes.num_blocks, lanes.num_lanes, messages.RingBytes(), messages.slot_bytes,
                        messages.message_bytes, messages.num_pieces, messages.per_chunk);
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
  using Released = nb::call_guard<nb::gil_scoped_release>;  // other threads answer other processes meanwhile
  module.def("make_shared_memory", &jax_ep::MakeSharedMemory, nb::arg("device"), nb::arg("bytes"), nb::arg("devices"),
             Released());
  module.def("export_allocation", &jax_ep::ExportAllocation, nb::arg("device"), nb::arg("address"));
  module.def("import_memory", &jax_ep::ImportMemory, nb::arg("fd"), nb::arg("bytes"), nb::arg("devices"), Released());
  module.def(
      "install_internode",
      [](const nb::capsule& kernels) {
        jax_ep::InstallInternode(static_cast<const jax_ep::InternodeKernels*>(kernels.data("jax_ep.InternodeKernels")));
      },
      nb::arg("kernels"));
  nb::class_<jax_ep::Berth>(module, "Berth")
      .def(nb::init<int, int, int, uint64_t>(), nb::arg("process"), nb::arg("device"), nb::arg("node"),
           nb::arg("room"));
  module.def("make_internode_group", &jax_ep::MakeInternodeGroup, nb::arg("devices"), nb::arg("berths"),
             nb::arg("box_bytes"));
  module.def(
      "nodes_of",
      [](const std::vector<int>& node_of_rank) {
        const jax_ep::Nodes nodes = jax_ep::NodesOf(node_of_rank);
        return nb::make_tuple(nodes.num_nodes, nodes.ranks_per_node);
      },
      nb::arg("node_of_rank"));
  module.def("box_bytes", &jax_ep::BoxBytes, nb::arg("num_processes"));
  module.def("room_bytes", &jax_ep::RoomBytes, nb::arg("num_processes"));
  module.def("internode_plan", &InternodePlanOf, nb::arg("num_nodes"), nb::arg("ranks_per_node"), nb::arg("num_tokens"),
             nb::arg("num_topk"), nb::arg("row_bytes"), nb::arg("second_bytes"), nb::arg("num_sms"),
             nb::arg("num_processes"));
  module.def(
      "make_shared_arena",
      [](const std::vector<int>& devices, jax_ep::Purpose purpose, int64_t bytes, const std::vector<uint64_t>& at) {
        jax_ep::Group::OfDevices(devices).MakeSharedArena(purpose, bytes, at);
      },
      nb::arg("devices"), nb::arg("purpose"), nb::arg("bytes"), nb::arg("at"));
  module.def("low_latency_arena_bytes", &jax_ep::Group::LowLatencyArenaBytes, nb::arg("window_bytes"));
  nb::enum_<jax_ep::Purpose>(module, "Purpose")
      .value("LOW_LATENCY", jax_ep::Purpose::kLowLatency)
      .value("HALVES", jax_ep::Purpose::kHalves);
  module.def("landing_arena_bytes", &jax_ep::Group::LandingArenaBytes, nb::arg("window_bytes"));
  module.def("dispatch_landing_bytes", &DispatchLandingBytes, nb::arg("num_ranks"), nb::arg("num_experts"),
             nb::arg("layout"), nb::arg("num_tokens"), nb::arg("num_topk"), nb::arg("max_recv_tokens"),
             nb::arg("row_bytes"), nb::arg("has_weights"));
  module.def("combine_landing_bytes", &CombineLandingBytes, nb::arg("num_ranks"), nb::arg("num_tokens"),
             nb::arg("num_topk"), nb::arg("max_recv_tokens"), nb::arg("row_bytes"), nb::arg("has_carried"));
  module.def("low_latency_dispatch_bytes", &LowLatencyDispatchBytes, nb::arg("num_ranks"), nb::arg("num_experts"),
             nb::arg("layout"), nb::arg("num_tokens"), nb::arg("num_topk"), nb::arg("max_recv_tokens"),
             nb::arg("row_bytes"), nb::arg("has_weights"), nb::arg("is_routed"), nb::arg("encodes"));
  module.def("low_latency_combine_bytes", &LowLatencyCombineBytes, nb::arg("num_ranks"), nb::arg("num_tokens"),
             nb::arg("num_topk"), nb::arg("max_recv_tokens"), nb::arg("row_bytes"), nb::arg("has_carried"),
             nb::arg("logfmt_item_bytes"));
  module.def("have_peer_access", &jax_ep::Group::HavePeerAccess, nb::arg("devices"));
  module.def("set_dead", &jax_ep::Group::SetDead, nb::arg("devices"));
  module.def("forbid_masks", &jax_ep::Group::ForbidMasks, nb::arg("devices"));
  module.def("set_timeout", &jax_ep::Group::SetTimeout, nb::arg("seconds"));
  module.attr("cuda_version") = nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  module.attr("ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
