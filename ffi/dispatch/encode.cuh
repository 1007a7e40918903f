// The encoders of a dispatch with an encoding: kEncoders warps make each sender's rows into values and scales, in
// shared memory. The warps of such a team meet once a piece: the sender then sends the row that its piece completes,
// while the encoders make the next one. Neighbours: send.cuh, device/quantize.cuh.
//
//   warp      waits, before the team meets, for        hands over
//   sender    its stores to have read the next slot    the next slot; how many pieces it has loaded
//   encoder   the piece's bulk load                    its part of the piece, encoded; the piece's stage
#pragma once

#include "device/quantize.cuh"
#include "dispatch/plan.cuh"

namespace jax_ep {

// Barriers 0 and 1 are the block's and the copying warps'. Their numbers are constants: racecheck follows no others.
__device__ __forceinline__ void MeetTeam(int team) {
  static_assert(kSendWarps == 2);
  __syncwarp();
  if (team == 0) {
    asm volatile("bar.sync 2, %0;" ::"n"(32 * (1 + kEncoders)) : "memory");
  } else {
    asm volatile("bar.sync 3, %0;" ::"n"(32 * (1 + kEncoders)) : "memory");
  }
}

// An encoder's share of all rows that its sender sends; `stages` are the sender's.
template <Wire kWire, class T>
__device__ __forceinline__ void EncodeRows(const DispatchPlan& plan, DispatchShared& shared, char* stages, int team,
                                           int part) {
  const Pieces& pieces = plan.send;
  const int hidden = plan.params.encoding.hidden;
  char* const slots = stages + pieces.stages * pieces.stride;
  int stage = 0, slot = 0, piece = 0;
  uint32_t parity = 0;
  MeetTeam(team);
  for (uint32_t i = 0; i < shared.loaded[team][i % 2]; ++i) {
    const int first = piece * plan.piece_columns;
    char* const values = slots + slot * plan.slot_stride;
    char* const scales = values + hidden + first / GroupColumns(kWire) * ScaleBytes(kWire);
    WaitMbarrier(&shared.send_full[team][stage], parity);
    EncodeRow<kWire, T>(stages + stage * pieces.stride, min(plan.piece_columns, hidden - first), values + first, scales,
                        part, kEncoders);
    FenceProxyAsyncShared();  // the slot will be stored from, the stage loaded into, by bulk copies
    MeetTeam(team);
    if (++stage == pieces.stages) stage = 0, parity ^= 1;
    if (++piece == pieces.per_row) {
      piece = 0;
      if (++slot == plan.slots) slot = 0;
    }
  }
}

template <class T>
__device__ __forceinline__ void EncodeRows(const DispatchPlan& plan, DispatchShared& shared, char* stages, int team,
                                           int part) {
  switch (static_cast<Wire>(plan.params.encoding.wire)) {
    case Wire::kFp8:
      return EncodeRows<Wire::kFp8, T>(plan, shared, stages, team, part);
    case Wire::kFp8Ue8m0:
      return EncodeRows<Wire::kFp8Ue8m0, T>(plan, shared, stages, team, part);
    case Wire::kMxfp8:
      return EncodeRows<Wire::kMxfp8, T>(plan, shared, stages, team, part);
  }
}

// Called by an encoding warp when its sender begins to send. `warp` counts them.
__device__ inline void EncodeRows(const DispatchPlan& plan, DispatchShared& shared, char* stages, int warp) {
  const int team = warp / kEncoders, part = warp - team * kEncoders;
  stages += team * plan.send_bytes;
  switch (plan.params.encoding.dtype) {
    case RowDtype::kBfloat16:
      return EncodeRows<__nv_bfloat16>(plan, shared, stages, team, part);
    case RowDtype::kFloat16:
      return EncodeRows<__half>(plan, shared, stages, team, part);
    case RowDtype::kFloat32:
      return EncodeRows<float>(plan, shared, stages, team, part);
  }
}

}  // namespace jax_ep
