// Dispatch over nodes: two kernels a call (one along a known routing). internode.h has the contract, docs/protocol.md
// the order of events.
//
//   Notify     counts to every rank, every rank's counts, places: slot
//   Dispatch   warps of a lane   waits for                    signals
//     sender (a node)            freed by that node's ranks   arrived at the rank there with its local index
//     announcer                  arrived of all nodes         announced at the ranks of this node
//     reader (another rank)      announced                    freed at that rank
//              other warps
//     publisher (last of a block)  zero rows, where nothing is to be published
//     own rows                   nothing; those of a lane join in when they are done
//
// Nobody waits for another warp's wait: readers always read, so slots are freed, so senders send.
#include <algorithm>

#include "device/load.h"
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
constexpr int64_t kMaxDynamicShared = 232448 - 2048 - int64_t{sizeof(Notices)};  // a block's limit less the static part

struct InternodeDispatchPlan {
  DispatchPlan dispatch;
  InternodeView view;
  Lanes lanes;
  DispatchTasks tasks;
  Messages messages;
  Written written;
  int stages_offset, stage_bytes;  // of dynamic shared memory

  // Where in a box of a rank on node `at` the ring of a lane and of node `of` begins.
  __device__ __forceinline__ int64_t Ring(int lane_number, int at, int of) const {
    const int skips_own = view.nodes.ranks_per_node == 1 ? 1 : 0;  // DispatchRings
    const int64_t ring = int64_t{lane_number} * (view.nodes.num_nodes - skips_own) + of - (of > at ? skips_own : 0);
    return ring * messages.RingBytes();
  }
  __device__ __forceinline__ int64_t row_bytes() const {
    return dispatch.params.num_row_arrays > 0 ? dispatch.params.rows[0].row_bytes : 0;
  }
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
    if (!IsMapped(view, peer)) {
      PutAndSignal(view, peer, reinterpret_cast<char*>(counts), reinterpret_cast<const char*>(outgoing),
                   plan.dispatch.num_bins * 4ll, post, call.Tag(kPosted));
      continue;
    }
    int32_t* const there = In(view, peer, counts);
    for (int bin = threadIdx.x % 32; peer != call.rank && bin < plan.dispatch.num_bins; bin += 32)
      there[bin] = outgoing[bin];
    __syncwarp();
    FenceSys();
    if (threadIdx.x % 32 == 0) StoreRelaxedSys(In(view, peer, post), call.Tag(kPosted));
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

// This lane's tokens to one node, each once; those that only this rank wants stay.
__device__ __forceinline__ void SendToNode(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                           Poster& poster, int lane_number, int node) {
  const DispatchParams& p = plan.dispatch.params;
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const Messages& messages = plan.messages;
  const int lane = threadIdx.x % 32, own_node = nodes.node[call.rank];
  char* const inbox = Inbox(view) + plan.Ring(lane_number, node, own_node);
  char* const outbox = Outbox(view) + plan.Ring(lane_number, own_node, node);
  uint8_t readers[kMaxRanks];
  Stream stream{};
  stream.to = nodes.rank_at[node * nodes.ranks_per_node + nodes.local[call.rank]];
  const bool is_mapped = IsMapped(view, stream.to);
  stream.ring = is_mapped ? In(view, stream.to, inbox) : outbox;
  stream.far_ring = is_mapped ? nullptr : inbox;
  stream.told = view.room->arrived[lane_number][own_node];
  stream.freed = view.room->freed;
  stream.num_parts = 1;
  stream.readers = readers;
  for (int i = 0; i < nodes.ranks_per_node; ++i) {
    const uint8_t reader = nodes.rank_at[node * nodes.ranks_per_node + i];
    if (reader != call.rank) readers[stream.num_readers++] = reader;
  }
  stream.lane = lane_number;
  Outgoing out(call, view, messages, stream, plan.written, poster);

  const LaneTokens tokens(p.num_tokens, lane_number, plan.lanes.num_lanes);
  const bool has_expert = p.layout == Layout::kRank && p.operation != kDispatchCached;
  struct Outbound {  // a token, and this lane's choice of it
    int token, slot = -1, expert = -1;
    float weight = 0.f;
  };
  const auto ask = [&](int token) {
    Outbound asked{token};
    if (lane < p.num_topk && token < tokens.end) {
      const int64_t choice = static_cast<int64_t>(token) * p.num_topk + lane;
      asked.slot = p.slot[choice];
      if (has_expert) asked.expert = p.topk_idx[choice];
      if (p.topk_weights != nullptr) asked.weight = p.topk_weights[choice];
    }
    return asked;
  };
  Outbound asked = ask(tokens.begin);
  const auto next_that_goes = [&] {
    while (asked.token < tokens.end) {
      const Outbound found = asked;
      asked = ask(found.token + 1);
      const int rank = found.slot >= 0 ? found.slot / p.max_recv_tokens : call.rank;
      if (__any_sync(~0u, rank != call.rank && nodes.node[rank] == node)) return found;
    }
    return asked;
  };
  const auto begin = [&](int token, int piece) {
    const PieceRange range = PieceOf(plan.row_bytes(), messages.piece_bytes, piece);
    if (token < tokens.end) conveyor.Begin(p.rows[0].x + token * plan.row_bytes() + range.begin, range.size);
  };
  Outbound now = next_that_goes();
  int piece = 0;
  begin(now.token, piece);
  while (now.token < tokens.end) {
    const bool ends = piece + 1 == messages.num_pieces;
    const Outbound next = ends ? next_that_goes() : now;
    const int next_piece = ends ? 0 : piece + 1;
    begin(next.token, next_piece);
    char* const message = out.Next();
    if (message == nullptr) return conveyor.Drop();
    if (lane == 0) *reinterpret_cast<int4*>(message) = make_int4(now.token, piece, 0, 0);
    const Choices choices(message, p.num_topk);
    if (lane < p.num_topk) {
      choices.slot[lane] = now.slot;
      choices.expert[lane] = now.expert;
      choices.weight[lane] = now.weight;
    }
    char* place = message + messages.header_bytes;
    conveyor.Finish(lane == 0 ? place : nullptr, PieceOf(plan.row_bytes(), messages.piece_bytes, piece).size);
    place += messages.piece_bytes;
    if (p.num_row_arrays > 1) {
      const PieceRange second = PieceOf(p.rows[1].row_bytes, messages.second_bytes, piece);
      CopyUnits(place, p.rows[1].x + now.token * p.rows[1].row_bytes + second.begin, second.size,
                UnitOf(p.rows[1].row_bytes));
    }
    out.Add();
    now = next, piece = next_piece;
  }
  out.Finish();
}

// What came for this node into this rank's inbox is there for all its ranks.
__device__ void Announce(const InternodeDispatchPlan& plan, const Call& call, int lane_number) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const int lane = threadIdx.x % 32, local = nodes.local[call.rank], own_node = nodes.node[call.rank];
  const auto source_of = [&](int node) { return nodes.rank_at[node * nodes.ranks_per_node + local]; };
  PassOnChunks(
      call, view, nodes.num_nodes == 32 ? ~0u : (1u << nodes.num_nodes) - 1, lane_number,
      [&](int node) { return view.room->arrived[lane_number][node]; }, source_of,
      [&](uint32_t mask, uint32_t chunk) {
        if ((mask >> lane & 1) == 0) return false;
        const int slot = static_cast<int>(chunk % kSlots);
        const char* const place =
            Inbox(view) + plan.Ring(lane_number, own_node, lane) + slot * plan.messages.slot_bytes;
        const bool is_last = LoadRow(place).y != 0;
        FenceSys();  // the chunk, acquired by this lane, before the flags
        for (int i = 0; i < nodes.ranks_per_node; ++i) {
          const int peer = nodes.rank_at[own_node * nodes.ranks_per_node + (local + i) % nodes.ranks_per_node];
          if (peer == source_of(lane)) continue;  // it reads its own rows where they are
          StoreRelaxedSys(In(view, peer, &view.room->announced[lane_number][source_of(lane)][slot]),
                          call.Tag(chunk + 1));
        }
        return is_last;
      });
}

