// The XLA FFI handlers of low-latency calls: they check shapes, find the arena, then launch. Operands and results are
// those of dispatch/dispatch_ffi.cc and combine/combine_ffi.cc, but for the halves, which leave what is in flight in
// the windows: of the arrays [T, ...] between them only the first 16 bytes of the first one count.
//
//   jax_ep_low_latency_...
//     notify           topk_idx                         -> slot, recv_slot, counts, recv_topk_idx ("rank")
//     dispatch         rows..., weights?, topk_idx      -> rows..., weights?, and what notify gives
//                      with `wire` as dispatch/encoding_ffi.h has it
//     dispatch_cached  rows..., weights?, handle        -> rows..., weights?
//     dispatch_start   rows..., weights?, handle        -> in flight...
//     dispatch_done    in flight..., handle             -> rows..., weights?
//     combine          y?, weights?, carried?, handle   -> out?, carried_back?
//                      `wire`: 0, or 1 for LogFMT-10, which carries nothing
//     combine_start    y?, weights?, carried?, handle   -> in flight...
//     combine_done     in flight..., handle             -> out?, carried_back?
//
// A handle is slot, recv_slot and counts.
#include <cstdint>
#include <stdexcept>

#include "common/error.h"
#include "dispatch/encoding_ffi.h"
#include "group/member.h"
#include "low_latency/low_latency.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

// This device's place in the group and in the arenas. A program that was not lowered in this process makes them here.
ffi::Error FindArenas(const char* name, cudaStream_t stream, int32_t device, ffi::RunId run,
                      ffi::Span<const int64_t> devices, int64_t num_ranks, int64_t window_bytes, Member* member,
                      LowLatencyParams* low_latency) {
  if (window_bytes == 0) return InvalidArgument(name, "the low-latency kernel does not take this shape");
  if (ffi::Error error = FindMember(name, stream, device, run, devices, num_ranks, member); error.failure())
    return error;
  try {
    member->group->MakeArenas(window_bytes);
    low_latency->arenas = member->group->arenas(member->rank, window_bytes);
  } catch (const std::runtime_error& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

ffi::Error HasWord(const char* name, const ffi::AnyBuffer& in_flight) {
  if (in_flight.size_bytes() >= 16) return ffi::Error::Success();
  return InvalidArgument(name, "the first array in flight must have 16 bytes");
}

LowLatencyConfig Config(int64_t num_sms) {
  LowLatencyConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  return config;
}

template <Operation operation, Half half>
ffi::Error Dispatch(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                    int64_t num_ranks, int64_t num_experts, int64_t layout, int64_t expert_alignment,
                    int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows, int64_t has_weights,
                    int64_t num_sms, int64_t wire, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr bool kCached = operation == kDispatchCached;
  constexpr const char* kName = half == Half::kStart           ? "dispatch_start"
                                : half == Half::kDone          ? "dispatch_done"
                                : operation == kDispatch       ? "dispatch"
                                : operation == kDispatchCached ? "dispatch_cached"
                                                               : "notify";
  DispatchParams p{};
  LowLatencyParams low_latency{};
  p.operation = operation;
  p.layout = static_cast<Layout>(layout);
  low_latency.half = half;
  const bool encodes = wire != 0;
  const size_t moved = num_rows + has_weights, come = moved + encodes;
  const size_t num_routed = kCached ? 0 : p.layout == Layout::kRank ? 4 : 3;
  if (num_rows > kMaxRowArrays || args.size() != moved + (kCached ? 3 : 1) || rets.size() != come + num_routed) {
    return InvalidArgument(kName, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(moved)->dimensions();  // topk_idx or slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.num_experts = static_cast<int>(num_experts);
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  p.expert_alignment = static_cast<int>(expert_alignment);
  p.expert_capacity = static_cast<int>(expert_capacity);
  p.num_row_arrays = static_cast<int>(num_rows);
  if (p.num_tokens <= 0 || max_recv_tokens <= 0) return InvalidArgument(kName, "nothing to move");
  if (encodes) {
    if (ffi::Error error = ReadEncoding(kName, wire, num_rows, args, rets, &p); error.failure()) return error;
  }
  for (int64_t i = 0; !encodes && i < num_rows; ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i);
    const auto recv = rets.get<ffi::AnyBuffer>(i);
    const int64_t recv_rows = half == Half::kStart ? p.num_tokens : max_recv_tokens;
    p.rows[i] = {Data<char>(*x), Data<char>(**recv), static_cast<int64_t>(x->size_bytes()) / p.num_tokens};
    if (static_cast<int64_t>((*recv)->size_bytes()) != p.rows[i].row_bytes * recv_rows) {
      return InvalidArgument(kName, "a result must have rows of its operand's size");
    }
  }
  if (has_weights != 0) {
    p.topk_weights = Data<float>(*args.get<ffi::AnyBuffer>(num_rows));
    p.recv_weights = Data<float>(**rets.get<ffi::AnyBuffer>(num_rows + encodes));
  }
  if (kCached) {
    p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved));
    p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 1));
    p.counts = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 2));
  } else {
    p.topk_idx = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved));
    p.slot = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come));
    p.recv_slot = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 1));
    p.counts = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 2));
    if (num_routed == 4) p.recv_topk_idx = Data<int32_t>(**rets.get<ffi::AnyBuffer>(come + 3));
  }
  if (half != Half::kBoth) {
    const auto in_flight = half == Half::kStart ? **rets.get<ffi::AnyBuffer>(0) : *args.get<ffi::AnyBuffer>(0);
    if (ffi::Error error = HasWord(kName, in_flight); error.failure()) return error;
    low_latency.in_flight = Data<uint64_t>(in_flight);
  }
  Member member;
  const int64_t window_bytes = LowLatencyDispatchBytes(p, static_cast<int>(num_ranks));
  if (ffi::Error error =
          FindArenas(kName, stream, device, run, devices, num_ranks, window_bytes, &member, &low_latency);
      error.failure())
    return error;
  p.group = member.view();
  p.refused = member.refused();
  return Report(kName, member, LaunchLowLatencyDispatch(p, low_latency, Config(num_sms), stream));
}

