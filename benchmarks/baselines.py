"""What one would write without jax_ep: the same job by XLA's collectives alone. Functions for inside shard_map.

all_gather+psum_scatter  every token to every rank; back as a sum over all ranks. No routing at all, R times the bytes.
all_to_all               one copy a (token, rank), in buckets that hold the worst case of T tokens a rank; not sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case
from jax import lax


def all_gather_and_psum_scatter(case: Case) -> dict[str, Callable[..., Any]]:
    """Dispatch: x [T, H], topk_idx -> [R * T, H], None. Combine: that -> [T, H]."""

    def dispatch(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, None]:
        del topk_idx
        return lax.all_gather(x, case.axis_name, tiled=True), None

    def combine(y: jax.Array, _: None) -> jax.Array:
        return lax.psum_scatter(y, case.axis_name, tiled=True)

    return {"dispatch": dispatch, "combine": combine}


def all_to_all(case: Case) -> dict[str, Callable[..., Any]]:
    """Dispatch: x [T, H], topk_idx s32[T, K] -> [R, T, H], place of each token in each rank's bucket s32[R, T]. Combine: back."""

    def dispatch(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, jax.Array]:
        owner = topk_idx // case.num_local_experts
        goes = (owner[..., None] == jnp.arange(case.num_ranks)).any(axis=1).T  # [R, T]
        place = jnp.where(goes, jnp.cumsum(goes, axis=1) - 1, case.num_tokens)
        token = jnp.argsort(~goes, axis=1, stable=True)
        token = jnp.where(jnp.arange(case.num_tokens) < goes.sum(axis=1, keepdims=True), token, case.num_tokens)
        buckets = x.at[token].get(mode="fill", fill_value=0)
        return lax.all_to_all(buckets, case.axis_name, split_axis=0, concat_axis=0), place

    def combine(y: jax.Array, place: jax.Array) -> jax.Array:
        buckets = lax.all_to_all(y, case.axis_name, split_axis=0, concat_axis=0)
        total = jnp.zeros((case.num_tokens, case.hidden), jnp.float32)
        for bucket, row in zip(buckets, place, strict=True):
            total += bucket.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
        return total.astype(y.dtype)

    return {"dispatch": dispatch, "combine": combine}


BASELINES = {"all_gather+psum_scatter": all_gather_and_psum_scatter, "all_to_all": all_to_all}
