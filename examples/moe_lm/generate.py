"""Text from the trained model: one continuation a device, byte after byte."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from . import model

TEMPERATURE = 0.7


def generate(
    params: model.Params, prompt: np.ndarray, config: model.Config, mesh: Mesh, *, num_bytes: int, seed: int
) -> bytes:
    """Continues prompt s32[batch, S], batch a multiple of the devices; gives the first of this process's texts.

    Each byte costs a forward pass over the last S: short to write, and a key-value cache is not what is shown here.
    """
    seq = prompt.shape[1]

    def per_rank(params: model.Params, prompt: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), lax.axis_index(model.AXIS))

        def append(i: Array, text: Array) -> Array:
            window = lax.dynamic_slice_in_dim(text, i, seq, axis=1)
            logits = model.forward(params, window, config, model.expert_parallel(config), mean=lambda x: x)[0]
            byte = jax.random.categorical(jax.random.fold_in(key, i), logits[:, -1].astype(jnp.float32) / TEMPERATURE)
            return lax.dynamic_update_slice_in_dim(text, byte[:, None], seq + i, axis=1)

        return lax.fori_loop(0, num_bytes, append, jnp.pad(prompt, ((0, 0), (0, num_bytes))))[:, seq:]

    run = jax.jit(model.over_ranks(per_rank, config, mesh, out_specs=P(model.AXIS)))
    text = run(params, model.place_batch(prompt, mesh)).addressable_shards[0].data[0]
    return bytes(np.asarray(text, np.uint8))
