"""The benchmark of the kernels on this machine's GPUs: every operation has a time, and calls inside jit have one too."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.append(str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def run(out, name, *options, memory=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)):
    """In a process of its own: this one holds most of the GPUs' memory already."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *options]
    env = os.environ | dict(memory)
    env.pop(
        "JAX_EP_TEST_PLATFORM", None
    )  # under which the cases ask for devices when they are imported, too early for a job
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)  # what a row that failed only begins to say
    return json.loads(out.read_text())


@pytest.mark.timeout(400)  # nvcc takes a minute or two of it
def test_the_kernels_are_timed(tmp_path):
    try:
        importlib.import_module("benchmarks.native").find_nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    # Few calls: where other processes use the GPUs too, two ranks meet when both have their turn, and each call takes long.
    few = ["--layouts", "rank", "expert", "--calls", "4", "--repeats", "2", "--case-timeout", "60"]
    options = ["--bases", "64", "--base-sms", "8", "--axes", "graph", "wire", "--no-ceiling", *few]
    rows = run(tmp_path / "kernels.json", "kernels", *options)
    assert {row["error"] for row in rows} == {None}
    operations = {"dispatch", "dispatch_quantized", "dispatch_cached", "combine", "combine_weighted", "combine_grad"}
    assert {row["operation"] for row in rows} == operations
    assert {(row["graph"], row["wire"]) for row in rows} == {(False, None), (True, None), (False, "fp8")}
    assert all(1 < row["us"] < 1e5 for row in rows)


@pytest.mark.parametrize("launch", ["stream", "graph"])
def test_calls_inside_jit_are_timed(tmp_path, launch):
    some = ["--cases", "expert", "--calls", "4", "--samples", "3", "--layouts", "expert", "rank", "--wires", "none"]
    rows = run(tmp_path / "jit.json", "exchange", *some, "--baselines", "all_to_all", "--launch", launch)
    assert {row["error"] for row in rows} == {None}
    assert {row["by"] for row in rows} == {"jax_ep", "all_to_all"} and {row["graph"] for row in rows} == {
        launch == "graph"
    }


@pytest.mark.timeout(400)
def test_steps_and_calls_of_decode_size_are_timed(tmp_path):
    sizes = [
        "--tokens",
        "16",
        "1",
        "--hidden",
        "1024",
        "--experts",
        "16",
        "--topk",
        "2",
        "--layers",
        "2",
        "--calls",
        "8",
    ]
    some = ["--programs", "40", "--steps", "40", "--samples", "20", "--most-calls", "200", "--idle-ms", "0", "5"]
    rows = run(tmp_path / "decode.json", "decode", "--quick", "--budget-s", "200", *sizes, *some)
    assert {row["error"] for row in rows} == {None}
    assert {row["part"] for row in rows} == {"programs", "step", "calls", "idle", "late"}
    assert {(row["by"], row["graph"]) for row in rows if row["part"] == "step"} == {
        (by, graph) for by in ("jax_ep", "all_gather+psum_scatter") for graph in (True, False)
    }
    for row in rows:
        assert row["part"] == "late" or 1 < row["us"] < 1e5  # differences of times on a machine that others load
        assert row["graph"] == (row["part"] != "step" or row["graph"])
        assert row["clock"].startswith("the device's") or row["part"] == "idle"
        assert row["part"] != "idle" or 1 < row["device_us"] < row["us"]
    delays = [row["delay_us"] for row in rows if row["part"] == "late"]
    assert set(delays[::2]) == {0} and all(delay != 0 for delay in delays[1::2])


@pytest.mark.multiprocess
@pytest.mark.skipif(len(jax.devices()) % 2 == 1, reason="needs an even number of GPUs")
def test_a_process_a_gpu_is_timed_beside_one_for_all(tmp_path):
    some = ["--cases", "expert", "--layouts", "expert", "--operations", "pair", "--wires", "none", "--baselines"]
    some += ["--modes", "high_throughput", "low_latency", "--calls", "4", "--samples", "3", "--launch", "stream"]
    rows = run(
        tmp_path / "processes.json",
        *("exchange", *some, "--processes", "1", "2"),
        memory={"XLA_PYTHON_CLIENT_MEM_FRACTION": ".05"},  # in one piece, so that processes can share it
    )
    assert [(row["processes"], row["mode"], row["error"]) for row in rows] == [
        (count, mode, None) for count in (1, 2) for mode in ("high_throughput", "low_latency")
    ]
    assert all(1 < row["us"] < 1e5 for row in rows)
    # Through XLA's collectives a pair of these takes several times as long.
    assert all(two["us"] < 3 * one["us"] for one, two in zip(rows[:2], rows[2:], strict=True))
