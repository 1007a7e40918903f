"""Transformations: with the routing fixed, dispatch and combine are linear, and every rule of JAX holds for them.

The expert of these tests is tanh(scale[e] * row), so that derivatives of all orders are worth looking at and a dense
computation of the same layer is one line.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case
from jax import lax
from jax.test_util import check_grads
from spmd import (
    LAYOUTS,
    assert_same_bits,
    assert_same_tree,
    dispatch,
    merge_ranks,
    mesh_of,
    on_every_rank,
    sharded,
    split_ranks,
)
from strategies import draw_topk_idx, integers, normal

import jax_ep

P = jax.P

pytestmark = pytest.mark.usefixtures("emits_fast")
# Of tests that compare within a tolerance, or integers that round nowhere. The others compile with XLA's optimisations.
quick = pytest.mark.usefixtures("compiles_fast")

ADJOINT = [
    *(
        "expert",
        "expert-one-rank",
        "expert-tight",
        "expert-tight-aligned",
        "expert-two-axes",
        "expert-permuted",
        "expert-no-tokens",
    ),
    *("rank", "rank-tight", "rank-three-ranks"),
    *("batched", "batched-tight", "batched-three-ranks"),
]


def moe(case, x, topk_idx, weights, scale):
    """f32[T, H], s32[T, K], f32[T, K], f32[L, H] -> f32[T, H]: a whole layer, on every rank."""
    recv, handle = dispatch(case, x, topk_idx, weights)
    return jax_ep.combine(experts(case, recv, scale), handle, None if case.layout == "rank" else recv.weights)


def experts(case, recv, scale):
    if case.layout == "batched":
        return jnp.tanh(recv.x * scale[:, None])
    if case.layout == "rank":
        each = jnp.tanh(recv.x[:, None] * scale[recv.topk_idx])
        return (each * jnp.where(recv.topk_idx < 0, 0, recv.weights)[..., None]).sum(axis=1)
    expert = jnp.repeat(jnp.arange(len(scale)), recv.group_sizes, total_repeat_length=len(recv.x))
    return jnp.tanh(recv.x * scale[expert])


def dense(case, x, topk_idx, weights, scale):
    """The same layer of all ranks' tokens [R * T, ...] with scale[E, H], and no communication."""
    valid = (topk_idx >= 0) & (topk_idx < case.num_experts)
    each = jnp.tanh(x[:, None] * scale[jnp.where(valid, topk_idx, 0)])
    return (each * jnp.where(valid, weights, 0)[..., None]).sum(axis=1)


def layer_inputs(case, style="distinct"):
    """Global x[R * T, H], topk_idx, weights, scale[E, H]."""
    shape = (case.num_ranks, case.num_tokens)
    arrays = (
        normal(0, *shape, case.hidden),
        draw_topk_idx(case, style),
        normal(1, *shape, case.num_topk),
        normal(2, case.num_ranks, case.num_local_experts, case.hidden),
    )
    return jax.tree.map(jnp.asarray, merge_ranks(arrays))


@functools.cache
def layer(case, check_vma=True):
    return jax.jit(sharded(case, functools.partial(moe, case), check_vma=check_vma))


