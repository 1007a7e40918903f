"""Starts one worker function in several JAX processes, on virtual CPU devices or GPUs, and brings back what each returned.

`run("exchange_worker:core")` from a test; as a script this file is one of the processes. A process that fails, or
a deadline that passes, ends all of them: the error shows the end of every log.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TAIL = 6000  # characters of a log that an error shows


def run(
    worker: str,
    *,
    num_processes: int = 2,
    devices_per_process: int = 4,
    gpus: Sequence[str] | None = None,
    environments: Sequence[dict[str, str]] | None = None,
    dies: int | None = None,
    timeout: float = 120,
) -> list[Any]:
    """Runs `worker`, "module:function" of this folder, in each process; returns each one's result, which must fit JSON.

    `gpus` has each process's CUDA_VISIBLE_DEVICES, `environments` further variables; the process `dies` is expected to be
    killed, and has no result.
    """
    num_processes = num_processes if gpus is None else len(gpus)
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices_per_process}".lstrip(),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parent)])),
    }
    if gpus is not None:
        for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"):
            environment.pop(name, None)
        environment |= {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": ".05"}
    own = [dict(variables) for variables in environments or [{}] * num_processes]
    for variables, visible in zip(own, gpus or [], strict=gpus is not None):
        variables["CUDA_VISIBLE_DEVICES"] = visible
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as logs:
        results = [Path(folder) / f"result{i}.json" for i in range(num_processes)]
        log_paths = [Path(folder) / f"log{i}.txt" for i in range(num_processes)]
        job = {
            "worker": worker,
            "coordinator": f"localhost:{_free_port()}",
            "num_processes": num_processes,
            "dies": dies,
        }
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps({**job, "process": i, "result": str(results[i])})],
                env=environment | own[i],
                stdout=logs.enter_context(log_paths[i].open("w")),
                stderr=subprocess.STDOUT,
            )
            for i in range(num_processes)
        ]
        failure = _wait(processes, timeout, dies)
        if failure:
            tails = (f"--- process {i}\n{path.read_text()[-TAIL:]}" for i, path in enumerate(log_paths))
            raise AssertionError("\n".join([f"{worker}: {failure}", *tails]))
        return [json.loads(path.read_text()) if i != dies else None for i, path in enumerate(results)]


def _wait(processes: list[subprocess.Popen], timeout: float, dies: int | None) -> str | None:
    """Until all have ended; what went wrong, if something did. None of them is left running."""
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


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def main() -> None:
    """One of the processes."""
    job = json.loads(sys.argv[1])
    import jax

    jax.distributed.initialize(job["coordinator"], job["num_processes"], job["process"])
    module, function = job["worker"].split(":")
    try:
        result = getattr(importlib.import_module(module), function)()
        Path(job["result"]).write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait for the other processes, which may be waiting for this one
    if job["dies"] is not None:
        os._exit(0)  # there is one for whom shutdown would wait
    jax.distributed.shutdown()  # waits for the others, so that none loses its coordinator


if __name__ == "__main__":
    main()
