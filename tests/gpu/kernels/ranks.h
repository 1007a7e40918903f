// Ranks as streams of this process and their device arrays: what all of these programs share besides oracle.h.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>

#include "group/barrier.h"
#include "group/group.h"
#include "oracle.h"

#define CHECK_CUDA(call)                                                                    \
  do {                                                                                      \
    const cudaError_t error_ = (call);                                                      \
    if (error_ != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::fflush(stdout);                                                                  \
      std::_Exit(2);                                                                        \
    }                                                                                       \
  } while (0)

namespace jax_ep {

inline int g_num_devices = 0;

// Device memory of one rank, freed together.
class Memory {
 public:
  explicit Memory(int device) : device_(device) {}
  ~Memory() {
    cudaSetDevice(device_);
    for (void* p : blocks_) cudaFree(p);
  }
  template <class T>
  T* Make(int64_t count, int poison) {
    CHECK_CUDA(cudaSetDevice(device_));
    void* p = nullptr;
    CHECK_CUDA(cudaMalloc(&p, std::max<int64_t>(count * sizeof(T), 256)));
    CHECK_CUDA(cudaMemset(p, poison, std::max<int64_t>(count * sizeof(T), 256)));
    blocks_.push_back(p);
    return static_cast<T*>(p);
  }
  template <class T>
  T* Put(const std::vector<T>& host) {
    T* p = Make<T>(host.size(), 0);
    CHECK_CUDA(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
  }

 private:
  int device_;
  std::vector<void*> blocks_;
};

// A rank's stream, the same in all groups: the hardware has so few queues that streams of two ranks of a GPU may share
// one, and there the first kernel of the one can be behind the second of the other, which waits for it.
inline cudaStream_t StreamOf(int rank) {
  static std::vector<cudaStream_t> all;
  for (int i = static_cast<int>(all.size()); i <= rank; ++i) {
    all.emplace_back();
    CHECK_CUDA(cudaSetDevice(i % g_num_devices));
    CHECK_CUDA(cudaStreamCreateWithFlags(&all.back(), cudaStreamNonBlocking));
  }
  return all[rank];
}

struct Ranks {
  Group& group;
  std::vector<int> device;
  std::vector<cudaStream_t> stream;

  static Ranks& Of(int num_ranks) {
    static std::map<int, Ranks*> all;
    if (all[num_ranks] == nullptr) {
      // Each rank is a device of its own to the group, several of one ordinal where there are fewer GPUs.
      std::vector<int> ids(num_ranks), devices(num_ranks);
      for (int i = 0; i < num_ranks; ++i) ids[i] = i, devices[i] = i % g_num_devices;
      for (int i = 0; i < num_ranks; ++i) Group::SetOrdinals({{i, devices[i]}});
      auto* ranks = new Ranks{Group::OfDevices(ids), devices, std::vector<cudaStream_t>(num_ranks)};
      for (int i = 0; i < num_ranks; ++i) {
        ranks->stream[i] = StreamOf(i);
      }
      all[num_ranks] = ranks;
    }
    return *all[num_ranks];
  }

  inline static int64_t run = 1;  // a process numbers its runs, whichever ranks make them
  std::string failure;            // of the run
  std::string doing;              // told of a rank that does not end
  bool tells = true;              // prints failures
  uint32_t absent = 0;            // ranks that do not call

  bool IsAbsent(size_t rank) const { return (absent >> rank & 1) != 0; }
  // Masks these ranks and no others, here and in every group.
  static void Mask(uint32_t dead) {
    std::vector<int> ids;
    for (int i = 0; i < kMaxRanks; ++i) {
      if ((dead >> i & 1) != 0) ids.push_back(i);
    }
    Group::SetDead(ids);
  }

