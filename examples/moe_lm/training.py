"""The training step: expert-parallel loss and gradients, then AdamW on parameters that stay where they are."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from . import model


class History:
    """What training leaves behind for the report and the picture, in bits a byte and shares."""

    def __init__(self) -> None:
        self.held_out_bits: dict[int, float] = {}  # by step
        self._stats: list[model.Stats] = []

    def append(self, stats: model.Stats) -> float:
        """Keeps the stats of a step on the devices; gives the training loss of the step before."""
        self._stats.append(stats)
        return float(self._stats[-2:][0].cross_entropy) / math.log(2)

    @property
    def train_bits(self) -> np.ndarray:
        """f64[steps]"""
        return np.array([float(stats.cross_entropy) / math.log(2) for stats in self._stats])

    @property
    def load(self) -> np.ndarray:
        """f32[steps, layers, E], 1 is a fair share."""
        return np.stack([np.asarray(stats.load) for stats in self._stats])

    @property
    def dropped(self) -> np.ndarray:
        """f64[steps], share of the choices."""
        return np.array([float(stats.dropped) for stats in self._stats])

    def write(self, path: Path) -> None:
        """A line for each step."""
        steps = np.arange(1, len(self._stats) + 1)
        columns = np.column_stack([steps, self.train_bits, self.dropped, self.load.max(axis=(1, 2))])
        header = "step,training loss in bits a byte,share of dropped choices,load of the busiest expert in fair shares"
        np.savetxt(path, columns, fmt=("%d", "%.9g", "%.9g", "%.9g"), delimiter=",", header=header, comments="")


class State(NamedTuple):
    params: model.Params
    optimizer: optax.OptState


def make_training(
    config: model.Config, mesh: Mesh, num_steps: int
) -> tuple[Callable[[Array], State], Callable[[State, Array], tuple[State, model.Stats]]]:
    """init(key) -> State; step(State, tokens s32[batch, S + 1]) -> (State, Stats)."""
    optimizer = make_optimizer(num_steps, config.dim)
    specs = model.param_specs(config)
    loss_and_grads = model.over_ranks(
        partial(model.loss_and_grads, config=config), config, mesh, out_specs=(P(), specs)
    )

    def init(key: Array) -> State:
        params = model.init_params(key, config)
        return State(params, optimizer.init(params))

    def step(state: State, tokens: Array) -> tuple[State, model.Stats]:
        stats, grads = loss_and_grads(state.params, tokens)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), moments), stats

    # An expert's moments live with the expert. Said once for init and step, else both would be compiled again.
    moments = jax.eval_shape(init, jax.random.key(0)).optimizer
    moment_specs = optax.tree.map_params(
        optimizer, lambda _, spec: spec, moments, specs, transform_non_params=lambda _: P()
    )
    spread = partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
    state_sharding = spread(State(specs, moment_specs))
    return (
        jax.jit(init, out_shardings=state_sharding),
        jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, spread(P()))),
    )


def make_optimizer(num_steps: int, dim: int) -> optax.GradientTransformation:
    peak = 4e-3 * math.sqrt(128 / dim)
    warmup = max(1, num_steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(num_steps, warmup + 1), end_value=peak / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))


def make_evaluate(config: model.Config, mesh: Mesh, batches: list[np.ndarray]) -> Callable[[model.Params], float]:
    """Bits a byte over fixed batches."""
    loss = jax.jit(model.over_ranks(partial(model.loss, config=config), config, mesh, out_specs=P()))
    placed = [model.place_batch(batch, mesh) for batch in batches]
    return lambda params: statistics.mean(
        float(loss(params, tokens)[1].cross_entropy) / math.log(2) for tokens in placed
    )
