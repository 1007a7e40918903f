// The initialize stage of every handler whose calls go through a group. XLA runs it for each call in a program,
// whenever the program is executed and before anything of it is launched; also of calls that are replayed in CUDA
// graphs, for which it runs no other stage. So it is here that a failure among replays is heard of, and that calls
// begin anew.
#include "group/member.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

ffi::Error Initialize(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::RemainingArgs, ffi::RemainingRets,
                      ffi::Dictionary attributes) {
  const auto devices = attributes.get<ffi::Span<const int64_t>>("devices");
  const auto num_ranks = attributes.get<int64_t>("num_ranks");
  if (!devices.has_value()) return devices.error();
  if (!num_ranks.has_value()) return num_ranks.error();
  return BeginRun(stream, device, run, *devices, *num_ranks);
}

}  // namespace
}  // namespace jax_ep

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpBeginRun, jax_ep::Initialize,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::RunId>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
