// Times the kernels without XLA: benchmarks/kernels.py builds it, writes a case a line to its standard input, and reads
// a line of JSON for each. tests/gpu/kernels/ranks.h starts the ranks and makes their arrays.
//
//   in    mode operations(comma) layout ranks tokens topk experts capacity expert_capacity row_bytes second_bytes wire
//         sms calls repeats graph(0|1) file of s32[ranks, tokens, topk]
//         with a wire other than "none" row_bytes and second_bytes are those of values and scales, which dispatch makes
//         of bf16 rows; dispatch_quantized and dispatch_cached get them
//   out   {"gpus": [...], ...} once, then {"dispatch": [µs a call of each repeat], ...} or {"failed": "why"} a case
#include <cuda_runtime.h>

#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>

#include "device/quantize.cuh"
#include "ranks.h"

#if __has_include("low_latency/low_latency.h")
#include "low_latency/low_latency.h"
#define JAX_EP_LOW_LATENCY 1
#endif

using namespace jax_ep;

namespace {

constexpr double kPatience = 30;  // seconds for what is launched at once

struct Request {
  std::string mode;
  std::vector<std::string> operations;
  Case c;
  int wire = -1, calls = 0, repeats = 0;  // a Wire, or -1
  bool graph = false;
  std::string routing;
};

bool Parse(const std::string& line, Request* r) {
  std::istringstream in(line);
  std::string operations, layout, wire;
  int64_t row_bytes = 0;
  Case& c = r->c;
  in >> r->mode >> operations >> layout >> c.num_ranks >> c.num_tokens >> c.num_topk >> c.num_experts >> c.capacity >>
      c.expert_capacity >> row_bytes >> c.second_bytes >> wire >> c.num_sms >> r->calls >> r->repeats >> r->graph >>
      r->routing;
  c.layout = layout == "expert" ? Layout::kExpert : layout == "rank" ? Layout::kRank : Layout::kBatched;
  c.alignment = 1;
  c.dtype = RowDtype::kBfloat16;
  c.hidden = row_bytes / 2;
  const std::map<std::string, int> wires = {{"none", -1},
                                            {"fp8", static_cast<int>(Wire::kFp8)},
                                            {"fp8_ue8m0", static_cast<int>(Wire::kFp8Ue8m0)},
                                            {"mxfp8", static_cast<int>(Wire::kMxfp8)}};
  if (wires.count(wire) == 0) return false;
  r->wire = wires.at(wire);
  std::istringstream names(operations);
  for (std::string name; std::getline(names, name, ',');) r->operations.push_back(name);
  return !in.fail() && c.num_ranks > 0 && r->calls > 0 && r->repeats > 0;
}

// Numbers between 0.5 and 1 of either sign, as bf16; random bits for the links and memories to carry.
__global__ void FillRandom(uint32_t* words, int64_t count, uint32_t seed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    uint32_t hash = static_cast<uint32_t>(i) * 2654435761u + seed;
    hash = (hash ^ hash >> 15) * 2246822519u;
    hash = (hash ^ hash >> 13) * 3266489917u;
    words[i] = ((hash ^ hash >> 16) & 0x80ff80ffu) | 0x3f003f00u;
  }
}

char* MakeRows(Memory& memory, int64_t num_bytes, uint32_t seed) {
  char* rows = memory.Make<char>((num_bytes + 3) / 4 * 4, 0);
  FillRandom<<<256, 256>>>(reinterpret_cast<uint32_t*>(rows), (num_bytes + 3) / 4, seed);
  CHECK_CUDA(cudaGetLastError());
  return rows;
}

// One rank's calls and when they began and ended.
struct Timeline {
  cudaEvent_t begin, end;
  cudaGraphExec_t graph = nullptr;