def close(got, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def count(jaxpr, *names):
    """How many equations of these primitives a jaxpr holds, in all its inner jaxprs."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in names
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += count(value, *names)
    return total


def received_shapes(c, *arrays):
    """[R, n, ...] of the rows and gates that a dispatch of these arrays gives: traced, not compiled."""
    recv, _ = jax.eval_shape(sharded(c, functools.partial(dispatch, c)), *merge_ranks(arrays))
    return [(c.num_ranks, a.shape[0] // c.num_ranks, *a.shape[1:]) for a in (recv.x, recv.weights)]


DISPATCHES = ("jax_ep_dispatch", "jax_ep_notify", "jax_ep_dispatch_cached")


# ---- linearity -------------------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("name", ADJOINT)
def test_combine_is_the_transpose_of_dispatch_over_all_rows(name):
    """<dispatch(x, w), (y, g)> == <x, combine(y)> + <w, g's way back>, exactly, on integers; padding rows of y and g are not zero."""
    c = case(name)
    shape = (c.num_ranks, c.num_tokens)
    x, weights = integers(0, *shape, c.hidden), integers(1, *shape, c.num_topk)
    idx = draw_topk_idx(c, "invalid")
    y, g = (integers(seed, *shape) for seed, shape in enumerate(received_shapes(c, x, idx, weights), 2))

    def f(x, idx, weights, y, g):
        def linear(x, weights):
            recv, _ = dispatch(c, x, idx, weights)
            return recv.x, recv.weights

        rows, vjp = jax.vjp(linear, x, weights)
        _, handle = dispatch(c, x, idx, weights)
        transposed = jax.linear_transpose(linear, x, weights)((y, g))
        return rows, vjp((y, g)), transposed, jax_ep.combine(y, handle), handle.slot

    rows, (x_ct, w_ct), transposed, back, slot = on_every_rank(c, f)(x, idx, weights, y, g)
    assert (rows[0] * y).sum() == (x * x_ct).sum()
    assert (rows[1] * g).sum() == (weights * w_ct).sum()
    assert_same_bits(x_ct, back)
    assert_same_tree(transposed, (x_ct, w_ct))
    np.testing.assert_array_equal(w_ct[slot < 0], 0)  # a dropped choice has no gradient


@quick
@pytest.mark.parametrize(
    "name", ["expert", "expert-tight-aligned", "expert-two-axes", "batched-tight", "batched-three-ranks"]
)
def test_the_transposes_of_a_weighted_combine(name):
    """In y: dispatch_cached, times the gate. In the gates: the inner product of the row with what came for it."""
    c = case(name)
    shape = (c.num_ranks, c.num_tokens)
    x, ct, idx = integers(0, *shape, c.hidden), integers(1, *shape, c.hidden), draw_topk_idx(c, "any")
    shapes = received_shapes(c, x, idx, integers(2, *idx.shape))
    y, gate = (integers(seed, *shape) for seed, shape in enumerate(shapes, 3))

    def f(x, idx, y, gate, ct):
        _, handle = dispatch(c, x, idx)
        out, vjp = jax.vjp(lambda y, gate: jax_ep.combine(y, handle, gate), y, gate)
        out_unweighted, vjp_unweighted = jax.vjp(lambda y: jax_ep.combine(y, handle), y)
        (in_y,) = jax.linear_transpose(lambda y: jax_ep.combine(y, handle, gate), y)(ct)
        (in_gate,) = jax.linear_transpose(lambda gate: jax_ep.combine(y, handle, gate), gate)(ct)
        return out, vjp(ct), (in_y, in_gate), out_unweighted, vjp_unweighted(ct), jax_ep.dispatch_cached(ct, handle)

    out, (y_ct, gate_ct), transposed, out_unweighted, (y_ct_unweighted,), cached = on_every_rank(c, f)(
        x, idx, y, gate, ct
    )
    assert_same_bits(y_ct_unweighted, cached)
    np.testing.assert_array_equal(y_ct, cached * gate[..., None])
    np.testing.assert_array_equal(gate_ct, (cached * y).sum(axis=-1))
    np.testing.assert_array_equal(transposed[0], y_ct)
    np.testing.assert_array_equal(transposed[1], gate_ct)
    assert (out * ct).sum() == (y * y_ct).sum() == (gate * gate_ct).sum()
    assert (out_unweighted * ct).sum() == (y * y_ct_unweighted).sum()


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_transpose_of_the_whole_chain(layout):
    c = case(layout)
    idx = draw_topk_idx(c, "any")
    x, ct = (integers(seed, c.num_ranks, c.num_tokens, c.hidden) for seed in (0, 1))

    def f(x, idx, ct):
        def chain(x):
            recv, handle = dispatch(c, x, idx)
            return jax_ep.combine(3 * recv.x, handle) + jax_ep.combine(jax_ep.dispatch_cached(-x, handle), handle)

        return chain(x), jax.linear_transpose(chain, x)(ct)[0]

    out, back = on_every_rank(c, f)(x, idx, ct)
    assert (out * ct).sum() == (x * back).sum()


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tangent_travels_as_rows_do(layout):
    c = case(layout)
    idx = draw_topk_idx(c, "any")
    x, x_dot = (integers(seed, c.num_ranks, c.num_tokens, c.hidden, dtype=c.dtype) for seed in (0, 1))
    w, w_dot = (integers(seed, *idx.shape) for seed in (2, 3))

    def f(x, idx, w, x_dot, w_dot):
        def rows(x, w):
            recv, _ = dispatch(c, x, idx, w)
            return recv.x, recv.weights

        return (
            jax.jvp(rows, (x, w), (x_dot, w_dot)),
            (rows(x, w), rows(x_dot, w_dot)),
            jax.jvp(lambda x: rows(x, w)[0], (x,), (x_dot,)),
        )

    got, expected, x_alone = on_every_rank(c, f)(x, idx, w, x_dot, w_dot)
    assert_same_tree(got, expected)
    assert_same_tree(x_alone, (expected[0][0], expected[1][0]))


@quick
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cotangents_keep_the_dtype_of_their_rows(dtype):
    c = case("expert")
    x, idx, weights, _ = layer_inputs(c)

    def f(x, idx, weights):
        def loss(x, weights):
            recv, handle = dispatch(c, x, idx, weights)
            return jax_ep.combine(recv.x, handle, recv.weights).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    x_ct, w_ct = jax.jit(sharded(c, f))(x.astype(dtype), idx, weights)
    assert (x_ct.dtype, w_ct.dtype) == (jnp.dtype(dtype), jnp.float32)
    close(w_ct, np.broadcast_to(x.astype(dtype).astype(np.float32).sum(axis=1, keepdims=True), w_ct.shape), 0.05)


# ---- derivatives of a layer ------------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradients_are_those_of_the_dense_layer(layout, check_vma):
    c = case(layout)
    x, idx, weights, scale = layer_inputs(c, "invalid")
    f = layer(c, check_vma)

    def gradients(f):
        loss = lambda x, weights, scale: (f(x, idx, weights, scale) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, weights, scale)

    close(gradients(f), gradients(functools.partial(dense, c)))


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_taken_inside_shard_map(layout):
    c = case(layout)
    args = layer_inputs(c)

    def f(x, idx, weights, scale):
        return jax.grad(lambda x, w, s: (moe(c, x, idx, w, s) ** 2).sum(), (0, 1, 2))(x, weights, scale)

    x, idx, weights, scale = args
    expected = jax.jit(jax.grad(lambda x, w, s: (dense(c, x, idx, w, s) ** 2).sum(), (0, 1, 2)))(x, weights, scale)
    close(jax.jit(sharded(c, f))(*args), expected)


@quick
def test_check_grads_forward_and_reverse_to_second_order():
    """Against finite differences; the next test has the other layouts and exact expectations."""
    c = case("expert-three-ranks")
    x, idx, weights, _ = layer_inputs(c)

    def f(x, idx, weights):
        recv, handle = dispatch(c, x, idx, weights)
        return jax_ep.combine(recv.x * recv.x, handle, recv.weights)

    f = jax.jit(sharded(c, f))
    check_grads(lambda x, weights: f(x, idx, weights), (x, weights), order=2, atol=0.05, rtol=0.05, eps=1e-2)


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_are_those_of_the_dense_layer(layout):
    """Forward over reverse, reverse over forward, reverse over reverse: the same Hessian times a vector."""
    c = case(layout)
    x, idx, weights, scale = layer_inputs(c)
    v = normal(5, *x.shape)

    def products(f):
        def loss(x, w):
            return (f(x, idx, w, scale) ** 2).sum()

        grad = jax.grad(loss)

        def forward_over_reverse(x, w):
            return jax.jvp(lambda x: grad(x, w), (x,), (v,))[1]

        def reverse_over_forward(x, w):
            return jax.grad(lambda x: jax.jvp(lambda x: loss(x, w), (x,), (v,))[1])(x)

        def reverse_over_reverse(x, w):
            return jax.grad(lambda x, w: jnp.vdot(grad(x, w), v), (0, 1))(x, w)

        return jax.jit(
            lambda x, w: (forward_over_reverse(x, w), reverse_over_forward(x, w), reverse_over_reverse(x, w))
        )(x, weights)

    close(products(layer(c)), products(functools.partial(dense, c)), 1e-4)


@quick
def test_jacrev_and_jacfwd():
    """vmap of the transpose and of the tangent."""
    c = case("expert-three-ranks")
    x, idx, weights, scale = layer_inputs(c)
    f = layer(c)

    def jacobian(jac, f):
        return jax.jit(jac(lambda w: f(x, idx, w, scale).sum(axis=1)))(weights)

    expected = jacobian(jax.jacrev, functools.partial(dense, c))
    close(jacobian(jax.jacrev, f), expected)
    close(jacobian(jax.jacfwd, f), expected)


@quick
@pytest.mark.parametrize("layout", ["expert", "batched"])
def test_one_operand_differentiated_and_the_other_not(layout):
    """The other tangent is a symbolic zero. Each of both in one program."""
    c = case(layout)
    x, idx, weights, _ = layer_inputs(c)

    def f(x, idx, weights):
        def loss(x, weights):
            recv, handle = dispatch(c, x, idx, weights)
            return (jax_ep.combine(recv.x, handle, recv.weights) ** 2).sum()

        return jax.grad(lambda x: loss(x, weights))(x), jax.grad(lambda weights: loss(x, weights))(weights)

    def loss(x, weights):
        return ((x[:, None] * weights[..., None]).sum(axis=1) ** 2).sum()

    close(jax.jit(sharded(c, f))(x, idx, weights), jax.jit(jax.grad(loss, (0, 1)))(x, weights), 1e-4)


@quick
def test_dropped_rows_have_no_gradient():
    c = case("expert-tight", exact=True)
    x, idx, weights, scale = layer_inputs(c, "hot_expert")

    def f(x, idx, weights, scale):
        _, handle = dispatch(c, x, idx)
        return handle.slot, jax.grad(lambda x, w: moe(c, x, idx, w, scale).sum(), (0, 1))(x, weights)

    slot, (x_ct, w_ct) = jax.jit(sharded(c, f))(x, idx, weights, scale)
    dropped = np.asarray(slot) < 0
    assert dropped.all(axis=1).any()
    np.testing.assert_array_equal(np.asarray(w_ct)[dropped], 0)
    np.testing.assert_array_equal(np.asarray(x_ct)[dropped.all(axis=1)], 0)
    assert np.asarray(w_ct)[~dropped].all()


@quick
def test_nans_in_rows_that_hold_nothing_stay_out_of_values_and_gradients():
    """Padding of an expert's result is often 0 / 0."""
    c = case("expert-aligned")
    x, idx, weights, _ = layer_inputs(c)

    def f(x, idx, weights):
        def loss(x, weights):
            recv, handle = dispatch(c, x, idx, weights)
            y = jnp.where((recv.x == 0).all(axis=1, keepdims=True), jnp.nan, recv.x)
            return jax_ep.combine(y, handle, recv.weights).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    for gradient in jax.jit(sharded(c, f))(x, idx, weights):
        assert np.isfinite(gradient).all()


# ---- vmap ------------------------------------------------------------------------------------------------------------


def batches(c, size=3):
    """xs, idxs, weightss [B, R * T, ...] and one scale."""
    one = [layer_inputs(c, style) for style in ("distinct", "any", "invalid")[:size]]
    xs, idxs, ws, _ = (np.stack(parts) for parts in zip(*one, strict=True))
    grow = np.arange(1, size + 1, dtype=np.float32)[:, None, None]
    return xs * grow, idxs, ws / grow, one[0][3]


@quick
@pytest.mark.parametrize(
    ("batched", "inside"),
    [
        *((batched, True) for batched in ("x", "weights", "scale", "x-weights", "idx", "x-idx-weights-scale")),
        *((batched, False) for batched in ("x", "x-idx")),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_is_a_loop(layout, batched, inside):
    c = case(layout)
    xs, idxs, ws, scale = batches(c)
    every = {"x": xs, "idx": idxs, "weights": ws, "scale": np.stack([scale, -scale, 2 * scale])}
    axes = [0 if name in batched.split("-") else None for name in every]
    args = [a if axis == 0 else a[0] for a, axis in zip(every.values(), axes, strict=True)]
    if inside:
        specs = tuple(P(None, "expert") if axis == 0 else P("expert") for axis in axes)
        f = jax.shard_map(
            jax.vmap(functools.partial(moe, c), in_axes=axes),
            mesh=mesh_of(c),
            in_specs=specs,
            out_specs=P(None, "expert"),
        )
    else:
        f = jax.vmap(layer(c), in_axes=axes)
    expected = [layer(c)(*(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True))) for i in range(3)]
    got = jax.jit(f)(*args)
    close(got, np.stack(expected), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_rows_is_exact_and_one_exchange(layout):
    """The batch folds into hidden: one dispatch, one combine, no loop; and the arithmetic is that of each call, to the bit."""
    c = case(layout)
    xs, idxs, ws, _ = batches(c)
    xs = xs.astype(c.dtype)

    def rows(x, idx, w):
        recv, handle = dispatch(c, x, idx, w)
        gate = None if layout == "rank" else recv.weights
        return recv.x, jax_ep.combine(recv.x, handle, gate), jax_ep.combine(jax_ep.dispatch_cached(-x, handle), handle)

    many = jax.vmap(rows, in_axes=(0, None, None))
    f = jax.shard_map(
        many, mesh=mesh_of(c), in_specs=(P(None, "expert"), P("expert"), P("expert")), out_specs=P(None, "expert")
    )
    jaxpr = jax.make_jaxpr(f)(xs, idxs[0], ws[0])
    assert count(jaxpr, "scan", "while") == 0
    assert count(jaxpr, "jax_ep_dispatch") == 1
    assert count(jaxpr, "jax_ep_dispatch_cached") == 1
    assert count(jaxpr, "jax_ep_combine", "jax_ep_combine_weighted") == 2
    one = on_every_rank(c, rows)
    for i, got in enumerate(zip(*jax.jit(f)(xs, idxs[0], ws[0]), strict=True)):
        expected = one(*(split_ranks(a, c.num_ranks) for a in (xs[i], idxs[0], ws[0])))
        assert_same_tree(split_ranks(got, c.num_ranks), expected)


@quick
def test_vmap_over_other_axes_of_the_operands_and_twice():
    c = case("expert")
    xs, idxs, ws, scale = batches(c)
    f = layer(c)
    expected = np.stack([f(x, idxs[0], ws[0], scale) for x in xs])
    last = jax.vmap(f, in_axes=(2, None, None, None), out_axes=1)
    close(jax.jit(last)(np.moveaxis(xs, 0, 2), idxs[0], ws[0], scale), np.moveaxis(expected, 0, 1), 1e-6)
    inner = jax.vmap(f, in_axes=(0, None, None, None))
    twice = jax.vmap(inner, in_axes=(None, 0, 0, None))
    got = jax.jit(twice)(xs, idxs, ws, scale)
    close(got[1, 2], f(xs[2], idxs[1], ws[1], scale), 1e-6)
    close(got[0], expected, 1e-6)


@quick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_vmap_and_vmap_of_gradient(layout):
    c = case(layout)
    xs, idxs, ws, scale = batches(c)
    f = layer(c)

    def loss(x, idx, w):
        return (f(x, idx, w, scale) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 2)))
    each = [gradient(*a) for a in zip(xs, idxs, ws, strict=True)]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *each)
    close(jax.jit(jax.vmap(gradient))(xs, idxs, ws), expected)
    close(jax.jit(jax.grad(lambda x, w: jax.vmap(loss)(x, idxs, w).sum(), (0, 1)))(xs, ws), expected)