  // A host thread a rank, as under XLA: with a tool that makes launches wait, one thread could not launch the second
  // rank.
  template <class F>
  void Launch(F launch) {
    std::vector<std::thread> threads;
    ++run;
    // All enter first: a call that fails at once on one rank would else be refused on those that enter later.
    for (size_t i = 0; i < device.size(); ++i) {
      CHECK_CUDA(cudaSetDevice(device[i]));
      if (!IsAbsent(i)) CHECK_CUDA(Enter(i));
    }
    for (size_t i = 0; i < device.size(); ++i) {
      if (IsAbsent(i)) continue;
      threads.emplace_back([&, i] {
        CHECK_CUDA(cudaSetDevice(device[i]));
        CHECK_CUDA(launch(static_cast<int>(i), stream[i]));
      });
    }
    for (auto& thread : threads) thread.join();
  }

  cudaError_t Enter(int rank) {
    const std::string told = group.Enter(rank, run, stream[rank]);
    return told.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }

  // Of a rank that does not end: what its window says of the call, so that one look tells which warps are not through.
  void Report(size_t rank) const {
    GroupView view;
    Window* window = nullptr;
    cudaStream_t beside;
    CHECK_CUDA(cudaSetDevice(device[rank]));
    CHECK_CUDA(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
    CHECK_CUDA(cudaMallocHost(&window, sizeof *window));
    CHECK_CUDA(cudaMemcpyAsync(&view, group.view(rank), sizeof view, cudaMemcpyDeviceToHost, beside));
    CHECK_CUDA(cudaStreamSynchronize(beside));
    CHECK_CUDA(cudaMemcpyAsync(window, view.window[rank], sizeof *window, cudaMemcpyDeviceToHost, beside));
    CHECK_CUDA(cudaStreamSynchronize(beside));
    std::printf(
        "rank %zu: calls ended %llu, failed %llu, blocks through %u, own rows %u, zero rows %u, copies %u, chunks",
        rank, (unsigned long long)window->epoch, (unsigned long long)window->failed_epoch, window->exits,
        window->taken_own_rows, window->taken_zero_rows, window->taken_copies);
    for (unsigned int taken : window->taken_chunks) std::printf(" %u", taken);
    const uint64_t call = window->epoch + 1;
    for (int source = 0; source < view.num_ranks; ++source) {
      std::printf("; of rank %d: posts", source);
      for (int lane = 0; lane < kMaxSendBlocks; ++lane)
        std::printf(" %d", EpochOf(window->post[call & 1][source][lane]) == call);
      std::printf(", progress");
      for (int lane = 0; lane < kMaxSendBlocks; ++lane) {
        const uint64_t flag = window->progress[source][lane];
        if (EpochOf(flag) != call) {
          std::printf(" -");
        } else {
          std::printf(" %x", StateOf(flag));
        }
      }
      int arrived = 0;
      for (uint64_t flag : window->arrived[source]) arrived += EpochOf(flag) == call;
      std::printf(", chunks %d", arrived);
    }
    std::printf("\n");
  }

  bool Wait(double seconds = 100) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < stream.size(); ++i) {
      CHECK_CUDA(cudaSetDevice(device[i]));
      cudaError_t error;
      while ((error = cudaStreamQuery(stream[i])) == cudaErrorNotReady) {
        if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) {
          std::printf("HANG: rank %zu did not finish %s\n", i, doing.c_str());
          for (size_t rank = 0; rank < stream.size(); ++rank) Report(rank);
          std::fflush(stdout);
          std::_Exit(3);
        }
      }
      CHECK_CUDA(error);
    }
    ++run;
    const int rank = __builtin_ctz(~absent);
    failure = group.Enter(rank, run, stream[rank]);
    if (!failure.empty() && tells) std::printf("  failure: %s\n", failure.c_str());
    return failure.empty();
  }
};

inline std::vector<char> RandomRows(const Case& c, int64_t rows, std::mt19937& random) {
  // From a table: big cases would spend their time in the generator.
  constexpr int kTable = 4096;
  std::vector<char> bytes(rows * c.row_bytes()), table(kTable * c.elem_bytes());
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int i = 0; i < kTable; ++i) Store(c.dtype, &table[i * c.elem_bytes()], uniform(random));
  uint64_t state = random();
  for (int64_t i = 0; i < rows * c.hidden; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::memcpy(&bytes[i * c.elem_bytes()], &table[(state >> 52) * c.elem_bytes()], c.elem_bytes());
  }
  return bytes;
}

