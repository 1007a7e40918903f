// The XLA FFI handlers of calls over nodes: operands, results and checks are those of dispatch/operands.h,
// combine/operands.h and group/barrier_ffi.cc; `direct` chooses one hop instead of two (internode.h). The combine has
// no scratch. The kernels are jax_ep._internode's.
#include <cstdint>

#include "combine/operands.h"
#include "common/error.h"
#include "dispatch/operands.h"
#include "group/member.h"
#include "internode/internode_group.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error FindInternodeMember(const char* name, cudaStream_t stream, int32_t device, ffi::RunId run,
                               ffi::Span<const int64_t> devices, int64_t num_ranks, Member* member,
                               const InternodeView** view) {
  if (TheInternodeKernels() == nullptr) {
    return ffi::Error::Internal(std::string(name) +
                                ": this group is over several nodes, and jax_ep._internode is not loaded. Call "
                                "jax_ep.initialize(), then compile the program again with jax.jit.");
  }
  if (ffi::Error error = FindMember(name, stream, device, run, devices, num_ranks, member); error.failure())
    return error;
  *view = FindInternodeView(member->group);
  if (*view != nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(name) + ": this group was not made over nodes");
}

InternodeConfig Config(int64_t num_sms, int64_t direct) {
  InternodeConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  config.direct = direct != 0;
  return config;
}

template <Operation operation>
ffi::Error Dispatch(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                    int64_t num_ranks, int64_t num_experts, int64_t layout, int64_t expert_alignment,
                    int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows, int64_t has_weights,
                    int64_t num_sms, int64_t direct, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr const char* kName = NameOf(operation);
  DispatchParams p{};
  const DispatchAttributes attributes{num_ranks,       num_experts, layout,      expert_alignment, expert_capacity,
                                      max_recv_tokens, num_rows,    has_weights, num_sms,          0};
  if (ffi::Error error = ReadDispatchOperands(operation, kName, attributes, args, rets, &p); error.failure())
    return error;
  if (!DispatchFits(p, static_cast<int>(num_ranks)))
    return InvalidArgument(kName, "the kernel does not take this shape");
  Member member;
  const InternodeView* view = nullptr;
  if (ffi::Error error = FindInternodeMember(kName, stream, device, run, devices, num_ranks, &member, &view);
      error.failure())
    return error;
  p.group = member.view();
  p.refused = member.refused();
  return Report(kName, member, TheInternodeKernels()->dispatch(p, *view, Config(num_sms, direct), stream));
}

ffi::Error Combine(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, int64_t one_row_a_rank, int64_t max_recv_tokens, int64_t has_rows,
                   int64_t has_weights, int64_t has_carried, int64_t num_sms, int64_t direct, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  CombineParams p{};
  const CombineAttributes attributes{one_row_a_rank, max_recv_tokens, has_rows, has_weights, has_carried};
  if (ffi::Error error = ReadCombineOperands(attributes, 0, args, rets, &p); error.failure()) return error;
  if (!CombineFits(p, static_cast<int>(num_ranks)))
    return InvalidArgument("combine", "the kernel does not take this shape");
  Member member;
  const InternodeView* view = nullptr;
  if (ffi::Error error = FindInternodeMember("combine", stream, device, run, devices, num_ranks, &member, &view);
      error.failure())
    return error;
  p.group = member.view();
  p.refused = member.refused();
  return Report("combine", member, TheInternodeKernels()->combine(p, *view, Config(num_sms, direct), stream));
}

ffi::Error Barrier(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, ffi::BufferR1<ffi::S32>, ffi::ResultBufferR1<ffi::S32> came) {
  Member member;
  const InternodeView* view = nullptr;
  if (ffi::Error error = FindInternodeMember("barrier", stream, device, run, devices, num_ranks, &member, &view);
      error.failure())
    return error;
  return Report("barrier", member,
                TheInternodeKernels()->barrier(member.view(), *view, member.refused(), came->typed_data(), stream));
}

auto DispatchBinding() {
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
      .Attr<int64_t>("direct")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace
}  // namespace jax_ep

// The epoch lives in device memory, so a captured launch can be replayed.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInternodeDispatch, jax_ep::Dispatch<jax_ep::kDispatch>, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInternodeDispatchCached, jax_ep::Dispatch<jax_ep::kDispatchCached>,
                              jax_ep::DispatchBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInternodeNotify, jax_ep::Dispatch<jax_ep::kNotify>, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInternodeCombine, jax_ep::Combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::RunId>()
                                  .Attr<ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("num_ranks")
                                  .Attr<int64_t>("one_row_a_rank")
                                  .Attr<int64_t>("max_recv_tokens")
                                  .Attr<int64_t>("has_rows")
                                  .Attr<int64_t>("has_weights")
                                  .Attr<int64_t>("has_carried")
                                  .Attr<int64_t>("num_sms")
                                  .Attr<int64_t>("direct")
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpInternodeBarrier, jax_ep::Barrier,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::RunId>()
                                  .Attr<ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("num_ranks")
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
