// The operands and results of a combine, read and checked: the same for every kernel that serves one through a group.
//
//   combine   y?, weights?, carried?, slot, recv_slot -> out?, carried_back?, scratch?
#pragma once

#include <cstdint>

#include "combine/combine.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

struct CombineAttributes {
  int64_t one_row_a_rank, max_recv_tokens, has_rows, has_weights, has_carried;
};

// All of `params` but group and refused. With rows there is a scratch of `num_scratch` results, if that is not 0.
xla::ffi::Error ReadCombineOperands(const CombineAttributes& attributes, int64_t num_scratch,
                                    xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets, CombineParams* params);

}  // namespace jax_ep
