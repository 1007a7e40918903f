// What ranks share for the halves of high-throughput calls: an Arena of windows in which rows land as they are, and
// what a rank stages for its peers before it pushes. docs/protocol.md, "Halves of many tokens", explains each field.
// The only place that knows the layout, for host and device.
#pragma once

#include "group/arena.h"

namespace jax_ep {

constexpr int kLandingDepth = 2;        // calls in flight: two micro-batches, each of which has one at a time
constexpr int kMaxLandingChunks = 128;  // parts of a rank's tokens, each with flags of its own
constexpr int64_t kPartAlignment = 128;

// What the stage kernel of a start tells its push kernel.
struct Order {
  uint64_t number;  // of the start, see Fork; stored last
  uint64_t epoch;
  uint64_t goes;  // 0: there is nothing to push, the call has failed or its rank is masked
  uint64_t dead;  // AnyCall::dead, which may be another when the push kernel begins
};

struct Landing : Arena {
  // Own kernels only.
  unsigned int read;                                  // blocks of the running done kernel that have read its window
  Order orders[kLandingDepth];                        // by number of the start
  uint64_t staged[kLandingDepth][kMaxLandingChunks];  // by window: the last call whose chunk is ready to be pushed
  // Written by peers, indexed by the writer.
  alignas(128)
      uint64_t arrived[kLandingDepth][kMaxRanks][kMaxLandingChunks];  // by window: the last call whose chunk is here

  // Then kLandingDepth windows of LandingLayout.
};
static_assert(kLandingDepth <= kDepth);

constexpr __host__ __device__ int64_t RoundUpTo(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

constexpr int64_t kLandingHeaderBytes = RoundUpTo(sizeof(Landing), 4096);

// A window is made of parts, each the image of one rank's operands: rows [T, row_bytes], second rows [T, second_bytes],
// gates f32[T, K]. Parts 0 to R - 1 are what each rank has pushed here, and this rank's own. A combine has R - 1 more,
// what this rank pushes to each peer; of a dispatch that is its own part. Then the ranks that get each token, u32[T].
struct LandingLayout {
  int num_tokens, num_topk, num_parts;
  int chunk_tokens, num_chunks;
  int64_t row_bytes, second_bytes, gate_bytes;  // of a token
  int64_t second_offset, gates_offset, part_bytes;

  __host__ __device__ int64_t targets_offset() const { return num_parts * part_bytes; }
  __host__ __device__ int64_t window_bytes() const { return targets_offset() + RoundUpTo(4ll * num_tokens, 128); }
  __host__ __device__ int ChunkBegin(int chunk) const {
    const int begin = chunk * chunk_tokens;
    return begin < num_tokens ? begin : num_tokens;
  }
};

inline LandingLayout MakeLandingLayout(int num_ranks, int num_tokens, int num_topk, int64_t row_bytes,
                                       int64_t second_bytes, bool has_gates, bool sums) {
  LandingLayout layout{};
  layout.num_tokens = num_tokens, layout.num_topk = num_topk;
  layout.num_parts = sums ? 2 * num_ranks - 1 : num_ranks;
  // So that a chunk's second rows and gates begin at multiples of 16 bytes.
  const int64_t granularity = second_bytes % 4 == 0 ? 4 : 16;
  layout.chunk_tokens = static_cast<int>(RoundUpTo(DivideUp(num_tokens, kMaxLandingChunks), granularity));
  layout.num_chunks = static_cast<int>(DivideUp(num_tokens, layout.chunk_tokens));
  layout.row_bytes = row_bytes, layout.second_bytes = second_bytes, layout.gate_bytes = has_gates ? 4ll * num_topk : 0;
  layout.second_offset = RoundUpTo(num_tokens * row_bytes, kPartAlignment);
  layout.gates_offset = layout.second_offset + RoundUpTo(num_tokens * second_bytes, kPartAlignment);
  layout.part_bytes = layout.gates_offset + RoundUpTo(num_tokens * layout.gate_bytes, kPartAlignment);
  return layout;
}

}  // namespace jax_ep
