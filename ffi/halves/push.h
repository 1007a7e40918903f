// The push of a start: this rank's staged rows into the windows of its peers, by the copy engines.
#pragma once

#include "group/group.h"
#include "group/landing.h"
#include "halves/halves.h"

namespace jax_ep {

// Behind the stage on `stream`. Nothing is pushed where the fork names no peers.
cudaError_t Push(const HalfParams& half, const LandingLayout& layout, const Fork& fork, cudaStream_t stream);

}  // namespace jax_ep
