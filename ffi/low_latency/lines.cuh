// Lines: 128 bytes that eight lanes of a warp move in one instruction, 120 of them payload, the last 8 the epoch of the
// call. Such a store over NVLink and such a load are not torn, which NCCL's LL128 rests on as well: a line whose epoch
// is right is there as a whole. So nothing is fenced, and nothing need be cleared: epochs only grow.
//
// A record of n lines holds bytes [0, 112 n) in the first seven lanes of its lines, [112 n, 120 n) in the eighth: so
// that 16 bytes of a row stay 16 aligned bytes. Four lines are a group, one instruction of a warp.
#pragma once

#include "low_latency/call.cuh"

namespace jax_ep {

constexpr int kGroupLines = 4, kGroupBytes = kGroupLines * kLineBytes;

__device__ __forceinline__ bool IsTail() { return threadIdx.x % 8 == 7; }
__device__ __forceinline__ int LineInGroup() { return threadIdx.x % 32 / 8; }

// Where this lane's bytes of a line belong in a record of `num_lines`: 16 of them, 8 in the tail.
__device__ __forceinline__ int UnitOffset(int num_lines, int line) {
  return IsTail() ? num_lines * kLineMain + line * 8 : line * kLineMain + static_cast<int>(threadIdx.x % 8) * 16;
}

// 16 bytes at `offset`, or in the low half the 8 bytes at an offset that is an odd multiple of 8. A row is a multiple
// of 16 bytes, so all lanes load alike. From global memory, or kAnywhere.
template <bool kAnywhere = false>
__device__ __forceinline__ uint4 LoadUnit(const char* row, int64_t offset) {
  const auto* const place = reinterpret_cast<const uint4*>(row + (offset & ~15ll));
  uint4 bits = kAnywhere ? *place : __ldcg(place);
  if ((offset & 8) != 0) bits.x = bits.z, bits.y = bits.w;
  return bits;
}

__device__ __forceinline__ void StoreUnit(char* place, const uint4& bits) {
  if (IsTail()) {
    *reinterpret_cast<uint2*>(place) = make_uint2(bits.x, bits.y);
  } else {
    *reinterpret_cast<uint4*>(place) = bits;
  }
}

__device__ __forceinline__ uint64_t EpochIn(const uint4& bits) { return static_cast<uint64_t>(bits.w) << 32 | bits.z; }

// Makes lines of what the lanes hold, by one whole warp, whose lanes then store together.
template <int N>
__device__ __forceinline__ void SetEpoch(const ArenaCall& call, uint4 (&bits)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    bits[i].z = IsTail() ? static_cast<uint32_t>(call.epoch) : bits[i].z;
    bits[i].w = IsTail() ? static_cast<uint32_t>(call.epoch >> 32) : bits[i].w;
  }
  __syncwarp();
}

// A first look at N groups of lines, without waiting; a lane's `place` is null where it has no line. Called by one
// whole warp, as what follows.
template <int N>
__device__ __forceinline__ void LookForLines(const char* const (&place)[N], uint4 (&bits)[N]) {
  __syncwarp();  // the lanes of a line load together
#pragma unroll
  for (int i = 0; i < N; ++i) bits[i] = place[i] != nullptr ? LoadLine(place[i]) : uint4{};
}

// Waits for those that were not there. `peer_of(i)` sent group i; `item` is what an error names as the lane. False:
// they will not come.
template <int N, class PeerOf>
__device__ __forceinline__ bool AwaitLines(const ArenaCall& call, const char* const (&place)[N], uint4 (&bits)[N],
                                           const PeerOf& peer_of, int item) {
  const auto lacks = [&](int i) { return IsTail() && place[i] != nullptr && EpochIn(bits[i]) != call.epoch; };
  Patience patience;
  while (true) {
    uint32_t missing = 0;
    uint64_t seen = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t lanes = __ballot_sync(~0u, lacks(i));
      if (lanes == 0) continue;
      if (missing == 0) seen = __shfl_sync(~0u, EpochIn(bits[i]), __ffs(lanes) - 1);
      missing |= 1u << i;
    }
    if (missing == 0) return true;
    if (!patience.WaitOn(call, kLines, peer_of(__ffs(missing) - 1), item, call.Tag(kPosted), seen)) return false;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((missing >> i & 1) != 0 && place[i] != nullptr) bits[i] = LoadLine(place[i]);
    }
  }
}

template <int N, class PeerOf>
__device__ __forceinline__ bool ReceiveLines(const ArenaCall& call, const char* const (&place)[N], uint4 (&bits)[N],
                                             const PeerOf& peer_of, int item) {
  LookForLines(place, bits);
  return AwaitLines(call, place, bits, peer_of, item);
}

// ---- how a rank's work is cut: a unit is a piece of one record, 1 to kMaxGroups groups

constexpr int kMaxGroups = 4;

struct Cut {
  int groups;  // of a piece
  int pieces;  // of a record

  __host__ __device__ int lines() const { return groups * kGroupLines; }
};

// Long pieces have more loads in flight; few tokens need short ones to busy enough warps.
inline Cut CutRecord(int record_lines, int64_t num_tokens) {
  int groups = kMaxGroups;
  while (groups > 1 && num_tokens * DivideUp(record_lines, groups * kGroupLines) < 256) groups /= 2;
  return {groups, static_cast<int>(DivideUp(record_lines, groups * kGroupLines))};
}

}  // namespace jax_ep
