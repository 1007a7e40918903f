"""Batches of decode size: steps of several MoE layers, and a single call as a server meets it: its tail, after a pause, with a late rank.

    python -m benchmarks.decode --out benchmarks/results/h200x2-decode.json [--quick] [--budget-s 900]      # on a GPU machine
    python -m benchmarks.decode --cpu-devices 2 --tokens 4 2 --hidden 16                                    # the reference

step      router, dispatch, experts, combine, residual, several times, in one jit; and the same by XLA's collectives
programs  calls chained in one jit, from one program's end to the next's      calls  the same, a clock read on the device between two calls
idle      a program of one call after a pause                                 late   one rank spins before each call of a chain

Launched one by one and as a CUDA graph, in one process: that is an option of the compiler. What matters most comes first; what
--budget-s does not reach is recorded as skipped, what fails as failed. summary.py has the schema, clocks.py the kernels that read clocks
and spin. A chain's calls depend on each other as in programs.py, by a kernel of about 2 µs that is in `us`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import lax
from jax.sharding import NamedSharding

import jax_ep
from benchmarks import clocks, exchange, timing, traffic
from benchmarks.programs import Setting, after, after_handle, dispatch_of, experts, first, plain
from benchmarks.summary import NULLABLE

PARTS = ("programs", "step", "calls", "idle", "late")
MODES = ("low_latency", "high_throughput")
LAUNCHES: dict[bool, dict[str, Any]] = {  # graph or not
    False: {"xla_gpu_enable_command_buffer": ""},
    True: {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,COLLECTIVES",
        "xla_gpu_graph_min_graph_size": 1,
    },
}
COLLECTIVES = "all_gather+psum_scatter"
SIZES = {7168: ("deepseek-v3", 256, 8), 2880: ("gpt-oss-120b", 128, 4)}  # hidden: case, experts, choices
OTHERS = ("decode", 256, 8)
SMALL = 0.05  # scale of combine's rows: LogFMT-10 encodes only what is below 1
CALIBRATION = 200_000  # multiplications by which a rank is made late to see how long one takes

Row = dict[str, Any]
Layer = Callable[..., jax.Array]  # h [T, H], weights f32[T, K], topk_idx s32[T, K], w_in, w_out -> [T, H]
Measured = tuple[timing.Timing, Row]  # of one variant of a point, and more columns


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured together: one row, or several of one program."""

    part: str
    operation: str
    tokens: int
    hidden: int
    layout: str
    wire: str | None = None
    mode: str = "low_latency"
    graph: bool = True
    by: str = "jax_ep"


def plan(options: argparse.Namespace) -> list[Point]:
    """Around the first two numbers of tokens and the first hidden size; then the other tokens, then the other sizes. No point twice."""
    base = [(tokens, options.hidden[0]) for tokens in options.tokens[:2]]
    along = [(tokens, options.hidden[0]) for tokens in options.tokens[2:]]
    along += [(tokens, hidden) for hidden in options.hidden[1:] for tokens in options.tokens[:2]]
    graphs = [launch == "graph" for launch in options.launch]
    best, *other_modes = options.modes
    layout, *other_layouts = options.layouts
    three = (("dispatch", None), ("dispatch", "fp8"), ("combine", None))
    two = (("dispatch", None), ("combine", None))

    def calls(part: str, sizes: Any, operations: Any = three, layout: str = layout, mode: str = best) -> list[Point]:
        return [Point(part, name, *size, layout, wire, mode, graphs[0]) for size in sizes for name, wire in operations]

    def steps(sizes: Any, modes: Sequence[str], layout: str = options.step_layouts[0]) -> list[Point]:
        points = itertools.product(modes, sizes, graphs)
        return [Point("step", "step", *size, layout, None, mode, graph) for mode, size, graph in points]

    def baseline(sizes: Any) -> list[Point]:
        points = itertools.product(sizes, graphs)
        return [Point("step", "step", *size, "batched", None, "", graph, COLLECTIVES) for size, graph in points]

    points = [
        *calls("programs", base),
        *steps(base, [best]),
        *calls("calls", base[:1]),
        *calls("idle", base[:1], two),
        *calls("late", base[:1], two),
        *steps(base[:1], other_modes),
        *baseline(base[:1]),
        *calls("calls", base[1:]),
        *calls("late", base[1:], two),
    ]
    if not options.quick:
        logfmt10 = (("combine", "logfmt10"),)
        points += [point for part in ("programs", "calls") for point in calls(part, base, logfmt10)]
        points += [*calls("programs", along), *steps(along, [best]), *calls("idle", base[1:], two)]
        points += [point for other in options.step_layouts[1:] for point in steps(base, options.modes, other)]
        points += [*steps(base[1:], other_modes), *baseline(base[1:]), *steps(along, other_modes), *baseline(along)]
        points += [point for mode in other_modes for point in calls("programs", base, mode=mode)]
        for other in other_layouts:
            points += [*calls("programs", base, (*three, *logfmt10), other), *calls("calls", base, three, other)]
        points += [*calls("programs", along, logfmt10), *calls("calls", along)]
    clocked = options.clock is not None or options.cpu_devices is None  # on GPUs a clock that is not there is a failure
    return [
        point for point in dict.fromkeys(points) if point.part in options.parts and (point.part != "calls" or clocked)
    ]


