"""Runs a notebook's source from top to bottom and writes the notebook with what it printed and drew.

    python notebooks/render.py notebooks/kernel_room.py

The source is Python in jupytext's percent format: that is what to edit. Needs the extra `dev`.
"""

import os
import pathlib
import sys

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]


def run(source: pathlib.Path, *, timeout: float = 1800) -> nbformat.NotebookNode:
    """The notebook with its outputs; nbclient's CellExecutionError names the cell that failed. timeout: seconds of one cell."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # else random: each rendering would change every cell
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    where = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=timeout, resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the day
    return notebook


def main(argv: list[str]) -> None:
    for name in argv:
        source = pathlib.Path(name)
        nbformat.write(run(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
