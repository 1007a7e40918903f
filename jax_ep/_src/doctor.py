"""python -m jax_ep doctor: devices, links, versions and one small exchange, of this process or of all in the job.

Every process of a job runs it, as srun would start a training (docs/multinode.md); process 0 prints. The exit code is 0
where all is well, 1 where something is to be mended, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ep._src import bootstrap, compat, coordination, internode, peers, targets
from jax_ep._src.combine import combine
from jax_ep._src.config import config
from jax_ep._src.dispatch import dispatch

Report = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="says what there is, and whether an exchange works")
    doctor.add_argument("--json", action="store_true", help="for programs: JSON, the last line of the output")
    doctor.add_argument("--timeout", type=float, default=config.timeout, help="seconds to wait for a process or rank")
    args = parser.parse_args(argv)
    config.timeout = args.timeout

    start_process()
    me, reports = examine_all()
    problems = [f"process {report['process']}: {problem}" for report in reports for problem in report["problems"]]
    if me == 0 or len(reports) == 1:
        if args.json:
            print(json.dumps({"healthy": not problems, "problems": problems, "processes": reports}), flush=True)
        else:
            show(reports, problems)
    return 1 if problems else 0


def start_process() -> None:
    """Joins the job that the environment tells of: JAX's own variables, or SLURM's. A process alone does nothing.

    Where processes do not even connect, JAX ends this one itself: so what it waits for is said before.
    """
    if compat.distributed_client() is not None:
        return
    job: dict[str, Any] = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        job = {"num_processes": int(os.environ["JAX_NUM_PROCESSES"]), "process_id": int(os.environ["JAX_PROCESS_ID"])}
        who = f"process {job['process_id']} of {job['num_processes']}"
    elif "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        who = f"task {os.environ['SLURM_PROCID']} of {os.environ['SLURM_NTASKS']} on {os.environ.get('SLURM_NODELIST')}"
    else:
        return
    print(
        f"doctor: {who}, on {socket.gethostname()}, waits {config.timeout:g} s for the others",
        file=sys.stderr,
        flush=True,
    )
    jax.distributed.initialize(initialization_timeout=math.ceil(config.timeout), **job)


def examine_all() -> tuple[int, list[Report]]:
    """Which process this is, and the reports of all; this one's alone where the processes did not find each other."""
    client = compat.distributed_client()
    me, num_processes = compat.distributed_process() if client is not None else (0, 1)
    met = None
    try:
        bootstrap.initialize()
    except RuntimeError as error:
        met = str(error)
    report = examine(me, met)
    if client is None or num_processes == 1 or met:
        return me, [report]
    try:
        return me, coordination.gather(client, "doctor", report, me, num_processes)
    except RuntimeError as error:
        report["problems"].append(str(error))
        return me, [report]


def examine(process: int, met: str | None) -> Report:
    """What this process has. `met` is why it did not find the others, if it did not."""
    report: Report = {"process": process, "host": socket.gethostname(), "pid": os.getpid(), "problems": []}
    report["versions"] = versions()
    report["config"] = {name: getattr(config, name) for name in ("timeout", "max_groups", "arena_bytes")}
    if met:
        report["problems"].append(met)
        return report
    here = jax.local_devices()
    report["devices"] = [describe(device) for device in here]
    gpus = [device for device in here if device.platform == "gpu"]
    report["peer_access"] = [[a is b or bool(reach(a, b)) for b in gpus] for a in gpus]
    report["links"] = links() if gpus else {}
    report["across_nodes"] = internode.describe()
    if gpus and not all(map(all, report["peer_access"])):
        report["problems"].append(
            "the GPUs do not reach each other's memory: XLA's collectives serve instead of the kernels"
        )
    report["exchange"] = exchange()
    if report["exchange"]["error"]:
        report["problems"].append(f"the exchange failed: {report['exchange']['error']}")
    elif not report["exchange"]["right"]:
        report["problems"].append("the exchange gave wrong results")
    elif gpus and report["exchange"]["why_not"] and len({device.process_index for device in jax.devices()}) > 1:
        nodes = internode.world()
        if nodes is None or not nodes.collectives:
            report["problems"].append(
                f"XLA's collectives serve instead of the kernels: {report['exchange']['why_not']}"
            )
    return report


