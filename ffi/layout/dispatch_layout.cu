// One thread a choice, in strides over a bounded grid. A block counts in shared memory and adds its counts to the
// results at the end; sums of integers do not depend on the order, so neither do the results.
#include <algorithm>
#include <cstdint>

#include "layout/dispatch_layout.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 256;
constexpr int kChoicesPerThread = 8;  // enough that a block counts more than it adds at its end
constexpr int kMaxBlocks = 128;
constexpr int kMaxSharedCounts = 48 * 1024 / 4;  // what a block may have without opting in

// Whether no choice of the same token before `choice` lives on the rank that owns experts first .. first + count - 1.
__device__ bool IsFirstOnRank(const int* topk_idx, int64_t first_choice, int64_t choice, int first, int count) {
  for (int64_t earlier = first_choice; earlier < choice; ++earlier) {
    if (topk_idx[earlier] >= first && topk_idx[earlier] - first < count) return false;
  }
  return true;
}

__global__ void __launch_bounds__(kThreads) DispatchLayoutKernel(const DispatchLayoutParams p, bool counts_in_shared) {
  extern __shared__ int shared_counts[];  // s32[num_ranks + num_experts]
  const int num_counts = p.num_ranks + p.num_experts;
  int* per_rank = counts_in_shared ? shared_counts : p.num_tokens_per_rank;
  int* per_expert = counts_in_shared ? shared_counts + p.num_ranks : p.num_tokens_per_expert;
  if (counts_in_shared) {
    for (int i = threadIdx.x; i < num_counts; i += kThreads) shared_counts[i] = 0;
    __syncthreads();
  }

  const int num_local_experts = p.num_experts / p.num_ranks;
  const int64_t num_choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t choice = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; choice < num_choices;
       choice += stride) {
    const int expert = p.topk_idx[choice];
    if (expert < 0 || expert >= p.num_experts) continue;
    atomicAdd(&per_expert[expert], 1);
    const int64_t token = choice / p.num_topk;
    const int rank = expert / num_local_experts;
    if (IsFirstOnRank(p.topk_idx, token * p.num_topk, choice, rank * num_local_experts, num_local_experts)) {
      atomicAdd(&per_rank[rank], 1);
      p.is_token_in_rank[token * p.num_ranks + rank] = true;
    }
  }

  if (!counts_in_shared) return;
  __syncthreads();
  for (int i = threadIdx.x; i < num_counts; i += kThreads) {
    int* result = i < p.num_ranks ? p.num_tokens_per_rank + i : p.num_tokens_per_expert + (i - p.num_ranks);
    if (shared_counts[i] != 0) atomicAdd(result, shared_counts[i]);
  }
}

}  // namespace

cudaError_t LaunchDispatchLayout(const DispatchLayoutParams& p, cudaStream_t stream) {
  const auto zero = [stream](void* data, size_t num_bytes) {
    return num_bytes == 0 ? cudaSuccess : cudaMemsetAsync(data, 0, num_bytes, stream);
  };
  const size_t num_flags = static_cast<size_t>(p.num_tokens) * p.num_ranks;
  if (cudaError_t e = zero(p.num_tokens_per_rank, p.num_ranks * sizeof(int)); e != cudaSuccess) return e;
  if (cudaError_t e = zero(p.num_tokens_per_expert, p.num_experts * sizeof(int)); e != cudaSuccess) return e;
  if (cudaError_t e = zero(p.is_token_in_rank, num_flags * sizeof(bool)); e != cudaSuccess) return e;

  const int64_t num_choices = static_cast<int64_t>(p.num_tokens) * p.num_topk;
  if (num_choices == 0) return cudaSuccess;
  const int64_t choices_per_block = kThreads * kChoicesPerThread;
  const int num_blocks =
      static_cast<int>(std::min<int64_t>((num_choices + choices_per_block - 1) / choices_per_block, kMaxBlocks));
  const int num_counts = p.num_ranks + p.num_experts;
  const bool counts_in_shared = num_counts <= kMaxSharedCounts;
  const size_t shared_bytes = counts_in_shared ? num_counts * sizeof(int) : 0;
  DispatchLayoutKernel<<<num_blocks, kThreads, shared_bytes, stream>>>(p, counts_in_shared);
  return cudaGetLastError();
}

}  // namespace jax_ep
