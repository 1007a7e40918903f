"""The installed package: its wheel, its import where there is no GPU, and what the import says where something is wrong."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jax_ep import _core
from jax_ep._src import targets

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())


def run_python(code, **environment):
    """Standard output of a fresh Python with the installed jax_ep, started where no source tree shadows it."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_wheel_serves_every_python_from_3_12_on():
    wheel = importlib.metadata.distribution("jax-ep").read_text("WHEEL")
    assert "Tag: cp312-abi3-linux_" in wheel
    assert "Root-Is-Purelib: false" in wheel
    assert _core.__file__.endswith("_core.abi3.so")


def test_the_headers_are_those_of_the_oldest_jax_supported():
    """Handlers built with newer ones would take an older jaxlib's backend down."""
    oldest = next(r.removeprefix("jax>=") for r in PYPROJECT["project"]["dependencies"] if r.startswith("jax>="))
    assert f"jaxlib=={oldest}" in PYPROJECT["build-system"]["requires"]
    assert tuple(_core.ffi_api) == (0, 4)


def test_import_touches_no_backend_and_no_driver():
    """What jax itself loads where its CUDA plugin is installed is not ours."""
    loaded = run_python(
        "import jax\n"
        "from jax._src import xla_bridge\n"
        "def libraries():\n"
        "    return {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "before = libraries()\n"
        "import jax_ep\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "print(*libraries() - before)",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "_core.abi3.so" in loaded
    for library in ("libcuda.so", "libcudart.so", "libnvshmem", "libtorch", "libcupy"):
        assert library not in loaded, library


def test_every_target_that_is_named_is_in_the_module():
    named = {value for name, value in vars(targets).items() if name.isupper() and isinstance(value, str)}
    assert targets.DISPATCH_LAYOUT in named
    assert named <= set(_core.handlers())


def test_this_jaxlib_accepts_the_handlers():
    """XLA asks a handler for its FFI version when a backend takes it up: let the CPU backend do so, there may be no GPU."""
    run_python(
        "import jax\n"
        "from jax_ep import _core\n"
        "for target, handler in _core.handlers().items():\n"
        "    jax.ffi.register_ffi_target(f'{target}_on_cpu', handler, platform='cpu')\n"
        "assert jax.devices('cpu')",
    )


def headers(directory, major, minor):
    header = directory / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#pragma once\n#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n")
    return directory


@pytest.mark.parametrize("installed", [(0, 4), (0, 5), (0, 40)])
def test_a_jaxlib_of_the_same_or_a_newer_ffi_is_accepted(tmp_path, installed):
    targets.check_ffi_api((0, 4), targets.installed_ffi_api(headers(tmp_path, *installed)))


@pytest.mark.parametrize("installed", [(0, 3), (1, 0), (1, 5)])
def test_a_jaxlib_of_another_ffi_is_refused_with_the_way_out(tmp_path, installed):
    with pytest.raises(
        ImportError, match=r"jaxlib must have XLA FFI 0\.4 .* got \d\.\d in jaxlib .*pip install -U jax jaxlib"
    ):
        targets.check_ffi_api((0, 4), targets.installed_ffi_api(headers(tmp_path, *installed)))


def test_a_tree_that_was_not_built_says_what_to_run(tmp_path):
    """Python started in the source tree finds the sources before the installed package."""
    code = (
        "import sys\n"
        "sys.modules['jax_ep._core'] = None\n"
        "try:\n"
        "    import jax_ep\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "Build it with pip install ." in run_python(code)
