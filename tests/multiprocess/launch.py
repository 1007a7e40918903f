"""Starts one worker function in several JAX processes on virtual CPU devices, and brings back what each returned.

`run("exchange_worker:core")` from a test; as a script this file is one of the processes. A process that fails, or
a deadline that passes, ends all of them: the error shows the end of every log.
"""

import contextlib
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TAIL = 6000  # characters of a log that an error shows


def run(worker: str, *, num_processes: int = 2, devices_per_process: int = 4, timeout: float = 120) -> list[Any]:
    """Runs `worker`, "module:function" of this folder, in each process; returns each one's result, which must fit JSON."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices_per_process}".lstrip(),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parent)])),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as logs:
        results = [Path(folder) / f"result{i}.json" for i in range(num_processes)]
        log_paths = [Path(folder) / f"log{i}.txt" for i in range(num_processes)]
        job = {"worker": worker, "coordinator": f"localhost:{_free_port()}", "num_processes": num_processes}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps({**job, "process": i, "result": str(results[i])})],
                env=environment,
                stdout=logs.enter_context(log_paths[i].open("w")),
                stderr=subprocess.STDOUT,
            )
            for i in range(num_processes)
        ]
        failure = _wait(processes, timeout)
        if failure:
            tails = (f"--- process {i}\n{path.read_text()[-TAIL:]}" for i, path in enumerate(log_paths))
            raise AssertionError("\n".join([f"{worker}: {failure}", *tails]))
        return [json.loads(path.read_text()) for path in results]


def _wait(processes: list[subprocess.Popen], timeout: float) -> str | None:
    """Until all have ended; what went wrong, if something did. None of them is left running."""
    deadline = time.monotonic() + timeout
    try:
        while True:
            codes = [process.poll() for process in processes]
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
    jax.distributed.shutdown()  # waits for the others, so that none loses its coordinator


if __name__ == "__main__":
    main()
