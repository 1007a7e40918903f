// A group: the ranks of one expert-parallel axis, their windows and how a kernel finds them. Made once for a list of
// devices while a program is lowered, never freed: a captured graph may still hold its addresses. Its ranks are of this
// process, or of several on one host (jax_ep/_src/peers.py has mapped their memory). How memory is found is here alone;
// kernels see GroupView and nothing of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "group/arena.h"
#include "group/window.h"

namespace jax_ep {

// A rank of a group that spans processes. Addresses are those of this process unless said.
struct Place {
  int process;
  int device;       // CUDA ordinal; -1: another process's
  uint64_t window;  // a Window of zeros
  // The memory that its peers map, as its own process sees it, and what makes an address in it one of this process.
  uint64_t shared_begin, shared_bytes, shift;
};

// What calls a shared arena is for: different ones never share it.
enum class Purpose : int { kLowLatency, kHalves };

// Where a start half's rows are pushed while its stream goes on.
struct Fork {
  cudaStream_t stream;
  cudaEvent_t staged, pushed;
  int slot;         // of the window: host and device count the starts of a generation alike
  uint64_t* count;  // of the starts: whoever has launched the stage adds this one
  uint32_t peers;   // a bit for each rank that is pushed to
};

class Group {
 public:
  // The group of these devices (JAX's ids), rank by rank; made at the first call, if all of them are of this process.
  // Throws std::runtime_error with a sentence.
  static Group& OfDevices(const std::vector<int>& devices);
  // Makes a group whose ranks lie as said; does nothing if there is one of these devices. Throws as OfDevices does.
  static void MakeSpanning(const std::vector<int>& devices, const std::vector<Place>& places);
  // Tells the CUDA ordinals of this process's devices; as long as none is told, a device's id is its ordinal.
  static void SetOrdinals(const std::map<int, int>& ordinal_by_device);
  // The JAX id of a device of this process.
  static int DeviceOf(int ordinal);
  // Of the groups that span processes: whether a call failed here since the last Resume, or the dead are others now;
  // their generation; the beginning of the next, by a number on which all processes have agreed.
  static bool HasFailedSpanning();
  static uint64_t SpanningGeneration();
  static void Resume(uint64_t generation);
  // How long a wait for a peer may take, for all groups, now and later.
  static void SetTimeout(double seconds);
  // The devices (JAX's ids) whose ranks take no part in any group from now on, until told otherwise. Within a process
  // it holds from each group's next run on, over several from Resume on.
  static void SetDead(const std::vector<int>& devices);  // throws std::runtime_error, as said by ForbidMasks
  // None of these devices can be masked from now on: they are in groups over nodes, whose kernels know of no mask, and
  // would wait for them. Throws std::runtime_error if one is masked, as SetDead does later.
  static void ForbidMasks(const std::vector<int>& devices);
  static bool IsDead(int device);
  static std::vector<int> DeadDevices();
  // True where the first device reads and writes the memory of the others directly, and they each other's.
  static bool HavePeerAccess(const std::vector<int>& devices);

  int num_ranks() const { return static_cast<int>(ranks_.size()); }
  const GroupView* view(int rank) const { return ranks_[rank].view; }
  // Sees to memory at every rank that all ranks read and write: zeros, of which the first are a Ledger, whose epoch
  // follows this group's generations. Made once for a purpose and size, never freed. Of a group that spans processes
  // `at` has where this process sees each rank's, zero but for what peers have stored there already; in one process it
  // is empty and the memory is allocated here. Throws std::runtime_error.
  void MakeSharedArena(Purpose purpose, int64_t bytes, const std::vector<uint64_t>& at = {});
  // Of each rank, where this process sees its part; std::runtime_error where none has been made.
  const std::vector<char*>& shared_arena(Purpose purpose, int64_t bytes);
  // Bytes of the shared arena of low-latency calls that need so many of a window.
  static int64_t LowLatencyArenaBytes(int64_t window_bytes);
  // In one process: sees to the shared arena of such calls, as above.
  void MakeArenas(int64_t window_bytes) { MakeSharedArena(Purpose::kLowLatency, LowLatencyArenaBytes(window_bytes)); }
  // How `rank` finds it; it must have been made.
  ArenaView arenas(int rank, int64_t window_bytes);
  // The same for the windows in which the halves of high-throughput calls land.
  static int64_t LandingArenaBytes(int64_t window_bytes);
  ArenaView landings(int rank, int64_t window_bytes);
  // A start half of `rank` through landings of this size, to be launched on `stream` now. Its push waits on the fork's
  // stream for `staged`, and is over with `pushed`: what `stream` gets from here on comes behind the push before it out
  // of that window, but behind no other.
  cudaError_t MakeFork(int rank, int64_t window_bytes, cudaStream_t stream, Fork* fork);
  // Before anything of `run`, an execution of a program, is launched on a device of this process: what has failed in
  // the groups `devices` (group by group, `num_ranks` each), in a sentence, or nothing. If something has, the run is to
  // be given up. Whoever asks first decides, so all devices of the process give a run up or none does.
  static std::string HearBefore(int64_t run, const std::vector<int>& devices, int num_ranks);
  // After that, on the run's stream: if a run of this group has failed or its dead ranks are others now, calls of
  // `rank` from here on are of a new generation, so none pairs with one from before, be it launched or replayed in a
  // CUDA graph.
  std::string BeginRun(int rank, int64_t run, cudaStream_t stream);
  // Before each launch of `rank` on `stream`: what has failed meanwhile, in a sentence, or nothing. If something has,
  // the call is to be launched as refused and the sentence to be raised, like all that follow in the runs that have
  // begun; later ones begin a new generation. Processes do not know each other's runs: a group that spans them refuses
  // until Resume. On whatever stream, calls run one after another in the order in which they are launched.
  std::string Enter(int rank, int64_t run, cudaStream_t stream);
  // After each launch.
  cudaError_t Leave(int rank, cudaStream_t stream);
  // Why a peer in another process could not use `address`, an operand or result of `rank`; nothing if it can. If not,
  // the group has failed. In one process the same of an operand, given a `result` of the same call, which peers reach:
  // not what lies with a program's code.
  std::string CheckShared(int rank, const void* address, const void* result = nullptr);

