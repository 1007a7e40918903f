// Combine over nodes: one kernel a call. internode.h has the contract, docs/protocol.md the order of events.
//
//   warps of a lane    waits for            signals
//     sender (a rank)  freed by that rank   arrived there; or transit at the rank on this node that sends on
//     relay            transit              arrived at that rank
//     adder            arrived of all       freed at each
//
// Sums of single ranks travel, rounded as the contract says: f32 partial sums of a node would be added in another
// order. Each ring has a lane's tokens in their order, so the adder takes the next message of every ring that has one
// of its token, and adds it where it lies.
#include <algorithm>

#include "combine/clear.cuh"
#include "combine/instances.cuh"
#include "device/warp.cuh"
#include "internode/adder.cuh"
#include "internode/internode.h"
#include "internode/row_sender.cuh"
#include "internode/sum_sender.cuh"

namespace jax_ep {
namespace {

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
          const char* const place = Outbox(view) + plan.Ring(lane_number, stream) + offset;
          const int4 head = LoadRow(place);
          FenceSys();  // the chunk, acquired by lane `stream`, before the put
          PutAndSignal(view, nodes.rank_at[stream / per_node * per_node + local],
                       Inbox(view) + plan.Ring(lane_number, from) + offset, place, messages.ChunkBytes(head.x),
                       &view.room->arrived[lane_number][from][slot], call.Tag(number + 1));
          if (lane == stream) was_last = head.y != 0;
        }
        return was_last;
      });
}

template <class T, bool kWeighted, int V, bool kRows>
__global__ void __launch_bounds__(kInternodeThreads, 1)
    InternodeCombineKernel(const __grid_constant__ InternodeCombinePlan plan) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ Notices notices;
  const CombineParams& p = plan.combine;
  const Call call = BeginCall(p.group, kCombine);
  const int warp = threadIdx.x / 32, index = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const int lane_number = index / plan.lanes.num_tasks, task = index % plan.lanes.num_tasks;
  notices.Clear();
  const bool met = TakesPart(call, plan.view, p.refused) && MeetOverNodes(call, plan.view);
  if (kRows) FenceProxyAsync();  // boxes that all ranks have left are written by bulk copies
  if (met && warp == kTaskWarps) {
    Publish(notices, plan.view, [] { return false; });
  } else if (met) {
    auto& memory = reinterpret_cast<SumShared<V>*>(dynamic)[warp];
    Poster poster(notices, plan.view, plan.lanes.few_tokens);
    if (lane_number >= plan.lanes.num_lanes) {
      // There is no such lane.
    } else if (task < plan.tasks.senders) {
      const int source = (call.rank + 1 + task) % call.num_ranks;
      if constexpr (kRows) {
        SendRows(plan, call, memory, poster, lane_number, source);
      } else {
        SumSender<T, kWeighted, V>(plan, call, memory, poster, lane_number, source).Run();
      }
    } else if (task < plan.tasks.senders + plan.tasks.relays) {
      Relay(plan, call, lane_number);
    } else {
      const int part = task - plan.tasks.senders - plan.tasks.relays;
      Adder<T, kWeighted, V>(plan, call, memory, poster, lane_number, part).Run();
    }
    poster.Close();
  }
  if (IsLastBlock(call)) {
    if (HasFailed(call)) ClearResults(p, threadIdx.x, kInternodeThreads);
    EndOverNodes(call, plan.view);
  }
}

// Of layout "rank" (`kRows`), and of the others.
template <bool kRows>
struct Kernels {
  static constexpr int kWide =
      4;  // vectors that a lane has of what is added at once; one where an adder's part is short
  template <class T, bool kWeighted, int V>
  static Instance<InternodeCombinePlan> Of() {
    return {InternodeCombineKernel < T, kWeighted && !kRows, V, kRows >, kTaskWarps * int{sizeof(SumShared<V>)}};
  }
};

}  // namespace

cudaError_t LoadInternodeCombine() {
  if (cudaError_t error = LoadInstances<Kernels<true>>(); error != cudaSuccess) return error;
  return LoadInstances<Kernels<false>>();
}

cudaError_t LaunchInternodeCombine(const CombineParams& params, const InternodeView& view,
                                   const InternodeConfig& config, cudaStream_t stream) {
  InternodeCombinePlan plan;
  plan.combine = params;
  plan.view = view;
  const int num_ranks = view.nodes.num_nodes * view.nodes.ranks_per_node;
  if (config.direct) plan.view.nodes = EachRankANode(num_ranks);
  const bool all_mapped = std::all_of(view.room_of, view.room_of + num_ranks, [](const Room* room) { return room; });
  plan.tasks = CombineTasksOf(plan.view.nodes.num_nodes, plan.view.nodes.ranks_per_node, all_mapped, config.num_sms,
                              params.num_tokens, params.row_bytes, params.one_row_a_rank);
  plan.lanes = PlanLanes(config.num_sms, plan.tasks.count(), params.num_tokens, num_ranks, view.box_bytes);
  const int64_t header_bytes = params.carried != nullptr ? 4ll * params.num_topk : 0;
  plan.messages = PlanMessages(params.row_bytes, 0, header_bytes, plan.lanes, num_ranks, view.box_bytes);
  if (static_cast<int64_t>(params.num_tokens) * plan.messages.num_pieces >= kMaxSteps) return cudaErrorInvalidValue;
  const int64_t shortest = std::min(params.row_bytes, plan.messages.piece_bytes) / plan.tasks.adders;
  constexpr int kWide = Kernels<true>::kWide;
  const bool wide = shortest >= 512 * kWide, weighted = params.weights != nullptr;
  const int64_t piece_bytes = std::min(params.row_bytes, plan.messages.piece_bytes);
  plan.stage_bytes = static_cast<int>(std::min<int64_t>({std::max<int64_t>(PadTo128(piece_bytes), 128), kMostStageBytes,
                                                         wide ? kMostRowStageBytes<kWide> : kMostRowStageBytes<1>}));
  plan.written = WrittenInGroups(piece_bytes, plan.stage_bytes);
  const auto instance = params.one_row_a_rank ? InstanceFor<Kernels<true>>(params.dtype, weighted, wide)
                                              : InstanceFor<Kernels<false>>(params.dtype, weighted, wide);
  instance.kernel<<<plan.lanes.num_blocks, kInternodeThreads, instance.shared_bytes, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
