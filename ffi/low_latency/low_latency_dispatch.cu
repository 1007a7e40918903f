// The low-latency dispatch kernel and its launcher: see low_latency.h for the contract, docs/protocol.md for the order
// of events.
//
//   warps    role       waits for                                 signals
//   0 - 6    sender     its block's table, the window's reuse     lines of rows, once to every rank that wants them
//   7 - 14   receiver   the window's reuse (its table), tables    lines of the table, then that they are sent; that the
//                                                                 places are known
//   15       keeper                                               windows read before, to the peers; epoch
//   all      then jobs  the places; lines                         results
#include <algorithm>

#include "device/load.h"
#include "device/quantize.cuh"
#include "low_latency/places.cuh"

namespace jax_ep {
namespace {

constexpr int kZeroPiece = 2048, kZeroRows = 8;
constexpr int64_t kMaxShared = 232448 - 1024;
constexpr int64_t kMaxUnits = 1 << 20, kMaxJobs = 1 << 29;  // pieces of rows, of rows without a token

// ---- a record: the first row, the gates, the second row

enum class Array : int { kNone, kRow, kGates, kSecond };

// This lane's 16 bytes of each line that it has of a piece, 8 in the tail.
class Units {
 public:
  __device__ __forceinline__ Units(const DispatchWork& work, int first_line)
      : work_(work),
        line_(first_line + LineInGroup()),
        offset_(UnitOffset(work.lines.record, line_)),
        step_(kGroupLines * (IsTail() ? 8 : kLineMain)) {}

  static __device__ __forceinline__ int num_bytes() { return IsTail() ? 8 : 16; }
  // In the record, of the unit in group v.
  __device__ __forceinline__ int offset(int v) const { return offset_ + v * step_; }
  __device__ __forceinline__ Array array(int v) const {
    const int at = offset(v);
    if (v >= work_.cut.groups || line_ + v * kGroupLines >= work_.lines.record) return Array::kNone;
    if (at < work_.row_end) return Array::kRow;
    if (at < work_.gates_end) return Array::kGates;
    return at >= work_.second_begin && at < work_.second_end ? Array::kSecond : Array::kNone;
  }
  // Moves in one piece; else a row may also end inside.
  __device__ __forceinline__ bool aligned(Array array) const {
    return work_.all_aligned || array == Array::kRow ||
           (array == Array::kGates ? work_.gate_alignment : work_.second_alignment) >= num_bytes();
  }

 private:
  const DispatchWork& work_;
  int line_, offset_, step_;
};

// From memory that no kernel writes meanwhile, or (kShared) this block's.
template <bool kShared = false>
__device__ __forceinline__ uint4 LoadAligned(const char* place) {
  if (IsTail()) {
    const auto* const half = reinterpret_cast<const uint2*>(place);
    const uint2 bits = kShared ? *half : __ldcg(half);
    return make_uint4(bits.x, bits.y, 0, 0);
  }
  const auto* const whole = reinterpret_cast<const uint4*>(place);
  return kShared ? *whole : __ldcg(whole);
}

// The same of any alignment, `num_bytes` at most; by bytes or by words.
__device__ __noinline__ uint4 LoadBytes(const char* place, int num_bytes, bool by_bytes) {
  num_bytes = min(num_bytes, Units::num_bytes());
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!by_bytes) {
      if (4 * i < num_bytes) words[i] = *reinterpret_cast<const uint32_t*>(place + 4 * i);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * i + j < num_bytes) words[i] |= static_cast<uint32_t>(static_cast<uint8_t>(place[4 * i + j])) << 8 * j;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __noinline__ void StoreBytes(char* place, int num_bytes, bool by_bytes, uint4 bits) {
  num_bytes = min(num_bytes, Units::num_bytes());
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!by_bytes) {
      if (4 * i < num_bytes) *reinterpret_cast<uint32_t*>(place + 4 * i) = words[i];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * i + j < num_bytes) place[4 * i + j] = static_cast<char>(words[i] >> 8 * j);
      }
    }
  }
}

