// barrier: no rank's stream goes on before every rank's has come here. And two small kernels about the group itself.
#pragma once

#include <cuda_runtime_api.h>

#include "group/window.h"

namespace jax_ep {

constexpr int kMaxLedgers = 256;

// All the memory of a rank through which calls go.
struct Ledgers {
  Ledger* ledger[kMaxLedgers];
  int count;
  GroupView* view;
};

// `came`, s32[1], becomes the number of ranks that take part: those that are not masked; 0 on one that is.
cudaError_t LaunchBarrier(const GroupView* group, bool refused, int32_t* came, cudaStream_t stream);
// The calls launched after this belong to a new generation, in which the ranks of the mask `dead` take no part: none of
// them pairs with one launched before it.
cudaError_t LaunchBeginGeneration(const Ledgers& ledgers, uint64_t generation, uint32_t dead, cudaStream_t stream);

constexpr int kMaxDead = 64;

struct DeadDevices {
  int count;
  int device[kMaxDead];  // JAX's ids
};

// dead[i], of `count`: whether devices[i] is one of the dead. For programs of XLA's own collectives: the kernels read
// it in GroupView.
cudaError_t LaunchIsDead(const DeadDevices& dead_devices, int count, const int32_t* devices, bool* dead,
                         cudaStream_t stream);

// Loads these kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadBarrier();

}  // namespace jax_ep
