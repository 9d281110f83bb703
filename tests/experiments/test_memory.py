"""What a long training step needs, as the compiler counts it."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from experiments.benches.step import random_rows
from experiments.feed import place
from experiments.step import init_state, make_train_step
from mdl.pure import PureModel
from mdl.sharding import MeshConfig


@pytest.mark.slow
def test_a_step_of_32k_tokens_fits_4_gb():
    """A row of 32K tokens, with a gigabyte left for Python and the compiler. One head's scores alone would take 4.3 GB."""
    config = tiny.get_config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_position_embeddings=32768),
        train=dataclasses.replace(config.train, batch_size=1, seq_len=32768),
    )
    mesh = MeshConfig().build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = PureModel(config.model)
        state = jax.eval_shape(lambda: init_state(config, model))
        batch = place(random_rows(config), mesh, config.train.grad_accum_steps)
        step = jax.jit(make_train_step(config, model), donate_argnums=0)
        memory = step.lower(state, batch, np.float32(0)).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 3e9
