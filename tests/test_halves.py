"""dispatch_start and dispatch_done, combine_start and combine_done: to the bit what the whole calls give, with work in between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case
from spmd import LAYOUTS, assert_same_tree, dispatch, on_every_rank
from strategies import draw_topk_idx, integers, normal

import jax_ep

ONE_OF_A_KIND = [
    case(name)
    for name in ("expert-tight-aligned", "expert-no-tokens", "expert-two-axes", "rank-tight", "batched-tight")
]

# Halves are compared with the whole calls, compiled alike; what the whole calls sum is held to the bit as XLA optimises it in
# test_combine.py and test_arithmetic.py.
pytestmark = pytest.mark.usefixtures("compiles_fast")


@pytest.fixture(params=["auto", "high_throughput"])
def mode(request):
    """High throughput's halves are asked for by name."""
    if request.param == "high_throughput" and jax.default_backend() == "cpu":
        pytest.skip("on CPU every mode is the reference")
    return request.param


def whole(case, mode, x, topk_idx, weights):
    recv, handle = dispatch(case, x, topk_idx, weights, mode=mode)
    return recv, handle, jax_ep.combine(recv.x * recv.x, handle, None if case.layout == "rank" else recv.weights)


def halved(case, mode, x, topk_idx, weights):
    pending = dispatch(case, x, topk_idx, weights, start_only=True, mode=mode)
    meanwhile = jnp.cos(x) @ jnp.ones((x.shape[1], 8), x.dtype)
    recv, handle = jax_ep.dispatch_done(pending)
    pending = jax_ep.combine_start(recv.x * recv.x, handle, None if case.layout == "rank" else recv.weights)
    meanwhile = meanwhile + 1
    return recv, handle, jax_ep.combine_done(pending) + 0 * meanwhile[:, :1]


def arrays(case):
    shape = (case.num_ranks, case.num_tokens)
    return (
        normal(0, *shape, case.hidden, dtype=case.dtype),
        draw_topk_idx(case, "invalid"),
        normal(1, *shape, case.num_topk),
    )


@pytest.mark.parametrize("case", ONE_OF_A_KIND, ids=str)
def test_halves_give_what_the_whole_gives(case, mode):
    expected = on_every_rank(case, functools.partial(whole, case, mode))(*arrays(case))
    assert_same_tree(on_every_rank(case, functools.partial(halved, case, mode))(*arrays(case)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_without_weights(layout, mode):
    small = case(layout)
    x, idx, _ = arrays(small)

    def f(x, idx):
        recv, handle = jax_ep.dispatch_done(dispatch(small, x, idx, start_only=True, mode=mode))
        return recv, handle, jax_ep.combine_done(jax_ep.combine_start(recv.x, handle))

    def g(x, idx):
        recv, handle = dispatch(small, x, idx, mode=mode)
        return recv, handle, jax_ep.combine(recv.x, handle)

    assert_same_tree(on_every_rank(small, f)(x, idx), on_every_rank(small, g)(x, idx))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_halves_are_those_of_the_whole(layout, mode):
    small = case(layout)
    _, idx, _ = arrays(small)
    x, ct = (integers(seed, small.num_ranks, small.num_tokens, small.hidden) for seed in (2, 3))
    weights = integers(4, *idx.shape)

    def derivatives(f):
        def g(x, idx, weights, ct):
            def loss(x, weights):
                return (f(small, mode, x, idx, weights)[2] * ct).sum()

            tangent = jax.jvp(lambda x, weights: f(small, mode, x, idx, weights)[2], (x, weights), (ct, weights))
            return jax.grad(loss, (0, 1))(x, weights), tangent

        return on_every_rank(small, g)(x, idx, weights, ct)

    assert_same_tree(derivatives(halved), derivatives(whole))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_under_vmap_scan_and_remat(layout, mode):
    small = case(layout)
    x, idx, weights = arrays(small)
    xs = np.stack([x, -x, 2 * x], axis=1)  # [R, 3, T, H]

    def loop(f):
        def g(x, idx, weights):  # x[3, T, H]: what shard_map hands over, the batch first
            one = jax.checkpoint(lambda x: f(small, mode, x, idx, weights)[2])
            return jax.vmap(one)(x), jax.lax.map(one, x), jnp.stack([one(x[i]) for i in range(3)])

        return on_every_rank(small, g)(xs, idx, weights)

    batched, scanned, looped = loop(halved)
    assert_same_tree((batched, scanned), (looped, looped))
    assert_same_tree((batched, scanned, looped), loop(whole))


def test_halves_in_a_wire_format(mode):
    """All formats in one program."""
    small, formats = case("expert"), ("fp8", "fp8_ue8m0", "mxfp8")
    x, idx, weights = arrays(small)

    def start_and_done(wire, *args):
        return jax_ep.dispatch_done(dispatch(small, *args, start_only=True, wire=wire, mode=mode))

    def at_once(wire, *args):
        return dispatch(small, *args, wire=wire, mode=mode)

    def in_every_format(f):
        return on_every_rank(small, lambda *args: {wire: f(wire, *args) for wire in formats})(x, idx, weights)

    expected = in_every_format(at_once)
    for wire, got in in_every_format(start_and_done).items():
        assert_same_tree(got, expected[wire], wire)


def test_two_calls_in_flight_at_once_do_not_mix(mode):
    """Started in one order, finished in the other."""
    small = case("expert")
    x, idx, weights = arrays(small)

    def f(x, idx, weights):
        first = dispatch(small, x, idx, weights, start_only=True, mode=mode)
        second = dispatch(small, -x, idx[::-1], weights, start_only=True, mode=mode)
        recv2, handle2 = jax_ep.dispatch_done(second)
        recv1, handle1 = jax_ep.dispatch_done(first)
        back1 = jax_ep.combine_start(recv1.x, handle1, recv1.weights)
        back2 = jax_ep.combine_start(recv2.x, handle2)
        return recv1, handle1, recv2, handle2, jax_ep.combine_done(back2), jax_ep.combine_done(back1)

    def g(x, idx, weights):
        recv1, handle1 = dispatch(small, x, idx, weights, mode=mode)
        recv2, handle2 = dispatch(small, -x, idx[::-1], weights, mode=mode)
        return (
            recv1,
            handle1,
            recv2,
            handle2,
            jax_ep.combine(recv2.x, handle2),
            jax_ep.combine(recv1.x, handle1, recv1.weights),
        )

    assert_same_tree(on_every_rank(small, f)(x, idx, weights), on_every_rank(small, g)(x, idx, weights))
