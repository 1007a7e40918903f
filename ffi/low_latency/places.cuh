// The routing of a low-latency dispatch: tables out, tables in, and every row's place, found by every block for itself.
// The receiving warps of a block call these together. Neighbour: dispatch/notify.cuh does it by counts.
#pragma once

#include "device/warp.cuh"
#include "low_latency/lines.cuh"

namespace jax_ep {

constexpr int kReceiverThreads = 32 * kReceivers;

struct DispatchWork {
  DispatchParams params;
  LowLatencyParams low_latency;
  LineCounts lines;
  Cut cut;
  int gate_bytes;   // of a record: behind the first row, a multiple of 16; the second row comes last
  int zero_pieces;  // that a zero row is cut into
  bool own_lines;   // own rows go through the own window: they are not at hand, or not as they will be
  int encoded_offset, encoded_stride;  // of the two rows that the senders encode, in shared memory

  __host__ __device__ bool has_table() const { return params.operation != kDispatchCached; }
  __host__ __device__ int64_t first_bytes() const { return params.num_row_arrays > 0 ? params.rows[0].row_bytes : 0; }
  __host__ __device__ int64_t second_bytes() const { return params.num_row_arrays > 1 ? params.rows[1].row_bytes : 0; }
  // Of layout "rank" the places are per rank: bins behind those of the experts.
  __host__ __device__ int num_bins(int num_ranks) const {
    return params.num_experts + (params.layout == Layout::kRank ? num_ranks : 0);
  }
};

// A block's shared memory, all of it s32.
struct PlacesShared {
  int32_t* zero_first;   // [L + 1]: zero rows of the result begin here ...
  int32_t* zero_before;  // [L + 2]: ... and so many are in the ranges before
  int32_t* here;         // [R, T, K]: expert of each choice, then its row on this rank or -1
  int32_t* hist;         // [kReceivers][num_bins]: of a warp's choices, then those before them
  int32_t* total;        // [num_bins]
  int32_t* first;        // [E]: first row of the expert's group, then [R] ends
  int32_t* token_row;    // [kReceivers][32][R]: layout "rank"

