// Rows through shared memory by bulk copies, one row being loaded while the one before is stored: a warp always has
// loads on their way. Neighbours: ring.cuh, whose messages these rows are of; dispatch/pipe.cuh does the same over
// NVLink.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"

namespace jax_ep {

constexpr int kConveyorStages = 4, kMostStageBytes = 3584;  // four times that is a row of 7168 bf16

// Of one warp, all of which calls everything. Who has acquired the source has also made bulk loads wait for that
// (FenceProxyAsync in lane 0), and likewise whoever knows that the target may be written.
class Conveyor {
 public:
  // `full`: kConveyorStages barriers, initialised.
  __device__ Conveyor(char* stages, int stage_bytes, uint64_t* full)
      : stages_(stages), stage_bytes_(stage_bytes), full_(full) {}

  // Begins to load `num_bytes`. At most one row more than those that Finish has stored.
  __device__ __forceinline__ void Begin(const char* source, int64_t num_bytes) {
    if (load_left_ > 0) {
      next_source_ = source, next_left_ = num_bytes;
    } else {
      load_source_ = source, load_left_ = num_bytes;
    }
    // The last stage is being stored from, but before the first row is.
    const int free = is_first_ ? kConveyorStages : kConveyorStages - 1;
    while (loaded_ < free && load_left_ > 0) Load();
  }
  // Stores the row whose turn it is at each lane's `target`, if that is not null: under way when this returns, for
  // WaitBulkDone, in a bulk group a stage.
  __device__ __forceinline__ void Finish(char* target, int64_t num_bytes) {
    is_first_ = false;
    for (int64_t stored = 0; stored < num_bytes; stored += stage_bytes_) {
      WaitMbarrier(full_ + out_, parity_);
      const auto size = static_cast<uint32_t>(min(static_cast<int64_t>(stage_bytes_), num_bytes - stored));
      if (target != nullptr) BulkStore(target + stored, stages_ + out_ * stage_bytes_, size);
      CommitBulkGroup();
      if (++out_ == kConveyorStages) out_ = 0, parity_ ^= 1;
      --loaded_;
      if (load_left_ > 0 && loaded_ < kConveyorStages - 1) Load();
    }
  }
  // Forgets what has begun. Nothing may land in shared memory after the block has gone.
  __device__ __forceinline__ void Drop() {
    load_left_ = next_left_ = 0;
    for (; loaded_ > 0; --loaded_) {
      WaitMbarrier(full_ + out_, parity_);
      if (++out_ == kConveyorStages) out_ = 0, parity_ ^= 1;
    }
  }

 private:
  // The next stage's bytes. It was stored from before the newest group at the latest.
  __device__ __forceinline__ void Load() {
    WaitBulkRead<1>();
    __syncwarp();
    const auto size = static_cast<uint32_t>(min(static_cast<int64_t>(stage_bytes_), load_left_));
    if (threadIdx.x % 32 == 0) {
      ExpectBytes(full_ + in_, size);
      BulkLoad(stages_ + in_ * stage_bytes_, load_source_, size, full_ + in_);
    }
    if (++in_ == kConveyorStages) in_ = 0;
    ++loaded_;
    load_source_ += size, load_left_ -= size;
    if (load_left_ == 0) load_source_ = next_source_, load_left_ = next_left_, next_left_ = 0;
  }

  char* stages_;
  int stage_bytes_;
  uint64_t* full_;
  const char *load_source_ = nullptr, *next_source_ = nullptr;  // what is loaded, and after that
  int64_t load_left_ = 0, next_left_ = 0;
  int in_ = 0, out_ = 0, loaded_ = 0;  // stages; how many are loaded and not stored
  uint32_t parity_ = 0;
  bool is_first_ = true;
};

}  // namespace jax_ep
