// How a call over nodes is cut: lanes, rings and messages, from sizes that are the same on every rank. Made by the
// launchers, read by every warp; docs/multinode.md has the formulas in words.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "internode/room.h"

namespace jax_ep {

constexpr int kTaskWarps = 15, kInternodeWarps = kTaskWarps + 1, kInternodeThreads = 32 * kInternodeWarps;
constexpr int kChunkHeaderBytes = 128;  // in front of a chunk's messages
constexpr int kMaxPerChunk = 32;

// Rows are cut into messages, and messages gathered in chunks. A message is a header, a piece of a row, and a piece of
// the second array's row, each padded to 128 bytes.
struct Messages {
  int num_pieces, header_bytes, per_chunk;
  int64_t piece_bytes, second_bytes, message_bytes, slot_bytes;

  __host__ __device__ int64_t ChunkBytes(int count) const { return kChunkHeaderBytes + count * message_bytes; }
  __host__ __device__ int64_t RingBytes() const { return kSlots * slot_bytes; }
};

// A lane is a part of all tokens, with rings of its own and a warp for each of its tasks.
struct Lanes {
  int num_blocks, num_lanes, num_tasks;  // tasks of a lane
  bool few_tokens;                       // of each

  static constexpr int kFewTokens = 2;
};

// Of a lane of a dispatch: a sender for each other node, and for the own one if others are on it, as many announcers,
// and a reader for each other rank. Rows that stay are no task of a lane: all warps share them.
struct DispatchTasks {
  int senders, announcers, readers;

  __host__ __device__ int count() const { return senders + announcers + readers; }
};
inline DispatchTasks DispatchTasksOf(int num_nodes, int ranks_per_node) {
  const int neighbours = ranks_per_node > 1 ? 1 : 0;
  return {num_nodes - 1 + neighbours, neighbours, num_nodes * ranks_per_node - 1};
}

// Rings of a lane in a box of a dispatch: one a node, but for the own one if no others are on it.
inline int DispatchRings(int num_nodes, int ranks_per_node) {
  return std::max(ranks_per_node > 1 ? num_nodes : num_nodes - 1, 1);
}

// Of a lane of a combine: a sender for each other rank, a relay where ranks send through others, and adders, each of
// its part of the columns.
struct CombineTasks {
  int senders, relays, adders;

  __host__ __device__ int count() const { return senders + relays + adders; }
};
// Adders are as many as can be, unless rows are short. But where senders add too, they need as many warps as the
// adders: as many of these as ranks then, whose sums they add; with few tokens one, if that gives every token a lane of
// its own, or again as many as can be, if there are warps for that.
inline CombineTasks CombineTasksOf(int num_nodes, int ranks_per_node, bool all_mapped, int num_sms, int num_tokens,
                                   int64_t row_bytes, bool one_row_a_rank) {
  constexpr int64_t kLeastAdderBytes = 2048;
  const int num_ranks = num_nodes * ranks_per_node;
  const bool through_others = !all_mapped && num_nodes > 1 && ranks_per_node > 1;
  const int others = num_ranks - 1 + (through_others ? 1 : 0);
  int64_t adders = kMaxAdders;
  if (!one_row_a_rank && int64_t{num_tokens} * (others + kMaxAdders) > int64_t{num_sms} * kTaskWarps) {
    adders = num_ranks == 2 && num_tokens <= kMaxInternodeLanes ? 1 : std::min(num_ranks, kMaxAdders);
  }
  adders = std::max<int64_t>(std::min(adders, row_bytes / kLeastAdderBytes), 1);
  return {num_ranks - 1, through_others ? 1 : 0, static_cast<int>(adders)};
}

// Bytes in front of a dispatch's rows: {token, piece}, and of each choice slot, expert and gate.
constexpr int64_t DispatchHeaderBytes(int num_topk) { return 16 + 12ll * num_topk; }

inline int64_t PadTo128(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// A warp for each task of a lane; but not so many lanes that slots become small.
inline Lanes PlanLanes(int num_sms, int num_tasks, int num_tokens, int rings_per_lane, int64_t box_bytes) {
  const int num_blocks = std::max(std::max(num_sms, 1), (num_tasks + kTaskWarps - 1) / kTaskWarps);
  if (num_tasks == 0) return {num_blocks, 0, 1, true};
  const int64_t with_room = box_bytes / (rings_per_lane * kSlots * kLeastSlotBytes);
  const int64_t most = std::min<int64_t>({num_blocks * kTaskWarps / num_tasks, kMaxInternodeLanes, num_tokens});
  const int num_lanes = static_cast<int>(std::max<int64_t>(std::min(most, with_room), 1));
  return {num_blocks, num_lanes, num_tasks, num_tokens <= num_lanes * Lanes::kFewTokens};
}

// A box is shared out evenly: over lanes, rings and slots.
inline Messages PlanMessages(int64_t row_bytes, int64_t second_bytes, int64_t header_bytes, const Lanes& lanes,
                             int rings_per_lane, int64_t box_bytes) {
  Messages messages;
  const int64_t per_slot = box_bytes / (std::max<int64_t>(lanes.num_lanes, 1) * rings_per_lane * kSlots);
  messages.slot_bytes = std::min(per_slot / 128 * 128, kMostChunkBytes);
  messages.header_bytes = static_cast<int>(PadTo128(header_bytes));
  const int64_t limit = messages.slot_bytes - kChunkHeaderBytes - messages.header_bytes;
  int64_t pieces = std::max<int64_t>((row_bytes + second_bytes + limit - 1) / limit, 1);
  const auto piece = [&](int64_t bytes) { return PadTo128((bytes + pieces - 1) / pieces); };
  while (piece(row_bytes) + piece(second_bytes) > limit) ++pieces;
  messages.num_pieces = static_cast<int>(pieces);
  messages.piece_bytes = piece(row_bytes), messages.second_bytes = piece(second_bytes);
  messages.message_bytes = messages.header_bytes + messages.piece_bytes + messages.second_bytes;
  const int64_t fit = (messages.slot_bytes - kChunkHeaderBytes) / messages.message_bytes;
  messages.per_chunk = static_cast<int>(std::min<int64_t>(fit, kMaxPerChunk));
  return messages;
}

// Every rank a node of its own.
inline Nodes EachRankANode(int num_ranks) {
  Nodes nodes{num_ranks, 1, {}, {}, {}};
  for (int rank = 0; rank < num_ranks; ++rank) nodes.node[rank] = nodes.rank_at[rank] = static_cast<uint8_t>(rank);
  return nodes;
}

}  // namespace jax_ep
