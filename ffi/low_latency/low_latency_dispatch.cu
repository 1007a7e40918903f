// The low-latency dispatch kernel and its launcher: see low_latency.h for the contract, docs/protocol.md for the order
// of events.
//
//   warps    role       waits for                                 signals
//   0 - 6    sender     the window's reuse                        lines of rows, once to every rank that wants them
//   7 - 14   receiver   the window's reuse (its table), lines     lines of the table
//   15       keeper                                               windows read before, to the peers; epoch
#include <algorithm>

#include "device/quantize.cuh"
#include "low_latency/places.cuh"

namespace jax_ep {
namespace {

constexpr int kZeroPiece = 2048;
constexpr int64_t kMaxShared = 232448 - 1024;

// ---- a record: the first row, the gates, the second row

// Up to 16 bytes at any place, as many as a row of `row_bytes` has from `offset`.
__device__ inline uint4 LoadSmallRow(const char* row, int64_t row_bytes, int64_t offset) {
  uint4 bits{};
  if (offset >= row_bytes) return bits;
  if (row_bytes % 16 == 0) return LoadUnit<true>(row, offset);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row_bytes % 4 == 0) {
      if (offset + 4 * i < row_bytes) words[i] = *reinterpret_cast<const uint32_t*>(row + offset + 4 * i);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t place = offset + 4 * i + j;
        if (place < row_bytes) words[i] |= static_cast<uint32_t>(static_cast<uint8_t>(row[place])) << 8 * j;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ inline void StoreSmallRow(char* row, int64_t row_bytes, int64_t offset, const uint4& bits) {
  const int num_bytes = static_cast<int>(min(row_bytes - offset, int64_t{IsTail() ? 8 : 16}));
  if (num_bytes <= 0) return;
  if (row_bytes % 16 == 0) return StoreUnit(row + offset, bits);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row_bytes % 4 == 0) {
      if (4 * i < num_bytes) *reinterpret_cast<uint32_t*>(row + offset + 4 * i) = words[i];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * i + j < num_bytes) row[offset + 4 * i + j] = static_cast<char>(words[i] >> 8 * j);
      }
    }
  }
}

// This lane's unit of a token's record, behind the first row; the second row is at `second`.
__device__ __noinline__ uint4 LoadBehindRow(const DispatchWork& work, int64_t token, const char* second,
                                            int64_t offset) {
  const DispatchParams& p = work.params;
  if (offset >= work.gate_bytes) {
    return p.num_row_arrays < 2 ? uint4{} : LoadSmallRow(second, p.rows[1].row_bytes, offset - work.gate_bytes);
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = static_cast<int>(offset / 4) + i;
    words[i] = k < p.num_topk ? __float_as_uint(p.topk_weights[token * p.num_topk + k]) : 0;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A piece of a record from this rank's operands; lanes past its end get nothing of meaning.
__device__ __forceinline__ void LoadPiece(const DispatchWork& work, int64_t token, int first_line,
                                          uint4 (&bits)[kMaxGroups]) {
  const int64_t row_bytes = work.first_bytes();
  const char* const row = work.params.rows[0].x + token * row_bytes;
  const char* const second = work.params.rows[1].x + token * work.second_bytes();
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const int line = first_line + v * kGroupLines + LineInGroup();
    const int64_t offset = UnitOffset(work.lines.record, line);
    bits[v] = uint4{};
    if (v >= work.cut.groups || line >= work.lines.record) continue;
    if (offset < row_bytes) bits[v] = LoadUnit(row, offset);
  }
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const int line = first_line + v * kGroupLines + LineInGroup();
    const int64_t offset = UnitOffset(work.lines.record, line);
    if (v >= work.cut.groups || line >= work.lines.record) continue;
    if (offset >= row_bytes) bits[v] = LoadBehindRow(work, token, second, offset - row_bytes);
  }
}

