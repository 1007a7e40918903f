// Flags that the warps of a block want stored, and the one warp that stores them. The fence before a flag waits for
// what is under way, over NVLink some microseconds: so the warps that move many rows have none. Those that move few
// store their flags themselves: to hand them over takes longer than it saves.
//
//   release                     acquire               what it hands over
//   Notices::posted (Poster)    Publish               all that the warp has read and written before
//   Notices::published          Poster, when full     places in its queue
#pragma once

#include "device/warp.cuh"
#include "internode/link.cuh"
#include "internode/plan.h"

namespace jax_ep {

constexpr int kNoticesAhead = kMaxRanks;  // of a warp, not published yet
constexpr uint32_t kNoMoreNotices = 1u << 31;

// In words that are handed over as the counter is (StoreRelaxedShared).
struct alignas(16) Notice {
  uint32_t offset;     // of the flag, in a room
  uint32_t peer;       // whose room
  uint32_t low, high;  // the value

  __device__ __forceinline__ void Set(int64_t flag_offset, int whose, uint64_t value) {
    StoreRelaxedShared(&offset, static_cast<uint32_t>(flag_offset));
    StoreRelaxedShared(&peer, static_cast<uint32_t>(whose));
    StoreRelaxedShared(&low, static_cast<uint32_t>(value));
    StoreRelaxedShared(&high, static_cast<uint32_t>(value >> 32));
  }
  __device__ __forceinline__ void Tell(const InternodeView& view) const {
    auto* const flag = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(view.room) + LoadAcquireShared(&offset));
    const auto whose = static_cast<int>(LoadAcquireShared(&peer));
    Signal(view, whose, flag, static_cast<uint64_t>(LoadAcquireShared(&high)) << 32 | LoadAcquireShared(&low));
  }
};

// Of a block, in shared memory.
struct Notices {
  Notice notice[kTaskWarps][kNoticesAhead];
  uint32_t posted[kTaskWarps];  // and kNoMoreNotices
  uint32_t published[kTaskWarps];

  // By all threads of the block, before a barrier.
  __device__ __forceinline__ void Clear() {
    if (threadIdx.x < kTaskWarps) posted[threadIdx.x] = published[threadIdx.x] = 0;
  }
};

// A warp's end of its queue; all of the warp calls everything.
class Poster {
 public:
  __device__ __forceinline__ Poster(Notices& notices, const InternodeView& view, bool at_once)
      : notices_(notices), view_(view), at_once_(at_once), warp_(threadIdx.x / 32) {}

  // `value` is to be stored into `flag` (an address in the own room) of `peer`, for each lane that `wants` it.
  __device__ __forceinline__ void Post(bool wants, int peer, uint64_t* flag, uint64_t value) {
    if (at_once_) {
      __syncwarp();
      FenceSys();
      if (wants) Signal(view_, peer, flag, value);
      __syncwarp();
      return;
    }
    const uint32_t wanting = __ballot_sync(~0u, wants);
    const int lane = threadIdx.x % 32, count = __popc(wanting);
    while (WarpLoadAcquireShared(&notices_.published[warp_]) + kNoticesAhead < posted_ + count) __nanosleep(50);
    if (wants) {
      const uint32_t at = (posted_ + __popc(wanting & ((1u << lane) - 1))) % kNoticesAhead;
      const auto offset = reinterpret_cast<const char*>(flag) - reinterpret_cast<const char*>(view_.room);
      notices_.notice[warp_][at].Set(offset, peer, value);
    }
    posted_ += count;
    __syncwarp();
    if (lane == 0) StoreReleaseShared(&notices_.posted[warp_], posted_);
  }

  // There will be no more.
  __device__ __forceinline__ void Close() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) StoreReleaseShared(&notices_.posted[warp_], posted_ | kNoMoreNotices);
  }

 private:
  Notices& notices_;
  const InternodeView& view_;
  const bool at_once_;
  const int warp_;
  uint32_t posted_ = 0;
};

// All of the publishing warp's work: lane w serves warp w, until it has closed. `meanwhile()` does a bit of other work;
// false: there is none.
template <class Meanwhile>
__device__ __forceinline__ void Publish(Notices& notices, const InternodeView& view, const Meanwhile& meanwhile) {
  const int lane = threadIdx.x % 32;
  uint32_t published = 0;
  while (true) {
    const uint32_t posted = lane < kTaskWarps ? LoadAcquireShared(&notices.posted[lane]) : kNoMoreNotices;
    const uint32_t count = posted & ~kNoMoreNotices;
    if (__any_sync(~0u, count != published)) {
      FenceSys();
      for (; published != count; ++published) {
        notices.notice[lane][published % kNoticesAhead].Tell(view);
      }
      if (lane < kTaskWarps) StoreReleaseShared(&notices.published[lane], published);
      __syncwarp();
    } else if (__all_sync(~0u, (posted & kNoMoreNotices) != 0)) {
      return;
    } else if (!meanwhile()) {
      __nanosleep(50);
    }
  }
}

}  // namespace jax_ep
