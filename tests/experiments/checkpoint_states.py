"""Train states without a model: the structure, dtypes and shardings that a trainer has, values from a seed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "tensor")
JSON = {"data_state": {"next_row": 7}, "config_json": {"seed": 1, "model": {"layers": 5}}, "extra": {"tokenizer": "ab"}}


def make_mesh(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices)


def abstract_params(mesh, layers=3, width=16):
    def leaf(shape, *spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    return {
        "embed": {"table": leaf((32, width), "tensor", "fsdp")},
        "prefix": [{"w": leaf((width, 8), "fsdp", None)}, {"w": leaf((width, 8), "fsdp", None)}],
        "stack": {
            "attn": {"w": leaf((layers, width, 8), None, "fsdp", "tensor", dtype=jnp.bfloat16)},
            "experts": {"w": leaf((layers, 8, width, 4), None, "expert", "fsdp")},
            "scale": leaf((layers,), None),
        },
    }


def abstract_state(mesh, ema=True, **kwargs):
    """A train state as the trainer has it, as shapes with shardings."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    params = abstract_params(mesh, **kwargs)
    layers = params["stack"]["scale"].shape[0]
    bias = jax.ShapeDtypeStruct((layers, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    adam = optax.adamw(1e-3, mask=jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    opt = jax.eval_shape(adam.init, params)
    moments = {"mu": params, "nu": params}
    opt = jax.tree.map(lambda leaf: scalar, opt)
    opt = (opt[0]._replace(**moments), *opt[1:])
    state = {
        "step": scalar,
        "params": params,
        "buffers": {"stack": {"router": {"bias": bias}}},
        "opt": opt,
        "skipped": scalar,
    }
    return state | ({"ema": params} if ema else {})


def fill(abstract, seed):
    """Random values, different in every leaf, the same on every mesh."""
    leaves, treedef = jax.tree.flatten(abstract)

    def values(i, leaf):
        random = np.asarray(np.random.default_rng((seed, i)).normal(size=leaf.shape) * 100, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: random[index])

    return jax.tree.unflatten(treedef, [values(i, leaf) for i, leaf in enumerate(leaves)])


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        assert a.sharding == b.sharding, path
        for got_shard, want_shard in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(got_shard.data), np.asarray(want_shard.data), err_msg=str(path))
