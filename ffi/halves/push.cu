// The push kernel of a start: see halves.h for the contract, docs/protocol.md for the order of events.
//
//   warp   waits for                    signals
//   each   order, then staged[chunk]    arrived[me][chunk] at every peer, when its stores are complete
//
// It runs beside whatever the start's stream does next, so it is small: two warps a block, which only feed bulk copies.
// A warp has the chunks w, w + W, ...; a piece of a row goes through shared memory once, whoever gets it.
#include <algorithm>

#include "halves/landing.cuh"
#include "halves/push.cuh"

namespace jax_ep {
namespace {

constexpr int kPushWarps = 2, kPushThreads = 32 * kPushWarps;
constexpr int kMaxStages = 12, kMaxPiece = 14336;
constexpr int kBytesInFlight = 3 * kMaxPiece;  // of a warp; more would clog the receivers' links
constexpr int kUnreported = 12;                // pieces; a store over the link takes several µs to complete

struct PushWork {
  HalfParams half;
  LandingLayout layout;
  Operation operation;
  int piece_bytes, num_pieces, num_stages, stage_bytes;
};

struct Piece {
  int token, index;
  uint32_t targets;  // ranks
};

struct PushShared {
  uint64_t full[kPushWarps][kMaxStages];
  Piece piece[kPushWarps][kMaxStages];
};

// What the stage of this start says; it has begun, or begins now. False: there is nothing to push.
__device__ bool AwaitOrder(const PushWork& work, ArenaCall* call) {
  const Order* const order = &LandingOf(*call, call->rank)->orders[work.half.number % kLandingDepth];
  uint64_t number = 0, epoch = 0, goes = 0, dead = 0;
  if (threadIdx.x % 32 == 0) {
    const uint64_t begin = NanoSeconds();
    while ((number = LoadAcquireSys(&order->number)) < work.half.number) {
      __nanosleep(100);
      if (NanoSeconds() - begin > *const_cast<const volatile uint64_t*>(&call->group->timeout_ns)) break;
    }
    epoch = LoadRelaxedSys(&order->epoch), goes = LoadRelaxedSys(&order->goes);
    dead = LoadRelaxedSys(&order->dead);
  }
  call->epoch = __shfl_sync(~0u, epoch, 0);
  call->slot = call->SlotOf(call->epoch);
  call->dead = static_cast<uint32_t>(__shfl_sync(~0u, dead, 0));
  // A later order stands there only where this call's generation has failed.
  return __shfl_sync(~0u, number == work.half.number && goes != 0, 0);
}

// A warp's way from the own window to the peers'. Called by the whole warp; lane r stores what rank r gets.
class Pipe {
 public:
  __device__ Pipe(const PushWork& work, const ArenaCall& call, PushShared& shared, char* stages, int first, int stride)
      : work_(work),
        call_(call),
        shared_(shared),
        stages_(stages),
        next_(first),
        ended_(first),
        marked_(first),
        stride_(stride) {
    const int lane = threadIdx.x % 32;
    to_ = lane < call.num_ranks ? PartOf(call, work.layout, lane, call.rank) : nullptr;
  }

  // A token's row to the `targets`, which get the same.
  __device__ __forceinline__ void Push(int token, uint32_t targets) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = OutPart(call_, work_.layout, __ffs(targets) - 1);
    const char* const row = PartOf(call_, work_.layout, call_.rank, part) + token * work_.layout.row_bytes;
    for (int index = 0; index < work_.num_pieces; ++index) {
      if (in_flight_ == work_.num_stages - 1) Drain();
      WaitBulkRead<1>();  // the stage filled now was stored from before the newest group
      if (lane == 0) shared_.piece[warp][in_] = {token, index, targets};
      __syncwarp();
      if (lane == 0) {
        ExpectBytes(&shared_.full[warp][in_], Size(index));
        BulkLoad(stages_ + in_ * work_.stage_bytes, row + Offset(index), Size(index), &shared_.full[warp][in_]);
      }
      if (++in_ == work_.num_stages) in_ = 0;
      ++in_flight_, ++loaded_;
    }
  }

