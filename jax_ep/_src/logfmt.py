"""LogFMT-10: the compressed way back of `combine`, 10 bits a value: a sign and one of 511 steps on a logarithmic scale.

`combine(wire="logfmt10")` sends each partial row through `logfmt10_roundtrip`. The format is DeepEP's (low-latency combine);
its logarithms and powers are replaced by integer ones, so that XLA on any platform, NumPy and a kernel give the same bits.

Per group of 128 columns (the last may be shorter), over magnitudes:
  lmax = log2(amax), lmin = max(log2(amin), lmax - 32), range = lmax - lmin, step = range / 510
  code 0 is zero, code c = 1..511 is 2**(lmin + (c - 1) * step); a value takes the code nearest to it in linear space.
A piece of 1024 columns (512 unless H is a multiple of 1024; the last may be shorter) is encoded if each of its groups has
amax < 1 and lmin < lmax; else it travels as it is. f32 subnormals count as zero.

Arithmetic, all in integers. A logarithm has 16 fraction bits and f32's exponent bias. With exponent e and mantissa m of f32:
  log2:  (e << 16) + LOG[m >> 16] + round(m's low 16 bits of the way to the next entry)      LOG[i] = round(2**16 log2(1 + i/128))
  exp2:  bits of f32 = (l >> 16 << 23) + EXP[l's next 7 bits] + round(low 9 bits of the way)  EXP[i] = round(2**23 (2**(i/128) - 1))
  lmin:  max(log2(amin), lmax - 32.0, that of the least normal number); amin = 0 stands below all
  code:  max(0, 510 (log2|x| - lmin) + bias) // range, with bias = 3 range // 2 - (range // 64)**2 // 94180
         (that is 2 range - 510 log2((1 + 2**step) / 2): the boundary between two codes is their arithmetic mean)
  value: exp2(lmin + ((code - 1) range + 255) // 510), rounded to x's dtype to nearest even
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_ep._src.quantized import SOURCE_DTYPES, f32_bits, narrow

GROUP = 128
_LOG = np.array([round(2**16 * math.log2(1 + i / 128)) for i in range(129)], np.int32)
_EXP = np.array([round(2**23 * (2 ** (i / 128) - 1)) for i in range(129)], np.int32)
_LAST_STEP = 510
_WIDEST = 32 << 16
_F32_ONE = 0x3F800000
_F32_MIN_NORMAL = 0x00800000
_LOG_MIN_NORMAL = 1 << 16
_SIGN = 1 << 9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogFMT10:
    """What travels. H columns, G = ceil(H / 128) groups, P = ceil(H / piece_columns(H)) pieces.

    codes    u16[..., H]: sign << 9 | code, where the piece is encoded, else 0 (`pack` makes bytes of them)
    amax     x's dtype [..., G]: largest magnitude of the group
    amin     x's dtype [..., G]: smallest; neither means anything where the piece is not encoded
    encoded  bool[..., P]
    raw      x's dtype [..., H]: the pieces that are not encoded, else 0
    """

    codes: Array
    amax: Array
    amin: Array
    encoded: Array
    raw: Array


@functools.partial(jax.jit, inline=True)
def logfmt10_encode(x: Array) -> LogFMT10:
    """Encodes bf16, f16 or f32[..., H], any leading axes, H >= 1.

    Raises:
      TypeError: x is not bf16, f16 or f32.
      ValueError: x has no columns.

    >>> logfmt10_encode(jnp.array([0.5, -0.25, 0.0])).codes & 511          # the full 32 binades, because of the zero
    Array([511, 495,   0], dtype=uint16)
    """
    _check(x)
    bits = f32_bits(x)
    magnitude = bits & 0x7FFFFFFF
    magnitude = jnp.where(magnitude < _F32_MIN_NORMAL, 0, magnitude)
    groups = _split(magnitude, fill=0)
    amax = jnp.max(groups, axis=-1)
    amin = jnp.min(_split(magnitude, fill=0x7FFFFFFF), axis=-1)
    lmin, width = _scale(amax, amin)

    piece = piece_columns(x.shape[-1])
    num_pieces = -(-x.shape[-1] // piece)
    good = (amax < _F32_ONE) & (width > 0)
    good = _pad(good, num_pieces * (piece // GROUP), fill=True).reshape(*good.shape[:-1], num_pieces, piece // GROUP)
    encoded = jnp.all(good, axis=-1)

    width = jnp.maximum(width, 1)  # where it is 0 the piece is not encoded
    bias = 3 * width // 2 - (width // 64) ** 2 // 94180
    distance = jnp.maximum(_log2(groups) - lmin[..., None], -width[..., None])  # further below is code 0 as well
    code = jnp.maximum(_LAST_STEP * distance + bias[..., None], 0) // width[..., None]
    code = jnp.where(groups == 0, 0, code)
    code = _join(code, x.shape[-1]) | jnp.where(bits >> 31 != 0, _SIGN, 0)

    here = _by_column(encoded, x.shape[-1])
    codes = jnp.where(here, code, 0).astype(jnp.uint16)
    return LogFMT10(codes, _round_to(amax, x.dtype), _round_to(amin, x.dtype), encoded, jnp.where(here, 0, x))


@functools.partial(jax.jit, inline=True)
def logfmt10_decode(encoding: LogFMT10) -> Array:
    """The rows again, x's dtype [..., H]. A zero keeps its sign.

    >>> logfmt10_decode(logfmt10_encode(jnp.array([0.5, -0.25, 0.0])))
    Array([ 0.5      , -0.2493223,  0.       ], dtype=float32)
    """
    hidden = encoding.codes.shape[-1]
    code = _split((encoding.codes & (_SIGN - 1)).astype(jnp.int32), fill=0)
    lmin, width = (a[..., None] for a in _scale(f32_bits(encoding.amax), f32_bits(encoding.amin)))
    magnitude = _exp2(lmin + ((code - 1) * width + _LAST_STEP // 2) // _LAST_STEP)
    magnitude = _join(jnp.where(code == 0, 0, magnitude), hidden)
    sign = (encoding.codes & _SIGN).astype(jnp.uint32) << 22
    rows = _round_to(magnitude.astype(jnp.uint32) | sign, encoding.raw.dtype)
    return jnp.where(_by_column(encoding.encoded, hidden), rows, encoding.raw)


@jax.custom_jvp
def logfmt10_roundtrip(x: Array) -> Array:
    """What arrives of bf16, f16 or f32[..., H]: same shape and dtype. The derivative is straight-through (the identity).

    Raises as `logfmt10_encode`.

    >>> logfmt10_roundtrip(jnp.array([2.0, 0.3, 0.1]))                     # amax >= 1: the piece travels as it is
    Array([2. , 0.3, 0.1], dtype=float32)
    """
    return logfmt10_decode(logfmt10_encode(x))


@logfmt10_roundtrip.defjvp
def _logfmt10_roundtrip_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return logfmt10_roundtrip(*primals), tangents[0]


def piece_columns(hidden: int) -> int:
    """Columns that are encoded, or not, together.

    >>> piece_columns(7168), piece_columns(2880)
    (1024, 512)
    """
    return 1024 if hidden % 1024 == 0 else 512


def packed_bytes(columns: int, dtype: Any) -> int:
    """Bytes of `columns` encoded columns: ten bits each, and amax and amin for each group, in the rows' dtype.

    A whole piece of 1024 bf16 columns takes 1312 bytes instead of 2048.

    >>> packed_bytes(1024, jnp.bfloat16), packed_bytes(64, jnp.float32)
    (1312, 88)
    """
    return -(-10 * columns // 8) + 2 * jnp.dtype(dtype).itemsize * -(-columns // GROUP)


def pack(codes: Array) -> Array:
    """u16[..., n] of ten bits -> u8[..., ceil(10 n / 8)]: code i is bits 10 i .. 10 i + 9, the lowest bit first.

    >>> pack(jnp.array([0x3FF, 0, 0x201], jnp.uint16))
    Array([255,   3,  16,  32], dtype=uint8)
    """
    n = codes.shape[-1]
    c = _pad(codes.astype(jnp.uint32), -(-n // 4) * 4, fill=0).reshape(*codes.shape[:-1], -(-n // 4), 4)
    c0, c1, c2, c3 = (c[..., i] for i in range(4))
    five = jnp.stack([c0, c0 >> 8 | c1 << 2, c1 >> 6 | c2 << 4, c2 >> 4 | c3 << 6, c3 >> 2], axis=-1).astype(jnp.uint8)
    return _flat(five)[..., : -(-10 * n // 8)]


def unpack(packed: Array, n: int) -> Array:
    """u8[..., ceil(10 n / 8)] -> u16[..., n], the inverse of `pack`.

    >>> unpack(jnp.array([255, 3, 16, 32], jnp.uint8), 3)
    Array([1023,    0,  513], dtype=uint16)
    """
    b = _pad(packed.astype(jnp.uint32), -(-n // 4) * 5, fill=0).reshape(*packed.shape[:-1], -(-n // 4), 5)
    b0, b1, b2, b3, b4 = (b[..., i] for i in range(5))
    four = jnp.stack([b0 | b1 << 8, b1 >> 2 | b2 << 6, b2 >> 4 | b3 << 4, b3 >> 6 | b4 << 2], axis=-1) & 0x3FF
    return _flat(four)[..., :n].astype(jnp.uint16)


# Integer logarithms and powers; bits are those of an f32 >= 0


def _scale(amax: Array, amin: Array) -> tuple[Array, Array]:
    """lmin and range of each group, from the bits of amax and amin."""
    lmax = _log2(amax)
    lmin = jnp.where(amin == 0, 0, _log2(amin))
    lmin = jnp.maximum(jnp.maximum(lmin, lmax - _WIDEST), _LOG_MIN_NORMAL)
    return lmin, lmax - lmin


def _log2(bits: Array) -> Array:
    index, low = bits >> 16 & 0x7F, (bits & 0xFFFF).astype(jnp.int32)
    return ((bits >> 23) << 16).astype(jnp.int32) + _interpolate(_LOG, index, low, low_bits=16)


def _exp2(log: Array) -> Array:
    return (log >> 16 << 23) + _interpolate(_EXP, log >> 9 & 0x7F, log & 0x1FF, low_bits=9)


def _interpolate(table: np.ndarray, index: Array, low: Array, low_bits: int) -> Array:
    """s32: the table's entry at index + low / 2**low_bits, rounded to nearest, a half upwards."""
    entry = jnp.asarray(table).at[index].get(mode="promise_in_bounds")
    rise = jnp.asarray(np.diff(table)).at[index].get(mode="promise_in_bounds")
    return entry + (rise * low + (1 << (low_bits - 1)) >> low_bits)


