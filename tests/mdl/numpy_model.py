"""The models in float64 NumPy, written from the equations: one document at a time, one head, one token, one expert at a time.

Nothing is packed, padded, sharded, scanned or chunked here, and nothing is shared with the code under test but the configs and
the names of the parameters. Sources: DeepSeek-V3 report (arXiv 2412.19437) sections 2.1 and 2.2, DeepSeek-V2 (2405.04434)
section 2.1, DeepSeek-V3.2-Exp report section 2.1, YaRN (2309.00071), grouped-query attention (2305.13245), Llama 3.1's released
configuration.
"""

import functools
import math

import numpy as np

from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.rope import Llama3RopeConfig, YarnConfig


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g * sigmoid(g) * (x @ up)) @ down


# ---- rotary positions


@functools.cache
def frequency(rope, pair: int, dim: int) -> float:
    """Radians per position of one pair."""
    plain = rope.rope_theta ** (-2 * pair / dim)
    if isinstance(rope, YarnConfig):

        def pair_that_turns(times: float) -> float:
            # base^(-2 i / dim) * length = 2 pi * times, solved for i.
            return math.log(rope.original_max_position_embeddings / (2 * math.pi * times), rope.rope_theta) * dim / 2

        low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(rope.beta_slow)), dim - 1)
        if pair <= low:
            return plain
        if pair >= high:
            return plain / rope.factor
        slowed = (pair - low) / (high - low)
        return slowed * plain / rope.factor + (1 - slowed) * plain
    if isinstance(rope, Llama3RopeConfig):
        wavelength = 2 * math.pi / plain
        if wavelength < rope.original_max_position_embeddings / rope.high_freq_factor:
            return plain
        if wavelength > rope.original_max_position_embeddings / rope.low_freq_factor:
            return plain / rope.factor
        kept = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return (1 - kept) * plain / rope.factor + kept * plain
    return plain


def mscale(factor, m):
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1


def table_factor(rope) -> float:
    if not isinstance(rope, YarnConfig):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor, 1)


def turned(x, position: int, rope, *, interleaved: bool):
    """One head of one token, as complex numbers: the pairs turned by their angles."""
    R = len(x)
    pairs = x[0::2] + 1j * x[1::2] if interleaved else x[: R // 2] + 1j * x[R // 2 :]
    angles = np.array([position * frequency(rope, i, R) for i in range(R // 2)])
    return pairs * np.exp(1j * angles) * table_factor(rope)


def real(z):
    """Inner products of these are those of the rotated vectors, whatever order an implementation keeps the channels in."""
    return np.concatenate([z.real, z.imag])


# ---- attention over one document, x [T, D]


def attend(q, k, v, scale, keys=None):
    """One head: q [T, K], k [T, K], v [T, U]; position t sees keys[t], or 0 to t."""
    keys = [range(t + 1) for t in range(len(q))] if keys is None else keys
    return np.stack([softmax(q[t] @ k[keys[t]].T * scale) @ v[keys[t]] for t in range(len(q))])


def mla_heads(x, p, c: MlaConfig):
    """q, k and v of each head, and what their logits are multiplied by."""
    T, H = len(x), c.qk_nope_head_dim
    w = {name: value["weight"] for name, value in p.items()}
    q_input, q_up = (x, w["q_proj"]) if c.q_lora_rank is None else (None, w.get("q_b_proj"))
    if q_input is None:
        q_input = rms_norm(x @ w["q_a_proj"], w["q_a_norm"], 1e-6)
    compressed = x @ w["kv_a_proj"]
    latent = rms_norm(compressed[:, : c.kv_lora_rank], w["kv_a_norm"], 1e-6)

    def rotated(a):
        return np.stack([real(turned(a[t], t, c.rope, interleaved=c.rope_interleave)) for t in range(T)])

    shared_key = rotated(compressed[:, c.kv_lora_rank :])
    scale = 1 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
    if isinstance(c.rope, YarnConfig) and c.rope.mscale_all_dim:
        scale *= mscale(c.rope.factor, c.rope.mscale_all_dim) ** 2
    heads = []
    for head in range(c.num_attention_heads):
        q, kv = q_input @ q_up[:, head], latent @ w["kv_b_proj"][:, head]
        q = np.concatenate([q[:, :H], rotated(q[:, H:])], axis=1)
        k = np.concatenate([kv[:, :H], shared_key], axis=1)
        heads.append((q, k, kv[:, H:]))
    return heads, scale


def gqa_heads(x, p, c: GqaConfig, eps):
    """The same; heads of a group share k and v."""
    w = {name: value["weight"] for name, value in p.items()}

    def prepared(a, norm):
        if c.qk_norm:
            a = rms_norm(a, w[norm], eps)
        return np.stack([real(turned(a[t], t, c.rope, interleaved=False)) for t in range(len(a))])

    heads = []
    for head in range(c.num_attention_heads):
        group = head * c.num_key_value_heads // c.num_attention_heads
        q, k = prepared(x @ w["q_proj"][:, head], "q_norm"), prepared(x @ w["k_proj"][:, group], "k_norm")
        heads.append((q, k, x @ w["v_proj"][:, group]))
    return heads, c.head_dim**-0.5


def heads_of(x, p, c, eps):
    return mla_heads(x, p, c) if isinstance(c, MlaConfig) else gqa_heads(x, p, c, eps)


def dense(x, p, c, eps, keys=None):
    heads, scale = heads_of(x, p, c, eps)
    outputs = p["o_proj"]["weight"]
    return sum(attend(q, k, v, scale, keys) @ outputs[head] for head, (q, k, v) in enumerate(heads))


def in_e4m3(a):
    """One head of one token as it is in FP8, the nearest values times a power of two, ties to even (V3.2's inference code)."""
    scale = 2.0 ** np.ceil(np.log2(max(np.abs(a).max(), 1e-4) / 448))
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(a / scale), 2.0**-6))) - 3)
    return np.round(a / scale / step) * step * scale


