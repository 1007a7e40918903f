// How a worker of a combine adds rows: as one stream of pieces, over the ends of sums and items, so that loads never
// run dry. A piece is 16 bytes a lane, V times. Each lane copies its own part of the next pieces to shared memory while
// it adds one: registers would not do, since the compiler waits for all loads of a loop at a time.
//
// Neighbours: items.cuh says what is added, vector.cuh does the arithmetic.
#pragma once

#include <cstddef>

#include "combine/items.cuh"
#include "combine/vector.cuh"

namespace jax_ep {

constexpr int kStages = 5;     // pieces of a worker, all but one of them on their way
constexpr int kPlaces = 8;     // at least as many
constexpr int kMaxTerms = 64;  // a token's rows here, and a sum of every peer

// What follows when a piece of a row has been added.
enum Then : uint32_t {
  kRound = 1,     // the rows of this rank are added: their sum is rounded, and is the total so far
  kSetAside = 2,  // the same, but it is set aside, because lower ranks come before it
  kTakeBack = 4,  // what was set aside is added
  kStore = 8,     // the total is complete
  kConcludes = kRound | kSetAside | kTakeBack | kStore,
  kOfRank = 16,   // the row is a rank's sum: it has no weight
  kNothing = 32,  // no piece
};

// A row to be added, and its weight. Read and written as 16 bytes.
struct alignas(16) Term {
  const char* row;
  float weight;
  uint32_t then;
};

// Where an item's total goes: its first piece at byte `first` of `target`, its last at `last`.
struct alignas(16) Place {
  char* target;
  int first, last;
};

// A worker's part of shared memory.
template <int V>
struct SumShared {
  Term terms[kMaxTerms];  // of the item that is loaded
  struct Stage {
    int4 bits[V][32];
    uint2 due[32];  // weight and `then` of the piece, for each lane, so that lanes need not meet
  } stage[kStages];
  int4 aside[V][32];
  Place places[kPlaces];  // of the items that have begun and not ended
};

template <class T, bool kWeighted, int V>
struct SumPipe {
  using Shared = SumShared<V>;
  static constexpr int kPieceBytes = 512 * V, kSize = Vector<T>::kSize;
  static constexpr uint32_t kStage = offsetof(Shared, stage), kStageBytes = sizeof(typename Shared::Stage);

  const int lane, lane_offset;
  const uint32_t shared;  // address, as the compiler would work it out again and again
  float sum[V][kSize] = {};
  // Loading: pieces left of the item (none: 0 or less), its next term, where in the rows, and the stage to fill.
  int left = 0, offset = 0, last = 0;
  uint32_t next_term = 0, terms_end = 0, stage = 0;
  // Items begun and ended, pieces stored of the one that is added, what the piece added last asks for.
  uint32_t begun = 0, ended = 0, stored = 0, then = 0;

  __device__ __forceinline__ SumPipe(Shared& memory, int row_bytes)
      : lane(threadIdx.x % 32),
        lane_offset(min(lane * 16, row_bytes - 16)),
        shared(__shfl_sync(~0u, SharedAddress(&memory), 0)) {
    for (auto& filled : memory.stage) filled.due[lane].y = kNothing;
  }

  // Items that have begun and not ended.
  __device__ __forceinline__ uint32_t NumPending() const { return begun - ended; }

  // An item whose `count` > 0 terms stand in its place: bytes [begin, end) of the rows. A range that is no multiple of
  // pieces, or less than one, is covered by pieces that overlap, or overlap other items': both store the same sums.
  __device__ __forceinline__ void Begin(Shared& memory, int count, char* target, int begin, int end) {
    const int last_piece = max(end - kPieceBytes, 0), first_piece = min(begin, last_piece);
    if (lane == 0) memory.places[begun % kPlaces] = {target, first_piece, last_piece};
    __syncwarp();
    ++begun;
    left = count * ((end - begin + kPieceBytes - 1) / kPieceBytes);
    next_term = shared;
    terms_end = next_term + count * sizeof(Term);
    offset = first_piece + lane_offset;
    last = last_piece + lane_offset;
  }

  // Asks for the next piece and adds the oldest. False: Conclude or Begin must come before the next step. Where nothing
  // is left to ask for, some piece is loaded once more, for nothing: an item must have begun.
  __device__ __forceinline__ bool Step() {
    const int4 term = LoadShared16(next_term);
    const char* const row = Pointer(term) + offset;
    const uint32_t in = shared + stage;
#pragma unroll
    for (int v = 0; v < V; ++v) CopyAsync(in + lane * 16 + kStage + v * 512, row + v * 512);
    CommitCopies();
    StoreShared8(in + lane * 8 + kStage + kPieceBytes, make_uint2(term.z, left > 0 ? term.w : kNothing));
    --left;
    next_term += sizeof(Term);
    const bool wraps = next_term == terms_end;
    next_term = wraps ? shared : next_term;
    offset = wraps ? min(offset + kPieceBytes, last) : offset;
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;

    WaitCopies<kStages - 1>();
    const uint2 due = LoadShared8(shared + stage + lane * 8 + kStage + kPieceBytes);
    then = due.y;
    if (kWeighted && (then & (kOfRank | kNothing)) == 0) {
      Add<true>(__uint_as_float(due.x));
    } else if ((then & kNothing) == 0) {
      Add<false>(1.f);
    }
    return left > 0 && (then & kConcludes) == 0;
  }

  template <bool kWeigh>
  __device__ __forceinline__ void Add(float weight) {
    int4 bits[V];
#pragma unroll
    for (int v = 0; v < V; ++v) bits[v] = LoadShared16(shared + stage + lane * 16 + kStage + v * 512);
#pragma unroll
    for (int v = 0; v < V; ++v) Accumulate<T, kWeigh>(sum[v], bits[v], weight);
  }

  // Of a Term or a Place as 16 bytes.
  static __device__ __forceinline__ char* Pointer(const int4& bits) {
    return reinterpret_cast<char*>(static_cast<uint64_t>(static_cast<uint32_t>(bits.y)) << 32 |
                                   static_cast<uint32_t>(bits.x));
  }

  // Does what the piece added last asks for. True: its item has ended.
  __device__ __forceinline__ bool Conclude() {
    if ((then & kConcludes) == 0) return false;
    const uint32_t aside = shared + offsetof(Shared, aside) + lane * 16;
    if (then & (kRound | kSetAside)) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int4 rounded = Vector<T>::Pack(sum[v]);
        Clear(sum[v]);
        if (then & kSetAside) {
          StoreShared16(aside + v * 512, rounded);
        } else {
          Accumulate<T, false>(sum[v], rounded, 1.f);
        }
      }
    }
    if (then & kTakeBack) {
#pragma unroll
      for (int v = 0; v < V; ++v) Accumulate<T, false>(sum[v], LoadShared16(aside + v * 512), 1.f);
    }
    if ((then & kStore) == 0) return false;
    const int4 place = LoadShared16(shared + offsetof(Shared, places) + ended % kPlaces * sizeof(Place));
    const int at = min(place.z + static_cast<int>(stored) * kPieceBytes, place.w);
    char* const target = Pointer(place) + at + lane_offset;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      __stcg(reinterpret_cast<int4*>(target + v * 512), Vector<T>::Pack(sum[v]));
      Clear(sum[v]);
    }
    const bool is_last = at == place.w;
    stored = is_last ? 0 : stored + 1;
    ended += is_last;
    return is_last;
  }

  static __device__ __forceinline__ void Clear(float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = 0.f;
  }
};

}  // namespace jax_ep
