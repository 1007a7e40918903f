// The sending warps and the publisher of a dispatch: rows out of this rank, once to every rank that wants them.
//
//   warp            waits for                                        signals
//   sender (0, 1)   shared.slotted, its stage's bulk load            shared.sent, when a chunk's stores are complete
//                   (with an encoding: its encoders)
//   publisher (2)   shared.sent                                      arrived, progress in every rank's window
#pragma once

#include "device/warp.cuh"
#include "dispatch/encode.cuh"
#include "dispatch/pipe.cuh"

namespace jax_ep {

// A sending warp. Its instructions are what few ranks wait for, so places are found for several tokens at once: lane
// j * K + k serves choice k of the j-th. The first choice on a rank sends the row there. Own rows are the copiers'
// work, but for encoded ones: here alone they are. Few rows in flight: more would clog the receivers' links.
template <bool kEncodes>
class Sender {
 public:
  __device__ Sender(const DispatchPlan& plan, const Call& call, DispatchShared& shared, char* stages)
      : plan_(plan),
        call_(call),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        own_(kSendWarps * static_cast<int>(blockIdx.x) + warp_),
        stage_(stages + warp_ * plan.send_bytes) {}

  // Sets own rows on their way into shared memory, before the ranks have met: that needs no peer.
  __device__ void Begin() {
    own_end_ = shared_.lane_begin[own_ + 1];
    slotted_ = plan_.params.operation == kDispatchCached ? own_end_ : shared_.lane_begin[own_];
    next_own_ = TakeOwn();
    while (loads_ + 1 < plan_.send.stages && Load()) continue;
  }

  // Sends what Begin has loaded, and chunks until none are left.
  __device__ void Run() {
    constexpr int kReportEvery = 4, kUnreported = 12;  // pieces; a store over the link takes several µs to complete
    static_assert(kMaxSendStages + kUnreported + kReportEvery <= kChunkRing,
                  "else Take could wait for this warp's own report");
    const DispatchParams& p = plan_.params;
    const Pieces& pieces = plan_.send;
    const bool second_apart = !kEncodes && p.num_row_arrays > 1 && pieces.second_bytes == 0;
    const int batch = 32 / p.num_topk;  // tokens
    int now = 0, next_slot = -1, next_begin = -1;
    uint32_t parity = 0, stored = 0, reported = 0;
    may_help_ = true;
    // Encoders leave no stage to be stored from, so all are filled.
    while (loads_ + (kEncodes ? 0 : 1) < pieces.stages && Load()) continue;
    if (kEncodes) MeetEncoders();
    const auto load_slots = [&](const Tokens& tokens) {
      next_begin = tokens.begin;
      next_slot = lane_ < (tokens.end - tokens.begin) * p.num_topk
                      ? __ldcg(p.slot + static_cast<int64_t>(tokens.begin) * p.num_topk + lane_)
                      : -1;
    };
    const auto report = [&] {
      if (++stored % kReportEvery == 0 && stored > kUnreported) {
        WaitBulkDone<kUnreported>();
        reported = Report(reported, stored - kUnreported);
      }
    };
    for (uint32_t i = 0; i < taken_; ++i) {  // taken_ grows meanwhile
      const Tokens chunk = shared_.chunk[warp_][i % kChunkRing].tokens;
      for (int begin = chunk.begin, end; begin < chunk.end; begin = end) {
        end = min(begin + batch, chunk.end);
        if (next_begin != begin) {
          while (!AreSlotted({begin, end})) __nanosleep(20);
          load_slots({begin, end});
        }
        const Place place = PlaceOf(next_slot);
        for (int token = begin; token < end; ++token) {
          const bool sends = place.token == token - begin;
          if (token + 1 == end) {  // the slots of the next batch are on their way meanwhile
            Tokens next{end, min(end + batch, chunk.end)};
            if (end == chunk.end && i + 1 < taken_) {
              next = shared_.chunk[warp_][(i + 1) % kChunkRing].tokens;
              next.end = min(next.begin + batch, next.end);
            }
            if (next.begin < next.end && AreSlotted(next)) load_slots(next);
          }
          if constexpr (kEncodes) {
            SendEncoded(sends, place, stage_ + pieces.stages * pieces.stride + now * plan_.slot_stride);
            if (++now == plan_.slots) now = 0;
            report();
            continue;
          }
          if (second_apart) SendSecond(p.rows[1].x + token * p.rows[1].row_bytes, sends, place.second);
          for (int piece = 0; piece < pieces.per_row; ++piece) {
            // The stage filled next is the one stored from before this one.
            WaitBulkRead<0>();
            __syncwarp();
            Load();
            WaitMbarrier(&shared_.send_full[warp_][now], parity);
            if (sends) StorePiece(pieces, place.first, place.second, piece, stage_ + now * pieces.stride);
            CommitBulkGroup();
            if (++now == pieces.stages) now = 0, parity ^= 1;
            report();
          }
        }
      }
    }
    WaitBulkDone<0>();
    __syncwarp();
    if (lane_ == 0) StoreReleaseShared(&shared_.sent[warp_], taken_ | kSenderDone);
  }

