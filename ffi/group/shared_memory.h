// Device memory that processes of one host map: made, exported as a file descriptor, imported. jax_ep/_src/peers.py
// carries the descriptors from process to process. Every function throws std::runtime_error with a sentence.
#pragma once

#include <cstdint>
#include <vector>

namespace jax_ep {

// A whole allocation of this process. The descriptor is the caller's to close; the memory is never freed.
struct SharedMemory {
  int fd;
  uint64_t begin, bytes;
};

// New, zeroed, at least `bytes` long, on CUDA device `device`; read and written by it and by all of `devices`.
SharedMemory MakeSharedMemory(int device, uint64_t bytes, const std::vector<int>& devices);
// The allocation on `device` that holds `address`, whoever made it.
SharedMemory ExportAllocation(int device, uint64_t address);
// Maps what another process has exported, for all of `devices`; returns where. The descriptor stays the caller's.
uint64_t ImportMemory(int fd, uint64_t bytes, const std::vector<int>& devices);

// Addresses come from other processes and from Python as numbers.
inline void* ToPointer(uint64_t address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

}  // namespace jax_ep
