// The combine kernels and their launcher: see combine.h for the contract, docs/protocol.md for the order of events.
//
//   warps         role        waits for                      signals
//   all but last  worker      peers' progress (sums only)    shared.next, its place in the block's list of items
//   last          publisher   shared.next of all workers     progress in every rank's window; then leaves
//
// Block b has the tokens b, b + B, ... of every rank, one a step. A step is a list of items, a piece of a row each:
// first the sums to push to the peers, then the sums of this rank's own token of kLag steps before, for which the peers
// have pushed meanwhile.
#include <algorithm>

#include "combine/combine.h"
#include "combine/vector.cuh"
#include "device/wait.cuh"
#include "device/warp.cuh"

namespace jax_ep {
namespace {

// Pulling has more loads in flight a thread, over the link; reducing more warps, so that some add while others load.
template <bool kReduce>
constexpr int kNumWarps = kReduce ? 20 : 16;
constexpr int kMaxWorkers = kNumWarps<true> - 1;
constexpr int kPieceBytes = 4096;  // of a row, an item, at most
constexpr int kLag = 3;

enum Address { kY, kScratch, kCarried };

struct CombineShared {
  uint64_t address[kMaxRanks][kNumAddresses];
  uint32_t next[kMaxWorkers];
};

struct Steps {
  int num_steps, num_pieces, piece_bytes, lag, items_per_step, num_pushes;

  __device__ Steps(const CombineParams& p, int num_ranks) {
    const int num_blocks = gridDim.x, block = blockIdx.x;
    num_steps = (p.num_tokens - block + num_blocks - 1) / num_blocks;
    num_pieces = max(static_cast<int>((p.row_bytes + kPieceBytes - 1) / kPieceBytes), 1);
    piece_bytes = static_cast<int>((p.row_bytes + num_pieces - 1) / num_pieces + 511) / 512 * 512;
    num_pushes = p.one_row_a_rank || num_ranks == 1 ? 0 : num_ranks * num_pieces;
    lag = num_pushes > 0 ? kLag : 0;
    items_per_step = num_pushes + num_pieces;
  }
  __device__ uint32_t num_items() const {
    return num_steps > 0 ? static_cast<uint32_t>(num_steps + lag) * items_per_step : 0;
  }
};

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

// The sum of kRows rows (or one less, if kMayLack) from byte `begin`, into `target`, where the whole row begins. A
// thread has kRows * V loads in flight before it adds. Beyond the end it reads the last vector again, and stores
// nothing.
template <class T, bool kWeighted, int kRows, int V, bool kMayLack = false>
__device__ __forceinline__ void SumFewRows(const Rows& rows, int64_t begin, char* target, bool is_total) {
  const int first = threadIdx.x % 32 * 16, size = static_cast<int>(rows.end - begin), last = size - 16 - first;
  const bool lacks = kMayLack && __popc(rows.holders) < kRows;
  const char* row[kRows];
  uint32_t rest = rows.holders;
#pragma unroll
  for (int i = 0; i < kRows; ++i, rest &= rest - 1) row[i] = PointerOf(rows, __ffs(rest) - 1) + begin + first;
  target += begin + first;
  const auto load = [&](int4(&bits)[kRows][V], int base) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        bits[i][v] = int4{};
        if (!(kMayLack && i == kRows - 1 && lacks)) bits[i][v] = LoadRow(row[i] + min(base + v * 512, last));
      }
    }
  };
  for (int base = 0; base < size; base += V * 512) {
    int4 bits[kRows][V];
    load(bits, base);
    float weight[kRows];  // asked for after the loads: they need not wait for it
    rest = rows.holders;
#pragma unroll
    for (int i = 0; i < kRows; ++i, rest &= rest - 1) {
      weight[i] = kWeighted ? __shfl_sync(~0u, rows.weight, __ffs(rest) - 1) : 1.f;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float sum[Vector<T>::kSize] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) Accumulate<T, kWeighted>(sum, bits[i][v], weight[i]);
      if (base + v * 512 <= last) StoreSum<T>(sum, target + base + v * 512, is_total);
    }
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

