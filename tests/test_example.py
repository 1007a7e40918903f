"""examples/train_moe_lm.py on a model that compiles fast: it learns, agrees with a dense model, and repeats itself."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--dim=32", "--layers=1", "--experts=8", "--batch=8", "--seq=32", "--steps=16"]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    try:
        import train_moe_lm

        yield train_moe_lm
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        sys.path.remove(str(EXAMPLES))


def train(example, out, *flags):
    assert example.main([*TINY, *flags, f"--out={out}"]) == 0
    return np.loadtxt(out / "training.csv", delimiter=",", skiprows=1)[:, 1]  # loss of each step


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
    if jax.default_backend() == "gpu":
        pytest.skip("XLA adds up an embedding's gradient in no fixed order on GPUs")
    np.testing.assert_array_equal(train(example, tmp_path), trained[0])


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
