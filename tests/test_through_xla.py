"""What XLA does with calls around the calls: loops, donated memory, programs in flight, other collectives, several groups.

Every result is compared with the oracle's, to the bit, on routing drawn anew for each call. layer.py has the
layer and its oracle. Neighbours: test_transforms.py for derivatives, gpu/test_graphs_gpu.py for the same under CUDA graphs.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, case, fitted
from jax import lax
from layer import draw, draw_many, layer, oracle_dispatch, oracle_layer, place
from spmd import LAYOUTS, assert_same_bits, dispatch, expect, mesh_of, on_every_rank, sharded, split_ranks
from strategies import draw_topk_idx, gates, integers, normal

import jax_ep

P = jax.P
MIXED = ["expert", "rank", "batched", "expert-tight-aligned", "expert-two-axes", "expert-permuted"]


# ---- loops -----------------------------------------------------------------------------------------------------------


def looped(case, kind):
    """n s32[1], x[T, H], topk_idx[L, T, K], weights[L, T, K] -> x after n layers, the routing of layer i % L each."""

    def step(i, x, topk_idx, weights):
        return layer(case, x, *(lax.dynamic_index_in_dim(a, i % len(a), keepdims=False) for a in (topk_idx, weights)))

    def while_loop(n, x, topk_idx, weights):
        state = lax.while_loop(lambda s: s[0] < n[0], lambda s: (s[0] + 1, step(*s, topk_idx, weights)), (0 * n[0], x))
        return state[1]

    def fori_loop(n, x, topk_idx, weights):
        return lax.fori_loop(0, n[0], lambda i, x: step(i, x, topk_idx, weights), x)

    def scan(n, x, topk_idx, weights):
        layers = jnp.arange(len(topk_idx), dtype=jnp.int32) + 0 * n[0]
        return lax.scan(lambda x, i: (step(i, x, topk_idx, weights), None), x, layers)[0]

    return {"while_loop": while_loop, "fori_loop": fori_loop, "scan": scan}[kind]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("kind", ["scan", "while_loop", "fori_loop"])
def test_loops_of_layers(name, kind, request):
    """Trip counts are data: one program runs none, one, and more layers than it has routings.

    A layer's sums as XLA optimises them are the scan's to show; the other loops compile fast.
    """
    if kind != "scan":
        request.getfixturevalue("compiles_fast")
    c, num_layers = case(name), 3
    f = on_every_rank(c, looped(c, kind), check_vma=False)
    for seed, n in enumerate([num_layers] if kind == "scan" else [0, 1, 5, 2]):
        _, idx, weights = draw_many(c, seed, num_layers)
        x = draw(c, (seed, 9))[0]
        expected = x
        for i in range(n):
            expected = oracle_layer(c, expected, idx[:, i % num_layers], weights[:, i % num_layers])
        assert_same_bits(f(np.full((c.num_ranks, 1), n, np.int32), x, idx, weights), expected, f"{n} layers")


def test_a_loop_in_a_loop_and_outputs_of_every_step():
    c = case("expert")
    x, idx, weights = draw_many(c, 0, 6)

    def f(x, idx, weights):
        def row(carry, layers):
            ys = lax.map(lambda args: layer(c, *args), layers)
            return carry + ys.astype(jnp.float32).sum(0), ys

        pairs = jax.tree.map(lambda a: a.reshape(3, 2, *a.shape[1:]), (x, idx, weights))
        return lax.scan(row, x[0].astype(jnp.float32) * 0, pairs)[1]

    got = on_every_rank(c, f)(x, idx, weights).reshape(x.shape)
    for i in range(6):
        assert_same_bits(got[:, i], oracle_layer(c, x[:, i], idx[:, i], weights[:, i]), f"step {i}")


# ---- where operands are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_are_constants_of_the_program(layout):
    """They lie with the program's code, where a GPU's peers cannot read them: there the call is refused, and the next is right."""
    c = case(layout)
    x = normal(0, c.num_tokens, c.hidden, dtype=c.dtype)
    idx, weights = draw_topk_idx(c, "distinct"), gates(c.num_ranks, c.num_tokens, c.num_topk)

    def f(idx, weights, x=x):
        recv, handle = dispatch(c, jnp.asarray(x), idx, weights)
        y = normal(1, *recv.x.shape, dtype=c.dtype)
        cached = jax_ep.dispatch_cached(jnp.asarray(x), handle)
        y = y if jax.default_backend() == "cpu" else recv.x
        return recv, handle, cached, jax_ep.combine(jnp.asarray(y), handle)

    rows = np.broadcast_to(x, (c.num_ranks, *x.shape))
    # Low latency pushes, and alone a rank has no peers.
    pulls = jax.default_backend() != "cpu" and c.num_ranks > 1 and "JAX_EP_TEST_LOW_LATENCY" not in os.environ
    if not pulls:
        recv, handle, cached, out = on_every_rank(c, f)(idx, weights)
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="constant of the program"):
            on_every_rank(c, f)(idx, weights)
        recv, handle, cached, out = on_every_rank(c, f)(idx, weights, rows)
    expected = expect(c, handle, idx, rows, weights)
    assert_same_bits(recv.x, expected.x)
    assert_same_bits(cached, expected.x)
    y = np.broadcast_to(normal(1, *recv.x.shape[1:], dtype=c.dtype), recv.x.shape)
    y = y if jax.default_backend() == "cpu" else expected.x
    assert_same_bits(out, oracle.combine(expected.routing, y.reshape(c.num_ranks, -1, c.hidden)))


# ---- memory that XLA gives away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_donated_rows_are_not_read_after_the_call(name):
    """x becomes the result, twenty times without waiting. NaNs are written at once into whatever memory came free."""
    c = case(name)
    f = jax.jit(sharded(c, functools.partial(layer, c)), donate_argnums=0)
    sharding = jax.sharding.NamedSharding(mesh_of(c), P(c.axis_name))
    shape = (c.num_ranks * c.num_tokens, c.hidden)
    poison = jax.jit(lambda: jnp.full(shape, jnp.nan, c.dtype), out_shardings=sharding)
    x = draw(c, 0)[0]
    got, expected, poisoned = place(c, x), x, []
    for seed in range(20):
        _, idx, weights = draw(c, (1, seed))
        old = got
        got = f(old, *place(c, (idx, weights)))
        assert old.is_deleted()
        poisoned.append(poison())
        expected = oracle_layer(c, expected, idx, weights)
    assert_same_bits(split_ranks(got, c.num_ranks), expected)
    assert all(np.isnan(np.asarray(p, np.float32)).all() for p in poisoned)  # nor were they written to


def test_a_donated_operand_of_one_call_is_the_result_of_another():
    """y is donated to a program that combines it and, independently, sends rows out into results of the same size."""
    c = case("rank")
    x, idx, _ = draw(c, 3)
    _, handle = jax.jit(sharded(c, functools.partial(dispatch, c)))(*place(c, (x, idx)))
    rows, _, expected = oracle_dispatch(c, x, idx)

    def f(y, x, handle):
        return jax_ep.dispatch_cached(x, handle), jax_ep.combine(y, handle)

    f = jax.jit(sharded(c, f), donate_argnums=0)
    for scale in range(1, 9):
        y = place(c, rows * np.asarray(scale, rows.dtype))
        sent, back = f(y, place(c, x), handle)
        assert y.is_deleted()
        assert_same_bits(split_ranks(sent, c.num_ranks), rows)
        scaled = rows * np.asarray(scale, rows.dtype)
        assert_same_bits(split_ranks(back, c.num_ranks), oracle.combine(expected.routing, scaled))


# ---- calls that do not depend on each other --------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [("expert",) * 4, ("expert", "rank", "batched", "rank")], ids=["alike", "mixed"])
def test_independent_layers_in_one_program(layouts):
    """XLA launches them in an order of its own; it is the same on every rank."""
    cases = [case(layout) for layout in layouts]

    def f(*inputs):
        return [layer(c, *args) for c, args in zip(cases, inputs, strict=True)]

    f = on_every_rank(cases[0], f)
    for seed in range(4):
        inputs = [draw(c, (seed, i)) for i, c in enumerate(cases)]
        for got, c, args in zip(f(*inputs), cases, inputs, strict=True):
            assert_same_bits(got, oracle_layer(c, *args))


GRID = Case("grid", 6, 16, 2, 8, 4, axes=(("a", 2), ("b", 2)))


def over(axis_name, num_experts):
    """A layer over some of the grid's axes; as cases of the ranks that take part in it."""
    return dataclasses.replace(GRID, name=str(axis_name), num_ranks=2, axes=((axis_name, 2),), num_experts=num_experts)


