"""A job of four processes on the two virtual nodes of a real SLURM: the example's batch script, and the exchange's checks.

SLURM is started on this host, which needs root and Debian's slurm-wlm and munge, and changes /etc/hosts meanwhile: so only
where JAX_EP_TEST_SLURM=1 asks for it, as .ci/run does; it then fails where that is not possible.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TINY = ["--dim=32", "--layers=1", "--experts=8", "--batch=8", "--seq=32", "--steps=4"]

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        os.environ.get("JAX_EP_TEST_SLURM") != "1", reason="starts a SLURM here, as root: JAX_EP_TEST_SLURM=1"
    ),
]


def free_port():
    """The first of three in a row."""
    with socket.socket() as s:
        s.bind(("", 0))
        return min(s.getsockname()[1], 65000)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a job, in which every process has two virtual devices."""
    missing = [
        name for name in ("slurmctld", "slurmd", "srun", "sbatch", "munged") if not shutil.which(name, path=PATH)
    ]
    if missing or os.getuid() != 0:
        pytest.fail(f"needs root and apt-get install slurm-wlm munge; missing: {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    log = folder / "cluster.log"
    with log.open("w") as out:  # not a pipe: the daemons would hold it open
        up = [HERE / "cluster.sh", "up", folder, "2", str(free_port())]
        code = subprocess.run(up, stdout=out, stderr=subprocess.STDOUT, timeout=60, check=False).returncode
    assert code == 0, log.read_text()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "PATH": PATH,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
    }
    subprocess.run([HERE / "cluster.sh", "down", folder], timeout=60, check=True)


PATH = os.environ["PATH"] + ":/usr/sbin:/usr/bin"
LAYOUT = ["--nodes=2", "--ntasks-per-node=2"]


def run(command, environment):
    done = subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_the_batch_script_trains_over_two_nodes(slurm, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    script = "examples/slurm/train_moe_lm.sbatch"
    command = ["sbatch", "--wait", *LAYOUT, f"--output={log}", script, *TINY, f"--out={out}"]
    done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    text = log.read_text() if log.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + text[-8000:]
    assert "process 3 on" in text and "healthy" in text  # the doctor's word, before the training
    loss = np.loadtxt(out / "training.csv", delimiter=",", skiprows=1)[:, 1]
    assert loss.shape == (4,) and np.isfinite(loss).all() and loss[-1] < loss[0]


def test_four_processes_on_two_nodes_exchange_as_the_oracle_says(slurm):
    text = run(["srun", *LAYOUT, "--kill-on-bad-exit=1", sys.executable, "tests/slurm/exchange.py"], slurm)
    for process in range(4):
        assert f"process {process} of 4 is through" in text


def test_a_job_ends_with_the_doctors_exit_code(slurm):
    """One process of two comes, but says nothing: the other names it, and srun fails."""
    silent = "import jax, time; jax.distributed.initialize(); time.sleep(60)"
    one = f"""
      if [ "$SLURM_PROCID" = 1 ]; then exec {sys.executable} -c "{silent}"; fi
      exec {sys.executable} -m jax_ep doctor --timeout=5
    """
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", "-c", one]
    done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "task 0 of 2" in done.stderr and "waits 5 s for the others" in done.stderr
    assert "got no word from process 1" in " ".join(done.stdout.split()), done.stdout + done.stderr
    assert done.returncode != 0  # of the task that ended worst
