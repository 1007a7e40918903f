// The halves of dispatch: see halves.h for the contract, docs/protocol.md for the order of events.
//
//   stage   x as it is into the own part
//   done    blocks take (chunk, source) after (chunk, source): each row to all its places here; between, zero rows
#include <algorithm>

#include "device/load.h"
#include "dispatch/zero.cuh"
#include "halves/landing.cuh"
#include "halves/push.h"

namespace jax_ep {
namespace {

using DispatchHalf = HalfWork<DispatchParams>;

constexpr int kVectors = 8;  // of 16 bytes that a lane has under way
constexpr int kMaxLocalExperts = 4096;

__global__ void __launch_bounds__(kHalfThreads, 1) StageDispatchKernel(const __grid_constant__ DispatchHalf work) {
  const DispatchParams& p = work.params;
  const LandingLayout& layout = work.layout;
  const ArenaCall call = BeginArenaCall<0>(work.call, kDispatchCached, p.refused);
  KeepBooks(call);
  const bool ready = BeginStage(call, work.slot, work.call.in_flight);
  char* const part = PartOf(call, layout, call.rank, call.rank);
  for (int chunk = blockIdx.x; ready && chunk < layout.num_chunks; chunk += gridDim.x) {
    const int64_t begin = layout.ChunkBegin(chunk), end = layout.ChunkBegin(chunk + 1);
    const auto stage = [&](int64_t offset, const void* from, int64_t bytes) {
      CopyBytes(part + offset + begin * bytes, static_cast<const char*>(from) + begin * bytes, (end - begin) * bytes,
                threadIdx.x, kHalfThreads);
    };
    stage(0, p.rows[0].x, layout.row_bytes);
    stage(layout.second_offset, p.rows[1].x, layout.second_bytes);
    stage(layout.gates_offset, p.topk_weights, layout.gate_bytes);
  }
  LeaveFailed(call, call.failed || (call.takes_part && !ready));
}

// This lane's row of a token, one lane a row.
__device__ __forceinline__ int DistinctRow(const DispatchParams& p, int row) {
  if (p.layout != Layout::kRank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << (threadIdx.x % 32)) - 1)) == 0 ? row : -1;
}

// Bytes [begin, end) of a row, to the rows that lanes name (-1: none).
__device__ __forceinline__ void CopyRow(const RowArray& rows, const char* from, int row, int64_t begin, int64_t end) {
  for (int64_t base = begin + threadIdx.x % 32 * 16; base - threadIdx.x % 32 * 16 < end; base += kVectors * 512) {
    int4 bits[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (base + v * 512 < end) bits[v] = __ldcg(reinterpret_cast<const int4*>(from + base + v * 512));
    }
    for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1) {
      char* const to = rows.recv + __shfl_sync(~0u, row, __ffs(rest) - 1) * rows.row_bytes + base;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (base + v * 512 < end) *reinterpret_cast<int4*>(to + v * 512) = bits[v];
      }
    }
  }
}

// A row of any number of bytes, likewise.
template <class Unit>
__device__ __forceinline__ void CopySmallRow(const RowArray& rows, const char* from, int row) {
  const int num_units = static_cast<int>(rows.row_bytes / sizeof(Unit));
  for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1) {
    char* const to = rows.recv + __shfl_sync(~0u, row, __ffs(rest) - 1) * rows.row_bytes;
    for (int i = threadIdx.x % 32; i < num_units; i += 32)
      reinterpret_cast<Unit*>(to)[i] = __ldcg(reinterpret_cast<const Unit*>(from) + i);
  }
}

