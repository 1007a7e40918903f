#include "group/group.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "group/barrier.h"
#include "low_latency/low_latency.h"

namespace jax_ep {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::unique_ptr<Group>> groups;
  std::map<std::vector<int>, int64_t> by_devices;
  uint64_t timeout_ns = 60'000'000'000;
};

Registry& TheRegistry() {
  static Registry* registry = new Registry;  // outlives every handler
  return *registry;
}

void Check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("jax_ep: making a group failed: ") + what + ": " + cudaGetErrorString(error));
}

// The calling thread's device is as before when this goes.
class DeviceGuard {
 public:
  DeviceGuard() { Check("cudaGetDevice", cudaGetDevice(&device_)); }
  ~DeviceGuard() { cudaSetDevice(device_); }

 private:
  int device_ = 0;
};

const char* const kOperations[] = {"dispatch", "dispatch_cached", "notify", "combine", "barrier"};
const char* const kPhases[] = {"meet (the peer's post)",
                               "rows (the peer's progress)",
                               "leave (the peer's end of call)",
                               "refused",
                               "reuse (the peer's end of an earlier call; is each start followed by its done?)",
                               "lines (what the peer sends)",
                               "in flight"};

std::string InWords(const Status& status, uint64_t timeout_ns) {
  const uint64_t seen = status.seen, epoch = status.epoch;
  const auto state = [](uint64_t flag) {
    return StateOf(flag) == kGone ? "gone" : StateOf(flag) == kDone ? "done" : std::to_string(StateOf(flag));
  };
  const auto number = [](uint64_t epoch) { return std::to_string(epoch & 0xffffffff); };
  if (status.phase == kInFlight) {
    return std::string(kOperations[status.operation]) + ": rank " + std::to_string(status.rank) +
           " was given a value in flight that no start of this group has made";
  }
  std::string text = std::string(kOperations[status.operation]) + ": rank " + std::to_string(status.rank) +
                     " waited for rank " + std::to_string(status.peer) + " in phase " + kPhases[status.phase] +
                     ", lane " + std::to_string(status.lane) + ", call " + number(epoch) + " of the group, for state " +
                     state(status.expected) + "; ";
  if (EpochOf(seen) >= epoch && StateOf(seen) == kGone) return text + "that rank has given up";
  if (EpochOf(seen) > epoch)
    return text + "that rank is already in call " + number(EpochOf(seen)) + ", so it has given this one up";
  text += "after " + std::to_string(timeout_ns / 1'000'000) + " ms it saw ";
  if (EpochOf(seen) < epoch)
    return text + "nothing of this call (that rank was last seen in call " + number(EpochOf(seen)) + ")";
  return text + "state " + state(seen);
}

}  // namespace

Group::Group(int64_t id, const std::vector<int>& devices) : id_(id), ranks_(devices.size()) {
  if (devices.empty() || devices.size() > kMaxRanks) {
    throw std::runtime_error("jax_ep: a group must have 1 to " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(devices.size()));
  }
  DeviceGuard guard;
  for (size_t i = 0; i < devices.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.device = devices[i];
    Check("cudaSetDevice", cudaSetDevice(devices[i]));
    for (int peer : devices) {
      if (peer == devices[i]) continue;
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
      } else {
        Check("cudaDeviceEnablePeerAccess", error);
      }
    }
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&rank.window), sizeof(Window)));
    Check("cudaMemset", cudaMemset(rank.window, 0, sizeof(Window)));
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&rank.view), sizeof(GroupView)));
    Check("cudaHostAlloc", cudaHostAlloc(reinterpret_cast<void**>(&rank.status), sizeof(Status),
                                         cudaHostAllocMapped | cudaHostAllocPortable));
    *rank.status = Status{};
    // A kernel first loaded while a peer's kernel waits for it would never run.
    Check("loading dispatch", LoadDispatch());
    Check("loading combine", LoadCombine());
    Check("loading barrier", LoadBarrier());
    Check("loading low-latency dispatch", LoadLowLatencyDispatch());
    Check("loading low-latency combine", LoadLowLatencyCombine());
  }
  for (size_t i = 0; i < ranks_.size(); ++i) {
    GroupView view{};
    view.rank = static_cast<int>(i);
    view.num_ranks = num_ranks();
    view.timeout_ns = TheRegistry().timeout_ns;
    view.status = ranks_[i].status;
    for (size_t peer = 0; peer < ranks_.size(); ++peer) view.window[peer] = ranks_[peer].window;
    Check("cudaSetDevice", cudaSetDevice(ranks_[i].device));
    Check("cudaMemcpy", cudaMemcpy(ranks_[i].view, &view, sizeof view, cudaMemcpyHostToDevice));
  }
  for (const Rank& rank : ranks_) {
    Check("cudaSetDevice", cudaSetDevice(rank.device));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(nullptr));
  }
}

Group& Group::OfDevices(const std::vector<int>& devices) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.by_devices.find(devices);
  if (found != registry.by_devices.end()) return *registry.groups[found->second];
  const int64_t id = static_cast<int64_t>(registry.groups.size());
  registry.groups.push_back(std::unique_ptr<Group>(new Group(id, devices)));
  registry.by_devices[devices] = id;
  return *registry.groups[id];
}

Group* Group::Find(int64_t id) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  return id >= 0 && id < static_cast<int64_t>(registry.groups.size()) ? registry.groups[id].get() : nullptr;
}

void Group::SetTimeout(double seconds) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.timeout_ns = static_cast<uint64_t>(seconds * 1e9);
  DeviceGuard guard;
  for (const auto& group : registry.groups) group->SetViewTimeout(registry.timeout_ns);
}

