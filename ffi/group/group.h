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
  static void SetDead(const std::vector<int>& devices);
  static bool IsDead(int device);
  static std::vector<int> DeadDevices();
  // True where the first device reads and writes the memory of the others directly, and they each other's.
  static bool HavePeerAccess(const std::vector<int>& devices);

  int num_ranks() const { return static_cast<int>(ranks_.size()); }
  const GroupView* view(int rank) const { return ranks_[rank].view; }
  // Sees to arenas whose windows hold so many bytes; made once for a size, never freed. Throws std::runtime_error.
  void MakeArenas(int64_t window_bytes);
  // How `rank` finds them; they must have been made.
  ArenaView arenas(int rank, int64_t window_bytes);
  // Before each launch of `rank` on `stream`: what has failed in this group, in a sentence, or nothing. If something
  // has, the call is to be launched as refused and the sentence to be raised. All ranks' calls of the run in which the
  // failure is first heard of are refused; in the next run each rank begins a new generation of calls, so no call pairs
  // with one from before. Processes do not know each other's runs: a group that spans them refuses until Resume.
  std::string Enter(int rank, int64_t run, cudaStream_t stream);
  // Why a peer in another process could not use `address`, an operand or result of `rank`; nothing if it can. If not,
  // the group has failed.
  std::string CheckShared(int rank, const void* address);

 private:
  struct Rank {
    Place place;
    Window* window = nullptr;
    GroupView* view = nullptr;
    Status* status = nullptr;
    cudaStream_t aside = nullptr;  // for the host's writes while kernels wait: the default stream could wait for them
    uint32_t heard = 0;            // failures of this rank that the host has heard of
    uint64_t generation = 0;       // of this rank's calls
  };

  // The arenas of all ranks whose windows hold `window_bytes`.
  struct Arenas {
    int64_t window_bytes = 0;
    std::vector<char*> of_rank;
  };

  Group(const std::vector<int>& devices, const std::vector<Place>& places);
  const Arenas* FindArenas(int64_t window_bytes);
  void SetViewTimeout(uint64_t timeout_ns);
  bool is_local(const Rank& rank) const { return rank.place.device >= 0; }
  std::string Listen();
  uint32_t DeadRanks() const;

  std::vector<int> devices_;
  std::vector<Rank> ranks_;
  bool spans_processes_;
  std::mutex making_;  // held while arenas are made
  std::mutex mutex_;   // of what follows, and of heard and generation
  std::vector<std::unique_ptr<Arenas>> arenas_;
  uint64_t generation_ = 0;  // in one process: failures heard of and changes of the mask
  int64_t failed_run_ = 0;
  std::string failure_;                // in one process the last, else the first of this generation
  uint32_t dead_ = 0, next_dead_ = 0;  // ranks: in this generation, in the next
  // Runs are numbered as they are launched. A mask changes between two: no rank has entered the later one before.
  int64_t newest_run_ = -1, first_run_ = -1;  // entered; of this generation, if a mask began it
};

}  // namespace jax_ep
