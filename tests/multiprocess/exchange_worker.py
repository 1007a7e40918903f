"""The suite's core on 2 processes with 4 devices each, or on GPUs: each process compares the shards that it holds with the oracle's.

`core` and `core_on_gpus` run every check in turn and return what failed, by name: starting processes takes longer than
checking.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import case
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from spmd import assert_same_bits, dispatch, inputs, merge_ranks
from strategies import draw_topk_idx, gates, integers, normal, stamped

import jax_ep
from jax_ep._src import compat

EXCHANGES = [
    *("expert-eight-ranks", "expert-tight-aligned", "expert-two-axes"),
    *("rank-eight-ranks", "rank-tight"),
    *("batched-eight-ranks", "batched-tight", "batched-roomy-two-axes"),
]
LOW_LATENCY = ("expert-eight-ranks", "rank-tight", "batched-tight")
STYLES = ("distinct", "invalid", "one_rank")


def mesh_of(c):
    """The case's mesh over all processes: neighbours in a mesh of fewer devices than there are belong to different processes."""
    devices, num_processes = jax.devices(), jax.process_count()
    if c.num_ranks < len(devices):
        by_process = [[d for d in devices if d.process_index == i] for i in range(num_processes)]
        devices = [by_process[i % num_processes][i // num_processes] for i in range(c.num_ranks)]
    names, sizes = zip(*c.mesh_axes, strict=True)
    return Mesh(np.array(devices).reshape(sizes), names)


def spread(mesh, spec, tree):
    """NumPy arrays, the same in both processes, as global arrays."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)


def compile_on_every_rank(c, f):
    """jit(shard_map(f)) from NumPy arrays [R, n, ...] to global arrays [R * n, ...]."""
    mesh, spec = mesh_of(c), P(c.axis_name)
    compiled = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))
    return lambda *args: compiled(*spread(mesh, spec, merge_ranks(args)))


def compare(got, expected, name="", compare_shard=assert_same_bits):
    """got[R * n, ...] with expected[R, n, ...], as far as this process holds it."""
    if expected is None:
        assert got is None, name
        return
    expected = merge_ranks(expected)
    assert got.shape == expected.shape, name
    shards = got.addressable_shards
    assert len(shards) > 0, name
    assert len(shards) < len(got.sharding.device_set) or jax.process_count() == 1, name  # both processes take part
    for shard in shards:
        compare_shard(np.asarray(shard.data), expected[shard.index], f"{name} on {shard.device}")


def close(got, expected, name):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


# ---- checks ----------------------------------------------------------------------------------------------------------


def exchange(c, **options):
    """dispatch with all its results, dispatch_cached, combine with and without gates: every bit is the oracle's."""
    weighted = c.layout != "rank"

    def f(x, topk_idx, weights, other_x):
        recv, handle = dispatch(c, x, topk_idx, weights, **options)
        y = recv.x * jnp.asarray(0.375, recv.x.dtype)
        sums = jax_ep.combine(y, handle), jax_ep.combine(y, handle, recv.weights) if weighted else None
        return recv, handle, jax_ep.dispatch_cached(other_x, handle), y, sums

    program = compile_on_every_rank(c, f)
    for style in STYLES:
        topk_idx = draw_topk_idx(c, style)
        x, weights, other_x = inputs(c)
        recv, handle, cached, y, (plain, with_gates) = program(x, topk_idx, weights, other_x)
        simulate = functools.partial(
            oracle.simulate,
            topk_idx,
            layout=c.layout,
            num_experts=c.num_experts,
            num_rows=handle.routing.max_recv_tokens,
            alignment=c.expert_alignment,
            expert_capacity=handle.routing.expert_capacity,
        )
        expected = simulate(x, weights)
        for name in ("x", "weights", "topk_idx", "group_sizes", "num_tokens_per_expert", "num_dropped", "num_invalid"):
            compare(getattr(recv, name), getattr(expected, name), name)
        for name in ("slot", "recv_slot", "counts"):
            compare(getattr(handle, name), getattr(expected.routing, name), name)
        compare(cached, simulate(other_x, None).x, "dispatch_cached")

        y_expected = expected.x * np.asarray(0.375, expected.x.dtype)
        compare(y, y_expected, "y")
        rows = y_expected.reshape(c.num_ranks, -1, c.hidden)
        compare(plain, oracle.combine(expected.routing, rows), "combine")
        if weighted:
            gate = expected.weights.reshape(c.num_ranks, -1)
            compare(with_gates, oracle.combine(expected.routing, rows, gate), "combine with gates")


def halves(c=None, **options):
    """dispatch_start to combine_done gives the bits of dispatch and combine."""
    c = c or case("expert-eight-ranks")

    def f(x, topk_idx, weights):
        recv, handle = jax_ep.dispatch_done(dispatch(c, x, topk_idx, weights, start_only=True, **options))
        return recv.x, jax_ep.combine_done(jax_ep.combine_start(recv.x, handle, recv.weights))

    topk_idx = draw_topk_idx(c, "distinct")
    x, weights, _ = inputs(c)
    program = compile_on_every_rank(c, f)
    for _ in range(6):  # more often than there are windows
        rows, out = program(x, topk_idx, weights)
        num_rows = rows.shape[0] // c.num_ranks
        expected = oracle.simulate(topk_idx, x, weights, layout=c.layout, num_experts=c.num_experts, num_rows=num_rows)
        compare(rows, expected.x)
        compare(out, oracle.combine(expected.routing, expected.x, expected.weights))


def wire_formats(c=None, **options):
    """One row of integers a token is exact in fp8 as well: what arrives is what was sent."""
    # An encoded row is a multiple of 16 bytes: others are left to XLA's collectives, which GPUs shared by processes lack.
    c = dataclasses.replace(c or case("expert-eight-ranks"), dtype="float32", hidden=32)

    def f(x, topk_idx):
        recv, handle = dispatch(c, x, topk_idx, wire="fp8_ue8m0", **options)
        return jax_ep.dequantize(recv.x), jax_ep.combine(jax_ep.dequantize(recv.x), handle, wire=None)

    x, topk_idx = integers(0, c.num_ranks, c.num_tokens, c.hidden), draw_topk_idx(c, "distinct")
    rows, out = compile_on_every_rank(c, f)(x, topk_idx)
    num_rows = rows.shape[0] // c.num_ranks
    expected = oracle.simulate(topk_idx, x, None, layout=c.layout, num_experts=c.num_experts, num_rows=num_rows)
    compare(rows, expected.x)
    compare(out, c.num_topk * x)


def gradients(layout, c=None):
    """Of a layer with tanh experts, in x, gates and expert parameters: those of the dense computation in one process."""
    c = dataclasses.replace(c or case(f"{layout}-eight-ranks"), dtype="float32")

    def layer(x, topk_idx, weights, scale):
        recv, handle = dispatch(c, x, topk_idx, weights)
        if layout == "batched":
            return jax_ep.combine(jnp.tanh(recv.x * scale[:, None]), handle, recv.weights)
        if layout == "rank":
            each = jnp.tanh(recv.x[:, None] * scale[recv.topk_idx])
            return jax_ep.combine((each * recv.weights[..., None]).sum(axis=1), handle)
        expert = jnp.repeat(jnp.arange(len(scale)), recv.group_sizes, total_repeat_length=len(recv.x))
        return jax_ep.combine(jnp.tanh(recv.x * scale[expert]), handle, recv.weights)

    def dense(x, topk_idx, weights, scale):
        scale = scale.reshape(c.num_experts, c.hidden)
        return (jnp.tanh(x[..., None, :] * scale[topk_idx]) * weights[..., None]).sum(axis=2)

    def value_and_grads(layer, x, topk_idx, weights, scale, cotangent):
        out, vjp = jax.vjp(lambda x, weights, scale: layer(x, topk_idx, weights, scale), x, weights, scale)
        return out, *vjp(cotangent)

    shape = (c.num_ranks, c.num_tokens)
    args = (
        normal(0, *shape, c.hidden),
        draw_topk_idx(c, "distinct"),
        normal(1, *shape, c.num_topk),
        normal(2, c.num_ranks, c.num_local_experts, c.hidden),
        normal(3, *shape, c.hidden),
    )
    got = compile_on_every_rank(c, functools.partial(value_and_grads, layer))(*args)
    expected = jax.jit(functools.partial(value_and_grads, dense))(*args)
    for name, a, b in zip(("out", "x", "weights", "scale"), got, expected, strict=True):
        compare(a, np.asarray(b), name, close)


def nested_mesh(expert_axis_crosses):
    """A data axis beside the expert axis: each group of four ranks exchanges among itself, in one process or over both."""
    c = dataclasses.replace(case("expert"), num_ranks=4)
    devices = np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))).reshape(2, 4)
    if expert_axis_crosses:
        devices = devices.T.reshape(2, 4)
    mesh, spec = Mesh(devices, ("data", "expert")), P(("data", "expert"))

    def f(x, topk_idx, weights):
        recv, handle = dispatch(c, x, topk_idx, weights)
        return recv.x, jax_ep.combine(recv.x, handle, recv.weights)

    shape = (2, c.num_ranks, c.num_tokens)
    x = np.stack([stamped(*shape[1:], c.hidden, dtype=c.dtype, first=1 + 40 * i) for i in range(2)])
    topk_idx = np.stack([draw_topk_idx(c, "distinct", seed=i) for i in range(2)])
    weights = gates(*shape, c.num_topk)
    args = spread(mesh, spec, jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), (x, topk_idx, weights)))
    rows, out = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))(*args)
    num_rows = rows.shape[0] // 8
    groups = [
        oracle.simulate(topk_idx[i], x[i], weights[i], layout="expert", num_experts=c.num_experts, num_rows=num_rows)
        for i in range(2)
    ]
    compare(rows, np.concatenate([group.x for group in groups]))
    compare(out, np.concatenate([oracle.combine(group.routing, group.x, group.weights) for group in groups]))


