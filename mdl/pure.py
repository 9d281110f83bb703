"""Between NNX modules and plain trees of arrays: what the train step carries and what checkpoints hold."""

from typing import Any

import jax
from flax import nnx

from mdl.transformer import Transformer, TransformerConfig

Tree = dict[str, Any]


class PureModel:
    """A model without its arrays: {"params": ..., "buffers": ...} in, a Transformer out, and the other way round.

    Buffers are what no gradient reaches: the routers' biases.
    """

    def __init__(self, config: TransformerConfig, *, layers_apart: bool = False):
        """layers_apart: the stack is a dict of layers, as `apart` makes it, not one tree with a leading layer axis."""
        self.config = config

        def build() -> Transformer:
            model = config.build(nnx.Rngs(0))
            return model.with_layers_apart() if layers_apart else model

        model = nnx.eval_shape(build)
        self._graph, self._params, self._buffers = nnx.split(model, nnx.Param, ...)

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters and buffers, split over the mesh in use as they are made; to be jitted."""
        _, params, buffers = nnx.split(self.config.build(nnx.Rngs(params=key)), nnx.Param, ...)
        return {"params": nnx.to_pure_dict(params), "buffers": nnx.to_pure_dict(buffers)}

    def abstract(self) -> Tree:
        """Shapes, dtypes and (under a mesh) shardings of what `init` makes, without making it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def merge(self, params: Tree, buffers: Tree) -> Transformer:
        """The module with these arrays; usable inside and outside of jit."""
        return nnx.merge(self._graph, _filled(self._params, params), _filled(self._buffers, buffers))


def apart(arrays: Tree) -> Tree:
    """Arrays of a PureModel as one with `layers_apart` takes them; a copy of the stack if it is one tree, the rest is shared."""
    return {
        kind: {**tree, "stack": _layers(tree["stack"])} if "stack" in tree and "0" not in tree["stack"] else tree
        for kind, tree in arrays.items()
    }


@jax.jit
def _layers(stack: Tree) -> Tree:
    depth = jax.tree.leaves(stack)[0].shape[0]
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(depth)}


def _filled(state: nnx.State, arrays: Tree) -> nnx.State:
    filled = jax.tree.map(lambda leaf: leaf, state)  # a copy of the structure, so that two merges never share it
    nnx.replace_by_pure_dict(filled, arrays)
    return filled
