// What the kernels ask of the network, and all of it. transport.cu answers with NVSHMEM's public device API;
// tests/gpu/kernels/internode.cu with stores to rooms of the same process. Addresses are those of the own room.
#pragma once

#include "internode/room.h"

namespace jax_ep {

// Copies `num_bytes` from `source`, in the own room, to the same room of `peer` at `target`, then stores `value` into
// its `flag`: who acquires the flag sees the bytes. Returns before they have left. Called by one whole warp, after a
// system fence behind the threads that wrote the bytes.
__device__ void PutAndSignal(const InternodeView& view, int peer, char* target, const char* source, int64_t num_bytes,
                             uint64_t* flag, uint64_t value);

// Stores `value` into `flag` of `peer`. Called by one thread, after a system fence.
__device__ void SignalOverNetwork(const InternodeView& view, int peer, uint64_t* flag, uint64_t value);

// After `flag`, in the own room, was seen to be at least `value`: from here on the bytes that came with it are seen.
__device__ void SettleArrival(uint64_t* flag, uint64_t value);

}  // namespace jax_ep