// A piece of a token's row that lies at `first`, and this lane's choice of the token.
struct Part {
  const char* first = nullptr;
  int token = -1, piece = 0;
  int row = -1;  // here
  int expert = -1;
  float weight = 0.f;

  // `slot` is a place on any rank.
  __device__ __forceinline__ void SetRow(const DispatchParams& p, int rank, int slot) {
    const int at = slot - rank * p.max_recv_tokens;
    row = slot >= 0 && at >= 0 && at < p.max_recv_tokens ? at : -1;
  }
};

// Stores a part of a token of `source`, whose row the conveyor has begun, at all its rows here: there are some.
template <class Parts>
__device__ __forceinline__ void TakePart(const Parts& parts, const Call& call, Conveyor& conveyor, int source,
                                         const Part& part) {
  const DispatchPlan& plan = parts.plan.dispatch;
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_topk = p.num_topk, row = part.row;
  const uint32_t holders = __ballot_sync(~0u, row >= 0);
  const int first_row = __shfl_sync(~0u, row, __ffs(holders) - 1);
  if (part.piece == 0 && lane < num_topk) {
    if (p.operation != kDispatchCached) {
      p.recv_slot[(static_cast<int64_t>(source) * p.num_tokens + part.token) * num_topk + lane] = row;
    }
    if (p.layout != Layout::kRank) {
      if (row >= 0 && p.recv_weights != nullptr) p.recv_weights[row] = part.weight;
    } else {
      const int64_t place = static_cast<int64_t>(first_row) * num_topk + lane;
      const int num_local = p.num_experts / call.num_ranks;
      if (p.recv_weights != nullptr) p.recv_weights[place] = row >= 0 ? part.weight : 0.f;
      if (p.operation != kDispatchCached) p.recv_topk_idx[place] = row >= 0 ? part.expert % num_local : -1;
    }
  }
  __syncwarp();
  const int own_row = DistinctRow(plan, row);
  const PieceRange range = parts.Range(part);
  conveyor.Finish(own_row >= 0 ? p.rows[0].recv + own_row * p.rows[0].row_bytes + range.begin : nullptr, range.size);
  if (p.num_row_arrays > 1) {
    const PieceRange second = parts.SecondRange(part);
    for (uint32_t rest = __ballot_sync(~0u, own_row >= 0); rest != 0; rest &= rest - 1) {
      const int64_t target = __shfl_sync(~0u, row, __ffs(rest) - 1);
      CopyUnits(p.rows[1].recv + target * p.rows[1].row_bytes + second.begin, parts.Second(part), second.size,
                UnitOf(p.rows[1].row_bytes));
    }
  }
}

