// The kernels of ffi/halves/ without XLA, as kernels.cu does it for whole calls: oracle.h says what they must give.
//
//   halves check [seed count]   named and random cases, bitwise: calls one after another, two in flight ended in both
//                               orders, dispatch and combine in flight together, work of one rank between the halves
//   halves small                a few small cases, for compute-sanitizer
//   halves masked               masked ranks do not call, or do: the others get what the oracle says
//   halves timeout              a rank does not call, or starts too often: an error, zeros, and right calls later
//   halves bench                µs of a start, a done, both, and both with work between them: the hidden share
//
// nvcc -O3 -std=c++17 -Iffi -gencode arch=compute_90a,code=sm_90a -o halves tests/gpu/kernels/halves.cu
//   ffi/halves/*.cu ffi/halves/push.cc ffi/low_latency/*.cu ffi/dispatch/dispatch.cu ffi/combine/*.cu
//   ffi/group/barrier.cu ffi/group/group.cc
#include <algorithm>
#include <chrono>
#include <functional>
#include <utility>

#include "halves/halves.h"
#include "ranks.h"

using namespace jax_ep;

namespace {

// Something else for the multiprocessors to do: many short blocks, as of a matrix product.
__global__ void WorkKernel(int rounds, float* sink) {
  float a = threadIdx.x, b = blockIdx.x;
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) a = fmaf(a, 1.0001f, b);
  }
  if (a == 12345.f) *sink = a;
}

// One case: its operands, expected results, and halves of both operations on all ranks. The routing is the oracle's.
class Exchange {
 public:
  using Words = std::vector<uint64_t*>;

  explicit Exchange(Case c) : c_(c), R(c.num_ranks), ranks_(Ranks::Of(c.num_ranks)), routing_(Route(c)) {
    std::mt19937 random(c.seed + 77);
    std::uniform_real_distribution<float> uniform(-1, 1);
    const int64_t per_row = c.layout == Layout::kRank ? c.num_topk : 1;
    for (int r = 0; r < R; ++r) {
      x_.push_back(RandomRows(c, c.num_tokens, random));
      y_.push_back(RandomRows(c, c.capacity, random));
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
      d.operation = kDispatchCached;
      d.slot = memory.Put(routing_[r].slot);
      d.recv_slot = memory.Put(routing_[r].recv_slot);
      d.counts = memory.Put(routing_[r].counts);
      d.rows[0].x = memory.Put(x_[r]);
      d.rows[1].x = memory.Put(second_[r]);
      if (c.weights) d.topk_weights = memory.Put(weights_[r]);
      CombineParams& b = arrays_[r].combine;
      b.slot = d.slot, b.recv_slot = d.recv_slot;
      b.y = memory.Put(y_[r]);
      // Cases without gates carry nothing back either: then no pointer may be looked at.
      if (c.weights) b.carried = memory.Put(carried_[r]);
      if (!c.weights) b.carried_back = nullptr;
      gates_device_.push_back(memory.Put(gates_[r]));
      sink_.push_back(memory.Make<float>(1, 0));
    }
    dispatch_bytes_ = DispatchLandingBytes(arrays_[0].dispatch, R);
    combine_bytes_ = CombineLandingBytes(arrays_[0].combine, R);
    if (!fits()) return;
    for (int64_t bytes : {dispatch_bytes_, combine_bytes_})
      ranks_.group.MakeSharedArena(Purpose::kHalves, Group::LandingArenaBytes(bytes));
    Settle();
    Mask(c.dead);
  }
  ~Exchange() { Mask(0); }

  // From now on these ranks take no part; the routing stays what is left of it.
  void Mask(uint32_t dead) {
    c_.dead = dead;
    routing_ = Masked(c_, routing_);
    for (auto& sums : sums_) sums.clear();
    Ranks::Mask(dead);
    ranks_.absent = dead;
  }
  // Whether masked ranks call.
  void LetMaskedCall() { ranks_.absent = 0; }

  bool fits() const { return dispatch_bytes_ > 0 && combine_bytes_ > 0; }
  Ranks& ranks() { return ranks_; }
  HalvesConfig config;

  cudaError_t DispatchStart(int r, cudaStream_t stream, const Words& words) {
    return Start(r, stream, words, dispatch_bytes_, [&](const HalfParams& half, const Fork& fork) {
      return LaunchDispatchStart(arrays_[r].dispatch, half, fork, config, stream);
    });
  }
  cudaError_t CombineStart(int r, cudaStream_t stream, const Words& words, bool weighted) {
    CombineParams b = arrays_[r].combine;
    b.weights = weighted ? gates_device_[r] : nullptr;
    return Start(r, stream, words, combine_bytes_, [&](const HalfParams& half, const Fork& fork) {
      return LaunchCombineStart(b, half, fork, config, stream);
    });
  }
  cudaError_t DispatchDone(int r, cudaStream_t stream, const Words& words) {
    const HalfParams half{ranks_.group.landings(r, dispatch_bytes_), words[r]};
    return LaunchDispatchDone(arrays_[r].dispatch, half, config, stream);
  }
  cudaError_t CombineDone(int r, cudaStream_t stream, const Words& words) {
    const HalfParams half{ranks_.group.landings(r, combine_bytes_), words[r]};
    return LaunchCombineDone(arrays_[r].combine, half, config, stream);
  }
  cudaError_t Work(int r, cudaStream_t stream, int rounds) {
    WorkKernel<<<1056, 256, 0, stream>>>(rounds, sink_[r]);
    return cudaGetLastError();
  }

  template <class F>
  void OnAll(F call) {
    ranks_.Launch([&](int r, cudaStream_t stream) { return call(r, stream); });
  }
  bool Wait() { return ranks_.Wait(); }

  void Poison() {
    for (int r = 0; r < R; ++r) {
      const Arrays& a = arrays_[r];
      const int64_t per_row = c_.layout == Layout::kRank ? c_.num_topk : 1;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      CHECK_CUDA(cudaMemset(a.dispatch.rows[0].recv, 0xab, c_.capacity * c_.row_bytes()));
      if (c_.second_bytes > 0) CHECK_CUDA(cudaMemset(a.dispatch.rows[1].recv, 0xab, c_.capacity * c_.second_bytes));
      if (c_.weights) CHECK_CUDA(cudaMemset(a.dispatch.recv_weights, 0xab, c_.capacity * per_row * 4));
      CHECK_CUDA(cudaMemset(a.combine.out, 0xab, c_.num_tokens * c_.row_bytes()));
      if (c_.weights) CHECK_CUDA(cudaMemset(a.combine.carried_back, 0xab, c_.choices() * 4));
    }
    Settle();
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
  bool SumsAreRight(const char* what, bool weighted) {
    if (sums_[weighted].empty()) {
      for (int r = 0; r < R; ++r)
        sums_[weighted].push_back(Combined(c_, routing_, r, y_, weighted ? &gates_ : nullptr));
    }
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same(what, r, arrays_[r].combine.out, sums_[weighted][r], c_.row_bytes());
      if (!c_.weights) continue;
      ok &= Same((std::string(what) + ": carried back").c_str(), r, arrays_[r].combine.carried_back,
                 CarriedBack(c_, routing_, r, carried_));
    }
    return ok;
  }
  bool RowsAreZero(const char* what, int except = -1) {
    return AreZero(what, except, c_.capacity * c_.row_bytes(), [&](int r) { return arrays_[r].dispatch.rows[0].recv; });
  }
  bool SumsAreZero(const char* what, int except = -1) {
    return AreZero(what, except, c_.num_tokens * c_.row_bytes(), [&](int r) { return arrays_[r].combine.out; });
  }

  // A value in flight for the calls that follow: of no call yet.
  Words NewWords() {
    Words words;
    for (int r = 0; r < R; ++r) words.push_back(memory_[r]->Make<uint64_t>(2, 0));
    Settle();
    return words;
  }

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
  template <class Launch>
  cudaError_t Start(int r, cudaStream_t stream, const Words& words, int64_t bytes, Launch launch) {
    Fork fork{};
    if (cudaError_t error = ranks_.group.MakeFork(r, bytes, stream, &fork); error != cudaSuccess) return error;
    return launch({ranks_.group.landings(r, bytes), words[r]}, fork);
  }
  template <class F>
  bool AreZero(const char* what, int except, int64_t num_bytes, F array) {
    bool ok = true;
    for (int r = 0; r < R; ++r) {
      if (r == except || ranks_.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks_.device[r]));
      ok &= Same(what, r, array(r), std::vector<char>(num_bytes, 0));
    }
    return ok;
  }

  Case c_;
  int R;
  Ranks& ranks_;
  std::vector<RankRouting> routing_;
  std::vector<std::vector<char>> x_, second_, y_, sums_[2];
  std::vector<std::vector<float>> weights_, gates_, carried_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<Arrays> arrays_;
  std::vector<const float*> gates_device_;
  std::vector<float*> sink_;
  int64_t dispatch_bytes_ = 0, combine_bytes_ = 0;
};

bool CheckCase(Case c, bool masked_call = false) {
  Finish(c);
  Exchange calls(c);
  if (masked_call) calls.LetMaskedCall();
  if (!calls.fits()) {
    std::printf("%-40s does not fit\n", c.name.c_str());
    return false;
  }
  calls.config.num_sms = c.num_sms;
  const bool weighs = c.layout != Layout::kRank;
  const auto first = calls.NewWords(), second = calls.NewWords(), third = calls.NewWords();
  bool ok = true;
  for (int repeat = 0; repeat < kDepth + 2 && ok; ++repeat) {  // more often than there are windows
    calls.Poison();
    calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchStart(r, s, first); });
    // One rank is late: the others' pushes wait for nothing of it, their dones do.
    calls.OnAll([&](int r, cudaStream_t s) { return r == 0 ? calls.Work(r, s, 200) : cudaSuccess; });
    calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, first); });
    ok &= calls.Wait() && calls.RowsAreRight("dispatch");
    const bool weighted = weighs && repeat % 2 == 1;
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, first, weighted); });
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, first); });
    ok &= calls.Wait() && calls.SumsAreRight("combine", weighted);
  }
  // Two of each kind in flight, ended in both orders.
  for (bool swapped : {false, true}) {
    for (const auto& words : {first, second})
      calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchStart(r, s, words); });
    for (const auto& words : {swapped ? second : first, swapped ? first : second}) {
      calls.Poison();
      calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, words); });
      ok &= calls.Wait() && calls.RowsAreRight("dispatch_done");
    }
    for (bool one : {false, true})
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, one ? second : first, one && weighs); });
    for (bool one : {swapped, !swapped}) {
      calls.Poison();
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, one ? second : first); });
      ok &= calls.Wait() && calls.SumsAreRight("combine_done", one && weighs);
    }
  }
  const auto nothing = calls.NewWords();
  calls.Poison();
  calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, nothing); });
  calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, nothing); });
  ok &= calls.Wait() && calls.RowsAreZero("done of nothing") && calls.SumsAreZero("done of nothing");
  // A layer of two batches, without anything in between that would keep the ranks together.
  calls.Poison();
  for (int repeat = 0; repeat < 10; ++repeat) {
    calls.OnAll([&](int r, cudaStream_t s) {
      cudaError_t error = calls.DispatchStart(r, s, first);
      if (error == cudaSuccess) error = calls.DispatchDone(r, s, first);
      if (error == cudaSuccess) error = calls.CombineStart(r, s, first, false);
      if (error == cudaSuccess) error = calls.DispatchStart(r, s, second);
      if (error == cudaSuccess) error = calls.DispatchDone(r, s, second);
      if (error == cudaSuccess) error = calls.CombineDone(r, s, first);
      if (error == cudaSuccess) error = calls.CombineStart(r, s, third, false);
      if (error == cudaSuccess) error = calls.CombineDone(r, s, third);
      return error;
    });
  }
  ok &= calls.Wait() && calls.RowsAreRight("run") && calls.SumsAreRight("run", false);
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
      {"batched, drops, no gates", R, 33, 2, 2 * R, Layout::kBatched, 1, 9 * R, 0, bf16, 256, 12, false},
      {"tiny rows, all to expert 0", R, 70, 2, 2 * R, Layout::kExpert, 8, 0, 0, RowDtype::kFloat32, 4, 0, true, 0.9},
      {"long rows", R, 19, 2, 2 * R, Layout::kExpert, 4, 0, 0, bf16, 20000},
      {"more tokens than chunks", R, 700, 2, 2 * R, Layout::kRank, 1, 0, 0, bf16, 64},
      {"nobody chooses anything", R, 9, 2, 2 * R, Layout::kExpert, 4, 0, 20, bf16, 64, 0, true, 0, 1},
  };
  for (Case& c : cases) c.num_sms = 3;
  return cases;
}

