// The routing of a dispatch: counts out, counts in, final places by prefix sums.
// All threads of a block call these in order: CountTokens, Meet, PlaceExperts; then the routing warps WriteSlots, while
// senders, where rows are pushed, follow them with rows. Only send blocks count and write slots. Blocks have kThreads
// threads.
#pragma once

#include <type_traits>

#include "device/warp.cuh"
#include "dispatch/plan.cuh"

namespace jax_ep {

// Lives where the stages of the copiers will be.
struct NotifyShared {
  const DispatchParams& params;
  int32_t* hist;       // [kRouteWarps][num_bins]: counts of a warp's tokens, later the next row of each bin
  int32_t* total;      // [num_bins]: over all ranks
  int32_t* before;     // [num_bins]: first row of this block
  int32_t* token_row;  // [kRouteWarps][32][R]: layout "rank"
  int first_choice, num_staged;
  int32_t* topk_idx;  // [num_staged]: this block's, from the counting on
  float* topk_weights;

  __device__ NotifyShared(const DispatchPlan& plan, char* shared, int num_ranks) : params(plan.params) {
    hist = reinterpret_cast<int32_t*>(shared);
    total = hist + kRouteWarps * plan.num_bins;
    before = total + plan.num_bins;
    token_row = before + plan.num_bins;
    topk_idx = token_row + max(kRouteWarps * 32 * num_ranks, params.num_experts + num_ranks);
    num_staged = plan.staged_choices;
    topk_weights = reinterpret_cast<float*>(topk_idx + num_staged);
    first_choice = plan.TokenBegin(kSendWarps * blockIdx.x) * params.num_topk;
  }
  __device__ __forceinline__ int Expert(int choice) const {
    const int i = choice - first_choice;
    const int expert = i < num_staged ? topk_idx[i] : __ldg(params.topk_idx + choice);
    return expert < params.num_experts ? expert : -1;
  }
  __device__ __forceinline__ float Weight(int choice) const {
    const int i = choice - first_choice;
    return i < num_staged ? topk_weights[i] : __ldg(params.topk_weights + choice);
  }
};

// For a dispatch whose ranks do not reach each other's results: routing warps write `slot` and nothing else, and no
// sender follows them.
struct OutOfReach {
  const DispatchPlan& plan;

