"""The suite's core on 2 processes with 4 devices each: each process compares the shards that it holds with the oracle's.

`core` runs every check in turn and returns what failed, by name: starting processes takes longer than checking.
"""

import dataclasses
import functools
import time
import traceback

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

EXCHANGES = [
    *("expert-eight-ranks", "expert-tight-aligned", "expert-two-axes"),
    *("rank-eight-ranks", "rank-tight"),
    *("batched-eight-ranks", "batched-tight", "batched-roomy-two-axes"),
]
STYLES = ("distinct", "invalid", "one_rank")


def mesh_of(c):
    """The case's mesh over both processes: every other rank of a mesh with fewer than 8 devices is the other process's."""
    devices = jax.devices()
    if c.num_ranks < len(devices):
        by_process = [[d for d in devices if d.process_index == i] for i in range(2)]
        devices = [by_process[i % 2][i // 2] for i in range(c.num_ranks)]
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
    assert 0 < len(shards) < len(got.sharding.device_set), name  # both processes take part
    for shard in shards:
        compare_shard(np.asarray(shard.data), expected[shard.index], f"{name} on {shard.device}")


def close(got, expected, name):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


# ---- checks ----------------------------------------------------------------------------------------------------------


def exchange(c):
    """dispatch with all its results, dispatch_cached, combine with and without gates: every bit is the oracle's."""
    weighted = c.layout != "rank"

    def f(x, topk_idx, weights, other_x):
        recv, handle = dispatch(c, x, topk_idx, weights)
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


def halves():
    """dispatch_start to combine_done gives the bits of dispatch and combine."""
    c = case("expert-eight-ranks")

    def f(x, topk_idx, weights):
        recv, handle = jax_ep.dispatch_done(dispatch(c, x, topk_idx, weights, start_only=True))
        return recv.x, jax_ep.combine_done(jax_ep.combine_start(recv.x, handle, recv.weights))

    topk_idx = draw_topk_idx(c, "distinct")
    x, weights, _ = inputs(c)
    rows, out = compile_on_every_rank(c, f)(x, topk_idx, weights)
    num_rows = rows.shape[0] // c.num_ranks
    expected = oracle.simulate(topk_idx, x, weights, layout=c.layout, num_experts=c.num_experts, num_rows=num_rows)
    compare(rows, expected.x)
    compare(out, oracle.combine(expected.routing, expected.x, expected.weights))


def wire_formats():
    """One row of integers a token is exact in fp8 as well: what arrives is what was sent."""
    c = dataclasses.replace(case("expert-eight-ranks"), dtype="float32")

    def f(x, topk_idx):
        recv, handle = dispatch(c, x, topk_idx, wire="fp8_ue8m0")
        return jax_ep.dequantize(recv.x), jax_ep.combine(jax_ep.dequantize(recv.x), handle, wire=None)

    x, topk_idx = integers(0, c.num_ranks, c.num_tokens, c.hidden), draw_topk_idx(c, "distinct")
    rows, out = compile_on_every_rank(c, f)(x, topk_idx)
    num_rows = rows.shape[0] // c.num_ranks
    expected = oracle.simulate(topk_idx, x, None, layout=c.layout, num_experts=c.num_experts, num_rows=num_rows)
    compare(rows, expected.x)
    compare(out, c.num_topk * x)


def gradients(layout):
    """Of a layer with tanh experts, in x, gates and expert parameters: those of the dense computation in one process."""
    c = dataclasses.replace(case(f"{layout}-eight-ranks"), dtype="float32")

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
    mesh = mesh_of(case("expert-eight-ranks"))
    wait = jax.jit(jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=P("expert")))
    compare(wait(), np.full((8, 1), 8, np.int32))
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


def core():
    jax_ep.initialize()
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    failed, seconds, returned = {}, {}, {}
    for name, check in CHECKS.items():
        start = time.monotonic()
        try:
            returned[name] = check()
        except Exception:  # every process goes on to the next check, so that none waits for another
            failed[name] = traceback.format_exc()
        seconds[name] = round(time.monotonic() - start, 1)
    return {"failed": failed, "seconds": seconds, "barrier": returned.get("barrier")}
