// What ranks share for the halves of high-throughput calls: an Arena of windows in which rows land as they are, pushed
// there by the copy engines. docs/protocol.md, "Halves of many tokens", explains each field. The only place that knows
// the layout, for host and device.
#pragma once

#include "group/arena.h"

namespace jax_ep {

constexpr int kMaxLandingChunks = 128;  // parts of a rank's tokens: what a block stages or lays out at once
constexpr int kMaxPieces = 8;           // parts of a push, each with a flag of its own; of whole chunks
constexpr int64_t kLeastPiece = 4 << 20;
constexpr int64_t kPartAlignment = 128;

struct Landing : Arena {
  // Own kernels only.
  unsigned int read;      // blocks of the running done kernel that have read its window
  uint64_t told[kDepth];  // by window: the call whose rows its own part holds. A push carries it behind the rows
  // Written by the peers' pushes, indexed by the writer.
  alignas(128) uint64_t arrived[kDepth][kMaxRanks][kMaxPieces];  // by window: the last call whose piece is here

  // Then as many windows of LandingLayout as calls may be in flight.
};

constexpr __host__ __device__ int64_t RoundUpTo(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

constexpr int64_t kLandingHeaderBytes = RoundUpTo(sizeof(Landing), 4096);

// Calls in flight through windows of this size. Two micro-batches have one each; four where memory is no matter.
constexpr int LandingDepth(int64_t window_bytes) { return window_bytes <= 64 << 20 ? kDepth : 2; }

// A window is made of parts, each the image of one rank's operands: rows [T, row_bytes], second rows [T, second_bytes],
// gates f32[T, K]. Parts 0 to R - 1 are what each rank has pushed here, and this rank's own. A combine has R - 1 more,
// what this rank pushes to each peer; of a dispatch that is its own part.
struct LandingLayout {
  int num_ranks, num_tokens, num_topk, num_parts;
  int chunk_tokens, num_chunks;
  int piece_chunks, num_pieces;
  int64_t row_bytes, second_bytes, gate_bytes;  // of a token
  int64_t second_offset, gates_offset, part_bytes;

  __host__ __device__ int64_t window_bytes() const { return num_parts * part_bytes; }
  __host__ __device__ int ChunkBegin(int chunk) const {
    const int begin = chunk * chunk_tokens;
    return begin < num_tokens ? begin : num_tokens;
  }
  __host__ __device__ int PieceOf(int chunk) const { return chunk / piece_chunks; }
  // The part of its own window that `rank` pushes to `peer`; its own where the peer is itself.
  __host__ __device__ int OutPart(int rank, int peer) const {
    if (peer == rank || num_parts == num_ranks) return rank;
    return num_ranks + (peer < rank ? peer : peer - 1);
  }
};

inline LandingLayout MakeLandingLayout(int num_ranks, int num_tokens, int num_topk, int64_t row_bytes,
                                       int64_t second_bytes, bool has_gates, bool sums) {
  LandingLayout layout{};
  layout.num_ranks = num_ranks, layout.num_tokens = num_tokens, layout.num_topk = num_topk;
  layout.num_parts = sums ? 2 * num_ranks - 1 : num_ranks;
  // So that a chunk's second rows and gates begin at multiples of 16 bytes.
  const int64_t granularity = second_bytes % 4 == 0 ? 4 : 16;
  layout.chunk_tokens = static_cast<int>(RoundUpTo(DivideUp(num_tokens, kMaxLandingChunks), granularity));
  layout.num_chunks = static_cast<int>(DivideUp(num_tokens, layout.chunk_tokens));
  layout.row_bytes = row_bytes, layout.second_bytes = second_bytes, layout.gate_bytes = has_gates ? 4ll * num_topk : 0;
  layout.second_offset = RoundUpTo(num_tokens * row_bytes, kPartAlignment);
  layout.gates_offset = layout.second_offset + RoundUpTo(num_tokens * second_bytes, kPartAlignment);
  layout.part_bytes = layout.gates_offset + RoundUpTo(num_tokens * layout.gate_bytes, kPartAlignment);
  // A piece costs the host and the engine two copies to each peer.
  const int64_t most = num_ranks > 1 ? DivideUp(kMaxPieces, num_ranks - 1) : 1;
  const int64_t wanted = num_tokens * row_bytes / kLeastPiece;
  const int64_t pieces = wanted < 1 ? 1 : wanted < most ? wanted : most;
  layout.piece_chunks = static_cast<int>(DivideUp(layout.num_chunks, pieces));
  layout.num_pieces = static_cast<int>(DivideUp(layout.num_chunks, layout.piece_chunks));
  return layout;
}

}  // namespace jax_ep
