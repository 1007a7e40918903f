// Dispatch, combine and barrier of a group that spans nodes. Meaning, operands and results are those of
// dispatch/dispatch.h, combine/combine.h and group/barrier.h, to the bit. docs/protocol.md, "Across nodes", draws this.
//
//   dispatch   a token's row crosses the network once a node, to the rank of its source's local index there; the ranks
//              of that node read it from that rank's inbox
//   combine    each rank's sum of a token goes to the rank of the token's local index on its own node, from there over
//              the network to the token's rank, which adds the sums in rank order. Where NVLink reaches all ranks,
//              straight to that rank
//
// The kernels are jax_ep._internode, a module of its own that is loaded where nodes must talk: it links NVSHMEM. The
// handlers are in jax_ep._core and call them through InternodeKernels.
#pragma once

#include <cuda_runtime_api.h>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "internode/room.h"

namespace jax_ep {

struct InternodeConfig {
  int num_sms = 24;     // more where a group has more ranks than these have warps for
  bool direct = false;  // every rank counts as a node: one hop, more rows over the network. For few tokens
};

// The combine has no scratch here.
struct InternodeKernels {
  // Loads the kernels on the current device, so that their first launch allocates nothing.
  cudaError_t (*load)();
  cudaError_t (*dispatch)(const DispatchParams&, const InternodeView&, const InternodeConfig&, cudaStream_t);
  cudaError_t (*combine)(const CombineParams&, const InternodeView&, const InternodeConfig&, cudaStream_t);
  cudaError_t (*barrier)(const GroupView*, const InternodeView&, bool refused, int32_t* came, cudaStream_t);
};

cudaError_t LoadInternodeDispatch();
cudaError_t LoadInternodeCombine();
cudaError_t LoadInternodeBarrier();
cudaError_t LaunchInternodeDispatch(const DispatchParams& params, const InternodeView& view,
                                    const InternodeConfig& config, cudaStream_t stream);
cudaError_t LaunchInternodeCombine(const CombineParams& params, const InternodeView& view,
                                   const InternodeConfig& config, cudaStream_t stream);
cudaError_t LaunchInternodeBarrier(const GroupView* group, const InternodeView& view, bool refused, int32_t* came,
                                   cudaStream_t stream);

}  // namespace jax_ep
