"""Trains a byte-level Mixture-of-Experts language model, expert-parallel over all devices.

    python examples/train_moe_lm.py            # all GPUs; without one, 8 virtual CPU devices, two minutes
    python examples/train_moe_lm.py --check    # one step against a dense model on one device: loss, every gradient

The parts are in moe_lm/: data.py (text), model.py (the model; jax_ep is used there), training.py, measure.py,
check.py, generate.py, plot.py.
"""

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from moe_lm import data, model
from moe_lm.check import agrees_with_dense
from moe_lm.generate import generate
from moe_lm.measure import exchange_seconds
from moe_lm.plot import plot_training
from moe_lm.training import History, make_evaluate, make_training
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import jax_ep


class Result(NamedTuple):
    history: History
    baselines: dict[str, float]  # bits a byte on the held-out files
    tokens_in_step: int
    step_seconds: float  # median
    exchange_seconds: float  # of dispatch and combine, forward and backward, timed alone
    prompt: bytes
    continuation: bytes


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    args = parse_args(argv)
    mesh = jax.make_mesh((jax.device_count(),), (model.AXIS,))
    for name in ("batch", "experts"):
        if getattr(args, name) % mesh.size:
            sys.exit(f"--{name} must be a multiple of the number of devices, {mesh.size}, got {getattr(args, name)}.")
    config = model.Config(
        dim=args.dim,
        layers=args.layers,
        experts=args.experts,
        topk=args.topk,
        capacity_factor=args.capacity_factor,
        wire=args.wire,
        dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
    )
    console = Console(quiet=jax.process_index() != 0)  # every process computes, one speaks
    console.print(f"[bold]{mesh.size} × {mesh.devices.flat[0].device_kind}[/], {config}")
    corpus = data.gather()
    if args.check:
        batch = data.sample_batch(corpus.train, batch=args.batch, seq=args.seq, seed=args.seed, step=0)
        return 0 if agrees_with_dense(config, mesh, batch, args.seed, console) else 1
    result = train(args, config, mesh, corpus, console)
    if jax.process_index() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_training(result.history, result.baselines, args.out / "training.png")
        result.history.write(args.out / "training.csv")
        report(result, console)
        console.print(f"Written: training.png, training.csv in {args.out}. {time.perf_counter() - began:.0f} s in all.")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dim", type=int, default=model.Config.dim, help="width of the model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=model.Config.layers)
    parser.add_argument("--experts", type=int, default=model.Config.experts, help="in each layer, over all devices")
    parser.add_argument("--topk", type=int, default=model.Config.topk, help="experts a byte goes through")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over all devices")
    parser.add_argument("--seq", type=int, default=128, help="bytes in a sequence")
    parser.add_argument(
        "--capacity-factor",
        type=float,
        default=model.Config.capacity_factor,
        help="room on a device, 1 is its fair share",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of the activations: bfloat16 on GPUs, float32 on CPU if not given",
    )
    parser.add_argument("--wire", choices=["fp8", "fp8_ue8m0", "mxfp8"], help="what travels to the experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("moe_lm_out"), help="folder for the picture and its numbers")
    parser.add_argument("--check", action="store_true", help="compare one step with a dense model, then exit")
    return parser.parse_args(argv)


def start_devices() -> None:
    """Eight virtual devices where JAX finds only a CPU; one process of several where the environment says so."""
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)  # GPUs, where there are any, come first and all the same
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        num_processes, process_id = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
    elif "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()
    else:
        return
    jax_ep.initialize()


def train(args: argparse.Namespace, config: model.Config, mesh: Mesh, corpus: data.Corpus, console: Console) -> Result:
    init, train_step = make_training(config, mesh, args.steps)
    state = init(jax.random.key(args.seed))
    held_out = data.spread_batch(corpus.held_out, batch=8 * args.batch, seq=args.seq)
    evaluate = make_evaluate(config, mesh, [held_out[part::8] for part in range(8)])
    evaluate_after = {math.ceil(args.steps * (part / 12) ** 2) for part in range(1, 13)}  # denser where much happens

    history = History()
    history.held_out_bits[0] = evaluate(state.params)
    seconds: list[float] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=args.steps, train=math.nan, held_out=history.held_out_bits[0], rate=0)
        for step in range(1, args.steps + 1):
            start = time.perf_counter()
            batch = data.sample_batch(corpus.train, batch=args.batch, seq=args.seq, seed=args.seed, step=step)
            tokens = model.place_batch(batch, mesh)
            state, stats = train_step(state, tokens)
            train_bits = history.append(stats)  # waits for the step before, this one runs meanwhile
            seconds.append(time.perf_counter() - start)
            if step in evaluate_after:
                history.held_out_bits[step] = evaluate(state.params)
            rate = args.batch * args.seq / statistics.median(seconds)
            held_out_bits = history.held_out_bits[max(history.held_out_bits)]
            progress.update(task, advance=1, train=train_bits, held_out=held_out_bits, rate=rate)

    prompt = held_out[held_out.shape[0] // 2 :][: mesh.size, :-1]
    return Result(
        history=history,
        baselines={
            "unigram entropy": data.unigram_bits(corpus.train, held_out),
            "bigram entropy": data.bigram_bits(corpus.train, held_out),
        },
        tokens_in_step=args.batch * args.seq,
        step_seconds=statistics.median(seconds),
        exchange_seconds=exchange_seconds(state.params, tokens, config, mesh),
        prompt=bytes(prompt[0].astype(np.uint8)),
        continuation=generate(state.params, prompt, config, mesh, num_bytes=200, seed=args.seed),
    )


def progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[train]:.2f} bits/byte, held out {task.fields[held_out]:.2f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def report(result: Result, console: Console) -> None:
    bits = result.history.held_out_bits
    share = result.exchange_seconds / result.step_seconds
    dropped = result.history.dropped
    table = Table("", "", show_header=False)
    table.add_row("held-out loss before", f"{bits[0]:.3f} bits/byte")
    table.add_row("held-out loss after", f"[bold]{bits[max(bits)]:.3f} bits/byte")
    for name, baseline in result.baselines.items():
        table.add_row(f"  {name}", f"{baseline:.3f} bits/byte")
    table.add_section()
    table.add_row("throughput", f"{result.tokens_in_step / result.step_seconds:,.0f} tokens/s")
    table.add_row("training step", f"{result.step_seconds * 1e3:.1f} ms (median)")
    table.add_row(
        "  dispatch and combine", f"{result.exchange_seconds * 1e3:.1f} ms timed alone, {share:.0%} of a step"
    )
    table.add_row("dropped choices", f"{dropped.mean():.2%} in all steps, {dropped[-1]:.2%} in the last")
    console.print(table)
    sample = Text(result.prompt.decode(errors="replace"), style="dim")
    sample.append(result.continuation.decode(errors="replace"), style="bold not dim")
    console.print(Panel(sample, title="held-out text (dim), continued by the model (bold)"))


if __name__ == "__main__":
    start_devices()
    sys.exit(main())
