"""The kernels' wire formats (ffi/device/quantize.cuh, logfmt.cuh) give the reference's bits, compiled for the host and on a GPU."""

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from jax_ep._src import logfmt, quantized

# The reference's bits, as users compile it, are held to the oracle's by test_quantized.py and test_logfmt.py.
pytestmark = pytest.mark.usefixtures("compiles_fast")

REPOSITORY = Path(__file__).parents[1]
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
FORMATS = ("fp8", "fp8_ue8m0", "mxfp8", "logfmt10")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
formats = pytest.mark.parametrize("format", FORMATS)
places = pytest.mark.parametrize("place", ["host", pytest.param("device", marks=pytest.mark.gpu)])


@functools.partial(jax.jit, static_argnums=0)
def references(format, *arrays):
    """The reference's answers for each array, all in one program, which compiles faster than one for each."""
    if format == "logfmt10":
        encodings = [(logfmt.logfmt10_roundtrip(x), logfmt.logfmt10_encode(x)) for x in arrays]
        return [(arrived, encoding.codes, encoding.encoded) for arrived, encoding in encodings]
    return [quantized.encode(x, format) for x in arrays]


def find_nvcc():
    """nvcc and where its libraries are: $CUDACXX, PATH, then the CUDA wheels."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        return [nvcc]
    spec = importlib.util.find_spec("nvidia")
    for path in spec.submodule_search_locations if spec else []:
        root = Path(path) / "cu13"
        if (root / "bin/nvcc").is_file() and (root / "include/cuda_runtime.h").is_file():
            return [str(root / "bin/nvcc"), f"-L{root}/lib"]
    return None


@pytest.fixture(scope="module")
def nvcc():
    return find_nvcc() or pytest.skip("needs nvcc: $CUDACXX, PATH or the CUDA wheels")


@pytest.fixture(scope="module")
def program(tmp_path_factory, nvcc):
    out = tmp_path_factory.mktemp("formats") / "formats"
    compile_program(nvcc, out, "-gencode", "arch=compute_90a,code=sm_90a")
    return out


def compile_program(nvcc, out, *flags):
    source = REPOSITORY / "tests/gpu/kernels/formats.cu"
    command = [*nvcc, "-O2", "-std=c++17", f"-I{REPOSITORY}/ffi", *flags, "-o", out, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_kernels_do_not_depend_on_the_c_library(tmp_path, nvcc):
    """Ubuntu's compilers define _FORTIFY_SOURCE: then memcpy is a wrapper, which on GPUs once made a wait endless."""
    outs = [tmp_path / f"{level}.ptx" for level in (0, 3)]
    for level, out in zip((0, 3), outs, strict=True):
        fortified = ["-U_FORTIFY_SOURCE", f"-D_FORTIFY_SOURCE={level}"]
        compile_program(nvcc, out, *fortified, "-arch=compute_90a", "-ptx")
    plain, fortified = (out.read_text() for out in outs)
    assert plain == fortified


