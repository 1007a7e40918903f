// How a dispatch is laid out over blocks, warps and shared memory. Made by the launcher, read by every role.
#pragma once

#include "device/wait.cuh"
#include "dispatch/dispatch.h"

namespace jax_ep {

constexpr int kDispatchWarps = 8;
constexpr int kDispatchThreads = 32 * kDispatchWarps;
constexpr int kSendWarps = 2;      // warps 0, 1 of a send block
constexpr int kPublishWarp = 2;    // of a send block
constexpr int kFirstCopyWarp = 3;  // of a send block; in the other blocks every warp copies
constexpr int kMaxSendStages = 16, kMaxCopyStages = 8;

// A row is moved in pieces of at most `bytes`, each through one stage of shared memory. The first piece takes the row
// of the second array along, behind its own bytes, if that is a multiple of 16 bytes and short; else `second_bytes` is
// 0.
struct Pieces {
  int bytes, per_row, stages, stride, second_bytes;

  __device__ int Size(int64_t row_bytes, int piece) const {
    return static_cast<int>(min(static_cast<int64_t>(bytes), row_bytes - static_cast<int64_t>(piece) * bytes));
  }
};

struct DispatchPlan {
  DispatchParams params;
  int num_send_blocks, num_copy_warps, num_bins;
  Pieces send, copy;
  int zero_bytes;                       // of shared memory that stay zero
  int zero_rows_offset, stages_offset;  // into dynamic shared memory

  __host__ __device__ int num_lanes() const { return num_send_blocks * kSendWarps; }
  // Sending lane s holds tokens [TokenBegin(s), TokenBegin(s + 1)).
  __host__ __device__ int TokenBegin(int s) const {
    return static_cast<int>(static_cast<int64_t>(s) * params.num_tokens / num_lanes());
  }
};

enum Address { kRecvRows, kRecvRows1, kRecvWeights, kRecvSlot, kRecvTopkIdx };

// Static shared memory of a block.
struct DispatchShared {
  uint64_t address[kMaxRanks][kNumAddresses];  // of the peers' results
  uint64_t send_full[kSendWarps][kMaxSendStages];
  uint64_t copy_full[kDispatchWarps][kMaxCopyStages];
  int32_t copy_row[kDispatchWarps][kMaxCopyStages][32];
  int copy_piece[kDispatchWarps][kMaxCopyStages];
  uint32_t sent[kSendWarps];  // 1 + tokens of that lane which have arrived; kDone; kGone
};

}  // namespace jax_ep