// Calls of a routing from before the mask.
bool CheckMaskedLate(Case c) {
  Finish(c);
  const uint32_t dead = std::exchange(c.dead, 0);
  Exchange calls(c);
  calls.config.num_sms = c.num_sms;
  const auto words = calls.NewWords();
  calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchStart(r, s, words); });
  calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, words); });
  bool ok = calls.Wait() && calls.RowsAreRight("before");
  // A start from before the mask is lost, and its done says so.
  calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, words, false); });
  ok &= calls.Wait();
  calls.Settle();
  calls.Mask(dead);
  calls.Poison();
  calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, words); });
  const bool told = !calls.Wait();
  ok &= told && calls.SumsAreZero("done of a start from before the mask");
  for (int repeat = 0; repeat < 4 && ok; ++repeat) {
    const bool weighted = repeat % 2 != 0 && c.layout != Layout::kRank;
    calls.Poison();
    calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchStart(r, s, words); });
    calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, words); });
    ok &= calls.Wait() && calls.RowsAreRight("dispatch, masked late");
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, words, weighted); });
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, words); });
    ok &= calls.Wait() && calls.SumsAreRight("combine, masked late", weighted);
  }
  std::printf("%-44s R %d masked %u: told %d, %s\n", c.name.c_str(), c.num_ranks, dead, told, ok ? "ok" : "FAILED");
  return ok;
}