def hadamard(a):
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(len(a))] for i in range(len(a))]
    return np.array(signs) @ a / math.sqrt(len(a))


def index_scores(x, p, c: DsaConfig, *, fp8: bool = False):
    """[T, T] of one document, the future included: one head and one pair of tokens at a time. Rotation alone changes nothing."""
    w = {name: p["indexer"][name]["weight"] for name in ("wq_b", "wk", "k_norm")}
    R = c.dense.rotary_dim

    def rotated(a, t):
        head = turned(a[:R], t, c.dense.rope, interleaved=c.indexer_rope_interleave)
        a = np.concatenate([real(head), a[R:]])
        if not fp8:
            return a
        return in_e4m3(hadamard(a) if c.index_hadamard else a)

    latent = x
    if isinstance(c.dense, MlaConfig):
        latent = rms_norm(x @ p["dense"]["q_a_proj"]["weight"], p["dense"]["q_a_norm"]["weight"], 1e-6)
    keys = []
    for t, token in enumerate(x):
        a = token @ w["wk"]
        a = (a - a.mean()) / np.sqrt(a.var() + 1e-6) * w["k_norm"] + p["indexer"]["k_norm"]["bias"]
        keys.append(rotated(a, t))
    scores = np.zeros((len(x), len(x)))
    for head in range(c.index_n_heads):
        importance = x @ p["indexer"]["weights_proj"][:, head] / math.sqrt(c.index_n_heads)
        for t in range(len(x)):
            q = rotated(latent[t] @ w["wq_b"][:, head], t)
            for s, key in enumerate(keys):
                scores[t, s] += importance[t] * max(q @ key / math.sqrt(c.index_head_dim), 0)
    return scores


def selected(scores, k) -> list[list[int]]:
    """The k highest of 0 to t for every t, the earlier one first among equals."""
    return [sorted(range(t + 1), key=lambda s, row=row: (-row[s], s))[:k] for t, row in enumerate(scores)]


def chosen(scores, c: DsaConfig) -> list[list[int]]:
    """The best keys of each token, and the latest, itself among them."""
    found = []
    for t, row in enumerate(scores):
        latest = list(range(max(t + 1 - c.index_window, 0), t + 1)) if c.index_window else []
        older = sorted(range(t + 1 - len(latest)), key=lambda s, row=row: (-row[s], s))
        found.append(sorted(older[: c.index_topk - c.index_window] + latest))
    return found


def keys_of(scores, c: DsaConfig):
    return selected(scores, len(scores)) if c.warmup else chosen(scores, c)


def dsa(x, p, c: DsaConfig, eps):
    return dense(x, p["dense"], c.dense, eps, keys_of(index_scores(x, p, c, fp8=c.index_fp8), c))


