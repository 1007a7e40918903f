"""The programs as XLA's GPU compiler makes them for four H200s, on a machine without one.

A scheduled module's order is the order of launches: here it is read how often each kernel is launched, in scan and grad
too, and what else crosses the link. Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of this jax; no GPU, no nvcc.
data/h200.txtpb is the description of the GPU that XLA writes itself (--xla_dump_to on an H200).
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._src import cuda, group, logfmt, quantized, reference, tuning

if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
    pytest.skip("needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("compiles for GPUs that are not there; here are some", allow_module_level=True)
if jax.__version_info__[:2] != (0, 11):
    pytest.skip("data/h200.txtpb is of jax 0.11", allow_module_level=True)

R, T, H, E, K, LAYERS = 4, 128, 256, 16, 4, 3
GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL"}
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
# How a product is tiled and how well a kernel is compiled changes no launch, and is half of what compiling takes.
QUICK = {
    "xla_gpu_autotune_level": 0,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_gpu_disable_gpuasm_optimizations": True,
}


@pytest.fixture(scope="module")
def mesh():
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from jax.experimental import topologies

    config = (Path(__file__).parent / "data" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{R}")
    return Mesh(np.array(topology.devices), ("expert",))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_kept():
    """JAX cannot read back what it has compiled for a topology, so it must not be in the run's cache (conftest.py)."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch):
    """The devices of a topology cannot be asked for peer access or memory: say that they have it."""
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: (tuple(range(R)),))
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: True)
    monkeypatch.setattr(group, "make_landings", lambda groups, window_bytes: True)


def moe(x, router, scale, layout="expert", wire=None, mode="high_throughput", halves=False):
    """One MoE layer of a rank: bf16[T, H], bf16[H, E], bf16[H, H] -> bf16[T, H]."""
    weights, topk_idx = jax.lax.top_k(jax.nn.softmax((x @ router).astype(jnp.float32)), K)
    sizes = {"expert_capacity": T} if layout == "batched" else {"max_recv_tokens": 5 * T}
    static = {"axis_name": "expert", "num_experts": E, "layout": layout, "wire": wire, "mode": mode, **sizes}
    if halves:
        recv, handle = jax_ep.dispatch_done(jax_ep.dispatch_start(x, topk_idx, weights, **static))
    else:
        recv, handle = jax_ep.dispatch(x, topk_idx, weights, **static)
    rows = recv.x if wire is None else jax_ep.dequantize(recv.x)
    y = jax.nn.silu(rows @ scale)
    gates = None if layout == "rank" else recv.weights
    if halves:
        return jax_ep.combine_done(jax_ep.combine_start(y, handle, gates))
    return jax_ep.combine(y, handle, gates)


def network(mesh, remat=None, **kwargs):
    """LAYERS layers in a scan: x, routers [LAYERS, H, E], scales [LAYERS, H, H] -> x."""

    def layer(x, params):
        return x + moe(x, *params, **kwargs)

    step = layer if remat is None else jax.checkpoint(layer, policy=remat)

    def f(x, routers, scales):
        return jax.lax.scan(lambda x, params: (step(x, params), None), x, (routers, scales))[0]

    return jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))


def gradient(f):
    return jax.grad(lambda *args: (f(*args).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))


def compile_for_gpus(mesh, f, options=None):
    def aval(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    args = aval((R * T, H), P("expert")), aval((LAYERS, H, E), P()), aval((LAYERS, H, H), P())
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).compile(QUICK | (options or {}))


def launches(compiled):
    """Kernels of this package, in the order of the module's text; but for the reference's question who is masked."""
    return re.findall(r'custom_call_target="jax_ep_(?!is_dead)(\w+)"', compiled.as_text())


def collectives(compiled):
    """What crosses the link besides."""
    names = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    return re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_a_layer_is_one_dispatch_and_one_combine_and_nothing_else_on_the_link(mesh, layout):
    compiled = compile_for_gpus(mesh, network(mesh, layout=layout))
    assert launches(compiled) == ["dispatch", "combine"]
    assert collectives(compiled) == []


