// The halves of combine: see halves.h for the contract, docs/protocol.md for the order of events.
//
//   stage   this rank's sum of each token of each rank into the part that goes there
//   done    blocks take chunk after chunk: of own tokens the sum over the parts, in rank order
#include <algorithm>

#include "combine/clear.cuh"
#include "combine/row_sum.cuh"
#include "device/load.h"
#include "halves/landing.cuh"
#include "halves/push.h"

namespace jax_ep {
namespace {

using CombineHalf = HalfWork<CombineParams>;

// The row that a choice names here; of layout "rank" each row in one lane only.
__device__ __forceinline__ int DistinctRow(const CombineParams& p, int row) {
  if (!p.one_row_a_rank) return row;
  const uint32_t same = __match_any_sync(~0u, row);
  return (same & ((1u << (threadIdx.x % 32)) - 1)) == 0 ? row : -1;
}

__device__ __forceinline__ const int32_t* HereOf(const CombineParams& p, int rank, int64_t token) {
  return p.recv_slot + (static_cast<int64_t>(rank) * p.num_tokens + token) * p.num_topk;
}

template <class T, bool kWeighted>
__device__ __forceinline__ void StageSums(const CombineHalf& work, const ArenaCall& call, int begin, int end) {
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_ranks = call.num_ranks, num_groups = work.num_groups;
  const int num_units = (end - begin) * num_ranks * num_groups;
  const auto rank_of = [&](int unit) { return (call.rank + 1 + unit / num_groups % num_ranks) % num_ranks; };
  const auto token_of = [&](int unit) { return begin + unit / num_groups / num_ranks; };
  const auto load_row = [&](int unit) {
    return unit < num_units && lane < p.num_topk ? HereOf(p, rank_of(unit), token_of(unit))[lane] : -1;
  };
  int next_row = load_row(threadIdx.x / 32);
  for (int unit = threadIdx.x / 32; unit < num_units; unit += kHalfWarps) {
    const int row = DistinctRow(p, next_row);
    next_row = load_row(unit + kHalfWarps);
    Rows rows{__ballot_sync(~0u, row >= 0), p.y + row * p.row_bytes, 1.f, 0};
    if (rows.holders == 0) continue;
    if (kWeighted && row >= 0) rows.weight = p.weights[row];
    const int64_t first = unit % num_groups * work.group_bytes;
    rows.end = min(first + work.group_bytes, p.row_bytes);
    char* const part = PartOf(call, work.layout, call.rank, work.layout.OutPart(call.rank, rank_of(unit)));
    SumRows<T, kWeighted>(rows, first, part + token_of(unit) * p.row_bytes, false);
  }
}

// What is carried back to each choice that has its row here.
__device__ __forceinline__ void StageCarried(const CombineHalf& work, const ArenaCall& call, int begin, int end) {
  const CombineParams& p = work.params;
  const int num_choices = (end - begin) * p.num_topk;
  for (int rank = 0; rank < call.num_ranks; ++rank) {
    const int part = work.layout.OutPart(call.rank, rank);
    auto* const gates = reinterpret_cast<float*>(PartOf(call, work.layout, call.rank, part) + work.layout.gates_offset);
    for (int i = threadIdx.x; i < num_choices; i += kHalfThreads) {
      const int64_t choice = static_cast<int64_t>(begin) * p.num_topk + i;
      const int row = HereOf(p, rank, 0)[choice];
      const int64_t place = p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + choice % p.num_topk : row;
      gates[choice] = row >= 0 ? p.carried[place] : 0.f;
    }
  }
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kHalfThreads, 1) StageCombineKernel(const __grid_constant__ CombineHalf work) {
  const LandingLayout& layout = work.layout;
  const ArenaCall call = BeginArenaCall<0>(work.call, kCombine, work.params.refused);
  KeepBooks(call);
  const bool ready = BeginStage(call, work.slot, work.call.in_flight);
  for (int chunk = blockIdx.x; ready && chunk < layout.num_chunks; chunk += gridDim.x) {
    const int begin = layout.ChunkBegin(chunk), end = layout.ChunkBegin(chunk + 1);
    if (layout.gate_bytes > 0) StageCarried(work, call, begin, end);
    if (layout.row_bytes > 0) StageSums<T, kWeighted>(work, call, begin, end);
  }
  LeaveFailed(call, call.failed || (call.takes_part && !ready));
}

template <class T>
__device__ __forceinline__ void SumChunk(const CombineHalf& work, const ArenaCall& call, int begin, int end) {
  const CombineParams& p = work.params;
  const int lane = threadIdx.x % 32, num_groups = work.num_groups, num_units = (end - begin) * num_groups;
  const char* const part = PartOf(call, work.layout, call.rank, lane < call.num_ranks ? lane : 0);
  const auto load_slot = [&](int unit) {
    const int64_t token = begin + unit / num_groups;
    return unit < num_units && lane < p.num_topk ? p.slot[token * p.num_topk + lane] : -1;
  };
  int next_slot = load_slot(threadIdx.x / 32);
  for (int unit = threadIdx.x / 32; unit < num_units; unit += kHalfWarps) {
    const int slot = next_slot;
    next_slot = load_slot(unit + kHalfWarps);
    const int64_t token = begin + unit / num_groups, first = unit % num_groups * work.group_bytes;
    const uint32_t ranks = __reduce_or_sync(~0u, slot >= 0 ? 1u << (slot / p.max_recv_tokens) : 0u) & ~call.dead;
    const Rows rows{ranks, part + token * p.row_bytes, 1.f, min(first + work.group_bytes, p.row_bytes)};
    SumOrClear<T, false>(rows, first, p.out + token * p.row_bytes, false);
  }
}

__device__ __forceinline__ void TakeCarried(const CombineHalf& work, const ArenaCall& call, int begin, int end) {
  const CombineParams& p = work.params;
  for (int i = threadIdx.x; i < (end - begin) * p.num_topk; i += kHalfThreads) {
    const int64_t choice = static_cast<int64_t>(begin) * p.num_topk + i;
    const int named = p.slot[choice], slot = named >= 0 && call.Reaches(named / p.max_recv_tokens) ? named : -1;
    const char* const part = PartOf(call, work.layout, call.rank, slot >= 0 ? slot / p.max_recv_tokens : 0);
    const auto* const gates = reinterpret_cast<const float*>(part + work.layout.gates_offset);
    p.carried_back[choice] = slot >= 0 ? __ldcg(gates + choice) : 0.f;
  }
}

__device__ void ClearResults(const CombineHalf& work, int block, int num_blocks) {
  ClearResults(work.params, block * kHalfThreads + threadIdx.x, num_blocks * kHalfThreads);
}

template <class T>
__global__ void __launch_bounds__(kHalfThreads, 1) CombineDoneKernel(const __grid_constant__ CombineHalf work) {
  const LandingLayout& layout = work.layout;
  const ArenaCall call = BeginArenaCall<0>(work.call, kCombine, work.params.refused);
  const int warp = threadIdx.x / 32;
  KeepBooks(call);
  bool came = call.takes_part;
  for (int chunk = blockIdx.x; came && chunk < layout.num_chunks; chunk += gridDim.x) {
    // Warp s waits for rank s; own sums were staged by a kernel before this one.
    for (int source = warp; source < call.num_ranks; source += kHalfWarps)
      came = came && (source == call.rank || !call.Reaches(source) || AwaitArrived(call, layout, source, chunk));
    came = __syncthreads_and(came);
    if (!came) break;
    const int begin = layout.ChunkBegin(chunk), end = layout.ChunkBegin(chunk + 1);
    if (layout.row_bytes > 0) SumChunk<T>(work, call, begin, end);
    if (work.params.carried_back != nullptr) TakeCarried(work, call, begin, end);
  }
  came = came && WasKept(call);
  if (!call.takes_part && !call.failed) ClearResults(work, blockIdx.x, gridDim.x);
  AckRead(call);
  if (LeaveFailed(call, call.failed || (call.takes_part && !came))) ClearResults(work, 0, 1);
}

using Kernel = void (*)(CombineHalf);

template <class T>
Kernel StageFor(bool weighted) {
  return weighted ? StageCombineKernel<T, true> : StageCombineKernel<T, false>;
}

Kernel StageFor(RowDtype dtype, bool weighted) {
  if (dtype == RowDtype::kBfloat16) return StageFor<__nv_bfloat16>(weighted);
  if (dtype == RowDtype::kFloat16) return StageFor<__half>(weighted);
  return StageFor<float>(weighted);
}

Kernel DoneFor(RowDtype dtype) {
  if (dtype == RowDtype::kBfloat16) return CombineDoneKernel<__nv_bfloat16>;
  if (dtype == RowDtype::kFloat16) return CombineDoneKernel<__half>;
  return CombineDoneKernel<float>;
}

CombineHalf MakeWork(const CombineParams& p, int num_ranks, int64_t num_sources) {
  CombineHalf work{};
  work.params = p;
  const bool has_carried = p.carried != nullptr || p.carried_back != nullptr;
  work.layout = MakeLandingLayout(num_ranks, p.num_tokens, p.num_topk, p.row_bytes, 0, has_carried, true);
  CutRows(work.layout, num_sources, &work.num_groups, &work.group_bytes);
  return work;
}

int NumBlocks(const CombineHalf& work, const HalvesConfig& config) {
  return std::max(1, std::min(work.layout.num_chunks, config.num_sms));
}

}  // namespace

int64_t CombineLandingBytes(const CombineParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.row_bytes % 16 != 0 || p.row_bytes >= 1 << 30) return 0;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return 0;
  if (p.max_recv_tokens <= 0 || p.num_tokens <= 0) return 0;
  return MakeWork(p, num_ranks, num_ranks).layout.window_bytes();
}