template <class T, bool kWeighted, bool kReduce>
__device__ __forceinline__ void SumRows(const Rows& rows, int64_t begin, char* target, bool is_total) {
  constexpr int kWide = kReduce ? 4 : 8, kNarrow = kReduce ? 2 : 4;
  const int count = __popc(rows.holders);
  switch (count) {
    case 0:
      return;
    case 1:
      return SumFewRows<T, kWeighted, 1, kWide>(rows, begin, target, is_total);
    case 2:
      return SumFewRows<T, kWeighted, 2, kWide>(rows, begin, target, is_total);
    case 3:
      return SumFewRows<T, kWeighted, 3, kNarrow>(rows, begin, target, is_total);
    case 4:
      return SumFewRows<T, kWeighted, 4, kNarrow>(rows, begin, target, is_total);
    default:
      if (kReduce && !kWeighted && count <= 6)
        return SumFewRows<T, kWeighted, 6, 1, true>(rows, begin, target, is_total);
      if (kReduce && !kWeighted && count <= 8)
        return SumFewRows<T, kWeighted, 8, 1, true>(rows, begin, target, is_total);
      return SumManyRows<T, kWeighted>(rows, begin, target, is_total);
  }
}

// A token without rows sums to zero.
template <class T, bool kWeighted, bool kReduce>
__device__ __forceinline__ void SumOrClear(const Rows& rows, int64_t begin, char* target, bool is_total) {
  if (rows.holders != 0) return SumRows<T, kWeighted, kReduce>(rows, begin, target, is_total);
  for (int64_t offset = begin + threadIdx.x % 32 * 16; offset < rows.end; offset += 512) {
    *reinterpret_cast<int4*>(target + offset) = int4{};
  }
}

// What an item is, and this lane's choice of its token: recv_slot of a source's token to push, or slot of an own token
// to sum.
struct Item {
  bool push;
  int step, piece, source, choice;
  int64_t token;  // -1: nothing to do
};

__device__ __forceinline__ Item LoadItem(const CombineParams& p, const Call& call, const Steps& steps, uint32_t index) {
  Item item;
  const int lane = threadIdx.x % 32, step = index / steps.items_per_step, part = index % steps.items_per_step;
  item.push = part < steps.num_pushes;
  item.step = item.push ? step : step - steps.lag;
  item.token = -1;
  item.choice = -1;
  if (item.step < 0 || item.step >= steps.num_steps || index >= steps.num_items()) return item;
  item.token = static_cast<int64_t>(item.step) * gridDim.x + blockIdx.x;
  item.source = (call.rank + 1 + part % call.num_ranks) % call.num_ranks;
  item.piece = item.push ? part / call.num_ranks : part - steps.num_pushes;
  const int32_t* choices =
      item.push ? p.recv_slot + static_cast<int64_t>(item.source) * p.num_tokens * p.num_topk : p.slot;
  if (lane < p.num_topk) item.choice = choices[item.token * p.num_topk + lane];
  return item;
}

template <class T, bool kWeighted>
__device__ __forceinline__ Rows OwnRows(const CombineParams& p, int row, int64_t end) {
  Rows rows;
  rows.holders = __ballot_sync(~0u, row >= 0);
  rows.pointer = p.y + row * p.row_bytes;
  rows.weight = kWeighted && row >= 0 ? p.weights[row] : 1.f;
  rows.end = end;
  return rows;
}