@pytest.mark.parametrize("options", [NO_GRAPHS, GRAPHS], ids=["launched", "graphs"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_scan_and_grad_launch_each_call_once(mesh, layout, options):
    """XLA 0.11.2 launched a dispatch twice whose rows are a residual of scan; a barrier keeps it from that."""
    compiled = compile_for_gpus(mesh, gradient(network(mesh, layout=layout)), options)
    back = "dispatch_cached" if layout == "rank" else "combine_grad"
    assert launches(compiled) == ["dispatch", "combine", back, "combine"]
    assert set(collectives(compiled)) <= {"all-reduce"}  # of the replicated parameters' gradients


def test_remat_repeats_the_dispatch_unless_the_policy_saves_it(mesh):
    names = ("jax_ep_dispatch", "jax_ep_handle")
    everything = compile_for_gpus(mesh, gradient(network(mesh, remat=jax.checkpoint_policies.nothing_saveable)))
    saved = compile_for_gpus(mesh, gradient(network(mesh, remat=jax.checkpoint_policies.save_only_these_names(*names))))
    assert launches(everything) == ["dispatch", "combine", "dispatch", "combine_grad", "combine"]
    assert launches(saved) == ["dispatch", "combine", "combine_grad", "combine"]


def encoded_dispatch(compiled):
    """Types of the results and number of the operands of the one dispatch in a module's text."""
    ((results, operands),) = re.findall(
        r"= \((.*?)\) custom-call\((.*?)\).*jax_ep_(?:low_latency_)?dispatch\"", compiled.as_text()
    )
    return results, operands.count("%")


@pytest.mark.parametrize("wire", ["fp8", "fp8_ue8m0", "mxfp8"])
@pytest.mark.parametrize("mode", ["high_throughput", "low_latency"])
def test_kernels_encode_a_wire_format_themselves(mesh, mode, wire):
    compiled = compile_for_gpus(mesh, network(mesh, wire=wire, mode=mode))
    prefix = "low_latency_" if mode == "low_latency" else ""
    assert launches(compiled) == [f"{prefix}dispatch", f"{prefix}combine"]
    results, num_operands = encoded_dispatch(compiled)
    assert f"f8e4m3fn[{5 * T},{H}]" in results and num_operands == 3  # x, weights, topk_idx


def test_the_derivative_of_a_wire_format_launches_each_call_once(mesh):
    compiled = compile_for_gpus(mesh, gradient(network(mesh, wire="fp8")))
    assert launches(compiled) == ["dispatch", "combine", "combine_grad", "combine"]
    results, _ = encoded_dispatch(compiled)
    assert f"f8e4m3fn[{5 * T},{H}]" in results and f"f32[{5 * T},{H // 128}]" in results


def test_rows_that_the_kernel_does_not_encode_are_encoded_by_xla(mesh, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_ENCODED_HIDDEN", H - 16)
    compiled = compile_for_gpus(mesh, network(mesh, wire="fp8"))
    assert launches(compiled) == ["dispatch", "combine"]
    results, num_operands = encoded_dispatch(compiled)
    assert f"f8e4m3fn[{5 * T},{H}]" in results and num_operands == 4  # values and scales instead of x


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
@pytest.mark.parametrize("mode", ["auto", "low_latency"])
def test_few_tokens_are_served_by_low_latency_kernels(mesh, mode, layout, monkeypatch):
    monkeypatch.setattr(tuning, "DEFAULT_TOKENS", T)
    compiled = compile_for_gpus(mesh, network(mesh, layout=layout, mode=mode))
    assert launches(compiled) == ["low_latency_dispatch", "low_latency_combine"]
    assert collectives(compiled) == []


@pytest.mark.parametrize("wire", [None, "fp8"])
def test_without_arenas_low_latency_is_high_throughput(mesh, wire, monkeypatch):
    """As over several processes."""
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: False)
    compiled = compile_for_gpus(mesh, network(mesh, wire=wire, mode="low_latency"))
    assert launches(compiled) == ["dispatch", "combine"]


@pytest.mark.parametrize("options", [NO_GRAPHS, GRAPHS], ids=["launched", "graphs"])
def test_scan_and_grad_launch_each_low_latency_call_once(mesh, options):
    compiled = compile_for_gpus(mesh, gradient(network(mesh, mode="low_latency")), options)
    names = ["dispatch", "combine", "dispatch_cached", "combine"]
    assert launches(compiled) == [f"low_latency_{name}" for name in names]


@pytest.mark.parametrize("mode", ["low_latency", "high_throughput"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_halves_are_launched_once_each_and_in_order(mesh, layout, mode):
    prefix = "low_latency_" if mode == "low_latency" else ""
    compiled = compile_for_gpus(mesh, network(mesh, layout=layout, mode=mode, halves=True))
    names = ["notify", "dispatch_start", "dispatch_done", "combine_start", "combine_done"]
    assert launches(compiled) == [prefix + name for name in names]
    assert collectives(compiled) == []
    differentiated = compile_for_gpus(mesh, gradient(network(mesh, layout=layout, mode=mode, halves=True)))
    back = ["dispatch_start", "dispatch_done", "combine_start", "combine_done"]
    assert launches(differentiated) == [prefix + name for name in names + back]


@pytest.mark.parametrize("mode", ["low_latency", "high_throughput"])
def test_work_stays_between_the_halves_on_their_stream(mesh, mode):
    """A kernel of the product is launched after the start and before the done, and nothing is on a stream of its own."""

    def f(x, routers, scales):
        idx = jax.lax.top_k(x @ routers[0], K)[1]
        static = {"axis_name": "expert", "num_experts": E, "mode": mode, "max_recv_tokens": 5 * T}
        pending = jax_ep.dispatch_start(x, idx, **static)
        pending, scale = jax.lax.optimization_barrier((pending, scales[1]))
        pending, between = jax.lax.optimization_barrier((pending, scale @ scales[2]))
        recv, handle = jax_ep.dispatch_done(pending)
        return jax_ep.combine(recv.x, handle) @ between

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    text = compile_for_gpus(mesh, sharded, NO_GRAPHS).as_text()
    entry = text[text.index("ENTRY") :]
    start, done = entry.index('dispatch_start"'), entry.index('dispatch_done"')
    assert re.search(r"gemm|dot", entry[start:done]) and "async" not in entry


def beside_the_main_stream(mesh, layout="expert", wire=None, mode="high_throughput", halves=False):
    """A dispatch and a combine on a stream of their own. What stands there besides must be free of jits: jax.nn.silu is one."""

    def exchange(x, idx, weights):
        static = {"axis_name": "expert", "num_experts": E, "layout": layout, "wire": wire, "mode": mode}
        if halves:
            recv, handle = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **static))
        else:
            recv, handle = jax_ep.dispatch(x, idx, weights, **static)
        y = jax_ep.dispatch_cached(x, handle) - (recv.x if wire is None else jax_ep.dequantize(recv.x))
        gates = None if layout == "rank" else recv.weights
        return (
            jax_ep.combine_done(jax_ep.combine_start(y, handle, gates)) if halves else jax_ep.combine(y, handle, gates)
        )

    def f(x, routers, scales):
        beside = compute_on(exchange, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)
        weights, idx = jax.lax.top_k((x @ routers[0]).astype(jnp.float32), K)
        return beside(x, idx, weights) + x @ scales[0]

    return jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"layout": "expert"},
        {"layout": "rank"},
        {"layout": "batched"},
        {"mode": "low_latency"},
        {"wire": "fp8"},
        {"halves": True},
        {"halves": True, "mode": "auto"},
        {"halves": True, "mode": "low_latency", "wire": "fp8"},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_calls_compile_on_a_stream_beside_the_main_one(mesh, kwargs):
    """XLA refuses an asynchronous call in an asynchronous call, as which a nested jit of ours came out (jnp.where)."""
    f = beside_the_main_stream(mesh, **kwargs)
    text = compile_for_gpus(mesh, f, NO_GRAPHS).as_text()
    entry = text[text.index("ENTRY") :]
    assert "jax_ep_" in text[: text.index("ENTRY")] and 'custom_call_target="jax_ep_' not in entry
    assert len(re.findall(r" call-start\(", entry)) == 1
    compile_for_gpus(mesh, gradient(f), NO_GRAPHS)


def test_halves_of_high_throughput_are_asked_for_by_name(mesh):
    compiled = compile_for_gpus(mesh, network(mesh, mode="auto", halves=True))
    assert launches(compiled) == ["notify", "dispatch_cached", "combine"] and not collectives(compiled)


def test_without_landings_a_whole_call_is_one_of_the_halves(mesh, monkeypatch):
    monkeypatch.setattr(group, "make_landings", lambda groups, window_bytes: False)
    compiled = compile_for_gpus(mesh, network(mesh, halves=True))
    assert launches(compiled) == ["notify", "dispatch_cached", "combine"] and not collectives(compiled)


def test_halves_under_vmap_are_whole_calls(mesh):
    def on_gpus(f):
        sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
        return compile_for_gpus(mesh, sharded)

    def vmapped(mode):
        def f(x, routers, scales):
            def halves(x):
                return moe(x, routers[0], scales[0], mode=mode, halves=True)

            return jax.vmap(halves, in_axes=1, out_axes=1)(x.reshape(T // 2, 2, H)).reshape(T, H)

        return f

    for mode in ("low_latency", "high_throughput"):
        calls = launches(on_gpus(vmapped(mode)))
        assert not any(name.endswith(("start", "done")) for name in calls) and {"dispatch_cached", "combine"} <= set(
            calls
        )


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_sums_in_logfmt10_are_encoded_by_low_latency_and_before_high_throughput(mesh, layout):
    """Low latency has it in its kernels. High throughput is handed encoded sums as rows of layout "rank"."""

    def launched(mode, back):
        def f(x, routers, scales):
            idx = jax.lax.top_k(x @ routers[0], K)[1]
            recv, handle = jax_ep.dispatch(x, idx, axis_name="expert", num_experts=E, layout=layout, mode=mode)
            return back(recv.x, handle)

        sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
        compiled = compile_for_gpus(mesh, sharded)
        return launches(compiled), collectives(compiled)

    def whole(y, handle):
        return jax_ep.combine(y, handle, wire="logfmt10")

    def halves(y, handle):
        return jax_ep.combine_done(jax_ep.combine_start(y, handle, wire="logfmt10"))

    assert launched("low_latency", whole) == (["low_latency_dispatch", "low_latency_combine"], [])
    low_latency_halves = ["low_latency_dispatch", "low_latency_combine_start", "low_latency_combine_done"]
    assert launched("low_latency", halves) == (low_latency_halves, [])
    assert launched("high_throughput", whole) == (["dispatch", "combine"], [])
    assert launched("high_throughput", halves) == (["dispatch", "combine"], [])  # its halves know no format


def test_shapes_beyond_the_low_latency_kernel_are_served_by_the_other(mesh):
    def f(x, routers, scales):
        many = jnp.repeat(x, 128, axis=0)  # the routing tables do not fit into shared memory
        idx = jax.lax.top_k(many @ routers[0], K)[1]
        return jax_ep.dispatch(many, idx, axis_name="expert", num_experts=E, mode="low_latency")[0].x

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    assert launches(compile_for_gpus(mesh, sharded)) == ["dispatch"]


def test_independent_calls_are_launched_in_the_same_order_by_every_compilation(mesh):
    def two(x, routers, scales):
        return moe(x, routers[0], scales[0]) + moe(2 * x, routers[1], scales[1])

    f = jax.shard_map(two, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    first, second = (compile_for_gpus(mesh, f).as_text() for _ in range(2))
    calls = [re.findall(r"%(jax_ep_\S+) =", text) for text in (first, second)]
    assert calls[0] == calls[1] and len(calls[0]) == 4


def test_dispatch_layout_is_one_kernel(mesh):
    def f(x, routers, scales):
        idx = jax.lax.top_k(x @ routers[0], K)[1]
        return jax_ep.dispatch_layout(idx, num_experts=E, num_ranks=R).num_tokens_per_rank

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    assert launches(compile_for_gpus(mesh, sharded)) == ["dispatch_layout"]


def test_a_barrier_is_one_kernel_that_later_work_can_wait_for(mesh):
    def f(x, routers, scales):
        x, _ = jax.lax.optimization_barrier((x, jax_ep.barrier("expert")))
        return moe(x, routers[0], scales[0])

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    compiled = compile_for_gpus(mesh, sharded)
    assert launches(compiled) == ["barrier", "dispatch", "combine"]
    assert collectives(compiled) == []


def test_where_kernels_cannot_serve_the_reference_is_compiled(mesh, monkeypatch):
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: None)
    compiled = compile_for_gpus(mesh, network(mesh))
    assert launches(compiled) == []
    assert set(collectives(compiled)) == {"all-gather", "all-to-all"}


@pytest.mark.parametrize("mode", ["high_throughput", "low_latency"])
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_over_nodes_the_calls_are_the_same_by_kernels_of_their_own(mesh, layout, mode, monkeypatch):
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: False)
    monkeypatch.setattr(group, "spans_nodes", lambda groups: True)
    compiled = compile_for_gpus(mesh, gradient(network(mesh, layout=layout, mode=mode)))
    names = ["dispatch", "combine", "dispatch_cached", "combine"]
    assert launches(compiled) == [f"internode_{name}" for name in names]
    assert set(collectives(compiled)) <= {"all-reduce"}  # of the replicated parameters' gradients


def test_over_nodes_values_and_scales_go_in_one_call_and_halves_are_whole_calls(mesh, monkeypatch):
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: False)
    monkeypatch.setattr(group, "make_landings", lambda groups, window_bytes: False)
    monkeypatch.setattr(group, "spans_nodes", lambda groups: True)
    compiled = compile_for_gpus(mesh, network(mesh, wire="fp8"))
    assert launches(compiled) == ["internode_dispatch", "internode_combine"]
    (dispatch,) = re.findall(r"= \((.*?)\) custom-call.*internode_dispatch\"", compiled.as_text())
    assert f"f8e4m3fn[{5 * T},{H}]" in dispatch and f"f32[{5 * T},{H // 128}]" in dispatch
    halves = compile_for_gpus(mesh, network(mesh, mode="low_latency", halves=True))
    assert launches(halves) == ["internode_notify", "internode_dispatch_cached", "internode_combine"]
    assert not collectives(halves)


def test_a_barrier_over_nodes_is_one_kernel(mesh, monkeypatch):
    monkeypatch.setattr(group, "spans_nodes", lambda groups: True)

    def f(x, routers, scales):
        return jax.lax.optimization_barrier((x, jax_ep.barrier("expert")))[0]

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert"))
    assert launches(compile_for_gpus(mesh, sharded)) == ["internode_barrier"]


# ---- the reference's bits --------------------------------------------------------------------------------------------


def compile_for_one(mesh, f, *shapes):
    """f of f32 arrays on one GPU, as optimized HLO."""
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
        for shape in shapes
    ]
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()


