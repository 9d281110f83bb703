"""The lightning indexer against its equations in float64 NumPy, written here: choices, losses and gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Way, ways

from kernels_pallas import Mask, Unsupported
from kernels_pallas.lightning_indexer import dense_kl, gathers, recall, select_keys, selected_kl, tiles, topk

WAYS = ways("xla", "reference")
XLA = Way(implementation="xla", where="cpu")
SCALE = 0.4


@pytest.fixture
def tiled(monkeypatch):
    """Several blocks of queries and chunks of keys, of sizes that divide nothing."""
    monkeypatch.setattr(tiles, "BLOCK", 8)
    monkeypatch.setattr(tiles, "CPU_BLOCK", 8)
    monkeypatch.setattr(tiles, "LEAST_CHUNK", 8)
    monkeypatch.setattr(tiles, "CPU_TILE", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Operands are small integers and quarters, so that scores are exact, and many of them equal."""

    name: str
    lengths: tuple[int, int] = (37, 37)  # T, S
    heads: int = 3
    key_heads: int = 2  # of the attention, whose query heads are 4
    topk: int = 5
    sign: int = 0  # of all weights; 0 for either
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    offset: int | None = None
    packed: bool = False  # documents, and padding at the end
    cached: bool = False  # rows end at different slots of their keys
    half: bool = False  # a selection that hides half of the keys

    def __str__(self) -> str:
        return self.name

    def operands(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(0)
        (T, S), B, I, J = self.lengths, 2, self.heads, 4
        w = rng.integers(-4, 5, (B, T, I)) / 4
        w = w if self.sign == 0 else self.sign * np.abs(w)
        return rng.integers(-2, 3, (B, T, I, J)) * 1.0, w, rng.integers(-2, 3, (B, S, J)) * 1.0

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        T, S = self.lengths
        found = {}
        if self.packed:
            ids = np.sort(rng.integers(1, 5, (2, max(T, S))), axis=1)
            ids[:, -3:] = 0
            found |= {"q_segment_ids_BT": ids[:, :T], "kv_segment_ids_BS": ids[:, :S]}
        if self.cached:
            ends = np.array([T + 1, S - 1])
            found |= {
                "q_positions_BT": ends[:, None] - np.arange(T)[::-1],
                "kv_positions_BS": np.broadcast_to(np.arange(S), (2, S)),
            }
        if self.half:
            found["selected_BTS"] = rng.random((2, T, S)) < 0.5
        return found

    def mask(self) -> Mask:
        arrays = {name: jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for name, a in self.arrays().items()}
        return Mask(causal=self.causal, window=self.window, q_offset=self.offset, **arrays)

    def visible(self) -> np.ndarray:
        arrays, (T, S) = self.arrays(), self.lengths
        seen = np.zeros((2, T, S), bool)
        left = self.window[0] if self.window else None
        for b, t, s in np.ndindex(seen.shape):
            q, k = t + (self.offset or 0), s
            if self.cached:
                q, k = arrays["q_positions_BT"][b, t], arrays["kv_positions_BS"][b, s]
            sees = not (self.causal and k > q) and (left is None or k >= q - left)
            if self.packed:
                mine, its = arrays["q_segment_ids_BT"][b, t], arrays["kv_segment_ids_BS"][b, s]
                sees &= mine == its and mine != 0
            if self.half:
                sees &= bool(arrays["selected_BTS"][b, t, s])
            seen[b, t, s] = sees
        return seen


CASES = {
    case.name: case
    for case in (
        Case(name="causal", key_heads=1),
        Case(name="one head, so that half of the scores are zero", heads=1),
        Case(name="weights below zero, so that zeros are best", sign=-1),
        Case(name="one key", topk=1, sign=1),
        Case(name="all keys", topk=37, window=(30, None)),
        Case(name="candidates first", lengths=(20, 161), offset=141, topk=7),
        Case(name="packed documents", packed=True, window=(9, None)),
        Case(name="a cache", lengths=(3, 90), cached=True, topk=6),
        Case(name="one query", lengths=(1, 70), offset=69, topk=8),
        Case(name="a selection", causal=False, half=True),
    )
}
FEW = [CASES["causal"], CASES["packed documents"]]
LOSSES = [*FEW, CASES["all keys"], CASES["a cache"]]


def scores(q: np.ndarray, w: np.ndarray, k: np.ndarray) -> np.ndarray:
    logits = np.einsum("btij,bsj->btis", q, k)
    return np.einsum("bti,btis->bts", w, np.maximum(logits, 0))


def chosen_keys(score: np.ndarray, visible: np.ndarray, number: int) -> np.ndarray:
    """By definition: sort by score, then by place."""
    B, T, S = score.shape
    index = np.full((B, T, number), S)
    for b, t in np.ndindex(B, T):
        keys = [s for s in range(S) if visible[b, t, s] and score[b, t, s] > -np.inf]
        best = sorted(sorted(keys, key=lambda s: (-score[b, t, s], s))[:number])
        index[b, t, : len(best)] = best
    return index


# ---- selection


def check_selection(case: Case, way: Way) -> None:
    operands = case.operands()
    index = way.run(
        lambda q, w, k, **how: select_keys(q, w, k, mask=case.mask(), topk=case.topk, **how),
        *(jnp.asarray(a, jnp.float32) for a in operands),
    )
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, chosen_keys(scores(*operands), case.visible(), case.topk))


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_selects_the_best_visible_keys(case, tiled):
    check_selection(case, XLA)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_selects_in_one_tile(case, way):
    check_selection(case, way)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bfloat16_scores_are_summed_in_float32(way):
    """Sums of 64 products of eighths, by weights of up to 8 bits, need more bits than bfloat16 has, and float32 has them."""
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-16, 17, shape) / 8 for shape in ((1, 9, 4, 64), (1, 50, 64)))
    w = rng.integers(-127, 128, (1, 9, 4)) / 128
    index = way.run(
        lambda q, w, k, **how: select_keys(q, w, k, mask=Mask(), topk=11, **how),
        *(jnp.asarray(a, dtype) for a, dtype in ((q, jnp.bfloat16), (w, jnp.float32), (k, jnp.bfloat16))),
    )
    np.testing.assert_array_equal(index, chosen_keys(scores(q, w, k), np.ones((1, 9, 50), bool), 11))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_score_of_minus_infinity_is_never_selected(way):
    q, k = jnp.ones((1, 1, 2, 1)), jnp.asarray([1.0, 2.0, 3.0, 4.0])[None, :, None]
    q = q.at[0, 0, 1].set(-1.0)
    w = jnp.asarray([[[-3e38, 0.0]]])  # times 1 it is finite, beyond it overflows
    index = way.run(lambda q, w, k, **how: select_keys(q, w, k, mask=Mask(), topk=3, **how), q, w, k)
    np.testing.assert_array_equal(index, [[[0, 4, 4]]])


