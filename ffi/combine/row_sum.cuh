// The sums of a combine, to the bit: a warp adds the rows that its lanes name, in lane order, in f32, and rounds the
// sum. Neighbour: vector.cuh, the arithmetic of 16 bytes.
#pragma once

#include "combine/vector.cuh"

namespace jax_ep {

constexpr int kVectors = 8;  // of 16 bytes, that a thread asks for at once; twice as many are under way

// The rows that begin at `pointer` of the lanes in `holders`, to be added in lane order up to byte `end`.
struct Rows {
  uint32_t holders;
  const char* pointer;
  float weight;
  int64_t end;
};

__device__ __forceinline__ const char* PointerOf(const Rows& rows, int lane) {
  return reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(rows.pointer), lane));
}

// A sum that stands for all ranks' (there is one rank) is rounded as a rank's and as the total: -0 becomes 0.
template <class T>
__device__ __forceinline__ void StoreSum(const float (&sum)[Vector<T>::kSize], char* target, bool is_total) {
  int4 bits = Vector<T>::Pack(sum);
  if (is_total) {
    float total[Vector<T>::kSize] = {};
    Accumulate<T, false>(total, bits, 1.f);
    bits = Vector<T>::Pack(total);
  }
  *reinterpret_cast<int4*>(target) = bits;
}

// The sum of kRows rows (or one less, if kMayLack) from byte `begin`, into `target`, where the whole row begins. While
// one batch of kRows * V vectors is added the next is on its way. Four vectors are better than eight for one or two
// rows, whose sums come in quick succession.
template <class T, bool kWeighted, int kRows, bool kMayLack = false>
__device__ __forceinline__ void SumFewRows(const Rows& rows, int64_t begin, char* target, bool is_total) {
  constexpr int V = kRows <= 2 ? 4 / kRows : kVectors / kRows, kBatch = V * 512;
  const int first = threadIdx.x % 32 * 16, size = static_cast<int>(rows.end - begin);
  const bool lacks = kMayLack && __popc(rows.holders) < kRows;
  const char* row[kRows];
  float weight[kRows];
  uint32_t rest = rows.holders;
#pragma unroll
  for (int i = 0; i < kRows; ++i, rest &= rest - 1) {
    const int holder = __ffs(rest) - 1;
    row[i] = PointerOf(rows, holder) + begin + first;
    weight[i] = kWeighted ? __shfl_sync(~0u, rows.weight, holder) : 1.f;
    if (kMayLack && i == kRows - 1 && lacks) weight[i] = 0.f;
  }
  target += begin + first;
  int left = size - first;  // bytes from this thread's next vector to the end
  int4 even[kRows][V], odd[kRows][V];
  const auto load = [&](int4(&bits)[kRows][V], int left) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        bits[i][v] = int4{};
        if (v * 512 < left && !(kMayLack && i == kRows - 1 && lacks)) bits[i][v] = LoadRow(row[i] + v * 512);
      }
      row[i] += kBatch;
    }
  };
  const auto add = [&](const int4(&bits)[kRows][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum[Vector<T>::kSize] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) Accumulate<T, kWeighted>(sum, bits[i][v], weight[i]);
      if (v * 512 < left) StoreSum<T>(sum, target + v * 512, is_total);
    }
    target += kBatch;
    left -= kBatch;
  };
  load(even, left);
#pragma unroll 1
  for (int base = 0; base < size; base += 2 * kBatch) {
    load(odd, left - kBatch);
    add(even);
    load(even, left - kBatch);
    add(odd);
  }
}

// The same for any number of rows: two vectors a thread, four rows at a time.
template <class T, bool kWeighted>
__device__ __forceinline__ void SumManyRows(const Rows& rows, int64_t begin, char* target, bool is_total) {
  constexpr int kRows = 4, V = 2;
  for (int64_t base = begin; base < rows.end; base += V * 512) {
    const int64_t offset = base + threadIdx.x % 32 * 16;
    float sum[V][Vector<T>::kSize] = {};
    for (uint32_t rest = rows.holders; rest != 0;) {
      int4 bits[kRows][V];
      float weight[kRows];
      const int count = min(__popc(rest), kRows);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int lane = i < count ? __ffs(rest) - 1 : 0;
        const char* row = PointerOf(rows, lane);
        weight[i] = kWeighted ? __shfl_sync(~0u, rows.weight, lane) : 1.f;
        if (i >= count) continue;
        rest &= rest - 1;
#pragma unroll
        for (int v = 0; v < V; ++v) bits[i][v] = LoadRow(row + min(offset + v * 512, rows.end - 16));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= count) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) Accumulate<T, kWeighted>(sum[v], bits[i][v], weight[i]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (offset + v * 512 < rows.end) StoreSum<T>(sum[v], target + offset + v * 512, is_total);
    }
  }
}

template <class T, bool kWeighted>
__device__ __forceinline__ void SumRows(const Rows& rows, int64_t begin, char* target, bool is_total) {
  const int count = __popc(rows.holders);
  switch (count) {
    case 0:
      return;
    case 1:
      return SumFewRows<T, kWeighted, 1>(rows, begin, target, is_total);
    case 2:
      return SumFewRows<T, kWeighted, 2>(rows, begin, target, is_total);
    case 3:
    case 4:
      return SumFewRows<T, kWeighted, 4, true>(rows, begin, target, is_total);
    case 5:
    case 6:
      return SumFewRows<T, kWeighted, 6, true>(rows, begin, target, is_total);
    case 7:
    case 8:
      return SumFewRows<T, kWeighted, 8, true>(rows, begin, target, is_total);
    default:
      return SumManyRows<T, kWeighted>(rows, begin, target, is_total);
  }
}

// A token without rows sums to zero.
template <class T, bool kWeighted>
__device__ __forceinline__ void SumOrClear(const Rows& rows, int64_t begin, char* target, bool is_total) {
  if (rows.holders != 0) return SumRows<T, kWeighted>(rows, begin, target, is_total);
  for (int64_t offset = begin + threadIdx.x % 32 * 16; offset < rows.end; offset += 512) {
    *reinterpret_cast<int4*>(target + offset) = int4{};
  }
}

}  // namespace jax_ep
