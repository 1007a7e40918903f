"""soak.py: a few of its calls, here and on GPUs, and that it finds what is wrong."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CALLS, PROGRAMS = (1000, 12) if jax.default_backend() == "gpu" else (10, 2)


@pytest.fixture(scope="module")
def soak():
    sys.path.append(str(ROOT))  # last, so that jax_ep is the installed one
    yield importlib.import_module("soak")
    sys.path.remove(str(ROOT))


@pytest.mark.timeout(900)  # compiling three dozen programs for GPUs
def test_random_calls_are_right_and_recorded(soak, tmp_path, capsys):
    out = tmp_path / "soak.json"
    arguments = ["--calls", CALLS, "--programs", PROGRAMS, "--seed", 3, "--size", "small"]
    arguments += ["--oracle-every", CALLS // 10, "--out", out]
    assert soak.main([str(a) for a in arguments]) == 0, capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["calls"] == CALLS and record["num_failures"] == 0 and record["failures"] == []
    assert record["programs"] == PROGRAMS and record["oracle_checks"] > 0
    assert {"commit", "date", "machine", "versions", "command", "seed"} <= record.keys()


def test_one_bit_is_found_by_the_reference_and_by_the_oracle(soak, monkeypatch, capsys):
    right = soak.Program.with_kernels

    def with_one_wrong_bit(program):
        def call(*operands):
            results = right.__get__(program, type(program))(*operands)
            bits = np.array(results["out"])
            bits.view(np.uint8).reshape(-1)[-1] ^= 1
            return results | {"out": jax.device_put(bits, results["out"].sharding)}

        return call

    seed = next(s for s in range(1000) if all(soak.draw_program(s, i, "small").has_oracle for i in range(2)))
    monkeypatch.setattr(soak.Program, "with_kernels", property(with_one_wrong_bit))
    run = soak.Soak(seed, num_programs=2, size="small", oracle_every=1)
    run.run(first=0, calls=2, seconds=1000)
    against = [(failure["against"], failure["call"], sum(failure["differing"].values())) for failure in run.failures]
    assert sorted(against) == [("oracle", 0, 1), ("oracle", 1, 1), ("reference", 0, 1), ("reference", 1, 1)]
    assert soak.main(["--calls", "1", "--programs", "2", "--seed", str(seed), "--size", "small"]) == 1
    assert '"out"' in capsys.readouterr().out


def test_a_call_is_the_same_when_it_is_made_again(soak):
    program = soak.draw_program(3, 0, "small")
    first, second = (program.draw(5, 1) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_programs_differ_in_all_that_a_program_is(soak):
    programs = [soak.draw_program(0, i, "full") for i in range(200)]
    assert programs == [soak.draw_program.__wrapped__(0, i, "full") for i in range(200)]
    for name in (
        "kind",
        "axis_name",
        "num_tokens",
        "hidden",
        "num_topk",
        "num_experts",
        "layout",
        "dtype",
        "wire",
        "mode",
    ):
        values = {getattr(program, name) for program in programs}
        assert len(values) > (1 if jax.device_count() > 1 or name != "axis_name" else 0), name
