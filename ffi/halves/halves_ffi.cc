// The XLA FFI handlers of the halves of high-throughput calls: they check shapes, find the landings, fork, then launch.
//
//   jax_ep_dispatch_start  rows [T, ...]..., weights?, handle    -> in flight [T, ...]...
//   jax_ep_dispatch_done   in flight..., handle                  -> rows [C, ...]..., weights?
//   jax_ep_combine_start   y?, weights?, carried?, handle        -> in flight [T, ...]...
//   jax_ep_combine_done    in flight..., handle                  -> out?, carried_back?
//
// A handle is slot, recv_slot and counts. Of what is in flight only the first 16 bytes of the first array count.
#include <cstdint>
#include <stdexcept>

#include "common/error.h"
#include "group/member.h"
#include "halves/halves.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

struct LandingPlace {
  Member member;
  HalfParams half;
  int64_t window_bytes;
};

// This device's place in the group and the landings. A program that was not lowered in this process makes them here.
ffi::Error FindPlace(const char* name, cudaStream_t stream, int32_t device, ffi::RunId run,
                     ffi::Span<const int64_t> devices, int64_t num_ranks, const ffi::AnyBuffer& in_flight,
                     int64_t window_bytes, LandingPlace* place) {
  if (window_bytes == 0) return InvalidArgument(name, "the kernels do not take this shape");
  if (in_flight.size_bytes() < 16) return InvalidArgument(name, "the first array in flight must have 16 bytes");
  Member& member = place->member;
  if (ffi::Error error = FindMember(name, stream, device, run, devices, num_ranks, &member); error.failure())
    return error;
  try {
    member.group->MakeSharedArena(Purpose::kHalves, Group::LandingArenaBytes(window_bytes));
    place->half.arenas = member.group->landings(member.rank, window_bytes);
  } catch (const std::runtime_error& error) {
    return ffi::Error::Internal(error.what());
  }
  place->half.in_flight = Data<uint64_t>(in_flight);
  place->window_bytes = window_bytes;
  return ffi::Error::Success();
}

// Launches a start, which takes a fork.
template <class Launch>
ffi::Error Start(const char* name, cudaStream_t stream, LandingPlace* place, const Launch& launch) {
  Fork fork{};
  cudaError_t error = place->member.group->MakeFork(place->member.rank, place->window_bytes, stream, &fork);
  if (place->member.refused()) fork.peers = 0;
  if (error == cudaSuccess) error = launch(fork);
  return Report(name, place->member, error);
}

HalvesConfig Config(int64_t num_sms) {
  HalvesConfig config;
  if (num_sms > 0) config.num_sms = static_cast<int>(num_sms);
  return config;
}

template <bool kStart>
ffi::Error Dispatch(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                    int64_t num_ranks, int64_t num_experts, int64_t layout, int64_t expert_alignment,
                    int64_t expert_capacity, int64_t max_recv_tokens, int64_t num_rows, int64_t has_weights,
                    int64_t num_sms, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  constexpr const char* kName = kStart ? "dispatch_start" : "dispatch_done";
  const size_t moved = num_rows + has_weights;
  if (moved == 0 || num_rows > kMaxRowArrays || args.size() != moved + 3 || rets.size() != moved) {
    return InvalidArgument(kName, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(moved)->dimensions();  // slot, [T, K]
  DispatchParams p{};
  p.operation = kDispatchCached;
  p.layout = static_cast<Layout>(layout);
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.num_experts = static_cast<int>(num_experts);
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  p.expert_alignment = static_cast<int>(expert_alignment);
  p.expert_capacity = static_cast<int>(expert_capacity);
  p.num_row_arrays = static_cast<int>(num_rows);
  if (p.num_tokens <= 0 || max_recv_tokens <= 0) return InvalidArgument(kName, "nothing to move");
  const int64_t rows_back = kStart ? p.num_tokens : max_recv_tokens;
  for (int64_t i = 0; i < num_rows; ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i);
    const auto recv = rets.get<ffi::AnyBuffer>(i);
    p.rows[i] = {Data<char>(*x), Data<char>(**recv), static_cast<int64_t>(x->size_bytes()) / p.num_tokens};
    if (static_cast<int64_t>((*recv)->size_bytes()) != p.rows[i].row_bytes * rows_back) {
      return InvalidArgument(kName, "a result must have rows of its operand's size");
    }
  }
  if (has_weights != 0) {
    p.topk_weights = Data<float>(*args.get<ffi::AnyBuffer>(num_rows));
    p.recv_weights = Data<float>(**rets.get<ffi::AnyBuffer>(num_rows));
  }
  p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved));
  p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 1));
  p.counts = Data<int32_t>(*args.get<ffi::AnyBuffer>(moved + 2));
  const auto in_flight = kStart ? **rets.get<ffi::AnyBuffer>(0) : *args.get<ffi::AnyBuffer>(0);
  LandingPlace place{};
  if (ffi::Error error = FindPlace(kName, stream, device, run, devices, num_ranks, in_flight,
                                   DispatchLandingBytes(p, static_cast<int>(num_ranks)), &place);
      error.failure())
    return error;
  p.group = place.member.view();
  p.refused = place.member.refused();
  if (!kStart) return Report(kName, place.member, LaunchDispatchDone(p, place.half, Config(num_sms), stream));
  return Start(kName, stream, &place,
               [&](const Fork& fork) { return LaunchDispatchStart(p, place.half, fork, Config(num_sms), stream); });
}

