"""vmap: rows alone batched fold into the hidden axis, one exchange for all; routing or gates batched go one after another.

    rows [T, B, H] -> [T, B*H] -> [C, B*H] -> [C, B, H]

Every rank maps over the same number of calls in the same order, so no rank waits for a call that another never makes.

Halves under vmap are the reference's: mapped one after another, all starts come before the first done, more of them than
may be in flight; and what is in flight must be of one kind whichever way it is batched.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep._src import autodiff, compat, quantized, reference
from jax_ep._src import primitives as p
from jax_ep._src.barrier import barrier_p

_HALVES = (
    p.dispatch_start_p,
    p.dispatch_done_p,
    p.combine_start_p,
    p.combine_done_p,
    p.combine_weighted_start_p,
)
_LOGFMT_PIECE = 1024  # rows of whole pieces can be folded under wire="logfmt10"


def _refuse_own_axis(axis_data: Any, axis_name: tuple[str, ...]) -> None:
    if axis_data.name in axis_name:
        raise NotImplementedError(
            f"jax_ep: vmap must not run over the ranks' axis {axis_data.name!r} itself. Use jax.shard_map over that axis."
        )


def _one_after_another(primitive: compat.Primitive, args: Any, dims: Any, params: Any) -> Any:
    """Maps over the batched operands; the others are the same for all."""
    batched = [jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True) if dim is not None]

    def one(slices: list[jax.Array]) -> list[jax.Array]:
        remaining = iter(slices)
        operands = [arg if dim is None else next(remaining) for arg, dim in zip(args, dims, strict=True)]
        return primitive.bind(*operands, **params)

    results = lax.map(one, batched)
    return results, [0] * len(results)


def _fold(rows: jax.Array, dim: int | None) -> jax.Array:
    """[T, H] with a batch axis anywhere -> [T, B*H]; rows without one stay."""
    if dim is None:
        return rows
    moved = jnp.moveaxis(rows, dim, 1)
    return moved.reshape(moved.shape[0], -1)


def _unfold(rows: jax.Array, size: int) -> jax.Array:
    return rows.reshape(*rows.shape[:-1], size, rows.shape[-1] // size)


def _moving(primitive: compat.Primitive, axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
    """Batching of a primitive whose first `num_rows` operands are rows."""
    num_rows = params["num_rows"]
    wire = params.get("wire")
    foldable = wire is None or args[0].shape[-1] % _LOGFMT_PIECE == 0
    if any(dim is not None for dim in dims[num_rows:]) or not foldable:
        return _one_after_another(primitive, args, dims, params)
    rows = [_fold(arg, dim) for arg, dim in zip(args[:num_rows], dims[:num_rows], strict=True)]
    results = primitive.bind(*rows, *args[num_rows:], **params)
    return _unfold_results(results, dims[:num_rows], axis_data.size)


def _unfold_results(results: Any, row_dims: Any, size: int) -> Any:
    """Rows that went in batched come out batched, before their last axis; the other results are the same for all."""
    num_rows = len(row_dims)
    values = [r if dim is None else _unfold(r, size) for r, dim in zip(results[:num_rows], row_dims, strict=True)]
    out_dims = [None if dim is None else value.ndim - 2 for value, dim in zip(values, row_dims, strict=True)]
    return [*values, *results[num_rows:]], [*out_dims, *[None] * (len(results) - num_rows)]


def _dispatch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
    num_rows, wire = params["num_rows"], params["wire"]
    if wire is not None and dims[0] is not None and all(dim is None for dim in dims[num_rows:]):
        # scales belong to groups of one row's columns: quantize before rows are laid side by side
        values_scales = quantized.encode(jnp.moveaxis(args[0], dims[0], 0), wire)
        args, dims = (*values_scales, *args[1:]), (0, 0, *dims[1:])
        params = {**params, "num_rows": 2, "wire": None}
    return _moving(p.dispatch_p, axis_data, args, dims, **params)


def _weighted(primitive: compat.Primitive, num_y: int, axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
    """Batching of y..., weights..., handle with `num_y` of each: folds where only y's are batched."""
    order = [0, 1] if num_y == 1 else [0, 2, 1, 3]  # (y, w) or (y', w', y, w) -> y's first
    order += range(2 * num_y, len(args))
    y_first, y_dims = [args[i] for i in order], [dims[i] for i in order]
    foldable = params.get("wire") is None or args[0].shape[-1] % _LOGFMT_PIECE == 0
    if any(dim is not None for dim in y_dims[num_y:]) or not foldable:
        return _one_after_another(primitive, args, dims, params)
    for i in range(num_y):
        stacked = compat.batching.bdim_at_front(y_first[i], y_dims[i], axis_data.size)
        y_first[i] = _fold(stacked, 0)
    operands = [y_first[order.index(i)] for i in range(len(args))]
    (out,) = primitive.bind(*operands, **params)
    return [_unfold(out, axis_data.size)], [out.ndim - 1]


def _grad(axis_data: Any, args: Any, dims: Any, *, routing: Any) -> Any:
    """Inner products are not to be folded: rows are dispatched, all at a time, and weighed each for itself."""
    if any(dim is not None for dim in dims[3:]):
        return _one_after_another(p.combine_grad_p, args, dims, {"routing": routing})

    def one(out_bar: jax.Array, y: jax.Array, weights: jax.Array, *handle: jax.Array) -> list[jax.Array]:
        (rows,), _ = p.move(p.dispatch_cached_p, [out_bar], None, handle, routing)
        return reference.weigh(rows, y, weights, handle[1])

    batched = jax.vmap(one, in_axes=dims, axis_size=axis_data.size, spmd_axis_name=axis_data.spmd_name)
    return batched(*args), [0, 0]


def _notify(_: Any, args: Any, dims: Any, **params: Any) -> Any:
    return _one_after_another(p.notify_p, args, dims, params)


def _barrier(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
    """Once for all: no rank has come before all of its calls have."""
    _refuse_own_axis(axis_data, params["axis_name"])
    (one,), (dim,) = args, dims
    return barrier_p.bind(one if dim is None else jnp.take(one, 0, axis=dim), **params), [None]


def _register(primitive: compat.Primitive, rule: Any) -> None:
    def batch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        _refuse_own_axis(axis_data, params["routing"].axis_name)
        if all(dim is None for dim in dims):  # inside vmap, but not batched
            results = primitive.bind(*args, **params)
            return results, [None] * len(results)
        if primitive in _HALVES:
            params["routing"] = dataclasses.replace(params["routing"], mode="whole")
        return rule(axis_data, args, dims, **params)

    compat.batching.fancy_primitive_batchers[primitive] = batch


compat.batching.fancy_primitive_batchers[barrier_p] = _barrier
_register(p.notify_p, _notify)
_register(p.dispatch_p, _dispatch)
_register(p.dispatch_cached_p, functools.partial(_moving, p.dispatch_cached_p))
_register(p.dispatch_start_p, functools.partial(_moving, p.dispatch_start_p))
_register(p.dispatch_done_p, functools.partial(_moving, p.dispatch_done_p))
_register(p.combine_p, functools.partial(_moving, p.combine_p))
_register(p.combine_start_p, functools.partial(_moving, p.combine_start_p))
_register(p.combine_done_p, functools.partial(_moving, p.combine_done_p))
_register(p.combine_grad_p, _grad)
for _combine in (p.combine_weighted_p, p.combine_weighted_start_p):
    _register(_combine, functools.partial(_weighted, _combine, 1))
for _tangent in autodiff.WEIGHTED_TANGENTS.values():
    _register(_tangent, functools.partial(_weighted, _tangent, 2))
