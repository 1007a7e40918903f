// transport.cuh by NVSHMEM: InfiniBand (IBGDA, IBRC), EFA or NVLink are its business. No wait of its own is used.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "internode/transport.cuh"

namespace jax_ep {

__device__ void PutAndSignal(const InternodeView& view, int peer, char* target, const char* source, int64_t num_bytes,
                             uint64_t* flag, uint64_t value) {
  nvshmemx_putmem_signal_nbi_warp(target, source, static_cast<size_t>(num_bytes), flag, value, NVSHMEM_SIGNAL_SET,
                                  view.pe[peer]);
}

__device__ void SignalOverNetwork(const InternodeView& view, int peer, uint64_t* flag, uint64_t value) {
  nvshmemx_signal_op(flag, value, NVSHMEM_SIGNAL_SET, view.pe[peer]);
}

// It is there already, so this does not wait: it makes what a NIC wrote before the flag visible, where that takes more
// than an acquire.
__device__ void SettleArrival(uint64_t* flag, uint64_t value) { nvshmem_uint64_test(flag, NVSHMEM_CMP_GE, value); }

}  // namespace jax_ep
