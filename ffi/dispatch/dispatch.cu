// The dispatch kernel and its launcher: see dispatch.h for the contract, docs/protocol.md for the order of events.
//
//   blocks < num_send_blocks   warps 0, 1 send; warp 2 publishes and leaves; warps 3.. copy
//   other blocks               all warps copy
#include <algorithm>

#include "dispatch/copy.cuh"
#include "dispatch/notify.cuh"
#include "dispatch/send.cuh"

namespace jax_ep {
namespace {

constexpr int kMaxSendPiece = 14336, kMaxCopyPiece = 8192, kMaxZeroBytes = 4096;
constexpr int64_t kMaxDynamicShared = 232448 - 12288;  // a block's limit less the static part

__device__ void ClearResults(const DispatchPlan& plan, const Call& call) {
  const DispatchParams& p = plan.params;
  const auto clear = [](void* bytes, int64_t num_bytes, int value) {
    for (int64_t i = threadIdx.x; i < num_bytes / 4; i += kDispatchThreads) static_cast<int32_t*>(bytes)[i] = value;
    if (threadIdx.x < num_bytes % 4) static_cast<char*>(bytes)[num_bytes / 4 * 4 + threadIdx.x] = 0;
  };
  const int64_t rows = p.max_recv_tokens, choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  for (int i = 0; i < p.num_row_arrays; ++i) clear(p.rows[i].recv, rows * p.rows[i].row_bytes, 0);
  const int64_t choices_per_row = p.layout == Layout::kRank ? p.num_topk : 1;
  if (p.recv_weights != nullptr) clear(p.recv_weights, rows * choices_per_row * 4, 0);
  if (p.operation == kDispatchCached) return;
  clear(p.slot, choices * 4, -1);
  clear(p.recv_slot, call.num_ranks * choices * 4, -1);
  clear(p.counts, (p.num_experts / call.num_ranks + 1) * 4, 0);
  if (p.recv_topk_idx != nullptr) clear(p.recv_topk_idx, rows * p.num_topk * 4, -1);
}

// The gates of this block's tokens along a known routing.
__device__ void SendCachedWeights(const DispatchPlan& plan, const Call& call, const DispatchShared& shared) {
  const DispatchParams& p = plan.params;
  const int num_topk = p.num_topk, capacity = p.max_recv_tokens;
  const int begin = plan.TokenBegin(kSendWarps * blockIdx.x), end = plan.TokenBegin(kSendWarps * (blockIdx.x + 1));
  for (int i = begin * num_topk + threadIdx.x; i < end * num_topk; i += kDispatchThreads) {
    const int slot = p.slot[i], rank = slot >= 0 ? slot / capacity : -1, first = i / num_topk * num_topk;
    const float weight = p.topk_weights[i];
    if (p.layout != Layout::kRank) {
      if (slot >= 0 && call.Reaches(rank))
        reinterpret_cast<float*>(shared.address[rank][kRecvWeights])[slot % capacity] = weight;
      continue;
    }
    // Column k of each row that the token has: the gate on the rank of choice k, zero on the others.
    for (int k = 0; k < num_topk; ++k) {
      const int other = p.slot[first + k];
      if (other < 0 || !call.Reaches(other / capacity)) continue;
      float* row = reinterpret_cast<float*>(shared.address[other / capacity][kRecvWeights]) +
                   static_cast<int64_t>(other % capacity) * num_topk;
      row[i - first] = other == slot ? weight : 0.f;
    }
  }
}

__global__ void __launch_bounds__(kDispatchThreads, 1) DispatchKernel(const __grid_constant__ DispatchPlan plan) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ DispatchShared shared;
  const DispatchParams& p = plan.params;
  const Call call = BeginCall(p.group, p.operation);
  const int block = blockIdx.x, warp = threadIdx.x / 32;
  const bool sends = block < plan.num_send_blocks, cached = p.operation == kDispatchCached;
  char* const send_stages = dynamic + plan.stages_offset;
  char* const copy_stages = send_stages + (sends ? kSendWarps * plan.send.stages * plan.send.stride : 0);
  const NotifyShared notify(plan, copy_stages, call.num_ranks);
  const ZeroRows zero(plan, dynamic + plan.zero_rows_offset, call.num_ranks);