// What stands behind the first row in this lane's unit of a record, to where the token's rows `here` [K] are.
__device__ __noinline__ void StoreBehindRow(const DispatchWork& work, const int32_t* here, int64_t offset, uint4 bits) {
  const DispatchParams& p = work.params;
  if (offset >= work.gate_bytes) {
    if (p.num_row_arrays < 2) return;
    const RowArray& second = p.rows[1];
    for (int k = 0; k < p.num_topk; ++k) {
      if (here[k] < 0) continue;
      StoreSmallRow(second.recv + here[k] * second.row_bytes, second.row_bytes, offset - work.gate_bytes, bits);
      if (p.layout == Layout::kRank) break;
    }
    return;
  }
  int row = -1;  // of layout "rank": that of all choices here
  for (int k = 0; k < p.num_topk; ++k) row = max(row, here[k]);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int k = static_cast<int>(offset / 4) + i;
    if ((IsTail() && i >= 2) || k >= p.num_topk) continue;
    if (p.layout == Layout::kRank) {
      p.recv_weights[static_cast<int64_t>(row) * p.num_topk + k] = here[k] >= 0 ? __uint_as_float(words[i]) : 0.f;
    } else if (here[k] >= 0) {
      p.recv_weights[here[k]] = __uint_as_float(words[i]);
    }
  }
}

// A piece of a record to the rows that lanes name (-1: none), each row in one lane.
__device__ __forceinline__ void StorePiece(const DispatchWork& work, const int32_t* here, int row, int first_line,
                                           const uint4 (&bits)[kMaxGroups]) {
  const int64_t row_bytes = work.first_bytes();
  for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1) {
    char* const target = work.params.rows[0].recv + __shfl_sync(~0u, row, __ffs(rest) - 1) * row_bytes;
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      const int line = first_line + v * kGroupLines + LineInGroup();
      const int64_t offset = UnitOffset(work.lines.record, line);
      if (v < work.cut.groups && line < work.lines.record && offset < row_bytes) StoreUnit(target + offset, bits[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const int line = first_line + v * kGroupLines + LineInGroup();
    const int64_t offset = UnitOffset(work.lines.record, line);
    if (v < work.cut.groups && line < work.lines.record && offset >= row_bytes)
      StoreBehindRow(work, here, offset - row_bytes, bits[v]);
  }
}

// ---- roles

// The ranks to which a token goes, a bit each, from its expert or slot in each lane.
__device__ __forceinline__ uint32_t RanksOf(const DispatchWork& work, const ArenaCall& call, int64_t token) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  int rank = -1;
  if (lane < p.num_topk) {
    if (work.has_table()) {
      const int expert = LoadExpert(p, token * p.num_topk + lane);
      if (expert >= 0) rank = expert / (p.num_experts / call.num_ranks);
    } else {
      const int slot = p.slot[token * p.num_topk + lane];
      if (slot >= 0) rank = slot / p.max_recv_tokens;
    }
  }
  const uint32_t ranks = __reduce_or_sync(~0u, rank >= 0 ? 1u << rank : 0u) & ~call.dead;
  return work.own_lines ? ranks : ranks & ~(1u << call.rank);
}

// Every token once to every rank that owns one of its experts, through the own window too if its lines are wanted.
// Destinations begin at the neighbour, so that no receiver is everybody's first.
__device__ inline bool SendRows(const DispatchWork& work, const ArenaCall& call) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens);
  const int num_units = p.num_tokens * work.cut.pieces;
  bool ready = false;
  for (int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32); unit < num_units; unit += gridDim.x * kSenders) {
    const int64_t token = unit / work.cut.pieces;
    const int first_line = unit % work.cut.pieces * work.cut.lines();
    const uint32_t ranks = RanksOf(work, call, token);
    uint4 bits[kMaxGroups];
    LoadPiece(work, token, first_line, bits);
    if (!ready && !(ready = AwaitReuse(call))) return false;
    SetEpoch(call, bits);
    int peer = call.rank;
    for (int n = 0; n < call.num_ranks; ++n) {
      if (++peer == call.num_ranks) peer = 0;
      if ((ranks >> peer & 1) == 0) continue;
      char* const record = call.Lines(peer, call.rank, source_bytes) +
                           (work.lines.table + token * work.lines.record) * kLineBytes + first_line * kLineBytes;
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) {
        if (v < work.cut.groups && first_line + v * kGroupLines + LineInGroup() < work.lines.record)
          StoreLine(record + v * kGroupBytes + lane * 16, bits[v]);
      }
    }
  }
  return true;
}

