"""What one would write without jax_ep: the same job by XLA's collectives alone. Functions for inside shard_map.

all_gather+psum_scatter  every token to every rank; back as a sum over all ranks. No routing at all, R times the bytes.
all_to_all               one copy a (token, rank), in buckets that hold the worst case of T tokens a rank; not sorted by expert.
ragged_all_to_all        one copy a (token, expert): permute, ragged_all_to_all, local permute to expert order; and back. As MaxText does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case
from jax import lax


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Two functions of one rank's arrays, and what they leave out."""

    dispatch: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]  # x [T, H], topk_idx s32[T, K] -> rows, state
    combine: Callable[[jax.Array, Any], jax.Array]  # rows, state -> [T, H], the sum of the token's copies
    routed: bool = True  # False: the routing changes nothing
    group_sizes: Callable[[Any], jax.Array] | None = None  # of a state: s32[L], where rows are in expert order


def all_gather_and_psum_scatter(case: Case) -> Baseline:
    """Rows are [R * T, H]."""

    def dispatch(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, None]:
        del topk_idx
        return lax.all_gather(x, case.axis_name, tiled=True), None

    def combine(y: jax.Array, _: None) -> jax.Array:
        return lax.psum_scatter(y, case.axis_name, tiled=True)

    return Baseline(dispatch, combine, routed=False)


def all_to_all(case: Case) -> Baseline:
    """Rows are [R, T, H]; the state is the place of each token in each rank's bucket, s32[R, T]."""

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

    return Baseline(dispatch, combine)


def ragged_all_to_all(case: Case, exchange: Callable[..., jax.Array] = lax.ragged_all_to_all) -> Baseline:
    """Rows are [C, H] in expert order; the state has the permutations, the group sizes and what each rank sends to each."""
    ranks, local, choices = case.num_ranks, case.num_local_experts, case.num_tokens * case.num_topk
    capacity = case.max_recv_tokens or ranks * choices

    def zeros(rows: int, dtype: Any) -> jax.Array:
        return lax.pcast(jnp.zeros((rows, case.hidden), dtype), case.axis_name, to="varying")

    def before(sizes: jax.Array, axis: int) -> jax.Array:
        return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes

    def dispatch(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        me = lax.axis_index(case.axis_name)
        expert = topk_idx.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        counts = jnp.zeros(case.num_experts, jnp.int32).at[expert].add(1)
        all_counts = lax.all_gather(counts, case.axis_name).reshape(ranks, ranks, local)
        sizes = all_counts.sum(axis=2, dtype=jnp.int32)  # [source, destination]
        here = all_counts[:, me]  # [source, local expert]
        ends = jnp.cumsum(here.reshape(-1))
        run = jnp.searchsorted(
            ends, jnp.arange(capacity), side="right"
        )  # which (source, expert) a row that arrives is of
        place = jnp.argsort(jnp.where(run < ranks * local, run % local, local), stable=True)
        state = {"order": order, "place": place, "group_sizes": here.sum(axis=0, dtype=jnp.int32), "sizes": sizes}
        arrived = exchange(
            x[order // case.num_topk], zeros(capacity, x.dtype), before(sizes, 1)[me], sizes[me],
            before(sizes, 0)[me], sizes[:, me], axis_name=case.axis_name,
        )  # fmt: skip
        return arrived[place], state

    def combine(y: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
        me, sizes = lax.axis_index(case.axis_name), state["sizes"]
        back = exchange(
            jnp.zeros_like(y).at[state["place"]].set(y), zeros(choices, y.dtype),
            before(sizes, 0)[:, me], sizes[:, me], before(sizes, 1)[:, me], sizes[me], axis_name=case.axis_name,
        )  # fmt: skip
        unsorted = jnp.zeros_like(back).at[state["order"]].set(back)
        return unsorted.reshape(-1, case.num_topk, case.hidden).sum(axis=1, dtype=jnp.float32).astype(y.dtype)

    return Baseline(dispatch, combine, group_sizes=lambda state: state["group_sizes"])


BASELINES: dict[str, Callable[[Case], Baseline]] = {
    "all_gather+psum_scatter": all_gather_and_psum_scatter,
    "all_to_all": all_to_all,
    "ragged_all_to_all": ragged_all_to_all,
}
