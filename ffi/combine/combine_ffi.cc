// The XLA FFI handler of combine: checks shapes, then launches.
//
//   jax_ep_combine   y?, weights?, carried?, slot, recv_slot -> out?, carried_back?, scratch?
#include <cstdint>

#include "combine/combine.h"
#include "combine/operands.h"
#include "common/error.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error Combine(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, int64_t one_row_a_rank, int64_t max_recv_tokens, int64_t has_rows,
                   int64_t has_weights, int64_t has_carried, int64_t num_sms, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  CombineParams p{};
  const CombineAttributes attributes{one_row_a_rank, max_recv_tokens, has_rows, has_weights, has_carried};
  const int64_t num_scratch = one_row_a_rank != 0 ? 0 : num_ranks - 1;
  if (ffi::Error error = ReadCombineOperands(attributes, num_scratch, args, rets, &p); error.failure()) return error;
  if (!CombineFits(p, static_cast<int>(num_ranks)))
    return InvalidArgument("combine", "the kernel does not take this shape");
  Member member;
  if (ffi::Error error = FindMember("combine", stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  CheckMail(&member, {p.scratch});
  const void* const result = p.out != nullptr ? p.out : reinterpret_cast<const char*>(p.carried_back);
  CheckMail(&member, {p.one_row_a_rank ? p.y : nullptr, p.carried}, result);
  p.group = member.view();
  p.refused = member.refused();
  CombineConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  return Report("combine", member, LaunchCombine(p, config, stream));
}

}  // namespace
}  // namespace jax_ep

// The epoch lives in device memory, so a captured launch can be replayed.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombine, jax_ep::Combine,
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
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
