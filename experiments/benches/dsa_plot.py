"""The picture of `bench dsa`: time and memory by length. matplotlib is optional and imported only here, when it is drawn."""

import pathlib
from typing import Any

from experiments.plot import save, style

DETAIL = "#777777"
CURVES = {"dense": "#d9730d", "sparse": "#0b6e99"}


def plot(results: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the figure. ImportError without matplotlib."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.6), dpi=100, layout="constrained", facecolor="white")
    time, memory = figure.subplots(1, 2)
    rows = results["lengths"]
    tokens = [row["tokens"] for row in rows]
    for name, color in CURVES.items():
        drawn = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.8, "label": name}
        time.plot(tokens, [row[f"{name}_us_per_token"] for row in rows], **drawn)
        memory.plot(tokens, [row[f"{name}_temporary_bytes"] / 2**20 for row in rows], **drawn)
    if (even := results["break_even_tokens"]) is not None:
        time.axvline(even, color=DETAIL, linewidth=1, linestyle="--")
        time.annotate(
            f"break-even {even:.0f}",
            (even, 0.03),
            xycoords=time.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=DETAIL,
        )
    for axes, label in ((time, "microseconds per token"), (memory, "temporaries, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(tokens, [f"{length / 1024:g}K" if length % 1024 == 0 else str(length) for length in tokens])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("tokens of a row", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.legend(frameon=False, fontsize=9)
    style(time, "time, forward and backward", size=10)
    style(memory, "memory, forward and backward", size=10)
    save(figure, out)