def check(program, place, tmp_path, format, *arrays):
    """Writes the reference's answers for each x[rows, hidden], all of one dtype, and has the program compare."""
    parts = []
    arrays = [np.ascontiguousarray(x) for x in arrays]
    for x, answers in zip(arrays, references(format, *arrays), strict=True):
        header = (FORMATS.index(format), [np.dtype(d) for d in DTYPES].index(x.dtype), *x.shape)
        parts += [np.array(header, np.int32), x, *map(np.asarray, answers)]
    path = tmp_path / "answers"
    path.write_bytes(b"".join(part.tobytes() for part in parts))
    result = subprocess.run([program, place, path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(arrays)} cases on the {place}" in result.stdout


def widths(dtype):
    """Rows of whole 16 bytes: less than a group, whole and broken groups, steps and pieces."""
    return (16 // np.dtype(dtype).itemsize, 32, 40, 128, 160, 512, 1000, 1024, 1536, 2880, 7168)


def bits(rng, shape, dtype):
    """Any bits whose NaN is positive where a conversion to f32 may drop its sign."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    x = rng.integers(0, 2 ** (8 * unsigned.itemsize), shape, unsigned).view(dtype)
    return np.where(np.isnan(x.astype(np.float32)), np.abs(x), x) if dtype == np.float16 else x


def below_one(x):
    """The same fractions and signs with exponents below 1, where logfmt10 encodes."""
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    return (x.view(unsigned) % np.array(1, x.dtype).view(unsigned) | x.view(unsigned) & sign).view(x.dtype)


@places
@formats
@dtypes
def test_rows_of_every_width_have_the_references_bits(program, place, tmp_path, format, dtype):
    rng = np.random.default_rng(0)
    arrays = []
    for hidden in widths(dtype):
        x = rng.standard_normal((8, hidden)) * np.exp2(rng.integers(-12, 3, (8, 1)))
        x[1, rng.integers(0, hidden, 2)] = 0.0, -0.0
        x[2, hidden // 2 :] = 0.0
        x[3, -1] = np.nan
        x[4, 0] = -np.inf
        arrays.append(np.concatenate([x, rng.standard_normal((4, hidden)) * 0.1]).astype(dtype))
    check(program, place, tmp_path, format, *arrays)


@places
@formats
@dtypes
def test_any_bits_have_the_references_bits(program, place, tmp_path, format, dtype):
    rng = np.random.default_rng(1)
    x = bits(rng, (256, 640), dtype)
    finite = np.where(np.isfinite(x.astype(np.float32)), x, np.array(1, dtype))
    check(program, place, tmp_path, format, x, finite, below_one(x), below_one(bits(rng, (32, 4096), dtype)))


@places
@pytest.mark.parametrize("format", FORMATS[:3])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_number_of_sixteen_bits_under_many_scales(program, place, tmp_path, format, dtype):
    """Each group holds its amax and, of all numbers, some that are no larger."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    magnitudes = np.sort(np.abs(numbers[np.isfinite(numbers.astype(np.float32))]).view(np.uint16))
    rng = np.random.default_rng(2)
    arrays = []
    for amax in [
        *rng.choice(magnitudes, 12),
        1,
        0x80,
        magnitudes[-1],
        *np.array([448, 1, 1.75], dtype).view(np.uint16),
    ]:
        some = numbers[(numbers.view(np.uint16) & 0x7FFF) <= amax]
        some = np.concatenate([some, np.zeros(-len(some) % (31 * 32), dtype)]).reshape(-1, 31)
        x = np.concatenate([np.full((len(some), 1), amax, np.uint16).view(dtype), some], axis=1)
        arrays.append(x.reshape(-1, 1024))
    check(program, place, tmp_path, format, np.concatenate(arrays))


@places
@pytest.mark.parametrize("format", FORMATS[:3])
def test_every_rounding_boundary_under_every_binade_of_amax(program, place, tmp_path, format):
    """e4m3 values, the midpoints between them and their neighbours, times scales of every exponent; amax at the edges."""
    points = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (points[1:] + points[:-1]) / 2
    near = np.concatenate([points, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(np.inf))])
    near = np.concatenate([near, np.zeros(-len(near) % 31, np.float32)]).reshape(-1, 31)
    exponents = np.arange(-140, 120)
    with np.errstate(under="ignore"):
        rows = np.concatenate([np.full((len(near), 1), 448, np.float32), near], axis=1).reshape(1, -1)
        rows = np.ldexp(rows, exponents[:, None]).astype(np.float32)
        edges = np.exp2(np.arange(-126, 128)).astype(np.float32)
        edges = np.concatenate([edges, np.minimum(edges, 2.0**126) * np.float32(1.75)])
        edges = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, np.float32(np.inf))])
        fractions = np.resize(
            np.array([1, -1, 0.5, 1 / 448, -1 / 3, 2.0**-10, -(2.0**-16), 3e-7, 0, -0.0], np.float32), 32
        )
        groups = edges[:, None] * fractions
    check(program, place, tmp_path, format, rows, -rows, groups)


@places
@dtypes
def test_narrow_and_wide_groups_of_logfmt10(program, place, tmp_path, dtype):
    """From two neighbouring numbers to far more than 32 binades, zeros beside the least normal numbers."""
    most = np.nextafter(np.array(1, dtype), np.array(0, dtype))
    rng = np.random.default_rng(3)
    rows = []
    for low in [1 - 2.0**-k for k in (23, 20, 15, 11, 9, 5, 1)] + [
        2.0**-k for k in (2, 10, 14, 31, 32, 33, 100, 126, 130)
    ]:
        for high in (1.0, 2.0**-8, 2.0**-100, 2.0**-125):
            row = np.exp2(rng.uniform(np.log2(low), 0, 1024)) * high
            row[::128], row[1::128] = most.astype(np.float64) * high, -low * high
            row[512 + 7 :: 128] = 0.0
            rows.append(np.minimum(row.astype(dtype), most))
    x = np.stack(rows)
    check(program, place, tmp_path, "logfmt10", x, x[:, :512], x[:, :160])


def test_no_range_of_logfmt10_rounds_a_code_or_a_value_wrongly(program):
    result = subprocess.run([program, "ranges"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@hypothesis.given(
    x=hnp.arrays(
        np.float32, st.sampled_from([(3, 40), (2, 132)]), elements=st.floats(width=32) | st.floats(-1, 1, width=32)
    ),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
)
@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_row_has_the_references_bits(program, tmp_path, x, format, dtype):
    x = np.where(np.isnan(x), np.float32(np.nan), x)
    with np.errstate(over="ignore", under="ignore"):
        x = x.astype(dtype)
    columns = x.shape[1] // (16 // x.dtype.itemsize) * (16 // x.dtype.itemsize)
    check(program, "host", tmp_path, format, x[:, :columns])
