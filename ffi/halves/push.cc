// Copies, not a kernel: whatever the multiprocessors do meanwhile they do alone, and nothing here waits for one of
// them. The engines know no routing, so all tokens go to every peer; that is what most peers get of most tokens anyway.
//
//   waits for   the stage, by an event
//   signals     arrived[me][piece] at each peer: the copies of a stream are made one after the other, so the word that
//               follows a piece is there when the piece is. AwaitArrived acquires it
#include "halves/push.h"

#include <algorithm>

namespace jax_ep {
namespace {

Landing* LandingOf(const HalfParams& half, int rank) { return reinterpret_cast<Landing*>(half.arenas.arena[rank]); }

char* PartOf(const HalfParams& half, const LandingLayout& layout, int slot, int owner, int part) {
  return half.arenas.arena[owner] + kLandingHeaderBytes + slot * half.arenas.window_bytes + part * layout.part_bytes;
}

}  // namespace

cudaError_t Push(const HalfParams& half, const LandingLayout& layout, const Fork& fork, cudaStream_t stream) {
  if (fork.peers == 0) return cudaSuccess;
  if (cudaError_t error = cudaEventRecord(fork.staged, stream); error != cudaSuccess) return error;
  if (cudaError_t error = cudaStreamWaitEvent(fork.stream, fork.staged, 0); error != cudaSuccess) return error;
  const int rank = half.arenas.rank, num_ranks = half.arenas.num_ranks;
  cudaError_t error = cudaSuccess;
  const auto copy = [&](void* to, const void* from, int64_t bytes) {
    if (error == cudaSuccess && bytes > 0) error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, fork.stream);
  };
  for (int piece = 0; piece < layout.num_pieces; ++piece) {
    const int64_t begin = layout.ChunkBegin(piece * layout.piece_chunks) * layout.row_bytes,
                  end = layout.ChunkBegin((piece + 1) * layout.piece_chunks) * layout.row_bytes;
    for (int n = 1; n < num_ranks; ++n) {
      const int peer = (rank + n) % num_ranks;  // every rank begins with another
      if ((fork.peers >> peer & 1) == 0) continue;
      const char* const from = PartOf(half, layout, fork.slot, rank, layout.OutPart(rank, peer));
      char* const to = PartOf(half, layout, fork.slot, peer, rank);
      copy(to + begin, from + begin, end - begin);
      if (piece == 0) {  // second rows and gates
        const int64_t rest = layout.second_offset;
        copy(to + rest, from + rest, layout.part_bytes - rest);
      }
      copy(&LandingOf(half, peer)->arrived[fork.slot][rank][piece], &LandingOf(half, rank)->told[fork.slot],
           sizeof(uint64_t));
    }
  }
  // Also behind what was queued before a copy that could not be: the next stage waits for it.
  const cudaError_t recorded = cudaEventRecord(fork.pushed, fork.stream);
  return error != cudaSuccess ? error : recorded;
}

}  // namespace jax_ep