// Rows travel as they are.
struct AsTheyAre {
  static constexpr bool kEncodes = false;
};

template <Wire kWire, class T>
struct Encoded {
  static constexpr bool kEncodes = true;

  // All of a sender's steps of a row in global memory into shared memory.
  __device__ static void EncodePart(const Encoding& encoding, int64_t token, char* values, char* scales) {
    const int hidden = encoding.hidden, part = threadIdx.x / 32;
    const char* const row = encoding.x + token * hidden * static_cast<int64_t>(sizeof(T));
    LaneEncoder<kWire, T> lane(row, hidden, values, scales, threadIdx.x % 32, part);
    int step = part;
    for (; (step + 1) * kStepColumns <= hidden; step += kSenders) {
      EncodeStep<true>(lane);
      lane.Advance(kSenders);
    }
    if (step * kStepColumns < hidden) EncodeStep<false>(lane);
  }
};

// Ends with the senders synchronised; true if it is true for any.
__device__ __forceinline__ bool SyncSendersOr(bool value) {
  int any;
  asm volatile("{ .reg .pred p, q;\n  setp.ne.s32 p, %1, 0;\n  bar.red.or.pred q, 2, %2, p;\n  selp.s32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(static_cast<int>(value)), "n"(32 * kSenders)
               : "memory");
  return any != 0;
}

// The same with rows that the senders of a block encode together, a token a block. Two of them in shared memory: while
// a warp still sends the one, others encode the next; the barrier of the next is behind all that sent the one.
template <class Rows>
__device__ inline bool SendEncodedRows(const DispatchWork& work, const ArenaCall& call, char* encoded) {
  const DispatchParams& p = work.params;
  const int warp = threadIdx.x / 32, num_lines = work.lines.record;
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens), row_bytes = work.first_bytes();
  bool ready = false;
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    char* const scales = encoded + row_bytes;
    Rows::EncodePart(work.low_latency.encoding, token, encoded, scales);
    const uint32_t ranks = RanksOf(work, call, token);
    ready = ready || AwaitReuse(call);
    if (SyncSendersOr(!ready)) return false;
    // Groups kSenders apart, kMaxGroups of them at once.
    for (int first = warp; first * kGroupLines < num_lines; first += kSenders * kMaxGroups) {
      uint4 bits[kMaxGroups];
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) {
        const int line = (first + v * kSenders) * kGroupLines + LineInGroup();
        const int64_t offset = UnitOffset(num_lines, line);
        bits[v] = uint4{};
        if (line < num_lines) {
          bits[v] = offset < row_bytes ? LoadUnit<true>(encoded, offset)
                                       : LoadBehindRow(work, token, scales, offset - row_bytes);
        }
      }
      SetEpoch(call, bits);
      int peer = call.rank;
      for (int n = 0; n < call.num_ranks; ++n) {
        if (++peer == call.num_ranks) peer = 0;
        if ((ranks >> peer & 1) == 0) continue;
        char* const record = call.Lines(peer, call.rank, source_bytes) +
                             (work.lines.table + token * num_lines) * kLineBytes + threadIdx.x % 8 * 16;
#pragma unroll
        for (int v = 0; v < kMaxGroups; ++v) {
          const int line = (first + v * kSenders) * kGroupLines + LineInGroup();
          if (line < num_lines) StoreLine(record + line * kLineBytes, bits[v]);
        }
      }
    }
    encoded += token / gridDim.x % 2 == 0 ? work.encoded_stride : -work.encoded_stride;
  }
  return true;
}

