"""Random programs and random calls through jit in one process, each result compared to the bit. From the repository's root:

    python -m tests.soak --calls 20000 --programs 32 --seed 0 --seconds 600 --out soak.json
    python -m tests.soak --programs 32 --seed 0 --first 1234 --calls 1      # call 1234 of that again

A program is a shape, layout, dtype, wire, mode, alignment, capacity and group of devices; a call is new rows and a new routing.
The same program is compiled twice, with the kernels and with the reference, which uses XLA's collectives: every call is
compared on the devices. The first call of a program and every --oracle-every-th are compared with NumPy's oracle as well.
On CPU both compilations are the reference, and the oracle is the test. test_soak.py runs a few calls.
"""

import benchmarks  # first, as it arranges sys.path

# isort: split
import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax import lax
from jax.sharding import Mesh, NamedSharding

import jax_ep
from benchmarks import timing
from jax_ep._src import group
from jax_ep._src.handle import MODES

ROWS_BYTES = {"small": 1 << 16, "full": 1 << 26}  # of a rank's result, at most
KINDS = ("layer", "cached", "loop", "gradient")
MAX_LAYERS = 4  # of a loop
# Calls. Virtual CPU devices share a pool of threads, in which collectives of two programs can wait for each other.
IN_FLIGHT = {"gpu": 32, "cpu": 0}
LOWERING = threading.Lock()  # one program at a time decides which kernels it calls; XLA compiles several
STYLES = (
    "distinct",
    "any",
    "skewed",
    "absent",
    "invalid",
    "hot expert",
    "one expert",
    "one rank",
    "silent rank",
    "nothing",
)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled. `axes` is the mesh, `axis_name` those of its axes along which the experts lie."""

    kind: str
    devices: tuple[int, ...]
    axes: tuple[tuple[str, int], ...]
    axis_name: tuple[str, ...]
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    layout: str
    dtype: str
    expert_alignment: int
    max_recv_tokens: int | None
    expert_capacity: int | None
    wire: str | None
    combine_wire: str | None
    has_weights: bool
    num_sms: int | None
    mode: str

    # ---- the mesh --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def mesh(self):
        names, sizes = zip(*self.axes, strict=True)
        return Mesh(np.array([jax.devices()[i] for i in self.devices]).reshape(sizes), names)

    @property
    def num_ranks(self):
        return int(np.prod([size for name, size in self.axes if name in self.axis_name]))

    @property
    def groups(self):
        """[R, number of groups]: places in the mesh, rank by rank."""
        names, sizes = zip(*self.axes, strict=True)
        places = np.arange(len(self.devices)).reshape(sizes)
        first = [names.index(name) for name in self.axis_name]
        return np.moveaxis(places, first, range(len(first))).reshape(self.num_ranks, -1)

    def on_every_device(self, f):
        spec = jax.P(tuple(name for name, _ in self.axes))
        return jax.shard_map(f, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)

    # ---- what a call does, on a device -----------------------------------------------------------------------------------

    def layer(self, x, topk_idx, weights):
        recv, handle = jax_ep.dispatch(
            x,
            topk_idx,
            weights if self.has_weights else None,
            axis_name=self.axis_name,
            num_experts=self.num_experts,
            layout=self.layout,
            max_recv_tokens=self.max_recv_tokens,
            expert_alignment=self.expert_alignment,
            expert_capacity=self.expert_capacity,
            wire=self.wire,
            num_sms=self.num_sms,
            mode=self.mode,
        )
        rows = recv.x if self.wire is None else lax.optimization_barrier(jax_ep.dequantize(recv.x))
        gates = recv.weights if self.has_weights and self.layout != "rank" else None
        return recv, handle, jax_ep.combine(-rows, handle, gates, wire=self.combine_wire)

    def call(self, x, topk_idx, weights, num_layers):
        """[T, H], s32[T, K], f32[T, K], s32[1] -> a dict of results, none of which XLA rounds."""
        if self.kind == "loop":
            out = lax.fori_loop(0, num_layers[0], lambda i, x: self.layer(x, jnp.roll(topk_idx, i, 0), weights)[2], x)
            return {"out": out}
        recv, handle, out = self.layer(x, topk_idx, weights)
        results = {"recv": dataclasses.replace(recv, x=bare(recv.x)), "handle": handle, "out": out}
        if self.kind == "cached":
            results["cached"] = jax_ep.dispatch_cached(-x, handle)
            results["back"] = jax_ep.combine(results["cached"], handle)
        if self.kind == "gradient":
            results["gradient"] = jax.vjp(lambda x: jax_ep.combine(-jax_ep.dispatch_cached(x, handle), handle), x)[1](
                out
            )[0]
        return results

    # ---- compiled --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def draw(self):
        """seed s32[], style s32[] -> operands of a call."""
        sharding = NamedSharding(self.mesh, jax.P(tuple(name for name, _ in self.axes)))
        return jax.jit(functools.partial(draw, self), out_shardings=sharding)

    @functools.cached_property
    def with_kernels(self):
        with LOWERING:
            lowered = jax.jit(self.on_every_device(self.call)).lower(*self.operands)
        return lowered.compile()

    @functools.cached_property
    def differing(self):
        """Operands, results -> s32[devices, leaves of results]: how many elements are not the reference's."""

        def f(operands, results):
            return count_differing(results, self.call(*operands))[None]

        results = jax.eval_shape(self.on_every_device(self.call), *self.operands)
        with LOWERING, mock.patch.object(group, "along", return_value=None):  # no kernels here
            lowered = jax.jit(self.on_every_device(f)).lower(self.operands, results)
        return lowered.compile()

    @functools.cached_property
    def operands(self):
        operands = jax.eval_shape(self.draw, 0, 0)
        sharding = NamedSharding(self.mesh, jax.P(tuple(name for name, _ in self.axes)))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), operands)

    @property
    def has_oracle(self):
        return self.wire is None and self.combine_wire is None