@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_the_references_sums_begin_at_zero(mesh, layout, monkeypatch):
    """XLA took 0 + x for x, which is another number where x is -0: one addition a rank, and one for a rank's own sums."""
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: None)
    text = compile_for_gpus(mesh, network(mesh, layout=layout)).as_text()
    assert len(re.findall(rf" f32\[[\d,]*{T},[\d,]*{H}\]\S* add\(", text)) == R + 1


def test_an_inner_product_begins_at_zero(mesh):
    """Of rows of one chunk of 1024 f16: 3 additions of vectors, 3 of their halves, one to zero and 5 of the lanes' halves."""

    def f(a, b):
        return reference.inner_products(a.astype(jnp.float16), b.astype(jnp.float16))

    text = compile_for_one(mesh, f, (T, 1024), (T, 1024))
    assert len(re.findall(r" f32\S* add\(", text)) == 3 + 3 + 1 + 5


SHORT = {"bfloat16": "bf16", "float16": "f16"}
ROUNDED = {
    **{form: functools.partial(quantized.encode, format=form) for form in quantized.FORMATS},
    "logfmt10": logfmt.logfmt10_encode,
    "inner-product": lambda x: reference.inner_products(x, x),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_row_that_was_just_rounded_is_used_rounded(mesh, name, dtype):
    """XLA:GPU drops f32 -> f16 -> f32: rows were encoded and multiplied as they were before."""
    text = compile_for_one(mesh, lambda x: jax.tree.leaves(ROUNDED[name](x.astype(dtype)))[0], (T, H))
    assert re.search(rf" {SHORT[dtype]}\[{T},{H}\]\S* convert\(", text)


RESULTS = {
    "sum": lambda x, dtype: reference._sum(x.astype(dtype)),
    "dequantized": lambda x, dtype: quantized.decode(*quantized.encode(x[0], "fp8"), "fp8", dtype),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_rounded_though_it_is_widened_at_once(mesh, name, dtype):
    text = compile_for_one(mesh, lambda x: RESULTS[name](x, jnp.dtype(dtype)).astype(jnp.float32), (R, T, H))
    assert re.search(rf" {SHORT[dtype]}\[(1,)?{T},{H}\]\S* bitcast\(", text)
