"""Production shapes (DeepSeek-V2-Lite and V3) for tests, compile checks and benches."""

# name: [M, N] as on disk (output, input); 576 is four and a half blocks
WEIGHTS: dict[str, tuple[int, int]] = {
    "v3 q_a_proj": (1536, 7168),
    "v3 q_b_proj": (24576, 1536),
    "v3 kv_a_proj": (576, 7168),
    "v3 kv_b_proj": (32768, 512),
    "v3 o_proj": (7168, 16384),
    "v3 dense gate_proj": (18432, 7168),
    "v3 expert gate_proj": (2048, 7168),
    "v3 expert down_proj": (7168, 2048),
    "v2-lite q_proj": (3072, 2048),
    "v2-lite kv_a_proj": (576, 2048),
    "v2-lite expert gate_proj": (1408, 2048),
    "v2-lite expert down_proj": (2048, 1408),
    "v2-lite dense gate_proj": (10944, 2048),
}

# name: [tokens, N]
ACTIVATIONS: dict[str, tuple[int, int]] = {
    "v3 hidden, prefill": (4096, 7168),
    "v3 hidden, decode": (128, 7168),
    "v3 expert hidden, prefill": (4096, 2048),
    "v3 attention output, prefill": (4096, 16384),
    "v3 dense hidden, prefill": (4096, 18432),
    "v2-lite hidden, prefill": (4096, 2048),
    "v2-lite hidden, decode": (128, 2048),
    "v2-lite dense hidden, prefill": (4096, 10944),  # 85.5 tiles
}
