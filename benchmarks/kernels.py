"""The kernels alone, without XLA: a sweep around base points, one axis varied at a time, as JSON. One command on a GPU machine:

    python -m benchmarks.kernels --out benchmarks/results/h200x2-kernels.json [--quick] [--budget-s 900]

Builds kernels.cu and p2p_ceiling.cu with nvcc, measures the push ceiling at each SM count and row size, then each point: every rank a
stream and a host thread, calls back to back between two events, slowest rank, median of the repeats, random routing of its own.
A point that fails is recorded as failed, what the time does not reach as skipped. traffic.py counts bytes, summary.py has the schema.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import MODELS, Case

from benchmarks import ROOT, native, timing, traffic

Row = dict[str, Any]

MODEL_CASES = {case.name.split("/")[0]: case for case in MODELS}
LAYOUTS = ("rank", "expert", "batched")
OPERATIONS = ("dispatch", "dispatch_quantized", "dispatch_cached", "combine", "combine_weighted", "combine_grad")
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SMS = (4, 8, 12, 16, 20, 24, 32, 64)
QUICK = {"tokens": (1, 128, 1024, 8192), "sms": (12, 64)}
QUICK_LOW_LATENCY = ("sms", "tokens", "graph")  # axes
MODES = ("high_throughput", "low_latency")
DECODE, MOST_LOW_LATENCY = 128, 1024  # tokens at the low-latency kernels' base, and the most that they are asked for
AXES = ("sms", "tokens", "model", "wire", "routing", "graph")


@dataclasses.dataclass(frozen=True)
class Point:
    """What one row of times is measured at."""

    ranks: int
    layout: str
    tokens: int
    model: str = "deepseek-v3"
    sms: int = 24
    mode: str = "high_throughput"
    wire: str | None = None
    routing: str = "uniform"
    graph: bool = False

    @property
    def case(self) -> Case:
        """Its sizes; capacities are not in it."""
        return dataclasses.replace(
            MODEL_CASES[self.model], name=self.model, num_tokens=self.tokens, num_ranks=self.ranks, layout=self.layout
        )

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of the rows and of the scales beside them."""
        rows = self.case.hidden if self.wire else traffic.row_bytes(self.case, None)
        return rows, traffic.row_bytes(self.case, self.wire) - rows

    def operations(self, asked: Sequence[str]) -> list[str]:
        """Those that differ at this point: the way back has no wire, rows of "rank" no gates, low latency no combine_grad.

        With a wire dispatch makes values and scales of bf16 rows itself, dispatch_quantized gets them.
        """
        none = {"combine", "combine_weighted", "combine_grad"} if self.wire else {"dispatch_quantized"}
        if self.layout == "rank":
            none |= {"combine_weighted", "combine_grad"}
        if self.mode == "low_latency":
            none.add("combine_grad")
        return [name for name in asked if name not in none]


def plan(options: argparse.Namespace, num_gpus: int) -> list[Point]:
    """Base points first, then each axis around them; no point twice. The low-latency kernels have one base, a decode step."""
    ranks = options.ranks or [num_gpus]
    bases = [Point(of, layout, tokens) for of in ranks for tokens in options.bases for layout in options.layouts]
    decode = [Point(of, layout, DECODE) for of in ranks for layout in options.layouts]
    values: dict[str, Sequence[Any]] = {
        "sms": options.sms,
        "tokens": options.tokens,
        "model": options.models,
        "wire": (None, *options.wires),
        "routing": traffic.ROUTINGS,
        "graph": (False, True),
    }
    few = {**values, "tokens": [tokens for tokens in options.tokens if tokens <= MOST_LOW_LATENCY]}
    points: list[Point] = []
    for mode, around, along, axes in (
        ("high_throughput", bases, values, options.axes),
        ("low_latency", decode, few, [axis for axis in options.axes if not options.quick or axis in QUICK_LOW_LATENCY]),
    ):
        if mode in options.modes:
            at = [dataclasses.replace(base, mode=mode, sms=options.base_sms) for base in around]
            points += at
            points += [dataclasses.replace(base, **{axis: x}) for axis in axes for x in along[axis] for base in at]
    return list(dict.fromkeys(points))


