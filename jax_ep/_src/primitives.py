"""The primitives: what they take and return, their types, and the reference as their lowering on every platform.

`payload` means one or more arrays of rows, then the gates if they ride along; `handle` means slot, recv_slot, counts.

  notify                  topk_idx                       -> slot, recv_slot, counts, ("rank") recv_topk_idx
  dispatch                payload [T, ...], topk_idx     -> payload [C, ...], and what notify returns
  dispatch_cached         payload [T, ...], handle       -> payload [C, ...]
  dispatch_start          payload [T, ...], handle       -> payload [T, ...]
  dispatch_done           payload [T, ...], handle       -> payload [C, ...]
  combine                 payload [C, ...], handle       -> payload [T, ...]
  combine_start           payload [C, ...], handle       -> payload [T, ...]
  combine_done            payload [T, ...], handle       -> payload [T, ...]
  combine_weighted        y [C, H], weights [C], handle  -> [T, H]
  combine_weighted_start  y [C, H], weights [C], handle  -> [T, H]
  combine_grad            out_bar [T, H], y [C, H], weights [C], handle -> y_bar [C, H], weights_bar [C]

Gates are f32[T, K] at their tokens and between two halves, [C] at their rows ([C, K] for "rank"). On the way back each
gate returns to its choice, unsummed. What is between two halves is opaque: the reference's are rows, in a kernel's stands
which call it is. dispatch.py and combine.py hold the public functions, autodiff.py and batching.py the transformations,
reference.py the meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._src import compat, membership, quantized, reference
from jax_ep._src.handle import Routing

notify_p = compat.effectful_primitive("jax_ep_notify")
dispatch_p = compat.effectful_primitive("jax_ep_dispatch")
dispatch_cached_p = compat.effectful_primitive("jax_ep_dispatch_cached")
dispatch_start_p = compat.effectful_primitive("jax_ep_dispatch_start")
dispatch_done_p = compat.effectful_primitive("jax_ep_dispatch_done")
combine_p = compat.effectful_primitive("jax_ep_combine")
combine_start_p = compat.effectful_primitive("jax_ep_combine_start")
combine_done_p = compat.effectful_primitive("jax_ep_combine_done")
combine_weighted_p = compat.effectful_primitive("jax_ep_combine_weighted")
combine_weighted_start_p = compat.effectful_primitive("jax_ep_combine_weighted_start")
combine_grad_p = compat.effectful_primitive("jax_ep_combine_grad")


# ---- binding ---------------------------------------------------------------------------------------------------------


def align(routing: Routing, *operands: Any) -> list[Any]:
    """The operands (pytrees), all varying over the ranks' axes and over whatever axis any of them varies over."""
    leaves = jax.tree.leaves(operands)
    axes = frozenset(routing.axis_name).union(*(compat.varying_axes(leaf) for leaf in leaves))
    return list(jax.tree.map(lambda leaf: compat.as_varying(leaf, axes), operands))


