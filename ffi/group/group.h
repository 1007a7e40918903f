// A group: the ranks of one expert-parallel axis, their windows and how a kernel finds them. Made once for a list of devices
// while a program is lowered, never freed: a captured graph may still hold its addresses.
// In one process. How memory is found is here alone; kernels see GroupView and nothing of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
  // What failed in this group since the last call of this for `rank`, in a sentence; empty if nothing has.
  std::string TakeFailure(int rank);
  int64_t persistent_bytes() const { return sizeof(Window); }

 private:
  struct Rank {
    int device = 0;
    Window* window = nullptr;
    GroupView* view = nullptr;
    Status* status = nullptr;
    std::vector<uint32_t> reported;  // failures of each rank that this rank has heard of
  };

  explicit Group(int64_t id, const std::vector<int>& devices);
  void SetViewTimeout(uint64_t timeout_ns);

  int64_t id_;
  std::vector<Rank> ranks_;
};

}  // namespace jax_ep
