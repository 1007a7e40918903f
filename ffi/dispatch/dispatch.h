// dispatch: each token's row crosses once to every rank that owns one of its experts, and lies there once for each
// expert that chose it (layout "rank": once). dispatch_cached does the same along a known routing, notify gives the
// routing alone. Rows are pulled, or pushed where DispatchPulls says no:
//
//   puller     waits for every rank's post and slots, loads rows from the peers' x, stores them to all their places
//   here
//
//   sender     waits for every rank's post, stores rows into the peers' results, releases progress
//   encoder    makes values and scales of a sender's rows, with an encoding
//   copier     own tokens, zero rows; acquires progress, copies arrived encoded rows to further experts
//
// docs/protocol.md draws this. T tokens, K choices, E experts, L = E/R local ones, C rows of the result, R ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/row_dtype.h"
#include "group/window.h"

namespace jax_ep {

enum class Layout : int { kExpert, kRank, kBatched };

constexpr int kMaxRowArrays = 2;
constexpr int kMaxTopk = 32;  // one warp lane a choice
constexpr int kLost = -2;     // less the rank: the slot of a choice whose rank is masked. Like -1 it is no row
constexpr int kMaxEncodedHidden = 16384;

// One array of rows, moved as bytes. The first array's rows are a multiple of 16 bytes.
struct RowArray {
  const char* x;  // [T, row_bytes]
  char* recv;     // [C, row_bytes]
  int64_t row_bytes;
};

// Rows that the senders encode: rows[0] and rows[1] are what device/quantize.cuh makes of x, values and scales, and
// have no x of their own.
struct Encoding {
  const char* x;  // [T, hidden], or null: rows travel as they are
  RowDtype dtype;
  int wire;  // a Wire of device/quantize.cuh
  int hidden;

  __host__ __device__ int elem_bytes() const { return dtype == RowDtype::kFloat32 ? 4 : 2; }
};

struct DispatchParams {
  const GroupView* group;
  Operation operation;  // kDispatch, kDispatchCached or kNotify
  bool refused;
  Layout layout;
  int num_tokens, num_topk, num_experts, max_recv_tokens, expert_alignment, expert_capacity;
  int num_row_arrays;
  RowArray rows[kMaxRowArrays];
  Encoding encoding;          // of a kDispatch
  const int32_t* topk_idx;    // [T, K], not with kDispatchCached
  const float* topk_weights;  // [T, K] or null
  int32_t* slot;              // [T, K], result (operand of kDispatchCached)
  int32_t* recv_slot;         // [R, T, K], likewise
  int32_t* counts;            // [L + 1], likewise
  int32_t* recv_topk_idx;     // [C, K] with Layout::kRank, else null (operand of kDispatchCached)
  float* recv_weights;        // [C], with Layout::kRank [C, K]; or null
};

struct DispatchConfig {
  int num_sms = 24;
  int num_send_blocks = 0;           // 0: by the number of ranks
  int send_bytes_in_flight = 43008;  // a sending warp; two of them a block
  int pulls = -1;                    // rows as they are in layout "rank": 0 or 1; -1: what was measured to be faster
};

// Whether the ranks pull rows from each other's x, rather than push them into each other's results. Static sizes say
// so, to all ranks alike.
bool DispatchPulls(const DispatchParams& params, int num_ranks, const DispatchConfig& config);
// False where the shape is beyond the kernel.
bool DispatchFits(const DispatchParams& params, int num_ranks);
cudaError_t LaunchDispatch(const DispatchParams& params, int num_ranks, const DispatchConfig& config,
                           cudaStream_t stream);
// Loads the kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadDispatch();

}  // namespace jax_ep