template <class T, bool kWeighted, bool kReduce>
__device__ void Work(const CombineParams& p, const Call& call, const Steps& steps, CombineShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, capacity = p.max_recv_tokens;
  constexpr int kWorkers = kNumWarps<kReduce> - 1;
  const uint32_t num_items = steps.num_items();
  uint32_t seen = 0;  // steps that rank `lane` has pushed to here
  bool came = true;
  Item next = LoadItem(p, call, steps, warp);
  for (uint32_t index = warp; index < num_items; index += kWorkers) {
    const Item item = next;
    next = LoadItem(p, call, steps, index + kWorkers);
    const int64_t begin = static_cast<int64_t>(item.piece) * steps.piece_bytes,
                  end = min(begin + steps.piece_bytes, p.row_bytes);
    if (item.token >= 0 && item.push) {
      // This rank's own sum waits in the result itself, the peers' in the scratch of the token's rank.
      const int place = call.rank < item.source ? call.rank : call.rank - 1;
      char* const sums = item.source == call.rank ? p.out
                                                  : reinterpret_cast<char*>(shared.address[item.source][kScratch]) +
                                                        static_cast<int64_t>(place) * p.num_tokens * p.row_bytes;
      SumRows<T, kWeighted, kReduce>(OwnRows<T, kWeighted>(p, item.choice, end), begin, sums + item.token * p.row_bytes,
                                     false);
    } else if (item.token >= 0) {
      const int slot = item.choice, owner = slot >= 0 ? slot / capacity : -1, row = slot - owner * capacity;
      char* const target = p.out + item.token * p.row_bytes;
      Rows sums{__reduce_or_sync(~0u, slot >= 0 ? 1u << owner : 0u), nullptr, 1.f, end};
      const bool holds = sums.holders >> lane & 1;
      if (kReduce && call.num_ranks == 1) {
        SumOrClear<T, kWeighted, kReduce>(OwnRows<T, kWeighted>(p, slot >= 0 ? row : -1, end), begin, target, true);
      } else if (kReduce) {
        const uint32_t want = item.step + 1;
        if (came && holds && seen < want) {
          uint64_t value;
          came = Await(call, &call.window->progress[lane][blockIdx.x], want, kRows, lane, blockIdx.x, &value);
          seen = static_cast<uint32_t>(value) & kGone;
        }
        came = __all_sync(~0u, came);
        __syncwarp();  // each lane acquired for all
        const int64_t place = lane < call.rank ? lane : lane - 1;
        sums.pointer = lane == call.rank ? target : p.scratch + (place * p.num_tokens + item.token) * p.row_bytes;
        if (came) SumOrClear<T, false, kReduce>(sums, begin, target, false);
      } else {
        const int there = FirstRowOn(lane, owner, row, p.num_topk);
        sums.pointer = holds ? reinterpret_cast<const char*>(shared.address[lane][kY]) + there * p.row_bytes : nullptr;
        SumOrClear<T, false, kReduce>(sums, begin, target, call.num_ranks == 1);
      }
      if (item.piece == 0 && p.carried_back != nullptr && lane < p.num_topk) {
        const int64_t place = p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + lane : row;
        p.carried_back[item.token * p.num_topk + lane] =
            slot >= 0 ? __ldcg(reinterpret_cast<const float*>(shared.address[owner][kCarried]) + place) : 0.f;
      }
    }
    __syncwarp();
    if (lane == 0) StoreReleaseShared(&shared.next[warp], index + kWorkers);
  }
  __syncwarp();
  if (lane == 0) StoreReleaseShared(&shared.next[warp], ~0u);
}

// Carries the workers' progress into the windows of all ranks, then leaves the lane.
__device__ void PublishSteps(const Call& call, const Steps& steps, CombineShared& shared, bool met) {
  const int lane = threadIdx.x % 32, num_workers = blockDim.x / 32 - 1;
  uint32_t published = 0;
  const auto tell = [&](uint32_t state) {
    FenceSys();  // what the workers stored before counting is before the flag
    if (lane < call.num_ranks) StoreRelaxedSys(&call.Peer(lane)->progress[call.rank][blockIdx.x], call.Tag(state));
  };
  while (met) {
    const uint32_t next = __reduce_min_sync(~0u, lane < num_workers ? LoadAcquireShared(&shared.next[lane]) : ~0u);
    if (next == ~0u) break;
    // All items before `next` are done; the sums of a step come last and need not be.
    const uint32_t pushed =
        min((next + steps.num_pieces) / steps.items_per_step, static_cast<uint32_t>(steps.num_steps));
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
__global__ void __launch_bounds__(32 * kNumWarps<kReduce>, 1) CombineKernel(const __grid_constant__ CombineParams p) {
  constexpr int kThreads = 32 * kNumWarps<kReduce>, kWorkers = kNumWarps<kReduce> - 1;
  __shared__ CombineShared shared;
  const Call call = BeginCall(p.group, kCombine);
  const Steps steps(p, call.num_ranks);
  if (threadIdx.x < kWorkers) shared.next[threadIdx.x] = threadIdx.x;
  if (p.refused && threadIdx.x == 0) Refuse(call);
  bool met = __syncthreads_and(!p.refused && !HasFailed(call));
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
      for (int i = 0; i <= kCarried; ++i) shared.address[peer][i] = Translate(call, peer, mail.address[i]);
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
      for (int64_t i = threadIdx.x; i < num_words; i += kThreads) reinterpret_cast<int4*>(p.out)[i] = int4{};
      const int64_t num_choices = p.carried_back != nullptr ? static_cast<int64_t>(p.num_tokens) * p.num_topk : 0;
      for (int64_t i = threadIdx.x; i < num_choices; i += kThreads) p.carried_back[i] = 0.f;
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
  if (p.num_tokens >= kMaxSteps) return false;
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
  kernel<<<num_blocks, 32 * (params.one_row_a_rank ? kNumWarps<false> : kNumWarps<true>), 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep
