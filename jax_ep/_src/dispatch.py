"""dispatch: every token goes to the ranks that own its experts. The public functions.

Neighbours: combine.py is the way back, primitives.py what lies below, reference.py the meaning, autodiff.py and
batching.py the transformations, check.py every error that shapes and dtypes can tell.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import zero_from_primal

from jax_ep._src import check, compat, quantized, reference
from jax_ep._src.handle import Dispatched, DispatchInFlight, Handle, Routing
from jax_ep._src.primitives import (
    align,
    dispatch_cached_p,
    dispatch_done_p,
    dispatch_start_p,
    move,
    notify_and_move,
    notify_p,
)
from jax_ep._src.quantized import Quantized

# ---- public functions ------------------------------------------------------------------------------------------------


@compat.on_the_callers_stream
def dispatch(
    x: jax.Array | Quantized,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    num_experts: int,
    layout: str = "expert",
    max_recv_tokens: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    wire: str | None = None,
    mode: str = "auto",
    num_sms: int | None = None,
) -> tuple[Dispatched, Handle]:
    """Sends each token to the ranks that own its top-k experts; call it inside `jax.shard_map` over `axis_name`.

    Expert e lives on rank e // (num_experts / R). Shapes are per rank: T tokens, K choices, H columns, R ranks, C rows.

    Args:
      x: bf16, f16 or f32[T, H], or `Quantized` rows of any format, which travel as they are. A row must be a multiple
        of 16 bytes.
      topk_idx: s32[T, K] (s64 under x64), the expert of each choice, -1 for no choice. Other ids are treated as -1 and
        counted in `num_invalid`. An expert may be named twice by one token. x, topk_idx and topk_weights may share
        further leading axes (x[B, S, H]), which count as T in row-major order.
      topk_weights: f32[T, K] gates that ride along and come out as `Dispatched.weights`; f16 and bf16 are cast to f32.
      axis_name: the mesh axis of the ranks, or a tuple of them, slowest first.
      num_experts: E, a multiple of R.
      layout: order of the received rows. "expert": grouped by local expert, within a group by (source rank, token,
        choice), each group starting at the running sum of the aligned sizes. "rank": each token once a rank, by
        (source rank, token). "batched": [E / R, expert_capacity, H], each expert's rows by (source rank, token, choice).
      max_recv_tokens: C, static rows of "expert" and "rank". Rows beyond it are dropped in row order and counted.
        The default holds the worst case, R*T*K rows ("rank": R*T), and the experts run over all of them: pass what the
        routing needs, say 1.25 times T*K.
      expert_alignment: group sizes of "expert" are rounded up to multiples of it (for grouped matrix products).
      expert_capacity: rows an expert of "batched"; default R*T, which holds every token that names its experts once.
      wire: what travels: None (x's dtype), "fp8" (e4m3, an f32 scale per 128 columns), "fp8_ue8m0" (power-of-two scales)
        or "mxfp8" (a power-of-two scale per 32). `Dispatched.x` is then `Quantized`; derivatives are straight-through,
        in x's dtype.
      mode: "auto", "high_throughput" or "low_latency": a choice of kernel, never of meaning.
      num_sms: upper bound for the streaming multiprocessors that a kernel may occupy.

    Returns:
      (Dispatched, Handle). Rows that hold no token are exactly zero. Pass the handle to `combine` and `dispatch_cached`.

    Raises:
      ValueError, TypeError: an argument breaks a rule above; the message names argument, rule, value and next step.
      NameError: axis_name is not bound, that is, the call is outside shard_map.

    Derivatives: linear in x and topk_weights; the transpose is `combine`. Results carry the checkpoint names
    "jax_ep_dispatch" (rows and weights) and "jax_ep_handle" (the handle).

    Example, inside shard_map over a mesh axis "expert":
      >>> recv, handle = jax_ep.dispatch(x, topk_idx, weights, axis_name="expert", num_experts=256)
      >>> y = jax.lax.ragged_dot(recv.x, w, recv.group_sizes)
      >>> out = jax_ep.combine(y, handle, recv.weights)
    """
    call = _prepare(
        "dispatch", x, topk_idx, topk_weights, axis_name, num_experts, layout, max_recv_tokens, expert_alignment,
        expert_capacity, wire, mode, num_sms,
    )  # fmt: skip
    rows: jax.Array | Quantized
    if wire is None and not isinstance(x, Quantized):
        (rows,), weights, routed = notify_and_move((call.x,), call.weights, call.topk_idx, call.routing, None)
    else:
        moved, carrier, weights, routed = _dispatch_quantized(
            (call.routing, wire), call.x, call.carrier, call.weights, call.topk_idx
        )
        rows = _quantized_rows(moved, carrier, wire or call.format)
    rows, weights = _name((rows, weights), "jax_ep_dispatch")
    handle, recv_topk_idx = _handle(routed, call)
    return _dispatched(rows, weights, recv_topk_idx, call.num_invalid, handle), handle


@compat.on_the_callers_stream
def dispatch_cached(x: jax.Array | Quantized, handle: Handle) -> jax.Array | Quantized:
    """Sends rows along the routing of an earlier dispatch: no counts are exchanged, nothing is computed anew.

    Args:
      x: bf16, f16 or f32[T, H] (H and dtype may differ from those of the first dispatch), or `Quantized`, with the
        handle's leading axes.
      handle: from `dispatch`, over the same mesh axes.

    Returns:
      rows[C, H] ([E / R, expert_capacity, H] for "batched") in the handle's layout, zero where no token is.

    Raises:
      ValueError, TypeError: x does not fit the handle.

    Linear in x; the transpose is `combine` without weights.

    Example:
      >>> recv, handle = jax_ep.dispatch(x, topk_idx, axis_name="expert", num_experts=8)
      >>> rows_of_positions = jax_ep.dispatch_cached(position_embedding, handle)
    """
    parts = check.rows("dispatch_cached", "x", x, handle)
    routing = handle.routing
    payload, carrier, *arrays = align(routing, parts.payload, parts.carrier, *handle.arrays)
    if not isinstance(x, Quantized):
        (moved,), _ = move(dispatch_cached_p, payload, None, arrays, routing)
        return _shape_rows(moved, routing)
    moved_rows, carrier, _ = _move_quantized((dispatch_cached_p, routing), payload, carrier, None, tuple(arrays))
    return _shape_rows(_quantized_rows(moved_rows, carrier, x.format), routing)


@compat.on_the_callers_stream
def dispatch_start(
    x: jax.Array | Quantized,
    topk_idx: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    num_experts: int,
    layout: str = "expert",
    max_recv_tokens: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    wire: str | None = None,
    mode: str = "auto",
    num_sms: int | None = None,
) -> DispatchInFlight:
    """First half of `dispatch`: the rows leave. What stands between it and `dispatch_done` may run meanwhile.

    Arguments and errors are those of `dispatch`. The result is opaque: pass it to `dispatch_done`, once. On GPUs the rows
    in flight lie in memory of the group, made when the program is lowered: of calls of one size four may be in flight, with
    mode "high_throughput" two where R * T rows take more than 64 MB; its memory is so many times R * T rows (docs/overlap.md).

    Example:
      >>> pending = jax_ep.dispatch_start(x, topk_idx, axis_name="expert", num_experts=8)
      >>> shared = shared_expert(x)                      # overlaps with the exchange
      >>> recv, handle = jax_ep.dispatch_done(pending)
    """
    call = _prepare(
        "dispatch_start", x, topk_idx, topk_weights, axis_name, num_experts, layout, max_recv_tokens, expert_alignment,
        expert_capacity, wire, mode, num_sms,
    )  # fmt: skip
    handle, recv_topk_idx = _handle(notify_p.bind(call.topk_idx, routing=call.routing), call)
    payload, carrier, out_format = call.x, call.carrier, wire or call.format
    if wire is not None:
        payload, carrier = quantized.encode(lax.stop_gradient(call.x), wire), call.x
    if out_format is None:
        moved, weights = move(dispatch_start_p, (payload,), call.weights, handle.arrays, call.routing)
    else:
        static = (dispatch_start_p, call.routing)
        moved, carrier, weights = _move_quantized(static, payload, carrier, call.weights, handle.arrays)
    return DispatchInFlight(moved, carrier, weights, recv_topk_idx, call.num_invalid, handle, out_format)


@compat.on_the_callers_stream
def dispatch_done(pending: DispatchInFlight) -> tuple[Dispatched, Handle]:
    """Second half of `dispatch`: waits for the rows and hands them out.

    Args:
      pending: from `dispatch_start`.

    Returns:
      What `dispatch` returns for the same arguments, to the bit.

    Example: see `dispatch_start`.
    """
    check.instance("dispatch_done", "pending", pending, DispatchInFlight, "dispatch_start")
    handle = pending.handle
    routing = handle.routing
    check.bound_as_before("dispatch_done", handle)
    rows: jax.Array | Quantized
    if pending.format is None:
        (rows,), weights = move(dispatch_done_p, pending.rows, pending.weights, handle.arrays, routing)
    else:
        moved, carrier, weights = _move_quantized(
            (dispatch_done_p, routing), pending.rows, pending.carrier, pending.weights, handle.arrays
        )
        rows = _quantized_rows(moved, carrier, pending.format)
    rows, weights = _name((rows, weights), "jax_ep_dispatch")
    return _dispatched(rows, weights, pending.recv_topk_idx, pending.num_invalid, handle), handle


# ---- from arguments to primitives ------------------------------------------------------------------------------------


class _Call:
    """Operands of one dispatch, checked, folded to [T, ...] and typed as varying over the same axes."""

    def __init__(self, operation: str, x: Any, topk_idx: Any, topk_weights: Any, static: tuple[Any, ...]):
        wire = static[6]
        rows = check.rows(operation, "x", x, wire=wire)
        self.routing = check.routing(operation, rows.lead_shape, topk_idx, topk_weights, *static)
        self.lead_shape, self.format = rows.lead_shape, rows.format
        tokens = (self.routing.num_tokens, self.routing.num_topk)
        topk_idx = jnp.asarray(topk_idx).reshape(tokens)
        valid = (topk_idx >= 0) & (topk_idx < self.routing.num_experts)
        num_invalid = jnp.sum(~valid & (topk_idx != -1), dtype=jnp.int32).reshape(1)
        topk_idx = jnp.where(valid, topk_idx, -1).astype(jnp.int32)
        weights = None if topk_weights is None else jnp.asarray(topk_weights).astype(jnp.float32).reshape(tokens)
        payload: Any = rows.payload if isinstance(x, Quantized) else rows.payload[0]
        self.x, self.carrier, self.weights, self.topk_idx, self.num_invalid = align(
            self.routing, payload, rows.carrier, weights, topk_idx, num_invalid
        )


def _prepare(operation: str, x: Any, topk_idx: Any, topk_weights: Any, *static: Any) -> _Call:
    return _Call(operation, x, topk_idx, topk_weights, static)


def _handle(routed: Sequence[jax.Array], call: _Call) -> tuple[Handle, jax.Array | None]:
    """The handle, and for "rank" the local experts of the rows, under the name by which a remat policy can save them."""
    slot, recv_slot, counts, *recv_topk_idx = _name(tuple(routed), "jax_ep_handle")
    handle = Handle(slot, recv_slot, counts, routing=call.routing, lead_shape=call.lead_shape)
    return handle, recv_topk_idx[0] if recv_topk_idx else None


def _quantized_rows(moved: Sequence[jax.Array], carrier: jax.Array | None, out_format: str | None) -> Quantized:
    values, scales = moved
    assert out_format is not None
    return Quantized(values, scales, carrier=carrier, format=out_format)


def _dispatched(
    rows: jax.Array | Quantized,
    weights: jax.Array | None,
    recv_topk_idx: jax.Array | None,
    num_invalid: jax.Array,
    handle: Handle,
) -> Dispatched:
    """The result as the user sees it: what follows from the counts, and the layout's shape."""
    routing = handle.routing
    counts, wanted, capacity = handle.counts[:-1], handle.counts[-1], routing.max_recv_tokens
    group_sizes = None
    if routing.layout == "expert":
        sizes = reference.aligned_sizes(counts, routing.expert_alignment)
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        starts = ends - sizes
        group_sizes = jnp.minimum(ends, capacity) - jnp.minimum(starts, capacity)
        num_dropped = jnp.sum(counts - jnp.clip(capacity - starts, 0, counts))
    elif routing.layout == "rank":
        num_dropped = jnp.maximum(wanted - capacity, 0)
    else:
        num_dropped = jnp.sum(jnp.maximum(counts - routing.expert_capacity, 0))
    num_dropped += _num_lost(handle.slot, routing)
    return Dispatched(
        x=_shape_rows(rows, routing),
        weights=_shape_rows(weights, routing),
        num_tokens_per_expert=counts,
        num_dropped=num_dropped.astype(jnp.int32).reshape(1),
        num_invalid=num_invalid,
        group_sizes=group_sizes,
        topk_idx=recv_topk_idx,
    )


def _num_lost(slot: jax.Array, routing: Routing) -> jax.Array:
    """Rows of this rank's tokens that nobody holds because their rank is masked."""
    rank = reference.LOST - slot
    if routing.layout != "rank":
        return jnp.sum(rank >= 0, dtype=jnp.int32)
    is_lost_to = (rank[..., None] == jnp.arange(routing.num_ranks)).any(axis=1)  # a row a (token, rank)
    return jnp.sum(is_lost_to, dtype=jnp.int32)


def _shape_rows(received: Any, routing: Routing) -> Any:
    """[C, ...] as the layout shows it."""
    return jax.tree.map(lambda leaf: leaf.reshape(*routing.rows_shape, *leaf.shape[1:]), received)


def _name(results: Any, name: str) -> Any:
    """Gives results the name by which a remat policy can save them."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), results)


# ---- wire formats: values and scales travel, derivatives pass straight through ---------------------------------------
#
# fp8 has no useful tangents, so Quantized rows have a carrier: zeros in the source's dtype, whose tangent is the
# source's tangent. It is never sent; its tangent is, by the same primitive in the source's dtype.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dispatch_quantized(
    static: tuple[Routing, str | None], x: Any, carrier: Any, weights: Any, topk_idx: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array | None, jax.Array | None, tuple[jax.Array, ...]]:
    """dispatch of x in a wire format, or of Quantized rows x = (values, scales): rows, carrier, weights, routing arrays."""
    routing, wire = static
    rows, source = (x, carrier) if wire is None else ((x,), x)
    moved, weights, routed = notify_and_move(rows, weights, topk_idx, routing, wire)
    return moved, _carrier_like(source, moved[0]), weights, routed


@_dispatch_quantized.defjvp
def _(static: tuple[Routing, str | None], primals: Any, tangents: Any) -> Any:
    routing, wire = static
    x_dot, carrier_dot, weights_dot, _ = tangents
    out = _dispatch_quantized(static, *primals)
    source_dot = carrier_dot if wire is None else x_dot
    return out, _straight_through(dispatch_cached_p, routing, out, source_dot, weights_dot, out[3][:3])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _move_quantized(
    static: tuple[compat.Primitive, Routing], rows: Any, carrier: Any, weights: Any, arrays: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], jax.Array | None, jax.Array | None]:
    """Moves Quantized rows (values, scales) by one of the row-moving primitives: rows, carrier, weights."""
    primitive, routing = static
    moved, weights = move(primitive, rows, weights, arrays, routing)
    return moved, _carrier_like(carrier, moved[0]), weights


@_move_quantized.defjvp
def _(static: tuple[compat.Primitive, Routing], primals: Any, tangents: Any) -> Any:
    primitive, routing = static
    _, carrier_dot, weights_dot, _ = tangents
    out = _move_quantized(static, *primals)
    return out, _straight_through(primitive, routing, out, carrier_dot, weights_dot, primals[3])


def _carrier_like(source: jax.Array | None, moved: jax.Array) -> jax.Array | None:
    """Zeros for the moved rows, in the dtype that was quantized, varying as `moved`."""
    if source is None:
        return None
    return compat.as_varying(jnp.zeros((*moved.shape[:-1], source.shape[-1]), source.dtype), compat.varying_axes(moved))


def _straight_through(
    primitive: compat.Primitive, routing: Routing, out: Any, source_dot: Any, weights_dot: Any, arrays: Any
) -> Any:
    """Tangents of (rows, carrier, weights, ...): those of carrier and weights move as rows do, the others are zero."""
    rows = () if source_dot is None else (source_dot,)
    moved, weights_dot = move(primitive, rows, weights_dot, arrays, routing)
    rest = jax.tree.map(functools.partial(zero_from_primal, symbolic_zeros=False), (out[0], *out[3:]))
    return (rest[0], moved[0] if rows else None, weights_dot, *rest[1:])
