"""What is measured through jit: a number of calls chained in one program, so that JAX's own dispatch to the devices does not blur them.

Each call depends on the one before by its data: pairs and layers hand their rows on; the others get integers of their routing plus
whether the last result's first number is NaN, a kernel of about 2 µs. So nothing is merged, moved or held longer than by a user.
exchange.py and tune.py time these programs, baselines.py has the ways without jax_ep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import lax
from jax.sharding import NamedSharding

import jax_ep
from benchmarks import timing, traffic
from benchmarks.baselines import BASELINES

OPERATIONS = (
    "dispatch",
    "dispatch_cached",
    "combine",
    "combine_weighted",
    "combine_backward",
    "pair",
    "cached_pair",
    "moe",
    "moe_gradient",
)

Program = tuple[str, Callable[..., Any], tuple[Any, ...]]  # operation, function of global arrays, arguments


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case on a mesh, with a routing for each call."""

    case: Case
    mesh: jax.sharding.Mesh
    topk_idx: np.ndarray  # s32[calls, R, T, K]
    expert_hidden: int = 16  # F of the experts of "moe"

    @classmethod
    def of(cls, case: Case, calls: int = 1, routing: str = "uniform", expert_hidden: int = 16) -> Setting:
        """On as many of the devices as the case asks for, or can use."""
        ranks = min(case.num_ranks, jax.device_count())
        while case.num_experts % ranks or ranks % jax.process_count():
            ranks -= 1
        if ranks != case.num_ranks:
            case = dataclasses.replace(case, num_ranks=ranks, axes=())
        names, sizes = zip(*case.mesh_axes, strict=True)
        mesh = jax.sharding.Mesh(np.array(some_devices(ranks)).reshape(sizes), names)
        topk_idx = np.stack([traffic.draw_routing(case, routing, seed) for seed in range(calls)])
        return cls(case, mesh, topk_idx, expert_hidden)

    @property
    def calls(self) -> int:
        """In one program."""
        return len(self.topk_idx)

    def in_layout(self, layout: str) -> Setting:
        """The same with another layout and rows enough for every routing."""
        case = dataclasses.replace(self.case, layout=layout)
        each = [traffic.capacities(case, topk_idx) for topk_idx in self.topk_idx]
        most = {name: None if each[0][name] is None else max(sizes[name] or 0 for sizes in each) for name in each[0]}
        return dataclasses.replace(self, case=dataclasses.replace(case, **most))

    def on_every_rank(self, f: Callable[..., Any], check_vma: bool = True) -> Callable[..., Any]:
        """f for one rank -> a function of global arrays, [R * n, ...]."""
        spec = jax.P(self.case.axis_name)
        return jax.shard_map(f, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)

    def normal(self, seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
        """Normal variates [R * n, ...], where `shape` is a rank's [n, ...]."""
        sharding = NamedSharding(self.mesh, jax.P(self.case.axis_name))
        shape = (self.case.num_ranks * shape[0], *shape[1:])
        return jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype), out_shardings=sharding)(
            jax.random.key(seed)
        )

    def inputs(self) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """x [R * T, H], weights f32[R * T, K], topk_idx s32[R * T, K] for each call."""
        case, sharding = self.case, NamedSharding(self.mesh, jax.P(self.case.axis_name))
        x = self.normal(0, (case.num_tokens, case.hidden), jnp.dtype(case.dtype))
        weights = self.normal(1, (case.num_tokens, case.num_topk), jnp.float32, 1 / case.num_topk)
        routings = tuple(jax.device_put(idx.reshape(-1, case.num_topk), sharding) for idx in self.topk_idx)
        return x, weights, routings

    def experts(self) -> tuple[jax.Array, jax.Array]:
        """[E, H, F] and [E, F, H]."""
        hidden, inner, local = self.case.hidden, self.expert_hidden, self.case.num_local_experts
        w_in = self.normal(2, (local, hidden, inner), jnp.dtype(self.case.dtype), hidden**-0.5)
        return w_in, self.normal(3, (local, inner, hidden), jnp.dtype(self.case.dtype), inner**-0.5)


def some_devices(count: int) -> list[Any]:
    """So many devices, as many of each process."""
    each = count // jax.process_count()
    return [
        device
        for process in range(jax.process_count())
        for device in [device for device in jax.devices() if device.process_index == process][:each]
    ]


def first(rows: Any) -> jax.Array:
    """f32[]: the first number of rows, for the next call to wait for."""
    array = rows.values if isinstance(rows, jax_ep.Quantized) else rows
    return lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(()).astype(jnp.float32)


