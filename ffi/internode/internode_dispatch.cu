// Dispatch over nodes: two kernels a call (one along a known routing). internode.h has the contract, docs/protocol.md
// the order of events.
//
//   Notify     counts to every rank, every rank's counts, places: slot
//   Dispatch   warps          waits for                    signals
//     sender (a node)         freed by that node's ranks   arrived at the rank there with its local index
//     announcer               arrived of all nodes         announced at the ranks of this node
//     reader (a source)       announced                    freed at the source
//     zeros (last of a block)
//
// Nobody waits for another warp's wait: readers always read, so slots are freed, so senders send.
#include <algorithm>

#include "dispatch/clear.cuh"
#include "dispatch/notify.cuh"
#include "dispatch/zero.cuh"
#include "internode/conveyor.cuh"
#include "internode/internode.h"
#include "internode/link.cuh"
#include "internode/plan.h"
#include "internode/ring.cuh"

namespace jax_ep {
namespace {

constexpr int kNotifyThreads = DispatchThreads(Way::kPush), kMaxZeroBytes = 4096;
constexpr int64_t kMaxDynamicShared = 232448 - 2048;  // a block's limit less the static part

struct InternodeDispatchPlan {
  DispatchPlan dispatch;
  InternodeView view;
  Lanes lanes;
  Messages messages;
  int stages_offset, stage_bytes;  // of dynamic shared memory
};

// ---- routing

__global__ void __launch_bounds__(kNotifyThreads, 1)
    InternodeNotifyKernel(const __grid_constant__ InternodeDispatchPlan plan) {
  extern __shared__ __align__(128) char dynamic[];
  const DispatchParams& p = plan.dispatch.params;
  const InternodeView& view = plan.view;
  Room* const room = view.room;
  const Call call = BeginCall(p.group, p.operation);
  const NotifyShared notify(plan.dispatch, dynamic, call.num_ranks);
  const int block = blockIdx.x, warp = threadIdx.x / 32;
  if (!TakesPart(call, view, p.refused)) return;  // the next kernel ends the call

  int32_t* const outgoing = room->outgoing[call.parity][block];
  int32_t* const counts = room->counts[call.parity][call.rank][block];
  const OutOfReach reach{plan.dispatch};
  CountTokens<kNotifyThreads>(plan.dispatch, call, notify, reach,
                              [&](int bin, int count) { outgoing[bin] = counts[bin] = count; });
  // Where the sources' tokens are not here; the next kernel writes where they are.
  const int64_t num_choices = static_cast<int64_t>(call.num_ranks) * p.num_tokens * p.num_topk;
  for (int64_t i = static_cast<int64_t>(block) * kNotifyThreads + threadIdx.x; i < num_choices;
       i += static_cast<int64_t>(gridDim.x) * kNotifyThreads) {
    p.recv_slot[i] = -1;
  }
  __syncthreads();
  FenceSys();  // all threads' counts before the posts
  uint64_t* const post = &room->post[call.parity][call.rank][block];
  for (int i = warp; i < call.num_ranks; i += kDispatchWarps) {
    const int peer = (call.rank + 1 + i) % call.num_ranks;
    if (peer != call.rank) {
      PutAndSignal(view, peer, reinterpret_cast<char*>(counts), reinterpret_cast<const char*>(outgoing),
                   plan.dispatch.num_bins * 4ll, post, call.Tag(kPosted));
    } else if (threadIdx.x % 32 == 0) {
      StoreRelaxedSys(post, call.Tag(kPosted));
    }
  }
  bool met = true;
  for (int i = threadIdx.x; i < call.num_ranks * plan.dispatch.num_send_blocks; i += kNotifyThreads) {
    const int peer = i / plan.dispatch.num_send_blocks, its_block = i % plan.dispatch.num_send_blocks;
    met = met && AwaitOverNodes(call, view, &room->post[call.parity][peer][its_block], kPosted, kMeet, peer, its_block);
  }
  if (!__syncthreads_and(met)) return;
  PlaceExperts<kNotifyThreads>(plan.dispatch, call, notify);
  if (warp < kSendWarps) return;
  if (p.layout == Layout::kRank) {
    WriteRankSlots(plan.dispatch, call, notify, reach, warp - kSendWarps);
  } else {
    WriteExpertSlots(plan.dispatch, call, notify, reach, warp - kSendWarps);
  }
}

// ---- messages: {token, piece}, then of each choice slot, expert and gate

struct Choices {
  int32_t *slot, *expert;
  float* weight;

