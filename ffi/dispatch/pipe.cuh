// Rows through shared memory, piece by piece: bulk loads in, bulk stores out. Neighbours: send.cuh stores a row into
// several ranks, copy.cuh and pull.cuh a row to several places here.
#pragma once

#include "dispatch/plan.cuh"

namespace jax_ep {

// Loads one piece, which begins at `first`, into a stage; the first of a row with the row of the second array at
// `second`. Called by one lane.
__device__ __forceinline__ void LoadPiece(const Pieces& pieces, const char* first, const char* second, int piece,
                                          char* stage, uint64_t* full) {
  const int size = pieces.Size(piece), second_size = piece == 0 ? pieces.second_bytes : 0;
  ExpectBytes(full, size + second_size);
  BulkLoad(stage, first, size, full);
  if (second_size > 0) BulkLoad(stage + pieces.bytes, second, second_size, full);
}

// Stores one piece of a row whose places begin at `first` and `second`.
__device__ __forceinline__ void StorePiece(const Pieces& pieces, char* first, char* second, int piece,
                                           const char* stage) {
  BulkStore(first + static_cast<int64_t>(piece) * pieces.bytes, stage, pieces.Size(piece));
  if (piece == 0 && pieces.second_bytes > 0) BulkStore(second, stage + pieces.bytes, pieces.second_bytes);
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

// A warp's stages: jobs go in at one end (a load), come out at the other (stores to the rows that the lanes hold).
struct CopyPipe {
  const DispatchPlan& plan;
  DispatchShared& shared;
  char* stage;
  int warp, in = 0, out = 0, in_flight = 0;
  uint32_t parity = 0;

  // `warp`: which of the warps that share `stages`.
  __device__ CopyPipe(const DispatchPlan& plan, DispatchShared& shared, char* stages, int warp)
      : plan(plan), shared(shared), stage(stages + warp * plan.copy.stages * plan.copy.stride), warp(warp) {}

  // Stores what was loaded longest ago.
  __device__ __forceinline__ void Drain() {
    const Pieces& pieces = plan.copy;
    const RowArray &rows = plan.params.rows[0], &second = plan.params.rows[1];
    const int64_t row = shared.copy_row[warp][out][threadIdx.x % 32];
    const int piece = shared.copy_piece[warp][out];
    WaitMbarrier(&shared.copy_full[warp][out], parity);
    if (row >= 0) {
      StorePiece(pieces, rows.recv + row * rows.row_bytes, second.recv + row * pieces.second_bytes, piece,
                 stage + out * pieces.stride);
    }
    CommitBulkGroup();
    if (++out == pieces.stages) out = 0, parity ^= 1;
    --in_flight;
  }

  // Copies row `from` of arrays `first` and `second` to the rows that the lanes name (-1: none). Called by the whole
  // warp.
  __device__ __forceinline__ void Copy(const char* first, const char* second, int64_t from, int row) {
    const Pieces& pieces = plan.copy;
    const int lane = threadIdx.x % 32;
    for (int piece = 0; piece < pieces.per_row; ++piece) {
      if (in_flight == pieces.stages - 1) Drain();
      WaitBulkRead<1>();  // the stage filled now was stored from before the newest group
      shared.copy_row[warp][in][lane] = row;
      if (lane == 0) shared.copy_piece[warp][in] = piece;
      __syncwarp();
      if (lane == 0) {
        LoadPiece(pieces, first + from * plan.params.rows[0].row_bytes + int64_t{piece} * pieces.bytes,
                  second + from * pieces.second_bytes, piece, stage + in * pieces.stride, &shared.copy_full[warp][in]);
      }
      if (++in == pieces.stages) in = 0;
      ++in_flight;
    }
    if (plan.params.num_row_arrays > 1 && pieces.second_bytes == 0) {
      const RowArray& small = plan.params.rows[1];
      for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1) {
        const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
        CopySmallRow(small.recv + target * small.row_bytes, second + from * small.row_bytes, small.row_bytes);
      }
    }
  }

  __device__ __forceinline__ void Finish() {
    while (in_flight > 0) Drain();
    WaitBulkRead<0>();
  }
};

// The rows of one token here that the lanes' choices name, each row in one lane only.
__device__ __forceinline__ int DistinctRow(const DispatchPlan& plan, int row) {
  if (plan.params.layout != Layout::kRank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << (threadIdx.x % 32)) - 1)) == 0 ? row : -1;
}

}  // namespace jax_ep
