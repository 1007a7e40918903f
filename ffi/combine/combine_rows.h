// The launcher of combine_rows.cu, for combine.cu.
#pragma once

#include "combine/combine.h"

namespace jax_ep {

cudaError_t LaunchCombineRows(const CombineParams& params, const CombineConfig& config, cudaStream_t stream);
cudaError_t LoadCombineRows();

}  // namespace jax_ep
