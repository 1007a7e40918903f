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
#include "combine/terms.cuh"
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
  CombineTasks tasks;
  Messages messages;

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

// This rank's sums of the tokens of `source`, another one.
template <class T, bool kWeighted, int V>
class SumSender {
  using Pipe = SumPipe<T, kWeighted, V>;

 public:
  __device__ __forceinline__ SumSender(const InternodeCombinePlan& plan, const Call& call, SumShared<V>& memory,
                                       Poster& poster, int lane_number, int source)
      : sums_(plan, call, lane_number,
              plan.combine.recv_slot + static_cast<int64_t>(source) * plan.combine.num_tokens * plan.combine.num_topk,
              0),
        memory_(memory),
        out_(call, plan.view, plan.messages, StreamTo(plan, call, lane_number, source), Written::kByStores, poster) {}

  __device__ __forceinline__ void Run() {
    Pipe pipe(memory_, sums_.row_bytes);
    auto& choices = sums_.choices;
    while (true) {
      if (pipe.Conclude()) out_.Add();
      while (pipe.left <= 0) {
        while (choices.Has() && __ballot_sync(~0u, choices.now().slot >= 0) == 0) choices.Advance();
        // A chunk that it waits for to be read may wait for sums that are still in the pipe to be sent.
        if (choices.Has() && (pipe.NumPending() == 0 || out_.HasRoom())) {
          if (!Begin(pipe)) return WaitCopies<0>();
        } else if (pipe.NumPending() == 0) {
          WaitCopies<0>();  // the pipe's last loads were for nothing, but must not come later
          return out_.Finish();
        } else {
          break;
        }
      }
      while (pipe.Step()) {
      }
    }
  }

 private:
  static __device__ __forceinline__ Stream StreamTo(const InternodeCombinePlan& plan, const Call& call, int lane_number,
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

  // One message. False: its slot will not be read.
  __device__ __forceinline__ bool Begin(Pipe& pipe) {
    const CombineParams& p = sums_.p;
    const int lane = sums_.lane;
    char* const message = out_.Next();
    if (message == nullptr) return false;
    if (p.carried != nullptr && lane < p.num_topk) reinterpret_cast<float*>(message)[lane] = sums_.Carried();
    const PieceRange range = sums_.plan.Piece(sums_.piece);
    const char* const term = sums_.OwnTerm();
    if (range.size > 0) {
      __syncwarp();  // the terms of the sum before have been read
      const int count = PutOwnTerms(memory_, term, sums_.choices.now().weight, kStore);
      pipe.Begin(memory_, count, message + sums_.plan.messages.header_bytes - range.begin,
                 static_cast<int>(range.begin), static_cast<int>(range.begin + range.size));
    } else {
      out_.Add();
    }
    sums_.NextPiece();
    return true;
  }

  LaneSums<kWeighted> sums_;
  SumShared<V>& memory_;
  Outgoing out_;
};

// Adds the sums of a lane's tokens, part of their columns: this rank's own, made here, and those in the rings of all
// others. Warp lane r follows the ring of rank r.
template <class T, bool kWeighted, int V>
class Adder {
  using Pipe = SumPipe<T, kWeighted, V>;

 public:
  __device__ __forceinline__ Adder(const InternodeCombinePlan& plan, const Call& call, SumShared<V>& memory,
                                   Poster& poster, int lane_number, int part)
      : sums_(plan, call, lane_number, plan.combine.slot, call.rank * plan.combine.max_recv_tokens),
        memory_(memory),
        poster_(poster),
        lane_(threadIdx.x % 32),
        part_(part),
        open_(lane_ < call.num_ranks && lane_ != call.rank) {
    const int ring = min(lane_, call.num_ranks - 1);
    ring_ = Inbox(plan.view) + plan.Ring(lane_number, ring);
    arrived_ = plan.view.room->arrived[lane_number][ring];
    freed_ = plan.view.room->freed[part][lane_number][call.rank];
  }

  __device__ __forceinline__ void Run() {
    Pipe pipe(memory_, sums_.row_bytes);
    while (true) {
      if (pipe.Conclude()) Free(pipe.ended);
      while (pipe.left <= 0) {
        if (sums_.choices.Has() && IsReady()) {
          Begin(pipe);
        } else if (pipe.NumPending() > 0) {
          break;
        } else if (!sums_.choices.Has()) {
          WaitCopies<0>();  // the pipe's last loads were for nothing, but must not come later
          return Close();
        } else if (!AwaitMessages()) {
          return WaitCopies<0>();
        }
      }
      while (pipe.Step()) {
      }
    }
  }

