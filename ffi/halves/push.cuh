// The push kernel's contract: staged chunks of this rank into the windows of its peers.
#pragma once

#include "group/landing.h"
#include "halves/halves.h"

namespace jax_ep {

// Nothing is launched where there are no peers.
cudaError_t LaunchPush(const HalfParams& half, const LandingLayout& layout, Operation operation,
                       const HalvesConfig& config, cudaStream_t stream);

}  // namespace jax_ep
