// The kernels over nodes without XLA and without NVSHMEM: every rank a stream of this process, several ranks on one GPU
// where there are fewer GPUs than ranks, nodes pretended, and the network stores to rooms of the same process.
//
//   internode check [seed count]   named and random cases on many shapes of nodes against oracle.h, bitwise, each twice
//   internode small                a few small cases, for compute-sanitizer
//   internode timeout              one rank does not call: the others must say so, and later calls must be right
//   internode bench                DeepSeek-V3's layer, 4096 tokens, and 128 and 1 in one hop: time of a call, bytes to
//                                  other nodes
//
// nvcc -O3 -std=c++17 -Iffi -rdc=true -gencode arch=compute_90a,code=sm_90a -o internode tests/gpu/kernels/internode.cu
//   ffi/internode/internode_{dispatch,combine,barrier}.cu ffi/internode/internode_group.cc ffi/dispatch/dispatch.cu
//   ffi/combine/*.cu ffi/low_latency/*.cu ffi/halves/*.cu
//   ffi/halves/push.cc ffi/group/barrier.cu ffi/group/group.cc
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>

#include "check.h"
#include "device/ptx.cuh"
#include "internode/internode.h"
#include "internode/internode_group.h"
#include "internode/plan.h"
#include "internode/ring.cuh"
#include "internode/transport.cuh"

namespace jax_ep {

// ---- the network

namespace {
constexpr int kMaxPes = 256;
__device__ Room* room_of_pe[kMaxPes];

template <class T>
__device__ T* There(const InternodeView& view, int peer, T* own) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(room_of_pe[view.pe[peer]]) +
                              (reinterpret_cast<const char*>(own) - reinterpret_cast<const char*>(view.room)));
}
}  // namespace

__device__ void PutAndSignal(const InternodeView& view, int peer, char* target, const char* source, int64_t num_bytes,
                             uint64_t* flag, uint64_t value) {
  char* const there = There(view, peer, target);
  if ((num_bytes | reinterpret_cast<uint64_t>(source) | reinterpret_cast<uint64_t>(target)) % 16 == 0) {
    CopyVectors(there, source, num_bytes);
  } else {
    for (int64_t i = threadIdx.x % 32 * 4; i < num_bytes; i += 128) {
      *reinterpret_cast<int32_t*>(there + i) = __ldcg(reinterpret_cast<const int32_t*>(source + i));
    }
  }
  __syncwarp();
  FenceSys();
  if (threadIdx.x % 32 == 0) StoreRelaxedSys(There(view, peer, flag), value);
  __syncwarp();
}

__device__ void SignalOverNetwork(const InternodeView& view, int peer, uint64_t* flag, uint64_t value) {
  StoreRelaxedSys(There(view, peer, flag), value);
}

__device__ void SettleArrival(uint64_t*, uint64_t) {}

}  // namespace jax_ep

using namespace jax_ep;

namespace {

// A group whose ranks lie on nodes as said.
struct NodeRanks {
  Ranks ranks;
  std::vector<InternodeView> views;

