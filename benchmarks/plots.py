"""Pictures of what was measured, from benchmarks/results/*.json into docs/images (SVG, transparent: for light and dark pages):

    python -m benchmarks.plots [--machine "2 x NVIDIA H200"] [FILE ...]

speed-tokens, speed-sms   time and share of the push ceiling, the kernels alone        speed-modes      low latency and high throughput
speed-baselines           calls inside jit beside XLA's collectives                    speed-decode     steps of several layers
model-nodes               the model, 2 to 64 nodes
A picture without data is not drawn, and one that is there stays. matplotlib is needed here only (the "examples" extra).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cases import Case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import ROOT, model, summary, traffic, tune

Row = dict[str, Any]

FOLDER = ROOT / "docs" / "images"
INK = "#848d97"  # on white and on black alike
COLOURS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7", "#d4a72c", "#f778ba", "#768390")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jax_ep",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.6,
}
KERNELS = ("dispatch", "dispatch_cached", "combine", "combine_weighted")
LAYOUTS = ("rank", "expert", "batched")
MODES = ("low_latency", "high_throughput")


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows that have a time and these values; a tuple means one of them."""

    def agrees(row: Row) -> bool:
        return all(
            row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items()
        )

    return [row for row in rows if row["us"] is not None and agrees(row)]


def commonest(rows: Sequence[Row], key: str) -> Any:
    """The value that most rows have; of several the largest."""
    counts = collections.Counter(row[key] for row in rows)
    return max(counts, key=lambda value: (counts[value], value))


