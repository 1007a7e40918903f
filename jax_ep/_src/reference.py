"""The meaning of every primitive in `jax.lax` collectives: the default lowering, and the fallback where no kernel is.

Written to be read. A token travels like this:

    notify           everyone learns everyone's choices and works out every row's place
    dispatch_cached  every rank's rows go to every rank (all_gather); each takes those that are its own (a gather)
    combine          each rank sums its rows of a token in f32 and sends one row back a (token, rank)  (all_to_all);
                     the token's rank sums what came, in rank order, in f32

Of the halves one does all and the other nothing: XLA's scheduler starts a collective as soon as it has its operands and
waits for it as late as it can, wherever a program has it.

The arithmetic of the sums is part of the contract, to the bit, and XLA keeps to it where it must: a product is rounded to
f32 before it is added, so an `optimization_barrier` stands between (XLA's CPU and GPU backends would contract the two into
one FMA); a sum begins at zero, so that one of negative zeros is zero (`_zeros`); a row is what it was rounded to (`widen`).
Shapes are named as in docs/vocabulary.md: R ranks, T tokens a rank, K choices, C rows, H columns, E experts.

`dead`, bool[R] or None, says which ranks are masked (membership.py). Their tokens are none, rows for them are lost, and their
results are those of a rank to which nothing is sent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_ep._src import compat, logfmt, membership, quantized
from jax_ep._src.handle import Routing
from jax_ep._src.quantized import narrow, widen

Arrays = list[jax.Array]
Dead = jax.Array | None
LOST = -2  # less the rank: the slot of a choice whose rank is masked


# ---- routing ---------------------------------------------------------------------------------------------------------


def notify(topk_idx: jax.Array, *, routing: Routing, dead: Dead = None) -> Arrays:
    """s32[T, K] -> slot s32[T, K], recv_slot s32[R, T, K], counts s32[E/R + 1] (and for "rank" recv_topk_idx s32[C, K])."""
    num_local = routing.num_local_experts
    all_idx = lax.all_gather(topk_idx, routing.axis_name)  # s32[R, T, K]
    me = lax.axis_index(routing.axis_name)
    if dead is not None:
        all_idx = jnp.where(dead[:, None, None], -1, all_idx)
    valid = (all_idx >= 0) & (all_idx < routing.num_experts)
    owner = jnp.where(valid, all_idx // num_local, -1)

    counts, position = _positions_within_experts(jnp.where(valid, all_idx, routing.num_experts), routing.num_experts)
    row, wanted = _ROWS[routing.layout](all_idx, owner, counts, position, routing)

    slot = jnp.where(row < 0, -1, owner * routing.max_recv_tokens + row)[me]
    recv_slot = jnp.where(owner == me, row, -1)
    counts_here = jnp.append(lax.dynamic_slice_in_dim(counts, me * num_local, num_local), wanted[me])
    if dead is not None:
        slot = jnp.where(valid[me] & dead[owner[me]], LOST - owner[me], slot)
        recv_slot = jnp.where(dead[me], -1, recv_slot)
        counts_here = jnp.where(dead[me], 0, counts_here)
    result = [slot, recv_slot, counts_here]
    if routing.layout == "rank":
        local_expert = jnp.where(owner == me, all_idx - me * num_local, -1)
        token_row = recv_slot.max(axis=2, initial=-1).reshape(-1)
        nowhere = jnp.full((routing.max_recv_tokens, routing.num_topk), -1, jnp.int32)
        result.append(_place(nowhere, token_row, local_expert.reshape(-1, routing.num_topk)))
    return result


def _positions_within_experts(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """s32[R, T, K], `num_experts` for none -> choices an expert s32[E], each choice's place among its expert's s32[R, T, K]."""
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[flat].add(1)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    return counts[:num_experts], (place - first[flat]).reshape(expert.shape)


# Each returns the row of every choice on its owner, s32[R, T, K] with -1 for none or dropped, and the rows that every
# rank wanted before drops, s32[R].


def _rows_by_expert(
    all_idx: jax.Array, owner: jax.Array, counts: jax.Array, position: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    aligned = aligned_sizes(counts, routing.expert_alignment).reshape(routing.num_ranks, -1)
    group_start = (jnp.cumsum(aligned, axis=1, dtype=jnp.int32) - aligned).reshape(-1)
    row = group_start.at[all_idx].get(mode="clip") + position
    return jnp.where((owner >= 0) & (row < routing.max_recv_tokens), row, -1), aligned.sum(axis=1, dtype=jnp.int32)


def _rows_by_rank(
    all_idx: jax.Array, owner: jax.Array, counts: jax.Array, position: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    del all_idx, counts, position
    is_token_in_rank = (owner[..., None] == jnp.arange(routing.num_ranks)).any(axis=2).reshape(-1, routing.num_ranks)
    row_in_rank = jnp.cumsum(is_token_in_rank, axis=0, dtype=jnp.int32) - 1
    row = jnp.take_along_axis(row_in_rank, jnp.maximum(owner, 0).reshape(-1, routing.num_topk), axis=1).reshape(
        owner.shape
    )
    kept = (owner >= 0) & (row < routing.max_recv_tokens)
    return jnp.where(kept, row, -1), is_token_in_rank.sum(axis=0, dtype=jnp.int32)


def _rows_batched(
    all_idx: jax.Array, owner: jax.Array, counts: jax.Array, position: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    row = (all_idx % routing.num_local_experts) * routing.expert_capacity + position
    wanted = counts.reshape(routing.num_ranks, -1).sum(axis=1, dtype=jnp.int32)
    return jnp.where((owner >= 0) & (position < routing.expert_capacity), row, -1), wanted


_ROWS = {"expert": _rows_by_expert, "rank": _rows_by_rank, "batched": _rows_batched}


def aligned_sizes(counts: jax.Array, alignment: int) -> jax.Array:
    """Group sizes rounded up to multiples of `alignment`."""
    return (counts + alignment - 1) // alignment * alignment


# ---- the way out -----------------------------------------------------------------------------------------------------


def dispatch(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str | None, dead: Dead = None
) -> Arrays:
    """rows..., weights?, topk_idx -> rows..., weights?, and what notify returns."""
    *payload, topk_idx = operands
    if wire is not None:
        payload[:1] = quantized.encode(payload[0], wire)
    routed = notify(topk_idx, routing=routing, dead=dead)
    num_rows = len(payload) - has_weights
    moved = dispatch_cached(
        *payload, *routed[:3], routing=routing, num_rows=num_rows, has_weights=has_weights, dead=dead
    )
    return [*moved, *routed]


def dispatch_cached(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, dead: Dead = None
) -> Arrays:
    """rows [T, ...]..., weights f32[T, K]?, slot, recv_slot, counts -> rows [C, ...]..., weights f32[C]? (or [C, K])."""
    *payload, slot, recv_slot, _ = operands
    _, recv_slot = membership.without(dead, slot, recv_slot, routing)
    payload = [_as_dtype(lax.all_gather(_as_bits(rows), routing.axis_name), rows.dtype) for rows in payload]
    num_choices = recv_slot.size  # R * T * K
    choice = jnp.arange(num_choices, dtype=jnp.int32)
    nowhere = jnp.full(routing.max_recv_tokens, num_choices, jnp.int32)
    choice_of_row = _place(nowhere, recv_slot.reshape(-1), choice)
    token_of_row = choice_of_row // routing.num_topk
    result = [_take_rows(rows.reshape(-1, *rows.shape[2:]), token_of_row) for rows in payload[:num_rows]]
    if has_weights and routing.layout == "rank":
        here = jnp.where(recv_slot >= 0, payload[-1], 0).reshape(-1, routing.num_topk)
        result.append(_take_rows(here, token_of_row))
    elif has_weights:
        result.append(_take_rows(payload[-1].reshape(-1), choice_of_row))
    return result


def dispatch_start(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, dead: Dead = None
) -> Arrays:
    """rows [T, ...]..., weights [T, K]?, slot, recv_slot, counts -> rows and weights as they are."""
    del routing, num_rows, has_weights, dead
    return list(operands[:-3])


dispatch_done = dispatch_cached


# ---- the way back ----------------------------------------------------------------------------------------------------


def combine(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str | None, dead: Dead = None
) -> Arrays:
    """y [C, H]..., gates back f32[C]? (or [C, K]), slot, recv_slot, counts -> [T, H]..., f32[T, K]?."""
    *payload, slot, recv_slot, _ = operands
    slot, recv_slot = membership.without(dead, slot, recv_slot, routing)
    result = [_sum(_all_to_all(partial_sums(y, None, recv_slot, routing, wire), routing)) for y in payload[:num_rows]]
    if has_weights:
        row = recv_slot.reshape(-1)
        if routing.layout == "rank":  # f32[C, K]: the gate of choice k stands in column k of the token's row
            row = jnp.where(
                row < 0, -1, row * routing.num_topk + jnp.arange(row.size, dtype=jnp.int32) % routing.num_topk
            )
        back = _all_to_all(_take_rows(payload[-1].reshape(-1), row).reshape(recv_slot.shape), routing)
        owner = jnp.maximum(slot, 0) // max(routing.max_recv_tokens, 1)
        result.append(jnp.where(slot < 0, 0, jnp.take_along_axis(back, owner[None], axis=0)[0]))
    return result


def combine_weighted(
    y: jax.Array, weights: jax.Array, *arrays: jax.Array, routing: Routing, wire: str | None, dead: Dead = None
) -> Arrays:
    """y [C, H], weights f32[C], slot, recv_slot, counts -> [T, H]: sum over k of weights[row(t, k)] * y[row(t, k)]."""
    _, recv_slot = membership.without(dead, arrays[0], arrays[1], routing)
    return [_sum(_all_to_all(partial_sums(y, weights, recv_slot, routing, wire), routing))]


combine_start = combine
combine_weighted_start = combine_weighted


def combine_done(
    *operands: jax.Array, routing: Routing, num_rows: int, has_weights: bool, wire: str | None, dead: Dead = None
) -> Arrays:
    """sums [T, H]..., gates back [T, K]?, slot, recv_slot, counts -> sums and gates as they are."""
    del routing, num_rows, has_weights, wire, dead
    return list(operands[:-3])


def _sum(partials: jax.Array) -> jax.Array:
    """[R, T, H] of the ranks -> [T, H], added in rank order in f32."""
    total = _zeros(partials.shape[1:], partials)
    for partial in partials:
        total = total + widen(partial)
    return narrow(total, partials.dtype)


def partial_sums(
    y: jax.Array, weights: jax.Array | None, recv_slot: jax.Array, routing: Routing, wire: str | None
) -> jax.Array:
    """y [C, H] -> [R, T, H]: what my rows of each rank's tokens sum to, rounded to y's dtype, and through `wire`."""

    def for_source(slot_of_source: jax.Array) -> jax.Array:  # s32[T, K] -> [T, H]
        if routing.layout == "rank":  # one row a token, named by each of its choices here
            slot_of_source = slot_of_source.max(axis=1, keepdims=True, initial=-1)

        def add_choice(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            term = widen(_take_rows(y, row))
            if weights is not None:
                term = lax.optimization_barrier(_take_rows(weights, row)[:, None] * term)
            return total + term, None

        zeros = _zeros((slot_of_source.shape[0], y.shape[1]), y)
        total, _ = lax.scan(add_choice, zeros, slot_of_source.T)  # a loop: one term in memory at a time
        rounded = narrow(total, y.dtype)
        return logfmt.logfmt10_roundtrip(rounded) if wire == "logfmt10" else rounded

    return lax.map(for_source, recv_slot)


def combine_grad(
    out_bar: jax.Array, y: jax.Array, weights: jax.Array, *arrays: jax.Array, routing: Routing, dead: Dead = None
) -> Arrays:
    """out_bar [T, H], y [C, H], weights f32[C], slot, recv_slot, counts -> y_bar [C, H], weights_bar f32[C].

    The transpose of combine_weighted: weights[c] * rows[c] and <y[c], rows[c]>, where rows are out_bar dispatched, and
    zeros for rows that hold no token.
    """
    (rows,) = dispatch_cached(out_bar, *arrays, routing=routing, num_rows=1, has_weights=False, dead=dead)
    _, recv_slot = membership.without(dead, arrays[0], arrays[1], routing)
    return weigh(rows, y, weights, recv_slot)


def weigh(rows: jax.Array, y: jax.Array, weights: jax.Array, recv_slot: jax.Array) -> Arrays:
    """What combine_grad does with rows that have been dispatched."""
    holds = _place(jnp.zeros(rows.shape[0], bool), recv_slot.reshape(-1), jnp.array(True))
    y_bar = narrow(weights[:, None] * widen(rows), rows.dtype)
    return [jnp.where(holds[:, None], y_bar, 0), jnp.where(holds, inner_products(y, rows), 0)]


def inner_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """[C, H], [C, H] -> f32[C], added in the order that one warp of a GPU adds them.

    A row is split into chunks of 2 kB, filled up with zeros; a chunk into 4 vectors of 16 bytes for each of 32 lanes. A
    lane adds the products of its four vectors, element by element; then the elements, by halves; then chunk after chunk;
    at last the lanes are added, by halves.
    """
    elements = 16 // a.dtype.itemsize
    num_rows, hidden = a.shape
    padded = jnp.pad(widen(a) * widen(b), ((0, 0), (0, -hidden % (4 * 32 * elements))))
    vectors = lax.optimization_barrier(padded).reshape(num_rows, -1, 4, 32, elements)
    lanes = _add_halves(
        ((vectors[:, :, 0] + vectors[:, :, 1]) + vectors[:, :, 2]) + vectors[:, :, 3]
    )  # [C, chunks, 32]
    zeros = _zeros((num_rows, 32), lanes)
    total, _ = lax.scan(lambda total, chunk: (total + chunk, None), zeros, lanes.swapaxes(0, 1), unroll=32)
    return _add_halves(total)


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """What a sum begins with, f32 varying as `like`: zeros that XLA:GPU does not know for zeros.

    It would take 0 + x for x, and a sum of nothing but negative zeros would be one.
    """
    zero = compat.as_varying(jnp.float32(0), compat.varying_axes(like))
    return jnp.broadcast_to(lax.optimization_barrier(zero), shape)


def _add_halves(x: jax.Array) -> jax.Array:
    """The sum over the last axis, a power of two: the first half plus the second, and so on."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


