// The copying warps of a dispatch: all rows of a result that do not come over the link.
//
//   own tokens   from x to their rows here; waits for the slots of the block that routed them (progress >= 1)
//   zero rows    padding of groups and the tail
//   fan-out      a peer's row, once its chunk is here (arrived), to the further experts that chose it
//
// With an encoding own tokens come from the senders too: then the rank is one of those whose rows fan out.
// A warp takes the next piece of work of each kind as it comes free: those beside senders are slower than the others.
#pragma once

#include "device/warp.cuh"
#include "dispatch/send.cuh"

namespace jax_ep {

// A warp's stages: jobs go in at one end (a load), come out at the other (stores to the rows that the lanes hold).
struct CopyPipe {
  const DispatchPlan& plan;
  DispatchShared& shared;
  char* stage;
  int warp, in = 0, out = 0, in_flight = 0;
  uint32_t parity = 0;

  __device__ CopyPipe(const DispatchPlan& plan, DispatchShared& shared, char* stages, int warp)
      : plan(plan), shared(shared), stage(stages + warp * plan.copy.stages * plan.copy.stride), warp(warp) {}

  // Stores what was loaded longest ago.
  __device__ __forceinline__ void Drain() {
    const Pieces& pieces = plan.copy;
    const RowArray &rows = plan.params.rows[0], &second = plan.params.rows[1];
    const int64_t row = shared.copy_row[warp][out][threadIdx.x % 32];
    const int piece = shared.copy_piece[warp][out];
    WaitMbarrier(&shared.copy_full[warp][out], parity);
    if (row >= 0) {
      StorePiece(pieces, rows.recv + row * rows.row_bytes, second.recv + row * pieces.second_bytes, piece,
                 stage + out * pieces.stride);
    }
    CommitBulkGroup();
    if (++out == pieces.stages) out = 0, parity ^= 1;
    --in_flight;
  }

  // Copies row `from` of arrays `first` and `second` to the rows that the lanes name (-1: none). Called by the whole
  // warp.
  __device__ __forceinline__ void Copy(const char* first, const char* second, int64_t from, int row) {
    const Pieces& pieces = plan.copy;
    const int lane = threadIdx.x % 32;
    for (int piece = 0; piece < pieces.per_row; ++piece) {
      if (in_flight == pieces.stages - 1) Drain();
      WaitBulkRead<1>();  // the stage filled now was stored from before the newest group
      shared.copy_row[warp][in][lane] = row;
      if (lane == 0) shared.copy_piece[warp][in] = piece;
      __syncwarp();
      if (lane == 0) {
        LoadPiece(pieces, first + from * plan.params.rows[0].row_bytes + int64_t{piece} * pieces.bytes,
                  second + from * pieces.second_bytes, piece, stage + in * pieces.stride, &shared.copy_full[warp][in]);
      }
      if (++in == pieces.stages) in = 0;
      ++in_flight;
    }
    if (plan.params.num_row_arrays > 1 && pieces.second_bytes == 0) {
      const RowArray& small = plan.params.rows[1];
      for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1) {
        const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
        CopySmallRow(small.recv + target * small.row_bytes, second + from * small.row_bytes, small.row_bytes);
      }
    }
  }

  __device__ __forceinline__ void Finish() {
    while (in_flight > 0) Drain();
    WaitBulkRead<0>();
  }
};

// The rows of one token here that the lanes' choices name, each row in one lane only.
__device__ __forceinline__ int DistinctRow(const DispatchPlan& plan, int row) {
  if (plan.params.layout != Layout::kRank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << (threadIdx.x % 32)) - 1)) == 0 ? row : -1;
}

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

__device__ inline void WriteZeroRows(const DispatchPlan& plan, const ZeroRows& zero, const char* zeros, Taken& taken) {
  constexpr int kRows = 4;  // at once
  const int num_rows = zero.before[zero.num_ranges];
  int range = 0;
  for (int64_t first; (first = static_cast<int64_t>(taken.Next()) * kRows) < num_rows;) {
    for (int i = static_cast<int>(first); i < min(static_cast<int>(first) + kRows, num_rows); ++i) {
      while (i >= zero.before[range + 1]) ++range;
      WriteZeroRow(plan, zeros, zero.first[range] + (i - zero.before[range]));
    }
  }
}

