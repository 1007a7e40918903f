"""Quantized rows against an oracle in NumPy and ml_dtypes: the same bits; straight-through derivatives; clear errors."""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep._src import quantized
from jax_ep._src.quantized import Quantized, dequantize, quantize

E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
GROUP = {"fp8": 128, "fp8_ue8m0": 128, "mxfp8": 32}
WIDTHS = (1, 16, 32, 100, 128, 160, 512, 1024, 2880, 7168)
formats = pytest.mark.parametrize("format", GROUP)


def oracle_quantize(x: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """One group after another, in NumPy's f32 and with ml_dtypes' conversions."""
    x = x.astype(np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
    values, scales = [], []
    for start in range(0, x.shape[-1], GROUP[format]):
        columns = x[..., start : start + GROUP[format]]
        bad = ~np.isfinite(columns).all(axis=-1)
        columns = np.where(bad[..., None], np.float32(0), columns)
        true_amax = np.abs(columns).max(axis=-1)
        amax = np.maximum(true_amax, np.float32(448 * 2.0**-117))
        if format == "fp8":
            scale = amax / np.float32(448)
            inverse = np.float32(448) / amax
            scale = np.where(true_amax == 0, np.float32(1), scale)
        else:
            exponents = np.arange(-127, 128)
            least = exponents[np.searchsorted(np.ldexp(448.0, exponents), amax.astype(np.float64))]
            least = np.where(true_amax == 0, 0, least)
            inverse = np.ldexp(np.float32(1), -least)
            scale = np.ldexp(np.float32(1), least)
        scale = np.where(bad, np.float32(np.nan), scale)
        with np.errstate(under="ignore"):
            value = np.clip(columns * inverse[..., None], -448, 448).astype(np.float32)
        values.append(np.where(bad[..., None], np.float32(np.nan), value).astype(E4M3))
        scales.append(scale.astype(np.float32 if format == "fp8" else E8M0))
    return np.concatenate(values, axis=-1), np.stack(scales, axis=-1)


def oracle_dequantize(values: np.ndarray, scales: np.ndarray, format: str, dtype: np.dtype) -> np.ndarray:
    most = ml_dtypes.finfo(dtype).max.astype(np.float32)
    group_of_column = np.arange(values.shape[-1]) // GROUP[format]
    with np.errstate(over="ignore"):
        rows = values.astype(np.float32) * scales.astype(np.float32)[..., group_of_column]
    return np.clip(rows, -most, most).astype(dtype)


def assert_same_bits(got: jax.Array, want: np.ndarray) -> None:
    """Equal in shape, dtype and every bit; any NaN equals any other."""
    got = np.asarray(got)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    unsigned = f"u{want.dtype.itemsize}"
    both_nan = np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    differ = (got.view(unsigned) != want.view(unsigned)) & ~both_nan
    assert not differ.any(), f"{differ.sum()} differ, first {got[differ][0]!r} for {want[differ][0]!r}"


@functools.partial(jax.jit, static_argnums=0)
def quantize_each(format: str, *arrays: jax.Array) -> list[Quantized]:
    return [quantize(x, format) for x in arrays]


@jax.jit
def dequantize_each(rows: list[Quantized]) -> list[jax.Array]:
    return [dequantize(q) for q in rows]


def check_against_oracle(format: str, *arrays: np.ndarray) -> None:
    """All arrays in one program, which compiles faster than one for each."""
    rows = quantize_each(format, *arrays)
    for x, q, back in zip(arrays, rows, dequantize_each(rows), strict=True):
        values, scales = oracle_quantize(x, format)
        assert_same_bits(q.values, values)
        assert_same_bits(q.scales, scales)
        assert_same_bits(back, oracle_dequantize(values, scales, format, x.dtype))


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Every exponent, subnormals, infinities and NaNs."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    return rng.integers(0, 2 ** (8 * unsigned.itemsize), shape, unsigned).view(dtype)


# The same bits


@formats
@pytest.mark.parametrize("hidden", WIDTHS)
def test_normal_rows_have_the_oracles_bits(format, hidden):
    rng = np.random.default_rng(hidden)
    arrays = []
    for dtype in (BF16, np.float16, np.float32):
        rows = rng.standard_normal((3, 2, hidden)) * np.exp2(rng.integers(-12, 12, (3, 2, 1)))
        arrays.append(rows.astype(dtype))
    check_against_oracle(format, *arrays)


@formats
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_any_bits_have_the_oracles_bits(format, dtype):
    rng = np.random.default_rng(0)
    anything, finite = (random_bits(rng, (rows, 160), dtype) for rows in (64, 256))
    finite = np.where(np.isfinite(finite.astype(np.float32)), finite, 1).astype(dtype)
    check_against_oracle(format, anything, finite)


@formats
def test_every_binade_of_amax_around_the_scales_steps(format):
    """amax at, just below and just above powers of two and 448 times them, with small and signed-zero neighbours."""
    powers = np.exp2(np.arange(-126, 128)).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        edges = np.concatenate([powers, powers * np.float32(1.75)])
        edges = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, np.inf, dtype=np.float32)])
    edges = edges[np.isfinite(edges)]
    fractions = np.array([1, -1, 0.5, 1 / 448, -1 / 3, 2.0**-10, -(2.0**-16), 3e-7, 0.0, -0.0, 0.07, 0.99], np.float32)
    with np.errstate(under="ignore"):
        check_against_oracle(format, edges[:, None] * fractions)


@formats
def test_every_rounding_boundary_of_e4m3(format):
    """Under a scale of 1: all e4m3 values, the midpoints between them (ties to even) and their neighbours."""
    points = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    middles = (points[1:] + points[:-1]) / 2
    near = np.concatenate([points, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf, dtype=np.float32)])
    rows = np.stack([np.full_like(near, 448), near, -near], axis=-1)
    check_against_oracle(format, rows)
    assert (np.asarray(quantize(rows, format).scales).astype(np.float32) == 1).all()


@hypothesis.given(
    x=hnp.arrays(np.float32, st.sampled_from([(2, 5), (2, 33), (1, 130)]), elements=st.floats(width=32)),
    format=st.sampled_from(list(GROUP)),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_row_has_the_oracles_bits(x, format):
    check_against_oracle(format, x)


# What the formats promise


@hypothesis.given(
    x=hnp.arrays(np.float32, (2, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)),
    shift=st.integers(-40, 40),
    format=st.sampled_from(["fp8_ue8m0", "mxfp8", "fp8"]),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_scaling_a_group_by_a_power_of_two_scales_its_scale_alone(x, shift, format):
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)
    q, shifted = quantize(x, format), quantize(x * np.float32(2.0**shift), format)
    nonzero = np.asarray(jnp.max(jnp.abs(quantized._split(jnp.abs(x), GROUP[format])), axis=-1) > 0)
    assert_same_bits(shifted.values, np.asarray(q.values))
    ratio = np.asarray(shifted.scales, np.float64) / np.asarray(q.scales, np.float64)
    assert (ratio == np.where(nonzero, 2.0**shift, 1.0)).all()


@formats
def test_error_is_below_half_a_step_of_e4m3_and_groups_do_not_touch(format):
    x = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    x[:, ::128] *= 1000
    back = np.asarray(dequantize(quantize(x, format)))
    amax = np.repeat(np.abs(x).reshape(8, -1, GROUP[format]).max(axis=-1), GROUP[format], axis=-1)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * 2.0**-4, amax * 2.0**-17 * 1.15)).all()
    changed = x.copy()
    changed[:, : GROUP[format]] = 7
    assert_same_bits(
        quantize(changed, format).values[:, GROUP[format] :], np.asarray(quantize(x, format).values)[:, GROUP[format] :]
    )


@formats
def test_a_group_with_inf_or_nan_is_nan_and_its_neighbours_are_not(format):
    group = GROUP[format]
    x = np.ones((2, 3 * group), np.float32)
    x[0, group], x[1, group + 1] = np.inf, np.nan
    q = quantize(x, format)
    assert np.isnan(np.asarray(q.scales, np.float32)).tolist() == [[False, True, False]] * 2
    assert (
        np.isnan(np.asarray(dequantize(q))).all(axis=0).tolist() == [False] * group + [True] * group + [False] * group
    )


@formats
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_the_largest_finite_number_stays_finite(format, dtype):
    most = ml_dtypes.finfo(dtype).max
    back = dequantize(quantize(np.array([[most, -most]], dtype), format))
    np.testing.assert_allclose(np.asarray(back, np.float64), [[most, -most]], rtol=2.0**-4)


@formats
def test_zero_rows_are_zero_with_scale_one_and_keep_their_sign(format):
    q = quantize(jnp.array([[0.0, -0.0, 1e-40, -1e-40]]), format)
    assert np.asarray(q.scales, np.float32).tolist() == [[1.0]]
    assert np.asarray(q.values).view(np.uint8).tolist() == [[0, 0x80, 0, 0x80]]


def test_integer_division_rounds_as_ieee_division():
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0x20000000, 0x5E000000, 1 << 18, np.uint32) for _ in range(2))
    b[: 1 << 12] = (b[: 1 << 12] & 0x7F800000) | (a[: 1 << 12] & 0x7FFFFF)  # equal mantissas
    quotient = np.asarray(jax.jit(quantized._divide)(a, b))
    np.testing.assert_array_equal(quotient, (a.view(np.float32) / b.view(np.float32)).view(np.uint32))


@formats
def test_dequantize_reads_every_code_in_every_dtype(format):
    codes = np.tile(np.arange(256, dtype=np.uint8).view(E4M3), (3, 1))
    groups = quantized.num_groups(256, format)
    scales = np.array([2.0**-100, 1, 2.0**100], np.float32)[:, None].repeat(groups, axis=1)
    q = Quantized(codes, scales.astype(quantized.FORMATS[format].scales), format=format)
    for dtype in (BF16, np.float16, np.float32):
        assert_same_bits(dequantize(q, dtype), oracle_dequantize(codes, scales, format, dtype))
    assert dequantize(q).dtype == jnp.float32


# Transformations


def there_and_back(x: jax.Array, format: str) -> jax.Array:
    return dequantize(quantize(x, format))


@formats
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_derivative_is_the_identity_in_the_sources_dtype(format, dtype):
    x, t = (jax.random.normal(jax.random.key(i), (4, 160), dtype) for i in range(2))
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        f = wrap(functools.partial(there_and_back, format=format))
        assert_same_bits(jax.jvp(f, (x,), (t,))[1], np.asarray(t))
        assert_same_bits(jax.vjp(f, x)[1](t)[0], np.asarray(t))
    assert_same_bits(
        jax.jvp(lambda x: dequantize(quantize(x, format), jnp.float32), (x,), (t,))[1], np.asarray(t, np.float32)
    )


@formats
def test_second_derivative_sees_the_identity(format):
    x = jnp.arange(1.0, 41.0)

    def loss(x):
        return jnp.sum(there_and_back(x, format) ** 2)

    np.testing.assert_array_equal(jax.grad(loss)(x), 2 * there_and_back(x, format))
    np.testing.assert_array_equal(jax.hessian(loss)(x), 2 * np.eye(40))


@formats
def test_values_and_scales_carry_no_tangent(format):
    x = jnp.arange(1.0, 41.0)
    q, tangent = jax.jvp(lambda x: quantize(x, format), (x,), (jnp.ones(40),))
    assert (np.asarray(tangent.carrier) == 1).all() and not np.asarray(q.carrier).any()

    def used(x):
        q = quantize(x, format)
        return jnp.sum(q.values.astype(jnp.float32)) + jnp.sum(q.scales.astype(jnp.float32))

    def without_carrier(x):
        return jnp.sum(dequantize(dataclasses.replace(quantize(x, format), carrier=None)))

    assert not np.asarray(jax.grad(used)(x)).any()
    assert not np.asarray(jax.grad(without_carrier)(x)).any()


@formats
def test_gradient_beside_integers_is_float0(format):
    """Quantized rows and integer routing travel together: the integers' cotangent is float0, the rows' is x's dtype."""
    x, idx = jnp.ones((4, 32), jnp.bfloat16), jnp.arange(4)

    @jax.jit
    def permuted(x, idx):
        return jax.tree.map(lambda a: a[idx], quantize(x, format)), idx

    def loss(x, idx):
        q, idx = permuted(x, idx)
        return jnp.sum(dequantize(q).astype(jnp.float32) * idx[:, None])

    grad_x, grad_idx = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, idx)
    assert grad_idx.dtype == jax.dtypes.float0
    assert_same_bits(grad_x, np.broadcast_to(np.arange(4)[:, None], (4, 32)).astype(BF16))


@formats
def test_quantized_is_carried_through_scan_and_remat(format):
    x = jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)

    @jax.jit
    def loss(x):
        def step(q, _):
            return quantize(dequantize(q) * 2, format), q.scales

        q, _ = jax.lax.scan(jax.checkpoint(step), quantize(x, format), length=3)
        return jnp.sum(dequantize(q).astype(jnp.float32))

    assert (np.asarray(jax.grad(loss)(x), np.float32) == 8).all()


@formats
def test_vmap_is_one_more_leading_axis(format):
    x = jax.random.normal(jax.random.key(0), (5, 3, 160))
    q, each = quantize(x, format), jax.vmap(lambda x: quantize(x, format))(x)
    jax.tree.map(lambda a, b: assert_same_bits(a, np.asarray(b)), each, q)
    over_columns = jax.vmap(lambda x: there_and_back(x, format), in_axes=1, out_axes=1)(x)
    assert_same_bits(over_columns, np.asarray(dequantize(q)))
    grads = jax.vmap(jax.grad(lambda x: jnp.sum(there_and_back(x, format) * 3)))(x)
    assert (np.asarray(grads) == 3).all()


@formats
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_on_eight_devices(format, check_vma):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (16, 160))
    sharded = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
    )

    q = jax.jit(sharded(lambda x: quantize(x, format)))(x)
    jax.tree.map(lambda a, b: assert_same_bits(a, np.asarray(b)), q, quantize(x, format))
    assert_same_bits(jax.jit(sharded(dequantize))(q), np.asarray(dequantize(q)))

    f = sharded(lambda x: there_and_back(x, format) * (1 + jax.lax.axis_index("expert")))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(f(x))))(x)
    np.testing.assert_array_equal(grad, np.broadcast_to(np.repeat(np.arange(1.0, 9.0), 2)[:, None], x.shape))

    inside = sharded(lambda x: jax.grad(lambda x: jnp.sum(there_and_back(x, format)))(x))
    assert (np.asarray(jax.jit(inside)(x)) == 1).all()


@formats
def test_shapes_without_values(format):
    x = jax.ShapeDtypeStruct((0, 7, 2880), jnp.float16)
    q = jax.eval_shape(lambda x: quantize(x, format), x)
    assert q.values == jax.ShapeDtypeStruct(x.shape, E4M3) and q.carrier == x
    assert q.scales == jax.ShapeDtypeStruct(
        (0, 7, quantized.num_groups(2880, format)), quantized.FORMATS[format].scales
    )
    assert jax.eval_shape(dequantize, q) == x
    assert dequantize(quantize(jnp.zeros(x.shape, x.dtype), format)).shape == x.shape


def test_carrier_costs_nothing_when_it_is_not_asked_for():
    text = jax.jit(lambda x: quantize(x, "fp8").values).lower(jnp.ones((4, 128))).compile().as_text()
    assert "f32[4,128]{1,0} broadcast" not in text.split("ENTRY")[1]


# Errors


def test_quantize_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"quantize: format must be one of 'fp8', 'fp8_ue8m0', 'mxfp8', got 'fp4'\."):
        quantize(jnp.ones((2, 4)), "fp4")
    with pytest.raises(TypeError, match=r"quantize: x must be bf16, f16 or f32\[..., hidden\], got i?s?32\[2,4\]\."):
        quantize(jnp.ones((2, 4), jnp.int32), "fp8")
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match=r"quantize: x must be \[..., hidden\] with hidden >= 1"):
            quantize(jnp.ones(shape), "fp8")


def test_dequantize_names_what_is_wrong():
    values, scales = jnp.ones((2, 256), E4M3), jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"dequantize: q.format must be one of .*, got 'custom'\."):
        dequantize(Quantized(values, scales))
    with pytest.raises(
        TypeError, match=r"dequantize: q.scales must be float8_e8m0fnu for format 'mxfp8', got float32\."
    ):
        dequantize(Quantized(values, scales, format="mxfp8"))
    with pytest.raises(TypeError, match=r"dequantize: q.values must be float8_e4m3fn for format 'fp8', got float32\."):
        dequantize(Quantized(scales, scales, format="fp8"))
    with pytest.raises(ValueError, match=r"dequantize: q.scales must have one scale for each 128 columns"):
        dequantize(Quantized(values, scales[:, :1], format="fp8"))
    with pytest.raises(
        ValueError, match=r"dequantize: q.carrier must have the shape of q.values \(2, 256\), got \(2, 1\)\."
    ):
        dequantize(Quantized(values, scales, jnp.ones((2, 1)), "fp8"))
    with pytest.raises(TypeError, match=r"dequantize: dtype must be bfloat16, float16 or float32, got int32\."):
        dequantize(Quantized(values, scales, format="fp8"), jnp.int32)


def test_custom_rows_are_any_pytree_of_bytes():
    q = Quantized(jnp.ones((2, 16), jnp.uint8), jnp.ones((2, 3), E4M3))
    moved = jax.jit(lambda q: jax.tree.map(lambda a: a[::-1], q))(q)
    assert moved.format == "custom" and moved.carrier is None and moved.values.dtype == jnp.uint8
