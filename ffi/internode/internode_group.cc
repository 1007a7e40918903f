#include "internode/internode_group.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

namespace jax_ep {
namespace {

struct InternodeRegistry {
  std::mutex mutex;
  const InternodeKernels* kernels = nullptr;
  std::map<const Group*, std::unique_ptr<InternodeView>> views;
};

InternodeRegistry& TheInternodeRegistry() {
  static auto* registry = new InternodeRegistry;  // outlives every handler
  return *registry;
}

void LoadKernels(const InternodeKernels& kernels, int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = kernels.load();
  cudaSetDevice(before);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("jax_ep: loading the kernels of jax_ep._internode failed: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace

void InstallInternode(const InternodeKernels* kernels) {
  InternodeRegistry& registry = TheInternodeRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.kernels = kernels;
}

const InternodeKernels* TheInternodeKernels() {
  InternodeRegistry& registry = TheInternodeRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  return registry.kernels;
}

Nodes NodesOf(const std::vector<int>& node_of_rank) {
  Nodes nodes{};
  const size_t num_ranks = node_of_rank.size();
  if (num_ranks == 0 || num_ranks > kMaxRanks) {
    throw std::runtime_error("jax_ep: a group over nodes must have 1 to " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(num_ranks));
  }
  std::vector<int> members;  // of each node, in the order in which the ranks name them
  std::map<int, int> number_of;
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    const auto [place, is_first] = number_of.emplace(node_of_rank[rank], static_cast<int>(members.size()));
    if (is_first) members.push_back(0);
    nodes.node[rank] = static_cast<uint8_t>(place->second);
    nodes.local[rank] = static_cast<uint8_t>(members[place->second]++);
  }
  if (*std::min_element(members.begin(), members.end()) != *std::max_element(members.begin(), members.end())) {
    throw std::runtime_error("jax_ep: a group over nodes must have as many ranks on each of them");
  }
  nodes.num_nodes = static_cast<int32_t>(members.size());
  nodes.ranks_per_node = members[0];
  for (size_t rank = 0; rank < num_ranks; ++rank) {
    nodes.rank_at[nodes.node[rank] * nodes.ranks_per_node + nodes.local[rank]] = static_cast<uint8_t>(rank);
  }
  return nodes;
}

void MakeInternodeGroup(const std::vector<int>& devices, const std::vector<Berth>& berths, int64_t box_bytes) {
  const InternodeKernels* const kernels = TheInternodeKernels();
  if (kernels == nullptr) throw std::runtime_error("jax_ep: jax_ep._internode is not loaded");
  auto view = std::make_unique<InternodeView>();
  std::vector<int> node_of_rank;
  std::vector<Place> places;
  int here = -1;
  for (size_t rank = 0; rank < berths.size(); ++rank) {
    const Berth& berth = berths[rank];
    node_of_rank.push_back(berth.node);
    Place place{};
    place.process = berth.process;
    place.device = berth.device;
    place.window = berth.device >= 0 ? berth.room : 0;
    places.push_back(place);
    if (berth.device >= 0) here = static_cast<int>(rank);
  }
  if (here < 0) throw std::runtime_error("jax_ep: a group over nodes must have a rank of this process");
  view->nodes = NodesOf(node_of_rank);
  view->box_bytes = box_bytes;
  for (size_t rank = 0; rank < berths.size(); ++rank) {
    view->room_of[rank] = reinterpret_cast<Room*>(berths[rank].room);  // NOLINT(performance-no-int-to-ptr)
    view->pe[rank] = berths[rank].process;
    if (view->nodes.node[rank] == view->nodes.node[here] && berths[rank].room == 0) {
      throw std::runtime_error("jax_ep: rank " + std::to_string(rank) +
                               " is on this node, but its memory is not mapped");
    }
  }
  view->room = view->room_of[here];
  LoadKernels(*kernels, berths[here].device);
  Group::MakeSpanning(devices, places);
  const Group* const group = &Group::OfDevices(devices);
  InternodeRegistry& registry = TheInternodeRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.views.emplace(group, std::move(view));
}

const InternodeView* FindInternodeView(const Group* group) {
  InternodeRegistry& registry = TheInternodeRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.views.find(group);
  return found != registry.views.end() ? found->second.get() : nullptr;
}

}  // namespace jax_ep