// A routing from before the mask has rows for masked ranks' tokens too. The copying warps share the tokens; `warp` is
// this one's among those of its block.
__device__ __noinline__ static void WriteRowsOfDead(const DispatchPlan& plan, const Call& call, const char* zeros,
                                                    int warp) {
  constexpr int kBesideSenders = kDispatchWarps - kFirstCopyWarp;
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32;
  const auto warps_of = [&](int num_blocks) {
    const int with_senders = min(num_blocks, plan.num_send_blocks);
    return with_senders * kBesideSenders + (num_blocks - with_senders) * kDispatchWarps;
  };
  for (int source = 0; source < call.num_ranks; ++source) {
    if (call.Reaches(source)) continue;
    const int64_t first = static_cast<int64_t>(source) * p.num_tokens;
    for (int token = warps_of(blockIdx.x) + warp; token < p.num_tokens; token += warps_of(gridDim.x)) {
      const int here = lane < p.num_topk ? p.recv_slot[(first + token) * p.num_topk + lane] : -1;
      const int row = DistinctRow(plan, here);
      for (uint32_t holders = __ballot_sync(~0u, row >= 0); holders != 0; holders &= holders - 1) {
        WriteZeroRow(plan, zeros, __shfl_sync(~0u, row, __ffs(holders) - 1));
      }
    }
  }
}

// All of a copying warp's work.
template <bool kEncodes>
__device__ inline void CopyRows(const DispatchPlan& plan, const Call& call, DispatchShared& shared,
                                const ZeroRows& zero, const char* zeros, char* stages, int warp) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_lanes = plan.num_lanes(), num_sources = call.num_ranks - (kEncodes ? 0 : 1);
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  const int longest = (p.num_tokens + num_lanes - 1) / num_lanes;
  CopyPipe pipe(plan, shared, stages, warp);
  // The first piece of each kind is asked for at once.
  Taken own_rows(&call.window->taken_own_rows), zero_rows(&call.window->taken_zero_rows),
      copies(&call.window->taken_copies);

  // Tokens in the order in which the sending lanes take them.
  const auto token_of = [&](int step, int sending_lane) {
    const int token = shared.lane_begin[sending_lane] + step;
    return token < shared.lane_begin[sending_lane + 1] ? token : -1;
  };
  const auto rows_of = [&](int source, int token) {
    const int row =
        lane < p.num_topk ? p.recv_slot[source * choices + static_cast<int64_t>(token) * p.num_topk + lane] : -1;
    return DistinctRow(plan, row);
  };
  const auto await = [&](const uint64_t* flag, uint32_t state, int source, int item) {
    bool came = true;
    if (lane == 0) {
      came = Await(call, flag, state, kRows, source, item);
      FenceProxyAsync();
    }
    came = __shfl_sync(~0u, came, 0);
    __syncwarp();  // lane 0 acquired for all
    return came;
  };

  bool came = true;
  if (!kEncodes && p.num_row_arrays > 0) {
    for (unsigned int i; came && (i = own_rows.Next()) < static_cast<unsigned int>(longest * num_lanes);) {
      const int step = static_cast<int>(i) / num_lanes, sending_lane = static_cast<int>(i) - step * num_lanes;
      const int block = sending_lane / kSendWarps, token = token_of(step, sending_lane);
      if (token < 0) continue;
      if (p.operation != kDispatchCached)
        came = await(&call.window->progress[call.rank][block], kPosted, call.rank, block);
      const int row = rows_of(call.rank, token);
      if (!came || __ballot_sync(~0u, row >= 0) == 0) continue;
      pipe.Copy(p.rows[0].x, p.rows[1].x, token, row);
    }
  }
  if (came) WriteZeroRows(plan, zero, zeros, zero_rows);
  if (came && call.dead != 0 && p.operation == kDispatchCached) WriteRowsOfDead(plan, call, zeros, warp);
  if (came && p.num_row_arrays > 0 && plan.copies_on() && num_sources > 0) {
    const auto num_jobs = static_cast<unsigned int>(longest * num_lanes) * num_sources;  // < 2 * choices of the ranks
    for (unsigned int i; came && (i = copies.Next()) < num_jobs;) {
      const int all_lanes = static_cast<int>(i / num_sources), nth = static_cast<int>(i) - all_lanes * num_sources;
      const int step = all_lanes / num_lanes, sending_lane = all_lanes - step * num_lanes;
      const int source = (call.rank + num_sources - nth) % call.num_ranks, token = token_of(step, sending_lane);
      if (token < 0 || !call.Reaches(source)) continue;
      const int chunk = sending_lane * plan.chunks_per_lane + step / plan.chunk_tokens;
      came = await(&call.window->arrived[source][chunk], kDone, source, chunk);
      if (!came) break;
      int row = rows_of(source, token);
      const uint32_t holders = __ballot_sync(~0u, row >= 0);
      if ((holders & (holders - 1)) == 0) continue;
      const int primary = __shfl_sync(~0u, row, __ffs(holders) - 1);
      if (lane == __ffs(holders) - 1) row = -1;
      pipe.Copy(p.rows[0].recv, p.rows[1].recv, primary, row);
    }
  }
  pipe.Finish();
  WaitBulkDone<0>();
}

}  // namespace jax_ep
