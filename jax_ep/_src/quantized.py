"""Quantized rows: values in fp8 with one scale for each group of columns, and straight-through derivatives.

`quantize` and `dequantize` are public; `encode` and `decode` are the same arithmetic with no derivative, for the
reference and the lowering. Every step is an integer operation or a single IEEE operation on f32 that meets no
subnormal, so that XLA on any platform, NumPy and a kernel give the same bits. docs/wire-formats.md describes the formats.

Shapes: H columns (hidden), G = ceil(H / group) scales a row.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ep._src import compat


class Format(NamedTuple):
    """What a format stores: a value for each column, a scale for each `group` columns."""

    values: Any
    scales: Any
    group: int


FORMATS = {
    "fp8": Format(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float32), 128),
    "fp8_ue8m0": Format(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e8m0fnu), 128),
    "mxfp8": Format(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e8m0fnu), 32),
}
SOURCE_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))

_E4M3_MAX = 448.0
_E4M3_NAN = 0x7F
_E8M0_NAN = 0xFF
_E8M0_ONE = 127
_F32_448 = 0x43E00000
_F32_ONE = 0x3F800000
_F32_INF = 0x7F800000
_F32_NAN = 0x7FC00000
_F32_MIN_NORMAL = 0x00800000
# 448 * 2**-117: no scale is below 2**-117, so that no product of a scale and an e4m3 value (2**-9 or more) is subnormal.
_AMAX_FLOOR = 0x09600000


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales", "carrier"), meta_fields=("format",)
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Rows in a wire format. `quantize` makes one; build your own to send bytes that another library quantized.

    values   [..., H] in the format's dtype; with format "custom" any dtype and width (packed fp4 bytes too).
    scales   [..., G], G = num_groups(H, format); with "custom" any dtype and width.
    carrier  zeros [..., H] in the dtype that was quantized: its tangent is that of the source, which is how derivatives
             pass straight through. None where there is nothing to differentiate. It is free inside one jit; drop it
             with `dataclasses.replace(q, carrier=None)` before keeping q for long.
    format   a key of FORMATS, or "custom": carried as it is, not dequantized here.

    >>> fp4 = Quantized(jnp.zeros((2, 64), jnp.uint8), jnp.ones((2, 8), jnp.float8_e4m3fn))  # two values a byte
    >>> fp4.format, fp4.carrier
    ('custom', None)
    """

    values: Array
    scales: Array
    carrier: Array | None = None
    format: str = "custom"


@compat.on_the_callers_stream
def quantize(x: Array, format: str) -> Quantized:
    """Quantizes each group of columns of each row by its largest magnitude.

    Args:
      x: bf16, f16 or f32[..., H], any leading axes, H >= 1. The last group is shorter where H is no multiple.
      format: "fp8" (e4m3, f32 scale per 128 columns), "fp8_ue8m0" (e4m3, power-of-two scale per 128) or "mxfp8" (e4m3,
        power-of-two scale per 32, as in the OCP Microscaling formats, but rounded up so that no value saturates).

    Returns:
      Quantized with values e4m3[..., H], scales f32 or e8m0[..., G], carrier zeros of x's shape and dtype.

    A group with an inf or NaN becomes NaN in scale and values. An all-zero group has scale 1. f32 subnormals count as
    zero. The derivative is straight-through: dequantize(quantize(x)) has x's tangent.

    Raises:
      TypeError: x is not bf16, f16 or f32.
      ValueError: x has no columns, or format is unknown.

    >>> q = quantize(jnp.array([[448.0, -1.0, 0.3, 0.0]]), "fp8")
    >>> q.values, q.scales
    (Array([[448, -1, 0.3125, 0]], dtype=float8_e4m3fn), Array([[1.]], dtype=float32))
    """
    values, scales = encode(lax.stop_gradient(x), format)
    return Quantized(values, scales, carrier=_carrier(x), format=format)


