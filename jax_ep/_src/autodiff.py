"""Derivatives, on one page.

With the routing fixed, every primitive that moves a payload is linear, and each is the transpose of another:

    dispatch_cached  <->  combine            rows [T] -> [C] and back, the sums over a token's rows being the transpose
    dispatch_start   <->  combine_done        of copying it to them; gates go out and back the same way, unsummed
    dispatch_done    <->  combine_start

so   jvp(P)(x, x')  = P(x), P(x')       transpose(P)(ct) = P^T(ct).

A value in flight is opaque and goes from a start to its done once, so the halves may swap roles in the transpose: the
cotangent of dispatch_done's operand is what combine_start sends, of the same shape, and combine_done receives it.

dispatch = notify, then dispatch_cached: its tangent is dispatch_cached along the routing that the primal call found.
Where only a part of the operands is known (linear_transpose: the routing and the gates, say), partial evaluation splits
the call into what can be done now and what is linear in the rest.

combine_weighted(y, w) is bilinear. J(y', w'; y, w) = combine_weighted(y', w) + combine_weighted(y, w') is its tangent,
a primitive of its own so that its transpose sends the cotangent once for both:

    rows = dispatch_cached(ct);   y_bar[c] = w[c] * rows[c];   w_bar[c] = <y[c], rows[c]>

which is one primitive too, (y_bar, w_bar) = G(ct; y, w) = combine_grad, linear in ct and in (y, w) together:

    its tangent is G(ct'; y, w) + G(ct; y', w'); its transpose in ct is J(., .; y, w), in (y, w) it is G(ct; ., .)

and J's own tangent is J(y'', w''; y, w) + J(dy, dw; y', w'). A wire format on the way back is straight-through: tangents
travel without it.

combine_weighted_start has no such J: what it returns is opaque, and sums of two of them mean nothing. Its tangent sends
one sum, combine_start(w * y' + w' * y), each row rounded to y's dtype; its transpose is the same with dispatch_done.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ep._src import compat
from jax_ep._src import primitives as p
from jax_ep._src.compat import ad, pe
from jax_ep._src.handle import Routing

Zero = ad.Zero
_COMBINES = (p.combine_p, p.combine_start_p, p.combine_done_p)  # these take a wire format


def _no_wire(primitive: compat.Primitive) -> dict[str, Any]:
    return {"wire": None} if primitive in _COMBINES else {}


def _move_some(
    primitive: compat.Primitive, payload: list[Any], handle: list[Any], num_rows: int, routing: Routing
) -> list[Any]:
    """Moves those of `payload` that are not None or symbolic zeros; None stands for the others."""
    live = [i for i, value in enumerate(payload) if value is not None and type(value) is not Zero]
    rows = [payload[i] for i in live if i < num_rows]
    weights = payload[-1] if live and live[-1] >= num_rows else None
    moved, moved_weights = p.move(primitive, rows, weights, handle, routing, **_no_wire(primitive))
    results: list[Any] = [None] * len(payload)
    for i, value in zip(live, [*moved, moved_weights], strict=False):
        results[i] = value
    return results


# ---- linear primitives -----------------------------------------------------------------------------------------------


def _linear_jvp(primitive: compat.Primitive, primals: Any, tangents: Any, **params: Any) -> Any:
    results = primitive.bind(*primals, **params)
    moved = _move_some(primitive, tangents[:-3], primals[-3:], params["num_rows"], params["routing"])
    return results, [_or_zero(tangent, result) for tangent, result in zip(moved, results, strict=True)]


def _or_zero(tangent: Any, result: Any) -> Any:
    return compat.zero_tangent(result) if tangent is None else tangent


def _linear_transpose(
    other: compat.Primitive, cts: Any, *operands: Any, routing: Routing, num_rows: int, **_: Any
) -> Any:
    *payload, slot, recv_slot, counts = operands
    wanted = [ct if ad.is_undefined_primal(operand) else None for ct, operand in zip(cts, payload, strict=True)]
    moved = _move_some(other, wanted, [slot, recv_slot, counts], num_rows, routing)
    back = [
        Zero(operand.aval) if ad.is_undefined_primal(operand) and ct is None else ct
        for ct, operand in zip(moved, payload, strict=True)
    ]
    return [*back, None, None, None]


def _define_transposes(one: compat.Primitive, other: compat.Primitive) -> None:
    for primitive, transposed in ((one, other), (other, one)):
        ad.primitive_jvps[primitive] = functools.partial(_linear_jvp, primitive)
        ad.primitive_transposes[primitive] = functools.partial(_linear_transpose, transposed)
        pe.custom_partial_eval_rules[primitive] = functools.partial(_linear_partial_eval, primitive)


# ---- dispatch --------------------------------------------------------------------------------------------------------


def _dispatch_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    routing, num_rows = params["routing"], params["num_rows"]
    results = p.dispatch_p.bind(*primals, **params)
    first_routed = len(results) - p.num_routed(routing)
    # The tangent's transpose needs the routing: under its name, or a policy that saves the handle would not save this.
    routed = [checkpoint_name(array, "jax_ep_handle") for array in results[first_routed:]]
    results = [*results[:first_routed], *routed]
    payload_dot = list(tangents[:-1])
    if params["wire"] is not None and type(payload_dot[0]) is not Zero:
        raise NotImplementedError(
            "jax_ep_dispatch: a wire format is differentiated by jax_ep.dispatch, not by its primitive"
        )
    moved = _move_some(p.dispatch_cached_p, payload_dot, routed[:3], num_rows, routing)
    if params["wire"] is not None:
        moved.insert(0, None)  # x becomes values and scales
    tangents_out = [*moved, *[None] * len(routed)]
    return results, [_or_zero(tangent, result) for tangent, result in zip(tangents_out, results, strict=True)]


def _dispatch_partial_eval(trace: Any, *tracers: Any, **params: Any) -> Any:
    """Known routing, unknown rows: notify now, dispatch_cached later."""
    *payload, topk_idx = tracers
    if not topk_idx.is_known() or all(t.is_known() for t in payload) or params["wire"] is not None:
        return trace.default_process_primitive(p.dispatch_p, tracers, params)
    routed = p.notify_p.bind(topk_idx.pval.get_known(), routing=params["routing"])
    static = {key: value for key, value in params.items() if key != "wire"}
    handle = [trace.new_const(array) for array in routed[:3]]
    moved = _linear_partial_eval(p.dispatch_cached_p, trace, *payload, *handle, **static)
    return [*moved, *(trace.new_const(array) for array in routed)]


def _linear_partial_eval(primitive: compat.Primitive, trace: Any, *tracers: Any, **params: Any) -> Any:
    """What is known of a payload moves now, the rest later."""
    *payload, slot, recv_slot, counts = tracers
    handle = [slot, recv_slot, counts]
    known = [t.is_known() for t in payload]
    if not all(t.is_known() for t in handle) or all(known) or not any(known):
        return trace.default_process_primitive(primitive, tracers, params)
    num_rows = params["num_rows"]
    results: list[Any] = [None] * len(payload)
    for now in (True, False):
        chosen = [i for i, is_known in enumerate(known) if is_known == now]
        part = {**params, "num_rows": sum(i < num_rows for i in chosen), "has_weights": chosen[-1] >= num_rows}
        operands = [*(payload[i] for i in chosen), *handle]
        if now:
            moved = primitive.bind(*(t.pval.get_known() for t in operands), **part)
            moved = [trace.new_const(array) for array in moved]
        else:
            moved = trace.default_process_primitive(primitive, operands, part)
        for i, value in zip(chosen, moved, strict=True):
            results[i] = value
    return results


# ---- weighted combine ------------------------------------------------------------------------------------------------


def _weighted_jvp(combine: compat.Primitive, both: Any, primals: Any, tangents: Any, **params: Any) -> Any:
    """JVP of a weighted combine; `both` is its tangent where neither operand's is zero."""
    routing = params["routing"]
    y, w, *handle = primals
    y_dot, w_dot = tangents[:2]
    results = combine.bind(*primals, **params)
    if type(y_dot) is Zero and type(w_dot) is Zero:
        return results, [compat.zero_tangent(results[0])]
    if type(w_dot) is Zero:
        return results, combine.bind(y_dot, w, *handle, routing=routing, wire=None)
    if type(y_dot) is Zero:
        return results, combine.bind(y, w_dot, *handle, routing=routing, wire=None)
    return results, both(y_dot, w_dot, y, w, *handle, routing=routing)