// A piece of a record from this rank's operands; the loads are independent.
__device__ __forceinline__ void LoadPiece(const DispatchWork& work, int64_t token, int first_line,
                                          uint4 (&bits)[kMaxGroups]) {
  const DispatchParams& p = work.params;
  const Units units(work, first_line);
  // Less what stands before them in a record.
  const char* const row = p.rows[0].x + token * work.first_bytes();
  const char* const gates = reinterpret_cast<const char*>(p.topk_weights + token * p.num_topk) - work.row_end;
  const char* const second = p.rows[1].x + token * work.second_bytes() - work.second_begin;
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const Array array = units.array(v);
    const char* const base = array == Array::kRow ? row : array == Array::kGates ? gates : second;
    bits[v] = uint4{};
    if (array != Array::kNone && units.aligned(array)) bits[v] = LoadAligned(base + units.offset(v));
  }
  if (work.all_aligned) return;
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const Array array = units.array(v);
    if (array == Array::kNone || units.aligned(array)) continue;
    const int end = array == Array::kGates ? work.gates_end : work.second_end;
    bits[v] = LoadBytes((array == Array::kGates ? gates : second) + units.offset(v), end - units.offset(v),
                        array == Array::kSecond && work.second_alignment < 4);
  }
}

// The gates of choices `first` and following that the lane holds (from kMaxTopk on none). By one whole warp.
__device__ __noinline__ void StoreGates(const DispatchWork& work, int row, int first, uint4 bits) {
  const DispatchParams& p = work.params;
  const int common = __reduce_max_sync(~0u, row), count = min(p.num_topk - first, IsTail() ? 2 : 4);
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int target = __shfl_sync(~0u, row, (first + i) % 32);
    const float gate = __uint_as_float(i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w);
    if (i >= count) continue;
    if (p.layout == Layout::kRank) {
      p.recv_weights[int64_t{common} * p.num_topk + first + i] = target >= 0 ? gate : 0.f;
    } else if (target >= 0) {
      p.recv_weights[target] = gate;
    }
  }
}

// A piece of a record to a token's rows, of each choice one in its lane (-1: none).
__device__ __forceinline__ void StorePiece(const DispatchWork& work, int row, int first_line,
                                           const uint4 (&bits)[kMaxGroups]) {
  const DispatchParams& p = work.params;
  const Units units(work, first_line);
  const bool by_rank = p.layout == Layout::kRank;  // then all choices have the same row
  const uint32_t choices = __ballot_sync(~0u, row >= 0), rows = by_rank ? choices & -choices : choices;
  uint32_t moves = 0, second = 0, gates = 0, unaligned = 0;  // a bit a group
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const Array array = units.array(v);
    const bool aligned = units.aligned(array);
    moves |= array == Array::kRow || (array == Array::kSecond && aligned) ? 1u << v : 0;
    second |= array == Array::kSecond ? 1u << v : 0;
    gates |= array == Array::kGates ? 1u << v : 0;
    unaligned |= array == Array::kSecond && !aligned ? 1u << v : 0;
  }
#pragma unroll 1
  for (uint32_t rest = rows; rest != 0; rest &= rest - 1) {
    const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
    char* const in_first = p.rows[0].recv + target * work.first_bytes();
    char* const in_second = p.rows[1].recv + target * work.second_bytes() - work.second_begin;
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      if ((moves >> v & 1) != 0) StoreUnit(((second >> v & 1) != 0 ? in_second : in_first) + units.offset(v), bits[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < kMaxGroups; ++v) {
    const bool here = (gates >> v & 1) != 0;
    if (!__any_sync(~0u, here)) continue;
    StoreGates(work, row, here ? (units.offset(v) - work.row_end) / 4 : kMaxTopk, bits[v]);
  }
  if (!__any_sync(~0u, unaligned != 0)) return;
#pragma unroll 1
  for (uint32_t rest = rows; rest != 0; rest &= rest - 1) {
    const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
    char* const in_second = p.rows[1].recv + target * work.second_bytes() - work.second_begin;
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      if ((unaligned >> v & 1) != 0)
        StoreBytes(in_second + units.offset(v), work.second_end - units.offset(v), work.second_alignment < 4, bits[v]);
    }
  }
}

// ---- senders

// What decides where a token goes, of each choice in its lane: the expert, or the slot where it is known. As it stands
// there, so that nothing waits for it yet.
__device__ __forceinline__ int LoadDestination(const DispatchWork& work, int64_t token) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  const int32_t* const destinations = work.has_table() ? p.topk_idx : p.slot;
  return lane < p.num_topk ? destinations[token * p.num_topk + lane] : -1;
}

