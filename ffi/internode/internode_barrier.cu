// barrier over nodes: no rank leaves before every rank has come. `came` is how many have, 0 after a failure.
#include "device/load.h"
#include "internode/internode.h"
#include "internode/link.cuh"

namespace jax_ep {
namespace {

__global__ void InternodeBarrierKernel(const GroupView* group, const __grid_constant__ InternodeView view, bool refused,
                                       int32_t* came) {
  const Call call = BeginCall(group, kBarrier);
  const bool met = TakesPart(call, view, refused) && MeetOverNodes(call, view);
  if (threadIdx.x == 0) *came = met ? call.num_ranks : 0;
  if (IsLastBlock(call)) EndOverNodes(call, view);
}

}  // namespace

cudaError_t LoadInternodeBarrier() { return LoadKernel(InternodeBarrierKernel); }

cudaError_t LaunchInternodeBarrier(const GroupView* group, const InternodeView& view, bool refused, int32_t* came,
                                   cudaStream_t stream) {
  InternodeBarrierKernel<<<1, 32, 0, stream>>>(group, view, refused, came);
  return cudaGetLastError();
}

}  // namespace jax_ep
