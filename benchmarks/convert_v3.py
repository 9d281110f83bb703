"""Converts a synthetic FP8 checkpoint with the tensors of DeepSeek-V3, few layers of them, and compares with `dd` on the same disk.

python benchmarks/convert_v3.py --directory=DIR        (needs 30 GB there, deletes what it made)

Before every measurement the pages of the source are dropped from the page cache; what is written stays there, as far as it fits,
until `convert` has read it back. Random bytes: nothing on the way can compress or skip them.
"""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from experiments.cli import parse_flags
from experiments.conversion.naming import name_tensors
from experiments.conversion.recast import is_quantized
from mdl import hf
from mdl.hf import fp8
from mdl.hf.safetensors_write import ShardWriter, plan_shards, write_index

BYTES_OF_V3 = 688.6e9  # of the published files of DeepSeek-V3, MTP included
CONFIG = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 0, "first_k_dense_replace": 0, "quantization_config": fp8.quantization_config(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    directory: str  # where the checkpoints are made
    layers: int = 1  # all of them mixtures of experts
    experts: int = 160  # of 256
    keep: bool = False  # leave the source there, and use it if it is there


def make(directory: pathlib.Path, flags: Flags) -> None:
    """Writes the source."""
    config = CONFIG | {"num_hidden_layers": flags.layers, "n_routed_experts": flags.experts}
    sizes = {}
    for t in name_tensors(hf.model_config(config), hf.family(config).TABLE).tensors:
        shape = t.layout.shape_on_disk(t.array_shape[len(t.index) :])
        dtype = np.dtype(np.float32 if t.is_buffer else ml_dtypes.bfloat16)
        if is_quantized(t.tensor, shape):
            dtype = fp8.DTYPE
            sizes[fp8.scale_name(t.tensor)] = np.dtype(np.float32), fp8.scale_shape(shape)
        sizes[t.tensor] = dtype, shape
    directory.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(
        0, 120, 256 << 20, np.uint8
    )  # neither NaN nor infinite in any of the dtypes
    shards = plan_shards(sizes)
    for shard in shards:
        with ShardWriter(directory, shard) as writer:
            for name, (dtype, shape) in shard.entries.items():
                rows = max(1, noise.nbytes // max(1, int(np.prod(shape[1:])) * dtype.itemsize))
                for begin in range(0, shape[0], rows):
                    part = (min(rows, shape[0] - begin), *shape[1:])
                    count = int(np.prod(part)) * dtype.itemsize
                    writer.write(name, noise[:count].view(dtype).reshape(part), slice(begin, begin + part[0]))
    write_index(directory, shards)
    (directory / "config.json").write_text(json.dumps(config))


def drop(directory: pathlib.Path) -> None:
    """Takes the files out of the page cache."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(source: pathlib.Path, to: pathlib.Path, more: int) -> float:
    """Seconds in which dd copies the files of `source`, and writes `more` bytes beside that."""
    to.mkdir()
    drop(source)
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        command = ["dd", f"if={file}", f"of={to / file.name}", "bs=16M", "conv=fsync", "status=none"]
        subprocess.run(command, check=True)
    if more:
        command = ["dd", "if=/dev/zero", f"of={to / 'more'}", "bs=16M", f"count={more >> 24}", "conv=fsync"]
        subprocess.run([*command, "status=none"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def convert(source: pathlib.Path, to: pathlib.Path, *flags: str) -> dict:
    drop(source)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "experiments.convert", f"--from={source}", f"--to={to}", *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(to)
    print(output, file=sys.stderr)
    cpu = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(output.splitlines()[-1]) | {"wall_seconds": seconds, "cpu_seconds": cpu}


def main(flags: Flags) -> None:
    root = pathlib.Path(flags.directory)
    source = root / "source"
    if not source.exists():
        make(source, flags)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for name, arguments in {"FP8 -> ours, kept": [], "FP8 -> BF16": ["--dtype=bf16"]}.items():
        more = size if arguments else 0  # BF16 takes twice the bytes, but for the embedding and the head
        before = dd(source, root / "dd", more)  # also brings the memory of a virtual machine back from its host
        result = convert(source, root / "to", *arguments)
        after = dd(source, root / "dd", more)
        moved = 2 * size + more
        share = (size + result["bytes"]) / result["wall_seconds"] / (2 * moved / (before + after))
        row = {
            "way": name,
            "bytes_read": size,
            "bytes_written": result["bytes"],
            "wall_seconds": round(result["wall_seconds"], 1),
            "dd_bytes_moved": moved,
            "dd_seconds": [round(before, 1), round(after, 1)],
            "share_of_dd": round(
                share, 2
            ),  # bytes read and written per second, start of Python and verification included
            "cpu_seconds": round(result["cpu_seconds"], 1),
            "peak_memory_bytes": result["peak_memory_bytes"],
            "minutes_for_671B_at_this_rate": round(BYTES_OF_V3 / size * result["wall_seconds"] / 60, 1),
        }
        print(json.dumps(row), flush=True)
    if not flags.keep:
        shutil.rmtree(source)


if __name__ == "__main__":
    main(parse_flags(sys.argv[1:], Flags))