def barrier():
    """No rank leaves before the last one has come."""
    num_ranks = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    wait = jax.jit(jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=P("expert")))
    compare(wait(), np.full((num_ranks, 1), num_ranks, np.int32))
    if jax.process_index() == 1:
        time.sleep(1)
    before = time.time()
    jax.block_until_ready(wait())
    return {"before": before, "after": time.time()}


def calling_again():
    """initialize does nothing the second time, and finalize forgets without a word to the others."""
    jax_ep.initialize()
    if jax.process_index() == 1:
        jax_ep.finalize()


CHECKS = {
    **{f"exchange {name}": functools.partial(exchange, case(name)) for name in EXCHANGES},
    **{f"gradients {layout}": functools.partial(gradients, layout) for layout in ("expert", "rank", "batched")},
    "halves": halves,
    "wire formats": wire_formats,
    "nested mesh, groups within a process": functools.partial(nested_mesh, False),
    "nested mesh, groups across processes": functools.partial(nested_mesh, True),
    "barrier": barrier,
    "calling again": calling_again,
}


def core_of_four():
    """The part of it that four processes with two devices each can do: no mesh without one of them."""
    jax_ep.initialize()
    assert jax.process_count() == 4 and jax.local_device_count() == 2
    names = (
        "exchange expert-eight-ranks",
        "exchange rank-tight",
        "exchange batched-eight-ranks",
        "gradients expert",
        "halves",
    )
    return run_all({name: CHECKS[name] for name in (*names, "barrier", "calling again")})