# ---- what there is ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of all that must fit together; what is not there is absent."""

    def dotted(version: tuple[int, ...]) -> str:
        return ".".join(map(str, version))

    found = {"python": platform.python_version()}
    for name in (
        "jax-ep",
        "jax",
        "jaxlib",
        "jax-cuda13-plugin",
        "nvidia-nccl-cu13",
        "nvshmem4py-cu13",
        "nvidia-nvshmem-cu13",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["XLA FFI"] = (
        f"{dotted(targets.built_ffi_api)} (built), {dotted(targets.installed_ffi_api(jax.ffi.include_dir()))} (jaxlib)"
    )
    found["CUDA"] = f"{dotted(targets.cuda_version)} (built)"
    if driver := driver_version():
        found["CUDA"] += f", {dotted(driver)} (driver)"
    return found


@functools.cache
def _driver() -> Any:
    """libcuda, or None where there is no driver."""
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            return driver
    return None


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver supports."""
    number = ctypes.c_int()
    if _driver() is None or _driver().cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def describe(device: Any) -> dict[str, Any]:
    """One device, and whether other processes can map its memory."""
    about = {"id": device.id, "kind": device.device_kind, "platform": device.platform}
    if device.platform != "gpu":
        return about
    about |= {"ordinal": device.local_hardware_id, "pci": pci_of(device.local_hardware_id)}
    try:
        region = peers.CudaMemory().xla_memory(device)
        os.close(region.descriptor)
        about["shared_bytes"] = region.num_bytes
    except RuntimeError as error:
        about["not_shared"] = str(error)
    return about


def pci_of(ordinal: int) -> str | None:
    """Where the device is plugged in: the same name in every process."""
    text, handle = ctypes.create_string_buffer(32), ctypes.c_int()
    if _driver() is None or _driver().cuDeviceGet(ctypes.byref(handle), ordinal) != 0:
        return None
    return text.value.decode() if _driver().cuDeviceGetPCIBusId(text, len(text), handle) == 0 else None


def reach(a: Any, b: Any) -> bool:
    """Whether two GPUs of this process read and write each other's memory."""
    return bool(targets.have_peer_access([a.local_hardware_id, b.local_hardware_id]))


def links() -> dict[str, dict[str, str]]:
    """How GPUs are connected, with nvidia-smi's names for links (NV18: 18 NVLinks) and its numbers for GPUs."""
    try:
        answer = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_links(answer.stdout)


def parse_links(text: str) -> dict[str, dict[str, str]]:
    """{GPU: {other GPU: link}} from what `nvidia-smi topo -m` prints."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    header = next((words for words in lines if words[:1] == ["GPU0"] and words[1:2] != ["X"]), [])
    gpus = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    rows = {words[0]: words[1 : 1 + len(gpus)] for words in lines if words and words[0] in gpus and words is not header}
    return {gpu: {b: link for b, link in zip(gpus, row, strict=True) if b != gpu} for gpu, row in rows.items()}


# ---- one small exchange ----------------------------------------------------------------------------------------------


def exchange(num_tokens: int = 64, hidden: int = 256, repeats: int = 20) -> dict[str, Any]:
    """dispatch and combine over all devices of the job, every choice back: K * x is right. Time is of a whole call."""
    found: dict[str, Any] = {"served_by": None, "why_not": None, "right": False, "microseconds": None, "error": None}
    devices = np.array(jax.devices())
    mesh, spec = Mesh(devices, ("expert",)), P("expert")
    num_ranks, num_topk = len(devices), 2
    num_experts = 2 * num_ranks

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def round_trip(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        recv, handle = dispatch(x, topk_idx, axis_name="expert", num_experts=num_experts)
        assert isinstance(recv.x, jax.Array)  # no wire format
        return combine(recv.x, handle)

    def spread(array: np.ndarray[Any, Any]) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    total = num_ranks * num_tokens
    x = np.arange(total * hidden, dtype=np.float32).reshape(total, hidden) % 251
    token = np.arange(total, dtype=np.int32)
    args = spread(x), spread(np.stack([token % num_experts, (token + 1) % num_experts], axis=1))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            text = round_trip.lower(*args).as_text()
        served_by = {targets.DISPATCH: "kernels", targets.INTERNODE_DISPATCH: "kernels over NVSHMEM"}
        found["served_by"] = next(
            (who for target, who in served_by.items() if f"@{target}(" in text), "XLA's collectives"
        )
        found["why_not"] = next((str(w.message).split(": ", 2)[-1] for w in caught if "jax_ep" in str(w.message)), None)
        out = round_trip(*args)
        found["right"] = all(
            bool((np.asarray(shard.data) == num_topk * x[shard.index]).all()) for shard in out.addressable_shards
        )
        found["microseconds"] = round(
            1e6 * median_seconds(lambda: jax.block_until_ready(round_trip(*args)), repeats), 1
        )
    except Exception as error:  # whatever it is, the doctor is to say it
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call, over so many."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


# ---- for people ------------------------------------------------------------------------------------------------------


def show(reports: list[Report], problems: list[str]) -> None:
    """Tables by rich where it is installed, else plain lines; of later processes what differs from the first."""
    first = rows(reports[0])
    told = [first] + [[row for row in rows(report) if row not in first] for report in reports[1:]]
    verdict = "healthy" if not problems else "to be mended:"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for report, its_rows in zip(reports, told, strict=True):
            print(title(report))
            for name, value in its_rows:
                print(f"  {name:<22} {value}")
        print(verdict, *problems, sep="\n  ", flush=True)
        return
    console = Console(markup=False)
    for report, its_rows in zip(reports, told, strict=True):
        table = Table("", "", title=title(report), title_justify="left", show_header=False)
        for name, value in its_rows:
            table.add_row(name, value)
        console.print(table)
    console.print(verdict, style="bold red" if problems else "bold green")
    for problem in problems:
        console.print(f"  {problem}")


def title(report: Report) -> str:
    return f"process {report['process']} on {report['host']}, pid {report['pid']}"


def rows(report: Report) -> list[tuple[str, str]]:
    """A report as names and values."""
    found = list(report["versions"].items())
    found += [(f"jax_ep.config.{name}", str(value)) for name, value in report["config"].items()]
    for device in report.get("devices", []):
        about = device["kind"]
        if device["platform"] == "gpu":
            about += f" at {device['pci']}, CUDA device {device['ordinal']}; "
            shared = device.get("shared_bytes")
            about += f"{shared / 2**30:.1f} GiB to share" if shared else device["not_shared"]
        found.append((f"device {device['id']}", about))
    for gpu, others in report.get("links", {}).items():
        found.append((f"links of {gpu}", ", ".join(f"{other} {link}" for other, link in others.items()) or "none"))
    if access := report.get("peer_access"):
        found.append(("peer access", "all to all" if all(map(all, access)) else json.dumps(access)))
    if across := report.get("across_nodes"):
        found.append(("across nodes", across))
    if exchange := report.get("exchange"):
        took = f", {exchange['microseconds']:g} µs a call" if exchange["microseconds"] else ""
        why_not = f" ({exchange['why_not']})" if exchange["why_not"] else ""
        outcome = "right" if exchange["right"] else exchange["error"] or "wrong"
        found.append(("dispatch, combine", f"{outcome}, by {exchange['served_by']}{why_not}{took}"))
    return found