@compat.on_the_callers_stream
def dequantize(q: Quantized, dtype: Any = None) -> Array:
    """values * scales, rounded to f32 and then to `dtype`, where it saturates: what was finite stays finite.

    Args:
      q: a Quantized of a known format; leading axes of values and scales agree.
      dtype: bf16, f16 or f32; by default the dtype that was quantized, or f32 where q has no carrier.

    Returns:
      dtype[..., H]. Its tangent is the tangent of q.carrier, cast to dtype; without a carrier it is zero.

    Raises:
      TypeError: dtype, or a dtype in q, is not one the format allows.
      ValueError: the format is "custom" or unknown, or the shapes in q do not fit together.

    >>> dequantize(quantize(jnp.full((2, 256), 3.0, jnp.bfloat16), "mxfp8"))[0, :2]
    Array([3, 3], dtype=bfloat16)
    """
    _check_quantized(q)
    if dtype is None:
        dtype = jnp.float32 if q.carrier is None else q.carrier.dtype
    dtype = jnp.dtype(dtype)
    if dtype not in SOURCE_DTYPES:
        raise TypeError(
            f"dequantize: dtype must be bfloat16, float16 or float32, got {dtype}. Cast the result instead."
        )
    values, scales = lax.stop_gradient((q.values, q.scales))
    if q.carrier is None:
        return decode(values, scales, q.format, dtype)
    return _decode_straight_through(q.format, dtype, values, scales, q.carrier)


def num_groups(hidden: int, format: str) -> int:
    """Scales a row of `hidden` columns has in `format`, a key of FORMATS.

    >>> num_groups(2880, "fp8"), num_groups(2880, "mxfp8")
    (23, 90)
    """
    return -(-hidden // _format("num_groups", format).group)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def encode(x: Array, format: str) -> tuple[Array, Array]:
    """What `quantize` computes, with no derivative: (values e4m3[..., H], scales [..., G]) of x[..., H]. Same errors.

    amax is the largest magnitude of the group, at least 448 * 2**-117. With an f32 scale: scale = amax / 448 and
    value = e4m3(|x| * (448 / amax)). With an e8m0 scale: scale is the least power of two >= amax / 448 and
    value = e4m3(|x| / scale).

    >>> encode(jnp.array([896.0, -2.0]), "fp8_ue8m0")
    (Array([448, -1], dtype=float8_e4m3fn), Array([2], dtype=float8_e8m0fnu))
    """
    rule = _format("quantize", format)
    _check_source(x)
    bits = f32_bits(x)
    magnitude = bits & 0x7FFFFFFF
    magnitude = jnp.where(
        magnitude < _F32_MIN_NORMAL, 0, magnitude
    )  # platforms disagree on whether to flush subnormals
    groups = _split(magnitude, rule.group)
    amax = jnp.max(groups, axis=-1)  # of bit patterns: ordered as the magnitudes, inf and NaN above all
    zero, finite = amax == 0, amax < _F32_INF
    amax = jnp.maximum(amax, jnp.uint32(_AMAX_FLOOR))
    if rule.scales == jnp.float32:
        scale_bits = jnp.where(zero, _F32_ONE, _divide(amax, jnp.uint32(_F32_448)))
        inverse_bits = _divide(jnp.uint32(_F32_448), amax)
        scales = _as_f32(jnp.where(finite, scale_bits, _F32_NAN))
    else:  # 448 = 1.75 * 2**8, and 0x600000 is the mantissa of 1.75
        exponent = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000)
        exponent = jnp.where(zero, _E8M0_ONE, exponent)
        inverse_bits = (254 - exponent) << 23
        scales = lax.bitcast_convert_type(jnp.where(finite, exponent, _E8M0_NAN).astype(jnp.uint8), rule.scales)
    codes = _e4m3_bits(_as_f32(groups) * _as_f32(inverse_bits)[..., None])
    codes = jnp.where(finite[..., None], codes, _E4M3_NAN)
    codes = _join(codes, x.shape[-1]) | (bits >> 31 << 7)
    return lax.bitcast_convert_type(codes.astype(jnp.uint8), rule.values), scales


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def decode(values: Array, scales: Array, format: str, dtype: Any) -> Array:
    """What `dequantize` computes, with no derivative: dtype[..., H] of values [..., H] and scales [..., G].

    >>> decode(*encode(jnp.array([896.0, -2.0]), "fp8_ue8m0"), "fp8_ue8m0", jnp.float32)
    Array([896., -2.], dtype=float32)
    """
    group = _format("dequantize", format).group
    scales = jnp.repeat(scales.astype(jnp.float32), group, axis=-1)[..., : values.shape[-1]]
    most = float(jnp.finfo(dtype).max)  # rounding to a value may have gone up past it
    return narrow(jnp.clip(values.astype(jnp.float32) * scales, -most, most), dtype)


