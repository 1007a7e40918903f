// The results of a dispatch that failed, or of a masked rank: zeros, and -1 for places. By all threads, kThreads, of
// the block that ends the call.
#pragma once

#include "device/wait.cuh"
#include "dispatch/dispatch.h"

namespace jax_ep {

template <int kThreads>
__device__ void ClearResults(const DispatchParams& p, const Call& call) {
  const auto clear = [](void* bytes, int64_t num_bytes, int value) {
    for (int64_t i = threadIdx.x; i < num_bytes / 4; i += kThreads) static_cast<int32_t*>(bytes)[i] = value;
    if (threadIdx.x < num_bytes % 4) static_cast<char*>(bytes)[num_bytes / 4 * 4 + threadIdx.x] = 0;
  };
  const int64_t rows = p.max_recv_tokens, choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  for (int i = 0; i < p.num_row_arrays; ++i) clear(p.rows[i].recv, rows * p.rows[i].row_bytes, 0);
  const int64_t choices_per_row = p.layout == Layout::kRank ? p.num_topk : 1;
  if (p.recv_weights != nullptr) clear(p.recv_weights, rows * choices_per_row * 4, 0);
  if (p.operation == kDispatchCached) return;
  clear(p.slot, choices * 4, -1);
  clear(p.recv_slot, call.num_ranks * choices * 4, -1);
  clear(p.counts, (p.num_experts / call.num_ranks + 1) * 4, 0);
  if (p.recv_topk_idx != nullptr) clear(p.recv_topk_idx, rows * p.num_topk * 4, -1);
}

}  // namespace jax_ep
