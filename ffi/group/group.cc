#include "group/group.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <set>
#include <stdexcept>

#include "combine/combine.h"
#include "combine/combine_grad.h"
#include "dispatch/dispatch.h"
#include "group/barrier.h"
#include "group/landing.h"
#include "group/shared_memory.h"
#include "halves/halves.h"
#include "low_latency/low_latency.h"

namespace jax_ep {
namespace {

// An execution of a program. All its devices of this process share its id.
struct Run {
  uint64_t number;                                   // in the order in which this process meets them
  std::map<std::vector<int>, std::string> failures;  // of groups, by their devices: what had failed before it
};

struct Registry {
  static constexpr size_t kRunsInFlight = 1024;  // more than hosts run ahead of their devices

  std::mutex mutex;
  std::vector<std::unique_ptr<Group>> groups;
  std::map<std::vector<int>, Group*> by_devices;
  std::map<int, int> ordinal_by_device;
  uint64_t spanning_generation = 0;
  uint64_t timeout_ns = 60'000'000'000;  // until jax_ep.config says another
  std::map<int64_t, Run> runs;           // by id: the last ones
  std::deque<int64_t> run_ids;           // the same, the oldest first
  std::atomic<uint64_t> num_runs{0};     // read without the mutex too
  std::set<int> dead;                    // devices
  std::set<int> unmaskable;              // devices of groups over nodes

  // Called with the mutex held.
  Run& Meet(int64_t id) {
    const auto known = runs.find(id);
    if (known != runs.end()) return known->second;
    if (run_ids.size() >= kRunsInFlight) {
      runs.erase(run_ids.front());
      run_ids.pop_front();
    }
    run_ids.push_back(id);
    return runs[id] = Run{++num_runs, {}};
  }

  uint64_t NumberOf(int64_t run) {
    std::lock_guard<std::mutex> lock(mutex);
    return Meet(run).number;
  }

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

// Throws if one of the devices is among `others`, where one of both is masked and the other of a group over nodes.
void CheckMaskable(const std::vector<int>& devices, const std::set<int>& others) {
  for (int device : devices) {
    if (others.count(device) == 0) continue;
    throw std::runtime_error("jax_ep: device " + std::to_string(device) +
                             " is in a group over several nodes, whose kernels cannot go on without it. Take it off "
                             "jax_ep.config.dead_devices, or start anew without it.");
  }
}

// The calling thread's device is as before when this goes.
class DeviceGuard {
 public:
  DeviceGuard() { Check("cudaGetDevice", cudaGetDevice(&device_)); }
  ~DeviceGuard() { cudaSetDevice(device_); }

 private:
  int device_ = 0;
};

const char* const kOperations[] = {"dispatch", "dispatch_cached", "notify", "combine", "barrier", "combine_grad"};
const char* const kPhases[] = {"meet (the peer's post)",
                               "rows (the peer's progress)",
                               "leave (the peer's end of call)",
                               "refused",
                               "reuse (the peer's end of an earlier call; is each start followed by its done?)",
                               "lines (what the peer sends)",
                               "in flight",
                               "full",
                               "counted"};

std::string InWords(const Status& status, const std::string& who, const std::string& whom, uint64_t timeout_ns) {
  const uint64_t seen = status.seen, epoch = status.epoch;
  const auto state = [](uint64_t flag) {
    return StateOf(flag) == kGone ? "gone" : StateOf(flag) == kDone ? "done" : std::to_string(StateOf(flag));
  };
  const auto number = [](uint64_t epoch) { return std::to_string(CountOf(epoch)); };
  if (status.phase == kInFlight) {
    return std::string(kOperations[status.operation]) + ": " + who +
           " was given a value in flight that no start of this group has made, or one from before its mask changed";
  }
  if (status.phase == kCounted) {
    return std::string(kOperations[status.operation]) + ": " + who + " has counted " + number(status.epoch) +
           " calls of the group in one memory, which is as far as it can; the next run begins anew";
  }
  if (status.phase == kFull) {
    return std::string(kOperations[status.operation]) + ": " + who + " began a call while " +
           std::to_string(status.lane) +
           " starts of its size were in flight, which is all that there is room for: each start needs its done before "
           "so many others. Where the order is XLA's, jax.lax.optimization_barrier on a start's operand and an "
           "earlier done's result keeps them apart (docs/overlap.md)";
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
  generations_ = {{0, 0, DeadRanks()}};
  spans_processes_ = std::any_of(places.begin(), places.end(), [](const Place& place) { return place.device < 0; });
  DeviceGuard guard;
  for (size_t i = 0; i < places.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.place = places[i];
    rank.dead = generations_.back().dead;
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
    for (cudaEvent_t* event : {&rank.before, &rank.beside, &rank.staged}) {
      Check("cudaEventCreate", cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    Check("cudaStreamCreate", cudaStreamCreateWithFlags(&rank.push, cudaStreamNonBlocking));
    // A kernel first loaded while a peer's kernel waits for it would never run.
    Check("loading dispatch", LoadDispatch());
    Check("loading combine", LoadCombine());
    Check("loading combine_grad", LoadCombineGrad());
    Check("loading barrier", LoadBarrier());
    Check("loading low-latency dispatch", LoadLowLatencyDispatch());
    Check("loading low-latency combine", LoadLowLatencyCombine());
    Check("loading the halves of dispatch", LoadDispatchHalves());
    Check("loading the halves of combine", LoadCombineHalves());
  }
  for (size_t i = 0; i < ranks_.size(); ++i) {
    if (!is_local(ranks_[i])) continue;
    GroupView view{};
    view.rank = static_cast<int>(i);
    view.num_ranks = num_ranks();
    view.timeout_ns = TheRegistry().timeout_ns;
    view.status = ranks_[i].status;
    view.membership = generations_.back().dead;
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
  registry.groups.back()->generations_.back().number = registry.spanning_generation;
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
    if (!group->failure_.empty() || group->generations_.back().dead != group->DeadRanks()) return true;
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
    group->generations_ = {{generation, 0, group->DeadRanks()}};
    group->told_before_ = generation;
    group->failure_.clear();
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
  CheckMaskable(devices, registry.unmaskable);
  registry.dead = std::set<int>(devices.begin(), devices.end());
  for (const auto& group : registry.groups) {
    std::lock_guard<std::mutex> group_lock(group->mutex_);
    const Generation newest = group->generations_.back();
    const uint32_t dead = group->DeadRanks();
    if (group->spans_processes_ || newest.dead == dead) continue;
    group->generations_.push_back({newest.number + 1, registry.num_runs + 1, dead});
  }
}

void Group::ForbidMasks(const std::vector<int>& devices) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  CheckMaskable(devices, registry.dead);
  registry.unmaskable.insert(devices.begin(), devices.end());
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

Group::SharedArena* Group::FindSharedArena(Purpose purpose, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& arena : arenas_) {
    if (arena->purpose == purpose && arena->bytes == bytes) return arena.get();
  }
  return nullptr;
}

void Group::MakeSharedArena(Purpose purpose, int64_t bytes, const std::vector<uint64_t>& at) {
  if (FindSharedArena(purpose, bytes) != nullptr) return;
  if (at.size() != (spans_processes_ ? ranks_.size() : 0)) {
    throw std::runtime_error(
        "jax_ep: this program was not lowered in this process, and no memory is shared for it with the processes of "
        "its group. Compile it again with jax.jit");
  }
  std::lock_guard<std::mutex> making(making_);
  if (FindSharedArena(purpose, bytes) != nullptr) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (arenas_.size() + 1 >= kMaxLedgers) throw std::runtime_error("jax_ep: too many sizes of calls through arenas");
  }
  auto arena = std::make_unique<SharedArena>(SharedArena{purpose, bytes, {}, std::vector<Starts>(ranks_.size())});
  DeviceGuard guard;
  for (size_t i = 0; i < ranks_.size(); ++i) {
    char* memory = nullptr;
    if (spans_processes_) {
      memory = static_cast<char*>(ToPointer(at[i]));
    } else {
      Check("cudaSetDevice", cudaSetDevice(ranks_[i].place.device));
      if (const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&memory), bytes); error != cudaSuccess) {
        for (char* others : arena->of_rank) cudaFree(others);  // addresses name their devices
        Check("cudaMalloc", error);
      }
      Check("cudaMemset", cudaMemsetAsync(memory, 0, bytes, ranks_[i].aside));
      Check("cudaStreamSynchronize", cudaStreamSynchronize(ranks_[i].aside));
    }
    arena->of_rank.push_back(memory);
    if (purpose != Purpose::kHalves || !is_local(ranks_[i])) continue;
    Check("cudaSetDevice", cudaSetDevice(ranks_[i].place.device));
    for (cudaEvent_t& event : arena->starts[i].pushed) {
      Check("cudaEventCreate", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);  // a rank begins a generation before its arena is there, or with it
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const Rank& rank = ranks_[i];
    if (!is_local(rank)) continue;
    Check("cudaSetDevice", cudaSetDevice(rank.place.device));
    const uint64_t epoch = rank.generation << kCountBits;
    auto* ledger = reinterpret_cast<Ledger*>(arena->of_rank[i]);
    Check("cudaMemcpy", cudaMemcpyAsync(&ledger->epoch, &epoch, sizeof epoch, cudaMemcpyHostToDevice, rank.aside));
    Check("cudaStreamSynchronize", cudaStreamSynchronize(rank.aside));
  }
  arenas_.push_back(std::move(arena));
}

const std::vector<char*>& Group::shared_arena(Purpose purpose, int64_t bytes) {
  const SharedArena* const arena = FindSharedArena(purpose, bytes);
  if (arena == nullptr) throw std::runtime_error("jax_ep: this size of calls has no shared arena");
  return arena->of_rank;
}

namespace {

// Sizes are powers of two, so that all arenas together take less than twice the largest's bytes.
int64_t WindowClass(int64_t window_bytes) {
  int64_t size = 1 << 16;
  while (size < window_bytes) size *= 2;
  return size;
}

// Landings are large: at most an eighth is wasted so that calls of nearly one size share them.
int64_t LandingClass(int64_t window_bytes) {
  int64_t step = 1 << 18;
  while (step * 16 <= window_bytes) step *= 2;
  return RoundUpTo(window_bytes, step);
}

}  // namespace

int64_t Group::LowLatencyArenaBytes(int64_t window_bytes) {
  return kArenaHeaderBytes + kDepth * WindowClass(window_bytes);
}

int64_t Group::LandingArenaBytes(int64_t window_bytes) {
  const int depth = LandingDepth(window_bytes);
  // Arenas are known by their bytes: four small windows are never taken for two large ones.
  return kLandingHeaderBytes * (depth == kDepth ? 1 : 2) + depth * LandingClass(window_bytes);
}

ArenaView Group::ViewOf(int rank, Purpose purpose, int64_t bytes, int64_t window_bytes, int depth) {
  const std::vector<char*>& of_rank = shared_arena(purpose, bytes);
  ArenaView view{};
  view.group = ranks_[rank].view;
  view.rank = rank;
  view.num_ranks = num_ranks();
  view.depth = depth;
  view.window_bytes = window_bytes;
  std::copy(of_rank.begin(), of_rank.end(), view.arena);
  return view;
}

ArenaView Group::arenas(int rank, int64_t window_bytes) {
  return ViewOf(rank, Purpose::kLowLatency, LowLatencyArenaBytes(window_bytes), WindowClass(window_bytes), kDepth);
}

ArenaView Group::landings(int rank, int64_t window_bytes) {
  return ViewOf(rank, Purpose::kHalves, LandingArenaBytes(window_bytes), LandingClass(window_bytes),
                LandingDepth(window_bytes));
}

cudaError_t Group::MakeFork(int rank, int64_t window_bytes, cudaStream_t stream, Fork* fork) {
  SharedArena* const arena = FindSharedArena(Purpose::kHalves, LandingArenaBytes(window_bytes));
  if (arena == nullptr) return cudaErrorInvalidValue;
  std::lock_guard<std::mutex> lock(mutex_);
  const Rank& of = ranks_[rank];
  Starts& starts = arena->starts[rank];
  if (starts.generation != of.generation) starts.generation = of.generation, starts.count = 0;
  fork->slot = static_cast<int>((starts.count + 1) & (LandingDepth(window_bytes) - 1));
  fork->count = &starts.count;
  fork->stream = of.push;
  fork->staged = of.staged;
  fork->pushed = starts.pushed[fork->slot];
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << num_ranks()) - 1);
  fork->peers = (of.dead >> rank & 1) != 0 ? 0 : all & ~of.dead & ~(1u << rank);
  return cudaStreamWaitEvent(stream, fork->pushed, 0);
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
    if (status.epoch >> kCountBits < told_before_) continue;  // a consequence of what has been told
    news +=
        (news.empty() ? "" : "; ") + InWords(status, name(status.rank), name(status.peer), TheRegistry().timeout_ns);
    if (status.peer != status.rank) {
      news += " (rank " + std::to_string(status.peer) + " is device " + std::to_string(devices_[status.peer]) + ")";
    }
  }
  return news;
}

// The same, and what follows from it: the failure that concerns calls from now on, if there is one and it is news or
// the group spans processes. Called with the mutex held.
std::string Group::Hear() {
  std::string news = Listen();
  if (spans_processes_) {
    if (failure_.empty()) failure_ = news;
    return failure_.empty() ? "" : failure_ + ". Call jax_ep.initialize() in every process to begin anew";
  }
  if (!news.empty()) BeginAnew(news);
  return news;
}

// In one process: all runs that have begun are refused, the next begin a new generation. Called with the mutex held.
void Group::BeginAnew(const std::string& failure) {
  const Generation newest = generations_.back();
  refused_runs_ = TheRegistry().num_runs;
  generations_.push_back({newest.number + 1, refused_runs_ + 1, newest.dead});
  told_before_ = newest.number + 1;
  failure_ = failure;
}

// That of a run's calls. Called with the mutex held.
const Group::Generation& Group::GenerationOf(uint64_t run) const {
  size_t i = generations_.size() - 1;
  while (i > 0 && generations_[i].first_run > run) --i;
  return generations_[i];
}

// Called with the mutex held.
std::string Group::Begin(const Generation& generation, int rank, cudaStream_t stream) {
  if (generation.number >= kMaxGenerations) {
    return "it has begun anew " + std::to_string(kMaxGenerations - 1) +
           " times, after failures and with other dead_devices, which is as often as it can. Start the process anew";
  }
  Ledgers ledgers{};
  ledgers.ledger[ledgers.count++] = ranks_[rank].window;
  for (const auto& arena : arenas_) ledgers.ledger[ledgers.count++] = reinterpret_cast<Ledger*>(arena->of_rank[rank]);
  ledgers.view = ranks_[rank].view;
  const cudaError_t error = LaunchBeginGeneration(ledgers, generation.number, generation.dead, stream);
  if (error == cudaSuccess) ranks_[rank].generation = generation.number, ranks_[rank].dead = generation.dead;
  return error == cudaSuccess ? "" : std::string("a new generation could not begin: ") + cudaGetErrorString(error);
}

std::string Group::HearBefore(int64_t run, const std::vector<int>& devices, int num_ranks) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  Run& met = registry.Meet(run);
  const auto known = met.failures.find(devices);
  if (known != met.failures.end()) return known->second;
  std::string failure;
  for (auto first = devices.begin(); devices.end() - first >= num_ranks && failure.empty(); first += num_ranks) {
    const auto found = registry.by_devices.find(std::vector<int>(first, first + num_ranks));
    if (found == registry.by_devices.end()) continue;  // of other processes
    Group& group = *found->second;
    std::lock_guard<std::mutex> group_lock(group.mutex_);
    failure = group.Hear();
    if (failure.empty() && met.number <= group.refused_runs_) failure = group.failure_;
  }
  return met.failures[devices] = failure;
}

