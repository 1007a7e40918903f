"""Routings, and the speed of light of their exchange: the bytes that must cross the link, over a ceiling measured in the same run.

    dispatch   one row a (token, rank) that holds one of its experts: sum over tokens, ranks r != own, of bytes(x row)
    combine    one row back for each of them:                                                             bytes(y row)

Gates, counts and indices are left out; so are the receiver's own copies.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import subprocess
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax import lax

from benchmarks import native, timing
from jax_ep._src import compat

MULTIPROCESSORS = 64  # of a ceiling without a bound: more push no faster
HEADROOM = 1.25  # rows that there are room for, of those expected
ROUTINGS = ("uniform", "skewed")
SKEW = 0.5  # exponent of Zipf's law over the experts

SCALE_BYTES = {"fp8": (128, 4), "fp8_ue8m0": (128, 1), "mxfp8": (32, 1)}  # columns a scale, bytes a scale


def draw_routing(case: Case, routing: str, seed: int) -> np.ndarray:
    """s32[R, T, K], distinct experts a token, at random; "skewed": the i-th most wanted expert is wanted as i ** -SKEW."""
    random = np.random.default_rng(seed)
    scores = random.random((case.num_ranks, case.num_tokens, case.num_experts), np.float32)
    if (
        routing == "skewed"
    ):  # exponential variates over their rates: the smallest are a draw by weight without replacement
        rates = random.permutation(np.arange(1, case.num_experts + 1, dtype=np.float32) ** -SKEW)
        scores = -np.log1p(-scores) / rates
    if case.num_topk < case.num_experts:
        scores = np.argpartition(scores, case.num_topk, axis=-1)[..., : case.num_topk]
    else:
        scores = np.argsort(scores, axis=-1)
    return random.permuted(scores, axis=-1).astype(np.int32)


def capacities(case: Case, topk_idx: np.ndarray) -> dict[str, int | None]:
    """max_recv_tokens and expert_capacity that drop nothing."""
    per_expert = np.bincount(topk_idx.reshape(-1), minlength=case.num_experts)
    if case.layout == "batched":
        load = per_expert
    elif case.layout == "expert":
        aligned = -(-per_expert // case.expert_alignment) * case.expert_alignment
        load = aligned.reshape(case.num_ranks, -1).sum(axis=1)
    else:
        owner = (topk_idx // case.num_local_experts).reshape(-1, case.num_topk)
        load = np.array([(owner == rank).any(axis=1).sum() for rank in range(case.num_ranks)])
    enough = max(int(load.max(initial=0)), math.ceil(HEADROOM * load.mean()))
    if case.layout == "batched":
        return {"max_recv_tokens": None, "expert_capacity": enough}
    return {"max_recv_tokens": enough, "expert_capacity": None}


def row_bytes(case: Case, wire: str | None) -> int:
    """Bytes of one row on the wire."""
    itemsize = jnp.dtype(case.dtype).itemsize
    if wire is None:
        return case.hidden * itemsize
    if wire == "logfmt10":  # of combine: 10 bits a value, the largest and smallest of 128 columns beside
        return math.ceil(case.hidden * 10 / 8) + math.ceil(case.hidden / 128) * 2 * itemsize
    columns, scale = SCALE_BYTES[wire]
    return case.hidden + math.ceil(case.hidden / columns) * scale


def rows_crossing(case: Case, topk_idx: np.ndarray) -> np.ndarray:
    """s64[R, R]: rows from each rank to each other one, one a (token, rank). topk_idx: s32[R, T, K]."""
    owner = topk_idx // case.num_local_experts
    rows = np.stack([(owner == rank).any(axis=2).sum(axis=1) for rank in range(case.num_ranks)], axis=1)
    np.fill_diagonal(rows, 0)
    return rows


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """How fast bytes can move at best."""

    name: str
    bytes_per_second: float
    shared: bool  # one memory for all ranks (virtual devices), or a link of its own for each rank and direction

    def us(self, crossing_bytes: np.ndarray) -> float:
        """Microseconds for f64[R, R] bytes from rank to rank."""
        busiest_link = max(crossing_bytes.sum(axis=0).max(), crossing_bytes.sum(axis=1).max())
        return float(crossing_bytes.sum() if self.shared else busiest_link) / self.bytes_per_second * 1e6


def measure_ceiling(mesh: jax.sharding.Mesh, num_bytes: int, sms: int | None = None) -> Ceiling:
    """CPU: memcpy on all cores at once. GPUs: what `sms` multiprocessors push to all peers in rows of num_bytes (p2p_ceiling.cu),
    or where it cannot be built or run, a collective permute.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return Ceiling("memcpy", memcpy_bytes_per_second(), shared=True)
    pushed = _push_ceiling(mesh.devices.size, sms or MULTIPROCESSORS, num_bytes // 16 * 16)
    return pushed or Ceiling("collective permute", permute_bytes_per_second(mesh), shared=False)


@functools.cache
def _push_ceiling(gpus: int, sms: int, num_bytes: int) -> Ceiling | None:
    if gpus < 2:
        return None
    gigabytes = _of_first_process(f"{gpus} {sms} {num_bytes}", lambda: _pushed_gigabytes(gpus, sms, num_bytes))
    return gigabytes and Ceiling(f"push, {sms} SMs, rows of {num_bytes} bytes", gigabytes * 1e9, shared=False)


def _pushed_gigabytes(gpus: int, sms: int, num_bytes: int) -> float | None:
    try:
        (gigabytes,) = native.push_ceiling(gpus, (sms,), (num_bytes,)).values()
    except (FileNotFoundError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f"benchmarks: the push ceiling is not to be had: {error}", stacklevel=2)
        return None
    return gigabytes


def _of_first_process(name: str, measure: Callable[[], float | None], timeout_s: float = 900) -> float | None:
    """What process 0 measures while the others wait, all their devices idle."""
    if jax.process_count() == 1:
        return measure()
    client, key = compat.distributed_client(), f"benchmarks/{name}"
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(measure()))
    return json.loads(client.blocking_key_value_get(key, round(1000 * timeout_s)))


@functools.cache
def memcpy_bytes_per_second(num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes copied a second, the best of several times; each core copies a part that is larger than its caches."""
    cores = len(os.sched_getaffinity(0))
    parts = [(np.ones(num_bytes // cores, np.uint8), np.zeros(num_bytes // cores, np.uint8)) for _ in range(cores)]
    seconds = []
    with concurrent.futures.ThreadPoolExecutor(cores) as threads:
        for _ in range(repeats):
            start = time.perf_counter()
            list(threads.map(lambda part: np.copyto(part[1], part[0]), parts))
            seconds.append(time.perf_counter() - start)
    return sum(target.nbytes for _, target in parts) / min(seconds)


@functools.cache
def permute_bytes_per_second(mesh: jax.sharding.Mesh, num_bytes: int = 1 << 28) -> float:
    """Bytes a second that every rank sends to the next, all at once."""
    (axis,), num_ranks = mesh.axis_names, mesh.devices.size
    ring = [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]
    spec = jax.P(axis)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    x = jax.jit(lambda: jnp.ones(num_ranks * num_bytes, jnp.uint8), out_shardings=sharding)()
    move = jax.shard_map(lambda x: lax.ppermute(x, axis, ring), mesh=mesh, in_specs=spec, out_specs=spec)
    return num_bytes / (timing.measure(timing.compiled(move, x), x, samples=10).median * 1e-6)
