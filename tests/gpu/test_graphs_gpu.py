"""Layers inside CUDA graphs, as XLA makes them (command buffers), and launched one by one: the oracle's bits every time.

A graph is captured once and then replayed, or updated where buffers have moved: here some results are kept and most are
dropped, so that both happen. No handler runs in a replay: all that changes from call to call lies in device memory.
"""

import jax
import numpy as np
import pytest
from cases import case
from jax import lax
from jax.experimental.compute_on import compute_on
from layer import draw_many, layer, oracle_layer, place
from spmd import assert_same_bits, dispatch, sharded, split_ranks

import jax_ep

pytestmark = pytest.mark.gpu

CALLS, LAYERS = 60, 3
EVERYTHING = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES,CONDITIONAL,WHILE"
MODES = {
    "default": {},  # of jax 0.11.2: calls are in graphs, with at least four neighbours
    "launched": {"xla_gpu_enable_command_buffer": ""},
    "calls": {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1},
    "everything": {"xla_gpu_enable_command_buffer": EVERYTHING, "xla_gpu_graph_min_graph_size": 1},
}


def unrolled(case):
    def f(x, topk_idx, weights):
        for i in range(LAYERS):
            x = layer(case, x[0] if i == 0 else x, topk_idx[i], weights[i])
        return x

    return f


def halved(case):
    """In halves: starts of high throughput are launched beside the graphs, dones in them."""

    def f(x, topk_idx, weights):
        for i in range(LAYERS):
            x = x[0] if i == 0 else x
            pending = dispatch(case, x, topk_idx[i], weights[i], start_only=True, mode="high_throughput")
            recv, handle = jax_ep.dispatch_done(pending)
            gates = None if case.layout == "rank" else recv.weights
            x = jax_ep.combine_done(jax_ep.combine_start(-recv.x, handle, gates))
        return x

    return f


def looped(case):
    """As many layers as the first choice of all ranks says: none to LAYERS."""

    def f(x, topk_idx, weights):
        count = lax.pmax(topk_idx[0, 0, 0], case.axis_name) % (LAYERS + 1)
        return lax.fori_loop(0, count, lambda i, x: layer(case, x, topk_idx[i], weights[i]), x[0])

    return f


def oracle_of(case, kind, x, topk_idx, weights):
    count = topk_idx[:, 0, 0, 0].max() % (LAYERS + 1) if kind is looped else LAYERS
    out = x[:, 0]
    for i in range(count):
        out = oracle_layer(case, out, topk_idx[:, i], weights[:, i])
    return out


def program(case, kind, mode):
    return jax.jit(sharded(case, kind(case), check_vma=False), compiler_options=MODES[mode])


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
@pytest.mark.parametrize("kind", [unrolled, halved, looped])
@pytest.mark.parametrize("mode", MODES)
def test_replays_with_changing_data(mode, kind, layout):
    c = case(layout)
    f = program(c, kind, mode)
    kept = []
    for seed in range(CALLS):
        inputs = draw_many(c, seed, LAYERS)
        got = f(*place(c, inputs))
        if seed % 5 == 0:
            kept.append((seed, got))  # its memory is not free for the next call
        assert_same_bits(split_ranks(got, c.num_ranks), oracle_of(c, kind, *inputs), f"call {seed}")
    for seed, got in kept:
        assert_same_bits(split_ranks(got, c.num_ranks), oracle_of(c, kind, *draw_many(c, seed, LAYERS)), f"kept {seed}")


def test_replays_in_flight_together():
    c = case("expert")
    f = program(c, unrolled, "calls")
    inputs = [draw_many(c, seed, LAYERS) for seed in range(CALLS)]
    placed = [place(c, args) for args in inputs]
    for result, args in zip([f(*args) for args in placed], inputs, strict=True):
        assert_same_bits(split_ranks(result, c.num_ranks), oracle_of(c, unrolled, *args))


def side_by_side(case, stream):
    """LAYERS layers that do not depend on each other, every second of them on a stream of its own."""

    def one(*args):
        return layer(case, *args)

    beside = compute_on(one, compute_type=f"gpu_stream:{stream}", out_memory_spaces=jax.memory.Space.Device)

    def f(x, topk_idx, weights):
        return jax.numpy.stack([(beside if i % 2 else one)(x[i], topk_idx[i], weights[i]) for i in range(LAYERS)])

    return f


@pytest.mark.parametrize("stream", ["1", "collective"])
def test_calls_beside_the_main_stream_keep_the_order_of_the_group(stream):
    c = case("expert")
    f = jax.jit(sharded(c, side_by_side(c, stream), check_vma=False), compiler_options=MODES["launched"])
    inputs = [draw_many(c, seed, LAYERS) for seed in range(CALLS)]
    placed = [place(c, args) for args in inputs]
    assert "stream_annotation" in f.lower(*placed[0]).as_text()
    for result, args in zip([f(*args) for args in placed], inputs, strict=True):
        got = split_ranks(result, c.num_ranks)
        for i in range(LAYERS):
            assert_same_bits(got[:, i], oracle_layer(c, *(a[:, i] for a in args)), f"layer {i}")


def test_graphs_and_launches_by_turns_in_one_group():
    c = case("expert")
    programs = [(kind, program(c, kind, mode)) for mode in MODES for kind in (unrolled, looped)]
    turns = np.random.default_rng(0).integers(0, len(programs), CALLS)
    inputs = [draw_many(c, seed, LAYERS) for seed in range(CALLS)]
    results = [programs[k][1](*place(c, args)) for k, args in zip(turns, inputs, strict=True)]
    for k, result, args in zip(turns, results, inputs, strict=True):
        assert_same_bits(split_ranks(result, c.num_ranks), oracle_of(c, programs[k][0], *args), f"program {k}")
