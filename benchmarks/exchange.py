"""dispatch, dispatch_cached, combine, and the pair in one jit, beside the speed of light and two baselines.

    python -m benchmarks.exchange --cpu-devices 8 --cases mixtral-8x7b/decode --layouts expert rank --out benchmarks/results/cpu.json

Routing is uniform at random; capacities hold 1.25 times the mean and whatever the busiest rank or expert gets, so no row is dropped.
traffic.py holds the byte formula, baselines.py the baselines, summary.py the schema of a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, MODELS, Case
from cases import case as case_named
from jax.sharding import NamedSharding

import jax_ep
from benchmarks import timing, traffic
from benchmarks.baselines import BASELINES

LAYOUTS = ("expert", "rank", "batched")
OPERATIONS = ("dispatch", "dispatch_cached", "combine", "combine_weighted", "pair")

Row = dict[str, Any]
Program = tuple[str, Callable[..., Any], tuple[Any, ...]]  # operation, function of global arrays, arguments


# ---- what is run -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case on a mesh, with its inputs."""

    case: Case
    mesh: jax.sharding.Mesh
    topk_idx: np.ndarray  # s32[R, T, K]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Setting:
        """On as many of the devices as the case asks for, or can use."""
        ranks = min(case.num_ranks, jax.device_count())
        while case.num_experts % ranks:
            ranks -= 1
        if ranks != case.num_ranks:
            case = dataclasses.replace(case, num_ranks=ranks, axes=())
        names, sizes = zip(*case.mesh_axes, strict=True)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:ranks]).reshape(sizes), names)
        return cls(case, mesh, traffic.draw_routing(case, "uniform", seed))

    def in_layout(self, layout: str) -> Setting:
        """The same with another layout and rows enough for it."""
        capacity = traffic.capacities(dataclasses.replace(self.case, layout=layout), self.topk_idx)
        return dataclasses.replace(self, case=dataclasses.replace(self.case, layout=layout, **capacity))

    def on_every_rank(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """f for one rank -> a function of global arrays, [R * n, ...]."""
        spec = jax.P(self.case.axis_name)
        return jax.shard_map(f, mesh=self.mesh, in_specs=spec, out_specs=spec)

    def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [R * T, H], topk_idx s32[R * T, K], weights f32[R * T, K]."""
        sharding = NamedSharding(self.mesh, jax.P(self.case.axis_name))
        idx = self.topk_idx.reshape(-1, self.case.num_topk)
        make = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharding)
        x = make(jax.random.key(0), (len(idx), self.case.hidden), jnp.dtype(self.case.dtype))
        weights = make(jax.random.key(1), idx.shape, jnp.dtype("float32"))
        return x, jax.make_array_from_callback(idx.shape, sharding, lambda index: idx[index]), weights


def programs(
    setting: Setting, operations: Sequence[str], wire: str | None, mode: str, num_sms: int | None
) -> Iterator[Program]:
    """jax_ep's operations."""
    case = setting.case
    weighted = case.layout != "rank"

    def dispatch(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> Any:
        return jax_ep.dispatch(
            x,
            topk_idx,
            weights,
            axis_name=case.axis_name,
            num_experts=case.num_experts,
            layout=case.layout,
            max_recv_tokens=case.max_recv_tokens,
            expert_alignment=case.expert_alignment,
            expert_capacity=case.expert_capacity,
            wire=wire,
            mode=mode,
            num_sms=num_sms,
        )

    def rows(recv: jax_ep.Dispatched) -> jax.Array:
        return jax_ep.dequantize(recv.x) if isinstance(recv.x, jax_ep.Quantized) else recv.x

    def pair(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
        recv, handle = dispatch(x, topk_idx, weights)
        return jax_ep.combine(rows(recv), handle, recv.weights if weighted else None)

    inputs = setting.inputs()
    if "dispatch" in operations:
        yield "dispatch", setting.on_every_rank(dispatch), inputs
    recv, handle = timing.compiled(setting.on_every_rank(dispatch), *inputs)(*inputs)
    if "dispatch_cached" in operations and wire is None:
        yield "dispatch_cached", setting.on_every_rank(jax_ep.dispatch_cached), (inputs[0], handle)
    y, gates = jax.jit(setting.on_every_rank(rows))(recv), recv.weights
    del recv
    if "combine" in operations:
        yield "combine", setting.on_every_rank(jax_ep.combine), (y, handle)
    if "combine_weighted" in operations and weighted:
        yield "combine_weighted", setting.on_every_rank(jax_ep.combine), (y, handle, gates)
    del y, handle, gates
    if "pair" in operations:
        yield "pair", setting.on_every_rank(pair), inputs


def baseline_programs(setting: Setting, name: str, operations: Sequence[str]) -> Iterator[Program]:
    """A baseline's dispatch, combine and pair."""
    parts = BASELINES[name](setting.case)

    def pair(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        return parts["combine"](*parts["dispatch"](x, topk_idx))

    x, topk_idx, _ = setting.inputs()
    dispatch = setting.on_every_rank(parts["dispatch"])
    if "dispatch" in operations:
        yield "dispatch", dispatch, (x, topk_idx)
    if "combine" in operations:
        yield "combine", setting.on_every_rank(parts["combine"]), jax.jit(dispatch)(x, topk_idx)
    if "pair" in operations:
        yield "pair", setting.on_every_rank(pair), (x, topk_idx)


# ---- rows ------------------------------------------------------------------------------------------------------------


def crossing_bytes(setting: Setting, operation: str, wire: str | None) -> list[np.ndarray]:
    """f64[R, R] bytes from rank to rank, for each of an operation's exchanges, one after the other."""
    rows = traffic.rows_crossing(setting.case, setting.topk_idx).astype(np.float64)
    out = rows * traffic.row_bytes(setting.case, wire)
    back = rows.T * traffic.row_bytes(setting.case, None)
    return {"dispatch": [out], "dispatch_cached": [out], "pair": [out, back]}.get(operation, [back])


def row(
    setting: Setting,
    operation: str,
    by: str,
    wire: str | None,
    timed: timing.Timing,
    ceiling: traffic.Ceiling,
    **more: Any,
) -> Row:
    """What is recorded of a measurement."""
    case, exchanges = setting.case, crossing_bytes(setting, operation, wire)
    ceiling_us = sum(ceiling.us(exchange) for exchange in exchanges)
    ours = by == "jax_ep"
    return {
        "case": case.name,
        "operation": operation,
        "level": "program",
        "by": by,
        "layout": case.layout if ours else None,
        "wire": wire,
        "mode": None,
        "routing": "uniform",
        "dtype": case.dtype,
        "tokens": case.num_tokens,
        "hidden": case.hidden,
        "topk": case.num_topk,
        "experts": case.num_experts,
        "ranks": case.num_ranks,
        "processes": jax.process_count(),
        "gpus": None if jax.devices()[0].platform == "cpu" else case.num_ranks,
        "sms": None,
        "graph": False,
        "us": timed.median,
        "p10_us": timed.p10,
        "p90_us": timed.p90,
        "samples": timed.samples,
        "max_recv_tokens": case.max_recv_tokens if ours else None,
        "expert_capacity": case.expert_capacity if ours else None,
        "crossing_bytes": int(sum(exchange.sum() for exchange in exchanges)),
        "ceiling": f"{ceiling.name}, {ceiling.bytes_per_second / 1e9:.1f} GB/s",
        "ceiling_us": round(ceiling_us, 3) if ceiling_us else None,
        "ratio": round(timed.median / ceiling_us, 2) if ceiling_us else None,
        "error": None,
        **more,
        **timing.origin(),
    }


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, as they are measured."""
    ceiling = traffic.measure_ceiling(jax.sharding.Mesh(np.array(jax.devices()), ("rank",)))
    on_cpu = jax.devices()[0].platform == "cpu"
    mode = "reference" if on_cpu else options.mode
    for name in options.cases:
        setting = Setting.of(case_named(name))
        for layout in options.layouts:
            ours = setting.in_layout(layout)
            for wire in options.wires:
                for operation, f, args in programs(ours, options.operations, wire, options.mode, options.num_sms):
                    timed = timing.measure(timing.compiled(f, *args), *args, samples=options.samples)
                    yield row(ours, operation, "jax_ep", wire, timed, ceiling, mode=mode, sms=options.num_sms)
        for baseline in BASELINES:
            for operation, f, args in baseline_programs(setting, baseline, options.operations):
                timed = timing.measure(timing.compiled(f, *args), *args, samples=options.samples)
                yield row(setting, operation, baseline, None, timed, ceiling)


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = ("operation", "by", "us", "p10-p90", "x ceiling", "GB/s")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of one case, for each operation: jax_ep's rows, the baselines', the speed of light."""
    lines = []
    for operation in OPERATIONS:
        section = [row for row in rows if row["operation"] == operation]
        for row in section:
            by = ", ".join(filter(None, (row["by"], row["layout"], row["wire"])))
            spread = f"{row['p10_us']:.0f}-{row['p90_us']:.0f}"
            ratio = f"{row['ratio']:.1f}" if row["ratio"] else ""
            lines.append((operation, by, f"{row['us']:.0f}", spread, ratio, _speed(row, "us")))
        for wire in dict.fromkeys(row["wire"] for row in section):
            row = next(row for row in section if row["wire"] == wire)
            if row["ceiling_us"]:
                by = ", ".join(filter(None, ("speed of light", wire)))
                lines.append((operation, by, f"{row['ceiling_us']:.0f}", "", "1.0", _speed(row, "ceiling_us")))
    return lines


def _speed(row: Row, us: str) -> str:
    return f"{row['crossing_bytes'] / row[us] / 1e3:.2f}"


def title(row: Row) -> str:
    """The case of a row and what the speed of light is taken from."""
    sizes = " ".join(f"{row[key]} {key}" for key in ("ranks", "tokens", "hidden", "topk", "experts"))
    return f"{row['case']}: {sizes} {row['dtype']} ({row['mode']}; ceiling: {row['ceiling']})"


def show(rows: Sequence[Row]) -> None:
    """Prints a table a case, with rich where it is installed."""
    print(timing.machine())
    for name in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == name]
        _draw(title(of_case[0]), table(of_case))


def _draw(heading: str, lines: list[tuple[str, ...]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
        print(heading)
        for line in [COLUMNS, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    drawn = Table(title=heading, title_justify="left", box=box.HORIZONTALS)
    for column in COLUMNS:
        drawn.add_column(column, justify="left" if column in ("operation", "by") else "right")
    previous = None
    for line in lines:
        if line[0] != previous:
            drawn.add_section()
        drawn.add_row("" if line[0] == previous else line[0], *line[1:])
        previous = line[0]
    Console().print(drawn)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and records where --out says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange", description=__doc__.split("\n", maxsplit=1)[0]
    )
    decode = [case.name for case in MODELS if case.name.endswith("/decode")]
    parser.add_argument(
        "--cases",
        nargs="+",
        default=decode,
        metavar="NAME",
        choices=[case.name for case in CASES],
        help="of tests/cases.py (default: the models' decode steps)",
    )
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--wires", nargs="+", default=["none"], choices=["none", *traffic.SCALE_BYTES])
    parser.add_argument("--mode", default="auto", choices=["auto", "high_throughput", "low_latency"])
    parser.add_argument("--num-sms", type=int, help="upper bound for the multiprocessors of a kernel")
    parser.add_argument("--samples", type=int, default=20, help="timed calls (default 20)")
    parser.add_argument("--cpu-devices", type=int, help="run on this many virtual CPU devices")
    parser.add_argument("--out", help="JSON file to write the rows to")
    options = parser.parse_args(arguments)
    options.wires = [None if wire == "none" else wire for wire in options.wires]
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    rows = []
    for measured in measure(options):
        rows.append(measured)
        print(
            f"{measured['case']} {measured['operation']} {measured['by']} {measured['layout'] or ''}", file=sys.stderr
        )
    show(rows)
    if options.out and jax.process_index() == 0:
        timing.write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