 private:
  // The rank that this lane's choice of the token is on, or -1.
  __device__ __forceinline__ int Owner() const {
    const int slot = sums_.choices.now().slot;
    return slot >= 0 ? slot / sums_.p.max_recv_tokens : -1;
  }
  // The other ranks that have rows of the token, as bits.
  __device__ __forceinline__ uint32_t Peers() const {
    const int owner = Owner();
    return __reduce_or_sync(~0u, owner >= 0 ? 1u << owner : 0u) & ~(1u << sums_.call.rank);
  }
  __device__ __forceinline__ bool IsWanted(uint32_t peers) const { return (peers >> lane_ & 1) != 0; }
  __device__ __forceinline__ bool IsUsedUp() const { return index_ == count_; }
  __device__ __forceinline__ uint64_t* Arrived() const { return arrived_ + chunk_ % kSlots; }

  // Whether all messages of the token are here. A ring has at most one chunk that is used up and not freed.
  __device__ __forceinline__ bool IsReady() {
    bool ready = true;
    if (IsWanted(Peers())) {
      if (IsUsedUp()) {
        const uint64_t value = LoadAcquireSys(Arrived()), expected = sums_.call.Tag(chunk_ + 1);
        ready = Reached(sums_.call, value, chunk_ + 1);
        if (ready) {
          SettleArrival(Arrived(), expected);
          Open();
        }
      }
      if (ready && index_ + 1 == count_ && owes_) ready = false;
    }
    ready = __all_sync(~0u, ready);
    __syncwarp();  // each lane acquired for all
    return ready;
  }

  // Waits for those that are missing; nothing is in the pipe. False: some will not come.
  __device__ __forceinline__ bool AwaitMessages() {
    bool came = true;
    if (IsWanted(Peers()) && IsUsedUp()) {
      came = AwaitOverNodes(sums_.call, sums_.plan.view, Arrived(), chunk_ + 1, kLines, lane_, sums_.lane_number);
      if (came) Open();
    }
    came = __all_sync(~0u, came);
    __syncwarp();  // each lane acquired for all
    return came;
  }

  // The next chunk of this lane's ring, which is here.
  __device__ __forceinline__ void Open() {
    place_ = ring_ + chunk_ % kSlots * sums_.plan.messages.slot_bytes;
    const int4 head = LoadRow(place_);
    count_ = head.x, index_ = 0;
    open_ = head.y == 0;
    ++chunk_;
  }

  // Adds one piece of the token.
  __device__ __forceinline__ void Begin(Pipe& pipe) {
    const CombineParams& p = sums_.p;
    const Messages& messages = sums_.plan.messages;
    const uint32_t peers = Peers();
    const char* message = nullptr;
    if (IsWanted(peers)) {
      message = place_ + messages.ChunkBytes(index_);
      if (++index_ == count_) owes_ = true, owed_ = chunk_ - 1;
    }
    const int token = sums_.choices.now().token;
    if (p.carried_back != nullptr && sums_.piece == 0 && part_ == 0) CarryBack(token, message);
    const PieceRange range = sums_.plan.Piece(sums_.piece);
    char* const target = p.out + static_cast<int64_t>(token) * p.row_bytes;
    const char* const term = sums_.OwnTerm();
    const int begin = static_cast<int>(range.begin) + EndOfPart(range.size, part_ - 1);
    const int end = static_cast<int>(range.begin) + EndOfPart(range.size, part_);
    if (range.size > 0) {
      __syncwarp();  // the terms of the sum before have been read
      const int count = PutSumsOfRanks(memory_, term, sums_.choices.now().weight, sums_.call.rank, peers,
                                       message + messages.header_bytes - range.begin);
      if (count > 0) pipe.Begin(memory_, count, target, begin, end);
      // A token without rows sums to zero.
      for (int i = begin + lane_ * 16; count == 0 && i < end; i += 512) *reinterpret_cast<int4*>(target + i) = int4{};
    }
    if (message != nullptr && IsUsedUp()) used_by_ = pipe.begun;
    if (range.size == 0) Free(pipe.ended);
    sums_.NextPiece();
  }

  // Of so many bytes, where the columns of an adder end.
  __device__ __forceinline__ int EndOfPart(int64_t num_bytes, int part) const {
    return static_cast<int>(num_bytes / 16) * (part + 1) / sums_.plan.tasks.adders * 16;
  }

