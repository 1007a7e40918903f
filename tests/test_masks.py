"""jax_ep.config.dead_devices: masked ranks take no part, in programs that are compiled already too; the others' results are exact.

On GPUs all ranks call here, the masked ones too (one process runs the program on every device); kernels.cu and
low_latency.cu have ranks that never call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import case
from spmd import LAYOUTS, assert_same_bits, assert_same_tree, dispatch, expect, mesh_of, on_every_rank
from strategies import draw_topk_idx, gates, integers, normal, stamped
from test_logfmt import oracle_roundtrip

import jax_ep
from jax_ep._src import targets

NAMES = [
    "expert", "expert-eight-ranks", "expert-tight-aligned", "expert-permuted", "expert-two-axes", "rank",
    "rank-eight-ranks", "rank-tight", "batched", "batched-tight", "batched-roomy-two-axes", "batched-three-ranks",
]  # fmt: skip


# A mask changes which rows travel, and no arithmetic: sums are held to the bit as XLA optimises them in test_combine.py, those
# in logfmt10 in test_wire.py.
pytestmark = pytest.mark.usefixtures("compiles_fast")


@pytest.fixture(autouse=True)
def unmasked():
    yield
    jax_ep.config.dead_devices = []


def masks(c):
    """Sets of ranks to try: the first, the last, several, nobody again."""
    return dict.fromkeys([(0,), (c.num_ranks - 1,), tuple(range(0, c.num_ranks, 2))[: c.num_ranks - 1], ()])


def mask(c, ranks):
    """The devices of these ranks of the case's mesh."""
    devices = mesh_of(c).devices.flatten()
    jax_ep.config.dead_devices = [devices[rank] for rank in ranks]


def by_row(c, y):
    return y.reshape(c.num_ranks, -1, y.shape[-1])


@functools.cache
def layer(c):
    """x, topk_idx, weights -> Dispatched, Handle, their sums."""

    def f(x, idx, weights):
        recv, handle = dispatch(c, x, idx, weights)
        return recv, handle, jax_ep.combine(recv.x, handle, None if c.layout == "rank" else recv.weights)

    return on_every_rank(c, f)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_the_masked_ranks_is_the_oracles(name):
    """One compiled program, under one mask after another."""
    c = case(name)
    idx = draw_topk_idx(c, "any")
    x, weights = stamped(c.num_ranks, c.num_tokens, c.hidden, dtype=c.dtype), gates(*idx.shape)

    for dead in masks(c):
        mask(c, dead)
        recv, handle, out = layer(c)(x, idx, weights)
        expected = expect(c, handle, idx, x, weights, dead)
        routing = expected.routing
        for field in ("x", "weights", "topk_idx", "num_tokens_per_expert", "num_dropped"):
            assert_same_bits(getattr(recv, field), getattr(expected, field), field)
        if c.layout == "expert":
            assert_same_bits(recv.group_sizes, expected.group_sizes, "group_sizes")
        for field in ("slot", "recv_slot", "counts"):
            assert_same_bits(getattr(handle, field), getattr(routing, field), field)
        gate = None if c.layout == "rank" else expected.weights.reshape(c.num_ranks, -1)
        assert_same_bits(out, oracle.combine(routing, by_row(c, expected.x), gate))


@pytest.mark.parametrize("name", NAMES)
def test_a_routing_from_before_the_mask_goes_on_without_their_rows(name):
    """Made by the layer's program, which is compiled already."""
    c = case(name)
    idx = draw_topk_idx(c, "any")
    x, weights = stamped(c.num_ranks, c.num_tokens, c.hidden, dtype=c.dtype), gates(*idx.shape)
    recv, handle, _ = layer(c)(x, idx, weights)
    before = expect(c, handle, idx, x, weights).routing
    y = normal(1, *recv.x.shape, dtype=c.dtype)

    def f(x, y, handle):
        return jax_ep.dispatch_cached(x, handle), jax_ep.combine(y, handle)

    f = on_every_rank(c, f)
    for dead in masks(c):
        mask(c, dead)
        routing = oracle.mask(before, dead)
        rows, out = f(x, y, handle)
        assert_same_bits(by_row(c, rows), oracle.move(routing, x), "rows")
        assert_same_bits(out, oracle.combine(routing, by_row(c, y)), "sums")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_and_wire_formats_under_a_mask(layout):
    c = case(layout)
    dead = (1,) if c.num_ranks > 1 else (0,)
    idx = draw_topk_idx(c, "any")
    x, weights = normal(0, c.num_ranks, c.num_tokens, c.hidden, dtype=c.dtype), normal(1, *idx.shape)

    def f(x, idx, weights, halves):
        def gate(recv):
            return None if layout == "rank" else recv.weights

        if halves:
            recv, handle = jax_ep.dispatch_done(dispatch(c, x, idx, weights, start_only=True))
            back = [
                jax_ep.combine_done(jax_ep.combine_start(recv.x / 64, handle, gate(recv), wire=wire))
                for wire in (None, "logfmt10")
            ]
        else:
            recv, handle = dispatch(c, x, idx, weights)
            back = [jax_ep.combine(recv.x / 64, handle, gate(recv), wire=wire) for wire in (None, "logfmt10")]
        return recv, handle, back, dispatch(c, x, idx, weights, wire="fp8")[0].x

    mask(c, dead)
    whole, halves = (on_every_rank(c, functools.partial(f, halves=h))(x, idx, weights) for h in (False, True))
    assert_same_tree(halves, whole)
    recv, handle, (_, logfmt), quantized = whole
    expected = expect(c, handle, idx, x, weights, dead)
    assert_same_bits(recv.x, expected.x)
    rows = by_row(c, (expected.x.astype(np.float32) / 64).astype(expected.x.dtype))
    gate = None if layout == "rank" else expected.weights.reshape(c.num_ranks, -1)
    encoded = oracle.combine(expected.routing, rows, gate, wire=lambda sums: oracle_roundtrip(sums[None])[0][0])
    assert_same_bits(logfmt, encoded)
    values = np.asarray(jax_ep.quantize(jnp.asarray(x), "fp8").values)
    assert_same_bits(quantized.values, expect(c, handle, idx, values, None, dead).x)