  // Instead of Run, if the ranks did not meet: nothing may land in shared memory after the block has gone.
  __device__ void Abandon() {
    for (int i = 0; i < loads_; ++i) WaitMbarrier(&shared_.send_full[warp_][i], 0);
    if (lane_ == 0) StoreReleaseShared(&shared_.sent[warp_], kSenderDone | kSenderGone);
  }

 private:
  // Where this lane sends a row, and that of which token of the batch: -1 for none.
  struct Place {
    int token;
    char *first, *second;
  };

  __device__ __forceinline__ Place PlaceOf(int slot) const {
    const DispatchParams& p = plan_.params;
    const int token = lane_ / p.num_topk;
    const uint32_t before = (1u << lane_) - (1u << token * p.num_topk);  // choices of this token
    int rank = slot >= 0 ? 0 : -1;  // slot / max_recv_tokens, but to divide takes longer
    for (int i = 1; i < call_.num_ranks; ++i) rank += slot >= i * p.max_recv_tokens;
    bool sends = rank >= 0 && (kEncodes || rank != call_.rank) && call_.Reaches(rank);
    for (int i = 0; i < call_.num_ranks; ++i) {
      const uint32_t chosen = __ballot_sync(~0u, rank == i);
      sends &= rank != i || (chosen & before) == 0;
    }
    if (!sends) return {-1, nullptr, nullptr};
    const int64_t row = slot - rank * p.max_recv_tokens;
    return {token, reinterpret_cast<char*>(shared_.address[rank][kRecvRows]) + row * p.rows[0].row_bytes,
            reinterpret_cast<char*>(shared_.address[rank][kRecvRows1]) + row * p.rows[1].row_bytes};
  }

  __device__ __forceinline__ uint32_t TakeOwn() {
    return lane_ == 0 ? atomicAdd(&call_.window->taken_chunks[own_], 1u) : 0;
  }

