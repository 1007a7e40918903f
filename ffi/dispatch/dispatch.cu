// The dispatch kernel and its launcher: see dispatch.h for the contract, docs/protocol.md for the order of events.
//
//   blocks < num_send_blocks   warps 0, 1 send; warps 2.. route, then warp 2 publishes and leaves, warps 3.. copy
//                              warps 8.., with an encoding: 4 a sending warp, encode
//   other blocks               warps 0..7 copy
//
// Where rows are pulled there are no senders: the routing warps of the first num_send_blocks blocks route, then all
// warps of all blocks pull.
#include <algorithm>

#include "device/load.h"
#include "dispatch/clear.cuh"
#include "dispatch/copy.cuh"
#include "dispatch/notify.cuh"
#include "dispatch/pull.cuh"
#include "dispatch/send.cuh"

namespace jax_ep {
namespace {

constexpr int kMaxSendPiece = 14336, kMaxCopyPiece = 8192, kMaxZeroBytes = 4096;
constexpr int kMaxEncodedPiece = 16384, kMaxEncodedCopyPiece = 4096;
// A block's limit less the static part, to which a few more words belong.
constexpr int64_t kMaxDynamicShared = (232448 - int64_t{sizeof(DispatchShared)} - 256) / 128 * 128;

// The gates of this block's tokens along a known routing, by the routing warps.
__device__ void SendCachedWeights(const DispatchPlan& plan, const Call& call, const DispatchShared& shared) {
  const DispatchParams& p = plan.params;
  const int num_topk = p.num_topk, capacity = p.max_recv_tokens;
  const int begin = plan.TokenBegin(kSendWarps * blockIdx.x), end = plan.TokenBegin(kSendWarps * (blockIdx.x + 1));
  const int thread = threadIdx.x - 32 * kSendWarps;
  for (int i = begin * num_topk + thread; i < end * num_topk; i += 32 * kRouteWarps) {
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

// All warps of a block that neither send nor encode: `beside_senders` or all eight. In a block that routes a release of
// what the routing warps wrote to the one among them that tells the peers.
__device__ __forceinline__ void SyncCopyWarps(bool beside_senders) {
  if (beside_senders) {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kRouteWarps) : "memory");
  } else {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kDispatchWarps) : "memory");
  }
}