def indexer_terms(x, p, c: DsaConfig, eps):
    """Sums over the tokens of one document: KL of attention to the indexer (eqs. 3 and 4) and to uniform, and what share of the
    attention to all keys the selected ones hold."""
    heads, scale = heads_of(x, p["dense"], c.dense, eps)
    scores, by = index_scores(x, p, c), index_scores(x, p, c, fp8=c.index_fp8)
    kl = uniform = recall = 0.0
    for t, (keys, best) in enumerate(zip(keys_of(by, c), chosen(by, c), strict=True)):
        target = np.mean([softmax(scale * k[keys] @ q[t]) for q, k, _ in heads], axis=0)
        kl += np.sum(target * np.log(target / softmax(scores[t, keys])))
        uniform += np.sum(target * np.log(target * len(keys)))
        recall += np.mean([softmax(scale * k[: t + 1] @ q[t])[best].sum() for q, k, _ in heads])
    return kl, uniform, recall


def attention(x, p, c, eps):
    return dsa(x, p, c, eps) if isinstance(c, DsaConfig) else dense(x, p, c, eps)


# ---- mixture of experts


def affinities(logits, c):
    return sigmoid(logits) if c.scoring_func == "sigmoid" else softmax(logits)


def choose(scores, bias, c) -> list[int]:
    """The experts of one token (eqs. 14-16 and section 2.1.2 "node-limited routing"; for V2 its section 2.2.2)."""
    E, G = c.n_routed_experts, c.n_group
    choice = scores + bias
    allowed = list(range(E))
    if c.topk_method != "greedy" and G > 1:
        groups = [list(range(g * E // G, (g + 1) * E // G)) for g in range(G)]
        best = 2 if c.topk_method == "noaux_tc" else 1
        worth = [sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in groups]
        kept = sorted(range(G), key=lambda g: -worth[g])[: c.topk_group]
        allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: -choice[e])[: c.num_experts_per_tok]


def gates(scores, chosen, c):
    weights = np.array([scores[e] for e in chosen])
    if c.norm_topk_prob:
        weights = weights / weights.sum()
    return weights * c.routed_scaling_factor


def moe(x, p, bias, c):
    """y [T, D], the affinities [T, E] and the experts that each token chose."""
    r, experts = c.router, p["experts"]
    scores = np.stack([affinities(row, r) for row in x @ p["router"]["weight"]])
    chosen = [choose(s, bias, r) for s in scores]
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        for e, gate in zip(chosen[t], gates(scores[t], chosen[t], r), strict=True):
            y[t] += gate * swiglu(token, experts["gate_EDF"][e], experts["up_EDF"][e], experts["down_EFD"][e])
    if c.n_shared_experts:
        y += mlp(x, p["shared_experts"])
    return y, scores, chosen


def balance(scores, c) -> float:
    """Eqs. 17-20 without alpha over the tokens of one sequence, scores [T, E]."""
    T, E = scores.shape
    total = 0.0
    for i in range(E):
        among_best = sum(i in sorted(range(E), key=lambda e, s=s: -s[e])[: c.num_experts_per_tok] for s in scores)
        f = E / (c.num_experts_per_tok * T) * among_best
        P = sum(s[i] / s.sum() for s in scores) / T
        total += f * P
    return total


def mlp(x, p):
    return swiglu(x, *(p[name]["weight"] for name in ("gate_proj", "up_proj", "down_proj")))


# ---- the model on one document


class Reports(dict):
    """(layer) -> list of (scores, chosen) over the documents of a row."""

    def add(self, layer, scores, chosen):
        self.setdefault(layer, []).append((scores, chosen))


def block(x, p, bias, config, layer, reports):
    normed, c = rms_norm(x, p["attention_norm"]["weight"], config.rms_norm_eps), config.attention
    x = x + attention(normed, p["attention"], c, config.rms_norm_eps)
    normed = rms_norm(x, p["mlp_norm"]["weight"], config.rms_norm_eps)
    if "router" not in p["mlp"]:
        return x + mlp(normed, p["mlp"])
    y, scores, chosen = moe(normed, p["mlp"], bias, config.moe)
    reports.add(layer, scores, chosen)
    return x + y


def layer_of(tree, i):
    return {k: layer_of(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def bias_of(buffers, i=None):
    if not buffers:
        return 0.0
    bias = buffers["mlp"]["router"]["bias"]
    return bias if i is None else bias[i]


def hidden(tokens, params, buffers, config, reports):
    """[T, D] after the final norm."""
    x = params["embedding"][tokens]
    for i in range(config.num_prefix_layers):
        x = block(x, params["prefix"][str(i)], None, config, None, reports)
    for i in range(config.num_hidden_layers - config.num_prefix_layers):
        bias = bias_of(buffers.get("stack"), i)
        x = block(x, layer_of(params["stack"], i), bias, config, ("stack", i), reports)
    return rms_norm(x, params["final_norm"]["weight"], config.rms_norm_eps)


def mtp_hidden(k, h, tokens, params, buffers, config, reports):
    """Eqs. 21-22: positions 0 to T - 1 - k of a document of T tokens, from the hidden states of depth k - 1."""
    p, eps, count = params["mtp"][str(k - 1)], config.rms_norm_eps, len(tokens) - k
    embedded = rms_norm(params["embedding"][tokens[k:]], p["embedding_norm"]["weight"], eps)
    joined = np.concatenate([embedded, rms_norm(h[:count], p["hidden_norm"]["weight"], eps)], axis=1)
    bias = bias_of(buffers["mtp"][str(k - 1)]["block"]) if "mtp" in buffers else 0.0
    x = block(joined @ p["eh_proj"]["weight"], p["block"], bias, config, (f"mtp_{k - 1}", 0), reports)
    return rms_norm(x, p["norm"]["weight"], eps)


# ---- the loss of a batch


def documents(segment_ids):
    """(first, end) of each document of one row."""
    ids = [i for i in dict.fromkeys(segment_ids.tolist()) if i]
    return [
        (int(np.argmax(segment_ids == i)), int(np.argmax(segment_ids == i) + (segment_ids == i).sum())) for i in ids
    ]


def terms(config, tree, batch, *, mtp: float, balance_weight: float, z: float) -> dict:
    """loss, main, mtp (one of each depth), balance, z and loads of all rows [..., T + 1], whatever split they come in."""
    params, buffers = tree["params"], tree["buffers"]
    head = params["embedding"].T if config.tie_word_embeddings else params["head"]
    depth = config.mtp.num_nextn_predict_layers if config.mtp else 0
    T = batch["tokens"].shape[-1] - 1
    nll, lse_squared = [[] for _ in range(depth + 1)], []
    balances, loads, rows = 0.0, {}, 0

    def predict(h, targets, k):
        for state, target in zip(h, targets, strict=True):
            logits = state @ head
            lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            nll[k].append(lse - logits[target])
            if k == 0:
                lse_squared.append(lse**2)

    for row, ids in zip(batch["tokens"].reshape(-1, T + 1), batch["segment_ids"].reshape(-1, T + 1), strict=True):
        reports, rows = Reports(), rows + bool(ids.any())
        for first, end in documents(ids):
            tokens, inputs = row[first:end], row[first : min(end, T)]
            if not len(inputs):
                continue  # a document that begins with the row's last token is nothing but that token
            h = hidden(inputs, params, buffers, config, reports)
            predict(h[: len(tokens) - 1], tokens[1:], 0)
            for k in range(1, depth + 1):
                if len(tokens) <= k:
                    break
                h = mtp_hidden(k, h, tokens, params, buffers, config, reports)
                predict(h[: len(tokens) - 1 - k], tokens[k + 1 :], k)
        for (name, i), parts in reports.items():
            balances += balance(np.concatenate([scores for scores, _ in parts]), config.moe.router)
            count = loads.setdefault(name, {}).setdefault(i, np.zeros(config.moe.router.n_routed_experts))
            for e in (e for _, chosen in parts for token in chosen for e in token):
                count[e] += 1
    means = [np.mean(values) for values in nll]
    mean_balance, mean_z = balances / rows, np.mean(lse_squared)
    total = means[0] + z * mean_z + balance_weight * mean_balance + mtp * sum(means[1:]) / max(depth, 1)
    stacked = {name: np.stack([counts[i] for i in sorted(counts)]) for name, counts in loads.items()}
    return {
        "loss": total,
        "main": means[0],
        "mtp": means[1:],
        "balance": mean_balance,
        "z": mean_z,
        "loads": {name: value if name == "stack" else value[0] for name, value in stacked.items()},
    }