def origin(rows: Sequence[Row]) -> str:
    """Where the numbers of a picture are from."""
    dates = sorted({row["date"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    return f"{rows[0]['machine']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits[:3])}"


def tokens_ticks(axes: Axes, values: Iterable[int], label: str) -> None:
    """A logarithmic axis with the values measured on it."""
    axes.set_xscale("log", base=2)
    values = sorted(set(values))
    axes.set_xticks(values, [str(value) for value in values], rotation=45 if len(values) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def times_axis(axes: Axes) -> None:
    """Logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


# ---- the kernels alone -----------------------------------------------------------------------------------------------


def along(rows: Sequence[Row], key: str, label: str) -> Figure | None:
    """µs and share of the ceiling against `key`, a column an operation, a line a layout; the others at their base."""
    base = select(rows, level="kernel", wire=None, routing="uniform", graph=False, mode="high_throughput")
    base = [row for row in base if row["gpus"] == row["ranks"]]
    if not base:
        return None
    base = select(base, case="deepseek-v3", ranks=commonest(base, "ranks"))
    fixed = {"tokens": "sms", "sms": "tokens"}[key]
    # Of the values of the other axis the one along which most of this axis was measured.
    spans = {value: len({row[key] for row in select(base, **{fixed: value})}) for value in {row[fixed] for row in base}}
    if not spans or max(spans.values()) < 2:
        return None
    at = max(spans, key=lambda value: (spans[value], value))
    base = select(base, **{fixed: at})
    shown = [name for name in KERNELS if select(base, operation=name)]
    figure = Figure(figsize=(2.6 * len(shown), 4.6), layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
    for column, operation in zip(grid.T, shown, strict=True):
        for layout, colour in zip(LAYOUTS, COLOURS, strict=False):
            line = sorted(select(base, operation=operation, layout=layout), key=lambda row: row[key])
            x = [row[key] for row in line]
            if not line:
                continue
            column[0].plot(x, [row["us"] for row in line], "o-", color=colour, label=f'"{layout}"')
            shares = [1 / row["ratio"] if row["ratio"] else np.nan for row in line]
            column[1].plot(x, shares, "o-", color=colour)
        ceilings = {row[key]: row["ceiling_us"] for row in base if row["operation"] == operation and row["ceiling_us"]}
        if ceilings:
            column[0].plot(
                sorted(ceilings), [ceilings[x] for x in sorted(ceilings)], ":", color=INK, label="push ceiling"
            )
        column[0].set_title(operation)
        times_axis(column[0])
        column[1].set_ylim(0, 1)
        tokens_ticks(column[1], (row[key] for row in base), label)
    fastest, ceiling = (min((row[name] for row in base if row[name]), default=1) for name in ("us", "ceiling_us"))
    grid[0, 0].set_ylim(bottom=min(fastest, max(fastest / 4, ceiling)) / 1.2)  # few bytes: a ceiling far below
    grid[0, 0].set_ylabel("µs a call")
    grid[1, 0].set_ylabel("share of the push ceiling")
    grid[0, 0].legend(fontsize=8)
    what = f"{at} SMs" if fixed == "sms" else f"{at} tokens a rank"
    figure.suptitle(
        f"DeepSeek-V3 (hidden 7168, top-8 of 256), bf16, {base[0]['ranks']} ranks, {what}\n{origin(base)}", fontsize=9
    )
    return figure


# ---- modes, and what there is without jax_ep -------------------------------------------------------------------------


def pairs_of_kernels(rows: Sequence[Row]) -> list[Row]:
    """Kernels' rows as rows of pairs: the times of a dispatch and a combine (weighted where rows have gates) at the same point."""
    keys = ("mode", "case", "ranks", "hidden", "layout", "wire", "tokens", "sms", "routing", "graph")
    there: dict[tuple[Any, ...], Row] = {}
    for row in select(rows, level="kernel", wire=None, routing="uniform"):
        times = there.setdefault(tuple(row[key] for key in keys), row | {"operation": "pair", "parts": {}})["parts"]
        times[row["operation"]] = row["us"]
    made = []
    for row in there.values():
        back = "combine" if row["layout"] == "rank" else "combine_weighted"
        if {"dispatch", back} <= set(row["parts"]):
            made.append(row | {"us": row["parts"]["dispatch"] + row["parts"][back]})
    return made


def modes(rows: Sequence[Row]) -> Figure | None:
    """Pairs of both modes against tokens, a column a layout and size of a row: inside jit, or the kernels alone."""
    inside = select(
        rows, level="jit", operation="pair", by="jax_ep", mode=("low_latency", "high_throughput"), graph=False
    )
    alone = pairs_of_kernels(rows)
    alone = [
        row
        for row in alone
        if row["case"] == "deepseek-v3" and not row["graph"] and row["sms"] == commonest(alone, "sms")
    ]
    for pairs, what in ((inside, "inside jit"), (alone, "kernels alone")):
        panels = [
            panel
            for panel in dict.fromkeys((row["ranks"], row["hidden"], row["layout"], row["wire"]) for row in pairs)
            if all(len({row["tokens"] for row in select(_of(pairs, panel), mode=mode)}) > 1 for mode in MODES)
        ][:6]
        if panels:
            return _modes(pairs, panels, what)
    return None


def crossover(row: Row) -> int | None:
    """Up to how many tokens mode="auto" takes low latency for such rows, if tuning.json has an entry for just these."""
    case = Case("", 1, row["hidden"], 1, row["ranks"], row["ranks"], dtype=row["dtype"] or "bfloat16")
    like = {name: row[name] for name in ("ranks", "layout")} | {"row_bytes": traffic.row_bytes(case, row["wire"])}
    device = row["machine"].split(" x ")[-1]
    for entry in json.loads(tune.TABLE.read_text()):
        if fnmatch.fnmatchcase(device, entry["device"]) and all(entry[name] == like[name] for name in like):
            return entry["low_latency_up_to"]
    return None


def _modes(pairs: Sequence[Row], panels: Sequence[tuple[Any, ...]], what: str) -> Figure:
    wide = len(panels) if len(panels) <= 4 else 3
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(max(2.8 * wide, 4.5), 0.4 + 2.6 * high), layout="constrained")
    for axes, panel in zip(figure.subplots(high, wide, sharey=True, squeeze=False).flat, panels, strict=False):
        of_panel = _of(pairs, panel)
        most = max(row["tokens"] for row in select(of_panel, mode="low_latency"))
        for mode, colour in zip(MODES, COLOURS, strict=False):
            line = sorted(select(of_panel, mode=mode), key=lambda row: row["tokens"])
            line = [row for row in line if row["tokens"] <= most]
            axes.plot([row["tokens"] for row in line], [row["us"] for row in line], "o-", color=colour, label=mode)
        up_to = crossover(of_panel[0])
        if up_to is not None:
            label = f'"auto": low latency up to {up_to}' if up_to else '"auto": never low latency'
            axes.axvline(max(up_to, 0.75), color=INK, linestyle=":", linewidth=1)
            axes.annotate(
                label, (max(up_to, 0.75), 0.02), (3, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                rotation=90, fontsize=7,
            )  # fmt: skip
        ranks, hidden, layout, wire = panel
        axes.set_title(f'{ranks} ranks, hidden {hidden}, "{layout}"{", " + wire if wire else ""}', fontsize=8)
        times_axis(axes)
        tokens_ticks(axes, (row["tokens"] for row in of_panel if row["tokens"] <= most), "tokens a rank")
    figure.axes[0].set_ylabel("µs, dispatch and combine")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{what}: {origin(pairs)}", fontsize=9)
    return figure


def _of(rows: Sequence[Row], panel: tuple[Any, ...]) -> list[Row]:
    ranks, hidden, layout, wire = panel
    return select(rows, ranks=ranks, hidden=hidden, layout=layout, wire=wire)


def baselines(rows: Sequence[Row]) -> Figure | None:
    """A bar a way to do the job, in the best of what was measured of it; a panel an operation and number of tokens."""
    level = "jit" if select(rows, level="jit", by="jax_ep") else "program"
    inside = select(rows, level=level, operation=("pair", "moe", "moe_gradient"))
    inside = [row for row in inside if row.get("ranks_per_node") is None]  # nodes are not pretended
    panels = [
        panel
        for panel in dict.fromkeys((row["case"], row["tokens"], row["operation"]) for row in inside)
        if len({row["by"] for row in _at(inside, panel)}) > 1
    ][:4]
    if not panels:
        return None
    figure = Figure(figsize=(3.4 * len(panels) + 1.6, 2.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        best: dict[str, float] = {}
        for row in _at(inside, panel):
            name = (
                row["by"]
                if row["by"] != "jax_ep"
                else f'jax_ep, "{row["layout"]}"' + (f", {row['wire']}" if row["wire"] else "")
            )
            best[name] = min(best.get(name, np.inf), row["us"])
        names = sorted(best, key=lambda name: best[name], reverse=True)
        ours = [COLOURS[0] if name.startswith("jax_ep") else COLOURS[-1] for name in names]
        longest = 1.2 * max(us for us in best.values() if us <= 10 * min(best.values()))  # what is far beyond is cut
        lengths = [min(best[name], longest) for name in names]
        axes.barh(names, lengths, color=ours)
        for place, (name, length) in enumerate(zip(names, lengths, strict=True)):
            told = f"{best[name]:.0f}" + (", cut" if best[name] > longest else "")
            axes.annotate(told, (length, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        case, tokens, operation = panel
        axes.set_title(f"{operation}: {case.split('/')[0]}, {tokens} tokens a rank")
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.25 * longest)
        axes.set_xlabel("µs" + (", with JAX's own dispatch" if level == "program" else " a call"))
    figure.suptitle(origin(inside), fontsize=9)
    return figure


def _at(rows: Sequence[Row], panel: tuple[Any, ...]) -> list[Row]:
    case, tokens, operation = panel
    return select(rows, case=case, tokens=tokens, operation=operation)


def decode(rows: Sequence[Row]) -> Figure | None:
    """Steps of several layers against tokens: µs a step, and of the host until the call returns; a column a hidden size."""
    steps = select(rows, operation="step")
    if not steps:
        return None
    steps = select(steps, ranks=commonest(steps, "ranks"))
    own = [row for row in steps if row["by"] == "jax_ep"]
    layout = commonest(own, "layout") if own else None
    lines = {
        f'"{layout}", {mode}': select(own, layout=layout, mode=mode)
        for mode in dict.fromkeys(row["mode"] for row in own)
    }
    lines |= {by: select(steps, by=by) for by in dict.fromkeys(row["by"] for row in steps) if by != "jax_ep"}
    sizes = sorted({row["hidden"] for row in steps}, reverse=True)[:4]
    figure = Figure(figsize=(max(2.8 * len(sizes), 5), 4.6), layout="constrained")
    grid = figure.subplots(2, len(sizes), sharex="col", sharey="row", squeeze=False)
    for column, hidden in zip(grid.T, sizes, strict=True):
        for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
            for graph, style in ((True, "o-"), (False, "s--")):
                shown = sorted(select(line, hidden=hidden, graph=graph), key=lambda row: row["tokens"])
                label = f"{name}, {'graph' if graph else 'launched'}"
                for axes, key in zip(column, ("us", "host_us"), strict=True):
                    if shown:
                        axes.plot(
                            [row["tokens"] for row in shown],
                            [row[key] for row in shown],
                            style,
                            color=colour,
                            label=label,
                        )
        column[0].set_title(f"hidden {hidden}")
        for axes in column:
            times_axis(axes)
        tokens_ticks(column[1], (row["tokens"] for row in steps if row["hidden"] == hidden), "tokens a rank")
    grid[0, 0].set_ylabel("µs a step, steps queued")
    grid[1, 0].set_ylabel("µs until the call returns")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    layers = commonest(steps, "layers")
    figure.suptitle(f"decode steps of {layers} MoE layers, {steps[0]['ranks']} ranks\n{origin(steps)}", fontsize=9)
    return figure


# ---- the model -------------------------------------------------------------------------------------------------------


def nodes(machine: model.Machine) -> Figure:
    """The model from 2 to 64 nodes, and beside DeepEP's published figures."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    times, figures = figure.subplots(1, 2, width_ratios=(1, 1.1))
    counts = [2, 4, 8, 16, 32, 64]
    for tokens, style in ((4096, "o-"), (128, "s--")):
        for out, name, colour in ((True, "dispatch", COLOURS[0]), (False, "combine", COLOURS[1])):
            us = [model.across_nodes(count, tokens, machine, out)[1] for count in counts]
            times.plot(counts, us, style, color=colour, label=f"{name}, {tokens} tokens")
    times_axis(times)
    tokens_ticks(times, counts, "nodes of 8 H200s, 400 Gb/s a GPU")
    times.set_ylabel("µs a call (model, not measured)")
    times.set_title('"rank", bf16, hidden 7168, top-8, 24 SMs')
    times.legend(fontsize=8)
    published = model.published()
    for place, (unit, colour) in enumerate((("GB/s", COLOURS[2]), ("µs", COLOURS[3]))):
        some = [figure for figure in published if figure.unit == unit]
        label = f"DeepEP, {'throughput, logical GB/s' if place == 0 else 'low latency, µs'}"
        figures.plot([f.value for f in some], [f.predicted for f in some], "o", color=colour, label=label)
    ends = np.array([30, 450])
    figures.plot(ends, ends, color=INK, linewidth=1)
    figures.fill_between(ends, 0.8 * ends, 1.2 * ends, color=INK, alpha=0.15, linewidth=0, label="within 20 %")
    figures.set(xscale="log", yscale="log", xlabel="published", ylabel="model", title="the model and DeepEP's figures")
    figures.set_xticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    figures.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    figures.minorticks_off()
    figures.legend(fontsize=8)
    return figure


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    """A file's name and what draws it from the rows of one machine."""

    name: str
    draw: Callable[[Sequence[Row]], Figure | None]


PICTURES = (
    Picture("speed-tokens", lambda rows: along(rows, "tokens", "tokens a rank")),
    Picture("speed-sms", lambda rows: along(rows, "sms", "SMs")),
    Picture("speed-modes", modes),
    Picture("speed-baselines", baselines),
    Picture("speed-decode", decode),
    Picture("model-nodes", lambda _: nodes(model.measured_machine())),
)


def machine_of(rows: Sequence[Row]) -> str | None:
    """The GPU machine that most rows are from."""
    on_gpus = [row for row in rows if row["gpus"]]
    return commonest(on_gpus, "machine") if on_gpus else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws what there is data for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.split(",", maxsplit=1)[0])
    parser.add_argument("--machine", help="as rows name it (default: the GPUs that most rows are from)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: docs/images")
    parser.add_argument("files", type=Path, nargs="*", help="default: benchmarks/results/*.json")
    options = parser.parse_args(arguments)
    rows = summary.read(options.files)
    machine = options.machine or machine_of(rows)
    rows = [row for row in rows if row["machine"] == machine]
    options.folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for picture in PICTURES:
            figure = picture.draw(rows)
            path = options.folder / f"{picture.name}.svg"
            if figure is None:
                print(f"{path.name}: no data of {machine}", file=sys.stderr)
                continue
            figure.savefig(path, transparent=True, metadata={"Date": None})
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