  __device__ __forceinline__ Tokens RoutedBy(int warp) const {
    return PartOf(plan.TokenBegin(kSendWarps * blockIdx.x), plan.TokenBegin(kSendWarps * (blockIdx.x + 1)), warp);
  }
};

// The routing warps count their tokens, the block's threads `put(bin, count)` to where the ranks find the counts. Then
// the block synchronises and posts. `shared`: DispatchShared or OutOfReach, here and below.
template <int kThreads, class Shared, class Put>
__device__ inline void CountTokens(const DispatchPlan& plan, const Call& call, const NotifyShared& notify,
                                   const Shared& shared, const Put& put) {
  constexpr int kBatch = 8;  // loads on their way at once: one after another they would take 1 µs each
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x / 32) - kSendWarps;
  const int num_experts = p.num_experts, experts_per_rank = num_experts / call.num_ranks, num_topk = p.num_topk;
  if (warp >= 0 && warp < kRouteWarps) {
    int32_t* hist = notify.hist + warp * plan.num_bins;
    for (int bin = lane; bin < plan.num_bins; bin += 32) hist[bin] = 0;
    __syncwarp();
    const Tokens tokens = shared.RoutedBy(warp);
    const int end = tokens.end * num_topk;
    for (int base = tokens.begin * num_topk + lane; base < end; base += 32 * kBatch) {
      int expert[kBatch];
      float weight[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = base + 32 * j;
        expert[j] = i < end ? __ldg(p.topk_idx + i) : -1;
        weight[j] = i < end && p.topk_weights != nullptr ? __ldg(p.topk_weights + i) : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = base + 32 * j;
        if (i < end && i - notify.first_choice < notify.num_staged) {
          notify.topk_idx[i - notify.first_choice] = expert[j];
          notify.topk_weights[i - notify.first_choice] = weight[j];
        }
        if (expert[j] >= 0 && expert[j] < num_experts) atomicAdd(&hist[expert[j]], 1);
      }
    }
    __syncwarp();
    // In layout "rank" a token counts once on each of its ranks.
    for (int token = tokens.begin + lane; token < tokens.end && p.layout == Layout::kRank; token += 32) {
      uint32_t ranks = 0;
      for (int k = 0; k < num_topk; ++k) {
        const int expert = notify.Expert(token * num_topk + k);
        if (expert >= 0) ranks |= 1u << (expert / experts_per_rank);
      }
      for (; ranks != 0; ranks &= ranks - 1) atomicAdd(&hist[num_experts + __ffs(ranks) - 1], 1);
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < plan.num_bins; bin += kThreads) {
    int count = 0;
    for (int w = 0; w < kRouteWarps; ++w) count += notify.hist[w * plan.num_bins + bin];
    put(bin, count);
  }
}

// Waits for the posts that this block needs and copies the peers' addresses. False: some rank did not come.
template <int kThreads>
__device__ inline bool Meet(const DispatchPlan& plan, const Call& call, DispatchShared& shared) {
  const bool posts = static_cast<int>(blockIdx.x) < plan.num_send_blocks || plan.way == Way::kPull;
  bool met = true;
  // Of the same block: read by the threads that have posted, each behind its own post (wait.cuh, Post). Without that a
  // peer that gives up might not see this block's post, and this block not its farewell.
  const int poster = static_cast<int>(threadIdx.x) - 32 * kPublishWarp;
  if (posts && poster >= 0 && poster < 32 && call.Reaches(poster))
    met = Await(call, &call.window->post[call.parity][poster][blockIdx.x], kPosted, kMeet, poster, blockIdx.x);
  // Of all that count.
  const int num_lanes = plan.params.operation == kDispatchCached ? 0 : plan.num_send_blocks;
  for (int i = threadIdx.x; i < call.num_ranks * num_lanes; i += kThreads) {
    const int peer = i / num_lanes, lane = i % num_lanes;
    if (!call.Reaches(peer)) continue;
    met &= Await(call, &call.window->post[call.parity][peer][lane], kPosted, kMeet, peer, lane);
  }
  met = __syncthreads_and(met);
  const int mail_lane = posts ? blockIdx.x : 0;
  for (int i = threadIdx.x; i < call.num_ranks * kNumAddresses; i += kThreads) {
    const int peer = i / kNumAddresses, address = i % kNumAddresses;
    if (!call.Reaches(peer)) continue;
    shared.address[peer][address] =
        Translate(call, peer, call.window->mail[call.parity][peer][mail_lane].address[address]);
  }
  return met;
}

// First row of each expert that has rows, in layout "expert": groups are aligned. Called by one warp; writes
// first[0..n), returns the end.
__device__ inline int ScanGroups(const int32_t* total, int32_t* first, int n, int alignment) {
  const int lane = threadIdx.x % 32;
  int end = 0;
  for (int e = 0; e < n; e += 32) {
    const int count = e + lane < n ? total[e + lane] : 0;
    int sum;
    const int offset = WarpScan((count + alignment - 1) / alignment * alignment, &sum);
    if (e + lane < n) first[e + lane] = end + offset;
    end += sum;
  }
  return end;
}

// From everybody's counts: totals, and in a send block the next row of each (warp, bin). The last block writes the
// result `counts`, for which alone layout "rank" needs the experts.
template <int kThreads>
__device__ inline void PlaceExperts(const DispatchPlan& plan, const Call& call, const NotifyShared& notify) {
  const DispatchParams& p = plan.params;
  const bool sends = static_cast<int>(blockIdx.x) < plan.num_send_blocks, is_last = blockIdx.x == gridDim.x - 1;
  const int num_local = p.num_experts / call.num_ranks, warp = threadIdx.x / 32;
  const int first_bin = p.layout == Layout::kRank && !is_last ? p.num_experts : 0;
  for (int bin = first_bin + static_cast<int>(threadIdx.x); bin < plan.num_bins; bin += kThreads) {
    int total = 0, before = 0;
    for (int source = 0; source < call.num_ranks; ++source) {
      if (!call.Reaches(source)) continue;
      int count[kMaxSendBlocks];  // all on their way at once
#pragma unroll
      for (int block = 0; block < kMaxSendBlocks; ++block) {
        count[block] = block < plan.num_send_blocks ? __ldcg(&call.window->counts[call.parity][source][block][bin]) : 0;
      }
#pragma unroll
      for (int block = 0; block < kMaxSendBlocks; ++block) {
        total += count[block];
        if (source < call.rank || (source == call.rank && block < static_cast<int>(blockIdx.x))) before += count[block];
      }
    }
    notify.total[bin] = total;
    notify.before[bin] = before;
  }
  __syncthreads();
  // token_row is free until WriteSlots: here the groups' first rows.
  int32_t* first = notify.token_row;
  int32_t* ends = first + p.num_experts;
  if (p.layout == Layout::kExpert) {
    for (int rank = warp; rank < call.num_ranks; rank += kThreads / 32) {
      const int end =
          ScanGroups(notify.total + rank * num_local, first + rank * num_local, num_local, p.expert_alignment);
      if (threadIdx.x % 32 == 0) ends[rank] = end;
    }
  } else {
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) first[e] = e % num_local * p.expert_capacity;
    if (p.layout == Layout::kBatched && warp == 0) {
      int end = 0;
      for (int e = threadIdx.x; e < num_local; e += 32) end += notify.total[call.rank * num_local + e];
      end = __reduce_add_sync(~0u, end);
      if (threadIdx.x == 0) ends[call.rank] = end;
    }
  }
  __syncthreads();
  if (is_last) {
    for (int e = threadIdx.x; e < num_local; e += kThreads) p.counts[e] = notify.total[call.rank * num_local + e];
    if (threadIdx.x == 0) {
      p.counts[num_local] = p.layout == Layout::kRank ? notify.total[p.num_experts + call.rank] : ends[call.rank];
    }
  }
  if (sends) {
    for (int bin = first_bin + static_cast<int>(threadIdx.x); bin < plan.num_bins; bin += kThreads) {
      int row = notify.before[bin] + (bin < p.num_experts ? first[bin] : 0);
      for (int w = 0; w < kRouteWarps; ++w) {
        int32_t* next = &notify.hist[w * plan.num_bins + bin];
        const int count = *next;
        *next = row;
        row += count;
      }
    }
  }
  __syncthreads();
}

