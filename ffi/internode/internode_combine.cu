// Combine over nodes: two kernels a call. internode.h has the contract, docs/protocol.md the order of events.
//
//   Exchange   warps           waits for           signals
//     sender (a source)        freed by the source arrived there; or transit at the rank on this node that sends on
//     relay                    transit             arrived at the source
//     reader (a rank)          arrived             freed at that rank
//   Sum        a token a warp: the sums of the ranks that have rows of it, in rank order
//
// Sums of single ranks travel, rounded as the contract says: f32 partial sums of a node would be added in another
// order.
#include <algorithm>

#include "combine/clear.cuh"
#include "combine/row_sum.cuh"
#include "device/warp.cuh"
#include "internode/internode.h"
#include "internode/link.cuh"
#include "internode/plan.h"
#include "internode/ring.cuh"

namespace jax_ep {
namespace {

struct InternodeCombinePlan {
  CombineParams combine;
  InternodeView view;
  Lanes lanes;
  Messages messages;
};

// Rings of a lane: in the inbox one a rank; in the outbox one a (node, local index of the rank that sends through
// here).
__device__ __forceinline__ int64_t InRing(const InternodeCombinePlan& plan, const Call& call, int lane_number,
                                          int from) {
  return (static_cast<int64_t>(lane_number) * call.num_ranks + from) * plan.messages.RingBytes();
}
__device__ __forceinline__ int64_t OutRing(const InternodeCombinePlan& plan, const Call& call, int lane_number,
                                           int stream) {
  return (static_cast<int64_t>(lane_number) * call.num_ranks + stream) * plan.messages.RingBytes();
}

// The ranks that have rows of a token of this rank, as bits; lane k holds choice k's slot.
__device__ __forceinline__ uint32_t RanksOf(const CombineParams& p, int slot) {
  return __reduce_or_sync(~0u, slot >= 0 ? 1u << (slot / p.max_recv_tokens) : 0u);
}
__device__ __forceinline__ int OwnSlot(const CombineParams& p, int token) {
  const int lane = threadIdx.x % 32;
  return lane < p.num_topk ? p.slot[static_cast<int64_t>(token) * p.num_topk + lane] : -1;
}
// Where the sum of `rank` waits to be added.
__device__ __forceinline__ char* ScratchRow(const CombineParams& p, uint32_t ranks, int rank, int token) {
  const int64_t place = __popc(ranks & ((1u << rank) - 1));
  return p.scratch + (place * p.num_tokens + token) * p.row_bytes;
}

// This rank's sums of the tokens of `source`.
template <class T, bool kWeighted>
__device__ void SendSums(const InternodeCombinePlan& plan, const Call& call, int lane_number, int source) {
  const CombineParams& p = plan.combine;
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk;
  const uint8_t reader = static_cast<uint8_t>(source);
  const bool stays = source == call.rank;  // then the sums go where they will be added
  const int num_pieces = stays ? 1 : messages.num_pieces;
  Stream stream{};
  stream.freed = view.room->freed[lane_number][0];
  stream.readers = &reader;
  stream.num_readers = 1;
  stream.lane = lane_number;
  if (IsNear(view, call.rank, source)) {
    stream.ring = In(view, source, Inbox(view)) + InRing(plan, call, lane_number, call.rank);
    stream.to = source;
    stream.told = view.room->arrived[lane_number][call.rank];
  } else {
    // Through the rank of this node that has the source's local index.
    const int rail = nodes.rank_at[nodes.node[call.rank] * nodes.ranks_per_node + nodes.local[source]];
    const int through = nodes.node[source] * nodes.ranks_per_node + nodes.local[call.rank];
    stream.ring = In(view, rail, Outbox(view)) + OutRing(plan, call, lane_number, through);
    stream.to = rail == call.rank ? source : rail;
    stream.told =
        rail == call.rank ? view.room->arrived[lane_number][call.rank] : view.room->transit[lane_number][through];
    if (rail == call.rank) stream.far_ring = Inbox(view) + InRing(plan, call, lane_number, call.rank);
  }
  Outgoing out(call, view, messages, stream);

  const LaneTokens tokens(p.num_tokens, lane_number, plan.lanes.num_lanes);
  const int32_t* const choices = p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * num_topk;
  const auto load_row = [&](int token) {
    return lane < num_topk && token < tokens.end ? choices[static_cast<int64_t>(token) * num_topk + lane] : -1;
  };
  int next_row = load_row(tokens.begin);
  for (int token = tokens.begin; token < tokens.end; ++token) {
    const int row = next_row;
    next_row = load_row(token + 1);
    uint32_t holders = __ballot_sync(~0u, row >= 0);
    if (holders == 0) continue;
    if (p.one_row_a_rank) holders &= -holders;  // all choices name the one row
    const float weight = kWeighted && row >= 0 ? p.weights[row] : 1.f;
    float carried = 0.f;
    if (p.carried != nullptr && row >= 0) {
      carried = p.carried[p.one_row_a_rank ? static_cast<int64_t>(row) * num_topk + lane : row];
    }
    const char* const pointer = p.y + static_cast<int64_t>(row) * p.row_bytes;
    if (stays && p.carried_back != nullptr && row >= 0) {
      p.carried_back[static_cast<int64_t>(token) * num_topk + lane] = carried;
    }
    const uint32_t ranks = stays ? RanksOf(p, OwnSlot(p, token)) : 0;
    for (int piece = 0; piece < num_pieces; ++piece) {
      PieceRange range{0, p.row_bytes};
      char* target;  // where the whole row would begin
      if (stays) {
        target = ScratchRow(p, ranks, call.rank, token);
      } else {
        char* const message = out.Next();
        if (message == nullptr) return;
        if (lane == 0) *reinterpret_cast<int4*>(message) = make_int4(token, piece, 0, 0);
        if (p.carried != nullptr && lane < num_topk) reinterpret_cast<float*>(message + 16)[lane] = carried;
        range = PieceOf(p.row_bytes, messages.piece_bytes, piece);
        target = message + messages.header_bytes - range.begin;
      }
      if (range.size > 0) {
        SumRows<T, kWeighted>({holders, pointer, weight, range.begin + range.size}, range.begin, target, false);
      }
      __syncwarp();
      if (!stays) out.Add();
    }
  }
  if (!stays) out.Finish();
}

// Chunks of this node's other ranks for sources on this rank's rail: they lie in the outbox, and only have to be put.
__device__ void Relay(const InternodeCombinePlan& plan, const Call& call, int lane_number) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32, per_node = nodes.ranks_per_node;
  const int own_node = nodes.node[call.rank], local = nodes.local[call.rank];
  const auto from_of = [&](int stream) { return nodes.rank_at[own_node * per_node + stream % per_node]; };
  const bool mine = lane < call.num_ranks && lane / per_node != own_node && lane % per_node != local;
  PassOnChunks(
      call, view, __ballot_sync(~0u, mine), lane_number,
      [&](int stream) { return view.room->transit[lane_number][stream]; }, from_of,
      [&](uint32_t mask, uint32_t chunk) {
        bool was_last = false;
        for (; mask != 0; mask &= mask - 1) {
          const int stream = __ffs(mask) - 1, from = from_of(stream);
          const uint32_t number = __shfl_sync(~0u, chunk, stream);
          const int64_t slot = number % kSlots, offset = slot * messages.slot_bytes;
          const char* const place = Outbox(view) + OutRing(plan, call, lane_number, stream) + offset;
          const int4 head = LoadRow(place);
          FenceSys();  // the chunk, acquired by lane `stream`, before the put
          PutAndSignal(view, nodes.rank_at[stream / per_node * per_node + local],
                       Inbox(view) + InRing(plan, call, lane_number, from) + offset, place, messages.ChunkBytes(head.x),
                       &view.room->arrived[lane_number][from][slot], call.Tag(number + 1));
          if (lane == stream) was_last = head.y != 0;
        }
        return was_last;
      });
}

// The sums of one rank, each to where it waits for the others.
__device__ void ReadSums(const InternodeCombinePlan& plan, const Call& call, int lane_number, int from) {
  const CombineParams& p = plan.combine;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32;
  ReadChunks(call, plan.view, messages, Inbox(plan.view) + InRing(plan, call, lane_number, from),
             plan.view.room->arrived[lane_number][from], from, lane_number, [&](const char* message) {
               const int4 head = LoadRow(message);
               const int token = head.x, piece = head.y, slot = OwnSlot(p, token);
               const uint32_t ranks = RanksOf(p, slot);
               if (piece == 0 && p.carried_back != nullptr && slot >= 0 && slot / p.max_recv_tokens == from) {
                 p.carried_back[static_cast<int64_t>(token) * p.num_topk + lane] =
                     __ldcg(reinterpret_cast<const float*>(message + 16) + lane);
               }
               const PieceRange range = PieceOf(p.row_bytes, messages.piece_bytes, piece);
               CopyVectors(ScratchRow(p, ranks, from, token) + range.begin, message + messages.header_bytes,
                           range.size);
             });
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kInternodeThreads, 1)
    InternodeExchangeKernel(const __grid_constant__ InternodeCombinePlan plan) {
  const CombineParams& p = plan.combine;
  const Call call = BeginCall(p.group, kCombine);
  if (!TakesPart(call, plan.view, p.refused) || !MeetOverNodes(call, plan.view)) return;  // Sum ends the call
  const int index = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  const int lane_number = index / plan.lanes.num_tasks, task = index % plan.lanes.num_tasks;
  if (lane_number >= plan.lanes.num_lanes) return;
  if (task < call.num_ranks) {
    SendSums<T, kWeighted>(plan, call, lane_number, (call.rank + 1 + task) % call.num_ranks);
  } else if (task == call.num_ranks) {
    Relay(plan, call, lane_number);
  } else {
    ReadSums(plan, call, lane_number, (call.rank + task - call.num_ranks) % call.num_ranks);
  }
}

template <class T>
__global__ void __launch_bounds__(kInternodeThreads, 1)
    InternodeSumKernel(const __grid_constant__ InternodeCombinePlan plan) {
  const CombineParams& p = plan.combine;
  const Call call = BeginCall(p.group, kCombine);
  const int lane = threadIdx.x % 32;
  if (!HasFailed(call)) {
    const int first = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    for (int token = first; token < p.num_tokens; token += kInternodeWarps * gridDim.x) {
      const int slot = OwnSlot(p, token), count = __popc(RanksOf(p, slot));
      if (p.carried_back != nullptr && lane < p.num_topk && slot < 0) {
        p.carried_back[static_cast<int64_t>(token) * p.num_topk + lane] = 0.f;
      }
      if (p.row_bytes == 0) continue;
      Rows rows{count == 32 ? ~0u : (1u << count) - 1, nullptr, 1.f, p.row_bytes};
      rows.pointer = p.scratch + (static_cast<int64_t>(lane) * p.num_tokens + token) * p.row_bytes;
      SumOrClear<T, false>(rows, 0, p.out + token * p.row_bytes, false);
    }
  }
  if (IsLastBlock(call)) {
    if (HasFailed(call)) ClearResults(p, threadIdx.x, kInternodeThreads);
    EndOverNodes(call, plan.view);
  }
}

using Kernel = void (*)(InternodeCombinePlan);

template <class T>
Kernel ExchangeKernelFor(bool weighted) {
  return weighted ? InternodeExchangeKernel<T, true> : InternodeExchangeKernel<T, false>;
}

Kernel ExchangeKernelFor(RowDtype dtype, bool weighted) {
  if (dtype == RowDtype::kBfloat16) return ExchangeKernelFor<__nv_bfloat16>(weighted);
  if (dtype == RowDtype::kFloat16) return ExchangeKernelFor<__half>(weighted);
  return ExchangeKernelFor<float>(weighted);
}

Kernel SumKernelFor(RowDtype dtype) {
  if (dtype == RowDtype::kBfloat16) return InternodeSumKernel<__nv_bfloat16>;
  if (dtype == RowDtype::kFloat16) return InternodeSumKernel<__half>;
  return InternodeSumKernel<float>;
}

}  // namespace