// The ranks to which the token goes, a bit each.
__device__ __forceinline__ uint32_t RanksOf(const DispatchWork& work, const ArenaCall& call, int destination) {
  const DispatchParams& p = work.params;
  const bool goes = destination >= 0 && (!work.has_table() || destination < p.num_experts);
  uint32_t rank = 0;
  if (goes) {
    rank = work.has_table() ? work.by_local(destination)
                            : static_cast<uint32_t>(destination) / static_cast<uint32_t>(p.max_recv_tokens);
  }
  const uint32_t ranks = __reduce_or_sync(~0u, goes ? 1u << rank : 0u) & ~call.dead;
  return work.own_lines ? ranks : ranks & ~(1u << call.rank);
}

// Lines that the lanes hold, once to every rank of `ranks`: `count` groups `stride` apart, from `first_line` of the
// token's record. Destinations begin at the neighbour, so that no receiver is everybody's first.
__device__ __forceinline__ void StoreLines(const DispatchWork& work, const ArenaCall& call, int64_t token,
                                           uint32_t ranks, int first_line, int stride, int count,
                                           uint4 (&bits)[kMaxGroups]) {
  const int64_t source_bytes = work.lines.SourceBytes(work.params.num_tokens);
  const int64_t place = (work.lines.table + token * work.lines.record) * kLineBytes + threadIdx.x % 8 * 16;
  SetEpoch(call, bits);
  int peer = call.rank;
#pragma unroll 1
  for (int n = 0; n < call.num_ranks; ++n) {
    if (++peer == call.num_ranks) peer = 0;
    if ((ranks >> peer & 1) == 0) continue;
    char* const record = call.Lines(peer, call.rank, source_bytes) + place;
#pragma unroll
    for (int v = 0; v < kMaxGroups; ++v) {
      const int line = first_line + v * stride * kGroupLines + LineInGroup();
      if (v < count && line < work.lines.record) StoreLine(record + line * kLineBytes, bits[v]);
    }
  }
}

// Rows travel as they are: a warp sends pieces of records.
struct AsTheyAre {
  // A piece on its way from the operands.
  struct Outgoing {
    int destination = -1;
    uint4 bits[kMaxGroups];
  };

  __device__ static int FirstUnit() { return blockIdx.x + gridDim.x * (threadIdx.x / 32); }

  __device__ __forceinline__ static void Load(const DispatchWork& work, int unit, char*, Outgoing& outgoing) {
    const int token = work.by_pieces(unit);
    if (token >= work.params.num_tokens) return;
    outgoing.destination = LoadDestination(work, token);
    LoadPiece(work, token, (unit - token * work.cut.pieces) * work.cut.lines(), outgoing.bits);
  }