def test_hidden_keys_may_hold_anything():
    """A cache's slots behind a row's length."""
    q, w, k = (jnp.asarray(a, jnp.float32) for a in CASES["causal"].operands())
    mask = Mask(causal=True, q_offset=20)
    want = select_keys(q[:, :5], w[:, :5], k, mask=mask, topk=4)
    got = select_keys(q[:, :5], w[:, :5], k.at[:, 25:].set(jnp.nan), mask=mask, topk=4)
    np.testing.assert_array_equal(got, want)


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "many ties": lambda rng, shape: np.round(rng.normal(size=shape)),
    "few finite": lambda rng, shape: np.where(rng.random(shape) < 0.7, -np.inf, np.round(2 * rng.normal(size=shape))),
    "zeros of either sign": lambda rng, shape: np.where(rng.random(shape) < 0.6, rng.choice([0.0, -0.0], shape), -1.0),
    "one value": lambda rng, shape: np.full(shape, 1.5),
    "all magnitudes": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, shape),
    "infinities": lambda rng, shape: rng.choice([np.inf, 1.0, -np.inf], shape),
}


@pytest.mark.parametrize("number", [1, 40, 160])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_largest_is_exact(where, number, monkeypatch):
    monkeypatch.setattr(topk, "platform", lambda: where)  # elsewhere than on CPU passes count at several bounds

    @jax.jit
    def run(score):
        key_RS = topk.sortable(score)
        return topk.largest(key_RS, number, lambda absorb, state: absorb(key_RS, state))

    for kind, draw_scores in KINDS.items():
        score = draw_scores(np.random.default_rng(0), (12, 640)).astype(np.float32)
        want = chosen_keys(score[None], np.ones((1, *score.shape), bool), number)[0]
        np.testing.assert_array_equal(run(score), want, err_msg=kind)


