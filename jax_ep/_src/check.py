"""Every error that shapes, dtypes and static arguments can tell, at trace time, in one form:

    operation: argument must be rule = what that is here, got value. Next step.

All ranks trace the same program, so that all raise alike and none is left waiting.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jax_ep._src import compat, quantized
from jax_ep._src.handle import LAYOUTS, MODES, Handle, Routing
from jax_ep._src.quantized import Quantized

ROW_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
ROW_BYTES = 16  # a row must be a multiple of it: the unit of the copy engine
_INT32_MAX = 2**31 - 1
_NOT_BYTES = ("bool", "complex", "int2", "int4", "uint2", "uint4", "float4", "float6")  # beginnings of names
_SHORT = {"float": "f", "bfloat": "bf", "int": "s", "uint": "u"}


def fail(error: type[Exception], operation: str, rule: str, got: object, hint: str) -> NoReturn:
    """Raises `error` in the one form of this package."""
    raise error(f"{operation}: {rule}, got {got}. {hint}")


def show(x: Any) -> str:
    """`f32[4096, 8]`, as a jaxpr writes it."""
    name = str(x.dtype)
    head = name.rstrip("0123456789")
    if head in _SHORT:
        name = _SHORT[head] + name[len(head) :]
    return f"{name}[{', '.join(map(str, x.shape))}]"


def instance(operation: str, argument: str, value: object, kind: type, maker: str) -> None:
    """`value` must be what `maker` returned."""
    if not isinstance(value, kind):
        fail(
            TypeError,
            operation,
            f"{argument} must be a {kind.__name__}",
            type(value).__name__,
            f"Pass what {maker} returned.",
        )


# ---- axes ------------------------------------------------------------------------------------------------------------


def axes(operation: str, axis_name: Any) -> tuple[str, ...]:
    """A name or a tuple of names, all bound by shard_map, with no axis left to the automatic partitioner."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        fail(
            TypeError, operation, "axis_name must be a mesh axis's name or a tuple of different names", repr(axis_name),
            'Pass axis_name="expert", say.',
        )  # fmt: skip
    for name in names:
        if not compat.axis_exists(name):
            fail(
                NameError, operation, "axis_name must be bound by jax.shard_map", f"the unbound name {name!r}",
                f"Call {operation} inside jax.shard_map over a mesh that has this axis.",
            )  # fmt: skip
    mesh = jax.sharding.get_abstract_mesh()
    for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True):
        if kind == jax.sharding.AxisType.Auto and size > 1:
            fail(
                ValueError, operation, "every mesh axis must be manual where it is called", f"axis {name!r} left automatic",
                "The partitioner would gather the operands and repeat the call on each of its devices: "
                "name the axis in shard_map's axis_names (or leave axis_names out) and shard the operands over it.",
            )  # fmt: skip
    return names


# ---- dispatch --------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Operands of the row-moving primitives, leading axes folded: [T, ...] each."""

    payload: tuple[jax.Array, ...]  # (x,) or (values, scales)
    carrier: jax.Array | None  # of Quantized rows
    format: str | None  # of Quantized rows
    lead_shape: tuple[int, ...]