  Timeline() {
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
  }
  ~Timeline() {
    cudaEventDestroy(begin), cudaEventDestroy(end);
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
};

using Call = std::function<cudaError_t(int rank, cudaStream_t stream)>;

cudaError_t Capture(const Call& call, int rank, cudaStream_t stream, int calls, cudaGraphExec_t* exec) {
  cudaGraph_t graph;
  cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  for (int k = 0; k < calls && error == cudaSuccess; ++k) error = call(rank, stream);
  if (error == cudaSuccess) error = cudaStreamEndCapture(stream, &graph);
  if (error == cudaSuccess) error = cudaGraphInstantiate(exec, graph, 0);
  if (error == cudaSuccess) error = cudaGraphDestroy(graph);
  if (error == cudaSuccess) error = cudaGraphUpload(*exec, stream);
  return error;
}

// The slowest rank's µs a call in each repeat: calls back to back after one that lets the ranks meet. Empty: failed.
std::vector<double> Time(Ranks& ranks, const Request& request, const Call& call) {
  constexpr int kWarmUps = 3;
  std::vector<std::unique_ptr<Timeline>> timeline;
  for (int device : ranks.device) {
    CHECK_CUDA(cudaSetDevice(device));
    timeline.push_back(std::make_unique<Timeline>());
  }
  for (int k = 0; k < kWarmUps; ++k) ranks.Launch(call);
  if (!ranks.Wait(kPatience)) return {};
  if (request.graph) {
    ranks.Launch([&](int rank, cudaStream_t stream) {
      return Capture(call, rank, stream, request.calls, &timeline[rank]->graph);
    });
  }
  std::vector<double> times;
  for (int repeat = 0; repeat < request.repeats; ++repeat) {
    ranks.Launch([&](int rank, cudaStream_t stream) {
      Timeline& of = *timeline[rank];
      cudaError_t error = call(rank, stream);
      if (error == cudaSuccess) error = cudaEventRecord(of.begin, stream);
      for (int k = 0; k < request.calls && error == cudaSuccess && !request.graph; ++k) error = call(rank, stream);
      if (error == cudaSuccess && request.graph) error = cudaGraphLaunch(of.graph, stream);
      return error == cudaSuccess ? cudaEventRecord(of.end, stream) : error;
    });
    if (!ranks.Wait(kPatience)) return {};
    double slowest = 0;
    for (const auto& of : timeline) {
      float ms;
      CHECK_CUDA(cudaEventElapsedTime(&ms, of->begin, of->end));
      slowest = std::max(slowest, ms * 1e3 / request.calls);
    }
    times.push_back(slowest);
  }
  return times;
}

std::string Failed(const std::string& why) {
  std::string quoted;
  for (char letter : why) quoted += letter == '"' || letter == '\\' || letter < ' ' ? '\'' : letter;
  return "{\"failed\": \"" + quoted + "\"}";
}

DispatchParams Cached(DispatchParams d) {
  d.operation = kDispatchCached;
  d.topk_idx = nullptr;
  return d;
}

// The cotangents travel from where a dispatch's rows do.
CombineGradParams Backward(const Arrays& of, const float* weights) {
  CombineGradParams g = of.grad;
  g.out_bar = of.dispatch.rows[0].x, g.y = of.combine.y, g.weights = weights;
  return g;
}

// The same rows, from bf16: encoded on the way.
DispatchParams Encoded(DispatchParams d, const char* x, int wire) {
  d.encoding = {x, RowDtype::kBfloat16, wire, static_cast<int>(d.rows[0].row_bytes)};
  return d;
}

CombineParams Weighted(CombineParams b, const float* weights) {
  b.weights = weights;
  return b;
}

std::map<std::string, Call> HighThroughput(const Case& c, const std::vector<Arrays>& arrays,
                                           const std::vector<DispatchParams>& encoded,
                                           const std::vector<const float*>& gates) {
  const int R = c.num_ranks;
  DispatchConfig out;
  CombineConfig back;
  out.num_sms = back.num_sms = c.num_sms;
  return {
      {"dispatch", [=, &encoded](int r, cudaStream_t s) { return LaunchDispatch(encoded[r], R, out, s); }},
      {"dispatch_quantized",
       [=, &arrays](int r, cudaStream_t s) { return LaunchDispatch(arrays[r].dispatch, R, out, s); }},
      {"dispatch_cached",
       [=, &arrays](int r, cudaStream_t s) { return LaunchDispatch(Cached(arrays[r].dispatch), R, out, s); }},
      {"combine", [=, &arrays](int r, cudaStream_t s) { return LaunchCombine(arrays[r].combine, back, s); }},
      {"combine_weighted",
       [=, &arrays, &gates](int r, cudaStream_t s) {
         return LaunchCombine(Weighted(arrays[r].combine, gates[r]), back, s);
       }},
      {"combine_grad",
       [=, &arrays, &gates](int r, cudaStream_t s) {
         return LaunchCombineGrad(Backward(arrays[r], gates[r]), back, s);
       }},
  };
}

#if JAX_EP_LOW_LATENCY
// Of a window of each kind of call; 0: the shape is beyond the kernel.
std::vector<int64_t> LowLatencyBytes(const Arrays& of, const DispatchParams& encoded, const float* gates, int num_ranks,
                                     bool combines) {
  std::vector<int64_t> bytes = {LowLatencyDispatchBytes(encoded, num_ranks),
                                LowLatencyDispatchBytes(of.dispatch, num_ranks),
                                LowLatencyDispatchBytes(Cached(of.dispatch), num_ranks)};
  if (combines) {
    bytes.push_back(LowLatencyCombineBytes(of.combine, num_ranks));
    bytes.push_back(LowLatencyCombineBytes(Weighted(of.combine, gates), num_ranks));
  }
  return bytes;
}

std::map<std::string, Call> LowLatency(const Case& c, Group& group, const std::vector<Arrays>& arrays,
                                       const std::vector<DispatchParams>& encoded,
                                       const std::vector<const float*>& gates) {
  const int R = c.num_ranks;
  LowLatencyConfig config;
  config.num_sms = c.num_sms;
  const auto dispatch = [=, &group](const DispatchParams& d, int r, cudaStream_t s) {
    const ArenaView arenas = group.arenas(r, LowLatencyDispatchBytes(d, R));
    return LaunchLowLatencyDispatch(d, {arenas, Half::kBoth, nullptr}, config, s);
  };
  const auto combine = [=, &group](CombineParams b, int r, cudaStream_t s) {
    b.scratch = nullptr;
    return LaunchLowLatencyCombine(b, {group.arenas(r, LowLatencyCombineBytes(b, R)), Half::kBoth, nullptr}, config, s);
  };
  return {
      {"dispatch", [=, &encoded](int r, cudaStream_t s) { return dispatch(encoded[r], r, s); }},
      {"dispatch_quantized", [=, &arrays](int r, cudaStream_t s) { return dispatch(arrays[r].dispatch, r, s); }},
      {"dispatch_cached", [=, &arrays](int r, cudaStream_t s) { return dispatch(Cached(arrays[r].dispatch), r, s); }},
      {"combine", [=, &arrays](int r, cudaStream_t s) { return combine(arrays[r].combine, r, s); }},
      {"combine_weighted",
       [=, &arrays, &gates](int r, cudaStream_t s) { return combine(Weighted(arrays[r].combine, gates[r]), r, s); }},
  };
}
#endif

std::string Measure(const Request& request) {
  const Case& c = request.c;
  const int R = c.num_ranks;
  Ranks& ranks = Ranks::Of(R);
  std::ifstream file(request.routing, std::ios::binary);
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<Arrays> arrays(R);
  std::vector<DispatchParams> encoded(R);
  std::vector<const float*> gates(R);
  const auto asked = [&](const char* name) {
    return std::find(request.operations.begin(), request.operations.end(), name) != request.operations.end();
  };
  const bool combines = asked("combine") || asked("combine_weighted") || asked("combine_grad");
  for (int r = 0; r < R; ++r) {
    std::vector<int32_t> topk_idx(c.choices());
    file.read(reinterpret_cast<char*>(topk_idx.data()), topk_idx.size() * sizeof(int32_t));
    if (!file) return Failed("no routing in " + request.routing);
    memory.push_back(std::make_unique<Memory>(ranks.device[r]));
    Memory& of = *memory[r];
    arrays[r] = MakeArrays(c, of, ranks.group.view(r), combines);
    DispatchParams& d = arrays[r].dispatch;
    d.topk_idx = of.Put(topk_idx);
    d.topk_weights = of.Make<float>(c.choices(), 0x3c);
    d.rows[0].x = MakeRows(of, c.num_tokens * c.row_bytes(), r + 1);
    if (c.second_bytes > 0) d.rows[1].x = MakeRows(of, c.num_tokens * c.second_bytes, r + 101);
    encoded[r] = d;
    if (request.wire >= 0)
      encoded[r] = Encoded(d, MakeRows(of, 2 * c.num_tokens * c.row_bytes(), r + 301), request.wire);
    gates[r] = of.Make<float>(c.capacity, 0x3c);
    if (combines) {
      arrays[r].combine.y = MakeRows(of, static_cast<int64_t>(c.capacity) * c.row_bytes(), r + 201);
      arrays[r].combine.carried_back = nullptr;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  const bool fits = DispatchFits(arrays[0].dispatch, R) && DispatchFits(encoded[0], R) &&
                    (!combines || CombineFits(arrays[0].combine, R));
  if (!fits) return Failed("beyond the kernel's limits");
  std::map<std::string, Call> calls;
  if (request.mode == "high_throughput") {
    calls = HighThroughput(c, arrays, encoded, gates);
#if JAX_EP_LOW_LATENCY
  } else if (request.mode == "low_latency") {
    const std::vector<int64_t> sizes = LowLatencyBytes(arrays[0], encoded[0], gates[0], R, combines);
    if (std::count(sizes.begin(), sizes.end(), 0) > 0) return Failed("beyond the low-latency kernel's limits");
    for (int64_t bytes : sizes) ranks.group.MakeArenas(bytes);
    calls = LowLatency(c, ranks.group, arrays, encoded, gates);
#endif
  } else {
    return Failed("no kernels of mode " + request.mode);
  }
  ranks.doing = "the first dispatch";
  ranks.Launch(calls.at("dispatch"));  // the routing that the others follow
  if (!ranks.Wait(kPatience)) return Failed(ranks.failure);
  std::ostringstream out;
  for (const std::string& name : request.operations) {
    const auto call = calls.find(name);
    if (call == calls.end()) return Failed("no operation " + name);
    ranks.doing = name;
    const std::vector<double> times = Time(ranks, request, call->second);
    if (times.empty()) return Failed(name + ": " + ranks.failure);
    out << (out.tellp() > 0 ? ", " : "{") << '"' << name << "\": [";
    for (size_t i = 0; i < times.size(); ++i) out << (i > 0 ? ", " : "") << times[i];
    out << ']';
  }
  out << '}';
  return out.str();
}

void Greet() {
  int driver = 0, runtime = 0;
  CHECK_CUDA(cudaDriverGetVersion(&driver));
  CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
  CHECK_CUDA(cudaGetDeviceCount(&g_num_devices));
  std::cout << "{\"gpus\": [";
  cudaDeviceProp properties{};
  for (int i = 0; i < g_num_devices; ++i) {
    CHECK_CUDA(cudaGetDeviceProperties(&properties, i));
    std::cout << (i > 0 ? ", \"" : "\"") << properties.name << '"';
  }
  std::cout << "], \"multiprocessors\": " << properties.multiProcessorCount << ", \"driver\": " << driver
            << ", \"runtime\": " << runtime << '}' << std::endl;
}

}  // namespace

int main() {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // ranks of one GPU must run side by side
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);       // loading a kernel could wait for one that waits for a peer
  Greet();
  Group::SetTimeout(4);
  for (std::string line; std::getline(std::cin, line);) {
    Request request;
    std::string answer;
    try {
      answer = Parse(line, &request) ? Measure(request) : Failed("cannot read: " + line);
    } catch (const std::exception& error) {  // of making the group
      answer = Failed(error.what());
    }
    std::cout << answer << std::endl;
  }
  return 0;
}