// Takes all of `parts`, each begun while the one before is stored. Of what Ask loads for a part no more than `first`
// and `row` is wanted before the next Ask.
template <class Parts>
__device__ __forceinline__ void TakeParts(Parts parts, const Call& call, Conveyor& conveyor, int source) {
  const auto begin = [&](const Part& part) {
    const bool here = __any_sync(~0u, part.row >= 0);
    if (here) conveyor.Begin(part.first, parts.Range(part).size);
    return here;
  };
  Part now = parts.Ask(), next = parts.Ask();
  bool now_is_here = begin(now);
  while (now.token >= 0) {
    const Part later = parts.Ask();
    const bool next_is_here = begin(next);
    if (now_is_here) TakePart(parts, call, conveyor, source, now);
    now = next, now_is_here = next_is_here;
    next = later;
  }
}

// The messages of a chunk, the first at `next`.
struct PartsOfChunk {
  const InternodeDispatchPlan& plan;
  const int rank;
  const char* next;
  int left;

  // No token: there are no more.
  __device__ __forceinline__ Part Ask() {
    Part part;
    if (left == 0) return part;
    const DispatchParams& p = plan.dispatch.params;
    const int lane = threadIdx.x % 32;
    const Choices choices(next, p.num_topk);
    const int4 head = LoadRow(next);
    if (lane < p.num_topk) {
      part.SetRow(p, rank, __ldcg(choices.slot + lane));
      part.expert = __ldcg(choices.expert + lane);
      part.weight = __ldcg(choices.weight + lane);
    }
    part.token = head.x, part.piece = head.y;
    part.first = next + plan.messages.header_bytes;
    next += plan.messages.message_bytes;
    --left;
    return part;
  }
  __device__ __forceinline__ PieceRange Range(const Part& part) const {
    return PieceOf(plan.row_bytes(), plan.messages.piece_bytes, part.piece);
  }
  __device__ __forceinline__ PieceRange SecondRange(const Part& part) const {
    return PieceOf(plan.dispatch.params.rows[1].row_bytes, plan.messages.second_bytes, part.piece);
  }
  __device__ __forceinline__ const char* Second(const Part& part) const {
    return part.first + plan.messages.piece_bytes;
  }
};

// This rank's own tokens, whole; all warps of the grid share them. Where there are at most as many as warps each has
// one at most, and the first are those of the last warps, which have no task of a lane: to ask a counter takes longer.
struct PartsOfOwnTokens {
  const InternodeDispatchPlan& plan;
  const int rank;
  Taken* const counter;  // or null
  int next;              // without one

