"""LogFMT-10 against an oracle in NumPy's s64 (the same bits) and against the format's definition in f64 (the same error)."""

import functools
import hashlib
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep._src import logfmt

BF16 = ml_dtypes.bfloat16
DTYPES = (BF16, np.float16, np.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
roundtrip = jax.jit(logfmt.logfmt10_roundtrip)
encode = logfmt.logfmt10_encode
pack = jax.jit(logfmt.pack)
unpack = jax.jit(logfmt.unpack, static_argnums=1)


def oracle_log2(magnitude: np.ndarray) -> np.ndarray:
    """f32 > 0 -> s64 with 16 fraction bits: a straight line between 128 points of each binade."""
    mantissa, exponent = np.frexp(magnitude)  # mantissa in [1/2, 1)
    position = np.ldexp(mantissa.astype(np.float64), 24).astype(np.int64) - 2**23
    points = np.rint(2**16 * np.log2(1 + np.arange(129) / 128)).astype(np.int64)
    i, low = position // 2**16, position % 2**16
    return (
        (exponent.astype(np.int64) + 126) * 2**16 + points[i] + (2 * (points[i + 1] - points[i]) * low + 2**16) // 2**17
    )


def oracle_exp2(log: np.ndarray) -> np.ndarray:
    """The inverse, as f32."""
    points = np.rint(2**23 * (np.exp2(np.arange(129) / 128) - 1)).astype(np.int64)
    i, low = log % 2**16 // 2**9, log % 2**9
    mantissa = 2**23 + points[i] + (2 * (points[i + 1] - points[i]) * low + 2**9) // 2**10
    return np.ldexp(mantissa.astype(np.float64), log // 2**16 - 127 - 23).astype(np.float32)


def oracle_group(magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """One group of one row: codes, decoded magnitudes in f32, and whether it can be encoded."""
    amax, amin = magnitude.max(), magnitude.min()
    if not 0 < amax < 1:
        return np.zeros(magnitude.shape, int), magnitude, False
    lmax = int(oracle_log2(amax))
    lmin = max(int(oracle_log2(amin)) if amin > 0 else 0, lmax - 32 * 2**16, 2**16)
    span = lmax - lmin
    if span == 0:
        return np.zeros(magnitude.shape, int), magnitude, False
    log = oracle_log2(np.where(magnitude == 0, np.float32(1), magnitude))
    codes = (510 * (log - lmin) + 3 * span // 2 - (span // 64) ** 2 // 94180) // span
    codes = np.where(magnitude == 0, 0, np.maximum(codes, 0))
    decoded = oracle_exp2(lmin + ((np.maximum(codes, 1) - 1) * span + 255) // 510)
    return codes, np.where(codes == 0, np.float32(0), decoded), True


def oracle_roundtrip(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, H] -> rows as they arrive, codes."""
    hidden = x.shape[-1]
    piece = 1024 if hidden % 1024 == 0 else 512
    arrived, codes = x.copy(), np.zeros(x.shape, np.uint16)
    for row in range(x.shape[0]):
        for start in range(0, hidden, piece):
            end = min(start + piece, hidden)
            values = x[row, start:end].astype(np.float32)
            magnitude = np.abs(values)
            magnitude = np.where(magnitude < np.finfo(np.float32).tiny, np.float32(0), magnitude)
            groups = [oracle_group(magnitude[g : g + 128]) for g in range(0, end - start, 128)]
            if all(good for _, _, good in groups):
                decoded = np.concatenate([d for _, d, _ in groups])
                arrived[row, start:end] = np.copysign(decoded, values).astype(x.dtype)
                codes[row, start:end] = np.concatenate([c for c, _, _ in groups]) + 512 * np.signbit(values)
    return arrived, codes


def assert_same_bits(got: jax.Array, want: np.ndarray) -> None:
    """Equal in shape, dtype and every bit, NaNs too."""
    got = np.asarray(got)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    differ = got.view(f"u{want.dtype.itemsize}") != want.view(f"u{want.dtype.itemsize}")
    assert not differ.any(), f"{differ.sum()} differ, first {got[differ][0]!r} for {want[differ][0]!r}"


@jax.jit
def codes_and_roundtrip(*arrays: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    return [(encode(x).codes, logfmt.logfmt10_roundtrip(x)) for x in arrays]


def check_against_oracle(*arrays: np.ndarray) -> None:
    """All arrays in one program, which compiles faster than one for each."""
    for x, (codes, arrived) in zip(arrays, codes_and_roundtrip(*arrays), strict=True):
        expected_arrived, expected_codes = oracle_roundtrip(x)
        assert_same_bits(codes, expected_codes)
        assert_same_bits(arrived, expected_arrived)


def defined_roundtrip(x: np.ndarray) -> np.ndarray:
    """The definition in f64, for rows all of whose groups are whole and can be encoded."""
    groups = x.astype(np.float64).reshape(x.shape[0], -1, 128)
    with np.errstate(divide="ignore"):
        log = np.log2(np.abs(groups))
    lmax = log.max(axis=-1, keepdims=True)
    lmin = np.maximum(log.min(axis=-1, keepdims=True), lmax - 32)
    step = (lmax - lmin) / 510
    rounding = 2 - np.log2((1 + 2**step) / 2) / step
    code = np.floor(np.maximum((log - lmin) / step + rounding, 0))
    return (np.where(code == 0, 0, 2 ** ((code - 1) * step + lmin)) * np.sign(groups)).reshape(x.shape)


# The same bits


@pytest.mark.parametrize("hidden", [1, 16, 32, 100, 128, 160, 512, 640, 1024, 2880, 7168])
def test_normal_rows_have_the_oracles_bits(hidden):
    rng = np.random.default_rng(hidden)
    arrays = []
    for dtype in DTYPES:
        rows = (rng.standard_normal((6, hidden)) * np.array([[0.01], [0.1], [0.2], [0.3], [1e-6], [10]])).astype(dtype)
        rows[1, rng.integers(0, hidden, 2)] = [0.0, -0.0]
        arrays.append(rows)
    check_against_oracle(*arrays)


@dtypes
def test_any_bits_have_the_oracles_bits(dtype):
    """All exponents and both signs, subnormals, infinities and NaNs; and the same below 1, where rows are encoded."""
    rng = np.random.default_rng(0)
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = rng.integers(0, 2 ** (8 * unsigned.itemsize), (16, 640), unsigned)
    check_against_oracle(bits.view(dtype))
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    below_one = bits % np.array(1, dtype).view(unsigned) | bits & sign
    assert np.asarray(encode(below_one.view(dtype)).encoded).all()
    check_against_oracle(below_one.view(dtype))


@dtypes
def test_narrow_and_wide_groups_have_the_oracles_bits(dtype):
    """From two neighbouring numbers to far more than 32 binades, powers of two at either end, the least normal number."""
    most = np.nextafter(np.array(1, dtype), np.array(0, dtype))
    rng = np.random.default_rng(1)
    rows = []
    for low in [most.astype(np.float64) * (1 - 2.0**-k) for k in (9, 5, 1)] + [
        2.0**-k for k in (2, 10, 14, 31, 32, 33, 126, 130)
    ]:
        row = np.exp2(rng.uniform(math.log2(low), 0, 128)).astype(dtype)
        row[:3] = most, low, -low
        rows.append(np.minimum(row, most))
    rows = np.stack(rows)
    check_against_oracle(rows)
    check_against_oracle((rows.astype(np.float32) * np.float32(2.0**-10)).astype(dtype))


@hypothesis.given(
    x=hnp.arrays(np.float32, st.sampled_from([(2, 5), (1, 130)]), elements=st.floats(-1, 1, width=32)),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_row_has_the_oracles_bits(x):
    check_against_oracle(x)


def test_tables_do_not_depend_on_the_platforms_logarithm():
    """No entry is so near a tie that another libm would round it otherwise; these are the numbers a kernel holds."""
    for exact in ([2**16 * math.log2(1 + i / 128) for i in range(129)], [2**23 * 2 ** (i / 128) for i in range(129)]):
        assert min(abs(e % 1 - 0.5) for e in exact) > 1e-4
    digest = hashlib.sha256(logfmt._LOG.astype("<i4").tobytes() + logfmt._EXP.astype("<i4").tobytes()).hexdigest()
    assert digest.startswith("98ca6e8062c8e44e")


# What the format promises


@dtypes
def test_error_is_that_of_the_definition_in_f64(dtype):
    x = (np.random.default_rng(2).standard_normal((64, 1024)) * 0.1).astype(dtype)
    exact, arrived = x.astype(np.float64), np.asarray(roundtrip(x)).astype(np.float64)
    defined = defined_roundtrip(x).astype(dtype).astype(np.float64)

    def rms(rows):
        return np.sqrt(np.mean((rows - exact) ** 2) / np.mean(exact**2))

    assert rms(arrived) < 0.0042
    assert abs(rms(arrived) / rms(defined) - 1) < 1e-3
    assert (arrived != defined).mean() < 0.01 or dtype == np.float32  # f32 shows the tables' last bits
    np.testing.assert_allclose(arrived, defined, rtol=0.03)  # at most one step apart, where a boundary is near


def test_rounding_is_unbiased_in_linear_space():
    """Values spread evenly from one code's value to another's keep their mean; rounding in log space would add 2.4e-4."""
    codes = np.arange(1, 512)
    values = 0.75 * 2.0 ** (-32 * (511 - codes) / 510)  # 32 binades, as of a group with a zero: steps of 4.4 %
    x = np.linspace(values[480], values[505], 128 * 4096).astype(np.float32).reshape(4096, 128)
    x[:, 0], x[:, 1] = 0.75, 0
    arrived = np.asarray(roundtrip(x)).astype(np.float64)
    assert abs(arrived.sum() / x.astype(np.float64).sum() - 1) < 2e-5


@dtypes
def test_extremes_of_a_group_arrive_exactly_in_sixteen_bits(dtype):
    x = (np.random.default_rng(4).standard_normal((64, 1024)) * 0.1).astype(dtype)
    groups, arrived = (np.abs(np.asarray(a).astype(np.float32)).reshape(-1, 128) for a in (x, roundtrip(x)))
    rtol = 2e-5 if dtype == np.float32 else 0
    np.testing.assert_allclose(arrived.max(axis=-1), groups.max(axis=-1), rtol=rtol)
    np.testing.assert_allclose(arrived.min(axis=-1), groups.min(axis=-1), rtol=rtol)


def test_codes_rise_with_the_value_and_every_code_is_used():
    x = np.linspace(1 / 512, 0.999, 128 * 512, dtype=np.float32).reshape(512, 128)
    x = np.sort(
        np.concatenate([x, np.full((512, 1), 1 / 512, np.float32), np.full((512, 1), 0.999, np.float32)], axis=1)[:, 2:]
    )
    x[:, 0], x[:, -1] = 1 / 512, 0.999
    codes = np.asarray(encode(x).codes).reshape(-1)
    assert set(codes) == set(range(1, 512))
    order = np.argsort(x.reshape(-1), kind="stable")
    assert (np.diff(codes[order].astype(int)) >= 0).all()


@pytest.mark.parametrize(("hidden", "piece"), [(1024, 1024), (2048, 1024), (1536, 512), (2880, 512), (640, 512)])
def test_one_group_that_cannot_be_encoded_keeps_its_piece_as_it_is(hidden, piece):
    x = (np.random.default_rng(5).standard_normal((4, hidden)) * 0.1).astype(BF16)
    pieces = -(-hidden // piece)
    last = (pieces - 1) * piece
    x[0, last] = 1.0  # amax is not below 1
    x[1, last : last + 128] = 0.25  # a single magnitude
    x[2, last : last + 128] = 0.0
    x[3, last] = np.nan
    encoded, arrived = np.asarray(encode(x).encoded), roundtrip(x)
    assert (encoded == [True] * (pieces - 1) + [False]).all()
    assert_same_bits(arrived[:, last:], x[:, last:])
    assert logfmt.piece_columns(hidden) == piece


def test_columns_of_another_group_change_nothing():
    x = (np.random.default_rng(6).standard_normal((4, 1024)) * 0.1).astype(np.float32)
    changed = x.copy()
    changed[:, 128:256] *= 1e-3
    before, after = np.asarray(roundtrip(x)), np.asarray(roundtrip(changed))
    assert_same_bits(np.delete(after, np.s_[128:256], axis=1), np.delete(before, np.s_[128:256], axis=1))


# Bytes


@hypothesis.given(
    codes=hnp.arrays(np.uint16, st.sampled_from([(3, n) for n in (1, 2, 3, 4, 5, 128)]), elements=st.integers(0, 1023))
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_packing_is_a_little_endian_stream_of_ten_bits(codes):
    n = codes.shape[-1]
    packed = np.asarray(pack(codes))
    stream = [sum(int(c) << (10 * i) for i, c in enumerate(row)).to_bytes(-(-10 * n // 8), "little") for row in codes]
    assert packed.tolist() == [list(row) for row in stream]
    np.testing.assert_array_equal(unpack(packed, n), codes)


def test_packed_bytes_are_those_of_codes_and_scales():
    for columns, dtype in ((1024, BF16), (512, np.float16), (320, np.float32), (1, BF16)):
        x = jnp.full((columns,), 0.5, dtype)
        encoding = encode(x)
        scales = encoding.amax.nbytes + encoding.amin.nbytes
        assert logfmt.packed_bytes(columns, dtype) == pack(encoding.codes).nbytes + scales
    assert logfmt.packed_bytes(1024, BF16) / (2 * 1024) < 0.65


# Transformations and errors


@dtypes
def test_derivative_is_the_identity(dtype):
    x, t = np.random.default_rng(7).standard_normal((2, 4, 160)).astype(dtype) / 8
    assert_same_bits(jax.jvp(jax.checkpoint(roundtrip), (x,), (t,))[1], np.asarray(t))
    assert_same_bits(jax.vjp(jax.checkpoint(roundtrip), x)[1](t)[0], np.asarray(t))
    hessian = jax.hessian(lambda x: jnp.sum(roundtrip(x) ** 2))(jnp.linspace(0.1, 0.9, 5))
    np.testing.assert_array_equal(hessian, 2 * np.eye(5))


def test_vmap_and_scan_see_rows():
    x = jax.random.normal(jax.random.key(0), (3, 4, 160), jnp.bfloat16) * 0.1
    want = np.asarray(roundtrip(x))
    assert_same_bits(jax.vmap(roundtrip)(x), want)
    assert_same_bits(jax.lax.scan(lambda c, row: (c, logfmt.logfmt10_roundtrip(row)), 0, x)[1], want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_on_eight_devices(check_vma):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (16, 640), jnp.bfloat16) * 0.1
    sharded = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
    )
    assert_same_bits(jax.jit(sharded(logfmt.logfmt10_roundtrip))(x), np.asarray(roundtrip(x)))
    grad = jax.jit(sharded(lambda x: jax.grad(lambda x: jnp.sum(logfmt.logfmt10_roundtrip(x).astype(jnp.float32)))(x)))(
        x
    )
    assert (np.asarray(grad, np.float32) == 1).all()


def test_no_rows_is_no_rows():
    assert roundtrip(jnp.zeros((0, 7, 160), jnp.float16)).shape == (0, 7, 160)


def test_encode_names_what_is_wrong():
    with pytest.raises(TypeError, match=r"logfmt10: x must be bf16, f16 or f32\[..., hidden\], got i?s?32\[2,4\]\."):
        logfmt.logfmt10_encode(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"logfmt10: x must be \[..., hidden\] with hidden >= 1, got shape \(3, 0\)\."):
        logfmt.logfmt10_encode(jnp.ones((3, 0)))