def test_groups_that_share_devices_in_one_program():
    """Rows of a grid, its columns, all of it and all of it transposed: independent layers on the same four devices."""
    rows, columns = over("b", 4), over("a", 6)
    transposed = dataclasses.replace(GRID, axes=(("b", 2), ("a", 2)))
    mesh_of(GRID)  # skips where there are fewer than four devices

    def f(*inputs):
        return [layer(c, *args) for c, args in zip((GRID, rows, columns, transposed), inputs, strict=True)]

    f = on_every_rank(GRID, f)
    swapped = np.array([0, 2, 1, 3])  # place in the mesh of rank 0, 1, 2, 3 over ("b", "a")
    for seed in range(6):
        inputs = [draw(dataclasses.replace(GRID, num_experts=e), (seed, e, i)) for i, e in enumerate((8, 4, 6, 8))]
        whole, by_row, by_column, other = f(*inputs)
        assert_same_bits(whole, oracle_layer(GRID, *inputs[0]), "whole grid")
        for i in range(2):
            in_row, in_column = slice(2 * i, 2 * i + 2), slice(i, None, 2)
            assert_same_bits(by_row[in_row], expect_part(rows, inputs[1], in_row), f"row {i}")
            assert_same_bits(by_column[in_column], expect_part(columns, inputs[2], in_column), f"column {i}")
        assert_same_bits(other[swapped], oracle_layer(GRID, *(a[swapped] for a in inputs[3])), "transposed")