@quick
def test_vmap_over_handles():
    """Routing made in one vmap, used in another."""
    c = case("expert")
    xs, idxs, _, _ = batches(c)

    def f(xs, idxs):
        _, handles = jax.vmap(lambda x, idx: dispatch(c, x, idx))(xs, idxs)
        rows = jax.vmap(jax_ep.dispatch_cached)(xs, handles)
        shared = jax.vmap(jax_ep.dispatch_cached, in_axes=(None, 0))(xs[0], handles)
        return jax.vmap(jax_ep.combine)(rows, handles), jax.vmap(jax_ep.combine)(shared, handles)

    spec = P(None, "expert")
    got, shared = jax.jit(jax.shard_map(f, mesh=mesh_of(c), in_specs=spec, out_specs=spec))(xs, idxs)
    times = ((idxs >= 0) & (idxs < c.num_experts)).sum(axis=2, keepdims=True)
    close(got, xs * times, 1e-6)
    close(shared, xs[:1] * times, 1e-6)


@pytest.mark.parametrize("layout", ["expert", "batched"])
def test_the_backward_of_a_weighted_combine_is_one_call(layout):
    """Under vmap over the rows too; there each row's inner product is its own."""
    c = case(layout)
    idx = draw_topk_idx(c, "any")
    rows, weights = received_shapes(c, normal(0, *idx.shape[:2], c.hidden), idx, normal(1, *idx.shape))
    gates, ys = normal(2, *weights), normal(3, 3, *rows)
    cts = normal(4, 3, *idx.shape[:2], c.hidden)

    def pull(y, gates, ct, idx):
        _, handle = dispatch(c, ct, idx)
        return jax.vjp(lambda y, gates: jax_ep.combine(y, handle, gates), y, gates)[1](ct)

    def pull_all(ys, gates, cts, idx):
        return jax.vmap(pull, in_axes=(0, None, 0, None))(ys, gates, cts, idx)

    one, many = on_every_rank(c, pull), on_every_rank(c, pull_all)
    each = [one(y, gates, ct, idx) for y, ct in zip(ys, cts, strict=True)]
    together = many(ys.swapaxes(0, 1), gates, cts.swapaxes(0, 1), idx)
    assert_same_tree(together, tuple(np.stack(parts, axis=1) for parts in zip(*each, strict=True)))
    jaxpr = jax.make_jaxpr(sharded(c, pull))(*merge_ranks((ys[0], gates, cts[0], idx)))
    assert count(jaxpr, "jax_ep_combine_grad") == 1 and count(jaxpr, "jax_ep_dispatch_cached") == 0
    jaxpr = jax.make_jaxpr(sharded(c, pull_all))(*merge_ranks((ys.swapaxes(0, 1), gates, cts.swapaxes(0, 1), idx)))
    assert count(jaxpr, "jax_ep_dispatch_cached") == 1


