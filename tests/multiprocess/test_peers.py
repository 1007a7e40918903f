"""Processes map each other's memory, agree on what kernels can serve, on windows, and on where to go on after a failure."""

import re

import launch
import pytest

pytestmark = pytest.mark.multiprocess


def test_every_rank_reaches_the_memory_of_every_other():
    processes = launch.run("peers_worker:shares", devices_per_process=1)
    assert "got no word from process 1" in processes[0]["early"]
    for me, seen in enumerate(processes):
        assert seen["exports"] == 1  # also after an attempt that found nobody
        assert seen["again"]
        assert seen["why_not"] == [None, None, "device 999 was not there when jax_ep.initialize() was called"]
        # Ranks are devices 100, 201, 101, 200 of processes 0, 1, 1, 0.
        assert seen["places"] == ([[0, 0], [1, -1], [1, -1], [0, 1]] if me == 0 else [[0, -1], [1, 1], [1, 0], [0, -1]])
        assert seen["own_shift"] == 0
        ranks = (0, 3) if me == 0 else (1, 2)
        assert seen["windows"] == [[1000 * source + rank for source in range(4)] for rank in ranks]
        assert seen["arenas"] == seen["windows"]
        assert seen["neighbours"] == [0, 0]  # the next group's windows
        assert seen["read"] == 7001 - me
        assert seen["left_open"] == 0


def test_processes_make_memory_for_each_other_whenever_one_asks():
    first, second = launch.run("peers_worker:makes_more", devices_per_process=1)
    for seen in (first, second):
        assert seen["again"]
        assert seen["words"] == [[10 * i, 10 * i + 1] for i in range(4)]
        assert [seen[key] for key in "bcd"] == [[100, 101, 200, 201], [100, 101], [100, 101, 200, 201]]
        assert seen["made"] == 1 + 4  # the exchange's, and one for each of the arenas a to d
        assert re.fullmatch("process [01]: out of memory", seen["too much"])
    assert "process 1 must make memory that calls of this size share, and gave process 0 no answer" in first["gone"]


def test_twenty_exchanges_leave_no_more_behind_than_one():
    for first, last in launch.run("peers_worker:starts_often", devices_per_process=1, arguments={"count": 20}):
        assert last == first
        assert not first["offers"] and "jax_ep descriptors" not in first["threads"]
        assert not any("jax_ep test" in name for name in first["descriptors"])


@pytest.mark.parametrize(("offers", "topic"), [(False, "memory"), (True, "mapped")])
def test_a_process_that_is_killed_in_the_exchange_is_named(offers, topic):
    told, _ = launch.run("peers_worker:is_killed", devices_per_process=1, arguments={"offers": offers}, dies=1)
    assert f"within 3 s, got no word from process 1 on process 0 ({topic})" in told


def test_what_one_process_cannot_share_all_know():
    for spanning, within in launch.run("peers_worker:refuses", devices_per_process=1):
        assert spanning == "process 1: its memory grows"
        assert within is None


def test_windows_are_claimed_alike_in_any_order():
    (first, again), (other_first, other_again) = launch.run("peers_worker:claims", devices_per_process=1)
    assert first == again == other_first == other_again
    assert sorted(number for number in first.values() if number is not None) == [0, 1, 2]
    assert list(first.values()).count(None) == 1


def test_room_is_allotted_alike_in_any_order():
    (first, again, amounts), (other_first, other_again, _) = launch.run("peers_worker:allots", devices_per_process=1)
    assert again == other_again
    # Who was told of no room before is told of none later, and who was told of some keeps it.
    assert first == other_first == again
    end = 0
    for begin, owner in sorted((begin, owner) for owner, begin in again.items() if begin is not None):
        assert begin == end
        end += amounts[owner]
    assert end <= 1000
    assert all(end + amounts[owner] > 1000 for owner, begin in again.items() if begin is None)


def test_after_a_failure_all_processes_begin_the_same_generation():
    first, second = launch.run("peers_worker:resumes", devices_per_process=1)
    assert first["quiet"] == second["quiet"] == 0
    assert "got no word from process 1" in first["alone"] and "resume 0" in first["alone"]
    assert first["together"] == second["together"] == 42
    assert first["again"] == second["again"] == 42
