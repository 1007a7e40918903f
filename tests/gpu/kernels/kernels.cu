// The kernels without XLA: every rank a stream of this process, several ranks on one GPU where there are fewer GPUs
// than ranks.
//
//   kernels check [seed count]         named and random cases against oracle.h, bitwise, each call twice
//   kernels small                      a few small cases, for compute-sanitizer
//   kernels timeout                    one rank does not call: the others must say so, and later calls must be right
//   kernels masked                     masked ranks do not call, or do: the others get what the oracle says
//   kernels burst [how]                dispatches queued behind each other at a benchmark's sizes: do they end?
//
// nvcc -O3 -std=c++17 -Iffi -gencode arch=compute_90a,code=sm_90a -o kernels tests/gpu/kernels/kernels.cu
//   ffi/dispatch/dispatch.cu ffi/combine/*.cu ffi/low_latency/*.cu ffi/halves/*.cu ffi/halves/push.cc
//   ffi/group/barrier.cu ffi/group/group.cc
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "check.h"
#include "group/barrier.h"
#include "group/group.h"

using namespace jax_ep;

namespace jax_ep {

struct NvlinkCalls {
  static constexpr bool kOverNodes = false;

  bool Fits(const Arrays& arrays, const Case& c) const {
    return DispatchFits(arrays.dispatch, c.num_ranks) && CombineFits(arrays.combine, c.num_ranks) &&
           (c.layout == Layout::kRank || CombineGradFits(arrays.grad, c.num_ranks));
  }
  cudaError_t Dispatch(int, const DispatchParams& params, const Case& c, cudaStream_t stream) const {
    DispatchConfig config;
    config.num_sms = c.num_sms, config.num_send_blocks = c.num_send_blocks;
    config.pulls = c.pulls;
    return LaunchDispatch(params, c.num_ranks, config, stream);
  }
  cudaError_t Combine(int, const CombineParams& params, const Case& c, cudaStream_t stream) const {
    return LaunchCombine(params, Config(c), stream);
  }
  cudaError_t CombineGrad(const CombineGradParams& params, const Case& c, cudaStream_t stream) const {
    return LaunchCombineGrad(params, Config(c), stream);
  }
  cudaError_t Barrier(const GroupView* view, int, int32_t* came, cudaStream_t stream) const {
    return LaunchBarrier(view, false, came, stream);
  }
  static CombineConfig Config(const Case& c) {
    CombineConfig config;
    config.stream_from_tokens = c.num_tokens % 2 == 0 ? 0 : c.num_tokens + 1;  // both ways have their cases
    config.num_sms = c.num_sms;
    return config;
  }
};

}  // namespace jax_ep

namespace {

bool CheckCase(const Case& c, int stride = 1, Mask mask = Mask::kBefore) {
  return CheckCalls(c, Ranks::Of(c.num_ranks), NvlinkCalls{}, stride, mask);
}

int Check(int argc, char** argv) {
  bool ok = true;
  for (int R : {1, 2, 3, 4, 8}) {
    for (const Case& c : SmallCases(R)) ok &= CheckCase(c);
  }
  const auto bf16 = RowDtype::kBfloat16;
  Case models[] = {
      {"DeepSeek-V3 expert", 2, 4096, 8, 256, Layout::kExpert, 128, 0, 40960, bf16, 7168, 0, true, 0, 0, 24, 12},
      {"DeepSeek-V3 rank", 2, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, 24, 12},
      // As many send blocks as a call takes by itself: more lanes than a warp has, too.
      {"DeepSeek-V3 rank, 24 SMs", 2, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, 24, 0},
      {"DeepSeek-V3 rank, 64 SMs", 2, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, 64, 0},
      {"DeepSeek-V3 rank, fp8-sized", 2, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 3584, 224, true, 0, 0, 24, 0},
      {"short rows, uneven lanes", 2, 1003, 6, 48, Layout::kRank, 1, 0, 1500, bf16, 264, 0, true, 0.2, 0.05, 40, 0},
      {"GPT-OSS batched, four ranks", 4, 1024, 4, 128, Layout::kBatched, 1, 256, 0, bf16, 2880, 0, true, 0, 0.02, 24,
       12},
  };
  for (Case& c : models) {
    ok &= CheckCase(c, 37);
    if (c.layout != Layout::kRank) continue;
    for (c.pulls = 0; c.pulls < 2; ++c.pulls) ok &= CheckCase(c, 37);
  }
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

// A rank that does not call is told, then masked: the others go on.
bool GoOnWithout() {
  Case c{"after a failure, masked", 3, 100, 4, 24, Layout::kExpert, 8, 0, 0, RowDtype::kBfloat16, 512};
  Ranks& ranks = Ranks::Of(3);
  bool ok = CheckCase(c);
  ranks.absent = 2;
  ranks.Launch([&](int r, cudaStream_t stream) {
    static Memory memory(ranks.device[r]);
    return LaunchBarrier(ranks.group.view(r), false, memory.Make<int32_t>(1, 0), stream);
  });
  const bool told = !ranks.Wait() && ranks.failure.find("waited for rank 1") != std::string::npos;
  std::printf("rank 1 never calls: told %d\n", told);
  c.dead = 2;
  for (int repeat = 0; repeat < 3; ++repeat) ok &= told && CheckCase(c);
  c.dead = 0;
  ok &= CheckCase(c);
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
        for (Mask mask : {Mask::kBefore, Mask::kBeforeAndCalling, Mask::kAfterDispatch}) ok &= CheckCase(c, 1, mask);
      }
      ok &= CheckCase(SmallCases(R)[0]);  // all together again
    }
  }
  Group::SetTimeout(1.5);
  ok &= GoOnWithout();
  std::printf("%s\n", ok ? "MASKED OK" : "MASKED FAILED");
  return ok ? 0 : 1;
}

// A rank's dispatch of a case, with rows and gates of whatever numbers.
DispatchParams MakeDispatch(const Case& c, Memory& memory, const GroupView* view, const RankRouting& routing) {
  DispatchParams d = MakeArrays(c, memory, view, false).dispatch;
  d.topk_idx = memory.Put(routing.topk_idx);
  d.topk_weights = memory.Make<float>(c.choices(), 0x3c);
  d.rows[0].x = memory.Make<char>(c.num_tokens * c.row_bytes(), 1);
  if (c.second_bytes > 0) d.rows[1].x = memory.Make<char>(c.num_tokens * c.second_bytes, 1);
  return d;
}

// Says what it begins before it begins, so that of a rank that does not go on the last words name the call.
int Burst(const std::string& asked) {
  constexpr int kCalls = 23;
  bool ok = true;
  for (const char* how : {"one array", "two arrays", "two arrays, cached", "encoded"}) {
    if (!asked.empty() && asked != how) continue;
    for (Layout layout : {Layout::kRank, Layout::kExpert}) {
      for (int send_blocks : {16, 12}) {
        const bool two = std::string(how).find("two") == 0, encodes = std::string(how) == "encoded";
        Case c{how, 2, 4096, 8, 256, layout, 1, 0, layout == Layout::kRank ? 0 : 40960, RowDtype::kBfloat16, 7168};
        if (two) c.hidden = 3584, c.second_bytes = 224;
        Finish(c);
        Ranks& ranks = Ranks::Of(2);
        const auto routing = Route(c);
        std::vector<std::unique_ptr<Memory>> memory;
        std::vector<DispatchParams> calls;
        for (int r = 0; r < 2; ++r) {
          memory.push_back(std::make_unique<Memory>(ranks.device[r]));
          Memory& of = *memory[r];
          DispatchParams d = MakeDispatch(c, of, ranks.group.view(r), routing[r]);
          if (encodes) {
            d.encoding = {d.rows[0].x, c.dtype, static_cast<int>(Wire::kFp8), static_cast<int>(c.hidden)};
            d.num_row_arrays = 2;
            for (int i = 0; i < 2; ++i) {
              const int64_t bytes = i == 0 ? c.hidden : c.hidden / 32;
              d.rows[i] = {nullptr, of.Make<char>(c.capacity * bytes, 0), bytes};
            }
          }
          CHECK_CUDA(cudaDeviceSynchronize());
          calls.push_back(d);
        }
        std::printf("%d dispatches, %s, %s, %d send blocks: ", kCalls, how, layout == Layout::kRank ? "rank" : "expert",
                    send_blocks);
        std::fflush(stdout);
        const DispatchConfig config{24, send_blocks};
        ranks.Launch([&](int r, cudaStream_t stream) {
          cudaError_t error = LaunchDispatch(calls[r], 2, config, stream);  // the routing that cached ones follow
          DispatchParams d = calls[r];
          if (std::string(how).find("cached") != std::string::npos) d.operation = kDispatchCached, d.topk_idx = nullptr;
          for (int i = 1; i < kCalls && error == cudaSuccess; ++i) error = LaunchDispatch(d, 2, config, stream);
          return error;
        });
        const bool ended = ranks.Wait(30);
        std::printf("%s\n", ended ? "ok" : "FAILED");
        ok &= ended;
      }
    }
  }
  std::printf("%s\n", ok ? "BURST OK" : "BURST FAILED");
  return ok ? 0 : 1;
}