# ---- what points share -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def setting_of(case: Case, calls: int) -> Setting:
    """With a routing for each of the most calls that a program has."""
    return Setting.of(case, calls)


@functools.lru_cache(maxsize=2)
def inputs_of(case: Case, calls: int) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Its x, weights and routings."""
    return setting_of(case, calls).inputs()


@functools.lru_cache(maxsize=2)
def received(case: Case, calls: int, layout: str, mode: str) -> tuple[jax.Array, jax_ep.Handle, jax.Array | None]:
    """Arguments of a combine: rows, handle, gates."""
    setting = setting_of(case, calls).in_layout(layout)
    dispatch = dispatch_of(setting.case, None, mode)

    def rows(*args: jax.Array) -> tuple[jax.Array, jax_ep.Handle, jax.Array | None]:
        recv, handle = dispatch(*args)
        return recv.x * jnp.asarray(SMALL, recv.x.dtype), handle, None if layout == "rank" else recv.weights

    x, weights, routings = inputs_of(case, calls)
    return jax.jit(setting.on_every_rank(rows))(x, weights, routings[0])


@functools.lru_cache(maxsize=1)
def matrices(hidden: int, inner: int, num_experts: int, num_ranks: int) -> tuple[jax.Array, jax.Array]:
    """Of the experts of a step, the same ones in each of its layers."""
    return Setting.of(Case("", 1, hidden, 1, num_experts, num_ranks), expert_hidden=inner).experts()


def case_of(point: Point, options: argparse.Namespace) -> Case:
    """Its sizes, in the layout "expert"."""
    name, num_experts, num_topk = SIZES.get(point.hidden, OTHERS)
    experts, topk = options.experts or num_experts, options.topk or num_topk
    return Case(name, point.tokens, point.hidden, topk, experts, options.ranks or jax.device_count())


def setting_at(point: Point, options: argparse.Namespace) -> Setting:
    """Where a point is measured, with as many routings as its program has calls."""
    setting = setting_of(case_of(point, options), options.calls)
    number = {"idle": 1, "step": options.layers}.get(point.part, options.calls)
    if point.part == "step":
        return dataclasses.replace(with_room(setting, point.layout), topk_idx=setting.topk_idx[[0] * number])
    return dataclasses.replace(setting.in_layout(point.layout), topk_idx=setting.topk_idx[:number])


def with_room(setting: Setting, layout: str) -> Setting:
    """For what routers send that choose like a uniform draw: five deviations more than the mean, at least 1.25 times."""
    case = setting.case

    def room(mean: float, most: int) -> int:
        return min(most, math.ceil(max(traffic.HEADROOM * mean, mean + 5 * math.sqrt(mean) + 1)))

    everyones = case.num_ranks * case.num_tokens
    if layout == "batched":
        rows = {"expert_capacity": room(everyones * case.num_topk / case.num_experts, everyones)}
    else:
        rows = {"max_recv_tokens": room(case.num_tokens * case.num_topk, everyones * case.num_topk)}
    layer = dataclasses.replace(case, layout=layout, max_recv_tokens=None, expert_capacity=None)
    return dataclasses.replace(setting, case=dataclasses.replace(layer, **rows))


# ---- programs --------------------------------------------------------------------------------------------------------


def ended(token: jax.Array, clocked: bool) -> jax.Array:
    """[1] of a rank, there when token is: the device's clock, or token where it has none."""
    return clocks.now(token[None])[1] if clocked else token[None]