std::string Group::BeginRun(int rank, int64_t run, cudaStream_t stream) {
  const uint64_t number = TheRegistry().NumberOf(run);
  std::lock_guard<std::mutex> lock(mutex_);
  ranks_[rank].main = stream;
  const bool refused = spans_processes_ ? !failure_.empty() : number <= refused_runs_;  // heard of meanwhile
  const Generation& generation = GenerationOf(number);
  return refused || ranks_[rank].generation >= generation.number ? "" : Begin(generation, rank, stream);
}

// Calls of a rank share its window: on whatever stream one is launched, it runs after those launched before. A call
// that is captured is part of a graph, a chain that runs on the main stream. Called with the mutex held.
cudaError_t Group::Follow(Rank& rank, cudaStream_t stream) {
  rank.launches_beside = false;
  if (rank.main == nullptr) return cudaSuccess;  // not under XLA
  if (stream != rank.main) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (cudaError_t error = cudaStreamIsCapturing(stream, &capture); error != cudaSuccess) return error;
    if (capture != cudaStreamCaptureStatusNone) return cudaSuccess;
    if (cudaError_t error = cudaEventRecord(rank.before, rank.main); error != cudaSuccess) return error;
    if (cudaError_t error = cudaStreamWaitEvent(stream, rank.before, 0); error != cudaSuccess) return error;
    rank.launches_beside = true;
  }
  const bool waits = rank.has_beside;
  rank.has_beside = rank.launches_beside;
  return waits ? cudaStreamWaitEvent(stream, rank.beside, 0) : cudaSuccess;
}

