// The XLA FFI handler of barrier: an s32[1] token in, the same out once every rank has come.
#include "common/error.h"
#include "group/barrier.h"
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error Barrier(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, ffi::BufferR1<ffi::S32> token, ffi::ResultBufferR1<ffi::S32> result) {
  Member member;
  if (ffi::Error error = FindMember("barrier", stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  cudaError_t error = LaunchBarrier(member.view(), member.refused(), stream);
  if (error == cudaSuccess && token.typed_data() != result->typed_data()) {
    error =
        cudaMemcpyAsync(result->typed_data(), token.typed_data(), token.size_bytes(), cudaMemcpyDeviceToDevice, stream);
  }
  return Report("barrier", member, error);
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
