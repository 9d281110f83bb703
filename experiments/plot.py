"""Draws the curves of one run, or of several in one figure, from their `metrics.jsonl`.

    python -m experiments.plot runs/tiny
    python -m experiments.plot runs/* --out=compared.png

matplotlib is optional and imported only here, when a figure is drawn.
"""

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cli
from experiments.errors import UserError
from experiments.metrics import FILE_NAME, read_metrics

HOW_TO_INSTALL = "matplotlib is not installed; run `pip install matplotlib`"
_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#9f6b53", "#cb912f", "#787774")
_MOST_POINTS = 700


History = dict[str, list[dict[str, Any]]]  # name of a run: lines of its metrics.jsonl


class Curve(NamedTuple):
    steps: list[int]
    values: list[float]


class Panel(NamedTuple):
    title: str
    names: tuple[str, ...]  # the first of these metrics that a run has is drawn
    noisy: bool = False  # drawn smoothed, from zero
    by_depth: bool = (
        False  # the one name goes on with a depth, 1, 2, …: all that a run has are drawn, the deeper the paler
    )


_SMALL_PANELS = (
    Panel("validation bits per byte", ("val/bpb", "val/loss")),
    Panel("expert load: max / mean - 1", ("load/max_violation",), noisy=True),
    Panel("MTP drafts that would be accepted", ("val/acceptance/mtp_",), by_depth=True),
    Panel("attention kept by selected keys", ("val/indexer/recall",)),
    Panel("indexer: KL, a layer's mean", ("indexer/kl",), noisy=True),
    Panel("gradient norm", ("grad_norm",), noisy=True),
    Panel("learning rate", ("learning_rate",)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotFlags:
    out: str = "loss.png"  # the picture; for a single run it is put into that run's directory


def main(argv: list[str]) -> None:
    folders = [argument for argument in argv if not argument.startswith("-")]
    flags = cli.parse_flags([argument for argument in argv if argument.startswith("-")], PlotFlags)
    if not folders:
        raise UserError("no run: give run directories, such as python -m experiments.plot runs/*")
    runs = [pathlib.Path(folder) for folder in folders if (pathlib.Path(folder) / FILE_NAME).is_file()]
    if not runs:
        raise UserError(f"no {FILE_NAME} in {', '.join(folders)}")
    out = runs[0] / flags.out if len(runs) == 1 else pathlib.Path(flags.out)
    try:
        plot_runs(runs, out)
    except ImportError as error:
        raise UserError(HOW_TO_INSTALL) from error
    print(out)


def plot_at_end(workdir: str | os.PathLike) -> str:
    """Draws `loss.png` of a finished run; returns the line to print, also where matplotlib is missing."""
    out = pathlib.Path(workdir) / "loss.png"
    try:
        plot_runs([pathlib.Path(workdir)], out)
    except ImportError:
        return f"no loss.png: {HOW_TO_INSTALL}"
    except UserError as error:
        return f"no loss.png: {error}"
    return f"curves: {out}"


def plot_runs(runs: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """Writes the figure. ImportError without matplotlib; UserError if no run has a finite loss."""
    import matplotlib.figure  # the object interface: no global state, no display
    import matplotlib.ticker

    histories = _histories(runs)
    if not any(read_curve(lines, ("loss",)).steps for lines in histories.values()):
        raise UserError(f"no finite loss in {', '.join(str(run / FILE_NAME) for run in runs)}")
    panels = [p for p in _SMALL_PANELS if any(panel_curves(lines, p) for lines in histories.values())]
    columns = 1 if len(panels) <= 3 else 2
    rows = max(1, math.ceil(len(panels) / columns))

    figure = matplotlib.figure.Figure(figsize=(11, 5.6), dpi=100, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, 1 + columns, width_ratios=[2.1, *[1.0] * columns])
    _draw_loss(figure.add_subplot(grid[:, 0]), histories)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[i % rows, 1 + i // rows])
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        _draw_panel(axes, panel, histories)
    save(figure, out)


def save(figure: Any, out: pathlib.Path) -> None:
    """Writes a matplotlib figure as a picture of 256 colours: noisy curves make a true-colour file three times as big."""
    import matplotlib.backends.backend_agg
    import PIL.Image  # comes with matplotlib

    out.parent.mkdir(parents=True, exist_ok=True)
    canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    picture = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256).save(out, optimize=True)


def _histories(runs: Sequence[pathlib.Path]) -> History:
    """The lines of each run under its shortest name that is unique."""
    names = [run.absolute().name for run in runs]
    unique = len(set(names)) == len(names)
    return {name if unique else str(run): read_metrics(run / FILE_NAME) for name, run in zip(names, runs, strict=True)}


def _draw_loss(axes: Any, histories: History) -> None:
    curves = []
    for (name, lines), color in zip(histories.items(), itertools.cycle(_COLORS)):
        if not (curve := read_curve(lines, ("loss",))).steps:
            continue
        smooth = smoothed(curve)
        axes.plot(*thinned(curve), color=color, alpha=0.22, linewidth=0.7)
        axes.plot(*thinned(smooth), color=color, linewidth=1.8, label=f"{name}   {smooth.values[-1]:.3f}")
        curves.append(curve)
    axes.set_ylim(*loss_limits(curves))
    axes.legend(frameon=False, loc="upper right", fontsize=9, title="smoothed, at the end", title_fontsize=8)
    axes.set_xlabel("step", fontsize=9)
    style(axes, "training loss", size=11)


def _draw_panel(axes: Any, panel: Panel, histories: History) -> None:
    top = 0.0
    for (_, lines), color in zip(histories.items(), itertools.cycle(_COLORS)):
        for depth, curve in enumerate(panel_curves(lines, panel)):
            if panel.noisy:
                axes.plot(*thinned(curve), color=color, alpha=0.22, linewidth=0.6)
                top = max(top, float(np.percentile(curve.values, 98)))  # a few early spikes may leave the picture
                curve = smoothed(curve)
            marker = "o" if len(curve.steps) <= 30 else ""
            axes.plot(*thinned(curve), color=color, alpha=0.6**depth, linewidth=1.3, marker=marker, markersize=3)
    if panel.noisy:
        axes.set_ylim(0, 1.1 * top)
    style(axes, panel.title, size=9)


def panel_curves(lines: list[dict[str, Any]], panel: Panel) -> list[Curve]:
    """What a panel shows of a run; nothing if the run has not measured it."""
    names = [(f"{panel.names[0]}{depth}",) for depth in range(1, 9)] if panel.by_depth else [panel.names]
    return [curve for each in names if (curve := read_curve(lines, each)).steps]


def read_curve(lines: list[dict[str, Any]], names: tuple[str, ...]) -> Curve:
    """The finite values of the first of these metrics that occurs."""
    for name in names:
        points = [(line["step"], line[name]) for line in lines if _is_finite(line.get(name))]
        if points:
            return Curve([step for step, _ in points], [value for _, value in points])
    return Curve([], [])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smoothed(curve: Curve) -> Curve:
    """Exponential mean over 2 % of the run; over less at its start, so that it does not trail the first fall."""
    values, mean = [], 0.0
    for i, value in enumerate(curve.values):
        mean += (value - mean) / max(1.0, min(0.02 * len(curve.values), 0.05 * (i + 1)))
        values.append(mean)
    return Curve(curve.steps, values)


def thinned(curve: Curve) -> Curve:
    """At most a screenful of points; the last one stays."""
    stride = max(1, math.ceil(len(curve.steps) / _MOST_POINTS))
    return Curve(curve.steps[::-1][::stride][::-1], curve.values[::-1][::stride][::-1])


def loss_limits(curves: list[Curve]) -> tuple[float, float]:
    """Shows all but the first fall: the top is where the curves stand after 2 % of the run, plus a margin."""
    low = min(sorted(c.values)[len(c.values) // 200] for c in curves)
    high = max(smoothed(c).values[len(c.values) // 50] for c in curves)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def style(axes: Any, title: str, *, size: int) -> None:
    """What all panels have in common."""
    axes.set_title(title, loc="left", fontsize=size, color="#333333")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


if __name__ == "__main__":
    cli.run_main(main)
