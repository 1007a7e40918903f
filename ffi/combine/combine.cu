// combine by streams of pieces, and the launcher of both ways: see combine.h for the contract, frame.cuh for the warps'
// roles, docs/protocol.md for the order of events. combine_rows.cu has the other way.
//
// items.cuh has the list of items, terms.cuh what of an item is added, sum.cuh the adding.
#include "combine/combine_rows.h"
#include "combine/frame.cuh"
#include "combine/instances.cuh"
#include "combine/items.cuh"
#include "combine/terms.cuh"
#include "device/wait.cuh"

namespace jax_ep {
namespace {

template <int V>
struct StreamShared {
  SumShared<V> worker[kWorkers];
  CombineShared frame;
};

// One worker's way through its items.
template <class T, bool kWeighted, int V>
struct Worker {
  using Pipe = SumPipe<T, kWeighted, V>;

  const CombineParams& p;
  const Call& call;
  const Steps& steps;
  CombineShared& shared;
  SumShared<V>& memory;  // of this worker
  const int lane, row_bytes;
  ItemList items;
  uint32_t index;  // of `item`, which is being loaded or comes next
  Item item, next, later;
  bool came = true;
  uint32_t seen = 0;  // steps that rank `lane` has pushed to here

  __device__ __forceinline__ Worker(const CombineParams& p, const Call& call, const Steps& steps, CombineShared& shared,
                                    SumShared<V>& memory)
      : p(p),
        call(call),
        steps(steps),
        shared(shared),
        memory(memory),
        lane(threadIdx.x % 32),
        row_bytes(static_cast<int>(p.row_bytes)),
        items(p, call, steps, threadIdx.x / 32),
        index(threadIdx.x / 32) {
    item = items.Next();
    LoadWeight(item);
    next = items.Next();
    LoadWeight(next);
    later = items.Next();
  }

  // The row here that this lane's choice names, or -1.
  __device__ __forceinline__ int OwnRow(const Item& of) const {
    const int row = of.source == call.rank ? of.choice - call.rank * p.max_recv_tokens : of.choice;
    return of.choice >= 0 && row >= 0 && row < p.max_recv_tokens ? row : -1;
  }

  // Asked for one item ahead of its use, when the choice is there, for which it was asked two ahead.
  __device__ __forceinline__ void LoadWeight(Item& of) const {
    const int row = kWeighted ? OwnRow(of) : -1;
    if (row >= 0) of.weight = p.weights[row];
  }

  __device__ __forceinline__ void Advance() {
    index += kWorkers;
    item = next;
    next = later;
    LoadWeight(next);
    later = items.Next();
  }

  __device__ __forceinline__ void Run() {
    const uint32_t num_items = steps.num_items();
    while (true) {
      Stream(num_items);
      if (index >= num_items) break;
      TellPublisher(shared, index);  // before waiting for peers, which may be waiting for these pushes
      Await();
    }
    TellPublisher(shared, kNoItem);
  }

  // Adds items until there are none left or the next must wait for peers.
  __device__ __forceinline__ void Stream(uint32_t num_items) {
    Pipe pipe(memory, row_bytes);
    bool taken = false;  // item `index`
    while (true) {
      // Small items may end while several are under way; what can be told is that none before `index` is.
      if (pipe.Conclude() && pipe.NumPending() <= (taken ? 1 : 0)) TellPublisher(shared, index);
      while (pipe.left <= 0) {
        if (taken) Advance();
        taken = index < num_items && IsReady();
        if (taken) {
          Begin(pipe);
        } else if (pipe.NumPending() == 0) {
          return WaitCopies<0>();  // the pipe's last loads were for nothing, but must not come later
        } else {
          break;
        }
      }
      while (pipe.Step()) {
      }
    }
  }

  // Whether the item is to be added to sums that peers push.
  __device__ __forceinline__ bool Waits() const {
    return came && steps.num_pushes > 0 && item.token >= 0 && item.source == call.rank;
  }
  __device__ __forceinline__ uint32_t Wanted() const { return item.token / gridDim.x + 1; }
  __device__ __forceinline__ bool IsMissing() const {
    return call.Reaches(lane) && lane != call.rank && seen < Wanted();
  }
  __device__ __forceinline__ const uint64_t* Progress() const { return &call.window->progress[lane][blockIdx.x]; }

  __device__ __forceinline__ bool IsReady() {
    if (!Waits()) return true;
    bool here = true;
    if (IsMissing()) {
      const uint64_t value = LoadAcquireSys(Progress());
      here = Reached(call, value, Wanted());
      if (here) seen = static_cast<uint32_t>(value) & kGone;
    }
    here = __all_sync(~0u, here);
    __syncwarp();  // each lane acquired for all
    return here;
  }

  __device__ __forceinline__ void Await() {
    if (IsMissing()) came = jax_ep::Await(call, Progress(), Wanted(), kRows, lane, blockIdx.x);
    came = __all_sync(~0u, came);
  }

