"""combine: bitwise the oracle's sums in every dtype and layout; rows that hold nothing are never read into a sum."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import TINY, case
from spmd import LAYOUTS, assert_same_bits, dispatch, expect, on_every_rank
from strategies import draw_topk_idx, few_examples, integers, normal, stamped, topk_idx

import jax_ep


@functools.lru_cache
def routed(case):
    """topk_idx, weights -> Dispatched (of a narrow x), Handle."""

    def f(topk_idx, weights):
        return dispatch(case, jnp.ones((topk_idx.shape[0], 4), jnp.float32), topk_idx, weights)

    return on_every_rank(case, f)


@functools.lru_cache
def combined(case):
    """y, Handle -> tokens. The handle has been outside jit and shard_map, as NumPy arrays."""
    return on_every_rank(case, jax_ep.combine)


@functools.lru_cache
def combined_both_ways(case):
    """y, Handle, gates -> tokens without gates and, except with layout "rank", with them."""

    def f(y, handle, gates):
        sums = {"unweighted": jax_ep.combine(y, handle)}
        if case.layout != "rank":
            sums["weighted"] = jax_ep.combine(y, handle, gates)
        return sums

    return on_every_rank(case, f)


def assert_sums(case, y, handle, gates, routing):
    """Both ways, the oracle's. Gates of rows that hold nothing may be NaN."""
    flat = {"unweighted": None, "weighted": np.asarray(gates).reshape(case.num_ranks, -1)}
    for name, got in combined_both_ways(case)(y, handle, gates).items():
        assert_same_bits(got, oracle.combine(routing, by_row(case, y), flat[name]), name)


def by_row(case, y):
    """As the oracle numbers rows: "batched" [R, L, expert_capacity, ...] becomes [R, C, ...]."""
    return y.reshape(case.num_ranks, -1, *y.shape[3:]) if case.layout == "batched" else y


def rows_for(recv, handle, case, make):
    """y of the shape that Dispatched.x has, NaN wherever no token's row is."""
    num_rows = handle.routing.max_recv_tokens
    y = make(case.num_ranks, num_rows, case.hidden)
    occupied = np.zeros((case.num_ranks, num_rows), bool)
    for rank in range(case.num_ranks):
        rows = handle.recv_slot[rank]
        occupied[rank, rows[rows >= 0]] = True
    y[~occupied] = np.nan
    return y.reshape(*recv.x.shape[:-1], case.hidden)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_sums_are_the_oracles_to_the_bit(case):
    @few_examples
    @hypothesis.given(topk_idx(case))
    def check(topk_idx):
        weights = normal(0, *topk_idx.shape)
        recv, handle = routed(case)(topk_idx, weights)
        routing = oracle.route(
            topk_idx,
            num_experts=case.num_experts,
            layout=case.layout,
            num_rows=handle.routing.max_recv_tokens,
            alignment=case.expert_alignment,
            expert_capacity=handle.routing.expert_capacity,
        )
        y = rows_for(recv, handle, case, functools.partial(normal, 1, dtype=case.dtype))
        gates = np.where(recv.weights == 0, np.float32(np.nan), recv.weights)
        assert_sums(case, y, handle, gates, routing)

    check()


