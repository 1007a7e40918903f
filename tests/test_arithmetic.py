"""Bits that a compiler may take away: the zero that a sum begins with, and the rounding of a row that is used at once.

XLA:GPU takes 0 + x for x, and drops f32 -> bf16 -> f32 (test_ahead_of_time.py looks at what it makes of the reference); here
the bits are asked for, on CPUs and on GPUs, and the conversions of quantized.py are tried exhaustively.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import case
from layer import layer, oracle_dispatch, oracle_layer
from spmd import LAYOUTS, assert_same_bits, dispatch, on_every_rank
from strategies import draw_topk_idx, gates, normal

import jax_ep
from jax_ep._src import logfmt, quantized, reference

HALF_DTYPES = (ml_dtypes.bfloat16, np.float16)


# ---- the zero that a sum begins with ---------------------------------------------------------------------------------


def halved_layer(case, x, topk_idx, weights):
    recv, handle = jax_ep.dispatch_done(dispatch(case, x, topk_idx, weights, start_only=True))
    gates = None if case.layout == "rank" else recv.weights
    return jax_ep.combine_done(jax_ep.combine_start(-recv.x, handle, gates))


def unweighted_layer(case, x, topk_idx, weights):
    recv, handle = dispatch(case, x, topk_idx)
    return jax_ep.combine(-recv.x, handle)


@pytest.mark.parametrize("num_topk", [1, 2])
@pytest.mark.parametrize("name", [*LAYOUTS, "expert-one-rank", "rank-one-rank", "batched-one-rank"])
def test_a_sum_of_negative_zeros_is_zero(name, num_topk):
    """Every dtype and every layer in one program: the routing, which they share, is most of what there is to compile."""
    dtypes = ("bfloat16", "float16", "float32")
    cases = [dataclasses.replace(case(name), num_topk=num_topk, dtype=dtype) for dtype in dtypes]
    idx = draw_topk_idx(cases[0], "any")
    weights = gates(*idx.shape)
    xs = [np.zeros((*idx.shape[:2], c.hidden), c.dtype) for c in cases]

    def f(xs, idx, weights):
        layers = (layer, halved_layer, unweighted_layer)
        return [[each(c, x, idx, weights) for each in layers] for c, x in zip(cases, xs, strict=True)]

    for c, x, results in zip(cases, xs, on_every_rank(cases[0], f)(xs, idx, weights), strict=True):
        for got in results:
            assert_same_bits(got, oracle_layer(c, x, idx, weights))
            assert not np.signbit(got.astype(np.float32)).any()


@pytest.mark.parametrize("hidden", [8, 1024, 2048])
@pytest.mark.parametrize("name", ["expert", "batched"])
def test_an_inner_product_of_negative_zeros_is_zero(name, hidden):
    """The gates' cotangents where the experts' rows are negative zeros; chunks that are full, and one that is filled up."""
    c = dataclasses.replace(case(name), hidden=hidden)
    idx = draw_topk_idx(c, "distinct")
    weights = gates(*idx.shape)
    x = np.zeros((*idx.shape[:2], c.hidden), c.dtype)

    def f(x, idx, weights):
        recv, handle = dispatch(c, x, idx, weights)
        out, vjp = jax.vjp(lambda y, gate: jax_ep.combine(y, handle, gate), -recv.x, recv.weights)
        return vjp(jnp.ones_like(out))

    y_bar, gates_bar = on_every_rank(c, f)(x, idx, weights)
    rows, gate, expected = oracle_dispatch(c, x, idx, weights)
    expected_y_bar, expected_gates_bar = oracle.combine_grad(expected.routing, np.ones_like(x), -rows, gate)
    assert_same_bits(y_bar.reshape(expected_y_bar.shape), expected_y_bar)
    assert_same_bits(gates_bar.reshape(expected_gates_bar.shape), expected_gates_bar)


# ---- a row is what it was rounded to ---------------------------------------------------------------------------------


def rounded_at_once(f, dtype, *arrays):
    """f of f32 arrays rounded to dtype inside its jit, and of arrays that came rounded."""
    inside = jax.jit(lambda *arrays: f(*(a.astype(dtype) for a in arrays)))(*arrays)
    before = jax.jit(f)(*(jnp.asarray(a.astype(dtype)) for a in arrays))
    return jax.tree.map(np.asarray, (inside, before))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("form", quantized.FORMATS)
def test_rows_that_are_rounded_and_encoded_at_once(form, dtype):
    inside, before = rounded_at_once(lambda x: quantized.encode(x, form), dtype, normal(0, 64, 256))
    for got, expected in zip(inside, before, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rows_that_are_rounded_and_sent_in_logfmt10_at_once(dtype):
    inside, before = rounded_at_once(logfmt.logfmt10_roundtrip, dtype, normal(0, 64, 256) / 8)
    assert_same_bits(inside, before)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rows_that_are_rounded_and_multiplied_at_once(dtype):
    inside, before = rounded_at_once(reference.inner_products, dtype, normal(0, 64, 256), normal(1, 64, 256))
    assert_same_bits(inside, before)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_sum_that_is_rounded_and_widened_at_once(dtype):
    partials = normal(0, 4, 64, 256).astype(dtype)
    widened = jax.jit(lambda x: reference._sum(x).astype(jnp.float32))(partials)
    assert_same_bits(np.asarray(widened), np.asarray(jax.jit(reference._sum)(partials)).astype(np.float32))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_number_of_sixteen_bits_is_widened_exactly(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    got = np.asarray(jax.jit(quantized.widen)(every))
    number = ~np.isnan(every)
    assert_same_bits(got[number], every[number].astype(np.float32))
    bits, is_nan = every.view(np.uint16).astype(np.uint32), ~number
    sign, mantissa = bits >> 15 << 31, bits << (16 if dtype is ml_dtypes.bfloat16 else 13) & 0x7FFFFF
    np.testing.assert_array_equal(got.view(np.uint32)[is_nan], (sign | 0x7F800000 | mantissa)[is_nan])


def near_ties(dtype):
    """f32 at, beside and halfway between all neighbours of the dtype, and any bits."""
    every = np.arange(2**15, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every)].astype(np.float64)
    every = np.append(every, 2.0 ** (16 if dtype is np.float16 else 128))  # where inf would be
    x = np.concatenate([every[:-1], (every[:-1] + every[1:]) / 2])
    bits = np.concatenate([x, -x]).astype(np.float32).view(np.uint32)
    around = np.concatenate([bits, bits + 1, bits - 1, np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32)])
    return around.view(np.float32)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_f32_is_rounded_to_nearest_even(dtype):
    x = near_ties(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    got = np.asarray(jax.jit(lambda x: quantized.narrow(x, dtype))(x))
    number = ~np.isnan(x)
    assert_same_bits(got[number], expected[number])
    assert np.isnan(got[~number]).all() and (np.signbit(got) == np.signbit(x)).all()


def test_f32_stays_as_it_is():
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32).view(np.float32)
    assert_same_bits(np.asarray(jax.jit(quantized.widen)(bits)), bits)
    assert_same_bits(np.asarray(jax.jit(lambda x: quantized.narrow(x, jnp.float32))(bits)), bits)