  __device__ __forceinline__ void CarryBack(int token, const char* message) const {
    const CombineParams& p = sums_.p;
    const int owner = Owner();
    const auto from =
        reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(message), owner >= 0 ? owner : 0));
    if (lane_ >= p.num_topk) return;
    float carried = 0.f;
    if (owner == sums_.call.rank) carried = sums_.Carried();
    if (owner >= 0 && owner != sums_.call.rank) carried = __ldcg(reinterpret_cast<const float*>(from) + lane_);
    p.carried_back[static_cast<int64_t>(token) * p.num_topk + lane_] = carried;
  }

  // Tells the writers of chunks that are used up, by sums that have been added, that they may write again.
  __device__ __forceinline__ void Free(uint32_t ended) {
    const bool frees = owes_ && static_cast<int32_t>(ended - used_by_) >= 0;
    if (!__any_sync(~0u, frees)) return;
    TellFreed(frees, owed_);
    if (frees) owes_ = false;
  }
  __device__ __forceinline__ void TellFreed(bool frees, uint32_t chunk) {
    poster_.Post(frees, lane_, freed_ + chunk % kSlots, sums_.call.Tag(chunk + 1));
  }

  // A ring's last chunk may have no messages.
  __device__ __forceinline__ void Close() {
    while (__any_sync(~0u, open_)) {
      const bool opens = open_;
      bool came = true;
      if (opens)
        came = AwaitOverNodes(sums_.call, sums_.plan.view, Arrived(), chunk_ + 1, kLines, lane_, sums_.lane_number);
      if (!__all_sync(~0u, came)) return;
      if (opens) Open();
      TellFreed(opens, chunk_ - 1);
    }
  }

  LaneSums<kWeighted> sums_;
  SumShared<V>& memory_;
  Poster& poster_;
  const int lane_, part_;
  const char *ring_, *place_ = nullptr;  // this lane's ring, its chunk that is read
  uint64_t *arrived_, *freed_;           // [kSlots]
  uint32_t chunk_ = 0;                   // chunks that were begun
  int index_ = 0, count_ = 0;            // messages used, and there are, of the last one
  bool open_;                            // more chunks will come
  bool owes_ = false;                    // chunk owed_ is used up, by sum number used_by_, and not freed
  uint32_t owed_ = 0, used_by_ = 0;
};

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

template <class T, bool kWeighted, int V>
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
  if (met && warp == kTaskWarps) {
    Publish(notices, plan.view, [] { return false; });
  } else if (met) {
    auto& memory = reinterpret_cast<SumShared<V>*>(dynamic)[warp];
    Poster poster(notices, plan.view, plan.lanes.few_tokens);
    if (lane_number >= plan.lanes.num_lanes) {
      // There is no such lane.
    } else if (task < plan.tasks.senders) {
      const int source = (call.rank + 1 + task) % call.num_ranks;
      SumSender<T, kWeighted, V>(plan, call, memory, poster, lane_number, source).Run();
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

struct Kernels {
  static constexpr int kWide =
      4;  // vectors that a lane has of what is added at once; one where an adder's part is shorter
  template <class T, bool kWeighted, int V>
  static Instance<InternodeCombinePlan> Of() {
    return {InternodeCombineKernel<T, kWeighted, V>, kTaskWarps * int{sizeof(SumShared<V>)}};
  }
};

}  // namespace

cudaError_t LoadInternodeCombine() { return LoadInstances<Kernels>(); }

cudaError_t LaunchInternodeCombine(const CombineParams& params, const InternodeView& view,
                                   const InternodeConfig& config, cudaStream_t stream) {
  InternodeCombinePlan plan;
  plan.combine = params;
  plan.view = view;
  const int num_ranks = view.nodes.num_nodes * view.nodes.ranks_per_node;
  if (config.direct) plan.view.nodes = EachRankANode(num_ranks);
  const bool all_mapped = std::all_of(view.room_of, view.room_of + num_ranks, [](const Room* room) { return room; });
  plan.tasks = CombineTasksOf(plan.view.nodes.num_nodes, plan.view.nodes.ranks_per_node, all_mapped, params.num_tokens,
                              params.row_bytes);
  plan.lanes = PlanLanes(config.num_sms, plan.tasks.count(), params.num_tokens, num_ranks, view.box_bytes);
  const int64_t header_bytes = params.carried != nullptr ? 4ll * params.num_topk : 0;
  plan.messages = PlanMessages(params.row_bytes, 0, header_bytes, plan.lanes, num_ranks, view.box_bytes);
  if (static_cast<int64_t>(params.num_tokens) * plan.messages.num_pieces >= kMaxSteps) return cudaErrorInvalidValue;
  const int64_t shortest = std::min(params.row_bytes, plan.messages.piece_bytes) / plan.tasks.adders;
  const auto instance = InstanceFor<Kernels>(params.dtype, params.weights != nullptr, shortest >= 512 * Kernels::kWide);
  instance.kernel<<<plan.lanes.num_blocks, kInternodeThreads, instance.shared_bytes, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace jax_ep