__device__ inline void WriteZeroRows(const DispatchWork& work, const PlacesShared& places, int num_local) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  if (work.lines.record == 0 && p.recv_topk_idx == nullptr) return;
  const int64_t num_units = static_cast<int64_t>(places.zero_before[num_local + 1]) * work.zero_pieces;
  const int64_t row_bytes = work.first_bytes(), second_bytes = work.second_bytes();
  int range = 0;
  for (int64_t unit = blockIdx.x + gridDim.x * ReceiverWarp(); unit < num_units; unit += gridDim.x * kReceivers) {
    const int index = static_cast<int>(unit / work.zero_pieces), piece = static_cast<int>(unit % work.zero_pieces);
    while (index >= places.zero_before[range + 1]) ++range;
    const int64_t row = places.zero_first[range] + (index - places.zero_before[range]);
    const int64_t end = min(row_bytes, (int64_t{piece} + 1) * kZeroPiece);
    for (int64_t offset = static_cast<int64_t>(piece) * kZeroPiece + lane * 16; offset < end; offset += 512) {
      *reinterpret_cast<uint4*>(p.rows[0].recv + row * row_bytes + offset) = uint4{};
    }
    if (piece != 0) continue;
    for (int64_t i = lane; i < second_bytes; i += 32) p.rows[1].recv[row * second_bytes + i] = 0;
    const int num_choices = p.layout == Layout::kRank ? p.num_topk : 1;
    if (lane >= num_choices) continue;
    if (p.recv_weights != nullptr) p.recv_weights[row * num_choices + lane] = 0.f;
    if (p.recv_topk_idx != nullptr && work.has_table()) p.recv_topk_idx[row * num_choices + lane] = -1;
  }
}

// This lane's row of a token, one lane a row.
__device__ __forceinline__ int DistinctRow(const DispatchParams& p, const int32_t* here) {
  const int lane = threadIdx.x % 32, row = lane < p.num_topk ? here[lane] : -1;
  if (p.layout != Layout::kRank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << lane) - 1)) == 0 ? row : -1;
}

// Own rows, rows without a token, then the peers' in the order in which they leave.
__device__ inline bool ReceiveRows(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const int index = blockIdx.x + gridDim.x * ReceiverWarp(), stride = gridDim.x * kReceivers;
  const int num_topk = p.num_topk, num_pieces = work.cut.pieces;
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * num_topk,
                source_bytes = work.lines.SourceBytes(p.num_tokens);
  const int32_t* const all_here = work.has_table() ? places.here : p.recv_slot;
  uint4 bits[kMaxGroups];
  if (!work.own_lines) {
    for (int unit = index; unit < p.num_tokens * num_pieces; unit += stride) {
      const int64_t token = unit / num_pieces;
      const int first_line = unit % num_pieces * work.cut.lines();
      const int32_t* const here = all_here + call.rank * choices + token * num_topk;
      const int row = DistinctRow(p, here);
      if (__ballot_sync(~0u, row >= 0) == 0) continue;
      LoadPiece(work, token, first_line, bits);
      StorePiece(work, here, row, first_line, bits);
    }
  }
  WriteZeroRows(work, places, p.num_experts / call.num_ranks);
  const int num_sources = work.own_lines ? call.num_ranks : call.num_ranks - 1;
  const int64_t num_units = static_cast<int64_t>(num_sources) * p.num_tokens * num_pieces;
  for (int64_t unit = index; unit < num_units; unit += stride) {
    const int first_line = static_cast<int>(unit % num_pieces) * work.cut.lines();
    const int64_t part = unit / num_pieces, token = part / num_sources;
    const int source = (2 * call.num_ranks - 1 + call.rank - static_cast<int>(part % num_sources)) % call.num_ranks;
    const int32_t* const here = all_here + source * choices + token * num_topk;
    const int row = DistinctRow(p, here);
    if (__ballot_sync(~0u, row >= 0) == 0) continue;
    const char* const record = call.Lines(call.rank, source, source_bytes) +
                               (work.lines.table + token * work.lines.record + first_line) * kLineBytes;
    const char* place[kMaxGroups];
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      const bool in_record = v < work.cut.groups && first_line + v * kGroupLines + LineInGroup() < work.lines.record;
      place[v] = in_record ? record + v * kGroupBytes + threadIdx.x % 32 * 16 : nullptr;
    }
    if (!call.Reaches(source)) {  // in a routing from before the mask: its rows are zero
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) bits[v] = uint4{};
    } else if (!ReceiveLines(call, place, bits, [&](int) { return source; }, static_cast<int>(token))) {
      return false;
    }
    StorePiece(work, here, row, first_line, bits);
  }
  return true;
}

