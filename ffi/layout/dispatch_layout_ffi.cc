// The XLA FFI handler of dispatch_layout: checks shapes, then launches.
#include <cstdint>
#include <limits>

#include "common/error.h"
#include "layout/dispatch_layout.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error DispatchLayout(cudaStream_t stream, int64_t num_experts, int64_t num_ranks, ffi::BufferR2<ffi::S32> topk_idx,
                          ffi::ResultBufferR1<ffi::S32> num_tokens_per_rank,
                          ffi::ResultBufferR1<ffi::S32> num_tokens_per_expert,
                          ffi::ResultBufferR2<ffi::PRED> is_token_in_rank) {
  constexpr int64_t kMaxSize = std::numeric_limits<int>::max();
  const int64_t num_tokens = topk_idx.dimensions()[0], num_topk = topk_idx.dimensions()[1];
  if (num_ranks < 1 || num_experts < 1 || num_experts % num_ranks != 0) {
    return InvalidArgument("dispatch_layout", "num_experts must be a positive multiple of num_ranks");
  }
  if (num_tokens > kMaxSize || num_topk > kMaxSize || num_experts + num_ranks > kMaxSize) {
    return InvalidArgument("dispatch_layout", "sizes must fit in 32 bits");
  }
  if (num_tokens_per_rank->dimensions()[0] != num_ranks || num_tokens_per_expert->dimensions()[0] != num_experts ||
      is_token_in_rank->dimensions()[0] != num_tokens || is_token_in_rank->dimensions()[1] != num_ranks) {
    return InvalidArgument("dispatch_layout",
                           "results must be s32[num_ranks], s32[num_experts], pred[num_tokens, num_ranks]");
  }
  DispatchLayoutParams params;
  params.num_tokens = static_cast<int>(num_tokens);
  params.num_topk = static_cast<int>(num_topk);
  params.num_experts = static_cast<int>(num_experts);
  params.num_ranks = static_cast<int>(num_ranks);
  params.topk_idx = topk_idx.typed_data();
  params.num_tokens_per_rank = num_tokens_per_rank->typed_data();
  params.num_tokens_per_expert = num_tokens_per_expert->typed_data();
  params.is_token_in_rank = is_token_in_rank->typed_data();
  return FromCuda("dispatch_layout", LaunchDispatchLayout(params, stream));
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchLayout, jax_ep::DispatchLayout,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Attr<int64_t>("num_experts")
                                  .Attr<int64_t>("num_ranks")
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR2<ffi::PRED>>(),
                              {ffi::Traits::kCmdBufferCompatible});
