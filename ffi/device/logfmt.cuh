// LogFMT-10, combine's wire format, one lane 32 consecutive columns at a time: ten bits a value between registers and
// packed words. jax_ep/_src/logfmt.py is the meaning, docs/wire-formats.md the arithmetic; every bit agrees with both.
// EncodePieces and DecodeLane are the warp's calls; what they are made of compiles on the host too, for
// tests/gpu/kernels/formats.cu. Neighbour: quantize.cuh, whose Source reads a row's dtypes.
#pragma once

#include <type_traits>

#include "device/quantize.cuh"

namespace jax_ep {

constexpr int kLogfmtLaneWords = 10;  // 32 codes of ten bits

// Columns that are encoded, or not, together.
constexpr __host__ __device__ int LogfmtPieceColumns(int hidden) { return hidden % 1024 == 0 ? 1024 : 512; }

// ---- tables: round(2**16 log2(1 + i / 128)) and round(2**23 (2**(i / 128) - 1)) for i = 0 .. 128

__host__ __device__ inline uint32_t LogEntry(int i) {
  static constexpr uint32_t kEntries[129] = {
      0,     736,   1466,  2190,  2909,  3623,  4331,  5034,  5732,  6425,  7112,  7795,  8473,  9146,  9814,
      10477, 11136, 11791, 12440, 13086, 13727, 14363, 14996, 15624, 16248, 16868, 17484, 18096, 18704, 19308,
      19909, 20505, 21098, 21687, 22272, 22854, 23433, 24007, 24579, 25146, 25711, 26272, 26830, 27384, 27936,
      28484, 29029, 29571, 30109, 30645, 31178, 31707, 32234, 32758, 33279, 33797, 34312, 34825, 35334, 35841,
      36346, 36847, 37346, 37842, 38336, 38827, 39316, 39802, 40286, 40767, 41246, 41722, 42196, 42667, 43137,
      43603, 44068, 44530, 44990, 45448, 45904, 46357, 46809, 47258, 47705, 48150, 48593, 49034, 49472, 49909,
      50344, 50776, 51207, 51636, 52063, 52488, 52911, 53332, 53751, 54169, 54584, 54998, 55410, 55820, 56229,
      56635, 57040, 57443, 57845, 58245, 58643, 59039, 59434, 59827, 60219, 60609, 60997, 61384, 61769, 62152,
      62534, 62915, 63294, 63671, 64047, 64421, 64794, 65166, 65536};
  return kEntries[i];
}

__host__ __device__ inline uint32_t ExpEntry(int i) {
  static constexpr uint32_t kEntries[129] = {
      0,       45549,   91346,   137391,  183687,  230233,  277033,  324086,  371395,  418961,  466786,  514869,
      563215,  611822,  660693,  709830,  759234,  808906,  858847,  909060,  959546,  1010305, 1061340, 1112653,
      1164243, 1216114, 1268267, 1320703, 1373424, 1426431, 1479725, 1533309, 1587184, 1641352, 1695814, 1750571,
      1805626, 1860979, 1916634, 1972590, 2028850, 2085416, 2142289, 2199471, 2256963, 2314767, 2372886, 2431320,
      2490071, 2549141, 2608532, 2668245, 2728283, 2788646, 2849338, 2910359, 2971711, 3033396, 3095417, 3157774,
      3220470, 3283506, 3346884, 3410607, 3474675, 3539092, 3603858, 3668976, 3734447, 3800274, 3866459, 3933002,
      3999908, 4067176, 4134810, 4202811, 4271181, 4339922, 4409037, 4478527, 4548394, 4618641, 4689269, 4760280,
      4831678, 4903462, 4975637, 5048204, 5121164, 5194521, 5268276, 5342431, 5416990, 5491953, 5567323, 5643102,
      5719293, 5795897, 5872918, 5950356, 6028216, 6106498, 6185205, 6264339, 6343903, 6423899, 6504329, 6585197,
      6666503, 6748251, 6830442, 6913080, 6996167, 7079705, 7163696, 7248144, 7333050, 7418417, 7504247, 7590544,
      7677309, 7764545, 7852255, 7940442, 8029107, 8118253, 8207884, 8298001, 8388608};
  return kEntries[i];
}

// In shared memory a lane reads its own copy, so that lanes with different indices meet in no bank. 16 KiB each.
struct LogTable {
  static constexpr int kCopies = 32;
  uint32_t entry[128][kCopies];  // entry less 512 i, and above 16 bits the way to the next entry