  __device__ Choices(const char* message, int num_topk) {
    slot = reinterpret_cast<int32_t*>(const_cast<char*>(message) + 16);
    expert = slot + num_topk;
    weight = reinterpret_cast<float*>(expert + num_topk);
  }
};

// Any number of bytes, by one whole warp, to several rows: `unit` divides both addresses and all row sizes.
__device__ void CopyUnits(char* target, const char* source, int64_t num_bytes, int unit) {
  const int lane = threadIdx.x % 32;
  if (unit == 16) return CopyVectors(target, source, num_bytes);
  if (unit == 4) {
    for (int64_t i = lane * 4; i < num_bytes; i += 128) {
      *reinterpret_cast<int32_t*>(target + i) = __ldcg(reinterpret_cast<const int32_t*>(source + i));
    }
  } else {
    for (int64_t i = lane; i < num_bytes; i += 32) target[i] = __ldcg(source + i);
  }
}
__device__ __forceinline__ int UnitOf(int64_t row_bytes) {
  return row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 1;
}

// This lane's tokens to one node, each once.
__device__ void SendToNode(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor, int lane_number,
                           int node) {
  const DispatchParams& p = plan.dispatch.params;
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32, own_node = nodes.node[call.rank];
  const bool stays = node == own_node;
  // Chunks for this node go straight into the inbox, where its ranks read.
  const int64_t ring_bytes = messages.RingBytes();
  char* const inbox = Inbox(view) + (static_cast<int64_t>(lane_number) * nodes.num_nodes + own_node) * ring_bytes;
  char* const outbox = Outbox(view) + (static_cast<int64_t>(lane_number) * nodes.num_nodes + node) * ring_bytes;
  Stream stream{};
  stream.ring = stays ? inbox : outbox;
  stream.far_ring = stays ? nullptr : inbox;
  stream.to = nodes.rank_at[node * nodes.ranks_per_node + nodes.local[call.rank]];
  stream.told = view.room->arrived[lane_number][own_node];
  stream.freed = view.room->freed[lane_number][0];
  stream.readers = nodes.rank_at + node * nodes.ranks_per_node;
  stream.num_readers = nodes.ranks_per_node;
  stream.lane = lane_number;
  Outgoing out(call, view, messages, stream);

  const LaneTokens tokens(p.num_tokens, lane_number, plan.lanes.num_lanes);
  const auto load_slot = [&](int token) {
    return lane < p.num_topk && token < tokens.end ? p.slot[static_cast<int64_t>(token) * p.num_topk + lane] : -1;
  };
  const bool has_expert = p.layout == Layout::kRank && p.operation != kDispatchCached;
  int next_slot = load_slot(tokens.begin);
  for (int token = tokens.begin; token < tokens.end; ++token) {
    const int slot = next_slot;
    next_slot = load_slot(token + 1);
    const bool goes = slot >= 0 && nodes.node[slot / p.max_recv_tokens] == node;
    if (__ballot_sync(~0u, goes) == 0) continue;
    const int64_t choice = static_cast<int64_t>(token) * p.num_topk + lane;
    for (int piece = 0; piece < messages.num_pieces; ++piece) {
      const PieceRange range = PieceOf(p.num_row_arrays > 0 ? p.rows[0].row_bytes : 0, messages.piece_bytes, piece);
      conveyor.Begin(p.rows[0].x + token * p.rows[0].row_bytes + range.begin, range.size);
      char* const message = out.Next();
      if (message == nullptr) {
        conveyor.Finish(nullptr);
        return;
      }
      if (lane == 0) *reinterpret_cast<int4*>(message) = make_int4(token, piece, 0, 0);
      const Choices choices(message, p.num_topk);
      if (lane < p.num_topk) {
        choices.slot[lane] = slot;
        choices.expert[lane] = has_expert ? p.topk_idx[choice] : -1;
        choices.weight[lane] = p.topk_weights != nullptr ? p.topk_weights[choice] : 0.f;
      }
      char* place = message + messages.header_bytes;
      conveyor.Finish(lane == 0 ? place : nullptr);
      place += messages.piece_bytes;
      if (p.num_row_arrays > 1) {
        const PieceRange second = PieceOf(p.rows[1].row_bytes, messages.second_bytes, piece);
        CopyUnits(place, p.rows[1].x + token * p.rows[1].row_bytes + second.begin, second.size,
                  UnitOf(p.rows[1].row_bytes));
      }
      __syncwarp();
      out.Add();
    }
  }
  out.Finish();
}

// What came for this node into this rank's inbox is there for all its ranks.
__device__ void Announce(const InternodeDispatchPlan& plan, const Call& call, int lane_number) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const int lane = threadIdx.x % 32, local = nodes.local[call.rank], own_node = nodes.node[call.rank];
  if (nodes.ranks_per_node == 1) return;  // its reader reads `arrived`
  const char* const rings =
      Inbox(view) + static_cast<int64_t>(lane_number) * nodes.num_nodes * plan.messages.RingBytes();
  const auto source_of = [&](int node) { return nodes.rank_at[node * nodes.ranks_per_node + local]; };
  PassOnChunks(
      call, view, nodes.num_nodes == 32 ? ~0u : (1u << nodes.num_nodes) - 1, lane_number,
      [&](int node) { return view.room->arrived[lane_number][node]; }, source_of,
      [&](uint32_t mask, uint32_t chunk) {
        if ((mask >> lane & 1) == 0) return false;
        const int slot = static_cast<int>(chunk % kSlots);
        const char* const place = rings + lane * plan.messages.RingBytes() + slot * plan.messages.slot_bytes;
        const bool is_last = LoadRow(place).y != 0;
        FenceSys();  // the chunk, acquired by this lane, before the flags
        for (int i = 0; i < nodes.ranks_per_node; ++i) {
          const int peer = nodes.rank_at[own_node * nodes.ranks_per_node + (local + i) % nodes.ranks_per_node];
          StoreRelaxedSys(In(view, peer, &view.room->announced[lane_number][source_of(lane)][slot]),
                          call.Tag(chunk + 1));
        }
        return is_last;
      });
}

// One piece of a token from `source`, to all its rows here.
__device__ __forceinline__ void TakeMessage(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                            int source, const char* message) {
  const DispatchParams& p = plan.dispatch.params;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk, num_local = p.num_experts / call.num_ranks;
  const Choices choices(message, num_topk);
  const int4 head = LoadRow(message);
  const int slot = lane < num_topk ? __ldcg(choices.slot + lane) : -1;
  const int row = slot >= 0 && slot / p.max_recv_tokens == call.rank ? slot - call.rank * p.max_recv_tokens : -1;
  const uint32_t holders = __ballot_sync(~0u, row >= 0);
  if (holders == 0) return;
  const char* place = message + messages.header_bytes;
  const PieceRange range = PieceOf(p.num_row_arrays > 0 ? p.rows[0].row_bytes : 0, messages.piece_bytes, head.y);
  conveyor.Begin(place, range.size);  // while choices are read and written
  const int token = head.x, piece = head.y, first_row = __shfl_sync(~0u, row, __ffs(holders) - 1);
  if (piece == 0 && lane < num_topk) {
    if (p.operation != kDispatchCached) {
      p.recv_slot[(static_cast<int64_t>(source) * p.num_tokens + token) * num_topk + lane] = row;
    }
    const float weight = __ldcg(choices.weight + lane);
    if (p.layout != Layout::kRank) {
      if (row >= 0 && p.recv_weights != nullptr) p.recv_weights[row] = weight;
    } else {
      const int64_t place = static_cast<int64_t>(first_row) * num_topk + lane;
      if (p.recv_weights != nullptr) p.recv_weights[place] = row >= 0 ? weight : 0.f;
      if (p.operation != kDispatchCached) {
        p.recv_topk_idx[place] = row >= 0 ? __ldcg(choices.expert + lane) % num_local : -1;
      }
    }
  }
  __syncwarp();
  const int own_row = DistinctRow(plan.dispatch, row);
  conveyor.Finish(own_row >= 0 ? p.rows[0].recv + own_row * p.rows[0].row_bytes + range.begin : nullptr);
  place += messages.piece_bytes;
  if (p.num_row_arrays > 1) {
    const PieceRange second = PieceOf(p.rows[1].row_bytes, messages.second_bytes, piece);
    for (uint32_t rest = __ballot_sync(~0u, own_row >= 0); rest != 0; rest &= rest - 1) {
      const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
      CopyUnits(p.rows[1].recv + target * p.rows[1].row_bytes + second.begin, place, second.size,
                UnitOf(p.rows[1].row_bytes));
    }
  }
}

// This rank's rows of one source, from the inbox of the rank of this node on that source's rail.
__device__ void ReadSource(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor, int lane_number,
                           int source) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const int node = nodes.node[source];
  const int rail = nodes.rank_at[nodes.node[call.rank] * nodes.ranks_per_node + nodes.local[source]];
  const int64_t ring = static_cast<int64_t>(lane_number) * nodes.num_nodes + node;
  uint64_t* const flags =
      nodes.ranks_per_node == 1 ? view.room->arrived[lane_number][node] : view.room->announced[lane_number][source];
  ReadChunks(call, view, plan.messages, In(view, rail, Inbox(view)) + ring * plan.messages.RingBytes(), flags, source,
             lane_number, [&](const char* message) { TakeMessage(plan, call, conveyor, source, message); });
}

