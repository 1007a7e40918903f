"""The kernels under several processes of one host: right to the bit, and no hang when one of them is late, dies or cannot share.

Two processes with a GPU each, one process with two, two with two each; where there is one GPU, both processes use it
(pretending: their kernels take turns). Alone: JAX_EP_TEST_PLATFORM=gpu pytest -n 0 tests/multiprocess/test_exchange_gpu.py
"""

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
CHOSEN_BY_JAX = [{"JAX_CUDA_VISIBLE_DEVICES": "0"}, {"JAX_CUDA_VISIBLE_DEVICES": "1"}]


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


def test_a_process_that_comes_late_is_named_and_initialize_makes_all_right_again():
    first, second = launch.run("exchange_worker:comes_late", gpus=two_processes())
    (missed, seconds), (refused, at_once) = first["errors"]
    assert "rank 0 of process 0 waited for rank 1 of process 1" in missed and 1.9 < seconds < 20
    assert "Call jax_ep.initialize() in every process" in missed
    assert "waited for rank 1 of process 1" in refused and at_once < 1.9
    ((told, soon),) = second["errors"]
    assert "rank 1 of process 1 waited for rank 0 of process 0" in told and "given" in told and soon < 1.9
    assert first["right"] == second["right"] == [True] * 4


def test_a_process_that_dies_becomes_an_error_that_names_its_rank():
    (error, seconds), _ = launch.run("exchange_worker:dies", gpus=two_processes(), dies=1)
    assert "waited for rank 1 of process 1" in error
    assert seconds < 20


@pytest.mark.skipif("len(jax.devices()) < 2", reason="NCCL wants a GPU a rank")
def test_where_one_process_cannot_share_its_memory_both_use_the_collectives_and_say_so():
    environments = [{}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}]
    for seen in launch.run("exchange_worker:falls_back", gpus=["0", "1"], environments=environments):
        assert not seen["kernels"] and seen["right"]
        assert len(seen["warnings"]) >= 1
        assert "process 1: XLA's memory" in seen["warnings"][0]
        assert "XLA_PYTHON_CLIENT_PREALLOCATE" in seen["warnings"][0]
