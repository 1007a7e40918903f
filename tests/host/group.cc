// The host's side of a group without a GPU: what Group tells handlers when ranks fail, within a process and over
// several. The CUDA runtime here is this file's: device memory is host memory, and launches are written down.
//
// g++ -std=c++17 -Iffi -I<cuda>/include -o group tests/host/group.cc ffi/group/group.cc -lpthread
#include "group/group.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "combine/combine.h"
#include "combine/combine_grad.h"
#include "dispatch/dispatch.h"
#include "group/barrier.h"
#include "halves/halves.h"
#include "low_latency/low_latency.h"

std::vector<const jax_ep::GroupView*> g_views;
// A stream or event is here what it comes after: the calls launched on a stream, and those it has waited for.
std::vector<int>* g_capturing = nullptr;
const void *g_constant = nullptr, *g_unknown = nullptr;  // what only device 0 reaches; what seems so
int g_device = 0, g_pointers_asked = 0;

namespace jax_ep {

char* Zeros(size_t bytes) {  // as aligned as device memory
  bytes = (bytes + 255) / 256 * 256;
  return static_cast<char*>(std::memset(std::aligned_alloc(256, bytes), 0, bytes));
}

}  // namespace jax_ep

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = g_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return g_device = device, cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  ++g_pointers_asked;
  const bool reaches = g_device == 0 || (pointer != g_constant && pointer != g_unknown);
  attributes->devicePointer = reaches ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = jax_ep::Zeros(bytes), cudaSuccess; }
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
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  return *event = reinterpret_cast<cudaEvent_t>(new std::vector<int>), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return *reinterpret_cast<std::vector<int>*>(event) = *reinterpret_cast<std::vector<int>*>(stream), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
  auto& done = *reinterpret_cast<std::vector<int>*>(stream);
  const auto& before = *reinterpret_cast<std::vector<int>*>(event);
  return done.insert(done.end(), before.begin(), before.end()), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool captures = reinterpret_cast<std::vector<int>*>(stream) == g_capturing;
  return *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned int) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
}

