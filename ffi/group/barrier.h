// barrier: no rank's stream goes on before every rank's has come here.
#pragma once

#include <cuda_runtime_api.h>

#include "group/window.h"

namespace jax_ep {

cudaError_t LaunchBarrier(const GroupView* group, bool refused, cudaStream_t stream);
cudaError_t LoadBarrier();

}  // namespace jax_ep
