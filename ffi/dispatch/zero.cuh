// Rows of a result that hold no token, and how the warps of a grid share work out. Neighbours: copy.cuh, pull.cuh.
#pragma once

#include "device/warp.cuh"
#include "dispatch/pipe.cuh"

namespace jax_ep {

// Zero rows of the result: [first[i], first[i] + (before[i + 1] - before[i])) for each range i.
struct ZeroRows {
  int32_t* first;   // [L + 1]
  int32_t* before;  // [L + 2]
  int num_ranges;

  __device__ ZeroRows(const DispatchPlan& plan, char* shared, int num_ranks) {
    num_ranges = plan.params.num_experts / num_ranks + 1;
    first = reinterpret_cast<int32_t*>(shared);
    before = first + num_ranges;
  }
};

// Where the zero rows are, from the counts of the local experts and the rows wanted here. Called by one warp.
__device__ inline void FindZeroRows(const DispatchPlan& plan, const int32_t* counts, int rows_wanted,
                                    const ZeroRows& zero) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_local = zero.num_ranges - 1, capacity = p.max_recv_tokens;
  int end = 0, before = 0;
  for (int e = 0; e < zero.num_ranges; e += 32) {
    const int i = e + lane;
    int begin = 0, length = 0;
    if (p.layout == Layout::kExpert) {
      const int count = i < num_local ? counts[i] : 0;
      const int aligned = (count + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
      int sum;
      const int start = end + WarpScan(aligned, &sum);
      end += sum;
      begin = min(start + count, capacity);
      length = (i < num_local ? min(start + aligned, capacity) : capacity) - begin;
      if (i > num_local) length = 0;
    } else if (p.layout == Layout::kBatched) {
      const int count = i < num_local ? min(counts[i], p.expert_capacity) : 0;
      begin = i * p.expert_capacity + count;
      length = i < num_local ? p.expert_capacity - count : 0;
    } else if (i == 0) {
      begin = min(rows_wanted, capacity);
      length = capacity - begin;
    }
    int sum;
    const int offset = before + WarpScan(length, &sum);
    before += sum;
    if (i < zero.num_ranges) {
      zero.first[i] = begin;
      zero.before[i] = offset;
    }
  }
  if (lane == 0) zero.before[zero.num_ranges] = before;
}

// Pieces of work, each taken by one warp of the grid. Called by the whole warp; the next one is on its way meanwhile.
class Taken {
 public:
  __device__ explicit Taken(unsigned int* counter) : counter_(counter), next_(Add()) {}
  __device__ __forceinline__ unsigned int Next() {
    const unsigned int number = __shfl_sync(~0u, next_, 0);
    next_ = Add();
    return number;
  }

 private:
  __device__ __forceinline__ unsigned int Add() const { return threadIdx.x % 32 == 0 ? atomicAdd(counter_, 1u) : 0; }

  unsigned int* const counter_;
  unsigned int next_;
};

// A row without a token, by one warp.
__device__ __forceinline__ void WriteZeroRow(const DispatchPlan& plan, const char* zeros, int64_t row) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32;
  if (p.num_row_arrays > 0) {
    const int64_t row_bytes = p.rows[0].row_bytes;
    for (int64_t offset = static_cast<int64_t>(lane) * plan.zero_bytes; offset < row_bytes;
         offset += 32 * plan.zero_bytes) {
      const int num_bytes = static_cast<int>(min(static_cast<int64_t>(plan.zero_bytes), row_bytes - offset));
      BulkStore(p.rows[0].recv + row * row_bytes + offset, zeros, num_bytes);
    }
    CommitBulkGroup();
    WaitBulkRead<4>();
  }
  if (p.num_row_arrays > 1) {
    for (int64_t j = lane; j < p.rows[1].row_bytes; j += 32) p.rows[1].recv[row * p.rows[1].row_bytes + j] = 0;
  }
  const int num_choices = p.layout == Layout::kRank ? p.num_topk : 1;
  if (lane < num_choices) {
    if (p.recv_weights != nullptr) p.recv_weights[row * num_choices + lane] = 0.f;
    if (p.recv_topk_idx != nullptr && p.operation != kDispatchCached) p.recv_topk_idx[row * num_choices + lane] = -1;
  }
}

// The next of all zero rows that no warp has taken; `range` is that of the ones before. False: there are none.
__device__ __forceinline__ bool WriteSomeZeroRows(const DispatchPlan& plan, const ZeroRows& zero, const char* zeros,
                                                  Taken& taken, int* range) {
  constexpr int kRows = 4;  // at once
  const int num_rows = zero.before[zero.num_ranges];
  const int64_t first = static_cast<int64_t>(taken.Next()) * kRows;
  for (int64_t i = first; i < min(first + kRows, static_cast<int64_t>(num_rows)); ++i) {
    while (i >= zero.before[*range + 1]) ++*range;
    WriteZeroRow(plan, zeros, zero.first[*range] + (i - zero.before[*range]));
  }
  return first < num_rows;
}

__device__ inline void WriteZeroRows(const DispatchPlan& plan, const ZeroRows& zero, const char* zeros, Taken& taken) {
  for (int range = 0; WriteSomeZeroRows(plan, zero, zeros, taken, &range);) continue;
}

// A routing from before the mask has rows for masked ranks' tokens too. The warps of the grid share the tokens: this
// one has every `num_warps`-th from `warp` on.
__device__ __noinline__ static void WriteRowsOfDead(const DispatchPlan& plan, const Call& call, const char* zeros,
                                                    int warp, int num_warps) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32;
  for (int source = 0; source < call.num_ranks; ++source) {
    if (call.Reaches(source)) continue;
    const int64_t first = static_cast<int64_t>(source) * p.num_tokens;
    for (int token = warp; token < p.num_tokens; token += num_warps) {
      const int here = lane < p.num_topk ? p.recv_slot[(first + token) * p.num_topk + lane] : -1;
      const int row = DistinctRow(plan, here);
      for (uint32_t holders = __ballot_sync(~0u, row >= 0); holders != 0; holders &= holders - 1) {
        WriteZeroRow(plan, zeros, __shfl_sync(~0u, row, __ffs(holders) - 1));
      }
    }
  }
}

}  // namespace jax_ep