  // The next chunk: of this lane's own while there are any, then of the lane that has most left. False: there is none.
  __device__ bool Take() {
    if (none_left_) return false;
    int from = -1, number = 0;
    if (!helps_) {
      number = __shfl_sync(~0u, next_own_, 0);
      helps_ = number >= shared_.lane_chunks[own_];
      if (!helps_) {
        from = own_;
        next_own_ = TakeOwn();  // its answer is wanted a chunk later
      }
    }
    while (from < 0 && may_help_) {
      int left = 0, of = 0;
      for (int i = lane_; i < plan_.num_lanes(); i += 32) {
        const unsigned int taken = *const_cast<volatile unsigned int*>(&call_.window->taken_chunks[i]);
        const int chunks = shared_.lane_chunks[i] - static_cast<int>(taken);
        if (chunks > left) left = chunks, of = i;
      }
      const int most = __reduce_max_sync(~0u, left);
      if (most <= 0) break;
      const int other = __shfl_sync(~0u, of, __ffs(__ballot_sync(~0u, left == most)) - 1);
      number = lane_ == 0 ? atomicAdd(&call_.window->taken_chunks[other], 1u) : 0;
      number = __shfl_sync(~0u, number, 0);
      if (number >= shared_.lane_chunks[other]) continue;
      bool slotted = true;
      if (plan_.params.operation != kDispatchCached && lane_ == 0) {
        const int block = other / kSendWarps;
        slotted = Await(call_, &call_.window->progress[call_.rank][block], kPosted, kRows, call_.rank, block);
      }
      if (!__shfl_sync(~0u, slotted, 0)) break;
      from = other;
    }
    if (from < 0) {
      none_left_ = may_help_;
      return false;
    }
    while (WarpLoadAcquireShared(&shared_.published[warp_]) + kChunkRing <= taken_) __nanosleep(100);
    const Tokens tokens = shared_.ChunkTokens(plan_, from, number);
    stores_taken_ += (tokens.end - tokens.begin) * (kEncodes ? 1 : plan_.send.per_row);
    if (lane_ == 0) {
      shared_.chunk[warp_][taken_ % kChunkRing] = {tokens, stores_taken_};
      StoreRelaxedShared(&shared_.number[warp_][taken_ % kChunkRing], from * plan_.chunks_per_lane + number);
    }
    __syncwarp();
    ++taken_;
    load_left_ = tokens.end - tokens.begin;
    load_first_ = plan_.x + tokens.begin * plan_.x_row_bytes;
    load_second_ = plan_.params.rows[1].x + static_cast<int64_t>(tokens.begin) * plan_.send.second_bytes;
    return true;
  }

  // Sets the next piece on its way, if there is one.
  __device__ __forceinline__ bool Load() {
    const Pieces& pieces = plan_.send;
    if (load_left_ == 0 && !Take()) return false;
    if (lane_ == 0) {
      LoadPiece(pieces, load_first_, load_second_, load_piece_, stage_ + load_stage_ * pieces.stride,
                &shared_.send_full[warp_][load_stage_]);
    }
    ++loads_;
    load_first_ += pieces.Size(load_piece_);
    if (++load_stage_ == pieces.stages) load_stage_ = 0;
    if (++load_piece_ == pieces.per_row) {
      load_piece_ = 0, --load_left_;
      load_second_ += pieces.second_bytes;
    }
    return true;
  }

  // Whether the slots of these tokens, all of one lane, are written. Those of another lane's are: Take has waited.
  __device__ __forceinline__ bool AreSlotted(const Tokens& tokens) {
    if (tokens.end <= slotted_ || tokens.begin >= own_end_ || tokens.begin < shared_.lane_begin[own_]) return true;
    while (slotted_ < tokens.end) {
      while (slotted_ >= shared_.RoutedBy(route_warp_).end) ++route_warp_;
      const int until = static_cast<int>(WarpLoadAcquireShared(&shared_.slotted[route_warp_]));
      if (until <= slotted_) return false;
      slotted_ = until;
    }
    return true;
  }

  // A piece is encoded, its stage free; the encoders learn how many more there are.
  __device__ __forceinline__ void MeetEncoders() {
    if (lane_ == 0) shared_.loaded[warp_][meetings_ % 2] = loads_;
    ++meetings_;
    MeetTeam(warp_);
  }

  // Sends the row that the encoders complete in `slot`, as one bulk group.
  __device__ __forceinline__ void SendEncoded(bool sends, const Place& place, const char* slot) {
    const DispatchParams& p = plan_.params;
    const int hidden = p.encoding.hidden, scale_bytes = static_cast<int>(p.rows[1].row_bytes);
    for (int piece = 1; piece < plan_.send.per_row; ++piece) {
      MeetEncoders();
      Load();
    }
    // The slot filled next is that of two rows ago, with two slots that of the row before.
    if (plan_.slots == 2) {
      WaitBulkRead<0>();
    } else {
      WaitBulkRead<1>();
    }
    MeetEncoders();
    Load();
    if (sends) {
      BulkStore(place.first, slot, hidden);
      if (scale_bytes % 16 == 0) BulkStore(place.second, slot + hidden, scale_bytes);
    }
    CommitBulkGroup();
    if (scale_bytes % 16 != 0) SendSecond(slot + hidden, sends, place.second);
  }

