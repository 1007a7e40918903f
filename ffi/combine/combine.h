// combine: every rank sums its rows of a token and hands the sum back; the token's rank adds the sums in rank order.
//
//   layouts "expert", "batched"   pushed: the expert's rank reduces and stores one row a (token, rank) into the
//   source's scratch
//   layout "rank"                 pulled: rows are sums already, the source reads them where they are
//
// docs/protocol.md draws this. T tokens, K choices, C rows of y, H columns, R ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/row_dtype.h"
#include "group/window.h"

namespace jax_ep {

struct CombineParams {
  const GroupView* group;
  bool refused;
  bool one_row_a_rank;  // layout "rank": all choices of a token on one rank name the same row
  RowDtype dtype;
  int num_tokens, num_topk, max_recv_tokens;
  int64_t row_bytes;         // a multiple of 16
  const char* y;             // [C, H]
  const float* weights;      // [C], the gate of each row, or null: all ones. Not with one_row_a_rank
  const float* carried;      // [C], or [C, K] with one_row_a_rank; or null
  const int32_t* slot;       // [T, K]
  const int32_t* recv_slot;  // [R, T, K]
  char* out;                 // [T, H]
  float* carried_back;       // [T, K]: carried of each choice's row; null without carried
  char* scratch;             // [R - 1, T, H], where the peers put their sums; not with one_row_a_rank, nor over nodes
};

struct CombineConfig {
  int num_sms = 24;
  // From so many tokens on the rows of "expert" and "batched" go through shared memory; fewer, and those of "rank", go
  // row by row, which begins sooner. The same on every rank.
  int stream_from_tokens = 256;
};

// False where the shape is beyond the kernel.
bool CombineFits(const CombineParams& params, int num_ranks);
cudaError_t LaunchCombine(const CombineParams& params, const CombineConfig& config, cudaStream_t stream);
// Loads the kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadCombine();

}  // namespace jax_ep