# ---- jit, eager, scan, remat -----------------------------------------------------------------------------------------


def test_eager_equals_jit():
    """Each primitive compiled alone."""
    c = case("expert")
    x, idx, weights, _ = layer_inputs(c, "any")

    def f(x, idx, weights):
        recv, handle = dispatch(c, x, idx, weights)
        return recv, handle, jax_ep.combine(recv.x, handle, recv.weights), jax_ep.dispatch_cached(-x, handle)

    eager, jitted = sharded(c, f)(x, idx, weights), jax.jit(sharded(c, f))(x, idx, weights)
    assert_same_tree(*(jax.tree.map(np.asarray, out) for out in (eager, jitted)))


def layers(c, x, idx, weights, scales, wrap=lambda f: f):
    """A scan over layers; scales [N, L, H]."""

    def body(x, scale):
        return x + moe(c, x, idx, weights, scale), None

    return lax.scan(wrap(body), x, scales)[0]


def scanned(c, wrap=lambda f: f, **options):
    specs = (P("expert"), P("expert"), P("expert"), P(None, "expert"))
    f = functools.partial(layers, c, wrap=wrap)
    return jax.shard_map(f, mesh=mesh_of(c), in_specs=specs, out_specs=P("expert"), **options)


def names_saved(*names):
    return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


