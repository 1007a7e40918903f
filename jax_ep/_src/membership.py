"""Which ranks are masked (`jax_ep.config.dead_devices`), as the reference sees it: asked anew by every run of a program.

The kernels find the mask in their group's memory. A program of XLA's collectives calls a handler of the compiled half
(ffi/group/is_dead_ffi.cc) with the ids of its group's devices, so a new mask holds in programs that are compiled already. An
exported program, or one lowered for no devices, knows of no mask: it must run where the handler is not. Neighbour: reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._src import compat, targets
from jax_ep._src.handle import Routing

Rule = Callable[..., Any]


def lowering(meaning: Callable[..., list[jax.Array]]) -> Rule:
    """The lowering of a primitive by its reference, which gets the mask as the keyword `dead`: bool[R], or None for no mask."""

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        names = params["routing"].axis_name if "routing" in params else params["axis_name"]
        devices = None if compat.lowers_for_export(ctx) else _devices(ctx.module_context.axis_context, names)

        def with_mask(*args: jax.Array, **static: Any) -> list[jax.Array]:
            dead = None
            if devices is not None and all(compat.axis_exists(name) for name in devices[1]):
                dead = _is_dead(*devices, args[0])
            return meaning(*args, dead=dead, **static)

        return compat.mlir.lower_fun(with_mask, multiple_results=True)(ctx, *operands, **params)

    return rule


def _devices(axis_context: Any, axis_name: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Ids of the devices of each group along the axes, s32[groups, R], and the axes that number the groups; None without devices."""
    mesh = getattr(axis_context, "mesh", None)
    if not isinstance(mesh, jax.sharding.Mesh) or mesh.empty:
        return None
    ids = np.vectorize(lambda device: device.id, otypes=[np.int32])(mesh.devices)
    others = [name for name in mesh.axis_names if name not in axis_name]
    order = [mesh.axis_names.index(name) for name in (*others, *axis_name)]
    num_ranks = math.prod(mesh.shape[name] for name in axis_name)
    return ids.transpose(order).reshape(-1, num_ranks), tuple(name for name in others if mesh.shape[name] > 1)


def _is_dead(devices: np.ndarray, others: tuple[str, ...], like: jax.Array) -> jax.Array:
    """bool[R] of the own group, varying as `like` does."""
    own = jnp.asarray(devices)[lax.axis_index(others) if others else 0]
    (dead,) = jax.ffi.ffi_call(targets.IS_DEAD, [jax.ShapeDtypeStruct(own.shape, jnp.bool_)])(own)
    return compat.as_varying(dead, compat.varying_axes(like))


def without(
    dead: jax.Array | None, slot: jax.Array, recv_slot: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    """slot and recv_slot without the rows of masked ranks, which a routing from before the mask may have."""
    if dead is None:
        return slot, recv_slot
    me = dead[lax.axis_index(routing.axis_name)]
    owner = jnp.maximum(slot, 0) // max(routing.max_recv_tokens, 1)
    slot = jnp.where(me | ((slot >= 0) & dead[owner]), -1, slot)
    return slot, jnp.where(me | dead[:, None, None], -1, recv_slot)