# Derivatives: the carrier takes x's tangent on, decoding takes it up again.


@jax.custom_jvp
def _carrier(x: Array) -> Array:
    return jnp.zeros_like(x)


@_carrier.defjvp
def _carrier_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _carrier(*primals), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _decode_straight_through(format: str, dtype: Any, values: Array, scales: Array, carrier: Array) -> Array:
    del carrier
    return decode(values, scales, format, dtype)


@_decode_straight_through.defjvp
def _decode_straight_through_jvp(
    format: str, dtype: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    return _decode_straight_through(format, dtype, *primals), tangents[2].astype(dtype)


# Between the rows' dtypes and f32, for all of the contract's arithmetic. In integers, because XLA:GPU takes a conversion
# f32 -> bf16 -> f32 for nothing and drops it (xla_allow_excess_precision): what had just been rounded, here or by the
# user's program, would be encoded or added unrounded.


def f32_bits(x: Array) -> Array:
    """u32: the bits of the f32 that bf16, f16 or f32 x is."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    if x.dtype != jnp.float16:
        return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    exponent, mantissa = bits >> 10 & 0x1F, bits & 0x3FF
    shift = lax.clz(mantissa) - 21  # of a subnormal: its leading 1 becomes the implicit one
    subnormal = (113 - shift << 23) | (mantissa << shift & 0x3FF) << 13
    normal = (exponent + 112 << 23) | mantissa << 13
    magnitude = jnp.where(exponent == 0, jnp.where(mantissa == 0, 0, subnormal), normal)
    magnitude = jnp.where(exponent == 0x1F, _F32_INF | mantissa << 13, magnitude)
    return bits >> 15 << 31 | magnitude


def widen(x: Array) -> Array:
    """bf16, f16 or f32 x as f32."""
    return _as_f32(f32_bits(x))


def narrow(x: Array, dtype: Any) -> Array:
    """f32 x rounded to bf16, f16 or f32, to nearest even. NaN stays NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == jnp.bfloat16:
        rounded = magnitude + 0x7FFF + (magnitude >> 16 & 1) >> 16
        quiet_nan = magnitude >> 16 | 0x40
    elif dtype == jnp.float16:
        normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) >> 13) - (112 << 10)
        # Below 2**-14 f16 counts in steps of 2**-24, the last bit of f32 at 1/2: the sum rounds as wanted, flushed or not.
        subnormal = lax.bitcast_convert_type(_as_f32(magnitude) + 0.5, jnp.uint32) - 0x3F000000
        rounded = jnp.where(magnitude < 0x38800000, subnormal, jnp.minimum(normal, 0x7C00))
        quiet_nan = magnitude >> 13 & 0x3FF | 0x7E00
    else:
        return x.astype(dtype)
    rounded = jnp.where(magnitude > _F32_INF, quiet_nan, rounded) | bits >> 31 << 15
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), dtype)


# f32 as bit patterns in u32


