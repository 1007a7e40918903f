"""Processes that agree on nodes, with a pretended NVSHMEM, and the exchange over the true one; for test_internode*.py."""

import functools
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from exchange_worker import (
    EXCHANGES,
    barrier,
    compile_on_every_rank,
    exchange,
    gradients,
    on_all_gpus,
    run_all,
    small_call,
)
from jax._src import distributed

import jax_ep
from jax_ep._src import coordination, internode, targets


class Pretended:
    """An NVSHMEM of numbers: memory of process p begins at 2^40 (1 + p)."""

    def __init__(self, why_not=None, fails=None, reaches=lambda process: True):
        self.log, self.reason, self.fails, self.reaches = [], why_not, fails, reaches

    def why_not(self):
        return self.reason

    def unique_id(self):
        self.log.append("made an id")
        return b"the same for all"

    def initialize(self, unique_id, me, num_processes):
        self.log.append([unique_id.decode(), me, num_processes])
        self.me = me
        if self.fails:
            raise RuntimeError(self.fails)

    def allocate(self, num_bytes):
        self.log.append(num_bytes)
        return (1 + self.me) << 40

    def mapped(self, address, process):
        assert address == (1 + self.me) << 40
        return (1 + process) << 40 if self.reaches(process) else 0


def agree(transport):
    client = distributed.global_state.client
    me, num_processes = distributed.global_state.process_id, distributed.global_state.num_processes
    try:
        world = internode.exchange(client, me, num_processes, lambda: transport)
    except RuntimeError as error:
        return {"error": str(error)}
    seen = {"log": transport.log, "described": internode.describe()}
    if world is not None:
        seen |= {"nodes": world.nodes, "why_not": world.why_not, "collectives": world.collectives}
        seen |= {"rooms": list(world.rooms.items()), "room_bytes": world.room_bytes}
        seen["again"] = internode.exchange(client, me, num_processes, Pretended) is world
    return seen


def all_have_it():
    return agree(Pretended())


def one_reaches_no_other_node():
    alone = distributed.global_state.process_id == 3
    return agree(Pretended(reaches=lambda process: not alone or process == 2))


def one_lacks_it():
    return agree(Pretended(why_not="nvshmem4py is not installed" if distributed.global_state.process_id == 1 else None))


def one_fails():
    return agree(Pretended(fails="out of memory" if distributed.global_state.process_id == 2 else None))


def rendezvous():
    """The true NVSHMEM, as far as it goes without a GPU: the processes find each other, and then it has no device."""
    client = distributed.global_state.client
    me, num_processes = distributed.global_state.process_id, distributed.global_state.num_processes
    transport = internode.Nvshmem()
    assert transport.load() is None
    identity = transport.unique_id().hex() if me == 0 else None
    identity = coordination.gather(client, "identity", identity, me, num_processes)[0]
    try:
        transport.initialize(bytes.fromhex(identity), me, num_processes)
    except RuntimeError as error:
        return str(error)
    return None


def what_jax_ep_says():
    """initialize on CPU devices of two pretended nodes: nothing is loaded, and programs run."""
    jax_ep.initialize()
    world = internode.world()
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("expert",))
    came = jax.jit(jax.shard_map(lambda: jax_ep.barrier("expert"), mesh=mesh, in_specs=(), out_specs=jax.P("expert")))()
    plugins = any(name.startswith("jax_plugins.") for name in sys.modules)
    maps = Path("/proc/self/maps").read_text()
    return {
        "nodes": world.nodes,
        "why_not": world.why_not,
        # JAX's plugin for CUDA, where it is installed, loads NVSHMEM's library by itself.
        "loaded": [
            name for name in ("libnvshmem", "_internode") if name in maps and not (plugins and name == "libnvshmem")
        ],
        "came": [int(np.asarray(shard.data)[0]) for shard in came.addressable_shards],
    }


# ---- on GPUs ---------------------------------------------------------------------------------------------------------


def kernels_serve():
    text = small_call().text()
    assert f"@{targets.INTERNODE_DISPATCH}(" in text and f"@{targets.INTERNODE_COMBINE}(" in text, text
    assert "all_gather" not in text and "all_to_all" not in text


def many_calls():
    call = small_call()
    for i in range(50):
        assert (call(i) == i * jax.device_count()).all()


