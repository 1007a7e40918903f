// The low-latency combine kernels and their launcher: see low_latency.h for the contract, docs/protocol.md for the
// order of events.
//
//   warps    role       waits for              signals
//   0 - 6    sender     the window's reuse     lines of this rank's sums of a peer's token, and of what it carries back
//   7 - 14   receiver   lines                  (own rows it sums itself, unless the call is halved)
//   15       keeper                            windows read before, to the peers; epoch
//
// Sums in LogFMT-10 have kernels of their own, in which a rank's own sums go through its window as well.
#include <algorithm>
#include <type_traits>

#include "combine/clear.cuh"
#include "combine/vector.cuh"
#include "device/load.h"
#include "low_latency/logfmt_lines.cuh"

namespace jax_ep {
namespace {

constexpr int kPeersAtOnce = 4;

struct CombineWork {
  CombineParams params;
  LowLatencyParams low_latency;
  LineCounts lines;
  Cut cut;
  int hidden, logfmt_steps;  // of a row in LogFMT-10
};

// The rows of y that lanes name (-1: none), added in lane order: this lane's units of `count` groups from `first_line`,
// rounded to y's dtype.
template <class T, bool kWeighted, int N>
__device__ __forceinline__ void SumRows(const CombineWork& work, int row, int first_line, int count, uint4 (&bits)[N]) {
  const CombineParams& p = work.params;
  const int64_t row_bytes = work.params.row_bytes;
  float weight = 1.f;
  if (kWeighted && row >= 0) weight = p.weights[row];
  int64_t offset[N];
  bool in_row[N];
  float sum[N][Vector<T>::kSize];
#pragma unroll
  for (int v = 0; v < N; ++v) {
    const int line = first_line + v * kGroupLines + LineInGroup();
    offset[v] = UnitOffset(work.lines.record, line);
    in_row[v] = v < count && line < work.lines.record && offset[v] < row_bytes;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) sum[v][i] = 0.f;
  }
  for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0;) {
    // Two rows at a time, so that the loads of both are under way before the first is added.
    const int one = __ffs(rest) - 1;
    rest &= rest - 1;
    const int two = rest != 0 ? __ffs(rest) - 1 : -1;
    rest &= rest - 1;
    const char* const row_one = p.y + __shfl_sync(~0u, row, one) * row_bytes;
    const char* const row_two = p.y + __shfl_sync(~0u, row, max(two, 0)) * row_bytes;
    const float weight_one = __shfl_sync(~0u, weight, one), weight_two = __shfl_sync(~0u, weight, max(two, 0));
    uint4 bits_one[N], bits_two[N];
#pragma unroll
    for (int v = 0; v < N; ++v) bits_one[v] = in_row[v] ? LoadUnit(row_one, offset[v]) : uint4{};
#pragma unroll
    for (int v = 0; v < N; ++v) bits_two[v] = in_row[v] && two >= 0 ? LoadUnit(row_two, offset[v]) : uint4{};
#pragma unroll
    for (int v = 0; v < N; ++v)
      Accumulate<T, kWeighted>(sum[v], reinterpret_cast<const int4&>(bits_one[v]), weight_one);
    if (two < 0) break;
#pragma unroll
    for (int v = 0; v < N; ++v)
      Accumulate<T, kWeighted>(sum[v], reinterpret_cast<const int4&>(bits_two[v]), weight_two);
  }
#pragma unroll
  for (int v = 0; v < N; ++v) {
    const int4 packed = Vector<T>::Pack(sum[v]);
    bits[v] = make_uint4(packed.x, packed.y, packed.z, packed.w);
  }
}

__device__ __forceinline__ float Carried(const CombineParams& p, int row, int k) {
  return p.carried[p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + k : row];
}

// This lane's unit of what is carried back, from byte `offset` of it: of each choice that has its row here.
__device__ __noinline__ uint4 LoadCarried(const CombineParams& p, const int32_t* here, int64_t offset) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = static_cast<int>(offset / 4) + i, row = k < p.num_topk ? here[k] : -1;
    words[i] = row >= 0 ? __float_as_uint(Carried(p, row, k)) : 0;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The same unit as it came from `rank`, to the choices that went there.
