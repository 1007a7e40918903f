"""The kernels behind the primitives on this machine's GPUs: that they are used, and give the same bits again and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._src import group

MODES = ["high_throughput", "low_latency"]

pytestmark = pytest.mark.gpu


def shard_map(f):
    mesh = jax.make_mesh((len(jax.devices()),), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("e"), out_specs=P("e")))


def pair(layout, mode):
    def f(x, idx, gates):
        static = {"axis_name": "e", "num_experts": 4 * len(jax.devices()), "layout": layout, "mode": mode}
        recv, handle = jax_ep.dispatch(x, idx, gates, **static)
        moved = jax_ep.dispatch_cached(2 * x, handle)
        out = jax_ep.combine(recv.x + moved, handle, None if layout == "rank" else recv.weights)
        return out, handle.slot, recv.num_tokens_per_expert

    return f


def operands():
    num_ranks = len(jax.devices())
    rng = np.random.default_rng(3)
    idx = rng.integers(-1, 4 * num_ranks, (33 * num_ranks, 3)).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((33 * num_ranks, 72)), jnp.bfloat16)
    return x, idx, rng.standard_normal(idx.shape).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_programs_call_the_kernels_and_no_collective(layout, mode):
    text = shard_map(pair(layout, mode)).lower(*operands()).as_text()
    prefix = "jax_ep_low_latency_" if mode == "low_latency" else "jax_ep_"
    for operation in ("dispatch", "dispatch_cached", "combine"):
        assert f"@{prefix}{operation}(" in text
    assert "all_gather" not in text and "all_to_all" not in text


def test_a_barrier_is_a_kernel_that_counts_the_ranks():
    mesh = jax.make_mesh((len(jax.devices()),), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.jit(jax.shard_map(lambda: jax_ep.barrier("e"), mesh=mesh, in_specs=(), out_specs=P("e")))
    text = f.lower().as_text()
    assert "@jax_ep_barrier(" in text and "all_reduce" not in text
    for _ in range(20):
        np.testing.assert_array_equal(f(), np.full(mesh.size, mesh.size, np.int32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_many_calls_in_flight_give_the_same_bits(layout, mode):
    f = shard_map(pair(layout, mode))
    first = jax.tree.map(np.asarray, f(*operands()))
    for result in [f(*operands()) for _ in range(50)]:
        jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(np.asarray, result))


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_both_kinds_of_kernels_and_the_reference_agree_to_the_bit(layout, monkeypatch):
    results = [jax.tree.map(np.asarray, shard_map(pair(layout, mode))(*operands())) for mode in MODES]
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: None)
    reference = jax.tree.map(np.asarray, shard_map(pair(layout, "auto"))(*operands()))
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, reference)


@pytest.mark.parametrize("wire", ["fp8", "fp8_ue8m0", "mxfp8"])
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_rows_that_kernels_encode_are_those_of_the_reference(layout, wire, monkeypatch):
    """The last group of 128 columns is short; some rows have an inf or NaN, some are zero."""

    def received(mode):
        def f(x, idx, gates):
            static = {"axis_name": "e", "num_experts": 4 * len(jax.devices()), "layout": layout, "mode": mode}
            recv, handle = jax_ep.dispatch(x, idx, gates, wire=wire, **static)
            return recv.x.values, recv.x.scales, recv.weights, handle.slot

        calls = shard_map(f)
        text = calls.lower(x, idx, gates).as_text()
        prefix = {"high_throughput": "@jax_ep_dispatch(", "low_latency": "@jax_ep_low_latency_dispatch("}
        assert mode not in prefix or prefix[mode] in text
        return [np.asarray(leaf).view(np.uint8) for leaf in calls(x, idx, gates)]

    x, idx, gates = operands()
    x = jnp.tile(x, (1, 30)).at[::5, 3].set(jnp.inf).at[1::7, 200].set(jnp.nan).at[2::9].set(0)  # 2160 columns
    results = [received(mode) for mode in MODES]
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: None)
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, received("auto"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_two_batches_in_halves_are_kernels_and_give_the_bits_of_whole_calls(layout, mode):
    """Many calls in flight, nothing between them that would keep the ranks together."""
    static = {"axis_name": "e", "num_experts": 4 * len(jax.devices()), "layout": layout, "mode": mode}

    def whole(x, idx, gates):
        recv, handle = jax_ep.dispatch(x, idx, gates, **static)
        return jax_ep.combine(recv.x * recv.x, handle, None if layout == "rank" else recv.weights)

    def experts(pending):
        recv, handle = jax_ep.dispatch_done(pending)
        return jax_ep.combine_start(recv.x * recv.x, handle, None if layout == "rank" else recv.weights)

    def two(x, idx, gates):
        a, b = jax_ep.dispatch_start(x, idx, gates, **static), jax_ep.dispatch_start(-3 * x, idx, gates, **static)
        a, b = experts(a), experts(b)
        return jax_ep.combine_done(a), jax_ep.combine_done(b)

    text = shard_map(two).lower(*operands()).as_text()
    prefix = "jax_ep_low_latency_" if mode == "low_latency" else "jax_ep_"
    for half in ("dispatch_start", "dispatch_done", "combine_start", "combine_done"):
        assert f"@{prefix}{half}(" in text
    assert "all_gather" not in text and "all_to_all" not in text
    x, idx, gates = operands()
    expected = [np.asarray(shard_map(whole)(y, idx, gates)) for y in (x, -3 * x)]
    f = shard_map(two)
    for result in [f(x, idx, gates) for _ in range(50)]:
        for got, want in zip(result, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)


def test_work_between_the_halves_of_high_throughput_runs_while_rows_travel():
    """Not a measure (benchmarks/overlap.py is): a long product between the halves, and the bits are the same."""
    static = {"axis_name": "e", "num_experts": 4 * len(jax.devices()), "mode": "high_throughput"}
    num_ranks = len(jax.devices())
    rng = np.random.default_rng(5)
    idx = rng.integers(0, 4 * num_ranks, (2048 * num_ranks, 3)).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((2048 * num_ranks, 1024)), jnp.bfloat16)

    def f(x, idx, w):
        outs, product = [], w
        for i in range(4):
            pending = jax_ep.dispatch_start(x * (i + 1), idx, **static)
            pending, product = jax.lax.optimization_barrier((pending, product))
            pending, product = jax.lax.optimization_barrier((pending, product @ w))
            recv, handle = jax_ep.dispatch_done(pending)
            pending = jax_ep.combine_start(recv.x, handle)
            pending, product = jax.lax.optimization_barrier((pending, product))
            pending, product = jax.lax.optimization_barrier((pending, product @ w))
            outs.append(jax_ep.combine_done(pending))
        return jnp.stack(outs, 1), product

    def whole(x, idx):
        recv, handle = jax_ep.dispatch(x, idx, **static)
        return jax_ep.combine(recv.x, handle)

    w = jnp.asarray(rng.standard_normal((2048 * num_ranks, 2048)) / 45, jnp.bfloat16)
    outs = np.asarray(shard_map(f)(x, idx, w)[0])
    for i in range(4):
        np.testing.assert_array_equal(outs[:, i], np.asarray(shard_map(whole)(x * (i + 1), idx)))


@pytest.mark.parametrize("mode", MODES)
def test_halves_in_a_scan_carry_their_rows_from_one_step_to_the_next(mode):
    """Each step ends the exchange that the step before has started; the first ends one of nothing."""

    def f(x, idx, gates):
        static = {"axis_name": "e", "num_experts": 4 * len(jax.devices()), "mode": mode}

        def step(pending, x):
            recv, handle = jax_ep.dispatch_done(pending)
            return jax_ep.dispatch_start(x, idx, gates, **static), jax_ep.combine(recv.x, handle)

        nothing = jax.tree.map(jnp.zeros_like, jax_ep.dispatch_start(x, idx, gates, **static))
        last, outs = jax.lax.scan(step, nothing, jnp.stack([x * i for i in range(1, 8)]))
        recv, handle = jax_ep.dispatch_done(last)
        return jnp.concatenate([outs, jax_ep.combine(recv.x, handle)[None]]).swapaxes(0, 1)

    x, idx, gates = operands()
    outs = np.asarray(shard_map(f)(jnp.sign(x), idx, gates))
    once = outs[:, 1]
    assert np.any(once)
    for step in range(8):
        np.testing.assert_array_equal(outs[:, step], once * step)
