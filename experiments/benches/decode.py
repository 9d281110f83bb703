"""Decoding of a config's model: tokens per second after a prompt, greedy, all rows of equal length; with and without drafts.

Parameters and prompts are random, or those of a trained checkpoint and beginnings of Python code: drafts need them.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from experiments.backend import set_up_backend
from experiments.benches.report import BenchFlags, report
from experiments.cli import parse_argv
from experiments.completion import check_drafts
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.loading import find_model
from mdl.generate import Generator
from mdl.pure import PureModel, Tree
from mdl.sampling import Sampling

BEGINNINGS = (
    "def fib(n):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n",
    '    def close(self):\n        """',
    "def main():\n    parser = argparse.ArgumentParser(",
    "    for name, value in ",
    "class TestCase(unittest.TestCase):\n    def test_",
    "    if not isinstance(",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeFlags(BenchFlags):
    batch: tuple[int, ...] = (1, 8)  # numbers of rows
    prompt: int = 64  # tokens of every prompt that is random
    tokens: int = 64  # timed tokens of every row
    checkpoint: str | None = None  # trained parameters of this very model
    draft: Literal["mtp"] | None = None  # measure drafting beside plain decoding, in turn

    def __post_init__(self):
        super().__post_init__()
        if min(self.batch, default=0) < 1 or self.prompt < 1 or self.tokens < 1:
            raise UserError("--batch, --prompt and --tokens must be at least 1")


def main(argv: list[str]) -> None:
    config, flags = parse_argv(argv, DecodeFlags, ExperimentConfig)
    config.check_mesh(jax.device_count(), jax.process_count())
    if flags.draft:
        check_drafts(config.model, "the config")
    set_up_backend()
    report("decode", flags, list(measure(config, flags)))


def measure(config: ExperimentConfig, flags: DecodeFlags) -> Iterator[dict[str, Any]]:
    """A row per batch, and one for its drafts; the prompts and the tokens that they give are not timed."""
    mesh = config.mesh.build()
    with jax.set_mesh(mesh):
        pure = PureModel(config.model)
        arrays, beginnings = _trained(config, flags, pure) if flags.checkpoint else (None, None)
        arrays = jax.jit(pure.init)(jax.random.key(config.seed)) if arrays is None else arrays
        generators: dict[str | None, Generator] = {None: Generator(pure, arrays)}
        if flags.draft:
            generators[flags.draft] = Generator(pure, arrays, drafts=True)
        for batch in flags.batch:
            shape = (batch, flags.prompt)
            prompts = np.random.default_rng(batch).integers(0, config.model.vocab_size, shape).tolist()
            if beginnings:
                prompts = [beginnings[i % len(beginnings)] for i in range(batch)]
            yield from _compared(generators, prompts, flags)


def _trained(config: ExperimentConfig, flags: DecodeFlags, pure: PureModel) -> tuple[Tree, list[list[int]]]:
    assert flags.checkpoint is not None
    source = find_model(flags.checkpoint)
    if source.config != config.model:
        raise UserError(f"--checkpoint={flags.checkpoint} is of another model than --config says")
    if (tokenizer := source.tokenizer()) is None:
        raise UserError(f"--checkpoint={flags.checkpoint}: holds no tokenizer.json")
    bos = source.begins_with_bos(tokenizer)
    mesh = jax.sharding.get_mesh()
    return source.load_arrays(pure, mesh), tokenizer.encode_batch(BEGINNINGS, bos)


def _compared(
    generators: dict[str | None, Generator], prompts: list[list[int]], flags: DecodeFlags
) -> Iterator[dict[str, Any]]:
    times: dict[str | None, list[tuple[float, float]]] = {}
    for turn in range(flags.repeats + 1):  # the first one compiles
        for draft, generator in generators.items():
            if turn == 1:
                generator.acceptance.clear()
            measured = _once(generator, prompts, flags.tokens)
            times.setdefault(draft, []).extend([measured] * (turn > 0))
    tokens = len(prompts) * flags.tokens
    for draft, measured in times.items():
        row = {
            "batch": len(prompts),
            "draft": draft,
            "tokens_per_second": tokens / statistics.median(wall for wall, _ in measured),
            "best_tokens_per_second": tokens / min(wall for wall, _ in measured),
            "cpu_ms_per_token": 1000 * min(cpu for _, cpu in measured) / tokens,
        }
        if draft:
            pairs = zip(times[None], measured, strict=True)
            row["speedup"] = statistics.median(plain / drafting for (plain, _), (drafting, _) in pairs)
            row["acceptance"] = generators[draft].acceptance.shares
        yield row


def _once(generator: Generator, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all threads."""
    stream = generator.stream(prompts, max_new_tokens=tokens + 1, sampling=Sampling(), seeds=[0] * len(prompts))
    for _ in prompts:
        next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in stream:
        pass
    return time.perf_counter() - wall, time.process_time() - cpu