__device__ inline bool Receive(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  if (work.has_table()) {
    const bool sent = SendTable(work, call);
    if (SyncReceiversOr(!sent) || !FindPlaces(work, call, places)) return false;
  } else {
    const int num_local = p.num_experts / call.num_ranks;
    if (ReceiverWarp() == 0) FindZeroRows(work, p.counts, num_local, p.counts[num_local], places);
    SyncReceivers();
  }
  return ReceiveRows(work, call, places);
}

// Results without a token in them, by blocks `block` of `num_blocks`.
__device__ void ClearResults(const DispatchWork& work, const ArenaCall& call, int block, int num_blocks) {
  const DispatchParams& p = work.params;
  const auto clear = [&](void* bytes, int64_t num_bytes, int value) {
    const int64_t thread = static_cast<int64_t>(block) * kLowLatencyThreads + threadIdx.x;
    for (int64_t i = thread; i < num_bytes / 4; i += static_cast<int64_t>(num_blocks) * kLowLatencyThreads)
      static_cast<int32_t*>(bytes)[i] = value;
    if (thread < num_bytes % 4) static_cast<char*>(bytes)[num_bytes / 4 * 4 + thread] = 0;
  };
  const int64_t rows = p.max_recv_tokens, choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  for (int i = 0; i < p.num_row_arrays; ++i) clear(p.rows[i].recv, rows * p.rows[i].row_bytes, 0);
  if (p.recv_weights != nullptr) clear(p.recv_weights, rows * (p.layout == Layout::kRank ? p.num_topk : 1) * 4, 0);
  if (!work.has_table()) return;
  clear(p.slot, choices * 4, -1);
  clear(p.recv_slot, call.num_ranks * choices * 4, -1);
  clear(p.counts, (p.num_experts / call.num_ranks + 1) * 4, 0);
  if (p.recv_topk_idx != nullptr) clear(p.recv_topk_idx, rows * p.num_topk * 4, -1);
}

template <class Rows>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyDispatchKernel(const __grid_constant__ DispatchWork work) {
  extern __shared__ __align__(16) int32_t shared[];
  const ArenaCall call = BeginArenaCall(work.low_latency, work.params.operation, work.params.refused);
  const PlacesShared places(work, shared, call.num_ranks);
  const int warp = threadIdx.x / 32;
  bool failed = call.failed;
  if (warp == kKeeper) {
    Keep(call);
  } else if (call.takes_part && warp < kSenders) {
    if constexpr (Rows::kEncodes) {
      failed = !SendEncodedRows<Rows>(work, call, reinterpret_cast<char*>(shared) + work.encoded_offset);
    } else {
      failed = call.sends && work.lines.record > 0 && !SendRows(work, call);
    }
  } else if (call.takes_part) {
    failed = call.receives && !Receive(work, call, places);
  }
  if (!call.receives && call.sends) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      work.low_latency.in_flight[0] = call.epoch, work.low_latency.in_flight[1] = ~call.epoch;
    }
    LeaveFailed(call, failed);
    return;
  }
  if (!call.takes_part && !call.failed) ClearResults(work, call, blockIdx.x, gridDim.x);
  if (LeaveFailed(call, failed)) ClearResults(work, call, 0, 1);
}

using Kernel = void (*)(DispatchWork);

template <class T>
Kernel KernelFor(Wire wire) {
  if (wire == Wire::kFp8) return LowLatencyDispatchKernel<Encoded<Wire::kFp8, T>>;
  if (wire == Wire::kFp8Ue8m0) return LowLatencyDispatchKernel<Encoded<Wire::kFp8Ue8m0, T>>;
  return LowLatencyDispatchKernel<Encoded<Wire::kMxfp8, T>>;
}

Kernel KernelFor(RowDtype dtype, Wire wire) {
  if (dtype == RowDtype::kBfloat16) return KernelFor<__nv_bfloat16>(wire);
  if (dtype == RowDtype::kFloat16) return KernelFor<__half>(wire);
  return KernelFor<float>(wire);
}

int64_t RoundUp(int64_t value, int64_t to) { return DivideUp(value, to) * to; }

