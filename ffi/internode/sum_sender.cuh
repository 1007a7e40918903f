// The sender of sums: rows of several experts are added before they leave. Neighbour: row_sender.cuh sends one row a
// token.
#pragma once

#include "internode/combine_lane.cuh"

namespace jax_ep {

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

}  // namespace jax_ep