cudaError_t Group::Leave(int rank, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  return ranks_[rank].launches_beside ? cudaEventRecord(ranks_[rank].beside, stream) : cudaSuccess;
}

std::string Group::Enter(int rank, int64_t run, cudaStream_t stream) {
  const uint64_t number = TheRegistry().NumberOf(run);
  std::lock_guard<std::mutex> lock(mutex_);
  if (cudaError_t error = Follow(ranks_[rank], stream); error != cudaSuccess) {
    return std::string("its calls could not be put in an order: ") + cudaGetErrorString(error);
  }
  std::string failure = Hear();
  if (spans_processes_ && !failure.empty()) return failure;
  if (!spans_processes_ && number <= refused_runs_) return failure_;
  const Generation& generation = GenerationOf(number);
  return ranks_[rank].generation >= generation.number ? "" : Begin(generation, rank, stream);
}

// Whether kernels on the other ranks' devices may read there. A program's constants lie with its code, which is mapped
// on its own device alone; so does memory that another library has mapped so.
bool Group::ReachedByPeers(int rank, const void* address) const {
  const int own = ranks_[rank].place.device;
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess) return true;
  bool reached = true;
  for (const Rank& peer : ranks_) {
    if (peer.place.device == own || !reached) continue;
    cudaPointerAttributes attributes{};
    reached = cudaSetDevice(peer.place.device) == cudaSuccess &&
              cudaPointerGetAttributes(&attributes, address) == cudaSuccess && attributes.devicePointer != nullptr;
  }
  cudaSetDevice(before);
  cudaGetLastError();
  return reached;
}