template <Way kWay>
__global__ void __launch_bounds__(DispatchThreads(kWay), 1) DispatchKernel(const __grid_constant__ DispatchPlan plan) {
  constexpr int kThreads = DispatchThreads(kWay);
  constexpr bool kPulls = kWay == Way::kPull, kEncodes = kWay == Way::kPushEncoded;
  extern __shared__ __align__(128) char dynamic[];
  __shared__ DispatchShared shared;
  const DispatchParams& p = plan.params;
  const Call call = BeginCall(p.group, p.operation);
  const int block = blockIdx.x, warp = threadIdx.x / 32;
  const bool send_block = block < plan.num_send_blocks, cached = p.operation == kDispatchCached;
  const bool sender = !kPulls && send_block && warp < kSendWarps && p.num_row_arrays > 0;
  char* const send_stages = dynamic + plan.stages_offset;
  char* const copy_stages = send_stages + (send_block ? kSendWarps * plan.send_bytes : 0);
  const NotifyShared notify(plan, copy_stages, call.num_ranks);
  const ZeroRows zero(plan, dynamic + plan.zero_rows_offset, call.num_ranks);

  for (int i = threadIdx.x; i < plan.zero_bytes / 16; i += kThreads) reinterpret_cast<int4*>(dynamic)[i] = int4{};
  if (threadIdx.x < kSendWarps) shared.sent[threadIdx.x] = shared.published[threadIdx.x] = 0;
  if (threadIdx.x < kRouteWarps) shared.slotted[threadIdx.x] = 0;
  if (static_cast<int>(threadIdx.x) <= plan.num_lanes()) {
    const int begin = plan.TokenBegin(threadIdx.x), tokens = plan.TokenBegin(threadIdx.x + 1) - begin;
    shared.lane_begin[threadIdx.x] = begin;
    if (threadIdx.x < plan.num_lanes())
      shared.lane_chunks[threadIdx.x] = (tokens + plan.chunk_tokens - 1) / plan.chunk_tokens;
  }
  for (int i = threadIdx.x; i < kSendWarps * kMaxSendStages; i += kThreads) InitMbarrier(&shared.send_full[0][0] + i);
  for (int i = threadIdx.x; i < kDispatchWarps * kMaxCopyStages; i += kThreads)
    InitMbarrier(&shared.copy_full[0][0] + i);
  FenceMbarrierInit();
  if (p.refused && threadIdx.x == 0) Refuse(call);
  const bool takes_part = __syncthreads_and(!p.refused && !HasFailed(call) && !call.IsDead(call.rank));

  Sender<kEncodes> rows(plan, call, shared, send_stages);
  if (sender && takes_part) rows.Begin();
  if ((kPulls || send_block) && takes_part) {
    if (send_block && !cached) {
      CountTokens<kThreads>(plan, call, notify, shared, [&](int bin, int count) {
        for (int i = 0; i < call.num_ranks; ++i) {
          const int peer = (call.rank + 1 + i) % call.num_ranks;
          if (!call.Reaches(peer)) continue;
          call.Peer(peer)->counts[call.parity][call.rank][blockIdx.x][bin] = count;
        }
      });
    }
    if (call.Reaches(threadIdx.x)) {
      Mail* mail = &call.Peer(threadIdx.x)->mail[call.parity][call.rank][block];
      mail->address[kRecvRows] = reinterpret_cast<uint64_t>(p.rows[0].recv);
      mail->address[kRecvRows1] = reinterpret_cast<uint64_t>(p.rows[1].recv);
      mail->address[kRecvWeights] = reinterpret_cast<uint64_t>(p.recv_weights);
      mail->address[kRecvSlot] = reinterpret_cast<uint64_t>(p.recv_slot);
      mail->address[kRecvTopkIdx] = reinterpret_cast<uint64_t>(p.recv_topk_idx);
      if (kPulls) {
        mail->address[kX] = reinterpret_cast<uint64_t>(p.rows[0].x);
        mail->address[kX1] = reinterpret_cast<uint64_t>(p.rows[1].x);
      }
    }
    __syncthreads();
    if (warp == kPublishWarp) Post(call, block);
  }
  bool met = takes_part;
  if (met && (kPulls || send_block || !cached)) met = Meet<kThreads>(plan, call, shared);
  __syncthreads();
  if (met && !cached) PlaceExperts<kThreads>(plan, call, notify);

  if (!kPulls && send_block && warp < kSendWarps) {
    if (sender && met) {
      rows.Run();
    } else if (sender && takes_part) {
      rows.Abandon();
    } else if (threadIdx.x % 32 == 0) {
      StoreReleaseShared(&shared.sent[warp], met ? kSenderDone : kSenderDone | kSenderGone);
    }
  } else if (kEncodes && warp >= kDispatchWarps) {
    if (send_block && met) EncodeRows(plan, shared, send_stages, warp - kDispatchWarps);
  } else {
    if (met && warp == kDispatchWarps - 1) {
      const int num_local = p.num_experts / call.num_ranks;
      const int32_t* counts = cached ? p.counts : notify.total + call.rank * num_local;
      const int32_t* wanted = cached ? p.counts + num_local : notify.total + p.num_experts + call.rank;
      FindZeroRows(plan, counts, p.layout == Layout::kRank ? *wanted : 0, zero);
    }
    if (met && send_block && warp >= kSendWarps) {
      if (cached && p.topk_weights != nullptr) SendCachedWeights(plan, call, shared);
      if (!cached && call.dead != 0) ForgetDeadSources(plan, call);
      if (!cached && p.layout == Layout::kRank) WriteRankSlots(plan, call, notify, shared, warp - kSendWarps);
      if (!cached && p.layout != Layout::kRank) WriteExpertSlots(plan, call, notify, shared, warp - kSendWarps);
    }
    FenceProxyAsyncShared();  // zeros are read, and the copiers' stages filled, by bulk copies
    SyncCopyWarps(!kPulls && send_block);
    if (kPulls) {
      if (send_block && warp == kPublishWarp && met) TellPeers(call, kPosted);  // slots and gates are written
      if (met) Puller(plan, call, shared, copy_stages).Run(zero, dynamic);
      __syncthreads();
      if (warp == 0) LeaveLane(call, met);
    } else if (send_block && warp == kPublishWarp) {
      Publish(plan, call, shared, met);
    } else if (met) {
      CopyRows<kEncodes>(plan, call, shared, zero, dynamic, copy_stages, send_block ? warp - kFirstCopyWarp : warp);
    }
  }
  if (IsLastBlock(call)) {
    if (HasFailed(call) || call.IsDead(call.rank)) ClearResults<kThreads>(p, call);
    if (threadIdx.x < 2 * kMaxSendBlocks) call.window->taken_chunks[threadIdx.x] = 0;
    if (threadIdx.x == 0) call.window->taken_own_rows = call.window->taken_zero_rows = call.window->taken_copies = 0;
    EndCall(call);
  }
}

int RoundUp(int64_t value, int to) { return static_cast<int>((value + to - 1) / to * to); }