  // A row of the second array to every lane's place.
  __device__ void SendSecond(const char* from, bool sends, char* place) {
    for (uint32_t rest = __ballot_sync(~0u, sends); rest != 0; rest &= rest - 1) {
      char* target = reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(place), __ffs(rest) - 1));
      CopySmallRow(target, from, plan_.params.rows[1].row_bytes);
    }
  }

  // Tells which of the chunks taken have arrived with the first `complete` pieces; returns how many.
  __device__ __forceinline__ uint32_t Report(uint32_t reported, uint32_t complete) {
    const uint32_t before = reported;
    while (reported < taken_ && shared_.chunk[warp_][reported % kChunkRing].end <= complete) ++reported;
    __syncwarp();
    if (reported > before && lane_ == 0) StoreReleaseShared(&shared_.sent[warp_], reported);
    return reported;
  }

  const DispatchPlan& plan_;
  const Call& call_;
  DispatchShared& shared_;
  const int warp_, lane_, own_;
  char* const stage_;
  bool helps_ = false, may_help_ = false, none_left_ = false;
  uint32_t next_own_ = 0;  // of lane 0: the own chunk taken ahead
  uint32_t taken_ = 0, stores_taken_ = 0, meetings_ = 0;
  const char *load_first_ = nullptr, *load_second_ = nullptr;  // where the next piece, the next second row is
  int load_left_ = 0, load_piece_ = 0, load_stage_ = 0, loads_ = 0;
  int own_end_ = 0, slotted_ = 0, route_warp_ = 0;  // the slots of own tokens before slotted_ are written
};

// Tells the peers what of this block has arrived, until both senders are done, then leaves its lane.
__device__ inline void Publish(const DispatchPlan& plan, const Call& call, DispatchShared& shared, bool met) {
  const int peer = threadIdx.x % 32;
  uint64_t* const progress = call.Reaches(peer) ? &call.Peer(peer)->progress[call.rank][blockIdx.x] : nullptr;
  if (met && progress != nullptr) {
    FenceSys();  // the slots of this block, gates and choices before the flag
    StoreRelaxedSys(progress, call.Tag(kPosted));
  }
  uint32_t published[kSendWarps] = {}, sent[kSendWarps] = {};
  while (((sent[0] & sent[1]) & kSenderDone) == 0) {
    bool news = false;
    for (int warp = 0; warp < kSendWarps; ++warp) {
      sent[warp] = WarpLoadAcquireShared(&shared.sent[warp]);
      news |= (sent[warp] & ~(kSenderDone | kSenderGone)) > published[warp];
    }
    if (!news) {
      __nanosleep(100);
      continue;
    }
    __syncwarp();
    if (plan.copies_on()) FenceSys();  // what the senders stored before counting is before the flags
    for (int warp = 0; warp < kSendWarps; ++warp) {
      const uint32_t count = sent[warp] & ~(kSenderDone | kSenderGone);
      for (; published[warp] < count; ++published[warp]) {
        const uint32_t chunk = WarpLoadAcquireShared(&shared.number[warp][published[warp] % kChunkRing]);
        if (plan.copies_on() && progress != nullptr)
          StoreRelaxedSys(&call.Peer(peer)->arrived[call.rank][chunk], call.Tag(kDone));
      }
      __syncwarp();
      if (peer == 0) StoreReleaseShared(&shared.published[warp], count);
    }
  }
  if (progress != nullptr) {
    FenceSys();
    StoreRelaxedSys(progress, call.Tag(((sent[0] | sent[1]) & kSenderGone) != 0 ? kGone : kDone));
  }
  __syncwarp();
  Leave(call, blockIdx.x, blockIdx.x);
}

}  // namespace jax_ep