  __host__ __device__ static uint32_t Entry(int i) {
    return (LogEntry(i) - 512 * i) | (LogEntry(i + 1) - LogEntry(i)) << 16;
  }
};
struct ExpTable {
  static constexpr int kCopies = 16;
  uint2 entry[128][kCopies];  // 512 times the entry and 256 to round by; the way to the next entry

  __host__ __device__ static uint2 Entry(int i) {
    return make_uint2(ExpEntry(i) * 512 + 256, ExpEntry(i + 1) - ExpEntry(i));
  }
};

// By all threads of a block, which then need __syncthreads.
template <class Table>
__device__ inline void FillTable(Table* table) {
  for (int i = threadIdx.x; i < 128 * Table::kCopies; i += blockDim.x) {
    table->entry[i / Table::kCopies][i % Table::kCopies] = Table::Entry(i / Table::kCopies);
  }
}

// ---- arithmetic of one group

constexpr int kWidest = 32 << 16, kLastStep = 510;

// log2 with 16 fraction bits and f32's bias, of the f32 bits of a magnitude.
__host__ __device__ __forceinline__ int Log2(const LogTable& table, int copy, uint32_t bits) {
  const uint32_t entry = table.entry[bits >> 16 & 0x7F][copy];
  return static_cast<int>((bits >> 16) * 512 + (entry & 0xFFFF) + (((entry >> 16) * (bits & 0xFFFF) + 0x8000) >> 16));
}

struct LogScale {
  int lmin, range;  // range > 0 where the group can be encoded
};

__host__ __device__ __forceinline__ LogScale LogScaleOf(const LogTable& table, int copy, uint32_t amax, uint32_t amin) {
  const int lmax = Log2(table, copy, amax);
  int lmin = amin == 0 ? 0 : Log2(table, copy, amin);
  lmin = lmin > lmax - kWidest ? lmin : lmax - kWidest;
  lmin = lmin > 1 << 16 ? lmin : 1 << 16;
  return {lmin, lmax - lmin};
}

// code = max(0, 510 (log - lmin) + bias) / range as one product: (max(log - least, 0) * factor + offset) >> shift.
// With b bits in range - 1 and shift >= 2 b + 1 the rounding of factor and offset stays below the 1 / range by which a
// quotient that is no integer falls short of the next one.
struct CodeRule {
  int least;
  uint32_t factor;
  uint64_t offset;
  int shift;
};

__host__ __device__ __forceinline__ int BitLength(uint32_t x) {
#ifdef __CUDA_ARCH__
  return 32 - __clz(x);
#else
  return x == 0 ? 0 : 32 - __builtin_clz(x);
#endif
}

// ceil(510 * 2**shift / range), below 2**32: a quotient of floats, put right by two exact remainders.
__host__ __device__ __forceinline__ uint32_t CodeFactor(int range, int shift) {
  const float inverse = 1.f / static_cast<float>(range);
  const uint64_t numerator = static_cast<uint64_t>(kLastStep) << shift;
  uint32_t quotient = static_cast<uint32_t>(AsFloat((127u + shift) << 23) * kLastStep * inverse);
  int64_t rest = static_cast<int64_t>(numerator - static_cast<uint64_t>(quotient) * static_cast<uint32_t>(range));
  const int more = static_cast<int>(static_cast<float>(rest) * inverse);
  quotient += more;
  rest -= static_cast<int64_t>(more) * range;
  return quotient + (rest > 0) + (rest > range) - (rest <= -range);
}

__host__ __device__ __forceinline__ CodeRule CodeRuleOf(const LogScale& scale) {
  const uint32_t range = scale.range;
  const uint32_t bias = 3 * range / 2 - (range / 64) * (range / 64) / 94180;
  const uint32_t steps = bias / kLastStep, rest = bias % kLastStep;
  const int bits = BitLength(range - 1), shift = 2 * bits + 1 > 20 ? 2 * bits + 1 : 20;
  CodeRule rule;
  rule.least = scale.lmin - static_cast<int>(steps);
  rule.factor = CodeFactor(scale.range, shift);
  rule.shift = shift;
  // rest / 510 of a factor, rounded up: 16449 is 2**23 / 510 rounded up.
  rule.offset = (static_cast<uint64_t>(rule.factor) * (rest * 16449) >> 23) + 1;
  return rule;
}

// value = exp2(lmin + ((code - 1) range + 255) / 510): the exponent times 2**23 is 16 code * step + start.
struct ValueRule {
  uint32_t step;
  uint64_t start;
};

__host__ __device__ __forceinline__ ValueRule ValueRuleOf(const LogScale& scale) {
  const uint32_t range = scale.range;
  const uint32_t step = range * 1028 + (range * 4 + 254) / 255;  // 2**19 range / 510, rounded up
  return {step, ((static_cast<uint64_t>(scale.lmin) << 19) + (1 << 18) - step) << 4};
}

// f32 bits of the value of 16 * code, of no meaning where that is 0.
__host__ __device__ __forceinline__ uint32_t ValueOf(const ExpTable& table, int copy, const ValueRule& rule,
                                                     uint32_t code16) {
  const uint64_t log = static_cast<uint64_t>(code16) * rule.step + rule.start;
  const uint32_t high = static_cast<uint32_t>(log >> 32), low = static_cast<uint32_t>(log) >> 23;
  const uint2 entry = table.entry[high & 0x7F][copy];
  return (high >> 7 << 23) | (entry.x + entry.y * low) >> 9;
}

// ---- a lane: 32 consecutive columns of a row as words, a quarter of a group

template <class T>
struct LogfmtLane {
  static constexpr int kPerWord = Source<T>::kPerWord;
  static constexpr int kWords = kLaneColumns / kPerWord;
  uint32_t x[kWords];

  __host__ __device__ __forceinline__ uint32_t Bits(int column) const {
    float values[2];
    Source<T>::Unpack(x[column / kPerWord], values);
    return AsBits(values[column % kPerWord]);
  }

  // f32 bits of the largest and the smallest magnitude of the first `columns` columns, all of a word or none.
  __host__ __device__ __forceinline__ void Extremes(int columns, uint32_t* amax, uint32_t* amin) const {
    uint32_t max = 0, min = Source<T>::kLargest;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (i * kPerWord >= columns) continue;
      max = Source<T>::Max(max, x[i]);
      min = Source<T>::Min(min, x[i]);
    }
    *amax = Source<T>::Magnitude(max);
    *amin = Source<T>::LesserMagnitude(min);
    if (*amax < kF32MinNormal) *amax = 0;
    if (*amin < kF32MinNormal) *amin = 0;
  }

  // The codes of all 32 columns, ten bits each from the lowest on.
  __host__ __device__ __forceinline__ void Encode(const LogTable& table, int copy, const CodeRule& rule,
                                                  uint32_t (&codes)[kLogfmtLaneWords]) const {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const uint32_t bits = Bits(i), magnitude = bits & 0x7FFFFFFF;
      int log;
      if constexpr (kIsBfloat) {
        log = static_cast<int>((magnitude >> 16) * 512 + (table.entry[magnitude >> 16 & 0x7F][copy] & 0xFFFF));
      } else {
        log = Log2(table, copy, magnitude);
      }
      const uint32_t far = log > rule.least ? log - rule.least : 0;
      uint32_t code = static_cast<uint32_t>((static_cast<uint64_t>(far) * rule.factor + rule.offset) >> rule.shift);
      if (magnitude < kF32MinNormal) code = 0;
      code |= bits >> 22 & 0x200;
      const int begin = 10 * i, word = begin / 32, at = begin % 32;
      if (at == 0) {
        codes[word] = code;
      } else {
        codes[word] |= code << at;
        if (at > 22) codes[word + 1] = code >> (32 - at);
      }
    }
  }

  __host__ __device__ __forceinline__ void Decode(const ExpTable& table, int copy, const ValueRule& rule,
                                                  const uint32_t (&codes)[kLogfmtLaneWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      uint32_t bits[kPerWord];
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        const int begin = 10 * (i * kPerWord + j), word = begin / 32, at = begin % 32;
        uint32_t code = codes[word] >> at;
        if (at > 22) code |= codes[word + 1] << (32 - at);
        const uint32_t code16 = (code & 0x1FF) << 4, sign = code << 22 & 0x80000000;
        const uint32_t value = ValueOf(table, copy, rule, code16);
        bits[j] = (code16 == 0 ? 0 : value) | sign;
      }
      x[i] = Source<T>::Round(bits);
    }
  }

  static constexpr bool kIsBfloat = std::is_same<T, __nv_bfloat16>::value;
};

// Over the four lanes of a group.
__device__ __forceinline__ void GroupExtremes(uint32_t* amax, uint32_t* amin) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    *amax = Greater(*amax, __shfl_xor_sync(~0u, *amax, distance));
    *amin = Lesser(*amin, __shfl_xor_sync(~0u, *amin, distance));
  }
}

// Encodes 1024 columns, lane i columns 32 i on: one piece of 1024 or two of 512 (`piece_columns`). `columns` is how
// many of the lane's 32 are in the row, 0 to 32. Called by one whole warp. True: the lane's piece is encoded; its lane
// has 32 codes of ten bits (zeros past the end of the row), and (amax, amin) of its group as f32 bits that are exact in
// T. False: the piece travels as it is.
template <class T>
__device__ __forceinline__ bool EncodePieces(const LogfmtLane<T>& lane, int columns, int piece_columns,
                                             const LogTable& table, uint32_t (&codes)[kLogfmtLaneWords], uint32_t* amax,
                                             uint32_t* amin) {
  const int id = threadIdx.x % 32;
  lane.Extremes(columns, amax, amin);
  GroupExtremes(amax, amin);
  const LogScale scale = LogScaleOf(table, id, *amax, *amin);
  const bool past_end = __shfl_sync(~0u, columns, id & ~3) <= 0;
  const uint32_t good = __ballot_sync(~0u, past_end || (*amax < kF32One && scale.range > 0));
  const uint32_t piece = piece_columns == kStepColumns ? ~0u : id < 16 ? 0xFFFFu : 0xFFFF0000u;
#pragma unroll
  for (int i = 0; i < kLogfmtLaneWords; ++i) codes[i] = 0;
  if ((good & piece) != piece) return false;
  if (columns > 0) lane.Encode(table, id, CodeRuleOf(scale), codes);
  return true;
}

// The lane's 32 columns of an encoded piece again, from its codes and its group's (amax, amin).
template <class T>
__device__ __forceinline__ LogfmtLane<T> DecodeLane(const uint32_t (&codes)[kLogfmtLaneWords], uint32_t amax,
                                                    uint32_t amin, const LogTable& logs, const ExpTable& exps) {
  const int id = threadIdx.x % 32;
  LogfmtLane<T> lane;
  lane.Decode(exps, id % ExpTable::kCopies, ValueRuleOf(LogScaleOf(logs, id, amax, amin)), codes);
  return lane;
}

}  // namespace jax_ep
