// The low-latency kernels without XLA, as kernels.cu does it for the others: oracle.h says what they must give.
//
//   low_latency check [seed count]   named and random cases, bitwise: whole calls, halves out of order, between
//                                    high-throughput calls of the same group
//   low_latency small                a few small cases, for compute-sanitizer
//   low_latency timeout              a rank does not call, or starts too often: an error, zeros, and right calls later
//   low_latency masked               masked ranks do not call, or do: the others get what the oracle says
//   low_latency bench [H [sms...]]   µs a call, back to back in a CUDA graph, slowest rank
//   low_latency clocks [H [sms]]     when blocks of a dispatch reach its moments; built with -DJAX_EP_CLOCKS
//
// nvcc -O3 -std=c++17 -Iffi -gencode arch=compute_90a,code=sm_90a -o low_latency tests/gpu/kernels/low_latency.cu
//   ffi/low_latency/*.cu ffi/halves/*.cu ffi/halves/push.cc ffi/dispatch/dispatch.cu ffi/combine/*.cu
//   ffi/group/barrier.cu ffi/group/group.cc
#include <algorithm>
#include <functional>
#include <utility>

#include "encoded.h"
#include "logfmt_host.h"
#include "low_latency/clocks.cuh"
#include "low_latency/low_latency.h"

using namespace jax_ep;

namespace {

// What arrives of a rank's sum in LogFMT-10, in its place.
void LogfmtRoundtrip(const Case& c, char* row) {
  const int hidden = static_cast<int>(c.hidden);
  if (c.dtype == RowDtype::kBfloat16) return jax_ep::LogfmtRoundtrip<__nv_bfloat16>(row, hidden);
  if (c.dtype == RowDtype::kFloat16) return jax_ep::LogfmtRoundtrip<__half>(row, hidden);
  jax_ep::LogfmtRoundtrip<float>(row, hidden);
}

// One case: its operands, expected results, and calls of every kind on all ranks.
class Exchange {
 public:
  explicit Exchange(Case c) : c_(c), R(c.num_ranks), ranks_(Ranks::Of(c.num_ranks)), routing_(Route(c)) {
    Mask(c.dead);
    std::mt19937 random(c.seed + 77);
    std::uniform_real_distribution<float> uniform(-1, 1);
    const int64_t per_row = c.layout == Layout::kRank ? c.num_topk : 1;
    for (int r = 0; r < R; ++r) {
      x_.push_back(RandomRows(c, c.num_tokens, random));
      y_.push_back(RandomRows(c, c.capacity, random));
      small_y_.push_back(SmallRows(y_[r]));
      second_.emplace_back(c.num_tokens * c.second_bytes);
      for (char& byte : second_[r]) byte = static_cast<char>(random());
      weights_.emplace_back(c.choices());
      gates_.emplace_back(c.capacity);
      carried_.emplace_back(c.capacity * per_row);
      for (auto* list : {&weights_[r], &gates_[r], &carried_[r]}) {
        for (float& value : *list) value = uniform(random);
      }
      memory_.push_back(std::make_unique<Memory>(ranks_.device[r]));
      Memory& memory = *memory_[r];
      arrays_.push_back(MakeArrays(c, memory, ranks_.group.view(r), true));
      DispatchParams& d = arrays_[r].dispatch;
      d.topk_idx = memory.Put(routing_[r].topk_idx);
      d.rows[0].x = memory.Put(x_[r]);
      d.rows[1].x = memory.Put(second_[r]);
      if (c.weights) d.topk_weights = memory.Put(weights_[r]);
      CombineParams& b = arrays_[r].combine;
      b.y = memory.Put(y_[r]);
      small_y_device_.push_back(memory.Put(small_y_[r]));
      // Cases without gates carry nothing back either: then no pointer may be looked at.
      if (c.weights) b.carried = memory.Put(carried_[r]);
      if (!c.weights) b.carried_back = nullptr;
      gates_device_.push_back(memory.Put(gates_[r]));
      in_flight_.push_back(memory.Make<uint64_t>(2, 0));
    }
    dispatch_bytes_ = LowLatencyDispatchBytes(Of(0, kDispatch), R);
    combine_bytes_ = LowLatencyCombineBytes(arrays_[0].combine, R);
    logfmt_bytes_ = LowLatencyCombineBytes(OfLogfmt(0), R, true);
    if (!fits()) return;
    for (Operation operation : {kDispatch, kDispatchCached, kNotify}) {
      ranks_.group.MakeArenas(LowLatencyDispatchBytes(Of(0, operation), R));
    }
    ranks_.group.MakeArenas(combine_bytes_);
    ranks_.group.MakeArenas(logfmt_bytes_);
    Settle();
  }

  ~Exchange() { Mask(0); }

  // From now on these ranks take no part; the routing stays what is left of it.
  void Mask(uint32_t dead) {
    c_.dead = dead;
    routing_ = Masked(c_, routing_);
    Ranks::Mask(dead);
    ranks_.absent = dead;
  }
  // Whether masked ranks call.
  void LetMaskedCall() { ranks_.absent = 0; }

