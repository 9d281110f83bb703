"""Parameters as they are drawn: distribution, independence, and no dependence on the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from models import FAST_COMPILE, FLOAT32, V3, leaves

from mdl.mtp import MtpConfig
from mdl.pure import PureModel
from mdl.sharding import MeshConfig

CONFIG = dataclasses.replace(V3, hidden_size=32, vocab_size=128, mtp=MtpConfig())


@pytest.fixture(scope="module")
def init():
    return jax.jit(PureModel(CONFIG).init, compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def drawn(init):
    return jax.device_get(init(jax.random.key(0)))


def test_matrices_are_normal_and_norms_are_one(drawn):
    """Every matrix from one normal distribution, embedding, router and MTP included (V3 report, section 4.2)."""
    for path, leaf in leaves(drawn["params"]).items():
        assert leaf.dtype == np.float32
        if "norm" in path:
            np.testing.assert_array_equal(leaf, 1, err_msg=path)
            continue
        x = leaf.ravel() / CONFIG.initializer_range
        n = x.size
        # Five standard errors of mean, variance and fourth moment of a normal sample.
        assert abs(x.mean()) < 5 / np.sqrt(n), path
        assert abs((x**2).mean() - 1) < 5 * np.sqrt(2 / n), path
        assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / n), path


def test_biases_start_at_zero(drawn):
    for path, leaf in leaves(drawn["buffers"]).items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)


def test_no_two_matrices_are_equal(drawn):
    """Stacked layers, experts and MTP modules included: a key used twice would show."""
    seen = {}
    for path, leaf in leaves(drawn["params"]).items():
        if "norm" in path:
            continue
        layers = leaf if "['stack']" in path else leaf[None]
        for i, layer in enumerate(layers):
            for j, expert in enumerate(layer if "['experts']" in path else layer[None]):
                first = expert.ravel()[:8].tobytes()
                assert first not in seen, (path, i, j, seen.get(first))
                seen[first] = (path, i, j)


def test_seed_decides(init, drawn):
    again, other = init(jax.random.key(0)), init(jax.random.key(1))
    for path, leaf in leaves(drawn["params"]).items():
        np.testing.assert_array_equal(leaf, leaves(again["params"])[path])
        assert "norm" in path or not np.array_equal(leaf, leaves(other["params"])[path])


def test_mesh_does_not_matter(drawn):
    with jax.set_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()):
        split = jax.jit(PureModel(CONFIG).init, compiler_options=FAST_COMPILE)(jax.random.key(0))
    for path, leaf in leaves(split).items():
        # The bits drawn are equal; what makes them normal is compiled anew and may round otherwise.
        np.testing.assert_allclose(leaf, leaves(drawn)[path], rtol=1e-6, err_msg=path)
    assert {axis for leaf in jax.tree.leaves(split) for axis in leaf.sharding.spec} >= {"fsdp", "expert", "tensor"}


def test_parameter_dtype():
    precision = dataclasses.replace(FLOAT32, param="bfloat16")
    abstract = PureModel(dataclasses.replace(CONFIG, precision=precision)).abstract()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract["params"])} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract["buffers"])} == {"float32"}  # moved by 0.001 at a time
