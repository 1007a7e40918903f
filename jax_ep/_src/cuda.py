"""The primitives on CUDA: which kernel serves a call, and what it is told. The table at the end says which primitives have one.

Whatever a kernel does not take falls back, with the same meaning: from low latency to high throughput (too little memory
is shared between processes), from there to the reference: no peer access, empty arrays, shapes beyond the kernel's limits.
Where no kernel serves a half, one half does nothing and the other is the whole call. Groups over several nodes have kernels of
their own, which take what the others take but halves; there low latency is one hop instead of two. Neighbours: group.py finds the
devices, ffi/*/*_ffi.cc are the other side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir.dialects import stablehlo

from jax_ep._src import compat, group, logfmt, membership, primitives, quantized, reference, targets, tuning
from jax_ep._src.handle import LAYOUTS, Routing

Rule = Callable[..., Any]

MAX_TOPK = 32  # one lane of a warp a choice
MAX_BINS = 2080  # counts that a block publishes: kMaxBins in ffi/group/window.h
MAX_RANKS = 32
MIN_PIECE = 28672  # bytes of a row that cross nodes in one message, at least
MAX_STEPS = 2**19 - 1  # tokens a rank, messages of a call between two: kMaxSteps in ffi/group/window.h
MAX_ENCODED_HIDDEN = (
    16384  # columns of rows that the high-throughput kernel encodes: kMaxEncodedHidden in ffi/dispatch/dispatch.h
)
INT_MAX = 2**31 - 1
IN_FLIGHT_BYTES = 16  # that a start leaves at the head of its first result, for its done


# ---- what the kernels take -------------------------------------------------------------------------------------------


def _row_bytes(aval: Any) -> int:
    return math.prod(aval.shape[1:]) * aval.dtype.itemsize


def _routing_fits(routing: Routing) -> bool:
    return (
        0 < routing.num_tokens < MAX_STEPS
        and routing.max_recv_tokens > 0
        and 0 < routing.num_topk <= MAX_TOPK
        and routing.num_ranks <= MAX_RANKS
        and routing.num_experts + routing.num_ranks <= MAX_BINS
        and routing.num_ranks * routing.num_tokens * routing.num_topk <= INT_MAX
        and routing.num_ranks * routing.max_recv_tokens <= INT_MAX
    )


def _dispatch_fits(rows: Any, routing: Routing) -> bool:
    sizes = [_row_bytes(row) for row in rows]
    return _routing_fits(routing) and len(sizes) <= 2 and all(sizes) and (not sizes or sizes[0] % 16 == 0)


def _combine_fits(rows: Any, routing: Routing) -> bool:
    sizes = [_row_bytes(row) for row in rows]
    return (
        _routing_fits(routing)
        and len(sizes) <= 1
        and all(sizes)
        and all(size % 16 == 0 and size < 2**30 for size in sizes)
        and all(row.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) for row in rows)
        and all((routing.num_tokens + 34) * (routing.num_ranks + 1) * (size // 2048 + 1) <= INT_MAX for size in sizes)
    )


def _wants_low_latency(routing: Routing, row_bytes: int) -> bool:
    mode = routing.mode
    if mode == "auto":
        mode = tuning.choose_mode(
            num_tokens=routing.num_tokens,
            num_ranks=routing.num_ranks,
            row_bytes=max(row_bytes, 1),
            layout=routing.layout,
            device_kind=group.device_kind(),
        )
    return mode == "low_latency"


# Each of these two says for shapes that fit how many bytes of a low-latency window a call needs, 0 if it is none. Both
# halves of a call must be told the same.


def _dispatch_window(
    row_bytes: list[int], routing: Routing, has_weights: bool, is_routed: bool, encodes: bool = False
) -> int:
    if not _wants_low_latency(routing, sum(row_bytes)):
        return 0
    return targets.low_latency_dispatch_bytes(
        num_ranks=routing.num_ranks,
        num_experts=routing.num_experts,
        layout=LAYOUTS.index(routing.layout),
        num_tokens=routing.num_tokens,
        num_topk=routing.num_topk,
        max_recv_tokens=routing.max_recv_tokens,
        row_bytes=row_bytes,
        has_weights=has_weights,
        is_routed=is_routed,
        encodes=encodes,
    )


def _combine_window(rows: Any, routing: Routing, has_carried: bool, wire: str | None = None) -> int:
    row_bytes = sum(_row_bytes(row) for row in rows)
    if not _wants_low_latency(routing, row_bytes):
        return 0
    return targets.low_latency_combine_bytes(
        num_ranks=routing.num_ranks,
        num_tokens=routing.num_tokens,
        num_topk=routing.num_topk,
        max_recv_tokens=routing.max_recv_tokens,
        row_bytes=row_bytes,
        has_carried=has_carried,
        logfmt_item_bytes=0 if wire is None else rows[0].dtype.itemsize,
    )


# ---- calling them ----------------------------------------------------------------------------------------------------


def _int64(**attributes: int) -> dict[str, Any]:
    return {name: np.int64(value) for name, value in attributes.items()}


_reference = membership.lowering


def _composed(of_primitives: Rule) -> Rule:
    return compat.mlir.lower_fun(of_primitives, multiple_results=True)


def _groups(ctx: Any, routing: Routing, rows: Any = ()) -> group.Groups | None:
    """The groups that kernels serve; over nodes not if `rows` are too many messages."""
    groups = group.along(ctx.module_context.axis_context, routing.axis_name)
    messages = routing.num_tokens * (sum(map(_row_bytes, rows)) // MIN_PIECE + 2)
    return None if groups is not None and messages >= MAX_STEPS and group.spans_nodes(groups) else groups


def _call_dispatch(
    target: str,
    ctx: Any,
    operands: Any,
    routing: Routing,
    devices: Any,
    num_rows: int,
    has_weights: bool,
    wire: str | None = None,
) -> Any:
    attributes = _int64(
        num_ranks=routing.num_ranks,
        num_experts=routing.num_experts,
        layout=LAYOUTS.index(routing.layout),
        expert_alignment=routing.expert_alignment,
        expert_capacity=routing.expert_capacity,
        max_recv_tokens=routing.max_recv_tokens,
        num_rows=num_rows,
        has_weights=has_weights,
        num_sms=routing.num_sms or 0,
    )
    if group.spans_nodes(devices):
        target = targets.INTERNODE_DISPATCHES[target]
        row_bytes = sum(_row_bytes(row) for row in ctx.avals_in[:num_rows])
        attributes |= _int64(direct=_wants_low_latency(routing, row_bytes))
    elif target not in (targets.DISPATCH_START, targets.DISPATCH_DONE):  # which know no format
        attributes |= _int64(wire=0 if wire is None else 1 + list(quantized.FORMATS).index(wire))
    rule = jax.ffi.ffi_lowering(target)
    return _launched_once(rule(ctx, *operands, devices=np.array(devices, np.int64).reshape(-1), **attributes))


def _launched_once(results: Any) -> Any:
    """The results behind an optimization barrier.

    XLA:GPU 0.11.2 fuses a call with the dynamic-update-slice that stores its result as a residual of scan, and launches
    the call a second time for its other results; it does not look through a barrier.
    """
    return stablehlo.OptimizationBarrierOp(results).results


def _notify(ctx: Any, topk_idx: Any, *, routing: Routing) -> Any:
    devices = _groups(ctx, routing) if _routing_fits(routing) else None
    if devices is None:
        return _reference(reference.notify)(ctx, topk_idx, routing=routing)
    window = _dispatch_window([], routing, False, False)
    target = _with_arenas(devices, window, targets.LOW_LATENCY_NOTIFY, targets.NOTIFY)
    return _call_dispatch(target, ctx, [topk_idx], routing, devices, 0, False)


def _with_arenas(devices: group.Groups, window_bytes: int, low_latency: str, other: str) -> str:
    """Which of two targets to call; the memory of the first is there then."""
    return low_latency if window_bytes > 0 and group.make_arenas(devices, window_bytes) else other


def _dispatch(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None) -> Any:
    if wire is not None:
        encoded = _dispatch_encoded(ctx, operands, routing, num_rows, has_weights, wire)
        if encoded is not None:
            return encoded
        # encoded by XLA, then sent as values and scales
        return _composed(_encode_and_dispatch)(
            ctx, *operands, routing=routing, num_rows=num_rows, has_weights=has_weights, wire=wire
        )
    rows = ctx.avals_in[:num_rows]
    devices = _groups(ctx, routing, rows) if _dispatch_fits(rows, routing) else None
    if devices is None:
        static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
        return _reference(reference.dispatch)(ctx, *operands, **static)
    window = _dispatch_window([_row_bytes(row) for row in rows], routing, has_weights, False)
    target = _with_arenas(devices, window, targets.LOW_LATENCY_DISPATCH, targets.DISPATCH)
    return _call_dispatch(target, ctx, operands, routing, devices, num_rows, has_weights)


def _dispatch_encoded(
    ctx: Any, operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str
) -> Any | None:
    """A dispatch whose kernel encodes the rows, or None where none does."""
    fits = _dispatch_fits(ctx.avals_in[:num_rows], routing) and _dispatch_fits(ctx.avals_out[:2], routing)
    devices = _groups(ctx, routing) if fits else None
    if devices is None or group.spans_nodes(devices):
        return None
    values, scales = (_row_bytes(row) for row in ctx.avals_out[:2])
    window = _dispatch_window([values, scales], routing, has_weights, False, encodes=True)
    target = _with_arenas(devices, window, targets.LOW_LATENCY_DISPATCH, targets.DISPATCH)
    if target == targets.DISPATCH and values > MAX_ENCODED_HIDDEN:
        return None
    return _call_dispatch(target, ctx, operands, routing, devices, num_rows, has_weights, wire=wire)


def _encode_and_dispatch(*operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str) -> Any:
    del num_rows
    values, scales = quantized.encode(operands[0], wire)
    return primitives.dispatch_p.bind(
        values, scales, *operands[1:], routing=routing, num_rows=2, has_weights=has_weights, wire=None
    )


def _dispatch_cached(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool) -> Any:
    rows = ctx.avals_in[:num_rows]
    devices = _groups(ctx, routing, rows) if _dispatch_fits(rows, routing) else None
    if devices is None:
        static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights}
        return _reference(reference.dispatch_cached)(ctx, *operands, **static)
    window = _dispatch_window([_row_bytes(row) for row in rows], routing, has_weights, True)
    target = _with_arenas(devices, window, targets.LOW_LATENCY_DISPATCH_CACHED, targets.DISPATCH_CACHED)
    return _call_dispatch(target, ctx, operands, routing, devices, num_rows, has_weights)


# ---- halves ----------------------------------------------------------------------------------------------------------
#
# Both halves of a call ask the same questions of the same sizes, so they are served alike. Low latency first, then the
# kernels of ffi/halves/, then a whole call in the place of one of them.


def _with_room(
    devices: group.Groups, routing: Routing, window: int, landing: int, low_latency: str, other: str
) -> str | None:
    """Which of two targets to call for a half that needs so much of an arena; None where there is no memory.

    The halves of high throughput take memory as long as their rows, so they are asked for by name, never by "auto".
    """
    if window > 0 and group.make_arenas(devices, window):
        return low_latency
    asked = routing.mode == "high_throughput" and landing > 0
    return other if asked and group.make_landings(devices, landing) else None


def _holds_in_flight(routing: Routing, token_bytes: int) -> bool:
    """Whether the first array between the halves, [T, ...], is long enough for what a start leaves in it."""
    return routing.mode != "whole" and routing.num_tokens * token_bytes >= IN_FLIGHT_BYTES


def _dispatch_landing(row_bytes: list[int], routing: Routing, has_weights: bool) -> int:
    return targets.dispatch_landing_bytes(
        num_ranks=routing.num_ranks,
        num_experts=routing.num_experts,
        layout=LAYOUTS.index(routing.layout),
        num_tokens=routing.num_tokens,
        num_topk=routing.num_topk,
        max_recv_tokens=routing.max_recv_tokens,
        row_bytes=row_bytes,
        has_weights=has_weights,
    )


def _dispatch_half(otherwise: Rule, low_latency: str, other: str) -> Rule:
    """Lowering of dispatch_start or dispatch_done; `otherwise` lowers it where no kernel of halves serves."""

    def rule(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool) -> Any:
        payload, rows = ctx.avals_in[: num_rows + has_weights], ctx.avals_in[:num_rows]
        fits = _dispatch_fits(rows, routing) and _holds_in_flight(routing, _row_bytes(payload[0]))
        devices = _groups(ctx, routing) if fits else None
        target = None
        if devices is not None:
            sizes = [_row_bytes(row) for row in rows]
            window = _dispatch_window(sizes, routing, has_weights, True)
            target = _with_room(
                devices, routing, window, _dispatch_landing(sizes, routing, has_weights), low_latency, other
            )
        if target is None:
            return otherwise(ctx, *operands, routing=routing, num_rows=num_rows, has_weights=has_weights)
        return _call_dispatch(target, ctx, operands, routing, devices, num_rows, has_weights)

    return rule


def _combine_attributes(
    routing: Routing, has_rows: bool, has_weights: bool, has_carried: bool, devices: Any
) -> dict[str, Any]:
    attributes = _int64(
        num_ranks=routing.num_ranks,
        one_row_a_rank=routing.layout == "rank",
        max_recv_tokens=routing.max_recv_tokens,
        has_rows=has_rows,
        has_weights=has_weights,
        has_carried=has_carried,
        num_sms=routing.num_sms or 0,
    )
    return attributes | {"devices": np.array(devices, np.int64).reshape(-1)}


def _call_combine(
    ctx: Any,
    operands: Any,
    routing: Routing,
    devices: Any,
    has_rows: bool,
    has_weights: bool,
    has_carried: bool,
    wire: str | None,
) -> Any | None:
    """Calls the kernel that serves; None where none knows the wire format."""
    attributes = _combine_attributes(routing, has_rows, has_weights, has_carried, devices)
    over_nodes = group.spans_nodes(devices)
    window = _combine_window(ctx.avals_in[: int(has_rows)], routing, has_carried, wire=wire)
    if window > 0 and group.make_arenas(devices, window):
        attributes |= _int64(wire=wire is not None)
        return _launched_once(jax.ffi.ffi_lowering(targets.LOW_LATENCY_COMBINE)(ctx, *operands, **attributes))
    if wire is not None:
        return None
    avals_out = list(ctx.avals_out)
    *moved, slot, recv_slot, _ = operands
    num_scratch = 0 if routing.layout == "rank" else routing.num_ranks - 1
    if over_nodes:
        num_scratch = 0
        row_bytes = sum(_row_bytes(row) for row in ctx.avals_in[: int(has_rows)])
        attributes |= _int64(direct=_wants_low_latency(routing, row_bytes))
    if has_rows and num_scratch > 0:
        # Where the ranks' sums wait. A result like the others, so that XLA finds room for it call by call.
        out = avals_out[0]
        avals_out.append(jax.core.ShapedArray((num_scratch, *out.shape), out.dtype))
    ctx = ctx.replace(avals_in=[*ctx.avals_in[:-1]], avals_out=avals_out)
    target = targets.INTERNODE_COMBINE if over_nodes else targets.COMBINE
    results = jax.ffi.ffi_lowering(target)(ctx, *moved, slot, recv_slot, **attributes)
    return _launched_once(results)[: int(has_rows) + int(has_carried)]


def encode_and_combine(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str | None
) -> list[jax.Array]:
    """combine in a wire format that the kernel does not know: each rank's sums go through the format in XLA, then to the kernel.

    The kernel gets them as rows of layout "rank", row s * T + t the sum for token t of source s. They travel in y's dtype.
    `has_weights` is that of combine_weighted: y, weights?, slot, recv_slot, counts.
    """
    assert num_rows == 1 and wire is not None
    y, *weights, slot, recv_slot, counts = operands
    if routing.layout == "rank":
        rows = logfmt.logfmt10_roundtrip(y)  # its rows are sums
    else:
        sums = reference.partial_sums(y, weights[0] if has_weights else None, recv_slot, routing, wire)
        rows = sums.reshape(-1, y.shape[1])
        num_tokens, num_rows_a_rank = routing.num_tokens, rows.shape[0]
        token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
        source = jnp.arange(routing.num_ranks, dtype=jnp.int32)[:, None, None]
        owner = slot // routing.max_recv_tokens
        here = jax.lax.axis_index(routing.axis_name) * num_tokens + token
        slot = jnp.where(slot < 0, -1, owner * num_rows_a_rank + here)
        recv_slot = jnp.where(recv_slot < 0, -1, source * num_tokens + token)
        routing = _as_sums(routing)
    aligned = primitives.align(routing, rows, slot, recv_slot, counts)
    return primitives.combine_p.bind(*aligned, routing=routing, num_rows=1, has_weights=False, wire=None)


def _as_sums(routing: Routing) -> Routing:
    """The routing under which encode_and_combine hands its sums over."""
    return dataclasses.replace(
        routing,
        layout="rank",
        max_recv_tokens=routing.num_ranks * routing.num_tokens,
        expert_alignment=1,
        expert_capacity=0,
        mode="high_throughput",
    )


def _combine(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None) -> Any:
    rows = ctx.avals_in[:num_rows]
    devices = _groups(ctx, routing, rows) if _combine_fits(rows, routing) else None
    static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
    if devices is None or (wire is not None and (num_rows != 1 or has_weights)):
        return _reference(reference.combine)(ctx, *operands, **static)
    called = _call_combine(ctx, operands, routing, devices, num_rows == 1, False, has_weights, wire)
    return _composed(encode_and_combine)(ctx, *operands, **static) if called is None else called


def _combine_weighted(ctx: Any, *operands: Any, routing: Routing, wire: str | None) -> Any:
    rows = ctx.avals_in[:1]
    devices = _groups(ctx, routing, rows) if _combine_fits(rows, routing) else None
    if devices is None:
        return _reference(reference.combine_weighted)(ctx, *operands, routing=routing, wire=wire)
    called = _call_combine(ctx, operands, routing, devices, True, True, False, wire)
    static = {"routing": routing, "num_rows": 1, "has_weights": True, "wire": wire}
    return _composed(encode_and_combine)(ctx, *operands, **static) if called is None else called


COMBINE_STARTS = (targets.LOW_LATENCY_COMBINE_START, targets.COMBINE_START)
COMBINE_DONES = (targets.LOW_LATENCY_COMBINE_DONE, targets.COMBINE_DONE)


def _combine_landing(rows: Any, routing: Routing, has_carried: bool) -> int:
    return targets.combine_landing_bytes(
        num_ranks=routing.num_ranks,
        num_tokens=routing.num_tokens,
        num_topk=routing.num_topk,
        max_recv_tokens=routing.max_recv_tokens,
        row_bytes=sum(_row_bytes(row) for row in rows),
        has_carried=has_carried,
    )


def _combine_grad(ctx: Any, *operands: Any, routing: Routing) -> Any:
    rows = ctx.avals_in[:1]
    devices = _groups(ctx, routing, rows) if _combine_fits(rows, routing) else None
    if devices is None:
        return _reference(reference.combine_grad)(ctx, *operands, routing=routing)
    window = _dispatch_window([_row_bytes(rows[0])], routing, False, True)
    if group.spans_nodes(devices) or (window > 0 and group.make_arenas(devices, window)):
        return _composed(_dispatch_and_weigh)(ctx, *operands, routing=routing)
    out_bar, y, weights, _, recv_slot, counts = operands
    ctx = ctx.replace(avals_in=[*ctx.avals_in[:3], *ctx.avals_in[4:]])
    attributes = _int64(
        num_ranks=routing.num_ranks,
        expert_alignment=routing.expert_alignment if routing.layout == "expert" else 0,
        expert_capacity=routing.expert_capacity,
        num_sms=routing.num_sms or 0,
    )
    rule = jax.ffi.ffi_lowering(targets.COMBINE_GRAD)
    attributes["devices"] = np.array(devices, np.int64).reshape(-1)
    return _launched_once(rule(ctx, out_bar, y, weights, recv_slot, counts, **attributes))


def _dispatch_and_weigh(
    out_bar: jax.Array, y: jax.Array, weights: jax.Array, *handle: jax.Array, routing: Routing
) -> Any:
    """combine_grad where rows must come first: in low latency a pass more over few rows costs less than a meeting, and
    over nodes nobody reads another's rows.
    """
    (rows,), _ = primitives.move(primitives.dispatch_cached_p, [out_bar], None, handle, routing)
    return reference.weigh(rows, y, weights, handle[1])


def _call_combine_half(
    otherwise: Rule,
    halves: tuple[str, str],
    ctx: Any,
    operands: Any,
    routing: Routing,
    kinds: tuple[bool, bool, bool],
    **static: Any,
) -> Any:
    """Lowers a half of a combine with rows, weights and carried gates as `kinds` says; `otherwise` where no kernel of halves serves."""
    has_rows, has_weights, has_carried = kinds
    rows = ctx.avals_in[: int(has_rows)]
    wire = static.get("wire")
    token_bytes = _row_bytes(rows[0]) if has_rows else 4 * routing.num_topk
    fits = _combine_fits(rows, routing) and _holds_in_flight(routing, token_bytes) and (wire is None or has_rows)
    devices = _groups(ctx, routing) if fits else None
    target = None
    if devices is not None:
        window = _combine_window(rows, routing, has_carried, wire)
        landing = 0 if wire is not None else _combine_landing(rows, routing, has_carried)  # only low latency has one
        target = _with_room(devices, routing, window, landing, *halves)
    if target is None:
        return otherwise(ctx, *operands, routing=routing, **static)
    attributes = _combine_attributes(routing, has_rows, has_weights, has_carried, devices)
    if target == halves[0]:
        attributes |= _int64(wire=wire is not None)
    return _launched_once(jax.ffi.ffi_lowering(target)(ctx, *operands, **attributes))


def _combine_start(
    ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None
) -> Any:
    static: dict[str, Any] = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
    if num_rows > 1:
        return _combine(ctx, *operands, **static)
    kinds = (num_rows == 1, False, has_weights)
    return _call_combine_half(_combine, COMBINE_STARTS, ctx, operands, kinds=kinds, **static)


def _combine_weighted_start(ctx: Any, *operands: Any, routing: Routing, wire: str | None) -> Any:
    return _call_combine_half(_combine_weighted, COMBINE_STARTS, ctx, operands, routing, (True, True, False), wire=wire)


def _combine_done(
    ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None
) -> Any:
    static: dict[str, Any] = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
    nothing = _reference(reference.combine_done)
    if num_rows > 1:
        return nothing(ctx, *operands, **static)
    kinds = (num_rows == 1, False, has_weights)
    return _call_combine_half(nothing, COMBINE_DONES, ctx, operands, kinds=kinds, **static)


for _primitive, _rule in (
    (primitives.notify_p, _notify),
    (primitives.dispatch_p, _dispatch),
    (primitives.dispatch_cached_p, _dispatch_cached),
    (
        primitives.dispatch_start_p,
        _dispatch_half(
            _reference(reference.dispatch_start), targets.LOW_LATENCY_DISPATCH_START, targets.DISPATCH_START
        ),
    ),
    (
        primitives.dispatch_done_p,
        _dispatch_half(_dispatch_cached, targets.LOW_LATENCY_DISPATCH_DONE, targets.DISPATCH_DONE),
    ),
    (primitives.combine_p, _combine),
    (primitives.combine_start_p, _combine_start),
    (primitives.combine_done_p, _combine_done),
    (primitives.combine_weighted_p, _combine_weighted),
    (primitives.combine_weighted_start_p, _combine_weighted_start),
    (primitives.combine_grad_p, _combine_grad),
):
    compat.mlir.register_lowering(_primitive, _rule, platform="cuda")
