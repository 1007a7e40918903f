"""A rank that does not do as the others do, through jit: the error says who waited for whom in which call, and later calls are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")]

# scenario: the operation that waits, by whom and for whom
TOLD = {
    "no_dispatch": r"dispatch: rank [^1] waited for rank 1",
    "no_combine": r"combine: rank [^1] waited for rank 1",
    "one_more_trip": r"dispatch: rank 1 waited for rank \d+",
}
PHASES = {"high_throughput": "meet", "low_latency": "lines"}  # the first thing that a rank waits for


@pytest.fixture(params=PHASES)
def mode(request):
    return request.param


def report_of(scenario, launch, mode):
    # The process of the tests holds most of the GPUs' memory already.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("failure_worker.py")), scenario, launch, mode]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env, check=False)
    assert "REPORT " in result.stdout, result.stdout + result.stderr
    return json.loads(result.stdout.split("REPORT ")[1])


def told(scenario, mode):
    return f"{TOLD[scenario]} in phase {PHASES[mode]}"


def outcomes(runs):
    return [run["is"] for run in runs]


def afterwards(report):
    """Once the error has been raised: programs that were there, a new one, and all of them by turns."""
    return outcomes([*report["launched"], *report["fresh"], *report["by turns"]])


@pytest.mark.parametrize("scenario", TOLD)
def test_the_error_names_operation_ranks_and_phase_and_later_calls_are_right(scenario, mode):
    report = report_of(scenario, "launched", mode)
    assert set(outcomes(report["before"])) == {"right"}
    failing = report["failing"]
    assert failing["is"] in ("zero", "error") or scenario == "one_more_trip", failing
    assert 0.4 < failing["seconds"] < 30, "the timeout was set after the group was made, and holds at once"
    runs = [failing, *report["next"]]
    (error,) = [run["text"] for run in runs if run["is"] == "error"]
    assert re.search(told(scenario, mode), error), error
    assert "call " in error and "lane " in error and re.search(r"after 500 ms it saw", error), error
    after = [run for run in report["next"] if run["is"] != "error"]
    assert after and {*outcomes(after), *afterwards(report)} == {"right"}, report


def test_a_failure_among_replayed_graphs(mode):
    """No handler is run for a replay but the initialize stage: it raises what happened, and the next replay is right again."""
    report = report_of("no_dispatch", "graphs", mode)
    assert set(outcomes(report["before"])) == {"right"}
    runs = [report["failing"], *report["next"]]
    assert outcomes(runs) in (["zero", "error", "right"], ["error", "right", "right"]), report
    (error,) = [run["text"] for run in runs if run["is"] == "error"]
    assert re.search(told("no_dispatch", mode), error), report
    assert set(afterwards(report)) == {"right"}, report


def test_a_rank_that_is_late_but_in_time_is_waited_for(mode):
    report = report_of("late", "launched", mode)
    assert {*outcomes([report["failing"], *report["next"]]), *afterwards(report)} == {"right"}, report
