"""The train step of a config on random tokens."""

import math
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np

from experiments.backend import set_up_backend
from experiments.benches.report import BenchFlags, report, seconds
from experiments.cli import parse_argv
from experiments.config import ExperimentConfig
from experiments.feed import place
from experiments.peak_flops import find_peak
from experiments.step import init_state, jit_train_step
from mdl.flops import count_parameters
from mdl.pure import PureModel


def main(argv: list[str]) -> None:
    config, flags = parse_argv(argv, BenchFlags, ExperimentConfig)
    config.check_training()
    config.check_mesh(jax.device_count(), jax.process_count())
    set_up_backend()
    report("step", flags, measure(config, flags.repeats))


def measure(config: ExperimentConfig, repeats: int, limit: float = math.inf) -> dict[str, Any]:
    """tokens_per_second, mfu, step_ms (median and fastest), compile_seconds, peak memory in bytes.

    After `limit` seconds of steps no further one begins.
    """
    mesh = config.mesh.build()
    peak = find_peak(list(mesh.devices.flat))
    train = config.train
    with jax.set_mesh(mesh):
        model = PureModel(config.model)
        state = jax.jit(lambda: init_state(config, model))()
        batch = place(random_rows(config), mesh, train.grad_accum_steps)
        began = time.perf_counter()
        lowered = jit_train_step(config, model, mesh).lower(state, batch, np.float32(0))
        lowering = time.perf_counter() - began
        compiled = lowered.compile()
        compiling = time.perf_counter() - began - lowering

        def step() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, np.float32(0))
            return metrics

        times = seconds(step, repeats, limit=limit)
    tokens, median = train.batch_size * train.seq_len, statistics.median(times)
    memory = mesh.devices.flat[0].memory_stats() or {}
    return {
        "tokens_per_second": tokens / median,
        "best_tokens_per_second": tokens / min(times),
        "mfu": tokens / median * config.train_flops_per_token / peak.flops,
        "mfu_against": peak.line,
        "step_ms": 1000 * median,
        "lower_seconds": lowering,
        "compile_seconds": compiling,
        "peak_memory_bytes": memory.get("peak_bytes_in_use")
        or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "parameters": count_parameters(config.model)._asdict(),
        "batch": {"rows": train.batch_size, "seq_len": train.seq_len, "micro_batches": train.grad_accum_steps},
    }


def random_rows(config: ExperimentConfig) -> dict[str, np.ndarray]:
    """Rows of one document each, uniform tokens: the routing is that of the untrained router, not forced to balance."""
    rows, length = config.train.batch_size // jax.process_count(), config.train.seq_len + 1
    generator = np.random.default_rng(config.seed)
    return {
        "tokens": generator.integers(0, config.model.vocab_size, (rows, length), dtype=np.int32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
    }
