// The XLA FFI handlers of is_dead: s32[n] of JAX's device ids in, pred[n] out. They are asked by every run of a
// program, so a new mask holds in programs that are compiled already; a CUDA graph would keep an old one.
//
//   jax_ep_is_dead   on the host and on CUDA: jax_ep/_src/membership.py
#include "common/error.h"
#include "group/barrier.h"
#include "group/group.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error IsDeadOnHost(ffi::BufferR1<ffi::S32> devices, ffi::ResultBufferR1<ffi::PRED> dead) {
  for (size_t i = 0; i < devices.element_count(); ++i) {
    dead->typed_data()[i] = Group::IsDead(devices.typed_data()[i]);
  }
  return ffi::Error::Success();
}

ffi::Error IsDead(cudaStream_t stream, ffi::BufferR1<ffi::S32> devices, ffi::ResultBufferR1<ffi::PRED> dead) {
  DeadDevices dead_devices{};
  for (int device : Group::DeadDevices()) {
    if (dead_devices.count < kMaxDead) dead_devices.device[dead_devices.count++] = device;
  }
  const int count = static_cast<int>(devices.element_count());
  return FromCuda("is_dead", LaunchIsDead(dead_devices, count, devices.typed_data(), dead->typed_data(), stream));
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpIsDeadOnHost, jax_ep::IsDeadOnHost,
                              ffi::Ffi::Bind().Arg<ffi::BufferR1<ffi::S32>>().Ret<ffi::BufferR1<ffi::PRED>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpIsDead, jax_ep::IsDead,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::PRED>>());