  __device__ __forceinline__ Part Ask() {
    Part part;
    const DispatchParams& p = plan.dispatch.params;
    const int lane = threadIdx.x % 32;
    const unsigned int token = counter != nullptr ? counter->Next() : next;
    next = p.num_tokens;
    if (token >= static_cast<unsigned int>(p.num_tokens)) return part;
    if (lane < p.num_topk) {
      const int64_t choice = static_cast<int64_t>(token) * p.num_topk + lane;
      part.SetRow(p, rank, p.slot[choice]);
      if (p.topk_weights != nullptr) part.weight = p.topk_weights[choice];
      if (p.operation != kDispatchCached) part.expert = p.topk_idx[choice];
    }
    part.token = static_cast<int>(token);
    part.first = p.rows[0].x + part.token * p.rows[0].row_bytes;
    return part;
  }
  __device__ __forceinline__ PieceRange Range(const Part&) const { return {0, plan.row_bytes()}; }
  __device__ __forceinline__ PieceRange SecondRange(const Part&) const {
    return {0, plan.dispatch.params.rows[1].row_bytes};
  }
  __device__ __forceinline__ const char* Second(const Part& part) const {
    return plan.dispatch.params.rows[1].x + part.token * plan.dispatch.params.rows[1].row_bytes;
  }
};

// This rank's rows of another, from the inbox of the rank of this node on that source's rail.
__device__ __forceinline__ void ReadSource(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                           Poster& poster, int lane_number, int source) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  const int node = nodes.node[source], own_node = nodes.node[call.rank];
  const int rail = nodes.rank_at[own_node * nodes.ranks_per_node + nodes.local[source]];
  uint64_t* const flags =
      nodes.ranks_per_node == 1 ? view.room->arrived[lane_number][node] : view.room->announced[lane_number][source];
  const char* const ring = In(view, rail, Inbox(view)) + plan.Ring(lane_number, own_node, node);
  ReadChunks(call, view, plan.messages, ring, flags, source, lane_number, poster, [&](const char* chunk, int count) {
    TakeParts(PartsOfChunk{plan, call.rank, chunk, count}, call, conveyor, source);
  });
}

__device__ __forceinline__ void CopyOwnRows(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor) {
  const int num_warps = kTaskWarps * static_cast<int>(gridDim.x), num_tokens = plan.dispatch.params.num_tokens;
  const int warp = static_cast<int>(threadIdx.x) / 32 * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  if (num_tokens <= num_warps) {
    TakeParts(PartsOfOwnTokens{plan, call.rank, nullptr, num_warps - 1 - warp}, call, conveyor, call.rank);
  } else {
    Taken counter(&plan.view.room->taken_own_rows);
    TakeParts(PartsOfOwnTokens{plan, call.rank, &counter, 0}, call, conveyor, call.rank);
  }
  WaitBulkDone<0>();
}

// With many tokens the three that move rows are functions of their own, as one that had all would run out of registers.
// With few tokens the time until all is under way counts, and in functions the plan is read through memory: there they
// are part of the kernel.
template <bool kFew>
struct Roles {
  static __device__ __forceinline__ void Send(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                              Poster& poster, int lane_number, int node) {
    SendToNode(plan, call, conveyor, poster, lane_number, node);
  }
  static __device__ __forceinline__ void Read(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                              Poster& poster, int lane_number, int source) {
    ReadSource(plan, call, conveyor, poster, lane_number, source);
  }
  static __device__ __forceinline__ void CopyOwn(const InternodeDispatchPlan& plan, const Call& call,
                                                 Conveyor& conveyor) {
    CopyOwnRows(plan, call, conveyor);
  }
};

template <>
struct Roles<false> {
  static __device__ __forceinline__ void Send(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                              Poster& poster, int lane_number, int node) {
    conveyor = SendApart(plan, call, conveyor, poster, lane_number, node);
  }
  static __device__ __forceinline__ void Read(const InternodeDispatchPlan& plan, const Call& call, Conveyor& conveyor,
                                              Poster& poster, int lane_number, int source) {
    conveyor = ReadApart(plan, call, conveyor, poster, lane_number, source);
  }
  static __device__ __forceinline__ void CopyOwn(const InternodeDispatchPlan& plan, const Call& call,
                                                 Conveyor& conveyor) {
    CopyOwnApart(plan, call, conveyor);
  }