def _cotangents(transposed: compat.Primitive, ct: Any, y: Any, w: Any, handle: Any, routing: Routing, want: Any) -> Any:
    """Cotangents of the operands that weigh `w` and `y`, where wanted."""
    if all(want) and transposed is p.dispatch_cached_p:
        return p.combine_grad_p.bind(ct, y, w, *handle, routing=routing)
    (rows,), _ = p.move(transposed, [ct], None, handle, routing)
    y_bar = (w[:, None] * rows.astype(jnp.float32)).astype(rows.dtype) if want[0] else None
    w_bar = jnp.sum(y.astype(jnp.float32) * rows.astype(jnp.float32), axis=1) if want[1] else None
    return [y_bar, w_bar]


def _weighted_transpose(
    transposed: compat.Primitive, cts: Any, y: Any, w: Any, *handle: Any, routing: Routing, **_: Any
) -> Any:
    want = ad.is_undefined_primal(y), ad.is_undefined_primal(w)
    if all(want):
        raise NotImplementedError("jax_ep_combine: bilinear in y and weights, so it has no transpose in both at once")
    if type(cts[0]) is Zero:
        back = [Zero(y.aval) if want[0] else None, Zero(w.aval) if want[1] else None]
    else:
        back = _cotangents(transposed, cts[0], y, w, handle, routing, want)
    return [*back, None, None, None]


