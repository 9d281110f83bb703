"""Sparse attention beside dense attention, one block of each, forward and backward, by length; and decoding at the longest.

    python -m experiments.bench dsa --plot=dsa.png
    python -m experiments.bench dsa --config=configs/deepseek_v32.py --compile_for=v5p

A block is an attention with its projections: DSA in its sparse stage, the indexer's loss included, and the dense attention inside
it, MLA by flash attention. Memory is the temporaries of the compiled program, by the compiler's count. Without a config the blocks
have V3.2's proportions. With `--compile_for` nothing is timed: the config's sparse block, at its train.seq_len, is compiled for
one chip that is not here.
"""

import dataclasses
import importlib.util
import itertools
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from experiments.backend import set_up_backend
from experiments.benches.dsa_block import Block, compile_for, decoded, trained
from experiments.benches.dsa_plot import plot
from experiments.benches.report import BenchFlags, interleaved_seconds, report
from experiments.cli import parse_argv, parse_flags
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.plot import HOW_TO_INSTALL
from kernels_pallas import aot
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.precision import Float, PrecisionConfig
from mdl.sharding import MeshConfig

# An eighth of V3.2's heads, of its indexer heads and roughly of its width, a quarter of its keys; head widths as they are, but the
# indexer's half as wide.
HIDDEN_SIZE = 1024
ATTENTION = DsaConfig(
    dense=MlaConfig(
        num_attention_heads=16,
        q_lora_rank=384,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    index_n_heads=8,
    index_head_dim=64,
    index_topk=512,
)
COLUMNS = "{tokens:>8} {dense:>14} {sparse:>15} {speed:>12} {dense_memory:>16} {sparse_memory:>17} {memory:>12}"
HEADER = COLUMNS.format(
    tokens="tokens",
    dense="dense us/token",
    sparse="sparse us/token",
    speed="dense/sparse",
    dense_memory="dense KiB/token",
    sparse_memory="sparse KiB/token",
    memory="dense/sparse",
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DsaFlags(BenchFlags):
    repeats: int = 3  # timed repetitions; the median counts
    tokens: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)  # lengths; decoding has a context of the longest
    max_tokens: int | None = None  # leave out longer ones
    decoded: int = 50  # timed tokens, each with the whole context behind it
    dtype: Float = "float32"  # of activations and parameters, where no config says it
    limit_seconds: float = 300  # no further repetition at a length begins after so long
    plot: str | None = None  # draws both curves into this file
    compile_for: str | None = None  # chip to compile the config's block for: v5e, v5p, v6e, tpu7x or h200

    def __post_init__(self):
        super().__post_init__()
        if min(self.tokens, default=0) < 1 or self.decoded < 1 or not self.limit_seconds > 0:
            raise UserError("--tokens, --decoded and --limit_seconds must be positive")
        if not self.lengths:
            raise UserError(f"--max_tokens={self.max_tokens} leaves no length of {', '.join(map(str, self.tokens))}")
        for name in ("out", "plot"):
            path = getattr(self, name)
            if path is not None and not pathlib.Path(path).parent.is_dir():
                raise UserError(f"--{name}={path}: no such directory")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError(f"--plot={self.plot}: {HOW_TO_INSTALL}")

    @property
    def lengths(self) -> list[int]:
        return sorted(length for length in self.tokens if self.max_tokens is None or length <= self.max_tokens)


def main(argv: list[str]) -> None:
    if not any(argument.partition("=")[0] == "--config" for argument in argv):
        flags = parse_flags(argv, DsaFlags)
        if flags.compile_for is not None:
            raise UserError("--compile_for takes the block of a config: give --config=configs/deepseek_v32.py")
        precision = PrecisionConfig(param=flags.dtype, compute=flags.dtype)
        block = Block(hidden_size=HIDDEN_SIZE, attention=ATTENTION, precision=precision)
    else:
        config, flags = parse_argv(argv, DsaFlags, ExperimentConfig)
        block = block_of(config)
        if flags.compile_for is not None:
            chip = chip_of(flags.compile_for)
            jax.config.update("jax_platforms", "cpu")  # the machine's own devices are not needed, and may be in use
            report("dsa", flags, compiled(block, config.train.seq_len, chip))
            return
    set_up_backend()
    results = measure(block, flags)
    report("dsa", flags, results)
    if flags.plot is not None:
        plot(results, pathlib.Path(flags.plot))
        print(flags.plot)


def block_of(config: ExperimentConfig) -> Block:
    model = config.model
    if not isinstance(model.attention, DsaConfig):
        raise UserError(f"model.attention is {type(model.attention).__name__}; sparse attention is DsaConfig")
    attention = dataclasses.replace(model.attention.of_layer(0), warmup=False)
    return Block(hidden_size=model.hidden_size, attention=attention, precision=model.precision)


def chip_of(name: str) -> aot.Chip:
    """UserError, before anything is compiled, for what is no chip or has no compiler here."""
    try:
        chip = aot.chip(name)
        _ = chip.device
    except (aot.Unavailable, ValueError) as error:
        raise UserError(f"--compile_for={name}: {error}") from error
    return chip


def compiled(block: Block, tokens: int, chip: aot.Chip) -> Row:
    memory, seconds = compile_for(block, tokens, chip)
    sizes = dataclasses.asdict(memory)
    said = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())
    print(f"{tokens} tokens through one block on one {chip.name}: {said}", file=sys.stderr)
    return {
        **dataclasses.asdict(block),
        "tokens": tokens,
        "chip": chip.name,
        "bytes": sizes,
        "seconds": round(seconds, 1),
    }