// How many of the blocks route, and send where rows are pushed (measured: docs/measured.md). Encoded rows that are
// copied on: that takes longer than the link. Layout "rank" leaves own rows alone to be copied, and not even those if
// they are encoded; long ones that wait for their places take more blocks. To more peers a row that is loaded once
// leaves several times, so fewer senders fill the link; of short rows a sender moves fewer bytes.
int SendBlocks(const DispatchParams& params, int num_ranks, int num_blocks) {
  if (params.layout != Layout::kRank) return num_ranks == 2 ? 16 : 12;
  if (params.encoding.x != nullptr) return num_blocks;
  const bool short_rows = params.rows[0].row_bytes <= 8192;
  if (num_ranks == 1 || (num_ranks > 2 && !short_rows)) return 12;
  const int copy = params.operation == kDispatchCached || short_rows ? num_blocks / 6 : num_blocks / 3;
  return std::clamp(num_blocks - copy, 16, 20);
}

// Rows in pieces of at most `limit` bytes, as many stages as fit into `bytes`.
Pieces Split(int64_t row_bytes, int64_t second_bytes, int limit, int bytes, int least, int most) {
  Pieces pieces;
  const int64_t num = std::max<int64_t>((row_bytes + limit - 1) / limit, 1);
  pieces.bytes = RoundUp((row_bytes + num - 1) / num, num > 1 ? 128 : 16);
  pieces.per_row = static_cast<int>((row_bytes + pieces.bytes - 1) / std::max(pieces.bytes, 16));
  pieces.last_bytes = static_cast<int>(row_bytes - (pieces.per_row - 1ll) * pieces.bytes);
  pieces.second_bytes = second_bytes % 16 == 0 && second_bytes <= 2048 ? static_cast<int>(second_bytes) : 0;
  pieces.stride = std::max(RoundUp(pieces.bytes + pieces.second_bytes, 128), 128);
  pieces.stages = std::min(std::max(bytes / pieces.stride, least), most);
  return pieces;
}

// The same of the rows that encoders read, in pieces of about `limit` bytes; and what they write.
void SplitEncoded(DispatchPlan* plan, int limit, int bytes) {
  const Encoding& encoding = plan->params.encoding;
  const int num = (encoding.hidden * encoding.elem_bytes() + limit - 1) / limit;
  const int columns = (encoding.hidden + num - 1) / num;
  plan->piece_columns = num > 1 ? RoundUp(columns, kStepColumns) : encoding.hidden;
  Pieces& pieces = plan->send;
  pieces.bytes = plan->piece_columns * encoding.elem_bytes();
  pieces.per_row = (encoding.hidden + plan->piece_columns - 1) / plan->piece_columns;
  pieces.last_bytes = (encoding.hidden - (pieces.per_row - 1) * plan->piece_columns) * encoding.elem_bytes();
  pieces.second_bytes = 0;
  pieces.stride = RoundUp(pieces.bytes, 128);
  pieces.stages = std::min(std::max(bytes / pieces.stride, 3), kMaxSendStages);
  plan->slots = 3;
  plan->slot_stride = RoundUp(encoding.hidden + plan->params.rows[1].row_bytes, 128);
}

}  // namespace

// Measured (docs/measured.md). Rows with several places here are pulled. One place a row: pushed, as stores fill the
// link better than loads; but pulled where the link is not the limit: few rows, few multiprocessors that wait for their
// places (all their warps pull), and between two ranks short rows, of which a sender can send only so many. What is
// encoded is encoded once, so pushed.
bool DispatchPulls(const DispatchParams& params, int num_ranks, const DispatchConfig& config) {
  constexpr int kFewTokens = 256, kFewSms = 16, kShortRow = 8192;
  if (params.encoding.x != nullptr) return false;
  if (params.layout != Layout::kRank) return true;
  if (config.pulls >= 0) return config.pulls != 0;
  if (params.num_tokens <= kFewTokens) return true;
  if (num_ranks == 2 && params.rows[0].row_bytes <= kShortRow) return true;
  return params.operation != kDispatchCached && config.num_sms <= kFewSms;
}

bool DispatchFits(const DispatchParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kMaxTopk || p.num_experts + num_ranks > kMaxBins) return false;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return false;
  if (p.num_tokens >= kMaxSteps) return false;
  if (p.encoding.x != nullptr && (p.num_row_arrays != 2 || p.encoding.hidden > kMaxEncodedHidden)) return false;
  if (p.num_row_arrays > kMaxRowArrays || (p.num_row_arrays > 0 && p.rows[0].row_bytes % 16 != 0)) return false;
  return p.max_recv_tokens > 0 && p.num_tokens > 0;
}

