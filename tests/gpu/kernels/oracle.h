// What the kernels must give, computed plainly over all ranks on the host: routing, rows, and the sums to the bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "combine/combine.h"
#include "combine/combine_grad.h"
#include "dispatch/dispatch.h"

namespace jax_ep {

struct Case {
  std::string name;
  int num_ranks, num_tokens, num_topk, num_experts;
  Layout layout;
  int alignment, expert_capacity, capacity;  // capacity C; 0: worst case
  RowDtype dtype;
  int64_t hidden;
  int64_t second_bytes = 0;  // of a row of a second array
  bool weights = true;
  double skew = 0;  // share of choices that go to expert 0
  double invalid = 0.05;
  int num_sms = 8, num_send_blocks = 4;
  unsigned seed = 1;
  uint32_t dead = 0;  // masked ranks
  int pulls = -1;     // as in DispatchConfig

  bool IsDead(int rank) const { return (dead >> rank & 1) != 0; }
  int64_t elem_bytes() const { return dtype == RowDtype::kFloat32 ? 4 : 2; }
  int64_t row_bytes() const { return hidden * elem_bytes(); }
  int num_local() const { return num_experts / num_ranks; }
  int64_t choices() const { return static_cast<int64_t>(num_tokens) * num_topk; }
};

struct RankRouting {
  std::vector<int32_t> topk_idx, slot, recv_slot, counts, recv_topk_idx;
};

inline void Finish(Case& c) {
  if (c.layout == Layout::kBatched) {
    if (c.expert_capacity == 0) c.expert_capacity = c.num_ranks * c.num_tokens;
    c.capacity = c.num_local() * c.expert_capacity;
  } else if (c.capacity == 0) {
    c.capacity = c.layout == Layout::kRank
                     ? c.num_ranks * c.num_tokens
                     : c.num_ranks * c.num_tokens * c.num_topk + c.num_local() * (c.alignment - 1);
  }
}

inline std::vector<RankRouting> Route(const Case& c) {
  const int R = c.num_ranks, T = c.num_tokens, K = c.num_topk, E = c.num_experts, L = c.num_local(), C = c.capacity;
  std::vector<RankRouting> ranks(R);
  std::mt19937 random(c.seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<int> experts(E);
  for (int e = 0; e < E; ++e) experts[e] = e;
  for (auto& rank : ranks) {
    rank.topk_idx.resize(c.choices());
    for (int t = 0; t < T; ++t) {
      for (int k = 0; k < K; ++k) {
        std::swap(experts[k % E], experts[k % E + random() % (E - k % E)]);
        int e = experts[k % E];
        if (uniform(random) < c.skew) e = 0;
        const double u = uniform(random);
        if (u < c.invalid) e = u < c.invalid / 2 ? -1 : E + static_cast<int>(random() % 3);
        rank.topk_idx[t * K + k] = e;
      }
    }
    rank.slot.assign(c.choices(), -1);
    rank.recv_slot.assign(R * c.choices(), -1);
    rank.counts.assign(L + 1, 0);
    if (c.layout == Layout::kRank) rank.recv_topk_idx.assign(static_cast<int64_t>(C) * K, -1);
  }
  const auto valid = [&](int e) { return e >= 0 && e < E; };
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < c.choices(); ++i) {
      const int e = ranks[r].topk_idx[i];
      if (!c.IsDead(r) && valid(e) && c.IsDead(e / L)) ranks[r].slot[i] = kLost - e / L;
    }
  }
  for (int d = 0; d < R; ++d) {
    if (c.IsDead(d)) continue;
    auto& here = ranks[d];
    for (int r = 0; r < R; ++r) {
      if (c.IsDead(r)) continue;
      for (int64_t i = 0; i < c.choices(); ++i) {
        const int e = ranks[r].topk_idx[i];
        if (valid(e) && e / L == d) ++here.counts[e % L];
      }
    }
    std::vector<int64_t> next(L, 0), limit(L, C);
    int64_t end = 0;
    for (int e = 0; e < L; ++e) {
      if (c.layout == Layout::kExpert) {
        next[e] = end;
        end += (here.counts[e] + c.alignment - 1) / c.alignment * c.alignment;
      } else if (c.layout == Layout::kBatched) {
        next[e] = static_cast<int64_t>(e) * c.expert_capacity;
        limit[e] = next[e] + c.expert_capacity;
        end += here.counts[e];
      }
    }
    for (int r = 0; r < R; ++r) {
      if (c.IsDead(r)) continue;
      for (int t = 0; t < T; ++t) {
        int64_t row = -1;
        for (int k = 0; k < K; ++k) {
          const int64_t i = static_cast<int64_t>(t) * K + k;
          const int e = ranks[r].topk_idx[i];
          if (!valid(e) || e / L != d) continue;
          if (c.layout == Layout::kRank) {
            if (row < 0) row = end++;
            if (row < C) here.recv_topk_idx[row * K + k] = e % L;
          } else {
            row = next[e % L]++;
          }
          if (row >= (c.layout == Layout::kRank ? C : limit[e % L])) continue;
          here.recv_slot[r * c.choices() + i] = static_cast<int32_t>(row);
          ranks[r].slot[i] = static_cast<int32_t>(static_cast<int64_t>(d) * C + row);
        }
      }
    }
    here.counts[L] = static_cast<int32_t>(end);
  }
  return ranks;
}