template <Half half>
ffi::Error Combine(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, int64_t one_row_a_rank, int64_t max_recv_tokens, int64_t has_rows,
                   int64_t has_weights, int64_t has_carried, int64_t num_sms, int64_t wire, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  constexpr const char* kName = half == Half::kStart  ? "combine_start"
                                : half == Half::kDone ? "combine_done"
                                                      : "combine";
  CombineParams p{};
  LowLatencyParams low_latency{};
  low_latency.half = half;
  p.one_row_a_rank = one_row_a_rank != 0;
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  const size_t num_moved = has_rows + has_weights + has_carried, num_back = has_rows + has_carried;
  if (wire < 0 || wire > 1 || (wire != 0 && has_rows == 0)) return InvalidArgument(kName, "unexpected wire format");
  low_latency.logfmt = wire != 0;
  if (args.size() != num_moved + 3 || rets.size() != num_back || (half == Half::kDone && has_weights != 0)) {
    return InvalidArgument(kName, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(num_moved)->dimensions();  // slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved));
  p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved + 1));
  if (p.num_tokens <= 0 || max_recv_tokens <= 0) return InvalidArgument(kName, "nothing to move");
  if (has_rows != 0) {
    const auto y = args.get<ffi::AnyBuffer>(0);
    const auto out = rets.get<ffi::AnyBuffer>(0);
    switch (y->element_type()) {
      case ffi::BF16:
        p.dtype = RowDtype::kBfloat16;
        break;
      case ffi::F16:
        p.dtype = RowDtype::kFloat16;
        break;
      case ffi::F32:
        p.dtype = RowDtype::kFloat32;
        break;
      default:
        return InvalidArgument(kName, "y must be bf16, f16 or f32");
    }
    const int64_t y_rows = half == Half::kDone ? p.num_tokens : max_recv_tokens;
    p.y = Data<char>(*y);
    p.out = Data<char>(**out);
    p.row_bytes = static_cast<int64_t>((*out)->size_bytes()) / p.num_tokens;
    if (static_cast<int64_t>(y->size_bytes()) != p.row_bytes * y_rows) {
      return InvalidArgument(kName, "y must have rows of the result's size");
    }
  }
  if (has_weights != 0) p.weights = Data<float>(*args.get<ffi::AnyBuffer>(has_rows));
  if (has_carried != 0) {
    p.carried = Data<float>(*args.get<ffi::AnyBuffer>(has_rows + has_weights));
    p.carried_back = Data<float>(**rets.get<ffi::AnyBuffer>(has_rows));
  }
  if (half != Half::kBoth) {
    const auto in_flight = half == Half::kStart ? **rets.get<ffi::AnyBuffer>(0) : *args.get<ffi::AnyBuffer>(0);
    if (ffi::Error error = HasWord(kName, in_flight); error.failure()) return error;
    low_latency.in_flight = Data<uint64_t>(in_flight);
  }
  Member member;
  const int64_t window_bytes = LowLatencyCombineBytes(p, static_cast<int>(num_ranks), low_latency.logfmt);
  if (ffi::Error error =
          FindArenas(kName, stream, device, run, devices, num_ranks, window_bytes, &member, &low_latency);
      error.failure())
    return error;
  p.group = member.view();
  p.refused = member.refused();
  return Report(kName, member, LaunchLowLatencyCombine(p, low_latency, Config(num_sms), stream));
}

