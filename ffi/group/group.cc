#include "group/group.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <set>
#include <stdexcept>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "group/barrier.h"
#include "group/shared_memory.h"
#include "low_latency/low_latency.h"

namespace jax_ep {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::unique_ptr<Group>> groups;
  std::map<std::vector<int>, Group*> by_devices;
  std::map<int, int> ordinal_by_device;
  uint64_t spanning_generation = 0;
  uint64_t timeout_ns = 60'000'000'000;  // until jax_ep.config says another
  std::set<int> dead;                    // devices

  int OrdinalOf(int device) const {
    const auto found = ordinal_by_device.find(device);
    if (found != ordinal_by_device.end()) return found->second;
    return ordinal_by_device.empty() ? device : -1;
  }
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

std::string InWords(const Status& status, const std::string& who, const std::string& whom, uint64_t timeout_ns) {
  const uint64_t seen = status.seen, epoch = status.epoch;
  const auto state = [](uint64_t flag) {
    return StateOf(flag) == kGone ? "gone" : StateOf(flag) == kDone ? "done" : std::to_string(StateOf(flag));
  };
  const auto number = [](uint64_t epoch) { return std::to_string(epoch & 0xffffffff); };
  if (status.phase == kInFlight) {
    return std::string(kOperations[status.operation]) + ": " + who +
           " was given a value in flight that no start of this group has made, or one from before its mask changed";
  }
  std::string text = std::string(kOperations[status.operation]) + ": " + who + " waited for " + whom + " in phase " +
                     kPhases[status.phase] + ", lane " + std::to_string(status.lane) + ", call " + number(epoch) +
                     " of the group, for state " + state(status.expected) + "; ";
  if (EpochOf(seen) >= epoch && StateOf(seen) == kGone) return text + "that rank has given up";
  if (EpochOf(seen) > epoch)
    return text + "that rank is already in call " + number(EpochOf(seen)) + ", so it has given this one up";
  text += "after " + std::to_string(timeout_ns / 1'000'000) + " ms it saw ";
  if (EpochOf(seen) < epoch)
    return text + "nothing of this call (that rank was last seen in call " + number(EpochOf(seen)) + ")";
  return text + "state " + state(seen);
}

}  // namespace

Group::Group(const std::vector<int>& devices, const std::vector<Place>& places)
    : devices_(devices), ranks_(places.size()) {
  if (places.empty() || places.size() > kMaxRanks) {
    throw std::runtime_error("jax_ep: a group must have 1 to " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(places.size()));
  }
  dead_ = next_dead_ = DeadRanks();
  spans_processes_ = std::any_of(places.begin(), places.end(), [](const Place& place) { return place.device < 0; });
  DeviceGuard guard;
  for (size_t i = 0; i < places.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.place = places[i];
    rank.window = static_cast<Window*>(ToPointer(places[i].window));
    if (!is_local(rank)) continue;
    Check("cudaSetDevice", cudaSetDevice(rank.place.device));
    for (const Place& peer : places) {
      if (peer.device == rank.place.device || peer.device < 0) continue;
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer.device, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
      } else {
        Check("cudaDeviceEnablePeerAccess", error);
      }
    }
    if (rank.window == nullptr) {
      Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&rank.window), sizeof(Window)));
      Check("cudaMemset", cudaMemset(rank.window, 0, sizeof(Window)));
    }
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&rank.view), sizeof(GroupView)));
    Check("cudaHostAlloc", cudaHostAlloc(reinterpret_cast<void**>(&rank.status), sizeof(Status),
                                         cudaHostAllocMapped | cudaHostAllocPortable));
    *rank.status = Status{};
    Check("cudaStreamCreate", cudaStreamCreateWithFlags(&rank.aside, cudaStreamNonBlocking));
    // A kernel first loaded while a peer's kernel waits for it would never run.
    Check("loading dispatch", LoadDispatch());
    Check("loading combine", LoadCombine());
    Check("loading barrier", LoadBarrier());
    Check("loading low-latency dispatch", LoadLowLatencyDispatch());
    Check("loading low-latency combine", LoadLowLatencyCombine());
  }
  for (size_t i = 0; i < ranks_.size(); ++i) {
    if (!is_local(ranks_[i])) continue;
    GroupView view{};
    view.rank = static_cast<int>(i);
    view.num_ranks = num_ranks();
    view.timeout_ns = TheRegistry().timeout_ns;
    view.status = ranks_[i].status;
    view.membership = dead_;
    for (size_t peer = 0; peer < ranks_.size(); ++peer) {
      view.window[peer] = ranks_[peer].window;
      view.shift[peer] = ranks_[peer].place.shift;
    }
    Check("cudaSetDevice", cudaSetDevice(ranks_[i].place.device));
    Check("cudaMemcpy", cudaMemcpy(ranks_[i].view, &view, sizeof view, cudaMemcpyHostToDevice));
  }
  for (const Rank& rank : ranks_) {
    if (!is_local(rank)) continue;
    Check("cudaSetDevice", cudaSetDevice(rank.place.device));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(nullptr));
  }
}

