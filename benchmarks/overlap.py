"""How much of an exchange a matrix product between its halves hides: 1 - (both - product) / exchange, for both modes.

    python -m benchmarks.overlap --out benchmarks/results/h200x2-overlap.json                        # on a GPU machine
    python -m benchmarks.overlap --cpu-devices 4 --cases expert --calls 1 --samples 3                # the reference

Three programs a row, each a chain of calls in one jit: start and done alone, the product alone, and start, product, done. The product
takes about twice as long as the exchange, so what is left of it is what the halves themselves take of the stream, and of the product's
multiprocessors. 1: all hidden; 0: as long as one after the other; below: slower than that. Rows as exchange.py's, with
`product_us`, `both_us` and `hidden` beside.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from cases import CASES
from jax import lax

import jax_ep
from benchmarks import exchange, timing
from benchmarks.programs import Setting, after, after_handle, dispatch_of, first

OPERATIONS = ("dispatch_halves", "combine_halves")
MOST_PRODUCTS = 64

Row = dict[str, Any]


def products(count: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """a [M, H], w [H, H] -> a @ w @ w ..., `count` times, each of them a kernel."""

    def f(a: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(count):
            a = a @ w
        return a

    return f


def between(pending: Any, a: jax.Array, w: jax.Array, work: Any) -> tuple[Any, jax.Array]:
    """What a start left, and `work(a, w)`: neither before the start nor after the done."""
    if work is None:
        return pending, a
    pending, a = lax.optimization_barrier((pending, a))
    return lax.optimization_barrier((pending, work(a, w)))


def halves(setting: Setting, operation: str, mode: str, sms: int | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`setting.calls` exchanges in halves, one after the other, and their arguments: a function of the work between them."""
    case = setting.case
    x, weights, routings = setting.inputs()

    start = dispatch_of(case, mode=mode, num_sms=sms, call=jax_ep.dispatch_start)

    def dispatches(work: Any) -> Callable[..., jax.Array]:
        def chain(x: jax.Array, weights: jax.Array, routings: Any, a: jax.Array, w: jax.Array) -> jax.Array:
            token = None
            for topk_idx in routings:
                pending, a = between(start(x, weights, after(token, topk_idx)), a, w, work)
                token = first(jax_ep.dispatch_done(pending)[0].x)
            return token[None] + 0 * first(a)

        return chain

    def combines(work: Any) -> Callable[..., jax.Array]:
        def chain(y: jax.Array, handle: jax_ep.Handle, gates: Any, a: jax.Array, w: jax.Array) -> jax.Array:
            token = None
            for _ in range(setting.calls):
                pending, a = between(jax_ep.combine_start(y, after_handle(token, handle), gates), a, w, work)
                token = first(jax_ep.combine_done(pending))
            return token[None] + 0 * first(a)

        return chain

    if operation == "dispatch_halves":
        return dispatches, (x, weights, routings)
    one = setting.on_every_rank(lambda x, weights, idx: jax_ep.dispatch_done(start(x, weights, idx)))
    recv, handle = timing.compiled(one, x, weights, routings[0])(x, weights, routings[0])
    return combines, (recv.x, handle, None if case.layout == "rank" else recv.weights)


def alone(calls: int, count: int) -> Callable[..., jax.Array]:
    """As many products as the chain has."""
    work = products(count)

    def f(a: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(calls):
            a = lax.optimization_barrier(work(a, w))
        return first(a)[None]

    return f


def measure(setting: Setting, operation: str, mode: str, sms: int | None, options: argparse.Namespace) -> Row:
    """One row."""
    case, dtype = setting.case, jnp.dtype(setting.case.dtype)
    rows = options.product_rows or min(max(case.num_tokens, 128), 1024)
    a = setting.normal(4, (rows, case.hidden), dtype)
    w = setting.normal(5, (case.hidden, case.hidden), dtype, case.hidden**-0.5)
    chain, operands = halves(setting, operation, mode, sms)

    def time(f: Callable[..., Any], *args: Any) -> timing.Timing:
        run = timing.compiled(setting.on_every_rank(f), *args)
        took = timing.measure(run, *args, samples=options.samples, calls=2, budget_s=options.case_budget_s)
        return took.over(setting.calls)

    apart = time(chain(None), *operands, a, w)
    one = time(alone(setting.calls, 1), a, w).median
    count = min(max(1, math.ceil(options.times * apart.median / one)), MOST_PRODUCTS)
    product = time(alone(setting.calls, count), a, w).median
    both = time(chain(products(count)), *operands, a, w).median
    row = exchange.row(setting, operation, "jax_ep", None, apart, None, sms, mode)
    return row | {
        "products": count,
        "product_us": product,
        "both_us": both,
        "hidden": round(1 - (both - product) / apart.median, 3),
    }


def show(row: Row) -> None:
    """A line of the row."""
    print(
        f"{row['operation']:16} {row['layout']:8} {row['mode']:16} T {row['tokens']:5} "
        f"exchange {row['us']:9.1f} µs  product {row['product_us']:9.1f}  both {row['both_us']:9.1f}  hidden {row['hidden']:6.2f}",
        flush=True,
    )


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, as they are measured."""
    on_cpu = jax.devices()[0].platform == "cpu"
    for case in exchange.selected(options):
        setting = Setting.of(case, options.calls or (1 if on_cpu else 8))
        modes = options.modes[:1] if on_cpu else options.modes
        for layout, mode, sms in itertools.product(options.layouts, modes, options.num_sms):
            for operation in options.operations:
                yield measure(setting.in_layout(layout), operation, mode, sms, options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; "none" is None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description=__doc__.split("\n", maxsplit=1)[0]
    )
    some = ["deepseek-v3/decode", "deepseek-v3/prefill"]  # 128 and 4096 tokens
    parser.add_argument("--cases", nargs="+", default=some, metavar="NAME", choices=[case.name for case in CASES])
    parser.add_argument("--tokens", nargs="+", type=int, help="a rank, instead of the cases' own")
    parser.add_argument("--layouts", nargs="+", default=["expert", "rank"], choices=exchange.LAYOUTS)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--modes", nargs="+", default=["high_throughput", "low_latency"], choices=exchange.MODES)
    parser.add_argument("--num-sms", nargs="+", default=["none"], help='bounds for the kernels, or "none"')
    parser.add_argument("--calls", type=int, help="in one program (default: 8, 1 on CPU)")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument(
        "--case-budget-s", type=float, default=5, help="seconds for the samples of a program (default 5)"
    )
    parser.add_argument("--times", type=float, default=2, help="length of the product, in exchanges (default 2)")
    parser.add_argument("--product-rows", type=int, help="M of [M, H] @ [H, H] (default: the tokens, 128 to 1024)")
    parser.add_argument("--cpu-devices", type=int, help="run on this many virtual CPU devices")
    parser.add_argument("--out", help="JSON file to write the rows to, as they come")
    options = parser.parse_args(arguments)
    options.num_sms = [None if number == "none" else int(number) for number in options.num_sms]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and records where --out says."""
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    rows: list[Row] = []
    for row in measured(options):
        if jax.process_index() == 0:
            rows.append(row)
            show(row)
            if options.out:
                timing.write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