def _as_f32(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def _divide(a: Array, b: Array) -> Array:
    """Bits of the correctly rounded f32 quotient of two positive normal numbers whose quotient is normal.

    Long division, because XLA turns a division by a constant into a product and divides approximately on GPUs. A kernel
    gets the same bits from __fdiv_rn.
    """
    numerator, denominator = (a & 0x7FFFFF) | 0x800000, (b & 0x7FFFFF) | 0x800000
    below = (numerator < denominator).astype(jnp.uint32)  # then the quotient of the mantissas is in (1/2, 1): double it
    remainder = (numerator << below) - denominator  # the leading 1 of the quotient
    fraction = jnp.uint32(0)
    for _ in range(3):  # 24 bits: 23 of the mantissa and one to round by
        fraction = (fraction << 8) | ((remainder << 8) // denominator)
        remainder = (remainder << 8) % denominator
    mantissa = fraction >> 1
    round_up = (fraction & 1) & ((remainder != 0) | (mantissa & 1))
    exponent = (a >> 23) - (b >> 23) + 127 - below
    return (exponent << 23) + mantissa + round_up


def _e4m3_bits(x: Array) -> Array:
    """u32 codes of the e4m3 nearest to x >= 0 (ties to even), saturating at 448."""
    x = jnp.minimum(x, _E4M3_MAX)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 127 becomes 7
    # Below 2**-6 e4m3 counts in steps of 2**-9, the last bit of f32 at 2**14: the sum rounds as wanted.
    subnormal = lax.bitcast_convert_type(x + 16384.0, jnp.uint32) - 0x46800000
    return jnp.where(bits < 0x3C800000, subnormal, normal)


def _split(x: Array, group: int) -> Array:
    """[..., H] as [..., G, group]; the last group is filled up with zeros."""
    fill = -x.shape[-1] % group
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _join(x: Array, hidden: int) -> Array:
    """[..., G, group] as [..., H], without the fill."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :hidden]


# Checks


def _format(op: str, format: str) -> Format:
    if format not in FORMATS:
        names = ", ".join(map(repr, FORMATS))
        raise ValueError(f"{op}: format must be one of {names}, got {format!r}. Pass one of these names.")
    return FORMATS[format]


def _check_source(x: Array) -> None:
    if x.dtype not in SOURCE_DTYPES:
        got = jax.typeof(x).str_short(short_dtypes=True)
        raise TypeError(
            f"quantize: x must be bf16, f16 or f32[..., hidden], got {got}. Cast it with .astype(jnp.float32)."
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize: x must be [..., hidden] with hidden >= 1, got shape {x.shape}. Add a last axis.")


def _check_quantized(q: Quantized) -> None:
    if q.format not in FORMATS:
        names = ", ".join(map(repr, FORMATS))
        raise ValueError(
            f"dequantize: q.format must be one of {names}, got {q.format!r}. Name the format when building Quantized, "
            "or convert values and scales yourself."
        )
    rule = FORMATS[q.format]
    for name, got, want in (("values", q.values.dtype, rule.values), ("scales", q.scales.dtype, rule.scales)):
        if got != want:
            raise TypeError(
                f"dequantize: q.{name} must be {want} for format {q.format!r}, got {got}. "
                "Name the format that made it, or 'custom'."
            )
    groups = -(-q.values.shape[-1] // rule.group) if q.values.ndim else 0
    if q.values.ndim == 0 or q.scales.shape != (*q.values.shape[:-1], groups):
        raise ValueError(
            f"dequantize: q.scales must have one scale for each {rule.group} columns of q.values {q.values.shape}, "
            f"got q.scales {q.scales.shape}. Check the group size and the leading axes."
        )
    if q.carrier is not None and q.carrier.shape != q.values.shape:
        raise ValueError(
            f"dequantize: q.carrier must have the shape of q.values {q.values.shape}, got {q.carrier.shape}. "
            "Pass carrier=None if there is nothing to differentiate."
        )