Group& Group::OfDevices(const std::vector<int>& devices) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.by_devices.find(devices);
  if (found != registry.by_devices.end()) return *found->second;
  std::vector<Place> places;
  int num_devices = 0;
  Check("cudaGetDeviceCount", cudaGetDeviceCount(&num_devices));
  for (int device : devices) {
    Place place{};
    place.device = registry.OrdinalOf(device);
    if (place.device < 0 || place.device >= num_devices) {
      throw std::runtime_error("jax_ep: device " + std::to_string(device) +
                               " is another process's, and this program was not lowered here. Call "
                               "jax_ep.initialize(), then compile it again with jax.jit.");
    }
    places.push_back(place);
  }
  registry.groups.push_back(std::unique_ptr<Group>(new Group(devices, places)));
  return *(registry.by_devices[devices] = registry.groups.back().get());
}

void Group::MakeSpanning(const std::vector<int>& devices, const std::vector<Place>& places) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  if (registry.by_devices.count(devices) != 0) return;
  registry.groups.push_back(std::unique_ptr<Group>(new Group(devices, places)));
  registry.groups.back()->generation_ = registry.spanning_generation;
  registry.by_devices[devices] = registry.groups.back().get();
}

void Group::SetOrdinals(const std::map<int, int>& ordinal_by_device) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& [device, ordinal] : ordinal_by_device) registry.ordinal_by_device[device] = ordinal;
}

int Group::DeviceOf(int ordinal) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& [device, its_ordinal] : registry.ordinal_by_device) {
    if (its_ordinal == ordinal) return device;
  }
  return ordinal;
}

bool Group::HasFailedSpanning() {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& group : registry.groups) {
    if (!group->spans_processes_) continue;
    std::lock_guard<std::mutex> group_lock(group->mutex_);
    if (group->failure_.empty()) group->failure_ = group->Listen();
    if (!group->failure_.empty() || group->dead_ != group->next_dead_) return true;
  }
  return false;
}

uint64_t Group::SpanningGeneration() {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  return registry.spanning_generation;
}

void Group::Resume(uint64_t generation) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.spanning_generation = generation;
  for (const auto& group : registry.groups) {
    if (!group->spans_processes_) continue;
    std::lock_guard<std::mutex> group_lock(group->mutex_);
    group->generation_ = generation;
    group->failure_.clear();
    group->dead_ = group->next_dead_;
  }
}

void Group::SetTimeout(double seconds) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.timeout_ns = static_cast<uint64_t>(seconds * 1e9);
  if (registry.groups.empty()) return;  // on a machine without CUDA too
  DeviceGuard guard;
  for (const auto& group : registry.groups) group->SetViewTimeout(registry.timeout_ns);
}

void Group::SetDead(const std::vector<int>& devices) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.dead = std::set<int>(devices.begin(), devices.end());
  for (const auto& group : registry.groups) {
    std::lock_guard<std::mutex> group_lock(group->mutex_);
    group->next_dead_ = group->DeadRanks();
  }
}

bool Group::IsDead(int device) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  return registry.dead.count(device) != 0;
}

std::vector<int> Group::DeadDevices() {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  return std::vector<int>(registry.dead.begin(), registry.dead.end());
}

// Of the registry's dead devices, as a mask of ranks. Called with its mutex held.
uint32_t Group::DeadRanks() const {
  uint32_t dead = 0;
  for (size_t rank = 0; rank < devices_.size(); ++rank) {
    if (TheRegistry().dead.count(devices_[rank]) != 0) dead |= 1u << rank;
  }
  return dead;
}