@pytest.mark.parametrize(("where", "most"), [("cpu", 16), ("gpu", 6)])
def test_passes_over_the_keys(where, most, monkeypatch):
    """Of scores that are not tied: the first, those that settle for a quarter of candidates too many, and two that mark them."""
    monkeypatch.setattr(topk, "platform", lambda: where)
    score = np.random.default_rng(0).standard_normal((16, 4096)).astype(np.float32)
    key_RS, passes = topk.sortable(jnp.asarray(score)), []

    def over_pieces(absorb, state):
        jax.debug.callback(lambda: passes.append(1))
        return absorb(key_RS, state)

    low_R, reach_R = jax.jit(lambda like: topk._threshold(256, 320, over_pieces, like))(key_RS[:, 0])
    jax.effects_barrier()
    assert ((reach_R >= 256) & (reach_R <= 320)).all() and ((key_RS >= low_R[:, None]).sum(1) == reach_R).all()
    assert len(passes) <= most


# ---- losses


def draw(case: Case, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Real numbers in bfloat16 of an indexer and of an attention, and weights of the losses."""
    rng = np.random.default_rng(3)
    (T, S), B, I = case.lengths, 2, case.heads
    shapes = {
        "q": (B, T, I, 8),
        "w": (B, T, I),
        "k": (B, S, 8),
        "main_q": (B, T, 4, 6),
        "main_k": (B, S, case.key_heads, 6),
        "dkl": (B, T),
    }
    return {n: rng.standard_normal(s).astype(jnp.bfloat16).astype(dtype) for n, s in shapes.items()}


def truth(case: Case, within: np.ndarray) -> dict[str, np.ndarray]:
    """Losses over the keys `within`, each query by itself, gradients by the chain rule, and the logsumexp of each head."""
    a = draw(case)
    B, T = a["dkl"].shape
    found = {"kl": np.zeros((B, T)), "uniform": np.zeros((B, T)), "lse": np.full((B, T, 4), -np.inf)}
    found |= {name: np.zeros_like(a[name]) for name in ("q", "w", "k")}
    for b, t in np.ndindex(B, T):
        keys = np.flatnonzero(within[b, t])
        if not len(keys):
            continue
        logits = SCALE * np.stack(
            [a["main_k"][b, keys, n * case.key_heads // 4] @ a["main_q"][b, t, n] for n in range(4)]
        )
        found["lse"][b, t] = np.log(np.exp(logits).sum(1))
        p = np.exp(logits - found["lse"][b, t][:, None]).mean(0)
        heads = a["k"][b, keys] @ a["q"][b, t].T  # [keys, I]
        score = np.maximum(heads, 0) @ a["w"][b, t]
        softmax = np.exp(score) / np.exp(score).sum()
        found["kl"][b, t] = np.sum(p * np.log(p / softmax))
        found["uniform"][b, t] = np.sum(p * np.log(p * len(keys)))
        dscore = a["dkl"][b, t] * (softmax - p)
        dheads = dscore[:, None] * a["w"][b, t] * (heads > 0)
        found["q"][b, t] = dheads.T @ a["k"][b, keys]
        found["w"][b, t] = np.maximum(heads, 0).T @ dscore
        found["k"][b, keys] += dheads @ a["q"][b, t]
    return found


def check(case: Case, within: np.ndarray, loss: Any, way: Way, dtype: Any, tolerance: float) -> None:
    """`loss` of (indexer's q, w, k, attention's q, k, lse) and its gradients; the attention must get none."""
    want, a = truth(case, within), draw(case)
    operands = [jnp.asarray(a[name], jnp.float32 if name == "w" else dtype) for name in ("q", "w", "k")]
    main = [jnp.asarray(a["main_q"], dtype), jnp.asarray(a["main_k"], dtype), jnp.asarray(want["lse"], jnp.float32)]

    def run(*args, **how):
        (kl, uniform), vjp = jax.vjp(lambda *args: tuple(loss(*args, **how)), *args)
        return kl, uniform, *vjp((jnp.asarray(a["dkl"], kl.dtype), jnp.ones_like(uniform)))

    kl, uniform, *gradients = way.run(run, *operands, *main)
    assert kl.dtype == uniform.dtype == jnp.float32
    assert [g.dtype for g in gradients[:3]] == [o.dtype for o in operands]
    got = dict(zip(("kl", "uniform", "q", "w", "k"), (kl, uniform, *gradients[:3]), strict=True))
    for name, value in got.items():
        largest = max(1, np.abs(want[name]).max())
        np.testing.assert_allclose(
            np.asarray(value, np.float64), want[name], rtol=0, atol=tolerance * largest, err_msg=name
        )
    for none in gradients[3:]:
        np.testing.assert_array_equal(np.asarray(none, np.float32), 0)


def check_dense(case: Case, way: Way) -> None:
    """float32 sums of some hundred products are right to some ten ULPs of the largest: 1e-5 of it is over a hundred."""
    mask = case.mask()
    check(
        case,
        case.visible(),
        lambda *args, **how: dense_kl(*args, scale=SCALE, mask=mask, **how),
        way,
        jnp.float32,
        1e-5,
    )


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_dense_kl(case, tiled):
    check_dense(case, XLA)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_dense_kl_in_one_tile(way):
    check_dense(CASES["packed documents"], way)


def selection(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Some visible keys of each query, and the same as bool [B, T, S]; keys of real scores, in an order of their own."""
    a = draw(case)
    index = chosen_keys(scores(a["q"], a["w"], a["k"]), case.visible(), case.topk)
    within = np.zeros((*index.shape[:2], case.lengths[1] + 1), bool)
    np.put_along_axis(within, index, True, axis=2)
    return np.random.default_rng(5).permuted(index, axis=2), within[..., :-1]


def check_selected(case: Case, way: Way) -> None:
    """The tolerance is that of dense_kl; what is kept in the indexer's dtype is float32 here."""
    index, within = selection(case)

    def loss(*args, **how):
        return selected_kl(*args, jnp.asarray(index, jnp.int32), scale=SCALE, **how)

    check(case, within, loss, way, jnp.float32, 1e-5)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_selected_kl(case, monkeypatch):
    monkeypatch.setattr(gathers, "CPU_GATHERED", 3 * case.topk * (8 + 2 * 6))  # three queries at a time
    check_selected(case, XLA)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_selected_kl_in_one_chunk(way):
    check_selected(CASES["packed documents"], way)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "selected"])
