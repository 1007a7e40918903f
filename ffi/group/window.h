// What ranks share: one Window a rank, at a fixed address for the life of the group. docs/protocol.md explains each
// field. The only place that knows the layout, for host and device; GroupView is how a kernel finds the windows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace jax_ep {

constexpr int kMaxRanks = 32;       // one warp lane a rank
constexpr int kMaxLanes = 192;      // flag rows a rank: more than a GPU has multiprocessors
constexpr int kMaxSendBlocks = 32;  // blocks that count and send in a dispatch
constexpr int kMaxBins = 2080;      // counts a send block publishes: experts, and ranks in layout "rank"
constexpr int kMaxChunks = 2048;    // parts of a rank's tokens, each with a flag that its rows are there
constexpr int kNumAddresses = 8;

// A flag is epoch << kStateBits | state, and only grows. An epoch is generation << kCountBits | number of the call: the
// host begins a new generation after a failure, with a new mask, and when the calls of one are used up.
constexpr int kStateBits = 20, kCountBits = 34;
constexpr uint64_t kMaxCount = (uint64_t{1} << kCountBits) - 1;
constexpr uint64_t kMaxGenerations = uint64_t{1} << (64 - kStateBits - kCountBits);
constexpr uint32_t kPosted = 1;
constexpr uint32_t kDone = 0x7ffff;
constexpr uint32_t kGone = 0xfffff;
constexpr int kMaxSteps = kDone;  // of a lane: states before kDone

constexpr uint64_t MakeFlag(uint64_t epoch, uint32_t state) { return epoch << kStateBits | state; }
constexpr __host__ __device__ uint64_t CountOf(uint64_t epoch) { return epoch & kMaxCount; }
constexpr uint64_t EpochOf(uint64_t flag) { return flag >> kStateBits; }
constexpr uint32_t StateOf(uint64_t flag) { return static_cast<uint32_t>(flag) & kGone; }

struct Mail {
  uint64_t address[kNumAddresses];
};

// What own kernels keep of the calls through one piece of memory, a Window or an Arena.
struct Ledger {
  uint64_t epoch;         // calls that have ended
  uint64_t failed_epoch;  // last call that failed: its whole generation has, from then on
};

struct Window : Ledger {
  unsigned int exits;
  // What the warps of a dispatch have taken of each kind of work; zero between calls.
  unsigned int taken_chunks[2 * kMaxSendBlocks], taken_own_rows, taken_zero_rows, taken_copies;
  // Written by peers, indexed by the writer.
  alignas(128) uint64_t post[2][kMaxRanks][kMaxLanes];
  uint64_t progress[kMaxRanks][kMaxLanes];
  uint64_t arrived[kMaxRanks][kMaxChunks];
  Mail mail[2][kMaxRanks][kMaxLanes];
  alignas(128) int32_t counts[2][kMaxRanks][kMaxSendBlocks][kMaxBins];
};

// In host memory that the device maps: after a failure, who waited for whom. `failures` is stored last. Never read
// while waiting: hundreds of warps that read over PCIe take milliseconds.
struct Status {
  volatile uint32_t failures;
  volatile uint32_t operation, phase;
  volatile int32_t rank, peer, lane;
  volatile uint64_t epoch, expected, seen;
};

struct GroupView {
  int32_t rank, num_ranks;
  uint64_t timeout_ns;
  Status* status;
  Window* window[kMaxRanks];
  uint64_t shift[kMaxRanks];  // what makes an address in that rank's mail one of this process; 0 in its own
  // generation << kCountBits | a bit for each masked rank: one word, so that a rank's calls change both at once.
  // Written by own kernels between calls; it only grows.
  uint64_t membership;
  uint64_t masked_since;  // the generation in which the mask last changed
};

enum Operation : uint32_t { kDispatch, kDispatchCached, kNotify, kCombine, kBarrier, kCombineGrad };
enum Phase : uint32_t { kMeet, kRows, kLeave, kRefused, kReuse, kLines, kInFlight, kFull, kCounted };

}  // namespace jax_ep
