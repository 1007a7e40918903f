"""combine: the experts' rows go back to their tokens' ranks and are summed. The public functions.

Neighbours: dispatch.py is the way out, primitives.py what lies below, reference.py the meaning (and the arithmetic of
the sums, to the bit), autodiff.py and batching.py the transformations.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src import check, compat
from jax_ep._src.handle import CombineInFlight, Handle
from jax_ep._src.primitives import (
    align,
    combine_done_p,
    combine_p,
    combine_start_p,
    combine_weighted_p,
    combine_weighted_start_p,
    move,
)


@compat.on_the_callers_stream
def combine(y: jax.Array, handle: Handle, weights: jax.Array | None = None, *, wire: str | None = None) -> jax.Array:
    """Sums each token's rows where the token came from: out[t] = sum over k of weights[row(t, k)] * y[row(t, k)].

    Args:
      y: bf16, f16 or f32[C, H] ([E / R, expert_capacity, H] for "batched"), a row for each row of `Dispatched.x`; H and
        dtype may differ from x's. A row must be a multiple of 16 bytes.
      handle: from the `dispatch` whose rows these are.
      weights: f32[C] (f32[E / R, expert_capacity]), one gate a row, as `Dispatched.weights`; all ones if left out. Not
        with layout "rank", whose rows are sums over experts already.
      wire: None, or "logfmt10" to send the sums back in 10 bits a value (see docs/wire-formats.md; derivatives are
        straight-through).

    Returns:
      [T, H] in y's dtype, with the leading axes that x had. A dropped row counts as absent.

    The sums are exactly defined: over a rank's rows of one token in choice order in f32, each product rounded to f32,
    the sum rounded to y's dtype; then over ranks in rank order in f32, rounded to y's dtype.

    Raises:
      ValueError, TypeError: y or weights do not fit the handle; the message names argument, rule, value and next step.

    Derivatives: bilinear in y and weights; the transpose in y is `dispatch_cached`. The result carries the checkpoint
    name "jax_ep_combine".

    Example:
      >>> recv, handle = jax_ep.dispatch(x, topk_idx, weights, axis_name="expert", num_experts=8)
      >>> out = jax_ep.combine(2 * recv.x, handle, recv.weights)       # 2 * x * weights.sum(-1), nearly
    """
    rows, weights = check.combine("combine", y, handle, weights, wire)
    routing = handle.routing
    if weights is None:
        rows, *arrays = align(routing, rows, *handle.arrays)
        (out,), _ = move(combine_p, (rows,), None, arrays, routing, wire=wire)
    else:
        operands = align(routing, rows, weights, *handle.arrays)
        (out,) = combine_weighted_p.bind(*operands, routing=routing, wire=wire)
    return _shape_tokens(out, handle)


@compat.on_the_callers_stream
def combine_start(
    y: jax.Array, handle: Handle, weights: jax.Array | None = None, *, wire: str | None = None
) -> CombineInFlight:
    """First half of `combine`: the rank's sums leave. What stands between it and `combine_done` may run meanwhile.

    Arguments and errors are those of `combine`. The result is opaque: pass it to `combine_done`, once. As for
    `dispatch_start` few calls may be in flight at once; with "high_throughput" each takes (2 * R - 1) * T rows of memory.

    Example:
      >>> pending = jax_ep.combine_start(y, handle, recv.weights)
      >>> shared = shared_expert(x)                      # overlaps with the exchange
      >>> out = jax_ep.combine_done(pending) + shared
    """
    rows, weights = check.combine("combine_start", y, handle, weights, wire)
    routing = handle.routing
    if weights is None:
        rows, *arrays = align(routing, rows, *handle.arrays)
        (sums,), _ = move(combine_start_p, (rows,), None, arrays, routing, wire=wire)
    else:
        operands = align(routing, rows, weights, *handle.arrays)
        (sums,) = combine_weighted_start_p.bind(*operands, routing=routing, wire=wire)
    return CombineInFlight(sums, handle, wire)


@compat.on_the_callers_stream
def combine_done(pending: CombineInFlight) -> jax.Array:
    """Second half of `combine`: waits for the sums of all ranks and adds them.

    Args:
      pending: from `combine_start`.

    Returns:
      What `combine` returns for the same arguments, to the bit.

    Example: see `combine_start`.
    """
    check.instance("combine_done", "pending", pending, CombineInFlight, "combine_start")
    routing = pending.handle.routing
    check.bound_as_before("combine_done", pending.handle)
    sums, *arrays = align(routing, pending.rows, *pending.handle.arrays)
    (out,), _ = move(combine_done_p, (sums,), None, arrays, routing, wire=pending.wire)
    return _shape_tokens(out, pending.handle)


def _shape_tokens(out: jax.Array, handle: Handle) -> jax.Array:
    """[T, H] with the leading axes that x had."""
    return checkpoint_name(out.reshape(*handle.lead_shape, out.shape[-1]), "jax_ep_combine")