__device__ __noinline__ void StoreCarried(const CombineParams& p, int64_t token, int rank, int64_t offset, uint4 bits) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = static_cast<int>(offset / 4) + i;
    if ((IsTail() && i >= 2) || k >= p.num_topk) continue;
    const int64_t choice = token * p.num_topk + k;
    const int slot = p.slot[choice];
    if (slot >= 0 && slot / p.max_recv_tokens == rank) p.carried_back[choice] = __uint_as_float(words[i]);
  }
}

// This lane's row of a token, one lane a row.
__device__ __forceinline__ int DistinctRow(const CombineParams& p, int row) {
  if (!p.one_row_a_rank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << (threadIdx.x % 32)) - 1)) == 0 ? row : -1;
}

// A piece of this rank's record for a token whose rows here are `here` [K], one of them, `row`, in each lane.
template <class T, bool kWeighted>
__device__ __forceinline__ void MakePiece(const CombineWork& work, const int32_t* here, int row, int first_line,
                                          uint4 (&bits)[kMaxGroups]) {
  const CombineParams& p = work.params;
  const int64_t row_bytes = work.params.row_bytes;
  // Half of the registers for sums, the other for loads: two groups at a time.
#pragma unroll
  for (int half = 0; half < kMaxGroups; half += 2) {
    uint4 two[2];
    two[0] = two[1] = uint4{};
    if (half < work.cut.groups && row_bytes > 0)
      SumRows<T, kWeighted>(work, DistinctRow(p, row), first_line + half * kGroupLines, work.cut.groups - half, two);
    bits[half] = two[0], bits[half + 1] = two[1];
  }
  if (p.carried == nullptr) return;
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const int line = first_line + v * kGroupLines + LineInGroup();
    const int64_t offset = UnitOffset(work.lines.record, line);
    if (v < work.cut.groups && line < work.lines.record && offset >= row_bytes)
      bits[v] = LoadCarried(p, here, offset - row_bytes);
  }
}

// This rank's sums to the tokens' ranks; through its own window too where the call is halved.
template <class T, bool kWeighted>
__device__ bool SendSums(const CombineWork& work, const ArenaCall& call) {
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk, num_pieces = work.cut.pieces;
  const int num_targets = call.receives ? call.num_ranks - 1 : call.num_ranks;
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * num_topk;
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens);
  const int num_units = p.num_tokens * num_targets * num_pieces, stride = gridDim.x * kSenders;
  bool ready = false;
  const auto target_of = [&](int unit) { return (call.rank + 1 + unit / num_pieces % num_targets) % call.num_ranks; };
  const auto here_of = [&](int unit) {
    return p.recv_slot + target_of(unit) * choices + unit / num_pieces / num_targets * static_cast<int64_t>(num_topk);
  };
  const auto load_row = [&](int unit) { return unit < num_units && lane < num_topk ? here_of(unit)[lane] : -1; };
  int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32);
  int next_row = load_row(unit);
  for (; unit < num_units; unit += stride) {
    const int row = next_row;
    next_row = load_row(unit + stride);
    if (__ballot_sync(~0u, row >= 0) == 0 || !call.Reaches(target_of(unit))) continue;
    const int64_t token = unit / num_pieces / num_targets;
    const int first_line = unit % num_pieces * work.cut.lines();
    uint4 bits[kMaxGroups];
    MakePiece<T, kWeighted>(work, here_of(unit), row, first_line, bits);
    if (!ready && !(ready = AwaitReuse(call))) return false;
    char* const record =
        call.Lines(target_of(unit), call.rank, source_bytes) + (token * work.lines.record + first_line) * kLineBytes;
    SetEpoch(call, bits);
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      if (v < work.cut.groups && first_line + v * kGroupLines + LineInGroup() < work.lines.record)
        StoreLine(record + v * kGroupBytes + lane * 16, bits[v]);
    }
  }
  return true;
}

