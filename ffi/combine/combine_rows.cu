// combine by whole rows: the way of layout "rank", whose rows are sums already, and of few tokens. combine.cu has the
// other way and chooses; both have the same protocol with the peers, and the same sums. frame.cuh has the warps' roles,
// docs/protocol.md the order of events.
//
// An item is a row or a part of it. A rank's own sum of an own token is an item apart, among the pushes: it waits in
// the result itself.
#include "combine/combine_rows.h"
#include "combine/frame.cuh"
#include "combine/row_sum.cuh"
#include "device/load.h"
#include "device/wait.cuh"

namespace jax_ep {
namespace {

// Which row the token has on `rank`: that of the first choice whose owner it is, or -1. Lane k holds choice k's owner
// and row.
__device__ __forceinline__ int FirstRowOn(int rank, int owner, int row, int num_topk) {
  int found = -1;
  for (int k = num_topk - 1; k >= 0; --k) {
    const int other = __shfl_sync(~0u, owner, k), other_row = __shfl_sync(~0u, row, k);
    if (other == rank) found = other_row;
  }
  return found;
}

// Pushes are to all ranks, this one too; there are none in layout "rank" and for one rank alone, which sum rows where
// they are. Groups are multiples of 512 bytes.
__device__ __forceinline__ Steps RowSteps(const CombineParams& p, int num_ranks) {
  constexpr int kLeast = 2048;
  const int num_steps = NumTokensOfLane(p.num_tokens);
  // Whole rows, unless there are too few of them to keep the workers busy.
  const int64_t most = max((p.row_bytes + kLeast - 1) / kLeast, int64_t{1}), num_rows = max(num_steps, 1) * num_ranks;
  const int num_groups = static_cast<int>(min((4 * kWorkers + num_rows - 1) / num_rows, most));
  const int64_t group_bytes = ((p.row_bytes + num_groups - 1) / num_groups + 511) / 512 * 512;
  const bool pushes = !p.one_row_a_rank && num_ranks > 1;
  return {num_steps, num_groups, static_cast<int>(group_bytes), pushes ? num_ranks * num_groups : 0};
}

// What an item is, and this lane's choice of its token (recv_slot of a source's token to push, slot of an own token to
// sum) and the weight of the row that it names.
struct Item {
  bool push;
  int step, group, source, choice;
  int64_t token;  // -1: nothing to do
  float weight;
};

__device__ __forceinline__ Item LoadItem(const CombineParams& p, const Call& call, const Steps& steps, uint32_t index) {
  Item item;
  const int lane = threadIdx.x % 32, step = index / steps.items_per_step, part = index % steps.items_per_step;
  item.push = part < steps.num_pushes;
  item.step = item.push ? step : step - steps.lag;
  item.token = -1;
  item.choice = -1;
  item.weight = 1.f;
  if (item.step < 0 || item.step >= steps.num_steps || index >= steps.num_items()) return item;
  item.token = static_cast<int64_t>(item.step) * gridDim.x + blockIdx.x;
  item.source = (call.rank + 1 + part % call.num_ranks) % call.num_ranks;
  item.group = item.push ? part / call.num_ranks : part - steps.num_pushes;
  const int32_t* choices =
      item.push ? p.recv_slot + static_cast<int64_t>(item.source) * p.num_tokens * p.num_topk : p.slot;
  if (lane < p.num_topk) item.choice = choices[item.token * p.num_topk + lane];
  if (call.dead != 0) {  // masked ranks are sent nothing, and their rows are absent
    if (item.push && !call.Reaches(item.source)) item.token = -1, item.choice = -1;
    if (!item.push && item.choice >= 0 && !call.Reaches(item.choice / p.max_recv_tokens)) item.choice = -1;
  }
  return item;
}

// The row here that this lane's choice names, or -1.
__device__ __forceinline__ int OwnRow(const CombineParams& p, const Call& call, const Item& item) {
  if (item.push) return item.choice;
  const int row = item.choice - call.rank * p.max_recv_tokens;
  return item.choice >= 0 && row >= 0 && row < p.max_recv_tokens ? row : -1;
}

// A load of its own, asked for when the choice is there: one item ahead of its use, as choices are two.
template <bool kWeighted>
__device__ __forceinline__ void LoadWeight(const CombineParams& p, const Call& call, Item& item) {
  const int row = kWeighted ? OwnRow(p, call, item) : -1;
  item.weight = row >= 0 ? p.weights[row] : 1.f;
}

__device__ __forceinline__ Rows OwnRows(const CombineParams& p, int row, float weight, int64_t end) {
  return {__ballot_sync(~0u, row >= 0), p.y + row * p.row_bytes, weight, end};
}

template <class T, bool kWeighted>
__device__ void Work(const CombineParams& p, const Call& call, const Steps& steps, CombineShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, capacity = p.max_recv_tokens;
  const uint32_t num_items = steps.num_items();
  uint32_t seen = 0;  // steps that rank `lane` has pushed to here
  bool came = true;
  Item next = LoadItem(p, call, steps, warp), later = LoadItem(p, call, steps, warp + kWorkers);
  LoadWeight<kWeighted>(p, call, next);
  for (uint32_t index = warp; index < num_items; index += kWorkers) {
    const Item item = next;
    next = later;
    LoadWeight<kWeighted>(p, call, next);
    later = LoadItem(p, call, steps, index + 2 * kWorkers);
    const int64_t begin = item.group * steps.group_bytes, end = min(begin + steps.group_bytes, p.row_bytes);
    Rows rows{0, nullptr, 1.f, end};
    char* target = nullptr;
    bool is_total = false;
    const int slot = item.choice, owner = slot >= 0 && !item.push ? slot / capacity : -1, row = slot - owner * capacity;
    if (item.token >= 0 && item.push) {
      // This rank's own sum waits in the result itself, the peers' in the scratch of the token's rank.
      const int place = call.rank < item.source ? call.rank : call.rank - 1;
      char* const sums = item.source == call.rank ? p.out
                                                  : reinterpret_cast<char*>(shared.address[item.source][kScratch]) +
                                                        static_cast<int64_t>(place) * p.num_tokens * p.row_bytes;
      rows = OwnRows(p, slot, item.weight, end);
      target = sums + item.token * p.row_bytes;
    } else if (item.token >= 0) {
      target = p.out + item.token * p.row_bytes;
      rows.holders = __reduce_or_sync(~0u, slot >= 0 ? 1u << owner : 0u);
      const bool holds = rows.holders >> lane & 1;
      is_total = call.num_ranks == 1;
      if (p.one_row_a_rank) {
        const int there = FirstRowOn(lane, owner, row, p.num_topk);
        rows.pointer = holds ? reinterpret_cast<const char*>(shared.address[lane][kY]) + there * p.row_bytes : nullptr;
      } else if (call.num_ranks == 1) {
        rows = OwnRows(p, slot >= 0 ? row : -1, item.weight, end);
      } else {
        const uint32_t want = item.step + 1;
        if (came && holds && seen < want) {
          uint64_t value;
          came = Await(call, &call.window->progress[lane][blockIdx.x], want, kRows, lane, blockIdx.x, &value);
          seen = static_cast<uint32_t>(value) & kGone;
        }
        came = __all_sync(~0u, came);
        __syncwarp();  // each lane acquired for all
        const int64_t place = lane < call.rank ? lane : lane - 1;
        rows.pointer = lane == call.rank ? target : p.scratch + (place * p.num_tokens + item.token) * p.row_bytes;
        if (!came) target = nullptr;
      }
      if (item.group == 0 && p.carried_back != nullptr && lane < p.num_topk) {
        const int64_t place = p.one_row_a_rank ? static_cast<int64_t>(row) * p.num_topk + lane : row;
        p.carried_back[item.token * p.num_topk + lane] =
            slot >= 0 ? __ldcg(reinterpret_cast<const float*>(shared.address[owner][kCarried]) + place) : 0.f;
      }
    }
    if (target != nullptr && (rows.holders != 0 || !item.push)) {
      SumOrClear<T, kWeighted>(rows, begin, target, is_total);
    }
    TellPublisher(shared, index + kWorkers);
  }
  TellPublisher(shared, kNoItem);
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 1) CombineRowsKernel(const __grid_constant__ CombineParams p) {
  __shared__ CombineShared shared;
  const Call call = BeginCall(p.group, kCombine);
  const Steps steps = RowSteps(p, call.num_ranks);
  RunCombine(p, call, steps, shared, [&] { Work<T, kWeighted>(p, call, steps, shared); });
}

using Kernel = void (*)(CombineParams);

template <class T>
Kernel KernelFor(bool weighted) {
  return weighted ? CombineRowsKernel<T, true> : CombineRowsKernel<T, false>;
}

Kernel KernelFor(RowDtype dtype, bool weighted) {
  if (dtype == RowDtype::kBfloat16) return KernelFor<__nv_bfloat16>(weighted);
  if (dtype == RowDtype::kFloat16) return KernelFor<__half>(weighted);
  return KernelFor<float>(weighted);
}

}  // namespace

cudaError_t LoadCombineRows() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (bool weighted : {false, true}) {
      if (cudaError_t error = LoadKernel(KernelFor(dtype, weighted)); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchCombineRows(const CombineParams& params, const CombineConfig& config, cudaStream_t stream) {
  const Kernel kernel = KernelFor(params.dtype, params.weights != nullptr);
  kernel<<<NumLanes(config), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep
