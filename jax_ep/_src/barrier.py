"""barrier: no rank goes on before every rank has come. On CUDA ffi/group/barrier.cu, elsewhere a sum over the ranks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._src import check, compat, group, membership, targets

MAX_RANKS = 32  # one lane of a warp a rank


def barrier(axis_name: str | tuple[str, ...]) -> jax.Array:
    """Waits until every rank along `axis_name` has come here; call it inside `jax.shard_map`.

    Args:
      axis_name: the mesh axis, or a tuple of them.

    Returns:
      s32[1], the number of ranks that came: all that are not masked (`jax_ep.config.dead_devices`). On GPUs the call is made
      even if nothing uses that; elsewhere XLA keeps only what is used.
      `x, came = jax.lax.optimization_barrier((x, came))` puts later work behind it, if `came` is used too.

    Raises:
      NameError: the axis is not bound.
      JaxRuntimeError: on GPUs, at the next call, if a rank did not come within `jax_ep.config.timeout`; the result is 0.

    Example:
      >>> came = jax.jit(jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=P("expert")))()
    """
    names = check.axes("barrier", axis_name)
    (came,) = barrier_p.bind(
        compat.as_varying(jnp.ones(1, jnp.int32), names), axis_name=names, num_ranks=compat.axis_size(names)
    )
    return came


barrier_p = compat.effectful_primitive("jax_ep_barrier")


def _abstract_eval(one: Any, *, axis_name: tuple[str, ...], num_ranks: int) -> Any:
    del num_ranks
    axes = compat.varying_axes(one) | frozenset(axis_name)
    return [compat.result_aval(one, (1,), jnp.int32, axes)], compat.named_axis_effects(axis_name)


def _reference(
    one: jax.Array, *, axis_name: tuple[str, ...], num_ranks: int, dead: jax.Array | None = None
) -> list[jax.Array]:
    del num_ranks
    is_dead = dead is not None and dead[lax.axis_index(axis_name)]
    came = compat.as_varying(lax.psum(jnp.where(is_dead, 0, one), axis_name), axis_name)
    return [jnp.where(is_dead, 0, came)]


def _cuda(ctx: Any, one: Any, *, axis_name: tuple[str, ...], num_ranks: int) -> Any:
    groups = group.along(ctx.module_context.axis_context, axis_name) if num_ranks <= MAX_RANKS else None
    if groups is None:
        return _lower_reference(ctx, one, axis_name=axis_name, num_ranks=num_ranks)
    devices = np.array(groups, np.int64).reshape(-1)
    target = targets.INTERNODE_BARRIER if group.spans_nodes(groups) else targets.BARRIER
    return jax.ffi.ffi_lowering(target, has_side_effect=True)(ctx, one, devices=devices, num_ranks=np.int64(num_ranks))


_lower_reference = membership.lowering(_reference)
barrier_p.def_effectful_abstract_eval(_abstract_eval)
compat.mlir.register_lowering(barrier_p, _lower_reference)
compat.mlir.register_lowering(barrier_p, _cuda, platform="cuda")
