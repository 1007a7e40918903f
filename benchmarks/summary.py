"""`python -m benchmarks.summary [FILE ...]`: the recorded results as JSON lines, a line a row.

Without files: benchmarks/results/*.json. KEYS is the schema; a recorded row has more (bytes, spread, versions, command).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

KEYS = (
    "case",  # of tests/cases.py
    "operation",  # dispatch, dispatch_cached, combine, combine_weighted, pair (dispatch, then weighted combine, in one jit)
    "by",  # jax_ep, or the baseline that does the same job: all_gather+psum_scatter, all_to_all
    "layout",  # of the case; null for a baseline
    "wire",  # null: x's dtype
    "mode",  # reference, high_throughput, low_latency, auto; null for a baseline
    "dtype",
    "tokens",  # a rank
    "hidden",
    "topk",
    "experts",
    "ranks",
    "processes",
    "sms",  # the bound given to the kernel; null: none
    "us",  # median of whole calls, on the slowest rank
    "ceiling_us",  # the bytes that must cross the link, over the measured ceiling; null where none must
    "ratio",  # us / ceiling_us
    "commit",
    "date",
    "machine",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the rows of the files named, or of all."""
    paths = [Path(path) for path in (sys.argv[1:] if arguments is None else arguments)] or sorted(
        RESULTS.glob("*.json")
    )
    for path in paths:
        for row in json.loads(path.read_text()):
            print(json.dumps({key: row[key] for key in KEYS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
