"""The kernels under several processes of one host: right to the bit, and no hang when one of them is late, dies or cannot share.

Two processes with a GPU each, one process with two, two with two each; where there is one GPU, both processes use it
(pretending: their kernels take turns). Alone: JAX_EP_TEST_PLATFORM=gpu pytest -n 0 tests/multiprocess/test_exchange_gpu.py
"""

import os
import subprocess
from pathlib import Path

import jax
import launch
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]

SPLITS = {
    "two processes on one GPU": ["0", "0"],
    "a process a GPU": ["0", "1"],
    "one process": ["0,1"],
    "two GPUs a process": ["0,1", "2,3"],
    "three GPUs and one": ["0,1,2", "3"],
}
# As under SLURM: all GPUs are visible, and jax.distributed takes number SLURM_LOCALID of them.
CHOSEN_BY_JAX = [{launch.CHOSEN_GPUS: "0"}, {launch.CHOSEN_GPUS: "1"}]


def gpus_of(split):
    gpus = SPLITS[split]
    needed = 1 + max(int(gpu) for visible in gpus for gpu in visible.split(","))
    if len(jax.devices()) < needed:
        pytest.skip(f"needs {needed} GPUs")
    return gpus


def two_processes():
    """A GPU each if there are two."""
    return SPLITS["a process a GPU" if len(jax.devices()) > 1 else "two processes on one GPU"]


@pytest.mark.parametrize("split", SPLITS)
def test_processes_exchange_as_the_oracle_says(split):
    assert_right(launch.run("exchange_worker:core_on_gpus", gpus=gpus_of(split), timeout=280))


def test_processes_exchange_where_jax_chooses_the_gpu():
    gpus_of("a process a GPU")
    assert_right(launch.run("exchange_worker:core_on_gpus", gpus=["0,1"] * 2, environments=CHOSEN_BY_JAX, timeout=280))


def assert_right(processes):
    failed = [
        f"process {i}, {name}:\n{error}"
        for i, process in enumerate(processes)
        for name, error in process["failed"].items()
    ]
    assert not failed, "\n".join(failed)
    if len(processes) > 1:
        first, second = (process["barrier"] for process in processes)
        assert first["after"] >= second["before"]  # process 1 came late


HOW = [("high_throughput", False), ("high_throughput", True), ("low_latency", False), ("low_latency", True)]


@pytest.mark.parametrize(("mode", "graph"), HOW)
def test_a_process_that_comes_late_is_named_and_initialize_makes_all_right_again(mode, graph):
    how = {"mode": mode, "graph": graph}
    first, second = launch.run("exchange_worker:comes_late", gpus=two_processes(), arguments=how)
    (missed, seconds), (refused, at_once) = first["errors"]
    assert "rank 0 of process 0 waited for rank 1 of process 1" in missed and 5.9 < seconds < 40
    assert "Call jax_ep.initialize() in every process" in missed
    assert "waited for rank 1 of process 1" in refused and at_once < 5.5
    ((told, soon),) = second["errors"]
    assert "rank 1 of process 1 waited for rank 0 of process 0" in told and "given" in told and soon < 5.5
    assert first["right"] == second["right"] == [True] * 4


@pytest.mark.parametrize(("mode", "graph"), HOW)
def test_a_process_that_is_killed_in_a_call_is_named_in_time_and_a_new_job_starts_at_once(mode, graph):
    how = {"mode": mode, "graph": graph}
    seen, _ = launch.run("exchange_worker:is_killed", gpus=two_processes(), arguments=how, dies=1)
    assert seen["error"] and "waited for rank 1 of process 1" in seen["error"]
    assert seen["seconds"] < 20 and seen["calls"] > 0  # the deadline is 3 s
    assert launch.run("exchange_worker:starts_and_calls", gpus=two_processes()) == [[True, True]] * 2


def left_on_this_machine():
    """What a job may leave behind: MiB in use on each GPU, files in /dev/shm, descriptors of this process.

    Its sockets are there as long as a process holds them, and all of its processes have ended. Beside other tests memory
    and files say nothing.
    """
    left = {"descriptors": len(list(Path("/proc/self/fd").iterdir()))}
    if "PYTEST_XDIST_WORKER" in os.environ:
        return left | {"memory": [], "shm": []}
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    shm = sorted(path.name for path in Path("/dev/shm").iterdir())
    return left | {"memory": [int(line) for line in used.split()], "shm": shm}


def test_jobs_that_start_and_end_or_are_killed_leave_nothing_behind():
    """JAX_EP_TEST_STARTS jobs in a row, every fourth of them killed. Ten seconds each."""
    for _ in range(2):
        launch.run("exchange_worker:starts_and_calls", gpus=two_processes())
    before = left_on_this_machine()
    for i in range(int(os.environ.get("JAX_EP_TEST_STARTS", "20"))):
        if i % 4 == 3:
            how = {"mode": HOW[i // 4 % len(HOW)][0], "graph": False}
            launch.run("exchange_worker:is_killed", gpus=two_processes(), arguments=how, dies=1)
        else:
            assert launch.run("exchange_worker:starts_and_calls", gpus=two_processes()) == [[True, True]] * 2
    after = left_on_this_machine()
    assert all(now - then < 16 for then, now in zip(before.pop("memory"), after.pop("memory"), strict=True))
    assert after == before


@pytest.mark.skipif("len(jax.devices()) < 2", reason="NCCL wants a GPU a rank")
def test_where_one_process_cannot_share_its_memory_both_use_the_collectives_and_say_so():
    environments = [{}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}]
    for seen in launch.run("exchange_worker:falls_back", gpus=["0", "1"], environments=environments):
        assert not seen["kernels"] and seen["right"]
        assert len(seen["warnings"]) >= 1
        assert "process 1: XLA's memory" in seen["warnings"][0]
        assert "XLA_PYTHON_CLIENT_PREALLOCATE" in seen["warnings"][0]
