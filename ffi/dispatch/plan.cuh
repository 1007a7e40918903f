// How a dispatch is laid out over blocks, warps and shared memory. Made by the launcher, read by every role.
#pragma once

#include "device/wait.cuh"
#include "dispatch/dispatch.h"

namespace jax_ep {

constexpr int kDispatchWarps = 8;
constexpr int kEncoders = 4;                              // warps besides that encode what one sending warp sends
constexpr int kSendWarps = 2;                             // warps 0, 1 of a send block
constexpr int kPublishWarp = 2;                           // of a send block
constexpr int kFirstCopyWarp = 3;                         // of a send block; in the other blocks every warp copies
constexpr int kRouteWarps = kDispatchWarps - kSendWarps;  // those that do not send count and write slots first
constexpr int kMaxSendStages = 16, kMaxCopyStages = 8;
constexpr int kChunkRing = 32;  // chunks a sender may have taken and not yet published
constexpr int kLeastChunk = 4;  // tokens

// A row is moved in pieces of at most `bytes`, each through one stage of shared memory. The first piece takes the row
// of the second array along, behind its own bytes, if that is a multiple of 16 bytes and short; else `second_bytes` is
// 0.
struct Pieces {
  int bytes, per_row, last_bytes, stages, stride, second_bytes;

  __device__ int Size(int piece) const { return piece + 1 == per_row ? last_bytes : bytes; }
};

struct Tokens {
  int begin, end;
};

// How rows travel: senders push each once into a rank that wants it; the same and encoders encode them before; or every
// warp pulls what its rank wants.
enum class Way { kPush, kPushEncoded, kPull };

constexpr __host__ __device__ int DispatchThreads(Way way) {
  return 32 * (kDispatchWarps + (way == Way::kPushEncoded ? kSendWarps * kEncoders : 0));
}

// A routing warp's part of a block's tokens: in order, so a warp's rows of one expert come after those of the warps
// before it.
__device__ __forceinline__ Tokens PartOf(int begin, int end, int warp) {
  return {begin + (end - begin) * warp / kRouteWarps, begin + (end - begin) * (warp + 1) / kRouteWarps};
}

// The first num_send_blocks blocks route, and send where rows are pushed.
//
// Sending lane s, a sending warp, begins with tokens [TokenBegin(s), TokenBegin(s + 1)), chunk after chunk, then helps
// others with theirs. A chunk is a lane's next chunk_tokens tokens, the last one shorter.
struct DispatchPlan {
  DispatchParams params;
  Way way;
  int num_send_blocks, num_bins;
  int chunk_tokens, chunks_per_lane;
  int staged_choices;  // of a block, in shared memory
  const char* x;       // what the senders load, [T, x_row_bytes]
  int64_t x_row_bytes;
  Pieces send, copy;
  // With an encoding: columns of a piece, a multiple of kStepColumns unless a row is one piece; and beside a sender's
  // stages 2 or 3 slots, each for a whole row's values and behind them its scales.
  int piece_columns, slots, slot_stride;
  int send_bytes;                       // of a sending warp's stages and slots
  int zero_bytes;                       // of shared memory that stay zero
  int zero_rows_offset, stages_offset;  // into dynamic shared memory

  __host__ __device__ int num_lanes() const { return num_send_blocks * kSendWarps; }
  __host__ __device__ int TokenBegin(int lane) const {
    return static_cast<int>(static_cast<int64_t>(lane) * params.num_tokens / num_lanes());
  }
  // The block that has routed a token.
  __device__ int BlockOf(int token) const {
    return static_cast<int>(((token + 1u) * num_send_blocks - 1) / static_cast<uint32_t>(params.num_tokens));
  }
  // Of rows that are pushed: are there any that are copied on to further experts of the same rank?
  __device__ bool copies_on() const { return params.layout != Layout::kRank && params.num_topk > 1; }
};

// kX, kX1: the rows that peers pull.
enum Address { kRecvRows, kRecvRows1, kRecvWeights, kRecvSlot, kRecvTopkIdx, kX, kX1 };

// A chunk that a sender has taken.
struct Chunk {
  Tokens tokens;
  uint32_t end;  // of the stores of this sender: a piece each, an encoded row
};

// Static shared memory of a block.
struct DispatchShared {
  uint64_t address[kMaxRanks][kNumAddresses];  // of the peers' results
  uint64_t send_full[kSendWarps][kMaxSendStages];
  uint64_t copy_full[kDispatchWarps][kMaxCopyStages];
  int32_t copy_row[kDispatchWarps][kMaxCopyStages][32];
  int copy_piece[kDispatchWarps][kMaxCopyStages];
  // TokenBegin of each sending lane, and how many chunks it has: to divide takes long.
  int lane_begin[kSendWarps * kMaxSendBlocks + 1], lane_chunks[kSendWarps * kMaxSendBlocks];
  uint32_t slotted[kRouteWarps];            // the token before which that warp has written all slots of its part
  Chunk chunk[kSendWarps][kChunkRing];      // what a sender has taken, in its order
  uint32_t number[kSendWarps][kChunkRing];  // of those chunks, for the publisher
  uint32_t sent[kSendWarps];                // how many of them have arrived; kSenderDone and kSenderGone besides
  uint32_t published[kSendWarps];           // how many of them the peers know of
  uint32_t loaded[kSendWarps][2];  // pieces; read when the team has met, written before it meets the time after

  __device__ Tokens ChunkTokens(const DispatchPlan& plan, int lane, int number) const {
    const int begin = lane_begin[lane] + number * plan.chunk_tokens;
    return {begin, min(begin + plan.chunk_tokens, lane_begin[lane + 1])};
  }
  // The tokens whose slots a routing warp of this block writes.
  __device__ Tokens RoutedBy(int warp) const {
    return PartOf(lane_begin[kSendWarps * blockIdx.x], lane_begin[kSendWarps * (blockIdx.x + 1)], warp);
  }
};

constexpr uint32_t kSenderDone = 1u << 31, kSenderGone = 1u << 30;

}  // namespace jax_ep
