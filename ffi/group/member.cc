#include "group/member.h"

#include <stdexcept>

#include "common/error.h"

namespace jax_ep {
namespace {

// The group and the rank in it, but nothing of what has failed.
xla::ffi::Error FindRank(const char* operation, int ordinal, xla::ffi::Span<const int64_t> devices, int64_t num_ranks,
                         Member* member) {
  const size_t count = devices.size();
  const int device = Group::DeviceOf(ordinal);
  for (size_t i = 0; i < count; ++i) {
    if (devices.begin()[i] != device) continue;
    const size_t first = i / num_ranks * num_ranks;
    if (first + num_ranks > count) break;
    const std::vector<int> ranks(devices.begin() + first, devices.begin() + first + num_ranks);
    try {
      member->group = &Group::OfDevices(ranks);
    } catch (const std::runtime_error& error) {
      return xla::ffi::Error::Internal(error.what());
    }
    member->rank = static_cast<int>(i - first);
    return xla::ffi::Error::Success();
  }
  return InvalidArgument(operation, "device " + std::to_string(device) +
                                        " is in no group of this call; compile it for the devices it runs on");
}

xla::ffi::Error Failed(const char* operation, const std::string& failure) {
  return xla::ffi::Error::Internal(std::string(operation) +
                                   ": an earlier call of this group failed, and its results are zero: " + failure +
                                   ". Look at the named rank; jax_ep.config.timeout sets how long a rank waits, and "
                                   "jax_ep.config.dead_devices which ranks the others go on without.");
}

}  // namespace

xla::ffi::Error BeginRun(cudaStream_t stream, int ordinal, xla::ffi::RunId run, xla::ffi::Span<const int64_t> devices,
                         int64_t num_ranks) {
  Member member;
  if (xla::ffi::Error error = FindRank("jax_ep", ordinal, devices, num_ranks, &member); error.failure()) return error;
  const std::vector<int> all(devices.begin(), devices.end());
  std::string failure = Group::HearBefore(run.run_id, all, static_cast<int>(num_ranks));
  if (failure.empty()) failure = member.group->BeginRun(member.rank, run.run_id, stream);
  return failure.empty() ? xla::ffi::Error::Success() : Failed("jax_ep", failure);
}

xla::ffi::Error FindMember(const char* operation, cudaStream_t stream, int ordinal, xla::ffi::RunId run,
                           xla::ffi::Span<const int64_t> devices, int64_t num_ranks, Member* member) {
  if (xla::ffi::Error error = FindRank(operation, ordinal, devices, num_ranks, member); error.failure()) return error;
  member->stream = stream;
  member->failure = member->group->Enter(member->rank, run.run_id, stream);
  return xla::ffi::Error::Success();
}

void CheckMail(Member* member, std::initializer_list<const void*> addresses, const void* result) {
  for (const void* address : addresses) {
    if (!member->refused()) member->failure = member->group->CheckShared(member->rank, address, result);
  }
}

xla::ffi::Error Report(const char* operation, const Member& member, cudaError_t launched) {
  if (launched == cudaSuccess) launched = member.group->Leave(member.rank, member.stream);
  if (launched != cudaSuccess || !member.refused()) return FromCuda(operation, launched);
  return Failed(operation, member.failure);
}

}  // namespace jax_ep