def chain(
    call: Callable[..., jax.Array], calls: int, clocked: bool, each: bool = False, late_on: str | None = None
) -> Callable[[tuple[Any, ...], jax.Array], jax.Array]:
    """(args, counts s32[1]) -> when its end was there, [1]; with `each` also when each call began, [calls + 1].

    call: token f32[], i, *args -> token. late_on: the platform on which the rank spins counts times before each call.
    """

    def f(args: tuple[Any, ...], counts: jax.Array) -> jax.Array:
        token, times = first(args[0]), []
        for i in range(calls):
            if late_on:
                token = clocks.spin(token[None], counts, late_on)[0]
            if each:
                (token,), began = clocks.now(token[None])
                times.append(began)
            token = call(token, i, *args)
        return jnp.concatenate([*times, ended(token, clocked)])

    return f


def nothing(token: jax.Array, i: int, *args: Any) -> jax.Array:
    """In the place of a call."""
    del i, args
    return token


def call_of(point: Point, setting: Setting, options: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """One call of a chain, and the chain's arguments."""
    of = case_of(point, options), options.calls
    if point.operation == "combine":

        def combine(token: jax.Array, i: int, y: jax.Array, handle: jax_ep.Handle, gates: Any) -> jax.Array:
            del i
            return first(jax_ep.combine(y, after_handle(token, handle), gates, wire=point.wire))

        return combine, received(*of, point.layout, point.mode)
    dispatch = dispatch_of(setting.case, point.wire, point.mode)

    def dispatched(token: jax.Array, i: int, x: jax.Array, weights: jax.Array, routings: Any) -> jax.Array:
        return first(dispatch(x, weights, after(token, routings[i]))[0].x)

    x, weights, routings = inputs_of(*of)
    return dispatched, (x, weights, routings[: setting.calls])


def ours(case: Case, mode: str) -> Layer:
    """A layer by dispatch and combine."""
    dispatch = dispatch_of(case, None, mode)

    def layer(h: jax.Array, weights: jax.Array, topk_idx: jax.Array, *w: jax.Array) -> jax.Array:
        recv, handle = dispatch(h, weights, topk_idx)
        return jax_ep.combine(experts(plain(recv), recv.group_sizes, *w), handle, recv.weights)

    return layer


def by_collectives(case: Case) -> Layer:
    """The same by XLA's collectives: every token to every rank, which keeps the rows of its experts; back as a sum over ranks."""
    local, capacity = case.num_local_experts, case.expert_capacity

    def layer(h: jax.Array, weights: jax.Array, topk_idx: jax.Array, *w: jax.Array) -> jax.Array:
        rows, gates, idx = (lax.all_gather(array, case.axis_name, tiled=True) for array in (h, weights, topk_idx))
        expert = idx.reshape(-1) - lax.axis_index(case.axis_name) * local
        chosen = jax.nn.one_hot(expert, local, dtype=jnp.int32)
        place = ((jnp.cumsum(chosen, axis=0) - 1) * chosen).sum(axis=1)
        expert = jnp.where((expert >= 0) & (expert < local) & (place < capacity), expert, local)
        token = jnp.arange(expert.size) // case.num_topk
        batches = jnp.zeros((local, capacity, case.hidden), h.dtype).at[expert, place].set(rows[token], mode="drop")
        y = experts(batches, None, *w).at[expert, place].get(mode="fill", fill_value=0)
        sums = (y.astype(jnp.float32) * gates.reshape(-1, 1)).reshape(*idx.shape, -1).sum(axis=1)
        return lax.psum_scatter(sums.astype(h.dtype), case.axis_name, tiled=True)

    return layer


def step(case: Case, layer: Layer) -> Callable[..., jax.Array]:
    """x [T, H], routers [layers, H, E], w_in, w_out -> [T, H]."""

    def f(x: jax.Array, routers: jax.Array, *w: jax.Array) -> jax.Array:
        for router in routers:
            wide = x.astype(jnp.float32)
            h = (wide * lax.rsqrt(jnp.mean(wide**2, axis=1, keepdims=True) + 1e-6)).astype(x.dtype)
            weights, topk_idx = lax.top_k(jax.nn.softmax((h @ router).astype(jnp.float32)), case.num_topk)
            x += layer(h, weights / weights.sum(axis=1, keepdims=True), topk_idx, *w)
        return x

    return f


def repeatable(of_x: Callable[..., jax.Array], clocked: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A step whose result is x itself, once all of its own is there: it runs again and again in the same memory, on the same numbers."""

    def f(x: jax.Array, *params: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = of_x(x, *params)
        return jnp.where(jnp.isnan(y), y, x), ended(first(y), clocked)

    return f


# ---- measuring -------------------------------------------------------------------------------------------------------


def queued(launch: Callable[[], jax.Array], count: int, ahead: int, budget_s: float) -> np.ndarray:
    """Seconds from each program's end to the next one's, while `ahead` more are queued; the slowest rank's where devices tell the time.

    launch: launches a program and returns its `ended`, [R].
    """
    waiting: collections.deque[jax.Array] = collections.deque()
    results, ends, launched = [], [], 0
    start = time.perf_counter()
    while waiting or launched < count:
        while launched < count and len(waiting) <= ahead:
            waiting.append(launch())
            launched += 1
        results.append(jax.block_until_ready(waiting.popleft()))
        ends.append(time.perf_counter())
        if ends[-1] - start > budget_s and len(ends) > ahead + 3:
            count = launched
    between = np.diff(ends)
    if results[0].dtype == jnp.int32:
        between = ticks([np.asarray(result) for result in results])
    return between[ahead:]


def ticks(reads: Sequence[np.ndarray]) -> np.ndarray:
    """f64[N - 1] seconds between successive reads of the devices' clocks, s32[R] each, that of the slowest rank."""
    return np.diff(np.stack(reads).view(np.uint32), axis=0).max(axis=1) * 1e-9  # modulo 2**32 ns


def launched(f: Any, setting: Setting, graph: bool, **jit: Any) -> Any:
    """`f` of every rank, ready to be compiled when it is called first."""
    return jax.jit(setting.on_every_rank(f, check_vma=False), compiler_options=LAUNCHES[graph], **jit)


def counts_of(setting: Setting, late: int = 0) -> jax.Array:
    """s32[R]: how often each rank spins; the last is the late one."""
    counts = np.zeros(setting.case.num_ranks, np.int32)
    counts[-1] = late
    return jax.device_put(counts, NamedSharding(setting.mesh, jax.P(setting.case.axis_name)))


def warmed(launch: Callable[[], Any]) -> Callable[[], Any]:
    """Compiled, and its graph captured."""
    for _ in range(3):
        jax.block_until_ready(launch())
    return launch


def measure_programs(point: Point, setting: Setting, options: argparse.Namespace) -> Iterator[Measured]:
    """Of a chain, per call."""
    call, args = call_of(point, setting, options)
    run = launched(chain(call, setting.calls, options.clock is not None), setting, point.graph)
    counts = counts_of(setting)
    between = queued(warmed(lambda: run(args, counts)), options.programs, options.ahead, options.case_budget_s)
    of = f"means of the {setting.calls} calls of a program, from the end of one program to that of the next, {options.ahead} more queued"
    yield timing.Timing.of(between / setting.calls), {"of": of, "clock": options.clock or "host"}


@functools.lru_cache(maxsize=2)
def us_of_a_read(case: Case, graph: bool, calls: int) -> float:
    """What a read of the clock takes between two others."""
    setting = setting_of(case, calls)
    run = launched(chain(nothing, calls, clocked=True, each=True), setting, graph)
    x, counts = inputs_of(case, calls)[:1], counts_of(setting)
    reads = [np.asarray(run(x, counts)).reshape(case.num_ranks, -1) for _ in range(20)][3:]
    return float(np.median(np.diff(np.stack(reads).view(np.uint32), axis=2)) * 1e-3)


def measure_calls(point: Point, setting: Setting, options: argparse.Namespace) -> Iterator[Measured]:
    """Each call by itself, by the devices' clocks; the first of a program waits for ranks that begin late, and is left out."""
    if options.clock is None:
        raise NotImplementedError("the clock of these devices cannot be read inside jit")
    call, args = call_of(point, setting, options)
    run = launched(chain(call, setting.calls, clocked=True, each=True), setting, point.graph)
    counts, ranks = counts_of(setting), setting.case.num_ranks
    warmed(lambda: run(args, counts))
    us = us_of_a_read(case_of(point, options), point.graph, options.calls)
    results: list[jax.Array] = []
    start, enough = time.perf_counter(), math.ceil(options.most_calls / max(setting.calls - 1, 1))
    while len(results) < enough and (len(results) < 3 or time.perf_counter() - start < options.case_budget_s):
        results += jax.block_until_ready([run(args, counts) for _ in range(1 + options.ahead)])
    reads = [np.asarray(result).reshape(ranks, -1).T for result in results]  # [calls + 1, R] each
    seconds = np.concatenate([ticks(of_program[1:]) for of_program in reads])
    of = f"single calls, between two reads of the device's clock, the slowest rank of each, less {us:.2f} µs that a read takes"
    yield timing.Timing.of(seconds - us * 1e-6), {"of": of, "clock": options.clock}


def measure_idle(point: Point, setting: Setting, options: argparse.Namespace) -> Iterator[Measured]:
    """A program of one call, after each pause."""
    call, args = call_of(point, setting, options)
    clocked = options.clock is not None
    run = launched(chain(call, 1, clocked, each=clocked), setting, point.graph)
    counts, ranks = counts_of(setting), setting.case.num_ranks
    launch = warmed(lambda: run(args, counts))
    for idle_ms in options.idle_ms:
        most = int(options.case_budget_s * 1000 / idle_ms) if idle_ms else options.samples
        results, columns = waited(launch, max(3, min(options.samples, most)), idle_ms * 1e-3)
        columns["of"] = "programs of one call, launched after a pause and waited for, JAX's dispatch included"
        if clocked:
            reads = np.stack([np.asarray(result).reshape(ranks, 2) for result in results]).view(np.uint32)
            own = np.diff(reads, axis=2).min(axis=1)[:, 0] * 1e-9  # who begins last waits for nobody
            read_us = us_of_a_read(case_of(point, options), point.graph, options.calls)
            columns["device_us"], columns["device_p99_us"] = _median_and_p99(own - read_us * 1e-6)
        yield columns.pop("waited"), columns | {"clock": "host", "idle_ms": idle_ms}


def waited(launch: Callable[[], Any], samples: int, pause_s: float = 0, budget_s: float = math.inf) -> tuple[Any, Row]:
    """The results, and columns of programs that are launched one at a time: until the call returns, until all devices are done."""
    results, returned, done = [], [], []
    began = time.perf_counter()
    while len(done) < samples and (len(done) < 3 or time.perf_counter() - began < budget_s):
        if pause_s:
            time.sleep(pause_s)
        start = time.perf_counter()
        result = launch()
        returned.append(time.perf_counter() - start)
        results.append(jax.block_until_ready(result))
        done.append(time.perf_counter() - start)
    columns: Row = {"waited": timing.Timing.of(done)}
    columns["host_us"], columns["host_p99_us"] = _median_and_p99(returned)
    columns["waited_us"], columns["waited_p99_us"] = columns["waited"].median, columns["waited"].p99
    return results, columns


def _median_and_p99(seconds: Sequence[float] | np.ndarray) -> tuple[float, float]:
    of = timing.Timing.of(seconds)
    return of.median, of.p99


def measure_late(point: Point, setting: Setting, options: argparse.Namespace) -> Iterator[Measured]:
    """A chain whose last rank spins before each call, less the same without the calls; not late at all first."""
    call, args = call_of(point, setting, options)
    calls, clocked, platform = setting.calls, options.clock is not None, setting.mesh.devices.flat[0].platform
    with_calls, without = (
        launched(chain(f, calls, clocked, late_on=platform), setting, point.graph) for f in (call, nothing)
    )

    def took(run: Any, args: Any, late: int) -> np.ndarray:
        counts, programs = counts_of(setting, late), max(options.programs // 5, 5)
        budget_s = options.case_budget_s / 3
        return queued(warmed(lambda: run(args, counts)), programs, options.ahead, budget_s) / calls

    even = float(np.median(took(without, args[:1], 0)))
    each = (float(np.median(took(without, args[:1], CALIBRATION))) - even) / CALIBRATION
    for late_us in options.late_us:
        late = round(late_us * 1e-6 / each) if late_us and each > 0 else 0
        alone = float(np.median(took(without, args[:1], late))) if late else even
        both = took(with_calls, args, late)
        of = f"means of the {calls} calls of a program, the slowest rank's, less {alone * 1e6:.2f} µs that spinning alone takes a call"
        columns = {"of": of, "clock": options.clock or "host", "delay_us": round((alone - even) * 1e6, 2)}
        yield timing.Timing.of(both - alone), columns


def measure_step(point: Point, setting: Setting, options: argparse.Namespace) -> Iterator[Measured]:
    """Queued, and one at a time."""
    case = setting.case
    layer = ours(case, point.mode) if point.by == "jax_ep" else by_collectives(case)
    f = repeatable(step(case, layer), options.clock is not None)
    run = launched(f, setting, point.graph, donate_argnums=0)
    x = jnp.copy(inputs_of(case_of(point, options), options.calls)[0])
    routers = setting.normal(6, (options.layers, case.hidden, case.num_experts), x.dtype, case.hidden**-0.5)
    w = matrices(case.hidden, options.expert_hidden, case.num_experts, case.num_ranks)

    def launch() -> jax.Array:
        nonlocal x
        x, end = run(x, routers, *w)
        return end

    warmed(launch)
    between = queued(launch, options.steps, options.ahead, options.case_budget_s)
    _, columns = waited(launch, options.samples, budget_s=options.case_budget_s / 2)
    del columns["waited"]
    of = f"steps of {options.layers} layers, from the end of one to that of the next, {options.ahead} more queued"
    yield timing.Timing.of(between), columns | {"of": of, "clock": options.clock or "host"}


MEASURES = {
    "programs": measure_programs,
    "calls": measure_calls,
    "idle": measure_idle,
    "late": measure_late,
    "step": measure_step,
}


# ---- rows ------------------------------------------------------------------------------------------------------------


def measure(point: Point, options: argparse.Namespace) -> Iterator[Row]:
    """A point's rows, as they are measured; those that do not come say why."""
    setting = setting_at(point, options)
    names = {"idle": [{"idle_ms": ms} for ms in options.idle_ms], "late": [{"delay_us": us} for us in options.late_us]}
    expected: list[Row] = names.get(point.part, [{}])
    done = 0
    error = f"skipped: --budget-s {options.budget_s:g} is over" if time.monotonic() > options.deadline else None
    if error is None:
        try:
            for took, columns in MEASURES[point.part](point, setting, options):
                yield row(point, setting, options, took, None, columns)
                done += 1
        except Exception as failure:  # one program that fails does not end the others
            lines = str(failure).splitlines() or [""]
            error = f"failed: {type(failure).__name__}: {lines[0][:300]}"
    for columns in expected[done:]:
        yield row(point, setting, options, None, error, columns)


def row(
    point: Point,
    setting: Setting,
    options: argparse.Namespace,
    took: timing.Timing | None,
    error: str | None,
    more: Row,
) -> Row:
    """What is recorded of a measurement."""
    with_ceiling = options.ceiling and point.part in ("programs", "calls")
    made = exchange.row(
        setting, point.operation, point.by, point.wire, took, error, None, point.mode, point.graph, with_ceiling
    )
    of_step = point.part == "step"
    levels = {"level": "program" if of_step or point.part == "idle" else "jit", "part": point.part}
    step_columns = {"layers": options.layers, "expert_hidden": options.expert_hidden, "calls": 1} if of_step else {}
    return dict.fromkeys(NULLABLE) | made | levels | step_columns | more


COLUMNS = ("operation", "by", "us", "p10", "p99", "host", "waited", "device")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line a row."""

    def number(row: Row, key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.1f}"

    lines = []
    for row in rows:
        mode = None if row["mode"] in ("reference", None) else row["mode"]
        pause = row["idle_ms"] is not None and f"after {row['idle_ms']:g} ms"
        late = row["delay_us"] is not None and f"one rank {row['delay_us']:g} µs late"
        graph = "graph" if row["graph"] else None
        by = ", ".join(filter(None, (row["by"], row["layout"], row["wire"], mode, graph, pause, late)))
        what = f"{row['operation']} ({row['part']})" if row["part"] != row["operation"] else row["operation"]
        numbers = [number(row, key) for key in ("us", "p10_us", "p99_us", "host_us", "waited_us", "device_us")]
        lines.append((what, by, row["error"] or numbers[0], *numbers[1:]))
    return lines


def show(rows: Sequence[Row]) -> None:
    """Prints a table for each size."""
    print(rows[0]["machine"] if rows else "nothing was measured")
    keys = ("case", "ranks", "tokens", "hidden", "topk", "experts")
    for size in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of_size = [row for row in rows if tuple(row[key] for key in keys) == size]
        heading = ", ".join(f"{value} {key}" for key, value in zip(keys[1:], size[1:], strict=True))
        exchange.draw(f"{size[0]}: {heading}; µs", table(of_size), COLUMNS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with what --quick and CPUs change."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split(":", maxsplit=1)[0])
    add = parser.add_argument
    add("--out", help="JSON file to write the rows to, as they come")
    add("--quick", action="store_true", help="the first sizes alone, fewer pauses; --budget-s 85")
    add("--budget-s", type=float, help="seconds after which nothing new is begun (default 900)")
    add("--case-budget-s", type=float, help="seconds for the samples of a row (default 3, quick 1)")
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add(
        "--tokens", nargs="+", type=int, default=[128, 1, 8, 32, 64, 256, 512], help="a rank; the first two matter most"
    )
    add("--hidden", nargs="+", type=int, default=[7168, 2048, 2880, 4096], help="the first matters most")
    add("--experts", type=int, help="default: 256; 128 where hidden is 2880")
    add("--topk", type=int, help="default: 8; 4 where hidden is 2880")
    add("--ranks", type=int, help="default: all devices")
    add("--layouts", nargs="+", default=["rank", "expert", "batched"], choices=exchange.LAYOUTS)
    add("--step-layouts", nargs="+", default=["batched", "expert"], choices=["batched", "expert"])
    add("--modes", nargs="+", default=MODES, choices=exchange.MODES)
    add(
        "--launch", nargs="+", choices=["graph", "stream"], help="default: both on GPUs; chains of calls take the first"
    )
    add("--layers", type=int, help="of a step (default 4, on CPU 2)")
    add("--expert-hidden", type=int, help="inner width of a step's experts (default 128, on CPU 16)")
    add("--calls", type=int, help="chained in one program (default 32, on CPU 2)")
    add("--programs", type=int, help="of a chain (default 1000, on CPU 5)")
    add("--most-calls", type=int, default=12_800, help="that are timed one by one (default 12800)")
    add("--steps", type=int, help="queued (default 1000, on CPU 5)")
    add("--samples", type=int, help="of programs that are waited for (default 300, on CPU 5)")
    add("--ahead", type=int, help="programs queued behind the one that is waited for (default 4, on CPU 1)")
    add("--idle-ms", nargs="+", type=float, default=[0, 10, 1000], help="pauses (default 0 10 1000)")
    add("--late-us", nargs="+", type=float, default=[0, 20], help="by which a rank is late (default 0 20)")
    add("--no-ceiling", dest="ceiling", action="store_false", help="do not measure what the links give")
    add("--cpu-devices", type=int, help="run on this many virtual CPU devices")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.hidden, options.ceiling = options.tokens[:2], options.hidden[:1], False
    if options.budget_s is None:
        options.budget_s = 85 if options.quick else 900
    if options.case_budget_s is None:
        options.case_budget_s = 1 if options.quick else 3
    options.deadline = time.monotonic() + options.budget_s
    return options


def settle(options: argparse.Namespace) -> None:
    """What depends on the devices, once jax has them."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    both = (
        ("layers", 4, 2), ("expert_hidden", 128, 16), ("calls", 32, 2), ("programs", 1000, 5), ("steps", 1000, 5),
        ("samples", 300, 5), ("ahead", 4, 1), ("launch", ["graph", "stream"], ["stream"]),
    )  # fmt: skip
    for name, of_gpus, of_cpus in both:
        if getattr(options, name) is None:
            setattr(options, name, of_cpus if on_cpu else of_gpus)
    if on_cpu:
        options.cpu_devices, options.modes = jax.device_count(), options.modes[:1]
    nanoseconds = clocks.resolution_ns(device)
    options.clock = nanoseconds and f"the device's, in steps of {nanoseconds} ns"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and records where --out says."""
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    settle(options)
    rows: list[Row] = []
    for point in plan(options):
        for measured in measure(point, options):
            rows.append(measured)
            if options.out:
                timing.write(options.out, rows)
            (line,) = table([measured])
            print(f"{point.tokens} x {point.hidden}", *line[:3], file=sys.stderr, flush=True)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
