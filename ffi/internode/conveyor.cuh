// Rows through shared memory by bulk copies: a warp has a whole row on its way, where registers hold a quarter of one.
// Neighbours: ring.cuh, whose messages these rows are of; dispatch/pipe.cuh does the same over NVLink.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"

namespace jax_ep {

constexpr int kConveyorStages = 2, kMostStageBytes = 7168;  // twice that is a row of 7168 bf16

// Of one warp, all of which calls everything. Who has acquired the source has also made bulk loads wait for that
// (FenceProxyAsync in lane 0), and likewise whoever knows that the target may be written.
class Conveyor {
 public:
  // `full`: kConveyorStages barriers, initialised.
  __device__ Conveyor(char* stages, int stage_bytes, uint64_t* full)
      : stages_(stages), stage_bytes_(stage_bytes), full_(full) {}

  // Begins to load `num_bytes`; ends by Finish, before the next Begin.
  __device__ __forceinline__ void Begin(const char* source, int64_t num_bytes) {
    source_ = source, num_bytes_ = num_bytes, loaded_ = 0;
    for (int i = 0; i < kConveyorStages; ++i) Load();
  }
  // Stores them at each lane's `target`, if that is not null: under way when this returns, for WaitBulkDone.
  __device__ __forceinline__ void Finish(char* target) {
    for (int64_t stored = 0; stored < num_bytes_; stored += stage_bytes_) {
      WaitMbarrier(full_ + out_, parity_);
      if (target != nullptr) BulkStore(target + stored, stages_ + out_ * stage_bytes_, Size(stored));
      CommitBulkGroup();
      if (++out_ == kConveyorStages) out_ = 0, parity_ ^= 1;
      Load();
    }
  }

 private:
  __device__ __forceinline__ uint32_t Size(int64_t begin) const {
    return static_cast<uint32_t>(min(static_cast<int64_t>(stage_bytes_), num_bytes_ - begin));
  }
  __device__ __forceinline__ void Load() {
    if (loaded_ >= num_bytes_) return;
    WaitBulkRead<0>();  // every lane's stores have left the stage that is filled now
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ExpectBytes(full_ + in_, Size(loaded_));
      BulkLoad(stages_ + in_ * stage_bytes_, source_ + loaded_, Size(loaded_), full_ + in_);
    }
    if (++in_ == kConveyorStages) in_ = 0;
    loaded_ += stage_bytes_;
  }

  char* const stages_;
  const int stage_bytes_;
  uint64_t* const full_;
  const char* source_ = nullptr;
  int64_t num_bytes_ = 0, loaded_ = 0;
  int in_ = 0, out_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep
