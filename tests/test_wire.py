"""Wire formats: what arrives is what quantize gives, moved; rows quantized elsewhere pass as they are; derivatives are straight-through.

The formats' own arithmetic is held to oracles of its own in test_quantized.py and test_logfmt.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import case
from spmd import LAYOUTS, assert_same_bits, assert_same_tree, dispatch, expect, on_every_rank
from strategies import any_bits, draw_topk_idx, gates, integers, normal
from test_combine import routed
from test_logfmt import oracle_roundtrip

import jax_ep
from jax_ep._src import cuda

FORMATS = ("fp8", "fp8_ue8m0", "mxfp8")
# Of tests that compare moved bytes, integers that round nowhere, or with a tolerance. The formats' arithmetic is held to
# the bit as XLA optimises it in test_quantized.py and test_arithmetic.py; sums in logfmt10 are so here.
quick = pytest.mark.usefixtures("compiles_fast")


def wide(name, hidden=160, **changes):
    """Two groups of 128 columns, or five of 32; the last of 128 is short."""
    return dataclasses.replace(case(name), hidden=hidden, **changes)


def rows_of(c, seed=0):
    """Rows of very different sizes, as many scales."""
    x = normal(seed, c.num_ranks, c.num_tokens, c.hidden)
    return (x * np.exp2(np.arange(x[..., :1].size).reshape(x[..., :1].shape) % 13 - 6)).astype(jnp.dtype(c.dtype))


def quantized(x, form):
    """As NumPy arrays; no carrier."""
    q = jax_ep.quantize(jnp.asarray(x), form)
    return np.asarray(q.values), np.asarray(q.scales)


@quick
@pytest.mark.parametrize("name", ["expert", "expert-tight-aligned", "rank", "batched-tight"])
def test_a_wire_format_moves_what_quantize_gives(name):
    """The scales of rows that hold nothing are zero bytes too, whatever number e8m0 makes of that. All formats in one program."""
    c = wide(name)
    x, idx = rows_of(c), draw_topk_idx(c, "any")
    weights = gates(*idx.shape)
    f = on_every_rank(c, lambda *args: [dispatch(c, *args, wire=form) for form in FORMATS])
    for form, (recv, handle) in zip(FORMATS, f(x, idx, weights), strict=True):
        values, scales = quantized(x, form)
        expected = expect(c, handle, idx, values, weights)
        assert_same_bits(recv.x.values, expected.x, form)
        assert_same_bits(recv.x.scales, expect(c, handle, idx, scales).x, form)
        assert recv.x.format == form
        assert_same_bits(recv.x.carrier, np.zeros(expected.x.shape, x.dtype), form)
        for field in ("weights", "group_sizes", "topk_idx", "num_tokens_per_expert", "num_dropped", "num_invalid"):
            assert_same_bits(getattr(recv, field), getattr(expected, field), f"{form}, {field}")


@quick
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_on_the_wire_and_dequantized_again(dtype):
    """All formats in one program."""
    c = wide("expert", hidden=128, dtype=dtype)
    x, idx = rows_of(c), draw_topk_idx(c, "distinct")

    def of_one(form, x, idx):
        recv, handle = dispatch(c, x, idx, wire=form)
        return jax_ep.dequantize(recv.x), handle

    results = on_every_rank(c, lambda *args: [of_one(form, *args) for form in FORMATS])(x, idx)
    for form, (rows, handle) in zip(FORMATS, results, strict=True):
        each = np.asarray(jax_ep.dequantize(jax_ep.quantize(jnp.asarray(x), form)))
        assert_same_bits(rows, expect(c, handle, idx, each).x, form)


@quick
def test_quantized_rows_travel_as_those_of_a_wire_format():
    """quantize, then dispatch; and the same rows along a handle. All formats in one program."""
    c = wide("expert")
    x, idx = rows_of(c), draw_topk_idx(c, "any")
    weights = gates(*idx.shape)

    def of_one(form, x, idx, weights):
        by_wire, handle = dispatch(c, x, idx, weights, wire=form)
        by_hand, _ = dispatch(c, jax_ep.quantize(x, form), idx, weights)
        return by_wire, by_hand, jax_ep.dispatch_cached(jax_ep.quantize(x, form), handle)

    results = on_every_rank(c, lambda *args: [of_one(form, *args) for form in FORMATS])(x, idx, weights)
    for form, (by_wire, by_hand, cached) in zip(FORMATS, results, strict=True):
        assert_same_tree(by_hand, by_wire, form)
        assert_same_tree(cached, by_wire.x, form)


CUSTOM = {
    "packed-fp4-with-e4m3-scales": (("uint8", 32), ("float8_e4m3fn", 4)),
    "fp8-with-scales-of-one-byte": (("float8_e5m2", 48), ("float8_e8m0fnu", 1)),
    "int8-with-a-bf16-scale": (("int8", 16), ("bfloat16", 1)),
    "u32-words-with-f16-scales": (("uint32", 12), ("float16", 3)),
}


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_users_own_format_pass_as_bytes(layout):
    """All formats in one program."""
    c = case(layout)
    rows = {
        kind: [
            any_bits(seed, c.num_ranks, c.num_tokens, columns, dtype=dtype)
            for seed, (dtype, columns) in enumerate(arrays)
        ]
        for kind, arrays in CUSTOM.items()
    }
    idx = draw_topk_idx(c, "any")
    weights = gates(*idx.shape)

    def f(rows, idx, weights):
        def of_one(values, scales):
            mine = jax_ep.Quantized(values, scales)
            recv, handle = dispatch(c, mine, idx, weights)
            pending = dispatch(c, mine, idx, weights, start_only=True)
            return recv, handle, jax_ep.dispatch_cached(mine, handle), jax_ep.dispatch_done(pending)[0]

        return {kind: of_one(*arrays) for kind, arrays in rows.items()}

    results = on_every_rank(c, f)(rows, idx, weights)
    for kind, (values, scales) in rows.items():
        recv, handle, cached, by_halves = results[kind]
        expected = expect(c, handle, idx, values, weights)
        assert_same_bits(recv.x.values, expected.x, kind)
        assert_same_bits(recv.x.scales, expect(c, handle, idx, scales).x, kind)
        assert_same_bits(recv.weights, expected.weights, kind)
        assert (recv.x.carrier, recv.x.format) == (None, "custom")
        assert_same_tree(cached, recv.x)
        assert_same_tree(by_halves, recv)


# ---- straight-through derivatives ------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_derivative_of_a_wire_format_is_that_of_no_format(layout):
    """Tangents and cotangents travel in x's dtype, unquantized: to the bit those of the plain dispatch. All formats in one program."""
    c = wide(layout)
    x, x_dot = (integers(seed, c.num_ranks, c.num_tokens, c.hidden, dtype=c.dtype) for seed in (0, 1))
    idx = draw_topk_idx(c, "any")
    w, w_dot = (integers(seed, *idx.shape) for seed in (2, 3))

    def f(x, idx, w, x_dot, w_dot):
        def plain(x, w):
            recv, _ = dispatch(c, x, idx, w)
            return recv.x, recv.weights

        def by_wire(form, x, w):
            recv, _ = dispatch(c, x, idx, w, wire=form)
            return jax_ep.dequantize(recv.x), recv.weights

        def by_hand(form, x, w):
            recv, _ = dispatch(c, jax_ep.quantize(x, form), idx, w)
            return jax_ep.dequantize(recv.x), recv.weights

        def by_halves(form, x, w):
            recv, _ = jax_ep.dispatch_done(dispatch(c, x, idx, w, start_only=True, wire=form))
            return jax_ep.dequantize(recv.x), recv.weights

        def derivatives(g):
            (rows, gate), tangents = jax.jvp(g, (x, w), (x_dot, w_dot))
            cotangents = jax.vjp(g, x, w)[1]((jnp.ones_like(rows), jnp.ones_like(gate)))
            return tangents, cotangents

        encoded = {
            f"{form}, {g.__name__}": derivatives(functools.partial(g, form))
            for form in FORMATS
            for g in (by_wire, by_hand, by_halves)
        }
        return derivatives(plain), encoded

    expected, encoded = on_every_rank(c, f)(x, idx, w, x_dot, w_dot)
    assert expected[0][0].dtype == x.dtype
    for name, got in encoded.items():
        assert_same_tree(got, expected, name)


