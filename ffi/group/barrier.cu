// The barrier kernel: one warp a rank, lane 0 of the flags.
#include "group/barrier.h"

#include "device/wait.cuh"

namespace jax_ep {
namespace {

__global__ void BarrierKernel(const GroupView* group, bool refused) {
  const Call call = BeginCall(group, kBarrier);
  const int peer = threadIdx.x;
  bool met = !refused;
  if (refused && peer == 0) Refuse(call);
  if (!refused) Post(call, 0);
  if (!refused && peer < call.num_ranks) met = Await(call, &call.window->post[call.parity][peer][0], kPosted, kMeet, peer, 0);
  met = __all_sync(~0u, met);
  FenceSys();
  if (peer < call.num_ranks) StoreRelaxedSys(&call.Peer(peer)->progress[call.rank][0], call.Tag(met ? kDone : kGone));
  Leave(call, 0, 0);
  if (IsLastBlock(call)) EndCall(call);
}

}  // namespace

cudaError_t LaunchBarrier(const GroupView* group, bool refused, cudaStream_t stream) {
  BarrierKernel<<<1, 32, 0, stream>>>(group, refused);
  return cudaGetLastError();
}

cudaError_t LoadBarrier() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, BarrierKernel);
}

}  // namespace jax_ep