# ---- one point -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the program says of the GPUs."""

    gpus: tuple[str, ...]
    multiprocessors: int

    @classmethod
    def of(cls, hello: dict[str, Any]) -> Machine:
        """From kernels.cu's first line."""
        return cls(tuple(hello["gpus"]), hello["multiprocessors"])

    def __str__(self) -> str:
        return f"{len(self.gpus)} x {self.gpus[0]}"

    def gpu_of(self, rank: int) -> int:
        """As ranks.h places them."""
        return rank % len(self.gpus)

    def refuses(self, point: Point) -> str | None:
        """Why a point cannot be measured here."""
        sharing = -(-point.ranks // len(self.gpus))
        if point.case.num_experts % point.ranks:
            return f"skipped: {point.case.num_experts} experts on {point.ranks} ranks"
        if sharing * point.sms > self.multiprocessors:  # blocks that wait for each other must be resident together
            return f"skipped: {sharing} x {point.sms} SMs of a GPU that has {self.multiprocessors}"
        return None

    def crossing(self, point: Point, topk_idx: np.ndarray) -> np.ndarray:
        """s64[G, G]: rows from each GPU to each other one."""
        rows = traffic.rows_crossing(point.case, topk_idx)
        gpus = min(len(self.gpus), point.ranks)
        between = np.zeros((gpus, gpus), np.int64)
        owner = np.array([self.gpu_of(rank) for rank in range(point.ranks)])
        np.add.at(between, (owner[:, None], owner[None, :]), rows)
        np.fill_diagonal(between, 0)
        return between


def request(point: Point, operations: Sequence[str], capacity: Row, calls: int, repeats: int, routing: Path) -> str:
    """The line that kernels.cu reads."""
    case, (row_bytes, second_bytes) = point.case, point.row_bytes
    expert_capacity = capacity["expert_capacity"] or 0
    rows = capacity["max_recv_tokens"] or case.num_local_experts * expert_capacity
    sizes = (point.ranks, point.tokens, case.num_topk, case.num_experts, rows, expert_capacity, row_bytes, second_bytes)
    numbers = (*sizes, point.wire or "none", point.sms, calls, repeats, int(point.graph))
    return f"{point.mode} {','.join(operations)} {point.layout} {' '.join(map(str, numbers))} {routing}"


def ceiling_of(point: Point, gigabytes: dict[tuple[int, int], float], row_bytes: int) -> traffic.Ceiling | None:
    """The push ceiling with the point's SMs and rows of about this size; None where no link was measured."""
    sizes = [row for sms, row in gigabytes if sms == point.sms]
    if not sizes:
        return None
    nearest = min(sizes, key=lambda row: abs(row - row_bytes))
    name = f"push, {point.sms} SMs, rows of {nearest} bytes"
    return traffic.Ceiling(name, gigabytes[point.sms, nearest] * 1e9, shared=False)


def row(
    point: Point, operation: str, machine: Machine, timed: timing.Timing | None, error: str | None,
    crossing: np.ndarray | None, gigabytes: dict[tuple[int, int], float],
) -> Row:  # fmt: skip
    """What is recorded of a point's operation."""
    case, goes_out = point.case, operation.startswith("dispatch") or operation == "combine_grad"
    row_bytes = traffic.row_bytes(case, point.wire if goes_out else None)
    ceiling = ceiling_of(point, gigabytes, row_bytes)
    moved = None if crossing is None else (crossing if goes_out else crossing.T).astype(np.float64) * row_bytes
    ceiling_us = ceiling.us(moved) if ceiling and moved is not None else None
    return {
        "case": case.name,
        "operation": operation,
        "level": "kernel",
        "by": "jax_ep",
        "layout": point.layout,
        "wire": point.wire,
        "mode": point.mode,
        "routing": point.routing,
        "dtype": case.dtype,
        "tokens": point.tokens,
        "hidden": case.hidden,
        "topk": case.num_topk,
        "experts": case.num_experts,
        "ranks": point.ranks,
        "processes": 1,
        "gpus": min(point.ranks, len(machine.gpus)),
        "sms": point.sms,
        "graph": point.graph,
        **(timed.columns if timed else {"us": None}),
        "crossing_bytes": None if moved is None else int(moved.sum()),
        "ceiling": ceiling and f"{ceiling.name}, {ceiling.bytes_per_second / 1e9:.1f} GB/s",
        "ceiling_us": round(ceiling_us, 3) if ceiling_us else None,
        "ratio": round(timed.median / ceiling_us, 3) if timed and ceiling_us else None,
        "error": error,
        **timing.origin(str(machine)),
    }


def measure(
    program: native.Program, points: Sequence[Point], options: argparse.Namespace, gigabytes: Row, deadline: float
) -> Iterator[list[Row]]:
    """A point's rows, as they are measured. `gigabytes`: for each number of GPUs what p2p_ceiling.cu found."""
    machine = Machine.of(program.hello)
    more = {"cuda": {name: program.hello[name] for name in ("driver", "runtime")}}
    longest, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        routing = Path(folder) / "routing"
        for seed, point in enumerate(points):
            began = time.monotonic()
            announce(point, began - started)
            operations = point.operations(options.operations)
            answer: dict[str, list[float]] = {}
            crossing, sizes = None, {}
            error = machine.refuses(point)
            if error is None and began + longest > deadline:
                error = f"skipped: --budget-s {options.budget_s:g} is over"
            if error is None:
                topk_idx = traffic.draw_routing(point.case, point.routing, seed)
                routing.write_bytes(topk_idx.tobytes())
                crossing, sizes = machine.crossing(point, topk_idx), traffic.capacities(point.case, topk_idx)
                line = request(point, operations, sizes, options.calls, options.repeats, routing)
                try:
                    answer = program.ask(line, options.case_timeout)
                except native.Failure as failure:
                    error = f"failed: {failure}"
                longest = max(longest, time.monotonic() - began)
            times = {name: timing.Timing.of(np.array(us) * 1e-6) for name, us in answer.items()}
            links = gigabytes.get(min(point.ranks, len(machine.gpus)), {})
            yield [
                row(point, name, machine, times.get(name), error, crossing, links) | sizes | more for name in operations
            ]


def announce(point: Point, seconds: float) -> None:
    """Begins a point's line on standard error before it is measured: who is cut off has said where."""
    keys = ("mode", "model", "layout", "ranks", "tokens", "sms", "wire", "routing", "graph")
    what = " ".join(f"{key} {getattr(point, key)}" for key in keys)
    print(f"{seconds:6.1f} s  {what}:", end=" ", file=sys.stderr, flush=True)


def show(rows: Sequence[Row]) -> None:
    """Ends the line: µs and share of the ceiling."""
    told = (
        row["error"] or f"{row['operation']} {row['us']:.1f}" + (f" ({1 / row['ratio']:.2f})" if row["ratio"] else "")
        for row in rows
    )
    print(", ".join(dict.fromkeys(told)), file=sys.stderr, flush=True)


def modes_there_are() -> list[str]:
    """Those whose kernels the library has."""
    return [mode for mode in MODES if mode == "high_throughput" or (ROOT / "ffi" / mode).is_dir()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what --quick changes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split(":", maxsplit=1)[0])
    parser.add_argument("--out", required=True, help="JSON file, written as rows come")
    parser.add_argument("--quick", action="store_true", help="at most 40 points")
    parser.add_argument(
        "--budget-s", type=float, default=900, help="seconds after which no point is begun (default 900)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="default: as many as GPUs; more share GPUs")
    parser.add_argument("--bases", type=int, nargs="+", default=[4096, 128], metavar="TOKENS")
    parser.add_argument("--base-sms", type=int, default=24)
    parser.add_argument("--axes", nargs="*", default=AXES, choices=AXES, help="which are varied around the bases")
    parser.add_argument("--modes", nargs="+", default=modes_there_are(), choices=MODES)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sms", type=int, nargs="+", default=SMS)
    parser.add_argument("--models", nargs="+", default=list(MODEL_CASES), choices=list(MODEL_CASES))
    parser.add_argument("--wires", nargs="*", default=["fp8"], choices=list(traffic.SCALE_BYTES))
    parser.add_argument("--calls", type=int, default=20, help="between two events (default 20)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--case-timeout", type=float, default=90, help="seconds a point may take (default 90)")
    parser.add_argument("--program", nargs="+", help="instead of building kernels.cu")
    parser.add_argument("--no-ceiling", action="store_true", help="do not measure what the links give")
    parser.add_argument("--list", action="store_true", help="print the points and measure nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.bases, options.layouts = options.bases[:1], [name for name in options.layouts if name != "batched"]
        options.tokens, options.sms = QUICK["tokens"], QUICK["sms"]
    return options


def links(points: Sequence[Point], machine: Machine) -> Row:
    """GB/s of the push ceiling by number of GPUs, then by (SMs, bytes of a row), for all points that cross links."""
    sms = tuple(sorted({point.sms for point in points}))
    sizes = tuple(sorted({traffic.row_bytes(point.case, point.wire) // 16 * 16 for point in points}))
    try:
        counts = sorted({min(point.ranks, len(machine.gpus)) for point in points} - {1})
        return {gpus: native.push_ceiling(gpus, sms, sizes) for gpus in counts}
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"benchmarks.kernels: no push ceiling: {error}", file=sys.stderr)
        return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, measures, records."""
    options = parse(arguments)
    deadline = time.monotonic() + options.budget_s
    if options.list:
        print(*plan(options, num_gpus=2), sep="\n")
        return 0
    try:
        command = options.program or [str(native.build(ROOT / "benchmarks" / "kernels.cu", native.kernel_sources()))]
        program = native.Program(command)
    except (FileNotFoundError, RuntimeError, native.Failure) as error:
        print(f"benchmarks.kernels: the program that times kernels does not start: {error}", file=sys.stderr)
        return 1
    rows: list[Row] = []
    with program:
        machine = Machine.of(program.hello)
        points = plan(options, len(machine.gpus))
        print(f"{machine}: {len(points)} points", file=sys.stderr)
        gigabytes = {} if options.no_ceiling else links(points, machine)
        for of_point in measure(program, points, options, gigabytes, deadline):
            rows += of_point
            timing.write(options.out, rows)
            show(of_point)
    return 0


if __name__ == "__main__":
    sys.exit(main())
