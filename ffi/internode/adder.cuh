// The adder: a token's own rows and the sums in the rings of all other ranks, added where they lie.
#pragma once

#include "internode/combine_lane.cuh"

namespace jax_ep {

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

}  // namespace jax_ep