// Own tokens: over the ranks that hold rows of one, in rank order, what they sent.
template <class T, bool kWeighted>
__device__ bool ReceiveSums(const CombineWork& work, const ArenaCall& call) {
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk,
            num_groups = static_cast<int>(DivideUp(work.lines.record, kGroupLines));
  const int64_t row_bytes = work.params.row_bytes, source_bytes = work.lines.SourceBytes(p.num_tokens);
  const int num_units = p.num_tokens * num_groups;
  for (int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32 - kSenders); unit < num_units;
       unit += gridDim.x * kReceivers) {
    const int64_t token = unit / num_groups;
    const int line = unit % num_groups * kGroupLines + LineInGroup();
    const bool in_record = line < work.lines.record;
    const int64_t offset = UnitOffset(work.lines.record, line);
    const int slot = lane < num_topk ? p.slot[token * num_topk + lane] : -1;
    const int rank = slot >= 0 ? slot / p.max_recv_tokens : -1, row = slot - rank * p.max_recv_tokens;
    uint32_t ranks = __reduce_or_sync(~0u, rank >= 0 ? 1u << rank : 0u) & ~call.dead;
    uint4 own[1] = {};
    const bool sums_itself = call.sends && (ranks >> call.rank & 1) != 0;
    if (sums_itself && row_bytes > 0) {
      const int here = rank == call.rank ? row : -1;
      SumRows<T, kWeighted>(work, DistinctRow(p, here), unit % num_groups * kGroupLines, 1, own);
    }
    if (p.carried_back != nullptr && unit % num_groups == 0 && lane < num_topk) {
      // Choices that no line brings.
      if (rank < 0 || call.IsDead(rank)) p.carried_back[token * num_topk + lane] = 0.f;
      if (call.sends && rank == call.rank) p.carried_back[token * num_topk + lane] = Carried(p, row, lane);
    }
    float total[Vector<T>::kSize] = {};
    while (ranks != 0) {
      const char* place[kPeersAtOnce];
      int from[kPeersAtOnce];
      uint4 bits[kPeersAtOnce];
#pragma unroll
      for (int i = 0; i < kPeersAtOnce; ++i) {
        from[i] = ranks != 0 ? __ffs(ranks) - 1 : -1;
        ranks &= ranks - 1;
        const bool comes = from[i] >= 0 && !(call.sends && from[i] == call.rank) && in_record;
        place[i] = comes ? call.Lines(call.rank, from[i], source_bytes) +
                               (token * work.lines.record + line) * kLineBytes + lane % 8 * 16
                         : nullptr;
      }
      const auto peer_of = [&](int i) { return i == 0 ? from[0] : i == 1 ? from[1] : i == 2 ? from[2] : from[3]; };
      if (!ReceiveLines(call, place, bits, peer_of, static_cast<int>(token))) return false;
#pragma unroll
      for (int i = 0; i < kPeersAtOnce; ++i) {
        if (from[i] < 0) continue;
        if (call.sends && from[i] == call.rank) bits[i] = own[0];
        Accumulate<T, false>(total, reinterpret_cast<const int4&>(bits[i]), 1.f);
        if (p.carried_back != nullptr && place[i] != nullptr && offset >= row_bytes)
          StoreCarried(p, token, from[i], offset - row_bytes, bits[i]);
      }
    }
    if (!in_record || offset >= row_bytes) continue;
    const int4 packed = Vector<T>::Pack(total);
    StoreUnit(p.out + token * row_bytes + offset, make_uint4(packed.x, packed.y, packed.z, packed.w));
  }
  return true;
}

// ---- sums in LogFMT-10

struct LogfmtTables {
  LogTable logs;
  ExpTable exps;
};

// How many of this lane's columns of a step are in the row.
__device__ __forceinline__ int ColumnsOf(const CombineWork& work, int step) {
  const int first = step * kStepColumns + static_cast<int>(threadIdx.x % 32) * kLaneColumns;
  return max(0, min(work.hidden - first, kLaneColumns));
}

// Whether the row has columns in this lane's line of a step.
__device__ __forceinline__ bool HasLine(const CombineWork& work, int step) {
  return step * kStepColumns + LineInGroup() * 8 * kLaneColumns < work.hidden;
}