  bool fits() const { return dispatch_bytes_ > 0 && combine_bytes_ > 0 && logfmt_bytes_ > 0; }
  Ranks& ranks() { return ranks_; }

  cudaError_t Dispatch(int r, cudaStream_t stream, Operation operation, Half half = Half::kBoth) {
    const DispatchParams d = Of(r, operation);
    const ArenaView arenas = ranks_.group.arenas(r, LowLatencyDispatchBytes(d, R));
    return LaunchLowLatencyDispatch(d, {arenas, half, in_flight_[r]}, config_, stream);
  }
  cudaError_t Combine(int r, cudaStream_t stream, bool weighted, Half half = Half::kBoth) {
    CombineParams b = arrays_[r].combine;
    b.weights = weighted && half != Half::kDone ? gates_device_[r] : nullptr;
    b.scratch = nullptr;
    return LaunchLowLatencyCombine(b, {ranks_.group.arenas(r, combine_bytes_), half, in_flight_[r]}, config_, stream);
  }
  cudaError_t CombineLogfmt(int r, cudaStream_t stream, bool weighted, Half half = Half::kBoth) {
    CombineParams b = OfLogfmt(r);
    b.weights = weighted && half != Half::kDone ? gates_device_[r] : nullptr;
    LowLatencyParams low_latency{ranks_.group.arenas(r, logfmt_bytes_), half, in_flight_[r]};
    low_latency.logfmt = true;
    return LaunchLowLatencyCombine(b, low_latency, config_, stream);
  }
  // Encoded rows have results of their own.
  bool MakeEncoded(Wire wire) {
    encoded_ = std::make_unique<EncodedResults>(c_, wire, x_, memory_);
    const int64_t bytes = LowLatencyDispatchBytes(OfEncoded(0), R);
    if (bytes > 0) ranks_.group.MakeArenas(bytes);
    Settle();
    return bytes > 0;
  }
  cudaError_t DispatchEncoded(int r, cudaStream_t stream) {
    const DispatchParams d = OfEncoded(r);
    const ArenaView arenas = ranks_.group.arenas(r, LowLatencyDispatchBytes(d, R));
    return LaunchLowLatencyDispatch(d, {arenas, Half::kBoth, nullptr}, config_, stream);
  }
  bool EncodedAreRight() {
    bool ok = encoded_->AreRight(ranks_, routing_);
    for (int r = 0; r < R && c_.weights; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same("encoded: weights", r, arrays_[r].dispatch.recv_weights, ReceivedWeights(c_, routing_, r, weights_));
    }
    return ok;
  }
  cudaError_t HighThroughput(int r, cudaStream_t stream) {
    DispatchConfig config;
    config.num_sms = 4, config.num_send_blocks = 2;
    return LaunchDispatch(arrays_[r].dispatch, R, config, stream);
  }
  void set_num_sms(int num_sms) { config_.num_sms = num_sms; }

  template <class F>
  void OnAll(F call) {
    ranks_.Launch([&](int r, cudaStream_t stream) { return call(r, stream); });
  }
  bool Wait() { return ranks_.Wait(); }

  void Poison(bool routed) {
    for (int r = 0; r < R; ++r) {
      const Arrays& a = arrays_[r];
      const int64_t per_row = c_.layout == Layout::kRank ? c_.num_topk : 1;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      CHECK_CUDA(cudaMemset(a.dispatch.rows[0].recv, 0xab, c_.capacity * c_.row_bytes()));
      if (c_.second_bytes > 0) CHECK_CUDA(cudaMemset(a.dispatch.rows[1].recv, 0xab, c_.capacity * c_.second_bytes));
      if (c_.weights) CHECK_CUDA(cudaMemset(a.dispatch.recv_weights, 0xab, c_.capacity * per_row * 4));
      CHECK_CUDA(cudaMemset(a.combine.out, 0xab, c_.num_tokens * c_.row_bytes()));
      if (c_.weights) CHECK_CUDA(cudaMemset(a.combine.carried_back, 0xab, c_.choices() * 4));
      if (!routed) continue;
      CHECK_CUDA(cudaMemset(a.dispatch.slot, 0xab, c_.choices() * 4));
      CHECK_CUDA(cudaMemset(a.dispatch.recv_slot, 0xab, R * c_.choices() * 4));
      CHECK_CUDA(cudaMemset(a.dispatch.counts, 0xab, (c_.num_local() + 1) * 4));
      if (c_.layout == Layout::kRank)
        CHECK_CUDA(cudaMemset(a.dispatch.recv_topk_idx, 0xab, c_.capacity * c_.num_topk * 4));
    }
    Settle();
  }