def test_gates_of_a_users_own_format_have_gradients():
    c = case("expert")
    values = any_bits(0, c.num_ranks, c.num_tokens, 16, dtype="uint8")
    scales = normal(1, c.num_ranks, c.num_tokens, 2)
    idx = draw_topk_idx(c, "invalid")
    weights = integers(2, *idx.shape)

    def f(values, scales, idx, weights):
        def loss(weights):
            recv, _ = dispatch(c, jax_ep.Quantized(values, scales), idx, weights)
            return (3 * recv.weights).sum()

        return jax.grad(loss)(weights)

    got = on_every_rank(c, f)(values, scales, idx, weights)
    np.testing.assert_array_equal(got, 3.0 * ((idx >= 0) & (idx < c.num_experts)))


@quick
@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_in_a_wire_format_under_vmap_scan_and_remat(form):
    """Every transformation gives the loop's values and gradients; the loop's are those of rows quantized beforehand."""
    c = wide("expert", hidden=48, dtype="float32")
    xs = np.stack([rows_of(c, seed) for seed in range(2)], axis=1)  # [R, 2, T, H]
    idx = draw_topk_idx(c, "any")
    weights = normal(3, *idx.shape)

    def f(xs, idx, weights):
        def layer(x, wire):
            if wire is None:
                x = jax_ep.dequantize(jax_ep.quantize(x, form))
            recv, handle = dispatch(c, x, idx, weights, wire=wire)
            rows = recv.x if wire is None else jax_ep.dequantize(recv.x)
            return jax_ep.combine(rows * rows, handle, recv.weights)

        def value_and_grad(x, wire=form, wrap=lambda f: f):
            out, vjp = jax.vjp(wrap(functools.partial(layer, wire=wire)), x)
            return out, vjp(jnp.ones_like(out))[0]

        remat = functools.partial(value_and_grad, wrap=jax.checkpoint)
        loop = [jax.tree.map(lambda *a: jnp.stack(a), *(value_and_grad(x, wire) for x in xs)) for wire in (None, form)]
        return *loop, jax.vmap(value_and_grad)(xs), jax.lax.map(remat, xs), jax.vmap(remat)(xs)

    expected, *others = on_every_rank(c, f)(xs, idx, weights)
    for got in others:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hidden", "dtypes"),
    [
        *((layout, 640, "bfloat16 float32") for layout in LAYOUTS),  # pieces of 512 and of 128
        ("expert", 8, "float16"),
        ("expert-eight-ranks", 1032, "float16"),
        ("expert-tight-aligned", 2048, "bfloat16"),
        ("rank-tight", 1536, "float32"),
        ("batched-three-ranks", 296, "bfloat16"),
    ],
)
def test_logfmt10_on_the_way_back_is_each_ranks_sum_through_the_format(name, hidden, dtypes):
    """A layout's dtypes in one program. Of the way out only the routing matters: it is that of narrow rows, as in test_combine.py."""
    c, dtypes = case(name), dtypes.split()
    idx = draw_topk_idx(c, "any")
    recv, handle = routed(c)(idx, normal(1, *idx.shape))
    y = normal(2, *recv.x.shape[:-1], hidden) / 8
    y[..., ::7, :] *= 64  # some rows beyond 1: these travel as they are
    ys = [y.astype(jnp.dtype(dtype)) for dtype in dtypes]
    gate = [] if c.layout == "rank" else [recv.weights]

    def back(y, handle, *gate):
        whole = jax_ep.combine(y, handle, *gate, wire="logfmt10")
        return whole, jax_ep.combine_done(jax_ep.combine_start(y, handle, *gate, wire="logfmt10"))

    results = on_every_rank(c, lambda ys, *args: [back(y, *args) for y in ys])(ys, handle, *gate)
    routing = expect(c, handle, idx, np.zeros((c.num_ranks, c.num_tokens, 1), np.float32)).routing
    gate = gate[0].reshape(c.num_ranks, -1) if gate else None
    for dtype, y, (got, by_halves) in zip(dtypes, ys, results, strict=True):
        assert_same_bits(by_halves, got, dtype)
        by_row = y.reshape(c.num_ranks, -1, hidden)
        expected = oracle.combine(routing, by_row, gate, wire=lambda partial: oracle_roundtrip(partial[None])[0][0])
        assert_same_bits(got, expected, dtype)
        exact = oracle.combine(routing, by_row, gate).astype(np.float32)
        assert (got.astype(np.float32) != exact).any(), dtype
        np.testing.assert_allclose(got.astype(np.float32), exact, rtol=0.05, atol=0.1, err_msg=dtype)


