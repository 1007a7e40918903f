// The XLA FFI handlers of dispatch, dispatch_cached and notify: they check shapes, then launch the one kernel.
//
//   jax_ep_notify            topk_idx                                -> slot, recv_slot, counts, recv_topk_idx ("rank")
//   jax_ep_dispatch          rows..., weights?, topk_idx             -> rows..., weights?, and what notify gives
//                            with `wire` as encoding_ffi.h has it
//   jax_ep_dispatch_cached   rows..., weights?, slot, recv_slot, counts -> rows..., weights?
#include <cstdint>

#include "common/error.h"
#include "dispatch/dispatch.h"
#include "dispatch/encoding_ffi.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

ffi::Error Run(Operation operation, const char* name, cudaStream_t stream, int32_t device, ffi::RunId run,
               ffi::Span<const int64_t> devices, int64_t num_ranks, int64_t num_experts, int64_t layout,
               int64_t expert_alignment, int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows,
               int64_t has_weights, int64_t num_sms, int64_t wire, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const bool cached = operation == kDispatchCached;
  DispatchParams p{};
  p.operation = operation;
  p.layout = static_cast<Layout>(layout);
  const bool encodes = wire != 0;
  const size_t moved = num_rows + has_weights, come = moved + encodes;
  const size_t num_routed = cached ? 0 : p.layout == Layout::kRank ? 4 : 3;
  if (num_rows > kMaxRowArrays || args.size() != moved + (cached ? 3 : 1) || rets.size() != come + num_routed) {
    return InvalidArgument(name, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(moved)->dimensions();  // topk_idx or slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.num_experts = static_cast<int>(num_experts);
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  p.expert_alignment = static_cast<int>(expert_alignment);
  p.expert_capacity = static_cast<int>(expert_capacity);
  p.num_row_arrays = static_cast<int>(num_rows);
  if (encodes) {
    if (ffi::Error error = ReadEncoding(name, wire, num_rows, args, rets, &p); error.failure()) return error;
  }
  for (int64_t i = 0; !encodes && i < num_rows; ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i);
    const auto recv = rets.get<ffi::AnyBuffer>(i);
    p.rows[i] = {Data<char>(*x), Data<char>(**recv), static_cast<int64_t>(x->size_bytes()) / p.num_tokens};
    if (static_cast<int64_t>((*recv)->size_bytes()) != p.rows[i].row_bytes * max_recv_tokens) {
      return InvalidArgument(name, "a result must have max_recv_tokens rows of its operand's size");
    }
  }
  if (has_weights != 0) {
    p.topk_weights = Data<float>(*args.get<ffi::AnyBuffer>(num_rows));
    p.recv_weights = Data<float>(**rets.get<ffi::AnyBuffer>(num_rows + encodes));
  }
  if (cached) {
    p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved));
    p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 1));
    p.counts = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 2));
  } else {
    p.topk_idx = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved));
    p.slot = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come));
    p.recv_slot = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 1));
    p.counts = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 2));
    if (num_routed == 4) p.recv_topk_idx = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 3));
  }
  if (!DispatchFits(p, static_cast<int>(num_ranks)))
    return InvalidArgument(name, "the kernel does not take this shape");
  Member member;
  if (ffi::Error error = FindMember(name, stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  CheckMail(&member, {p.rows[0].recv, p.rows[1].recv, p.recv_weights, p.recv_slot, p.recv_topk_idx});
  p.group = member.view();
  p.refused = member.refused();
  DispatchConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  return Report(name, member, LaunchDispatch(p, static_cast<int>(num_ranks), config, stream));
}

template <Operation operation>
ffi::Error Handle(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                  int64_t num_ranks, int64_t num_experts, int64_t layout, int64_t expert_alignment,
                  int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows, int64_t has_weights,
                  int64_t num_sms, int64_t wire, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr const char* kName = operation == kDispatch ? "dispatch"
                                : operation == kNotify ? "notify"
                                                       : "dispatch_cached";
  return Run(operation, kName, stream, device, run, devices, num_ranks, num_experts, layout, expert_alignment,
             expert_capacity, max_recv_tokens, num_rows, has_weights, num_sms, wire, args, rets);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::RunId>()
      .Attr<ffi::Span<const int64_t>>("devices")
      .Attr<int64_t>("num_ranks")
      .Attr<int64_t>("num_experts")
      .Attr<int64_t>("layout")
      .Attr<int64_t>("expert_alignment")
      .Attr<int64_t>("expert_capacity")
      .Attr<int64_t>("max_recv_tokens")
      .Attr<int64_t>("num_rows")
      .Attr<int64_t>("has_weights")
      .Attr<int64_t>("num_sms")
      .Attr<int64_t>("wire")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace
}  // namespace jax_ep

// The epoch lives in device memory, so a captured launch can be replayed.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatch, jax_ep::Handle<jax_ep::kDispatch>, jax_ep::Binding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchCached, jax_ep::Handle<jax_ep::kDispatchCached>, jax_ep::Binding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpNotify, jax_ep::Handle<jax_ep::kNotify>, jax_ep::Binding(),
                              {ffi::Traits::kCmdBufferCompatible});
