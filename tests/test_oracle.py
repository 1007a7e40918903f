"""The oracle against examples worked out by hand. R = 2 ranks, E = 4 experts: 0 and 1 live on rank 0, 2 and 3 on rank 1."""

import ml_dtypes
import numpy as np
import oracle
import pytest

TOPK_IDX = np.array(
    [
        [[3, 0], [1, -1], [2, 3]],  # rank 0's tokens
        [[0, 1], [9, 3], [-1, -1]],  # rank 1's tokens: expert 9 does not exist
    ],
    np.int32,
)
X = np.array([[[10.0], [11.0], [12.0]], [[20.0], [21.0], [22.0]]], np.float32)
WEIGHTS = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]], np.float32)


def test_expert_layout():
    got = oracle.simulate(TOPK_IDX, X, WEIGHTS, layout="expert", num_experts=4, num_rows=5)
    np.testing.assert_array_equal(got.x[..., 0], [[10, 20, 11, 20, 0], [12, 10, 12, 21, 0]])
    np.testing.assert_array_equal(got.weights, [[2, 7, 3, 8, 0], [5, 1, 6, 10, 0]])
    np.testing.assert_array_equal(got.group_sizes, [[2, 2], [1, 3]])
    np.testing.assert_array_equal(got.num_tokens_per_expert, [[2, 2], [1, 3]])
    np.testing.assert_array_equal(got.num_dropped, [[0], [0]])
    np.testing.assert_array_equal(got.num_invalid, [[0], [1]])
    np.testing.assert_array_equal(got.routing.slot, [[[6, 0], [2, -1], [5, 7]], [[1, 3], [-1, 8], [-1, -1]]])
    np.testing.assert_array_equal(got.routing.counts, [[2, 2, 4], [1, 3, 4]])


def test_expert_layout_aligned_and_cut_off():
    got = oracle.simulate(TOPK_IDX, X, WEIGHTS, layout="expert", num_experts=4, num_rows=6, alignment=4)
    np.testing.assert_array_equal(got.x[..., 0], [[10, 20, 0, 0, 11, 20], [12, 0, 0, 0, 10, 12]])
    np.testing.assert_array_equal(got.group_sizes, [[4, 2], [4, 2]])
    np.testing.assert_array_equal(got.num_tokens_per_expert, [[2, 2], [1, 3]])
    np.testing.assert_array_equal(got.num_dropped, [[0], [1]])
    np.testing.assert_array_equal(got.routing.counts, [[2, 2, 8], [1, 3, 8]])


def test_rank_layout():
    got = oracle.simulate(TOPK_IDX, X, WEIGHTS, layout="rank", num_experts=4, num_rows=4)
    np.testing.assert_array_equal(got.x[..., 0], [[10, 11, 20, 0], [10, 12, 21, 0]])
    np.testing.assert_array_equal(got.topk_idx[0], [[-1, 0], [1, -1], [0, 1], [-1, -1]])
    np.testing.assert_array_equal(got.topk_idx[1], [[1, -1], [0, 1], [-1, 1], [-1, -1]])
    np.testing.assert_array_equal(got.weights[0], [[0, 2], [3, 0], [7, 8], [0, 0]])
    np.testing.assert_array_equal(got.weights[1], [[1, 0], [5, 6], [0, 10], [0, 0]])
    np.testing.assert_array_equal(got.routing.slot, [[[4, 0], [1, -1], [5, 5]], [[2, 2], [-1, 6], [-1, -1]]])
    np.testing.assert_array_equal(got.routing.counts, [[2, 2, 3], [1, 3, 3]])
    assert got.group_sizes is None


def test_rank_layout_cut_off():
    got = oracle.simulate(TOPK_IDX, X, WEIGHTS, layout="rank", num_experts=4, num_rows=2)
    np.testing.assert_array_equal(got.x[..., 0], [[10, 11], [10, 12]])
    np.testing.assert_array_equal(got.num_dropped, [[1], [1]])
    np.testing.assert_array_equal(got.routing.counts, [[2, 2, 3], [1, 3, 3]])


def test_batched_layout_cut_off():
    got = oracle.simulate(TOPK_IDX, X, WEIGHTS, layout="batched", num_experts=4, expert_capacity=2)
    np.testing.assert_array_equal(got.x[..., 0], [[[10, 20], [11, 20]], [[12, 0], [10, 12]]])
    np.testing.assert_array_equal(got.weights, [[[2, 7], [3, 8]], [[5, 0], [1, 6]]])
    np.testing.assert_array_equal(got.num_tokens_per_expert, [[2, 2], [1, 3]])
    np.testing.assert_array_equal(got.num_dropped, [[0], [1]])
    np.testing.assert_array_equal(got.routing.counts, [[2, 2, 4], [1, 3, 4]])