def _define_weighted(combine: compat.Primitive, transposed: compat.Primitive) -> None:
    """Derivatives of a weighted combine whose unweighted form has the transpose `transposed`."""
    tangent_p = compat.effectful_primitive(f"{combine.name}_jvp")  # y', w', y, w, slot, recv_slot, counts -> [T, H]

    def tangent_meaning(y_dot: Any, w_dot: Any, y: Any, w: Any, *handle: Any, routing: Routing) -> list[jax.Array]:
        (one,) = combine.bind(y_dot, w, *handle, routing=routing, wire=None)
        (two,) = combine.bind(y, w_dot, *handle, routing=routing, wire=None)
        return [one + two]

    def tangent_jvp(primals: Any, tangents: Any, *, routing: Routing) -> Any:
        y_dot, w_dot, y, w, *handle = primals
        y_dot2, w_dot2, dy, dw = (ad.instantiate_zeros(tangent) for tangent in tangents[:4])
        results = tangent_p.bind(*primals, routing=routing)
        (one,) = tangent_p.bind(y_dot2, w_dot2, y, w, *handle, routing=routing)
        (two,) = tangent_p.bind(dy, dw, y_dot, w_dot, *handle, routing=routing)
        return results, [one + two]

    def tangent_transpose(cts: Any, y_dot: Any, w_dot: Any, y: Any, w: Any, *handle: Any, routing: Routing) -> Any:
        want = ad.is_undefined_primal(y_dot), ad.is_undefined_primal(w_dot)
        if type(cts[0]) is Zero:
            back = [Zero(y_dot.aval) if want[0] else None, Zero(w_dot.aval) if want[1] else None]
        else:
            back = _cotangents(transposed, cts[0], y, w, handle, routing, want)
        return [*back, None, None, None, None, None]

    def tangent_abstract_eval(y_dot: Any, w_dot: Any, y: Any, w: Any, *handle: Any, routing: Routing) -> Any:
        return combine.abstract_eval(y, w, *handle, routing=routing, wire=None)

    tangent_p.def_effectful_abstract_eval(tangent_abstract_eval)
    compat.mlir.register_lowering(tangent_p, compat.mlir.lower_fun(tangent_meaning, multiple_results=True))
    ad.primitive_jvps[combine] = functools.partial(_weighted_jvp, combine, tangent_p.bind)
    ad.primitive_transposes[combine] = functools.partial(_weighted_transpose, transposed)
    ad.primitive_jvps[tangent_p] = tangent_jvp
    ad.primitive_transposes[tangent_p] = tangent_transpose
    WEIGHTED_TANGENTS[combine] = tangent_p


