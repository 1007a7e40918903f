"""The picture of a training: the loss, the load of every expert and the dropped choices, step by step."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .training import History

TRAIN, HELD_OUT, QUIET = "#7aa6d6", "#c2410c", "0.45"


def plot_training(history: History, baselines: dict[str, float], path: Path) -> None:
    """baselines: bits a byte on the held-out files, by name."""
    loads, dropped, train_bits = history.load, history.dropped, history.train_bits
    num_steps, num_layers, num_experts = loads.shape
    steps = np.arange(1, num_steps + 1)
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    loss, load, drops = figure.subplots(3, sharex=True, height_ratios=(4, 4, 1.3))

    for name, bits in baselines.items():
        loss.axhline(bits, color=QUIET, linestyle="--", linewidth=1)
        loss.annotate(
            f"{name}: {bits:.2f}", (1, bits), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", color=QUIET,
        )  # fmt: skip
    loss.plot(steps, train_bits, color=TRAIN, linewidth=1, label="training batch")
    at, held_out_bits = zip(*history.held_out_bits.items(), strict=True)
    loss.plot(at, held_out_bits, "o-", color=HELD_OUT, markersize=4, clip_on=False, label="held-out files")
    loss.annotate(
        f"{held_out_bits[-1]:.2f}", (at[-1], held_out_bits[-1]), xytext=(0, 8), textcoords="offset points", ha="right",
        color=HELD_OUT, weight="bold",
    )  # fmt: skip
    loss.set(title="Loss", ylabel="bits per byte", ylim=(0, None))
    loss.legend(frameon=False)
    loss.grid(axis="y", alpha=0.3)

    image = load.imshow(
        loads.reshape(num_steps, -1).T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest",
        extent=(0.5, num_steps + 0.5, num_layers * num_experts, 0),
    )  # fmt: skip
    for layer in range(1, num_layers):
        load.axhline(layer * num_experts, color="black", linewidth=1)
    load.set_yticks(
        (np.arange(num_layers) + 0.5) * num_experts, [f"layer {layer}" for layer in range(num_layers)],
        rotation=90, va="center",
    )  # fmt: skip
    load.tick_params(axis="y", length=0)
    load.set(title=f"Load of the experts, {num_experts} in each layer", ylabel="expert")
    colorbar = figure.colorbar(image, ax=load, extend="max", pad=0.01, aspect=30)
    colorbar.set_label("choices, in fair shares")

    drops.fill_between(steps, dropped, color=TRAIN, linewidth=0)
    drops.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    drops.set(title="Dropped for want of room", xlabel="training step", ylabel="of all choices")
    drops.set(ylim=(0, max(0.05, 1.05 * dropped.max())), xlim=(0, num_steps + 0.5))
    drops.grid(axis="y", alpha=0.3)

    for axes in (loss, load, drops):
        axes.set_title(axes.get_title(), loc="left", weight="bold")
        axes.set_title("")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
