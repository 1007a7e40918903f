// Groups over nodes, on the host: a Group (group/group.h), whose window is the first part of this rank's room, and
// where the rooms are. jax_ep/_src/internode.py has made those; kernels come from the module jax_ep._internode, once
// loaded.
#pragma once

#include <cstdint>
#include <vector>

#include "group/group.h"
#include "internode/internode.h"

namespace jax_ep {

// A rank of a group over nodes.
struct Berth {
  int process;    // NVSHMEM's number of it too
  int device;     // CUDA ordinal; -1: another process's
  int node;       // 0, 1, ...
  uint64_t room;  // where it is mapped here, zeroed before anybody could write to it; 0: it is not, on another node
};

void InstallInternode(const InternodeKernels* kernels);
// Null before InstallInternode.
const InternodeKernels* TheInternodeKernels();

// The nodes of a group, from the node of each rank. Throws std::runtime_error where they do not have as many ranks
// each.
Nodes NodesOf(const std::vector<int>& node_of_rank);
// Makes the group of these devices (JAX's ids), rank by rank; does nothing if there is one. Throws std::runtime_error.
void MakeInternodeGroup(const std::vector<int>& devices, const std::vector<Berth>& berths, int64_t box_bytes);
// How this process's rank of the group finds the rooms; null where MakeInternodeGroup has not made it.
const InternodeView* FindInternodeView(const Group* group);

}  // namespace jax_ep