// All that `source` has pushed of a chunk's tokens, by a whole block.
__device__ __forceinline__ void LayOutChunk(const DispatchHalf& work, const ArenaCall& call, int source, int chunk) {
  const DispatchParams& p = work.params;
  const LandingLayout& layout = work.layout;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk;
  const int begin = layout.ChunkBegin(chunk), num_units = (layout.ChunkBegin(chunk + 1) - begin) * work.num_groups;
  const char* const part = PartOf(call, layout, call.rank, source);
  const int32_t* const all_here = p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * num_topk;
  const auto load_row = [&](int unit) {
    const int64_t token = begin + unit / work.num_groups;
    return unit < num_units && lane < num_topk ? all_here[token * num_topk + lane] : -1;
  };
  int next_row = load_row(threadIdx.x / 32);
  for (int unit = threadIdx.x / 32; unit < num_units; unit += kHalfWarps) {
    const int here = next_row, group = unit % work.num_groups;
    next_row = load_row(unit + kHalfWarps);
    if (__ballot_sync(~0u, here >= 0) == 0) continue;
    const int64_t token = begin + unit / work.num_groups;
    const int row = DistinctRow(p, here);
    const int64_t first = group * work.group_bytes;
    if (layout.row_bytes > 0) {
      CopyRow(p.rows[0], part + token * layout.row_bytes, row, first, min(first + work.group_bytes, layout.row_bytes));
    }
    if (group != 0) continue;
    const char* const second = part + layout.second_offset + token * layout.second_bytes;
    if (layout.second_bytes % 16 == 0) {
      CopySmallRow<int4>(p.rows[1], second, row);
    } else if (layout.second_bytes % 4 == 0) {
      CopySmallRow<int>(p.rows[1], second, row);
    } else {
      CopySmallRow<char>(p.rows[1], second, row);
    }
    if (p.recv_weights == nullptr) continue;
    const int of_token = __reduce_max_sync(~0u, here);
    if (lane >= num_topk) continue;
    const float gate = __ldcg(reinterpret_cast<const float*>(part + layout.gates_offset) + token * num_topk + lane);
    if (p.layout == Layout::kRank) {
      p.recv_weights[static_cast<int64_t>(of_token) * num_topk + lane] = here >= 0 ? gate : 0.f;
    } else if (here >= 0) {
      p.recv_weights[here] = gate;
    }
  }
}

// A row without a token, by one warp.
__device__ __forceinline__ void WriteZeroRow(const DispatchHalf& work, int64_t row) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, num_choices = p.layout == Layout::kRank ? p.num_topk : 1;
  const int64_t row_bytes = work.layout.row_bytes, second_bytes = work.layout.second_bytes;
  for (int64_t offset = lane * 16; offset < row_bytes; offset += 512)
    *reinterpret_cast<int4*>(p.rows[0].recv + row * row_bytes + offset) = int4{};
  for (int64_t offset = lane; offset < second_bytes; offset += 32) p.rows[1].recv[row * second_bytes + offset] = 0;
  if (p.recv_weights != nullptr && lane < num_choices) p.recv_weights[row * num_choices + lane] = 0.f;
}

__device__ void WriteZeroRows(const DispatchHalf& work, const ZeroRows& zero) {
  const int num_rows = zero.before[zero.num_ranges];
  int range = 0;
  for (int i = blockIdx.x * kHalfWarps + threadIdx.x / 32; i < num_rows; i += gridDim.x * kHalfWarps) {
    while (i >= zero.before[range + 1]) ++range;
    WriteZeroRow(work, zero.first[range] + (i - zero.before[range]));
  }
}

// A routing from before the mask has rows for the tokens of `source` too, which is masked.
__device__ __noinline__ void ClearChunk(const DispatchHalf& work, int source, int chunk) {
  const DispatchParams& p = work.params;
  const int lane = threadIdx.x % 32, end = work.layout.ChunkBegin(chunk + 1);
  const int32_t* const all_here = p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * p.num_topk;
  for (int token = work.layout.ChunkBegin(chunk) + threadIdx.x / 32; token < end; token += kHalfWarps) {
    const int here = lane < p.num_topk ? all_here[static_cast<int64_t>(token) * p.num_topk + lane] : -1;
    const int row = DistinctRow(p, here);
    for (uint32_t rest = __ballot_sync(~0u, row >= 0); rest != 0; rest &= rest - 1)
      WriteZeroRow(work, __shfl_sync(~0u, row, __ffs(rest) - 1));
  }
}

// Results without a token in them, by block `block` of `num_blocks`.
__device__ void ClearResults(const DispatchHalf& work, int block, int num_blocks) {
  const DispatchParams& p = work.params;
  const int64_t thread = static_cast<int64_t>(block) * kHalfThreads + threadIdx.x,
                stride = static_cast<int64_t>(num_blocks) * kHalfThreads, rows = p.max_recv_tokens;
  for (int64_t i = thread; i < rows * (work.layout.row_bytes / 16); i += stride)
    reinterpret_cast<int4*>(p.rows[0].recv)[i] = int4{};
  for (int64_t i = thread; i < rows * work.layout.second_bytes; i += stride) p.rows[1].recv[i] = 0;
  const int64_t num_gates = p.recv_weights != nullptr ? rows * (p.layout == Layout::kRank ? p.num_topk : 1) : 0;
  for (int64_t i = thread; i < num_gates; i += stride) p.recv_weights[i] = 0.f;
}

