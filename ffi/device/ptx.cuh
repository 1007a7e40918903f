// The PTX that CUDA C++ does not spell: system-scope flags, bulk copies (TMA without tensor maps), mbarriers.
// Neighbours: wait.cuh builds the waits with a deadline on these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_ep {

// ---- flags that peers share

__device__ __forceinline__ uint64_t LoadAcquireSys(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ uint64_t LoadRelaxedSys(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void StoreRelaxedSys(uint64_t* flag, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void FenceSys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ void FenceSeqCstSys() { asm volatile("fence.sc.sys;" ::: "memory"); }

// ---- counters between the blocks of a grid

__device__ __forceinline__ void AddRelease(unsigned int* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// ---- 16 bytes of a line: one of the eight lanes that move its 128 bytes together

__device__ __forceinline__ uint4 LoadLine(const char* place) {
  uint64_t low, high;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(place) : "memory");
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}

__device__ __forceinline__ void StoreLine(char* place, const uint4& bits) {
  const uint64_t low = static_cast<uint64_t>(bits.y) << 32 | bits.x,
                 high = static_cast<uint64_t>(bits.w) << 32 | bits.z;
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(place), "l"(low), "l"(high) : "memory");
}

// ---- counters between the warps of a block

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// As atomics: compute-sanitizer's racecheck knows them to be synchronisation.
__device__ __forceinline__ uint32_t LoadAcquireShared(const uint32_t* counter) {
  uint32_t value;
  asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;" : "=r"(value) : "r"(SharedAddress(counter)) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseShared(uint32_t* counter, uint32_t value) {
  asm volatile(
      "{ .reg .b32 before;\n  atom.release.cta.shared.exch.b32 before, [%0], %1; }" ::"r"(SharedAddress(counter)),
      "r"(value)
      : "memory");
}

// A number that a counter's release hands over with it.
__device__ __forceinline__ void StoreRelaxedShared(uint32_t* number, uint32_t value) {
  asm volatile(
      "{ .reg .b32 before;\n  atom.relaxed.cta.shared.exch.b32 before, [%0], %1; }" ::"r"(SharedAddress(number)),
      "r"(value)
      : "memory");
}

// ---- shared memory by its address; copies to it are for the thread that asks for them

__device__ __forceinline__ int4 LoadShared16(uint32_t address) {
  int4 bits;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "r"(address)
               : "memory");
  return bits;
}

__device__ __forceinline__ void StoreShared16(uint32_t address, const int4& bits) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
}

__device__ __forceinline__ uint2 LoadShared8(uint32_t address) {
  uint2 bits;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "r"(address) : "memory");
  return bits;
}

__device__ __forceinline__ void StoreShared8(uint32_t address, const uint2& bits) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(bits.x), "r"(bits.y) : "memory");
}

__device__ __forceinline__ float LoadShared4(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreShared4(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void CopyAsync(uint32_t address, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the newest kPending groups of this thread's copies are there.
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- time

__device__ __forceinline__ uint64_t NanoSeconds() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

// ---- bulk copies. Addresses and sizes are multiples of 16 bytes.

__device__ __forceinline__ void InitMbarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
}

// Orders InitMbarrier before the bulk copies that signal it.
__device__ __forceinline__ void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The coming phase of `barrier` ends when `num_bytes` have been loaded.
__device__ __forceinline__ void ExpectBytes(uint64_t* barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(num_bytes)
               : "memory");
}

// Global to shared; counts towards what `barrier` expects.
__device__ __forceinline__ void BulkLoad(void* shared, const void* global, uint32_t num_bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(shared)),
               "l"(global), "r"(num_bytes), "r"(SharedAddress(barrier))
               : "memory");
}

__device__ __forceinline__ void WaitMbarrier(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Shared to global, own or a peer's; joins the calling thread's open bulk group.
__device__ __forceinline__ void BulkStore(void* global, const void* shared, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(SharedAddress(shared)),
               "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void CommitBulkGroup() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the newest kPending groups of this thread have read their shared memory: it may be refilled.
template <int kPending>
__device__ __forceinline__ void WaitBulkRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All but the newest kPending groups of this thread are complete: their writes are visible to it, so a release covers
// them.
template <int kPending>
__device__ __forceinline__ void WaitBulkDone() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Ordinary writes to shared memory before, bulk copies over the same bytes after.
__device__ __forceinline__ void FenceProxyAsyncShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Rows acquired through a flag before, bulk loads of them after.
__device__ __forceinline__ void FenceProxyAsync() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace jax_ep
