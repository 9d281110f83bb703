"""Decoding of a config's model with random parameters: tokens per second after a prompt, greedy, all rows of equal length."""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.backend import set_up_backend
from experiments.benches.report import BenchFlags, report
from experiments.cli import parse_argv
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from mdl.generate import Generator, Sampling
from mdl.pure import PureModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeFlags(BenchFlags):
    batch: tuple[int, ...] = (1, 8)  # numbers of rows
    prompt: int = 64  # tokens of every prompt
    tokens: int = 64  # timed tokens of every row

    def __post_init__(self):
        super().__post_init__()
        if min(self.batch, default=0) < 1 or self.prompt < 1 or self.tokens < 1:
            raise UserError("--batch, --prompt and --tokens must be at least 1")


def main(argv: list[str]) -> None:
    config, flags = parse_argv(argv, DecodeFlags, ExperimentConfig)
    config.check_mesh(jax.device_count(), jax.process_count())
    set_up_backend()
    report("decode", flags, list(measure(config, flags)))


def measure(config: ExperimentConfig, flags: DecodeFlags) -> Iterator[dict[str, Any]]:
    """One row per batch; the prompt and the token that it gives are not timed."""
    pure = PureModel(dataclasses.replace(config.model, mtp=None))
    with jax.set_mesh(config.mesh.build()):
        generator = Generator(pure, jax.jit(pure.init)(jax.random.key(config.seed)))
        for batch in flags.batch:
            prompts = np.random.default_rng(batch).integers(0, config.model.vocab_size, (batch, flags.prompt)).tolist()

            def once(prompts: list[list[int]] = prompts) -> tuple[float, float]:
                """Wall seconds and CPU seconds of all threads."""
                steps = generator.stream(
                    prompts, max_new_tokens=flags.tokens + 1, sampling=Sampling(), seeds=[0] * len(prompts)
                )
                next(steps)
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in steps:
                    pass
                return time.perf_counter() - wall, time.process_time() - cpu

            once()
            times = [once() for _ in range(flags.repeats)]
            tokens = batch * flags.tokens
            yield {
                "batch": batch,
                "tokens_per_second": tokens / statistics.median(wall for wall, _ in times),
                "best_tokens_per_second": tokens / min(wall for wall, _ in times),
                "cpu_ms_per_token": 1000 * min(cpu for _, cpu in times) / tokens,
            }