  for (int i = threadIdx.x; i < plan.zero_bytes / 16; i += kDispatchThreads)
    reinterpret_cast<int4*>(dynamic)[i] = int4{};
  if (threadIdx.x < kSendWarps) shared.sent[threadIdx.x] = kPosted;
  for (int i = threadIdx.x; i < kSendWarps * kMaxSendStages; i += kDispatchThreads)
    InitMbarrier(&shared.send_full[0][0] + i);
  for (int i = threadIdx.x; i < kDispatchWarps * kMaxCopyStages; i += kDispatchThreads)
    InitMbarrier(&shared.copy_full[0][0] + i);
  FenceMbarrierInit();
  if (p.refused && threadIdx.x == 0) Refuse(call);
  const bool takes_part = __syncthreads_and(!p.refused && !HasFailed(call) && !call.IsDead(call.rank));

  if (sends && takes_part) {
    if (!cached) CountTokens(plan, call, notify);
    if (call.Reaches(threadIdx.x)) {
      Mail* mail = &call.Peer(threadIdx.x)->mail[call.parity][call.rank][block];
      mail->address[kRecvRows] = reinterpret_cast<uint64_t>(p.rows[0].recv);
      mail->address[kRecvRows1] = reinterpret_cast<uint64_t>(p.rows[1].recv);
      mail->address[kRecvWeights] = reinterpret_cast<uint64_t>(p.recv_weights);
      mail->address[kRecvSlot] = reinterpret_cast<uint64_t>(p.recv_slot);
      mail->address[kRecvTopkIdx] = reinterpret_cast<uint64_t>(p.recv_topk_idx);
    }
    __syncthreads();
    if (warp == 0) Post(call, block);
  }
  bool met = takes_part;
  if (met && (sends || !cached)) met = Meet(plan, call, shared);
  if (met && !cached) {
    __syncthreads();
    PlaceExperts(plan, call, notify);
    if (warp == 0) {
      const int num_local = p.num_experts / call.num_ranks;
      const int rows_wanted = p.layout == Layout::kRank ? notify.total[p.num_experts + call.rank] : 0;
      FindZeroRows(plan, notify.total + call.rank * num_local, rows_wanted, zero);
    }
    if (sends && call.dead != 0) ForgetDeadSources(plan, call);
    if (sends && p.layout == Layout::kRank) WriteRankSlots(plan, call, notify, shared);
    if (sends && p.layout != Layout::kRank) WriteExpertSlots(plan, call, notify, shared);
  } else if (met) {
    __syncthreads();
    if (warp == 0) FindZeroRows(plan, p.counts, p.counts[zero.num_ranges - 1], zero);
    if (sends && p.topk_weights != nullptr) SendCachedWeights(plan, call, shared);
  }
  if (!met && threadIdx.x < kSendWarps) shared.sent[threadIdx.x] = kGone;
  FenceProxyAsyncShared();  // zeros are read, and the copiers' stages filled, by bulk copies
  __syncthreads();

  if (sends && warp < kSendWarps) {
    if (met && p.num_row_arrays > 0) {
      SendRows(plan, call, shared, send_stages);
    } else if (met && threadIdx.x % 32 == 0) {
      StoreReleaseShared(&shared.sent[warp], kDone);
    }
  } else if (sends && warp == kPublishWarp) {
    Publish(plan, call, shared);
  } else if (met) {
    const int copy_warp = sends ? warp - kFirstCopyWarp : warp, per_send_block = kDispatchWarps - kFirstCopyWarp;
    const int index =
        sends ? block * per_send_block + copy_warp
              : plan.num_send_blocks * per_send_block + (block - plan.num_send_blocks) * kDispatchWarps + copy_warp;
    CopyRows(plan, call, shared, zero, dynamic, copy_stages, copy_warp, index);
  }
  if (IsLastBlock(call)) {
    if (HasFailed(call) || call.IsDead(call.rank)) ClearResults(plan, call);
    EndCall(call);
  }
}

int RoundUp(int64_t value, int to) { return static_cast<int>((value + to - 1) / to * to); }

// Rows in pieces of at most `limit` bytes, as many stages as fit into `bytes`.
Pieces Split(int64_t row_bytes, int64_t second_bytes, int limit, int bytes, int least, int most) {
  Pieces pieces;
  const int64_t num = std::max<int64_t>((row_bytes + limit - 1) / limit, 1);
  pieces.bytes = RoundUp((row_bytes + num - 1) / num, num > 1 ? 128 : 16);
  pieces.per_row = static_cast<int>((row_bytes + pieces.bytes - 1) / std::max(pieces.bytes, 16));
  pieces.second_bytes = second_bytes % 16 == 0 && second_bytes <= 2048 ? static_cast<int>(second_bytes) : 0;
  pieces.stride = std::max(RoundUp(pieces.bytes + pieces.second_bytes, 128), 128);
  pieces.stages = std::min(std::max(bytes / pieces.stride, least), most);
  return pieces;
}

}  // namespace

