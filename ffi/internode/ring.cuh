// Rings of chunks between two ranks, with credits: a chunk is written once its slot has been read, and is there when
// its flag says so. A slot is a header {messages, is it the last chunk} and the messages, each with a header of its
// own.
//
//   release                          acquire                        what it hands over
//   arrived, announced or transit    the reader, the relay          a chunk
//   freed                            Outgoing, kSlots chunks later  the chunk's slot, here and wherever it passed
#pragma once

#include "combine/vector.cuh"
#include "internode/link.cuh"
#include "internode/plan.h"

namespace jax_ep {

struct PieceRange {
  int64_t begin, size;
};
__device__ __forceinline__ PieceRange PieceOf(int64_t row_bytes, int64_t piece_bytes, int piece) {
  const int64_t begin = min(piece * piece_bytes, row_bytes);
  return {begin, min(piece_bytes, row_bytes - begin)};
}

// The tokens of a lane: [begin, end).
struct LaneTokens {
  int begin, end;

  __device__ LaneTokens(int num_tokens, int lane, int num_lanes)
      : begin(static_cast<int>(static_cast<int64_t>(num_tokens) * lane / num_lanes)),
        end(static_cast<int>(static_cast<int64_t>(num_tokens) * (lane + 1) / num_lanes)) {}
};

// Where a stream of chunks goes. Addresses are those of the own room.
struct Stream {
  char* ring;       // what this warp writes: in the own room, or mapped from a rank of the node
  char* far_ring;   // to which it is then put, or null
  int to;           // the rank that is told
  uint64_t* told;   // [kSlots] there
  uint64_t* freed;  // reader i's [kSlots] begin at freed + readers[i] * kSlots
  const uint8_t* readers;
  int num_readers;
  int lane;  // that an error names
};

// The writing end of a ring; one whole warp.
class Outgoing {
 public:
  __device__ Outgoing(const Call& call, const InternodeView& view, const Messages& messages, const Stream& stream)
      : call_(call), view_(view), messages_(messages), stream_(stream) {}

  // Where the next message is to be written; null: its slot will not be read.
  __device__ char* Next() {
    if (count_ == 0 && chunk_ >= kSlots) {
      if (!AwaitRead(chunk_ - kSlots)) return nullptr;
      FenceProxyAsync();  // bulk copies may write it too
    }
    return Slot(stream_.ring) + messages_.ChunkBytes(count_);
  }

  // It has been written.
  __device__ void Add() {
    if (++count_ == messages_.per_chunk) Send(false);
  }

  // Sends what is left, and waits until all has been read: so at the end of a call no put is under way.
  __device__ void Finish() {
    if (count_ == 0 && chunk_ >= kSlots && !AwaitRead(chunk_ - kSlots)) return;
    Send(true);
    for (uint32_t chunk = chunk_ > kSlots ? chunk_ - kSlots : 0; chunk < chunk_; ++chunk) {
      if (!AwaitRead(chunk)) return;
    }
  }

 private:
  __device__ char* Slot(char* ring) const { return ring + chunk_ % kSlots * messages_.slot_bytes; }

  __device__ bool AwaitRead(uint32_t chunk) {
    const int lane = threadIdx.x % 32;
    bool read = true;
    if (lane < stream_.num_readers) {
      const int reader = stream_.readers[lane];
      read = AwaitOverNodes<false>(call_, view_, stream_.freed + reader * kSlots + chunk % kSlots, chunk + 1, kRows,
                                   reader, stream_.lane);
    }
    read = __all_sync(~0u, read);
    __syncwarp();  // each lane acquired for all
    return read;
  }

  __device__ void Send(bool is_last) {
    WaitBulkDone<0>();  // rows that bulk copies write, before the fence
    if (threadIdx.x % 32 == 0) *reinterpret_cast<int4*>(Slot(stream_.ring)) = make_int4(count_, is_last, 0, 0);
    __syncwarp();
    FenceSys();  // all lanes' messages before the flag, or before the put reads them
    uint64_t* const told = stream_.told + chunk_ % kSlots;
    if (stream_.far_ring != nullptr) {
      PutAndSignal(view_, stream_.to, Slot(stream_.far_ring), Slot(stream_.ring), messages_.ChunkBytes(count_), told,
                   call_.Tag(chunk_ + 1));
    } else if (threadIdx.x % 32 == 0) {
      StoreRelaxedSys(In(view_, stream_.to, told), call_.Tag(chunk_ + 1));
    }
    __syncwarp();
    ++chunk_;
    count_ = 0;
  }