  // False: some window does not get free.
  __device__ __forceinline__ static bool Send(const DispatchWork& work, const ArenaCall& call, char*,
                                              Outgoing& outgoing) {
    const int num_units = work.params.num_tokens * work.cut.pieces, stride = gridDim.x * kSenders;
    if (work.has_table()) AwaitTableSent();
    for (int unit = FirstUnit(); unit < num_units; unit += stride) {
      const int token = work.by_pieces(unit), first_line = (unit - token * work.cut.pieces) * work.cut.lines();
      const uint32_t ranks = RanksOf(work, call, outgoing.destination);
      if (unit == FirstUnit() && !AwaitReuse(call)) return false;
      StoreLines(work, call, token, ranks, first_line, 1, work.cut.groups, outgoing.bits);
      Load(work, unit + stride, nullptr, outgoing);
    }
    return true;
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

// Rows that the senders of a block encode together, a token a block. Two of them in shared memory, each with all of its
// record: while a warp still sends the one, others encode the next; the barrier of the next is behind all that sent
// the one.
template <Wire kWire, class T>
struct Encoded {
  // A warp's part of a token on its way from the operands.
  struct Outgoing {
    LaneEncoder<kWire, T> lane;
    int destination;
    float gate;

    __device__ Outgoing() : lane(nullptr, 0, nullptr, nullptr, 0, 0), destination(-1), gate(0.f) {}
  };

  __device__ static int FirstUnit() { return blockIdx.x; }

  __device__ __forceinline__ static void Load(const DispatchWork& work, int token, char* record, Outgoing& outgoing) {
    const DispatchParams& p = work.params;
    const Encoding& encoding = p.encoding;
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
    if (token >= p.num_tokens) return;
    const char* const row = encoding.x + int64_t{token} * encoding.hidden * static_cast<int>(sizeof(T));
    char* const scales = record + work.second_begin;
    outgoing.lane = LaneEncoder<kWire, T>(row, encoding.hidden, record, scales, lane, part);
    outgoing.lane.template Load<false>();
    outgoing.destination = LoadDestination(work, token);
    if (p.topk_weights != nullptr && lane < p.num_topk)
      outgoing.gate = p.topk_weights[int64_t{token} * p.num_topk + lane];
  }

  // All of this warp's part into the record.
  __device__ __forceinline__ static void Encode(const DispatchWork& work, Outgoing& outgoing, char* record) {
    const int hidden = work.params.encoding.hidden, lane = threadIdx.x % 32, part = threadIdx.x / 32;
    EncodeLoaded<false>(outgoing.lane);
    for (int step = part + kSenders; step * kStepColumns < hidden; step += kSenders) {
      outgoing.lane.Advance(kSenders);
      EncodeStep<false>(outgoing.lane);
    }
    if (part == 0 && work.params.topk_weights != nullptr && lane < work.params.num_topk)
      reinterpret_cast<float*>(record + work.row_end)[lane] = outgoing.gate;
  }

  __device__ __forceinline__ static bool Send(const DispatchWork& work, const ArenaCall& call, char* record,
                                              Outgoing& outgoing) {
    const int warp = threadIdx.x / 32, num_tokens = work.params.num_tokens;
    char* other = record + work.encoded_stride;
    if (FirstUnit() >= num_tokens && work.has_table()) AwaitTableSent();
    for (int token = FirstUnit(); token < num_tokens; token += gridDim.x) {
      Encode(work, outgoing, record);
      const uint32_t ranks = RanksOf(work, call, outgoing.destination);
      Load(work, token + gridDim.x, other, outgoing);
      if (token == FirstUnit() && work.has_table()) AwaitTableSent();
      const bool ready = token != FirstUnit() || AwaitReuse(call);
      if (SyncSendersOr(!ready)) return false;
      // Groups kSenders apart, kMaxGroups of them at once.
      for (int group = warp; group * kGroupLines < work.lines.record; group += kSenders * kMaxGroups) {
        uint4 bits[kMaxGroups];
#pragma unroll
        for (int v = 0; v < kMaxGroups; ++v) {
          const int line = (group + v * kSenders) * kGroupLines + LineInGroup();
          bits[v] = uint4{};
          if (line < work.lines.record) bits[v] = LoadAligned<true>(record + UnitOffset(work.lines.record, line));
        }
        StoreLines(work, call, token, ranks, group * kGroupLines, kSenders, kMaxGroups, bits);
      }
      char* const sent = record;
      record = other, other = sent;
    }
    return true;
  }
};

// ---- jobs: what is to do once the places are known. The blocks share them evenly, the warps of a block take them as
// they have time: senders come late where there is much to send.

// Receivers go on, the others wait for them.
__device__ __forceinline__ void TellPlaces() { asm volatile("bar.arrive 3, %0;" ::"n"(kLowLatencyThreads) : "memory"); }
__device__ __forceinline__ void AwaitPlaces() { asm volatile("bar.sync 3, %0;" ::"n"(kLowLatencyThreads) : "memory"); }

// How many there are of each kind, in the order in which they are taken.
struct Jobs {
  int own;             // pieces of own rows
  int padding, zeros;  // pieces of rows without a token: between groups, by group; then also behind them, by kZeroRows
  int routing;         // counts, then own tokens, whose places everywhere are written
  int lines;           // pieces of rows that come as lines
  bool all_are_first;

  __device__ Jobs(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
    const DispatchParams& p = work.params;
    // The first piece of a token's row writes what of its choices is here: also where there are no rows.
    const int pieces = work.lines.record > 0 || work.has_table() ? p.num_tokens * work.cut.pieces : 0;
    const bool is_padded = p.layout == Layout::kBatched || (p.layout == Layout::kExpert && p.expert_alignment > 1);
    const bool has_zeros = work.lines.record > 0 || p.recv_topk_idx != nullptr;
    const int behind = p.layout == Layout::kBatched ? 0 : max(p.max_recv_tokens - places.words->end, 0);
    own = work.own_lines ? 0 : pieces;
    padding = has_zeros && is_padded ? work.num_local * work.zero_pieces : 0;
    zeros = padding + (has_zeros ? (behind + kZeroRows - 1) / kZeroRows * work.zero_pieces : 0);
    routing = work.has_table() ? 1 + p.num_tokens : 0;
    lines = work.num_sources * pieces;
    // A receiver's first job has its number: a counter that all warps ask at once takes long.
    all_are_first = own + zeros + routing + lines <= kReceivers * static_cast<int>(gridDim.x);
  }
};

enum class Kind : int { kNothing, kOwnRow, kZeros, kCounts, kSlots, kLines, kAbsent, kNone };

struct Job {
  Kind kind;
  int source, token, piece;
  int row;           // where this lane's choice goes here, -1: nowhere; of kSlots on its rank
  int expert, rank;  // of a token whose table is here
};

__device__ __forceinline__ Job TakeJob(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places,
                                       const Jobs& jobs, bool is_first) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  Job job{Kind::kNone, call.rank, 0, 0, -1, -1, -1};
  unsigned int ticket = ReceiverWarp();
  if (!is_first || ticket >= kReceivers) {
    if (jobs.all_are_first) return job;
    if (lane == 0) ticket = atomicAdd(&places.words->next_job, 1u);
    ticket = __shfl_sync(~0u, ticket, 0);
  }
  int index = static_cast<int>(ticket * gridDim.x + blockIdx.x);
  if (index < jobs.own) {
    job.kind = Kind::kOwnRow;
    job.token = work.by_pieces(index), job.piece = index - job.token * work.cut.pieces;
  } else if ((index -= jobs.own) < jobs.zeros) {
    job.kind = Kind::kZeros, job.piece = index;
    return job;
  } else if ((index -= jobs.zeros) < jobs.routing) {
    job.kind = index == 0 ? Kind::kCounts : Kind::kSlots, job.token = index - 1;
    if (index == 0) return job;
  } else if ((index -= jobs.routing) < jobs.lines) {
    // In the order in which they leave.
    const int part = work.by_pieces(index);
    job.kind = Kind::kLines;
    job.piece = index - part * work.cut.pieces, job.token = work.by_sources(part);
    job.source = call.rank - 1 - (part - job.token * work.num_sources);
    if (job.source < 0) job.source += call.num_ranks;
    if (!call.Reaches(job.source)) job.kind = Kind::kAbsent;  // in a routing from before the mask: its rows are zero
  } else {
    return job;
  }
  if (work.has_table()) {
    const Choice choice = Find(work, call, places, job.source, job.token, job.kind == Kind::kSlots);
    job.row = choice.row, job.expert = choice.expert, job.rank = choice.rank;
  } else if (lane < p.num_topk) {
    job.row = p.recv_slot[(int64_t{job.source} * p.num_tokens + job.token) * p.num_topk + lane];
  }
  return job;
}

__device__ __noinline__ void WriteZeros(const DispatchWork& work, PlacesShared places, int padding, int index) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, piece = index % work.zero_pieces, capacity = p.max_recv_tokens;
  const int64_t row_bytes = work.first_bytes(), second_bytes = work.second_bytes();
  int64_t row, end;
  if (index < padding) {
    const int expert = index / work.zero_pieces, count = places.total[expert];
    const int first = places.first[work.low_latency.arenas.rank * work.num_local + expert];
    if (p.layout == Layout::kBatched) {
      row = first + min(count, p.expert_capacity), end = first + p.expert_capacity;
    } else {
      row = first + count, end = min(first + Aligned(work, count), capacity);
    }
  } else {
    row = places.words->end + int64_t{(index - padding) / work.zero_pieces} * kZeroRows;
    end = min(row + kZeroRows, int64_t{capacity});
  }
  const int64_t from = static_cast<int64_t>(piece) * kZeroPiece, to = min(row_bytes, from + kZeroPiece);
#pragma unroll 1
  for (; row < end; ++row) {
#pragma unroll 1
    for (int64_t offset = from + lane * 16; offset < to; offset += 512) {
      *reinterpret_cast<uint4*>(p.rows[0].recv + row * row_bytes + offset) = uint4{};
    }
    if (piece != 0) continue;
    char* const second = p.rows[1].recv + row * second_bytes;
    if (second_bytes % 4 == 0) {
#pragma unroll 1
      for (int64_t i = lane; i < second_bytes / 4; i += 32) reinterpret_cast<uint32_t*>(second)[i] = 0;
    } else {
#pragma unroll 1
      for (int64_t i = lane; i < second_bytes; i += 32) second[i] = 0;
    }
    const int num_choices = p.layout == Layout::kRank ? p.num_topk : 1;
    if (lane >= num_choices) continue;
    if (p.recv_weights != nullptr) p.recv_weights[row * num_choices + lane] = 0.f;
    if (p.recv_topk_idx != nullptr && work.has_table()) p.recv_topk_idx[row * num_choices + lane] = -1;
  }
}

