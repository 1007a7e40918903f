"""The NumPy voice: what every rank must see, from all ranks' inputs at once, in plain loops. Shares no code with jax_ep.

Shapes: R ranks, T tokens a rank, K choices, E experts, L = E // R of them on a rank, C rows a rank.
`route` places the choices, `move` and `move_weights` carry data along, `combine` brings rows back; `simulate` is a whole dispatch.
Every result has a leading axis of R: entry r is what rank r sees.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each choice's row goes. In layout "rank" a token's choices on one rank share one row."""

    slot: np.ndarray  # s32[R, T, K]: dest_rank * C + row, or -1; -2 - dest_rank where that rank is masked
    recv_slot: np.ndarray  # s32[R, R, T, K]: rank d's row of (source, token, choice), or -1
    counts: np.ndarray  # s32[R, L + 1]
    group_sizes: np.ndarray | None  # s32[R, L], layout "expert"
    num_dropped: np.ndarray  # s32[R, 1]
    num_invalid: np.ndarray  # s32[R, 1]
    local_expert: (
        np.ndarray
    )  # s32[R, R, T, K]: rank d's expert of (source, token, choice), or -1: lives elsewhere or nowhere
    num_rows: int  # C
    layout: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """The fields of Dispatched, and the routing its Handle holds."""

    x: np.ndarray  # [R, C, ...], or [R, L, expert_capacity, ...]
    weights: np.ndarray | None  # f32[R, C], f32[R, L, expert_capacity], or f32[R, C, K] for "rank"
    topk_idx: np.ndarray | None  # s32[R, C, K] for "rank"
    group_sizes: np.ndarray | None
    num_tokens_per_expert: np.ndarray  # s32[R, L]
    num_dropped: np.ndarray
    num_invalid: np.ndarray
    routing: Routing


