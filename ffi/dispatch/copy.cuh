// The copying warps of a dispatch whose rows are pushed: all rows of a result that do not come over the link.
//
//   own tokens   rows as they are: from x to their rows here; waits for the slots of the block that routed them
//                (progress >= 1). Encoded ones come from this rank's senders
//   zero rows    padding of groups and the tail
//   fan-out      encoded rows: one of any rank, once its chunk is here (arrived), to the further experts that chose it
//
// A warp takes the next piece of work of each kind as it comes free: those beside senders are slower than the others.
#pragma once

#include "dispatch/zero.cuh"

namespace jax_ep {

// All of a copying warp's work.
template <bool kEncodes>
__device__ inline void CopyRows(const DispatchPlan& plan, const Call& call, DispatchShared& shared,
                                const ZeroRows& zero, const char* zeros, char* stages, int warp) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_lanes = plan.num_lanes(), num_ranks = call.num_ranks;
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  const int longest = (p.num_tokens + num_lanes - 1) / num_lanes;
  CopyPipe pipe(plan, shared, stages, warp);
  // The first piece of each kind is asked for at once.
  Taken rows(kEncodes ? &call.window->taken_copies : &call.window->taken_own_rows),
      zero_rows(&call.window->taken_zero_rows);

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
    for (unsigned int i; came && (i = rows.Next()) < static_cast<unsigned int>(longest * num_lanes);) {
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
  if (came && call.dead != 0 && p.operation == kDispatchCached) {
    const auto warps_of = [&](int num_blocks) {
      const int with_senders = min(num_blocks, plan.num_send_blocks);
      return with_senders * (kDispatchWarps - kFirstCopyWarp) + (num_blocks - with_senders) * kDispatchWarps;
    };
    WriteRowsOfDead(plan, call, zeros, warps_of(blockIdx.x) + warp, warps_of(gridDim.x));
  }
  if (kEncodes && came && plan.copies_on()) {
    const auto num_jobs = static_cast<unsigned int>(longest * num_lanes) * num_ranks;  // < 2 * choices of the ranks
    for (unsigned int i; came && (i = rows.Next()) < num_jobs;) {
      const int all_lanes = static_cast<int>(i / num_ranks), nth = static_cast<int>(i) - all_lanes * num_ranks;
      const int step = all_lanes / num_lanes, sending_lane = all_lanes - step * num_lanes;
      const int source = (call.rank + num_ranks - nth) % num_ranks, token = token_of(step, sending_lane);
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
