"""Dispatch, combine, pairs and layers as a user calls them, chained inside one jit, beside the speed of light and the ways without jax_ep.

    python -m benchmarks.exchange --out benchmarks/results/h200x2-jit.json                       # on a GPU machine
    python -m benchmarks.exchange --processes 1 2 --baselines --out benchmarks/results/h200x2-processes.json   # a process a GPU beside one
    python -m benchmarks.exchange --processes 2 --ranks-per-node 1 --out benchmarks/results/h200x2-nodes.json    # pretended nodes
    python -m benchmarks.exchange --cpu-devices 8 --cases mixtral-8x7b/decode --layouts expert   # the reference

programs.py has what is run, baselines.py the ways without, traffic.py the byte formula and ceiling, summary.py the schema of a row.
On GPUs every case and way to launch (one by one, as a CUDA graph) is a process of its own, or as many as --processes says with a part of
the GPUs each; one that ends badly is recorded as failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
from cases import CASES, MODELS, Case
from cases import case as case_named

import jax_ep
from benchmarks import ROOT, native, timing, traffic
from benchmarks.baselines import BASELINES
from benchmarks.programs import OPERATIONS, Program, Setting, absent, baseline_programs, jax_ep_programs
from benchmarks.summary import KEYS
from jax_ep._src import internode

LAYOUTS = ("expert", "rank", "batched")
MODES = ("high_throughput", "low_latency", "auto")
GRAPH_FLAGS = "--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
ROUTED = ("dispatch", "pair", "moe", "moe_gradient", "step")  # whose every call has a routing of its own
FEW_TOKENS = 512  # up to here a case is a decode step: many calls, many samples

Row = dict[str, Any]


# ---- rows ------------------------------------------------------------------------------------------------------------


def crossing_bytes(setting: Setting, operation: str, wire: str | None) -> list[np.ndarray]:
    """f64[R, R] bytes from rank to rank, for each of an operation's exchanges, one after the other; the mean over the calls."""
    case = setting.case
    routings = setting.topk_idx if operation in ROUTED else setting.topk_idx[:1]
    rows = np.mean([traffic.rows_crossing(case, topk_idx) for topk_idx in routings], axis=0)
    wires = (None, wire) if wire == "logfmt10" else (wire, None)  # out and back
    out, back = rows * traffic.row_bytes(case, wires[0]), rows.T * traffic.row_bytes(case, wires[1])
    if operation == "step":  # a call is a layer of it
        return [out, back] * setting.calls
    if operation == "moe_gradient":  # the same again for cotangents, which travel in x's dtype
        return [out, back, back.T, back]
    if operation in ("pair", "cached_pair", "moe"):
        return [out, back]
    return [out] if operation.startswith("dispatch") or operation == "combine_backward" else [back]


def row(
    setting: Setting, operation: str, by: str, wire: str | None, timed: timing.Timing | None, error: str | None = None,
    sms: int | None = None, mode: str | None = None, graph: bool = False, with_ceiling: bool = True,
) -> Row:  # fmt: skip
    """What is recorded of a measurement."""
    case, exchanges = setting.case, crossing_bytes(setting, operation, wire)
    ceiling = traffic.measure_ceiling(setting.mesh, traffic.row_bytes(case, wire), sms) if with_ceiling else None
    ceiling_us = sum(ceiling.us(exchange) for exchange in exchanges) if ceiling else None
    ours = by == "jax_ep"
    on_cpu = setting.mesh.devices.flat[0].platform == "cpu"
    return {
        "case": case.name,
        "operation": operation,
        "level": "jit" if setting.calls > 1 else "program",
        "by": by,
        "layout": case.layout if ours else None,
        "wire": wire,
        "mode": ("reference" if on_cpu else mode) if ours else None,
        "routing": "uniform",
        "dtype": case.dtype,
        "tokens": case.num_tokens,
        "hidden": case.hidden,
        "topk": case.num_topk,
        "experts": case.num_experts,
        "ranks": case.num_ranks,
        "processes": jax.process_count(),
        **nodes(),
        "gpus": None if on_cpu else case.num_ranks,
        "sms": sms,
        "graph": graph,
        "calls": setting.calls,
        **(timed.columns if timed else {"us": None}),
        "expert_hidden": setting.expert_hidden if operation.startswith("moe") else None,
        "max_recv_tokens": case.max_recv_tokens if ours else None,
        "expert_capacity": case.expert_capacity if ours else None,
        "crossing_bytes": int(sum(exchange.sum() for exchange in exchanges)),
        "ceiling": ceiling and f"{ceiling.name}, {ceiling.bytes_per_second / 1e9:.1f} GB/s",
        "ceiling_us": round(ceiling_us, 3) if ceiling_us else None,
        "ratio": round(timed.median / ceiling_us, 2) if timed and ceiling_us else None,
        "error": error,
        **timing.origin(),
    }


