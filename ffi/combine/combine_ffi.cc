// The XLA FFI handler of combine: checks shapes, then launches.
//
//   jax_ep_combine   y?, weights?, carried?, slot, recv_slot -> out?, carried_back?, scratch?
#include <cstdint>

#include "combine/combine.h"
#include "common/error.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

ffi::Error Combine(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, int64_t one_row_a_rank, int64_t max_recv_tokens, int64_t has_rows,
                   int64_t has_weights, int64_t has_carried, int64_t num_sms, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  CombineParams p{};
  p.one_row_a_rank = one_row_a_rank != 0;
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  const bool has_scratch = has_rows != 0 && !p.one_row_a_rank && num_ranks > 1;
  const size_t num_moved = has_rows + has_weights + has_carried;
  if (args.size() != num_moved + 2 || rets.size() != static_cast<size_t>(has_rows + has_carried + has_scratch)) {
    return InvalidArgument("combine", "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(num_moved)->dimensions();  // slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved));
  p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved + 1));
  if (has_rows != 0) {
    const auto y = args.get<ffi::AnyBuffer>(0);
    const auto out = rets.get<ffi::AnyBuffer>(0);
    switch (y->element_type()) {
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
        return InvalidArgument("combine", "y must be bf16, f16 or f32");
    }
    p.y = Data<char>(*y);
    p.out = Data<char>(**out);
    p.row_bytes = static_cast<int64_t>((*out)->size_bytes()) / p.num_tokens;
    if (static_cast<int64_t>(y->size_bytes()) != p.row_bytes * max_recv_tokens) {
      return InvalidArgument("combine", "y must have max_recv_tokens rows of the result's size");
    }
  }
  if (has_weights != 0) p.weights = Data<float>(*args.get<ffi::AnyBuffer>(has_rows));
  if (has_carried != 0) {
    p.carried = Data<float>(*args.get<ffi::AnyBuffer>(has_rows + has_weights));
    p.carried_back = Data<float>(**rets.get<ffi::AnyBuffer>(has_rows));
  }
  if (has_scratch) {
    const auto scratch = rets.get<ffi::AnyBuffer>(has_rows + has_carried);
    p.scratch = Data<char>(**scratch);
    if (static_cast<int64_t>((*scratch)->size_bytes()) < (num_ranks - 1) * p.num_tokens * p.row_bytes) {
      return InvalidArgument("combine", "scratch must hold num_ranks - 1 results");
    }
  }
  if (!CombineFits(p, static_cast<int>(num_ranks)))
    return InvalidArgument("combine", "the kernel does not take this shape");
  Member member;
  if (ffi::Error error = FindMember("combine", stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  CheckMail(&member, {p.one_row_a_rank ? p.y : nullptr, p.scratch, p.carried});
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