template <class T>
bool Same(const char* what, int rank, const T* device, const std::vector<T>& expected, int64_t row = 1,
          int stride = 1) {
  std::vector<T> got(expected.size());
  CHECK_CUDA(cudaMemcpy(got.data(), device, got.size() * sizeof(T), cudaMemcpyDeviceToHost));
  if (std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0) return true;
  int64_t wrong = 0, first = -1;
  for (size_t i = 0; i < got.size(); ++i) {
    if (stride > 1 && (static_cast<int64_t>(i) / row) % stride != 0) continue;
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) != 0 && wrong++ == 0) first = i;
  }
  if (wrong == 0) return true;
  std::printf("  WRONG %s on rank %d: %lld of %zu, first at %lld (row %lld): got %g, expected %g\n", what, rank,
              (long long)wrong, got.size(), (long long)first, (long long)(first / row), double(got[first]),
              double(expected[first]));
  return false;
}

// All device arrays of one rank for one case.
struct Arrays {
  DispatchParams dispatch{};
  CombineParams combine{};
  CombineGradParams grad{};
};

inline Arrays MakeArrays(const Case& c, Memory& memory, const GroupView* view, bool with_combine) {
  Arrays a;
  const int64_t C = c.capacity, per_row = c.layout == Layout::kRank ? c.num_topk : 1;
  DispatchParams& d = a.dispatch;
  d.group = view;
  d.operation = kDispatch;
  d.layout = c.layout;
  d.num_tokens = c.num_tokens, d.num_topk = c.num_topk, d.num_experts = c.num_experts, d.max_recv_tokens = c.capacity;
  d.expert_alignment = c.alignment, d.expert_capacity = c.expert_capacity;
  d.num_row_arrays = c.second_bytes > 0 ? 2 : 1;
  d.rows[0] = {nullptr, memory.Make<char>(C * c.row_bytes(), 0xab), c.row_bytes()};
  if (c.second_bytes > 0) d.rows[1] = {nullptr, memory.Make<char>(C * c.second_bytes, 0xab), c.second_bytes};
  d.slot = memory.Make<int32_t>(c.choices(), 0xab);
  d.recv_slot = memory.Make<int32_t>(c.num_ranks * c.choices(), 0xab);
  d.counts = memory.Make<int32_t>(c.num_local() + 1, 0xab);
  if (c.layout == Layout::kRank) d.recv_topk_idx = memory.Make<int32_t>(C * c.num_topk, 0xab);
  if (c.weights) d.recv_weights = memory.Make<float>(C * per_row, 0xab);
  if (!with_combine) return a;
  CombineParams& b = a.combine;
  b.group = view;
  b.one_row_a_rank = c.layout == Layout::kRank;
  b.dtype = c.dtype;
  b.num_tokens = c.num_tokens, b.num_topk = c.num_topk, b.max_recv_tokens = c.capacity;
  b.row_bytes = c.row_bytes();
  b.slot = d.slot, b.recv_slot = d.recv_slot;
  b.out = memory.Make<char>(c.num_tokens * c.row_bytes(), 0xab);
  b.carried_back = memory.Make<float>(c.choices(), 0xab);
  const int num_scratch = b.one_row_a_rank ? 0 : c.num_ranks - 1;
  if (num_scratch > 0) b.scratch = memory.Make<char>(int64_t{num_scratch} * c.num_tokens * c.row_bytes(), 0xab);
  if (b.one_row_a_rank) return a;
  CombineGradParams& g = a.grad;
  g.group = view;
  g.dtype = c.dtype;
  g.num_tokens = c.num_tokens, g.num_topk = c.num_topk, g.max_recv_tokens = c.capacity;
  g.num_local_experts = c.num_local();
  g.expert_alignment = c.layout == Layout::kExpert ? c.alignment : 0, g.expert_capacity = c.expert_capacity;
  g.row_bytes = c.row_bytes();
  g.recv_slot = d.recv_slot, g.counts = d.counts;
  g.y_bar = memory.Make<char>(C * c.row_bytes(), 0xab);
  g.weights_bar = memory.Make<float>(C, 0xab);
  return a;
}

}  // namespace jax_ep
