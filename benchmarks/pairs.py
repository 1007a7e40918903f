"""Dispatch and combine as a user calls them: calls chained in one jit, µs a call, on this machine's GPUs in one process.

    python -m benchmarks.pairs [--tokens 4096] [--hidden 7168] [--sms 24] [--graphs]

Times are of whole programs of CALLS dependent calls, slowest device, median of REPEATS. --graphs has XLA replay them as a CUDA graph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

CALLS, REPEATS = 10, 7


def main() -> None:
    """Prints a row a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, default=24)
    parser.add_argument("--graphs", action="store_true")
    args = parser.parse_args()
    if args.graphs:
        flags = "--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import jax_ep

    mesh = jax.make_mesh((len(jax.devices()),), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    num_ranks = mesh.size
    rng = np.random.default_rng(0)
    rows = num_ranks * args.tokens
    topk = np.argsort(rng.random((rows, args.experts)), axis=1)[:, : args.topk].astype(np.int32)
    place = jax.sharding.NamedSharding(mesh, P("expert"))
    x = jax.device_put(jnp.asarray(rng.standard_normal((rows, args.hidden)), jnp.bfloat16), place)
    topk_idx = jax.device_put(topk, place)
    gates = jax.device_put(np.full((rows, args.topk), 1 / args.topk, np.float32), place)
    capacity = {"rank": None, "expert": int(1.25 * args.tokens * args.topk)}

    def dispatch(x, topk_idx, gates, layout):
        static = {"axis_name": "expert", "num_experts": args.experts, "layout": layout, "num_sms": args.sms}
        return jax_ep.dispatch(x, topk_idx, gates, max_recv_tokens=capacity[layout], **static)

    def chained(layout, what):
        def pairs(x, topk_idx, gates):
            for _ in range(CALLS):
                recv, handle = dispatch(x, topk_idx, gates, layout)
                x = jax_ep.combine(recv.x, handle, None if layout == "rank" else recv.weights)
            return x

        def cached(x, topk_idx, gates):
            recv, handle = dispatch(x, topk_idx, gates, layout)
            for _ in range(CALLS):
                moved = jax_ep.dispatch_cached(x, handle)
                x = jax_ep.combine(moved, handle, None if layout == "rank" else recv.weights)
            return x

        return jax.jit(
            jax.shard_map(
                {"pair": pairs, "cached pair": cached}[what], mesh=mesh, in_specs=P("expert"), out_specs=P("expert")
            )
        )

    for layout in ("rank", "expert"):
        for what in ("pair", "cached pair"):
            f = chained(layout, what)
            f(x, topk_idx, gates).block_until_ready()
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                f(x, topk_idx, gates).block_until_ready()
                times.append((time.perf_counter() - start) / CALLS * 1e6)
            print(
                f"{what:12} {layout:7} T {args.tokens} H {args.hidden} R {num_ranks} sms {args.sms} graphs {args.graphs}: "
                f"{statistics.median(times):.1f} µs",
                flush=True,
            )


if __name__ == "__main__":
    main()
