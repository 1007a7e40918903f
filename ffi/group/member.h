// What a handler needs of its group: attributes in, this device's place out.
#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "group/group.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

struct Member {
  Group* group = nullptr;
  int rank = 0;
  cudaStream_t stream = nullptr;
  // What has failed in the group: the call is to be launched as refused, and this is its error. Mostly empty.
  std::string failure;

  const GroupView* view() const { return group->view(rank); }
  bool refused() const { return !failure.empty(); }
};

// `devices` lists the devices (JAX's ids) of all groups along the axis, group by group, `num_ranks` each; the CUDA
// device `ordinal` is one of them.
//
// At the begin of a run: an error if one of these groups has failed since the last.
xla::ffi::Error BeginRun(cudaStream_t stream, int ordinal, xla::ffi::RunId run, xla::ffi::Span<const int64_t> devices,
                         int64_t num_ranks);
// Before a launch.
xla::ffi::Error FindMember(const char* operation, cudaStream_t stream, int ordinal, xla::ffi::RunId run,
                           xla::ffi::Span<const int64_t> devices, int64_t num_ranks, Member* member);

// Before the launch, of all addresses that the call puts into its mail: where a peer could not reach one, the call is
// refused. Those of operands, which may be constants of the program, with a `result` of the call, which never is.
void CheckMail(Member* member, std::initializer_list<const void*> addresses, const void* result = nullptr);

// After the launch: the launch's error, else the failure that came before, else success.
xla::ffi::Error Report(const char* operation, const Member& member, cudaError_t launched);

}  // namespace jax_ep