  bool RoutingIsRight(const char* what) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      const DispatchParams& d = arrays_[r].dispatch;
      ok &= Same((std::string(what) + ": slot").c_str(), r, d.slot, routing_[r].slot, c_.num_topk);
      ok &= Same((std::string(what) + ": recv_slot").c_str(), r, d.recv_slot, routing_[r].recv_slot, c_.num_topk);
      ok &= Same((std::string(what) + ": counts").c_str(), r, d.counts, routing_[r].counts);
      if (c_.layout == Layout::kRank)
        ok &= Same((std::string(what) + ": recv_topk_idx").c_str(), r, d.recv_topk_idx, routing_[r].recv_topk_idx,
                   c_.num_topk);
    }
    return ok;
  }
  bool RowsAreRight(const char* what) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      const DispatchParams& d = arrays_[r].dispatch;
      ok &= Same((std::string(what) + ": rows").c_str(), r, d.rows[0].recv,
                 ReceivedRows(c_, routing_, r, c_.row_bytes(), x_), c_.row_bytes());
      if (c_.second_bytes > 0)
        ok &= Same((std::string(what) + ": second array").c_str(), r, d.rows[1].recv,
                   ReceivedRows(c_, routing_, r, c_.second_bytes, second_), c_.second_bytes);
      if (c_.weights)
        ok &= Same((std::string(what) + ": weights").c_str(), r, d.recv_weights,
                   ReceivedWeights(c_, routing_, r, weights_));
    }
    return ok;
  }
  bool RowsAreZero(const char* what, int except = -1) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (r == except || ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same(what, r, arrays_[r].dispatch.rows[0].recv, std::vector<char>(c_.capacity * c_.row_bytes(), 0));
    }
    return ok;
  }
  bool SumsAreRight(const char* what, bool weighted) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same(what, r, arrays_[r].combine.out, Combined(c_, routing_, r, y_, weighted ? &gates_ : nullptr),
                 c_.row_bytes());
      if (!c_.weights) continue;
      ok &= Same((std::string(what) + ": carried back").c_str(), r, arrays_[r].combine.carried_back,
                 CarriedBack(c_, routing_, r, carried_));
    }
    return ok;
  }
  bool LogfmtSumsAreRight(const char* what, bool weighted) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      const auto wire = [&](char* row) { LogfmtRoundtrip(c_, row); };
      ok &= Same(what, r, arrays_[r].combine.out,
                 Combined(c_, routing_, r, small_y_, weighted ? &gates_ : nullptr, 1, wire), c_.row_bytes());
    }
    return ok;
  }
  bool SumsAreZero(const char* what, int except = -1) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (r == except || ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same(what, r, arrays_[r].combine.out, std::vector<char>(c_.num_tokens * c_.row_bytes(), 0));
    }
    return ok;
  }

  // Another value in flight for the calls that follow.
  std::vector<uint64_t*> NewInFlight() {
    std::vector<uint64_t*> words;
    for (int r = 0; r < R; ++r) words.push_back(memory_[r]->Make<uint64_t>(2, 0));
    Settle();
    return words;
  }
  std::vector<uint64_t*> in_flight_;

  void Settle() {
    for (int device = 0; device < g_num_devices; ++device) {
      CHECK_CUDA(cudaSetDevice(device));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  }

  // What leaves the busiest rank, in rows.
  int64_t MostRowsSent() const {
    int64_t most = 0;
    for (int r = 0; r < R; ++r) {
      int64_t sent = 0;
      for (int t = 0; t < c_.num_tokens; ++t) {
        uint32_t there = 0;
        for (int k = 0; k < c_.num_topk; ++k) {
          const int slot = routing_[r].slot[t * c_.num_topk + k];
          if (slot >= 0) there |= 1u << (slot / c_.capacity);
        }
        sent += __builtin_popcount(there & ~(1u << r));
      }
      most = std::max(most, sent);
    }
    return most;
  }

 private:
  DispatchParams OfEncoded(int r) const {
    const DispatchParams& d = arrays_[r].dispatch;
    return encoded_->Of(r, d, d.rows[0].x);
  }
  // Most rows so small that their sums are encoded; every fifth as it is, every seventh with a group of zeros.
  std::vector<char> SmallRows(std::vector<char> rows) const {
    for (int64_t row = 0; row < c_.capacity; ++row) {
      for (int64_t h = 0; h < c_.hidden; ++h) {
        char* const place = &rows[row * c_.row_bytes() + h * c_.elem_bytes()];
        if (row % 5 != 3) Store(c_.dtype, place, Load(c_.dtype, place) / 64);
        if (row % 7 == 4 && h / 128 == c_.hidden / 128 - 1) Store(c_.dtype, place, 0.f);
      }
    }
    return rows;
  }
  CombineParams OfLogfmt(int r) const {
    CombineParams b = arrays_[r].combine;
    b.y = small_y_device_.empty() ? nullptr : small_y_device_[r];
    b.carried = nullptr, b.carried_back = nullptr, b.scratch = nullptr;
    return b;
  }
  DispatchParams Of(int r, Operation operation) const {
    DispatchParams d = arrays_[r].dispatch;
    d.operation = operation;
    if (operation == kNotify) d.num_row_arrays = 0, d.topk_weights = nullptr, d.recv_weights = nullptr;
    return d;
  }

  Case c_;
  int R;
  Ranks& ranks_;
  std::vector<RankRouting> routing_;
  std::vector<std::vector<char>> x_, second_, y_, small_y_;
  std::vector<std::vector<float>> weights_, gates_, carried_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<Arrays> arrays_;
  std::vector<const float*> gates_device_;
  std::vector<const char*> small_y_device_;
  std::unique_ptr<EncodedResults> encoded_;
  int64_t dispatch_bytes_ = 0, combine_bytes_ = 0, logfmt_bytes_ = 0;
  LowLatencyConfig config_{8};
};

bool CheckCase(Case c, bool masked_call = false) {
  Finish(c);
  Exchange calls(c);
  if (masked_call) calls.LetMaskedCall();
  if (!calls.fits()) {
    std::printf("%-40s does not fit\n", c.name.c_str());
    return false;
  }
  calls.set_num_sms(c.num_sms);
  bool ok = true;
  for (int repeat = 0; repeat < 6 && ok; ++repeat) {  // more often than there are windows
    calls.Poison(true);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
    ok &= calls.Wait() && calls.RoutingIsRight("dispatch") && calls.RowsAreRight("dispatch");
  }
  calls.Poison(true);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kNotify); });
  ok &= calls.Wait() && calls.RoutingIsRight("notify");
  calls.OnAll([&](int r, cudaStream_t s) { return calls.HighThroughput(r, s); });
  ok &= calls.Wait() && calls.RowsAreRight("high throughput between");
  calls.Poison(false);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatchCached); });
  ok &= calls.Wait() && calls.RowsAreRight("dispatch_cached");
  for (bool weighted : {false, true}) {
    if (weighted && c.layout == Layout::kRank) continue;
    calls.Poison(false);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, weighted); });
    ok &= calls.Wait() && calls.SumsAreRight(weighted ? "combine weighted" : "combine", weighted);
    for (int repeat = 0; repeat < 6 && ok; ++repeat) {
      calls.Poison(false);
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineLogfmt(r, s, weighted); });
      ok &= calls.Wait() && calls.LogfmtSumsAreRight(weighted ? "logfmt weighted" : "logfmt", weighted);
    }
  }
  for (Wire wire : {Wire::kFp8, Wire::kFp8Ue8m0, Wire::kMxfp8}) {
    if (c.hidden % 16 != 0 || !calls.MakeEncoded(wire)) continue;
    for (int repeat = 0; repeat < 2; ++repeat) {
      calls.Poison(true);
      calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchEncoded(r, s); });
      ok &= calls.Wait() && calls.RoutingIsRight("encoded") && calls.EncodedAreRight();
    }
  }

  // Two of each kind in flight, ended in both orders, with whole calls between.
  const auto first = calls.in_flight_, second = calls.NewInFlight();
  for (bool swapped : {false, true}) {
    calls.Poison(false);
    for (const auto& words : {first, second}) {
      calls.in_flight_ = words;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatchCached, Half::kStart); });
    }
    for (const auto& words : {swapped ? second : first, swapped ? first : second}) {
      calls.Poison(false);
      calls.in_flight_ = words;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatchCached, Half::kDone); });
      ok &= calls.Wait() && calls.RowsAreRight("dispatch_done");
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, false); });
      ok &= calls.Wait() && calls.SumsAreRight("combine between", false);
    }
    const bool weighted = c.layout != Layout::kRank;
    for (bool one : {false, true}) {
      calls.in_flight_ = one ? second : first;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, one && weighted, Half::kStart); });
    }
    for (bool one : {swapped, !swapped}) {
      calls.Poison(false);
      calls.in_flight_ = one ? second : first;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, one && weighted, Half::kDone); });
      ok &= calls.Wait() && calls.SumsAreRight("combine_done", one && weighted);
    }
    for (bool one : {false, true}) {
      calls.in_flight_ = one ? second : first;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineLogfmt(r, s, one && weighted, Half::kStart); });
    }
    for (bool one : {swapped, !swapped}) {
      calls.Poison(false);
      calls.in_flight_ = one ? second : first;
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineLogfmt(r, s, one && weighted, Half::kDone); });
      ok &= calls.Wait() && calls.LogfmtSumsAreRight("logfmt, combine_done", one && weighted);
    }
  }
  calls.in_flight_ = calls.NewInFlight();  // zeros: of no call
  calls.Poison(false);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatchCached, Half::kDone); });
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, false, Half::kDone); });
  ok &= calls.Wait() && calls.RowsAreZero("done of nothing") && calls.SumsAreZero("done of nothing");
  calls.Poison(false);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineLogfmt(r, s, false, Half::kDone); });
  ok &= calls.Wait() && calls.SumsAreZero("logfmt done of nothing");
  // Without anything in between that would keep the ranks together.
  calls.Poison(true);
  for (int repeat = 0; repeat < 20; ++repeat) {
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, false); });
  }
  ok &= calls.Wait() && calls.RoutingIsRight("run") && calls.RowsAreRight("run") && calls.SumsAreRight("run", false);
  std::printf("%-44s R %d T %4d K %2d E %4d C %6d H %5lld sms %2d: %s\n", c.name.c_str(), c.num_ranks, c.num_tokens,
              c.num_topk, c.num_experts, c.capacity, (long long)c.hidden, c.num_sms, ok ? "ok" : "FAILED");
  std::fflush(stdout);
  return ok;
}