auto DispatchBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::RunId>()
      .Attr<ffi::Span<const int64_t>>("devices")
      .Attr<int64_t>("num_ranks")
      .Attr<int64_t>("num_experts")
      .Attr<int64_t>("layout")
      .Attr<int64_t>("expert_alignment")
      .Attr<int64_t>("expert_capacity")
      .Attr<int64_t>("max_recv_tokens")
      .Attr<int64_t>("num_rows")
      .Attr<int64_t>("has_weights")
      .Attr<int64_t>("num_sms")
      .Attr<int64_t>("wire")
      .RemainingArgs()
      .RemainingRets();
}

auto CombineBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::RunId>()
      .Attr<ffi::Span<const int64_t>>("devices")
      .Attr<int64_t>("num_ranks")
      .Attr<int64_t>("one_row_a_rank")
      .Attr<int64_t>("max_recv_tokens")
      .Attr<int64_t>("has_rows")
      .Attr<int64_t>("has_weights")
      .Attr<int64_t>("has_carried")
      .Attr<int64_t>("num_sms")
      .Attr<int64_t>("wire")
      .RemainingArgs()
      .RemainingRets();
}

// A comma between template arguments would end the macro's argument.
constexpr auto kRunNotify = Dispatch<kNotify, Half::kBoth>;
constexpr auto kRunDispatch = Dispatch<kDispatch, Half::kBoth>;
constexpr auto kRunDispatchCached = Dispatch<kDispatchCached, Half::kBoth>;
constexpr auto kRunDispatchStart = Dispatch<kDispatchCached, Half::kStart>;
constexpr auto kRunDispatchDone = Dispatch<kDispatchCached, Half::kDone>;

}  // namespace
}  // namespace jax_ep

// The epoch lives in device memory, so captured launches can be replayed.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyNotify, jax_ep::kRunNotify, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyDispatch, jax_ep::kRunDispatch, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyDispatchCached, jax_ep::kRunDispatchCached, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyDispatchStart, jax_ep::kRunDispatchStart, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyDispatchDone, jax_ep::kRunDispatchDone, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyCombine, jax_ep::Combine<jax_ep::Half::kBoth>, jax_ep::CombineBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyCombineStart, jax_ep::Combine<jax_ep::Half::kStart>,
                              jax_ep::CombineBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpLowLatencyCombineDone, jax_ep::Combine<jax_ep::Half::kDone>,
                              jax_ep::CombineBinding(), {ffi::Traits::kCmdBufferCompatible});
