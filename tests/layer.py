"""A layer whose expert is -x, which rounds nothing: on the devices, and by the oracle. What random calls of it are fed.

Neighbours: test_through_xla.py, gpu/test_graphs_gpu.py and soak.py run it; spmd.py knows meshes, oracle.py the meaning.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from spmd import dispatch, merge_ranks, mesh_of, sharded
from strategies import normal

import jax_ep


def layer(case, x, topk_idx, weights):
    """[T, H], s32[T, K], f32[T, K] -> [T, H] on every rank: out, negated, back."""
    recv, handle = dispatch(case, x, topk_idx, weights)
    return jax_ep.combine(-recv.x, handle, None if case.layout == "rank" else recv.weights)


@functools.cache
def static(case):
    """The static part of the case's handles: how many rows a default capacity gives."""
    rows = case.num_ranks * case.num_tokens
    x = jax.ShapeDtypeStruct((rows, case.hidden), case.dtype)
    idx = jax.ShapeDtypeStruct((rows, case.num_topk), jnp.int32)
    return jax.eval_shape(sharded(case, functools.partial(dispatch, case)), x, idx)[1].routing


def oracle_dispatch(case, x, topk_idx, weights=None):
    """Rows of the oracle are [R, C, ...] in every layout here."""
    expected = oracle.simulate(
        topk_idx,
        x,
        weights,
        layout=case.layout,
        num_experts=case.num_experts,
        num_rows=static(case).max_recv_tokens,
        alignment=case.expert_alignment,
        expert_capacity=static(case).expert_capacity,
    )
    rows = expected.x.reshape(case.num_ranks, -1, *x.shape[2:])
    gates = None if weights is None or case.layout == "rank" else expected.weights.reshape(case.num_ranks, -1)
    return rows, gates, expected


def oracle_layer(case, x, topk_idx, weights):
    """What `layer` gives, of all ranks: [R, T, H]."""
    rows, gates, expected = oracle_dispatch(case, x, topk_idx, weights)
    return oracle.combine(expected.routing, -rows, gates)


def draw(case, seed):
    """x, topk_idx, weights for all ranks. Gates below 1 / K keep a chain of layers from growing."""
    rng = np.random.default_rng(seed)
    shape = (case.num_ranks, case.num_tokens)
    idx = rng.integers(-1, case.num_experts, (*shape, case.num_topk)).astype(np.int32)
    gates = rng.uniform(0.2, 1.0, idx.shape).astype(np.float32) / case.num_topk
    return normal(seed, *shape, case.hidden, dtype=case.dtype), idx, gates


def draw_many(case, seed, count):
    """The same with a leading axis of layers behind that of ranks: [R, count, T, ...]."""
    return tuple(
        np.stack(arrays, axis=1) for arrays in zip(*(draw(case, (seed, i)) for i in range(count)), strict=True)
    )


def place(case, arrays):
    """[R, n, ...] onto the case's devices."""
    sharding = jax.sharding.NamedSharding(mesh_of(case), jax.P(case.axis_name))
    return jax.tree.map(lambda a: jax.device_put(a, sharding), merge_ranks(arrays))
