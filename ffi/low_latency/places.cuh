// The routing of a low-latency dispatch: tables out, tables in, and every row's place, found by every block for itself.
// The receiving warps of a block call these together, up to Find, which is any warp's. Neighbour: dispatch/notify.cuh
// does it by counts.
#pragma once

#include "device/warp.cuh"
#include "low_latency/clocks.cuh"
#include "low_latency/lines.cuh"

namespace jax_ep {

constexpr int kReceiverThreads = 32 * kReceivers;
constexpr int kLineEntries = kLineBytes / 2;  // of a table's line in shared memory, kLineChoices of them choices

// x / by for x and by below 2^20, in three instructions.
struct Divider {
  float inverse = 1.f;

  Divider() = default;
  explicit Divider(int by) : inverse(1.f / static_cast<float>(by)) {}
  __device__ __forceinline__ int operator()(int x) const {
    return static_cast<int>((static_cast<float>(x) + 0.5f) * inverse);
  }
};

// Where the arrays of PlacesShared begin in shared memory, in bytes, and where the last one ends.
struct PlacesLayout {
  int64_t index, before, ranks, total, first, end;
};

struct DispatchWork {
  DispatchParams params;
  LowLatencyParams low_latency;
  LineCounts lines;
  Cut cut;
  // Where in a record the first row ends, then the gates; where the second row begins and ends.
  int row_end, gates_end, second_begin, second_end;
  int gate_alignment, second_alignment;  // of a token's gates in topk_weights, of a second row; at most 16
  bool all_aligned;                      // to 16 bytes, all of them
  int num_local;                         // experts of a rank
  int zero_pieces;                       // that a zero row is cut into
  int lines_a_part;                      // of all tables, by which a warp counts
  Divider by_local, by_part, by_alignment, by_pieces, by_tokens, by_sources;
  int num_sources;  // of lines with rows
  bool own_lines;   // own rows go through the own window: they are not at hand, or not as they will be
  PlacesLayout places;
  int encoded_offset, encoded_stride;  // of the two records that the senders encode, in shared memory

  __host__ __device__ bool has_table() const { return params.operation != kDispatchCached; }
  __host__ __device__ int64_t first_bytes() const { return params.num_row_arrays > 0 ? params.rows[0].row_bytes : 0; }
  __host__ __device__ int64_t second_bytes() const { return params.num_row_arrays > 1 ? params.rows[1].row_bytes : 0; }
};

// A block's shared memory. Layout "rank" has `ranks` and no `index`, and of `first` nothing is used.
struct PlacesShared {
  struct Words {
    unsigned int next_job;  // of this block; the first kReceivers are not counted
    uint32_t known;         // whether the places were found
    int32_t end;            // rows wanted here, padding included; "batched": their number
    int32_t none;
  };
  Words* words;
  int16_t* tables;  // [R, lines, kLineEntries]: all tables, line by line
  uint16_t* index;  // the same: choices of the part with the same expert before this one
  int32_t* before;  // [kReceivers, E], choices of an expert before those of a warp's part; layout "rank": [groups of 32
                    // tokens, R], rows on a rank before those of the group
  uint32_t* ranks;  // [groups of 32 tokens, 32]: ranks of a token, a bit each
  int32_t* total;   // [L]: rows wanted by each local expert
  int32_t* first;   // [E]: first row of the expert's group on its rank; of a known handle for the local ones

  __device__ __forceinline__ PlacesShared(const PlacesLayout& layout, char* shared)
      : words(reinterpret_cast<Words*>(shared)),
        tables(reinterpret_cast<int16_t*>(words + 1)),
        index(reinterpret_cast<uint16_t*>(shared + layout.index)),
        before(reinterpret_cast<int32_t*>(shared + layout.before)),
        ranks(reinterpret_cast<uint32_t*>(shared + layout.ranks)),
        total(reinterpret_cast<int32_t*>(shared + layout.total)),
        first(reinterpret_cast<int32_t*>(shared + layout.first)) {}
  __host__ __device__ static int NumGroups(const DispatchWork& work, int num_ranks) {
    return (num_ranks * work.params.num_tokens + 31) / 32;
  }
  static PlacesLayout LayoutOf(const DispatchWork& work, int num_ranks) {
    const DispatchParams& p = work.params;
    const bool has_table = work.has_table(), by_rank = p.layout == Layout::kRank;
    const int64_t entries = int64_t{num_ranks} * work.lines.table * kLineEntries;
    const int64_t num_groups = has_table && by_rank ? NumGroups(work, num_ranks) : 0;
    const int64_t num_parts = has_table && !by_rank ? kReceivers : 0;
    PlacesLayout layout;
    layout.index = sizeof(Words) + 2 * entries;
    layout.before = layout.index + (by_rank ? 0 : 2 * entries);
    layout.ranks = layout.before + 4 * (num_groups * num_ranks + num_parts * p.num_experts);
    layout.total = layout.ranks + 4 * 32 * num_groups;
    layout.first = layout.total + 4 * work.num_local;
    layout.end = layout.first + 4 * p.num_experts;
    return layout;
  }

  // The expert of a token's choice, or -1.
  __device__ __forceinline__ int Expert(const DispatchWork& work, int source, int choice) const {
    return tables[(source * work.lines.table + choice / kLineChoices) * kLineEntries + choice % kLineChoices];
  }
};

__device__ __forceinline__ void SyncReceivers() { asm volatile("bar.sync 1, %0;" ::"n"(kReceiverThreads) : "memory"); }

// The same, and true if it is true for any.
__device__ __forceinline__ bool SyncReceiversOr(bool value) {
  int any;
  asm volatile("{ .reg .pred p, q;\n  setp.ne.s32 p, %1, 0;\n  bar.red.or.pred q, 1, %2, p;\n  selp.s32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(static_cast<int>(value)), "n"(kReceiverThreads)
               : "memory");
  return any != 0;
}

__device__ __forceinline__ int ReceiverThread() { return threadIdx.x - 32 * kSenders; }
__device__ __forceinline__ int ReceiverWarp() { return threadIdx.x / 32 - kSenders; }

__device__ __forceinline__ int LoadExpert(const DispatchParams& p, int64_t choice) {
  const int expert = p.topk_idx[choice];
  return expert >= 0 && expert < p.num_experts ? expert : -1;
}

// This lane's 16 bytes of four lines of this rank's table, without their epoch; the loads are independent.
__device__ __forceinline__ uint4 LoadTableLines(const DispatchWork& work, int group) {
  const DispatchParams& p = work.params;
  const int begin = (group * kGroupLines + LineInGroup()) * kLineChoices + static_cast<int>(threadIdx.x % 8) * 8;
  const int end = min(p.num_tokens * p.num_topk, begin + (IsTail() ? 4 : 8));
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int low = begin + 2 * j < end ? LoadExpert(p, begin + 2 * j) : -1;
    const int high = begin + 2 * j + 1 < end ? LoadExpert(p, begin + 2 * j + 1) : -1;
    words[j] = static_cast<uint32_t>(high) << 16 | (static_cast<uint32_t>(low) & 0xffff);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Senders wait for the receivers of their block to have sent its part of the table. Blocks begin together, so rows
// mostly queue behind all tables: no row finds its place before the last table has come. Only where there are both.
__device__ __forceinline__ void TellTableSent() {
  asm volatile("bar.arrive 4, %0;" ::"n"(32 * (kSenders + kReceivers)) : "memory");
}
__device__ __forceinline__ void AwaitTableSent() {
  asm volatile("bar.sync 4, %0;" ::"n"(32 * (kSenders + kReceivers)) : "memory");
}

// Own table into shared memory and, each group of lines by one block, to every peer. `loaded` is the group of this
// warp's number. False: some window does not get free.
__device__ __forceinline__ bool SendTable(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places,
                                          uint4 loaded) {
  const int num_groups = static_cast<int>(DivideUp(work.lines.table, kGroupLines));
  const int64_t source_bytes = work.lines.SourceBytes(work.params.num_tokens);
  char* const own =
      reinterpret_cast<char*>(places.tables) + static_cast<int64_t>(call.rank) * work.lines.table * kLineBytes;
  bool ready = false;
#pragma unroll 1
  for (int group = ReceiverWarp(); group < num_groups; group += kReceivers) {
    const int line = group * kGroupLines + LineInGroup();
    const int place = line * kLineBytes + static_cast<int>(threadIdx.x % 8) * 16;
    uint4 bits[1] = {group < kReceivers ? loaded : LoadTableLines(work, group)};
    SetEpoch(call, bits);
#pragma unroll 1
    for (int n = 1; n < call.num_ranks; ++n) {
      if ((group * (call.num_ranks - 1) + n - 1) % gridDim.x != blockIdx.x) continue;
      const int peer = call.rank + n < call.num_ranks ? call.rank + n : call.rank + n - call.num_ranks;
      if (!call.Reaches(peer)) continue;
      if (!ready && !(ready = AwaitReuse(call))) return false;
      __syncwarp();  // the lanes of a line store together
      if (line < work.lines.table) StoreLine(call.Lines(peer, call.rank, source_bytes) + place, bits[0]);
    }
    if (line < work.lines.table) *reinterpret_cast<uint4*>(own + place) = bits[0];
  }
  return true;
}

// The peers' tables into shared memory. False: some rank's did not come.
__device__ __forceinline__ bool ReceiveTables(const DispatchWork& work, const ArenaCall& call,
                                              const PlacesShared& places) {
  const int num_peers = call.num_ranks - 1;
  const int num_pieces = static_cast<int>(DivideUp(work.lines.table, kMaxGroups * kGroupLines));
  const int64_t source_bytes = work.lines.SourceBytes(work.params.num_tokens);
#pragma unroll 1
  for (int i = ReceiverWarp(); i < num_pieces * num_peers; i += kReceivers) {
    const int source = (call.rank + call.num_ranks - 1 - i % num_peers) % call.num_ranks;
    const int first = i / num_peers * kMaxGroups * kGroupLines + LineInGroup();
    const int in_line = static_cast<int>(threadIdx.x % 8) * 16;
    const char* const from = call.Lines(call.rank, source, source_bytes) + in_line;
    char* const to =
        reinterpret_cast<char*>(places.tables) + static_cast<int64_t>(source) * work.lines.table * kLineBytes + in_line;
    const char* place[kMaxGroups];
    uint4 bits[kMaxGroups];
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      const int line = first + v * kGroupLines;
      place[v] = line < work.lines.table ? from + line * kLineBytes : nullptr;
    }
    if (!call.Reaches(source)) {  // its tokens have no choices
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) bits[v] = make_uint4(~0u, ~0u, ~0u, ~0u);
    } else if (!ReceiveLines(call, place, bits, [&](int) { return source; }, 0)) {
      return false;
    }
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      if (place[v] != nullptr) *reinterpret_cast<uint4*>(to + (first + v * kGroupLines) * kLineBytes) = bits[v];
    }
  }
  return true;
}

__device__ __forceinline__ int Aligned(const DispatchWork& work, int count) {
  const int alignment = work.params.expert_alignment;
  return work.by_alignment(count + alignment - 1) * alignment;
}

// First row of each of a rank's groups, from the counts of its experts; where the last one ends ("batched": their sum).
// By one warp, which takes each count once.
template <class TakeCount>
__device__ __forceinline__ int FindGroups(const DispatchWork& work, int32_t* first, const TakeCount& take_count) {
  constexpr int kScans = 4;  // beside each other: a scan is a chain of shuffles
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  const bool aligns = p.layout == Layout::kExpert && p.expert_alignment > 1;
  int end = 0;
#pragma unroll 1
  for (int base = lane; base - lane < work.num_local; base += 32 * kScans) {
    int size[kScans], upto[kScans];
#pragma unroll
    for (int v = 0; v < kScans; ++v) {
      const int expert = base + 32 * v;
      const int count = expert < work.num_local ? take_count(expert) : 0;
      upto[v] = size[v] = aligns ? Aligned(work, count) : count;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
      for (int v = 0; v < kScans; ++v) {
        const int other = __shfl_up_sync(~0u, upto[v], distance);
        if (lane >= distance) upto[v] += other;
      }
    }
#pragma unroll
    for (int v = 0; v < kScans; ++v) {
      const int expert = base + 32 * v;
      if (expert < work.num_local)
        first[expert] = p.layout == Layout::kBatched ? expert * p.expert_capacity : end + upto[v] - size[v];
      end += __shfl_sync(~0u, upto[v], 31);
    }
  }
  return end;
}

// ---- layouts "expert" and "batched": a row a choice. A warp counts a part of all lines, part w before part w + 1.

__device__ __forceinline__ void CountChoices(const DispatchWork& work, const ArenaCall& call,
                                             const PlacesShared& places) {
  const int lane = threadIdx.x % 32;
  int32_t* const counts = places.before + ReceiverWarp() * work.params.num_experts;
  const int num_lines = call.num_ranks * work.lines.table, begin = ReceiverWarp() * work.lines_a_part;
  const int end = min(num_lines, begin + work.lines_a_part);
#pragma unroll 1
  for (int line = begin; line < end; ++line) {
#pragma unroll
    for (int in_line = lane; in_line < kLineEntries; in_line += 32) {
      const int entry = line * kLineEntries + in_line, expert = in_line < kLineChoices ? places.tables[entry] : -1;
      const uint32_t same = __match_any_sync(~0u, expert);
      const int earlier = __popc(same & ((1u << lane) - 1));
      const int counted = expert >= 0 ? counts[expert] : 0;
      __syncwarp();
      if (expert >= 0 && earlier == 0) counts[expert] = counted + __popc(same);
      __syncwarp();
      places.index[entry] = static_cast<uint16_t>(counted + earlier);
    }
  }
}

// Counts of parts become counts before them, their sums the groups.
__device__ __forceinline__ void SumChoices(const DispatchWork& work, const ArenaCall& call,
                                           const PlacesShared& places) {
  constexpr int kAtOnce = 4;
  static_assert(kReceivers % kAtOnce == 0);
  const int num_experts = work.params.num_experts;
  const int num_parts = static_cast<int>(DivideUp(call.num_ranks * work.lines.table, work.lines_a_part));
#pragma unroll 1
  for (int rank = ReceiverWarp(); rank < call.num_ranks; rank += kReceivers) {
    const auto take_count = [&](int expert) {
      int sum = 0;
      int32_t* count = places.before + rank * work.num_local + expert;
#pragma unroll 1
      for (int part = 0; part < num_parts; part += kAtOnce, count += kAtOnce * num_experts) {
        int counts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) counts[i] = count[i * num_experts];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) count[i * num_experts] = sum, sum += counts[i];
      }
      if (rank == call.rank) places.total[expert] = sum;
      return sum;
    };
    const int end = FindGroups(work, places.first + rank * work.num_local, take_count);
    if (rank == call.rank && threadIdx.x % 32 == 0) places.words->end = end;
  }
}

// ---- layout "rank": a row a (token, rank). A warp counts groups of 32 tokens, of all ranks in order.

__device__ __forceinline__ void CountTokens(const DispatchWork& work, const ArenaCall& call,
                                            const PlacesShared& places) {
  constexpr int kAtOnce = 8;  // loads from the tables
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_groups = PlacesShared::NumGroups(work, call.num_ranks);
#pragma unroll 1
  for (int group = ReceiverWarp(); group < num_groups; group += kReceivers) {
    const int source = work.by_tokens(group * 32 + lane);
    const int token = group * 32 + lane - source * p.num_tokens;
    uint32_t ranks = 0;
#pragma unroll 1
    for (int first = 0; first < p.num_topk; first += kAtOnce) {
      int expert[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const bool is_choice = first + k < p.num_topk && source < call.num_ranks;
        expert[k] = is_choice ? places.Expert(work, source, token * p.num_topk + first + k) : -1;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (expert[k] < 0) continue;
        const int rank = work.by_local(expert[k]);
        ranks |= 1u << rank;
        if (rank == call.rank) atomicAdd(&places.total[expert[k] - rank * work.num_local], 1);
      }
    }
    places.ranks[group * 32 + lane] = ranks;
    int count = 0;
#pragma unroll 1
    for (int rank = 0; rank < call.num_ranks; ++rank) {
      const uint32_t members = __ballot_sync(~0u, ranks >> rank & 1);
      if (lane == rank) count = __popc(members);
    }
    if (num_groups == 1 && lane == call.rank) places.words->end = count;  // there is nothing to sum
    if (lane < call.num_ranks) places.before[group * call.num_ranks + lane] = num_groups == 1 ? 0 : count;
  }
}

__device__ __forceinline__ void SumTokens(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const int lane = threadIdx.x % 32, num_groups = PlacesShared::NumGroups(work, call.num_ranks);
#pragma unroll 1
  for (int rank = ReceiverWarp(); rank < call.num_ranks; rank += kReceivers) {
    int before = 0;
#pragma unroll 1
    for (int group = lane; group - lane < num_groups; group += 32) {
      int32_t* const count = places.before + group * call.num_ranks + rank;
      int sum;
      const int offset = WarpScan(group < num_groups ? *count : 0, &sum);
      if (group < num_groups) *count = before + offset;
      before += sum;
    }
    if (rank == call.rank && lane == 0) places.words->end = before;
  }
}

// ----

// What all places follow from, in shared memory. `loaded`: see SendTable. Ends with the receivers synchronised, and
// says the same to all of them. False: some rank's table did not come.
__device__ __forceinline__ bool FindPlaces(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places,
                                           uint4 loaded) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  const bool by_rank = p.layout == Layout::kRank;
  if (!work.has_table()) {
    if (ReceiverWarp() == 0) {
      const auto take_count = [&](int expert) { return places.total[expert] = p.counts[expert]; };
      int32_t* const first = places.first + call.rank * work.num_local;
      const int end = by_rank ? p.counts[work.num_local] : FindGroups(work, first, take_count);
      if (lane == 0) places.words->end = end;
    }
    SyncReceivers();
    return true;
  }
  bool came = SendTable(work, call, places, loaded);
  if (work.lines.record > 0) TellTableSent();
  Mark(Moment::kTableSent);
  if (by_rank) {
#pragma unroll 1
    for (int e = ReceiverThread(); e < work.num_local; e += kReceiverThreads) places.total[e] = 0;
  } else {
    int32_t* const counts = places.before + ReceiverWarp() * p.num_experts;
#pragma unroll 1
    for (int e = lane; e < p.num_experts; e += 32) counts[e] = 0;
  }
  came = came && ReceiveTables(work, call, places);
  if (SyncReceiversOr(!came)) return false;
  Mark(Moment::kTablesHere);
  if (by_rank) {
    CountTokens(work, call, places);
    if (PlacesShared::NumGroups(work, call.num_ranks) > 1) {
      SyncReceivers();
      SumTokens(work, call, places);
    }
  } else {
    CountChoices(work, call, places);
    SyncReceivers();
    SumChoices(work, call, places);
  }
  SyncReceivers();
  Mark(Moment::kPlacesKnown);
  return true;
}

// Where a token's choices go, one a lane.
struct Choice {
  int expert, rank;  // -1: none
  int row;           // there, -1: dropped. If not `everywhere`, only of choices that come here, else -1
};

// From what FindPlaces left, by one whole warp.
__device__ __forceinline__ Choice Find(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places,
                                       int source, int token, bool everywhere) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, choice = token * p.num_topk + lane;
  Choice found{-1, -1, -1};
  if (lane < p.num_topk) found.expert = places.Expert(work, source, choice);
  if (found.expert >= 0) found.rank = work.by_local(found.expert);
  if (p.layout == Layout::kRank) {
    const int index = source * p.num_tokens + token, group = index / 32;
    const uint32_t ranks = places.ranks[group * 32 + lane], earlier = (1u << (index % 32)) - 1;
    const int begin = everywhere ? 0 : call.rank, end = everywhere ? call.num_ranks : begin + 1;
#pragma unroll 1
    for (int rank = begin; rank < end; ++rank) {
      const uint32_t members = __ballot_sync(~0u, ranks >> rank & 1);
      const int row = places.before[group * call.num_ranks + rank] + __popc(members & earlier);
      if (found.rank == rank && row < p.max_recv_tokens) found.row = row;
    }
  } else if (found.expert >= 0 && (everywhere || found.rank == call.rank)) {
    const int line = source * work.lines.table + choice / kLineChoices;
    const int row = places.first[found.expert] + places.before[work.by_part(line) * p.num_experts + found.expert] +
                    places.index[line * kLineEntries + choice % kLineChoices];
    const int limit = p.layout == Layout::kBatched
                          ? (found.expert - found.rank * work.num_local + 1) * p.expert_capacity
                          : p.max_recv_tokens;
    if (row < limit) found.row = row;
  }
  return found;
}

}  // namespace jax_ep
