// Dispatch and combine in halves, for many tokens: a start leaves its rows with the group and returns, the copy engines
// push them to the peers meanwhile, a done lays out what has come. Meaning, operands and results are those of
// dispatch/dispatch.h and combine/combine.h, to the bit. docs/protocol.md, "Halves of many tokens".
//
//   stage   start's stream   own rows (or sums) into the own window
//   push    fork's stream    copies them into the peers' windows, piece by piece, and behind each piece its flag
//   done    done's stream    acquires every rank's pieces, writes the result
#pragma once

#include <cuda_runtime_api.h>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "group/arena.h"
#include "group/group.h"

namespace jax_ep {

// How a half finds its windows, and the call: made by a start, taken by its done.
struct HalfParams {
  ArenaView arenas;
  // [2]: the call's epoch and its complement; a start's result, a done's operand. All zero: no call, and a done gives
  // zeros.
  uint64_t* in_flight;
};

struct HalvesConfig {
  int num_sms = 132;  // of stage and done, which have their stream to themselves; a push has none
};

// Bytes that a call needs of a window, 0 where the shape is beyond the kernels. Pointers are not looked at: gates and
// what is carried count as present if they are not null.
int64_t DispatchLandingBytes(const DispatchParams& params, int num_ranks);
int64_t CombineLandingBytes(const CombineParams& params, int num_ranks);

// A start: stage and push; `operation` must be kDispatchCached, rows.recv, recv_weights and out are not looked at.
cudaError_t LaunchDispatchStart(const DispatchParams& params, const HalfParams& half, const Fork& fork,
                                const HalvesConfig& config, cudaStream_t stream);
cudaError_t LaunchCombineStart(const CombineParams& params, const HalfParams& half, const Fork& fork,
                               const HalvesConfig& config, cudaStream_t stream);
// rows.x, topk_weights, y and weights are not looked at, but that gates and carried tell by null whether they travel.
cudaError_t LaunchDispatchDone(const DispatchParams& params, const HalfParams& half, const HalvesConfig& config,
                               cudaStream_t stream);
cudaError_t LaunchCombineDone(const CombineParams& params, const HalfParams& half, const HalvesConfig& config,
                              cudaStream_t stream);
// Load the kernels on the current device, so that their first launch allocates nothing.
cudaError_t LoadDispatchHalves();
cudaError_t LoadCombineHalves();

}  // namespace jax_ep