def core():
    jax_ep.initialize()
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    return run_all(CHECKS)


def run_all(checks):
    failed, seconds, returned = {}, {}, {}
    for name, check in checks.items():
        start = time.monotonic()
        try:
            returned[name] = check()
        except Exception:  # every process goes on to the next check, so that none waits for another
            failed[name] = traceback.format_exc()
        seconds[name] = round(time.monotonic() - start, 1)
    return {"failed": failed, "seconds": seconds, "barrier": returned.get("barrier")}


# ---- on GPUs, through the kernels ------------------------------------------------------------------------------------


def on_all_gpus(name):
    """The case with one rank a GPU of all processes, and as many experts on each."""
    c, num_ranks = case(name, exact=True), jax.device_count()
    num_experts = c.num_local_experts * num_ranks
    return dataclasses.replace(
        c, num_ranks=num_ranks, num_experts=num_experts, num_topk=min(c.num_topk, num_experts), axes=()
    )


GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}


def small_call(mode="high_throughput", graph=False, num_tokens=16, hidden=64):
    """A program of one dispatch and one combine on all GPUs: x f32[R * num_tokens, hidden] of this process's making to R * x."""
    num_ranks = jax.device_count()
    mesh, spec = Mesh(np.array(jax.devices()), ("expert",)), P("expert")

    def f(x, topk_idx):
        recv, handle = jax_ep.dispatch(x, topk_idx, axis_name="expert", num_experts=num_ranks, mode=mode)
        return jax_ep.combine(recv.x, handle)

    sharded = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    compiled = jax.jit(sharded, compiler_options=GRAPHS if graph else {"xla_gpu_enable_command_buffer": ""})
    topk_idx = np.tile(np.arange(num_ranks, dtype=np.int32), (num_tokens * num_ranks, 1))
    shape = (num_tokens * num_ranks, hidden)

    def call(value):
        out = compiled(*spread(mesh, spec, (np.full(shape, value, np.float32), topk_idx)))
        return np.concatenate([np.asarray(shard.data) for shard in out.addressable_shards])

    call.text = lambda: compiled.lower(*spread(mesh, spec, (np.zeros(shape, np.float32), topk_idx))).as_text()
    return call


def kernels_serve(mode):
    text, prefix = small_call(mode).text(), "jax_ep_low_latency" if mode == "low_latency" else "jax_ep"
    assert f"@{prefix}_dispatch(" in text and f"@{prefix}_combine(" in text
    assert "all_gather" not in text and "all_to_all" not in text


