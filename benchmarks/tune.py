"""Measures both modes and writes the table that mode="auto" reads (jax_ep/_src/tuning.json):

    python -m benchmarks.tune [--rows benchmarks/results/h200x2-modes.json]          # on a GPU machine, in one process

A dispatch and a weighted combine, chained in one jit as in programs.py, over numbers of tokens, ranks, layouts and sizes of a row.
Entries of other machines stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from cases import Case

from benchmarks import ROOT, exchange, timing, traffic
from benchmarks.programs import Setting, jax_ep_programs

MODES = ("low_latency", "high_throughput")
TABLE = ROOT / "jax_ep" / "_src" / "tuning.json"
KEY = ("device", "ranks", "layout", "row_bytes")

Row = dict[str, Any]


def crossover(us: Mapping[int, tuple[float, float]]) -> int:
    """The number of tokens up to which low latency had better serve: the choice that loses least over all that was measured.

    us: for each number of tokens the times of low latency and of high throughput. 0: never.
    """

    def loss(most: int) -> float:
        return sum(times[tokens > most] / min(times) for tokens, times in us.items())

    return min([0, *sorted(us)], key=loss)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A row a mode, number of tokens, layout, size of a row and number of ranks."""
    for ranks in options.ranks or [jax.device_count()]:
        for hidden in options.hidden:
            for wire in options.wires:
                for layout in options.layouts:
                    for tokens in options.tokens:
                        case = Case("tune", tokens, hidden, options.topk, options.experts, ranks)
                        setting = Setting.of(case, options.calls).in_layout(layout)
                        if setting.case.num_ranks != ranks:
                            continue
                        for mode in MODES:
                            (program,) = jax_ep_programs(setting, ["pair"], wire, mode)
                            took, error = exchange.timed(program, setting, options)
                            yield exchange.row(setting, "pair", "jax_ep", wire, took, error, mode=mode) | {"mode": mode}


def entries(rows: Sequence[Row], device: str) -> list[Row]:
    """What the table says of these rows: one entry for each number of ranks, layout and size of a row."""
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["error"] is None:
            size = traffic.row_bytes(_case(row), row["wire"])
            times = found.setdefault((device, row["ranks"], row["layout"], size), {})
            times.setdefault(row["tokens"], {})[row["mode"]] = row["us"]
    made = []
    for key, times in found.items():
        both = {tokens: (us[MODES[0]], us[MODES[1]]) for tokens, us in sorted(times.items()) if len(us) == 2}
        if both:
            measured = {str(tokens): list(us) for tokens, us in both.items()}
            origin = {"us": measured, "commit": rows[0]["commit"], "date": rows[0]["date"]}
            made.append(dict(zip(KEY, key, strict=True)) | {"low_latency_up_to": crossover(both), **origin})
    return made


def _case(row: Row) -> Case:
    sizes = (row["tokens"], row["hidden"], row["topk"], row["experts"], row["ranks"])
    return dataclasses.replace(Case(row["case"], *sizes), dtype=row["dtype"])


def merge(table: Sequence[Row], more: Sequence[Row]) -> list[Row]:
    """The table with new entries in the places of those for the same."""
    kept = {tuple(entry[name] for name in KEY): entry for entry in [*table, *more]}
    return [kept[key] for key in sorted(kept)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: all devices")
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168, 2880])
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layouts", nargs="+", default=["expert", "rank"], choices=exchange.LAYOUTS)
    parser.add_argument("--wires", nargs="+", default=["none"], choices=["none", *traffic.SCALE_BYTES])
    parser.add_argument("--calls", type=int, default=16, help="in one program (default 16)")
    parser.add_argument("--programs", type=int, default=2, help="launched in a row for one sample (default 2)")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--case-budget-s", type=float, default=2, help="seconds for the samples of a row (default 2)")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: jax_ep/_src/tuning.json")
    parser.add_argument(
        "--device", help='pattern of device kinds that it is for (default: this one\'s, as "NVIDIA H200")'
    )
    parser.add_argument("--rows", type=Path, help="JSON file for the rows themselves")
    options = parser.parse_args(arguments)
    options.wires = [None if wire == "none" else wire for wire in options.wires]
    rows = []
    for row in measure(options):
        rows.append(row)
        told = row["error"] or f"{row['us']} µs"
        sizes = " ".join(f"{row[name]} {name}" for name in ("ranks", "tokens", "hidden", "layout", "wire"))
        print(f"{sizes} {row['mode']}: {told}", file=sys.stderr, flush=True)
        if options.rows:
            timing.write(options.rows, rows)
    table = json.loads(options.table.read_text()) if options.table.exists() else []
    timing.write(options.table, merge(table, entries(rows, options.device or jax.devices()[0].device_kind)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
