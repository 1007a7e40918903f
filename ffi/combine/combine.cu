// The combine kernels and their launcher: see combine.h for the contract, docs/protocol.md for the order of events.
//
//   warps    role        waits for                          signals
//   0 .. 18  worker      peers' progress (sums only)        shared.next, its place in the block's list of items
//   19       publisher   shared.next of all workers         progress in every rank's window; then leaves
//
// Block b has the tokens b, b + B, ... of every rank, one a step. A step is a list of items, a piece of a row each: first the sums to
// push to the peers, then the sums of this rank's own token of kLag steps before, for which the peers have pushed meanwhile.
#include <algorithm>

#include "combine/combine.h"
#include "combine/vector.cuh"
#include "device/wait.cuh"
#include "device/warp.cuh"

namespace jax_ep {
namespace {

#ifndef JAX_EP_COMBINE_WARPS
#define JAX_EP_COMBINE_WARPS 20
#endif
constexpr int kCombineWarps = JAX_EP_COMBINE_WARPS, kCombineThreads = 32 * kCombineWarps, kWorkers = kCombineWarps - 1;
constexpr int kPieceBytes = 2048;   // of a row, an item
constexpr int kVectors = 2;         // 16-byte vectors of a row that a thread has in hand
constexpr int kRowsInHand = 4;      // rows that a thread loads before it adds them
constexpr int kLag = 3;

enum Address { kY, kScratch, kCarried };

struct CombineShared {
  uint64_t address[kMaxRanks][kNumAddresses];
  uint32_t next[kWorkers];
};

struct Steps {
  int num_steps, num_pieces, lag, items_per_step, num_pushes;

  __device__ Steps(const CombineParams& p, int num_ranks) {
    const int num_blocks = gridDim.x, block = blockIdx.x;
    num_steps = (p.num_tokens - block + num_blocks - 1) / num_blocks;
    num_pieces = max(static_cast<int>((p.row_bytes + kPieceBytes - 1) / kPieceBytes), 1);
    num_pushes = p.one_row_a_rank ? 0 : (num_ranks - 1) * num_pieces;
    lag = num_pushes > 0 ? kLag : 0;
    items_per_step = num_pushes + num_pieces;
  }
  __device__ uint32_t num_items() const { return num_steps > 0 ? static_cast<uint32_t>(num_steps + lag) * items_per_step : 0; }
};

// Adds to `sum`, in lane order, the rows that begin at `pointer` of the lanes in `holders`; this thread's part of them is at `offset`.
// `own` stands for the row of lane `own_lane`.
template <class T, bool kWeighted>
__device__ __forceinline__ void SumRows(uint32_t holders, const char* pointer, float weight, int64_t offset, const bool (&inside)[kVectors],
                                        int own_lane, const int4 (&own)[kVectors], float (&sum)[kVectors][Vector<T>::kSize]) {
  while (holders != 0) {
    int4 rows[kRowsInHand][kVectors];
    float weights[kRowsInHand];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kRowsInHand; ++i) {
      if (holders == 0) break;
      const int lane = __ffs(holders) - 1;
      holders &= holders - 1;
      count = i + 1;
      const char* row = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(pointer), lane)) + offset;
      if (kWeighted) weights[i] = __shfl_sync(~0u, weight, lane);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        rows[i][v] = int4{};
        if (lane == own_lane) {
          rows[i][v] = own[v];
        } else if (inside[v]) {
          rows[i][v] = __ldcg(reinterpret_cast<const int4*>(row + v * 512));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsInHand; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) Accumulate<T, kWeighted>(sum[v], rows[i][v], kWeighted ? weights[i] : 1.f);
    }
  }
}

template <class T>
__device__ __forceinline__ void Clear(float (&sum)[kVectors][Vector<T>::kSize]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) sum[v][i] = 0.f;
  }
}