def _round_to(bits: Array, dtype: Any) -> Array:
    """The f32 with these bits, rounded to nearest even in dtype."""
    return narrow(lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32), dtype)


# Groups and pieces


def _split(x: Array, fill: int) -> Array:
    """[..., H] as [..., G, 128], the last group filled up."""
    num_groups = -(-x.shape[-1] // GROUP)
    return _pad(x, num_groups * GROUP, fill).reshape(*x.shape[:-1], num_groups, GROUP)


def _join(x: Array, hidden: int) -> Array:
    """[..., G, 128] as [..., H], without the fill."""
    return _flat(x)[..., :hidden]


def _by_column(encoded: Array, hidden: int) -> Array:
    """bool[..., P] of the pieces as bool[..., H]."""
    return jnp.repeat(encoded, piece_columns(hidden), axis=-1)[..., :hidden]


def _pad(x: Array, size: int, fill: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])], constant_values=fill)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _check(x: Array) -> None:
    if x.dtype not in SOURCE_DTYPES:
        got = jax.typeof(x).str_short(short_dtypes=True)
        raise TypeError(
            f"logfmt10: x must be bf16, f16 or f32[..., hidden], got {got}. Cast it with .astype(jnp.float32)."
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"logfmt10: x must be [..., hidden] with hidden >= 1, got shape {x.shape}. Add a last axis.")
