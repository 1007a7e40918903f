"""The benchmarks run on a small case, count bytes rightly, and every recorded row fits the schema."""

import importlib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from conftest import compile_fast

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.append(str(ROOT))  # last, so that jax_ep is the installed one
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module", autouse=True)
def compiles_fast():
    """Here and in the processes that are started: no test looks at a time or at how a sum is rounded."""
    with compile_fast():
        yield


@pytest.fixture
def on_cpu():
    """For tests that look at a CPU's rows: tests/gpu/test_benchmarks_gpu.py looks at those of a GPU."""
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < 4:
        pytest.skip(f"asserts the rows of 4 CPU devices, jax has {len(devices)} x {devices[0].platform}")


def owners(choices, num_ranks, num_experts=8):
    return len(set(choices // (num_experts // num_ranks)))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def read_summary(capsys, *paths):
    assert module("summary").main([str(path) for path in paths]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def measure(out, *options):
    arguments = ["--cases", "expert", "--samples", "2", "--wires", "none", "--out", str(out), *options]
    assert module("exchange").main(arguments) == 0


def test_measured_rows_reach_the_summary_and_the_table(tmp_path, capsys, on_cpu):
    operations = ("dispatch", "combine_weighted", "pair")
    measure(tmp_path / "tiny.json", "--layouts", "expert", "rank", "--operations", *operations)
    assert "speed of light" in capsys.readouterr().out
    rows = read_summary(capsys, tmp_path / "tiny.json")
    measured = {(row["operation"], row["by"], row["layout"]) for row in rows}
    assert measured == {
        *((operation, "jax_ep", "expert") for operation in operations),
        *((operation, "jax_ep", "rank") for operation in ("dispatch", "pair")),
        ("pair", "all_gather+psum_scatter", None),
        *((operation, "all_to_all", None) for operation in ("dispatch", "pair")),
    }
    for row in rows:
        assert row["us"] > 0 and row["ratio"] == pytest.approx(row["us"] / row["ceiling_us"], abs=0.01, rel=0.1)
        assert (row["tokens"], row["hidden"], row["ranks"], row["processes"]) == (6, 16, 4, 1)
        assert (row["level"], row["graph"], row["gpus"], row["error"]) == ("program", False, None, None)


def test_a_wire_format_and_a_table_without_rich(tmp_path, capsys, monkeypatch, on_cpu):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    options = ["--layouts", "expert", "--operations", "dispatch", "--wires", "fp8", "--baselines", "--tokens", "3"]
    measure(tmp_path / "tiny.json", *options)
    assert "dispatch   speed of light, fp8" in capsys.readouterr().out
    (row,) = read_summary(capsys, tmp_path / "tiny.json")
    assert (row["by"], row["wire"], row["tokens"], row["mode"]) == ("jax_ep", "fp8", 3, "reference")


def test_what_the_time_does_not_reach_is_recorded_as_skipped(tmp_path, on_cpu):
    operations = ["pair", "combine_weighted", "moe"]
    measure(tmp_path / "none.json", "--budget-s", "-1", "--operations", *operations, "--baselines", "all_to_all")
    rows = json.loads((tmp_path / "none.json").read_text())
    assert {(row["layout"], row["operation"]) for row in rows} == {
        *((layout, operation) for layout in ("expert", "batched") for operation in operations),
        ("rank", "pair"),
        (None, "pair"),
    }
    assert {row["error"] for row in rows} == {"skipped: --budget-s -1 is over"} and not any(row["us"] for row in rows)


def test_layers_by_groups_and_by_batches_are_the_same_layer():
    programs = module("programs")
    setting = programs.Setting.of(Case("layer", 6, 16, 2, 8, 4, dtype="float32"), expert_hidden=8)
    for operation in ("moe", "moe_gradient"):
        results = []
        for layout in ("expert", "batched"):
            ((_, f, arguments),) = programs.jax_ep_programs(setting.in_layout(layout), [operation])
            results.append(jax.jit(f)(*arguments))
        np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)
        assert np.abs(results[0]).max() > 0


def test_each_way_to_launch_is_a_process_whose_bad_end_is_recorded(tmp_path, monkeypatch, on_cpu):
    exchange = module("exchange")
    options = ["--cpu-devices", "4", "--layouts", "rank", "--operations", "pair", "--baselines", "--calls", "2"]
    measure(tmp_path / "both.json", "--launch", "stream", "graph", *options)
    rows = json.loads((tmp_path / "both.json").read_text())
    assert [(row["graph"], row["level"], row["calls"], row["error"]) for row in rows] == [
        (False, "jit", 2, None),
        (True, "jit", 2, None),
    ]
    assert "--only" not in rows[0]["command"]
    monkeypatch.setattr(exchange, "GRAPH_FLAGS", "--no_such_flag_of_xla")
    measure(tmp_path / "bad.json", "--launch", "graph", *options)
    (row,) = json.loads((tmp_path / "bad.json").read_text())
    assert row["error"].startswith("failed: process 0 exited with") and row["us"] is None and row["graph"]
    assert set(module("summary").KEYS) <= set(row)


@pytest.mark.multiprocess
def test_rows_of_several_processes_stand_beside_those_of_one(tmp_path, capfd, on_cpu):
    options = ["--layouts", "rank", "--operations", "pair", "--baselines", "all_to_all", "--calls", "2"]
    measure(tmp_path / "processes.json", "--cpu-devices", "4", "--processes", "1", "2", *options)
    rows = json.loads((tmp_path / "processes.json").read_text())
    assert [(row["by"], row["processes"], row["ranks"], row["error"]) for row in rows] == [
        (by, count, 4, None) for count in (1, 2) for by in ("jax_ep", "all_to_all")
    ]
    one, several = ({key: row[key] for key in row if not key.startswith(("us", "p1", "p9"))} for row in rows[::2])
    times = ("processes", "ceiling", "ceiling_us", "ratio", "dirty")  # a file may have changed meanwhile
    assert {key for key in one if one[key] != several[key]} <= set(times) and several["ceiling_us"] > 0
    assert "jax_ep, rank, 2 processes" in capfd.readouterr().err


@pytest.mark.multiprocess
def test_a_process_of_several_that_ends_badly_is_recorded_and_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(module("exchange"), "GRAPH_FLAGS", "--no_such_flag_of_xla")
    options = ["--layouts", "rank", "--operations", "pair", "--baselines", "--launch", "graph"]
    measure(tmp_path / "bad.json", "--cpu-devices", "2", "--processes", "2", *options)
    (row,) = json.loads((tmp_path / "bad.json").read_text())
    assert row["error"].startswith("failed: process ") and (row["processes"], row["us"]) == (2, None)


def test_processes_that_do_not_divide_the_devices_are_refused(capsys):
    with pytest.raises(SystemExit):
        module("exchange").parse(["--cpu-devices", "4", "--processes", "3"])
    assert "--processes must divide --cpu-devices" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_overlap_measures_what_a_product_between_the_halves_hides(tmp_path, capsys, layout, on_cpu):
    out = tmp_path / "overlap.json"
    options = ["--cases", "expert", "--layouts", layout, "--calls", "2", "--samples", "3", "--product-rows", "8"]
    assert module("overlap").main([*options, "--times", "0.1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("hidden") == 2
    rows = json.loads(out.read_text())
    assert [row["operation"] for row in rows] == ["dispatch_halves", "combine_halves"]
    for row in rows:
        assert set(module("summary").KEYS) <= set(row)
        assert min(row["us"], row["both_us"], row["product_us"]) > 0 and row["mode"] == "reference"
        assert row["hidden"] == pytest.approx(1 - (row["both_us"] - row["product_us"]) / row["us"], abs=0.01)


@pytest.mark.parametrize("operation", ["dispatch_halves", "combine_halves"])
def test_a_product_between_the_halves_stays_between_them(operation):
    """As XLA is told: the product has what the start left, the done has what the product left."""
    overlap, programs = module("overlap"), module("programs")
    setting = programs.Setting.of(Case("by-hand", 5, 8, 2, 8, 4, dtype="float32"), calls=2).in_layout("expert")
    chain, operands = overlap.halves(setting, operation, "auto", None)
    a, w = setting.normal(4, (3, 8), jnp.float32), setting.normal(5, (8, 8), jnp.float32)
    text = str(jax.make_jaxpr(setting.on_every_rank(chain(overlap.products(2))))(*operands, a, w))
    names = re.findall(
        r"jax_ep_(?:dispatch|combine)(?:_weighted)?_(?:start|done)|dot_general|optimization_barrier", text
    )
    start = {"dispatch_halves": "jax_ep_dispatch_start", "combine_halves": "jax_ep_combine_weighted_start"}[operation]
    done = f"jax_ep_{operation.replace('_halves', '')}_done"
    once = [start, "optimization_barrier", *["dot_general"] * 2, "optimization_barrier", done]
    assert names == once * 2


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_chained_calls_compute_what_single_ones_do(layout):
    """A pair brings each row back times the sum of its gates ("rank": times its ranks), so a chain of two has the product."""
    programs = module("programs")
    setting = programs.Setting.of(Case("by-hand", 5, 8, 2, 8, 4, dtype="float32"), calls=2).in_layout(layout)
    x, weights, _ = setting.inputs()
    ((_, pairs, arguments),) = programs.jax_ep_programs(setting, ["pair"])
    if layout == "expert":
        factors = [np.asarray(weights).sum(axis=1)] * 2
    else:
        ranks = setting.case.num_ranks
        factors = [[owners(choices, ranks) for choices in idx.reshape(-1, 2)] for idx in setting.topk_idx]
    np.testing.assert_allclose(jax.jit(pairs)(*arguments), x * np.prod(factors, axis=0)[:, None], rtol=1e-5)
    assert (setting.topk_idx[0] != setting.topk_idx[1]).any()


def emulated_ragged_all_to_all(rows, onto, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """By all_gather: XLA:CPU has no ragged_all_to_all."""
    me = jax.lax.axis_index(axis_name)
    everyones = (jax.lax.all_gather(array, axis_name) for array in (rows, input_offsets, send_sizes, output_offsets))
    for rows, starts, sizes, places in zip(*everyones, strict=True):
        row = jnp.arange(len(onto)) - places[me]
        onto = jnp.where(((row >= 0) & (row < sizes[me]))[:, None], rows[starts[me] + row], onto)
    del recv_sizes
    return onto


def test_baselines_bring_back_their_copies_of_a_token():
    baselines = module("baselines")
    setting = module("programs").Setting.of(Case("by-hand", 5, 8, 2, 8, 4, dtype="float32")).in_layout("expert")
    x, _, (idx,) = setting.inputs()
    num_ranks, num_local = setting.case.num_ranks, setting.case.num_local_experts
    num_owners = [owners(choices, num_ranks) for choices in np.asarray(idx)]
    ragged = baselines.ragged_all_to_all(setting.case, emulated_ragged_all_to_all)
    made = {name: make(setting.case) for name, make in baselines.BASELINES.items()} | {"ragged_all_to_all": ragged}
    copies = {"all_gather+psum_scatter": num_ranks, "all_to_all": np.array(num_owners)[:, None], "ragged_all_to_all": 2}
    for name, parts in made.items():
        back = jax.jit(setting.on_every_rank(lambda *args, parts=parts: parts.combine(*parts.dispatch(*args))))(x, idx)
        np.testing.assert_allclose(back, x * jnp.asarray(copies[name], x.dtype), rtol=1e-6)

    def in_expert_order(x, idx):
        rows, state = ragged.dispatch(x, idx)
        return rows, ragged.group_sizes(state)

    rows, sizes = jax.jit(setting.on_every_rank(in_expert_order))(x, idx)
    capacity = setting.case.max_recv_tokens
    for expert in range(8):
        before = int(sizes[expert - expert % num_local : expert].sum())
        group = np.asarray(rows)[expert // num_local * capacity :][before:][: sizes[expert]]
        np.testing.assert_array_equal(group, np.asarray(x)[(np.asarray(idx) == expert).any(axis=1)])


def test_the_way_of_ragged_all_to_all_lowers_for_gpus():
    programs = module("programs")
    setting = programs.Setting.of(Case("by-hand", 5, 8, 2, 8, 4), calls=2).in_layout("expert")
    for _, f, arguments in programs.baseline_programs(setting, "ragged_all_to_all", ("pair", "moe", "moe_gradient")):
        assert "ragged_all_to_all" in jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


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

    setting = module("programs").Setting.of(Case("uneven", 3, 16, 2, 16, 4)).in_layout(layout)
    case = setting.case

    def dropped(x, idx):
        options = {"max_recv_tokens": case.max_recv_tokens, "expert_capacity": case.expert_capacity}
        recv, _ = jax_ep.dispatch(x, idx, axis_name="expert", num_experts=16, layout=layout, **options)
        return recv.num_dropped

    x, _, (idx,) = setting.inputs()
    assert not jax.jit(setting.on_every_rank(dropped))(x, idx).any()


def test_timing_says_what_a_call_takes():
    timing = module("timing")
    assert timing.Timing.of([3e-6, 1e-6, 2e-6]) == timing.Timing(2.0, 1.2, 2.8, 2.98, 3)
    assert timing.Timing(8.0, 4.0, 12.0, 16.0, 9).over(4) == timing.Timing(2.0, 1.0, 3.0, 4.0, 9)
    f = timing.compiled(lambda x: x + 1, jnp.zeros(3))
    timed = timing.measure(f, jnp.zeros(3), samples=4, warmup=1, calls=2)
    assert 0 < timed.p10 <= timed.median <= timed.p90 and timed.samples == 4
    assert {"machine", "commit", "dirty", "date", "versions", "command"} == set(timing.origin())


def test_recorded_results_fit_the_schema(capsys):
    rows = read_summary(capsys)
    assert rows
    for row in rows:
        assert tuple(row) == module("summary").KEYS + module("summary").NULLABLE
        assert row["commit"] and row["date"] and row["machine"]


# ---- kernels.py: the sweep, with a stand-in for the program that times kernels on GPUs ---------------------------------

STAND_IN = """
import json, os, sys, time
print(json.dumps({"gpus": ["GPU"] * 2, "multiprocessors": 132, "driver": 1, "runtime": 1}), flush=True)
for line in sys.stdin:
    mode, operations, layout, ranks, tokens, topk, *_, routing = line.split()
    assert os.path.getsize(routing) == 4 * int(ranks) * int(tokens) * int(topk)
    if tokens == "1":
        print("kernels.cu:1 cudaMalloc: out of memory", flush=True)
        os._exit(2)
    if tokens == "8":
        print(json.dumps({"failed": "rank 0 waited for rank 1"}), flush=True)
    elif tokens == "32":
        time.sleep(60)
    else:
        print(json.dumps({name: [30.0, 10.0, 20.0] for name in operations.split(",")}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return ["--program", sys.executable, str(path), "--no-ceiling"]


def sweep(tmp_path, *options):
    out = tmp_path / "kernels.json"
    fixed = ["--out", str(out), "--layouts", "rank", "--modes", "high_throughput"]
    assert module("kernels").main([*fixed, *options]) == 0
    return json.loads(out.read_text())


def test_a_sweep_records_what_fails_and_goes_on(tmp_path, stand_in):
    options = ["--axes", "tokens", "--bases", "64", "--tokens", "1", "8", "32", "128", "--case-timeout", "3"]
    rows = sweep(tmp_path, *options, "--operations", "dispatch", "combine_weighted", *stand_in)
    assert {row["tokens"]: row["error"] for row in rows} == {
        64: None,
        1: "failed: kernels.cu:1 cudaMalloc: out of memory; ended with status 2",
        8: "failed: rank 0 waited for rank 1",
        32: "failed: no answer in time",
        128: None,
    }
    assert {row["tokens"]: row["us"] for row in rows} == {64: 20.0, 1: None, 8: None, 32: None, 128: 20.0}
    assert {row["operation"] for row in rows} == {"dispatch"}  # rows of "rank" have no gates
    for row in rows:
        assert set(module("summary").KEYS) <= set(row)


def test_a_sweep_ends_when_its_time_is_over(tmp_path, stand_in):
    rows = sweep(tmp_path, "--quick", "--budget-s", "-1", *stand_in)
    assert len(rows) > 10 and {row["error"] for row in rows} == {"skipped: --budget-s -1 is over"}


def test_a_sweep_skips_what_the_machine_cannot_hold(tmp_path, stand_in):
    rows = sweep(tmp_path, "--axes", "sms", "--bases", "64", "--ranks", "4", "3", "--sms", "64", "67", *stand_in)
    assert {(row["ranks"], row["sms"]): row["error"] for row in rows} == {
        **{(4, sms): None for sms in (24, 64)},
        (4, 67): "skipped: 2 x 67 SMs of a GPU that has 132",
        **{(3, sms): "skipped: 256 experts on 3 ranks" for sms in (24, 64, 67)},
    }
    assert {row["gpus"] for row in rows} == {2}


def test_a_program_that_does_not_start_is_told_in_a_sentence(tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text("print('no driver')")
    assert (
        module("kernels").main(["--out", str(tmp_path / "none.json"), "--program", sys.executable, str(program)]) == 1
    )
    assert "does not start: no driver; ended with status 0" in capsys.readouterr().err


def test_the_quick_sweep_is_short_and_the_whole_one_has_every_axis():
    kernels = module("kernels")
    both = ["--out", "x", "--modes", "high_throughput", "low_latency"]
    quick, whole = (kernels.plan(kernels.parse([*both, *more]), 4) for more in (["--quick"], []))
    assert {(point.mode, point.tokens) for point in quick} >= {("low_latency", 128), ("high_throughput", 8192)}
    assert all(point.tokens <= 1024 for point in whole if point.mode == "low_latency")
    assert len(quick) <= 40 and len(set(whole)) == len(whole)
    assert {point.sms for point in whole} == {4, 8, 12, 16, 20, 24, 32, 64}
    assert {point.tokens for point in whole} >= {1, 128, 4096, 8192} and len({point.model for point in whole}) == 5
    assert {(point.wire, point.routing) for point in whole} >= {("fp8", "uniform"), (None, "skewed")}


def test_ranks_that_share_a_gpu_cross_no_link_to_each_other():
    kernels, traffic = module("kernels"), module("traffic")
    machine = kernels.Machine(("GPU", "GPU"), 132)
    point = kernels.Point(4, "rank", 16, model="mixtral-8x7b")
    topk_idx = np.tile(np.array([0, 4], np.int32), (4, 16, 1))  # ranks 0 and 2, both on the first GPU
    np.testing.assert_array_equal(machine.crossing(point, topk_idx), [[0, 0], [64, 0]])
    ceiling = kernels.ceiling_of(point, {(24, 8192): 100.0, (24, 4096): 50.0, (12, 8192): 10.0}, 8200)
    assert (ceiling.bytes_per_second, ceiling.shared) == (100e9, False)
    assert kernels.ceiling_of(point, {}, 8192) is None
    assert traffic.row_bytes(point.case, "fp8") == sum(
        kernels.Point(4, "rank", 1, "mixtral-8x7b", wire="fp8").row_bytes
    )


def test_a_wire_is_encoded_by_dispatch_and_carried_by_the_others():
    kernels = module("kernels")
    plain, wire = (kernels.Point(2, "expert", 64, wire=wire) for wire in (None, "fp8"))
    back = ["combine", "combine_weighted", "combine_grad"]
    assert plain.operations(kernels.OPERATIONS) == ["dispatch", "dispatch_cached", *back]
    assert wire.operations(kernels.OPERATIONS) == ["dispatch", "dispatch_quantized", "dispatch_cached"]
    sizes = {"max_recv_tokens": 100, "expert_capacity": None}
    line = kernels.request(wire, ["dispatch"], sizes, 3, 2, Path("routing"))
    assert line == "high_throughput dispatch expert 2 64 8 256 100 0 7168 224 fp8 24 3 2 0 routing"


def test_the_kernels_that_stand_without_xla_are_found():
    native = module("native")
    sources = {path.relative_to(ROOT).as_posix() for path in native.kernel_sources()}
    assert {"ffi/dispatch/dispatch.cu", "ffi/combine/combine.cu", "ffi/group/group.cc"} <= sources
    assert not any(path.endswith(("_ffi.cc", "module.cc", "member.cc")) for path in sources)


@pytest.mark.parametrize("name", ["uniform", "skewed"])
def test_routings_name_distinct_experts_and_skewed_ones_prefer_some(name):
    case = Case(name, 2000, 16, 4, 32, 2)
    idx = module("traffic").draw_routing(case, name, seed=5)
    assert idx.shape == (2, 2000, 4) and idx.dtype == np.int32 and idx.min() == 0 and idx.max() == 31
    assert (np.diff(np.sort(idx, axis=-1), axis=-1) > 0).all()
    load = np.sort(np.bincount(idx.reshape(-1), minlength=32)) / idx.size * 32
    # Weights of Zipf's law with exponent 1/2: the most wanted of 32 has 3.2 times the mean, less what a token cannot choose twice.
    assert (load[-1] < 1.2) if name == "uniform" else (2.3 < load[-1] < 3.2 and load[0] < 0.7)
    assert (module("traffic").draw_routing(case, name, seed=5) == idx).all()


# ---- tune.py: the table behind mode="auto" ---------------------------------------------------------------------------


def test_the_crossover_loses_least_over_what_was_measured():
    crossover = module("tune").crossover
    assert crossover({1: (10, 30), 64: (20, 30), 256: (50, 40), 1024: (200, 90)}) == 64
    assert crossover({1: (10, 9), 64: (20, 10)}) == 0
    assert crossover({1: (10, 11), 64: (12, 20)}) == 64
    assert crossover({1: (10.0, 9.9), 8: (10, 20), 64: (40, 30)}) == 8  # a hair's breadth at one token decides nothing


def test_tuning_writes_entries_beside_those_of_other_machines(tmp_path):
    ranks = min(2, len(jax.devices()))
    table, rows = tmp_path / "tuning.json", tmp_path / "rows.json"
    other = {"device": "other", "ranks": 2, "layout": "rank", "row_bytes": 32, "low_latency_up_to": 7}
    table.write_text(json.dumps([other]))
    sizes = [
        "--tokens",
        "2",
        "3",
        "--ranks",
        str(ranks),
        "--hidden",
        "16",
        "--topk",
        "2",
        "--experts",
        "4",
        "--layouts",
        "rank",
    ]
    options = ["--wires", "none", "--calls", "1", "--samples", "2", "--table", str(table), "--rows", str(rows)]
    for device in ("this", "this", "that"):
        assert module("tune").main([*sizes, *options, "--device", device]) == 0
    kept, that, this = json.loads(table.read_text())
    assert kept == other and (that["device"], this["device"]) == ("that", "this")
    assert {name: this[name] for name in ("ranks", "layout", "row_bytes")} == {
        "ranks": ranks,
        "layout": "rank",
        "row_bytes": 32,
    }
    assert this["low_latency_up_to"] in (0, 2, 3) and set(this["us"]) == {"2", "3"}
    measured = json.loads(rows.read_text())
    assert [(row["tokens"], row["mode"]) for row in measured] == [
        (tokens, mode) for tokens in (2, 3) for mode in ("low_latency", "high_throughput")
    ]


# ---- decode.py: steps of several layers, and single calls ------------------------------------------------------------


def decode_options(*more):
    decode = module("decode")
    sizes = ["--tokens", "4", "--hidden", "16", "--experts", "8", "--topk", "2", "--ranks", "2"]
    options = decode.parse([*sizes, "--idle-ms", "0", "1", "--late-us", "0", "2000", "--case-budget-s", "1", *more])
    decode.settle(options)
    return options


def measure_decode(out, *more):
    sizes = ["--tokens", "4", "--hidden", "16", "--experts", "8", "--topk", "2", "--ranks", "2", "--out", str(out)]
    assert module("decode").main([*sizes, "--idle-ms", "0", "1", "--late-us", "0", "2000", *more]) == 0
    return json.loads(out.read_text())


def test_steps_and_calls_of_decode_size_are_measured(tmp_path, capsys, on_cpu):
    rows = measure_decode(tmp_path / "decode.json", "--quick")
    summary, two = module("summary"), ("dispatch", "combine")
    kinds = [(row["part"], row["operation"], row["wire"], row["idle_ms"], row["by"]) for row in rows]
    assert kinds == [
        *(("programs", name, wire, None, "jax_ep") for name, wire in (("dispatch", None), ("dispatch", "fp8"))),
        ("programs", "combine", None, None, "jax_ep"),
        ("step", "step", None, None, "jax_ep"),
        *(("idle", name, None, pause, "jax_ep") for name in two for pause in (0, 1)),
        *(("late", name, None, None, "jax_ep") for name in two for _ in (0, 2000)),
        ("step", "step", None, None, "all_gather+psum_scatter"),
    ]
    for row in rows:
        assert set(summary.KEYS + summary.NULLABLE) <= set(row)
        assert (row["error"], row["graph"], row["ranks"], row["clock"]) == (None, False, 2, "host") and row["of"]
        assert (row["layers"], row["expert_hidden"]) == ((2, 16) if row["part"] == "step" else (None, None))
        assert (row["host_us"] is not None) == (row["part"] in ("step", "idle"))
        assert row["part"] == "late" or 0 < row["p10_us"] <= row["us"] <= row["p99_us"]
        assert row["part"] != "step" or 0 < row["host_us"] < row["waited_us"]
    for even, behind in zip(*[iter(row for row in rows if row["part"] == "late")] * 2, strict=True):
        assert even["delay_us"] == 0 < behind["delay_us"]  # how late depends on what else this machine does
    told = capsys.readouterr()
    assert "decode: 2 ranks, 4 tokens, 16 hidden" in told.out and "4 x 16 step all_gather+psum_scatter" in told.err


def test_of_decode_what_fails_and_what_is_not_reached_are_rows(tmp_path, monkeypatch, on_cpu):
    decode = module("decode")
    rows = measure_decode(tmp_path / "none.json", "--budget-s", "-1")
    assert {row["error"] for row in rows} == {"skipped: --budget-s -1 is over"} and {row["us"] for row in rows} == {
        None
    }
    assert {row["part"] for row in rows} == {"programs", "step", "idle", "late"}
    assert {(row["operation"], row["wire"]) for row in rows} >= {("dispatch", "fp8"), ("combine", "logfmt10")}

    def fails(point, setting, options):
        yield module("timing").Timing.of([1e-6]), {"idle_ms": 0}
        raise ValueError("no memory\nat all")

    monkeypatch.setitem(decode.MEASURES, "idle", fails)
    options = decode_options()
    rows = list(decode.measure(decode.Point("idle", "dispatch", 4, 16, "rank", graph=False), options))
    assert [(row["idle_ms"], row["us"], row["error"]) for row in rows] == [
        (0, 1.0, None),
        (1, None, "failed: ValueError: no memory"),
    ]


def test_a_graph_is_asked_for_and_compressed_calls_are_measured(on_cpu):
    decode, options = module("decode"), decode_options()
    for operation, wire in (("dispatch", "fp8"), ("combine", "logfmt10")):
        (row,) = decode.measure(decode.Point("programs", operation, 4, 16, "expert", wire), options)
        assert row["error"] is None and row["graph"] and row["us"] > 0
    case = Case("by-hand", 3, 7168, 2, 4, 2)
    assert module("traffic").row_bytes(case, "logfmt10") == pytest.approx(0.641 * 7168 * 2, rel=1e-3)
    setting = decode.setting_at(decode.Point("programs", "combine", 4, 16, "expert", "logfmt10"), options)
    (plain,), (wire,) = (module("exchange").crossing_bytes(setting, "combine", wire) for wire in (None, "logfmt10"))
    assert 0 < wire.sum() < plain.sum()


def test_what_matters_most_is_measured_first_and_nothing_twice():
    decode = module("decode")
    plans = {}
    for name, more in (("quick", ["--quick"]), ("whole", [])):
        options = decode.parse(more)
        options.launch, options.clock = ["graph", "stream"], "the device's"
        plans[name] = decode.plan(options)
    first = [(point.operation, point.tokens, point.wire, point.graph) for point in plans["quick"][:10]]
    assert first[:6] == [
        (name, tokens, wire, True)
        for tokens in (128, 1)
        for name, wire in (("dispatch", None), ("dispatch", "fp8"), ("combine", None))
    ]
    assert first[6:] == [("step", tokens, None, graph) for tokens in (128, 1) for graph in (True, False)]
    assert {point.part for point in plans["quick"]} == set(decode.PARTS) and len(plans["quick"]) < 40
    whole = plans["whole"]
    assert whole[: len(plans["quick"])] == plans["quick"] and len(set(whole)) == len(whole)
    steps = {(point.tokens, point.hidden) for point in whole if point.part == "step"}
    assert steps == {(t, 7168) for t in (1, 8, 32, 64, 128, 256, 512)} | {
        (t, h) for t in (1, 128) for h in (2048, 2880, 4096)
    }


def test_a_step_is_the_same_by_batches_by_groups_and_by_collectives(on_cpu):
    decode, programs = module("decode"), module("programs")
    setting = programs.Setting.of(Case("step", 6, 16, 2, 8, 4, dtype="float32"), expert_hidden=8)
    x, _, _ = setting.inputs()
    args = (x, setting.normal(6, (2, 16, 8), jnp.float32), *setting.experts())
    of_batches, of_groups = (decode.with_room(setting, layout) for layout in ("batched", "expert"))
    results = []
    for case, layer in (
        (of_batches.case, decode.ours(of_batches.case, "auto")),
        (of_groups.case, decode.ours(of_groups.case, "auto")),
        (of_batches.case, decode.by_collectives(of_batches.case)),
    ):
        f = decode.step(case, layer)
        results.append(jax.jit(setting.on_every_rank(f))(*args))
    again, end = jax.jit(setting.on_every_rank(decode.repeatable(f, clocked=False)))(*args)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(again, x)
    assert np.abs(results[0] - x).max() > 0.1 and end.shape == (4,)


def test_clocks_of_ranks_are_read_modulo_what_they_count_to():
    reads = [np.array(ns, np.uint32).view(np.int32) for ns in ([2**32 - 500, 7], [500, 1507], [2500, 2000])]
    np.testing.assert_allclose(module("decode").ticks(reads), [1500e-9, 2000e-9])
    results = iter([jnp.asarray(read) for read in reads for _ in (0, 1)])
    between = module("decode").queued(lambda: next(results), 6, 1, 10)
    np.testing.assert_allclose(between, [1500e-9, 0, 2000e-9, 0], atol=1e-12)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_clocks_and_late_ranks_are_kernels_of_one_graph(monkeypatch, on_cpu):
    """As XLA compiles them for two H200s that are not there."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt")
    if jax.__version_info__[:2] != (0, 11):
        pytest.skip("data/h200.txtpb is of jax 0.11")
    from jax.experimental import topologies

    from jax_ep._src import group

    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: ((0, 1),))
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: True)
    config = (ROOT / "tests" / "data" / "h200.txtpb").read_text()
    devices = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x2").devices
    decode, programs = module("decode"), module("programs")
    case = Case("graph", 8, 256, 2, 8, 2)
    idx = np.stack([module("traffic").draw_routing(case, "uniform", seed) for seed in range(3)])
    setting = programs.Setting(case, jax.sharding.Mesh(np.array(devices), ("expert",)), idx).in_layout("rank")
    dispatch = programs.dispatch_of(setting.case, None, "low_latency")

    def call(token, i, x, weights, routings):
        return programs.first(dispatch(x, weights, programs.after(token, routings[i]))[0].x)

    def array(shape, dtype):
        sharding = jax.sharding.NamedSharding(setting.mesh, jax.P("expert"))
        return jax.ShapeDtypeStruct((2 * shape[0], *shape[1:]), dtype, sharding=sharding)

    routings = (array((8, 2), jnp.int32),) * 3
    args = (array((8, 256), jnp.bfloat16), array((8, 2), jnp.float32), routings)
    f = decode.launched(decode.chain(call, 3, clocked=True, each=True, late_on="cuda"), setting, graph=True)
    text = f.trace(args, array((1,), jnp.int32)).lower(lowering_platforms=("cuda",)).compile().as_text()
    calls = [line for line in text.splitlines() if " custom-call(" in line]
    order = [re.search(r"/(spin|now)/pallas_call|\"jax_ep_(low_latency_dispatch)\"", line) for line in calls]
    assert [found[1] or found[2] for found in order] == ["spin", "now", "low_latency_dispatch"] * 3 + ["now"]


# ---- model.py and plots.py -------------------------------------------------------------------------------------------


def test_distinct_ranks_and_nodes_of_a_token_are_those_of_drawn_routings():
    model, traffic = module("model"), module("traffic")
    exchange = model.Exchange(tokens=4000, topk=4, experts=32, ranks=8, ranks_per_node=2)
    idx = traffic.draw_routing(Case("", 4000, 16, 4, 32, 8), "uniform", seed=0)[0]
    ranks = sum(((idx // 4) == rank).any(axis=1).sum() for rank in range(8))
    nodes = sum(((idx // 8) == node).any(axis=1).sum() for node in range(4))
    assert exchange.rows_of_ranks == pytest.approx(ranks, rel=0.02)
    assert exchange.rows_of_nodes == pytest.approx(nodes, rel=0.02)
    limited = model.Exchange(tokens=1, topk=8, experts=256, ranks=64, ranks_per_node=8, groups=4)
    assert limited.rows_of_nodes < 4 < model.Exchange(1, 8, 256, 64, 8).rows_of_nodes


def test_a_fit_finds_the_machine_that_made_the_rows():
    model = module("model")
    true = model.Machine(
        dispatch_latency=12, cached_latency=8, gather_latency=9, stream_latency=15, send=45, store=55, gather=30, stream=70,
        send_item=0.1, store_item=0.2, gather_item=0.3, stream_item=0.4, weigh=1.4, memory=3000, power=2.5,
    )  # fmt: skip
    rows = []
    sizes = ((1024, 24), (2048, 4), (4096, 8), (4096, 24), (4096, 64), (1024, 132), (16384, 24))
    for (tokens, sms), layout, wire, hidden in itertools.product(
        sizes, ("rank", "expert"), (None, "fp8"), (7168, 2880)
    ):
        for operation in ("dispatch", "dispatch_cached", "combine", "combine_weighted"):
            if layout == "expert" or operation != "combine_weighted":
                row = {"level": "kernel", "error": None, "gpus": 4, "ranks": 4, "mode": "high_throughput", "case": "x"}
                row |= {
                    "tokens": tokens,
                    "topk": 8,
                    "experts": 256,
                    "hidden": hidden,
                    "dtype": "bfloat16",
                    "wire": wire,
                }
                row |= {"layout": layout, "operation": operation, "sms": sms, "ceiling_us": None, "routing": "uniform"}
                row |= {"max_recv_tokens": 4 * tokens if layout == "rank" else 10 * tokens, "us": 1.0}
                row["us"] = true.us(model.work_of(row, true), sms)
                rows.append(row)
    assert all(map(model.fits, rows))
    assert not any(model.fits(rows[0] | other) for other in ({"gpus": 1}, {"tokens": 128}, {"us": None}))
    found = model.fit(rows)
    for name in model.FITTED:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.05)
    assert max(abs(model.error(row, found)) for row in rows) < 0.01
    said = []
    model.report(rows, said.append)
    assert len(said) > len(rows) and "worst" in said[-1]
    foreseen = model.foresight(rows)
    assert foreseen.keys() == model.SPLITS.keys()
    assert all(count + len(errors) == len(rows) for count, errors in foreseen.values())
    assert max(map(abs, foreseen["8, 24 and 64 multiprocessors"][1])) < 0.02


def test_the_model_is_within_a_fifth_of_published_figures():
    figures = module("model").published()
    assert len(figures) == 24 and sum(figure.fitted for figure in figures) == 1
    for figure in figures:
        assert abs(figure.error) < 0.2, figure


def test_more_nodes_take_longer_and_a_model_of_nothing_but_latency_is_its_latency():
    model = module("model")
    times = [model.across_nodes(nodes, 1024, model.Machine())[1] for nodes in (2, 4, 8, 16, 32, 64)]
    assert times == sorted(times)
    assert model.Machine().us(model.Work(link_us=0.0), sms=24) == model.Machine().dispatch_latency


def synthetic_rows():
    """Of every kind that a picture shows; numbers of no meaning."""
    row = dict.fromkeys(module("summary").KEYS) | {
        "machine": "2 x GPU",
        "commit": "c",
        "date": "2026-01-01",
        "by": "jax_ep",
    }
    row |= {
        "ranks": 2,
        "gpus": 2,
        "hidden": 7168,
        "graph": False,
        "routing": "uniform",
        "case": "deepseek-v3",
        "ratio": 2.0,
    }
    kernel = row | {"level": "kernel", "mode": "high_throughput", "ceiling_us": 5.0, "layout": "rank"}
    jit = row | {"level": "jit", "operation": "pair", "layout": "expert", "sms": None}
    return [
        *(
            kernel | {"operation": name, "tokens": 64, "sms": sms, "us": 10.0}
            for name in ("dispatch", "combine")
            for sms in (4, 8)
        ),
        *(kernel | {"operation": "dispatch", "tokens": tokens, "sms": 8, "us": 10.0} for tokens in (1, 128)),
        *(jit | {"mode": m, "tokens": t, "us": 9.0} for m in ("low_latency", "high_throughput") for t in (1, 64)),
        jit | {"by": "all_to_all", "tokens": 64, "us": 20.0, "layout": None},
        *(
            row
            | {"operation": "step", "layout": "batched", "mode": "low_latency", "graph": graph, "tokens": tokens}
            | {"us": 300.0, "host_us": 90.0, "layers": 4}
            for graph in (True, False)
            for tokens in (1, 128)
        ),
        kernel | {"operation": "dispatch", "tokens": 64, "sms": 16, "us": None, "error": "failed: x"},
    ]


def test_every_picture_is_drawn_where_there_is_data_and_none_without(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(synthetic_rows()))
    pictures = {f"{picture.name}.svg" for picture in module("plots").PICTURES}
    assert module("plots").main([str(rows), "--folder", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == pictures
    text = (tmp_path / "speed-sms.svg").read_text()
    assert "2 x GPU" in text and "push ceiling" in text
    for path in tmp_path.glob("*.svg"):
        path.unlink()
    capsys.readouterr()
    assert module("plots").main([str(rows), "--folder", str(tmp_path), "--machine", "another"]) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "model-nodes.svg"
    }  # the model needs no row of this machine
    assert capsys.readouterr().err.count("no data of another") == len(pictures) - 1


def test_the_crossover_of_the_table_is_marked(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plots, table = module("plots"), tmp_path / "tuning.json"
    entry = {"device": "GPU", "ranks": 2, "layout": "expert", "row_bytes": 14336, "low_latency_up_to": 64}
    table.write_text(json.dumps([entry | {"layout": "rank", "low_latency_up_to": 1}, entry]))
    monkeypatch.setattr(module("tune"), "TABLE", table)
    rows = [row for row in synthetic_rows() if row["operation"] == "pair"]
    assert plots.crossover(rows[0]) == 64
    for other in ({"hidden": 2880}, {"ranks": 4}, {"machine": "2 x other"}, {"wire": "fp8"}):
        assert plots.crossover(rows[0] | other) is None
    figure = plots.modes(rows)
    assert [text.get_text() for text in figure.axes[0].texts] == ['"auto": low latency up to 64']


def test_pictures_of_the_readme_are_there_and_small():
    named = re.findall(r"!\[[^\]]*\]\((docs/images/[^)]+)\)", (ROOT / "README.md").read_text())
    assert any("speed" in name for name in named)
    for name in named:
        assert (ROOT / name).is_file()
        assert (ROOT / name).suffix != ".svg" or (ROOT / name).stat().st_size < 200_000
