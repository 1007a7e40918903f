"""Starts one worker function in several JAX processes, on virtual CPU devices or GPUs, and brings back what each returned.

`run("exchange_worker:core")` from a test; as a script this file is one of the processes. A process that fails, or
a deadline that passes, ends all of them: the error shows the end of every log.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes

HERE = Path(__file__).resolve().parent
CHOSEN_GPUS = "JAX_EP_TEST_CHOSEN_GPUS"  # in a process's environment: of the visible GPUs those that JAX takes, as local_device_ids


def run(
    worker: str,
    *,
    num_processes: int = 2,
    devices_per_process: int = 4,
    gpus: Sequence[str] | None = None,
    environments: Sequence[dict[str, str]] | None = None,
    arguments: dict[str, Any] | None = None,
    dies: int | None = None,
    timeout: float = 120,
) -> list[Any]:
    """Runs `worker`, "module:function" of this folder, in each process; returns each one's result. Results and `arguments` must fit JSON.

    `gpus` has each process's CUDA_VISIBLE_DEVICES, `environments` further variables; the process `dies` is expected to be
    killed, and has no result.
    """
    num_processes = num_processes if gpus is None else len(gpus)
    environment = {
        **os.environ,
        **processes.on_cpu(devices_per_process),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parent)])),
    }
    if gpus is not None:
        for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"):
            environment.pop(name, None)
        environment |= {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "XLA_PYTHON_CLIENT_MEM_FRACTION": ".05"}
    own = [dict(variables) for variables in environments or [{}] * num_processes]
    for variables, visible in zip(own, gpus or [], strict=gpus is not None):
        variables["CUDA_VISIBLE_DEVICES"] = visible
    for tries_left in (2, 1, 0):
        returned, failure = _run_once(worker, own, environment, arguments or {}, dies, timeout)
        if failure is None:
            return returned
        # Another test's process may take the port before the coordinator does.
        if not tries_left or "address already in use" not in failure.lower():
            raise AssertionError(f"{worker}: {failure}")
    raise AssertionError("unreachable")


def _run_once(
    worker: str,
    own: Sequence[dict[str, str]],
    environment: dict[str, str],
    arguments: dict[str, Any],
    dies: int | None,
    timeout: float,
) -> tuple[list[Any], str | None]:
    """The results, or what failed."""
    num_processes = len(own)
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"result{i}.json" for i in range(num_processes)]
        job = {
            "worker": worker,
            "arguments": arguments,
            "coordinator": f"localhost:{processes.free_port()}",
            "num_processes": num_processes,
            "dies": dies,
        }
        commands = [
            [sys.executable, __file__, json.dumps({**job, "process": i, "result": str(results[i])})]
            for i in range(num_processes)
        ]
        failure = processes.run(commands, [environment | variables for variables in own], timeout=timeout, dies=dies)
        if failure:
            return [], failure
        return [json.loads(path.read_text()) if i != dies else None for i, path in enumerate(results)], None


def main() -> None:
    """One of the processes."""
    job = json.loads(sys.argv[1])
    import jax

    chosen = os.environ.get(CHOSEN_GPUS)
    jax.distributed.initialize(
        job["coordinator"],
        job["num_processes"],
        job["process"],
        local_device_ids=[int(i) for i in chosen.split(",")] if chosen else None,
    )
    module, function = job["worker"].split(":")
    try:
        result = getattr(importlib.import_module(module), function)(**job["arguments"])
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
