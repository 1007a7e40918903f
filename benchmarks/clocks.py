"""Kernels that tell the time and that take it, to stand between calls inside jit: `now` reads the GPU's clock, `spin` makes a rank late.

One warp each, by Pallas (Triton), so that XLA launches them or puts them into a CUDA graph like its own. The clock is %globaltimer, in
nanoseconds, the same for all multiprocessors of a GPU; clocks of two GPUs are never compared. CPUs have none, and their spin is a loop
of XLA's. Where Pallas has no Triton any more (it is deprecated in jax 0.11) there are no clocks, and decode.py reads the host's. What
varies over which axes is not told: call them in a shard_map with check_vma=False.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

READ = "mov.u32 $0, %globaltimer_lo;"


def now(token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[1] -> itself, and s32[1] nanoseconds modulo 2**32, read when token was there. On GPUs."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(token_ref: Any, out_ref: Any, time_ref: Any) -> None:
        token = token_ref[...]
        time = jax.ShapeDtypeStruct((1,), jnp.int32)
        bits = lax.bitcast_convert_type(token, jnp.int32)  # asked for, so that the read is not before
        (time_ref[...],) = triton.elementwise_inline_asm(
            READ, args=[bits], constraints="=r,r", pack=1, result_shape_dtypes=[time]
        )
        out_ref[...] = token

    return pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name="now",
    )(token)


def spin(token: jax.Array, count: jax.Array, platform: str) -> jax.Array:
    """f32[1], s32[1] -> nearly the token, after `count` multiplications, each of which waits for the one before."""

    def spun(count: jax.Array, token: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: x * jnp.float32(1.0000001) + jnp.float32(1e-9), token)

    if platform == "cpu":
        return spun(count[0], token)
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(token_ref: Any, count_ref: Any, out_ref: Any) -> None:
        out_ref[...] = spun(count_ref[0], token_ref[...])

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((1,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        name="spin",
    )(token, count)


@functools.cache
def resolution_ns(device: jax.Device) -> int | None:
    """The smallest step of a device's clock, as far as a few reads show it; None where there is no clock that moves."""
    if device.platform == "cpu":
        return None

    def reads(token: jax.Array) -> jax.Array:
        times = []
        for _ in range(64):
            token, time = now(token)
            times.append(time)
        return jnp.concatenate(times)

    try:
        times = np.asarray(jax.jit(reads)(jax.device_put(jnp.zeros(1, jnp.float32), device)))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ImportError, AttributeError):
        return None
    steps = np.diff(times.view(np.uint32))
    return int(np.gcd.reduce(steps)) or None
