"""Rival: greedy decoding of a DeepSeek-V3-shaped model in transformers / torch on the CPU, in tokens per second.

Needs an environment of its own, as torch_train_step.py beside this. For example,

    python benchmarks/rivals/torch_decode.py --model 10m --batch 1 8 --out rival.json

and ours, `python -m experiments.bench decode --config=configs/tiny.py`, on the same machine in turns. The prompt and the token that
it gives are not timed. `cpu_ms_per_token` counts all threads, waiting in a spin included, and says more than wall time on a busy
machine, where two spinning threads wait for a core that another process has: `--threads 1` is the kinder comparison there.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch
import transformers
from torch_train_step import MODELS, QUIET, SHARED, machine_seconds


def measure(name: str, batch: int, prompt: int, tokens: int, repetitions: int) -> dict:
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**SHARED, **MODELS[name], attn_implementation="sdpa")
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    prompts = torch.randint(3, config.vocab_size, (batch, prompt))

    @torch.no_grad()
    def once() -> tuple[float, float, float]:
        """Wall seconds, own CPU seconds, and the share of the machine that others used."""
        out = model(input_ids=prompts, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        machine, cpu, wall = machine_seconds(), time.process_time(), time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        others = machine_seconds() - machine - cpu
        return wall, cpu, max(0.0, others) / (wall * (os.cpu_count() or 1))

    once()
    measured = [once() for _ in range(repetitions)]
    quiet = [wall for wall, _, others in measured if others <= QUIET]
    return {
        "model": name,
        "batch": batch,
        "tokens_per_second": batch * tokens / statistics.median(wall for wall, _, _ in measured),
        "best_tokens_per_second": batch * tokens / min(wall for wall, _, _ in measured),
        "quiet_tokens_per_second": batch * tokens / statistics.median(quiet) if quiet else None,
        "cpu_ms_per_token": 1000 * min(cpu for _, cpu, _ in measured) / (batch * tokens),
        "repetitions": len(measured),
        "quiet_repetitions": len(quiet),
        "busy": statistics.median(others for _, _, others in measured),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["10m"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes as well as to stdout")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    rows = [
        measure(name, batch, args.prompt, args.tokens, args.repetitions) for name in args.model for batch in args.batch
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}
    result = json.dumps({"versions": versions, "rows": rows}, indent=1)
    print(result)
    if args.out:
        args.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