cudaError_t LoadDispatch() {
  for (const auto kernel :
       {DispatchKernel<Way::kPush>, DispatchKernel<Way::kPushEncoded>, DispatchKernel<Way::kPull>}) {
    if (cudaError_t error = LoadKernel(kernel, kMaxDynamicShared); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchDispatch(const DispatchParams& params, int num_ranks, const DispatchConfig& config,
                           cudaStream_t stream) {
  DispatchPlan plan{};
  plan.params = params;
  const bool pulls = DispatchPulls(params, num_ranks, config), encodes = params.encoding.x != nullptr;
  plan.way = pulls ? Way::kPull : encodes ? Way::kPushEncoded : Way::kPush;
  const int num_blocks = std::max(1, std::min(config.num_sms, kMaxLanes));
  const int send_blocks =
      config.num_send_blocks > 0 ? config.num_send_blocks : SendBlocks(params, num_ranks, num_blocks);
  plan.num_send_blocks = std::min({num_blocks, send_blocks, kMaxSendBlocks});
  const int longest = static_cast<int>((params.num_tokens + plan.num_lanes() - 1ll) / plan.num_lanes());
  const int most_chunks = kMaxChunks / plan.num_lanes();
  plan.chunk_tokens = std::max(kLeastChunk, (longest + most_chunks - 1) / most_chunks);
  plan.chunks_per_lane = std::max((longest + plan.chunk_tokens - 1) / plan.chunk_tokens, 1);
  plan.num_bins = params.num_experts + (params.layout == Layout::kRank ? num_ranks : 0);
  const int64_t row_bytes = params.num_row_arrays > 0 ? params.rows[0].row_bytes : 16;
  const int64_t second_bytes = params.num_row_arrays > 1 ? params.rows[1].row_bytes : 0;
  if (encodes) {
    plan.x = params.encoding.x;
    plan.x_row_bytes = int64_t{params.encoding.hidden} * params.encoding.elem_bytes();
    SplitEncoded(&plan, kMaxEncodedPiece, config.send_bytes_in_flight);
  } else {
    plan.x = params.rows[0].x;
    plan.x_row_bytes = params.rows[0].row_bytes;
    plan.send = Split(row_bytes, second_bytes, kMaxSendPiece, config.send_bytes_in_flight, 3, kMaxSendStages);
  }
  const int copy_piece = encodes ? kMaxEncodedCopyPiece : kMaxCopyPiece;
  plan.copy = Split(row_bytes, second_bytes, copy_piece, 24576, 3, kMaxCopyStages);
  plan.zero_bytes = static_cast<int>(std::min<int64_t>(row_bytes, kMaxZeroBytes));
  const int num_local = params.num_experts / num_ranks;
  plan.zero_rows_offset = RoundUp(plan.zero_bytes, 16);
  plan.stages_offset = RoundUp(plan.zero_rows_offset + (2 * num_local + 3) * 4, 128);
  const int64_t scratch = std::max(kRouteWarps * 32 * num_ranks, params.num_experts + num_ranks);
  const int64_t notify_bytes = 4 * ((kRouteWarps + 2ll) * plan.num_bins + scratch);
  const int copy_warps = pulls ? kDispatchWarps : kDispatchWarps - kFirstCopyWarp;  // beside senders
  const auto shared_bytes = [&] {
    plan.send_bytes = pulls ? 0 : plan.send.stages * plan.send.stride + plan.slots * plan.slot_stride;
    const int64_t copy_bytes = static_cast<int64_t>(plan.copy.stages) * plan.copy.stride;
    const int64_t send_block = int64_t{kSendWarps} * plan.send_bytes + std::max(copy_warps * copy_bytes, notify_bytes);
    const int64_t copy_block = std::max(kDispatchWarps * copy_bytes, notify_bytes);
    return plan.stages_offset + std::max(send_block, num_blocks > plan.num_send_blocks ? copy_block : 0);
  };
  const auto shrink = [&](int* count, int least) {
    while (shared_bytes() > kMaxDynamicShared && *count > least) --*count;
  };
  shrink(&plan.copy.stages, encodes ? 3 : 2);
  shrink(&plan.slots, 2);
  shrink(&plan.send.stages, 2);
  shrink(&plan.copy.stages, 2);
  for (int piece = kMaxEncodedPiece / 2; encodes && shared_bytes() > kMaxDynamicShared && piece > 1024; piece /= 2) {
    SplitEncoded(&plan, piece, 0);
    plan.slots = plan.send.stages = 2;
  }
  const int64_t free_bytes = copy_warps * int64_t{plan.copy.stages} * plan.copy.stride - notify_bytes;
  const int64_t block_tokens = (params.num_tokens + plan.num_send_blocks - 1) / plan.num_send_blocks + 1;
  plan.staged_choices = static_cast<int>(std::clamp<int64_t>(free_bytes / 8, 0, block_tokens * params.num_topk));
  const auto kernel = pulls     ? DispatchKernel<Way::kPull>
                      : encodes ? DispatchKernel<Way::kPushEncoded>
                                : DispatchKernel<Way::kPush>;
  kernel<<<num_blocks, DispatchThreads(plan.way), shared_bytes(), stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
