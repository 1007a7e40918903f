// The combine_grad kernels and their launcher: see combine_grad.h for the contract, docs/protocol.md for the order of
// events. All warps do the same; the first also meets the peers and leaves.
//
//   zero rows   groups' padding and the tail, before the peers are met
//   items       a token of a rank each: its cotangent's row, against all rows here that it has
//
// Block b has the tokens b, b + B, ... of every rank. A worker goes through its items as one stream of pieces of 2 kB,
// as in sum.cuh: one of the cotangent, then one of each row, then the next columns. Each lane copies its own part of
// the next pieces to shared memory while it works on one.
//
// Inner products are sums in a fixed order, the same in reference.py. A row is split into chunks of a piece, filled up
// with zeros; a chunk into 4 vectors of 16 bytes for each of 32 lanes. A lane adds the products of its four vectors,
// element by element; then the elements, by halves; then chunk after chunk; at last the lanes are added, by halves.
#include <cstddef>

#include "combine/clear.cuh"
#include "combine/combine_grad.h"
#include "combine/lane.cuh"
#include "combine/vector.cuh"
#include "device/load.h"
#include "device/wait.cuh"
#include "device/warp.cuh"

namespace jax_ep {
namespace {

constexpr int kGradWorkers = 15, kGradThreads = 32 * kGradWorkers;
constexpr int kGradStages = 5;                             // pieces of a worker, all but one of them on their way
constexpr int kVectors = 4, kPieceBytes = 512 * kVectors;  // of a lane; of a warp
constexpr int kGradTopk = 32;

// A row of which a piece is asked for, and what it is: 0, the cotangent's, or 1 and more, the rows in turn.
struct alignas(16) GradTerm {
  const char* source;
  int row;
  float weight;
};

// A piece that is asked for. Read and written as 16 bytes.
enum PieceKind : uint32_t { kIndex = 0xff, kFirstPiece = 0x100, kLastPiece = 0x200, kNoPiece = 0x400 };

struct alignas(16) GradPiece {
  int row;
  float weight;
  uint32_t kind;
  int offset;  // in the row
};

struct GradShared {
  struct Worker {
    int4 stage[kGradStages][kVectors][32];
    GradTerm terms[kGradTopk + 1];  // of the item that is loaded
    GradPiece pieces[kGradStages];
    float dot[kGradTopk + 1][32];  // each lane's part so far
  } worker[kGradWorkers];
  uint64_t address[kMaxRanks][1];  // of out_bar
};

// ---- zero rows

__device__ void ClearRow(const CombineGradParams& p, int64_t row) {
  const int lane = threadIdx.x % 32;
  for (int64_t offset = lane * 16; offset < p.row_bytes; offset += 512) {
    __stcg(reinterpret_cast<int4*>(p.y_bar + row * p.row_bytes + offset), int4{});
  }
  if (lane == 0) p.weights_bar[row] = 0.f;
}

// All rows of no token; they are shared out evenly among the warps of the grid.
__device__ void ClearRows(const CombineGradParams& p, int warp_of_grid) {
  const int lane = threadIdx.x % 32, num_warps = gridDim.x * kGradWorkers;
  int end = 0, mine = warp_of_grid;  // of the groups so far; rows to clear until the next of this warp
  const auto clear = [&](int begin, int length) {
    int sum;
    const int before = WarpScan(length, &sum);
    for (; mine < sum; mine += num_warps) {
      const int holder = __popc(__ballot_sync(~0u, before + length <= mine));
      const int row = __shfl_sync(~0u, begin - before, holder) + mine;
      ClearRow(p, row);
    }
    mine -= sum;
  };
  for (int e = 0; e < p.num_local_experts; e += 32) {
    const int count = e + lane < p.num_local_experts ? p.counts[e + lane] : 0;
    int begin = 0, length = 0;
    if (p.expert_alignment == 0) {
      if (e + lane < p.num_local_experts) {
        begin = (e + lane) * p.expert_capacity + min(count, p.expert_capacity);
        length = p.expert_capacity - min(count, p.expert_capacity);
      }
    } else {
      const int aligned = (count + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
      int sum;
      const int start = end + WarpScan(aligned, &sum);
      begin = min(start + count, p.max_recv_tokens);
      length = min(start + aligned, p.max_recv_tokens) - begin;
      end += sum;
    }
    clear(begin, length);
  }
  const int tail = p.expert_alignment == 0 ? p.max_recv_tokens : min(end, p.max_recv_tokens);
  clear(tail, lane == 0 ? p.max_recv_tokens - tail : 0);
}

// ---- items

// An item, as a lane sees it: the row here of its choice, and the row's weight.
struct GradItem {
  int token = -1, source = 0;  // token -1: nothing to do
  int row = -1;
  float weight = 0.f;
};

template <class T>
struct GradWorker {
  static constexpr int kSize = Vector<T>::kSize;

  const CombineGradParams& p;
  const Call& call;
  GradShared& memory;
  const int worker, lane, row_bytes, num_steps;
  const uint32_t shared;  // address of this worker's part, as the compiler would work it out again and again
  // Items: where the list stands, and the item that is loaded and those that come after it.
  int step, part;
  GradItem item, next, later;
  // Loading: pieces left of the item (none: 0 or less), its next term and how many there are, where in the rows, and
  // the stage to fill.
  int left = 0, at = 0, count = 0, offset = 0;
  uint32_t stage = 0;
  float out_bar[kVectors][kSize];

  __device__ __forceinline__ GradWorker(const CombineGradParams& p, const Call& call, GradShared& memory)
      : p(p),
        call(call),
        memory(memory),
        worker(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row_bytes(static_cast<int>(p.row_bytes)),
        num_steps(NumTokensOfLane(p.num_tokens)),
        shared(__shfl_sync(~0u, SharedAddress(&memory.worker[worker]), 0)),
        step(worker / call.num_ranks),
        part(worker % call.num_ranks) {
    if (lane < kGradStages) memory.worker[worker].pieces[lane].kind = kNoPiece;
    item = NextItem();
    LoadWeight(item);
    next = NextItem();
    LoadWeight(next);
    later = NextItem();
  }

  __device__ __forceinline__ GradItem NextItem() {
    GradItem found;
    if (step < num_steps) {
      found.source = call.rank + part < call.num_ranks ? call.rank + part : call.rank + part - call.num_ranks;
      found.token = step * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
      const int choice = (found.source * p.num_tokens + found.token) * p.num_topk + lane;
      if (lane < p.num_topk) found.row = p.recv_slot[choice];
    }
    part += kGradWorkers;
    while (part >= call.num_ranks) part -= call.num_ranks, ++step;
    return found;
  }

  // Asked for one item ahead of its use, when the row is known, which was asked for two ahead.
  __device__ __forceinline__ void LoadWeight(GradItem& of) const {
    if (of.row >= 0) of.weight = p.weights[of.row];
  }

  __device__ __forceinline__ void Run() {
    int idle = 0;
    while (true) {
      while (left <= 0 && item.token >= 0) {
        Begin();
        item = next;
        next = later;
        LoadWeight(next);
        later = NextItem();
      }
      if (left <= 0 && ++idle == kGradStages) break;  // the last pieces have been worked on
      Step();
    }
    WaitCopies<0>();
  }

  // Puts the terms of the item into their place, if there are rows here of its token.
  __device__ __forceinline__ void Begin() {
    const uint32_t rows = __ballot_sync(~0u, item.row >= 0);
    if (rows == 0) return;
    if (!call.Reaches(item.source)) {  // in a routing from before the mask
      for (uint32_t rest = rows; rest != 0; rest &= rest - 1) ClearRow(p, __shfl_sync(~0u, item.row, __ffs(rest) - 1));
      return;
    }
    __syncwarp();  // the terms of the item before have been read
    auto& terms = memory.worker[worker].terms;
    if (item.row >= 0) {
      terms[1 + __popc(rows & ((1u << lane) - 1))] = {p.y + static_cast<int64_t>(item.row) * row_bytes, item.row,
                                                      item.weight};
    }
    if (lane == 0) {
      const auto* theirs = reinterpret_cast<const char*>(memory.address[item.source][0]);
      terms[0] = {theirs + static_cast<int64_t>(item.token) * row_bytes, -1, 0.f};
    }
    count = 1 + __popc(rows);
    left = count * ((row_bytes + kPieceBytes - 1) / kPieceBytes);
    at = 0;
    offset = 0;
  }

  // Asks for the next piece, if one is left, and works on the oldest.
  __device__ __forceinline__ void Step() {
    __syncwarp();  // lane 0 wrote the terms and the piece
    const uint32_t in = stage;
    stage = stage + 1 == kGradStages ? 0 : stage + 1;
    int4 piece = make_int4(0, 0, kNoPiece, 0);
    if (left > 0) {
      const int4 term = LoadShared16(shared + offsetof(GradShared::Worker, terms) + at * sizeof(GradTerm));
      const char* const source = Pointer(term) + (offset + lane * 16);
      const uint32_t target = StageOf(in);
      const bool is_last = offset + kPieceBytes >= row_bytes;
      if (offset + kPieceBytes <= row_bytes) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) CopyAsync(target + v * 512, source + v * 512);
      } else {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (offset + lane * 16 + v * 512 < row_bytes) {
            CopyAsync(target + v * 512, source + v * 512);
          } else {
            StoreShared16(target + v * 512, int4{});
          }
        }
      }
      piece = make_int4(term.z, term.w, at | (offset == 0 ? kFirstPiece : 0) | (is_last ? kLastPiece : 0), offset);
      --left;
      const bool wraps = ++at == count;
      at = wraps ? 0 : at;
      offset = wraps ? offset + kPieceBytes : offset;
    }
    if (lane == 0) StoreShared16(PieceOf(in), piece);
    CommitCopies();
    WaitCopies<kGradStages - 1>();
    const int4 oldest = LoadShared16(PieceOf(stage));
    const uint32_t kind = oldest.z;
    if (kind & kNoPiece) return;
    if ((kind & kIndex) == 0) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) Vector<T>::Unpack(LoadShared16(StageOf(stage) + v * 512), out_bar[v]);
    } else {
      Multiply(oldest.x, __int_as_float(oldest.y), kind, oldest.w);
    }
  }

  // A piece of a row, at `offset` there, with out_bar's.
  __device__ __forceinline__ void Multiply(int row, float weight, uint32_t kind, int offset) {
    float sums[kSize];
    char* const target = p.y_bar + static_cast<int64_t>(row) * row_bytes + (offset + lane * 16);
    const int valid = row_bytes - offset - lane * 16;  // bytes from this lane's first vector to the end
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kSize], weighted[kSize];
      Vector<T>::Unpack(LoadShared16(StageOf(stage) + v * 512), values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float product = __fmul_rn(values[i], out_bar[v][i]);
        sums[i] = v == 0 ? product : __fadd_rn(sums[i], product);
        weighted[i] = __fmul_rn(weight, out_bar[v][i]);
      }
      if (v * 512 < valid) __stcg(reinterpret_cast<int4*>(target + v * 512), Vector<T>::Pack(weighted));
    }
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
    }
    const uint32_t dot = shared + offsetof(GradShared::Worker, dot) + (kind & kIndex) * 128 + lane * 4;
    float total = __fadd_rn(kind & kFirstPiece ? 0.f : LoadShared4(dot), sums[0]);
    if ((kind & kLastPiece) == 0) return StoreShared4(dot, total);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) total = __fadd_rn(total, __shfl_xor_sync(~0u, total, half));
    if (lane == 0) p.weights_bar[row] = total;
  }

  __device__ __forceinline__ uint32_t StageOf(uint32_t i) const {
    return shared + i * kPieceBytes + lane * 16;  // stages come first
  }
  __device__ __forceinline__ uint32_t PieceOf(uint32_t i) const {
    return shared + offsetof(GradShared::Worker, pieces) + i * sizeof(GradPiece);
  }
  static __device__ __forceinline__ const char* Pointer(const int4& bits) {
    return reinterpret_cast<const char*>(static_cast<uint64_t>(static_cast<uint32_t>(bits.y)) << 32 |
                                         static_cast<uint32_t>(bits.x));
  }
};