Case RandomCase(std::mt19937& random) {
  const auto pick = [&](std::vector<int> values) { return values[random() % values.size()]; };
  Case c;
  c.name = "random";
  c.num_ranks = pick({1, 2, 2, 3, 4, 4, 5, 8});
  c.num_tokens = pick({1, 2, 3, 7, 31, 64, 128, 200, 513, 1000});
  c.num_topk = pick({1, 2, 3, 4, 6, 8, 8, 16, 32});
  c.num_experts = c.num_ranks * pick({1, 2, 3, 8, 32, 64, 128});
  while (c.num_experts < c.num_topk) c.num_experts *= 2;
  c.layout = static_cast<Layout>(pick({0, 0, 1, 2}));
  c.alignment = pick({1, 1, 8, 64});
  c.expert_capacity = c.layout == Layout::kBatched ? pick({1, 5, 64}) : 0;
  c.capacity = c.layout == Layout::kBatched ? 0 : pick({0, 1, 100, 1000});
  c.dtype = static_cast<RowDtype>(pick({0, 0, 1, 2}));
  c.hidden = 8 * pick({1, 1, 3, 15, 16, 64, 100, 360, 896, 1500});
  if (int64_t(c.num_ranks) * c.num_tokens * c.num_topk * c.hidden > 16 << 20) c.hidden = 64;
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
  // Ranks that share a GPU need room for each other's kernels, and copies within it may be kernels.
  const int sms = g_num_devices < R ? 40 : 132;
  Case models[] = {
      {"DeepSeek-V3 expert", R, 512, 8, 256, Layout::kExpert, 128, 0, 0, bf16, 7168, 0, true, 0, 0, sms},
      {"DeepSeek-V3 rank", R, 512, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, sms},
      {"DeepSeek-V3 fp8-sized", R, 512, 8, 256, Layout::kExpert, 1, 0, 5120, bf16, 3584, 224, true, 0, 0, sms},
      {"several pieces", R, 1200, 2, 4 * R, Layout::kExpert, 1, 0, 0, bf16, 7168, 0, true, 0, 0, sms},
      {"two windows, several pieces", R, 4096, 2, 4 * R, Layout::kRank, 1, 0, 0, bf16, 7168, 24, true, 0, 0, sms},
      {"GPT-OSS batched", R, 256, 4, 128, Layout::kBatched, 1, 128, 0, bf16, 2880, 0, true, 0, 0.02, sms},
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
      for (const char* how : {"never starts", "starts too late", "starts too late, more calls queued"}) {
        Exchange calls(c);
        Ranks& ranks = calls.ranks();
        const auto words = calls.NewWords(), others = calls.NewWords();
        calls.Poison();
        const auto launch = [&](int r, const Exchange::Words& words) {
          CHECK_CUDA(cudaSetDevice(ranks.device[r]));
          const cudaStream_t stream = ranks.stream[r];
          CHECK_CUDA(combines ? calls.CombineStart(r, stream, words, true) : calls.DispatchStart(r, stream, words));
          CHECK_CUDA(combines ? calls.CombineDone(r, stream, words) : calls.DispatchDone(r, stream, words));
        };
        const bool queued = std::string(how).find("queued") != std::string::npos;
        const bool never = std::string(how) == "never starts";
        launch(1 - missing, words);
        if (queued) launch(1 - missing, others);  // of the same generation: must not meet the late rank's first call
        if (!never) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          launch(missing, words);
        }
        const bool told = !calls.Wait();
        const bool zero = combines ? calls.SumsAreZero("sums after a timeout", never ? missing : -1)
                                   : calls.RowsAreZero("rows after a timeout", never ? missing : -1);
        std::printf("rank %d %s (%s): told %d, zero %d\n", missing, how, combines ? "combine" : "dispatch", told, zero);
        ok &= told && zero && CheckCase(c);
      }
    }
  }
  {
    Exchange calls(c);
    const auto words = calls.NewWords();
    Group::SetTimeout(20);
    for (int i = 0; i < kDepth; ++i) {
      calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, words, false); });
    }
    ok &= calls.Wait();
    const auto begin = std::chrono::steady_clock::now();
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineStart(r, s, words, false); });
    const bool told = !calls.Wait() && calls.ranks().failure.find("began a call while") != std::string::npos;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("a start too many: told %d, after %.2f s\n", told, seconds);
    Group::SetTimeout(0.5);
    ok &= told && seconds < 5 && CheckCase(c);
  }
  {
    Exchange calls(c);
    const auto words = calls.NewWords();
    for (int r = 0; r < 2; ++r) {
      const uint64_t nonsense[2] = {12345, 6789};
      CHECK_CUDA(cudaSetDevice(calls.ranks().device[r]));
      CHECK_CUDA(cudaMemcpy(words[r], nonsense, sizeof nonsense, cudaMemcpyHostToDevice));
    }
    calls.Poison();
    calls.OnAll([&](int r, cudaStream_t s) { return calls.CombineDone(r, s, words); });
    const bool told = !calls.Wait(), zero = calls.SumsAreZero("sums of nonsense");
    std::printf("done of nonsense: told %d, zero %d\n", told, zero);
    ok &= told && zero && CheckCase(c);
  }
  std::printf("%s\n", ok ? "TIMEOUT OK" : "TIMEOUT FAILED");
  return ok ? 0 : 1;
}

