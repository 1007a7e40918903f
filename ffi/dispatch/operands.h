// The operands and results of a dispatch, read and checked: the same for every kernel that serves one through a group.
//
//   notify            topk_idx                                   -> slot, recv_slot, counts, recv_topk_idx ("rank")
//   dispatch          rows..., weights?, topk_idx                -> rows..., weights?, and what notify gives
//   dispatch_cached   rows..., weights?, slot, recv_slot, counts -> rows..., weights?
//
// A dispatch with `wire` has one array of rows and two of results, as encoding_ffi.h has it.
#pragma once

#include <cstdint>

#include "dispatch/dispatch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

struct DispatchAttributes {
  int64_t num_ranks, num_experts, layout, expert_alignment, expert_capacity, max_recv_tokens, num_rows, has_weights;
  int64_t num_sms, wire;
};

constexpr const char* NameOf(Operation operation) {
  return operation == kDispatch ? "dispatch" : operation == kNotify ? "notify" : "dispatch_cached";
}

// All of `params` but group and refused.
xla::ffi::Error ReadDispatchOperands(Operation operation, const char* name, const DispatchAttributes& attributes,
                                     xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                                     DispatchParams* params);

}  // namespace jax_ep