// This lane's columns of the sum, in lane order, of the rows that lanes name (-1: none), rounded to y's dtype.
template <class T, bool kWeighted>
__device__ __forceinline__ LogfmtLane<T> SumStep(const CombineWork& work, int row, int step, int columns) {
  constexpr int kSize = Vector<T>::kSize, V = kLaneColumns / kSize, kRowsAtOnce = V <= 4 ? 2 : 1;
  const CombineParams& p = work.params;
  const char* const y =
      p.y + (static_cast<int64_t>(step) * kStepColumns + threadIdx.x % 32 * kLaneColumns) * static_cast<int>(sizeof(T));
  float weight = 1.f;
  if (kWeighted && row >= 0) weight = p.weights[row];
  float sum[V][kSize] = {};
  for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0;) {
    int4 bits[kRowsAtOnce][V];
    float its_weight[kRowsAtOnce];
    const bool last = kRowsAtOnce > 1 && (rest & (rest - 1)) == 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int holder = max(__ffs(rest) - 1, 0);
      rest &= rest - 1;
      const char* const its_row = y + __shfl_sync(~0u, row, holder) * p.row_bytes;
      its_weight[i] = kWeighted ? __shfl_sync(~0u, weight, holder) : 1.f;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool loads = v * kSize < columns && !(i > 0 && last);
        bits[i][v] = loads ? __ldg(reinterpret_cast<const int4*>(its_row) + v) : int4{};
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i > 0 && last) break;
#pragma unroll
      for (int v = 0; v < V; ++v) Accumulate<T, kWeighted>(sum[v], bits[i][v], its_weight[i]);
    }
  }
  LogfmtLane<T> lane;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int4 packed = Vector<T>::Pack(sum[v]);
    lane.x[4 * v] = packed.x, lane.x[4 * v + 1] = packed.y, lane.x[4 * v + 2] = packed.z, lane.x[4 * v + 3] = packed.w;
  }
  return lane;
}

// A step of a sum into its place in the target's window. `encoded` is the same for all lanes of a line.
template <class T>
__device__ __forceinline__ void StoreStep(const ArenaCall& call, const LogfmtLane<T>& lane, bool has_line, bool encoded,
                                          const uint32_t (&codes)[kLogfmtLaneWords], uint32_t amax, uint32_t amin,
                                          char* place) {
  if (__any_sync(~0u, encoded)) {
    uint4 bits[kCodedGroups];
    PackCodes(codes, amax, amin, bits);
    SetEpoch(call, bits);
#pragma unroll
    for (int v = 0; v < kCodedGroups; ++v) {
      if (has_line && encoded) StoreLine(place + v * kGroupBytes, bits[v]);
    }
  }
  if (__any_sync(~0u, has_line && !encoded)) {
    uint4 bits[1] = {PackRawFirst(lane)};
    SetEpoch(call, bits);
    if (has_line && !encoded) StoreLine(place, bits[0]);
#pragma unroll
    for (int i = 0; i < kRawGroups<T> - 1; ++i) {
      bits[0] = PackRaw(lane, i);
      SetEpoch(call, bits);
      if (has_line && !encoded) StoreLine(place + (i + 1) * kGroupBytes, bits[0]);
    }
  }
}

