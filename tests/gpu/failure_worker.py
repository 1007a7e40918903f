"""A process in which one rank does not do as the others do: failure_worker.py SCENARIO LAUNCH MODE. test_failures_gpu.py reads its report.

Every token goes to every rank once, so a layer of ones is R. The timeout is set when groups and programs are there already.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep

SCENARIO, LAUNCH, MODE = sys.argv[1:]
TIMEOUT, ODD = 0.5, 1  # seconds, and the rank that differs
OPTIONS = {
    "launched": {"xla_gpu_enable_command_buffer": ""},
    "graphs": {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1},
}
R, T, H = len(jax.devices()), 16, 64
MESH = jax.make_mesh((R,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))


def dispatch(x, idx):
    return jax_ep.dispatch(x, idx, axis_name="e", num_experts=R, mode=MODE)


def layer(x, idx):
    recv, handle = dispatch(x, idx)
    return jax_ep.combine(recv.x, handle)


def is_odd():
    return lax.axis_index("e") == ODD


def no_dispatch(x, idx):
    return lax.cond(is_odd(), lambda x, idx: x, layer, x, idx)


def no_combine(x, idx):
    recv, handle = dispatch(x, idx)
    return lax.cond(is_odd(), lambda: x, lambda: jax_ep.combine(recv.x, handle))


def one_more_trip(x, idx):
    trips = jnp.where(is_odd(), 2, 1)
    return lax.while_loop(lambda s: s[0] < trips, lambda s: (s[0] + 1, layer(s[1], idx)), (0 * trips, x))[1]


def late(x, idx):
    """The odd rank comes tens of milliseconds after the others."""
    rounds = jnp.where(is_odd(), 4000, 0)
    slow = lax.fori_loop(0, rounds, lambda i, a: jnp.cos(a) + i.astype(a.dtype), x.astype(jnp.float32))
    return layer(x + 0 * jnp.minimum(slow, 1).astype(x.dtype), idx)


SCENARIOS = {"no_dispatch": no_dispatch, "no_combine": no_combine, "one_more_trip": one_more_trip, "late": late}


def program(f, launch):
    sharded = jax.shard_map(f, mesh=MESH, in_specs=P("e"), out_specs=P("e"), check_vma=False)
    return jax.jit(sharded, compiler_options=OPTIONS[launch])


def outcome(f, scale=1):
    """What a run comes to: "right", "zero" (on all ranks but the odd one), "wrong", or the error; and its seconds."""
    x = jnp.full((T * R, H), scale, jnp.bfloat16)
    idx = jnp.tile(jnp.arange(R, dtype=jnp.int32), (T * R, 1))
    start = time.monotonic()
    try:
        out = np.asarray(f(x, idx), np.float32).reshape(R, T, H)
    except jax.errors.JaxRuntimeError as error:
        return {"is": "error", "text": str(error), "seconds": time.monotonic() - start}
    others = np.delete(out, ODD, axis=0)
    what = "right" if (out == scale * R).all() else "zero" if (others == 0).all() else "wrong"
    return {"is": what, "seconds": time.monotonic() - start}


good, launched, bad = program(layer, LAUNCH), program(layer, "launched"), program(SCENARIOS[SCENARIO], "launched")
before = [outcome(f, scale) for f in (good, launched) for scale in (1, 2, 3)]  # captured, then replayed
jax_ep.config.timeout = TIMEOUT if SCENARIO != "late" else 30.0
report = {"before": before, "failing": outcome(bad)}
report["next"] = [outcome(good, scale) for scale in (1, 2)]  # of graphs: replays
report["launched"] = [outcome(launched)]
fresh = program(lambda x, idx: layer(x, idx), LAUNCH)
report["fresh"] = [outcome(fresh, scale) for scale in range(1, 9)]
report["by turns"] = [outcome(f, scale) for scale in range(1, 5) for f in (good, launched, fresh)]
print("REPORT", json.dumps(report))
