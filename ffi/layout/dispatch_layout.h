// dispatch_layout: where a rank's tokens go, counted. Local to a rank; no peer is asked.
#pragma once

#include <cuda_runtime_api.h>

namespace jax_ep {

struct DispatchLayoutParams {
  int num_tokens, num_topk, num_experts, num_ranks;  // num_experts is a multiple of num_ranks
  const int* topk_idx;                               // s32[num_tokens, num_topk]; ids outside of 0..num_experts-1: none
  int* num_tokens_per_rank;                          // s32[num_ranks], a token counts once a rank
  int* num_tokens_per_expert;                        // s32[num_experts], every choice counts
  bool* is_token_in_rank;                            // pred[num_tokens, num_ranks]
};

// Writes all three results, whatever they held before.
cudaError_t LaunchDispatchLayout(const DispatchLayoutParams& params, cudaStream_t stream);

}  // namespace jax_ep