// This rank's sums to the tokens' ranks, through its own window to itself, a step of 1024 columns at a time.
template <class T, bool kWeighted>
__device__ bool SendLogfmtSums(const CombineWork& work, const ArenaCall& call, const LogTable& logs) {
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_steps = work.logfmt_steps;
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens);
  const int num_units = p.num_tokens * call.num_ranks * num_steps, stride = gridDim.x * kSenders;
  bool ready = false;
  const auto target_of = [&](int unit) { return (call.rank + 1 + unit / num_steps % call.num_ranks) % call.num_ranks; };
  const auto load_row = [&](int unit) {
    const int64_t token = unit / num_steps / call.num_ranks;
    const bool is_choice = unit < num_units && lane < p.num_topk;
    return is_choice ? p.recv_slot[(target_of(unit) * int64_t{p.num_tokens} + token) * p.num_topk + lane] : -1;
  };
  int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32);
  int next_row = load_row(unit);
  for (; unit < num_units; unit += stride) {
    const int row = DistinctRow(p, next_row);
    next_row = load_row(unit + stride);
    if (__ballot_sync(~0u, row >= 0) == 0 || !call.Reaches(target_of(unit))) continue;
    const int64_t token = unit / num_steps / call.num_ranks;
    const int step = unit % num_steps, columns = ColumnsOf(work, step);
    const LogfmtLane<T> sum = SumStep<T, kWeighted>(work, row, step, columns);
    uint32_t codes[kLogfmtLaneWords], amax, amin;
    const bool encoded = EncodePieces(sum, columns, LogfmtPieceColumns(work.hidden), logs, codes, &amax, &amin);
    if (!ready && !(ready = AwaitReuse(call))) return false;
    char* const place = call.Lines(target_of(unit), call.rank, source_bytes) + token * work.lines.record * kLineBytes +
                        step * (kRawGroups<T> * kGroupBytes) + lane * 16;
    StoreStep(call, sum, HasLine(work, step), encoded, codes, amax, amin, place);
  }
  return true;
}

struct FirstGroups {
  uint4 bits[kCodedGroups];
};

template <class T>
struct RawStep {
  LogfmtLane<T> lane;
  bool came;
};

// The lane's columns of a step that is not encoded, where `wanted`: its other groups have still to be waited for. By
// value, so that what the call needs not is not in memory.
template <class T>
__device__ __noinline__ RawStep<T> TakeRaw(const ArenaCall& call, const char* place, bool wanted, int source, int token,
                                           FirstGroups first) {
  RawStep<T> raw{};
  UnpackRawFirst(first.bits[0], raw.lane);
  UnpackRaw(first.bits[1], 0, raw.lane);
  UnpackRaw(first.bits[2], 1, raw.lane);
#pragma unroll
  for (int group = kCodedGroups; group < kRawGroups<T>; group += 2) {
    const char* const places[2] = {wanted ? place + group * kGroupBytes : nullptr,
                                   wanted ? place + (group + 1) * kGroupBytes : nullptr};
    uint4 bits[2];
    if (!ReceiveLines(call, places, bits, [&](int) { return source; }, token)) return raw;
    UnpackRaw(bits[0], group - 1, raw.lane);
    UnpackRaw(bits[1], group, raw.lane);
  }
  raw.came = true;
  return raw;
}

// The lane's columns of what `source` sent, whose first groups are here. False: the others will not come.
template <class T>
__device__ __forceinline__ bool TakeStep(const ArenaCall& call, const char* place, bool has_line, int source, int token,
                                         const FirstGroups& first, const LogfmtTables& tables, LogfmtLane<T>* lane) {
  const bool coded = IsCoded(first.bits[0]);
  uint32_t codes[kLogfmtLaneWords], amax, amin;
  UnpackCodes(first.bits, codes, &amax, &amin);
  *lane = DecodeLane<T>(codes, amax, amin, tables.logs, tables.exps);
  const bool wanted = has_line && !coded;
  if (!__any_sync(~0u, wanted)) return true;
  const RawStep<T> raw = TakeRaw<T>(call, place, wanted, source, token, first);
  if (wanted) *lane = raw.lane;
  return raw.came;
}

