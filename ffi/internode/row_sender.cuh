// The sender of rows: layout "rank" has one a (token, rank), which is the rank's sum. So they leave as they are, by
// bulk copies; the adder's arithmetic is the same. Neighbour: sum_sender.cuh adds first.
#pragma once

#include "internode/combine_lane.cuh"
#include "internode/conveyor.cuh"

namespace jax_ep {

// The conveyor has the shared memory in which others of the lane add.
template <int V>
constexpr int kMostRowStageBytes =
    (int{sizeof(SumShared<V>)} - kConveyorStages * int{sizeof(uint64_t)}) / kConveyorStages / 128 * 128;

// This rank's rows of the tokens of `source`, another one.
template <int V>
__device__ __forceinline__ void SendRows(const InternodeCombinePlan& plan, const Call& call, SumShared<V>& memory,
                                         Poster& poster, int lane_number, int source) {
  const CombineParams& p = plan.combine;
  const int lane = threadIdx.x % 32;
  char* const stages = reinterpret_cast<char*>(&memory);
  auto* const full = reinterpret_cast<uint64_t*>(stages + kConveyorStages * plan.stage_bytes);
  if (lane < kConveyorStages) InitMbarrier(full + lane);
  FenceMbarrierInit();
  __syncwarp();
  Conveyor conveyor(stages, plan.stage_bytes, full);
  Outgoing out(call, plan.view, plan.messages, StreamTo(plan, call, lane_number, source), plan.written, poster);
  const int32_t* const slots = p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * p.num_topk;
  Choices<false> choices(p, LaneTokens(p.num_tokens, lane_number, plan.lanes.num_lanes), slots, 0);

  struct Outbound {
    const char* row;  // null: there are no more
    float carried;    // by this lane's choice
  };
  const auto next_that_goes = [&] {
    while (choices.Has()) {
      const int own = choices.Row();
      const uint32_t holders = __ballot_sync(~0u, own >= 0);
      const int row = __shfl_sync(~0u, own, holders != 0 ? __ffs(holders) - 1 : 0);
      choices.Advance();
      if (holders == 0) continue;
      float carried = 0.f;
      if (p.carried != nullptr && own >= 0) carried = p.carried[static_cast<int64_t>(own) * p.num_topk + lane];
      return Outbound{p.y + static_cast<int64_t>(row) * p.row_bytes, carried};
    }
    return Outbound{nullptr, 0.f};
  };
  const auto begin = [&](const Outbound& outbound, int piece) {
    const PieceRange range = plan.Piece(piece);
    if (outbound.row != nullptr) conveyor.Begin(outbound.row + range.begin, range.size);
  };
  Outbound now = next_that_goes();
  int piece = 0;
  begin(now, piece);
  while (now.row != nullptr) {
    const bool ends = piece + 1 == plan.messages.num_pieces;
    const Outbound next = ends ? next_that_goes() : now;
    const int next_piece = ends ? 0 : piece + 1;
    begin(next, next_piece);
    char* const message = out.Next();
    if (message == nullptr) {
      conveyor.Drop();
      break;
    }
    if (p.carried != nullptr && lane < p.num_topk) reinterpret_cast<float*>(message)[lane] = now.carried;
    conveyor.Finish(lane == 0 ? message + plan.messages.header_bytes : nullptr, plan.Piece(piece).size);
    out.Add();
    now = next, piece = next_piece;
  }
  if (now.row == nullptr) out.Finish();
  WaitBulkDone<0>();
}

}  // namespace jax_ep
