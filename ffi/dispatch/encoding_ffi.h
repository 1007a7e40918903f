// How a wire format comes to the handlers of a dispatch, of either mode: the attribute `wire` is 1 + a Wire of
// device/quantize.cuh, or 0. With it the one array of rows becomes two results, values and scales.
// Neighbours: dispatch_ffi.cc, low_latency/low_latency_ffi.cc.
#pragma once

#include "common/error.h"
#include "dispatch/dispatch.h"

namespace jax_ep {

// Fills p->rows and p->encoding from operand 0 and results 0 and 1; p->num_tokens and p->max_recv_tokens are there.
inline xla::ffi::Error ReadEncoding(const char* name, int64_t wire, int64_t num_rows, xla::ffi::RemainingArgs args,
                                    xla::ffi::RemainingRets rets, DispatchParams* p) {
  namespace ffi = xla::ffi;
  if (p->operation != kDispatch || num_rows != 1 || wire < 1 || wire > 3)
    return InvalidArgument(name, "unexpected wire format");
  p->num_row_arrays = 2;
  for (int i = 0; i < 2; ++i) {
    const auto recv = rets.get<ffi::AnyBuffer>(i);
    p->rows[i] = {nullptr, static_cast<char*>((*recv)->untyped_data()),
                  static_cast<int64_t>((*recv)->size_bytes()) / p->max_recv_tokens};
  }
  const auto x = args.get<ffi::AnyBuffer>(0);
  p->encoding = {static_cast<const char*>(x->untyped_data()), RowDtype::kBfloat16, static_cast<int>(wire - 1),
                 static_cast<int>(p->rows[0].row_bytes)};
  if (x->element_type() == ffi::F16) p->encoding.dtype = RowDtype::kFloat16;
  if (x->element_type() == ffi::F32) p->encoding.dtype = RowDtype::kFloat32;
  if (static_cast<int64_t>(x->element_count()) != p->rows[0].row_bytes * p->num_tokens) {
    return InvalidArgument(name, "a result must have rows of its operand's size");
  }
  return ffi::Error::Success();
}

}  // namespace jax_ep
