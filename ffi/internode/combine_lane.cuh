// A lane of a combine over nodes: what all of its warps read. Neighbours: sum_sender.cuh, row_sender.cuh and adder.cuh
// are its warps, internode_combine.cu is the kernel.
#pragma once

#include "combine/terms.cuh"
#include "internode/ring.cuh"

namespace jax_ep {

struct InternodeCombinePlan {
  CombineParams combine;
  InternodeView view;
  Lanes lanes;
  CombineTasks tasks;
  Messages messages;
  Written written;  // rows, where they are sent as they are
  int stage_bytes;

  // Rings of a lane: in the inbox one a rank; in the outbox one a (node, local index of the rank that sends through
  // here).
  __device__ int64_t Ring(int lane_number, int of) const {
    const int num_ranks = view.nodes.num_nodes * view.nodes.ranks_per_node;
    return (static_cast<int64_t>(lane_number) * num_ranks + of) * messages.RingBytes();
  }
  // The columns of a message: all messages of a row are equally long, so the last two may overlap.
  __device__ PieceRange Piece(int piece) const {
    const int64_t size = min(messages.piece_bytes, combine.row_bytes);
    return {min(piece * messages.piece_bytes, combine.row_bytes - size), size};
  }
};

// One token of a lane, as a warp's lane sees it.
struct Choice {
  int token;
  int slot = -1;  // of this lane's choice: on any rank, or here
  float weight = 1.f;
};

// The tokens of a lane in their order: their choices are asked for two tokens ahead, the weights of rows here one
// ahead.
template <bool kWeighted>
class Choices {
 public:
  // `slots`, [T, K]: a row here is first, first + 1, ...
  __device__ Choices(const CombineParams& p, const LaneTokens& tokens, const int32_t* slots, int first)
      : p_(p), slots_(slots), first_(first), end_(tokens.end), next_token_(tokens.begin) {
    now_ = Ask();
    LoadWeight(now_);
    next_ = Ask();
  }
  // Whether `now` is a token.
  __device__ __forceinline__ bool Has() const { return now_.token < end_; }
  __device__ __forceinline__ const Choice& now() const { return now_; }
  // The row here that this lane's choice names, or -1.
  __device__ __forceinline__ int Row() const { return RowOf(now_); }
  __device__ __forceinline__ void Advance() {
    now_ = next_;
    LoadWeight(now_);
    next_ = Ask();
  }

 private:
  __device__ __forceinline__ int RowOf(const Choice& choice) const {
    const int row = choice.slot - first_;
    return choice.slot >= 0 && row >= 0 && row < p_.max_recv_tokens ? row : -1;
  }
  __device__ __forceinline__ Choice Ask() {
    Choice choice{next_token_};
    const int lane = threadIdx.x % 32;
    if (next_token_ < end_ && lane < p_.num_topk)
      choice.slot = slots_[static_cast<int64_t>(next_token_) * p_.num_topk + lane];
    if (next_token_ < end_) ++next_token_;
    return choice;
  }
  __device__ __forceinline__ void LoadWeight(Choice& choice) const {
    const int row = kWeighted ? RowOf(choice) : -1;
    if (row >= 0) choice.weight = p_.weights[row];
  }

  const CombineParams& p_;
  const int32_t* const slots_;
  const int first_, end_;
  int next_token_;
  Choice now_, next_;
};

// The stream of a lane's sums, or rows, to `source`.
__device__ __forceinline__ Stream StreamTo(const InternodeCombinePlan& plan, const Call& call, int lane_number,
                                           int source) {
  const InternodeView& view = plan.view;
  const Nodes& nodes = view.nodes;
  char* const inbox = Inbox(view) + plan.Ring(lane_number, call.rank);
  Stream stream{};
  stream.freed = view.room->freed;
  stream.num_parts = plan.tasks.adders;
  stream.readers = nodes.rank_at + nodes.node[source] * nodes.ranks_per_node + nodes.local[source];  // `source`
  stream.num_readers = 1;
  stream.lane = lane_number;
  stream.to = source;
  stream.told = view.room->arrived[lane_number][call.rank];
  if (IsMapped(view, source)) {
    stream.ring = In(view, source, inbox);
    return stream;
  }
  // Through the rank of this node that has the source's local index.
  const int rail = nodes.rank_at[nodes.node[call.rank] * nodes.ranks_per_node + nodes.local[source]];
  const int through = nodes.node[source] * nodes.ranks_per_node + nodes.local[call.rank];
  stream.ring = In(view, rail, Outbox(view)) + plan.Ring(lane_number, through);
  if (rail == call.rank) {
    stream.far_ring = inbox;
  } else {
    stream.to = rail;
    stream.told = view.room->transit[lane_number][through];
  }
  return stream;
}

// What senders and adders have in common: a stream of sums, one a (token, piece), of a lane. The pipe that adds them is
// apart, so that it stays in registers.
template <bool kWeighted>
struct LaneSums {
  const InternodeCombinePlan& plan;
  const CombineParams& p;
  const Call& call;
  const int lane_number, lane, row_bytes;
  Choices<kWeighted> choices;
  int piece = 0;  // of the token that comes next

  __device__ __forceinline__ LaneSums(const InternodeCombinePlan& plan, const Call& call, int lane_number,
                                      const int32_t* slots, int first)
      : plan(plan),
        p(plan.combine),
        call(call),
        lane_number(lane_number),
        lane(threadIdx.x % 32),
        row_bytes(static_cast<int>(p.row_bytes)),
        choices(p, LaneTokens(p.num_tokens, lane_number, plan.lanes.num_lanes), slots, first) {}

  // This lane's term of the sum of rows here, or null.
  __device__ __forceinline__ const char* OwnTerm() const {
    const int row = choices.Row();
    const uint32_t holders = __ballot_sync(~0u, row >= 0);
    if (row < 0 || (p.one_row_a_rank && lane != __ffs(holders) - 1)) return nullptr;  // there all name the one row
    return p.y + static_cast<int64_t>(row) * row_bytes;
  }
  __device__ __forceinline__ float Carried() const {
    const int row = choices.Row();
    return row < 0 ? 0.f : p.carried[p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + lane : row];
  }
  __device__ __forceinline__ void NextPiece() {
    if (++piece == plan.messages.num_pieces) {
      piece = 0;
      choices.Advance();
    }
  }
};

}  // namespace jax_ep