def nodes() -> Row:
    """How the processes are split into pretended nodes, and how rows go from one to another."""
    told = os.environ.get(internode.RANKS_PER_NODE)
    asked = os.environ.get(internode.ACROSS_NODES, "stores") if told else None
    return {"ranks_per_node": int(told) if told else None, "across_nodes": asked}


def timed(program: Program, setting: Setting, options: argparse.Namespace) -> tuple[timing.Timing | None, str | None]:
    """µs a call of the chain, or why there are none: one program that fails does not end the others."""
    _, f, args = program
    few = setting.case.num_tokens <= FEW_TOKENS
    samples = options.samples or (200 if few else 20)
    try:
        run = timing.compiled(f, *args)
        measured = timing.measure(run, *args, samples=samples, calls=options.programs, budget_s=options.case_budget_s)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return None, f"failed: {str(error).splitlines()[0][:300]}"
    return measured.over(setting.calls), None


def measure_case(case: Case, options: argparse.Namespace, graph: bool) -> Iterator[Row]:
    """All rows of a case, as they are measured, in this process."""
    on_cpu = jax.devices()[0].platform == "cpu"
    # A chain of the reference would share its all_gather, so there a program has one call.
    calls = options.calls or (1 if on_cpu else 64 if case.num_tokens <= FEW_TOKENS else 8)
    setting = Setting.of(case, calls, expert_hidden=options.expert_hidden or (16 if on_cpu else 512))
    in_expert_order = setting.in_layout("expert")
    over = f"skipped: --budget-s {options.budget_s:g} is over"
    modes = options.modes[:1] if on_cpu else options.modes
    for layout, wire, mode, sms in itertools.product(options.layouts, options.wires, modes, options.num_sms):
        ours = setting.in_layout(layout)
        if time.monotonic() > options.deadline:
            for operation in set(options.operations) - absent(layout, wire):
                yield row(ours, operation, "jax_ep", wire, None, over, sms, mode, graph)
            continue
        for program in jax_ep_programs(ours, options.operations, wire, mode, sms):
            took, error = timed(program, ours, options)
            yield row(ours, program[0], "jax_ep", wire, took, error, sms, mode, graph)
    for name in options.baselines:
        if on_cpu and name == "ragged_all_to_all":  # XLA:CPU has none
            continue
        if time.monotonic() > options.deadline:
            yield row(in_expert_order, "pair", name, None, None, over, graph=graph)
            continue
        for program in baseline_programs(in_expert_order, name, options.operations):
            took, error = timed(program, setting, options)
            yield row(in_expert_order, program[0], name, None, took, error, graph=graph)


# ---- processes -------------------------------------------------------------------------------------------------------


def measure_apart(
    case: Case, options: argparse.Namespace, graph: bool, num_processes: int, arguments: Sequence[str]
) -> list[Row]:
    """The same in processes of their own; what they measured before they ended badly is kept."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {"XLA_FLAGS": f"{flags} {GRAPH_FLAGS}".strip() if graph else flags}
    if num_processes > 1 and options.ranks_per_node:
        environment[internode.RANKS_PER_NODE] = str(options.ranks_per_node)
        if options.across_nodes != "stores":
            environment[internode.ACROSS_NODES] = options.across_nodes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        which = ["--only", case.name, str(case.num_tokens), "graph" if graph else "stream", "--out", str(out)]
        left = ["--budget-s", str(options.deadline - time.monotonic())] if math.isfinite(options.deadline) else []
        command = [sys.executable, "-m", "benchmarks.exchange", *arguments, *which, *left]
        commands = [command]
        if num_processes > 1:
            address = f"localhost:{processes.free_port()}"
            job = ["--process", str(num_processes), address]
            commands = [[*command, *job, str(i)] for i in range(num_processes)]
        ended = processes.run(
            commands,
            [environment] * num_processes,
            timeout=options.process_timeout,
            cwd=ROOT,
            first_is_heard=True,
        )
        rows: list[Row] = json.loads(out.read_text()) if out.exists() else []
    rows = [row | {"command": timing.command()} for row in rows]
    if ended:
        print(f"{case.name}: {ended}", file=sys.stderr)
        unknown = dict.fromkeys(KEYS) | {"case": case.name, "tokens": case.num_tokens} | timing.origin("unknown")
        like = rows[-1] if rows else unknown
        blank = dict.fromkeys(("us", "ceiling_us", "ratio", "operation", "layout", "by"))
        why = ended.splitlines()[0]
        rows.append(like | blank | {"graph": graph, "processes": num_processes, "error": f"failed: {why}"})
    return rows


def join(options: argparse.Namespace) -> None:
    """Makes this process one of a job on this machine, with its part of the devices. Before JAX's backend starts."""
    count, address, me = int(options.process[0]), options.process[1], int(options.process[2])
    mine = None
    if not options.cpu_devices:
        num_devices = native.count_gpus()
        if num_devices % count:
            raise ValueError(
                f"--processes: {num_devices} GPUs cannot be shared out to {count} processes. Take a divisor."
            )
        each = num_devices // count
        mine = list(range(me * each, (me + 1) * each))
    jax.distributed.initialize(address, count, me, local_device_ids=mine)
    jax_ep.initialize()


def selected(options: argparse.Namespace) -> list[Case]:
    """The cases named, with each number of tokens that is asked for."""
    cases = [case_named(name) for name in options.cases]
    return list(
        dict.fromkeys(
            dataclasses.replace(case, name=case.name.split("/")[0] if options.tokens else case.name, num_tokens=tokens)
            for case in cases
            for tokens in options.tokens or [case.num_tokens]
        )
    )


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = ("operation", "by", "us", "p10-p99", "x ceiling", "GB/s")


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of one case, for each operation: jax_ep's rows, the baselines', the speed of light."""
    lines = []
    for operation in OPERATIONS:
        section = [row for row in rows if row["operation"] == operation]
        for row in section:
            if row["error"]:
                lines.append((operation, _who(row), row["error"], "", "", ""))
                continue
            spread = f"{row['p10_us']:.0f}-{row['p99_us']:.0f}"
            ratio = f"{row['ratio']:.1f}" if row["ratio"] else ""
            us = f"{row['us']:.1f}"
            lines.append((operation, _who(row), us, spread, ratio, _speed(row, "us")))
        for wire in dict.fromkeys(row["wire"] for row in section):
            row = next((row for row in section if row["wire"] == wire and row["ceiling_us"]), None)
            if row is not None:
                by = ", ".join(filter(None, ("speed of light", wire)))
                lines.append((operation, by, f"{row['ceiling_us']:.1f}", "", "1.0", _speed(row, "ceiling_us")))
    return lines


def _who(row: Row) -> str:
    mode = row["mode"] if row["mode"] not in ("auto", "reference") else None
    processes = f"{row['processes']} processes" if (row["processes"] or 1) > 1 else None
    graph = "graph" if row["graph"] else None
    return ", ".join(filter(None, (row["by"], row["layout"], row["wire"], mode, graph, processes)))


def _speed(row: Row, us: str) -> str:
    return f"{row['crossing_bytes'] / row[us] / 1e3:.2f}" if row["crossing_bytes"] else ""


def title(row: Row) -> str:
    """The case of a row and what the speed of light is taken from."""
    sizes = " ".join(f"{row[key]} {key}" for key in ("ranks", "tokens", "hidden", "topk", "experts"))
    return f"{row['case']}: {sizes} {row['dtype']} ({row['level']}; ceiling: {row.get('ceiling')})"


def show(rows: Sequence[Row]) -> None:
    """Prints a table a case, with rich where it is installed."""
    print(rows[0]["machine"] if rows else "nothing was measured")
    for case in dict.fromkeys((row["case"], row["tokens"]) for row in rows):
        of_case = [row for row in rows if (row["case"], row["tokens"]) == case]
        draw(title(of_case[0]), table(of_case))


def draw(heading: str, lines: Sequence[tuple[str, ...]], columns: Sequence[str] = COLUMNS) -> None:
    """Prints one table; what a line's first cells repeat of the line before is left out."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        print(heading)
        for line in [columns, *lines]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    drawn = Table(title=heading, title_justify="left", box=box.HORIZONTALS)
    for column in columns:
        drawn.add_column(column, justify="left" if column in ("operation", "by") else "right")
    previous = None
    for line in lines:
        if line[0] != previous:
            drawn.add_section()
        drawn.add_row("" if line[0] == previous else line[0], *line[1:])
        previous = line[0]
    Console().print(drawn)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; "none" is None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange", description=__doc__.split("\n", maxsplit=1)[0]
    )
    some = ["deepseek-v3/decode", "deepseek-v3/prefill"]
    parser.add_argument(
        "--cases",
        nargs="+",
        default=some,
        metavar="NAME",
        choices=[case.name for case in CASES],
        help=f"of tests/cases.py: {', '.join(case.name for case in MODELS)} and the tests' (default: {' '.join(some)})",
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="a rank, instead of the cases' own")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--wires", nargs="+", default=["none", "fp8"], choices=["none", *traffic.SCALE_BYTES])
    parser.add_argument("--modes", nargs="+", default=["auto"], choices=MODES)
    parser.add_argument(
        "--num-sms", nargs="+", default=["none"], help='bounds for the multiprocessors of a kernel, or "none"'
    )
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--launch", nargs="+", choices=["stream", "graph"], help="default: both on GPUs")
    parser.add_argument(
        "--processes",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="that share the devices (default: one has all)",
    )
    parser.add_argument("--ranks-per-node", type=int, help="so many processes are a node, pretended: NVSHMEM serves")
    parser.add_argument(
        "--across-nodes",
        default="stores",
        choices=["stores", internode.PUTS, internode.COLLECTIVES],
        help="how rows go from one pretended node to another (default: by stores over NVLink)",
    )
    parser.add_argument("--calls", type=int, help="in one program (default: 64 up to 512 tokens, 8 above, 1 on CPU)")
    parser.add_argument(
        "--programs",
        type=int,
        default=8,
        help="launched in a row for one sample (default 8): the host needs some 0.5 ms for the first, then it is ahead",
    )
    parser.add_argument("--samples", type=int, help="default: 200 up to 512 tokens, 20 above")
    parser.add_argument("--case-budget-s", type=float, default=5, help="seconds for the samples of a row (default 5)")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which nothing new is begun")
    parser.add_argument("--process-timeout", type=float, default=900, help="seconds for a case (default 900)")
    parser.add_argument("--expert-hidden", type=int, help="inner width of the layers' experts (default 512, on CPU 16)")
    parser.add_argument("--cpu-devices", type=int, help="run on this many virtual CPU devices")
    parser.add_argument("--process", nargs=3, metavar=("COUNT", "COORDINATOR", "ME"), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs=3, metavar=("CASE", "TOKENS", "LAUNCH"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="JSON file to write the rows to, as they come")
    parser.add_argument(
        "--quick", action="store_true", help='"expert" and "rank", no wire, fewer operations and samples'
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.layouts, options.wires, options.case_budget_s = LAYOUTS[:2], ["none"], 1.5
        options.operations = ("dispatch", "combine", "pair", "moe")
    if options.cpu_devices and any(options.cpu_devices % count for count in options.processes):
        parser.error("--processes must divide --cpu-devices")
    options.deadline = time.monotonic() + options.budget_s
    options.wires = [None if wire == "none" else wire for wire in options.wires]
    options.num_sms = [None if number == "none" else int(number) for number in options.num_sms]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and records where --out says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if not options.process:
        return run(options, arguments)
    try:
        return run(options, arguments)
    except BaseException:  # an ordinary end would wait for the other processes, which may be waiting for this one
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`main` with its options."""
    rows: list[Row] = []

    def keep(more: Sequence[Row]) -> None:
        rows.extend(more)
        if options.out:
            timing.write(options.out, rows)

    gpus = not options.cpu_devices and Path("/proc/driver/nvidia/version").exists()
    launches = options.launch or (["stream", "graph"] if gpus else ["stream"])
    if options.only or (launches == ["stream"] and options.processes == [1]):
        if options.cpu_devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update(
                "jax_num_cpu_devices", options.cpu_devices // int(options.process[0] if options.process else 1)
            )
        if options.process:
            join(options)
        cases = [(case, launches[0] == "graph") for case in selected(options)]
        if options.only:
            name, tokens, launch = options.only
            cases = [
                (case, launch == "graph") for case, _ in cases if (case.name, str(case.num_tokens)) == (name, tokens)
            ]
        for case, graph in cases:
            for measured in measure_case(case, options, graph):
                if jax.process_index() == 0:
                    keep([measured])
                    print(f"{case.name} {measured['operation']} {_who(measured)}", file=sys.stderr, flush=True)
    else:
        for case in selected(options):
            for launch, count in itertools.product(launches, options.processes):
                keep(measure_apart(case, options, launch == "graph", count, arguments))
    if not options.only:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
