"""What the three layouts have in common, what group_sizes promise, and dispatch_layout, which counts without sending."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case
from spmd import assert_same_bits, dispatch, inputs, on_every_rank
from strategies import STYLES, draw_topk_idx, few_examples, integers, topk_idx
from test_dispatch import program

import jax_ep


@hypothesis.settings(few_examples, max_examples=40)
@hypothesis.given(st.data())
def test_dispatch_layout_counts_what_this_rank_sends(data):
    small = case(data.draw(st.sampled_from(["expert", "expert-three-ranks", "expert-one-rank", "expert-no-tokens"])))
    idx = data.draw(topk_idx(small))[0]
    per_rank, per_expert, in_rank = jax_ep.dispatch_layout(
        jnp.asarray(idx), num_experts=small.num_experts, num_ranks=small.num_ranks
    )
    valid = (idx >= 0) & (idx < small.num_experts)
    expected = np.zeros((small.num_tokens, small.num_ranks), bool)
    for token, choice in np.argwhere(valid):
        expected[token, idx[token, choice] // small.num_local_experts] = True
    assert_same_bits(np.asarray(per_rank), expected.sum(axis=0).astype(np.int32))
    assert_same_bits(np.asarray(per_expert), np.bincount(idx[valid], minlength=small.num_experts).astype(np.int32))
    np.testing.assert_array_equal(in_rank, expected)
    assert in_rank.dtype == bool


def test_dispatch_layout_summed_over_ranks_is_what_dispatch_receives():
    small = case("rank")
    x, weights, other_x = inputs(small)
    idx = draw_topk_idx(small, "any")
    recv, handle, _ = program(small)(x, idx, weights, other_x)
    count = jax.jit(lambda idx: jax_ep.dispatch_layout(idx, num_experts=small.num_experts, num_ranks=small.num_ranks))
    per_rank, per_expert, _ = (np.stack(parts) for parts in zip(*map(count, idx), strict=True))
    np.testing.assert_array_equal(per_rank.sum(axis=0), handle.counts[:, -1])
    np.testing.assert_array_equal(per_expert.sum(axis=0), recv.num_tokens_per_expert.reshape(-1))


@pytest.mark.parametrize(
    "name", ["expert-tight", "expert-tight-aligned", "expert-one-row", "expert-no-rows", "expert-aligned"]
)
def test_group_sizes_are_aligned_and_never_sum_to_more_than_the_rows(name):
    grouped = case(name)
    x, weights, other_x = inputs(grouped)
    for make in STYLES:
        idx = draw_topk_idx(grouped, make.__name__[1:])
        recv, handle, _ = program(grouped)(x, idx, weights, other_x)
        num_rows = handle.routing.max_recv_tokens
        assert (recv.group_sizes >= 0).all()
        ends = recv.group_sizes.cumsum(axis=1)
        assert (ends <= num_rows).all()
        assert ((ends % grouped.expert_alignment == 0) | (ends == num_rows)).all()


def test_an_experts_rows_are_the_same_rows_in_the_same_order_in_every_layout():
    """Same routing, three layouts, no drops: an expert sees one matrix of rows."""
    sizes = case("expert"), case("rank"), case("batched")
    idx = draw_topk_idx(sizes[0], "distinct")
    x, weights, other_x = inputs(sizes[0])
    grouped, by_rank, batched = (program(c)(x, idx, weights, other_x)[0] for c in sizes)
    for rank in range(sizes[0].num_ranks):
        start = 0
        for expert, count in enumerate(grouped.num_tokens_per_expert[rank]):
            rows = slice(start, start + count)
            assert_same_bits(batched.x[rank, expert, :count], grouped.x[rank, rows])
            assert_same_bits(batched.weights[rank, expert, :count], grouped.weights[rank, rows])
            chosen = by_rank.topk_idx[rank] == expert
            assert_same_bits(by_rank.x[rank, chosen.any(axis=1)], grouped.x[rank, rows])
            assert_same_bits(by_rank.weights[rank][chosen], grouped.weights[rank, rows])
            start += count


@pytest.mark.parametrize("name", ["expert", "expert-aligned", "expert-tight"])
def test_ragged_dot_takes_the_rows_and_their_group_sizes(name):
    grouped = case(name)
    x = integers(0, grouped.num_ranks, grouped.num_tokens, grouped.hidden)
    idx = draw_topk_idx(grouped, "distinct")
    w = integers(1, grouped.num_ranks, grouped.num_local_experts, grouped.hidden, 8)

    def f(x, topk_idx, w):
        recv, handle = dispatch(grouped, x, topk_idx)
        return jax_ep.combine(jax.lax.ragged_dot(recv.x, w, recv.group_sizes), handle), handle.slot

    got, slot = on_every_rank(grouped, f)(x, idx, w)
    per_choice = np.einsum("rth,rtkhf->rtkf", x, w.reshape(-1, grouped.hidden, 8)[idx])
    np.testing.assert_array_equal(got, (per_choice * (slot >= 0)[..., None]).sum(axis=2))
