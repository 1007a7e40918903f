// The XLA FFI handlers of dispatch, dispatch_cached and notify: they check shapes, then launch the one kernel.
//
//   jax_ep_notify            topk_idx                                -> slot, recv_slot, counts, recv_topk_idx ("rank")
//   jax_ep_dispatch          rows..., weights?, topk_idx             -> rows..., weights?, and what notify gives
//                            with `wire` as encoding_ffi.h has it
//   jax_ep_dispatch_cached   rows..., weights?, slot, recv_slot, counts -> rows..., weights?
#include <cstdint>

#include "common/error.h"
#include "dispatch/dispatch.h"
#include "dispatch/operands.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error Run(Operation operation, const char* name, cudaStream_t stream, int32_t device, ffi::RunId run,
               ffi::Span<const int64_t> devices, const DispatchAttributes& attributes, ffi::RemainingArgs args,
               ffi::RemainingRets rets) {
  DispatchParams p{};
  if (ffi::Error error = ReadDispatchOperands(operation, name, attributes, args, rets, &p); error.failure())
    return error;
  const int num_ranks = static_cast<int>(attributes.num_ranks);
  if (!DispatchFits(p, num_ranks)) return InvalidArgument(name, "the kernel does not take this shape");
  Member member;
  if (ffi::Error error = FindMember(name, stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  CheckMail(&member, {p.rows[0].recv, p.rows[1].recv, p.recv_weights, p.recv_slot, p.recv_topk_idx});
  DispatchConfig config;
  if (attributes.num_sms > 0) config.num_sms = static_cast<int>(attributes.num_sms);
  if (DispatchPulls(p, num_ranks, config)) CheckMail(&member, {p.rows[0].x, p.rows[1].x}, p.rows[0].recv);
  p.group = member.view();
  p.refused = member.refused();
  return Report(name, member, LaunchDispatch(p, num_ranks, config, stream));
}

template <Operation operation>
ffi::Error Handle(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                  int64_t num_ranks, int64_t num_experts, int64_t layout, int64_t expert_alignment,
                  int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows, int64_t has_weights,
                  int64_t num_sms, int64_t wire, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const DispatchAttributes attributes{num_ranks,       num_experts, layout,      expert_alignment, expert_capacity,
                                      max_recv_tokens, num_rows,    has_weights, num_sms,          wire};
  return Run(operation, NameOf(operation), stream, device, run, devices, attributes, args, rets);
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
