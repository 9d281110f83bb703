"""Which parameters a run trains. The others are frozen: gradient, optimizer, decay and gradient norm do not know of them."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax

from experiments.config_tree import did_you_mean
from experiments.errors import UserError

Tree = Any
Patterns = Sequence[str] | None  # globs of parameter paths, `*` matching `/` too; None is every parameter


def paths(params: Tree) -> list[str]:
    """As patterns and messages spell them: stack/attention/indexer/wk/weight."""
    return [_spell(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def trains(path: str, patterns: Patterns) -> bool:
    return patterns is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def split(params: Tree, patterns: Patterns) -> tuple[Tree, Tree]:
    """(trained, frozen): in each the leaves of the other are None, which JAX takes for no leaf at all."""

    def only(wanted: bool) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if trains(_spell(path), patterns) == wanted else None, params
        )

    return only(True), only(False)


def join(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda leaf: leaf is None)


def check(params: Tree, patterns: Patterns) -> None:
    """UserError for a pattern that matches no parameter."""
    known = paths(params)
    for pattern in patterns or ():
        if not fnmatch.filter(known, pattern):
            # Names of modules are nearer to what people mean than whole paths.
            names = sorted({part for path in known for part in path.split("/") if not part.isdigit()})
            word = max(pattern.replace("*", "/").split("/"), key=len)
            raise UserError(
                f"train.trainable={pattern} matches no parameter{did_you_mean(word, names)}; paths look like {known[-1]}, and * "
                "matches any part of them"
            )


def _spell(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