def after(token: jax.Array | None, integers: Any) -> Any:
    """Arrays of integers as they are, but not before `token` is there."""
    if token is None:
        return integers
    return jax.tree.map(lambda array: array + jnp.isnan(token).astype(array.dtype), integers)


def after_handle(token: jax.Array | None, handle: jax_ep.Handle) -> jax_ep.Handle:
    """The same of a routing."""
    slot, recv_slot = after(token, (handle.slot, handle.recv_slot))
    return dataclasses.replace(handle, slot=slot, recv_slot=recv_slot)


def dispatch_of(
    case: Case,
    wire: str | None = None,
    mode: str = "auto",
    num_sms: int | None = None,
    call: Callable[..., Any] = jax_ep.dispatch,
) -> Callable[[jax.Array, jax.Array, jax.Array], Any]:
    """x, weights, topk_idx -> what a case's dispatch, or `call`, returns."""

    def dispatch(x: jax.Array, weights: jax.Array, topk_idx: jax.Array) -> Any:
        return call(x, topk_idx, weights, **case.dispatch_options, wire=wire, mode=mode, num_sms=num_sms)

    return dispatch


def plain(recv: jax_ep.Dispatched) -> jax.Array:
    """The received rows, decoded."""
    return jax_ep.dequantize(recv.x) if isinstance(recv.x, jax_ep.Quantized) else recv.x


