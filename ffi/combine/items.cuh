// What the workers of combine.cu do, in which order: items, the sums of one token or of a part of its columns.
// Neighbours: frame.cuh has the list of steps that they are of, sum.cuh adds their rows.
#pragma once

#include <algorithm>

#include "combine/combine.h"
#include "combine/frame.cuh"
#include "device/wait.cuh"

namespace jax_ep {

// Pushes are to the peers only; groups are whole pieces.
__device__ __forceinline__ Steps StreamSteps(const CombineParams& p, int num_ranks, int piece_bytes) {
  const int num_steps = NumTokensOfLane(p.num_tokens), row_bytes = static_cast<int>(p.row_bytes);
  // Whole rows, unless there are too few of them to keep the workers busy.
  const int num_pieces = max((row_bytes + piece_bytes - 1) / piece_bytes, 1);
  const int num_rows = min(max(num_steps, 1), 4 * kWorkers) * num_ranks;
  const int most = min((4 * kWorkers + num_rows - 1) / num_rows, num_pieces);
  const int pieces_per_group = (num_pieces + most - 1) / most;
  const int num_groups = (num_pieces + pieces_per_group - 1) / pieces_per_group;
  return {num_steps, num_groups, pieces_per_group * piece_bytes, (num_ranks - 1) * num_groups};
}

// An item, as a lane sees it: its choice of the token (recv_slot of a peer's token to push, slot of an own token to
// sum) and the weight of the row here that this names.
struct Item {
  int token = -1;  // -1: nothing to do
  int source = 0, group = 0;
  int choice = -1;
  float weight = 1.f;
};

// Goes through the items of a worker and asks for their choices.
struct ItemList {
  const CombineParams& p;
  const Steps& steps;
  const int rank, num_ranks;
  const uint32_t dead;
  int step, part;  // of the item that comes next

  __device__ __forceinline__ ItemList(const CombineParams& p, const Call& call, const Steps& steps, int first)
      : p(p), steps(steps), rank(call.rank), num_ranks(call.num_ranks), dead(call.dead) {
    step = first / steps.items_per_step;
    part = first % steps.items_per_step;
  }

  __device__ __forceinline__ Item Next() {
    Item item;
    const bool push = part < steps.num_pushes;
    const int own_step = push ? step : step - steps.lag;
    if (own_step >= 0 && own_step < steps.num_steps) {
      // The peers in turn, this rank's successor first, so that not all push to one rank at a time.
      const int peers = push ? num_ranks - 1 : 1, i = push ? part : part - steps.num_pushes;
      item.group = steps.num_groups > 1 ? i / peers : 0;
      item.source = push ? rank + 1 + i - item.group * peers : rank;
      if (item.source >= num_ranks) item.source -= num_ranks;
      item.token = own_step * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
      const int32_t* choices = push ? p.recv_slot + item.source * p.num_tokens * p.num_topk : p.slot;
      const int lane = threadIdx.x % 32;
      if (lane < p.num_topk) item.choice = choices[item.token * p.num_topk + lane];
      if (dead != 0) Forget(item);
    }
    part += kWorkers;
    while (part >= steps.items_per_step) part -= steps.items_per_step, ++step;
    return item;
  }

  // Masked ranks are sent nothing, and their rows are absent.
  __device__ __forceinline__ void Forget(Item& item) const {
    if (item.source != rank) {
      if ((dead >> item.source & 1) != 0) item.token = -1, item.choice = -1;
    } else if (item.choice >= 0 && (dead >> (item.choice / p.max_recv_tokens) & 1) != 0) {
      item.choice = -1;
    }
  }
};

}  // namespace jax_ep
