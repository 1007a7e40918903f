// combine_grad: the transpose of a weighted combine in both operands, in one pass. For every row c here, of token t of
// rank s:   y_bar[c] = weights[c] * out_bar_s[t],   weights_bar[c] = <y[c], out_bar_s[t]>;   zeros for rows of no
// token.
//
// It pulls: each rank reads a cotangent's row once for each of its tokens' ranks, where it is. docs/protocol.md draws
// this. T tokens, K choices, C rows of y, H columns, R ranks, L local experts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "combine/combine.h"

namespace jax_ep {

struct CombineGradParams {
  const GroupView* group;
  bool refused;
  RowDtype dtype;
  int num_tokens, num_topk, max_recv_tokens, num_local_experts;
  int expert_alignment;      // layout "expert": rows of a group, rounded up to it; 0: "batched"
  int expert_capacity;       // layout "batched": rows of a group
  int64_t row_bytes;         // a multiple of 16, at least that
  const char* out_bar;       // [T, H]
  const char* y;             // [C, H]
  const float* weights;      // [C]
  const int32_t* recv_slot;  // [R, T, K]
  const int32_t* counts;     // [L + 1], tokens of each local expert
  char* y_bar;               // [C, H]
  float* weights_bar;        // [C]
};

// False where the shape is beyond the kernel.
bool CombineGradFits(const CombineGradParams& params, int num_ranks);
cudaError_t LaunchCombineGrad(const CombineGradParams& params, const CombineConfig& config, cudaStream_t stream);
// Loads the kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadCombineGrad();

}  // namespace jax_ep