def _start_of_sum(y_dot: Any, w_dot: Any, y: Any, w: Any, *handle: Any, routing: Routing) -> Any:
    """The tangent of combine_weighted_start in both operands."""
    of_y = w[:, None] * y_dot.astype(jnp.float32)
    of_w = w_dot[:, None] * y.astype(jnp.float32)
    rows, _ = p.move(p.combine_start_p, [(of_y + of_w).astype(y.dtype)], None, handle, routing, wire=None)
    return list(rows)


WEIGHTED_TANGENTS: dict[compat.Primitive, compat.Primitive] = {}


def _grad_jvp(primals: Any, tangents: Any, *, routing: Routing) -> Any:
    ct, y, w, *handle = primals
    results = p.combine_grad_p.bind(*primals, routing=routing)
    if all(type(tangent) is Zero for tangent in tangents[:3]):
        return results, [compat.zero_tangent(result) for result in results]
    ct_dot, y_dot, w_dot = (ad.instantiate_zeros(tangent) for tangent in tangents[:3])
    terms = []
    if type(tangents[0]) is not Zero:
        terms.append(p.combine_grad_p.bind(ct_dot, y, w, *handle, routing=routing))
    if type(tangents[1]) is not Zero or type(tangents[2]) is not Zero:
        terms.append(p.combine_grad_p.bind(ct, y_dot, w_dot, *handle, routing=routing))
    return results, terms[0] if len(terms) == 1 else [one + two for one, two in zip(*terms, strict=True)]


def _grad_transpose(cts: Any, ct: Any, y: Any, w: Any, *handle: Any, routing: Routing) -> Any:
    want = [ad.is_undefined_primal(operand) for operand in (ct, y, w)]
    if want[0] and any(want[1:]):
        raise NotImplementedError("jax_ep_combine_grad: bilinear, so it has no transpose in all operands at once")
    if all(type(of) is Zero for of in cts):
        return [Zero(of.aval) if wanted else None for of, wanted in zip((ct, y, w), want, strict=True)] + [None] * 3
    a, b = (ad.instantiate_zeros(of) for of in cts)
    if want[0]:
        back = [*WEIGHTED_TANGENTS[p.combine_weighted_p].bind(a, b, y, w, *handle, routing=routing), None, None]
    else:
        bars = p.combine_grad_p.bind(ct, a, b, *handle, routing=routing)
        back = [None, *(bar if wanted else None for bar, wanted in zip(bars, want[1:], strict=True))]
    return [*back, None, None, None]


# ---- the table -------------------------------------------------------------------------------------------------------

_define_transposes(p.dispatch_cached_p, p.combine_p)
_define_transposes(p.dispatch_start_p, p.combine_done_p)
_define_transposes(p.dispatch_done_p, p.combine_start_p)
ad.primitive_jvps[p.dispatch_p] = _dispatch_jvp
pe.custom_partial_eval_rules[p.dispatch_p] = _dispatch_partial_eval
_define_weighted(p.combine_weighted_p, p.dispatch_cached_p)
ad.primitive_jvps[p.combine_weighted_start_p] = functools.partial(
    _weighted_jvp, p.combine_weighted_start_p, _start_of_sum
)
ad.primitive_transposes[p.combine_weighted_start_p] = functools.partial(_weighted_transpose, p.dispatch_done_p)

ad.primitive_jvps[p.combine_grad_p] = _grad_jvp
ad.primitive_transposes[p.combine_grad_p] = _grad_transpose

compat.give_names_a_transpose()
