// The pulling warps of a dispatch: each loads a token's row once, from where the token is, and stores it to all its
// places here. So an SM stores the result and nothing else, and storing is the limit of few SMs: a row pushed is stored
// into the rank that wants it, then loaded there again and copied on.
//
//   remote tokens   from the peers' x; waits for the slots of the block that routed them (progress >= 1)
//   own tokens      the same from this rank's
//   zero rows       padding of groups and the tail
//
// Most warps begin with the link, some with what needs none; who is done helps with the other.
#pragma once

#include "dispatch/zero.cuh"

namespace jax_ep {

constexpr int kLocalFirst = 3;  // of a block's warps

// A pulling warp. All its threads call all of it.
class Puller {
 public:
  __device__ Puller(const DispatchPlan& plan, const Call& call, DispatchShared& shared, char* stages)
      : plan_(plan),
        call_(call),
        shared_(shared),
        lane_(threadIdx.x % 32),
        pipe_(plan, shared, stages, static_cast<int>(threadIdx.x / 32)) {}

  __device__ void Run(const ZeroRows& zero, const char* zeros) {
    const DispatchParams& p = plan_.params;
    const bool local_first = static_cast<int>(threadIdx.x / 32) < kLocalFirst;
    FenceProxyAsync();  // the peers' rows, acquired with their posts, are read by bulk copies
    if (!local_first) PullFrom(call_.rank + 1, call_.num_ranks - 1, &call_.window->taken_copies);
    if (local_first) WriteZeroRows(zero, zeros);
    PullFrom(call_.rank, 1, &call_.window->taken_own_rows);
    if (local_first) PullFrom(call_.rank + 1, call_.num_ranks - 1, &call_.window->taken_copies);
    if (!local_first) WriteZeroRows(zero, zeros);
    if (came_ && call_.dead != 0 && p.operation == kDispatchCached) {
      WriteRowsOfDead(plan_, call_, zeros, kDispatchWarps * blockIdx.x + threadIdx.x / 32, kDispatchWarps * gridDim.x);
    }
    pipe_.Finish();
    WaitBulkDone<0>();
  }

 private:
  struct Token {
    int source, number, row;  // row: the place of this lane's choice here, or -1
  };

  __device__ void WriteZeroRows(const ZeroRows& zero, const char* zeros) {
    Taken taken(&call_.window->taken_zero_rows);
    if (came_) jax_ep::WriteZeroRows(plan_, zero, zeros, taken);
  }

  // Copies tokens of `num_sources` ranks, by turns, until `counter` says that all have been taken.
  __device__ void PullFrom(int first_source, int num_sources, unsigned int* counter) {
    if (!came_ || num_sources == 0 || plan_.params.num_row_arrays == 0) return;
    Taken taken(counter);
    Token next = Take(taken, first_source, num_sources);
    while (next.number >= 0) {
      const Token token = next;
      next = Take(taken, first_source, num_sources);  // its places are on their way meanwhile
      const int row = DistinctRow(plan_, token.row);
      if (__ballot_sync(~0u, row >= 0) == 0) continue;
      const DispatchParams& p = plan_.params;
      const bool own = token.source == call_.rank;
      const char* const first = own ? p.rows[0].x : reinterpret_cast<const char*>(shared_.address[token.source][kX]);
      const char* const second = own ? p.rows[1].x : reinterpret_cast<const char*>(shared_.address[token.source][kX1]);
      pipe_.Copy(first, second, token.number, row);
    }
  }

  // The next token that is for anybody; number -1 if there is none.
  __device__ __forceinline__ Token Take(Taken& taken, int first_source, int num_sources) {
    const DispatchParams& p = plan_.params;
    while (came_) {
      const unsigned int i = taken.Next();
      const int number = static_cast<int>(i / num_sources);
      if (number >= p.num_tokens) break;
      int source = first_source + static_cast<int>(i - number * num_sources);
      while (source >= call_.num_ranks) source -= call_.num_ranks;
      if (!call_.Reaches(source)) continue;
      if (p.operation != kDispatchCached && !IsSlotted(source, plan_.BlockOf(number))) break;
      const int64_t choice = (static_cast<int64_t>(source) * p.num_tokens + number) * p.num_topk + lane_;
      return {source, number, lane_ < p.num_topk ? p.recv_slot[choice] : -1};
    }
    return {0, -1, -1};
  }

  // Waits until the slots of that block of `source` are written here. False: they will not be.
  __device__ __forceinline__ bool IsSlotted(int source, int block) {
    if ((__shfl_sync(~0u, slotted_, source) >> block & 1) != 0) return true;
    bool came = true;
    if (lane_ == 0) came = Await(call_, &call_.window->progress[source][block], kPosted, kRows, source, block);
    came_ = __shfl_sync(~0u, came, 0);
    __syncwarp();  // lane 0 acquired for all
    if (lane_ == source && came_) slotted_ |= 1u << block;
    return came_;
  }

  const DispatchPlan& plan_;
  const Call& call_;
  DispatchShared& shared_;
  const int lane_;
  CopyPipe pipe_;
  bool came_ = true;
  uint32_t slotted_ = 0;  // of lane s: the blocks of rank s that IsSlotted has seen
};

}  // namespace jax_ep