std::vector<Case> SmallCases(int R) {
  const auto bf16 = RowDtype::kBfloat16;
  std::vector<Case> cases = {
      {"expert", R, 37, 3, 4 * R, Layout::kExpert, 1, 0, 0, bf16, 128},
      {"one token", R, 1, 4, 4 * R, Layout::kExpert, 1, 0, 0, bf16, 7168},
      {"expert aligned, drops, second array", R, 64, 4, 2 * R, Layout::kExpert, 16, 0, 40 * R, RowDtype::kFloat16, 2880,
       23},
      {"rank, drops", R, 50, 4, 4 * R, Layout::kRank, 1, 0, 40 * R, RowDtype::kFloat32, 64, 16},
      {"batched, drops", R, 33, 2, 2 * R, Layout::kBatched, 1, 9 * R, 0, bf16, 256, 12},
      {"tiny rows, all to expert 0", R, 70, 2, 2 * R, Layout::kExpert, 8, 0, 0, RowDtype::kFloat32, 4, 0, true, 0.9},
      {"long rows", R, 19, 2, 2 * R, Layout::kExpert, 4, 0, 0, bf16, 20000},
      {"nobody chooses anything", R, 9, 2, 2 * R, Layout::kExpert, 4, 0, 20, bf16, 64, 0, true, 0, 1},
  };
  for (Case& c : cases) c.num_sms = 3;
  return cases;
}

Case RandomCase(std::mt19937& random) {
  const auto pick = [&](std::vector<int> values) { return values[random() % values.size()]; };
  Case c;
  c.name = "random";
  c.num_ranks = pick({1, 2, 2, 3, 4, 4, 5, 8});
  c.num_tokens = pick({1, 1, 2, 3, 7, 8, 31, 64, 128, 200, 512});
  c.num_topk = pick({1, 2, 3, 4, 6, 8, 8, 16, 32});
  c.num_experts = c.num_ranks * pick({1, 2, 3, 8, 32, 64, 128});
  while (c.num_experts < c.num_topk) c.num_experts *= 2;
  if (c.num_ranks * c.num_tokens * c.num_topk > 30000) c.num_tokens = 64;
  c.layout = static_cast<Layout>(pick({0, 0, 1, 2}));
  c.alignment = pick({1, 1, 8, 64});
  c.expert_capacity = c.layout == Layout::kBatched ? pick({1, 5, 64}) : 0;
  c.capacity = c.layout == Layout::kBatched ? 0 : pick({0, 1, 100, 1000});
  c.dtype = static_cast<RowDtype>(pick({0, 0, 1, 2}));
  c.hidden = 8 * pick({1, 1, 3, 15, 16, 64, 100, 360, 896, 1500});
  if (int64_t(c.num_ranks) * c.num_tokens * c.num_topk * c.hidden > 16 << 20) c.hidden = 128;
  c.second_bytes = pick({0, 0, 1, 16, 28, 56, 92, 224});
  c.weights = pick({0, 1, 1});
  c.skew = pick({0, 0, 0, 1}) * 0.7;
  c.invalid = pick({0, 1}) * 0.1;
  c.num_sms = pick({1, 2, 5, 12, 16});
  c.seed = random();
  return c;
}

int Check(int argc, char** argv) {
  bool ok = true;
  for (int R : {1, 2, 3, 4, 8}) {
    for (const Case& c : SmallCases(R)) ok &= CheckCase(c);
  }
  const auto bf16 = RowDtype::kBfloat16;
  const int R = std::max(g_num_devices, 2);
  Case models[] = {
      {"DeepSeek-V3 expert", R, 128, 8, 256, Layout::kExpert, 128, 0, 0, bf16, 7168, 0, true, 0, 0, 32},
      {"DeepSeek-V3 rank", R, 128, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, 32},
      {"DeepSeek-V3 fp8-sized", R, 128, 8, 256, Layout::kExpert, 1, 0, 1280, bf16, 3584, 224, true, 0, 0, 32},
      {"GPT-OSS batched", R, 64, 4, 128, Layout::kBatched, 1, 128, 0, bf16, 2880, 0, true, 0, 0.02, 32},
  };
  for (const Case& c : models) ok &= CheckCase(c);
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
  const int count = argc > 3 ? std::atoi(argv[3]) : 60;
  int wrong = 0;
  for (int i = 0; i < count; ++i) wrong += !CheckCase(RandomCase(random));
  std::printf("%s\n", ok && wrong == 0 ? "CHECK OK" : "CHECK FAILED");
  return ok && wrong == 0 ? 0 : 1;
}

int Small() {
  bool ok = true;
  for (const Case& c : SmallCases(2)) ok &= CheckCase(c);
  std::printf("%s\n", ok ? "SMALL OK" : "SMALL FAILED");
  return ok ? 0 : 1;
}

