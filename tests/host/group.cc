// The host's side of a group without a GPU: what Group tells handlers when ranks fail, within a process and over
// several. The CUDA runtime here is this file's: device memory is host memory, and launches are written down.
//
// g++ -std=c++17 -Iffi -I<cuda>/include -o group tests/host/group.cc ffi/group/group.cc -lpthread
#include "group/group.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "combine/combine.h"
#include "dispatch/dispatch.h"
#include "group/barrier.h"
#include "low_latency/low_latency.h"

std::vector<const jax_ep::GroupView*> g_views;

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  bytes = (bytes + 255) / 256 * 256;
  return *memory = std::memset(std::aligned_alloc(256, bytes), 0, bytes), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned int) { return cudaMalloc(memory, bytes); }
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return std::memset(memory, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes == sizeof(jax_ep::GroupView)) g_views.push_back(static_cast<jax_ep::GroupView*>(to));
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned int) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
}

namespace jax_ep {

using Begun = std::vector<std::pair<int, uint64_t>>;  // rank, generation
Begun g_begun;
int g_ledgers = 0;    // of the last launch
uint32_t g_dead = 0;  // likewise

cudaError_t LoadDispatch() { return cudaSuccess; }
cudaError_t LoadCombine() { return cudaSuccess; }
cudaError_t LoadBarrier() { return cudaSuccess; }
cudaError_t LoadLowLatencyDispatch() { return cudaSuccess; }
cudaError_t LoadLowLatencyCombine() { return cudaSuccess; }
cudaError_t LaunchBeginGeneration(const Ledgers& ledgers, uint64_t generation, uint32_t dead, cudaStream_t) {
  g_ledgers = ledgers.count;
  g_dead = dead;
  for (const GroupView* view : g_views) {
    if (view == ledgers.view && view->window[view->rank] == ledgers.ledger[0])
      return g_begun.push_back({view->rank, generation}), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

namespace {

#define EXPECT(...)                                                        \
  do {                                                                     \
    if (!(__VA_ARGS__)) {                                                  \
      std::printf("%s:%d not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

bool Has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// As a kernel of `rank` reports that it waited for `peer`, in a call of `generation`.
void Fail(Group& group, int rank, int peer, uint64_t generation) {
  Status* status = group.view(rank)->status;
  status->operation = kCombine, status->phase = kRows, status->rank = rank, status->peer = peer;
  status->epoch = generation << kCountBits | 3;
  status->expected = MakeFlag(status->epoch, 1), status->seen = 0;
  status->failures = status->failures + 1;
}

Begun TakeBegun() { return std::exchange(g_begun, {}); }

// Two devices of this process that are numbered otherwise in the job.
void OneProcess() {
  Group& group = Group::OfDevices({11, 10});
  EXPECT(&group == &Group::OfDevices({11, 10}) && &group != &Group::OfDevices({10, 11}));
  EXPECT(group.view(0)->shift[1] == 0 && group.view(0)->window[1] == group.view(1)->window[1]);
  EXPECT(group.Enter(0, 1, nullptr).empty() && group.Enter(1, 1, nullptr).empty());
  Fail(group, 1, 0, 0);
  const std::string told = group.Enter(0, 2, nullptr);
  EXPECT(Has(told, "combine: rank 1 waited for rank 0 in phase rows") && !Has(told, "process"));
  EXPECT(Has(told, "(rank 0 is device 11)"));
  EXPECT(group.Enter(1, 2, nullptr) == told);  // the same run
  EXPECT(TakeBegun().empty());
  // A generation begins in the arenas too, and in one made later with its number.
  group.MakeArenas(1000);
  EXPECT(group.arenas(1, 900).window_bytes == 1 << 16 && group.arenas(1, 900).rank == 1);
  EXPECT(group.Enter(1, 3, nullptr).empty() && group.Enter(0, 3, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{1, 1}, {0, 1}} && g_ledgers == 2);
  group.MakeArenas(1 << 17);
  const ArenaView later = group.arenas(0, (1 << 16) + 1);
  EXPECT(reinterpret_cast<Arena*>(later.arena[1])->epoch == 1ull << kCountBits);
  EXPECT(later.arena[0] != group.arenas(0, 1000).arena[0] && later.window_bytes == 1 << 17);
  bool unknown = false;
  try {
    group.arenas(0, 1 << 18);
  } catch (const std::runtime_error&) {
    unknown = true;
  }
  EXPECT(unknown);
  Fail(group, 0, 1, 0);  // a late consequence is no news
  EXPECT(group.Enter(0, 4, nullptr).empty() && TakeBegun().empty());
  EXPECT(group.CheckShared(0, &group).empty());
  EXPECT(!Group::HasFailedSpanning());
}

std::vector<Place> Places(char* windows) {
  const auto window = [&](int i) { return reinterpret_cast<uint64_t>(windows) + i * sizeof(Window); };
  const uint64_t negative = -4096;
  return {{0, 1, window(0), 5000, 100, 0}, {4, -1, window(1), 7000, 100, negative}, {0, 0, window(2), 9000, 100, 0}};
}

void SeveralProcesses() {
  auto* windows = static_cast<char*>(std::calloc(6, sizeof(Window)));
  Group::MakeSpanning({11, 12, 10}, Places(windows));
  Group& group = Group::OfDevices({11, 12, 10});
  Group::MakeSpanning({11, 12, 10}, Places(windows));
  EXPECT(&group == &Group::OfDevices({11, 12, 10}));
  EXPECT(group.view(1) == nullptr);
  for (int rank : {0, 2}) {
    const GroupView& view = *group.view(rank);
    EXPECT(view.rank == rank && view.num_ranks == 3);
    for (int i = 0; i < 3; ++i) EXPECT(reinterpret_cast<char*>(view.window[i]) == windows + i * sizeof(Window));
    EXPECT(view.shift[0] == 0 && 7050 + view.shift[1] == 7050 - 4096 && view.shift[2] == 0);
  }
  EXPECT(group.Enter(0, 1, nullptr).empty() && !Group::HasFailedSpanning());
  bool refused = false;  // arenas are not shared between processes
  try {
    group.MakeArenas(1000);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused);

  Fail(group, 2, 1, 0);
  EXPECT(Group::HasFailedSpanning() && Group::HasFailedSpanning());
  for (int run : {1, 2, 3}) {  // there is no run in which it goes on by itself
    const std::string told = group.Enter(0, run, nullptr);
    EXPECT(Has(told, "rank 2 of process 0 waited for rank 1 of process 4") && Has(told, "Call jax_ep.initialize()"));
  }
  EXPECT(TakeBegun().empty());
  Group::Resume(7);
  EXPECT(Group::SpanningGeneration() == 7 && !Group::HasFailedSpanning());
  EXPECT(group.Enter(2, 4, nullptr).empty() && group.Enter(0, 4, nullptr).empty() &&
         group.Enter(2, 5, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{2, 7}, {0, 7}});
  Fail(group, 0, 2, 6);
  EXPECT(group.Enter(0, 5, nullptr).empty());

  EXPECT(group.CheckShared(2, nullptr).empty());
  EXPECT(group.CheckShared(2, reinterpret_cast<void*>(9000)).empty());
  EXPECT(group.CheckShared(2, reinterpret_cast<void*>(9099)).empty());
  EXPECT(!Group::HasFailedSpanning());
  EXPECT(Has(group.CheckShared(2, reinterpret_cast<void*>(9100)), "an array of rank 2 lies outside"));
  EXPECT(Has(group.CheckShared(0, reinterpret_cast<void*>(4999)),
             "an array of rank 2"));  // the first failure is the one told
  EXPECT(Group::HasFailedSpanning() && Has(group.Enter(0, 6, nullptr), "lies outside"));

  Group::MakeSpanning({10, 12, 11},
                      Places(windows + 3 * sizeof(Window)));  // made later, in the same generation as the rest
  Group& later = Group::OfDevices({10, 12, 11});
  EXPECT(later.Enter(0, 7, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 7}});
}

// Masks change between runs, each rank in its own time, and are there for groups made later.
void Masks() {
  Group& group = Group::OfDevices({11, 10});
  Group::SetDead({10, 77});
  EXPECT(Group::IsDead(10) && Group::IsDead(77) && !Group::IsDead(11));
  // A run that rank 0 has entered goes on as it was on rank 1; the next is masked on both, whoever comes first.
  EXPECT(group.Enter(1, 4, nullptr).empty() && TakeBegun().empty());
  EXPECT(group.Enter(1, 5, nullptr).empty() && TakeBegun() == Begun{{1, 2}} && g_dead == 2);
  EXPECT(group.Enter(0, 4, nullptr).empty() && TakeBegun().empty());
  EXPECT(group.Enter(0, 5, nullptr).empty() && TakeBegun() == Begun{{0, 2}} && g_dead == 2);
  EXPECT(group.Enter(0, 6, nullptr).empty() && group.Enter(1, 6, nullptr).empty() && TakeBegun().empty());
  Group::SetDead({10});  // for this group nothing new
  EXPECT(group.Enter(0, 7, nullptr).empty() && group.Enter(1, 7, nullptr).empty() && TakeBegun().empty());
  EXPECT(Group::OfDevices({10}).view(0)->membership == 1);
  EXPECT(group.view(0)->membership == 0);  // the kernels write it

  // After a failure: its run is refused, the next begins anew and masked.
  Group::SetDead({11});
  Fail(group, 1, 0, 2);
  EXPECT(Has(group.Enter(1, 8, nullptr), "waited for rank 0") && Has(group.Enter(0, 8, nullptr), "waited for rank 0"));
  EXPECT(group.Enter(0, 9, nullptr).empty() && group.Enter(1, 9, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 4}, {1, 4}} && g_dead == 1);

  Group& spanning = Group::OfDevices({10, 12, 11});  // 11 is dead now, 10 was when it was made or not at all
  EXPECT(Group::HasFailedSpanning());
  Group::Resume(20);
  EXPECT(!Group::HasFailedSpanning() && spanning.Enter(0, 9, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 20}} && g_dead == 4);
  Group::SetDead({});
  EXPECT(Group::HasFailedSpanning() && spanning.Enter(0, 10, nullptr).empty() && TakeBegun().empty());
  Group::Resume(21);
  EXPECT(spanning.Enter(0, 11, nullptr).empty() && TakeBegun() == Begun{{0, 21}} && g_dead == 0);
  EXPECT(group.Enter(0, 11, nullptr).empty() && TakeBegun() == Begun{{0, 5}} && g_dead == 0);
}

void Unknown() {
  EXPECT(Group::DeviceOf(0) == 10 && Group::DeviceOf(1) == 11);
  try {
    Group::OfDevices({10, 99});
    EXPECT(false);
  } catch (const std::runtime_error& error) {
    EXPECT(Has(error.what(), "device 99 is another process's") && Has(error.what(), "jax_ep.initialize()"));
  }
}

}  // namespace
}  // namespace jax_ep

int main() {
  using namespace jax_ep;
  EXPECT(Group::DeviceOf(1) == 1);  // as long as nobody says otherwise
  Group::SetOrdinals({{10, 0}, {11, 1}});
  OneProcess();
  SeveralProcesses();
  Masks();
  Unknown();
  Group::SetTimeout(1.5);
  EXPECT(Group::OfDevices({11, 12, 10}).view(0)->timeout_ns == 1'500'000'000);
  std::printf("GROUP OK\n");
  return 0;
}