REMATS = {
    "everything-saved": lambda f: f,
    "nothing-saved": jax.checkpoint,
    "handle-saved": names_saved("jax_ep_handle"),
    "handle-and-rows-saved": names_saved("jax_ep_handle", "jax_ep_dispatch"),
    "all-saved": names_saved("jax_ep_handle", "jax_ep_dispatch", "jax_ep_combine"),
}


@quick
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_over_layers_and_remat(layout, check_vma):
    c = case(layout)
    x, idx, weights, scale = layer_inputs(c)
    scales = np.stack([scale, -scale, 0.5 * scale])

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, w, s: (f(x, idx, w, s) ** 2).mean(), (0, 1, 2)))(x, weights, scales)

    def plain(x, idx, w, scales):
        for s in scales:
            x = x + dense(c, x, idx, w, s)
        return x

    expected = gradients(plain)
    names = ["nothing-saved", "handle-and-rows-saved", "handle-saved"]
    for name in names if check_vma and layout == "expert" else names[: 1 + check_vma]:
        close(gradients(scanned(c, REMATS[name], check_vma=check_vma)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_remat_does_what_its_policy_says(layout):
    """A saved dispatch is sent once; else once more on the way back. What the transposes send comes on top of either."""
    c = case(layout)
    x, idx, weights, scale = layer_inputs(c)

    def dispatches(wrap):
        f = sharded(c, wrap(functools.partial(moe, c)))
        jaxpr = jax.make_jaxpr(jax.grad(lambda s: (f(x, idx, weights, s) ** 2).sum()))(scale)
        return count(jaxpr, "jax_ep_dispatch", "jax_ep_notify")

    assert dispatches(REMATS["everything-saved"]) == 1
    assert dispatches(REMATS["handle-and-rows-saved"]) == 1
    assert dispatches(REMATS["all-saved"]) == 1
    assert dispatches(REMATS["nothing-saved"]) == 2


@quick
def test_a_handle_in_scans_carry_and_outputs_and_in_cond():
    c = case("expert")
    x, idx, _, _ = layer_inputs(c, "any")

    def f(x, idx):
        _, first = dispatch(c, x, idx)
        _, second = dispatch(c, x, idx[::-1])

        def body(handle, x):
            return handle, (jax_ep.combine(jax_ep.dispatch_cached(x, handle), handle), handle)

        last, (outs, handles) = lax.scan(body, first, jnp.stack([x, 2 * x]))
        chosen = lax.cond(lax.psum(idx.sum(), "expert") > 0, lambda: first, lambda: second)
        again = jax_ep.combine(jax_ep.dispatch_cached(x, chosen), last)
        return outs[0], outs[1], again, jax.tree.map(lambda a: a[1], handles), first

    once, doubled, again, from_ys, first = jax.jit(sharded(c, f))(x, idx)
    times = ((idx >= 0) & (idx < c.num_experts)).sum(axis=1, keepdims=True)
    close(once, x * times, 1e-6)
    close(doubled, 2 * x * times, 1e-6)
    close(again, x * times, 1e-6)
    assert_same_tree(jax.tree.map(np.asarray, from_ys), jax.tree.map(np.asarray, first))


@quick
def test_dispatch_in_a_branch_and_in_an_inner_jit():
    """The predicate is the same on every rank, or they would wait for each other."""
    c = case("expert")
    args = layer_inputs(c)

    def f(x, idx, weights, scale):
        inner = jax.jit(functools.partial(moe, c))
        taken = lax.cond(lax.psum(x.size, "expert") > 0, inner, lambda x, *_: x, x, idx, weights, scale)
        return taken, lax.cond(lax.psum(x.size, "expert") < 0, inner, lambda x, *_: x, x, idx, weights, scale)

    taken, other = jax.jit(sharded(c, f))(*args)
    close(taken, dense(c, *args))
    close(other, args[0])


def test_a_handle_in_host_memory():
    c = case("expert")
    x, idx, _, _ = layer_inputs(c, "any")
    _, handle = jax.jit(sharded(c, functools.partial(dispatch, c)))(x, idx)
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip(f"no pinned_host memory, only {sorted(kinds)}")
    away = jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind("pinned_host")), handle)
    back = jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind("device")), away)
    assert away.slot.sharding.memory_kind == "pinned_host"
    f = jax.jit(sharded(c, jax_ep.dispatch_cached))
    assert_same_bits(np.asarray(f(x, back)), np.asarray(f(x, handle)))