  __host__ __device__ PlacesShared(const DispatchWork& work, int32_t* shared, int num_ranks) {
    const DispatchParams& p = work.params;
    const int num_bins = work.num_bins(num_ranks);
    zero_first = shared;
    zero_before = zero_first + p.num_experts / num_ranks + 1;
    here = zero_before + p.num_experts / num_ranks + 2;
    hist = here + static_cast<int64_t>(num_ranks) * p.num_tokens * p.num_topk;
    total = hist + kReceivers * num_bins;
    first = total + num_bins;
    token_row = first + p.num_experts + num_ranks;
  }
  __host__ static int64_t Bytes(const DispatchWork& work, int num_ranks) {
    const PlacesShared places(work, nullptr, num_ranks);
    const int32_t* const end =
        !work.has_table() ? places.here
                          : places.token_row + (work.params.layout == Layout::kRank ? kReceivers * 32 * num_ranks : 0);
    return reinterpret_cast<int64_t>(end);
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

// This rank's table to every peer, its lines shared out over the grid. False: some window does not get free.
__device__ inline bool SendTable(const DispatchWork& work, const ArenaCall& call) {
  const DispatchParams& p = work.params;
  const int num_peers = call.num_ranks - 1, num_groups = static_cast<int>(DivideUp(work.lines.table, kGroupLines));
  const int num_choices = p.num_tokens * p.num_topk;
  bool ready = false;
  for (int i = blockIdx.x + gridDim.x * ReceiverWarp(); i < num_groups * num_peers; i += gridDim.x * kReceivers) {
    const int line = i / num_peers * kGroupLines + LineInGroup(),
              peer = (call.rank + 1 + i % num_peers) % call.num_ranks;
    if (!call.Reaches(peer)) continue;
    const int begin = line * kLineChoices + static_cast<int>(threadIdx.x % 8) * 8;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool in_line = !(IsTail() && j >= 2);
      const int low = in_line && begin + 2 * j < num_choices ? LoadExpert(p, begin + 2 * j) : -1;
      const int high = in_line && begin + 2 * j + 1 < num_choices ? LoadExpert(p, begin + 2 * j + 1) : -1;
      words[j] = static_cast<uint32_t>(high) << 16 | (static_cast<uint32_t>(low) & 0xffff);
    }
    uint4 bits[1] = {make_uint4(words[0], words[1], words[2], words[3])};
    SetEpoch(call, bits);
    if (!ready && !(ready = AwaitReuse(call))) return false;
    char* const table = call.Lines(peer, call.rank, work.lines.SourceBytes(p.num_tokens));
    if (line < work.lines.table) StoreLine(table + line * kLineBytes + threadIdx.x % 8 * 16, bits[0]);
  }
  return true;
}

// Everybody's tables into `here`. False: some rank's did not come.
__device__ inline bool ReceiveTables(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int num_choices = p.num_tokens * p.num_topk, num_peers = call.num_ranks - 1;
  for (int i = ReceiverThread(); i < num_choices; i += kReceiverThreads) {
    places.here[static_cast<int64_t>(call.rank) * num_choices + i] = LoadExpert(p, i);
  }
  for (uint32_t rest = call.dead; rest != 0; rest &= rest - 1) {
    int32_t* const experts = places.here + static_cast<int64_t>(__ffs(rest) - 1) * num_choices;
    for (int i = ReceiverThread(); i < num_choices; i += kReceiverThreads) experts[i] = -1;
  }
  const int num_pieces = static_cast<int>(DivideUp(work.lines.table, kMaxGroups * kGroupLines));
  for (int i = ReceiverWarp(); i < num_pieces * num_peers; i += kReceivers) {
    const int source = (call.rank + call.num_ranks - 1 - i % num_peers) % call.num_ranks;
    if (!call.Reaches(source)) continue;
    const int first = i / num_peers * kMaxGroups * kGroupLines + LineInGroup();
    const char* const table = call.Lines(call.rank, source, work.lines.SourceBytes(p.num_tokens));
    const char* place[kMaxGroups];
    uint4 bits[kMaxGroups];
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      const int line = first + v * kGroupLines;
      place[v] = line < work.lines.table ? table + line * kLineBytes + threadIdx.x % 8 * 16 : nullptr;
    }
    if (!ReceiveLines(call, place, bits, [&](int) { return source; }, 0)) return false;
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      if (place[v] == nullptr) continue;
      const int begin = (first + v * kGroupLines) * kLineChoices + static_cast<int>(threadIdx.x % 8) * 8;
      const uint32_t words[4] = {bits[v].x, bits[v].y, bits[v].z, bits[v].w};
      int32_t* const experts = places.here + static_cast<int64_t>(source) * num_choices + begin;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if ((IsTail() && j >= 4) || begin + j >= num_choices) continue;
        experts[j] = static_cast<int16_t>(words[j / 2] >> (j % 2 * 16));
      }
    }
  }
  return true;
}

// Choices of each warp's part of all choices, in order: part w comes before part w + 1.
struct Part {
  int begin, end;

  __device__ Part(int count) {
    const int warp = ReceiverWarp();
    begin = static_cast<int>(static_cast<int64_t>(count) * warp / kReceivers);
    end = static_cast<int>(static_cast<int64_t>(count) * (warp + 1) / kReceivers);
  }
};

__device__ inline void CountChoices(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_bins = work.num_bins(call.num_ranks),
            num_local = p.num_experts / call.num_ranks;
  int32_t* const hist = places.hist + ReceiverWarp() * num_bins;
  for (int bin = lane; bin < num_bins; bin += 32) hist[bin] = 0;
  __syncwarp();
  if (p.layout != Layout::kRank) {
    const Part part(call.num_ranks * p.num_tokens * p.num_topk);
    for (int i = part.begin + lane; i < part.end; i += 32) {
      if (places.here[i] >= 0) atomicAdd(&hist[places.here[i]], 1);
    }
  } else {
    const Part part(call.num_ranks * p.num_tokens);
    for (int token = part.begin + lane; token < part.end; token += 32) {
      uint32_t ranks = 0;
      for (int k = 0; k < p.num_topk; ++k) {
        const int expert = places.here[token * p.num_topk + k];
        if (expert < 0) continue;
        atomicAdd(&hist[expert], 1);
        ranks |= 1u << (expert / num_local);
      }
      for (; ranks != 0; ranks &= ranks - 1) atomicAdd(&hist[p.num_experts + __ffs(ranks) - 1], 1);
    }
  }
}

// Totals, and in `hist` how many come before each warp's part.
__device__ inline void SumParts(const DispatchWork& work, int num_bins, const PlacesShared& places) {
  for (int bin = ReceiverThread(); bin < num_bins; bin += kReceiverThreads) {
    int sum = 0;
    for (int warp = 0; warp < kReceivers; ++warp) {
      int32_t* const count = &places.hist[warp * num_bins + bin];
      const int before = sum;
      sum += *count;
      *count = before;
    }
    places.total[bin] = sum;
  }
}

// First row of each expert's group on its rank, and after them the ends of the ranks' groups ("batched": their sums).
__device__ inline void FindGroups(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_local = p.num_experts / call.num_ranks;
  const int alignment = p.layout == Layout::kExpert ? p.expert_alignment : 1;
  for (int rank = ReceiverWarp(); rank < call.num_ranks; rank += kReceivers) {
    int end = 0;
    for (int e = lane; e - lane < num_local; e += 32) {
      const int expert = rank * num_local + e, count = e < num_local ? places.total[expert] : 0;
      int sum;
      const int offset = WarpScan((count + alignment - 1) / alignment * alignment, &sum);
      if (e < num_local) places.first[expert] = p.layout == Layout::kBatched ? e * p.expert_capacity : end + offset;
      end += sum;
    }
    if (lane == 0) places.first[p.num_experts + rank] = end;
  }
}