def bare(x):
    """Quantized rows without what derivatives pass through."""
    return dataclasses.replace(x, carrier=None) if isinstance(x, jax_ep.Quantized) else x


def count_differing(got, expected):
    def count(a, b):
        a, b = (lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") for leaf in (a, b))
        return (a != b).sum(dtype=jnp.int32)

    return jnp.stack(jax.tree.leaves(jax.tree.map(count, got, expected)))


# ---- what is drawn -----------------------------------------------------------------------------------------------------


@functools.cache
def draw_program(seed, index, size):
    """Program `index` of a seed, on the devices there are."""
    rng = np.random.default_rng((seed, index))
    num_devices = len(jax.devices())
    devices = [int(i) for i in rng.permutation(num_devices) if rng.random() < 0.8] or [0]
    if rng.random() < 0.5:
        devices = list(range(num_devices))
    axes, axis_name = (("e", len(devices)),), ("e",)
    if len(devices) % 2 == 0 and rng.random() < 0.5:
        axes = (("a", 2), ("b", len(devices) // 2))
        axis_name = [("a",), ("b",), ("a", "b"), ("b", "a")][rng.integers(4)]
    num_ranks = int(np.prod([length for name, length in axes if name in axis_name]))
    layout = str(rng.choice(["expert", "rank", "batched"]))
    dtype = str(rng.choice(["bfloat16", "bfloat16", "float16", "float32"]))
    num_experts = num_ranks * int(rng.choice([1, 2, 3, 8, 16]))
    num_topk = min(int(rng.choice([1, 2, 3, 4, 6, 8, 16])), num_experts)
    kind = str(rng.choice(KINDS))
    wire = combine_wire = None
    if kind == "layer":
        wire = rng.choice([None, None, "fp8", "fp8_ue8m0", "mxfp8"])
        combine_wire = rng.choice([None, None, None, "logfmt10"])
    hidden = int(rng.choice([8, 16, 72, 200, 640, 1024, 2880, 4096]))
    if wire is not None or combine_wire is not None:
        hidden = -(-hidden // 512) * 512
    num_tokens = int(rng.choice([1, 2, 7, 33, 64, 129, 512]))
    alignment = int(rng.choice([1, 1, 8, 16, 128])) if layout == "expert" else 1
    while True:
        mean = max(1, num_tokens * (1 if layout == "rank" else num_topk))
        rows = int(mean * rng.choice([0.3, 1.0, 1.5, 3.0])) + 1 + alignment
        if rows * hidden * np.dtype(jnp.dtype(dtype)).itemsize <= ROWS_BYTES[size] or num_tokens == 1:
            break
        num_tokens = max(1, num_tokens // 2)
    capacity = None if num_ranks * rows * num_topk * hidden * 4 < ROWS_BYTES[size] and rng.random() < 0.3 else rows
    return Program(
        kind=kind,
        devices=tuple(devices),
        axes=axes,
        axis_name=axis_name,
        num_tokens=num_tokens,
        hidden=hidden,
        num_topk=num_topk,
        num_experts=num_experts,
        layout=layout,
        dtype=dtype,
        expert_alignment=alignment,
        max_recv_tokens=None if layout == "batched" else capacity,
        expert_capacity=-(-rows * num_ranks // num_experts) if layout == "batched" else None,
        wire=None if wire is None else str(wire),
        combine_wire=None if combine_wire is None else str(combine_wire),
        has_weights=bool(rng.random() < 0.7),
        num_sms=[None, None, 4, 16, 64][rng.integers(5)],
        mode=str(rng.choice(MODES)),  # where the kernels of one do not fit, those of the other serve
    )


def draw(program, seed, style):
    """x, topk_idx, weights, num_layers of all devices, on the devices."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    num_devices, num_experts = len(program.devices), program.num_experts
    tokens = num_devices * program.num_tokens
    shape = (tokens, program.num_topk)
    x = jax.random.normal(next(keys), (tokens, program.hidden), jnp.dtype(program.dtype))
    weights = jax.random.uniform(next(keys), shape, minval=0.1) / program.num_topk
    every = jax.random.randint(next(keys), shape, 0, num_experts)
    distinct = lax.top_k(jax.random.uniform(next(keys), (tokens, num_experts)), program.num_topk)[1]
    skewed = (num_experts * jax.random.uniform(next(keys), shape) ** 4).astype(jnp.int32)
    absent = jnp.where(jax.random.bernoulli(next(keys), 0.7, shape), -1, every)
    outside = jnp.array([-2, num_experts, num_experts + 1, -(2**31), 2**31 - 1], jnp.int32)
    invalid = jnp.where(
        jax.random.bernoulli(next(keys), 0.3, shape), jax.random.choice(next(keys), outside, shape), absent
    )
    one = jax.random.randint(next(keys), (), 0, num_experts)
    num_local = num_experts // program.num_ranks
    device = jnp.arange(tokens)[:, None] // program.num_tokens
    silent = jax.random.randint(next(keys), (), 0, num_devices)
    drawn = {
        "distinct": distinct,
        "any": every,
        "skewed": jnp.minimum(skewed, num_experts - 1),
        "absent": absent,
        "invalid": invalid,
        "hot expert": jnp.where(jnp.arange(program.num_topk) == 0, one, distinct),
        "one expert": jnp.full(shape, one),
        "one rank": one // num_local * num_local + every % num_local,
        "silent rank": jnp.where(device == silent, -1, distinct),
        "nothing": jnp.full(shape, -1),
    }
    topk_idx = jnp.stack([drawn[name] for name in STYLES]).astype(jnp.int32)[style]
    num_layers = jnp.full(num_devices, jax.random.randint(next(keys), (), 0, MAX_LAYERS + 1), jnp.int32)
    return x, topk_idx, weights, num_layers


# ---- the oracle ----------------------------------------------------------------------------------------------------------


def oracle_results(program, operands, num_rows):
    """What NumPy says of x, topk_idx, weights [R, T, ...] of one group: the results that it knows, by name."""
    x, topk_idx, weights, num_layers = operands

    def layer(x, topk_idx, gates=True):
        sent = oracle.simulate(
            topk_idx,
            x,
            weights if program.has_weights else None,
            layout=program.layout,
            num_experts=program.num_experts,
            num_rows=num_rows,
            alignment=program.expert_alignment,
            expert_capacity=program.expert_capacity,
        )
        rows = sent.x.reshape(program.num_ranks, -1, x.shape[-1])
        weighted = gates and program.has_weights and program.layout != "rank"
        gate = sent.weights.reshape(program.num_ranks, -1) if weighted else None
        return sent, rows, oracle.combine(sent.routing, -rows, gate)

    if program.kind == "loop":
        for i in range(num_layers.flat[0]):
            x = layer(x, np.roll(topk_idx, i, axis=1))[2]
        return {"out": x}
    sent, rows, out = layer(x, topk_idx)
    results = {"x": sent.x, "weights": sent.weights, "slot": sent.routing.slot, "recv_slot": sent.routing.recv_slot}
    results |= {
        name: getattr(sent, name) for name in ("num_tokens_per_expert", "num_dropped", "num_invalid", "group_sizes")
    }
    results |= {"topk_idx": sent.topk_idx, "out": out}
    if program.kind == "cached":
        again, rows, _ = layer(-x, topk_idx)
        results |= {"cached": again.x, "back": oracle.combine(sent.routing, rows)}
    if program.kind == "gradient":
        results["gradient"] = layer(out, topk_idx, gates=False)[2]
    return results


def check_with_oracle(program, operands, results):
    """Names of results that differ from the oracle's, with the number of elements."""
    flat = dict(results.pop("handle").__dict__ if "handle" in results else {}, **results)
    routing = flat.get("routing")
    flat |= vars(flat.pop("recv")) if "recv" in flat else {}

    def of_group(a, places):
        a = np.asarray(a)
        return a.reshape(len(program.devices), -1, *a.shape[1:])[places]

    differing = {}
    for places in program.groups.T:
        mine = [of_group(a, places) for a in operands]
        num_rows = routing.max_recv_tokens if routing else loop_rows(program)
        for name, expected in oracle_results(program, mine, num_rows).items():
            if expected is None:
                continue
            expected = np.ascontiguousarray(expected)
            got = np.ascontiguousarray(of_group(flat[name], places)).reshape(expected.shape)
            bits = f"u{expected.dtype.itemsize}"
            count = int((got.view(bits) != expected.view(bits)).sum()) if got.dtype == expected.dtype else expected.size
            if count:
                differing[name] = differing.get(name, 0) + count
    return differing


def loop_rows(program):
    """max_recv_tokens of a loop's calls, which hand out no handle."""
    if program.max_recv_tokens is not None or program.layout == "batched":
        return program.max_recv_tokens
    sizes = (program.num_ranks, program.num_tokens, program.num_topk, program.num_experts)
    return (
        oracle.default_rows(program.layout, *sizes, program.expert_alignment)
        + program.num_experts * program.expert_alignment
    )


# ---- the run -------------------------------------------------------------------------------------------------------------


class Soak:
    """Calls one after another, up to IN_FLIGHT of them not yet looked at."""

    def __init__(self, seed, num_programs, size, oracle_every):
        self.seed, self.oracle_every = seed, oracle_every
        self.programs = [draw_program(seed, i, size) for i in range(num_programs)]
        self.seen, self.pending, self.failures = set(), collections.deque(), []
        self.calls = self.oracle_checks = 0

    def compile(self):
        """All programs, several at a time."""
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            list(threads.map(self.compile_one, self.programs))

    @staticmethod
    def compile_one(program):
        program.draw(0, 0)
        return program.with_kernels, program.differing

    def call(self, number):
        rng = np.random.default_rng((self.seed, 1, number))
        program = self.programs[rng.integers(len(self.programs))]
        operands = program.draw(int(rng.integers(2**31)), int(rng.integers(len(STYLES))))
        results = program.with_kernels(*operands)
        self.pending.append((number, program, program.differing(operands, results)))
        self.calls += 1
        if program.has_oracle and (program not in self.seen or number % self.oracle_every == 0):
            self.oracle_checks += 1
            self.fail_if(number, program, "oracle", check_with_oracle(program, operands, dict(results)))
        self.seen.add(program)
        while len(self.pending) > IN_FLIGHT[jax.default_backend()]:
            self.look()

    def look(self):
        number, program, differing = self.pending.popleft()
        differing = np.asarray(differing).sum(axis=0)
        names = [jax.tree_util.keystr(path) for path, _ in self.leaves(program)]
        counts = {name: int(n) for name, n in zip(names, differing, strict=True) if n}
        self.fail_if(number, program, "reference", counts)

    @staticmethod
    @functools.cache
    def leaves(program):
        results = jax.eval_shape(program.on_every_device(program.call), *program.operands)
        return jax.tree.leaves_with_path(results)

    def fail_if(self, number, program, against, differing):
        if differing:
            fields = dataclasses.asdict(program)
            self.failures.append({"call": number, "against": against, "differing": differing, "program": fields})

    def run(self, first, calls, seconds, say=lambda text: None):
        start = told = time.monotonic()
        number = first
        if calls > len(self.programs):  # else those that are called, when they are
            self.compile()
            say(f"{len(self.programs)} programs after {time.monotonic() - start:.0f} s")
        try:
            for number in range(first, first + calls):
                self.call(number)
                now = time.monotonic()
                if now - told > 5:
                    told = now
                    rate = self.calls / (now - start)
                    say(f"{self.calls} of {calls} calls, {rate:.1f} a second, {len(self.failures)} wrong")
                if now - start > seconds:
                    break
            while self.pending:
                self.look()
        except jax.errors.JaxRuntimeError as error:  # the last call launched, or one in flight before it
            self.failures.append({"call": number, "error": str(error)})
        return time.monotonic() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, if not before")
    parser.add_argument("--programs", type=int, default=32, help="that are compiled")
    parser.add_argument("--seed", type=int, default=0, help="of the programs and of the calls")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--size", choices=ROWS_BYTES, default="full" if jax.default_backend() == "gpu" else "small")
    parser.add_argument("--oracle-every", type=int, default=500)
    parser.add_argument("--out", type=Path, help="JSON record")
    args = parser.parse_args(argv)

    soak = Soak(args.seed, args.programs, args.size, args.oracle_every)
    seconds = soak.run(args.first, args.calls, args.seconds, lambda text: print(text, flush=True))
    for failure in soak.failures[:20]:
        print("WRONG", json.dumps(failure))
    print(
        f"{soak.calls} calls of {len(soak.seen)} programs in {seconds:.0f} s, {soak.oracle_checks} of them also by the "
        f"oracle: {len(soak.failures)} wrong."
    )
    if args.out:
        record = {
            **timing.origin(),
            "seed": args.seed,
            "calls": soak.calls,
            "programs": len(soak.seen),
            "oracle_checks": soak.oracle_checks,
            "seconds": round(seconds, 1),
            "num_failures": len(soak.failures),
            "failures": soak.failures[:20],
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if soak.failures or not soak.calls else 0


if __name__ == "__main__":
    assert benchmarks.ROOT.is_dir()
    sys.exit(main())