def many_calls(**how):
    call = small_call(**how)
    for i in range(50):
        assert (call(i) == i * jax.device_count()).all()


def sizes_by_turns():
    """Larger arenas come while programs with smaller ones are there; all stay right, launched or replayed."""
    calls = []
    for num_tokens, hidden in ((4, 64), (128, 1024), (16, 64), (512, 1024)):
        calls += [small_call("low_latency", graph, num_tokens, hidden) for graph in (False, True)]
        for i in range(6):
            for call in calls:
                assert (call(i) == i * jax.device_count()).all()


def core_on_gpus():
    jax_ep.config.arena_bytes = 1 << 20  # for some arenas; processes make the others when asked
    jax_ep.initialize()
    checks = {"barrier": barrier, "sizes by turns": sizes_by_turns}
    for mode in ("high_throughput", "low_latency"):
        checks[f"kernels serve, {mode}"] = functools.partial(kernels_serve, mode)
        for graph in (False, True):
            checks[f"many calls, {mode}, graph {graph}"] = functools.partial(many_calls, mode=mode, graph=graph)
    for name in LOW_LATENCY:
        checks[f"exchange {name}, low latency"] = lambda name=name: exchange(on_all_gpus(name), mode="low_latency")
    for check in (halves, wire_formats):
        checks[f"{check.__name__}, low latency"] = lambda check=check: check(
            on_all_gpus("expert-eight-ranks"), mode="low_latency"
        )
    checks["halves, high throughput"] = lambda: halves(on_all_gpus("expert-eight-ranks"), mode="high_throughput")
    checks |= {f"exchange {name}": lambda name=name: exchange(on_all_gpus(name)) for name in EXCHANGES}
    for layout in ("expert", "rank", "batched"):
        checks[f"gradients {layout}"] = lambda layout=layout: gradients(layout, on_all_gpus(f"{layout}-eight-ranks"))
    return run_all(checks)


def error_of(call, tries=4):
    """What calling again and again ends in, and after how many seconds."""
    start = time.monotonic()
    for _ in range(tries):
        try:
            call(1)
        except jax.errors.JaxRuntimeError as error:
            return str(error), time.monotonic() - start
    return None, time.monotonic() - start


def both_here(name):
    """Both processes have come here; no part of what is tested."""
    compat.distributed_client().wait_at_barrier(f"test/{name}", 60_000)


def comes_late(mode, graph):
    """Process 1 stays away from a call, then comes: both learn of it, and after initialize both are right again."""
    jax_ep.initialize()
    jax_ep.config.timeout = 6.0
    call, me, num_ranks = small_call(mode, graph), jax.process_index(), jax.device_count()
    assert all((call(i) == i * num_ranks).all() for i in range(3))  # captured, then replayed
    both_here("right")
    errors = [error_of(call)] if me == 0 else []
    both_here("0 has failed")
    errors += [error_of(call)]
    both_here("both have failed")
    jax_ep.initialize()
    both_here("resumed")  # without it process 1 might call while 0 still compares
    right = [bool((call(i) == i * num_ranks).all()) for i in range(1, 5)]
    return {"errors": errors, "right": right}


def is_killed(mode, graph):
    """Process 1 is killed while calls are under way; what process 0 is told, and when. No result but zeros is wrong before."""
    jax_ep.initialize()
    jax_ep.config.timeout = 3.0
    call, num_ranks = small_call(mode, graph), jax.device_count()
    assert (call(1) == num_ranks).all()
    both_here("right")
    if jax.process_index() == 1:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    last_right, count = time.monotonic(), 0
    while time.monotonic() < last_right + 30:
        try:
            out = call(count + 1)
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error), "seconds": time.monotonic() - last_right, "calls": count}
        if (out == (count + 1) * num_ranks).all():
            last_right, count = time.monotonic(), count + 1
        else:
            assert (out == 0).all()
    return {"error": None}


def starts_and_calls():
    """A job that is there only for a few calls."""
    jax_ep.initialize()
    return [bool((small_call(mode)(3) == 3 * jax.device_count()).all()) for mode in ("high_throughput", "low_latency")]


def falls_back():
    """What is compiled where a process's memory cannot be shared: in every process the same, and each says why."""
    jax_ep.initialize()
    call = small_call()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = call.text()
    return {
        "kernels": "@jax_ep_dispatch(" in text,
        "warnings": [str(warning.message) for warning in caught if "jax_ep" in str(warning.message)],
        "right": bool((call(3) == 3 * jax.device_count()).all()),
    }