@pytest.mark.parametrize(
    "name", ["expert-eight-ranks", "expert-many-choices", "batched-eight-ranks", "rank-eight-ranks"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_order_and_rounding_of_the_sums_in_every_dtype(name, dtype):
    """Values of many magnitudes, all choices in use: another order, a fused multiply-add or one rounding less would show."""
    full = case(name)
    idx = draw_topk_idx(full, "distinct")
    rng = np.random.default_rng(0)
    recv, handle = routed(full)(idx, normal(0, *idx.shape))
    routing = expect(full, handle, idx, stamped(*idx.shape, dtype="float32"), None).routing

    def make(*shape):
        return (rng.normal(size=shape) * 2.0 ** rng.integers(-6, 6, shape)).astype(jnp.dtype(dtype))

    y = rows_for(recv, handle, full, make)
    assert_sums(full, y, handle, recv.weights, routing)


@pytest.mark.parametrize("name", ["expert-tight-aligned", "expert-three-ranks", "batched-tight"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_cotangents_of_rows_and_gates_are_the_oracles_to_the_bit(name, dtype):
    """Rows of more than one chunk of the inner products, the last not full; rows and gates of no token are NaN, their cotangents zero."""
    full = dataclasses.replace(case(name), hidden=1384)
    idx = draw_topk_idx(full, "invalid")
    recv, handle = routed(full)(idx, normal(0, *idx.shape))
    routing = expect(full, handle, idx, stamped(*idx.shape, dtype="float32"), None).routing
    rng = np.random.default_rng(0)

    def make(*shape):
        return (rng.normal(size=shape) * 2.0 ** rng.integers(-6, 6, shape)).astype(jnp.dtype(dtype))

    y, out_bar = rows_for(recv, handle, full, make), make(full.num_ranks, full.num_tokens, full.hidden)
    gates = np.where(recv.weights == 0, np.float32(np.nan), recv.weights)

    def pull(y, handle, gates, out_bar):
        return jax.vjp(lambda y, gates: jax_ep.combine(y, handle, gates), y, gates)[1](out_bar)

    y_bar, gates_bar = on_every_rank(full, pull)(y, handle, gates, out_bar)
    flat = gates.reshape(full.num_ranks, -1)
    expected = oracle.combine_grad(routing, out_bar, np.nan_to_num(by_row(full, y)), np.nan_to_num(flat))
    assert_same_bits(by_row(full, np.asarray(y_bar)), expected[0], "rows")
    assert_same_bits(np.asarray(gates_bar).reshape(flat.shape), expected[1], "gates")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_definition_without_slots_or_layouts(layout):
    """sum_k weights[t, k] * expert_k(x[t]) of a dense computation: integers, so no sum rounds. The whole way in one program."""
    small = case(layout)
    x = integers(0, small.num_ranks, small.num_tokens, small.hidden)
    idx = draw_topk_idx(small, "distinct")
    weights = integers(1, *idx.shape)
    scale = np.arange(1, small.num_experts + 1, dtype=np.float32).reshape(
        small.num_ranks, -1
    )  # expert e: x -> (e + 1) x

    def f(x, topk_idx, weights, scale):
        recv, handle = dispatch(small, x, topk_idx, weights)
        if layout == "rank":
            gate = recv.weights * jnp.where(recv.topk_idx < 0, 0, scale[recv.topk_idx])
            return jax_ep.combine(recv.x * gate.sum(axis=1, keepdims=True), handle)
        if layout == "batched":
            return jax_ep.combine(recv.x * scale[:, None, None], handle, recv.weights)
        per_row = jnp.repeat(scale, recv.group_sizes, total_repeat_length=recv.x.shape[0])
        return jax_ep.combine(recv.x * per_row[:, None], handle, recv.weights)

    got = on_every_rank(small, f)(x, idx, weights, scale)
    rows = x[:, :, None] * scale.reshape(-1)[idx][..., None]
    np.testing.assert_array_equal(got, oracle.combine_by_definition(idx, rows, weights))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_axes_come_back(layout):
    small = case(layout)
    idx = draw_topk_idx(small, "any")
    recv, handle = routed(small)(idx, normal(0, *idx.shape))
    y = rows_for(recv, handle, small, functools.partial(normal, 1, dtype=small.dtype))
    expected = combined(small)(y, handle)

    def f(topk_idx, y):
        x = jnp.ones((3, 2, 8))
        _, handle = dispatch(small, x, topk_idx.reshape(3, 2, -1))
        return jax_ep.combine(y, handle)

    got = on_every_rank(small, f)(idx, y)
    assert got.shape == (small.num_ranks, 3, 2, small.hidden)
    assert_same_bits(got.reshape(expected.shape), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_may_have_another_width_and_dtype_than_x(layout):
    small = case(layout)
    idx = draw_topk_idx(small, "any")
    recv, handle = routed(small)(idx, normal(0, *idx.shape))
    for hidden, dtype in ((4, "float32"), (40, "float16")):
        y = normal(0, *recv.x.shape[:-1], hidden, dtype=dtype)
        routing = expect(small, handle, idx, stamped(*idx.shape, dtype="float32"), None).routing
        assert_same_bits(combined(small)(y, handle), oracle.combine(routing, by_row(small, y)))


def test_tokens_without_rows_are_positive_zero():
    small = case("expert")
    idx = draw_topk_idx(small, "nothing")
    recv, handle = routed(small)(idx, normal(0, *idx.shape))
    y = rows_for(recv, handle, small, functools.partial(normal, 1, dtype=small.dtype))
    got = combined(small)(y, handle)
    assert_same_bits(got, np.zeros((small.num_ranks, small.num_tokens, small.hidden), got.dtype))


def test_infinities_and_nans_of_a_row_reach_its_token_and_no_other():
    small = case("expert")
    idx = draw_topk_idx(small, "distinct")
    recv, handle = routed(small)(idx, normal(0, *idx.shape))
    y = np.ones((*recv.x.shape[:-1], small.hidden), jnp.bfloat16)
    rank, token = small.num_ranks - 1, 2
    y[handle.slot[rank, token, 0] // recv.x.shape[1], handle.slot[rank, token, 0] % recv.x.shape[1]] = np.nan
    got = combined(small)(y, handle).astype(np.float32)
    assert np.isnan(got[rank, token]).all()
    got[rank, token] = small.num_topk
    np.testing.assert_array_equal(got, small.num_topk)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_the_same_bit_for_bit(layout):
    small = case(layout)
    idx = draw_topk_idx(small, "any")
    recv, handle = routed(small)(idx, normal(0, *idx.shape))
    y = rows_for(recv, handle, small, functools.partial(normal, 1, dtype=small.dtype))
    first = combined(small)(y, handle)
    for _ in range(3):
        assert_same_bits(combined(small)(y, handle), first)