// What is left of a routing from before the mask.
inline std::vector<RankRouting> Masked(const Case& c, std::vector<RankRouting> ranks) {
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int32_t& slot : ranks[r].slot) {
      if (slot >= 0 && (c.IsDead(r) || c.IsDead(slot / c.capacity))) slot = -1;
    }
    for (int s = 0; s < c.num_ranks; ++s) {
      if (!c.IsDead(r) && !c.IsDead(s)) continue;
      const auto part = ranks[r].recv_slot.begin() + s * c.choices();
      std::fill(part, part + c.choices(), -1);
    }
  }
  return ranks;
}

// Rows [C, row_bytes] of rank d from everybody's x [T, row_bytes].
inline std::vector<char> ReceivedRows(const Case& c, const std::vector<RankRouting>& routing, int d, int64_t row_bytes,
                                      const std::vector<std::vector<char>>& x) {
  std::vector<char> rows(static_cast<int64_t>(c.capacity) * row_bytes, 0);
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int64_t i = 0; i < c.choices(); ++i) {
      const int64_t row = routing[d].recv_slot[r * c.choices() + i];
      if (row >= 0) std::memcpy(&rows[row * row_bytes], &x[r][i / c.num_topk * row_bytes], row_bytes);
    }
  }
  return rows;
}

inline std::vector<float> ReceivedWeights(const Case& c, const std::vector<RankRouting>& routing, int d,
                                          const std::vector<std::vector<float>>& weights) {
  const int64_t per_row = c.layout == Layout::kRank ? c.num_topk : 1;
  std::vector<float> rows(c.capacity * per_row, 0.f);
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int64_t i = 0; i < c.choices(); ++i) {
      const int64_t row = routing[d].recv_slot[r * c.choices() + i];
      if (row >= 0) rows[row * per_row + (per_row > 1 ? i % c.num_topk : 0)] = weights[r][i];
    }
  }
  return rows;
}

inline float Load(RowDtype dtype, const char* p) {
  if (dtype == RowDtype::kFloat32) return *reinterpret_cast<const float*>(p);
  if (dtype == RowDtype::kFloat16) return __half2float(*reinterpret_cast<const __half*>(p));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
}

inline void Store(RowDtype dtype, char* p, float value) {
  if (dtype == RowDtype::kFloat32) *reinterpret_cast<float*>(p) = value;
  if (dtype == RowDtype::kFloat16) *reinterpret_cast<__half*>(p) = __float2half_rn(value);
  if (dtype == RowDtype::kBfloat16) *reinterpret_cast<__nv_bfloat16*>(p) = __float2bfloat16_rn(value);
}

// out [T, H] of rank r from everybody's y [C, H] and weights [C]. `wire` makes of a rank's sum of a token, in place,
// what arrives of it. Only tokens t % stride == 0, the others stay zero.
inline std::vector<char> Combined(const Case& c, const std::vector<RankRouting>& routing, int r,
                                  const std::vector<std::vector<char>>& y,
                                  const std::vector<std::vector<float>>* weights, int stride = 1,
                                  const std::function<void(char*)>& wire = nullptr) {
  const int64_t row_bytes = c.row_bytes(), elem = c.elem_bytes();
  std::vector<char> out(c.num_tokens * row_bytes, 0), sum(row_bytes);
  std::vector<float> total(c.hidden);
  for (int t = 0; t < c.num_tokens; t += stride) {
    total.assign(c.hidden, 0.f);
    for (int d = 0; d < c.num_ranks; ++d) {
      std::vector<int64_t> rows;
      for (int k = 0; k < c.num_topk; ++k) {
        const int64_t slot = routing[r].slot[static_cast<int64_t>(t) * c.num_topk + k];
        if (slot < 0 || slot / c.capacity != d || (c.layout == Layout::kRank && !rows.empty())) continue;
        rows.push_back(slot % c.capacity);
      }
      if (rows.empty()) continue;
      for (int64_t h = 0; h < c.hidden; ++h) {
        volatile float partial = 0;  // so that each product and each sum is rounded
        for (int64_t row : rows) {
          volatile float value = Load(c.dtype, &y[d][row * row_bytes + h * elem]);
          if (weights != nullptr) value = (*weights)[d][row] * value;
          partial = partial + value;
        }
        Store(c.dtype, &sum[h * elem], partial);
      }
      if (wire) wire(sum.data());
      for (int64_t h = 0; h < c.hidden; ++h) total[h] += Load(c.dtype, &sum[h * elem]);
    }
    for (int64_t h = 0; h < c.hidden; ++h) Store(c.dtype, &out[t * row_bytes + h * elem], total[h]);
  }
  return out;
}

// The inner product of two rows, in the order that combine_grad.cu defines.
inline float InnerProduct(const Case& c, const char* a, const char* b) {
  const int elem = static_cast<int>(c.elem_bytes()), per_lane = 16 / elem, chunk = 4 * 32 * per_lane;
  float lanes[32] = {};
  for (int64_t begin = 0; begin < c.hidden; begin += chunk) {
    for (int lane = 0; lane < 32; ++lane) {
      float sums[8] = {};
      for (int64_t v = 0; v < 4; ++v) {
        for (int i = 0; i < per_lane; ++i) {
          const int64_t h = begin + (v * 32 + lane) * per_lane + i;
          const volatile float product = h < c.hidden ? Load(c.dtype, a + h * elem) * Load(c.dtype, b + h * elem) : 0.f;
          sums[i] = sums[i] + product;
        }
      }
      for (int half = per_lane / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
      }
      lanes[lane] += sums[0];
    }
  }
  for (int half = 16; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The cotangents of rank d's y [C, H] and weights [C] from everybody's out_bar [T, H]. Only rows c % stride == 0, the
// others stay zero.
struct Cotangents {
  std::vector<char> y;
  std::vector<float> weights;
};

inline Cotangents CombineGrad(const Case& c, const std::vector<RankRouting>& routing, int d,
                              const std::vector<std::vector<char>>& out_bar, const std::vector<char>& y,
                              const std::vector<float>& weights, int stride = 1) {
  const int64_t row_bytes = c.row_bytes(), elem = c.elem_bytes();
  Cotangents bar{std::vector<char>(c.capacity * row_bytes, 0), std::vector<float>(c.capacity, 0.f)};
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int64_t i = 0; i < c.choices(); ++i) {
      const int64_t row = routing[d].recv_slot[r * c.choices() + i];
      if (row < 0 || row % stride != 0) continue;
      const char* const ct = &out_bar[r][i / c.num_topk * row_bytes];
      for (int64_t h = 0; h < c.hidden; ++h) {
        Store(c.dtype, &bar.y[row * row_bytes + h * elem], weights[row] * Load(c.dtype, ct + h * elem));
      }
      bar.weights[row] = InnerProduct(c, &y[row * row_bytes], ct);
    }
  }
  return bar;
}

// carried of each choice's row, [T, K].
inline std::vector<float> CarriedBack(const Case& c, const std::vector<RankRouting>& routing, int r,
                                      const std::vector<std::vector<float>>& carried) {
  std::vector<float> back(c.choices(), 0.f);
  for (int64_t i = 0; i < c.choices(); ++i) {
    const int64_t slot = routing[r].slot[i];
    if (slot < 0) continue;
    const int64_t row = slot % c.capacity;
    back[i] = carried[slot / c.capacity][c.layout == Layout::kRank ? row * c.num_topk + i % c.num_topk : row];
  }
  return back;
}

}  // namespace jax_ep