def expect_part(part, inputs, ranks):
    """The oracle's layer of two of the four ranks: their own mesh, so their own default capacity."""
    alone = dataclasses.replace(part, axes=(("expert", 2),))
    return oracle_layer(alone, *(a[ranks] for a in inputs))


def test_programs_on_other_meshes_of_the_same_devices_in_flight_together():
    """All devices, all of them in another order, the first half: three groups that share devices, launched by turns."""
    whole = fitted(Case("whole", 6, 16, 2, 16, 8))
    permuted = dataclasses.replace(whole, permuted=True)
    half = dataclasses.replace(whole, num_ranks=max(whole.num_ranks // 2, 1), layout="rank")
    cases = whole, permuted, half
    programs = [jax.jit(sharded(c, functools.partial(layer, c))) for c in cases]
    inputs = [(i % 3, draw(cases[i % 3], i)) for i in range(30)]
    placed = [place(cases[k], args) for k, args in inputs]
    results = [programs[k](*args) for (k, _), args in zip(inputs, placed, strict=True)]
    for result, (k, args) in zip(results, inputs, strict=True):
        assert_same_bits(split_ranks(result, cases[k].num_ranks), oracle_layer(cases[k], *args))


# ---- programs in flight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["expert", "rank", "batched-tight"])
def test_many_programs_in_flight(name):
    """Launched one after another with data of their own, looked at only in the end, and last first."""
    c = case(name)
    f = jax.jit(sharded(c, functools.partial(layer, c)))
    inputs = [draw(c, seed) for seed in range(60)]
    placed = [place(c, args) for args in inputs]
    results = [f(*args) for args in placed]
    for result, args in reversed(list(zip(results, inputs, strict=True))):
        assert_same_bits(split_ranks(result, c.num_ranks), oracle_layer(c, *args))


def test_shapes_layouts_and_dtypes_by_turns():
    """Programs of all kinds through one group, in random order, in flight together."""
    shapes = [
        Case("one token", 1, 8, 1, 8, 8, dtype="float32"),
        Case("wide", 5, 640, 2, 8, 8, layout="rank"),
        Case("many experts", 16, 16, 8, 64, 8, expert_alignment=8),
        Case("batched", 9, 24, 3, 16, 8, layout="batched", expert_capacity=4, dtype="float16"),
        Case("tight", 12, 8, 2, 8, 8, max_recv_tokens=11),
        Case("long", 70, 8, 2, 8, 8, dtype="float32"),
    ]
    cases = [fitted(c) for c in shapes]
    programs = [jax.jit(sharded(c, functools.partial(layer, c))) for c in cases]
    turns = np.random.default_rng(0).integers(0, len(cases), 48)
    inputs = [draw(cases[k], (seed, k)) for seed, k in enumerate(turns)]
    results = [programs[k](*place(cases[k], args)) for k, args in zip(turns, inputs, strict=True)]
    for k, result, args in zip(turns, results, inputs, strict=True):
        assert_same_bits(split_ranks(result, cases[k].num_ranks), oracle_layer(cases[k], *args), cases[k].name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_handles_across_programs_used_twice_and_out_of_order(layout):
    """Three routings are made, then used last first, each by two programs, with other rows every time."""
    c = case(layout)
    route = jax.jit(sharded(c, functools.partial(dispatch, c)))
    send = jax.jit(sharded(c, jax_ep.dispatch_cached))
    back = jax.jit(sharded(c, lambda rows, handle: jax_ep.combine(-rows, handle)))
    inputs = [draw(c, seed) for seed in range(3)]
    handles = [route(*place(c, (x, idx)))[1] for x, idx, _ in inputs]
    used = [(i, draw(c, (turn, i))[0]) for turn in range(2) for i in reversed(range(3))]
    results = []
    for i, x in used:
        rows = send(place(c, x), handles[i])
        results.append((rows, back(rows, handles[i])))
    for (i, x), (rows, out) in zip(used, results, strict=True):
        expected, _, routed = oracle_dispatch(c, x, inputs[i][1])
        assert_same_bits(split_ranks(rows, c.num_ranks).reshape(expected.shape), expected)
        assert_same_bits(split_ranks(out, c.num_ranks), oracle.combine(routed.routing, -expected))


# ---- beside other collectives ----------------------------------------------------------------------------------------


def among_collectives(case, x, topk_idx):
    """Each of XLA's collectives before, between and after the calls, tied to them and not. Integers: no sum rounds."""
    axis, num_ranks = case.axis_name, case.num_ranks
    ring = [(r, (r + 1) % num_ranks) for r in range(num_ranks)]
    apart = lax.psum(x * x, axis)  # needs nothing of the calls, so XLA may run it beside them
    moved = lax.ppermute(x, axis, ring)
    recv, handle = dispatch(case, moved, topk_idx)
    rows_everywhere = lax.all_gather(recv.num_tokens_per_expert, axis)
    most = lax.pmax(recv.num_tokens_per_expert.max(), axis).astype(x.dtype)
    out = jax_ep.combine(recv.x * most, handle)
    again = jax_ep.dispatch_cached(lax.all_to_all(jnp.stack([out] * num_ranks), axis, 0, 0).sum(0), handle)
    total = lax.psum_scatter(jnp.stack([out] * num_ranks), axis, tiled=False)
    return apart, rows_everywhere, out, again, total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_a_loop", [False, True], ids=["once", "in a scan"])
def test_beside_xlas_own_collectives(layout, in_a_loop):
    c = dataclasses.replace(case(layout), dtype="float32")
    times = 4

    def f(x, idx):
        return lax.map(lambda args: among_collectives(c, *args), (x, idx))

    if in_a_loop:
        f = on_every_rank(c, f)
    else:
        once = on_every_rank(c, functools.partial(among_collectives, c))
    xs = np.stack([integers(seed, c.num_ranks, c.num_tokens, c.hidden) for seed in range(times)], axis=1)
    idxs = np.stack([draw(c, seed)[1] for seed in range(times)], axis=1)
    if in_a_loop:
        stacked = f(xs, idxs)
        results = [jax.tree.map(lambda a, i=i: a.reshape(c.num_ranks, times, -1)[:, i], stacked) for i in range(times)]
    else:
        results = [once(xs[:, i], idxs[:, i]) for i in range(times)]
    for i, got in enumerate(results):
        x, idx = xs[:, i], idxs[:, i]
        rows, _, expected = oracle_dispatch(c, np.roll(x, 1, axis=0), idx)
        counts = expected.num_tokens_per_expert
        out = oracle.combine(expected.routing, rows * np.float32(counts.max()))
        summed = np.broadcast_to(out.sum(axis=0), out.shape)
        wanted = (
            np.broadcast_to((x * x).sum(axis=0), x.shape),
            np.broadcast_to(counts, (c.num_ranks, *counts.shape)),
            out,
            oracle_dispatch(c, summed, idx)[0],
            summed,
        )
        for name, a, b in zip(
            ("psum", "all_gather", "combine", "dispatch_cached", "psum_scatter"), got, wanted, strict=True
        ):
            assert_same_bits(a.reshape(c.num_ranks, -1), np.ascontiguousarray(b).reshape(c.num_ranks, -1), name)


# ---- transformations, exactly ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiles_fast")
@pytest.mark.parametrize("layout", ["expert", "batched"])
@pytest.mark.parametrize("policy", ["none", "nothing_saveable", "everything_saveable", "names"])
def test_gradients_under_remat_in_a_scan_are_the_oracles(layout, policy):
    """d/dx of <ct, two layers of x>: the layers' transposes, the other way round. Integers, so nothing rounds."""
    c = dataclasses.replace(case(layout), dtype="float32")
    xs, idx, weights = (np.stack(a, axis=1) for a in zip(*(draw_integers(c, seed) for seed in range(2)), strict=True))
    x, ct = xs[:, 0], integers(7, *xs[:, 0].shape)

    def f(x, idx, weights, ct):
        step = functools.partial(layer, c)
        if policy != "none":
            named = jax.checkpoint_policies.save_only_these_names("jax_ep_dispatch", "jax_ep_handle")
            chosen = named if policy == "names" else getattr(jax.checkpoint_policies, policy)
            step = jax.checkpoint(step, policy=chosen)
        out, vjp = jax.vjp(lambda x: lax.scan(lambda x, a: (step(x, *a), None), x, (idx, weights))[0], x)
        return out, vjp(ct)[0]

    out, x_ct = on_every_rank(c, f)(x, idx, weights, ct)
    forward, backward = x, ct
    for i in range(2):
        forward = oracle_layer(c, forward, idx[:, i], weights[:, i])
    for i in reversed(range(2)):  # of a linear layer with gates: the gated rows go the same way
        backward = oracle_layer(c, backward, idx[:, i], weights[:, i])
    assert_same_bits(out, forward)
    np.testing.assert_array_equal(x_ct, backward)


def draw_integers(case, seed):
    """As `draw`, of integers small enough that two layers round nothing in f32."""
    idx = draw(case, seed)[1]
    return integers(seed, case.num_ranks, case.num_tokens, case.hidden), idx, integers((seed, 1), *idx.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["one", "each its own"])
def test_vmap_is_the_oracle_of_each(layout, routing):
    c = case(layout)
    x, idx, weights = draw_many(c, 0, 3)
    if routing == "one":
        idx, weights = idx[:, 0], weights[:, 0]
    in_axes = (0, None, None) if routing == "one" else 0
    got = on_every_rank(c, jax.vmap(functools.partial(layer, c), in_axes))(x, idx, weights)
    for i in range(3):
        one = (idx, weights) if routing == "one" else (idx[:, i], weights[:, i])
        assert_same_bits(got[:, i], oracle_layer(c, x[:, i], *one), f"element {i}")
