"""Builds the benchmarks' CUDA programs with nvcc and talks to them. kernels.py and tune.py use it; no JAX is needed.

nvcc is what $CUDACXX names, then the CUDA wheels' of this Python, then PATH's, then /usr/local/cuda's: as in cmake/PipCuda.cmake.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks import ROOT

BUILD = ROOT / "build" / "benchmarks"
FLAGS = ("-O3", "-std=c++17", "-t0", "-gencode", "arch=compute_90a,code=sm_90a", "-cudart", "static")
INCLUDES = (ROOT / "ffi", ROOT / "tests" / "gpu" / "kernels")


def find_nvcc() -> Path:
    """The compiler; FileNotFoundError where there is none."""
    wheel = [Path(path) / "nvidia" / "cu13" / "bin" / "nvcc" for path in sys.path]
    named = [os.environ.get("CUDACXX"), *wheel, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for path in filter(None, named):
        if Path(path).is_file():
            return Path(path)
    raise FileNotFoundError(
        "benchmarks: no nvcc in $CUDACXX, the CUDA wheels, PATH or /usr/local/cuda. Name one: CUDACXX=..."
    )


def kernel_sources() -> list[Path]:
    """The library's files that stand without XLA, Python and a network: kernels, launchers, groups of one node.

    internode/transport.cuh declares what only NVSHMEM, or a stand-in for it, defines.
    """
    others = re.compile("xla/|nanobind|nvshmem|internode/transport")
    files = sorted([*ROOT.glob("ffi/*/*.cu"), *ROOT.glob("ffi/*/*.cc")])
    return [path for path in files if not any(others.match(name) for name in included(path))]


def included(path: Path) -> set[str]:
    """Names of all headers that a file includes, also through headers of ours."""
    names: set[str] = set()
    files = [path]
    while files:
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', files.pop().read_text(), re.MULTILINE):
            if name not in names:
                names.add(name)
                files += [folder / name for folder in INCLUDES if (folder / name).is_file()]
    return names


def build(program: Path, sources: Sequence[Path] = ()) -> Path:
    """The program's binary, compiled anew where a source, a header or the compiler is another."""
    nvcc = find_nvcc()
    texts = [path for folder in INCLUDES for path in sorted(folder.rglob("*")) if path.is_file()]
    digest = hashlib.sha256(str((nvcc, FLAGS)).encode())
    for path in (program, *sources, *texts):
        digest.update(path.read_bytes())
    binary = BUILD / f"{program.stem}-{digest.hexdigest()[:12]}"
    if not binary.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        making = binary.with_suffix(f".{os.getpid()}")
        command = [nvcc, *FLAGS, *(f"-I{folder}" for folder in INCLUDES), "-o", making, program, *sources]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"benchmarks: {program.name} does not compile:\n{done.stdout}{done.stderr}")
        making.rename(binary)
    return binary


def count_gpus() -> int:
    """How many GPUs a process finds; JAX's backend is not started for that. RuntimeError without a driver."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"benchmarks: no GPU driver: {error}") from error
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        raise RuntimeError("benchmarks: the GPU driver does not start")
    return count.value


@functools.cache
def push_ceiling(gpus: int, sms: tuple[int, ...], row_bytes: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """GB/s leaving each of so many GPUs, by (multiprocessors, bytes of a row): p2p_ceiling.cu, run now."""
    rows = ",".join(map(str, row_bytes))
    command = [str(build(ROOT / "benchmarks" / "p2p_ceiling.cu")), f"gpus={gpus}", f"rows={rows}", *map(str, sms)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(int(sms), int(row)): float(gigabytes) for sms, row, gigabytes in lines}


class Failure(Exception):
    """What a program says of a case that it could not run; also that it died or did not answer."""


class Program:
    """A program that answers each line with a line of JSON. One that dies or falls silent is started again for the next."""

    def __init__(self, command: Sequence[str], start_timeout: float = 120.0) -> None:
        """Starts it; `hello` is its first line."""
        self._command = list(command)
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[str] | None = None
        self.hello = self._start()

    def ask(self, line: str, timeout: float) -> dict[str, Any]:
        """Its answer; Failure where it has none within `timeout` seconds."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: _answer says what it said
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._answer(timeout)
        if "failed" in answer:
            raise Failure(answer["failed"])
        return answer

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> dict[str, Any]:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._answer(self._start_timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        said: list[str] = []
        for line in self._until(time.monotonic() + timeout, said):
            if line.startswith("{"):
                return dict(json.loads(line))
            said.append(line.strip())
        raise Failure("; ".join(said))

    def _until(self, deadline: float, said: list[str]) -> Iterator[str]:
        """Lines until the deadline or its end; then it is no more, and `said` ends with why."""
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                said.append("no answer in time")
                break
            if line is None:
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
                said.append(f"ended with status {self._process.poll()}")
                break
            yield line
        self.close()


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