// The calls of a generation are used up: that is told, and the next begins.
bool CheckLastCalls(const Case& c) {
  Ranks& ranks = Ranks::Of(2);
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<int32_t*> came;
  for (int r = 0; r < 2; ++r) {
    GroupView view;
    memory.push_back(std::make_unique<Memory>(ranks.device[r]));
    came.push_back(memory[r]->Make<int32_t>(1, 0));
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(&view, ranks.group.view(r), sizeof view, cudaMemcpyDeviceToHost));
    uint64_t epoch;
    CHECK_CUDA(cudaMemcpy(&epoch, &view.window[r]->epoch, sizeof epoch, cudaMemcpyDeviceToHost));
    epoch = (epoch & ~kMaxCount) + kMaxCount - 3;
    CHECK_CUDA(cudaMemcpy(&view.window[r]->epoch, &epoch, sizeof epoch, cudaMemcpyHostToDevice));
  }
  bool ok = true;
  for (int call = 0; call < 5 && ok; ++call) {
    ranks.Launch([&](int r, cudaStream_t s) { return LaunchBarrier(ranks.group.view(r), false, came[r], s); });
    const bool last = call == 2;
    ok &= ranks.Wait() != last;
    if (last) ok &= ranks.failure.find("has counted 17179869183 calls") != std::string::npos;
  }
  std::printf("the last calls of a generation: %s\n", ok ? "told" : "NOT TOLD");
  return ok && CheckCase(c);
}

