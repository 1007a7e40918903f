"""dispatch and dispatch_cached: every row, gate and count equals the oracle's, in every layout; all other rows are zero."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import MODELS, TINY, case
from spmd import (
    LAYOUTS,
    assert_same_bits,
    assert_same_tree,
    dispatch,
    expect,
    inputs,
    mesh_of,
    on_every_rank,
)
from strategies import any_bits, draw_topk_idx, few_examples, stamped, topk_idx

import jax_ep

DEFAULT_CAPACITY = [c for c in TINY if c.max_recv_tokens is None and c.expert_capacity is None]

pytestmark = pytest.mark.usefixtures("compiles_fast")


def assert_dispatched(recv, handle, expected):
    for name in ("x", "weights", "topk_idx", "group_sizes", "num_tokens_per_expert", "num_dropped", "num_invalid"):
        assert_same_bits(getattr(recv, name), getattr(expected, name), name)
    for name in ("slot", "counts"):
        assert_same_bits(getattr(handle, name), getattr(expected.routing, name), name)
    assert_same_bits(handle.recv_slot, expected.routing.recv_slot, "recv_slot")


@functools.lru_cache
def program(case):
    """x, topk_idx, weights, other x -> Dispatched, Handle, rows of other x sent by the handle."""

    def f(x, topk_idx, weights, other_x):
        recv, handle = dispatch(case, x, topk_idx, weights)
        return recv, handle, jax_ep.dispatch_cached(other_x, handle)

    return on_every_rank(case, f)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_every_row_gate_and_count_equals_the_oracles(case):
    @few_examples
    @hypothesis.given(topk_idx(case))
    def check(topk_idx):
        x, weights, other_x = inputs(case)
        recv, handle, cached = program(case)(x, topk_idx, weights, other_x)
        expected = expect(case, handle, topk_idx, x, weights)
        assert_dispatched(recv, handle, expected)
        assert_same_bits(cached, expect(case, handle, topk_idx, other_x, None).x, "dispatch_cached")

    check()


@pytest.mark.parametrize("case", DEFAULT_CAPACITY, ids=str)
def test_the_default_capacity_holds_the_worst_case(case):
    """With "batched" of experts that differ within a token; else also of one expert named by every choice."""
    for style in ("distinct", "hot_expert", "silent_rank", "one_rank", "one_expert"):
        x, weights, other_x = inputs(case)
        recv, handle, _ = program(case)(x, draw_topk_idx(case, style), weights, other_x)
        if case.layout != "batched" or style not in ("one_rank", "one_expert"):
            assert recv.num_dropped.sum() == 0
    sizes = case.num_ranks, case.num_tokens
    if case.layout == "batched":
        assert handle.routing.expert_capacity == math.prod(sizes)
    if case.layout == "rank":
        assert handle.routing.max_recv_tokens == math.prod(sizes)
    if case.layout == "expert":
        least = oracle.default_rows("expert", *sizes, case.num_topk, case.num_experts, case.expert_alignment)
        assert handle.routing.max_recv_tokens >= least


@pytest.mark.parametrize(
    "name", ["expert-tight", "expert-tight-aligned", "expert-one-row", "rank-tight", "batched-tight"]
)
def test_drops_happen_and_are_counted(name):
    """The oracle already says how many; here: that these cases drop at all, and that received and dropped rows add up."""
    tight = case(name)
    x, weights, other_x = inputs(tight)
    idx = draw_topk_idx(tight, "hot_expert")
    recv, handle, _ = program(tight)(x, idx, weights, other_x)
    assert recv.num_dropped.sum() > 0
    if tight.layout == "rank":
        received, wanted = (handle.recv_slot.max(axis=3) >= 0).sum(axis=(1, 2)), handle.counts[:, -1]
    else:
        received, wanted = (handle.recv_slot >= 0).sum(axis=(1, 2, 3)), recv.num_tokens_per_expert.sum(axis=1)
    np.testing.assert_array_equal(received + recv.num_dropped[:, 0], wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_moved_as_they_are_whatever_their_bits(dtype, layout):
    """NaN payloads, signalling NaNs and negative zeros too: a sum or a conversion on the way would show."""
    small = case(layout)
    x = any_bits(0, small.num_ranks, small.num_tokens, small.hidden, dtype=dtype)
    weights = any_bits(1, small.num_ranks, small.num_tokens, small.num_topk, dtype="float32")
    idx = draw_topk_idx(small, "invalid")
    recv, handle, cached = program(small)(x, idx, weights, x)
    expected = expect(small, handle, idx, x, weights)
    assert_dispatched(recv, handle, expected)
    assert_same_bits(cached, expected.x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weights_there_are_none(layout):
    small = case(layout)
    x, _, _ = inputs(small)
    idx = draw_topk_idx(small, "any")
    recv, handle = on_every_rank(small, functools.partial(dispatch, small))(x, idx)
    assert_dispatched(recv, handle, expect(small, handle, idx, x, None))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_fewer_bits_ride_along_as_f32(dtype):
    small = case("expert")
    x, weights, _ = inputs(small)
    weights = weights.astype(jnp.dtype(dtype))
    idx = draw_topk_idx(small, "any")
    recv, handle = on_every_rank(small, functools.partial(dispatch, small))(x, idx, weights)
    assert_same_bits(recv.weights, expect(small, handle, idx, x, weights.astype(np.float32)).weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_axes_count_as_tokens_in_row_major_order(layout):
    small = case(layout)
    x, weights, other_x = inputs(small)
    idx = draw_topk_idx(small, "any")
    expected = program(small)(x, idx, weights, other_x)

    def f(x, idx, weights, other_x):
        x, idx, weights, other_x = (a.reshape(2, 3, a.shape[-1]) for a in (x, idx, weights, other_x))
        recv, handle = dispatch(small, x, idx, weights)
        return recv, handle.slot, jax_ep.dispatch_cached(other_x, handle)

    recv, slot, cached = on_every_rank(small, f)(x, idx, weights, other_x)
    assert_same_tree(recv, expected[0])
    assert_same_bits(slot, expected[1].slot)
    assert_same_bits(cached, expected[2])


def test_no_leading_axis_at_all_is_one_token():
    """x[H] would be ambiguous with a missing axis; x[1, H] and x[1, 1, H] are not."""
    small = case("expert")
    x, weights, _ = (a[:, :1] for a in inputs(small))
    idx = draw_topk_idx(small, "any")[:, :1]
    expected, _ = on_every_rank(small, functools.partial(dispatch, small))(x, idx, weights)
    got, _ = on_every_rank(small, lambda *a: dispatch(small, *(b[None] for b in a)))(x, idx, weights)
    assert_same_tree(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_s64_expert_ids_under_x64(layout):
    small = case(layout)
    x, weights, other_x = inputs(small)
    idx = draw_topk_idx(small, "invalid")
    recv, handle, cached = program(small)(x, idx, weights, other_x)
    with jax.enable_x64(True):
        wide = idx.astype(np.int64)
        program64 = program.__wrapped__(small)
        recv64, handle64, cached64 = program64(x, wide, weights, other_x)
        assert_same_tree((recv64, handle64, cached64), (recv, handle, cached))
        # Ids that only 32 bits more can tell from a valid one.
        beyond = np.where(idx < 0, wide, wide + 2**32)
        recv64, _, _ = program64(x, beyond, weights, other_x)
    assert (recv64.num_invalid == (idx != -1).sum(axis=(1, 2))[:, None]).all()
    assert not recv64.num_tokens_per_expert.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mode_and_num_sms_choose_a_kernel_and_never_a_meaning(layout):
    """All modes in one program."""
    small, modes = case(layout), ("auto", "high_throughput", "low_latency")
    x, weights, other_x = inputs(small)
    idx = draw_topk_idx(small, "any")
    expected, _, _ = program(small)(x, idx, weights, other_x)

    def f(*args):
        return {mode: dispatch(small, *args, mode=mode, num_sms=8)[0] for mode in modes}

    for mode, got in on_every_rank(small, f)(x, idx, weights).items():
        assert_same_tree(got, expected, mode)


@pytest.mark.parametrize("name", ["expert-tight", "rank", "batched-eight-ranks"])
def test_two_runs_are_the_same_bit_for_bit(name):
    small = case(name)
    x, weights, other_x = inputs(small)
    idx = draw_topk_idx(small, "any")
    first = program(small)(x, idx, weights, other_x)
    for _ in range(3):
        assert_same_tree(program(small)(x, idx, weights, other_x), first)


def test_several_axes_layouts_and_sizes_in_one_program():
    """Nothing of one call leaks into another: two meshes' worth of groups, two top-k's, two dtypes, three layouts at once."""
    wide = case("expert-two-axes", exact=True)
    grid = case("batched-roomy-two-axes", exact=True)
    x, weights, _ = inputs(wide)
    idx = draw_topk_idx(wide, "any")

    def f(x, idx, weights):
        whole, _ = dispatch(wide, x, idx, weights)
        over_b, _ = jax_ep.dispatch(x.astype(jnp.float32), idx[:, :2], axis_name="b", num_experts=6, layout="rank")
        over_a, _ = jax_ep.dispatch(x, idx[:, :1], weights[:, :1], axis_name="a", num_experts=4, layout="batched")
        return whole, over_b, over_a

    whole, over_b, over_a = on_every_rank(grid, f)(x, idx, weights)
    expected = oracle.simulate(idx, x, weights, layout="expert", num_experts=8, num_rows=whole.x.shape[1])
    assert_same_bits(whole.x, expected.x)
    for a in range(2):
        ranks = [2 * a, 2 * a + 1]
        expected = oracle.simulate(
            idx[ranks, :, :2],
            x[ranks].astype(np.float32),
            None,
            layout="rank",
            num_experts=6,
            num_rows=over_b.x.shape[1],
        )
        assert_same_bits(over_b.x[ranks], expected.x)
        assert_same_bits(over_b.topk_idx[ranks], expected.topk_idx)
    for b in range(2):
        ranks = [b, 2 + b]
        expected = oracle.simulate(
            idx[ranks, :, :1], x[ranks], weights[ranks, :, :1], layout="batched", num_experts=4, expert_capacity=10
        )
        assert_same_bits(over_a.x[ranks], expected.x)
        assert_same_bits(over_a.num_invalid[ranks], expected.num_invalid)


def test_data_parallel_groups_do_not_mix():
    """A mesh of dp x expert: each row of it is a group of its own."""
    grid = case("expert-two-axes", exact=True)
    x, weights, _ = inputs(grid)
    idx = draw_topk_idx(grid, "any") // 2

    def f(x, idx, weights):
        return jax_ep.dispatch(x, idx, weights, axis_name="b", num_experts=4)

    recv, handle = on_every_rank(grid, f)(x, idx, weights)
    for dp in range(2):
        ranks = slice(2 * dp, 2 * dp + 2)
        expected = oracle.simulate(
            idx[ranks],
            x[ranks],
            weights[ranks],
            layout="expert",
            num_experts=4,
            num_rows=handle.routing.max_recv_tokens,
        )
        assert_dispatched(*jax.tree.map(lambda a, ranks=ranks: a[ranks], (recv, handle)), expected)


def test_axes_named_in_the_other_order_number_the_ranks_in_that_order():
    grid = case("expert-two-axes", exact=True)
    x, weights, _ = inputs(grid)
    idx = draw_topk_idx(grid, "any")

    def f(x, idx, weights):
        return jax_ep.dispatch(x, idx, weights, axis_name=("b", "a"), num_experts=8)

    recv, handle = on_every_rank(grid, f)(x, idx, weights)
    order = np.array([0, 2, 1, 3])  # mesh position of rank 0, 1, 2, 3 of ("b", "a"); its own inverse
    expected = oracle.simulate(
        idx[order], x[order], weights[order], layout="expert", num_experts=8, num_rows=handle.routing.max_recv_tokens
    )
    assert_same_bits(recv.x[order], expected.x)
    assert_same_bits(handle.slot[order], expected.routing.slot)


def test_dispatch_cached_takes_another_width_and_dtype():
    small = case("expert")
    x, weights, _ = inputs(small)
    other_x = stamped(small.num_ranks, small.num_tokens, 40, dtype="float32")
    idx = draw_topk_idx(small, "any")

    def f(x, idx, weights, other_x):
        _, handle = dispatch(small, x, idx, weights)
        return handle, jax_ep.dispatch_cached(other_x, handle)

    handle, rows = on_every_rank(small, f)(x, idx, weights, other_x)
    assert_same_bits(rows, expect(small, handle, idx, other_x, None).x)


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_shapes_of_known_models(case):
    """Traced, not run: what a layer of each would hold, a rank."""
    mesh, spec = mesh_of(case), jax.P(case.axis_name)
    tokens = case.num_ranks * case.num_tokens
    arrays = [
        jax.ShapeDtypeStruct((tokens, case.hidden), case.dtype),
        jax.ShapeDtypeStruct((tokens, case.num_topk), jnp.int32),
        jax.ShapeDtypeStruct((tokens, case.num_topk), jnp.float32),
    ]

    def f(x, topk_idx, weights):
        recv, handle = dispatch(case, x, topk_idx, weights)
        return recv, handle, jax_ep.combine(recv.x, handle, recv.weights)

    recv, handle, out = jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec), *arrays)
    rows = case.num_ranks * tokens * case.num_topk  # each rank could be sent all of them
    assert recv.x.shape == (rows, case.hidden)
    assert recv.weights.shape == (rows,)
    assert recv.group_sizes.shape == recv.num_tokens_per_expert.shape == (case.num_experts,)
    assert recv.num_dropped.shape == recv.num_invalid.shape == (case.num_ranks,)
    assert handle.slot.shape == (tokens, case.num_topk)
    assert (out.shape, out.dtype) == ((tokens, case.hidden), jnp.bfloat16)
