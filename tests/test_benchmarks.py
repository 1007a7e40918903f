"""The benchmarks run on a small case, count bytes rightly, and every recorded row fits the schema."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.append(str(ROOT))  # last, so that jax_ep is the installed one
    yield
    sys.path.remove(str(ROOT))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def read_summary(capsys, *paths):
    assert module("summary").main([str(path) for path in paths]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def measure(out, *options):
    arguments = ["--cases", "expert", "--samples", "2", "--out", str(out), *options]
    assert module("exchange").main(arguments) == 0


def test_measured_rows_reach_the_summary_and_the_table(tmp_path, capsys):
    measure(
        tmp_path / "tiny.json", "--layouts", "expert", "rank", "--operations", "dispatch", "combine_weighted", "pair"
    )
    assert "speed of light" in capsys.readouterr().out
    rows = read_summary(capsys, tmp_path / "tiny.json")
    measured = {(row["operation"], row["by"], row["layout"]) for row in rows}
    assert measured == {
        *((operation, "jax_ep", "expert") for operation in ("dispatch", "combine_weighted", "pair")),
        *((operation, "jax_ep", "rank") for operation in ("dispatch", "pair")),
        *(
            (operation, by, None)
            for operation in ("dispatch", "pair")
            for by in ("all_gather+psum_scatter", "all_to_all")
        ),
    }
    for row in rows:
        assert row["us"] > 0 and row["ratio"] == pytest.approx(row["us"] / row["ceiling_us"], abs=0.01, rel=0.1)
        assert (row["tokens"], row["hidden"], row["ranks"], row["processes"]) == (6, 16, 4, 1)


def test_a_wire_format_and_a_table_without_rich(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    measure(tmp_path / "tiny.json", "--layouts", "expert", "--operations", "dispatch", "--wires", "fp8")
    assert "dispatch   speed of light, fp8" in capsys.readouterr().out
    assert {row["wire"] for row in read_summary(capsys, tmp_path / "tiny.json") if row["by"] == "jax_ep"} == {"fp8"}


def test_baselines_bring_back_one_copy_for_each_rank_of_a_token():
    setting = module("exchange").Setting.of(Case("by-hand", 5, 8, 2, 8, 4, dtype="float32"))
    x, idx, _ = setting.inputs()
    num_owners = [len(set(choices // 2)) for choices in np.asarray(idx)]
    for name, copies in (("all_gather+psum_scatter", 4), ("all_to_all", np.array(num_owners)[:, None])):
        parts = module("baselines").BASELINES[name](setting.case)
        back = setting.on_every_rank(lambda *args, parts=parts: parts["combine"](*parts["dispatch"](*args)))(x, idx)
        np.testing.assert_allclose(back, x * jnp.asarray(copies, x.dtype), rtol=1e-6)


def test_crossing_bytes_by_hand():
    """One row a (token, rank) that is not the token's own, however many experts it chose there."""
    traffic = module("traffic")
    case = Case("by-hand", 3, 64, 2, 4, 2)
    idx = np.array([[[0, 1], [1, 2], [2, 3]], [[0, 1], [3, 2], [3, 0]]], np.int32)
    np.testing.assert_array_equal(traffic.rows_crossing(case, idx), [[0, 2], [2, 0]])
    assert traffic.row_bytes(case, None) == 128
    assert traffic.row_bytes(case, "fp8") == 64 + 4
    assert traffic.row_bytes(case, "mxfp8") == 64 + 2
    crossing = np.array([[0.0, 3e6], [1e6, 0.0]])
    assert traffic.Ceiling("memory", 1e9, shared=True).us(crossing) == pytest.approx(4000)
    assert traffic.Ceiling("links", 1e9, shared=False).us(crossing) == pytest.approx(3000)


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_benchmarks_drop_no_row(layout):
    import jax_ep

    setting = module("exchange").Setting.of(Case("uneven", 3, 16, 2, 16, 4)).in_layout(layout)
    case = setting.case

    def dropped(x, idx):
        options = {"max_recv_tokens": case.max_recv_tokens, "expert_capacity": case.expert_capacity}
        recv, _ = jax_ep.dispatch(x, idx, axis_name="expert", num_experts=16, layout=layout, **options)
        return recv.num_dropped

    assert not setting.on_every_rank(dropped)(*setting.inputs()[:2]).any()


def test_timing_says_what_a_call_takes():
    timing = module("timing")
    assert timing.Timing.of([3e-6, 1e-6, 2e-6]) == timing.Timing(2.0, 1.2, 2.8, 3)
    f = timing.compiled(lambda x: x + 1, jnp.zeros(3))
    timed = timing.measure(f, jnp.zeros(3), samples=4, warmup=1, calls=2)
    assert 0 < timed.p10 <= timed.median <= timed.p90 and timed.samples == 4
    assert {"machine", "commit", "dirty", "date", "versions", "command"} == set(timing.origin())


def test_recorded_results_fit_the_schema(capsys):
    rows = read_summary(capsys)
    assert rows
    for row in rows:
        assert tuple(row) == module("summary").KEYS
        assert row["commit"] and row["date"] and row["machine"]