__global__ void __launch_bounds__(kHalfThreads, 1) DispatchDoneKernel(const __grid_constant__ DispatchHalf work) {
  extern __shared__ __align__(16) int32_t shared[];
  const DispatchParams& p = work.params;
  const LandingLayout& layout = work.layout;
  const ArenaCall call = BeginArenaCall<0>(work.call, kDispatchCached, p.refused);
  const int warp = threadIdx.x / 32, num_local = p.num_experts / call.num_ranks, num_peers = call.num_ranks - 1;
  DispatchPlan plan{};
  plan.params = p;
  const ZeroRows zero(plan, reinterpret_cast<char*>(shared), call.num_ranks);
  KeepBooks(call);
  bool came = call.takes_part;
  if (came) {
    // Own rows were staged by a kernel before this one.
    for (int chunk = blockIdx.x; chunk < layout.num_chunks; chunk += gridDim.x)
      LayOutChunk(work, call, call.rank, chunk);
    if (warp == 0) FindZeroRows(plan, p.counts, p.counts[num_local], zero);
    __syncthreads();
    WriteZeroRows(work, zero);
    for (int i = blockIdx.x; came && i < layout.num_chunks * num_peers; i += gridDim.x) {
      // In the order in which they come: a rank pushes to its successor first.
      const int source = (call.rank + num_peers - i % num_peers) % call.num_ranks, chunk = i / num_peers;
      if (!call.Reaches(source)) {
        ClearChunk(work, source, chunk);
        continue;
      }
      came = __syncthreads_and(warp != 0 || AwaitArrived(call, layout, source, chunk));
      if (came) LayOutChunk(work, call, source, chunk);
    }
    came = came && WasKept(call);
  }
  if (!call.takes_part && !call.failed) ClearResults(work, blockIdx.x, gridDim.x);
  AckRead(call);
  if (LeaveFailed(call, call.failed || (call.takes_part && !came))) ClearResults(work, 0, 1);
}

DispatchHalf MakeWork(const DispatchParams& p, int num_ranks) {
  DispatchHalf work{};
  work.params = p;
  const int64_t row_bytes = p.num_row_arrays > 0 ? p.rows[0].row_bytes : 0,
                second_bytes = p.num_row_arrays > 1 ? p.rows[1].row_bytes : 0;
  const bool has_gates = p.topk_weights != nullptr || p.recv_weights != nullptr;
  work.layout = MakeLandingLayout(num_ranks, p.num_tokens, p.num_topk, row_bytes, second_bytes, has_gates, false);
  CutRows(work.layout, 1, &work.num_groups, &work.group_bytes);
  return work;
}

int NumBlocks(int64_t wanted, const HalvesConfig& config) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, config.num_sms)));
}

}  // namespace

int64_t DispatchLandingBytes(const DispatchParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.num_experts / num_ranks > kMaxLocalExperts) return 0;
  if (p.max_recv_tokens <= 0 || p.num_tokens <= 0 || p.num_row_arrays > kMaxRowArrays) return 0;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return 0;
  if (p.num_row_arrays > 0 && (p.rows[0].row_bytes % 16 != 0 || p.rows[0].row_bytes <= 0)) return 0;
  for (int i = 0; i < p.num_row_arrays; ++i) {
    if (p.rows[i].row_bytes >= 1 << 30) return 0;
  }
  return MakeWork(p, num_ranks).layout.window_bytes();
}

cudaError_t LaunchDispatchStart(const DispatchParams& params, const HalfParams& half, const Fork& fork,
                                const HalvesConfig& config, cudaStream_t stream) {
  DispatchHalf work = MakeWork(params, half.arenas.num_ranks);
  work.call = {half.arenas, Half::kStart, half.in_flight};
  work.slot = fork.slot;
  StageDispatchKernel<<<NumBlocks(work.layout.num_chunks, config), kHalfThreads, 0, stream>>>(work);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  ++*fork.count;
  return Push(half, work.layout, fork, stream);
}

cudaError_t LaunchDispatchDone(const DispatchParams& params, const HalfParams& half, const HalvesConfig& config,
                               cudaStream_t stream) {
  DispatchHalf work = MakeWork(params, half.arenas.num_ranks);
  work.call = {half.arenas, Half::kDone, half.in_flight};
  const int64_t chunks = static_cast<int64_t>(work.layout.num_chunks) * half.arenas.num_ranks;
  const int64_t zero_blocks = DivideUp(params.max_recv_tokens, kHalfWarps);
  const int num_local = params.num_experts / half.arenas.num_ranks;
  DispatchDoneKernel<<<NumBlocks(std::max(chunks, zero_blocks), config), kHalfThreads, (2 * num_local + 3) * 4,
                       stream>>>(work);
  return cudaGetLastError();
}

cudaError_t LoadDispatchHalves() {
  if (cudaError_t error = LoadKernel(StageDispatchKernel); error != cudaSuccess) return error;
  return LoadKernel(DispatchDoneKernel);
}

}  // namespace jax_ep
