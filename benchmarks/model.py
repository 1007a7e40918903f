"""How long dispatch and combine should take, from what is moved and what moves it; and how well that agrees with what was measured.

    python -m benchmarks.model [FILE ...]      fit to the kernels' rows of benchmarks/results, error of each; DeepEP's published figures

A call moves bytes over NVLink, over the network, through multiprocessors and through memory, all at once. Its time is a latency and
a p-norm of the four times: their maximum where one dominates, more where several are alike. docs/model.md says what that leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case

from benchmarks import summary, traffic

Row = dict[str, Any]

GIGA = 1e9
STREAM_PIECE = 2048  # bytes of a row that a combine of "expert" or "batched" adds at once
H200_MULTIPROCESSORS = 132


# ---- what is moved ---------------------------------------------------------------------------------------------------


def chance(local: int, experts: int, choices: int) -> float:
    """That a token with so many distinct choices among `experts` chooses one of `local` of them."""
    return 1 - math.comb(experts - local, choices) / math.comb(experts, choices)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sizes of a dispatch or combine, as means a rank under uniform routing."""

    tokens: int
    topk: int
    experts: int
    ranks: int
    ranks_per_node: int
    groups: int | None = None  # nodes that a token may choose among, if limited

    @property
    def nodes(self) -> int:
        """How many."""
        return self.ranks // self.ranks_per_node

    @property
    def reachable(self) -> tuple[int, int]:
        """Nodes and experts that a token chooses among."""
        nodes = min(self.groups or self.nodes, self.nodes)
        return nodes, self.experts * nodes // self.nodes

    @property
    def rows_of_ranks(self) -> float:
        """Distinct (token, rank) pairs a source rank, its own included."""
        nodes, experts = self.reachable
        return self.tokens * nodes * self.ranks_per_node * chance(self.experts // self.ranks, experts, self.topk)

    @property
    def rows_of_nodes(self) -> float:
        """Distinct (token, node) pairs a source rank, its own node included."""
        nodes, experts = self.reachable
        return self.tokens * nodes * chance(self.experts // self.nodes, experts, self.topk)

    @property
    def rows_over_network(self) -> float:
        """One a (token, node) that is not the source's."""
        return self.rows_of_nodes * (1 - 1 / self.nodes)

    @property
    def rows_over_links(self) -> float:
        """One a (token, rank), less those whose rank is where the row arrives in the node (the rail), or where it starts."""
        return self.rows_of_ranks * (1 - 1 / self.ranks_per_node)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call of a rank moves; of links the µs that a ceiling gives them."""

    link_us: float
    network_us: float = 0.0
    rows_through_sms: float = 0.0
    items: float = 0.0  # of multiprocessors: rows to store, or sums to make
    rows_through_memory: float = 0.0
    row_bytes: float = 0.0
    latency: str = "dispatch_latency"  # which of the machine's
    rate: str = "send"  # likewise
    weigh: str | None = None  # likewise, where rows have gates


def work(
    exchange: Exchange, operation: str, layout: str, row_bytes: float, capacity: float, link_us: float, encodes: bool = False
) -> Work:  # fmt: skip
    """What the multiprocessors and the memory of a rank move.

    dispatch  stores every row of the result, with a token or zero, and reads a row a (token, rank). Encoded rows but for "rank" are
              stored over the link besides, and read again where they have arrived, to be copied on
    combine   reads the rows of its experts, hands on a sum a (token, rank), reads those that come and stores its tokens
    """
    rows, choices = exchange.rows_of_ranks, exchange.tokens * exchange.topk
    by_rank, weigh = layout == "rank", None
    if operation.startswith("dispatch"):
        latency = "cached_latency" if operation == "dispatch_cached" else "dispatch_latency"
        rate = "send" if by_rank else "store"
        through_sms, through_memory = capacity, capacity + rows
        if encodes and not by_rank:
            through_sms, through_memory = capacity + exchange.rows_over_links, capacity + choices
        items = through_sms
    else:
        latency, rate = ("gather_latency", "gather") if by_rank else ("stream_latency", "stream")
        weigh = "weigh" if operation == "combine_weighted" else None
        through_sms, through_memory = choices + rows, choices + 2 * rows + exchange.tokens
        items = rows + exchange.tokens
        if by_rank:
            through_sms, through_memory, items = rows, rows + exchange.tokens, float(exchange.tokens)
    return Work(link_us, 0.0, through_sms, items, through_memory, row_bytes, latency, rate, weigh)


# ---- what moves it ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates in GB/s, latencies in µs. Those in FITTED are fitted, `link` and `network` are what a GPU can have leaving it."""

    dispatch_latency: float = 35.0
    cached_latency: float = 21.0
    gather_latency: float = 20.0
    stream_latency: float = 35.0
    send: float = 50.0  # a multiprocessor: rows of a dispatch to "rank"
    store: float = 60.0  # to the other layouts, most of them inside the GPU
    gather: float = 35.0  # a multiprocessor: a combine of "rank", row by row
    stream: float = 80.0  # of the other layouts, as one stream
    send_item: float = 0.05  # µs of a multiprocessor for each row stored, each sum, however short; of the same four
    store_item: float = 0.02
    gather_item: float = 0.05
    stream_item: float = 0.05
    weigh: float = 1.2  # factor of the work of adding where rows have gates
    memory: float = 3300.0
    power: float = 4.0
    link: float = 345.0
    link_of_sm: float = 33.0  # what one multiprocessor pushes over the link
    network: float = 45.0
    network_latency: float = 10.0  # of a hop, there

    def link_gigabytes(self, sms: int) -> float:
        """What so many multiprocessors push."""
        return min(self.link, self.link_of_sm * sms)

    def us(self, moved: Work, sms: int) -> float:
        """Of a whole call."""
        row_bytes = (
            math.ceil(moved.row_bytes / STREAM_PIECE) * STREAM_PIECE if moved.rate == "stream" else moved.row_bytes
        )
        of_rows = moved.rows_through_sms * row_bytes / (getattr(self, moved.rate) * GIGA) * 1e6
        if moved.weigh is not None:
            of_rows *= getattr(self, moved.weigh)
        times = (
            moved.link_us,
            moved.network_us,
            (of_rows + moved.items * getattr(self, f"{moved.rate}_item")) / sms,
            moved.rows_through_memory * moved.row_bytes / (self.memory * GIGA) * 1e6,
        )
        hop = self.network_latency if moved.network_us else 0.0
        return getattr(self, moved.latency) + hop + float(np.linalg.norm(times, ord=self.power))


BOUNDS = {
    "dispatch_latency": (1, 60), "cached_latency": (1, 60), "gather_latency": (1, 60), "stream_latency": (1, 60),
    "send": (15, 200), "store": (15, 200), "gather": (10, 200), "stream": (10, 200),
    "send_item": (0, 1), "store_item": (0, 1), "gather_item": (0, 1), "stream_item": (0, 1),
    "weigh": (1, 2), "memory": (1500, 4800), "power": (1, 8),
}  # fmt: skip
FITTED = tuple(BOUNDS)


# ---- against our rows ------------------------------------------------------------------------------------------------


# Below it a call is a chain of latencies, of which nothing here speaks.
LEAST_TOKENS = 1024


def fits(row: Row) -> bool:
    """The model speaks of whole kernels of one node, on GPUs of their own, with the ceiling of the same run."""
    return bool(
        row["level"] == "kernel" and row["error"] is None and row["gpus"] == row["ranks"] > 1 and row["us"] and row["sms"]
        and row["mode"] == "high_throughput" and row["operation"] != "combine_grad" and row["tokens"] >= LEAST_TOKENS
    )  # fmt: skip


def work_of(row: Row, machine: Machine) -> Work:
    """What a recorded call moves."""
    exchange = Exchange(row["tokens"], row["topk"], row["experts"], row["ranks"], row["ranks"])
    out = row["operation"].startswith("dispatch")
    case = Case("", row["tokens"], row["hidden"], row["topk"], row["experts"], row["ranks"], dtype=row["dtype"])
    row_bytes = traffic.row_bytes(case, row["wire"] if out else None)
    batched = (row.get("expert_capacity") or 0) * row["experts"] // row["ranks"]
    link_us = row["ceiling_us"]
    if link_us is None:
        link_us = exchange.rows_over_links * row_bytes / (machine.link_gigabytes(row["sms"]) * GIGA) * 1e6
    capacity = row.get("max_recv_tokens") or batched
    encodes = row["operation"] == "dispatch" and row["wire"] is not None
    return work(exchange, row["operation"], row["layout"], row_bytes, capacity, link_us, encodes)


def fit(rows: Sequence[Row], start: Machine | None = None) -> Machine:
    """The machine whose predictions are nearest, by the ratio; a row far off counts little more than one somewhat off."""
    from scipy.optimize import least_squares

    start = start or Machine()
    works = [(work_of(row, start), row["sms"], row["us"]) for row in rows]

    def machine_of(values: Sequence[float]) -> Machine:
        return dataclasses.replace(start, **dict(zip(FITTED, map(float, values), strict=True)))

    def errors(values: Sequence[float]) -> list[float]:
        machine = machine_of(values)
        return [math.log(machine.us(moved, sms) / us) for moved, sms, us in works]

    first = [getattr(start, name) for name in FITTED]
    low, high = zip(*BOUNDS.values(), strict=True)
    return machine_of(least_squares(errors, first, bounds=(low, high), loss="soft_l1", f_scale=0.1).x)


def error(row: Row, machine: Machine) -> float:
    """Predicted over measured, less one."""
    return float(machine.us(work_of(row, machine), row["sms"]) / row["us"] - 1)


# Rows to fit to; how well the others are foreseen then.
SPLITS: dict[str, Callable[[int, Row], bool]] = {
    "8, 24 and 64 multiprocessors": lambda _, row: row["sms"] in (8, 24, 64),
    "every second row": lambda i, _: i % 2 == 0,
    "rows without a wire format": lambda _, row: row["wire"] is None,
    "4096 tokens": lambda _, row: row["tokens"] == 4096,
}


def foresight(rows: Sequence[Row]) -> dict[str, tuple[int, list[float]]]:
    """By split how many rows were fitted to, and the errors of the others; without splits that leave too few."""
    found = {}
    for name, keeps in SPLITS.items():
        fitted = [row for i, row in enumerate(rows) if keeps(i, row)]
        others = [row for i, row in enumerate(rows) if not keeps(i, row)]
        if len(fitted) > len(FITTED) and others:
            machine = fit(fitted)
            found[name] = (len(fitted), [error(row, machine) for row in others])
    return found


# ---- across nodes: DeepEP's published figures ------------------------------------------------------------------------

# https://github.com/deepseek-ai/DeepEP: docs/legacy.md (V1) and README.md (V2), at commit 0297fc80. "Bandwidth" there is logical: all
# rows of a token's nodes over the time, those of its own node included (the README says so). FP8 out, bf16 back.
V1 = Exchange(tokens=4096, topk=8, experts=256, ranks=8, ranks_per_node=8, groups=4)
V2 = dataclasses.replace(V1, tokens=8192, groups=None)
LOW_LATENCY = dataclasses.replace(V1, tokens=128, groups=None)
FP8_ROW, BF16_ROW = 7168 + 224, 14336


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of DeepEP, and what the model says."""

    name: str
    value: float
    unit: str
    predicted: float
    fitted: bool = False  # a constant of the model was taken from it

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.value - 1


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A rank's rates in GB/s and latency in µs, where nothing but links and network limits."""

    link: float
    network: float = 45.0  # of 50 with 400 Gb/s a GPU: chosen for the figures of low latency, from 16 ranks on
    latency: float = 0.0

    def us(self, exchange: Exchange, row_bytes: float) -> float:
        """Rows to nodes and on to ranks at the same time."""
        over_network = exchange.rows_over_network * row_bytes / self.network
        over_links = exchange.rows_over_links * row_bytes / self.link
        return self.latency + max(over_network, over_links) / 1e3

    def direct_us(self, exchange: Exchange, row_bytes: float) -> float:
        """A copy a (token, expert), straight to its rank: over the network but for those that stay in the node."""
        rows = exchange.tokens * exchange.topk
        over_network = rows * (1 - 1 / exchange.nodes) * row_bytes / self.network
        over_links = rows / exchange.nodes * (1 - 1 / exchange.ranks_per_node) * row_bytes / self.link
        return self.latency + max(over_network, over_links) / 1e3


H800 = Cluster(link=153 * 7 / 8)  # 153 GB/s published for 8 ranks, an eighth of it a rank's own rows
H800_LOW_LATENCY = dataclasses.replace(H800, latency=30.0)  # chosen likewise
HOPPER = Cluster(link=345.0)  # the README of V2 says SM90 and CX7, not which: links as ours


def published() -> list[Published]:
    """All figures of Hopper GPUs that the two pages have."""
    found = [
        Published("V1 dispatch EP8", 153, "GB/s", _logical(V1, H800, FP8_ROW), fitted=True),
        Published("V1 combine EP8", 158, "GB/s", _logical(V1, H800, BF16_ROW)),
    ]
    for ranks, dispatch, combine in ((16, 43, 43), (32, 58, 57), (64, 51, 50)):
        exchange = dataclasses.replace(V1, ranks=ranks)
        found.append(Published(f"V1 dispatch EP{ranks}", dispatch, "GB/s", _logical(exchange, H800, FP8_ROW)))
        found.append(Published(f"V1 combine EP{ranks}", combine, "GB/s", _logical(exchange, H800, BF16_ROW)))
    for ranks, dispatch, combine in ((16, 90, 81), (32, 61, 61)):
        exchange = dataclasses.replace(V2, ranks=ranks)
        found.append(Published(f"V2 dispatch EP{ranks}", dispatch, "GB/s", _logical(exchange, HOPPER, FP8_ROW)))
        found.append(Published(f"V2 combine EP{ranks}", combine, "GB/s", _logical(exchange, HOPPER, BF16_ROW)))
    for ranks, dispatch, combine in (
        (8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360),
    ):  # fmt: skip
        exchange = dataclasses.replace(LOW_LATENCY, ranks=ranks)
        for name, us, row_bytes in (("dispatch", dispatch, FP8_ROW), ("combine", combine, BF16_ROW)):
            predicted = H800_LOW_LATENCY.direct_us(exchange, row_bytes)
            found.append(Published(f"low latency {name} EP{ranks}", us, "µs", predicted))
    return found


def _logical(exchange: Exchange, cluster: Cluster, row_bytes: float) -> float:
    """GB/s as DeepEP counts: over NVLink in one node, else over the network, own rows included."""
    rows = exchange.rows_of_ranks if exchange.nodes == 1 else exchange.rows_of_nodes
    return rows * row_bytes / cluster.us(exchange, row_bytes) / 1e3


def across_nodes(nodes: int, tokens: int, machine: Machine, out: bool = True, sms: int = 24) -> tuple[Exchange, float]:
    """DeepSeek-V3's layer (256 experts, or one a rank if there are more ranks) in layout "rank" on so many nodes of 8 H200s: µs of a call.

    Not measured: what the kernels across nodes have to reach.
    """
    ranks = 8 * nodes
    exchange = Exchange(tokens, 8, max(256, ranks), ranks, 8)
    link_us = exchange.rows_over_links * BF16_ROW / (machine.link_gigabytes(sms) * GIGA) * 1e6
    operation = "dispatch" if out else "combine"
    moved = work(exchange, operation, "rank", BF16_ROW, exchange.rows_of_ranks, link_us)
    network_us = exchange.rows_over_network * BF16_ROW / (machine.network * GIGA) * 1e6
    return exchange, machine.us(dataclasses.replace(moved, network_us=network_us), sms)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], say: Callable[[str], None] = print) -> None:
    """Fit, error of every row, error of every published figure."""
    usable = [row for row in rows if fits(row)]
    if len(usable) > len(FITTED):
        machine = fit(usable)
        say(f"fitted to {len(usable)} rows: " + ", ".join(f"{name} {getattr(machine, name):.3g}" for name in FITTED))
        off = [error(row, machine) for row in usable]
        for row, by in zip(usable, off, strict=True):
            at = " ".join(
                str(row[name]) for name in ("case", "layout", "operation", "wire", "routing", "ranks", "tokens", "sms")
            )
            say(f"  {at}: {row['us']:.0f} µs, predicted {row['us'] * (1 + by):.0f} ({by:+.0%})")
        say(f"median error {np.median(np.abs(off)):.0%}, worst {max(map(abs, off)):.0%}")
        for name, (count, errors) in foresight(usable).items():
            median, worst = np.median(np.abs(errors)), max(map(abs, errors))
            near = sum(abs(by) < 0.1 for by in errors)
            others = f"{len(errors)} others, {near} of them within 10 %"
            say(f"fitted to {name} ({count} rows): {others}, median error {median:.0%}, worst {worst:.0%}")
    else:
        say(f"{len(usable)} rows of kernels: too few for a fit of {len(FITTED)} numbers")
    figures = published()
    say("DeepEP's published figures (logical bandwidth, as they count):")
    for figure in figures:
        note = ", taken from this figure" if figure.fitted else ""
        say(
            f"  {figure.name}: {figure.value:g} {figure.unit}, predicted {figure.predicted:.0f} ({figure.error:+.0%}{note})"
        )
    worst = max((abs(figure.error) for figure in figures), default=0.0)
    say(f"worst error {worst:.0%}")


@functools.cache
def measured_machine() -> Machine:
    """Fitted to all rows in benchmarks/results, or unfitted where there are too few."""
    usable = [row for row in summary.read() if fits(row)]
    return fit(usable) if len(usable) > len(FITTED) else Machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report."""
    report(summary.read([Path(path) for path in (sys.argv[1:] if arguments is None else arguments)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
