// The instances of a combine kernel: of each dtype, weighted or not, and with one vector a lane or several. A Family
// has their number `kWide`, and `Of<T, kWeighted, V>()`, which gives an instance as an Instance<Params>.
#pragma once

#include "combine/vector.cuh"
#include "common/row_dtype.h"
#include "device/load.h"

namespace jax_ep {

template <class Params>
struct Instance {
  void (*kernel)(Params);
  int shared_bytes;
};

template <class Family, class T>
auto InstanceFor(bool weighted, bool wide) {
  constexpr int kWide = Family::kWide;
  if (weighted) return wide ? Family::template Of<T, true, kWide>() : Family::template Of<T, true, 1>();
  return wide ? Family::template Of<T, false, kWide>() : Family::template Of<T, false, 1>();
}

template <class Family>
auto InstanceFor(RowDtype dtype, bool weighted, bool wide) {
  if (dtype == RowDtype::kBfloat16) return InstanceFor<Family, __nv_bfloat16>(weighted, wide);
  if (dtype == RowDtype::kFloat16) return InstanceFor<Family, __half>(weighted, wide);
  return InstanceFor<Family, float>(weighted, wide);
}

template <class Family>
cudaError_t LoadInstances() {
  for (RowDtype dtype : {RowDtype::kBfloat16, RowDtype::kFloat16, RowDtype::kFloat32}) {
    for (int i = 0; i < 4; ++i) {
      const auto instance = InstanceFor<Family>(dtype, i / 2 != 0, i % 2 != 0);
      if (cudaError_t error = LoadKernel(instance.kernel, instance.shared_bytes); error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep
