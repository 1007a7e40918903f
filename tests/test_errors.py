"""What shapes, dtypes and static arguments can tell is told at trace time: operation, argument, rule, value, next step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case
from spmd import mesh_of

import jax_ep

P = jax.P
TWO_RANKS = jax.sharding.AbstractMesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))  # of no device
T, K, E, H = 4, 2, 4, 16


def of(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


X, IDX, WEIGHTS = of(T, H), of(T, K, dtype=jnp.int32), of(T, K)


def on_a_mesh(f, mesh=None, **options):
    """Traces f, per rank, inside shard_map; nothing is compiled or run."""
    mesh = mesh or TWO_RANKS
    return jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False, **options))


def refused(error, operation, *fragments, trace=on_a_mesh):
    """A decorator-free `with`: f() must raise `error` in the one form, naming every fragment."""

    def check(f):
        with pytest.raises(error) as caught:
            trace(f)
        message = str(caught.value)
        assert re.fullmatch(rf"{operation}: \S.* (must|go(es)? with) .*, got .+\. .+\.", message, re.DOTALL), message
        for fragment in fragments:
            assert fragment in message, message

    return check


def dispatched(x=X, topk_idx=IDX, topk_weights=None, **options):
    options = {"axis_name": "expert", "num_experts": E} | options
    return jax_ep.dispatch(x, topk_idx, topk_weights, **options)


@pytest.mark.parametrize("operation", ["dispatch", "dispatch_start"])
@pytest.mark.parametrize(
    ("error", "fragments", "arguments"),
    [
        pytest.param(TypeError, ["x ", "list"], {"x": [1.0]}, id="x-is-a-list"),
        pytest.param(
            TypeError, ["bf16, f16 or f32", "s32[4, 16]"], {"x": of(T, H, dtype=jnp.int32)}, id="x-of-integers"
        ),
        pytest.param(TypeError, ["float8_e4m3fn[4, 16]"], {"x": of(T, H, dtype=jnp.float8_e4m3fn)}, id="x-of-bare-fp8"),
        pytest.param(ValueError, ["[num_tokens, hidden]", "f32[16]"], {"x": of(H)}, id="x-without-tokens"),
        pytest.param(ValueError, ["16 bytes", "f32[4, 6]", "Pad hidden to 8"], {"x": of(T, 6)}, id="row-of-24-bytes"),
        pytest.param(ValueError, ["16 bytes", "bf16[4, 4]"], {"x": of(T, 4, dtype=jnp.bfloat16)}, id="row-of-8-bytes"),
        pytest.param(ValueError, ["16 bytes", "f32[4, 0]"], {"x": of(T, 0)}, id="row-of-no-bytes"),
        pytest.param(TypeError, ["topk_idx", "f32[4, 2]", "astype(jnp.int32)"], {"topk_idx": of(T, K)}, id="float-ids"),
        pytest.param(
            TypeError, ["topk_idx", "s16[4, 2]"], {"topk_idx": of(T, K, dtype=jnp.int16)}, id="ids-of-16-bits"
        ),
        pytest.param(TypeError, ["topk_idx", "u32[4, 2]"], {"topk_idx": of(T, K, dtype=jnp.uint32)}, id="unsigned-ids"),
        pytest.param(
            ValueError, ["topk_idx", "s32[3, 2]"], {"topk_idx": of(3, K, dtype=jnp.int32)}, id="fewer-ids-than-tokens"
        ),
        pytest.param(
            ValueError, ["topk_idx", "s32[4]"], {"topk_idx": of(T, dtype=jnp.int32)}, id="ids-without-choices"
        ),
        pytest.param(
            ValueError,
            ["topk_idx", "2, 2, 2"],
            {"topk_idx": of(2, 2, K, dtype=jnp.int32)},
            id="ids-with-other-leading-axes",
        ),
        pytest.param(
            ValueError, ["num_experts = 4"], {"topk_idx": of(T, 5, dtype=jnp.int32)}, id="more-choices-than-experts"
        ),
        pytest.param(ValueError, ["topk_idx"], {"topk_idx": of(T, 0, dtype=jnp.int32)}, id="no-choices"),
        pytest.param(TypeError, ["topk_weights", "s32[4, 2]"], {"topk_weights": IDX}, id="integer-weights"),
        pytest.param(
            ValueError, ["topk_weights", "f32[4, 1]"], {"topk_weights": of(T, 1)}, id="weights-of-another-shape"
        ),
        pytest.param(ValueError, ["multiple of the 2 ranks", "got 5"], {"num_experts": 5}, id="experts-do-not-divide"),
        pytest.param(ValueError, ["num_experts", "got 0"], {"num_experts": 0}, id="no-experts"),
        pytest.param(TypeError, ["num_experts", "4.0"], {"num_experts": 4.0}, id="experts-of-a-float"),
        pytest.param(
            ValueError, ["layout", "'expert', 'rank', 'batched'", "'ranks'"], {"layout": "ranks"}, id="unknown-layout"
        ),
        pytest.param(ValueError, ["wire", "'mxfp8'", "'fp4'"], {"wire": "fp4"}, id="unknown-wire"),
        pytest.param(ValueError, ["wire", "'logfmt10'"], {"wire": "logfmt10"}, id="the-way-backs-wire"),
        pytest.param(ValueError, ["mode", "'low_latency'", "'fast'"], {"mode": "fast"}, id="unknown-mode"),
        pytest.param(ValueError, ["num_sms", "got 0"], {"num_sms": 0}, id="no-sms"),
        pytest.param(TypeError, ["num_sms"], {"num_sms": True}, id="sms-of-a-bool"),
        pytest.param(ValueError, ["max_recv_tokens", "-1"], {"max_recv_tokens": -1}, id="negative-rows"),
        pytest.param(TypeError, ["max_recv_tokens", "2.5"], {"max_recv_tokens": 2.5}, id="rows-of-a-float"),
        pytest.param(
            ValueError, ["expert_capacity", "-1"], {"expert_capacity": -1, "layout": "batched"}, id="negative-capacity"
        ),
        pytest.param(ValueError, ["expert_alignment", "got 0"], {"expert_alignment": 0}, id="no-alignment"),
        pytest.param(
            ValueError, ["expert_alignment", "8"], {"expert_alignment": 8, "layout": "rank"}, id="alignment-of-ranks"
        ),
        pytest.param(
            ValueError,
            ["expert_alignment", "8"],
            {"expert_alignment": 8, "layout": "batched"},
            id="alignment-of-batches",
        ),
        pytest.param(ValueError, ["expert_capacity"], {"expert_capacity": 8}, id="capacity-of-groups"),
        pytest.param(ValueError, ["expert_capacity"], {"expert_capacity": 8, "layout": "rank"}, id="capacity-of-ranks"),
        pytest.param(
            ValueError, ["max_recv_tokens"], {"max_recv_tokens": 8, "layout": "batched"}, id="rows-of-batches"
        ),
        pytest.param(ValueError, ["2**31"], {"max_recv_tokens": 2**30}, id="rows-beyond-32-bits"),
        pytest.param(NameError, ["'experts'", "jax.shard_map"], {"axis_name": "experts"}, id="unbound-axis"),
        pytest.param(TypeError, ["axis_name"], {"axis_name": ()}, id="no-axis"),
        pytest.param(TypeError, ["axis_name"], {"axis_name": ("expert", "expert")}, id="an-axis-twice"),
        pytest.param(TypeError, ["axis_name"], {"axis_name": 0}, id="axis-by-number"),
        pytest.param(
            ValueError,
            ["wire", "Quantized"],
            {"x": jax_ep.Quantized(of(T, H, dtype=jnp.uint8), of(T, 1)), "wire": "fp8"},
            id="wire-for-quantized-rows",
        ),
        pytest.param(
            ValueError,
            ["x.scales", "f32[3, 1]"],
            {"x": jax_ep.Quantized(of(T, H, dtype=jnp.uint8), of(3, 1))},
            id="scales-of-other-tokens",
        ),
        pytest.param(
            TypeError,
            ["whole bytes", "float4_e2m1fn[4, 64]", "u8[num_tokens, hidden / 2]"],
            {"x": jax_ep.Quantized(of(T, 64, dtype=jnp.float4_e2m1fn), of(T, 1))},
            id="fp4-rows-unpacked",
        ),
        pytest.param(
            TypeError,
            ["whole bytes", "bool[4, 64]"],
            {"x": jax_ep.Quantized(of(T, 64, dtype=jnp.bool_), of(T, 1))},
            id="bool-rows",
        ),
        pytest.param(
            ValueError,
            ["x.carrier", "f32[3, 16]"],
            {"x": jax_ep.Quantized(of(T, H, dtype=jnp.uint8), of(T, 1), of(3, H))},
            id="carrier-of-other-tokens",
        ),
        pytest.param(
            ValueError,
            ["16 bytes", "u8[4, 8]"],
            {"x": jax_ep.Quantized(of(T, 8, dtype=jnp.uint8), of(T, 1))},
            id="quantized-row-of-8-bytes",
        ),
    ],
)
def test_dispatch_refuses(operation, error, fragments, arguments):
    arguments = {"x": X, "topk_idx": IDX, "axis_name": "expert", "num_experts": E} | arguments
    refused(error, operation, *fragments)(lambda: getattr(jax_ep, operation)(**arguments))


@pytest.mark.parametrize("operation", ["combine", "combine_start"])
@pytest.mark.parametrize(
    ("error", "fragments", "layout", "arguments"),
    [
        pytest.param(TypeError, ["y ", "list"], "expert", {"y": [0.0]}, id="y-is-a-list"),
        pytest.param(
            TypeError,
            ["bf16, f16 or f32", "s32[16, 16]"],
            "expert",
            {"y": of(16, H, dtype=jnp.int32)},
            id="y-of-integers",
        ),
        pytest.param(
            ValueError, ["y must be [16, hidden]", "f32[15, 16]"], "expert", {"y": of(15, H)}, id="other-rows"
        ),
        pytest.param(
            ValueError, ["y must be [2, 8, hidden]", "f32[16, 16]"], "batched", {"y": of(16, H)}, id="batches-flat"
        ),
        pytest.param(
            ValueError, ["y must be [8, hidden]", "f32[16, 16]"], "rank", {"y": of(16, H)}, id="rows-of-another-layout"
        ),
        pytest.param(ValueError, ["16 bytes", "f32[16, 3]"], "expert", {"y": of(16, 3)}, id="row-of-12-bytes"),
        pytest.param(
            ValueError, ["weights", "rank"], "rank", {"y": of(8, H), "weights": of(8, K)}, id="weights-with-layout-rank"
        ),
        pytest.param(
            ValueError,
            ["weights must be f32[16]", "f32[4, 2]"],
            "expert",
            {"y": of(16, H), "weights": WEIGHTS},
            id="topk-weights",
        ),
        pytest.param(
            TypeError,
            ["weights must be f32[16]", "s32[16]"],
            "expert",
            {"y": of(16, H), "weights": of(16, dtype=jnp.int32)},
            id="integer-weights",
        ),
        pytest.param(
            ValueError,
            ["wire", "'logfmt10'", "'fp8'"],
            "expert",
            {"y": of(16, H), "wire": "fp8"},
            id="the-way-outs-wire",
        ),
        pytest.param(
            TypeError, ["handle", "Handle", "tuple"], "expert", {"y": of(16, H), "handle": ()}, id="no-handle"
        ),
        pytest.param(
            TypeError,
            ["y ", "Quantized"],
            "expert",
            {"y": jax_ep.Quantized(of(16, H, dtype=jnp.uint8), of(16, 1))},
            id="quantized-y",
        ),
    ],
)
def test_combine_refuses(operation, error, fragments, layout, arguments):
    def f():
        _, handle = dispatched(layout=layout)
        return getattr(jax_ep, operation)(**({"handle": handle} | arguments))

    refused(error, operation, *fragments)(f)


@pytest.mark.parametrize(
    ("error", "fragments", "x"),
    [
        pytest.param(ValueError, ["handle's tokens [4]", "f32[5, 16]"], of(5, H), id="other-tokens"),
        pytest.param(ValueError, ["handle's tokens [4]", "f32[2, 2, 16]"], of(2, 2, H), id="other-leading-axes"),
        pytest.param(TypeError, ["bf16, f16 or f32", "s32[4, 16]"], of(T, H, dtype=jnp.int32), id="integers"),
        pytest.param(ValueError, ["16 bytes", "f32[4, 5]"], of(T, 5), id="row-of-20-bytes"),
    ],
)
def test_dispatch_cached_refuses(error, fragments, x):
    refused(error, "dispatch_cached", *fragments)(lambda: jax_ep.dispatch_cached(x, dispatched()[1]))


def test_dispatch_cached_refuses_what_is_no_handle():
    refused(TypeError, "dispatch_cached", "Handle", "Dispatched")(lambda: jax_ep.dispatch_cached(X, dispatched()[0]))


@pytest.mark.parametrize(
    ("operation", "maker"), [("dispatch_done", "dispatch_start"), ("combine_done", "combine_start")]
)
def test_the_second_half_refuses_what_its_first_half_did_not_return(operation, maker):
    refused(TypeError, operation, maker)(lambda: getattr(jax_ep, operation)(dispatched()))


def test_outside_shard_map():
    refused(NameError, "dispatch", "'expert'", "jax.shard_map", trace=lambda f: f())(dispatched)
    refused(NameError, "dispatch", "'expert'", "jax.shard_map", trace=jax.eval_shape)(dispatched)


def test_a_handle_outside_shard_map():
    handle = on_a_mesh(lambda: dispatched()[1])
    refused(NameError, "combine", "jax.shard_map", trace=jax.eval_shape)(lambda: jax_ep.combine(of(16, H), handle))
    refused(NameError, "dispatch_cached", "jax.shard_map", trace=jax.eval_shape)(
        lambda: jax_ep.dispatch_cached(X, handle)
    )


def test_a_handle_of_another_number_of_ranks():
    handle = on_a_mesh(lambda: dispatched()[1])
    one = mesh_of(case("expert-one-rank"))
    arrays = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), handle)
    refused(ValueError, "combine", "2 ranks", trace=lambda f: on_a_mesh(f, one))(
        lambda: jax_ep.combine(of(16, H), arrays)
    )


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_an_axis_left_to_the_partitioner(operation):
    """It would gather the operands and repeat the call on every device of that axis: silently right, and slow."""
    grid = dataclasses.replace(case("expert-two-axes"), axes=(("data", 2), ("expert", 2)))
    mesh = mesh_of(grid)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def f():
        if operation == "dispatch":
            return dispatched()
        handle = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), on_a_mesh_handle)
        return jax_ep.combine(of(16, H), handle)

    on_a_mesh_handle = on_a_mesh(lambda: dispatched()[1])
    refused(
        ValueError,
        operation,
        "'data'",
        "manual",
        "axis_names",
        trace=lambda f: on_a_mesh(f, mesh, axis_names={"expert"}),
    )(f)


def test_vmap_over_the_expert_axis_itself():
    """A name that vmap binds is no mesh axis: there are no ranks along it."""
    with pytest.raises((NameError, NotImplementedError, ValueError, TypeError), match="shard_map"):
        jax.vmap(lambda x, idx: dispatched(x, idx), axis_name="expert")(of(2, T, H), of(2, T, K, dtype=jnp.int32))


@pytest.mark.parametrize(
    ("error", "fragments", "topk_idx", "arguments"),
    [
        pytest.param(TypeError, ["topk_idx", "f32[4, 2]"], of(T, K), {}, id="float-ids"),
        pytest.param(ValueError, ["num_experts", "5"], IDX, {"num_experts": 5}, id="experts-do-not-divide"),
        pytest.param(ValueError, ["num_ranks", "0"], IDX, {"num_ranks": 0}, id="no-ranks"),
    ],
)
def test_dispatch_layout_refuses(error, fragments, topk_idx, arguments):
    arguments = {"num_experts": E, "num_ranks": 2} | arguments
    refused(error, "dispatch_layout", *fragments, trace=jax.eval_shape)(
        lambda: jax_ep.dispatch_layout(topk_idx, **arguments)
    )


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_none(seconds):
    """No wait may be unbounded."""
    before = jax_ep.config.timeout

    def f():
        jax_ep.config.timeout = seconds

    refused(ValueError, "config", "timeout", str(float(seconds)), trace=lambda f: f())(f)
    assert jax_ep.config.timeout == before == 60


def test_a_barrier_along_no_axis():
    refused(NameError, "barrier", "'expert'", trace=lambda f: f())(lambda: jax_ep.barrier("expert"))


def test_a_barrier_of_a_mapped_axis_that_is_no_mesh_axis():
    with pytest.raises(NotImplementedError, match=r"'expert'.*jax\.shard_map"):
        jax.vmap(lambda x: x + jax_ep.barrier("expert"), axis_name="expert")(jnp.zeros((2, 1), jnp.int32))


def test_a_barrier_under_vmap_is_one_for_all():
    num_ranks = min(2, len(jax.devices()))
    mesh = jax.make_mesh((num_ranks,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def f(x):
        return jax.vmap(lambda row: row + jax_ep.barrier("expert"))(x)

    g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    np.testing.assert_array_equal(g(np.zeros((6, 1), np.int32)), np.full((6, 1), num_ranks))
    assert str(jax.make_jaxpr(g)(np.zeros((6, 1), np.int32))).count("jax_ep_barrier") == 1