  static NodeRanks& Of(const std::vector<int>& node_of_rank) {
    static std::map<std::vector<int>, NodeRanks*> all;
    if (all[node_of_rank] != nullptr) return *all[node_of_rank];
    const int num_ranks = static_cast<int>(node_of_rank.size());
    static int next_id = 1000, next_pe = 0;
    const int first_pe = next_pe;
    next_pe += num_ranks;
    if (next_pe > kMaxPes) std::_Exit(2);
    std::vector<int> ids(num_ranks), devices(num_ranks);
    std::vector<Place> places(num_ranks);
    std::vector<cudaStream_t> streams(num_ranks);
    std::vector<Room*> rooms(num_ranks);
    for (int i = 0; i < num_ranks; ++i) {
      ids[i] = next_id++, devices[i] = i % g_num_devices;
      CHECK_CUDA(cudaSetDevice(devices[i]));
      CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&rooms[i]), RoomBytes(num_ranks)));
      CHECK_CUDA(cudaMemset(rooms[i], 0, RoomBytes(num_ranks)));
      streams[i] = StreamOf(i);
      CHECK_CUDA(LoadInternodeDispatch());
      CHECK_CUDA(LoadInternodeCombine());
      CHECK_CUDA(LoadInternodeBarrier());
      CHECK_CUDA(cudaDeviceSynchronize());
      places[i].device = devices[i];
      places[i].window = reinterpret_cast<uint64_t>(rooms[i]);
    }
    Group::MakeSpanning(ids, places);
    auto* made = new NodeRanks{{Group::OfDevices(ids), devices, streams}, {}};
    for (int i = 0; i < num_ranks; ++i) {
      InternodeView view{};
      view.nodes = NodesOf(node_of_rank);
      view.room = rooms[i];
      view.box_bytes = BoxBytes(num_ranks);
      for (int j = 0; j < num_ranks; ++j) view.room_of[j] = rooms[j], view.pe[j] = first_pe + j;
      made->views.push_back(view);
    }
    for (int device = 0; device < g_num_devices; ++device) {
      CHECK_CUDA(cudaSetDevice(device));
      CHECK_CUDA(cudaMemcpyToSymbol(room_of_pe, rooms.data(), num_ranks * sizeof(Room*), first_pe * sizeof(Room*)));
    }
    return *(all[node_of_rank] = made);
  }
};

}  // namespace

namespace jax_ep {

struct NodeCalls {
  static constexpr bool kOverNodes = true;
  const std::vector<InternodeView>& views;
  bool direct, puts;  // one hop; over the network, else by stores, to other nodes
  int64_t box_bytes;

  bool Fits(const Arrays& arrays, const Case& c) const {
    return DispatchFits(arrays.dispatch, c.num_ranks) && CombineFits(arrays.combine, c.num_ranks);
  }
  InternodeView View(int rank) const {
    InternodeView view = views[rank];
    view.box_bytes = box_bytes;
    for (size_t peer = 0; puts && peer < views.size(); ++peer) {
      if (view.nodes.node[peer] != view.nodes.node[rank]) view.room_of[peer] = nullptr;
    }
    return view;
  }
  cudaError_t Dispatch(int rank, const DispatchParams& params, const Case& c, cudaStream_t stream) const {
    return LaunchInternodeDispatch(params, View(rank), {c.num_sms, direct}, stream);
  }
  cudaError_t Combine(int rank, const CombineParams& params, const Case& c, cudaStream_t stream) const {
    return LaunchInternodeCombine(params, View(rank), {c.num_sms, direct}, stream);
  }
  cudaError_t Barrier(const GroupView* view, int rank, int32_t* came, cudaStream_t stream) const {
    return LaunchInternodeBarrier(view, View(rank), false, came, stream);
  }
};

}  // namespace jax_ep

