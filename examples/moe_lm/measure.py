"""How long the exchange takes: a program of nothing but the dispatches and combines of one training step."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep

from . import model


def exchange_seconds(params: model.Params, tokens: Array, config: model.Config, mesh: Mesh) -> float:
    """Seconds of all layers' exchange, forward and backward, with the shapes and the routing of a training step.

    Timed alone, so time that a training step hides behind other work counts fully.
    """

    def routing(params: model.Params, tokens: Array) -> list[tuple[Array, Array]]:
        """topk_idx[B, S, K] and gates[B, S, K] of each layer."""
        layers: list[tuple[Array, Array]] = []
        ffn = model.expert_parallel(config)

        def listen(x: Array, topk_idx: Array, gates: Array, *weights: Array) -> tuple[Array, Array]:
            layers.append((topk_idx, gates))
            return ffn(x, topk_idx, gates, *weights)

        model.forward(params, tokens[:, :-1], config, listen, mean=lambda value: value)
        return layers

    def exchange(x: Array, layers: list[tuple[Array, Array]]) -> Any:
        def there_and_back(x: Array, all_gates: list[Array]) -> Array:
            for (topk_idx, _), gates in zip(layers, all_gates, strict=True):
                rows, recv, handle = model.send(x, topk_idx, gates, config)
                x = jax_ep.combine(rows, handle, recv.weights)
            return x

        y, transposed = jax.vjp(there_and_back, x, [gates for _, gates in layers])
        return transposed(y)

    layers = jax.jit(model.over_ranks(routing, config, mesh, out_specs=P(model.AXIS)))(params, tokens)
    shape = (tokens.shape[0], tokens.shape[1] - 1, config.dim)
    x = jax.jit(lambda: jnp.ones(shape, config.dtype), out_shardings=tokens.sharding)()
    over_ranks = jax.shard_map(exchange, mesh=mesh, in_specs=P(model.AXIS), out_specs=P(model.AXIS))
    return median_seconds(partial(jax.jit(over_ranks), x, layers))


def median_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