def measure(block: Block, flags: DsaFlags) -> Row:
    print(HEADER, file=sys.stderr)
    with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
        lengths = list(measure_lengths(block, flags))
        decode = measure_decoding(block, flags)
    found = break_even([(row["tokens"], row["dense_over_sparse_time"]) for row in lengths])
    print(
        f"break-even: {'none measured' if found is None else f'{found:.0f} tokens'}\n"
        f"decoding with {decode['context']} tokens in the cache: dense {decode['dense_ms']:.2f} ms, "
        f"sparse {decode['sparse_ms']:.2f} ms, dense/sparse {decode['dense_over_sparse_time']:.2f}",
        file=sys.stderr,
    )
    return {**dataclasses.asdict(block), "lengths": lengths, "break_even_tokens": found, "decode": decode}


def measure_lengths(block: Block, flags: DsaFlags) -> Iterator[Row]:
    """Both attentions in turns at each length."""
    for tokens in flags.lengths:
        programs = {"dense": trained(block.dense, tokens), "sparse": trained(block, tokens)}
        runs = {name: program.run for name, program in programs.items()}
        times = interleaved_seconds(runs, flags.repeats, warmups=1, limit=flags.limit_seconds)
        memory = {name: program.memory.temporaries for name, program in programs.items()}
        row: Row = {"tokens": tokens}
        for name in programs:
            row |= {f"{name}_us_per_token": 1e6 * times[name] / tokens, f"{name}_temporary_bytes": memory[name]}
        row["dense_over_sparse_time"] = times["dense"] / times["sparse"]
        row["dense_over_sparse_bytes"] = memory["dense"] / memory["sparse"]
        print(line(row), file=sys.stderr, flush=True)
        yield row


def measure_decoding(block: Block, flags: DsaFlags) -> Row:
    context = flags.lengths[-1]
    runs = {"dense": decoded(block.dense, context).run, "sparse": decoded(block, context).run}
    times = interleaved_seconds(runs, flags.decoded, warmups=3, limit=flags.limit_seconds)
    return {
        "context": context,
        **{f"{name}_ms": 1000 * seconds for name, seconds in times.items()},
        "dense_over_sparse_time": times["dense"] / times["sparse"],
    }


def line(row: Row) -> str:
    def kib(name: str) -> str:
        return f"{row[f'{name}_temporary_bytes'] / row['tokens'] / 1024:.1f}"

    return COLUMNS.format(
        tokens=row["tokens"],
        dense=f"{row['dense_us_per_token']:.0f}",
        sparse=f"{row['sparse_us_per_token']:.0f}",
        speed=f"{row['dense_over_sparse_time']:.2f}",
        dense_memory=kib("dense"),
        sparse_memory=kib("sparse"),
        memory=f"{row['dense_over_sparse_bytes']:.2f}",
    )


def break_even(ratios: list[tuple[int, float]]) -> float | None:
    """Where the ratio, known at rising lengths, passes 1 for good, on a straight line between logarithms; None if it does not."""
    for (shorter, below), (longer, above) in reversed(list(itertools.pairwise(ratios))):
        if below < 1 <= above:
            share = -math.log(below) / (math.log(above) - math.log(below))
            return shorter * (longer / shorter) ** share
    return None
