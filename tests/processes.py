"""The processes of one job on this machine, started and ended together: for tests/multiprocess/launch.py and benchmarks/exchange.py.

Whatever happens, none of them is left running: one that fails, or a deadline that passes, ends all.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL = 6000  # characters of a log that an error shows


def free_port() -> int:
    """A port on which a coordinator may listen."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def on_cpu(devices_per_process: int) -> dict[str, str]:
    """The variables of a process with so many virtual CPU devices."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    count = f"--xla_force_host_platform_device_count={devices_per_process}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {count}".lstrip()}


def run(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    timeout: float,
    dies: int | None = None,
    first_is_heard: bool = False,
    cwd: Path | None = None,
) -> str | None:
    """Runs the commands side by side, each in its environment, until all have ended; None, or what went wrong and the end of each log.

    The process `dies` is expected to be killed. With `first_is_heard` the first process writes where this one does.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as logs:
        paths = [Path(folder) / f"log{i}.txt" for i in range(len(commands))]
        processes = [
            subprocess.Popen(
                command,
                env=dict(environment),
                cwd=cwd,
                stdout=None if first_is_heard and i == 0 else logs.enter_context(path.open("w")),
                stderr=None if first_is_heard and i == 0 else subprocess.STDOUT,
            )
            for i, (command, environment, path) in enumerate(zip(commands, environments, paths, strict=True))
        ]
        failure = _wait(processes, timeout, dies)
        tails = [f"--- process {i}\n{path.read_text()[-TAIL:]}" for i, path in enumerate(paths) if path.exists()]
    return "\n".join([failure, *tails]) if failure else None


def _wait(processes: list[subprocess.Popen], timeout: float, dies: int | None) -> str | None:
    deadline = time.monotonic() + timeout
    try:
        while True:
            codes = [process.poll() for process in processes]
            if dies is not None and codes[dies] == -signal.SIGKILL:
                codes[dies] = 0
            failed = [f"process {i} exited with {code}" for i, code in enumerate(codes) if code]
            if failed:
                time.sleep(1)  # let the others say why they think so
                return ", ".join(failed)
            if all(code == 0 for code in codes):
                return None
            if time.monotonic() > deadline:
                running = ", ".join(str(i) for i, code in enumerate(codes) if code is None)
                return f"process {running} still ran after {timeout:g} s"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
