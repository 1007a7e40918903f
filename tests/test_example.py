"""examples/train_moe_lm.py on a model that compiles fast: it learns, agrees with a dense model, and repeats itself."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import compile_fast

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--dim=32", "--layers=1", "--experts=8", "--batch=8", "--seq=32", "--steps=16"]


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch, compile_fast():  # compiling is most of the time
        patch.syspath_prepend(str(EXAMPLES))
        import train_moe_lm

        yield train_moe_lm


def train(example, out, *flags):
    assert example.main([*TINY, *flags, f"--out={out}"]) == 0
    return losses_of(out)


def losses_of(out):
    """Of each step, to nine digits: as many as tell one f32 from another."""
    return np.loadtxt(out / "training.csv", delimiter=",", skiprows=1)[:, 1]


def train_elsewhere(outs, *flags, xla_flags="", **env):
    """Trainings one after another in a process of its own, whose JAX starts with this environment."""
    trainings = "; ".join(f"assert train_moe_lm.main({[*TINY, *flags, f'--out={out}']}) == 0" for out in outs)
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": xla_flags, **env}
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import train_moe_lm; {trainings}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [losses_of(out) for out in outs]


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return train(example, out), out


def test_loss_falls(trained):
    losses, _ = trained
    assert losses.shape == (16,)
    assert losses[0] > 7.5  # nothing known: 8 bits a byte
    assert losses[-3:].mean() < losses[0] - 2


def test_picture_is_written(trained):
    _, out = trained
    picture = (out / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_two_trainings_give_the_same_losses(example, trained, tmp_path):
    if jax.default_backend() == "gpu":  # where XLA adds up an embedding's gradient in no fixed order, unless told to
        outs = tmp_path / "first", tmp_path / "second"
        first, second = train_elsewhere(outs, xla_flags="--xla_gpu_deterministic_ops=true")
    else:
        first, second = trained[0], train(example, tmp_path)
    assert first.shape == (16,)
    np.testing.assert_array_equal(first, second)


def test_another_seed_gives_other_losses(example, trained, tmp_path):
    assert (train(example, tmp_path, "--seed=1") != trained[0]).any()


@pytest.mark.gpu
def test_losses_on_gpus_are_those_on_cpus(example, tmp_path):
    """In f32, on as many devices: between two CPU runs that sum in other orders the difference is below 1e-6."""
    with jax.default_matmul_precision("highest"):
        on_gpus = train(example, tmp_path / "gpus", "--dtype=float32")
    devices = f"--xla_force_host_platform_device_count={jax.device_count()}"
    (on_cpus,) = train_elsewhere([tmp_path / "cpus"], "--dtype=float32", xla_flags=devices, JAX_PLATFORMS="cpu")
    np.testing.assert_allclose(on_gpus, on_cpus, rtol=1e-3)


def test_loss_and_gradients_agree_with_the_dense_model(example, capsys):
    assert example.main([*TINY, "--layers=2", "--check"]) == 0
    assert "All agree" in capsys.readouterr().out


def test_a_difference_fails_the_check(example, monkeypatch, capsys):
    def twice_the_gates(x, topk_idx, gates, w_in, w_out):
        return dense(x, topk_idx, 2 * gates, w_in, w_out)

    dense = example.model.dense
    monkeypatch.setattr(example.model, "dense", twice_the_gates)
    assert example.main([*TINY, "--check"]) == 1
    assert "They differ" in capsys.readouterr().out