__global__ void __launch_bounds__(kInternodeThreads, 1)
    InternodeDispatchKernel(const __grid_constant__ InternodeDispatchPlan plan) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ uint64_t full[kTaskWarps][kConveyorStages];
  const DispatchParams& p = plan.dispatch.params;
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const Call call = BeginCall(p.group, p.operation);
  const ZeroRows zero(plan.dispatch, dynamic + plan.dispatch.zero_rows_offset, call.num_ranks);
  const int warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < plan.dispatch.zero_bytes / 16; i += kInternodeThreads)
    reinterpret_cast<int4*>(dynamic)[i] = int4{};
  if (threadIdx.x < kTaskWarps * kConveyorStages) InitMbarrier(&full[0][0] + threadIdx.x);
  FenceMbarrierInit();
  bool met = TakesPart(call, view, p.refused);
  if (met && p.operation == kDispatchCached) met = MeetOverNodes(call, view);  // else Notify has
  if (met && warp == kTaskWarps) FindZeroRows(plan.dispatch, p.counts, p.counts[zero.num_ranges - 1], zero);
  FenceProxyAsync();  // zeros are read, and boxes that all ranks have left written, by bulk copies
  __syncthreads();
  if (met && warp == kTaskWarps) {
    Taken zero_rows(&view.room->taken_zero_rows);
    WriteZeroRows(plan.dispatch, zero, dynamic, zero_rows);
  } else if (met) {
    const int index = warp * gridDim.x + blockIdx.x;
    const int lane_number = index / plan.lanes.num_tasks, task = index % plan.lanes.num_tasks;
    const int reader = task - nodes.num_nodes - 1;
    Conveyor conveyor(dynamic + plan.stages_offset + warp * kConveyorStages * plan.stage_bytes, plan.stage_bytes,
                      full[warp]);
    if (lane_number < plan.lanes.num_lanes) {
      if (reader >= 0)
        ReadSource(plan, call, conveyor, lane_number, (call.rank + call.num_ranks - reader) % call.num_ranks);
      if (reader == -1) Announce(plan, call, lane_number);
      if (reader < -1)
        SendToNode(plan, call, conveyor, lane_number, (nodes.node[call.rank] + 1 + task) % nodes.num_nodes);
    }
  }
  WaitBulkDone<0>();
  if (IsLastBlock(call)) {
    if (HasFailed(call)) ClearResults<kInternodeThreads>(p, call);
    if (threadIdx.x == 0) view.room->taken_zero_rows = 0;
    EndOverNodes(call, view);
  }
}

}  // namespace

