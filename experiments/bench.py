"""Measures one thing and prints JSON.

    python -m experiments.bench step --config=configs/tiny.py      tokens/s, MFU, compile time, peak memory of the train step
    python -m experiments.bench depth --config=configs/tiny.py     compile time of the train step by number of layers
    python -m experiments.bench experts                            expert products as a share of the dense matrix-product rate
    python -m experiments.bench grouped_gemm                       grouped products and their gradients, bfloat16 and FP8
    python -m experiments.bench moe                                a mixture-of-experts layer; with --config= its train step too
    python -m experiments.bench flash_attention                    attention, forward and backward, beside what JAX has
    python -m experiments.bench decode --config=configs/tiny.py    tokens/s of greedy decoding
    python -m experiments.bench mla_decode                         decoding attention over latents, beside plain products
    python -m experiments.bench select_keys                        the choice of keys by the lightning indexer, and its parts
    python -m experiments.bench sparse_attention                   attention over selected keys, forward and backward
    python -m experiments.bench dsa                                sparse attention beside dense by length, and its decoding
    python -m experiments.bench fp8                                quantize and dequantize as a share of copy bandwidth
    python -m experiments.bench memory --config=... --workdir=...  resident memory and open files of a run, step by step
    python -m experiments.bench aot                                what compilers say of kernels, for chips that are not here

`--out=FILE.json` keeps the result with date, commit and versions; those that time take `--repeats`. Only `memory` reads data.
"""

from experiments.benches import (
    aot,
    decode,
    depth,
    dsa,
    experts,
    flash_attention,
    fp8,
    grouped_gemm,
    memory,
    mla_decode,
    moe,
    select_keys,
    sparse_attention,
    step,
)
from experiments.cli import did_you_mean, run_main
from experiments.errors import UserError

BENCHES = {
    "step": step.main,
    "depth": depth.main,
    "experts": experts.main,
    "grouped_gemm": grouped_gemm.main,
    "moe": moe.main,
    "flash_attention": flash_attention.main,
    "decode": decode.main,
    "mla_decode": mla_decode.main,
    "select_keys": select_keys.main,
    "sparse_attention": sparse_attention.main,
    "dsa": dsa.main,
    "fp8": fp8.main,
    "memory": memory.main,
    "aot": aot.main,
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return
    name, *rest = argv
    if name not in BENCHES:
        raise UserError(f"no bench {name!r}{did_you_mean(name, BENCHES)}; there are {', '.join(BENCHES)}")
    BENCHES[name](rest)


if __name__ == "__main__":
    run_main(main)