template <bool kStart>
ffi::Error Combine(cudaStream_t stream, int32_t device, ffi::RunId run, ffi::Span<const int64_t> devices,
                   int64_t num_ranks, int64_t one_row_a_rank, int64_t max_recv_tokens, int64_t has_rows,
                   int64_t has_weights, int64_t has_carried, int64_t num_sms, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  constexpr const char* kName = kStart ? "combine_start" : "combine_done";
  const size_t num_moved = has_rows + has_weights + has_carried, num_back = has_rows + has_carried;
  if (num_back == 0 || args.size() != num_moved + 3 || rets.size() != num_back || (!kStart && has_weights != 0)) {
    return InvalidArgument(kName, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(num_moved)->dimensions();  // slot, [T, K]
  CombineParams p{};
  p.one_row_a_rank = one_row_a_rank != 0;
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
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
    p.y = Data<char>(*y);
    p.out = Data<char>(**out);
    p.row_bytes = static_cast<int64_t>((*out)->size_bytes()) / p.num_tokens;
    if (static_cast<int64_t>(y->size_bytes()) != p.row_bytes * (kStart ? max_recv_tokens : p.num_tokens)) {
      return InvalidArgument(kName, "y must have rows of the result's size");
    }
  }
  if (has_weights != 0) p.weights = Data<float>(*args.get<ffi::AnyBuffer>(has_rows));
  if (has_carried != 0) {
    p.carried = Data<float>(*args.get<ffi::AnyBuffer>(has_rows + has_weights));
    p.carried_back = Data<float>(**rets.get<ffi::AnyBuffer>(has_rows));
  }
  const auto in_flight = kStart ? **rets.get<ffi::AnyBuffer>(0) : *args.get<ffi::AnyBuffer>(0);
  LandingPlace place{};
  if (ffi::Error error = FindPlace(kName, stream, device, run, devices, num_ranks, in_flight,
                                   CombineLandingBytes(p, static_cast<int>(num_ranks)), &place);
      error.failure())
    return error;
  p.group = place.member.view();
  p.refused = place.member.refused();
  if (!kStart) return Report(kName, place.member, LaunchCombineDone(p, place.half, Config(num_sms), stream));
  return Start(kName, stream, &place,
               [&](const Fork& fork) { return LaunchCombineStart(p, place.half, fork, Config(num_sms), stream); });
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
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace
}  // namespace jax_ep

// Starts are not for CUDA graphs: within one a fork would have to be joined, and nothing would be hidden.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchStart, jax_ep::Dispatch<true>, jax_ep::DispatchBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchDone, jax_ep::Dispatch<false>, jax_ep::DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineStart, jax_ep::Combine<true>, jax_ep::CombineBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineDone, jax_ep::Combine<false>, jax_ep::CombineBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
