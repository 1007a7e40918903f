// A group: the ranks of one expert-parallel axis, their windows and how a kernel finds them. Made once for a list of
// devices while a program is lowered, never freed: a captured graph may still hold its addresses. In one process. How
// memory is found is here alone; kernels see GroupView and nothing of it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "group/arena.h"
#include "group/window.h"

namespace jax_ep {

class Group {
 public:
  // The group of these CUDA devices, rank by rank; made at the first call. Throws std::runtime_error with a sentence.
  static Group& OfDevices(const std::vector<int>& devices);
  // Made before by OfDevices; null for an unknown id.
  static Group* Find(int64_t id);
  // How long a wait for a peer may take, for all groups, now and later.
  static void SetTimeout(double seconds);
  // True where the first device reads and writes the memory of the others directly, and they each other's.
  static bool HavePeerAccess(const std::vector<int>& devices);

  int64_t id() const { return id_; }
  int num_ranks() const { return static_cast<int>(ranks_.size()); }
  // -1 for a device that is not in the group.
  int RankOf(int device) const;
  const GroupView* view(int rank) const { return ranks_[rank].view; }
  // Sees to arenas whose windows hold so many bytes; made once for a size, never freed. Throws std::runtime_error.
  void MakeArenas(int64_t window_bytes);
  // How `rank` finds them; they must have been made.
  ArenaView arenas(int rank, int64_t window_bytes);
  // Before each launch of `rank` on `stream`: what has failed in this group, in a sentence, or nothing. If something
  // has, the call is to be launched as refused and the sentence to be raised. All ranks' calls of the run in which the
  // failure is first heard of are refused; in the next run each rank begins a new generation of calls, so no call pairs
  // with one from before.
  std::string Enter(int rank, int64_t run, cudaStream_t stream);
  int64_t persistent_bytes();

 private:
  struct Rank {
    int device = 0;
    Window* window = nullptr;
    GroupView* view = nullptr;
    Status* status = nullptr;
    uint32_t heard = 0;       // failures of this rank that the host has heard of
    uint64_t generation = 0;  // of this rank's calls
  };

  // The arenas of all ranks whose windows hold `window_bytes`.
  struct Arenas {
    int64_t window_bytes = 0;
    std::vector<char*> of_rank;
  };

  explicit Group(int64_t id, const std::vector<int>& devices);
  const Arenas* FindArenas(int64_t window_bytes);
  void SetViewTimeout(uint64_t timeout_ns);

  int64_t id_;
  std::vector<Rank> ranks_;
  std::mutex making_;  // held while arenas are made
  std::mutex mutex_;   // of what follows, and of heard and generation
  std::vector<std::unique_ptr<Arenas>> arenas_;
  uint64_t generation_ = 0;  // failures heard of
  int64_t failed_run_ = 0;
  std::string failure_;
};

}  // namespace jax_ep
