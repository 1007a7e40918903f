"""dispatch_layout's kernel against plain NumPy, on any ids at all."""

import functools

import jax
import numpy as np
import pytest

from jax_ep._src import targets

pytestmark = pytest.mark.gpu

# num_tokens, num_topk, num_experts, num_ranks
SIZES = [
    (1, 1, 1, 1),
    (7, 2, 4, 2),
    (128, 8, 256, 8),
    (4096, 8, 256, 8),
    (4096, 8, 256, 256),
    (1000, 6, 21, 3),
    (513, 40, 64, 4),  # more choices than a warp has lanes
    (200_000, 8, 384, 64),  # more choices than the grid has threads
    (3000, 4, 16_384, 16),  # more counts than a block's shared memory holds
    (0, 8, 256, 8),
    (16, 0, 256, 8),
]


@functools.partial(jax.jit, static_argnums=(1, 2))
def dispatch_layout(topk_idx, num_experts, num_ranks):
    results = (
        jax.ShapeDtypeStruct((num_ranks,), np.int32),
        jax.ShapeDtypeStruct((num_experts,), np.int32),
        jax.ShapeDtypeStruct((topk_idx.shape[0], num_ranks), np.bool_),
    )
    return jax.ffi.ffi_call(targets.DISPATCH_LAYOUT, results)(topk_idx, num_experts=num_experts, num_ranks=num_ranks)


def expected_layout(topk_idx, num_experts, num_ranks):
    token, choice = np.nonzero((topk_idx >= 0) & (topk_idx < num_experts))
    expert = topk_idx[token, choice]
    is_token_in_rank = np.zeros((len(topk_idx), num_ranks), bool)
    is_token_in_rank[token, expert // (num_experts // num_ranks)] = True
    return is_token_in_rank.sum(axis=0), np.bincount(expert, minlength=num_experts), is_token_in_rank


def draw_topk_idx(style, num_tokens, num_topk, num_experts):
    rng = np.random.default_rng(0)
    shape = num_tokens, num_topk
    if style == "any id":
        ids = rng.integers(-2, num_experts + 2, shape)
        extremes = rng.choice([-(2**31), -1, num_experts, 2**31 - 1], shape)
        return np.where(rng.random(shape) < 0.1, extremes, ids).astype(np.int32)
    if style == "one expert":
        return np.full(shape, num_experts - 1, np.int32)
    return np.full(shape, -1, np.int32)


@pytest.mark.parametrize("style", ["any id", "one expert", "no choice"])
@pytest.mark.parametrize(("num_tokens", "num_topk", "num_experts", "num_ranks"), SIZES)
def test_counts_and_membership_are_those_of_numpy(num_tokens, num_topk, num_experts, num_ranks, style):
    topk_idx = draw_topk_idx(style, num_tokens, num_topk, num_experts)
    expected = expected_layout(topk_idx, num_experts, num_ranks)
    for _ in range(2):  # the second call finds the first one's results in its memory
        for got, want in zip(dispatch_layout(topk_idx, num_experts, num_ranks), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="dispatch_layout: num_experts must be a positive multiple of num_ranks"
    ):
        jax.block_until_ready(dispatch_layout(np.zeros((4, 2), np.int32), 5, 2))
