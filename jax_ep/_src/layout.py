"""dispatch_layout: where this rank's tokens go, counted. Local to a rank; no peer is asked.

The CUDA kernel is ffi/layout/. Rank-local code may use it to size capacities or to watch the experts' load.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._src import check, compat, targets


class DispatchLayout(NamedTuple):
    """What `dispatch_layout` returns."""

    num_tokens_per_rank: jax.Array
    num_tokens_per_expert: jax.Array
    is_token_in_rank: jax.Array


@compat.on_the_callers_stream
def dispatch_layout(topk_idx: jax.Array, *, num_experts: int, num_ranks: int) -> DispatchLayout:
    """Counts where tokens would go. Needs no mesh axis and talks to nobody.

    Args:
      topk_idx: s32[T, K] (s64 under x64), the expert of each choice; ids outside 0 .. num_experts - 1 are no choice.
        Further leading axes count as tokens in row-major order.
      num_experts: E, a multiple of num_ranks; expert e lives on rank e // (E / R).
      num_ranks: R.

    Returns:
      num_tokens_per_rank s32[R] (a token counts once a rank), num_tokens_per_expert s32[E] (every choice counts) and
      is_token_in_rank bool[T, R], in the leading axes of topk_idx.

    Raises:
      ValueError, TypeError: num_experts is no multiple of num_ranks, or topk_idx is no s32[T, K].

    Example:
      >>> per_rank, per_expert, where = jax_ep.dispatch_layout(jnp.array([[0, 3], [1, 0]]), num_experts=4, num_ranks=2)
      >>> per_rank, per_expert
      (Array([2, 1], dtype=int32), Array([2, 1, 0, 1], dtype=int32))
    """
    operation = "dispatch_layout"
    num_ranks = check.integer(operation, "num_ranks", num_ranks, 1)
    num_experts = check.integer(operation, "num_experts", num_experts, 1)
    if num_experts % num_ranks:
        check.fail(
            ValueError, operation, f"num_experts must be a multiple of num_ranks = {num_ranks}", num_experts,
            f"Pad the experts to {-(-num_experts // num_ranks) * num_ranks}.",
        )  # fmt: skip
    topk_idx = check.topk_idx(operation, topk_idx)
    lead_shape = topk_idx.shape[:-1]
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    topk_idx = jnp.where(valid, topk_idx, -1).astype(jnp.int32).reshape(math.prod(lead_shape), topk_idx.shape[-1])
    per_rank, per_expert, where = dispatch_layout_p.bind(topk_idx, num_experts=num_experts, num_ranks=num_ranks)
    return DispatchLayout(per_rank, per_expert, where.reshape(*lead_shape, num_ranks))


dispatch_layout_p = compat.effectful_primitive("jax_ep_dispatch_layout")


def _reference(topk_idx: jax.Array, *, num_experts: int, num_ranks: int) -> list[jax.Array]:
    valid = topk_idx >= 0
    owner = jnp.where(valid, topk_idx // (num_experts // num_ranks), -1)
    is_token_in_rank = (owner[:, :, None] == jnp.arange(num_ranks)).any(axis=1)
    per_expert = jnp.zeros(num_experts, jnp.int32).at[jnp.where(valid, topk_idx, num_experts)].add(1, mode="drop")
    return [is_token_in_rank.sum(axis=0, dtype=jnp.int32), per_expert, is_token_in_rank]


@dispatch_layout_p.def_abstract_eval
def _(topk_idx: Any, *, num_experts: int, num_ranks: int) -> Any:
    axes = compat.varying_axes(topk_idx)
    return [
        compat.result_aval(topk_idx, (num_ranks,), jnp.int32, axes),
        compat.result_aval(topk_idx, (num_experts,), jnp.int32, axes),
        compat.result_aval(topk_idx, (topk_idx.shape[0], num_ranks), jnp.bool_, axes),
    ]


def _lower_cuda(ctx: Any, topk_idx: Any, *, num_experts: int, num_ranks: int) -> Any:
    rule = jax.ffi.ffi_lowering(targets.DISPATCH_LAYOUT)
    return rule(ctx, topk_idx, num_experts=np.int64(num_experts), num_ranks=np.int64(num_ranks))


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    (topk_idx,), (dim,) = args, dims
    stacked = jnp.moveaxis(topk_idx, dim, 0)
    return lax.map(lambda one: dispatch_layout_p.bind(one, **params), stacked), [0, 0, 0]


compat.mlir.register_lowering(dispatch_layout_p, compat.mlir.lower_fun(_reference, multiple_results=True))
compat.mlir.register_lowering(dispatch_layout_p, _lower_cuda, platform="cuda")
compat.batching.primitive_batchers[dispatch_layout_p] = _batch
