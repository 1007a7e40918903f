"""One step of the expert-parallel model against the dense one on a single device: loss and every gradient."""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from . import model
from .training import make_training

TOLERANCE = 1e-4  # largest difference, relative to the largest entry: f32 sums in another order


def agrees_with_dense(config: model.Config, mesh: Mesh, batch: np.ndarray, seed: int, console: Console) -> bool:
    """True if all agree. In f32, with room for every choice and nothing quantised: what is left is rounding."""
    config = dataclasses.replace(config, dtype="float32", capacity_factor=None, wire=None)
    params = make_training(config, mesh, num_steps=1)[0](jax.random.key(seed)).params
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    specs = (P(), model.param_specs(config))

    with jax.default_matmul_precision("highest"):
        step = model.over_ranks(partial(model.loss_and_grads, config=config), config, mesh, out_specs=specs)
        stats, grads = everywhere(jax.jit(step)(params, model.place_batch(batch, mesh)))
        with jax.default_device(jax.local_devices()[0]):
            dense_step = jax.jit(partial(model.loss_and_grads, config=config, parallel=False))
            dense_stats, dense_grads = dense_step(jax.device_get(everywhere(params)), batch)

    table = Table(
        "loss and gradients", "shape", "largest entry", "difference", "", title="expert-parallel against dense"
    )
    agree = True
    pairs = {"loss": (stats.loss, dense_stats.loss), "load of the experts": (stats.load, dense_stats.load)}
    leaves = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(dense_grads), strict=True)
    pairs |= {jax.tree_util.keystr(path)[1:]: (ours, theirs) for (path, ours), theirs in leaves}
    for name, (ours, theirs) in pairs.items():
        largest = float(np.abs(theirs).max())
        difference = float(np.abs(ours - theirs).max()) / largest if largest else float("nan")
        good = difference <= TOLERANCE  # a gradient that is zero everywhere proves nothing: nan is not good
        agree &= good
        mark = "[green]ok" if good else "[red]differs"
        table.add_row(name, str(np.shape(theirs)), f"{largest:.3g}", f"{difference:.1e}", mark)
    console.print(table)
    console.print(
        f"{'[green]All agree' if agree else '[red]They differ'}[/]: "
        f"largest difference relative to the largest entry, tolerance {TOLERANCE:g}."
    )
    return agree