// Tells the senders of this block that all slots before `token` are written. Called by one whole routing warp.
__device__ __forceinline__ void ReleaseSlots(const OutOfReach&, int, int) { __syncwarp(); }
__device__ __forceinline__ void ReleaseSlots(DispatchShared& shared, int warp, int token) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) StoreReleaseShared(&shared.slotted[warp], token);
}

// Masked ranks have no rows here: their part of recv_slot, that of this block's tokens. Called by the routing warps.
__device__ __noinline__ static void ForgetDeadSources(const DispatchPlan& plan, const Call& call) {
  const DispatchParams& p = plan.params;
  const int begin = plan.TokenBegin(kSendWarps * blockIdx.x), end = plan.TokenBegin(kSendWarps * (blockIdx.x + 1));
  const int thread = static_cast<int>(threadIdx.x) - 32 * kSendWarps;
  for (int source = 0; source < call.num_ranks; ++source) {
    if (call.Reaches(source)) continue;
    int32_t* const recv_slot = p.recv_slot + static_cast<int64_t>(source) * p.num_tokens * p.num_topk;
    for (int i = begin * p.num_topk + thread; i < end * p.num_topk; i += 32 * kRouteWarps) recv_slot[i] = -1;
  }
}

// Layouts "expert" and "batched": slot, the peers' recv_slot and weights of this warp's tokens.
template <class Shared>
__device__ inline void WriteExpertSlots(const DispatchPlan& plan, const Call& call, const NotifyShared& notify,
                                        Shared& shared, int warp) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_local = p.num_experts / call.num_ranks;
  int32_t* next = notify.hist + warp * plan.num_bins;
  const Tokens tokens = shared.RoutedBy(warp);
  const int begin = tokens.begin * p.num_topk, end = tokens.end * p.num_topk;
  [[maybe_unused]] const int64_t mine = static_cast<int64_t>(call.rank) * p.num_tokens * p.num_topk;
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    const int expert = i < end ? notify.Expert(i) : -1;
    const uint32_t same = __match_any_sync(~0u, expert);
    const int position = __popc(same & ((1u << lane) - 1));
    int row = expert >= 0 ? next[expert] + position : 0;
    __syncwarp();
    if (expert >= 0 && position == 0) next[expert] += __popc(same);
    __syncwarp();
    const int rank = expert >= 0 ? expert / num_local : -1;
    const int limit = p.layout == Layout::kBatched ? (expert % num_local + 1) * p.expert_capacity : p.max_recv_tokens;
    const bool lost = expert >= 0 && call.IsDead(rank);
    if (expert < 0 || row >= limit || lost) row = -1;
    if (i < end) {
      p.slot[i] = row >= 0 ? rank * p.max_recv_tokens + row : lost ? kLost - rank : -1;
      if constexpr (std::is_same_v<Shared, DispatchShared>) {
        for (int n = 0; n < call.num_ranks; ++n) {
          const int peer = (call.rank + 1 + n) % call.num_ranks;
          if (!call.Reaches(peer)) continue;
          reinterpret_cast<int32_t*>(shared.address[peer][kRecvSlot])[mine + i] = peer == rank ? row : -1;
        }
        if (row >= 0 && p.topk_weights != nullptr)
          reinterpret_cast<float*>(shared.address[rank][kRecvWeights])[row] = notify.Weight(i);
      }
    }
    ReleaseSlots(shared, warp, min((base + 32) / p.num_topk, tokens.end));
  }
}