 private:
  struct Rank {
    Place place;
    Window* window = nullptr;
    GroupView* view = nullptr;
    Status* status = nullptr;
    cudaStream_t aside = nullptr;  // for the host's writes while kernels wait: the default stream could wait for them
    cudaStream_t push = nullptr;   // of forks
    cudaEvent_t staged = nullptr;
    uint32_t heard = 0;       // failures of this rank that the host has heard of
    uint64_t generation = 0;  // of this rank's calls
    uint32_t dead = 0;        // likewise
    // Calls beside the run's main stream, as XLA places those inside of compute_on: one is being launched now, one was
    // launched since the last on the main stream; and the events that keep them apart from the others.
    cudaStream_t main = nullptr;
    bool launches_beside = false, has_beside = false;
    cudaEvent_t before = nullptr, beside = nullptr;
    std::unordered_set<uint64_t> reached;  // in one process: parts of memory, 2 MiB each, that peers reach
  };

  // Starts of halves, counted as kernels count them: from the begin of a generation on.
  struct Starts {
    uint64_t generation = 0, count = 0;
    cudaEvent_t pushed[kDepth] = {};  // by window
  };

  struct SharedArena {
    Purpose purpose;
    int64_t bytes;
    std::vector<char*> of_rank;
    std::vector<Starts> starts;  // of each rank; of landings
  };

  // Calls of one generation pair with each other only, and have the same dead ranks. In one process a failure and a new
  // mask begin one, from the first run on that no rank has met yet.
  struct Generation {
    uint64_t number, first_run;
    uint32_t dead;
  };

  Group(const std::vector<int>& devices, const std::vector<Place>& places);
  SharedArena* FindSharedArena(Purpose purpose, int64_t bytes);
  ArenaView ViewOf(int rank, Purpose purpose, int64_t bytes, int64_t window_bytes, int depth);
  void SetViewTimeout(uint64_t timeout_ns);
  bool is_local(const Rank& rank) const { return rank.place.device >= 0; }
  std::string Listen();
  std::string Hear();
  void BeginAnew(const std::string& failure);
  bool ReachedByPeers(int rank, const void* address) const;
  uint32_t DeadRanks() const;
  const Generation& GenerationOf(uint64_t run) const;
  std::string Begin(const Generation& generation, int rank, cudaStream_t stream);
  static cudaError_t Follow(Rank& rank, cudaStream_t stream);

  std::vector<int> devices_;
  std::vector<Rank> ranks_;
  bool spans_processes_;
  std::mutex making_;  // held while arenas are made
  std::mutex mutex_;   // of what follows, and of heard and generation
  std::vector<std::unique_ptr<SharedArena>> arenas_;
  std::vector<Generation> generations_;  // the newest last; of a group that spans processes only that
  uint64_t told_before_ = 0;             // what fails in earlier generations is a consequence of what has been told
  uint64_t refused_runs_ = 0;            // in one process: how many had begun when the last failure was heard of
  std::string failure_;                  // in one process the last, else the first of this generation
};

}  // namespace jax_ep