def experts(rows: jax.Array, group_sizes: jax.Array | None, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """Each expert's two matrices: of rows [C, H] grouped by expert, or of [E / R, expert_capacity, H]."""
    if rows.ndim == 3:
        return jnp.einsum("ecf,efh->ech", jax.nn.silu(jnp.einsum("ech,ehf->ecf", rows, w_in)), w_out)
    return lax.ragged_dot(jax.nn.silu(lax.ragged_dot(rows, w_in, group_sizes)), w_out, group_sizes)


def chain_of_layers(layer: Callable[..., jax.Array], gradient: bool) -> Callable[..., jax.Array]:
    """x, weights, routings, w_in, w_out -> one layer after the other, or the gradient of one after that of the other."""

    def forward(x: jax.Array, weights: jax.Array, routings: Sequence[jax.Array], *w: jax.Array) -> jax.Array:
        for topk_idx in routings:
            x = layer(x, weights, topk_idx, *w)
        return x

    def both(x: jax.Array, weights: jax.Array, routings: Sequence[jax.Array], *w: jax.Array) -> jax.Array:
        token = None
        for topk_idx in routings:
            idx = after(token, topk_idx)
            _, pull = jax.vjp(lambda x, weights, *w, idx=idx: layer(x, weights, idx, *w), x, weights, *w)
            x, *others = pull(x)
            token = sum(map(first, others), jnp.float32(0))
        return x + jnp.isnan(token).astype(x.dtype)

    return both if gradient else forward


def jax_ep_programs(
    setting: Setting, operations: Sequence[str], wire: str | None = None, mode: str = "auto", num_sms: int | None = None
) -> Iterator[Program]:
    """jax_ep's operations. The layers need rows by expert."""
    case = setting.case
    weighted = case.layout != "rank"
    dispatch = dispatch_of(case, wire, mode, num_sms)

    def dispatches(x: jax.Array, weights: jax.Array, routings: Sequence[jax.Array]) -> jax.Array:
        token = None
        for topk_idx in routings:
            recv, _ = dispatch(x, weights, after(token, topk_idx))
            token = first(recv.x)
        return token[None]

    def cached(x: jax.Array, handle: jax_ep.Handle) -> jax.Array:
        token = None
        for _ in range(setting.calls):
            token = first(jax_ep.dispatch_cached(x, after_handle(token, handle)))
        return token[None]

    def combines(y: jax.Array, handle: jax_ep.Handle, *gates: jax.Array) -> jax.Array:
        token = None
        for _ in range(setting.calls):
            token = first(jax_ep.combine(y, after_handle(token, handle), *gates))
        return token[None]

    def backwards(y: jax.Array, handle: jax_ep.Handle, gates: jax.Array, out_bar: jax.Array) -> jax.Array:
        """Of a weighted combine alone: its result is not asked for."""
        token = None
        for _ in range(setting.calls):
            after_this = after_handle(token, handle)
            _, pull = jax.vjp(lambda y, gates, h=after_this: jax_ep.combine(y, h, gates), y, gates)
            y_bar, gates_bar = pull(out_bar)
            token = first(y_bar) + first(gates_bar)
        return token[None]

    def pairs(x: jax.Array, weights: jax.Array, routings: Sequence[jax.Array]) -> jax.Array:
        for topk_idx in routings:
            recv, handle = dispatch(x, weights, topk_idx)
            x = jax_ep.combine(plain(recv), handle, recv.weights if weighted else None)
        return x

    def cached_pairs(x: jax.Array, handle: jax_ep.Handle, gates: jax.Array) -> jax.Array:
        for _ in range(setting.calls):
            x = jax_ep.combine(jax_ep.dispatch_cached(x, handle), handle, gates if weighted else None)
        return x

    def layer(x: jax.Array, weights: jax.Array, topk_idx: jax.Array, *w: jax.Array) -> jax.Array:
        recv, handle = dispatch(x, weights, topk_idx)
        return jax_ep.combine(experts(plain(recv), recv.group_sizes, *w), handle, recv.weights)

    x, weights, routings = setting.inputs()
    asked = [name for name in operations if name not in absent(case.layout, wire)]
    if "dispatch" in asked:
        yield "dispatch", setting.on_every_rank(dispatches), (x, weights, routings)
    if {"dispatch_cached", "combine", "combine_weighted", "combine_backward", "cached_pair"} & set(asked):
        one = setting.on_every_rank(dispatch)
        recv, handle = timing.compiled(one, x, weights, routings[0])(x, weights, routings[0])
        gates = recv.weights
        if "dispatch_cached" in asked:
            yield "dispatch_cached", setting.on_every_rank(cached), (x, handle)
        if "cached_pair" in asked:
            yield "cached_pair", setting.on_every_rank(cached_pairs), (x, handle, gates)
        y = jax.jit(setting.on_every_rank(plain))(recv)
        del recv
        if "combine" in asked:
            yield "combine", setting.on_every_rank(combines), (y, handle)
        if "combine_weighted" in asked:
            yield "combine_weighted", setting.on_every_rank(combines), (y, handle, gates)
        if "combine_backward" in asked:
            yield "combine_backward", setting.on_every_rank(backwards), (y, handle, gates, x)
        del y, handle, gates
    if "pair" in asked:
        yield "pair", setting.on_every_rank(pairs), (x, weights, routings)
    for name in ("moe", "moe_gradient"):
        if name in asked:
            run = setting.on_every_rank(chain_of_layers(layer, gradient=name == "moe_gradient"))
            yield name, run, (x, weights, routings, *setting.experts())


def absent(layout: str, wire: str | None) -> set[str]:
    """Operations that a layout or a wire format lacks."""
    lacking = {"combine_weighted", "combine_backward", "moe", "moe_gradient"} if layout == "rank" else set()
    if wire is not None:  # rows already in a format would travel, or the same as without it
        lacking |= {"dispatch_cached", "cached_pair", "combine", "combine_weighted", "combine_backward"}
    return lacking


def baseline_programs(setting: Setting, name: str, operations: Sequence[str]) -> Iterator[Program]:
    """A baseline's operations, those that it has."""
    parts = BASELINES[name](setting.case)

    def dispatches(x: jax.Array, routings: Sequence[jax.Array]) -> jax.Array:
        token = None
        for topk_idx in routings:
            rows, _ = parts.dispatch(x, after(token, topk_idx))
            token = first(rows)
        return token[None]

    def combines(y: jax.Array, state: Any) -> jax.Array:
        token = None
        for _ in range(setting.calls):
            token = first(parts.combine(y, after(token, state)))
        return token[None]

    def pairs(x: jax.Array, routings: Sequence[jax.Array]) -> jax.Array:
        for topk_idx in routings:
            x = parts.combine(*parts.dispatch(x, topk_idx))
        return x

    def layer(x: jax.Array, weights: jax.Array, topk_idx: jax.Array, *w: jax.Array) -> jax.Array:
        del weights
        rows, state = parts.dispatch(x, topk_idx)
        return parts.combine(experts(rows, parts.group_sizes(state), *w), state)

    x, weights, routings = setting.inputs()
    if "dispatch" in operations and parts.routed:
        yield "dispatch", setting.on_every_rank(dispatches), (x, routings)
    if "combine" in operations and parts.routed:
        yield "combine", setting.on_every_rank(combines), jax.jit(setting.on_every_rank(parts.dispatch))(x, routings[0])
    if "pair" in operations:
        yield "pair", setting.on_every_rank(pairs), (x, routings)
    for operation in ("moe", "moe_gradient"):
        if operation in operations and parts.group_sizes is not None:
            run = setting.on_every_rank(chain_of_layers(layer, gradient=operation == "moe_gradient"))
            yield operation, run, (x, weights, routings, *setting.experts())