cudaError_t LaunchCombineStart(const CombineParams& params, const HalfParams& half, const Fork& fork,
                               const HalvesConfig& config, cudaStream_t stream) {
  CombineHalf work = MakeWork(params, half.arenas.num_ranks, half.arenas.num_ranks);
  work.call = {half.arenas, Half::kStart, half.in_flight};
  work.slot = fork.slot;
  const Kernel kernel = StageFor(params.dtype, params.weights != nullptr);
  kernel<<<NumBlocks(work, config), kHalfThreads, 0, stream>>>(work);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  ++*fork.count;
  return Push(half, work.layout, fork, stream);
}

cudaError_t LaunchCombineDone(const CombineParams& params, const HalfParams& half, const HalvesConfig& config,
                              cudaStream_t stream) {
  CombineHalf work = MakeWork(params, half.arenas.num_ranks, 1);
  work.call = {half.arenas, Half::kDone, half.in_flight};
  const Kernel kernel = DoneFor(params.dtype);
  kernel<<<NumBlocks(work, config), kHalfThreads, 0, stream>>>(work);
  return cudaGetLastError();
}

cudaError_t LoadCombineHalves() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (bool weighted : {false, true}) {
      if (cudaError_t error = LoadKernel(StageFor(dtype, weighted)); error != cudaSuccess) return error;
    }
    if (cudaError_t error = LoadKernel(DoneFor(dtype)); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