def test_a_handle_saved_to_a_file_and_used_by_another_program():
    """A pytree of integer arrays with static fields: no pointers, no ids of hidden state."""
    c = case("expert-permuted")
    x, idx, _, _ = layer_inputs(c, "any")
    _, handle = jax.jit(sharded(c, functools.partial(dispatch, c)))(x, idx)
    leaves, structure = jax.tree.flatten(handle)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert hash(structure) == hash(jax.tree.structure(handle))
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    loaded = np.load(file)
    restored = jax.tree.unflatten(structure, [loaded[name] for name in loaded.files])
    f = sharded(c, lambda x, h: jax_ep.combine(jax_ep.dispatch_cached(x, h), h))
    got = jax.jit(f)(x, restored)
    assert_same_bits(np.asarray(f(x, handle)), np.asarray(got))
    times = ((idx >= 0) & (idx < c.num_experts)).sum(axis=1, keepdims=True)
    close(got, x * times, 1e-6)
    with pytest.raises((AttributeError, TypeError), match=r"frozen|assign"):
        handle.slot = None


def test_nothing_recompiles_for_another_handle_of_the_same_sizes():
    c = case("expert")
    x, idx, _, _ = layer_inputs(c)
    send = jax.jit(sharded(c, functools.partial(dispatch, c)))
    traces = []

    def back(x, h):
        traces.append(1)
        return jax_ep.combine(jax_ep.dispatch_cached(x, h), h)

    f = jax.jit(sharded(c, back))
    for ids in (idx, idx[::-1], np.zeros_like(idx)):
        f(x, send(x, ids)[1])
    assert len(traces) == 1


