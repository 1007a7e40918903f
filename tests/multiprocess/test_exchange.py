"""The suite's core under 2 processes with 4 devices each. exchange_worker.py holds the checks; one run makes them all."""

import launch
import pytest

# Each process compiles every program, which is most of the time. What is new here is what crosses from one to the other: sums
# are held to the bit as XLA optimises them in test_combine.py.
COMPILES_FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.multiprocess
def test_two_processes_exchange_as_the_oracle_says():
    processes = launch.run("exchange_worker:core", environments=[COMPILES_FAST] * 2, timeout=280)
    failed = [
        f"process {i}, {name}:\n{error}"
        for i, process in enumerate(processes)
        for name, error in process["failed"].items()
    ]
    assert not failed, "\n".join(failed)
    print(*(process["seconds"] for process in processes))
    first, second = (process["barrier"] for process in processes)
    assert first["after"] >= second["before"]  # process 1 came late