cudaError_t LoadInternodeCombine() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (Kernel kernel : {ExchangeKernelFor(dtype, false), ExchangeKernelFor(dtype, true), SumKernelFor(dtype)}) {
      cudaFuncAttributes attributes;
      const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchInternodeCombine(const CombineParams& params, const InternodeView& view,
                                   const InternodeConfig& config, cudaStream_t stream) {
  InternodeCombinePlan plan;
  plan.combine = params;
  plan.view = view;
  const int num_ranks = view.nodes.num_nodes * view.nodes.ranks_per_node;
  if (config.direct) plan.view.nodes = EachRankANode(num_ranks);
  plan.lanes = PlanLanes(config.num_sms, 2 * num_ranks, params.num_tokens, num_ranks, view.box_bytes);
  const int64_t header_bytes = 16 + (params.carried != nullptr ? 4ll * params.num_topk : 0);
  plan.messages = PlanMessages(params.row_bytes, 0, header_bytes, plan.lanes, num_ranks, view.box_bytes);
  if (static_cast<int64_t>(params.num_tokens) * plan.messages.num_pieces >= kMaxSteps) return cudaErrorInvalidValue;
  ExchangeKernelFor(params.dtype,
                    params.weights != nullptr)<<<plan.lanes.num_blocks, kInternodeThreads, 0, stream>>>(plan);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  SumKernelFor(params.dtype)<<<plan.lanes.num_blocks, kInternodeThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