 private:  // each takes the conveyor and hands it on: by reference it would lie in memory
  static __device__ __noinline__ Conveyor SendApart(const InternodeDispatchPlan& plan, const Call& call,
                                                    Conveyor conveyor, Poster& poster, int lane_number, int node) {
    SendToNode(plan, call, conveyor, poster, lane_number, node);
    return conveyor;
  }
  static __device__ __noinline__ Conveyor ReadApart(const InternodeDispatchPlan& plan, const Call& call,
                                                    Conveyor conveyor, Poster& poster, int lane_number, int source) {
    ReadSource(plan, call, conveyor, poster, lane_number, source);
    return conveyor;
  }
  static __device__ __noinline__ void CopyOwnApart(const InternodeDispatchPlan& plan, const Call& call,
                                                   Conveyor conveyor) {
    CopyOwnRows(plan, call, conveyor);
  }
};

template <bool kFew>
__global__ void __launch_bounds__(kInternodeThreads, 1)
    InternodeDispatchKernel(const __grid_constant__ InternodeDispatchPlan plan) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ Notices notices;
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
  notices.Clear();
  bool met = TakesPart(call, view, p.refused);
  if (met && p.operation == kDispatchCached) met = MeetOverNodes(call, view);  // else Notify has
  if (met && warp == kTaskWarps) FindZeroRows(plan.dispatch, p.counts, p.counts[zero.num_ranges - 1], zero);
  FenceProxyAsync();  // zeros are read, and boxes that all ranks have left written, by bulk copies
  __syncthreads();
  if (met && warp == kTaskWarps) {
    Taken zero_rows(&view.room->taken_zero_rows);
    int range = 0;
    bool some_left = true;
    const auto write_zero_rows = [&] {
      if (some_left) some_left = WriteSomeZeroRows(plan.dispatch, zero, dynamic, zero_rows, &range);
      return some_left;
    };
    Publish(notices, view, write_zero_rows);
    while (write_zero_rows()) continue;
  } else if (met) {
    const int index = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    const int lane_number = index / plan.lanes.num_tasks, task = index % plan.lanes.num_tasks;
    const int reader = task - plan.tasks.senders - plan.tasks.announcers;
    Conveyor conveyor(dynamic + plan.stages_offset + warp * kConveyorStages * plan.stage_bytes, plan.stage_bytes,
                      full[warp]);
    Poster poster(notices, view, plan.lanes.few_tokens);
    if (lane_number >= plan.lanes.num_lanes) {
      // There is no such lane.
    } else if (reader >= 0) {
      const int source = (call.rank + call.num_ranks - 1 - reader) % call.num_ranks;
      Roles<kFew>::Read(plan, call, conveyor, poster, lane_number, source);
    } else if (task >= plan.tasks.senders) {
      Announce(plan, call, lane_number);
    } else {
      // Other nodes first: the own one, if it has other ranks, is the last task.
      const int node = (nodes.node[call.rank] + 1 + task) % nodes.num_nodes;
      Roles<kFew>::Send(plan, call, conveyor, poster, lane_number, node);
    }
    poster.Close();
    Roles<kFew>::CopyOwn(plan, call, conveyor);
  }
  WaitBulkDone<0>();
  if (IsLastBlock(call)) {
    if (HasFailed(call)) ClearResults<kInternodeThreads>(p, call);
    if (threadIdx.x == 0) view.room->taken_zero_rows = view.room->taken_own_rows = 0;
    EndOverNodes(call, view);
  }
}

}  // namespace

cudaError_t LoadInternodeDispatch() {
  for (const auto kernel : {InternodeDispatchKernel<true>, InternodeDispatchKernel<false>, InternodeNotifyKernel}) {
    if (cudaError_t error = LoadKernel(kernel, kMaxDynamicShared); error != cudaSuccess) return error;
  }
  return cudaSuccess;
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
  plan.tasks = DispatchTasksOf(num_nodes, plan.view.nodes.ranks_per_node);
  const int num_rings = DispatchRings(num_nodes, plan.view.nodes.ranks_per_node);
  plan.lanes = PlanLanes(config.num_sms, plan.tasks.count(), params.num_tokens, num_rings, view.box_bytes);
  plan.messages = PlanMessages(row_bytes, second_bytes, DispatchHeaderBytes(params.num_topk), plan.lanes, num_rings,
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
  const int64_t shortest = row_bytes - (plan.messages.num_pieces - 1) * plan.messages.piece_bytes;
  plan.written = WrittenInGroups(shortest, plan.stage_bytes);
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
  const auto kernel = plan.lanes.few_tokens ? InternodeDispatchKernel<true> : InternodeDispatchKernel<false>;
  kernel<<<plan.lanes.num_blocks, kInternodeThreads, dispatch_shared, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