void Group::SetViewTimeout(uint64_t timeout_ns) {
  for (const Rank& rank : ranks_) {
    if (!is_local(rank)) continue;
    Check("cudaSetDevice", cudaSetDevice(rank.place.device));
    Check("cudaMemcpy",
          cudaMemcpyAsync(&rank.view->timeout_ns, &timeout_ns, sizeof timeout_ns, cudaMemcpyHostToDevice, rank.aside));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(rank.aside));
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
  if (spans_processes_) throw std::runtime_error("jax_ep: low-latency calls are not served across processes");
  if (FindArenas(window_bytes) != nullptr) return;
  std::lock_guard<std::mutex> making(making_);
  if (FindArenas(window_bytes) != nullptr) return;
  auto arenas = std::make_unique<Arenas>();
  arenas->window_bytes = SizeClass(window_bytes);
  const int64_t bytes = kArenaHeaderBytes + kDepth * arenas->window_bytes;
  DeviceGuard guard;
  for (const Rank& rank : ranks_) {
    char* arena = nullptr;
    Check("cudaSetDevice", cudaSetDevice(rank.place.device));
    Check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&arena), bytes));
    Check("cudaMemset", cudaMemsetAsync(arena, 0, bytes, rank.aside));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(rank.aside));
    arenas->of_rank.push_back(arena);
  }
  std::lock_guard<std::mutex> lock(mutex_);  // a rank begins a generation before its arena is there, or with it
  if (arenas_.size() + 1 >= kMaxLedgers) throw std::runtime_error("jax_ep: too many sizes of low-latency calls");
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Check("cudaSetDevice", cudaSetDevice(ranks_[i].place.device));
    const uint64_t epoch = ranks_[i].generation << kCountBits;
    auto* ledger = static_cast<Ledger*>(reinterpret_cast<Arena*>(arenas->of_rank[i]));
    Check("cudaMemcpy", cudaMemcpyAsync(&ledger->epoch, &epoch, sizeof epoch, cudaMemcpyHostToDevice, ranks_[i].aside));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(ranks_[i].aside));
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

// What has failed here since the last time, in a sentence. Called with the mutex held.
std::string Group::Listen() {
  const auto name = [this](int rank) {
    const std::string of = spans_processes_ ? " of process " + std::to_string(ranks_[rank].place.process) : "";
    return "rank " + std::to_string(rank) + of;
  };
  std::string news;
  for (Rank& rank : ranks_) {
    if (!is_local(rank)) continue;
    const Status& status = *rank.status;
    const uint32_t failures = status.failures;
    if (failures == rank.heard) continue;
    rank.heard = failures;
    if (status.epoch >> kCountBits < generation_) continue;  // a consequence of what has been told
    news +=
        (news.empty() ? "" : "; ") + InWords(status, name(status.rank), name(status.peer), TheRegistry().timeout_ns);
    if (status.peer != status.rank) {
      news += " (rank " + std::to_string(status.peer) + " is device " + std::to_string(devices_[status.peer]) + ")";
    }
  }
  return news;
}

std::string Group::Enter(int rank, int64_t run, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::string news = Listen();
  if (spans_processes_) {
    if (failure_.empty()) failure_ = news;
    if (!failure_.empty()) return failure_ + ". Call jax_ep.initialize() in every process to begin anew";
  } else if (!news.empty()) {
    ++generation_;
    failed_run_ = run;
    failure_ = news;
  }
  if (!spans_processes_) {
    if (dead_ != next_dead_ && run > newest_run_ && run != failed_run_) {
      ++generation_;
      dead_ = next_dead_;
      first_run_ = run;
    }
    newest_run_ = std::max(newest_run_, run);
    if (run < first_run_) return "";  // this rank is behind the one that began the generation
  }
  if (ranks_[rank].generation == generation_) return "";
  if (!spans_processes_ && run == failed_run_) return failure_;
  ranks_[rank].generation = generation_;
  Ledgers ledgers{};
  ledgers.ledger[ledgers.count++] = ranks_[rank].window;
  for (const auto& arenas : arenas_) ledgers.ledger[ledgers.count++] = reinterpret_cast<Arena*>(arenas->of_rank[rank]);
  ledgers.view = ranks_[rank].view;
  const cudaError_t error = LaunchBeginGeneration(ledgers, generation_, dead_, stream);
  return error == cudaSuccess ? "" : std::string("a new generation could not begin: ") + cudaGetErrorString(error);
}

std::string Group::CheckShared(int rank, const void* address) {
  const Place& place = ranks_[rank].place;
  const uint64_t offset = reinterpret_cast<uint64_t>(address) - place.shared_begin;
  if (!spans_processes_ || address == nullptr || offset < place.shared_bytes) return "";
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.empty()) {
    failure_ = "an array of rank " + std::to_string(rank) +
               " lies outside of the memory that XLA preallocated, where no other process reaches it: it is a constant "
               "of the program or was taken over from another library. Pass a copy of it as an argument";
  }
  return failure_;
}

}  // namespace jax_ep