def test_losses_of_bfloat16_operands(dense):
    """Sums are float32, so losses are right to float32; gradients are of products of rounded factors, twice 2^-8 at most."""
    case = CASES["causal"]
    index, within = selection(case)

    def loss(*args, **how):
        if dense:
            return dense_kl(*args, scale=SCALE, mask=case.mask(), **how)
        return selected_kl(*args, jnp.asarray(index, jnp.int32), scale=SCALE, **how)

    check(case, case.visible() if dense else within, loss, XLA, jnp.bfloat16, 2**-7)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_recall(case, way):
    a, dense = draw(case), truth(case, case.visible())
    index, within = selection(case)
    logits = SCALE * np.einsum("btnk,bsnk->btns", a["main_q"], np.repeat(a["main_k"], 4 // case.key_heads, axis=2))
    with np.errstate(invalid="ignore"):
        p = np.where(within[:, :, None], np.exp(logits - dense["lse"][..., None]), 0)
    got = way.run(
        lambda *args, **how: recall(*args, jnp.asarray(index, jnp.int32), scale=SCALE, **how),
        *(jnp.asarray(x, jnp.float32) for x in (a["main_q"], a["main_k"], dense["lse"])),
    )
    np.testing.assert_allclose(got, p.mean(2).sum(-1), atol=1e-5)


def test_a_perfect_indexer_loses_nothing():
    """One head of weight 1 whose scores are the attention's logits, all above zero; terms of up to 6 cancel, 2^-21 each."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.random(s), jnp.float32) for s in ((1, 30, 1, 8), (1, 30, 8)))
    mask = Mask(causal=True)
    lse = jax.nn.logsumexp(jnp.where(mask.array(1, 30, 30), jnp.einsum("btnk,bsk->bts", q, k), -jnp.inf), axis=-1)
    kl = dense_kl(q, jnp.ones((1, 30, 1)), k, q, k[:, :, None], lse[..., None], scale=1.0, mask=mask)
    np.testing.assert_allclose(kl.kl_BT, 0, atol=1e-5)
    assert float(kl.uniform_BT[0, 5:].min()) > 1e-3


# ---- what does not fit

Q, W, K = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 3)), jnp.ones((1, 5, 2))
MAIN = (jnp.ones((1, 4, 6, 7)), jnp.ones((1, 5, 2, 7)), jnp.ones((1, 4, 6)))
INDEX = jnp.zeros((1, 4, 2), jnp.int32)
ALL = Mask()
REFUSED = {
    "ranks": (lambda: select_keys(Q[0], W, K, mask=ALL, topk=1), "shapes do not fit"),
    "weights": (lambda: select_keys(Q, W[..., :1], K, mask=ALL, topk=1), r"w \[1, 4, 1\]"),
    "widths": (lambda: select_keys(Q, W, K[..., :1], mask=ALL, topk=1), r"k \[1, 5, 1\]"),
    "rows": (lambda: select_keys(Q, W, jnp.ones((2, 5, 2)), mask=ALL, topk=1), "shapes do not fit"),
    "no keys": (lambda: select_keys(Q, W, K[:, :0], mask=ALL, topk=1), "empty dim"),
    "dtypes": (lambda: select_keys(Q, W, K.astype(jnp.bfloat16), mask=ALL, topk=1), "one floating dtype"),
    "integers": (lambda: select_keys(Q, W.astype(int), K, mask=ALL, topk=1), "floating w"),
    "too many": (lambda: select_keys(Q, W, K, mask=ALL, topk=6), "topk=6 must be at least 1 and at most .* 5"),
    "none": (lambda: select_keys(Q, W, K, mask=ALL, topk=0), "topk=0"),
    "mask": (lambda: select_keys(Q, W, K, mask=Mask(causal=True), topk=1), "give q_offset"),
    "implementation": (lambda: select_keys(Q, W, K, mask=ALL, topk=1, implementation="cuda"), "it has xla"),  # pyright: ignore
    "mask of the loss": (lambda: dense_kl(Q, W, K, *MAIN, scale=1.0, mask=Mask(causal=True)), "give q_offset"),
    "lse": (lambda: dense_kl(Q, W, K, *MAIN[:2], MAIN[2][..., :1], scale=1.0, mask=ALL), r"lse \[1, 4, 1\]"),
    "keys of the attention": (lambda: dense_kl(Q, W, K[:, :4], *MAIN, scale=1.0, mask=ALL), r"need .*\[1, 4, Z, K\]"),
    "heads": (
        lambda: dense_kl(Q, W, K, MAIN[0][:, :, :3], MAIN[1], MAIN[2][..., :3], scale=1.0, mask=ALL),
        "3 query heads are not a multiple of 2",
    ),
    "scale": (lambda: selected_kl(Q, W, K, *MAIN, INDEX, scale=float("inf")), "scale=inf"),
    "index rank": (lambda: selected_kl(Q, W, K, *MAIN, INDEX[0], scale=1.0), r"index must be \[1, 4, W\]"),
    "index rows": (lambda: recall(*MAIN, INDEX[:, :3], scale=1.0), r"got \[1, 3, 2\]"),
    "index of floats": (lambda: selected_kl(Q, W, K, *MAIN, INDEX * 1.0, scale=1.0), "signed integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert isinstance(caught.value, Unsupported) == (name == "implementation")
