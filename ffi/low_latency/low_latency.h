// Low-latency dispatch and combine, for a few hundred tokens a rank at most: one launch a call, rows pushed into the
// peers' windows before anything is known of the peers. Meaning, operands and results are those of dispatch/dispatch.h
// and combine/combine.h, to the bit. docs/protocol.md, "Low latency", draws this.
//
//   sender     waits for a free window (mostly free), stores routing table and rows as lines
//   receiver   waits for the lines that it wants, writes the result
//
// A call may be cut into halves: what is received by kDone has been sent by the kStart that left `in_flight`.
#pragma once

#include <cuda_runtime_api.h>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "group/arena.h"

namespace jax_ep {

enum class Half : int { kBoth, kStart, kDone };

struct LowLatencyParams {
  ArenaView arenas;
  Half half;
  // [2]: the call that a kStart has begun and its complement; its result, and kDone's operand. All zero: no call, and
  // kDone gives zeros. Null with kBoth.
  uint64_t* in_flight;
  bool logfmt;  // of a combine: sums travel in LogFMT-10 (device/logfmt.cuh), own ones too; nothing is carried
};

struct LowLatencyConfig {
  int num_sms = 64;  // at most; small calls take fewer
};

// Bytes that a call needs of a window, 0 where the shape is beyond the kernel. Pointers and in_flight are not looked
// at: weights, carried and an encoding count as present if they are not null. With a half the handle must be known:
// kDispatchCached.
int64_t LowLatencyDispatchBytes(const DispatchParams& params, int num_ranks);
int64_t LowLatencyCombineBytes(const CombineParams& params, int num_ranks, bool logfmt = false);

cudaError_t LaunchLowLatencyDispatch(const DispatchParams& params, const LowLatencyParams& low_latency,
                                     const LowLatencyConfig& config, cudaStream_t stream);
// `one_row_a_rank` sums as the other layouts do. Without scratch.
cudaError_t LaunchLowLatencyCombine(const CombineParams& params, const LowLatencyParams& low_latency,
                                    const LowLatencyConfig& config, cudaStream_t stream);
// Loads the kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadLowLatencyDispatch();
cudaError_t LoadLowLatencyCombine();

}  // namespace jax_ep