@pytest.mark.parametrize("name", ["expert", "expert-tight", "rank", "rank-tight", "batched", "batched-tight"])
def test_sums_encoded_before_the_kernel_of_high_throughput_are_the_same(name):
    """XLA sums and encodes, the kernel moves: its rows are the sums, under a routing of layout "rank"."""
    c = wide(name, hidden=640)
    idx = draw_topk_idx(c, "any")
    recv, handle = routed(case(name))(idx, normal(1, *idx.shape))
    y = (normal(2, *recv.x.shape[:-1], c.hidden) / 8).astype(jnp.dtype(c.dtype))

    def f(y, handle, weights):
        weights = [] if c.layout == "rank" else [weights.reshape(-1)]
        static = {"num_rows": 1, "has_weights": bool(weights), "wire": "logfmt10"}
        rows = y.reshape(-1, c.hidden)
        (out,) = cuda.encode_and_combine(rows, *weights, *handle.arrays, routing=handle.routing, **static)
        gates = weights[0].reshape(y.shape[:-1]) if weights else None
        return out, jax_ep.combine(y, handle, gates, wire="logfmt10")

    got, expected = on_every_rank(c, f)(y, handle, recv.weights)
    assert_same_bits(got, expected)


@quick
def test_the_derivative_of_logfmt10_is_straight_through():
    c = wide("expert", hidden=512, dtype="float32")
    idx = draw_topk_idx(c, "any")
    x, ct = (integers(seed, c.num_ranks, c.num_tokens, c.hidden) / 16 for seed in (0, 1))
    weights = integers(2, *idx.shape)

    def f(x, idx, weights, ct):
        def derivatives(wire):
            def g(x, weights):
                recv, handle = dispatch(c, x, idx, weights)
                return (
                    jax_ep.combine(recv.x, handle, recv.weights, wire=wire),
                    jax_ep.combine(recv.x, handle, wire=wire),
                    jax_ep.combine_done(jax_ep.combine_start(recv.x, handle, recv.weights, wire=wire)),
                )

            _, vjp = jax.vjp(g, x, weights)
            return vjp((ct, ct, ct)), jax.jvp(g, (x, weights), (ct, weights))[1]

        return derivatives("logfmt10"), derivatives(None)

    got, expected = on_every_rank(c, f)(x, idx, weights, ct)
    assert_same_tree(got, expected)


def test_logfmt10_under_vmap_is_a_loop():
    """Pieces and groups belong to one row's columns: rows laid side by side must not share them. Both widths in one program."""
    cases = [wide("expert", hidden=hidden, dtype="float32") for hidden in (320, 1024)]
    idx = draw_topk_idx(cases[0], "any")
    xs = [np.stack([rows_of(c, seed) / 64 for seed in range(2)], axis=1) for c in cases]
    weights = normal(1, *idx.shape)

    def f(xs, idx, weights):
        def layer(x):
            recv, handle = dispatch(cases[0], x, idx, weights)
            return (
                jax_ep.combine(recv.x, handle, recv.weights, wire="logfmt10"),
                jax_ep.combine(recv.x, handle, wire="logfmt10"),
            )

        return [(jax.vmap(layer)(x), jax.tree.map(lambda *a: jnp.stack(a), *map(layer, x))) for x in xs]

    for c, (got, expected) in zip(cases, on_every_rank(cases[0], f)(xs, idx, weights), strict=True):
        assert_same_tree(got, expected, f"{c.hidden} columns")
