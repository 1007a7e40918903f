"""Which kernels serve mode="auto": by a table of what was measured (tuning.json), by a plain rule where nothing like it was.

The table is written by `python -m benchmarks.tune`. An entry says up to how many tokens a rank the low-latency kernels were faster, for
one kind of device, number of ranks, bytes of a row and layout; what was measured stands beside it.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuning.json")
DEFAULT_TOKENS = 0  # a rank, up to which low latency serves where nothing was measured: none, until something was

Entry = Mapping[str, Any]


@functools.cache
def table() -> tuple[Entry, ...]:
    """The entries of tuning.json."""
    return tuple(json.loads(TABLE.read_text()))


def choose_mode(
    *,
    num_tokens: int,
    num_ranks: int,
    row_bytes: int,
    layout: str,
    device_kind: str,
    entries: Sequence[Entry] | None = None,
) -> str:
    """The mode that "auto" stands for: "low_latency" or "high_throughput".

    Static sizes alone decide, which are the same on every rank, so that all ranks choose alike.

    Args:
      num_tokens: T, tokens a rank.
      num_ranks: R, ranks along the expert-parallel axes.
      row_bytes: of one row as it travels, scales included.
      layout: "expert", "rank" or "batched".
      device_kind: `jax.Device.device_kind`, such as "NVIDIA H200".
      entries: a table instead of tuning.json.

    Example:
      >>> choose_mode(num_tokens=64, num_ranks=8, row_bytes=14336, layout="expert", device_kind="unknown", entries=())
      'high_throughput'
    """
    known = [
        entry
        for entry in (table() if entries is None else entries)
        if fnmatch.fnmatchcase(device_kind, entry["device"])
    ]
    most = DEFAULT_TOKENS
    if known:
        nearest = min(known, key=lambda entry: _distance(entry, num_ranks, row_bytes, layout))
        most = nearest["low_latency_up_to"]
    return "low_latency" if num_tokens <= most else "high_throughput"


def _distance(entry: Entry, num_ranks: int, row_bytes: int, layout: str) -> tuple[float, bool, float]:
    """How unlike an entry is: first in ranks, then in layout, then in bytes of a row, by their ratios."""
    return (
        abs(math.log(entry["ranks"] / num_ranks)),
        entry["layout"] != layout,
        abs(math.log(entry["row_bytes"] / row_bytes)),
    )
