// barrier: no rank's stream goes on before every rank's has come here.
#pragma once

#include <cuda_runtime_api.h>

#include "group/window.h"

namespace jax_ep {

constexpr int kMaxLedgers = 256;

// All the memory of a rank through which calls go.
struct Ledgers {
  Ledger* ledger[kMaxLedgers];
  int count;
};

// `came`, s32[1], becomes the number of ranks.
cudaError_t LaunchBarrier(const GroupView* group, bool refused, int32_t* came, cudaStream_t stream);
// The calls launched after this belong to a new generation: none of them pairs with one launched before it.
cudaError_t LaunchBeginGeneration(const Ledgers& ledgers, uint64_t generation, cudaStream_t stream);
cudaError_t LoadBarrier();

}  // namespace jax_ep
