"""What the lowered calls say is what the handlers' bindings ask for: XLA refuses a call with an attribute too many or too few.

Lowered for CUDA in every mode, layout and wire format, whole and in halves, within a node and over nodes; the bindings are
read from the C++ sources. Nothing is compiled, so this needs no GPU, no wheel of CUDA and no nvcc.
"""

import collections
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._src import group, targets

if jax.default_backend() != "cpu":
    pytest.skip("lowers for GPUs on a mesh of virtual CPU devices", allow_module_level=True)

FFI = Path(__file__).parent.parent / "ffi"
R, T, H, E, K = 4, 32, 256, 16, 4
KINDS = {"ffi::Span<const int64_t>": "i64[]", "int64_t": "i64"}
MODES = ("high_throughput", "low_latency")
WIRES = (None, "fp8", "fp8_ue8m0", "mxfp8")


# ---- what the handlers ask for ---------------------------------------------------------------------------------------


def bindings(source):
    """{symbol: {attribute: kind}} of the handlers that a source defines, by functions that bind or in place."""
    text = re.sub(r"//.*", "", source)
    functions = dict(re.findall(r"auto (\w+)\(\) \{\s*return (ffi::Ffi::Bind[^;]*);", text))
    found = {}
    for symbol, rest in re.findall(r"^XLA_FFI_DEFINE_HANDLER_SYMBOL\((\w+),([^;]*)\);", text, re.MULTILINE):
        named = [chain for name, chain in functions.items() if f"jax_ep::{name}()" in rest]
        (chain,) = named or [rest[rest.index("ffi::Ffi::Bind") :]]
        found[symbol] = {name: KINDS[kind] for kind, name in re.findall(r'\.Attr<([^"]*)>\("(\w+)"\)', chain)}
    return found


def asked():
    """{target: {attribute: kind}} of all that ffi/module.cc registers for CUDA."""
    by_symbol = {}
    for path in FFI.glob("*/*_ffi.cc"):
        by_symbol |= bindings(path.read_text())
    registered = re.findall(r'\badd\("(\w+)", (\w+)', (FFI / "module.cc").read_text())
    return {target: by_symbol[symbol] for target, symbol in registered}


def test_all_bindings_are_read():
    assert set(asked()) == set(targets._core.handlers())
    for path in FFI.glob("*/*_ffi.cc"):
        found = bindings(path.read_text())
        assert len(found) == path.read_text().count("XLA_FFI_DEFINE_HANDLER_SYMBOL"), path
        named = re.findall(r'\bAttr<.*>\("(\w+)"\)', path.read_text())
        assert set(named) == {name for attributes in found.values() for name in attributes}, path


# ---- what the calls say ----------------------------------------------------------------------------------------------


def calls(f):
    """(target, {attribute: kind}) of our calls in f(bf16[T, H], s32[T, K], f32[T, K]), lowered for CUDA."""
    mesh = Mesh(np.array(jax.devices()[:R]), ("expert",))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    types = (H, jnp.bfloat16), (K, jnp.int32), (K, jnp.float32)
    args = [jax.ShapeDtypeStruct((R * T, columns), dtype) for columns, dtype in types]
    text = jax.jit(sharded).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    for target, rest in re.findall(r"stablehlo\.custom_call @(jax_ep_\w+)\((.*)", text):
        config = re.search(r"backend_config = \{([^}]*)\}", rest)
        said = re.findall(r"(\w+) = (?:dense<.*?> : tensor<\d+x(\w+)>|-?\d+ : (\w+))", config[1] if config else "")
        yield target, {name: f"{array}[]" if array else scalar for name, array, scalar in said}


def layer(mode, layout="expert", halves=False, wire=None, back=None):
    """Gradients of a dispatch, a dispatch along its handle and a combine."""

    def loss(x, weights, idx):
        static = {"axis_name": "expert", "num_experts": E, "layout": layout, "mode": mode, "wire": wire, "num_sms": 8}
        if halves:
            recv, handle = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **static))
        else:
            recv, handle = jax_ep.dispatch(x, idx, weights, **static)
        rows = jax_ep.dispatch_cached(x, handle) + (recv.x if wire is None else jax_ep.dequantize(recv.x))
        gates = None if layout == "rank" else recv.weights
        if halves:
            out = jax_ep.combine_done(jax_ep.combine_start(rows, handle, gates, wire=back))
        else:
            out = jax_ep.combine(rows, handle, gates, wire=back)
        return (out.astype(jnp.float32) ** 2).sum() + (recv.weights**2).sum()

    return lambda x, idx, weights: jax.grad(loss, argnums=(0, 1))(x, weights, idx)


def beside(x, idx, weights):
    """What no layer calls."""
    counts = jax_ep.dispatch_layout(idx, num_experts=E, num_ranks=R).num_tokens_per_expert
    return counts + jax_ep.barrier("expert")


def programs():
    yield beside
    for mode, layout, halves in itertools.product(MODES, ("expert", "rank", "batched"), (False, True)):
        yield layer(mode, layout, halves)
    for mode, halves, wire in itertools.product(MODES, (False, True), WIRES):
        yield layer(mode, halves=halves, wire=wire, back="logfmt10")


@pytest.fixture(scope="module")
def said():
    """{target: all that calls of it say}: within a node, over nodes, and where XLA's collectives serve.

    Virtual CPU devices have neither peer access nor memory for groups, so group.py is told that they do.
    """
    found = collections.defaultdict(list)
    for one_node, reachable in ((True, True), (False, True), (False, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group, "along", lambda *_, reachable=reachable: (tuple(range(R)),) if reachable else None)
            patch.setattr(group, "make_arenas", lambda *_, one_node=one_node: one_node)
            patch.setattr(group, "make_landings", lambda *_, one_node=one_node: one_node)
            patch.setattr(group, "spans_nodes", lambda _, one_node=one_node: not one_node)
            for program in programs():
                for target, attributes in calls(program):
                    if attributes not in found[target]:
                        found[target].append(attributes)
    return found


def test_calls_have_the_attributes_that_their_handler_binds(said):
    """All targets in one test: tracing every program is what takes time, and is done once."""
    expected = {target: [asked()[target]] for target in targets._core.handlers()}
    assert {target: said[target] for target in expected} == expected
