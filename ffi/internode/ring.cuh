// Rings of chunks between two ranks, with credits: a chunk is written once its slot has been read, and is there when
// its flag says so. A slot is a header {messages, is it the last chunk} and the messages, each with a header of its
// own.
//
//   release                          acquire                        what it hands over
//   arrived, announced or transit    reader, adder, relay           a chunk
//   freed                            Outgoing, kSlots chunks later  the chunk's slot, here and wherever it passed
#pragma once

#include "combine/vector.cuh"
#include "internode/link.cuh"
#include "internode/plan.h"
#include "internode/publisher.cuh"

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
  char* ring;      // what this warp writes: in the own room, or mapped from a rank of the node
  char* far_ring;  // to which it is then put, or null
  int to;          // the rank that is told
  uint64_t* told;  // [kSlots] there
  // Part j of reader i tells in freed[j][lane][readers[i]][slot].
  SlotFlags* freed;
  const uint8_t* readers;
  int num_readers, num_parts;
  int lane;
};

// How messages are written: by stores; or by bulk copies, in at least so many groups each.
enum class Written { kByStores, kByAnyGroups, kByOneGroup, kByTwoGroups, kByFourGroups };

// Of messages whose shortest row has so many bytes, written by a Conveyor: in a group a stage.
inline Written WrittenInGroups(int64_t shortest_row, int stage_bytes) {
  if (shortest_row > 3ll * stage_bytes) return Written::kByFourGroups;
  if (shortest_row > stage_bytes) return Written::kByTwoGroups;
  return shortest_row > 0 ? Written::kByOneGroup : Written::kByAnyGroups;
}

// The writing end of a ring; one whole warp. Messages are reserved ahead and added in the same order.
class Outgoing {
 public:
  __device__ __forceinline__ Outgoing(const Call& call, const InternodeView& view, const Messages& messages,
                                      const Stream& stream, Written written, Poster& poster)
      : call_(call), view_(view), messages_(messages), stream_(stream), written_(written), poster_(poster) {}

  // Whether Next would return at once.
  __device__ __forceinline__ bool HasRoom() {
    if (chunk_ < admitted_) return true;
    const int lane = threadIdx.x % 32;
    bool read = true;
    if (lane < NumFlags()) read = Reached(call_, LoadAcquireSys(Freed(lane)), chunk_ - kSlots + 1);
    read = __all_sync(~0u, read);
    if (read) Admit();
    return read;
  }

  // Where the next message is to be written; null: its slot will not be read.
  __device__ __forceinline__ char* Next() {
    if (!HasRoom()) {
      Flush();  // who reads it may have to, before there is room
      if (!AwaitRoom()) return nullptr;
    }
    char* const place = Slot(stream_.ring, chunk_) + messages_.ChunkBytes(count_);
    if (++count_ == messages_.per_chunk) count_ = 0, ++chunk_;
    return place;
  }

  // The first of those that were reserved and not added has been written, or its bulk copies are under way. Then its
  // chunk is sent when the next message is: the copies are complete by then.
  __device__ __forceinline__ void Add() {
    if (full_) {
      if (written_ == Written::kByAnyGroups) WaitBulkDone<0>();
      if (written_ == Written::kByOneGroup) WaitBulkDone<1>();
      if (written_ == Written::kByTwoGroups) WaitBulkDone<2>();
      if (written_ == Written::kByFourGroups) WaitBulkDone<4>();
      Send(false);
    }
    full_ = ++added_ == messages_.per_chunk;
    if (full_ && written_ == Written::kByStores) Send(false);
  }

  // Sends what is left, and waits until all has been read: so at the end of a call no put is under way. All that were
  // reserved have been added.
  __device__ __forceinline__ void Finish() {
    Flush();
    if (!AwaitRoom()) return;
    WaitBulkDone<0>();
    Send(true);
    for (chunk_ = max(sent_, admitted_); chunk_ < sent_ + kSlots; ++chunk_) {
      if (!AwaitRoom()) return;
    }
  }

 private:
  __device__ char* Slot(char* ring, uint32_t chunk) const { return ring + chunk % kSlots * messages_.slot_bytes; }
  // The flags that chunk_ waits for: of each reader's parts.
  __device__ __forceinline__ int NumFlags() const { return stream_.num_readers * stream_.num_parts; }
  __device__ __forceinline__ int Reader(int i) const { return stream_.readers[i % stream_.num_readers]; }
  __device__ __forceinline__ uint64_t* Freed(int i) const {
    return &stream_.freed[i / stream_.num_readers][stream_.lane][Reader(i)][chunk_ % kSlots];
  }

  // Waits until the chunk that was in this one's slot has been read.
  __device__ __forceinline__ bool AwaitRoom() {
    if (chunk_ < admitted_) return true;
    const int lane = threadIdx.x % 32;
    bool read = true;
    if (lane < NumFlags())
      read = AwaitOverNodes<false>(call_, view_, Freed(lane), chunk_ - kSlots + 1, kRows, Reader(lane), stream_.lane);
    read = __all_sync(~0u, read);
    if (read) Admit();
    return read;
  }
  __device__ __forceinline__ void Admit() {
    __syncwarp();  // each lane acquired for all
    admitted_ = chunk_ + 1;
    if (written_ != Written::kByStores && threadIdx.x % 32 == 0) FenceProxyAsync();  // lane 0 begins the bulk copies
  }

  // Sends a chunk that is full and has not been sent.
  __device__ __forceinline__ void Flush() {
    if (!full_) return;
    WaitBulkDone<0>();
    Send(false);
  }

  __device__ __forceinline__ void Send(bool is_last) {
    const int lane = threadIdx.x % 32;
    char* const slot = Slot(stream_.ring, sent_);
    const int count = full_ ? messages_.per_chunk : added_;
    const uint64_t tag = call_.Tag(sent_ + 1);
    uint64_t* const told = stream_.told + sent_ % kSlots;
    if (lane == 0) *reinterpret_cast<int4*>(slot) = make_int4(count, is_last, 0, 0);
    if (stream_.far_ring != nullptr) {
      __syncwarp();
      FenceSys();  // all lanes' messages before the put reads them
      PutAndSignal(view_, stream_.to, Slot(stream_.far_ring, sent_), slot, messages_.ChunkBytes(count), told, tag);
      __syncwarp();
    } else {
      poster_.Post(lane == 0, stream_.to, told, tag);
    }
    ++sent_;
    if (full_) full_ = false, added_ = 0;
  }

  const Call& call_;
  const InternodeView& view_;
  const Messages& messages_;
  const Stream stream_;
  const Written written_;
  Poster& poster_;
  uint32_t chunk_ = 0, sent_ = 0, admitted_ = kSlots;  // chunks reserved, sent; that may be begun
  int count_ = 0, added_ = 0;                          // messages reserved of the one, added of the other
  bool full_ = false;                                  // chunk sent_ has all its messages
};

// Reads all chunks of a ring that lies at `ring`, mapped here, as `flags` (in the own room, [kSlots]) say that they are
// there; `take` gets a chunk's messages, the first and their number; then the writer `source` is told. One whole warp.
// False: some did not come.
template <class Take>
__device__ bool ReadChunks(const Call& call, const InternodeView& view, const Messages& messages, const char* ring,
                           uint64_t* flags, int source, int lane_number, Poster& poster, const Take& take) {
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
    take(place + messages.ChunkBytes(0), head.x);
    poster.Post(lane == 0, source, &view.room->freed[0][lane_number][call.rank][slot], call.Tag(chunk + 1));
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
