// What a row that a kernel computes with consists of. Neighbours: combine/combine.h, dispatch/dispatch.h.
#pragma once

namespace jax_ep {

enum class RowDtype : int { kBfloat16, kFloat16, kFloat32 };

}  // namespace jax_ep