namespace jax_ep {

using Begun = std::vector<std::pair<int, uint64_t>>;  // rank, generation
Begun g_begun;
int g_ledgers = 0;    // of the last launch
uint32_t g_dead = 0;  // likewise

cudaError_t LoadDispatch() { return cudaSuccess; }
cudaError_t LoadCombine() { return cudaSuccess; }
cudaError_t LoadCombineGrad() { return cudaSuccess; }
cudaError_t LoadBarrier() { return cudaSuccess; }
cudaError_t LoadLowLatencyDispatch() { return cudaSuccess; }
cudaError_t LoadLowLatencyCombine() { return cudaSuccess; }
cudaError_t LoadDispatchHalves() { return cudaSuccess; }
cudaError_t LoadCombineHalves() { return cudaSuccess; }
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

// An operand that lies with the program's code: the call is refused and raises, the next run begins anew.
void Constants() {
  const std::vector<int> devices{20, 21};
  Group::SetOrdinals({{20, 0}, {21, 1}});
  Group& group = Group::OfDevices(devices);
  static char memory[4][1 << 21];  // each in a part of its own
  g_device = 0;
  EXPECT(group.Enter(0, 50, nullptr).empty() && group.Enter(1, 50, nullptr).empty());
  EXPECT(group.CheckShared(0, memory[0], memory[1]).empty() && g_pointers_asked == 1 && g_device == 0);
  EXPECT(group.CheckShared(0, memory[0], memory[1]).empty() && g_pointers_asked == 1);  // known
  EXPECT(group.CheckShared(0, nullptr, memory[1]).empty() && group.CheckShared(0, memory[2]).empty());
  // Where a result seems out of reach too, nothing is said.
  g_constant = memory[2], g_unknown = memory[1];
  EXPECT(group.CheckShared(0, memory[2], memory[1]).empty() && g_device == 0);
  g_constant = memory[3], g_unknown = nullptr;
  const std::string told = group.CheckShared(0, memory[3], memory[1]);
  EXPECT(Has(told, "an array of rank 0 is out of its peers' reach: it is a constant of the program"));
  EXPECT(group.Enter(1, 50, nullptr) == told && group.Enter(0, 50, nullptr) == told);
  EXPECT(group.CheckShared(0, memory[3], memory[1]) == told);  // of a rank that had entered before
  TakeBegun();
  EXPECT(group.Enter(0, 51, nullptr).empty() && group.Enter(1, 51, nullptr).empty());
  EXPECT(TakeBegun() == Begun({{0, 1}, {1, 1}}));
}

// What the initialize stage hears and begins before a run of which perhaps nothing else reaches the host: a graph.
void Replays() {
  const std::vector<int> devices{10, 11};
  Group& group = Group::OfDevices(devices);
  const auto before = [&](int64_t run) { return Group::HearBefore(run, devices, 2); };
  const auto begin = [&](int64_t run) {
    const std::string first = group.BeginRun(0, run, nullptr);
    return first + group.BeginRun(1, run, nullptr);
  };
  EXPECT(before(101).empty() && begin(101).empty() && TakeBegun().empty());
  EXPECT(before(102).empty());
  Fail(group, 0, 1, 0);
  // Device 1 comes to run 102 later than device 0, for which it was all right: none of them gives it up.
  EXPECT(before(102).empty() && begin(102).empty());
  const std::string told = before(103);
  EXPECT(Has(told, "combine: rank 0 waited for rank 1") && before(103) == told && before(102).empty());
  EXPECT(begin(102).empty() && begin(103).empty() && TakeBegun().empty());
  EXPECT(before(104).empty() && begin(104).empty() && TakeBegun() == Begun{{0, 1}, {1, 1}});
  EXPECT(before(104).empty() && begin(104).empty() && TakeBegun().empty());  // of the second call in the program
  // Another group's failure is no concern of a program without calls of it.
  Fail(group, 1, 0, 1);
  EXPECT(Group::HearBefore(105, {11, 10}, 2).empty());
  EXPECT(Group::HearBefore(106, {11, 99}, 2).empty());
  // Heard of at a launch, then by the devices that come to the same run later, and by runs that had begun.
  EXPECT(before(107) == before(107) && !before(107).empty() && before(108).empty());
  Fail(group, 1, 0, 2);
  EXPECT(!group.Enter(1, 108, nullptr).empty() && !group.Enter(0, 108, nullptr).empty() && begin(108).empty());
  EXPECT(TakeBegun().empty());
  EXPECT(before(109).empty() && group.Enter(0, 109, nullptr).empty() && TakeBegun() == Begun{{0, 3}});
  // Of groups that are called together, what has failed in one all hear.
  Fail(group, 0, 1, 3);
  EXPECT(!Group::HearBefore(110, {11, 10, 10, 11}, 2).empty() && Group::HearBefore(110, {11, 10}, 2).empty());
  for (int64_t run = 200; run < 3000; ++run) EXPECT(before(run).empty());  // old ones are forgotten
  EXPECT(begin(2999).empty() && TakeBegun() == Begun{{0, 4}, {1, 4}});
}

// Whatever streams calls are launched on, each comes after all before it.
void Streams() {
  Group& group = Group::OfDevices({11});
  std::vector<int> main, beside, other, captured;
  const auto stream = [](std::vector<int>& calls) { return reinterpret_cast<cudaStream_t>(&calls); };
  const auto call = [&](std::vector<int>& on, int number) {
    EXPECT(group.Enter(0, 5000, stream(on)).empty());
    const std::vector<int> before = on;
    on.push_back(number);
    EXPECT(group.Leave(0, stream(on)) == cudaSuccess);
    return before;
  };
  const auto has_all = [](const std::vector<int>& before, int up_to) {
    for (int i = 0; i < up_to; ++i) {
      if (std::find(before.begin(), before.end(), i) == before.end()) return false;
    }
    return true;
  };
  EXPECT(group.BeginRun(0, 5000, stream(main)).empty());
  int number = 0;
  for (auto* on : {&main, &beside, &main, &main, &beside, &beside, &other, &beside, &other, &main, &other, &main}) {
    EXPECT(has_all(call(*on, number), number));
    ++number;
  }
  // On the main stream alone nothing is waited for, and a capture is left alone.
  const size_t before = main.size();
  call(main, 100);
  g_capturing = &captured;
  EXPECT(call(captured, 101).empty() && captured == std::vector<int>{101});
  call(main, 102);
  EXPECT(main.size() == before + 2);
}

std::vector<Place> Places(char* windows) {
  const auto window = [&](int i) { return reinterpret_cast<uint64_t>(windows) + i * sizeof(Window); };
  const uint64_t negative = -4096;
  return {{0, 1, window(0), 5000, 100, 0}, {4, -1, window(1), 7000, 100, negative}, {0, 0, window(2), 9000, 100, 0}};
}

void SeveralProcesses() {
  char* const windows = Zeros(6 * sizeof(Window));
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
  // Arenas are where they were mapped; this process counts in its own ranks' and touches no others.
  const int64_t bytes = Group::LowLatencyArenaBytes(1000);
  char* const arenas = Zeros(3 * bytes);
  const auto arena = [&](int i) { return reinterpret_cast<Arena*>(arenas + i * bytes); };
  std::vector<uint64_t> at;
  for (int i = 0; i < 3; ++i) at.push_back(reinterpret_cast<uint64_t>(arena(i)));
  bool refused = false;
  try {
    group.MakeArenas(1000);
  } catch (const std::runtime_error& error) {
    refused = Has(error.what(), "was not lowered in this process");
  }
  EXPECT(refused);
  arena(0)->gone[1] = arena(1)->epoch = 5;  // a peer was here before, and has counted
  group.MakeSharedArena(Purpose::kLowLatency, bytes, at);
  group.MakeArenas(1000);
  for (int rank : {0, 2}) {
    const ArenaView view = group.arenas(rank, 900);
    EXPECT(view.rank == rank && view.num_ranks == 3 && view.group == group.view(rank));
    for (int i = 0; i < 3; ++i) EXPECT(view.arena[i] == reinterpret_cast<char*>(arena(i)));
  }
  EXPECT(arena(0)->gone[1] == 5 && arena(1)->epoch == 5);

  Fail(group, 2, 1, 0);
  EXPECT(Group::HasFailedSpanning() && Group::HasFailedSpanning());
  for (int run : {1, 2, 3}) {  // there is no run in which it goes on by itself
    const std::string told = group.Enter(0, run, nullptr);
    EXPECT(Has(told, "rank 2 of process 0 waited for rank 1 of process 4") && Has(told, "Call jax_ep.initialize()"));
  }
  for (int run : {1, 4}) {
    EXPECT(Has(Group::HearBefore(run, {11, 12, 10}, 3), "Call jax_ep.initialize()"));
    EXPECT(group.BeginRun(0, run, nullptr).empty());
  }
  EXPECT(TakeBegun().empty());
  Group::Resume(7);
  EXPECT(Group::SpanningGeneration() == 7 && !Group::HasFailedSpanning());
  EXPECT(group.Enter(2, 4, nullptr).empty() && group.Enter(0, 4, nullptr).empty() &&
         group.Enter(2, 5, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{2, 7}, {0, 7}} && g_ledgers == 2);
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
  EXPECT(Group::HearBefore(7, {10, 12, 11}, 3).empty() && later.BeginRun(0, 7, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 7}});
}

// Masks change between runs, each rank in its own time, and are there for groups made later.
void Masks() {
  const std::vector<int> devices{11, 10};
  Group& group = Group::OfDevices(devices);
  const auto enter = [&](int rank, int64_t run) { return group.Enter(rank, run, nullptr).empty(); };
  const auto begins = [&](int rank, int64_t run, uint64_t generation, uint32_t dead) {
    return enter(rank, run) && TakeBegun() == Begun{{rank, generation}} && g_dead == dead;
  };
  const auto goes_on = [&](int rank, int64_t run) { return enter(rank, run) && TakeBegun().empty(); };
  EXPECT(Group::HearBefore(7001, devices, 2).empty() && goes_on(0, 7001));
  Group::SetDead({10, 77});
  EXPECT(Group::IsDead(10) && Group::IsDead(77) && !Group::IsDead(11));
  // A run that some rank has met goes on as it was on the others; the next is masked on all, whoever comes first.
  EXPECT(goes_on(1, 7001) && begins(1, 7002, 2, 2) && goes_on(0, 7001) && begins(0, 7002, 2, 2));
  // Also where a rank is two masks behind, and in the initialize stage.
  EXPECT(goes_on(1, 7003));
  Group::SetDead({});
  EXPECT(begins(1, 7004, 3, 0));
  Group::SetDead({10});
  EXPECT(Group::HearBefore(7005, devices, 2).empty() && group.BeginRun(1, 7005, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{1, 4}} && g_dead == 2 && goes_on(1, 7005));
  EXPECT(goes_on(0, 7003) && begins(0, 7004, 3, 0) && begins(0, 7005, 4, 2));
  Group::SetDead({10, 78});  // for this group nothing new
  EXPECT(goes_on(0, 7006) && goes_on(1, 7006));
  EXPECT(Group::OfDevices({10}).view(0)->membership == 1);
  EXPECT(group.view(0)->membership == 0);  // the kernels write it

  // What fails before the mask is told after it: that run is refused, the next begins anew and masked.
  Group::SetDead({11});
  EXPECT(begins(0, 7007, 5, 1));
  Fail(group, 1, 0, 4);
  for (int rank : {1, 0}) EXPECT(Has(group.Enter(rank, 7008, nullptr), "waited for rank 0") && !enter(rank, 7007));
  EXPECT(TakeBegun().empty() && begins(0, 7009, 6, 1) && begins(1, 7009, 6, 1));

  Group& spanning = Group::OfDevices({10, 12, 11});
  Group::Resume(20);
  EXPECT(!Group::HasFailedSpanning() && spanning.Enter(0, 7010, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 20}} && g_dead == 4);
  Group::SetDead({});
  EXPECT(Group::HasFailedSpanning() && spanning.Enter(0, 7011, nullptr).empty() && TakeBegun().empty());
  Group::Resume(21);
  EXPECT(!Group::HasFailedSpanning() && spanning.Enter(0, 7012, nullptr).empty());
  EXPECT(TakeBegun() == Begun{{0, 21}} && g_dead == 0);
  EXPECT(begins(0, 7012, 7, 0));

  // Groups over nodes know of no mask: neither may come before the other, and a mask that is refused changes nothing.
  const auto refusal = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  };
  Group::SetDead({10});
  EXPECT(Has(refusal([] { Group::ForbidMasks({90, 10}); }), "device 10 is in a group over several nodes"));
  EXPECT(refusal([] { Group::ForbidMasks({90, 91}); }).empty());
  EXPECT(Has(refusal([] { Group::SetDead({11, 91}); }), "device 91 is in a group over several nodes"));
  EXPECT(Group::IsDead(10) && !Group::IsDead(11) && !Group::IsDead(91));
  EXPECT(refusal([] { Group::SetDead({}); }).empty());
}

