// The XLA FFI handler of combine_grad: checks shapes, then launches.
//
//   jax_ep_combine_grad   out_bar, y, weights, recv_slot, counts -> y_bar, weights_bar
#include <cstdint>

#include "combine/combine_grad.h"
#include "common/error.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error CombineGrad(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                       int64_t num_ranks, int64_t expert_alignment, int64_t expert_capacity, int64_t num_sms,
                       ffi::AnyBuffer out_bar, ffi::AnyBuffer y, ffi::BufferR1<ffi::F32> weights,
                       ffi::BufferR3<ffi::S32> recv_slot, ffi::BufferR1<ffi::S32> counts,
                       ffi::Result<ffi::AnyBuffer> y_bar, ffi::ResultBufferR1<ffi::F32> weights_bar) {
  CombineGradParams p{};
  switch (y.element_type()) {
    case ffi::BF16:
      p.dtype = RowDtype::kBfloat16;
      break;
    case ffi::F16:
      p.dtype = RowDtype::kFloat16;
      break;
    case ffi::F32:
      p.dtype = RowDtype::kFloat32;
      break;
    default:
      return InvalidArgument("combine_grad", "y must be bf16, f16 or f32");
  }
  const auto choices = recv_slot.dimensions();  // [R, T, K]
  p.num_tokens = static_cast<int>(choices[1]);
  p.num_topk = static_cast<int>(choices[2]);
  p.max_recv_tokens = static_cast<int>(weights.dimensions()[0]);
  p.num_local_experts = static_cast<int>(counts.dimensions()[0]) - 1;
  p.expert_alignment = static_cast<int>(expert_alignment);
  p.expert_capacity = static_cast<int>(expert_capacity);
  if (p.num_tokens == 0 || choices[0] != num_ranks) {
    return InvalidArgument("combine_grad", "recv_slot must be s32[num_ranks, num_tokens, num_topk] with tokens");
  }
  p.row_bytes = static_cast<int64_t>(out_bar.size_bytes()) / p.num_tokens;
  const int64_t num_bytes = p.row_bytes * p.max_recv_tokens;
  if (out_bar.element_type() != y.element_type() || static_cast<int64_t>(y.size_bytes()) != num_bytes ||
      static_cast<int64_t>(y_bar->size_bytes()) != num_bytes || weights_bar->dimensions()[0] != p.max_recv_tokens) {
    return InvalidArgument("combine_grad", "out_bar, y and the results must have rows alike, and a weight a row");
  }
  if (!CombineGradFits(p, static_cast<int>(num_ranks))) {
    return InvalidArgument("combine_grad", "the kernel does not take this shape");
  }
  p.out_bar = static_cast<const char*>(out_bar.untyped_data());
  p.y = static_cast<const char*>(y.untyped_data());
  p.weights = weights.typed_data();
  p.recv_slot = recv_slot.typed_data();
  p.counts = counts.typed_data();
  p.y_bar = static_cast<char*>(y_bar->untyped_data());
  p.weights_bar = weights_bar->typed_data();
  Member member;
  if (ffi::Error error = FindMember("combine_grad", stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  CheckMail(&member, {p.out_bar}, p.y_bar);
  p.group = member.view();
  p.refused = member.refused();
  CombineConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  return Report("combine_grad", member, LaunchCombineGrad(p, config, stream));
}

}  // namespace
}  // namespace jax_ep

// The epoch lives in device memory, so a captured launch can be replayed.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineGrad, jax_ep::CombineGrad,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::RunId>()
                                  .Attr<ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("num_ranks")
                                  .Attr<int64_t>("expert_alignment")
                                  .Attr<int64_t>("expert_capacity")
                                  .Attr<int64_t>("num_sms")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR1<ffi::F32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
