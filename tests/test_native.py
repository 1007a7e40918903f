"""The sources of the kernels' benchmark stand alone: what nvcc's link says after a minute and a half, from their text."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def native():
    sys.path.append(str(ROOT))  # last, so that jax_ep is the installed one
    yield importlib.import_module("benchmarks.native")
    sys.path.remove(str(ROOT))


def texts_of(native, files):
    """Of the files and of all headers of ours that they include, without comments."""
    names = set().union(*map(native.included, files))
    headers = {folder / name for folder in native.INCLUDES for name in names if (folder / name).is_file()}
    return [re.sub(r"//.*", "", path.read_text()) for path in {*files, *headers}]


def undefined(texts):
    """Device functions that are declared and nowhere defined."""
    declared = {name for text in texts for name in re.findall(r"__device__[^;{}()]*?(\w+)\([^;{}]*\);", text)}
    return {name for name in declared if not any(re.search(rf"\b{name}\([^;{{}}]*\)\s*{{", text) for text in texts)}


def test_every_device_function_of_the_kernels_benchmark_is_defined(native):
    """ptxas fatal: Unresolved extern function 'SignalOverNetwork'. What needs the network is not among the sources."""
    sources = native.kernel_sources()
    assert undefined(texts_of(native, [ROOT / "benchmarks" / "kernels.cu", *sources])) == set()
    names = {path.relative_to(ROOT).as_posix() for path in sources}
    everything = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("ffi/*/*.cu")]
    assert set(everything) - names == {path for path in everything if path.startswith("ffi/internode/")}


def test_what_only_a_network_defines_is_seen(native):
    over_nodes = ROOT / "ffi" / "internode" / "internode_barrier.cu"
    assert "SignalOverNetwork" in undefined(texts_of(native, [over_nodes]))