def smoke():
    """The least: one call, another, a barrier."""
    jax_ep.initialize()
    checks = {"kernels serve": kernels_serve, "many calls": many_calls, "barrier": barrier}
    return run_all(checks) | {"described": internode.describe()}


def in_low_latency(name):
    exchange(on_all_gpus(name), mode="low_latency")


def quantized_rows():
    """Values and scales ride together."""
    num_ranks = jax.device_count()

    def f(x, topk_idx):
        recv, handle = jax_ep.dispatch(x, topk_idx, axis_name="expert", num_experts=num_ranks, wire="fp8_ue8m0")
        return jax_ep.combine(jax_ep.dequantize(recv.x), handle)

    c = on_all_gpus("expert-eight-ranks")
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (num_ranks, 40, 256)).astype(np.float32)
    topk_idx = np.tile(np.arange(num_ranks, dtype=np.int32), (num_ranks, 40, 1))
    out = compile_on_every_rank(c, f)(x, topk_idx)
    for shard in out.addressable_shards:
        np.testing.assert_array_equal(shard.data, num_ranks * x.reshape(-1, 256)[shard.index])


def large_rows():
    """Many chunks and pieces: rings go round."""
    num_ranks, num_tokens, hidden = jax.device_count(), 300, 40_000
    num_experts = 4 * num_ranks

    def f(x, topk_idx):
        recv, handle = jax_ep.dispatch(x, topk_idx, axis_name="expert", num_experts=num_experts, layout="rank")
        return jax_ep.combine(recv.x, handle), (recv.topk_idx >= 0).sum(axis=1, dtype=jnp.int32).sum()[None]

    rng = np.random.default_rng(1)
    topk_idx = np.stack([rng.permutation(num_experts)[:3] for _ in range(num_ranks * num_tokens)]).astype(np.int32)
    x = rng.integers(-8, 8, (num_ranks, num_tokens, hidden)).astype(jnp.bfloat16)
    c = on_all_gpus("rank-eight-ranks")
    out, _ = compile_on_every_rank(c, f)(x, topk_idx.reshape(num_ranks, num_tokens, 3))
    ranks = [len({expert // 4 for expert in row}) for row in topk_idx.tolist()]
    expected = x.reshape(-1, hidden).astype(np.float32) * np.array(ranks, np.float32)[:, None]
    for shard in out.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data).astype(np.float32), expected[shard.index])


def core():
    jax_ep.initialize()
    checks = {"kernels serve": kernels_serve, "many calls": many_calls, "barrier": barrier}
    checks |= {f"exchange {name}": lambda name=name: exchange(on_all_gpus(name)) for name in EXCHANGES}
    for layout in ("expert", "rank", "batched"):
        name = f"{layout}-eight-ranks"
        checks[f"low latency {layout}"] = functools.partial(in_low_latency, name)
        checks[f"gradients {layout}"] = lambda layout=layout, name=name: gradients(layout, on_all_gpus(name))
    checks |= {"quantized rows": quantized_rows, "large rows": large_rows}
    return run_all(checks)


def no_nvshmem():
    """What a program over nodes ends in where the bindings are missing."""
    internode.Nvshmem.why_not = lambda self: "NVSHMEM's Python bindings (nvshmem4py) are not installed"
    jax_ep.initialize()
    try:
        small_call()(1)
    except RuntimeError as error:
        return str(error)
    return None


def collectives():
    """The same where XLA's collectives are asked for."""
    assert os.environ[internode.ACROSS_NODES] == "collectives"
    jax_ep.initialize()
    call = small_call()
    return "all_gather" in call.text() and bool((call(3) == 3 * jax.device_count()).all())


def both_here(name):
    coordination_client = distributed.global_state.client
    coordination_client.wait_at_barrier(f"test/{name}", 60_000)


def comes_late():
    """Process 1 stays away from a call, then comes: both learn of it, and after initialize both are right again."""
    from exchange_worker import error_of

    jax_ep.initialize()
    jax_ep.config.timeout = 6.0
    call, me, num_ranks = small_call(), jax.process_index(), jax.device_count()
    assert (call(1) == num_ranks).all()
    both_here("right")
    errors = [error_of(call)] if me == 0 else []
    both_here("0 has failed")
    errors += [error_of(call)]
    both_here("both have failed")
    jax_ep.initialize()
    both_here("resumed")
    right = [bool((call(i) == i * num_ranks).all()) for i in range(1, 5)]
    return {"errors": errors, "right": right}
