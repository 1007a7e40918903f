// The results of a combine that failed, or of a masked rank: zeros. Neighbour: combine.h says what they are.
#pragma once

#include "combine/combine.h"

namespace jax_ep {

// Thread number `thread` of num_threads clears its part of num_rows rows and of num_values values.
__device__ __forceinline__ void ClearArrays(char* rows, int num_rows, int64_t row_bytes, float* values,
                                            uint32_t num_values, uint32_t thread, uint32_t num_threads) {
  const int64_t num_words = num_rows * (row_bytes / 16);
  for (int64_t i = thread; i < num_words; i += num_threads) reinterpret_cast<int4*>(rows)[i] = int4{};
  for (uint32_t i = thread; i < num_values; i += num_threads) values[i] = 0.f;
}

__device__ __forceinline__ void ClearResults(const CombineParams& p, uint32_t thread, uint32_t num_threads) {
  const int num_choices = p.carried_back != nullptr ? p.num_tokens * p.num_topk : 0;
  ClearArrays(p.out, p.num_tokens, p.row_bytes, p.carried_back, num_choices, thread, num_threads);
}

}  // namespace jax_ep