// A stream of its own: the default one could wait for a kernel that waits for a peer.
void Group::SetViewTimeout(uint64_t timeout_ns) {
  for (const Rank& rank : ranks_) {
    cudaStream_t stream;
    Check("cudaSetDevice", cudaSetDevice(rank.device));
    Check("cudaStreamCreate", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Check("cudaMemcpy",
          cudaMemcpyAsync(&rank.view->timeout_ns, &timeout_ns, sizeof timeout_ns, cudaMemcpyHostToDevice, stream));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(stream));
    cudaStreamDestroy(stream);
  }
}

namespace {

// Sizes are powers of two, so that all arenas together take less than twice the largest's bytes.
int64_t SizeClass(int64_t window_bytes) {
  int64_t size = 1 << 16;
  while (size < window_bytes) size *= 2;
  return size;
}

}  // namespace

const Group::Arenas* Group::FindArenas(int64_t window_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& arenas : arenas_) {
    if (arenas->window_bytes == SizeClass(window_bytes)) return arenas.get();
  }
  return nullptr;
}

void Group::MakeArenas(int64_t window_bytes) {
  if (FindArenas(window_bytes) != nullptr) return;
  std::lock_guard<std::mutex> making(making_);
  if (FindArenas(window_bytes) != nullptr) return;
  auto arenas = std::make_unique<Arenas>();
  arenas->window_bytes = SizeClass(window_bytes);
  const int64_t bytes = kArenaHeaderBytes + kDepth * arenas->window_bytes;
  DeviceGuard guard;
  std::vector<cudaStream_t> streams;  // of their own: the default one could wait for a kernel that waits for a peer
  for (const Rank& rank : ranks_) {
    char* arena = nullptr;
    cudaStream_t stream = nullptr;
    Check("cudaSetDevice", cudaSetDevice(rank.device));
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&arena), bytes));
    Check("cudaStreamCreate", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Check("cudaMemset", cudaMemsetAsync(arena, 0, bytes, stream));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(stream));
    arenas->of_rank.push_back(arena);
    streams.push_back(stream);
  }
  std::lock_guard<std::mutex> lock(mutex_);  // a rank begins a generation before its arena is there, or with it
  if (arenas_.size() + 1 >= kMaxLedgers) throw std::runtime_error("jax_ep: too many sizes of low-latency calls");
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Check("cudaSetDevice", cudaSetDevice(ranks_[i].device));
    const uint64_t epoch = ranks_[i].generation << kCountBits;
    auto* ledger = static_cast<Ledger*>(reinterpret_cast<Arena*>(arenas->of_rank[i]));
    Check("cudaMemcpy", cudaMemcpyAsync(&ledger->epoch, &epoch, sizeof epoch, cudaMemcpyHostToDevice, streams[i]));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(streams[i]));
    cudaStreamDestroy(streams[i]);
  }
  arenas_.push_back(std::move(arenas));
}

ArenaView Group::arenas(int rank, int64_t window_bytes) {
  const Arenas* const arenas = FindArenas(window_bytes);
  if (arenas == nullptr) throw std::runtime_error("jax_ep: this size of low-latency calls has no arenas");
  ArenaView view{};
  view.group = ranks_[rank].view;
  view.rank = rank;
  view.num_ranks = num_ranks();
  view.window_bytes = arenas->window_bytes;
  for (size_t peer = 0; peer < ranks_.size(); ++peer) view.arena[peer] = arenas->of_rank[peer];
  return view;
}

int64_t Group::persistent_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = sizeof(Window);
  for (const auto& arenas : arenas_) bytes += kArenaHeaderBytes + kDepth * arenas->window_bytes;
  return bytes;
}

bool Group::HavePeerAccess(const std::vector<int>& devices) {
  int num_devices = 0;
  bool have = cudaGetDeviceCount(&num_devices) == cudaSuccess;
  for (int a : devices) {
    have = have && a >= 0 && a < num_devices;
    for (int b : devices) {
      int can = 1;
      have = have && (a == b || (cudaDeviceCanAccessPeer(&can, a, b) == cudaSuccess && can != 0));
    }
  }
  cudaGetLastError();
  return have;
}

int Group::RankOf(int device) const {
  for (size_t i = 0; i < ranks_.size(); ++i) {
    if (ranks_[i].device == device) return static_cast<int>(i);
  }
  return -1;
}

std::string Group::Enter(int rank, int64_t run, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string news;
  for (Rank& other : ranks_) {
    const uint32_t failures = other.status->failures;
    if (failures == other.heard) continue;
    other.heard = failures;
    const bool is_news = other.status->epoch >> kCountBits >= generation_;  // else a consequence of what has been told
    if (is_news) news += (news.empty() ? "" : "; ") + InWords(*other.status, TheRegistry().timeout_ns);
  }
  if (!news.empty()) {
    ++generation_;
    failed_run_ = run;
    failure_ = news;
  }
  if (ranks_[rank].generation == generation_) return "";
  if (run == failed_run_) return failure_;
  ranks_[rank].generation = generation_;
  Ledgers ledgers{};
  ledgers.ledger[ledgers.count++] = ranks_[rank].window;
  for (const auto& arenas : arenas_) ledgers.ledger[ledgers.count++] = reinterpret_cast<Arena*>(arenas->of_rank[rank]);
  const cudaError_t error = LaunchBeginGeneration(ledgers, generation_, stream);
  return error == cudaSuccess ? "" : std::string("a new generation could not begin: ") + cudaGetErrorString(error);
}

}  // namespace jax_ep