# ---- meshes ----------------------------------------------------------------------------------------------------------


def two_axes(c, other):
    """A mesh with another axis before the case's: of size 2 if there are devices for that, else of size 1."""
    size = 2 if len(jax.devices()) >= 2 * c.num_ranks else 1
    devices = np.array(jax.devices()[: size * c.num_ranks])
    return jax.sharding.Mesh(devices.reshape(size, c.num_ranks), (other, "expert"))


def data_by_expert(c):
    return two_axes(c, "data")


@quick
@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallel_times_expert_parallel(check_vma):
    """Experts are replicated over "data": their gradient is the sum over it."""
    c = case("expert-many-choices")  # 2 ranks
    mesh = data_by_expert(c)
    halves = [layer_inputs(c, style) for style in ("distinct", "any")][: mesh.shape["data"]]
    x, idx, weights = (np.concatenate([half[i] for half in halves]) for i in range(3))
    scale = halves[0][3]
    tokens = P(("data", "expert"))
    f = jax.shard_map(
        functools.partial(moe, c),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, P("expert")),
        out_specs=tokens,
        check_vma=check_vma,
    )

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, w, s: (f(x, idx, w, s) ** 2).sum(), (0, 1, 2)))(x, weights, scale)

    close(gradients(f), gradients(functools.partial(dense, c)))


@quick
def test_operands_the_same_on_all_ranks():
    """Under check_vma a replicated operand has another type; it is cast, not refused, and its gradient is a sum."""
    c = case("expert")
    x, idx, weights, scale = layer_inputs(c)
    x, idx, weights = (a[: c.num_tokens] for a in (x, idx, weights))

    def f(x, idx, weights, scale):
        return moe(c, x, idx, weights, scale)[None]

    g = jax.shard_map(f, mesh=mesh_of(c), in_specs=(P(), P(), P(), P("expert")), out_specs=P("expert"))

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, w, s: (f(x, idx, w, s) ** 2).sum(), (0, 1, 2)))(x, weights, scale)

    close(gradients(g), gradients(lambda *a: jnp.stack([dense(c, *a)] * c.num_ranks)), 1e-4)