cudaError_t LoadInternodeDispatch() {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, InternodeDispatchKernel); error != cudaSuccess)
    return error;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, InternodeNotifyKernel); error != cudaSuccess) return error;
  if (cudaError_t error =
          cudaFuncSetAttribute(InternodeDispatchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicShared);
      error != cudaSuccess)
    return error;
  return cudaFuncSetAttribute(InternodeNotifyKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicShared);
}

cudaError_t LaunchInternodeDispatch(const DispatchParams& params, const InternodeView& view,
                                    const InternodeConfig& config, cudaStream_t stream) {
  InternodeDispatchPlan plan;
  plan.view = view;
  const int num_ranks = view.nodes.num_nodes * view.nodes.ranks_per_node;
  if (config.direct) plan.view.nodes = EachRankANode(num_ranks);
  const int num_nodes = plan.view.nodes.num_nodes;
  const int64_t row_bytes = params.num_row_arrays > 0 ? params.rows[0].row_bytes : 0;
  const int64_t second_bytes = params.num_row_arrays > 1 ? params.rows[1].row_bytes : 0;
  plan.lanes = PlanLanes(config.num_sms, num_nodes + 1 + num_ranks, params.num_tokens, num_nodes, view.box_bytes);
  plan.messages = PlanMessages(row_bytes, second_bytes, DispatchHeaderBytes(params.num_topk), plan.lanes, num_nodes,
                               view.box_bytes);
  if (static_cast<int64_t>(params.num_tokens) * plan.messages.num_pieces >= kMaxSteps) return cudaErrorInvalidValue;

  DispatchPlan& dispatch = plan.dispatch;
  dispatch = DispatchPlan{};
  dispatch.params = params;
  dispatch.num_send_blocks = std::min({plan.lanes.num_blocks, kMaxSendBlocks, params.num_tokens});
  dispatch.num_bins = params.num_experts + (params.layout == Layout::kRank ? num_ranks : 0);
  dispatch.zero_bytes = static_cast<int>(std::min<int64_t>(std::max<int64_t>(row_bytes, 16), kMaxZeroBytes));
  dispatch.zero_rows_offset = (dispatch.zero_bytes + 15) / 16 * 16;
  const int num_local = params.num_experts / num_ranks;
  const int64_t zero_shared = PadTo128(dispatch.zero_rows_offset + (2 * num_local + 3) * 4ll);
  const int64_t with_room = (kMaxDynamicShared - zero_shared) / (kTaskWarps * kConveyorStages) / 128 * 128;
  plan.stages_offset = static_cast<int>(zero_shared);
  plan.stage_bytes = static_cast<int>(
      std::min({std::max<int64_t>(plan.messages.piece_bytes, 128), int64_t{kMostStageBytes}, with_room}));
  const int64_t dispatch_shared = zero_shared + int64_t{kTaskWarps} * kConveyorStages * plan.stage_bytes;
  if (params.operation != kDispatchCached) {
    const int64_t scratch = std::max(kRouteWarps * 32 * num_ranks, params.num_experts + num_ranks);
    const int64_t shared = 4 * ((kRouteWarps + 2ll) * dispatch.num_bins + scratch);
    const int64_t block_tokens = (params.num_tokens + dispatch.num_send_blocks - 1) / dispatch.num_send_blocks + 1;
    dispatch.staged_choices =
        static_cast<int>(std::clamp<int64_t>((kMaxDynamicShared - shared) / 8, 0, block_tokens * params.num_topk));
    InternodeNotifyKernel<<<dispatch.num_send_blocks, kNotifyThreads, shared + 8ll * dispatch.staged_choices, stream>>>(
        plan);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  InternodeDispatchKernel<<<plan.lanes.num_blocks, kInternodeThreads, dispatch_shared, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
