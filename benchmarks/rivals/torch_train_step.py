"""Rival: train steps of a DeepSeek-V3-shaped model in transformers / torch on the CPU, in tokens per second.

Needs an environment of its own, never the project's: `pip install torch==2.13.0 transformers`. Then, for example,

    python benchmarks/rivals/torch_train_step.py --model 10m --shape 8x256 4x1024 --mode eager compile --out rival.json

A step is forward, float32 mean cross-entropy, backward, clipping of the global norm at 1 and fused AdamW; weights and moments
float32, experts by `grouped_mm`. Run it next to ours on a quiet machine: `busy` is the share of the machine that other
processes used meanwhile, and a repetition with more than a twentieth of it is not counted in `tokens_per_s`.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch
import transformers

SHARED = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "10m": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 704,
        "moe_intermediate_size": 176,
    },
    "60m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 1408,
        "moe_intermediate_size": 256,
    },
}
QUIET = 0.05


def make_step(name: str, batch: int, length: int, mode: str):
    """Returns a function that makes one training step and waits for it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.DeepseekV3Config(**SHARED, **MODELS[name], attn_implementation="sdpa")
    model = transformers.DeepseekV3ForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if mode == "compile" else model
    tokens = torch.randint(3, config.vocab_size, (batch, length))
    targets = tokens[:, 1:].flatten()

    def step():
        logits = forward(input_ids=tokens, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def machine_seconds() -> float:
    """CPU seconds that all processes of this machine have used so far."""
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def repeat(step, count: int) -> list[tuple[float, float]]:
    """Wall seconds of each repetition, and the share of the machine that others used during it."""
    measured = []
    for _ in range(count):
        machine, own, start = machine_seconds(), time.process_time(), time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        others = machine_seconds() - machine - (time.process_time() - own)
        measured.append((seconds, max(0.0, others) / (seconds * (os.cpu_count() or 1))))
    return measured


def measure(name: str, shape: str, mode: str, repetitions: int) -> dict:
    batch, length = (int(n) for n in shape.split("x"))
    step = make_step(name, batch, length, mode)
    start = time.perf_counter()
    step()
    first_step_s = time.perf_counter() - start
    step()
    measured = repeat(step, repetitions)
    quiet = [seconds for seconds, others in measured if others <= QUIET]
    tokens = batch * length
    return {
        "model": name,
        "shape": shape,
        "mode": mode,
        "tokens_per_s": tokens / statistics.median(quiet) if quiet else None,
        "tokens_per_s_all": tokens / statistics.median(seconds for seconds, _ in measured),
        "tokens_per_s_best": tokens / min(seconds for seconds, _ in measured),
        "repetitions": len(measured),
        "quiet_repetitions": len(quiet),
        "busy": statistics.median(others for _, others in measured),
        "first_step_s": first_step_s,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["10m"])
    parser.add_argument("--shape", nargs="+", default=["8x256", "4x1024"], help="batch x sequence length")
    parser.add_argument("--mode", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON goes as well as to stdout")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    rows = [
        measure(name, shape, mode, args.repetitions)
        for name in args.model
        for shape in args.shape
        for mode in args.mode
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}
    result = json.dumps({"versions": versions, "rows": rows}, indent=1)
    print(result)
    if args.out:
        args.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