std::string Group::CheckShared(int rank, const void* address, const void* result) {
  const std::string whose = "an array of rank " + std::to_string(rank);
  const std::string why =
      "it is a constant of the program or was taken over from another library. Pass a copy of it as "
      "an argument";
  const Place& place = ranks_[rank].place;
  if (spans_processes_) {
    const uint64_t offset = reinterpret_cast<uint64_t>(address) - place.shared_begin;
    if (address == nullptr || offset < place.shared_bytes) return "";
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.empty()) {
      failure_ = whose + " lies outside of the memory that XLA preallocated, where no other process reaches it: " + why;
    }
    return failure_;
  }
  if (address == nullptr || result == nullptr) return "";
  const uint64_t part = reinterpret_cast<uint64_t>(address) >> 21;
  std::lock_guard<std::mutex> lock(mutex_);
  std::unordered_set<uint64_t>& reached = ranks_[rank].reached;
  if (reached.count(part) != 0) return "";
  // Peers do write the result: if that, too, seems out of reach, this is no way to find out.
  if (ReachedByPeers(rank, address) || !ReachedByPeers(rank, result)) {
    reached.insert(part);
    return "";
  }
  // Of several ranks, whose arrays are constants alike, the first begins anew.
  if (generations_.back().first_run <= TheRegistry().num_runs) BeginAnew(whose + " is out of its peers' reach: " + why);
  return failure_;
}

}  // namespace jax_ep