// Where an own token's choices went.
__device__ __forceinline__ void WriteSlots(const DispatchWork& work, const ArenaCall& call, const Job& job) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32;
  int slot = job.row >= 0 ? job.rank * p.max_recv_tokens + job.row : -1;
  if (job.rank >= 0 && call.IsDead(job.rank)) slot = kLost - job.rank;
  if (lane < p.num_topk) p.slot[int64_t{job.token} * p.num_topk + lane] = slot;
}

// What of a token is here.
__device__ __forceinline__ void WriteHere(const DispatchWork& work, const ArenaCall& call, const Job& job) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, row = __reduce_max_sync(~0u, job.row);
  if (lane >= p.num_topk) return;
  p.recv_slot[(int64_t{job.source} * p.num_tokens + job.token) * p.num_topk + lane] = job.row;
  if (p.layout == Layout::kRank && row >= 0) {
    p.recv_topk_idx[int64_t{row} * p.num_topk + lane] =
        job.rank == call.rank ? job.expert - call.rank * work.num_local : -1;
  }
}

// False: some lines did not come.
__device__ __forceinline__ bool DoJobs(const DispatchWork& work, const ArenaCall& call, const PlacesShared& places) {
  const DispatchParams& p = work.params;
  const Jobs jobs(work, call, places);
  const int64_t source_bytes = work.lines.SourceBytes(p.num_tokens);
  Job job{Kind::kNothing, 0, 0, 0, -1, -1, -1};
  while (job.kind != Kind::kNone) {
    const bool is_of_row = job.kind == Kind::kOwnRow || job.kind == Kind::kLines || job.kind == Kind::kAbsent;
    const bool moves_row = is_of_row && work.lines.record > 0 && __any_sync(~0u, job.row >= 0);
    const bool awaits = moves_row && job.kind == Kind::kLines;
    const int first_line = job.piece * work.cut.lines();
    uint4 bits[kMaxGroups];
    const char* place[kMaxGroups];
    if (awaits) {
      const char* const record = call.Lines(call.rank, job.source, source_bytes) +
                                 (work.lines.table + int64_t{job.token} * work.lines.record + first_line) * kLineBytes;
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) {
        const bool in_record = v < work.cut.groups && first_line + v * kGroupLines + LineInGroup() < work.lines.record;
        place[v] = in_record ? record + v * kGroupBytes + threadIdx.x % 32 * 16 : nullptr;
      }
      LookForLines(place, bits);
    } else if (moves_row && job.kind == Kind::kAbsent) {
#pragma unroll
      for (int v = 0; v < kMaxGroups; ++v) bits[v] = uint4{};
    } else if (moves_row) {
      LoadPiece(work, job.token, first_line, bits);
    } else if (job.kind == Kind::kZeros) {
      WriteZeros(work, places, jobs.padding, job.piece);
    } else if (job.kind == Kind::kSlots) {
      WriteSlots(work, call, job);
    } else if (job.kind == Kind::kCounts) {
#pragma unroll 1
      for (int e = threadIdx.x % 32; e < work.num_local; e += 32) p.counts[e] = places.total[e];
      if (threadIdx.x % 32 == 0) p.counts[work.num_local] = places.words->end;
    }
    // While the row is on its way.
    if (is_of_row && work.has_table() && job.piece == 0) WriteHere(work, call, job);
    const Job next = TakeJob(work, call, places, jobs, job.kind == Kind::kNothing);
    if (awaits && !AwaitLines(call, place, bits, [&](int) { return job.source; }, job.token)) return false;
    if (moves_row) StorePiece(work, job.row, first_line, bits);
    job = next;
  }
  return true;
}

// Results without a token in them, by blocks `block` of `num_blocks`.
__device__ __noinline__ void ClearResults(const DispatchWork& work, const ArenaCall& call, int block, int num_blocks) {
  const DispatchParams& p = work.params;
  const auto clear = [&](void* bytes, int64_t num_bytes, int value) {
    const int64_t thread = static_cast<int64_t>(block) * kLowLatencyThreads + threadIdx.x;
#pragma unroll 1
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
  extern __shared__ __align__(128) char shared[];
  Mark(Moment::kBegan);
  char* const encoded = shared + work.encoded_offset;
  const int warp = threadIdx.x / 32;
  const bool is_sender = warp < kSenders, is_receiver = !is_sender && warp < kKeeper;
  const bool sends_rows = is_sender && work.low_latency.half != Half::kDone && work.lines.record > 0;
  typename Rows::Outgoing outgoing;
  uint4 table{};
  const PlacesShared places(work.places, shared);
  // Operands come while the begin reads what it needs.
  const ArenaCall call = BeginArenaCall(work.low_latency, work.params.operation, work.params.refused, [&] {
    if (sends_rows) Rows::Load(work, Rows::FirstUnit(), encoded, outgoing);
    if (is_receiver && work.has_table()) table = LoadTableLines(work, ReceiverWarp());
    if (threadIdx.x == 0) places.words->next_job = kReceivers;
  });
  Mark(Moment::kEpochKnown);
  bool failed = call.failed;
  if (warp == kKeeper) Keep(call);
  if (call.takes_part && sends_rows) {
    failed = !Rows::Send(work, call, encoded, outgoing);
    Mark(Moment::kRowsSent);
  }
  if (call.takes_part && call.receives) {
    bool known;
    if (is_receiver) {
      known = FindPlaces(work, call, places, table);
      if (ReceiverThread() == 0) StoreReleaseShared(&places.words->known, known);
      TellPlaces();
    } else {
      AwaitPlaces();
      known = LoadAcquireShared(&places.words->known) != 0;
      Mark(Moment::kJoined);
    }
    failed = failed || !known || !DoJobs(work, call, places);
    Mark(Moment::kLastJob);
  }
  if (!call.receives && call.sends) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      work.low_latency.in_flight[0] = call.epoch, work.low_latency.in_flight[1] = ~call.epoch;
    }
    LeaveFailed(call, failed);
    return;
  }
  if (!call.takes_part && !call.failed) ClearResults(work, call, blockIdx.x, gridDim.x);
  const bool clears = LeaveFailed(call, failed);
  Mark(Moment::kLeft);
  if (clears) ClearResults(work, call, 0, 1);
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

int LowestBit(int64_t bytes) { return static_cast<int>(std::min<int64_t>(bytes & -bytes, 16)); }

// What a call moves; its shape need not fit.
DispatchWork MakeWork(const DispatchParams& p, int num_ranks, Half half) {
  DispatchWork work{};
  const bool encodes = p.encoding.x != nullptr;
  work.params = p;
  const bool has_gates = p.topk_weights != nullptr;
  work.row_end = static_cast<int>(work.first_bytes());
  work.gates_end = work.row_end + (has_gates ? 4 * p.num_topk : 0);
  work.second_begin = static_cast<int>(RoundUp(work.gates_end, 16));
  work.second_end = work.second_begin + static_cast<int>(work.second_bytes());
  work.gate_alignment = has_gates ? LowestBit(4ll * p.num_topk) : 16;
  work.second_alignment = work.second_bytes() > 0 ? LowestBit(work.second_bytes()) : 16;
  work.all_aligned = work.gate_alignment == 16 && work.second_alignment == 16;
  work.lines = CountLines(work.has_table(), p.num_tokens, p.num_topk, work.second_end);
  work.cut = work.lines.record > 0 ? CutRecord(work.lines.record, p.num_tokens) : Cut{1, 1};
  work.num_local = p.num_experts / num_ranks;
  work.zero_pieces = static_cast<int>(std::max<int64_t>(DivideUp(work.first_bytes(), kZeroPiece), 1));
  work.lines_a_part =
      static_cast<int>(std::max<int64_t>(DivideUp(int64_t{num_ranks} * work.lines.table, kReceivers), 1));
  work.own_lines = encodes || half != Half::kBoth;
  work.num_sources = work.own_lines ? num_ranks : num_ranks - 1;
  work.by_local = Divider(std::max(work.num_local, 1));
  work.by_part = Divider(work.lines_a_part);
  work.by_alignment = Divider(std::max(p.expert_alignment, 1));
  work.by_pieces = Divider(work.cut.pieces);
  work.by_tokens = Divider(p.num_tokens);
  work.by_sources = Divider(std::max(work.num_sources, 1));
  work.places = PlacesShared::LayoutOf(work, num_ranks);
  work.encoded_offset = static_cast<int>(RoundUp(work.places.end, 16));
  if (encodes) work.encoded_stride = static_cast<int>(RoundUp(int64_t{work.lines.record} * kLinePayload, 16));
  return work;
}