template <class T>
__global__ void __launch_bounds__(kGradThreads, 1) CombineGradKernel(const __grid_constant__ CombineGradParams p) {
  extern __shared__ __align__(128) char dynamic[];
  auto& shared = *reinterpret_cast<GradShared*>(dynamic);
  const Call call = BeginCall(p.group, kCombineGrad);
  const int warp = threadIdx.x / 32;
  bool met = TakesPart(call, p.refused);
  if (met && warp == 0) PostAddresses(call, {p.out_bar});
  if (met) ClearRows(p, static_cast<int>(blockIdx.x) * kGradWorkers + warp);
  if (met && warp == 0) met = MeetPeers(call, shared.address);
  met = __syncthreads_and(met);
  if (met) GradWorker<T>(p, call, shared).Run();
  __syncthreads();
  if (warp == 0) LeaveLane(call, met);
  EndLane(call, [&] {
    ClearArrays(p.y_bar, p.max_recv_tokens, p.row_bytes, p.weights_bar, p.max_recv_tokens, threadIdx.x, kGradThreads);
  });
}

using GradKernel = void (*)(CombineGradParams);

GradKernel GradKernelFor(RowDtype dtype) {
  if (dtype == RowDtype::kBfloat16) return CombineGradKernel<__nv_bfloat16>;
  if (dtype == RowDtype::kFloat16) return CombineGradKernel<__half>;
  return CombineGradKernel<float>;
}

}  // namespace

bool CombineGradFits(const CombineGradParams& p, int num_ranks) {
  const int64_t choices = static_cast<int64_t>(p.num_tokens) * p.num_topk * num_ranks;
  if (num_ranks > kMaxRanks || p.num_topk > kGradTopk || p.num_tokens >= kMaxSteps) return false;
  if (p.row_bytes <= 0 || p.row_bytes % 16 != 0 || p.row_bytes >= 1 << 30) return false;
  if (choices >= 1ll << 31 || static_cast<int64_t>(num_ranks) * p.max_recv_tokens >= 1ll << 31) return false;
  return p.max_recv_tokens > 0 && p.num_tokens > 0 && p.num_local_experts > 0;
}

cudaError_t LoadCombineGrad() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    if (cudaError_t error = LoadKernel(GradKernelFor(dtype), sizeof(GradShared)); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombineGrad(const CombineGradParams& params, const CombineConfig& config, cudaStream_t stream) {
  GradKernelFor(params.dtype)<<<NumLanes(config), kGradThreads, sizeof(GradShared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_ep