# ---- moving rows -----------------------------------------------------------------------------------------------------


def _place(onto: jax.Array, row: jax.Array, values: jax.Array) -> jax.Array:
    """`onto` with values[i] at row[i]; negative rows go nowhere."""
    return onto.at[jnp.where(row < 0, onto.shape[0], row)].set(values, mode="drop")


def _take_rows(rows: jax.Array, row: jax.Array) -> jax.Array:
    """rows[row[i]] for each i; zero bits where row[i] is negative or past the end."""
    if rows.shape[0] == 0:
        return _as_dtype(jnp.zeros((*row.shape, *rows.shape[1:]), _bits_dtype(rows.dtype)), rows.dtype)
    past = jnp.where(row < 0, rows.shape[0], row)
    return _as_dtype(_as_bits(rows).at[past].get(mode="fill", fill_value=0), rows.dtype)


def _all_to_all(per_rank: jax.Array, routing: Routing) -> jax.Array:
    """[R, ...] for each rank -> [R, ...] from each rank."""
    moved = lax.all_to_all(_as_bits(per_rank), routing.axis_name, split_axis=0, concat_axis=0)
    return _as_dtype(moved, per_rank.dtype)


# Rows move as unsigned integers: any dtype travels, and NaN payloads and the sign of zero arrive as they left.


def _bits_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _as_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, _bits_dtype(x.dtype))


def _as_dtype(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)