namespace {

bool CheckOnNodes(const std::vector<int>& nodes, Case c, bool direct, bool puts, int64_t box_bytes, int stride = 1) {
  NodeRanks& ranks = NodeRanks::Of(nodes);
  c.num_ranks = static_cast<int>(nodes.size());
  std::string where;
  for (int node : nodes) where += std::to_string(node);
  c.name =
      where + (direct ? " direct" : "") + (puts ? " puts " : " ") + std::to_string(box_bytes >> 20) + " MiB " + c.name;
  return CheckCalls(c, ranks.ranks, NodeCalls{ranks.views, direct, puts, box_bytes}, stride);
}

const std::vector<std::vector<int>> kShapes = {{0},
                                               {0, 0},
                                               {0, 1},
                                               {0, 0, 1, 1},
                                               {0, 1, 0, 1},
                                               {0, 1, 2},
                                               {0, 1, 2, 3},
                                               {0, 0, 0, 0, 1, 1, 1, 1},
                                               {0, 0, 1, 1, 2, 2, 3, 3},
                                               {2, 0, 1, 1, 2, 0}};

int Check(int argc, char** argv) {
  bool ok = true;
  for (const auto& nodes : kShapes) {
    for (const Case& c : SmallCases(static_cast<int>(nodes.size()))) {
      for (bool puts : {true, false}) ok &= CheckOnNodes(nodes, c, false, puts, 1 << 20);
    }
  }
  const auto bf16 = RowDtype::kBfloat16;
  const Case models[] = {
      {"DeepSeek-V3", 2, 4096, 8, 256, Layout::kExpert, 128, 0, 40960, bf16, 7168, 0, true, 0, 0, 24},
      {"DeepSeek-V3 rank", 2, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0, 24},
  };
  for (const Case& c : models) {
    for (bool puts : {true, false}) ok &= CheckOnNodes({0, 1}, c, false, puts, BoxBytes(2), 37);
  }
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
  const int count = argc > 3 ? std::atoi(argv[3]) : 60;
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    const auto& nodes = kShapes[random() % kShapes.size()];
    Case c = RandomCase(random);
    c.num_experts = c.num_experts / c.num_ranks * static_cast<int>(nodes.size());
    while (c.num_experts < c.num_topk) c.num_experts *= 2;
    c.num_ranks = static_cast<int>(nodes.size());
    if (int64_t(c.num_ranks) * c.num_tokens * c.num_topk * c.hidden > 64 << 20) c.hidden = 128;
    const int64_t box_bytes = random() % 2 ? 1 << 20 : BoxBytes(c.num_ranks);
    const bool direct = random() % 4 == 0, puts = random() % 2 == 0;
    wrong += !CheckOnNodes(nodes, c, direct, puts, box_bytes);
  }
  std::printf("%s\n", ok && wrong == 0 ? "INTERNODE CHECK OK" : "INTERNODE CHECK FAILED");
  return ok && wrong == 0 ? 0 : 1;
}

int Small() {
  bool ok = true;
  for (const std::vector<int>& nodes : {std::vector<int>{0, 1}, std::vector<int>{0, 0, 1, 1}}) {
    for (const Case& c : SmallCases(static_cast<int>(nodes.size()))) {
      for (bool direct : {false, true}) ok &= CheckOnNodes(nodes, c, direct, direct, 1 << 20);
    }
  }
  std::printf("%s\n", ok ? "INTERNODE SMALL OK" : "INTERNODE SMALL FAILED");
  return ok ? 0 : 1;
}

// Of every rank: a routing, some rows and gates.
std::vector<Arrays> MakeOperands(const Case& c, const NodeRanks& ranks, const std::vector<RankRouting>& routing,
                                 std::vector<std::unique_ptr<Memory>>* memory) {
  std::vector<Arrays> arrays;
  for (int r = 0; r < c.num_ranks; ++r) {
    memory->push_back(std::make_unique<Memory>(ranks.ranks.device[r]));
    Memory& own = *memory->back();
    arrays.push_back(MakeArrays(c, own, ranks.ranks.group.view(r), true));
    DispatchParams& d = arrays[r].dispatch;
    d.topk_idx = own.Put(routing[r].topk_idx);
    d.rows[0].x = own.Make<char>(c.num_tokens * c.row_bytes(), 1);
    d.topk_weights = own.Make<float>(c.choices(), 0);
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  return arrays;
}

int Timeout() {
  constexpr double kPatient = 4, kImpatient = 0.5;
  const std::vector<int> nodes = {0, 0, 1, 1};
  const int R = static_cast<int>(nodes.size());
  Case c{"around a timeout", R, 100, 4, 16, Layout::kExpert, 8, 0, 0, RowDtype::kBfloat16, 512};
  bool ok = CheckOnNodes(nodes, c, false, true, 1 << 20);
  NodeRanks& ranks = NodeRanks::Of(nodes);
  Finish(c);
  const auto routing = Route(c);
  for (int missing = 0; missing < R; missing += 3) {
    for (bool late : {false, true}) {
      std::vector<std::unique_ptr<Memory>> memory;
      const std::vector<Arrays> arrays = MakeOperands(c, ranks, routing, &memory);
      const auto launch = [&](int r) {
        CHECK_CUDA(cudaSetDevice(ranks.ranks.device[r]));
        CHECK_CUDA(LaunchInternodeDispatch(arrays[r].dispatch, ranks.views[r], {}, ranks.ranks.stream[r]));
      };
      Group::SetTimeout(kImpatient);
      for (int r = 0; r < R; ++r) {
        if (r != missing) launch(r);
      }
      if (late) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1500));
        launch(missing);
      }
      const bool told = !ranks.ranks.Wait(30);
      bool zero = true;
      for (int r = 0; r < R; ++r) {
        if (r == missing && !late) continue;
        CHECK_CUDA(cudaSetDevice(ranks.ranks.device[r]));
        zero &= Same("result after a timeout", r, arrays[r].dispatch.rows[0].recv,
                     std::vector<char>(c.capacity * c.row_bytes(), 0));
      }
      Group::SetTimeout(kPatient);
      std::printf("rank %d %s: told %d, zero %d\n", missing, late ? "late" : "missing", told, zero);
      ok &= told && zero && CheckOnNodes(nodes, c, false, late, 1 << 20);
    }
  }
  std::printf("%s\n", ok ? "INTERNODE TIMEOUT OK" : "INTERNODE TIMEOUT FAILED");
  return ok ? 0 : 1;
}

// One rank's bytes that another node's ranks must get, each row once a node, or once a rank: the mean over the ranks.
double BytesToOtherNodes(const Case& c, const std::vector<RankRouting>& routing, const std::vector<int>& nodes,
                         bool once_a_rank) {
  int64_t rows = 0;
  for (int r = 0; r < c.num_ranks; ++r) {
    for (int t = 0; t < c.num_tokens; ++t) {
      std::set<int> places;
      for (int k = 0; k < c.num_topk; ++k) {
        const int slot = routing[r].slot[t * c.num_topk + k], rank = slot >= 0 ? slot / c.capacity : r;
        if (nodes[rank] != nodes[r]) places.insert(once_a_rank ? rank : nodes[rank]);
      }
      rows += static_cast<int64_t>(places.size());
    }
  }
  return static_cast<double>(rows) * static_cast<double>(c.row_bytes()) / c.num_ranks;
}

