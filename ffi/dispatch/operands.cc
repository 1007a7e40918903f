#include "dispatch/operands.h"

#include "common/error.h"
#include "dispatch/encoding_ffi.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

}  // namespace

ffi::Error ReadDispatchOperands(Operation operation, const char* name, const DispatchAttributes& attributes,
                                ffi::RemainingArgs args, ffi::RemainingRets rets, DispatchParams* params) {
  const bool cached = operation == kDispatchCached;
  const int64_t num_rows = attributes.num_rows, max_recv_tokens = attributes.max_recv_tokens;
  DispatchParams& p = *params;
  p.operation = operation;
  p.layout = static_cast<Layout>(attributes.layout);
  const bool encodes = attributes.wire != 0;
  const size_t moved = num_rows + attributes.has_weights, come = moved + encodes;
  const size_t num_routed = cached ? 0 : p.layout == Layout::kRank ? 4 : 3;
  if (num_rows > kMaxRowArrays || args.size() != moved + (cached ? 3 : 1) || rets.size() != come + num_routed) {
    return InvalidArgument(name, "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(moved)->dimensions();  // topk_idx or slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.num_experts = static_cast<int>(attributes.num_experts);
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  p.expert_alignment = static_cast<int>(attributes.expert_alignment);
  p.expert_capacity = static_cast<int>(attributes.expert_capacity);
  p.num_row_arrays = static_cast<int>(num_rows);
  if (encodes) {
    if (ffi::Error error = ReadEncoding(name, attributes.wire, num_rows, args, rets, &p); error.failure()) return error;
  }
  for (int64_t i = 0; !encodes && i < num_rows; ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i);
    const auto recv = rets.get<ffi::AnyBuffer>(i);
    p.rows[i] = {Data<char>(*x), Data<char>(**recv), static_cast<int64_t>(x->size_bytes()) / p.num_tokens};
    if (static_cast<int64_t>((*recv)->size_bytes()) != p.rows[i].row_bytes * max_recv_tokens) {
      return InvalidArgument(name, "a result must have max_recv_tokens rows of its operand's size");
    }
  }
  if (attributes.has_weights != 0) {
    p.topk_weights = Data<float>(*args.get<ffi::AnyBuffer>(num_rows));
    p.recv_weights = Data<float>(**rets.get<ffi::AnyBuffer>(num_rows + encodes));
  }
  if (cached) {
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
  return ffi::Error::Success();
}

}  // namespace jax_ep