// Piece `piece` of the sum of this rank's rows of one token, into `target`, the whole row's place. `row` is lane k's choice.
template <class T, bool kWeighted>
__device__ __forceinline__ void Push(const CombineParams& p, int row, int piece, char* target) {
  const int lane = threadIdx.x % 32;
  const uint32_t holders = __ballot_sync(~0u, row >= 0);
  if (holders == 0) return;
  const char* pointer = p.y + row * p.row_bytes;
  const float weight = kWeighted && row >= 0 ? p.weights[row] : 1.f;
  const int64_t begin = static_cast<int64_t>(piece) * kPieceBytes, end = min(begin + kPieceBytes, p.row_bytes);
  const int4 none[kVectors] = {};
  for (int64_t offset = begin + lane * 16; offset - lane * 16 < end; offset += kVectors * 512) {
    bool inside[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) inside[v] = offset + v * 512 < end;
    float sum[kVectors][Vector<T>::kSize];
    Clear<T>(sum);
    SumRows<T, kWeighted>(holders, pointer, weight, offset, inside, -1, none, sum);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (inside[v]) *reinterpret_cast<int4*>(target + offset + v * 512) = Vector<T>::Pack(sum[v]);
    }
  }
}

// Piece `piece` of out[token]: the sums of all ranks in `ranks`, of which rank lane's lies at lane's `pointer`; this rank's own is made here
// from `own_row`, lane k's choice, where it is not to be read.
template <class T, bool kWeighted, bool kReduce>
__device__ __forceinline__ void Sum(const CombineParams& p, int rank, uint32_t ranks, const char* pointer, int own_row, int piece, char* target) {
  const int lane = threadIdx.x % 32;
  const uint32_t own_holders = kReduce ? __ballot_sync(~0u, own_row >= 0) : 0;
  const char* own_pointer = p.y + own_row * p.row_bytes;
  const float weight = kReduce && kWeighted && own_row >= 0 ? p.weights[own_row] : 1.f;
  const int64_t begin = static_cast<int64_t>(piece) * kPieceBytes, end = min(begin + kPieceBytes, p.row_bytes);
  for (int64_t offset = begin + lane * 16; offset - lane * 16 < end; offset += kVectors * 512) {
    bool inside[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) inside[v] = offset + v * 512 < end;
    float sum[kVectors][Vector<T>::kSize];
    int4 own[kVectors] = {};
    if (kReduce && own_holders != 0) {
      Clear<T>(sum);
      SumRows<T, kWeighted>(own_holders, own_pointer, weight, offset, inside, -1, own, sum);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) own[v] = Vector<T>::Pack(sum[v]);
    }
    Clear<T>(sum);
    SumRows<T, false>(ranks, pointer, 1.f, offset, inside, kReduce ? rank : -1, own, sum);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (inside[v]) *reinterpret_cast<int4*>(target + offset + v * 512) = Vector<T>::Pack(sum[v]);
    }
  }
}