// A start's window is the one that its kernel takes: host and device count the starts of a generation.
void Forks() {
  constexpr int64_t kSmall = 1 << 20, kLarge = 100 << 20;
  Group& group = Group::OfDevices({10, 11});
  std::vector<int> calls;
  const auto stream = reinterpret_cast<cudaStream_t>(&calls);
  const auto fork = [&](int64_t bytes) {
    Fork fork{};
    EXPECT(group.MakeFork(0, bytes, stream, &fork) == cudaSuccess);
    ++*fork.count;
    return fork;
  };
  Fork none{};
  EXPECT(group.MakeFork(0, kSmall, stream, &none) != cudaSuccess);  // no memory has been made
  for (int64_t bytes : {kSmall, kLarge}) group.MakeSharedArena(Purpose::kHalves, Group::LandingArenaBytes(bytes));
  EXPECT(group.landings(0, kSmall).depth == 4 && group.landings(0, kLarge).depth == 2);
  // Four windows of 64 MB and two of 128 are not one arena.
  EXPECT(Group::LandingArenaBytes(64 << 20) != Group::LandingArenaBytes(128 << 20));
  Fork failed{};  // its launch: then it does not count
  EXPECT(group.MakeFork(0, kSmall, stream, &failed) == cudaSuccess && failed.slot == 1);
  const Fork first = fork(kSmall);
  EXPECT(first.slot == 1 && first.peers == 2);
  for (int slot : {2, 3, 0}) EXPECT(fork(kSmall).slot == slot);
  // The fifth comes behind the push out of its window, which the first was, and behind no other.
  auto& pushed = *reinterpret_cast<std::vector<int>*>(first.pushed);
  pushed = {77};
  const Fork fifth = fork(kSmall);
  EXPECT(fifth.slot == 1 && fifth.pushed == first.pushed && calls == std::vector<int>{77});
  for (int slot : {1, 0, 1}) EXPECT(fork(kLarge).slot == slot);
  // A new generation counts anew. Nothing is pushed to masked ranks, nor by them.
  Group::SetDead({11});
  EXPECT(group.Enter(0, 9002, nullptr).empty());
  for (int slot : {1, 2}) EXPECT(fork(kSmall).slot == slot);
  EXPECT(fork(kLarge).slot == 1 && fork(kSmall).peers == 0);
  Group::SetDead({10});
  EXPECT(group.Enter(0, 9003, nullptr).empty() && fork(kSmall).peers == 0);
  Group::SetDead({});
  EXPECT(group.Enter(0, 9004, nullptr).empty() && fork(kSmall).peers == 2);
  TakeBegun();
}

// Epochs have room for so many generations; what comes after is refused, not taken for an early one.
void ManyGenerations() {
  Group& group = Group::OfDevices({11, 10});
  std::string told;
  for (uint64_t i = 0; i < 2 * kMaxGenerations && told.empty(); ++i) {
    Group::SetDead(i % 2 == 0 ? std::vector<int>{11} : std::vector<int>{});
    told = group.Enter(1, 20000 + static_cast<int64_t>(i), nullptr);
  }
  EXPECT(Has(told, "begun anew 1023 times") && Has(told, "Start the process anew"));
  for (const auto& [rank, generation] : TakeBegun()) EXPECT(generation < kMaxGenerations);
  EXPECT(!group.Enter(1, 30000, nullptr).empty());
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
  Replays();
  Streams();
  Constants();
  SeveralProcesses();
  Masks();
  Forks();
  Unknown();
  ManyGenerations();
  Group::SetTimeout(1.5);
  EXPECT(Group::OfDevices({11, 12, 10}).view(0)->timeout_ns == 1'500'000'000);
  std::printf("GROUP OK\n");
  return 0;
}
