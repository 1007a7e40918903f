"""ffi/group/group.cc without a GPU: host/group.cc brings a CUDA runtime of its own. Needs g++ and CUDA's headers."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def cuda_include():
    """Of a toolkit, or of the wheels that the build uses."""
    compilers = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates = [Path(nvcc).resolve().parent.parent / "include" for nvcc in compilers if nvcc]
    if wheels := importlib.util.find_spec("nvidia"):
        candidates += [path / "include" for root in wheels.submodule_search_locations for path in Path(root).iterdir()]
    return next((path for path in candidates if (path / "cuda_runtime_api.h").exists()), None)


def test_what_handlers_are_told_within_a_process_and_over_several(tmp_path):
    include, compiler = cuda_include(), shutil.which(os.environ.get("CXX", "g++"))
    if include is None or compiler is None:
        pytest.skip("needs a C++ compiler and CUDA's headers (cuda_runtime_api.h)")
    sources = [ROOT / "tests/host/group.cc", ROOT / "ffi/group/group.cc"]
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Werror",
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
        f"-I{ROOT / 'ffi'}",
        f"-isystem{include}",
    ]
    built = subprocess.run(
        [*command, "-o", tmp_path / "group", *sources, "-lpthread"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "group"], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "GROUP OK\n" and ran.returncode == 0, ran.stdout + ran.stderr