// What a call moves; its shape need not fit.
DispatchWork MakeWork(const DispatchParams& p, int num_ranks, bool encodes) {
  DispatchWork work{};
  work.params = p;
  work.gate_bytes = p.topk_weights != nullptr ? static_cast<int>(RoundUp(4ll * p.num_topk, 16)) : 0;
  const int64_t record_bytes = work.first_bytes() + work.gate_bytes + work.second_bytes();
  work.lines = CountLines(work.has_table() && num_ranks > 1, p.num_tokens, p.num_topk, record_bytes);
  if (work.lines.record > 0) work.cut = CutRecord(work.lines.record, p.num_tokens);
  work.zero_pieces = static_cast<int>(std::max<int64_t>(DivideUp(work.first_bytes(), kZeroPiece), 1));
  work.encoded_offset = static_cast<int>(RoundUp(PlacesShared::Bytes(work, num_ranks), 16));
  if (encodes) work.encoded_stride = static_cast<int>(RoundUp(work.first_bytes() + work.second_bytes(), 16));
  return work;
}

int64_t SharedBytes(const DispatchWork& work) { return work.encoded_offset + 2ll * work.encoded_stride; }

}  // namespace

int64_t LowLatencyDispatchBytes(const DispatchParams& p, int num_ranks, bool encodes) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.num_experts + num_ranks > kMaxBins) return 0;
  if (p.max_recv_tokens <= 0 || p.num_tokens <= 0 || p.num_row_arrays > kMaxRowArrays) return 0;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return 0;
  if (p.num_row_arrays > 0 && (p.rows[0].row_bytes % 16 != 0 || p.rows[0].row_bytes <= 0)) return 0;
  for (int i = 0; i < p.num_row_arrays; ++i) {
    if (p.rows[i].row_bytes >= 1 << 26) return 0;
  }
  const DispatchWork work = MakeWork(p, num_ranks, encodes);
  if (static_cast<int64_t>(p.num_tokens) * std::max(work.cut.pieces, 1) >= 1ll << 30) return 0;
  if ((work.has_table() && choices >= kMaxShared) || SharedBytes(work) > kMaxShared) return 0;
  return std::max<int64_t>(num_ranks * work.lines.SourceBytes(p.num_tokens), kLineBytes);
}

cudaError_t LoadLowLatencyDispatch() {
  const auto load = [](Kernel kernel) {
    cudaFuncAttributes attributes;
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (cudaError_t error = cudaFuncGetAttributes(&attributes, function); error != cudaSuccess) return error;
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
  };
  if (cudaError_t error = load(LowLatencyDispatchKernel<AsTheyAre>); error != cudaSuccess) return error;
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (Wire wire : {Wire::kFp8, Wire::kFp8Ue8m0, Wire::kMxfp8}) {
      if (cudaError_t error = load(KernelFor(dtype, wire)); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchLowLatencyDispatch(const DispatchParams& params, const LowLatencyParams& low_latency,
                                     const LowLatencyConfig& config, cudaStream_t stream) {
  const int num_ranks = low_latency.arenas.num_ranks;
  const Encoding& encoding = low_latency.encoding;
  const bool encodes = encoding.x != nullptr;
  DispatchWork work = MakeWork(params, num_ranks, encodes);
  work.low_latency = low_latency;
  work.own_lines = encodes || low_latency.half != Half::kBoth;
  const int64_t sent = static_cast<int64_t>(params.num_tokens) * (encodes ? kReceivers : work.cut.pieces);
  const int64_t zero = work.lines.record == 0 ? 0 : static_cast<int64_t>(params.max_recv_tokens) * work.zero_pieces;
  const int64_t received = low_latency.half == Half::kStart ? 0 : std::max(num_ranks * sent, zero);
  const int64_t choices = work.has_table() ? int64_t{num_ranks} * params.num_tokens * params.num_topk : 0;
  const int64_t wanted = std::max(DivideUp(std::max(sent, received), kReceivers), DivideUp(choices, kReceiverThreads));
  const int num_blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, config.num_sms)));
  const Kernel kernel =
      encodes ? KernelFor(encoding.dtype, static_cast<Wire>(encoding.wire)) : LowLatencyDispatchKernel<AsTheyAre>;
  kernel<<<num_blocks, kLowLatencyThreads, SharedBytes(work), stream>>>(work);
  return cudaGetLastError();
}

}  // namespace jax_ep
