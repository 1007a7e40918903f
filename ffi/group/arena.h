// What ranks share for low-latency calls: an Arena a rank and size, windows of lines that peers fill without asking.
// docs/protocol.md, "Low latency", explains each field. The only place that knows the layout, for host and device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "group/window.h"

namespace jax_ep {

constexpr int kDepth = 4;        // calls of an arena that may be in flight: at most, see ArenaView
constexpr int kLineBytes = 128;  // a line: 15 units of 8 bytes, and the epoch of its call
constexpr int kLineMain = 112;   // bytes that seven lanes carry, 16 each; the eighth carries 8 and the epoch
constexpr int kLinePayload = 120;
constexpr int kLineChoices = 60;  // choices in a line of a routing table, 2 bytes each
constexpr int64_t kArenaHeaderBytes = 4096;

struct Arena : Ledger {
  // Own kernels only.
  unsigned int turn;          // kernels that have begun here
  unsigned int entered;       // blocks of the running kernel that know its epoch and turn
  unsigned int left[2];       // by parity of the turn: blocks of that kernel that are through
  uint64_t finished[kDepth];  // by window: the last call whose lines have been read
  // Written by peers, indexed by the writer.
  alignas(128) uint64_t acks[kDepth][kMaxRanks];  // `finished` there
  uint64_t gone[kMaxRanks];                       // last call that failed there: its whole generation has

  // Then kDepth windows: from each source its routing table, then a record of lines for each of its tokens.
};
static_assert(sizeof(Arena) <= kArenaHeaderBytes);

// What a call puts into a window.
struct LineCounts {
  int table;   // of one rank's routing table
  int record;  // of one token

  __host__ __device__ int64_t SourceBytes(int64_t num_tokens) const {
    return (table + num_tokens * record) * kLineBytes;
  }
};

constexpr __host__ __device__ int64_t DivideUp(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline LineCounts CountLines(bool has_table, int64_t num_tokens, int64_t num_topk, int64_t record_bytes) {
  return {has_table ? static_cast<int>(DivideUp(num_tokens * num_topk, kLineChoices)) : 0,
          static_cast<int>(DivideUp(record_bytes, kLinePayload))};
}

// How a kernel finds the arenas of one size. By value in its parameters: arenas never move and are never freed.
struct ArenaView {
  const GroupView* group;
  int rank, num_ranks;
  int depth;  // calls that may be in flight, each with a window of its own
  int64_t window_bytes;
  char* arena[kMaxRanks];
};

}  // namespace jax_ep
