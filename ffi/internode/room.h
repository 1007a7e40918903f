// What ranks of several nodes share: one Room a rank, all at the same place of NVSHMEM's symmetric heap, so that an
// address in one's own room names the same place in everybody's. docs/protocol.md, "Across nodes", explains each field;
// docs/multinode.md has the sizes. The only place that knows the layout, for host and device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "group/window.h"

namespace jax_ep {

constexpr int kSlots = 4;                // chunks that a ring holds
constexpr int kMaxInternodeLanes = 128;  // rings between two ends
constexpr int kMaxAdders = 4;            // warps that add what comes in one lane's rings
constexpr int64_t kBoxBytesPerRank = 2 << 20;
constexpr int64_t kLeastSlotBytes = 32768, kMostChunkBytes = 65536;

// A word for each slot of a lane's ring, by the other end: epoch << kStateBits | (1 + number of the chunk).
using SlotFlags = uint64_t[kMaxInternodeLanes][kMaxRanks][kSlots];

// Posts and counts are the Window's. Everything is written by other ranks but `outgoing`.
struct Room : Window {
  alignas(128) uint64_t gone[kMaxRanks];  // last call that failed there: it takes part in none after it
  alignas(
      128) SlotFlags arrived;   // a chunk lies in this rank's inbox; dispatch: by node of the source, combine: by rank
  SlotFlags announced;          // dispatch: a chunk of that source lies in the inbox of its rail's rank
  SlotFlags transit;            // combine: a chunk lies in this rank's outbox, to be sent on; by stream
  SlotFlags freed[kMaxAdders];  // that reader has read a chunk of this rank's; combine: its adders, each its columns
  alignas(128) int32_t outgoing[2][kMaxSendBlocks][kMaxBins];  // counts on their way
};

// Behind it come the boxes, `BoxBytes` each: rings of chunks that came for this rank or its node, and of chunks that
// go.
constexpr int64_t kRoomHeaderBytes = (static_cast<int64_t>(sizeof(Room)) + 4095) / 4096 * 4096;

constexpr int64_t BoxBytes(int num_processes) {
  return kBoxBytesPerRank * std::max(16, std::min(num_processes, kMaxRanks));
}
constexpr int64_t RoomBytes(int num_processes) { return kRoomHeaderBytes + 2 * BoxBytes(num_processes); }

// Where the ranks of a group lie. Every node has as many; a rank's rail is the ranks with its local index.
struct Nodes {
  int32_t num_nodes, ranks_per_node;
  uint8_t node[kMaxRanks], local[kMaxRanks];  // of a rank
  uint8_t rank_at[kMaxRanks];                 // of node * ranks_per_node + local
};

// How a kernel finds the rooms. By value in its parameters: rooms never move and are never freed.
struct InternodeView {
  Nodes nodes;
  Room* room;  // this rank's
  int64_t box_bytes;
  // Where a rank's room is mapped here: every rank's of this node, and of the others all or none (null).
  Room* room_of[kMaxRanks];
  int32_t pe[kMaxRanks];  // NVSHMEM's number of a rank
};

}  // namespace jax_ep