// Calls of a routing from before the mask.
bool CheckMaskedLate(Case c) {
  Finish(c);
  const uint32_t dead = std::exchange(c.dead, 0);
  Exchange calls(c);
  calls.set_num_sms(c.num_sms);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
  bool ok = calls.Wait() && calls.RoutingIsRight("before") && calls.RowsAreRight("before");
  // A start from before the mask is lost, and its done says so.
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, false, Half::kStart); });
  ok &= calls.Wait();
  calls.Mask(dead);
  calls.Poison(false);
  calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, false, Half::kDone); });
  const bool told = !calls.Wait();
  ok &= told && calls.SumsAreZero("done of a start from before the mask");
  for (int repeat = 0; repeat < 6 && ok; ++repeat) {
    const bool weighted = repeat % 2 != 0 && c.layout != Layout::kRank;
    calls.Poison(false);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatchCached); });
    ok &= calls.Wait() && calls.RowsAreRight("dispatch_cached, masked late");
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, weighted); });
    ok &= calls.Wait() && calls.SumsAreRight("combine, masked late", weighted);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineLogfmt(r, s, weighted); });
    ok &= calls.Wait() && calls.LogfmtSumsAreRight("logfmt, masked late", weighted);
  }
  std::printf("%-44s R %d masked %u: told %d, %s\n", c.name.c_str(), c.num_ranks, dead, told, ok ? "ok" : "FAILED");
  return ok;
}

int Masked() {
  bool ok = true;
  for (int R : {2, 3, 4, 8}) {
    for (uint32_t dead : {1u, 2u, 5u, 1u << (R - 1)}) {
      if (dead >= (1u << R) - 1) continue;
      for (Case c : SmallCases(R)) {
        c.name += ", masked " + std::to_string(dead);
        c.dead = dead;
        ok &= CheckCase(c) && CheckCase(c, true) && CheckMaskedLate(c);
      }
      ok &= CheckCase(SmallCases(R)[0]);  // all together again
    }
  }
  // A rank that does not call is told, then masked: the others go on, with the same routing and with new ones.
  Group::SetTimeout(1.5);
  Case c{"after a failure, masked", 3, 60, 4, 24, Layout::kExpert, 8, 0, 0, RowDtype::kBfloat16, 512};
  Finish(c);
  {
    Exchange calls(c);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
    ok &= calls.Wait() && calls.RowsAreRight("before");
    calls.ranks().absent = 2;
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, true); });
    const bool told =
        !calls.Wait() && calls.ranks().failure.find("waited for rank 1 in phase lines") != std::string::npos;
    ok &= told && calls.SumsAreZero("sums after a timeout");
    std::printf("rank 1 never calls: told %d\n", told);
    calls.Mask(2);
    for (int repeat = 0; repeat < 6; ++repeat) {
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Combine(r, s, true); });
      ok &= calls.Wait() && calls.SumsAreRight("combine after a failure", true);
    }
  }
  c.dead = 2;
  ok &= CheckCase(c);
  c.dead = 0;
  ok &= CheckCase(c);
  std::printf("%s\n", ok ? "MASKED OK" : "MASKED FAILED");
  return ok ? 0 : 1;
}

int Timeout() {
  Group::SetTimeout(0.5);
  Case c{"before and after a timeout", 2, 100, 4, 16, Layout::kExpert, 8, 0, 0, RowDtype::kBfloat16, 512};
  bool ok = CheckCase(c);
  Finish(c);
  for (int missing = 0; missing < 2; ++missing) {
    for (bool combines : {false, true}) {
      for (const char* how : {"never calls", "calls too late", "calls too late, more calls queued"}) {
        Exchange calls(c);
        Ranks& ranks = calls.ranks();
        calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kNotify); });
        ok &= calls.Wait();
        calls.Poison(false);
        const auto launch = [&](int r) {
          CHECK_CUDA(cudaSetDevice(ranks.device[r]));
          CHECK_CUDA(combines ? calls.Combine(r, ranks.stream[r], true)
                              : calls.Dispatch(r, ranks.stream[r], kDispatchCached));
        };
        const bool queued = std::string(how).find("queued") != std::string::npos;
        const bool never = std::string(how) == "never calls";
        launch(1 - missing);
        if (queued) launch(1 - missing);  // of the same generation: must not meet the late rank's first call
        if (!never) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          launch(missing);
        }
        const bool told = !calls.Wait();
        const bool zero = combines ? calls.SumsAreZero("sums after a timeout", never ? missing : -1)
                                   : calls.RowsAreZero("rows after a timeout", never ? missing : -1);
        std::printf("rank %d %s (%s): told %d, zero %d\n", missing, how, combines ? "combine" : "dispatch_cached", told,
                    zero);
        ok &= told && zero && CheckCase(c);
      }
    }
  }
  for (const Half last : {Half::kStart, Half::kBoth}) {
    Exchange calls(c);
    calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kNotify); });
    ok &= calls.Wait();
    for (int i = 0; i <= kDepth; ++i) {
      calls.OnAll(
          [&](int r, cudaStream_t s) { return calls.Combine(r, s, false, i < kDepth ? Half::kStart : last); });
    }
    const bool told = !calls.Wait() && calls.ranks().failure.find("began a call while 4 starts") != std::string::npos;
    std::printf("%s behind four starts: told %d\n", last == Half::kStart ? "a start" : "a whole call", told);
    ok &= told && CheckCase(c);
  }
  {
    Exchange calls(c);
    for (int r = 0; r < 2; ++r) {
      const uint64_t nonsense[2] = {12345, 6789};
      CHECK_CUDA(cudaSetDevice(calls.ranks().device[r]));
      CHECK_CUDA(cudaMemcpy(calls.in_flight_[r], nonsense, sizeof nonsense, cudaMemcpyHostToDevice));
    }
    calls.Poison(false);
    for (int r = 0; r < 2; ++r) {  // not through Enter: the first rank has failed before the second is launched
      CHECK_CUDA(cudaSetDevice(calls.ranks().device[r]));
      CHECK_CUDA(calls.Combine(r, calls.ranks().stream[r], false, Half::kDone));
    }
    const bool told = !calls.Wait(), zero = calls.SumsAreZero("sums of nonsense");
    std::printf("done of nonsense: told %d, zero %d\n", told, zero);
    ok &= told && zero && CheckCase(c);
  }
  std::printf("%s\n", ok ? "TIMEOUT OK" : "TIMEOUT FAILED");
  return ok ? 0 : 1;
}

// µs a call of the slowest rank, over replays of a graph of kCalls calls.
struct Times {
  double p50 = 0, p99 = 0;
};

Times Time(Ranks& ranks, const std::function<cudaError_t(int, cudaStream_t)>& call) {
  constexpr int kCalls = 20, kReplays = 100, kFirst = 5;
  const size_t n = ranks.device.size();
  std::vector<cudaGraphExec_t> graph(n);
  std::vector<std::vector<cudaEvent_t>> events(n, std::vector<cudaEvent_t>(kReplays + 1));
  const auto each = [&](auto body) {
    for (size_t i = 0; i < n; ++i) {
      CHECK_CUDA(cudaSetDevice(ranks.device[i]));
      body(i);
    }
  };
  each([&](size_t i) {
    for (cudaEvent_t& event : events[i]) CHECK_CUDA(cudaEventCreate(&event));
    cudaGraph_t captured;
    CHECK_CUDA(cudaStreamBeginCapture(ranks.stream[i], cudaStreamCaptureModeThreadLocal));
    for (int k = 0; k < kCalls; ++k) CHECK_CUDA(call(static_cast<int>(i), ranks.stream[i]));
    CHECK_CUDA(cudaStreamEndCapture(ranks.stream[i], &captured));
    CHECK_CUDA(cudaGraphInstantiate(&graph[i], captured, 0));
    CHECK_CUDA(cudaGraphUpload(graph[i], ranks.stream[i]));
    CHECK_CUDA(cudaGraphDestroy(captured));
  });
  for (int replay = -kFirst; replay < kReplays; ++replay) {
    each([&](size_t i) {
      if (replay == 0) CHECK_CUDA(cudaEventRecord(events[i][0], ranks.stream[i]));
      CHECK_CUDA(cudaGraphLaunch(graph[i], ranks.stream[i]));
      if (replay >= 0) CHECK_CUDA(cudaEventRecord(events[i][replay + 1], ranks.stream[i]));
    });
  }
  if (!ranks.Wait()) return {-1, -1};
  std::vector<double> times(kReplays, 0);
  each([&](size_t i) {
    for (int replay = 0; replay < kReplays; ++replay) {
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, events[i][replay], events[i][replay + 1]));
      times[replay] = std::max(times[replay], ms * 1e3 / kCalls);
    }
    for (cudaEvent_t event : events[i]) CHECK_CUDA(cudaEventDestroy(event));
    CHECK_CUDA(cudaGraphExecDestroy(graph[i]));
  });
  std::sort(times.begin(), times.end());
  return {times[kReplays / 2], times[kReplays * 99 / 100]};
}

// Top-8 of 256 experts; layout "expert" has room for 1.25 times the expected rows.
Case DeepSeek(bool by_rank, int tokens, int hidden) {
  Case c{by_rank ? "rank" : "expert x1.25",
         std::max(g_num_devices, 2),
         tokens,
         8,
         256,
         Layout::kExpert,
         1,
         0,
         tokens * 10,
         RowDtype::kBfloat16,
         hidden};
  if (by_rank) c.layout = Layout::kRank, c.capacity = 0;
  c.invalid = 0;
  Finish(c);
  return c;
}

