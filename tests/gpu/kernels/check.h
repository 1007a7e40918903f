// The check that kernels.cu and internode.cu share: every call of a case against oracle.h.
#pragma once

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "encoded.h"

namespace jax_ep {

// When the ranks of `dead` are masked, and whether they call nevertheless.
enum class Mask { kBefore, kBeforeAndCalling, kAfterDispatch };

// All calls of a case, each with the bits of oracle.h. `calls` launches them on one rank; over nodes no kernel encodes
// rows or serves combine_grad, and nobody is masked.
template <class Calls>
bool CheckCalls(Case c, Ranks& ranks, const Calls& calls, int stride = 1, Mask mask = Mask::kBefore) {
  Finish(c);
  const int R = c.num_ranks;
  std::mt19937 random(c.seed + 77);
  const uint32_t dead = c.dead;
  if (mask == Mask::kAfterDispatch) c.dead = 0;
  auto routing = Route(c);
  const auto apply_mask = [&] {
    Ranks::Mask(c.dead);
    ranks.absent = mask == Mask::kBeforeAndCalling ? 0 : c.dead;
  };
  apply_mask();
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<Arrays> arrays;
  std::vector<std::vector<char>> x(R), x_again(R), second(R), y(R);
  std::vector<std::vector<float>> weights(R), gates(R), carried(R);
  const int64_t per_row = c.layout == Layout::kRank ? c.num_topk : 1;
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int r = 0; r < R; ++r) {
    x[r] = RandomRows(c, c.num_tokens, random);
    x_again[r] = RandomRows(c, c.num_tokens, random);
    y[r] = RandomRows(c, c.capacity, random);
    second[r].resize(c.num_tokens * c.second_bytes);
    for (char& byte : second[r]) byte = static_cast<char>(random());
    weights[r].resize(c.choices());
    gates[r].resize(c.capacity);
    carried[r].resize(c.capacity * per_row);
    for (auto* list : {&weights[r], &gates[r], &carried[r]}) {
      for (float& value : *list) value = uniform(random);
    }
    memory.push_back(std::make_unique<Memory>(ranks.device[r]));
    arrays.push_back(MakeArrays(c, *memory[r], ranks.group.view(r), true));
    DispatchParams& d = arrays[r].dispatch;
    d.topk_idx = memory[r]->Put(routing[r].topk_idx);
    if (c.weights) d.topk_weights = memory[r]->Put(weights[r]);
    arrays[r].combine.y = memory[r]->Put(y[r]);
  }
  if (!calls.Fits(arrays[0], c)) {
    std::printf("%-40s does not fit\n", c.name.c_str());
    return false;
  }
  std::vector<const char*> x_device(R), x_again_device(R), second_device(R);
  std::vector<const float*> gates_device(R), carried_device(R);
  for (int r = 0; r < R; ++r) {
    x_device[r] = memory[r]->Put(x[r]), x_again_device[r] = memory[r]->Put(x_again[r]);
    second_device[r] = memory[r]->Put(second[r]);
    gates_device[r] = memory[r]->Put(gates[r]), carried_device[r] = memory[r]->Put(carried[r]);
  }
  for (int device = 0; device < g_num_devices; ++device) {
    CHECK_CUDA(cudaSetDevice(device));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  bool ok = true;
  const auto tell = [&] {
    Ranks::Mask(0);
    ranks.absent = 0;
    std::printf("%-44s R %d T %5d K %2d E %4d C %6d H %5lld sms %2d: %s\n", c.name.c_str(), R, c.num_tokens, c.num_topk,
                c.num_experts, c.capacity, (long long)c.hidden, c.num_sms, ok ? "ok" : "FAILED");
    std::fflush(stdout);
    return ok;
  };
  const auto check_routing = [&](bool all) {  // else only what calls of a known routing write of it
    for (int r = 0; r < R; ++r) {
      if (ranks.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      const DispatchParams& d = arrays[r].dispatch;
      if (c.weights) ok &= Same("weights", r, d.recv_weights, ReceivedWeights(c, routing, r, weights));
      if (!all) continue;
      ok &= Same("slot", r, d.slot, routing[r].slot, c.num_topk);
      ok &= Same("recv_slot", r, d.recv_slot, routing[r].recv_slot, c.num_topk);
      ok &= Same("counts", r, d.counts, routing[r].counts);
      if (c.layout == Layout::kRank)
        ok &= Same("recv_topk_idx", r, d.recv_topk_idx, routing[r].recv_topk_idx, c.num_topk);
    }
  };
  const auto check_rows = [&](const char* what, const std::vector<std::vector<char>>& source, bool all) {
    check_routing(all);
    for (int r = 0; r < R; ++r) {
      if (ranks.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      const DispatchParams& d = arrays[r].dispatch;
      ok &= Same(what, r, d.rows[0].recv, ReceivedRows(c, routing, r, c.row_bytes(), source), c.row_bytes());
      if (c.second_bytes > 0)
        ok &= Same("second array", r, d.rows[1].recv, ReceivedRows(c, routing, r, c.second_bytes, second),
                   c.second_bytes);
    }
  };
  const auto poison = [&] {
    for (int r = 0; r < R; ++r) {
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      CHECK_CUDA(cudaMemset(arrays[r].dispatch.rows[0].recv, 0xab, c.capacity * c.row_bytes()));
      CHECK_CUDA(cudaMemset(arrays[r].combine.out, 0xab, c.num_tokens * c.row_bytes()));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  };
  const auto poison_routing = [&] {
    for (int r = 0; r < R; ++r) {
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      const DispatchParams& d = arrays[r].dispatch;
      CHECK_CUDA(cudaMemset(d.slot, 0xab, c.choices() * 4));
      CHECK_CUDA(cudaMemset(d.recv_slot, 0xab, R * c.choices() * 4));
      CHECK_CUDA(cudaMemset(d.counts, 0xab, (c.num_local() + 1) * 4));
      if (c.weights) CHECK_CUDA(cudaMemset(d.recv_weights, 0xab, c.capacity * per_row * 4));
      if (c.layout == Layout::kRank)
        CHECK_CUDA(cudaMemset(d.recv_topk_idx, 0xab, int64_t{c.capacity} * c.num_topk * 4));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  };
  for (int repeat = 0; repeat < 2 && ok; ++repeat) {
    poison();
    poison_routing();
    ranks.Launch([&](int r, cudaStream_t stream) {
      DispatchParams d = arrays[r].dispatch;
      d.rows[0].x = x_device[r], d.rows[1].x = second_device[r];
      return calls.Dispatch(r, d, c, stream);
    });
    ok &= ranks.Wait();
    if (!ok) return tell();  // without a routing each of the other calls would fail after its own deadline
    check_rows("dispatch", x, true);
  }
  for (Wire wire : {Wire::kFp8, Wire::kFp8Ue8m0, Wire::kMxfp8}) {
    if (Calls::kOverNodes || c.hidden % 16 != 0 || c.hidden > kMaxEncodedHidden) continue;
    const EncodedResults encoded(c, wire, x, memory);
    if (!DispatchFits(encoded.Of(0, arrays[0].dispatch, x_device[0]), R)) {
      std::printf("%-40s does not fit encoded\n", c.name.c_str());
      return false;
    }
    for (int repeat = 0; repeat < 2 && ok; ++repeat) {
      encoded.Poison(ranks);
      poison_routing();
      ranks.Launch([&](int r, cudaStream_t stream) {
        return calls.Dispatch(r, encoded.Of(r, arrays[r].dispatch, x_device[r]), c, stream);
      });
      ok &= ranks.Wait() && encoded.AreRight(ranks, routing);
      check_routing(true);
    }
  }
  if (mask == Mask::kAfterDispatch) {
    c.dead = dead;
    apply_mask();
    routing = Masked(c, routing);
  }
  poison();
  ranks.Launch([&](int r, cudaStream_t stream) {
    DispatchParams d = arrays[r].dispatch;
    d.operation = kDispatchCached;
    d.topk_idx = nullptr;
    d.rows[0].x = x_again_device[r], d.rows[1].x = second_device[r];
    return calls.Dispatch(r, d, c, stream);
  });
  ok &= ranks.Wait();
  check_rows("dispatch_cached", x_again, mask != Mask::kAfterDispatch);
  for (int weighted = 0; weighted < (c.layout == Layout::kRank ? 1 : 2); ++weighted) {
    poison();
    ranks.Launch([&](int r, cudaStream_t stream) {
      CombineParams b = arrays[r].combine;
      b.weights = weighted ? gates_device[r] : nullptr;
      b.carried = carried_device[r];
      return calls.Combine(r, b, c, stream);
    });
    ok &= ranks.Wait();
    for (int r = 0; r < R; ++r) {
      if (ranks.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      ok &= Same(weighted ? "combine weighted" : "combine", r, arrays[r].combine.out,
                 Combined(c, routing, r, y, weighted ? &gates : nullptr, stride), c.row_bytes(), stride);
      ok &= Same("carried_back", r, arrays[r].combine.carried_back, CarriedBack(c, routing, r, carried));
    }
  }
  if constexpr (!Calls::kOverNodes) {
    for (int repeat = 0; repeat < 2 && ok && c.layout != Layout::kRank; ++repeat) {
      for (int r = 0; r < R; ++r) {
        CHECK_CUDA(cudaSetDevice(ranks.device[r]));
        CHECK_CUDA(cudaMemset(arrays[r].grad.y_bar, 0xab, c.capacity * c.row_bytes()));
        CHECK_CUDA(cudaMemset(arrays[r].grad.weights_bar, 0xab, c.capacity * sizeof(float)));
        CHECK_CUDA(cudaDeviceSynchronize());
      }
      ranks.Launch([&](int r, cudaStream_t stream) {
        CombineGradParams g = arrays[r].grad;
        g.out_bar = x_device[r], g.y = arrays[r].combine.y, g.weights = gates_device[r];
        return calls.CombineGrad(g, c, stream);
      });
      ok &= ranks.Wait();
      for (int r = 0; r < R; ++r) {
        if (ranks.IsAbsent(r)) continue;
        CHECK_CUDA(cudaSetDevice(ranks.device[r]));
        const Cotangents bar = CombineGrad(c, routing, r, x, y[r], gates[r], stride);
        ok &= Same("combine_grad", r, arrays[r].grad.y_bar, bar.y, c.row_bytes(), stride);
        ok &= Same("combine_grad's weights", r, arrays[r].grad.weights_bar, bar.weights, 1, stride);
      }
    }
  }
  ranks.Launch([&](int r, cudaStream_t stream) {
    return calls.Barrier(ranks.group.view(r), r, arrays[r].dispatch.counts, stream);
  });
  ok &= ranks.Wait();
  for (int r = 0; r < R; ++r) {
    if (ranks.IsAbsent(r)) continue;
    CHECK_CUDA(cudaSetDevice(ranks.device[r]));
    const int came = c.IsDead(r) ? 0 : R - __builtin_popcount(c.dead);
    ok &= Same("barrier", r, arrays[r].dispatch.counts, std::vector<int32_t>{came});
  }
  return tell();
}

inline std::vector<Case> SmallCases(int R) {
  const auto bf16 = RowDtype::kBfloat16;
  std::vector<Case> cases = {
      {"expert", R, 37, 3, 4 * R, Layout::kExpert, 1, 0, 0, bf16, 128},
      {"expert aligned, drops, second array", R, 64, 4, 2 * R, Layout::kExpert, 16, 0, 40 * R, RowDtype::kFloat16, 2880,
       23},
      {"rank, drops", R, 50, 4, 4 * R, Layout::kRank, 1, 0, 40 * R, RowDtype::kFloat32, 64, 16},
      {"batched, drops", R, 33, 2, 2 * R, Layout::kBatched, 1, 9 * R, 0, bf16, 256, 12},
      {"tiny rows, all to expert 0", R, 70, 2, 2 * R, Layout::kExpert, 8, 0, 0, RowDtype::kFloat32, 4, 0, true, 0.9},
      {"long rows", R, 19, 2, 2 * R, Layout::kExpert, 4, 0, 0, bf16, 20000},
      {"rows encoded in pieces", R, 45, 2, 4 * R, Layout::kExpert, 4, 0, 0, RowDtype::kFloat32, kMaxEncodedHidden},
      {"some columns more than a step, rank", R, 90, 3, 4 * R, Layout::kRank, 1, 0, 0, RowDtype::kFloat32, 5200},
      {"long rows, all to expert 0", R, 200, 4, 4 * R, Layout::kExpert, 8, 0, 0, bf16, 3072, 0, true, 0.9},
      {"two tokens, many choices", R, 2, 32, 12 * R < 32 ? 32 * R : 12 * R, Layout::kExpert, 1, 0, 0, bf16, 128, 224},
      {"few tokens, long rows", R, 7, 2, 2 * R, Layout::kExpert, 1, 0, 0, RowDtype::kFloat32, 7168},
  };
  for (Case& c : cases) c.num_sms = 3, c.num_send_blocks = 2;
  const size_t first = cases.size();
  for (size_t i = 0; i < first; ++i) {  // rows of layout "rank" both ways
    if (cases[i].layout != Layout::kRank) continue;
    cases[i].pulls = 1;
    cases.push_back(cases[i]);
    cases.back().pulls = 0;
    cases.back().name += ", pushed";
  }
  return cases;
}

inline Case RandomCase(std::mt19937& random) {
  const auto pick = [&](std::vector<int> values) { return values[random() % values.size()]; };
  Case c;
  c.name = "random";
  c.num_ranks = pick({1, 2, 2, 3, 4, 4, 5, 8});
  c.num_tokens = pick({1, 2, 7, 31, 64, 128, 200, 513});
  c.num_topk = pick({1, 2, 3, 4, 6, 8, 8, 16, 32});
  c.num_experts = c.num_ranks * pick({1, 2, 3, 8, 32, 40});
  while (c.num_experts < c.num_topk) c.num_experts *= 2;
  c.layout = static_cast<Layout>(pick({0, 0, 1, 2}));
  c.alignment = pick({1, 1, 8, 64, 128});
  c.expert_capacity = c.layout == Layout::kBatched ? pick({0, 5, 64}) : 0;
  c.capacity = pick({0, 0, 100, 1000});
  if (c.layout == Layout::kBatched) c.capacity = 0;
  c.dtype = static_cast<RowDtype>(pick({0, 0, 1, 2}));
  c.hidden = 8 * pick({1, 1, 3, 16, 64, 100, 360, 896, 1500});
  if (int64_t(c.num_ranks) * c.num_tokens * c.num_topk * c.hidden > 64 << 20) c.hidden = 128;
  c.second_bytes = pick({0, 0, 1, 16, 28, 92, 224});
  c.weights = pick({0, 1, 1});
  c.skew = pick({0, 0, 0, 1}) * 0.7;
  c.invalid = pick({0, 1}) * 0.1;
  c.num_sms = pick({1, 2, 5, 12, 16});
  c.num_send_blocks = pick({1, 2, 3, 12});
  c.pulls = pick({-1, 0, 1});
  c.seed = random();
  return c;
}

}  // namespace jax_ep