  // All of a chunk has been pushed into this pipe.
  __device__ __forceinline__ void EndChunk() {
    ended_ += stride_;
    if (marked_ == next_) Mark();
  }

  __device__ __forceinline__ void Finish() {
    while (in_flight_ > 0) Drain();
    WaitBulkDone<0>();
    Tell(ended_);
  }

 private:
  __device__ __forceinline__ int64_t Offset(int index) const { return int64_t{index} * work_.piece_bytes; }
  __device__ __forceinline__ int Size(int index) const {
    return static_cast<int>(min(int64_t{work_.piece_bytes}, work_.layout.row_bytes - Offset(index)));
  }

  // Stores what was loaded longest ago.
  __device__ __forceinline__ void Drain() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Piece piece = shared_.piece[warp][out_];
    WaitMbarrier(&shared_.full[warp][out_], parity_);
    if ((piece.targets >> lane & 1) != 0) {
      BulkStore(to_ + piece.token * work_.layout.row_bytes + Offset(piece.index), stages_ + out_ * work_.stage_bytes,
                Size(piece.index));
    }
    CommitBulkGroup();
    if (++out_ == work_.num_stages) out_ = 0, parity_ ^= 1;
    --in_flight_, ++stored_;
    if (marked_ > next_ && stored_ >= marked_stored_ + kUnreported) {
      WaitBulkDone<kUnreported>();
      Tell(marked_);
      Mark();
    }
  }

  // The chunks before `marked_` are complete once marked_stored_ pieces are.
  __device__ __forceinline__ void Mark() { marked_ = ended_, marked_stored_ = loaded_; }

  // Releases the chunks before `end`, acquired by AwaitArrived: of its rows each lane has stored those that its rank
  // gets, of gates and second rows the warp has stored all.
  __device__ __forceinline__ void Tell(int end) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    FenceSys();
    for (; next_ < end; next_ += stride_) {
      if (call_.Reaches(lane) && lane != call_.rank && next_ < work_.layout.num_chunks)
        StoreRelaxedSys(&LandingOf(call_, lane)->arrived[call_.slot][call_.rank][next_], call_.epoch);
    }
  }

  const PushWork& work_;
  const ArenaCall& call_;
  PushShared& shared_;
  char* stages_;
  char* to_;
  int next_, ended_, marked_, stride_;  // chunks: not told yet, not pushed yet, not marked yet
  int in_ = 0, out_ = 0, in_flight_ = 0, loaded_ = 0, stored_ = 0, marked_stored_ = 0;
  uint32_t parity_ = 0;
};

// Second rows and gates of a chunk, to every peer, whichever tokens it gets.
__device__ __forceinline__ void PushSmall(const PushWork& work, const ArenaCall& call, int chunk) {
  const LandingLayout& layout = work.layout;
  const int lane = threadIdx.x % 32, begin = layout.ChunkBegin(chunk), end = layout.ChunkBegin(chunk + 1);
  for (int n = 1; n < call.num_ranks; ++n) {
    const int peer = (call.rank + n) % call.num_ranks;
    if (!call.Reaches(peer)) continue;
    const char* const from = PartOf(call, layout, call.rank, OutPart(call, layout, peer));
    char* const to = PartOf(call, layout, peer, call.rank);
    const int64_t second = layout.second_offset + begin * layout.second_bytes,
                  gates = layout.gates_offset + begin * layout.gate_bytes;
    CopyBytes(to + second, from + second, (end - begin) * layout.second_bytes, lane, 32);
    CopyBytes(to + gates, from + gates, (end - begin) * layout.gate_bytes, lane, 32);
  }
}