  // Gives the pipe the terms of the item, if it has any.
  __device__ __forceinline__ void Begin(Pipe& pipe) {
    const int token = item.token, source = item.source;
    if (token < 0) return;
    const int begin = item.group * steps.group_bytes, end = min(begin + steps.group_bytes, row_bytes);
    int count;
    char* target;
    __syncwarp();  // the terms of the item before have been read
    if (source != call.rank) {
      const int place = call.rank < source ? call.rank : call.rank - 1;
      target = reinterpret_cast<char*>(shared.address[source][kScratch]) +
               static_cast<int64_t>(place * p.num_tokens + token) * row_bytes;
      count = row_bytes > 0 ? PutOwnTerms(memory, OwnTerm(), item.weight, kStore) : 0;
    } else {
      if (!came) return;
      const int owner = item.choice >= 0 ? item.choice / p.max_recv_tokens : -1;
      const int row = item.choice - owner * p.max_recv_tokens;
      if (item.group == 0 && p.carried_back != nullptr && lane < p.num_topk) CarryBack(token, owner, row);
      target = p.out + static_cast<int64_t>(token) * row_bytes;
      count = row_bytes > 0 ? PutSums(owner, token) : 0;
      if (count == 0) {  // a token without rows sums to zero
        for (int offset = begin + lane * 16; offset < end; offset += 512)
          *reinterpret_cast<int4*>(target + offset) = {};
      }
    }
    if (count > 0) pipe.Begin(memory, count, target, begin, end);
  }

  // The row here that this lane's choice names, or null.
  __device__ __forceinline__ const char* OwnTerm() const {
    const int row = OwnRow(item);
    return row >= 0 ? p.y + static_cast<int64_t>(row) * row_bytes : nullptr;
  }

  // The rows here, whose sum is this rank's, and the sums that peers have pushed.
  __device__ __forceinline__ int PutSums(int owner, int token) {
    const uint32_t peers = __reduce_or_sync(~0u, owner >= 0 ? 1u << owner : 0u) & ~(1u << call.rank);
    const int place = lane < call.rank ? lane : lane - 1;
    return PutSumsOfRanks(memory, OwnTerm(), item.weight, call.rank, peers,
                          p.scratch + static_cast<int64_t>(place * p.num_tokens + token) * row_bytes);
  }

  __device__ __forceinline__ void CarryBack(int token, int owner, int row) {
    p.carried_back[token * p.num_topk + lane] =
        owner >= 0 ? __ldcg(reinterpret_cast<const float*>(shared.address[owner][kCarried]) + row) : 0.f;
  }
};

template <class T, bool kWeighted, int V>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) char dynamic[];
  auto& shared = *reinterpret_cast<StreamShared<V>*>(dynamic);
  const Call call = BeginCall(p.group, kCombine);
  const Steps steps = StreamSteps(p, call.num_ranks, SumPipe<T, kWeighted, V>::kPieceBytes);
  RunCombine(p, call, steps, shared.frame,
             [&] { Worker<T, kWeighted, V>(p, call, steps, shared.frame, shared.worker[threadIdx.x / 32]).Run(); });
}

struct Kernels {
  static constexpr int kWide = 4;  // vectors that a lane has of a piece; one where rows are shorter than such a piece
  template <class T, bool kWeighted, int V>
  static Instance<CombineParams> Of() {
    return {CombineKernel<T, kWeighted, V>, int{sizeof(StreamShared<V>)}};
  }
};

}  // namespace

bool CombineFits(const CombineParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  // A list has at most (steps + lag) * ranks * groups items, here and in combine_rows.cu.
  const int64_t items = (p.num_tokens + kLag * kWorkers + 4ll) * (num_ranks + 1) * (p.row_bytes / 2048 + 1);
  if (p.num_tokens >= kMaxSteps) return false;
  if (num_ranks > kMaxRanks || p.num_topk > 32 || p.row_bytes % 16 != 0 || p.row_bytes >= 1 << 30) return false;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return false;
  return p.max_recv_tokens > 0 && p.num_tokens > 0 && items < 1ll << 31;
}

cudaError_t LoadCombine() {
  if (cudaError_t error = LoadCombineRows(); error != cudaSuccess) return error;
  return LoadInstances<Kernels>();
}

cudaError_t LaunchCombine(const CombineParams& params, const CombineConfig& config, cudaStream_t stream) {
  if (params.one_row_a_rank || params.num_tokens < config.stream_from_tokens) {
    return LaunchCombineRows(params, config, stream);
  }
  const auto instance =
      InstanceFor<Kernels>(params.dtype, params.weights != nullptr, params.row_bytes >= 512 * Kernels::kWide);
  instance.kernel<<<NumLanes(config), kThreads, instance.shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep
