// A rank's sum of a token as lines of LogFMT-10, a step of 1024 columns at a time: lane i of a warp keeps columns 32 i
// to 32 i + 31 from the sum to the result, and packs and unpacks without shared memory. Neighbours: device/logfmt.cuh
// has the codes, lines.cuh the lines.
//
// A step takes kCodedGroups groups of four lines if it is encoded, else kRawGroups. Line l of each group is of lanes
// 8 l to 8 l + 7, 256 columns, which are encoded together or not at all: so it says itself which.
//
//   group      lane 0 .. 6 of a line, 16 bytes                                      lane 7, 8 bytes
//   0 (coded)  codes 8, 9, and: lane 0, 1  codes 6, 7 / 8, 9 of lane 7              codes 0, 1
//                               lane 2, 4  amax, amin of the first / second group
//                               lane 5     1
//   1 (coded)  codes 0 .. 3                                                         codes 2, 3
//   2 (coded)  codes 4 .. 7                                                         codes 4, 5
//   0 (raw)    lanes 0 ..: what lane 7 has no room for; lane 5: 0                   -
//   1 .. (raw) words 4 (group - 1) on                                               words 2 (group - 1) on
#pragma once

#include "device/logfmt.cuh"
#include "low_latency/lines.cuh"

namespace jax_ep {

constexpr int kCodedGroups = 3;
template <class T>
constexpr int kRawGroups = 1 + LogfmtLane<T>::kWords / 4;

inline int LogfmtSteps(int64_t hidden) { return static_cast<int>(DivideUp(hidden, kStepColumns)); }
inline int LogfmtRecordLines(int64_t hidden, int item_bytes) {
  return LogfmtSteps(hidden) * kGroupLines * (1 + kLaneColumns * item_bytes / 16);
}

// `value` of the lane of this line whose place is `place`.
__device__ __forceinline__ uint32_t OfPlace(uint32_t value, int place) {
  return __shfl_sync(~0u, value, (threadIdx.x & 24) | place);
}

// Called by one whole warp; the epochs are set later.
__device__ __forceinline__ void PackCodes(const uint32_t (&codes)[kLogfmtLaneWords], uint32_t amax, uint32_t amin,
                                          uint4 (&bits)[kCodedGroups]) {
  const int place = threadIdx.x % 8;
  uint32_t rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rest[i] = OfPlace(codes[6 + i], 7);
  const uint32_t third = place == 0 ? rest[0] : place == 1 ? rest[2] : place == 5 ? 1 : amax;
  const uint32_t fourth = place == 0 ? rest[1] : place == 1 ? rest[3] : place == 5 ? 0 : amin;
  bits[0] = IsTail() ? make_uint4(codes[0], codes[1], 0, 0) : make_uint4(codes[8], codes[9], third, fourth);
  bits[1] = IsTail() ? make_uint4(codes[2], codes[3], 0, 0) : make_uint4(codes[0], codes[1], codes[2], codes[3]);
  bits[2] = IsTail() ? make_uint4(codes[4], codes[5], 0, 0) : make_uint4(codes[4], codes[5], codes[6], codes[7]);
}

__device__ __forceinline__ bool IsCoded(const uint4& first) { return OfPlace(first.z, 5) == 1; }

__device__ __forceinline__ void UnpackCodes(const uint4 (&bits)[kCodedGroups], uint32_t (&codes)[kLogfmtLaneWords],
                                            uint32_t* amax, uint32_t* amin) {
  const uint32_t rest[4] = {OfPlace(bits[0].z, 0), OfPlace(bits[0].w, 0), OfPlace(bits[0].z, 1), OfPlace(bits[0].w, 1)};
  const int scale_place = threadIdx.x % 8 < 4 ? 2 : 4;
  *amax = OfPlace(bits[0].z, scale_place), *amin = OfPlace(bits[0].w, scale_place);
  codes[0] = IsTail() ? bits[0].x : bits[1].x, codes[1] = IsTail() ? bits[0].y : bits[1].y;
  codes[2] = IsTail() ? bits[1].x : bits[1].z, codes[3] = IsTail() ? bits[1].y : bits[1].w;
  codes[4] = bits[2].x, codes[5] = bits[2].y;
  codes[6] = IsTail() ? rest[0] : bits[2].z, codes[7] = IsTail() ? rest[1] : bits[2].w;
  codes[8] = IsTail() ? rest[2] : bits[0].x, codes[9] = IsTail() ? rest[3] : bits[0].y;
}

template <class T>
__device__ __forceinline__ uint4 PackRawFirst(const LogfmtLane<T>& lane) {
  constexpr int kWords = LogfmtLane<T>::kWords;
  const int place = threadIdx.x % 8;
  uint4 bits{};
#pragma unroll
  for (int i = 0; i < kWords / 8; ++i) {
    const uint4 rest =
        make_uint4(OfPlace(lane.x[kWords / 2 + 4 * i], 7), OfPlace(lane.x[kWords / 2 + 4 * i + 1], 7),
                   OfPlace(lane.x[kWords / 2 + 4 * i + 2], 7), OfPlace(lane.x[kWords / 2 + 4 * i + 3], 7));
    if (place == i) bits = rest;
  }
  return bits;
}

template <class T>
__device__ __forceinline__ void UnpackRawFirst(const uint4& first, LogfmtLane<T>& lane) {
  constexpr int kWords = LogfmtLane<T>::kWords;
#pragma unroll
  for (int i = 0; i < kWords / 8; ++i) {
    const uint32_t rest[4] = {OfPlace(first.x, i), OfPlace(first.y, i), OfPlace(first.z, i), OfPlace(first.w, i)};
#pragma unroll
    for (int j = 0; j < 4; ++j) lane.x[kWords / 2 + 4 * i + j] = IsTail() ? rest[j] : lane.x[kWords / 2 + 4 * i + j];
  }
}

// Groups 1 on; `i` is the group less 1.
template <class T>
__device__ __forceinline__ uint4 PackRaw(const LogfmtLane<T>& lane, int i) {
  return IsTail() ? make_uint4(lane.x[2 * i], lane.x[2 * i + 1], 0, 0)
                  : make_uint4(lane.x[4 * i], lane.x[4 * i + 1], lane.x[4 * i + 2], lane.x[4 * i + 3]);
}

template <class T>
__device__ __forceinline__ void UnpackRaw(const uint4& bits, int i, LogfmtLane<T>& lane) {
  lane.x[2 * i] = IsTail() ? bits.x : lane.x[2 * i], lane.x[2 * i + 1] = IsTail() ? bits.y : lane.x[2 * i + 1];
  lane.x[4 * i] = IsTail() ? lane.x[4 * i] : bits.x, lane.x[4 * i + 1] = IsTail() ? lane.x[4 * i + 1] : bits.y;
  lane.x[4 * i + 2] = IsTail() ? lane.x[4 * i + 2] : bits.z, lane.x[4 * i + 3] = IsTail() ? lane.x[4 * i + 3] : bits.w;
}

}  // namespace jax_ep
