"""The launcher tells what went wrong and leaves nothing running."""

import time

import launch
import pytest


@pytest.mark.multiprocess
def test_a_process_that_fails_ends_the_one_that_waits():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)process 1 exited with 1.*--- process 1.*ValueError: as told"):
        launch.run("launch_worker:one_fails_one_hangs", devices_per_process=1)
    assert time.monotonic() - start < 100


@pytest.mark.multiprocess
def test_a_deadline_ends_all_processes():
    with pytest.raises(AssertionError, match=r"process 0, 1 still ran after 0\.5 s"):
        launch.run("launch_worker:all_hang", devices_per_process=1, timeout=0.5)


@pytest.mark.multiprocess
def test_a_process_takes_the_gpus_that_were_chosen_for_it():
    environments = [{launch.CHOSEN_GPUS: "1,2"}, {}]
    chosen = launch.run("launch_worker:chosen_gpus", devices_per_process=1, environments=environments)
    assert chosen == ["1,2", "all"]
