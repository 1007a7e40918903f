"""Groups over nodes without GPUs: who lies where, what the processes tell each other, what is loaded, and how calls are cut."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import launch
import pytest

import jax_ep
from jax_ep._src import group, internode, targets

TWO_NODES = [{"JAX_EP_RANKS_PER_NODE": "2"}] * 4
MIB = 2**20


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node", "nodes"),
    [
        ("aaaa", None, [0, 0, 0, 0]),
        ("aabb", None, [0, 0, 1, 1]),
        ("abab", None, [0, 1, 0, 1]),
        ("aaaa", 2, [0, 0, 1, 1]),
        ("aaaa", 1, [0, 1, 2, 3]),
        ("abab", 1, [0, 1, 2, 3]),
        ("aaaaa", 2, [0, 0, 1, 1, 2]),
        ("abaabb", 2, [0, 1, 0, 2, 1, 3]),
    ],
)
def test_a_node_is_a_host_or_a_part_of_one(hosts, ranks_per_node, nodes):
    assert internode.split(hosts, ranks_per_node) == nodes


@pytest.mark.parametrize("told", ["0", "-1", "two", ""])
def test_a_number_of_ranks_that_is_none_is_refused(monkeypatch, told):
    monkeypatch.setenv(internode.RANKS_PER_NODE, told)
    with pytest.raises(RuntimeError, match="JAX_EP_RANKS_PER_NODE must be a positive number, got"):
        internode.ranks_per_node()


def test_nodes_must_have_as_many_ranks():
    assert targets.nodes_of([5, 5, 2, 2]) == (2, 2)
    assert targets.nodes_of([1, 0, 1, 0, 1, 0]) == (2, 3)
    for nodes, why in (([0, 0, 1], "as many ranks on each"), ([], "1 to 32 ranks, got 0"), ([0] * 33, "got 33")):
        with pytest.raises(RuntimeError, match=why):
            targets.nodes_of(nodes)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def plan(num_nodes=4, ranks_per_node=8, num_tokens=4096, num_topk=8, row_bytes=14336, second_bytes=0, num_sms=24):
    sizes = (num_nodes, ranks_per_node, num_tokens, num_topk, row_bytes, second_bytes, num_sms)
    names = ("blocks", "lanes", "ring", "slot", "message", "pieces", "per_chunk")
    return dict(zip(names, targets.internode_plan(*sizes, num_nodes * ranks_per_node), strict=True))


def test_rooms_are_of_the_size_that_the_manual_says():
    for num_processes, box in ((2, 32 * MIB), (16, 32 * MIB), (24, 48 * MIB), (32, 64 * MIB), (128, 64 * MIB)):
        assert targets.box_bytes(num_processes) == box
        assert 2 * box + 19 * MIB < targets.room_bytes(num_processes) < 2 * box + 19.1 * MIB


def test_a_ring_is_an_even_share_of_a_box_in_whole_slots():
    for num_nodes, ranks_per_node in ((2, 1), (2, 8), (4, 8), (16, 2), (32, 1)):
        for num_sms in (1, 24, 132):
            cut = plan(num_nodes, ranks_per_node, num_sms=num_sms)
            box = targets.box_bytes(num_nodes * ranks_per_node)
            num_rings = num_nodes if ranks_per_node > 1 else num_nodes - 1
            assert cut["lanes"] * num_rings * cut["ring"] <= box
            assert cut["ring"] == 4 * cut["slot"] and cut["slot"] % 128 == 0
            assert 32768 <= cut["slot"] <= 65536
            assert 128 + cut["per_chunk"] * cut["message"] <= cut["slot"]
            assert cut["blocks"] * 15 >= cut["lanes"] * num_tasks(num_nodes, ranks_per_node)


def num_tasks(num_nodes, ranks_per_node):
    """Of a lane: senders to the other nodes, readers of the other ranks; inside a node a sender and an announcer."""
    return (num_nodes - 1) + (num_nodes * ranks_per_node - 1) + (2 if ranks_per_node > 1 else 0)


def test_lanes_take_all_warps_or_are_as_many_as_there_may_be_and_four_rows_of_deepseek_v3_share_a_chunk():
    cut = plan(2, 1)
    assert (cut["lanes"], cut["slot"], cut["per_chunk"], cut["pieces"]) == (128, 65536, 4, 1)
    assert cut["message"] == 14336 + 128  # of which 112 are of use: token, piece, and of 8 choices slot, expert, gate
    assert plan(2, 2)["lanes"] == 360 // 6 and plan(2, 2)["per_chunk"] == 4
    assert plan(2, 8)["lanes"] == 360 // 18 and plan(4, 1)["lanes"] == 360 // 6
    assert plan(2, 1, num_sms=12)["lanes"] == 180 // 2 and plan(2, 1, num_sms=132)["lanes"] == 128


@pytest.mark.parametrize("row_bytes", [16, 4096, 65536, 10**6, 2**29])
@pytest.mark.parametrize("second_bytes", [0, 1, 224, 10**5])
def test_rows_of_any_length_are_cut_into_pieces_that_fit(row_bytes, second_bytes):
    for num_topk in (1, 32):
        cut = plan(4, 8, num_topk=num_topk, row_bytes=row_bytes, second_bytes=second_bytes)
        header = -(-(16 + 12 * num_topk) // 128) * 128
        assert cut["per_chunk"] >= 1 and 128 + cut["per_chunk"] * cut["message"] <= cut["slot"]
        assert cut["pieces"] * (cut["message"] - header) >= row_bytes + second_bytes
        assert cut["pieces"] <= (row_bytes + second_bytes) // 28672 + 2  # MIN_PIECE in cuda.py


def test_few_tokens_take_few_lanes():
    assert plan(2, 1, num_tokens=3)["lanes"] == 3


# ---- what is called --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "direct"), [("high_throughput", 0), ("low_latency", 1)])
@pytest.mark.parametrize("layout", ["expert", "rank", "batched"])
def test_programs_over_nodes_call_the_kernels_for_it(monkeypatch, layout, mode, direct):
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: (tuple(range(mesh.size)),))
    monkeypatch.setattr(group, "make_arenas", lambda groups, window_bytes: False)
    monkeypatch.setattr(group, "spans_nodes", lambda groups: True)
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(x, topk_idx, gates):
        static = {"axis_name": "expert", "num_experts": 2 * mesh.size, "layout": layout, "mode": mode}
        recv, handle = jax_ep.dispatch(x, topk_idx, gates, **static)
        out = jax_ep.combine(recv.x, handle, None if layout == "rank" else recv.weights)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    sharded = jax.shard_map(jax.grad(f, argnums=(0, 2)), mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
    rows = 8 * mesh.size
    args = [((rows, 64), jnp.bfloat16), ((rows, 2), jnp.int32), ((rows, 2), jnp.float32)]
    traced = jax.jit(sharded).trace(*(jax.ShapeDtypeStruct(*arg) for arg in args))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@jax_ep_(\w+)\(.*?direct = (\d)", text)
    names = ["dispatch", "combine", "dispatch_cached", "combine"]
    assert calls == [(f"internode_{name}", str(direct)) for name in names] and "all_gather" not in text


def test_a_barrier_over_nodes_is_a_kernel_too(monkeypatch):
    monkeypatch.setattr(group, "along", lambda axis_context, axis_name: (tuple(range(mesh.size)),))
    monkeypatch.setattr(group, "spans_nodes", lambda groups: True)
    mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    wait = jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=jax.P("expert"))
    text = jax.jit(wait).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "@jax_ep_internode_barrier(" in text and "all_reduce" not in text


# ---- what is loaded, and what processes agree on ---------------------------------------------------------------------


def test_one_node_loads_nothing_and_needs_nothing():
    code = (
        "import jax_ep, sys\n"
        "jax_ep.initialize()\n"
        "assert 'nvshmem' not in sys.modules and 'jax_ep._internode' not in sys.modules\n"
        "plugins = any(name.startswith('jax_plugins.') for name in sys.modules)  # JAX's for CUDA loads it where it finds it\n"
        "assert plugins or 'libnvshmem' not in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd="/")


needs_nvshmem = pytest.mark.skipif(
    importlib.util.find_spec("jax_ep._internode") is None or internode.host_library() is None,
    reason="needs jax_ep built with NVSHMEM, and nvidia-nvshmem-cu13",
)


@pytest.mark.multiprocess
@needs_nvshmem
@pytest.mark.skipif(importlib.util.find_spec("nvshmem") is None, reason="needs nvshmem4py")
def test_processes_find_each_other_through_nvshmem_and_lack_a_gpu():
    environments = [{"NVSHMEM_REMOTE_TRANSPORT": "none", "CUDA_VISIBLE_DEVICES": ""}] * 2
    for error in launch.run("internode_worker:rendezvous", devices_per_process=1, environments=environments):
        assert "NVSHMEM's initialisation ended in status 1" in error


@needs_nvshmem
def test_the_module_imports_without_a_gpu():
    code = (
        "from jax_ep._src import internode\n"
        "internode.load_host_library()\n"
        "import jax_ep._internode as kernels\n"
        "from jax_ep._src import targets\n"
        "targets.install_internode(kernels.kernels())\n"
        "assert kernels.status() < 2\n"
        "assert internode.OLDEST <= kernels.loaded_nvshmem() < internode.TOO_NEW"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd="/", env=environment)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("worker", "asked", "reaches"),
    [("all_have_it", None, True), ("all_have_it", "puts", False), ("one_reaches_no_other_node", None, False)],
)
def test_processes_share_rooms_inside_a_node_and_beyond_it_if_all_reach_all(worker, asked, reaches):
    environments = [
        node | ({"JAX_EP_ACROSS_NODES": asked} if asked and i == 2 else {}) for i, node in enumerate(TWO_NODES)
    ]
    seen = launch.run(f"internode_worker:{worker}", num_processes=4, devices_per_process=1, environments=environments)
    for me, process in enumerate(seen):
        assert process["nodes"] == [0, 0, 1, 1] and process["why_not"] is None and process["again"]
        id_, *log = [entry for entry in process["log"] if entry != "made an id"]
        assert id_ == ["the same for all", me, 4] and log == [8 * process["room_bytes"]]
        assert ("made an id" in process["log"]) == (me == 0)
        here = [0, 1, 2, 3] if reaches else [0, 1] if me < 2 else [2, 3]
        assert process["rooms"] == [[peer, (1 + peer) << 40] for peer in here]
        by = "NVLink in NVSHMEM's memory" if reaches else "NVSHMEM"
        assert f"2 nodes, served by {by};" in process["described"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("worker", "why_not"),
    [("one_lacks_it", "process 1: nvshmem4py is not installed"), ("one_fails", "process 2: out of memory")],
)
def test_what_one_process_lacks_is_told_to_all(worker, why_not):
    for process in launch.run(
        f"internode_worker:{worker}", num_processes=4, devices_per_process=1, environments=TWO_NODES
    ):
        assert process["why_not"] == why_not and process["nodes"] == [0, 0, 1, 1]
        assert f"2 nodes, not served: {why_not}" in process["described"]


@pytest.mark.multiprocess
def test_different_ideas_of_a_node_are_an_error_in_every_process():
    environments = [{"JAX_EP_RANKS_PER_NODE": "1"}, {"JAX_EP_RANKS_PER_NODE": "2"}]
    for process in launch.run("internode_worker:all_have_it", devices_per_process=1, environments=environments):
        assert process["error"].endswith("must be the same in every process, got [1, 2].")


@pytest.mark.parametrize("told", ["collective", "nccl", ""])
def test_what_is_not_there_cannot_be_asked_for(monkeypatch, told):
    monkeypatch.setenv(internode.ACROSS_NODES, told)
    with pytest.raises(RuntimeError, match=r"JAX_EP_ACROSS_NODES must be 'collectives' or 'puts', got"):
        internode.asked_for()


@pytest.mark.multiprocess
def test_the_collectives_may_be_asked_for():
    environments = [
        {"JAX_EP_RANKS_PER_NODE": "1", "JAX_EP_ACROSS_NODES": "collectives"},
        {"JAX_EP_RANKS_PER_NODE": "1"},
    ]
    for process in launch.run("internode_worker:all_have_it", devices_per_process=1, environments=environments):
        assert process["collectives"] and process["log"] == [] and "asks for it" in process["described"]


@pytest.mark.multiprocess
def test_cpu_devices_on_two_nodes_are_served_as_ever():
    environments = [{"JAX_EP_RANKS_PER_NODE": "1"}] * 2
    for process in launch.run("internode_worker:what_jax_ep_says", devices_per_process=2, environments=environments):
        assert process["nodes"] == [0, 1] and process["loaded"] == [] and process["came"] == [4, 4]
        assert process["why_not"] == "process 0: it has 0 GPUs, and NVSHMEM wants one process a GPU"