def default_rows(layout, num_ranks, num_tokens, num_topk, num_experts, alignment):
    """The fewest rows that no routing can overflow ("expert" and "rank")."""
    if layout == "rank":
        return num_ranks * num_tokens
    most, num_choices = 0, num_ranks * num_tokens * num_topk
    for groups_in_use in range(1, min(num_experts // num_ranks, num_choices) + 1):
        # All groups but one hold a single row over a multiple of the alignment; the last one holds the rest.
        rest = num_choices - (groups_in_use - 1)
        most = max(most, (groups_in_use - 1) * alignment + -(-rest // alignment) * alignment)
    return most


def route(topk_idx, *, num_experts, layout, num_rows=None, alignment=1, expert_capacity=None, dead=()):
    """`dead` are the masked ranks: they have no tokens, hold no rows, and choices of their experts are lost."""
    num_ranks, num_tokens, num_topk = topk_idx.shape
    num_local = num_experts // num_ranks
    if layout == "batched":
        num_rows = num_local * expert_capacity
    slot = np.full((num_ranks, num_tokens, num_topk), -1, np.int32)
    recv_slot = np.full((num_ranks, num_ranks, num_tokens, num_topk), -1, np.int32)
    local_expert = np.full((num_ranks, num_ranks, num_tokens, num_topk), -1, np.int32)
    counts = np.zeros((num_ranks, num_local + 1), np.int32)
    group_sizes = np.zeros((num_ranks, num_local), np.int32)
    num_dropped = np.zeros((num_ranks, 1), np.int32)

    alive = [rank for rank in range(num_ranks) if rank not in dead]
    for source in alive:
        lost = set()  # rows: of layout "rank" one for all choices of a token
        for token in range(num_tokens):
            for choice in range(num_topk):
                expert = int(topk_idx[source, token, choice])
                if 0 <= expert < num_experts and expert // num_local in dead:
                    slot[source, token, choice] = -2 - expert // num_local
                    lost.add((token, expert // num_local if layout == "rank" else num_ranks + choice))
        num_dropped[source] = len(lost)

    for dest in alive:
        wanted = []  # (row, source, token, choice), dropped or not
        by_expert = [[] for _ in range(num_local)]
        for source in alive:
            for token in range(num_tokens):
                for choice in range(num_topk):
                    expert = int(topk_idx[source, token, choice])
                    if 0 <= expert < num_experts and expert // num_local == dest:
                        by_expert[expert % num_local].append((source, token, choice))
                        local_expert[dest, source, token, choice] = expert % num_local
        counts[dest, :num_local] = [len(rows) for rows in by_expert]

        if layout == "expert":
            start = 0
            for expert, rows in enumerate(by_expert):
                wanted += [(start + position, *row) for position, row in enumerate(rows)]
                end = start + -(-len(rows) // alignment) * alignment
                group_sizes[dest, expert] = min(end, num_rows) - min(start, num_rows)
                start = end
            counts[dest, num_local] = start
        elif layout == "batched":
            for expert, rows in enumerate(by_expert):
                for position, row in enumerate(rows):
                    fits = position < expert_capacity
                    wanted.append((expert * expert_capacity + position if fits else num_rows, *row))
            counts[dest, num_local] = len(wanted)
        else:
            row_of_token = {}
            for source, token, choice in sorted(row for rows in by_expert for row in rows):
                row = row_of_token.setdefault((source, token), len(row_of_token))
                wanted.append((row, source, token, choice))
            counts[dest, num_local] = len(row_of_token)

        for row, source, token, choice in wanted:
            if row < num_rows:
                slot[source, token, choice] = dest * num_rows + row
                recv_slot[dest, source, token, choice] = row
        if layout == "rank":
            num_dropped[dest] += max(len(row_of_token) - num_rows, 0)
        else:
            num_dropped[dest] += sum(row >= num_rows for row, *_ in wanted)

    invalid = (topk_idx < -1) | (topk_idx >= num_experts)
    num_invalid = invalid.reshape(num_ranks, -1).sum(axis=1, keepdims=True).astype(np.int32)
    return Routing(
        slot,
        recv_slot,
        counts,
        group_sizes if layout == "expert" else None,
        num_dropped,
        num_invalid,
        local_expert,
        num_rows,
        layout,
    )


def mask(routing, dead):
    """What is left of a routing from before these ranks were masked."""
    slot, recv_slot = routing.slot.copy(), routing.recv_slot.copy()
    for rank in dead:
        slot[rank], recv_slot[rank], recv_slot[:, rank] = -1, -1, -1
        slot[(slot >= 0) & (slot // max(routing.num_rows, 1) == rank)] = -1
    return dataclasses.replace(routing, slot=slot, recv_slot=recv_slot)


def placed(routing):
    """(dest, row, source, token, choice) of every choice whose row is there."""
    for dest, source, token, choice in np.argwhere(routing.recv_slot >= 0):
        yield dest, routing.recv_slot[dest, source, token, choice], source, token, choice


def move(routing, rows):
    """rows[R, T, ...] -> [R, C, ...]: bytes moved, zero bytes where nothing was."""
    out = np.zeros((rows.shape[0], routing.num_rows, *rows.shape[2:]), rows.dtype)
    for dest, row, source, token, _ in placed(routing):
        out[dest, row] = rows[source, token]
    return out


def move_weights(routing, weights):
    """f32[R, T, K] -> f32[R, C], the gate of each row; for "rank" f32[R, C, K], the gates of the choices that live here."""
    num_ranks, _, num_topk = weights.shape
    if routing.layout != "rank":
        out = np.zeros((num_ranks, routing.num_rows), weights.dtype)
        for dest, row, source, token, choice in placed(routing):
            out[dest, row] = weights[source, token, choice]
        return out
    out = np.zeros((num_ranks, routing.num_rows, num_topk), weights.dtype)
    for dest, row, source, token, _ in placed(routing):
        here = routing.local_expert[dest, source, token] >= 0
        out[dest, row, here] = weights[source, token, here]
    return out


def simulate(topk_idx, x, weights, *, layout, num_experts, num_rows=None, alignment=1, expert_capacity=None, dead=()):
    """A whole dispatch. x[R, T, ...], topk_idx s32[R, T, K], weights f32[R, T, K] or None."""
    num_ranks, _, num_topk = topk_idx.shape
    routing = route(
        topk_idx,
        num_experts=num_experts,
        layout=layout,
        num_rows=num_rows,
        alignment=alignment,
        expert_capacity=expert_capacity,
        dead=dead,
    )
    recv_x = move(routing, x)
    recv_weights = None if weights is None else move_weights(routing, weights)
    recv_topk_idx = None
    if layout == "batched":
        per_expert = (num_ranks, num_experts // num_ranks, expert_capacity)
        recv_x = recv_x.reshape(*per_expert, *recv_x.shape[2:])
        recv_weights = None if weights is None else recv_weights.reshape(per_expert)
    if layout == "rank":
        recv_topk_idx = np.full((num_ranks, routing.num_rows, num_topk), -1, np.int32)
        for dest, row, source, token, _ in placed(routing):
            recv_topk_idx[dest, row] = routing.local_expert[dest, source, token]
    return Expected(
        recv_x,
        recv_weights,
        recv_topk_idx,
        routing.group_sizes,
        routing.counts[:, :-1],
        routing.num_dropped,
        routing.num_invalid,
        routing,
    )


def combine(routing, y, gates=None, wire=lambda partial: partial):
    """y[R, C, H], gates f32[R, C] or None -> [R, T, H] of y's dtype, bitwise: each product and each sum rounded to f32, a rank's
    partial sum rounded to y's dtype (then to what `wire` makes of it), the sum over ranks rounded to y's dtype.
    """
    num_ranks, num_tokens, _ = routing.slot.shape
    out = np.zeros((num_ranks, num_tokens, y.shape[-1]), y.dtype)
    for source in range(num_ranks):
        for token in range(num_tokens):
            total = np.zeros(y.shape[-1], np.float32)
            for dest in range(num_ranks):
                rows = [row for row in routing.recv_slot[dest, source, token] if row >= 0]
                if routing.layout == "rank":
                    rows = rows[:1]  # the choices here share it: the row is their sum already
                if not rows:
                    continue
                partial = np.zeros(y.shape[-1], np.float32)
                for row in rows:
                    term = y[dest, row].astype(np.float32)
                    partial = partial + (term if gates is None else gates[dest, row] * term)
                total = total + wire(partial.astype(y.dtype)).astype(np.float32)
            out[source, token] = total.astype(y.dtype)
    return out


def combine_grad(routing, out_bar, y, gates):
    """out_bar[R, T, H], y[R, C, H], gates f32[R, C] -> the cotangents of y and of the gates of a weighted combine, bitwise; zeros
    for rows of no token.
    """
    y_bar, gates_bar = np.zeros_like(y), np.zeros(gates.shape, np.float32)
    for dest, row, source, token, _ in placed(routing):
        y_bar[dest, row] = (gates[dest, row] * out_bar[source, token].astype(np.float32)).astype(y.dtype)
        gates_bar[dest, row] = inner_product(y[dest, row], out_bar[source, token])
    return y_bar, gates_bar


def inner_product(a, b):
    """Of two rows, in f32: chunk by chunk of 4 vectors of 16 bytes for each of 32 lanes; a lane adds its vectors, then their
    elements by halves, then to what it has; at last the lanes are added by halves.
    """
    elements = 16 // a.dtype.itemsize
    chunk = 4 * 32 * elements
    products = np.zeros(-(-len(a) // chunk) * chunk, np.float32)
    products[: len(a)] = a.astype(np.float32) * b.astype(np.float32)
    lanes = np.zeros(32, np.float32)
    for first, second, third, fourth in products.reshape(-1, 4, 32, elements):
        lanes = lanes + halved(first + second + third + fourth)
    return halved(lanes)


def halved(x):
    """The sum over the last axis: its first half plus its second, and so on."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def combine_by_definition(topk_idx, expert_rows, weights=None):
    """sum_k weights[t, k] * expert_rows[t, k], in f64, where the choice is valid: no slots, no layout. A second look at `combine`."""
    valid = topk_idx >= 0
    gates = valid * (1.0 if weights is None else weights.astype(np.float64))
    return (np.where(valid[..., None], expert_rows.astype(np.float64), 0) * gates[..., None]).sum(axis=2)