__device__ __forceinline__ void PushRows(const PushWork& work, const ArenaCall& call, Pipe& pipe, int chunk) {
  const LandingLayout& layout = work.layout;
  const bool apart = layout.num_parts > call.num_ranks;  // every rank gets rows of its own
  const int lane = threadIdx.x % 32, begin = layout.ChunkBegin(chunk), end = layout.ChunkBegin(chunk + 1);
  const uint32_t* const targets = TargetsOf(call, layout);
  for (int first = begin; first < end; first += 32) {
    const uint32_t mine = first + lane < end ? __ldcg(targets + first + lane) & ~(1u << call.rank) : 0;
    for (int i = 0; i < min(32, end - first); ++i) {
      const uint32_t ranks = __shfl_sync(~0u, mine, i);
      if (ranks == 0) continue;
      if (!apart) {
        pipe.Push(first + i, ranks);
        continue;
      }
      // Destinations begin at the neighbour, so that no receiver is everybody's first.
      for (int n = 1; n < call.num_ranks; ++n) {
        const int peer = (call.rank + n) % call.num_ranks;
        if ((ranks >> peer & 1) != 0) pipe.Push(first + i, 1u << peer);
      }
    }
  }
}

__global__ void __launch_bounds__(kPushThreads) PushKernel(const __grid_constant__ PushWork work) {
  extern __shared__ __align__(128) char stages[];
  __shared__ PushShared shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = lane; i < kMaxStages; i += 32) InitMbarrier(&shared.full[warp][i]);
  FenceMbarrierInit();
  __syncwarp();
  ArenaCall call{};
  call.arenas = &work.half.arenas;
  call.group = work.half.arenas.group;
  call.rank = work.half.arenas.rank;
  call.num_ranks = work.half.arenas.num_ranks;
  call.operation = work.operation;
  call.ledger = call.Own();
  if (!AwaitOrder(work, &call)) return;
  const int first = blockIdx.x * kPushWarps + warp, stride = gridDim.x * kPushWarps;
  Pipe pipe(work, call, shared, stages + warp * work.num_stages * work.stage_bytes, first, stride);
  bool came = true;
  for (int chunk = first; chunk < work.layout.num_chunks; chunk += stride) {
    const uint64_t* const staged = &LandingOf(call, call.rank)->staged[call.slot][chunk];
    came = AwaitChunk(call, staged, kStage, call.rank, chunk);
    if (!came) break;
    FenceProxyAsync();  // bulk loads of the rows come next
    PushSmall(work, call, chunk);
    if (work.layout.row_bytes > 0) PushRows(work, call, pipe, chunk);
    pipe.EndChunk();
  }
  pipe.Finish();
  if (!came && call.Reaches(lane)) StoreRelaxedSys(&call.At(lane)->gone[call.rank], call.epoch);
}

}  // namespace

cudaError_t LoadPush() {
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, PushKernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(PushKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPushWarps * kBytesInFlight);
}

cudaError_t LaunchPush(const HalfParams& half, const LandingLayout& layout, Operation operation,
                       const HalvesConfig& config, cudaStream_t stream) {
  if (half.arenas.num_ranks == 1) return cudaSuccess;
  PushWork work{half, layout, operation, 16, 0, 2, 128};
  if (layout.row_bytes > 0) {
    const int64_t about = DivideUp(layout.row_bytes, DivideUp(layout.row_bytes, kMaxPiece));
    work.piece_bytes = static_cast<int>(RoundUpTo(about, 16));
    work.num_pieces = static_cast<int>(DivideUp(layout.row_bytes, work.piece_bytes));
    work.stage_bytes = static_cast<int>(RoundUpTo(work.piece_bytes, 128));
    work.num_stages = std::clamp(kBytesInFlight / work.stage_bytes, 3, kMaxStages);
  }
  const int most = static_cast<int>(DivideUp(layout.num_chunks, kPushWarps));
  const int num_blocks = std::max(1, std::min({config.num_push_sms, config.num_sms, most}));
  PushKernel<<<num_blocks, kPushThreads, kPushWarps * work.num_stages * work.stage_bytes, stream>>>(work);
  return cudaGetLastError();
}

}  // namespace jax_ep