// Where the rows without a token are, from the counts of the local experts and the rows wanted here. By one warp.
__device__ inline void FindZeroRows(const DispatchWork& work, const int32_t* counts, int num_local, int rows_wanted,
                                    const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, capacity = p.max_recv_tokens;
  int end = 0, before = 0;
  for (int e = lane; e - lane <= num_local; e += 32) {
    int begin = 0, length = 0;
    if (p.layout == Layout::kExpert) {
      const int count = e < num_local ? counts[e] : 0;
      const int aligned = (count + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
      int sum;
      const int start = end + WarpScan(aligned, &sum);
      end += sum;
      begin = min(start + count, capacity);
      length = e > num_local ? 0 : (e < num_local ? min(start + aligned, capacity) : capacity) - begin;
    } else if (p.layout == Layout::kBatched) {
      const int count = e < num_local ? min(counts[e], p.expert_capacity) : 0;
      begin = e * p.expert_capacity + count;
      length = e < num_local ? p.expert_capacity - count : 0;
    } else if (e == 0) {
      begin = min(rows_wanted, capacity);
      length = capacity - begin;
    }
    int sum;
    const int offset = before + WarpScan(length, &sum);
    before += sum;
    if (e <= num_local) places.zero_first[e] = begin, places.zero_before[e] = offset;
  }
  if (lane == 0) places.zero_before[num_local + 1] = before;
}

// Layouts "expert" and "batched": experts become rows, which this block's share of writes into the results.
__device__ inline void PlaceChoices(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_local = p.num_experts / call.num_ranks, mine = p.num_tokens * p.num_topk;
  const Part part(call.num_ranks * mine);
  int32_t* const next = places.hist + ReceiverWarp() * p.num_experts;
  unsigned int turn = ReceiverWarp();
  for (int base = part.begin; base < part.end; base += 32, turn += kReceivers) {
    const int i = base + lane;
    const int expert = i < part.end ? places.here[i] : -1;
    const uint32_t same = __match_any_sync(~0u, expert);
    const int position = __popc(same & ((1u << lane) - 1));
    int row = expert >= 0 ? places.first[expert] + next[expert] + position : -1;
    __syncwarp();
    if (expert >= 0 && position == 0) next[expert] += __popc(same);
    __syncwarp();
    const int rank = expert >= 0 ? expert / num_local : -1;
    const int limit = p.layout == Layout::kBatched ? (expert % num_local + 1) * p.expert_capacity : p.max_recv_tokens;
    if (row >= limit || (rank >= 0 && call.IsDead(rank))) row = -1;
    if (i >= part.end) continue;
    const int here = rank == call.rank ? row : -1;
    places.here[i] = here;
    if (turn % gridDim.x != blockIdx.x) continue;
    p.recv_slot[i] = here;
    const int no_row = rank >= 0 && call.IsDead(rank) ? kLost - rank : -1;
    if (i / mine == call.rank) p.slot[i % mine] = row >= 0 ? rank * p.max_recv_tokens + row : no_row;
  }
}

// Layout "rank": one row a (token, rank), named by all its choices there, with whose experts it is filed.
__device__ inline void PlaceTokens(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_local = p.num_experts / call.num_ranks, num_topk = p.num_topk;
  const Part part(call.num_ranks * p.num_tokens);
  int32_t* const next = places.hist + ReceiverWarp() * work.num_bins(call.num_ranks) + p.num_experts;
  int32_t* const token_row = places.token_row + ReceiverWarp() * 32 * call.num_ranks;
  unsigned int turn = ReceiverWarp();
  for (int base = part.begin; base < part.end; base += 32, turn += kReceivers) {
    const int token = base + lane;
    uint32_t ranks = 0;
    for (int k = 0; k < num_topk && token < part.end; ++k) {
      const int expert = places.here[token * num_topk + k];
      if (expert >= 0) ranks |= 1u << (expert / num_local);
    }
    for (int rank = 0; rank < call.num_ranks; ++rank) {
      const uint32_t members = __ballot_sync(~0u, ranks >> rank & 1);
      const int row = next[rank] + __popc(members & ((1u << lane) - 1));
      const bool holds = (ranks >> rank & 1) != 0 && row < p.max_recv_tokens && !call.IsDead(rank);
      token_row[lane * call.num_ranks + rank] = holds ? row : -1;
      __syncwarp();
      if (lane == 0) next[rank] += __popc(members);
      __syncwarp();
    }
    const bool writes = turn % gridDim.x == blockIdx.x;
    const int end = min(base + 32, part.end) * num_topk, mine = p.num_tokens * num_topk;
    for (int i = base * num_topk + lane; i < end; i += 32) {
      const int expert = places.here[i], rank = expert >= 0 ? expert / num_local : -1;
      const int32_t* const rows = token_row + (i / num_topk - base) * call.num_ranks;
      const int row = rank >= 0 ? rows[rank] : -1, row_here = rows[call.rank];
      const int here = rank == call.rank ? row : -1;
      places.here[i] = here;
      if (!writes) continue;
      p.recv_slot[i] = here;
      const int no_row = rank >= 0 && call.IsDead(rank) ? kLost - rank : -1;
      if (i / mine == call.rank) p.slot[i % mine] = row >= 0 ? rank * p.max_recv_tokens + row : no_row;
      if (row_here >= 0)
        p.recv_topk_idx[static_cast<int64_t>(row_here) * num_topk + i % num_topk] =
            rank == call.rank ? expert % num_local : -1;
    }
    __syncwarp();
  }
}

// All places, from everybody's tables: `here` and the zero ranges in shared memory, and this block's share of slot,
// recv_slot, counts and recv_topk_idx. Ends with the receivers synchronised. False: some rank's table did not come.
__device__ inline bool FindPlaces(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int num_bins = work.num_bins(call.num_ranks), num_local = p.num_experts / call.num_ranks;
  const bool came = ReceiveTables(work, call, places);
  if (SyncReceiversOr(!came)) return false;
  CountChoices(work, call, places);
  SyncReceivers();
  SumParts(work, num_bins, places);
  SyncReceivers();
  FindGroups(work, call, places);
  const int32_t* const counts = places.total + call.rank * num_local;
  const int rows_wanted = p.layout == Layout::kRank ? places.total[p.num_experts + call.rank] : 0;
  if (ReceiverWarp() == kReceivers - 1) FindZeroRows(work, counts, num_local, rows_wanted, places);
  SyncReceivers();
  if (blockIdx.x == 0) {
    for (int e = ReceiverThread(); e < num_local; e += kReceiverThreads) p.counts[e] = counts[e];
    if (ReceiverThread() == 0) {
      p.counts[num_local] = p.layout == Layout::kRank ? rows_wanted : places.first[p.num_experts + call.rank];
    }
  }
  if (p.layout == Layout::kRank) {
    PlaceTokens(work, call, places);
  } else {
    PlaceChoices(work, call, places);
  }
  SyncReceivers();
  return true;
}

}  // namespace jax_ep
