"""The kernels over nodes, one process a GPU on pretended nodes of this host: right to the bit, and no hang when one is late.

NVSHMEM's transport is NVLink here. Alone: JAX_EP_TEST_PLATFORM=gpu pytest -n 0 tests/multiprocess/test_internode_gpu.py.
More shapes of nodes than there are GPUs for: tests/gpu/kernels/internode.cu.
"""

import importlib.util

import jax
import launch
import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("jax_ep._internode", "nvshmem")),
        reason="needs jax_ep built with NVSHMEM, and nvshmem4py",
    ),
]

SHAPES = {"two nodes of one": (2, 1), "two nodes of two": (4, 2), "four nodes of one": (4, 1)}


def on_nodes(shape, worker, timeout=280, **variables):
    num_gpus, ranks_per_node = SHAPES[shape]
    if len(jax.devices()) < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    # NVSHMEM reaches only GPUs that it sees: all are visible, and JAX takes one.
    nodes = {"JAX_EP_RANKS_PER_NODE": str(ranks_per_node)}
    environments = [{launch.CHOSEN_GPUS: str(i), **nodes, **variables} for i in range(num_gpus)]
    gpus = [",".join(map(str, range(num_gpus)))] * num_gpus
    return launch.run(f"internode_worker:{worker}", gpus=gpus, environments=environments, timeout=timeout)


@pytest.mark.parametrize("shape", SHAPES)
def test_nodes_exchange_as_the_oracle_says(shape):
    processes = on_nodes(shape, "core")
    failed = [
        f"process {i}, {name}:\n{error}"
        for i, process in enumerate(processes)
        for name, error in process["failed"].items()
    ]
    assert not failed, "\n".join(failed)
    first, second, *_ = (process["barrier"] for process in processes)
    assert first["after"] >= second["before"]  # process 1 came late


def test_a_process_that_comes_late_is_named_and_initialize_makes_all_right_again():
    first, second = on_nodes("two nodes of one", "comes_late")
    (missed, seconds), (refused, at_once) = first["errors"]
    assert "rank 0 of process 0 waited for rank 1 of process 1" in missed and 5.9 < seconds < 40
    assert "waited for rank 1 of process 1" in refused and at_once < 5.5
    ((told, soon),) = second["errors"]
    assert "rank 1 of process 1 waited for rank 0 of process 0" in told and "given" in told and soon < 5.5
    assert first["right"] == second["right"] == [True] * 4


def test_where_nvshmem_is_missing_the_first_program_over_nodes_says_what_to_install():
    for error in on_nodes("two nodes of one", "no_nvshmem"):
        assert "a group over several nodes needs NVSHMEM. process 0: NVSHMEM's Python bindings" in error
        assert "pip install 'jax_ep[nvshmem]'" in error


def test_the_collectives_serve_where_they_are_asked_for():
    assert on_nodes("two nodes of one", "collectives", JAX_EP_ACROSS_NODES="collectives") == [True, True]
