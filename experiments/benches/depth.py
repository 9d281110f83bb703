"""Compile time of the train step by depth: with scanned layers it should not grow."""

import dataclasses
import time

import jax
import numpy as np

from experiments.benches.report import BenchFlags, report
from experiments.benches.step import random_rows
from experiments.cli import parse_argv
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.feed import place
from experiments.step import init_state, jit_train_step
from mdl.pure import PureModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthFlags(BenchFlags):
    repeats: int = 3  # compilations of each depth; the fastest counts
    depths: tuple[int, ...] = (4, 48)  # values of model.num_hidden_layers


def main(argv: list[str]) -> None:
    config, flags = parse_argv(argv, DepthFlags, ExperimentConfig)
    if len(flags.depths) < 2:
        raise UserError(f"--depths={flags.depths}: give at least two, such as --depths=4,48")
    jax.config.update("jax_enable_compilation_cache", False)
    best = dict.fromkeys(flags.depths, float("inf"))
    for _ in range(flags.repeats):
        for depth in best:
            best[depth] = min(best[depth], compile_seconds(config, depth))
    first, last = flags.depths[0], flags.depths[-1]
    report("depth", flags, {"compile_seconds": best, "ratio": best[last] / best[first]})


def compile_seconds(config: ExperimentConfig, depth: int) -> float:
    """Tracing, lowering and compiling of the train step, with nothing left over from the time before."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_hidden_layers=depth))
    mesh = config.mesh.build()
    with jax.set_mesh(mesh):
        model = PureModel(config.model)
        state = jax.eval_shape(lambda: init_state(config, model))
        batch = place(random_rows(config), mesh, config.train.grad_accum_steps)
        jax.clear_caches()
        began = time.perf_counter()
        jit_train_step(config, model, mesh).lower(state, batch, np.float32(0)).compile()
        return time.perf_counter() - began
