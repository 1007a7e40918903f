"""How every benchmark measures and what it records: compile, warm up, time whole calls, say where the numbers come from.

A call is timed from its launch to the moment when the slowest device of the slowest process has its results.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import provenance


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call, over `samples` samples."""

    median: float
    p10: float
    p90: float
    p99: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> Timing:
        """From each sample's seconds a call."""
        p10, median, p90, p99 = np.percentile(np.asarray(seconds) * 1e6, [10, 50, 90, 99])
        return cls(*(round(float(us), 2) for us in (median, p10, p90, p99)), len(seconds))

    def over(self, calls: int) -> Timing:
        """Of each of `calls` calls that were timed as one."""
        parts = (round(us / calls, 2) for us in (self.median, self.p10, self.p90, self.p99))
        return Timing(*parts, self.samples)

    @property
    def columns(self) -> dict[str, float]:
        """As rows are recorded."""
        return {
            "us": self.median,
            "p10_us": self.p10,
            "p90_us": self.p90,
            "p99_us": self.p99,
            "samples": self.samples,
        }


def compiled(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """`f` compiled for these arguments, so that no call that is timed traces or compiles."""
    return jax.jit(f).lower(*args).compile()


def measure(
    f: Callable[..., Any], *args: Any, samples: int = 20, warmup: int = 3, calls: int = 1, budget_s: float = math.inf
) -> Timing:
    """Times `f`, already compiled; a sample is `calls` calls launched in a row and waited for together.

    As many samples as fit into budget_s seconds, but three.
    """
    for _ in range(warmup):
        jax.block_until_ready(f(*args))
    seconds: list[float] = []
    while len(seconds) < samples:
        start = time.perf_counter()
        results = [f(*args) for _ in range(calls)]
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - start) / calls)
        del results
        if len(seconds) == 1:  # all processes take the same number of samples
            longest = float(of_slowest_process(np.array(seconds))[0]) * calls
            samples = min(samples, max(3, int(budget_s / longest))) if math.isfinite(budget_s) else samples
    return Timing.of(of_slowest_process(np.array(seconds)))


def of_slowest_process(seconds: np.ndarray) -> np.ndarray:
    """Each sample's time in the process where it took longest; all processes call this."""
    if jax.process_count() == 1:
        return seconds
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(seconds)).max(axis=0)


@functools.cache
def origin(on: str | None = None) -> dict[str, Any]:
    """Where (or `on` the machine that is named) and with what a row was measured; provenance.py says how commits are named."""
    return {
        "machine": on or machine(),
        **provenance.sources(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: _version(name) for name in ("jax-ep", "jax", "jaxlib")},
        "command": command(),
    }


def machine() -> str:
    """In words: "4 x NVIDIA H200", or "2-core AMD EPYC CPU, 8 virtual devices"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0))
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{cores}-core {models[0] if models else platform.machine()} CPU, {jax.device_count()} virtual devices"


def write(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSON, one a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command() -> str:
    """What was typed; flags that make virtual devices belong to it."""
    flags = os.environ.get("XLA_FLAGS")
    module = sys.modules["__main__"].__spec__
    program = ["python", "-m", module.name] if module else ["python", Path(sys.argv[0]).name]
    return " ".join(
        [f"XLA_FLAGS={shlex.quote(flags)}"] * bool(flags)
        + [shlex.join([*program, *map(_without_folder, sys.argv[1:])])]
    )


def _without_folder(argument: str) -> str:
    """Where a result was written is of no interest to others."""
    return Path(argument).name if argument.startswith("/") else argument


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
