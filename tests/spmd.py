"""Runs a function on every rank of a case's mesh, asks the oracle the same question, and compares bits.

Arrays go in and come out with a leading axis of R: entry r is rank r's.
"""

import functools
import math

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh
from strategies import gates, stamped

import jax_ep

LAYOUTS = ("expert", "rank", "batched")


def mesh_of(case, axis_type=jax.sharding.AxisType.Auto):
    sizes = [size for _, size in case.mesh_axes]
    names = tuple(name for name, _ in case.mesh_axes)
    devices = jax.devices()
    needed = math.prod(sizes)
    if len(devices) < needed:
        pytest.skip(f"{case} needs {needed} devices, {jax.default_backend()} has {len(devices)}")
    devices = devices[:needed]
    if case.permuted:
        devices = devices[1::2] + devices[::2][::-1]
    return Mesh(np.array(devices).reshape(sizes), names, axis_types=(axis_type,) * len(sizes))


def merge_ranks(tree):
    """[R, n, ...] -> [R * n, ...] in every leaf, as shard_map takes it."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


def split_ranks(tree, num_ranks):
    """[R * n, ...] -> [R, n, ...] in every leaf, as NumPy arrays."""
    return jax.tree.map(lambda a: np.asarray(a).reshape(num_ranks, a.shape[0] // num_ranks, *a.shape[1:]), tree)


def sharded(case, f, **shard_map_options):
    """shard_map(f) from and to global arrays [R * n, ...]; not compiled."""
    spec = jax.P(case.axis_name)
    return jax.shard_map(f, mesh=mesh_of(case), in_specs=spec, out_specs=spec, **shard_map_options)


def on_every_rank(case, f, **shard_map_options):
    """jit(shard_map(f)) from and to arrays [R, n, ...].

    An empty operand crosses the boundary with one element in place of none and is cut inside: XLA (jaxlib 0.11.2) crashes
    on a compiled shard_map with an empty operand, whatever is done with it.
    """

    @functools.cache
    def compiled(structure, empty_axes):
        def cut(*leaves):
            leaves = [
                a[tuple(slice(0 if i in axes else None) for i in range(a.ndim))]
                for a, axes in zip(leaves, empty_axes, strict=True)
            ]
            return f(*jax.tree.unflatten(structure, leaves))

        return jax.jit(sharded(case, cut, **shard_map_options))

    def call(*args):
        leaves, structure = jax.tree.flatten(merge_ranks(args))
        empty_axes = tuple(tuple(np.flatnonzero(np.array(a.shape) == 0)) for a in leaves)
        filled = [
            np.zeros([n or (1 if i else case.num_ranks) for i, n in enumerate(a.shape)], a.dtype) if axes else a
            for a, axes in zip(leaves, empty_axes, strict=True)
        ]
        return split_ranks(compiled(structure, empty_axes)(*filled), case.num_ranks)

    return call


def dispatch(case, x, topk_idx, weights=None, start_only=False, **options):
    """What the case says, inside shard_map."""
    call = jax_ep.dispatch_start if start_only else jax_ep.dispatch
    return call(x, topk_idx, weights, **case.dispatch_options, **options)


def expect(case, handle, topk_idx, x, weights=None, dead=()):
    """The oracle's answer to the same; how many rows a default capacity gives is the handle's word."""
    return oracle.simulate(
        topk_idx,
        x,
        weights,
        layout=case.layout,
        num_experts=case.num_experts,
        num_rows=handle.routing.max_recv_tokens,
        alignment=case.expert_alignment,
        expert_capacity=handle.routing.expert_capacity,
        dead=dead,
    )


def inputs(case):
    """x, weights, and another x."""
    shape = (case.num_ranks, case.num_tokens)
    x = stamped(*shape, case.hidden, dtype=case.dtype)
    return x, gates(*shape, case.num_topk), stamped(*shape, case.hidden, dtype=case.dtype, first=100)


def assert_same_bits(got, expected, name=""):
    if expected is None:
        assert got is None, name
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
    bits = f"u{got.dtype.itemsize}"
    got, expected = (np.ascontiguousarray(a).view(bits) for a in (got, expected))
    np.testing.assert_array_equal(got, expected, err_msg=name)


def assert_same_tree(got, expected, name=""):
    jax.tree.map(functools.partial(assert_same_bits, name=name), got, expected)
