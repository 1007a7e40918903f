// The XLA FFI handler of barrier: s32[1] in, which orders it, s32[1] out: the number of ranks, once every one has come.
#include "common/error.h"
#include "group/barrier.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error Barrier(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, ffi::BufferR1<ffi::S32>, ffi::ResultBufferR1<ffi::S32> came) {
  Member member;
  if (ffi::Error error = FindMember("barrier", stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  return Report("barrier", member, LaunchBarrier(member.view(), member.refused(), came->typed_data(), stream));
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpBarrier, jax_ep::Barrier,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::RunId>()
                                  .Attr<ffi::Span<const int64_t>>("devices")
                                  .Attr<int64_t>("num_ranks")
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>(),
                              {ffi::Traits::kCmdBufferCompatible});
