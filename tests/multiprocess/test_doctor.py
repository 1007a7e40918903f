"""python -m jax_ep doctor: what it says with and without rich, its exit code, and what it makes of an exchange gone wrong."""

import json
import os
import subprocess
import sys

import jax
import launch
import pytest

from jax_ep._src import doctor

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\t\tN/A
GPU1\tNV18\t X \tPHB\tSYS\t0-15\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t0-15\t0\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def as_json(capsys, *flags):
    code = doctor.main(["doctor", "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_all_is_well_here(capsys):
    code, said = as_json(capsys)
    assert (code, said["healthy"], said["problems"]) == (0, True, [])
    (process,) = said["processes"]
    assert len(process["devices"]) == jax.local_device_count()
    assert process["versions"]["jax"] == jax.__version__
    assert process["exchange"]["right"] and process["exchange"]["microseconds"] > 0
    served_by = "kernels" if jax.default_backend() == "gpu" else "XLA's collectives"
    assert process["exchange"]["served_by"] == served_by


@pytest.mark.parametrize("rich", [True, False])
def test_people_read_the_same_with_and_without_rich(capsys, monkeypatch, rich):
    if rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert ("│" in text) == rich
    for word in (
        "process 0 on",
        "jaxlib",
        "device 0",
        "across nodes",
        "dispatch, combine",
        "right, by",
        "µs a call",
        "healthy",
    ):
        assert word in text


def test_wrong_results_are_a_problem_and_an_exit_code(capsys, monkeypatch):
    right = doctor.combine
    monkeypatch.setattr(doctor, "combine", lambda y, handle: right(y, handle) + 1)
    code, said = as_json(capsys)
    assert (code, said["problems"]) == (1, ["process 0: the exchange gave wrong results"])


def test_an_error_is_told_and_not_raised(capsys, monkeypatch):
    def fails(y, handle):
        raise ValueError("no such luck")

    monkeypatch.setattr(doctor, "combine", fails)
    assert doctor.main(["doctor"]) == 1
    assert "process 0: the exchange failed: ValueError: no such luck" in " ".join(capsys.readouterr().out.split())


def test_as_a_command(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jax_ep", "doctor", "--json"]
    outside = {"capture_output": True, "timeout": 120, "env": env, "cwd": tmp_path}  # not among the sources
    done = subprocess.run(command, text=True, check=True, **outside)
    assert json.loads(done.stdout)["healthy"]
    assert subprocess.run(command[:3], check=False, **outside).returncode == 2


def test_links_are_read_from_what_nvidia_smi_prints():
    assert doctor.parse_links(TOPOLOGY) == {
        "GPU0": {"GPU1": "NV18", "GPU2": "SYS"},
        "GPU1": {"GPU0": "NV18", "GPU2": "PHB"},
        "GPU2": {"GPU0": "SYS", "GPU1": "PHB"},
    }
    assert doctor.parse_links("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == {"GPU0": {}}
    assert doctor.parse_links("nothing of the kind") == {}


@pytest.mark.multiprocess
def test_one_process_of_a_job_reports_for_all():
    first, second = launch.run("doctor_worker:all_run_it", devices_per_process=2)
    assert (first["code"], second["code"]) == (0, 0)
    assert second["out"] == ""
    said = json.loads(first["out"])
    assert [process["process"] for process in said["processes"]] == [0, 1]
    assert all(process["exchange"]["right"] and len(process["devices"]) == 2 for process in said["processes"])


@pytest.mark.multiprocess
def test_a_process_that_is_missing_is_named():
    first, _ = launch.run("doctor_worker:one_runs_it", devices_per_process=1)
    assert first["code"] == 1
    (problem,) = json.loads(first["out"])["problems"]
    assert "got no word from process 1" in problem
