"""`python -m benchmarks.summary [FILE ...]`: the recorded results as JSON lines, a line a row.

Without files: benchmarks/results/*.json. KEYS and NULLABLE are the schema; a recorded row has more (bytes, spread, versions, command).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

KEYS = (
    "case",  # of tests/cases.py, or its model where `tokens` is another number
    # dispatch, dispatch_cached, combine, combine_weighted, combine_grad (its kernel) or combine_backward, pair (both),
    # cached_pair, moe, moe_gradient; step, of several layers with their routers: decode.py; or halves: overlap.py
    "operation",
    "level",  # kernel: without XLA; jit: one of many chained in one program; program: one a program, with JAX's own dispatch
    "by",  # jax_ep, or the baseline that does the same job: see baselines.py
    "layout",  # of the case; null for a baseline
    "wire",  # null: x's dtype
    "mode",  # reference, high_throughput, low_latency, auto; null for a baseline
    "routing",  # uniform, skewed: see traffic.py
    "dtype",
    "tokens",  # a rank
    "hidden",
    "topk",
    "experts",
    "ranks",
    "processes",
    "gpus",  # null on CPU; fewer than ranks where several share one
    "sms",  # the bound given to the kernel; null: none
    "graph",  # replayed as a CUDA graph
    "us",  # median of whole calls, on the slowest rank; null where `error` says why
    "ceiling_us",  # the bytes that must cross the link, over the measured ceiling; null where none must
    "ratio",  # us / ceiling_us
    "error",  # null, or why there is no time: "failed: ...", "skipped: ..."
    "commit",
    "date",
    "machine",
)
NULLABLE = (  # null too where a file has no such column
    "p99_us",  # of the same samples as us
    "ranks_per_node",  # where processes of one host are pretended nodes
    "across_nodes",  # how rows go from one of them to another: stores, puts, collectives
    "part",  # of decode.py: programs, calls, idle, late, step
    "of",  # what us and its percentiles are of, in words: decode.py
    "clock",  # that they are read from: host, or the GPU's and its resolution
    "layers",  # of a step, and of its us: a step's, not a layer's
    "host_us",  # until the call that launches a program returns, nothing else being queued
    "waited_us",  # from that call to the moment when all devices are done
    "idle_ms",  # pause before each program
    "device_us",  # of a call in a program of its own, on the device that began last: without JAX's dispatch
    "delay_us",  # by which one rank begins every call late; not in us
)


def read(paths: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The rows of the files named, or of all in benchmarks/results."""
    return [row for path in paths or sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the rows of the files named, or of all."""
    for row in read([Path(path) for path in (sys.argv[1:] if arguments is None else arguments)]):
        print(json.dumps({key: row[key] for key in KEYS} | {key: row.get(key) for key in NULLABLE}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