// Own tokens: over the ranks that hold rows of one, in rank order, what they sent, decoded.
template <class T>
__device__ bool ReceiveLogfmtSums(const CombineWork& work, const ArenaCall& call, const LogfmtTables& tables) {
  constexpr int kRanksAtOnce = sizeof(T) == 4 ? 1 : 2, kPerWord = LogfmtLane<T>::kPerWord,
                kWords = LogfmtLane<T>::kWords;
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_steps = work.logfmt_steps, num_units = p.num_tokens * num_steps;
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens);
  for (int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32 - kSenders); unit < num_units;
       unit += gridDim.x * kReceivers) {
    const int token = unit / num_steps, step = unit % num_steps, columns = ColumnsOf(work, step);
    const bool has_line = HasLine(work, step);
    const int slot = lane < p.num_topk ? p.slot[int64_t{token} * p.num_topk + lane] : -1;
    uint32_t ranks = __reduce_or_sync(~0u, slot >= 0 ? 1u << (slot / p.max_recv_tokens) : 0u) & ~call.dead;
    const int64_t offset =
        int64_t{token} * work.lines.record * kLineBytes + step * (kRawGroups<T> * kGroupBytes) + lane * 16;
    float total[kWords][kPerWord] = {};
    while (ranks != 0) {
      int from[kRanksAtOnce];
      const char *record[kRanksAtOnce], *place[kRanksAtOnce * kCodedGroups];
      uint4 bits[kRanksAtOnce * kCodedGroups];
#pragma unroll
      for (int i = 0; i < kRanksAtOnce; ++i) {
        from[i] = ranks != 0 ? __ffs(ranks) - 1 : -1;
        ranks &= ranks - 1;
        record[i] = call.Lines(call.rank, max(from[i], 0), source_bytes) + offset;
#pragma unroll
        for (int v = 0; v < kCodedGroups; ++v)
          place[i * kCodedGroups + v] = from[i] >= 0 && has_line ? record[i] + v * kGroupBytes : nullptr;
      }
      const auto peer_of = [&](int i) { return i < kCodedGroups ? from[0] : from[kRanksAtOnce - 1]; };
      if (!ReceiveLines(call, place, bits, peer_of, token)) return false;
#pragma unroll
      for (int i = 0; i < kRanksAtOnce; ++i) {
        if (from[i] < 0) continue;
        const FirstGroups first{{bits[i * kCodedGroups], bits[i * kCodedGroups + 1], bits[i * kCodedGroups + 2]}};
        LogfmtLane<T> partial;
        if (!TakeStep(call, record[i], has_line, from[i], token, first, tables, &partial)) return false;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          float values[kPerWord];
          Source<T>::Unpack(partial.x[w], values);
#pragma unroll
          for (int j = 0; j < kPerWord; ++j) total[w][j] = __fadd_rn(total[w][j], values[j]);
        }
      }
    }
    constexpr int kSize = Vector<T>::kSize;
    char* const out = p.out + token * p.row_bytes +
                      (static_cast<int64_t>(step) * kStepColumns + lane * kLaneColumns) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int v = 0; v < kLaneColumns / kSize; ++v) {
      float values[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = total[(v * kSize + i) / kPerWord][(v * kSize + i) % kPerWord];
      if (v * kSize < columns) reinterpret_cast<int4*>(out)[v] = Vector<T>::Pack(values);
    }
  }
  return true;
}

__device__ void ClearResults(const CombineWork& work, int block, int num_blocks) {
  ClearResults(work.params, block * kLowLatencyThreads + threadIdx.x, num_blocks * kLowLatencyThreads);
}

template <class T, bool kWeighted, bool kLogfmt>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyCombineKernel(const __grid_constant__ CombineWork work) {
  __shared__ std::conditional_t<kLogfmt, LogfmtTables, char> tables;
  if constexpr (kLogfmt) FillTable(&tables.logs), FillTable(&tables.exps);  // the block is synchronised below
  const ArenaCall call = BeginArenaCall(work.low_latency, kCombine, work.params.refused);
  const int warp = threadIdx.x / 32;
  bool failed = call.failed;
  if (warp == kKeeper) {
    Keep(call);
  } else if (call.takes_part && call.sends && warp < kSenders) {
    if constexpr (kLogfmt) {
      failed = !SendLogfmtSums<T, kWeighted>(work, call, tables.logs);
    } else {
      failed = call.num_ranks > (call.receives ? 1 : 0) && !SendSums<T, kWeighted>(work, call);
    }
  } else if (call.takes_part && call.receives && warp >= kSenders) {
    if constexpr (kLogfmt) {
      failed = !ReceiveLogfmtSums<T>(work, call, tables);
    } else {
      failed = !ReceiveSums<T, kWeighted>(work, call);
    }
  }
  if (!call.receives && call.sends) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      work.low_latency.in_flight[0] = call.epoch, work.low_latency.in_flight[1] = ~call.epoch;
    }
    LeaveFailed(call, failed);
    return;
  }
  if (!call.takes_part && !call.failed) ClearResults(work, blockIdx.x, gridDim.x);
  if (LeaveFailed(call, failed)) ClearResults(work, 0, 1);
}