template <class T, bool kWeighted, bool kReduce>
__device__ void Work(const CombineParams& p, const Call& call, const Steps& steps, CombineShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_ranks = call.num_ranks, capacity = p.max_recv_tokens;
  const uint32_t num_items = steps.num_items();
  const auto token_of = [&](int step) { return static_cast<int64_t>(step) * gridDim.x + blockIdx.x; };
  const auto choice = [&](const int32_t* choices, int64_t token) {
    return lane < p.num_topk ? choices[token * p.num_topk + lane] : -1;
  };
  uint32_t seen = 0;  // steps that rank `lane` has pushed to here
  bool came = true;
  for (uint32_t item = warp; item < num_items; item += kWorkers) {
    const int step = item / steps.items_per_step, part = item % steps.items_per_step;
    if (kReduce && part < steps.num_pushes) {
      if (step < steps.num_steps) {
        const int source = (call.rank + 1 + part % (num_ranks - 1)) % num_ranks, piece = part / (num_ranks - 1);
        const int64_t token = token_of(step);
        const int row = choice(p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * p.num_topk, token);
        const int place = call.rank < source ? call.rank : call.rank - 1;
        char* scratch = reinterpret_cast<char*>(shared.address[source][kScratch]);
        if (p.row_bytes > 0) {
          Push<T, kWeighted>(p, row, piece, scratch + (static_cast<int64_t>(place) * p.num_tokens + token) * p.row_bytes);
        }
      }
    } else if (step >= steps.lag && came) {
      const int piece = part - steps.num_pushes;
      const int64_t token = token_of(step - steps.lag);
      const int slot = choice(p.slot, token);
      const int owner = slot >= 0 ? slot / capacity : -1, row = slot >= 0 ? slot % capacity : -1;
      const uint32_t ranks = __reduce_or_sync(~0u, slot >= 0 ? 1u << owner : 0u);
      const char* pointer = nullptr;
      if (kReduce) {
        const bool needed = (ranks >> lane & 1) && lane != call.rank;
        const uint32_t want = step - steps.lag + 1;
        if (needed && seen < want) {
          uint64_t value;
          came = Await(call, &call.window->progress[lane][blockIdx.x], want, kRows, lane, blockIdx.x, &value);
          seen = static_cast<uint32_t>(value);
        }
        came = __all_sync(~0u, came);
        __syncwarp();  // each lane acquired for all
        const int64_t place = lane < call.rank ? lane : lane - 1;
        pointer = p.scratch + (place * p.num_tokens + token) * p.row_bytes;
      } else {
        const int row_there = FirstRowOn(lane, slot, p.num_topk, capacity);
        if (ranks >> lane & 1) pointer = reinterpret_cast<const char*>(shared.address[lane][kY]) + row_there * p.row_bytes;
      }
      if (p.row_bytes > 0 && came) {
        Sum<T, kWeighted, kReduce>(p, call.rank, ranks, pointer, owner == call.rank ? row : -1, piece, p.out + token * p.row_bytes);
      }
      if (piece == 0 && p.carried_back != nullptr && lane < p.num_topk) {
        const int64_t place = p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + lane : row;
        p.carried_back[token * p.num_topk + lane] =
            slot >= 0 ? __ldcg(reinterpret_cast<const float*>(shared.address[owner][kCarried]) + place) : 0.f;
      }
    }
    __syncwarp();
    if (lane == 0) StoreReleaseShared(&shared.next[warp], item + kWorkers);
  }
  __syncwarp();
  if (lane == 0) StoreReleaseShared(&shared.next[warp], ~0u);
}

// Carries the workers' progress into the windows of all ranks, then leaves the lane.
__device__ void PublishSteps(const Call& call, const Steps& steps, CombineShared& shared, bool met) {
  const int lane = threadIdx.x % 32;
  uint32_t published = 0;
  const auto tell = [&](uint32_t state) {
    FenceSys();  // what the workers stored before counting is before the flag
    if (lane < call.num_ranks) StoreRelaxedSys(&call.Peer(lane)->progress[call.rank][blockIdx.x], call.Tag(state));
  };
  while (met) {
    const uint32_t next = __reduce_min_sync(~0u, lane < kWorkers ? LoadAcquireShared(&shared.next[lane]) : ~0u);
    if (next == ~0u) break;
    // All items before `next` are done; the sums of a step come last and need not be.
    const uint32_t pushed = min((next + steps.num_pieces) / steps.items_per_step, static_cast<uint32_t>(steps.num_steps));
    if (steps.num_pushes == 0 || pushed == published) {
      __nanosleep(100);
      continue;
    }
    tell(pushed);
    published = pushed;
  }
  tell(met ? kDone : kGone);
  Leave(call, blockIdx.x, blockIdx.x);
}

template <class T, bool kWeighted, bool kReduce>
__global__ void __launch_bounds__(kCombineThreads, 1) CombineKernel(const __grid_constant__ CombineParams p) {
  __shared__ CombineShared shared;
  const Call call = BeginCall(p.group, kCombine);
  const Steps steps(p, call.num_ranks);
  if (threadIdx.x < kWorkers) shared.next[threadIdx.x] = threadIdx.x;
  if (p.refused && threadIdx.x == 0) Refuse(call);
  bool met = !p.refused;
  if (met && threadIdx.x < call.num_ranks) {
    Mail* mail = &call.Peer(threadIdx.x)->mail[call.parity][call.rank][blockIdx.x];
    mail->address[kY] = reinterpret_cast<uint64_t>(p.y);
    mail->address[kScratch] = reinterpret_cast<uint64_t>(p.scratch);
    mail->address[kCarried] = reinterpret_cast<uint64_t>(p.carried);
  }
  if (met && threadIdx.x < 32) {
    __syncwarp();
    Post(call, blockIdx.x);
    const int peer = threadIdx.x;
    if (peer < call.num_ranks) {
      met = Await(call, &call.window->post[call.parity][peer][blockIdx.x], kPosted, kMeet, peer, blockIdx.x);
      const Mail& mail = call.window->mail[call.parity][peer][blockIdx.x];
      for (int i = 0; i <= kCarried; ++i) shared.address[peer][i] = mail.address[i];
    }
  }
  met = __syncthreads_and(met);
  if (threadIdx.x / 32 < kWorkers) {
    if (met) Work<T, kWeighted, kReduce>(p, call, steps, shared);
  } else {
    PublishSteps(call, steps, shared, met);
  }
  if (IsLastBlock(call)) {
    if (HasFailed(call)) {
      const int64_t num_words = p.num_tokens * (p.row_bytes / 16);
      for (int64_t i = threadIdx.x; i < num_words; i += kCombineThreads) reinterpret_cast<int4*>(p.out)[i] = int4{};
      const int64_t num_choices = p.carried_back != nullptr ? static_cast<int64_t>(p.num_tokens) * p.num_topk : 0;
      for (int64_t i = threadIdx.x; i < num_choices; i += kCombineThreads) p.carried_back[i] = 0.f;
    }
    EndCall(call);
  }
}

using Kernel = void (*)(CombineParams);

template <class T>
Kernel KernelFor(bool weighted, bool one_row_a_rank) {
  if (one_row_a_rank) return CombineKernel<T, false, false>;
  return weighted ? CombineKernel<T, true, true> : CombineKernel<T, false, true>;
}

Kernel KernelFor(RowDtype dtype, bool weighted, bool one_row_a_rank) {
  if (dtype == RowDtype::kBfloat16) return KernelFor<__nv_bfloat16>(weighted, one_row_a_rank);
  if (dtype == RowDtype::kFloat16) return KernelFor<__half>(weighted, one_row_a_rank);
  return KernelFor<float>(weighted, one_row_a_rank);
}

}  // namespace

bool CombineFits(const CombineParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  const int64_t items = (p.num_tokens + kLag) * num_ranks * (p.row_bytes / kPieceBytes + 1);
  if (num_ranks > kMaxRanks || p.num_topk > 32 || p.row_bytes % 16 != 0) return false;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return false;
  return p.max_recv_tokens > 0 && p.num_tokens > 0 && items < 1ll << 31;
}

cudaError_t LoadCombine() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (int variant = 0; variant < 3; ++variant) {
      cudaFuncAttributes attributes;
      const auto* kernel = reinterpret_cast<const void*>(KernelFor(dtype, variant == 1, variant == 2));
      if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchCombine(const CombineParams& params, const CombineConfig& config, cudaStream_t stream) {
  const int num_blocks = std::max(1, std::min(config.num_sms, kMaxLanes));
  const Kernel kernel = KernelFor(params.dtype, params.weights != nullptr, params.one_row_a_rank);
  kernel<<<num_blocks, kCombineThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep
