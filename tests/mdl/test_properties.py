"""What must hold whatever the numbers are: causality, isolation of documents and padding, equal results of equal computations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from models import BATCH, FAST_COMPILE, V3, T, V, gradient_of, leaves, packed_batch, parameters, pure, result

from mdl.mtp import MtpConfig
from mdl.sharding import MeshConfig, spec
from mdl.transformer import LONG

ONE_MODULE = dataclasses.replace(V3, mtp=MtpConfig())
# Two float32 orders of the same sums, through a few layers: gradients relative to the largest entry of their array.
ROUNDING = 1e-5


def assert_same(got, want):
    (grads, terms), (want_grads, want_terms) = got, want
    for name in ("loss", "main", "mtp", "balance", "z"):
        np.testing.assert_allclose(getattr(terms, name), getattr(want_terms, name), rtol=ROUNDING, err_msg=name)
    for name, load in want_terms.loads.items():
        np.testing.assert_array_equal(terms.loads[name], load, err_msg=name)
    assert grads.keys() == want_grads.keys()
    for path, want_grad in want_grads.items():
        atol = ROUNDING * np.abs(want_grad).max()
        np.testing.assert_allclose(grads[path], want_grad, rtol=0, atol=atol, err_msg=path)


# ---- causality and isolation


def test_outputs_depend_on_earlier_tokens_of_their_document_only():
    """Every token of the row is another one, so that rows of the embedding's gradient are positions."""
    batch = packed_batch([[6, 4]])
    segments = batch["segment_ids"][0, 0]
    tokens = np.random.default_rng(0).permutation(V)[: T + 1].astype(np.int32)
    tree = jax.tree.map(jnp.asarray, parameters(V3))
    direction = np.random.default_rng(1).standard_normal(V3.hidden_size).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    @jax.jacrev
    def dependence(embedding):
        model = pure(V3).merge({**tree["params"], "embedding": embedding}, tree["buffers"])
        positions, segment_ids = batch["positions"][0, :, :-1], jnp.asarray(segments[None, :-1])
        hidden_BTD = model(tokens[None, :-1], positions, segment_ids).hidden_BTD
        ahead_segments = jnp.where(segments[None, 1:] == segment_ids, segment_ids, 0)
        ahead = model.predict_ahead(hidden_BTD, tokens[None, 1:], positions, ahead_segments)
        return jnp.stack([h_BTD[0] @ direction for h_BTD in (hidden_BTD, *(h_BTD for h_BTD, _ in ahead))])

    jacobian = np.asarray(dependence(tree["params"]["embedding"]))  # [1 + depth, T, V, D]
    for k, outputs in enumerate(jacobian):
        for t in range(T):
            if not segments[t] or t + k > T or segments[t + k] != segments[t]:
                continue  # padding, or without an input at this depth
            got = np.abs(outputs[t]).max(axis=-1) > 0
            want = np.zeros(V, bool)
            want[[tokens[s] for s in range(T + 1) if s <= t + k and segments[s] == segments[t]]] = True
            np.testing.assert_array_equal(got, want, err_msg=f"depth {k}, position {t}")


def test_padding_changes_nothing():
    """Nothing but the order of sums (padding is routed to experts too), with every weight on; no gradient reaches it."""
    first, other = ({name: x.copy() for name, x in BATCH.items()} for _ in range(2))
    padding = BATCH["segment_ids"] == 0
    first["tokens"] %= V - 2
    other["tokens"] %= V - 2
    first["tokens"][padding], other["tokens"][padding] = V - 2, V - 1
    other["positions"][padding] = 3
    grads, terms = result(V3, other)
    assert_same((grads, terms), result(V3, first))
    np.testing.assert_array_equal(grads["['embedding']"][V - 2 :], 0)


def test_one_document_a_row_gives_the_same_loss():
    """Packed documents count like documents in rows of their own (but for the balance loss, which is per row)."""
    empty = [[]] * 5
    spread = packed_batch([[6], [4], [3], *empty])
    together = {name: x.copy() for name, x in packed_batch([[6, 4, 3], [], [], *empty]).items()}
    start = 0
    for row, size in enumerate((6, 4, 3)):
        together["tokens"][0, 0, start : start + size] = spread["tokens"][0, row, :size]
        start += size
    # 13 tokens fill the row: its last one is a target only, as the last token of every other row.
    (_, want), (_, got) = result(V3, spread), result(V3, together)
    for name in ("main", "mtp", "z"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=ROUNDING, err_msg=name)


# ---- loads and auxiliary losses


def test_loads_are_experts_per_token_times_valid_tokens():
    _, terms = result(V3)
    segments, X = BATCH["segment_ids"], V3.moe.router.num_experts_per_tok
    inputs = int((segments[..., :-1] > 0).sum())
    np.testing.assert_array_equal(terms.loads["stack"].sum(axis=-1), [inputs * X] * 2)
    for k in (1, 2):
        with_input = int(((segments[..., :-k] > 0) & (segments[..., :-k] == segments[..., k:])).sum())
        assert terms.loads[f"mtp_{k - 1}"].sum() == with_input * X


def test_every_auxiliary_loss_reaches_every_layer_under_scan():
    """Gradients are linear in each weight, and twice the weight moves each layer of the scanned stack."""
    _, terms = result(ONE_MODULE)
    assert terms.balance > 0 and terms.z > 0 and terms.mtp[0] > 0
    base = result(ONE_MODULE, mtp=0.0, balance=0.0)[0]
    balance = result(ONE_MODULE, mtp=0.0, balance=1.0)[0]
    mtp = result(ONE_MODULE, mtp=1.0, balance=0.0)[0]
    both = result(ONE_MODULE, mtp=0.5, balance=0.5)[0]
    for path, g in base.items():
        scale = max(np.abs(x).max() for x in (g, balance[path], mtp[path]))
        want = (balance[path] + mtp[path]) / 2
        np.testing.assert_allclose(both[path], want, rtol=0, atol=ROUNDING * scale, err_msg=path)

    router = "['params']['stack']['mlp']['router']['weight']".removeprefix("['params']")
    module_router = "['mtp']['0']['block']['mlp']['router']['weight']"
    for layer in range(2):
        assert np.abs(balance[router][layer] - base[router][layer]).max() > 1e-4
        assert np.abs(mtp[router][layer] - base[router][layer]).max() > 1e-4
    assert np.abs(balance[module_router]).max() > 1e-4
    for path, g in base.items():
        if path.startswith("['mtp']"):
            np.testing.assert_array_equal(g, 0, err_msg=path)  # switched off: no gradient
            assert np.abs(mtp[path]).max() > 0, path


# ---- the same computation, arranged otherwise

ARRANGEMENTS = {
    "scanned_full": {"remat": "full"},
    "unrolled_dots": {"scan_layers": False, "remat": "dots"},
    "scanned_attention": {"remat": "attention"},
    "unrolled": {"scan_layers": False},
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_scan_and_remat_change_nothing(name):
    assert_same(result(dataclasses.replace(ONE_MODULE, **ARRANGEMENTS[name])), result(ONE_MODULE))


def test_remat_recomputes():
    """Products in the traced gradient: none are repeated, those of experts are, all but attention's are, all are."""
    tree, products = parameters(ONE_MODULE), {}
    for remat in ("none", "dots", "attention", "full"):
        run = gradient_of(dataclasses.replace(ONE_MODULE, remat=remat))
        trace = run.trace(tree["params"], tree["buffers"], BATCH, 0.5, 0.7).jaxpr
        products[remat] = str(trace).count("dot_general")
    assert products["none"] < products["dots"] < products["attention"] < products["full"]


def test_only_long_rows_recompute_unless_told_otherwise():
    def products(remat, length):
        config = dataclasses.replace(ONE_MODULE, remat=remat, max_position_embeddings=length)
        batch = {name: jax.ShapeDtypeStruct((1, 1, length + 1), np.int32) for name in BATCH}
        tree = pure(config).abstract()
        run = gradient_of(config)
        return str(run.trace(tree["params"], tree["buffers"], batch, 0.5, 0.7).jaxpr).count("dot_general")

    assert products("auto", 64) == products("none", 64) < products("attention", 64)
    assert products("auto", LONG) == products("none", LONG)
    assert products("auto", 2 * LONG) == products("attention", 2 * LONG)


MESHES = {
    "fsdp": {"data": 1, "fsdp": 8},
    "data_fsdp_tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data_expert": {"data": 2, "expert": 4},
    "fsdp_expert_tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param("fsdp", "none", marks=pytest.mark.slow),
        pytest.param("data_fsdp_tensor", "none", marks=pytest.mark.slow),
        pytest.param("data_expert", "none", marks=pytest.mark.slow),
        ("fsdp_expert_tensor", "full"),
    ],
)
def test_eight_devices_give_what_one_gives(name, remat):
    want, config = result(ONE_MODULE), dataclasses.replace(ONE_MODULE, remat=remat)
    mesh = MeshConfig(**MESHES[name]).build()
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s.sharding.spec), pure(ONE_MODULE).abstract())
        tree = jax.device_put(parameters(ONE_MODULE), shardings)
        batch = jax.device_put(BATCH, NamedSharding(mesh, spec(None, "batch", None)))
        grads, terms = gradient_of(config)(tree["params"], tree["buffers"], batch, 0.5, 0.7)
    assert_same((leaves(grads), jax.device_get(terms)), want)
    for grad, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings["params"]), strict=True):
        assert grad.sharding.is_equivalent_to(sharding, grad.ndim)