@quick
def test_shard_map_nested_in_shard_map():
    """The outer one takes "data", the inner one "expert": where dispatch stands, no axis is left automatic."""
    c = case("expert-many-choices")
    mesh = data_by_expert(c)
    halves = [layer_inputs(c, style) for style in ("distinct", "any")][: mesh.shape["data"]]
    x, idx, weights = (np.stack([half[i] for half in halves]) for i in range(3))
    scale = halves[0][3]

    def outer(x, idx, weights, scale):
        inner = jax.shard_map(
            functools.partial(moe, c), in_specs=P("expert"), out_specs=P("expert"), axis_names={"expert"}
        )
        return inner(x[0], idx[0], weights[0], scale)[None]

    f = jax.shard_map(
        outer, mesh=mesh, in_specs=(P("data"), P("data"), P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )
    got = jax.jit(f)(x, idx, weights, scale)
    close(got, np.stack([dense(c, x[i], idx[i], weights[i], scale) for i in range(len(halves))]))


@quick
def test_other_axes_of_the_mesh_are_left_alone():
    """Hidden split over a second axis: each of its columns is a group of its own, and results vary over it."""
    c = case("expert-many-choices")
    mesh = two_axes(c, "model")
    x, idx, weights, scale = layer_inputs(c)
    x, scale = np.concatenate([x, -x], axis=1), np.concatenate([scale, scale], axis=1)
    f = jax.shard_map(
        functools.partial(moe, c),
        mesh=mesh,
        in_specs=(P("expert", "model"), P("expert"), P("expert"), P("expert", "model")),
        out_specs=P("expert", "model"),
    )
    close(jax.jit(f)(x, idx, weights, scale), dense(c, x, idx, weights, scale))


@quick
def test_vmap_whose_batch_lies_along_another_axis_of_the_mesh():
    """spmd_axis_name: the batch folds into hidden where it stands, on the ranks of its part of the mesh."""
    c = case("expert-many-choices")
    xs, idxs, ws, scale = batches(c, 2)
    specs = (P("expert"), P("expert"), P("expert"), P("expert"))
    f = jax.shard_map(
        functools.partial(moe, c), mesh=data_by_expert(c), in_specs=specs, out_specs=P("expert"), check_vma=False
    )
    got = jax.jit(jax.vmap(f, in_axes=(0, None, None, None), spmd_axis_name="data"))(xs, idxs[0], ws[0], scale)
    close(got, np.stack([dense(c, x, idxs[0], ws[0], scale) for x in xs]))


@quick
def test_a_mesh_with_explicit_axes():
    """What jax.make_mesh makes: operands carry their sharding in their type."""
    c = case("expert")
    mesh = mesh_of(c, jax.sharding.AxisType.Explicit)
    spec = P("expert")
    args = [jax.device_put(a, jax.sharding.NamedSharding(mesh, spec)) for a in layer_inputs(c)]
    f = jax.shard_map(functools.partial(moe, c), mesh=mesh, in_specs=spec, out_specs=spec)

    def gradients(f, x, idx, weights, scale):
        return jax.jit(jax.value_and_grad(lambda x, w, s: (f(x, idx, w, s) ** 2).sum(), (0, 1, 2)))(x, weights, scale)

    expected = gradients(functools.partial(dense, c), *layer_inputs(c))
    close(gradients(f, *args), expected)


@quick
@pytest.mark.parametrize("name", ["expert-two-axes", "expert-permuted"])
def test_layers_over_two_axes_and_permuted_devices(name):
    c = case(name)
    x, idx, weights, scale = layer_inputs(c)

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, w, s: (f(x, idx, w, s) ** 2).sum(), (0, 1, 2)))(x, weights, scale)

    close(gradients(layer(c)), gradients(functools.partial(dense, c)))


# ---- export and lowering ---------------------------------------------------------------------------------------------


def avals(c, args):
    sharding = jax.sharding.NamedSharding(mesh_of(c), P(c.axis_name))
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_and_back_with_gradients(layout):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with it")
    c = case(layout)
    args = layer_inputs(c)
    f = jax.jit(sharded(c, functools.partial(moe, c)))  # not `layer`, which a quick test may have compiled
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_ep_{mode}{name}")
        for mode in ("", "low_latency_")
        for name in ("notify", "dispatch", "dispatch_cached", "combine", "combine_weighted", "combine_grad")
    ]
    exported = jax.export.export(f, disabled_checks=checks)(*avals(c, args))
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1))
    placed = [jax.device_put(a, s.sharding) for a, s in zip(args, avals(c, args), strict=True)]
    assert_same_bits(np.asarray(jax.jit(loaded.call)(*placed)), np.asarray(f(*args)))
    x, idx, weights, scale = placed
    gradient = jax.jit(jax.grad(lambda x: (loaded.call(x, idx, weights, scale) ** 2).sum()))(x)
    close(gradient, jax.jit(jax.grad(lambda x: (dense(c, x, *args[1:]) ** 2).sum()))(args[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lowering_for_cuda_needs_no_gpu(layout):
    c = case(layout)
    args = layer_inputs(c)

    def step(x, idx, weights, scale):
        return jax.grad(lambda x, w, s: (layer(c)(x, idx, w, s) ** 2).sum(), (0, 1, 2))(x, weights, scale)

    for platforms in (("cuda",), ("cpu",), ("cpu", "cuda")):
        text = jax.jit(step).trace(*avals(c, args)).lower(lowering_platforms=platforms).as_text()
        assert "func.func public @main" in text


def test_programs_lower_to_the_same_text_every_time():
    c = case("expert")
    args = avals(c, layer_inputs(c))
    texts = {jax.jit(sharded(c, functools.partial(moe, c))).trace(*args).lower().as_text() for _ in range(2)}
    assert len(texts) == 1