int64_t SharedBytes(const DispatchWork& work) { return work.encoded_offset + 2ll * work.encoded_stride; }

// Jobs of rows without a token, apart from padding between groups, at most.
int64_t MostZeros(const DispatchWork& work) {
  return DivideUp(work.params.max_recv_tokens, kZeroRows) * work.zero_pieces;
}

}  // namespace

int64_t LowLatencyDispatchBytes(const DispatchParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.num_experts + num_ranks > kMaxBins) return 0;
  if (p.max_recv_tokens <= 0 || p.num_tokens <= 0 || p.num_row_arrays > kMaxRowArrays) return 0;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return 0;
  if (p.num_row_arrays > 0 && (p.rows[0].row_bytes % 16 != 0 || p.rows[0].row_bytes <= 0)) return 0;
  for (int i = 0; i < p.num_row_arrays; ++i) {
    if (p.rows[i].row_bytes >= 1 << 26) return 0;
  }
  if (p.operation != kDispatchCached && choices >= kMaxShared) return 0;
  if (p.expert_alignment >= 1 << 19) return 0;
  const DispatchWork work = MakeWork(p, num_ranks, Half::kBoth);
  if (int64_t{num_ranks} * p.num_tokens * work.cut.pieces >= kMaxUnits || MostZeros(work) >= kMaxJobs ||
      int64_t{work.num_local} * work.zero_pieces >= kMaxJobs)
    return 0;
  if (SharedBytes(work) > kMaxShared) return 0;
  return std::max<int64_t>(num_ranks * work.lines.SourceBytes(p.num_tokens), kLineBytes);
}

cudaError_t LoadLowLatencyDispatch() {
  if (cudaError_t error = LoadKernel(LowLatencyDispatchKernel<AsTheyAre>, kMaxShared); error != cudaSuccess)
    return error;
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (Wire wire : {Wire::kFp8, Wire::kFp8Ue8m0, Wire::kMxfp8}) {
      if (cudaError_t error = LoadKernel(KernelFor(dtype, wire), kMaxShared); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchLowLatencyDispatch(const DispatchParams& params, const LowLatencyParams& low_latency,
                                     const LowLatencyConfig& config, cudaStream_t stream) {
  const int num_ranks = low_latency.arenas.num_ranks;
  const Encoding& encoding = params.encoding;
  const bool encodes = encoding.x != nullptr;
  DispatchWork work = MakeWork(params, num_ranks, low_latency.half);
  work.low_latency = low_latency;
  // Few tokens take few blocks: as many as have a job for each receiver.
  const int64_t pieces = work.lines.record > 0 ? static_cast<int64_t>(params.num_tokens) * work.cut.pieces : 0;
  const int64_t sent = encodes ? int64_t{params.num_tokens} * kReceivers : pieces;
  const int64_t zeros = work.lines.record == 0 ? 0 : MostZeros(work);
  const int64_t received = low_latency.half == Half::kStart ? 0 : std::max(num_ranks * pieces, zeros);
  const int64_t routed = work.has_table() ? int64_t{num_ranks} * params.num_tokens : 0;
  const int64_t wanted = DivideUp(std::max({sent, received, routed}), kReceivers);
  const int num_blocks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, config.num_sms)));
  const Kernel kernel =
      encodes ? KernelFor(encoding.dtype, static_cast<Wire>(encoding.wire)) : LowLatencyDispatchKernel<AsTheyAre>;
  kernel<<<num_blocks, kLowLatencyThreads, SharedBytes(work), stream>>>(work);
  return cudaGetLastError();
}

#ifdef JAX_EP_CLOCKS
cudaError_t ReadDispatchClocks(unsigned long long* clocks) {
  cudaError_t error = cudaMemcpyFromSymbol(clocks, g_clocks, sizeof g_clocks);
  void* place = nullptr;
  if (error == cudaSuccess) error = cudaGetSymbolAddress(&place, g_clocks);
  return error == cudaSuccess ? cudaMemset(place, 0, sizeof g_clocks) : error;
}
#endif

}  // namespace jax_ep