// A call's time, back to back, by the slowest rank; prints a line a call and number of multiprocessors.
bool BenchCase(const std::vector<int>& nodes, Case c, bool direct, bool puts, const std::vector<int>& sms) {
  const int R = static_cast<int>(nodes.size());
  c.num_ranks = R;
  Finish(c);
  NodeRanks& ranks = NodeRanks::Of(nodes);
  const NodeCalls calls{ranks.views, direct, puts, BoxBytes(R)};
  const auto routing = Route(c);
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<Arrays> arrays = MakeOperands(c, ranks, routing, &memory);
  for (int r = 0; r < R; ++r) {
    CombineParams& p = arrays[r].combine;
    p.y = memory[r]->Make<char>(c.capacity * c.row_bytes(), 1);
    p.weights = c.layout == Layout::kRank ? nullptr : memory[r]->Make<float>(c.capacity, 0);
    p.carried_back = nullptr;
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  for (int num_sms : sms) {
    c.num_sms = num_sms;
    for (const char* what : {"dispatch", "dispatch_cached", "combine"}) {
      constexpr int kRepeats = 30, kWarmUp = 5;
      const bool combines = what[0] == 'c', cached = what[8] == '_';
      std::vector<cudaEvent_t> begin(R), end(R);
      ranks.ranks.Launch([&](int r, cudaStream_t stream) {
        CHECK_CUDA(cudaEventCreate(&begin[r]));
        CHECK_CUDA(cudaEventCreate(&end[r]));
        DispatchParams d = arrays[r].dispatch;
        if (cached) d.operation = kDispatchCached;
        for (int i = 0; i < kRepeats + kWarmUp; ++i) {
          if (i == kWarmUp) CHECK_CUDA(cudaEventRecord(begin[r], stream));
          CHECK_CUDA(combines ? calls.Combine(r, arrays[r].combine, c, stream) : calls.Dispatch(r, d, c, stream));
        }
        return cudaEventRecord(end[r], stream);
      });
      if (!ranks.ranks.Wait()) return false;
      float slowest = 0;
      for (int r = 0; r < R; ++r) {
        float milliseconds = 0;
        CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin[r], end[r]));
        slowest = std::max(slowest, milliseconds);
        CHECK_CUDA(cudaEventDestroy(begin[r]));
        CHECK_CUDA(cudaEventDestroy(end[r]));
      }
      const double us = slowest * 1000 / kRepeats, bytes = BytesToOtherNodes(c, routing, nodes, direct || combines);
      std::string where;
      for (int node : nodes) where += std::to_string(node);
      std::printf("nodes %-8s %5d tokens %-6s %-6s %-6s %-15s %3d SMs: %6.1f us, %5.1f GB/s to other nodes\n",
                  where.c_str(), c.num_tokens, c.layout == Layout::kRank ? "rank" : "expert", direct ? "direct" : "",
                  puts ? "puts" : "stores", what, num_sms, us, bytes / us / 1000);
      std::fflush(stdout);
    }
  }
  return true;
}

// Two ranks a GPU where there are fewer GPUs than ranks: as the ranks of a node are taken in turn, those of one GPU are
// a node, and nodes are joined by NVLink.
int Bench() {
  bool ok = true;
  for (const auto& nodes : {std::vector<int>{0, 1}, std::vector<int>{0, 0}, std::vector<int>{0, 1, 0, 1},
                            std::vector<int>{0, 0, 1, 1}, std::vector<int>{0, 1, 2, 3}}) {
    const int R = static_cast<int>(nodes.size());
    if (R > 2 * g_num_devices) continue;
    const auto bf16 = RowDtype::kBfloat16;
    const int capacity = 4096 * 8 * 5 / 4;
    const Case rank{"", R, 4096, 8, 256, Layout::kRank, 1, 0, 0, bf16, 7168, 0, true, 0, 0};
    const Case expert{"", R, 4096, 8, 256, Layout::kExpert, 128, 0, capacity, bf16, 7168, 0, true, 0, 0};
    const bool alone = R <= g_num_devices;
    for (bool puts : {false, true}) {
      if (puts && nodes.back() == 0) continue;  // there is no other node
      ok &= BenchCase(nodes, rank, false, puts, alone ? std::vector<int>{12, 24, 48} : std::vector<int>{24, 48});
      ok &= BenchCase(nodes, expert, false, puts, {24});
      for (int tokens : {1, 128}) {
        for (Case c : {rank, expert}) {
          c.num_tokens = tokens, c.alignment = 1;
          c.capacity = c.layout == Layout::kRank ? 0 : tokens * 8 * 5 / 4;
          ok &= BenchCase(nodes, c, true, puts, {24});
        }
      }
    }
  }
  return ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  CHECK_CUDA(cudaGetDeviceCount(&g_num_devices));
  const std::string what = argc > 1 ? argv[1] : "";
  Group::SetTimeout(what == "small" ? 60 : 4);
  int result = 1;
  if (what == "small") result = Small();
  if (what == "check") result = Check(argc, argv);
  if (what == "timeout") result = Timeout();
  if (what == "bench") result = Bench();
  std::fflush(stdout);
  return result;
}