using Kernel = void (*)(CombineWork);

template <class T>
Kernel KernelFor(bool weighted, bool logfmt) {
  if (logfmt) return weighted ? LowLatencyCombineKernel<T, true, true> : LowLatencyCombineKernel<T, false, true>;
  return weighted ? LowLatencyCombineKernel<T, true, false> : LowLatencyCombineKernel<T, false, false>;
}

Kernel KernelFor(RowDtype dtype, bool weighted, bool logfmt) {
  if (dtype == RowDtype::kBfloat16) return KernelFor<__nv_bfloat16>(weighted, logfmt);
  if (dtype == RowDtype::kFloat16) return KernelFor<__half>(weighted, logfmt);
  return KernelFor<float>(weighted, logfmt);
}

// What a call moves; its shape need not fit.
CombineWork MakeWork(const CombineParams& p, bool carries, bool logfmt) {
  CombineWork work{};
  work.params = p;
  if (logfmt) {
    const int item_bytes = p.dtype == RowDtype::kFloat32 ? 4 : 2;
    work.hidden = static_cast<int>(p.row_bytes / item_bytes);
    work.logfmt_steps = LogfmtSteps(work.hidden);
    work.lines = {0, LogfmtRecordLines(work.hidden, item_bytes)};
    work.cut = {kCodedGroups, work.logfmt_steps};
    return work;
  }
  const int64_t carried_bytes = carries ? DivideUp(4ll * p.num_topk, 16) * 16 : 0;
  work.lines = CountLines(false, p.num_tokens, p.num_topk, p.row_bytes + carried_bytes);
  if (work.lines.record > 0) work.cut = CutRecord(work.lines.record, p.num_tokens);
  return work;
}

bool Carries(const CombineParams& p) { return p.carried != nullptr || p.carried_back != nullptr; }

}  // namespace

int64_t LowLatencyCombineBytes(const CombineParams& p, int num_ranks, bool logfmt) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.row_bytes % 16 != 0 || p.row_bytes >= 1 << 26) return 0;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return 0;
  if (p.max_recv_tokens <= 0 || p.num_tokens <= 0 || (logfmt && Carries(p))) return 0;
  const CombineWork work = MakeWork(p, Carries(p), logfmt);
  if (work.lines.record == 0 || int64_t{p.num_tokens} * num_ranks * work.lines.record >= 1ll << 30) return 0;
  return num_ranks * work.lines.SourceBytes(p.num_tokens);
}

cudaError_t LoadLowLatencyCombine() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (int kind = 0; kind < 4; ++kind) {
      const Kernel kernel = KernelFor(dtype, kind % 2 != 0, kind / 2 != 0);
      if (cudaError_t error = LoadKernel(kernel); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchLowLatencyCombine(const CombineParams& params, const LowLatencyParams& low_latency,
                                    const LowLatencyConfig& config, cudaStream_t stream) {
  CombineWork work = MakeWork(params, Carries(params), low_latency.logfmt);
  work.low_latency = low_latency;
  const int64_t sent = int64_t{params.num_tokens} * work.cut.pieces * low_latency.arenas.num_ranks;
  const int64_t received = low_latency.logfmt ? int64_t{params.num_tokens} * work.logfmt_steps
                                              : int64_t{params.num_tokens} * DivideUp(work.lines.record, kGroupLines);
  const int64_t wanted = DivideUp(std::max(sent, received), kReceivers);
  const int num_blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, config.num_sms)));
  const Kernel kernel = KernelFor(params.dtype, params.weights != nullptr, low_latency.logfmt);
  kernel<<<num_blocks, kLowLatencyThreads, 0, stream>>>(work);
  return cudaGetLastError();
}

}  // namespace jax_ep