bool DispatchFits(const DispatchParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.num_experts + num_ranks > kMaxBins) return false;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return false;
  if (p.num_tokens >= kMaxSteps) return false;
  if (p.num_row_arrays > kMaxRowArrays || (p.num_row_arrays > 0 && p.rows[0].row_bytes % 16 != 0)) return false;
  return p.max_recv_tokens > 0 && p.num_tokens > 0;
}

cudaError_t LoadDispatch() {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, DispatchKernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(DispatchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicShared);
}

cudaError_t LaunchDispatch(const DispatchParams& params, int num_ranks, const DispatchConfig& config,
                           cudaStream_t stream) {
  DispatchPlan plan;
  plan.params = params;
  const int num_blocks = std::max(1, std::min(config.num_sms, kMaxLanes / kSendWarps));
  plan.num_send_blocks = std::min({num_blocks, config.num_send_blocks, kMaxSendBlocks});
  const int copy_warps = kDispatchWarps - kFirstCopyWarp;
  plan.num_copy_warps = plan.num_send_blocks * copy_warps + (num_blocks - plan.num_send_blocks) * kDispatchWarps;
  plan.num_bins = params.num_experts + (params.layout == Layout::kRank ? num_ranks : 0);
  const int64_t row_bytes = params.num_row_arrays > 0 ? params.rows[0].row_bytes : 16;
  const int64_t second_bytes = params.num_row_arrays > 1 ? params.rows[1].row_bytes : 0;
  plan.send = Split(row_bytes, second_bytes, kMaxSendPiece, config.send_bytes_in_flight, 3, kMaxSendStages);
  plan.copy = Split(row_bytes, second_bytes, kMaxCopyPiece, 24576, 3, kMaxCopyStages);
  plan.zero_bytes = static_cast<int>(std::min<int64_t>(row_bytes, kMaxZeroBytes));
  const int num_local = params.num_experts / num_ranks;
  plan.zero_rows_offset = RoundUp(plan.zero_bytes, 16);
  plan.stages_offset = RoundUp(plan.zero_rows_offset + (2 * num_local + 3) * 4, 128);
  const int64_t scratch = std::max(kDispatchWarps * 32 * num_ranks, params.num_experts + num_ranks);
  const int64_t notify_bytes = 4 * ((kDispatchWarps + 2ll) * plan.num_bins + scratch);
  const auto shared_bytes = [&] {
    const int64_t send_bytes = static_cast<int64_t>(kSendWarps) * plan.send.stages * plan.send.stride;
    const int64_t copy_bytes = static_cast<int64_t>(plan.copy.stages) * plan.copy.stride;
    const int64_t send_block = send_bytes + std::max(copy_warps * copy_bytes, notify_bytes);
    const int64_t copy_block = std::max(kDispatchWarps * copy_bytes, notify_bytes);
    return plan.stages_offset + std::max(send_block, num_blocks > plan.num_send_blocks ? copy_block : 0);
  };
  while (shared_bytes() > kMaxDynamicShared && plan.copy.stages > 2) --plan.copy.stages;
  while (shared_bytes() > kMaxDynamicShared && plan.send.stages > 2) --plan.send.stages;
  DispatchKernel<<<num_blocks, kDispatchThreads, shared_bytes(), stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