// Layout "rank": one row a (token, rank), named by all its choices there; they and their gates go along.
template <class Shared>
__device__ inline void WriteRankSlots(const DispatchPlan& plan, const Call& call, const NotifyShared& notify,
                                      Shared& shared, int warp) {
  const DispatchParams& p = plan.params;
  const int lane = threadIdx.x % 32, num_local = p.num_experts / call.num_ranks, num_topk = p.num_topk;
  int32_t* next = notify.hist + warp * plan.num_bins + p.num_experts;
  int32_t* token_row = notify.token_row + warp * 32 * call.num_ranks;
  const Tokens tokens = shared.RoutedBy(warp);
  [[maybe_unused]] const int64_t mine = static_cast<int64_t>(call.rank) * p.num_tokens * num_topk;
  for (int base = tokens.begin; base < tokens.end; base += 32) {
    const int token = base + lane;
    uint32_t ranks = 0;
    for (int k = 0; k < num_topk && token < tokens.end; ++k) {
      const int expert = notify.Expert(token * num_topk + k);
      if (expert >= 0) ranks |= 1u << (expert / num_local);
    }
    for (int rank = 0; rank < call.num_ranks; ++rank) {
      const uint32_t members = __ballot_sync(~0u, ranks >> rank & 1);
      const int row = next[rank] + __popc(members & ((1u << lane) - 1));
      const bool holds = (ranks >> rank & 1) != 0 && row < p.max_recv_tokens && !call.IsDead(rank);
      token_row[lane * call.num_ranks + rank] = holds ? row : -1;
      __syncwarp();
      if (lane == 0) next[rank] += __popc(members);
      __syncwarp();
    }
    // Now a lane a choice, so that a row's choices leave in one store.
    const int num_choices = (min(base + 32, tokens.end) - base) * num_topk;
    for (int j = lane; j < num_choices; j += 32) {
      const int i = base * num_topk + j, of = j / num_topk;
      [[maybe_unused]] const int k = j - of * num_topk;
      const int expert = notify.Expert(i);
      [[maybe_unused]] const float weight = p.topk_weights != nullptr ? notify.Weight(i) : 0.f;
      const int rank = expert >= 0 ? expert / num_local : -1;
      const int32_t* rows = token_row + of * call.num_ranks;
      const int row = rank >= 0 ? rows[rank] : -1;
      const bool lost = rank >= 0 && call.IsDead(rank);
      p.slot[i] = row >= 0 ? rank * p.max_recv_tokens + row : lost ? kLost - rank : -1;
      if constexpr (std::is_same_v<Shared, DispatchShared>) {
        for (int n = 0; n < call.num_ranks; ++n) {
          const int peer = (call.rank + 1 + n) % call.num_ranks;
          if (!call.Reaches(peer)) continue;
          reinterpret_cast<int32_t*>(shared.address[peer][kRecvSlot])[mine + i] = peer == rank ? row : -1;
          if (rows[peer] < 0) continue;
          const int64_t place = static_cast<int64_t>(rows[peer]) * num_topk + k;
          reinterpret_cast<int32_t*>(shared.address[peer][kRecvTopkIdx])[place] =
              peer == rank ? expert % num_local : -1;
          if (p.topk_weights != nullptr) {
            reinterpret_cast<float*>(shared.address[peer][kRecvWeights])[place] = peer == rank ? weight : 0.f;
          }
        }
      }
    }
    ReleaseSlots(shared, warp, min(base + 32, tokens.end));
  }
}

}  // namespace jax_ep