// µs a call of the slowest rank, median over repeats of kCalls calls in a row.
double Time(Ranks& ranks, const std::function<cudaError_t(int, cudaStream_t)>& call) {
  constexpr int kCalls = 20, kRepeats = 7;
  const size_t n = ranks.device.size();
  std::vector<cudaEvent_t> begin(n), end(n);
  for (size_t i = 0; i < n; ++i) {
    CHECK_CUDA(cudaSetDevice(ranks.device[i]));
    CHECK_CUDA(cudaEventCreate(&begin[i]));
    CHECK_CUDA(cudaEventCreate(&end[i]));
  }
  std::vector<double> times;
  for (int repeat = 0; repeat < kRepeats + 1; ++repeat) {
    ranks.Launch([&](int r, cudaStream_t stream) {
      for (int k = 0; k < 3; ++k) {
        if (cudaError_t error = call(r, stream); error != cudaSuccess) return error;
      }
      CHECK_CUDA(cudaEventRecord(begin[r], stream));
      for (int k = 0; k < kCalls; ++k) {
        if (cudaError_t error = call(r, stream); error != cudaSuccess) return error;
      }
      return cudaEventRecord(end[r], stream);
    });
    if (!ranks.Wait()) return -1;
    double slowest = 0;
    for (size_t i = 0; i < n; ++i) {
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, begin[i], end[i]));
      slowest = std::max(slowest, ms * 1e3 / kCalls);
    }
    if (repeat > 0) times.push_back(slowest);
  }
  for (size_t i = 0; i < n; ++i) {
    CHECK_CUDA(cudaEventDestroy(begin[i]));
    CHECK_CUDA(cudaEventDestroy(end[i]));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int Measure() {
  if (g_num_devices < 2) return std::printf("bench needs two GPUs\n"), 1;
  const auto bf16 = RowDtype::kBfloat16;
  std::printf(
      "%d GPUs, H 7168, top-8 of 256, µs; wire: rows at 350 GB/s; work: a kernel of its own between the halves\n",
      g_num_devices);
  std::printf("%-14s %5s | %8s %8s %8s %8s %8s | %7s\n", "case", "T", "both", "left", "work", "with", "wire", "hidden");
  for (int tokens : {4096, 1024, 128}) {
    for (const char* name : {"expert x1.25", "rank"}) {
      Case c{name, g_num_devices, tokens, 8, 256, Layout::kExpert, 1, 0, tokens * 10, bf16, 7168};
      if (std::string(name) == "rank") c.layout = Layout::kRank, c.capacity = 0;
      c.invalid = 0;
      Finish(c);
      Exchange calls(c);
      if (!calls.fits()) return std::printf("does not fit\n"), 1;
      const auto words = calls.NewWords();
      calls.Poison();
      calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchStart(r, s, words); });
      calls.OnAll([&](int r, cudaStream_t s) { return calls.DispatchDone(r, s, words); });
      if (!calls.Wait() || !calls.RowsAreRight(name)) return 1;
      for (bool combines : {false, true}) {
        const auto start = [&](int r, cudaStream_t s) {
          return combines ? calls.CombineStart(r, s, words, c.layout != Layout::kRank)
                          : calls.DispatchStart(r, s, words);
        };
        const auto done = [&](int r, cudaStream_t s) {
          return combines ? calls.CombineDone(r, s, words) : calls.DispatchDone(r, s, words);
        };
        const auto time = [&](int rounds, bool exchange) {
          return Time(calls.ranks(), [&](int r, cudaStream_t s) {
            cudaError_t error = exchange ? start(r, s) : cudaSuccess;
            if (error == cudaSuccess && rounds > 0) error = calls.Work(r, s, rounds);
            if (error == cudaSuccess && exchange) error = done(r, s);
            return error;
          });
        };
        const double both = time(0, true);
        const int rounds = std::max(1, static_cast<int>(2 * both / (time(100, false) / 100)));
        const double work = time(rounds, false), with = time(rounds, true);
        const double wire = calls.MostRowsSent() * double(c.row_bytes()) / 350e3;
        // What start and done themselves take of the stream is what work cannot hide.
        std::printf("%-14s %5d | %8.1f %8.1f %8.1f %8.1f %8.1f | %7.2f  %s\n", name, tokens, both, with - work, work,
                    with, wire, 1 - (with - work) / both, combines ? "combine" : "dispatch");
        std::fflush(stdout);
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  CHECK_CUDA(cudaGetDeviceCount(&g_num_devices));
  const std::string what = argc > 1 ? argv[1] : "";
  Group::SetTimeout(what == "small" ? 60 : 4);
  int result = 1;
  if (what == "check") result = Check(argc, argv);
  if (what == "small") result = Small();
  if (what == "masked") result = Masked();
  if (what == "timeout") result = Timeout();
  if (what == "bench") result = Measure();
  std::fflush(stdout);
  return result;
}