  const Call& call_;
  const InternodeView& view_;
  const Messages& messages_;
  const Stream stream_;
  uint32_t chunk_ = 0;
  int count_ = 0;
};

// Reads all chunks of a ring that lies at `ring`, mapped here, as `flags` (in the own room, [kSlots]) say that they are
// there; `take` gets each message; then the writer `source` is told. One whole warp. False: some did not come.
template <class Take>
__device__ bool ReadChunks(const Call& call, const InternodeView& view, const Messages& messages, const char* ring,
                           uint64_t* flags, int source, int lane_number, const Take& take) {
  const int lane = threadIdx.x % 32;
  for (uint32_t chunk = 0;; ++chunk) {
    const int slot = static_cast<int>(chunk % kSlots);
    bool came = true;
    if (lane == 0) came = AwaitOverNodes(call, view, flags + slot, chunk + 1, kLines, source, lane_number);
    came = __shfl_sync(~0u, came, 0);
    if (!came) return false;
    if (lane == 0) FenceProxyAsync();  // it also begins bulk loads of the chunk
    __syncwarp();                      // lane 0 acquired for all
    const char* const place = ring + slot * messages.slot_bytes;
    const int4 head = LoadRow(place);
    for (int i = 0; i < head.x; ++i) take(place + messages.ChunkBytes(i));
    __syncwarp();
    FenceSys();  // all lanes' loads before the writer may write again
    if (lane == 0) {
      Signal(call, view, source, &view.room->freed[lane_number][call.rank][slot], call.Tag(chunk + 1));
    }
    if (head.y != 0) return true;
  }
}

// Polls what came for up to 32 streams at once, one a lane of the warp: `flags_of(i)` are stream i's [kSlots] in the
// own room, `peer_of(i)` whom an error names; `pass_on(mask, chunk)` is called by the whole warp, with the lanes whose
// next chunk is there and this lane's number of it, and returns in those lanes whether it was the last.
template <class FlagsOf, class PeerOf, class PassOn>
__device__ void PassOnChunks(const Call& call, const InternodeView& view, uint32_t streams, int lane_number,
                             const FlagsOf& flags_of, const PeerOf& peer_of, const PassOn& pass_on) {
  const int lane = threadIdx.x % 32;
  bool open = streams >> lane & 1;
  uint32_t chunk = 0, tries = 0;
  uint64_t start = 0;
  while (__any_sync(~0u, open)) {
    uint64_t value = 0;
    bool came = false, failed = false;
    const uint64_t expected = call.Tag(chunk + 1);
    if (open) {
      uint64_t* const flag = flags_of(lane) + chunk % kSlots;
      value = LoadAcquireSys(flag);
      came = value >= expected;
      if (came && Reached(call, value, chunk + 1)) {
        SettleArrival(flag, expected);
      } else if (came) {
        Fail(call, kLines, peer_of(lane), lane_number, expected, value);
        failed = true;
      }
    }
    const uint32_t mask = __ballot_sync(~0u, came);
    if (mask != 0 && !__any_sync(~0u, failed)) {
      __syncwarp();  // each lane acquired for all
      const bool was_last = pass_on(mask, chunk);
      if (came) ++chunk, open = !was_last;
      tries = 0, start = 0;
      continue;
    }
    if (++tries > 8) __nanosleep(20);
    if (tries % 32 == 0) {
      if (start == 0) start = NanoSeconds();
      const uint32_t waiting = __ballot_sync(~0u, open);
      if (lane == __ffs(waiting) - 1) {
        failed |= !LookUpFromPolling(call, view, start, kLines, peer_of(lane), lane_number, expected, value);
      }
    }
    if (__any_sync(~0u, failed)) return;
  }
}

// Copies by one whole warp, in units of 16 bytes.
__device__ __forceinline__ void CopyVectors(char* target, const char* source, int64_t num_bytes) {
  constexpr int V = 8;
  for (int64_t base = threadIdx.x % 32 * 16; base < num_bytes; base += V * 512) {
    int4 bits[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (base + v * 512 < num_bytes) bits[v] = LoadRow(source + base + v * 512);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (base + v * 512 < num_bytes) *reinterpret_cast<int4*>(target + base + v * 512) = bits[v];
    }
  }
}

}  // namespace jax_ep
