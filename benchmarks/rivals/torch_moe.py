"""Rival: the mixture-of-experts layer of a DeepSeek-V3-shaped model in transformers / torch on the CPU, in tokens per second.

Needs an environment of its own, never the project's: `pip install torch==2.13.0 transformers`. Then, for example,

    python benchmarks/rivals/torch_moe.py --model 10m 60m --experts eager grouped_mm --out rival.json

One layer (router, routed and shared experts), float32, of the sizes that `python -m experiments.bench moe` has. Forward is
without gradients; forward and backward gives the gradients of the rows and of all parameters. Run it next to ours on a quiet
machine: `busy` is the share of the machine that other processes used meanwhile.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch
import transformers
from torch_train_step import MODELS, SHARED, repeat
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE


def make_passes(name: str, batch: int, length: int, experts: str, mode: str):
    """Functions that run one pass each, and the largest load of an expert as a multiple of the mean."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.DeepseekV3Config(**SHARED, **MODELS[name])
    config._experts_implementation = experts
    layer = DeepseekV3MoE(config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02)
    x = torch.randn(batch, length, config.hidden_size, requires_grad=True)
    dy = torch.randn_like(x)
    run = torch.compile(layer) if mode == "compile" else layer

    def forward():
        with torch.no_grad():
            run(x)

    def forward_and_backward():
        run(x).backward(dy)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    with torch.no_grad():
        load = torch.bincount(layer.gate(x)[2].flatten(), minlength=config.n_routed_experts)
    busiest = (load.max() / load.float().mean()).item()
    return {"forward": forward, "forward and backward": forward_and_backward}, busiest


def measure(name: str, shape: str, experts: str, mode: str, repetitions: int) -> list[dict]:
    batch, length = (int(n) for n in shape.split("x"))
    passes, busiest = make_passes(name, batch, length, experts, mode)
    rows = []
    for of, run in passes.items():
        run(), run()
        measured = repeat(run, repetitions)
        seconds = [s for s, _ in measured]
        rows.append(
            {
                "model": name,
                "shape": shape,
                "experts": experts,
                "mode": mode,
                "pass": of,
                "busiest_over_mean": busiest,
                "tokens_per_second": batch * length / statistics.median(seconds),
                "best_tokens_per_second": batch * length / min(seconds),
                "ms": 1000 * statistics.median(seconds),
                "busy": statistics.median(others for _, others in measured),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["10m", "60m"])
    parser.add_argument("--shape", default="8x256", help="batch x sequence length")
    parser.add_argument("--experts", nargs="+", choices=["eager", "grouped_mm"], default=["eager", "grouped_mm"])
    parser.add_argument("--mode", nargs="+", choices=["eager", "compile"], default=["eager"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes as well as to stdout")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    rows = [
        row
        for name in args.model
        for experts in args.experts
        for mode in args.mode
        for row in measure(name, args.shape, experts, mode, args.repetitions)
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}
    result = json.dumps({"versions": versions, "seconds": time.perf_counter() - began, "rows": rows}, indent=1)
    print(result)
    if args.out:
        args.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
