// The sending warps and the publisher of a dispatch: rows out of this rank, once to every rank that wants them.
//
//   warp            waits for               signals
//   sender (0, 1)   its stage's bulk load   shared.sent, when stores are complete
//   publisher (2)   shared.sent             progress in every rank's window
#pragma once

#include "device/warp.cuh"
#include "dispatch/plan.cuh"

namespace jax_ep {

// Bytes [begin, end) of a row make up one piece.
__device__ __forceinline__ int PieceBytes(const Pieces& pieces, int64_t row_bytes, int64_t offset) {
  return static_cast<int>(min(static_cast<int64_t>(pieces.bytes), row_bytes - offset));
}

// Copies a row of the second array, any number of bytes, to `target`; called by one whole warp.
__device__ __forceinline__ void CopySmallRow(char* target, const char* source, int64_t num_bytes) {
  const int lane = threadIdx.x % 32;
  if (num_bytes % 16 == 0) {
    for (int64_t i = lane * 16; i < num_bytes; i += 512) {
      *reinterpret_cast<int4*>(target + i) = *reinterpret_cast<const int4*>(source + i);
    }
  } else if (num_bytes % 4 == 0) {
    for (int64_t i = lane * 4; i < num_bytes; i += 128) {
      *reinterpret_cast<int32_t*>(target + i) = *reinterpret_cast<const int32_t*>(source + i);
    }
  } else {
    for (int64_t i = lane; i < num_bytes; i += 32) target[i] = source[i];
  }
}

// Lane i serves the rank i + 1 after this one, so that no two ranks begin with the same peer; own rows are the copiers' work.
// Few rows in flight: more would clog the receivers' links.
__device__ inline void SendRows(const DispatchPlan& plan, const Call& call, DispatchShared& shared, char* stages) {
  const DispatchParams& p = plan.params;
  const Pieces& pieces = plan.send;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int sending_lane = kSendWarps * blockIdx.x + warp;
  const int begin = plan.TokenBegin(sending_lane), end = plan.TokenBegin(sending_lane + 1);
  const int peer = (call.rank + 1 + lane) % call.num_ranks;
  const bool serves = lane < call.num_ranks - 1;
  const RowArray& rows = p.rows[0];
  char* stage = stages + warp * pieces.stages * pieces.stride;
  uint64_t* full = shared.send_full[warp];
  char* const recv = reinterpret_cast<char*>(shared.address[peer][kRecvRows]);

  int load_token = begin, load_piece = 0, load_stage = 0;
  const auto load = [&] {
    if (load_token >= end) return;
    if (lane == 0) {
      const int64_t offset = static_cast<int64_t>(load_piece) * pieces.bytes;
      BulkLoad(stage + load_stage * pieces.stride, rows.x + load_token * rows.row_bytes + offset,
               PieceBytes(pieces, rows.row_bytes, offset), &full[load_stage]);
    }
    if (++load_stage == pieces.stages) load_stage = 0;
    if (++load_piece == pieces.per_row) load_piece = 0, ++load_token;
  };
  for (int i = 0; i + 1 < pieces.stages; ++i) load();

  const auto load_slot = [&](int token) {
    return lane < p.num_topk && token < end ? p.slot[static_cast<int64_t>(token) * p.num_topk + lane] : -1;
  };
  int now = 0;
  uint32_t parity = 0, stored = 0;
  int next_slot = load_slot(begin);
  for (int token = begin; token < end; ++token) {
    const int slot = next_slot;
    next_slot = load_slot(token + 1);
    const int found = FirstRowOn(peer, slot, p.num_topk, p.max_recv_tokens);
    const int row = serves ? found : -1;
    if (p.num_row_arrays > 1) {
      const RowArray& small = p.rows[1];
      for (int i = 0; i + 1 < call.num_ranks; ++i) {
        const int target_row = __shfl_sync(~0u, row, i), target = (call.rank + 1 + i) % call.num_ranks;
        if (target_row < 0) continue;
        CopySmallRow(reinterpret_cast<char*>(shared.address[target][kRecvRows1]) + target_row * small.row_bytes,
                     small.x + token * small.row_bytes, small.row_bytes);
      }
    }
    for (int piece = 0; piece < pieces.per_row; ++piece) {
      const int64_t offset = static_cast<int64_t>(piece) * pieces.bytes;
      WaitMbarrier(&full[now], parity);
      if (row >= 0) {
        BulkStore(recv + row * rows.row_bytes + offset, stage + now * pieces.stride,
                  PieceBytes(pieces, rows.row_bytes, offset));
      }
      CommitBulkGroup();
      if (++now == pieces.stages) now = 0, parity ^= 1;
      WaitBulkRead<1>();  // the stage filled next is the one stored from before this one
      __syncwarp();
      load();
      if (++stored % 4 == 0) {
        WaitBulkDone<4>();
        __syncwarp();
        if (lane == 0) StoreReleaseShared(&shared.sent[warp], 1 + (stored - 4) / pieces.per_row);
      }
    }
  }
  WaitBulkDone<0>();
  __syncwarp();
  if (lane == 0) StoreReleaseShared(&shared.sent[warp], kDone);
}

// Carries shared.sent into the windows of all ranks until both senders are done, then leaves both lanes.
__device__ inline void Publish(const DispatchPlan& plan, const Call& call, DispatchShared& shared) {
  const int peer = threadIdx.x % 32;
  uint32_t published[kSendWarps] = {};
  while (published[0] < kDone || published[1] < kDone) {
    uint32_t sent[kSendWarps];
    bool news = false;
    for (int warp = 0; warp < kSendWarps; ++warp) {
      sent[warp] = __shfl_sync(~0u, LoadAcquireShared(&shared.sent[warp]), 0);
      news |= sent[warp] > published[warp];
    }
    if (!news) {
      __nanosleep(100);
      continue;
    }
    __syncwarp();
    FenceSys();  // what the senders stored before counting is before the flags
    for (int warp = 0; warp < kSendWarps; ++warp) {
      if (sent[warp] > published[warp] && peer < call.num_ranks) {
        StoreRelaxedSys(&call.Peer(peer)->progress[call.rank][kSendWarps * blockIdx.x + warp], call.Tag(sent[warp]));
      }
      published[warp] = sent[warp];
    }
  }
  for (int warp = 0; warp < kSendWarps; ++warp) Leave(call, blockIdx.x, kSendWarps * blockIdx.x + warp);
}

}  // namespace jax_ep
