// The barrier kernel: one warp a rank, lane 0 of the flags. `came` is how many ranks have come, 0 after a failure. And
// the kernels that begin a generation and tell who is masked.
#include "device/load.h"
#include "device/wait.cuh"
#include "group/barrier.h"

namespace jax_ep {
namespace {

__global__ void BarrierKernel(const GroupView* group, bool refused, int32_t* came) {
  const Call call = BeginCall(group, kBarrier);
  const int peer = threadIdx.x;
  if (refused && peer == 0) Refuse(call);
  __syncwarp();
  bool met = __all_sync(~0u, !refused && !HasFailed(call));
  if (met) Post(call, 0);
  if (met && call.Reaches(peer)) met = Await(call, &call.window->post[call.parity][peer][0], kPosted, kMeet, peer, 0);
  met = __all_sync(~0u, met);
  FenceSys();
  if (call.Reaches(peer)) StoreRelaxedSys(&call.Peer(peer)->progress[call.rank][0], call.Tag(met ? kDone : kGone));
  Leave(call, 0, 0);
  const int num_living = __popc(__ballot_sync(~0u, call.Reaches(peer)));
  if (peer == 0) *came = HasFailed(call) ? 0 : num_living;
  if (IsLastBlock(call)) EndCall(call);
}

// `failed_epoch` stays: it is of an earlier generation now. Epochs never go back: this launch may have been captured,
// and then a graph repeats it with every replay.
__global__ void BeginGenerationKernel(const __grid_constant__ Ledgers ledgers, uint64_t generation, uint32_t dead) {
  const uint64_t membership = generation << kCountBits | dead;
  GroupView* const view = ledgers.view;
  if (threadIdx.x == 0 && membership > view->membership) {
    if (static_cast<uint32_t>(view->membership) != dead) view->masked_since = generation;
    view->membership = membership;
  }
  for (int i = threadIdx.x; i < ledgers.count; i += 32) {
    uint64_t& epoch = ledgers.ledger[i]->epoch;
    epoch = max(epoch, generation << kCountBits);
  }
}

__global__ void IsDeadKernel(const __grid_constant__ DeadDevices dead_devices, int count, const int32_t* devices,
                             bool* dead) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    bool found = false;
    for (int j = 0; j < dead_devices.count; ++j) found |= dead_devices.device[j] == devices[i];
    dead[i] = found;
  }
}

}  // namespace

cudaError_t LaunchBeginGeneration(const Ledgers& ledgers, uint64_t generation, uint32_t dead, cudaStream_t stream) {
  BeginGenerationKernel<<<1, 32, 0, stream>>>(ledgers, generation, dead);
  return cudaGetLastError();
}

cudaError_t LaunchBarrier(const GroupView* group, bool refused, int32_t* came, cudaStream_t stream) {
  BarrierKernel<<<1, 32, 0, stream>>>(group, refused, came);
  return cudaGetLastError();
}

cudaError_t LaunchIsDead(const DeadDevices& dead_devices, int count, const int32_t* devices, bool* dead,
                         cudaStream_t stream) {
  IsDeadKernel<<<1, 32, 0, stream>>>(dead_devices, count, devices, dead);
  return cudaGetLastError();
}

cudaError_t LoadBarrier() {
  if (cudaError_t error = LoadKernel(BeginGenerationKernel); error != cudaSuccess) return error;
  if (cudaError_t error = LoadKernel(IsDeadKernel); error != cudaSuccess) return error;
  return LoadKernel(BarrierKernel);
}

}  // namespace jax_ep