def move(
    primitive: compat.Primitive,
    rows: Sequence[jax.Array],
    weights: jax.Array | None,
    handle: Sequence[jax.Array],
    routing: Routing,
    **params: Any,
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Binds one of the primitives that move a payload; returns the moved rows, and the gates if they ride along."""
    payload = tuple(rows) if weights is None else (*rows, weights)
    if not payload:
        return (), None
    has_weights = weights is not None
    moved = primitive.bind(*payload, *handle, routing=routing, num_rows=len(rows), has_weights=has_weights, **params)
    return (tuple(moved[:-1]), moved[-1]) if has_weights else (tuple(moved), None)


def notify_and_move(
    rows: Sequence[jax.Array],
    weights: jax.Array | None,
    topk_idx: jax.Array,
    routing: Routing,
    wire: str | None,
) -> tuple[tuple[jax.Array, ...], jax.Array | None, tuple[jax.Array, ...]]:
    """Binds dispatch_p; returns the moved rows, the gates if they ride along, and what notify returns."""
    payload = tuple(rows) if weights is None else (*rows, weights)
    has_weights = weights is not None
    results = dispatch_p.bind(
        *payload, topk_idx, routing=routing, num_rows=len(rows), has_weights=has_weights, wire=wire
    )
    first_routed = -num_routed(routing)
    moved, routed = tuple(results[:first_routed]), tuple(results[first_routed:])
    return (moved[:-1], moved[-1], routed) if has_weights else (moved, None, routed)


def num_routed(routing: Routing) -> int:
    """How many arrays notify returns: slot, recv_slot, counts, and for "rank" recv_topk_idx."""
    return 4 if routing.layout == "rank" else 3


# ---- types -----------------------------------------------------------------------------------------------------------

Shape = Callable[[Routing], tuple[int, ...]]


def _received(routing: Routing) -> tuple[int, ...]:
    return (routing.max_recv_tokens,)


def _tokens(routing: Routing) -> tuple[int, ...]:
    return (routing.num_tokens,)


def _all_tokens(routing: Routing) -> tuple[int, ...]:
    return (routing.num_ranks, routing.num_tokens)


def _received_gates(routing: Routing) -> tuple[int, ...]:
    return routing.recv_weights_shape


def _choices(lead: Shape) -> Shape:
    return lambda routing: (*lead(routing), routing.num_topk)


def _common_axes(routing: Routing, operands: Sequence[Any]) -> frozenset[str]:
    """The axes over which results vary; operands must already agree on them (see `align`)."""
    axes = frozenset(routing.axis_name).union(*(compat.varying_axes(operand) for operand in operands))
    if compat.check_vma_enabled() and any(compat.varying_axes(operand) != axes for operand in operands):
        raise TypeError(f"jax_ep: operands of a primitive must all vary over {sorted(axes)}")
    return axes


def _routed_avals(topk_idx: Any, routing: Routing, axes: frozenset[str]) -> list[Any]:
    shapes: list[tuple[int, ...]] = [
        _choices(_tokens)(routing),
        _choices(_all_tokens)(routing),
        (routing.num_local_experts + 1,),
    ]
    if routing.layout == "rank":
        shapes.append(_choices(_received)(routing))
    return [compat.result_aval(topk_idx, shape, jnp.int32, axes) for shape in shapes]


def _notify_abstract_eval(topk_idx: Any, *, routing: Routing) -> Any:
    axes = _common_axes(routing, [topk_idx])
    return _routed_avals(topk_idx, routing, axes), compat.named_axis_effects(routing.axis_name)


def _dispatch_abstract_eval(
    *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None
) -> Any:
    axes = _common_axes(routing, operands)
    rows, topk_idx = operands[:num_rows], operands[-1]
    row_types = [(row.shape[1:], row.dtype) for row in rows]
    if wire is not None:
        wire_format, hidden = quantized.FORMATS[wire], rows[0].shape[1]
        groups = quantized.num_groups(hidden, wire)
        row_types = [((hidden,), wire_format.values), ((groups,), wire_format.scales)]
    results = [compat.result_aval(topk_idx, (*_received(routing), *shape), dtype, axes) for shape, dtype in row_types]
    if has_weights:
        results.append(compat.result_aval(topk_idx, _received_gates(routing), jnp.float32, axes))
    return [*results, *_routed_avals(topk_idx, routing, axes)], compat.named_axis_effects(routing.axis_name)


def _moving_abstract_eval(lead: Shape, gates: Shape) -> Callable[..., Any]:
    """Abstract evaluation of a primitive that moves a payload: the leading axis becomes `lead`."""

    def rule(*operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None = None) -> Any:
        del wire
        axes = _common_axes(routing, operands)
        results = [
            compat.result_aval(rows, (*lead(routing), *rows.shape[1:]), rows.dtype, axes)
            for rows in operands[:num_rows]
        ]
        if has_weights:
            weights = operands[num_rows]
            results.append(compat.result_aval(weights, gates(routing), weights.dtype, axes))
        return results, compat.named_axis_effects(routing.axis_name)

    return rule


def _weighted_abstract_eval(lead: Shape) -> Callable[..., Any]:
    def rule(y: Any, *operands: Any, routing: Routing, wire: str | None) -> Any:
        del wire
        axes = _common_axes(routing, [y, *operands])
        aval = compat.result_aval(y, (*lead(routing), *y.shape[1:]), y.dtype, axes)
        return [aval], compat.named_axis_effects(routing.axis_name)

    return rule


def _grad_abstract_eval(out_bar: Any, y: Any, weights: Any, *handle: Any, routing: Routing) -> Any:
    axes = _common_axes(routing, [out_bar, y, weights, *handle])
    avals = [compat.result_aval(like, like.shape, like.dtype, axes) for like in (y, weights)]
    return avals, compat.named_axis_effects(routing.axis_name)


notify_p.def_effectful_abstract_eval(_notify_abstract_eval)
dispatch_p.def_effectful_abstract_eval(_dispatch_abstract_eval)
dispatch_cached_p.def_effectful_abstract_eval(_moving_abstract_eval(_received, _received_gates))
dispatch_start_p.def_effectful_abstract_eval(_moving_abstract_eval(_tokens, _choices(_tokens)))
dispatch_done_p.def_effectful_abstract_eval(_moving_abstract_eval(_received, _received_gates))
combine_p.def_effectful_abstract_eval(_moving_abstract_eval(_tokens, _choices(_tokens)))
combine_start_p.def_effectful_abstract_eval(_moving_abstract_eval(_tokens, _choices(_tokens)))
combine_done_p.def_effectful_abstract_eval(_moving_abstract_eval(_tokens, _choices(_tokens)))
combine_weighted_p.def_effectful_abstract_eval(_weighted_abstract_eval(_tokens))
combine_weighted_start_p.def_effectful_abstract_eval(_weighted_abstract_eval(_tokens))
combine_grad_p.def_effectful_abstract_eval(_grad_abstract_eval)


# ---- lowering: the reference on every platform -----------------------------------------------------------------------

for _primitive, _meaning in (
    (notify_p, reference.notify),
    (dispatch_p, reference.dispatch),
    (dispatch_cached_p, reference.dispatch_cached),
    (dispatch_start_p, reference.dispatch_start),
    (dispatch_done_p, reference.dispatch_done),
    (combine_p, reference.combine),
    (combine_start_p, reference.combine_start),
    (combine_done_p, reference.combine_done),
    (combine_weighted_p, reference.combine_weighted),
    (combine_weighted_start_p, reference.combine_weighted_start),
    (combine_grad_p, reference.combine_grad),
):
    compat.mlir.register_lowering(_primitive, membership.lowering(_meaning))
