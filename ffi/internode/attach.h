// What jax_ep._internode needs of NVSHMEM on the host; all else is nvshmem4py's (jax_ep/_src/internode.py).
#pragma once

#include <string>

namespace jax_ep {

struct NvshmemVersion {
  int major, minor, patch;
};

// After NVSHMEM's initialisation, for the kernels of this module on CUDA device `device`; what went wrong, or nothing.
std::string AttachNvshmem(int device);
// At least 2: initialised.
int NvshmemStatus();
NvshmemVersion LoadedNvshmem();
NvshmemVersion BuiltNvshmem();

}  // namespace jax_ep
