"""Versions of Python and JAX that this package cannot use, told in one line before JAX is imported.

Written so that older Pythons can run it too.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

OLDEST_PYTHON = (3, 11)  # as pyproject.toml has it; JAX's bounds are read from the metadata that pip made of it


def refuse_wrong_versions() -> None:
    """Ends a command with exit code 2; an `import` of this package elsewhere, in a notebook say, ends in ImportError."""
    line = wrong_version(sys.version_info[:2], installed("jax"), required_jax(), bool(installed("jax-cuda13-plugin")))
    if line is None:
        return
    if sys.argv[0] == "-m":  # while `python -m experiments.run` looks for its module
        print("error:", line, file=sys.stderr)
        sys.exit(2)
    raise ImportError(line)


def wrong_version(python: tuple[int, ...], jax: str | None, required: str | None, on_gpu: bool) -> str | None:
    """What does not fit, and the command that mends it; None where all is well or nothing is known.

    `jax` is the installed version, `required` a requirement such as `jax<0.13,>=0.10.2`.
    """
    if python < OLDEST_PYTHON:
        found, oldest = (".".join(map(str, version)) for version in (python, OLDEST_PYTHON))
        return (
            f"this is Python {found}, and mdl needs {oldest} or newer; "
            f"run `python{oldest} -m venv .venv && .venv/bin/pip install -e .`"
        )
    if required is None:
        return None
    if jax is None:
        return "JAX is not installed here; run `pip install -e .`, or -e '.[gpu]' or -e '.[tpu]' for chips"
    for relation, bound in re.findall(r"(>=|<)\s*([\d.]+)", required):
        if (numbers(jax) < numbers(bound)) == (relation == ">="):
            age = "older" if relation == ">=" else "newer"
            # the plugin's version must be that of JAX
            package = required.replace("jax", "jax[cuda13]", 1) if on_gpu else required
            return f"JAX {jax} is {age} than mdl can use ({required}); run `pip install -U '{package}'`"
    return None


def required_jax() -> str | None:
    """The requirement on JAX of the installed package; None if it runs from a directory without being installed."""
    try:
        requirements = importlib.metadata.requires("mdl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((each for each in requirements if re.match(r"jax\s*[<>=]", each) and ";" not in each), None)


def installed(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version as numbers: (0, 10, 2) of 0.10.2.dev7+cuda."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
