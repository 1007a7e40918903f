"""What dispatch hands out: Dispatched (the rows), Handle (the routing), and the values in flight between two halves.

Routing is the static part of a handle: everything that shapes and arguments decide. Every primitive takes one as
its only structural parameter. docs/vocabulary.md explains the words, docs/architecture.md who makes and who reads
these arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jax_ep._src.quantized import Quantized

Layout = Literal["expert", "rank", "batched"]
Mode = Literal["auto", "high_throughput", "low_latency"]

LAYOUTS: tuple[str, ...] = ("expert", "rank", "batched")
MODES: tuple[str, ...] = ("auto", "high_throughput", "low_latency")


@dataclasses.dataclass(frozen=True)
class Routing:
    """Static facts of one dispatch; hashable, so that it can be a primitive's parameter and a pytree's static field.

    Attributes:
      axis_name: mesh axes along which the ranks lie, slowest first.
      num_ranks: R, product of their sizes.
      num_experts: E over all ranks; expert e lives on rank e // (E / R).
      num_tokens: T a rank.
      num_topk: K choices a token.
      max_recv_tokens: C, rows of the result ("batched": experts a rank times `expert_capacity`).
      layout: order of the result's rows.
      expert_alignment: group sizes of "expert" are multiples of it.
      expert_capacity: rows an expert of "batched", else 0.
      mode: which kernel; never what is computed. Beside the MODES of a user, "whole": halves for which what is in
        flight must not be a kernel's, so that one of them is the whole call.
      num_sms: upper bound for the streaming multiprocessors a kernel may occupy, None for its own choice.
    """

    axis_name: tuple[str, ...]
    num_ranks: int
    num_experts: int
    num_tokens: int
    num_topk: int
    max_recv_tokens: int
    layout: str
    expert_alignment: int
    expert_capacity: int
    mode: str
    num_sms: int | None

    @property
    def num_local_experts(self) -> int:
        """E / R, the experts on one rank."""
        return self.num_experts // self.num_ranks

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Leading shape of the result as the user sees it: [C], or [E / R, expert_capacity] for "batched"."""
        if self.layout == "batched":
            return (self.num_local_experts, self.expert_capacity)
        return (self.max_recv_tokens,)

    @property
    def recv_weights_shape(self) -> tuple[int, ...]:
        """Shape of the gates at the receiver: one a row, or for "rank" one a row and choice."""
        return (self.max_recv_tokens, self.num_topk) if self.layout == "rank" else (self.max_recv_tokens,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Handle:
    """The routing of one dispatch: what combine and dispatch_cached need, and nothing else.

    Integer arrays and static fields only: it can be saved, offloaded, rematerialised, carried through `scan`, pass
    through `jit` and `shard_map` boundaries, and be used any number of times. Per rank:

    Attributes:
      slot: s32[num_tokens, num_topk], where choice k of token t went: `rank * C + row` on that rank; -1 for no
        choice, an id out of range, or a dropped row; -2 - rank where that rank is masked. With layout "rank" all choices of a
        token on one rank name the one row that the token has there.
      recv_slot: s32[num_ranks, num_tokens, num_topk], the same for the rows on this rank: the row of choice k of
        token t of each source rank, or -1 where it is not here.
      counts: s32[E / R + 1], true number of choices for each local expert before drops, then the rows wanted here
        before drops (aligned sizes included for "expert").
      routing: static, see `Routing`.
      lead_shape: static, the leading axes of x and topk_idx that were folded into T.
    """

    slot: jax.Array
    recv_slot: jax.Array
    counts: jax.Array
    routing: Routing = dataclasses.field(metadata={"static": True})
    lead_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The integer operands of every primitive that follows a dispatch."""
        return self.slot, self.recv_slot, self.counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """The rows that this rank's experts received.

    Attributes:
      x: [C, H] in x's dtype, or `Quantized` rows for a wire format; [E / R, expert_capacity, H] for "batched". Rows
        that hold no token are exactly zero.
      weights: gates that rode along, f32 in the shape of x's rows ("rank": f32[C, num_topk], 0 where the choice is
        not here), or None if dispatch had no topk_weights.
      num_tokens_per_expert: s32[E / R], choices for each local expert before any drop.
      num_dropped: s32[1], rows that this rank could not hold, and rows of its own tokens that nobody holds because their
        rank is masked (`jax_ep.config.dead_devices`). So over all ranks it is the rows wanted less the rows there are.
        One element rather than a scalar, so that a result can leave shard_map under P(axis_name).
      num_invalid: s32[1], choices of this rank's own tokens that named no expert: below -1, or num_experts and more.
      group_sizes: "expert" only, s32[E / R], aligned sizes of the groups, cut off at C: what `jax.lax.ragged_dot` takes.
      topk_idx: "rank" only, s32[C, num_topk], local expert of each choice, or -1.
    """

    x: jax.Array | Quantized
    weights: jax.Array | None
    num_tokens_per_expert: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    group_sizes: jax.Array | None
    topk_idx: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchInFlight:
    """What is under way between `dispatch_start` and `dispatch_done`: opaque, to be passed to `dispatch_done` once."""

    rows: tuple[jax.Array, ...]
    carrier: jax.Array | None
    weights: jax.Array | None
    recv_topk_idx: jax.Array | None
    num_invalid: jax.Array
    handle: Handle
    format: str | None = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombineInFlight:
    """What is under way between `combine_start` and `combine_done`: opaque, to be passed to `combine_done` once."""

    rows: jax.Array
    handle: Handle
    wire: str | None = dataclasses.field(metadata={"static": True})