// low_latency bench [hidden [sms...]]
int Measure(int argc, char** argv) {
  const int hidden = argc > 2 ? std::atoi(argv[2]) : 7168;
  std::vector<int> all_sms;
  for (int i = 3; i < argc; ++i) all_sms.push_back(std::atoi(argv[i]));
  if (all_sms.empty()) all_sms = g_num_devices > 1 ? std::vector<int>{64, 132} : std::vector<int>{64};
  std::printf("%d ranks on %d GPUs, H %d, top-8 of 256, µs a call in a CUDA graph, p50/p99; floor: bf16 rows at 350 GB/s\n",
              std::max(g_num_devices, 2), g_num_devices, hidden);
  const char* names[] = {"dispatch", "cached", "notify", "fp8", "combine", "weighted", "logfmt", "weighted"};
  std::printf("%-14s %4s %4s", "layout", "T", "sms");
  for (const char* name : names) std::printf(" | %13s", name);
  std::printf(" | %7s\n", "floor");
  for (int tokens : {1, 8, 32, 64, 128, 256, 512}) {
    for (bool by_rank : {true, false}) {
      const Case c = DeepSeek(by_rank, tokens, hidden);
      Exchange calls(c);
      // The routing stands before combine is timed.
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
      if (!calls.Wait() || !calls.RowsAreRight(c.name.c_str()) || !calls.MakeEncoded(Wire::kFp8)) return 1;
      for (int sms : all_sms) {
        calls.set_num_sms(sms);
        const auto print = [&](const std::function<cudaError_t(int, cudaStream_t)>& call) {
          const Times times = Time(calls.ranks(), call);
          std::printf(" | %6.1f/%6.1f", times.p50, times.p99);
          std::fflush(stdout);
        };
        std::printf("%-14s %4d %4d", c.name.c_str(), tokens, sms);
        for (Operation operation : {kDispatch, kDispatchCached, kNotify}) {
          print([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, operation); });
        }
        print([&](int r, cudaStream_t s) { return calls.DispatchEncoded(r, s); });
        const auto sums = [&](const auto& combine) {
          print([&](int r, cudaStream_t s) { return combine(r, s, false); });
          if (by_rank) {
            std::printf(" | %13s", "");
          } else {
            print([&](int r, cudaStream_t s) { return combine(r, s, true); });
          }
        };
        sums([&](int r, cudaStream_t s, bool weighted) { return calls.Combine(r, s, weighted); });
        sums([&](int r, cudaStream_t s, bool weighted) { return calls.CombineLogfmt(r, s, weighted); });
        std::printf(" | %7.1f\n", calls.MostRowsSent() * double(c.row_bytes()) / 350e3);
      }
    }
  }
  return 0;
}

#ifdef JAX_EP_CLOCKS
// low_latency clocks [hidden [sms]]: when the blocks of a dispatch reach its moments, µs after the first one began, the
// last of some calls in a row: first, median and last block, on each GPU.
int Clocks(int argc, char** argv) {
  const int hidden = argc > 2 ? std::atoi(argv[2]) : 7168, sms = argc > 3 ? std::atoi(argv[3]) : 64;
  for (int tokens : {1, 8, 128}) {
    for (bool by_rank : {true, false}) {
      const Case c = DeepSeek(by_rank, tokens, hidden);
      Exchange calls(c);
      calls.OnAll([&](int r, cudaStream_t s) { return calls.Dispatch(r, s, kDispatch); });
      if (!calls.Wait() || !calls.MakeEncoded(Wire::kFp8)) return 1;
      calls.set_num_sms(sms);
      for (const char* what : {"dispatch", "dispatch_cached", "fp8"}) {
        calls.OnAll([&](int r, cudaStream_t s) {
          cudaError_t error = cudaSuccess;
          for (int i = 0; i < 30 && error == cudaSuccess; ++i) {
            error = what[0] == 'f' ? calls.DispatchEncoded(r, s)
                                   : calls.Dispatch(r, s, what[8] == '\0' ? kDispatch : kDispatchCached);
          }
          return error;
        });
        if (!calls.Wait()) return 1;
        std::printf("%s, %s, T %d, H %d, %d sms\n", what, c.name.c_str(), tokens, hidden, sms);
        for (int device = 0; device < g_num_devices; ++device) {
          static unsigned long long clocks[kClockBlocks][kNumMoments];
          CHECK_CUDA(cudaSetDevice(device));
          CHECK_CUDA(ReadDispatchClocks(&clocks[0][0]));
          unsigned long long begin = ~0ull;
          for (const auto& block : clocks) begin = block[0] != 0 ? std::min(begin, block[0]) : begin;
          std::printf("  GPU %d", device);
          for (int moment = 0; moment < kNumMoments; ++moment) {
            std::vector<double> times;
            for (const auto& block : clocks) {
              if (block[moment] >= begin) times.push_back((block[moment] - begin) * 1e-3);
            }
            std::sort(times.begin(), times.end());
            if (times.empty()) continue;
            std::printf(" | %s %.1f %.1f %.1f", kMomentNames[moment], times.front(), times[times.size() / 2],
                        times.back());
          }
          std::printf("\n");
        }
        std::fflush(stdout);
      }
    }
  }
  return 0;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  CHECK_CUDA(cudaGetDeviceCount(&g_num_devices));
  const std::string what = argc > 1 ? argv[1] : "";
  Group::SetTimeout(what == "small" ? 60 : 4);
  int result = 1;
  if (what == "check") result = Check(argc, argv);
  if (what == "small") result = Small();
  if (what == "timeout") result = Timeout();
  if (what == "masked") result = Masked();
  if (what == "bench") result = Measure(argc, argv);
#ifdef JAX_EP_CLOCKS
  if (what == "clocks") result = Clocks(argc, argv);
#endif
  std::fflush(stdout);
  return result;
}
