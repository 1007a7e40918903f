// The sending warps and the publisher of a dispatch: rows out of this rank, once to every rank that wants them.
//
//   warp            waits for               signals
//   sender (0, 1)   its stage's bulk load   shared.sent, when stores are complete
//   publisher (2)   shared.sent             progress in every rank's window
#pragma once

#include "device/warp.cuh"
#include "dispatch/plan.cuh"

namespace jax_ep {

// Loads one piece of row `row` of x (or of rows received before) into a stage. Called by one lane.
__device__ __forceinline__ void LoadPiece(const Pieces& pieces, const char* first, int64_t row_bytes,
                                          const char* second, int64_t row, int piece, char* stage, uint64_t* full) {
  const int size = pieces.Size(row_bytes, piece), second_size = piece == 0 ? pieces.second_bytes : 0;
  ExpectBytes(full, size + second_size);
  BulkLoad(stage, first + row * row_bytes + static_cast<int64_t>(piece) * pieces.bytes, size, full);
  if (second_size > 0) BulkLoad(stage + pieces.bytes, second + row * second_size, second_size, full);
}

__device__ __forceinline__ void StorePiece(const Pieces& pieces, char* first, int64_t row_bytes, char* second,
                                           int64_t row, int piece, const char* stage) {
  BulkStore(first + row * row_bytes + static_cast<int64_t>(piece) * pieces.bytes, stage, pieces.Size(row_bytes, piece));
  if (piece == 0 && pieces.second_bytes > 0)
    BulkStore(second + row * pieces.second_bytes, stage + pieces.bytes, pieces.second_bytes);
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

// Lane k serves choice k: the first choice on a rank sends the row there; own rows are the copiers' work.
// Few rows in flight: more would clog the receivers' links.
__device__ inline void SendRows(const DispatchPlan& plan, const Call& call, DispatchShared& shared, char* stages) {
  constexpr int kReportEvery = 4, kUnreported = 12;  // pieces; a store over the link takes several µs to complete
  const DispatchParams& p = plan.params;
  const Pieces& pieces = plan.send;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int sending_lane = kSendWarps * blockIdx.x + warp;
  const int begin = plan.TokenBegin(sending_lane), end = plan.TokenBegin(sending_lane + 1);
  const RowArray& rows = p.rows[0];
  const bool second_apart = p.num_row_arrays > 1 && pieces.second_bytes == 0;
  char* stage = stages + warp * pieces.stages * pieces.stride;
  uint64_t* full = shared.send_full[warp];

  int load_token = begin, load_piece = 0, load_stage = 0;
  const auto load = [&] {
    if (load_token >= end) return;
    if (lane == 0) {
      LoadPiece(pieces, rows.x, rows.row_bytes, p.rows[1].x, load_token, load_piece, stage + load_stage * pieces.stride,
                &full[load_stage]);
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
    const int rank = slot >= 0 ? slot / p.max_recv_tokens : -1, row = slot - rank * p.max_recv_tokens;
    const uint32_t same = __match_any_sync(~0u, rank);
    const bool sends = rank >= 0 && rank != call.rank && call.Reaches(rank) && (same & ((1u << lane) - 1)) == 0;
    char* const target = sends ? reinterpret_cast<char*>(shared.address[rank][kRecvRows]) : nullptr;
    char* const second = sends ? reinterpret_cast<char*>(shared.address[rank][kRecvRows1]) : nullptr;
    if (second_apart) {
      for (uint32_t rest = __ballot_sync(~0u, sends); rest != 0; rest &= rest - 1) {
        const int holder = __ffs(rest) - 1;
        char* place = second + row * p.rows[1].row_bytes;
        place = reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(place), holder));
        CopySmallRow(place, p.rows[1].x + token * p.rows[1].row_bytes, p.rows[1].row_bytes);
      }
    }
    for (int piece = 0; piece < pieces.per_row; ++piece) {
      WaitMbarrier(&full[now], parity);
      if (sends) StorePiece(pieces, target, rows.row_bytes, second, row, piece, stage + now * pieces.stride);
      CommitBulkGroup();
      if (++now == pieces.stages) now = 0, parity ^= 1;
      WaitBulkRead<1>();  // the stage filled next is the one stored from before this one
      __syncwarp();
      load();
      if (++stored % kReportEvery == 0 && stored > kUnreported) {
        WaitBulkDone<kUnreported>();
        __syncwarp();
        if (lane == 0) StoreReleaseShared(&shared.sent[warp], 1 + (stored - kUnreported) / pieces.per_row);
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
      if (sent[warp] > published[warp] && call.Reaches(peer)) {
        StoreRelaxedSys(&call.Peer(peer)->progress[call.rank][kSendWarps * blockIdx.x + warp], call.Tag(sent[warp]));
      }
      published[warp] = sent[warp];
    }
  }
  for (int warp = 0; warp < kSendWarps; ++warp) Leave(call, blockIdx.x, kSendWarps * blockIdx.x + warp);
}

}  // namespace jax_ep