// A rank that calls while the other gives up on it: both have their rows or both have zeros, and into the results of
// the one that has ended nothing is written any more.
bool CheckAtDeadline(Layout layout, int pulls) {
  using namespace std::chrono;
  constexpr int kTries = 120;
  constexpr auto kDeadline = microseconds(20000), kAround = microseconds(300);
  Case c{"at the deadline", 2, 100, 4, 16, layout, 1, 0, 0, RowDtype::kBfloat16, 512};
  Finish(c);
  Ranks& ranks = Ranks::Of(2);
  const auto routing = Route(c);
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<DispatchParams> calls;
  for (int r = 0; r < 2; ++r) {
    memory.push_back(std::make_unique<Memory>(ranks.device[r]));
    calls.push_back(MakeDispatch(c, *memory[r], ranks.group.view(r), routing[r]));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  const int64_t row_bytes = c.capacity * c.row_bytes();
  const auto launch = [&](int r) {
    DispatchConfig config{8, 4};
    config.pulls = pulls;
    CHECK_CUDA(cudaSetDevice(ranks.device[r]));
    CHECK_CUDA(LaunchDispatch(calls[r], 2, config, ranks.stream[r]));
  };
  const auto rows_of = [&](int r) {
    std::vector<char> rows(row_bytes);
    CHECK_CUDA(cudaSetDevice(ranks.device[r]));
    CHECK_CUDA(cudaMemcpy(rows.data(), calls[r].rows[0].recv, row_bytes, cudaMemcpyDeviceToHost));
    return rows;
  };
  Group::SetTimeout(duration<double>(kDeadline).count());
  ranks.tells = false;
  bool ok = true;
  int met = 0;
  for (int i = 0; i < kTries && ok; ++i) {
    const int late = i % 2, early = 1 - late;
    ++ranks.run;
    for (int r = 0; r < 2; ++r) {
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      CHECK_CUDA(ranks.Enter(r));
      CHECK_CUDA(cudaMemsetAsync(calls[r].rows[0].recv, 0xab, row_bytes, ranks.stream[r]));
      CHECK_CUDA(cudaStreamSynchronize(ranks.stream[r]));
    }
    launch(early);
    const auto until = steady_clock::now() + kDeadline - kAround + 2 * kAround * i / kTries;
    while (steady_clock::now() < until) continue;
    launch(late);
    CHECK_CUDA(cudaSetDevice(ranks.device[early]));
    CHECK_CUDA(cudaStreamSynchronize(ranks.stream[early]));
    const std::vector<char> then = rows_of(early);
    const bool came = ranks.Wait(30);
    met += came;
    ok &= rows_of(early) == then;
    const std::vector<char> zeros(row_bytes, 0);
    for (int r = 0; r < 2 && !came; ++r) ok &= rows_of(r) == zeros;
  }
  ranks.tells = true;
  Group::SetTimeout(0.5);
  std::printf("a call at the other's deadline, %s, %s: %d of %d met, %s\n", layout == Layout::kRank ? "rank" : "expert",
              pulls ? "pulled" : "pushed", met, kTries, ok ? "right" : "WRONG");
  return ok && CheckCase(c);
}

int Timeout() {
  Group::SetTimeout(0.5);
  Case c{"before and after a timeout", 2, 100, 4, 16, Layout::kExpert, 8, 0, 0, RowDtype::kBfloat16, 512};
  bool ok = CheckCase(c);
  Finish(c);
  Ranks& ranks = Ranks::Of(2);
  const auto routing = Route(c);
  for (int variant = 0; variant < 4; ++variant) {
    const int missing = variant % 2;
    const bool encodes = variant >= 2;
    for (const char* how : {"never calls", "calls too late", "calls too late, more calls queued"}) {
      std::vector<std::unique_ptr<Memory>> memory;
      std::vector<Arrays> arrays;
      for (int r = 0; r < 2; ++r) {
        memory.push_back(std::make_unique<Memory>(ranks.device[r]));
        arrays.push_back(MakeArrays(c, *memory[r], ranks.group.view(r), true));
        DispatchParams& d = arrays[r].dispatch;
        d.topk_idx = memory[r]->Put(routing[r].topk_idx);
        d.rows[0].x = memory[r]->Make<char>(c.num_tokens * c.row_bytes(), 1);
        if (c.weights) d.topk_weights = memory[r]->Make<float>(c.choices(), 0);
        CHECK_CUDA(cudaDeviceSynchronize());
      }
      const EncodedResults encoded(c, Wire::kFp8, {}, memory);
      CHECK_CUDA(cudaDeviceSynchronize());
      const auto launch = [&](int r) {
        const DispatchParams& d = arrays[r].dispatch;
        CHECK_CUDA(cudaSetDevice(ranks.device[r]));
        CHECK_CUDA(
            LaunchDispatch(encodes ? encoded.Of(r, d, d.rows[0].x) : d, 2, DispatchConfig{8, 4}, ranks.stream[r]));
      };
      const bool queued = std::string(how).find("queued") != std::string::npos;
      launch(1 - missing);
      if (queued) launch(1 - missing);  // of the same generation: must not meet the late rank's first call
      if (std::string(how) != "never calls") {
        std::this_thread::sleep_for(std::chrono::milliseconds(1500));
        launch(missing);
      }
      const bool told = !ranks.Wait(30);
      bool zero = true;
      for (int r = 0; r < 2; ++r) {
        if (r == missing && std::string(how) == "never calls") continue;
        CHECK_CUDA(cudaSetDevice(ranks.device[r]));
        zero &= encodes ? encoded.AreZero(ranks, r)
                        : Same("result after a timeout", r, arrays[r].dispatch.rows[0].recv,
                               std::vector<char>(c.capacity * c.row_bytes(), 0));
      }
      std::printf("rank %d %s%s: told %d, zero %d\n", missing, how, encodes ? " (encoded)" : "", told, zero);
      ok &= told && zero && CheckCase(c);
    }
  }
  ok &= CheckAtDeadline(Layout::kExpert, 1) && CheckAtDeadline(Layout::kRank, 0) && CheckAtDeadline(Layout::kRank, 1);
  ok &= CheckLastCalls(c);
  std::printf("%s\n", ok ? "TIMEOUT OK" : "TIMEOUT FAILED");
  return ok ? 0 : 1;
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
  if (what == "timeout") result = Timeout();
  if (what == "masked") result = Masked();
  if (what == "burst") result = Burst(argc > 2 ? argv[2] : "");
  std::fflush(stdout);
  return result;
}