def test_one_expert_chosen_twice_has_two_rows_but_one_on_a_rank():
    topk_idx = np.array([[[1, 1]]], np.int32)
    expert = oracle.simulate(topk_idx, X[:1, :1], WEIGHTS[:1, :1], layout="expert", num_experts=2, num_rows=2)
    np.testing.assert_array_equal(expert.x[..., 0], [[10, 10]])
    np.testing.assert_array_equal(expert.weights, [[1, 2]])
    rank = oracle.simulate(topk_idx, X[:1, :1], WEIGHTS[:1, :1], layout="rank", num_experts=2, num_rows=2)
    np.testing.assert_array_equal(rank.x[..., 0], [[10, 0]])
    np.testing.assert_array_equal(oracle.combine(rank.routing, rank.x), [[[10]]])
    np.testing.assert_array_equal(rank.topk_idx[0, 0], [1, 1])
    np.testing.assert_array_equal(rank.weights[0, 0], [1, 2])


def test_combine_leaves_dropped_rows_and_padding_out():
    routing = oracle.route(TOPK_IDX, num_experts=4, layout="expert", num_rows=3)
    y = np.array([[[1.0], [2.0], [4.0]], [[8.0], [16.0], [32.0]]], np.float32)
    np.testing.assert_array_equal(oracle.combine(routing, y)[..., 0], [[1 + 16, 4, 8 + 32], [2, 0, 0]])
    gates = np.array([[10, 100, 1000], [1, 1, 1]], np.float32)
    np.testing.assert_array_equal(oracle.combine(routing, y, gates)[..., 0], [[10 + 16, 4000, 40], [200, 0, 0]])


def test_combine_rounds_a_ranks_sum_before_the_ranks_are_added():
    # 1 + 1/256 needs 9 significant bits: bf16 has 8. One rank's 1 + 1/256 rounds to 1; two ranks' 1/256 + 1/256 add up first.
    small = 1 / 256
    topk_idx = np.array([[[0, 1, 2]], [[-1, -1, -1]]], np.int32)
    routing = oracle.route(topk_idx, num_experts=4, layout="expert", num_rows=2)
    y = np.array([[[1.0], [small]], [[small], [0.0]]], ml_dtypes.bfloat16)
    assert oracle.combine(routing, y)[0, 0, 0] == 1
    y = np.array([[[small], [small]], [[1.0], [0.0]]], ml_dtypes.bfloat16)
    assert oracle.combine(routing, y)[0, 0, 0] == 1 + 2 * small


def test_combine_rounds_each_product():
    gate, row = (
        np.float32(1 + 2**-12),
        np.float32(1 + 2**-12),
    )  # the product is 1 + 2^-11 + 2^-24: it loses its last bit
    topk_idx = np.array([[[0, 1]]], np.int32)
    routing = oracle.route(topk_idx, num_experts=2, layout="expert", num_rows=2)
    y = np.array([[[-(1 + 2**-11)], [row]]], np.float32)
    gates = np.array([[1, gate]], np.float32)
    assert oracle.combine(routing, y, gates)[0, 0, 0] == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["expert", "batched"])
def test_combine_agrees_with_its_definition(layout, weighted):
    """Integers, so that no sum rounds: rows made per (source, token, choice), sent to where `route` put the choice."""
    rng = np.random.default_rng(0)
    topk_idx = rng.integers(-1, 6, (3, 4, 2)).astype(np.int32)
    rows = rng.integers(-8, 8, (3, 4, 2, 5)).astype(np.float32)
    weights = rng.integers(-4, 4, (3, 4, 2)).astype(np.float32) if weighted else None
    routing = oracle.route(topk_idx, num_experts=6, layout=layout, num_rows=24, expert_capacity=24)
    y = np.full((3, routing.num_rows, 5), np.nan, np.float32)
    for dest, row, source, token, choice in oracle.placed(routing):
        y[dest, row] = rows[source, token, choice]
    gates = None if weights is None else oracle.move_weights(routing, weights)
    expected = oracle.combine_by_definition(topk_idx, rows, weights)
    np.testing.assert_array_equal(oracle.combine(routing, y, gates), expected)


def test_default_rows_are_reached_and_never_passed():
    """All splits of 5 choices over 3 experts of one rank."""
    for alignment in (1, 2, 4, 8):
        needed = [
            sum(-(-n // alignment) * alignment for n in (a, b, 5 - a - b)) for a in range(6) for b in range(6 - a)
        ]
        assert oracle.default_rows("expert", 1, 5, 1, 3, alignment) == max(needed)
