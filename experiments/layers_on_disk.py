"""One array per layer on disk, one stack per scan in memory: the two views of a train state, and the way between them.

In memory every leaf below the key `stack` has a leading layer axis, and the unrolled layers before the scan stand below
`prefix` (a list, or a dict with the keys "0", "1", ...); a stack of unlike layers is such a dict too. On disk all become
`layers/<true layer index>`: parameters, buffers, optimizer moments and EMA alike. So a checkpoint does not know whether the
model scans.
Everything else keeps its path: `params/embed/table`, `opt/0/mu/head/kernel`, `step`.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

STACK = "stack"
PREFIX = "prefix"
LAYERS = "layers"


def to_disk(state) -> dict[str, jax.Array]:
    """Returns {name on disk: array}. Layers are fresh arrays: the caller may donate their stack at once.

    Slices wait in pinned host memory: an accelerator holds one extra leaf at a time, never a second copy of the state.
    (XLA's GPU client caps that memory; XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB raises the cap.)
    """
    arrays = {}
    for names, leaf in named_leaves(state):
        if isinstance(names, str):
            arrays[names] = leaf
        else:
            layers = _unstack(len(names), _layer_sharding(names[0], leaf.sharding))(leaf)
            on_host = jax.device_put(layers, layers[0].sharding.with_memory_kind("pinned_host"))
            arrays |= zip(names, jax.block_until_ready(on_host), strict=True)
    return arrays


def abstract_on_disk(abstract) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {name on disk: shape, dtype and target sharding of one array} for a state of ShapeDtypeStructs."""
    arrays = {}
    for names, leaf in named_leaves(abstract):
        if leaf.sharding is None:
            raise ValueError(f"{names}: a state can be read only onto shardings, this leaf has none")
        if isinstance(names, str):
            arrays[names] = leaf
        else:
            sharding = _layer_sharding(names[0], leaf.sharding)
            arrays |= dict.fromkeys(names, jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding))
    return arrays


def from_disk(arrays: dict[str, jax.Array], abstract):
    """Rebuilds the state that `abstract` describes. Empties `arrays` on the way: one leaf at a time is held twice."""
    leaves = []
    for names, leaf in named_leaves(abstract):
        if isinstance(names, str):
            leaves.append(arrays.pop(names))
        else:
            layers = [arrays.pop(name) for name in names]
            leaves.append(jax.block_until_ready(_stack(leaf.sharding)(*layers)))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def checksums(state) -> dict[str, int]:
    """Returns {name on disk: the sum of the array's bits, as words, modulo 2**32}: the same on every mesh."""
    sums = {}
    for names, leaf in named_leaves(state):
        # One at a time: virtual CPU devices abort when many collectives are queued.
        if isinstance(names, str):
            sums[names] = int(_sum_of_words(leaf, 0))
        else:
            sums |= zip(names, np.asarray(_sum_of_words(leaf, 1)).tolist(), strict=True)
    return sums


def is_by_expert(name: str) -> bool:
    """Whether the first dim of the array with this name counts routed experts."""
    return "/experts/" in name


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in arrays.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(_keys(path)): leaf for path, leaf in paths}


def named_leaves(tree) -> list[tuple[str | list[str], Any]]:
    """Every leaf in order, with its name on disk or with the names of its layers."""
    paths = [(_keys(path), leaf) for path, leaf in jax.tree.flatten_with_path(tree)[0]]
    # Buffers and the like may skip a prefix layer, parameters never do: the whole tree knows the count.
    first = max((1 + index for keys, _ in paths if (index := _prefix_index(keys)) is not None), default=0)
    named = [(_disk_names(keys, leaf, first), leaf) for keys, leaf in paths]
    flat = [name for names, _ in named for name in ([names] if isinstance(names, str) else names)]
    if len(set(flat)) < len(flat):
        twice = collections.Counter(flat).most_common(1)[0][0]
        raise ValueError(f"two leaves of the state would be called {twice} on disk")
    return named


def _disk_names(keys: list[str], leaf, first: int) -> str | list[str]:
    if STACK in keys:
        at = keys.index(STACK)
        if keys[at + 1 :] and keys[at + 1].isdecimal():
            return "/".join([*keys[:at], LAYERS, str(first + int(keys[at + 1])), *keys[at + 2 :]])
        return ["/".join([*keys[:at], LAYERS, str(first + i), *keys[at + 1 :]]) for i in range(leaf.shape[0])]
    if _prefix_index(keys) is not None:
        keys = [LAYERS if key == PREFIX else key for key in keys]
    return "/".join(keys)


def _prefix_index(keys: list[str]) -> int | None:
    """The layer index that follows the key `prefix`, if there is one."""
    after = dict(itertools.pairwise(keys)).get(PREFIX, "")
    return int(after) if after.isdecimal() else None


def _keys(path: Iterable[Any]) -> list[str]:
    """A tree path as strings: dict keys, list indices and the field names of optax's NamedTuples."""
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _layer_sharding(name: str, sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    if len(sharding.spec) and sharding.spec[0] is not None:
        raise ValueError(f"{name}: the layer axis of a stack must not be sharded, got {sharding.spec}")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_words(x, layer_axes: int):
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(x, word)
    return jnp.sum(words, axis=tuple(range(layer_axes, words.ndim)), dtype=jnp.uint32)


@functools.cache  # one program for all layers: its compilation costs once, calls for each layer would at every save
def _unstack(layers: int, sharding: Sharding):
    return jax.jit(lambda x: tuple(x[i] for i in range(layers)), out_shardings=(sharding,) * layers)


@functools.cache
def _stack(sharding: Sharding):
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=sharding)