def routing(
    operation: str,
    lead_shape: tuple[int, ...],
    topk_idx: jax.Array,
    topk_weights: jax.Array | None,
    axis_name: Any,
    num_experts: int,
    layout: str,
    max_recv_tokens: int | None,
    expert_alignment: int,
    expert_capacity: int | None,
    wire: str | None,
    mode: str,
    num_sms: int | None,
) -> Routing:
    """Checks everything but x and returns the static routing."""
    names = axes(operation, axis_name)
    num_ranks = compat.axis_size(names)
    one_of(operation, "layout", layout, LAYOUTS)
    one_of(operation, "mode", mode, MODES)
    one_of(operation, "wire", wire, (None, *quantized.FORMATS))
    num_experts = integer(operation, "num_experts", num_experts, 1)
    if num_experts % num_ranks:
        fail(
            ValueError, operation, f"num_experts must be a multiple of the {num_ranks} ranks along {names}", num_experts,
            f"Pad the experts to {-(-num_experts // num_ranks) * num_ranks}.",
        )  # fmt: skip

    topk_idx = _topk_idx(operation, topk_idx, lead_shape)
    num_topk = topk_idx.shape[-1]
    num_tokens = math.prod(lead_shape)
    if not 1 <= num_topk <= num_experts:
        fail(
            ValueError, operation, f"topk_idx must name 1 to num_experts = {num_experts} choices a token",
            f"num_topk {num_topk}", "Pass jax.lax.top_k's indices with 1 <= k <= num_experts.",
        )  # fmt: skip
    if topk_weights is not None:
        topk_weights = array(operation, "topk_weights", topk_weights)
        if topk_weights.shape != topk_idx.shape or not jnp.issubdtype(topk_weights.dtype, jnp.floating):
            fail(
                ValueError if topk_weights.shape != topk_idx.shape else TypeError, operation,
                f"topk_weights must be f32 in topk_idx's shape = f32[{', '.join(map(str, topk_idx.shape))}]",
                show(topk_weights), "Pass the gate of each choice, or leave it out.",
            )  # fmt: skip

    expert_alignment = integer(operation, "expert_alignment", expert_alignment, 1)
    if num_sms is not None:
        num_sms = integer(operation, "num_sms", num_sms, 1)
    if layout != "expert" and expert_alignment != 1:
        fail(
            ValueError, operation, 'expert_alignment goes with layout="expert"', f'{expert_alignment} with layout="{layout}"',
            "Leave it out.",
        )  # fmt: skip
    if layout == "batched":
        if max_recv_tokens is not None:
            fail(
                ValueError, operation, 'max_recv_tokens goes with layout "expert" or "rank"', f'{max_recv_tokens} with "batched"',
                "Pass expert_capacity, the rows of each expert.",
            )  # fmt: skip
        expert_capacity = num_ranks * num_tokens if expert_capacity is None else expert_capacity
        expert_capacity = integer(operation, "expert_capacity", expert_capacity, 0)
        max_recv_tokens = num_experts // num_ranks * expert_capacity
    else:
        if expert_capacity is not None:
            fail(
                ValueError, operation, 'expert_capacity goes with layout="batched"', f'{expert_capacity} with "{layout}"',
                "Pass max_recv_tokens, the rows of the whole result.",
            )  # fmt: skip
        expert_capacity = 0
        if max_recv_tokens is None:
            max_recv_tokens = num_ranks * num_tokens
            if layout == "expert":
                max_recv_tokens *= num_topk
                groups = min(num_experts // num_ranks, max_recv_tokens)
                max_recv_tokens += groups * (expert_alignment - 1)
        max_recv_tokens = integer(operation, "max_recv_tokens", max_recv_tokens, 0)
    # rows and choices of the whole group are numbered in 32 bits
    for what, number in (("rows", max_recv_tokens), ("choices", num_tokens * num_topk)):
        if num_ranks * number > _INT32_MAX:
            fail(
                ValueError, operation, f"{what} of all {num_ranks} ranks must be fewer than 2**31", num_ranks * number,
                "Pass a smaller capacity or dispatch the tokens in parts.",
            )  # fmt: skip
    return Routing(
        axis_name=names, num_ranks=num_ranks, num_experts=num_experts, num_tokens=num_tokens, num_topk=num_topk,
        max_recv_tokens=max_recv_tokens, layout=layout, expert_alignment=expert_alignment,
        expert_capacity=expert_capacity, mode=mode, num_sms=num_sms,
    )  # fmt: skip


def rows(operation: str, argument: str, x: Any, handle: Handle | None = None, wire: str | None = None) -> Rows:
    """x[..., H] or Quantized, checked and with its leading axes folded; they must be the handle's where one is given."""
    if handle is not None:
        instance(operation, "handle", handle, Handle, "dispatch")
        bound_as_before(operation, handle)
    if isinstance(x, Quantized):
        if wire is not None:
            fail(
                ValueError, operation, f"wire must be None where {argument} is Quantized", repr(wire),
                "Quantized rows travel as they are: leave wire out.",
            )  # fmt: skip
        values, scales = (
            array(operation, f"{argument}.values", x.values),
            array(operation, f"{argument}.scales", x.scales),
        )
        if values.ndim < 2 or scales.ndim != values.ndim or values.shape[:-1] != scales.shape[:-1]:
            fail(
                ValueError, operation, f"{argument}.values and {argument}.scales must be [num_tokens, ...] with the same tokens",
                f"{show(values)} and {show(scales)}", "Give every token its row of scales.",
            )  # fmt: skip
        parts: tuple[jax.Array, ...] = (values, scales)
        carrier, form = x.carrier, x.format
    else:
        x = array(operation, argument, x)
        floating(operation, argument, x)
        if x.ndim < 2:
            fail(
                ValueError, operation, f"{argument} must be [num_tokens, hidden]", show(x),
                "Add the missing axis.",
            )  # fmt: skip
        parts, carrier, form = (x,), None, None
    lead_shape = parts[0].shape[:-1]
    if handle is not None and lead_shape != handle.lead_shape:
        fail(
            ValueError, operation, f"{argument} must have the handle's tokens [{', '.join(map(str, handle.lead_shape))}]",
            show(parts[0]), "Pass the handle of a dispatch of the same tokens.",
        )  # fmt: skip
    whole_units(operation, argument, parts[0])
    for part in parts:
        if part.dtype.name.startswith(_NOT_BYTES):
            fail(
                TypeError, operation, f"{argument} must have a dtype of whole bytes", show(part),
                "Pass packed values as their bytes, u8[num_tokens, hidden / 2].",
            )  # fmt: skip
    if carrier is not None and (carrier.ndim != len(lead_shape) + 1 or carrier.shape[:-1] != lead_shape):
        fail(
            ValueError, operation, f"{argument}.carrier must be [num_tokens, hidden] with the tokens of the values",
            show(carrier), "Pass what quantize returned, or carrier=None.",
        )  # fmt: skip
    folded = tuple(part.reshape(math.prod(lead_shape), part.shape[-1]) for part in parts)
    if carrier is not None:
        carrier = carrier.reshape(math.prod(lead_shape), carrier.shape[-1])
    return Rows(folded, carrier, form, lead_shape)


def topk_idx(operation: str, value: Any, lead_shape: tuple[int, ...] | None = None) -> jax.Array:
    """s32 or s64[num_tokens, num_topk], with the leading axes of x where those are given."""
    value = array(operation, "topk_idx", value)
    lead = "num_tokens" if lead_shape is None else ", ".join(map(str, lead_shape))
    rule = f"topk_idx must be s32[num_tokens, num_topk] = s32[{lead}, K]"
    if value.dtype not in (jnp.int32, jnp.int64):
        fail(TypeError, operation, rule, show(value), "Cast it with .astype(jnp.int32).")
    if value.ndim < 2 or lead_shape not in (None, value.shape[:-1]):
        fail(
            ValueError,
            operation,
            rule,
            show(value),
            "Give x and topk_idx the same tokens, and topk_idx an axis of choices.",
        )
    return value


_topk_idx = topk_idx  # where an argument has that name


# ---- combine ---------------------------------------------------------------------------------------------------------


def combine(
    operation: str, y: Any, handle: Handle, weights: Any, wire: str | None
) -> tuple[jax.Array, jax.Array | None]:
    """y as [C, H] and weights as f32[C] or None, checked against the handle."""
    instance(operation, "handle", handle, Handle, "dispatch")
    bound_as_before(operation, handle)
    one_of(operation, "wire", wire, (None, "logfmt10"))
    routing = handle.routing
    if isinstance(y, Quantized):
        fail(TypeError, operation, "y must be bf16, f16 or f32 rows", "Quantized", "Pass jax_ep.dequantize(y).")
    y = array(operation, "y", y)
    floating(operation, "y", y)
    shape = ", ".join(map(str, routing.rows_shape))
    if y.ndim != len(routing.rows_shape) + 1 or y.shape[:-1] != routing.rows_shape:
        fail(
            ValueError, operation, f'y must be [{shape}, hidden], the rows of layout "{routing.layout}"', show(y),
            "Pass one row for each row of Dispatched.x.",
        )  # fmt: skip
    whole_units(operation, "y", y)
    if weights is not None:
        if routing.layout == "rank":
            fail(
                ValueError, operation, 'weights go with layout "expert" or "batched"', 'a handle of layout "rank"',
                "Rows of layout rank are sums over experts already: apply Dispatched.weights where they are summed.",
            )  # fmt: skip
        weights = array(operation, "weights", weights)
        if weights.shape != routing.rows_shape or not jnp.issubdtype(weights.dtype, jnp.floating):
            fail(
                ValueError if weights.shape != routing.rows_shape else TypeError, operation,
                f"weights must be f32[{shape}], one for each row", show(weights), "Pass Dispatched.weights.",
            )  # fmt: skip
        weights = weights.astype(jnp.float32).reshape(-1)
    return y.reshape(routing.max_recv_tokens, y.shape[-1]), weights


def bound_as_before(operation: str, handle: Handle) -> None:
    """The handle's axes must be bound here, with the sizes they had at its dispatch."""
    routing = handle.routing
    num_ranks = compat.axis_size(axes(operation, routing.axis_name))
    if num_ranks != routing.num_ranks:
        fail(
            ValueError, operation, f"handle must come from the same mesh, {routing.num_ranks} ranks along {routing.axis_name}",
            f"{num_ranks} ranks", "Dispatch again on this mesh.",
        )  # fmt: skip


# ---- one value -------------------------------------------------------------------------------------------------------


def array(operation: str, argument: str, value: Any) -> jax.Array:
    """`value` as a jax.Array; lists and other objects are refused."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        fail(TypeError, operation, f"{argument} must be an array", type(value).__name__, "Pass a jax.Array.")
    return jnp.asarray(value)


def floating(operation: str, argument: str, x: jax.Array) -> None:
    """bf16, f16 or f32."""
    if x.dtype not in ROW_DTYPES:
        fail(
            TypeError, operation, f"{argument} must be bf16, f16 or f32", show(x),
            "Cast it, or wrap rows of another format in jax_ep.Quantized(values, scales).",
        )  # fmt: skip


def whole_units(operation: str, argument: str, x: jax.Array) -> None:
    """A row's bytes must be a positive multiple of ROW_BYTES."""
    row_bytes = x.shape[-1] * x.dtype.itemsize
    if row_bytes == 0 or row_bytes % ROW_BYTES:
        unit = ROW_BYTES // x.dtype.itemsize
        fail(
            ValueError, operation, f"a row of {argument} must be a multiple of {ROW_BYTES} bytes = {unit} columns",
            f"{show(x)}, {row_bytes} bytes a row", f"Pad hidden to {max(-(-x.shape[-1] // unit), 1) * unit}.",
        )  # fmt: skip


def integer(operation: str, argument: str, value: Any, least: int) -> int:
    """A static Python integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, jax.core.Tracer):
        fail(TypeError, operation, f"{argument} must be a static integer", repr(value), "Pass a Python int.")
    if value < least:
        fail(ValueError, operation, f"{argument} must be at least {least}", value, "Pass a larger one.")
    return operator.index(value)


def one_of(operation: str, argument: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """One of a few words."""
    if not any(value == a and type(value) is type(a) for a in allowed):
        fail(
            ValueError, operation, f"{argument} must be one of {', '.join(map(repr, allowed))}", repr(value),
            "Choose one of these.",
        )  # fmt: skip