@pytest.mark.parametrize("layout", ["expert", "batched"])
def test_gradients_under_a_mask_are_the_transposes_without_the_masked(layout):
    c = case(layout)
    idx = draw_topk_idx(c, "any")
    x, ct = (integers(seed, c.num_ranks, c.num_tokens, c.hidden) for seed in (0, 1))
    dead = (0,)

    def f(x, idx, ct):
        def loss(x):
            recv, handle = dispatch(c, x, idx)
            return (jax_ep.combine(2 * recv.x, handle) * ct).sum(), handle

        return jax.grad(loss, has_aux=True)(x)

    mask(c, dead)
    got, handle = on_every_rank(c, f)(x, idx, ct)
    routing = expect(c, handle, idx, x, dead=dead).routing
    held = (routing.slot >= 0).sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(got, 2 * held * ct)


def test_a_barrier_counts_those_that_are_not_masked():
    c = case("expert")
    f = on_every_rank(c, lambda x: jax_ep.barrier(c.axis_name) + 0 * x[:1, 0].astype(jnp.int32))
    x = np.zeros((c.num_ranks, 1, 1), np.float32)
    for dead in masks(c):
        mask(c, dead)
        living = [rank for rank in range(c.num_ranks) if rank not in dead]
        assert f(x).ravel().tolist() == [len(living) * (rank in living) for rank in range(c.num_ranks)]


def test_a_mask_names_devices_whatever_groups_they_are_in():
    """Rank 1 of each of two groups is another device: one mask of one device concerns one group."""
    c = case("batched-roomy-two-axes", exact=True)
    mesh = mesh_of(c)  # skips where there are fewer devices
    devices = mesh.devices
    idx = np.tile(np.arange(2, dtype=np.int32), (devices.size, 3, 1))

    def f(idx):
        recv, _ = jax_ep.dispatch(jnp.ones((3, 8)), idx, axis_name="b", num_experts=2)
        return recv.num_dropped, recv.num_tokens_per_expert

    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=jax.P(("a", "b")), out_specs=jax.P(("a", "b"))))
    for dead, dropped, tokens in (
        ([], [0, 0, 0, 0], [6, 6, 6, 6]),
        ([devices[0, 1]], [3, 0, 0, 0], [3, 0, 6, 6]),
        ([devices[0, 0], devices[1, 1]], [0, 3, 3, 0], [0, 3, 3, 0]),
    ):
        jax_ep.config.dead_devices = dead
        got = f(idx.reshape(-1, 2))
        assert [a.ravel().tolist() for a in got] == [dropped, tokens]


def test_the_compiled_half_is_told_ids_and_wrong_ones_are_refused(monkeypatch):
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(targets, "set_dead", told.append)
        jax_ep.config.dead_devices = [jax.devices()[0], 7, 3, 7]
        assert jax_ep.config.dead_devices == {jax.devices()[0].id, 3, 7}
        assert "dead_devices=[0, 3, 7]" in repr(jax_ep.config)
        for wrong, error in ((["1"], TypeError), ([-1], TypeError), ([True], TypeError), (range(65), ValueError)):
            with pytest.raises(error, match="dead_devices"):
                jax_ep.config.dead_devices = wrong
        assert jax_ep.config.dead_devices == {jax.devices()[0].id, 3, 7}
    assert told == [[0, 3, 7]]
