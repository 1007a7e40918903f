"""Routings to try on a case, and data to send: rows stamped with where they come from, rows of any bits, sums of integers.

Hypothesis draws routings only: a case is compiled once and many routings run through it.
"""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

INT32 = np.iinfo(np.int32)

few_examples = hypothesis.settings(
    max_examples=12,
    deadline=None,  # the first example compiles
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


def _distinct(rng, case, shape):
    """What top_k gives: a token's experts differ."""
    return rng.permuted(np.broadcast_to(np.arange(case.num_experts), (*shape[:2], case.num_experts)), axis=-1)[
        ..., : shape[2]
    ]


def _any(rng, case, shape):
    """A token may name one expert twice."""
    return rng.integers(0, case.num_experts, shape)


def _absent(rng, case, shape):
    """Most choices are none."""
    return np.where(rng.random(shape) < 0.7, -1, _any(rng, case, shape))


def _invalid(rng, case, shape):
    """Choices that name no expert, far out and just outside."""
    outside = rng.choice([-2, case.num_experts, case.num_experts + 1, INT32.min, INT32.max], shape)
    return np.where(rng.random(shape) < 0.3, outside, _absent(rng, case, shape))


def _hot_expert(rng, case, shape):
    """Every token chooses one expert, among others."""
    topk_idx = _distinct(rng, case, shape)
    hot = rng.integers(case.num_experts)
    return np.where((topk_idx == hot).any(-1, keepdims=True) | (np.arange(shape[2]) > 0), topk_idx, hot)


def _one_expert(rng, case, shape):
    """All choices name one expert: the most rows that a rank can be sent."""
    return np.full(shape, rng.integers(case.num_experts))


def _one_rank(rng, case, shape):
    """One rank receives everything, the others nothing."""
    return case.num_local_experts * rng.integers(case.num_ranks) + rng.integers(0, case.num_local_experts, shape)


def _silent_rank(rng, case, shape):
    """One rank sends nothing: all its tokens are no tokens."""
    return np.where((np.arange(shape[0]) == rng.integers(shape[0]))[:, None, None], -1, _distinct(rng, case, shape))


def _nothing(rng, case, shape):
    return np.full(shape, -1)


STYLES = (_distinct, _any, _absent, _invalid, _hot_expert, _one_expert, _one_rank, _silent_rank, _nothing)


def draw_topk_idx(case, style, seed=0):
    """s32[R, T, K]; style: a name of STYLES without its underscore."""
    make = next(make for make in STYLES if make.__name__ == f"_{style}")
    shape = (case.num_ranks, case.num_tokens, case.num_topk)
    return make(np.random.default_rng(seed), case, shape).astype(np.int32)


def topk_idx(case):
    """Strategy: s32[R, T, K], of one of the styles or any numbers at all."""
    shape = (case.num_ranks, case.num_tokens, case.num_topk)
    styles = st.builds(
        lambda make, seed: make(np.random.default_rng(seed), case, shape).astype(np.int32),
        st.sampled_from(STYLES),
        st.integers(0, 2**32 - 1),
    )
    anything = hnp.arrays(np.int32, shape, elements=st.integers(-2, case.num_experts))
    return styles | anything


def stamped(*shape, dtype, first=1):
    """[R, T, H]: columns say rank, token and column in turn, each a small integer from `first` on: exact in every dtype, never zero."""
    rank, token, column = np.indices(shape)
    stamp = np.choose(column % 3, [first + rank, first + token, -first - column % 100])
    return stamp.astype(jnp.dtype(dtype))


def gates(*shape):
    """f32[R, T, K], no two alike and none zero."""
    return (1 + np.arange(np.prod(shape, dtype=int), dtype=np.float32)).reshape(shape) / 64


def integers(seed, *shape, dtype="float32"):
    """Integers so small that no sum of products rounds in f32."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(jnp.dtype(dtype))


def normal(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def any_bits(seed, *shape, dtype):
    """Every bit pattern: NaNs of all kinds, infinities, negative zeros, subnormals."""
    dtype = jnp.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return bits.view(dtype)
