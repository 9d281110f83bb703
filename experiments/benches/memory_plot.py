"""The picture of `bench memory`. matplotlib is optional and imported only here, when it is drawn."""

import pathlib
from typing import Any

from experiments.plot import save, style


def plot(results: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the figure. ImportError without matplotlib."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.4), dpi=100, layout="constrained", facecolor="white")
    memory, files = figure.subplots(1, 2)
    samples = results["samples"]
    memory.plot(samples["step"], [value / 2**20 for value in samples["rss_bytes"]], color="#0b6e99", linewidth=1.3)
    files.plot(samples["step"], samples["open_files"], color="#d9730d", linewidth=1.3)
    for axes, title in (
        (memory, f"resident memory, MiB ({results['rss_bytes_per_step'] / 1024:+.2f} KiB a step)"),
        (files, f"open files ({results['open_files_per_step']:+.1g} a step)"),
    ):
        axes.axvline(results["settled_after_step"], color="#777777", linewidth=1, linestyle="--")
        axes.set_xlabel("step", fontsize=9)
        style(axes, title, size=10)
        axes.set_ylim(bottom=0)
    save(figure, out)
