"""The primitives on CUDA: which kernel serves a call, and what it is told. The table at the end says which primitives have one.

Whatever a kernel does not take falls back to the reference, with the same meaning: no peer access, processes on several hosts,
empty arrays, shapes beyond the kernel's limits. Neighbours: group.py finds the devices, ffi/*/*_ffi.cc are the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir.dialects import stablehlo

from jax_ep._src import compat, group, primitives, quantized, reference, targets
from jax_ep._src.handle import LAYOUTS, Routing

Rule = Callable[..., Any]

MAX_TOPK = 32  # one lane of a warp a choice
MAX_BINS = 2080  # counts that a block publishes: kMaxBins in ffi/group/window.h
MAX_RANKS = 32
INT_MAX = 2**31 - 1


# ---- what the kernels take -------------------------------------------------------------------------------------------


def _row_bytes(aval: Any) -> int:
    return math.prod(aval.shape[1:]) * aval.dtype.itemsize


def _routing_fits(routing: Routing) -> bool:
    return (
        routing.num_tokens > 0
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
        and all(size % 16 == 0 for size in sizes)
        and all(row.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) for row in rows)
        and all((routing.num_tokens + 3) * routing.num_ranks * (size // 2048 + 1) <= INT_MAX for size in sizes)
    )


# ---- calling them ----------------------------------------------------------------------------------------------------


def _int64(**attributes: int) -> dict[str, Any]:
    return {name: np.int64(value) for name, value in attributes.items()}


def _reference(meaning: Rule) -> Rule:
    return compat.mlir.lower_fun(meaning, multiple_results=True)


def _groups(ctx: Any, routing: Routing) -> group.Groups | None:
    return group.along(ctx.module_context.axis_context, routing.axis_name)


def _call_dispatch(
    target: str, ctx: Any, operands: Any, routing: Routing, devices: Any, num_rows: int, has_weights: bool
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
    return _call_dispatch(targets.NOTIFY, ctx, [topk_idx], routing, devices, 0, False)


def _dispatch(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None) -> Any:
    if wire is not None:  # encoded by XLA, then sent as values and scales
        return _reference(_encode_and_dispatch)(
            ctx, *operands, routing=routing, num_rows=num_rows, has_weights=has_weights, wire=wire
        )
    devices = _groups(ctx, routing) if _dispatch_fits(ctx.avals_in[:num_rows], routing) else None
    if devices is None:
        static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
        return _reference(reference.dispatch)(ctx, *operands, **static)
    return _call_dispatch(targets.DISPATCH, ctx, operands, routing, devices, num_rows, has_weights)


def _encode_and_dispatch(*operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str) -> Any:
    del num_rows
    values, scales = quantized.encode(operands[0], wire)
    return primitives.dispatch_p.bind(
        values, scales, *operands[1:], routing=routing, num_rows=2, has_weights=has_weights, wire=None
    )


def _dispatch_cached(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool) -> Any:
    devices = _groups(ctx, routing) if _dispatch_fits(ctx.avals_in[:num_rows], routing) else None
    if devices is None:
        static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights}
        return _reference(reference.dispatch_cached)(ctx, *operands, **static)
    return _call_dispatch(targets.DISPATCH_CACHED, ctx, operands, routing, devices, num_rows, has_weights)


def _call_combine(
    ctx: Any, operands: Any, routing: Routing, devices: Any, has_rows: bool, has_weights: bool, has_carried: bool
) -> Any:
    avals_out = list(ctx.avals_out)
    *moved, slot, recv_slot, _ = operands
    if has_rows and routing.layout != "rank" and routing.num_ranks > 1:
        # Where the peers put their sums. A result like the others, so that XLA finds room for it call by call.
        out = avals_out[0]
        avals_out.append(jax.core.ShapedArray((routing.num_ranks - 1, *out.shape), out.dtype))
    attributes = _int64(
        num_ranks=routing.num_ranks,
        one_row_a_rank=routing.layout == "rank",
        max_recv_tokens=routing.max_recv_tokens,
        has_rows=has_rows,
        has_weights=has_weights,
        has_carried=has_carried,
        num_sms=routing.num_sms or 0,
    )
    ctx = ctx.replace(avals_in=[*ctx.avals_in[:-1]], avals_out=avals_out)
    results = jax.ffi.ffi_lowering(targets.COMBINE)(
        ctx, *moved, slot, recv_slot, devices=np.array(devices, np.int64).reshape(-1), **attributes
    )
    return _launched_once(results)[: int(has_rows) + int(has_carried)]


def _combine(ctx: Any, *operands: Any, routing: Routing, num_rows: int, has_weights: bool, wire: str | None) -> Any:
    fits = wire is None and _combine_fits(ctx.avals_in[:num_rows], routing)
    devices = _groups(ctx, routing) if fits else None
    if devices is None:
        static = {"routing": routing, "num_rows": num_rows, "has_weights": has_weights, "wire": wire}
        return _reference(reference.combine)(ctx, *operands, **static)
    return _call_combine(ctx, operands, routing, devices, num_rows == 1, False, has_weights)


def _combine_weighted(ctx: Any, *operands: Any, routing: Routing, wire: str | None) -> Any:
    fits = wire is None and _combine_fits(ctx.avals_in[:1], routing)
    devices = _groups(ctx, routing) if fits else None
    if devices is None:
        return _reference(reference.combine_weighted)(ctx, *operands, routing=routing, wire=wire)
    return _call_combine(ctx, operands, routing, devices, True, True, False)


for _primitive, _rule in (
    (primitives.notify_p, _notify),
    (primitives.dispatch_p, _dispatch),
    (primitives.dispatch_cached_p, _dispatch_cached),
    (primitives.combine_p, _combine),
    (primitives.combine_weighted_p, _combine_weighted),
):
    compat.mlir.register_lowering(_primitive, _rule, platform="cuda")
