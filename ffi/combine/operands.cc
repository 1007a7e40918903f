#include "combine/operands.h"

#include <string>

#include "common/error.h"

namespace ffi = xla::ffi;

namespace jax_ep {
namespace {

template <class T>
T* Data(const ffi::AnyBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

}  // namespace

ffi::Error ReadCombineOperands(const CombineAttributes& attributes, int64_t num_scratch, ffi::RemainingArgs args,
                               ffi::RemainingRets rets, CombineParams* params) {
  const auto [one_row_a_rank, max_recv_tokens, has_rows, has_weights, has_carried] = attributes;
  CombineParams& p = *params;
  p.one_row_a_rank = one_row_a_rank != 0;
  p.max_recv_tokens = static_cast<int>(max_recv_tokens);
  const bool has_scratch = has_rows != 0 && num_scratch > 0;
  const size_t num_moved = has_rows + has_weights + has_carried;
  if (args.size() != num_moved + 2 || rets.size() != static_cast<size_t>(has_rows + has_carried + has_scratch)) {
    return InvalidArgument("combine", "unexpected number of operands or results");
  }
  const auto choices = args.get<ffi::AnyBuffer>(num_moved)->dimensions();  // slot, [T, K]
  p.num_tokens = static_cast<int>(choices[0]);
  p.num_topk = static_cast<int>(choices[1]);
  p.slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved));
  p.recv_slot = Data<int32_t>(*args.get<ffi::AnyBuffer>(num_moved + 1));
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
        return InvalidArgument("combine", "y must be bf16, f16 or f32");
    }
    p.y = Data<char>(*y);
    p.out = Data<char>(**out);
    p.row_bytes = static_cast<int64_t>((*out)->size_bytes()) / p.num_tokens;
    if (static_cast<int64_t>(y->size_bytes()) != p.row_bytes * max_recv_tokens) {
      return InvalidArgument("combine", "y must have max_recv_tokens rows of the result's size");
    }
  }
  if (has_weights != 0) p.weights = Data<float>(*args.get<ffi::AnyBuffer>(has_rows));
  if (has_carried != 0) {
    p.carried = Data<float>(*args.get<ffi::AnyBuffer>(has_rows + has_weights));
    p.carried_back = Data<float>(**rets.get<ffi::AnyBuffer>(has_rows));
  }
  if (has_scratch) {
    const auto scratch = rets.get<ffi::AnyBuffer>(has_rows + has_carried);
    p.scratch = Data<char>(**scratch);
    if (static_cast<int64_t>((*scratch)->size_bytes()) < num_scratch * p.num_tokens * p.row_bytes) {
      return InvalidArgument("combine", "scratch must hold " + std::to_string(num_scratch) + " results");
    }
  }
  return ffi::Error::Success();
}

}  // namespace jax_ep
