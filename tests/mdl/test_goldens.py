"""The models against outputs of code that this project did not write (tests/golden), through the loader that `score` uses."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from experiments.loading import LoadedModel, find_model
from experiments.scoring import score
from mdl import hf
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.hf.load import export_tensors, read_config
from mdl.linear import Init
from mdl.loss import LossWeights, count_targets, loss_terms
from mdl.mlp import Mlp
from mdl.moe.router import Router, RouterConfig
from mdl.precision import PrecisionConfig
from mdl.rope import RopeConfig, YarnConfig, apply_rotary, rotary_tables
from mdl.sharding import MeshConfig, spec

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DEEPSEEK = ["deepseek_v3", "deepseek_v3_yarn", "deepseek_v3_mtp", "deepseek_v2_lite", "deepseek_v32", "glm_moe_dsa"]
VARIANTS = [*DEEPSEEK, "qwen3_untied", "qwen3_moe", "llama"]
TOLERANCE = 1e-4  # see tests/golden/README.md

# Half the time to compile, and nothing here runs long.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
all_variants = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / variant / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@functools.cache
def loaded(variant: str) -> LoadedModel:
    """The model on one device."""
    mesh = MeshConfig(data=1).build(jax.devices()[:1])
    return find_model(GOLDEN / variant).load(mesh)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=TOLERANCE, atol=TOLERANCE)


def batch_of(tokens_BT: np.ndarray, model: LoadedModel) -> dict[str, jax.Array]:
    """Rows that are one document each, on the model's mesh."""
    batch = {
        "tokens": tokens_BT,
        "segment_ids": np.ones_like(tokens_BT),
        "positions": np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape),
    }
    return jax.device_put(batch, NamedSharding(model.mesh, spec("batch", None)))


# ---- logits


@pytest.mark.parametrize(
    ("variant", "scan_layers"),
    [*((v, True) for v in VARIANTS), ("deepseek_v3", False), ("deepseek_v32", False), ("llama", False)],
)
def test_logits_and_loss(variant, scan_layers):
    model = loaded(variant)
    config = dataclasses.replace(model.config, scan_layers=scan_layers)
    model = dataclasses.replace(model, config=config, pure=type(model.pure)(config))
    want = golden(variant)

    scores = score(model, want["input_ids"], batch_size=8)

    close(scores.logits_BTV, want["logits"])
    np.testing.assert_allclose(scores.loss, want["loss"], rtol=1e-5)
    assert scores.logprobs_BT.shape == (2, 47)


@pytest.mark.parametrize("variant", ["deepseek_v3_yarn", "deepseek_v2_lite", "llama"])
def test_input_longer_than_the_original_context(variant):
    want = golden(variant)
    close(score(loaded(variant), want["long.input_ids"], batch_size=8).logits_BTV, want["long.logits"])


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("glm_moe_dsa", MeshConfig(data=2, fsdp=2, tensor=2)),
        ("deepseek_v3", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
        ("deepseek_v3_mtp", MeshConfig(data=1, fsdp=8)),
        ("deepseek_v32", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
        ("llama", MeshConfig(data=4, tensor=2)),
    ],
)
def test_logits_on_eight_devices(variant, mesh):
    model = find_model(GOLDEN / variant).load(mesh.build())
    want = golden(variant)
    close(score(model, want["input_ids"], batch_size=1).logits_BTV, want["logits"])


# ---- layer by layer


def run_layers(pure, arrays, batch):
    """Everything that the golden files hold of a forward pass."""
    model, tokens_BT = pure.merge(arrays["params"], arrays["buffers"]), batch["tokens"]
    context = model.context(batch["positions"], batch["segment_ids"])
    model = model.with_layers_apart()
    blocks = [*model.prefix.values(), *model.stack.values()]

    x_BTD, selected_BTW = model.embed(tokens_BT), None
    found = {"embed_out": x_BTD}
    outputs = {"attn_out": [], "mlp_out": [], "layer_out": []}
    for i, block in enumerate(blocks):
        shared = (None, selected_BTW) if isinstance(model.config.attention, DsaConfig) else ()
        attended_BTD = block.attention(block.attention_norm(x_BTD), context, *shared)[0]
        normed_BTD = block.mlp_norm(x_BTD + attended_BTD)
        if isinstance(block.mlp, Mlp):
            y_BTD = block.mlp(normed_BTD)
        else:
            y_BTD, routing, _ = block.mlp(normed_BTD)
            found[f"router.{i}.logits"] = block.mlp.router.logits(normed_BTD)
            found[f"router.{i}.topk_index"] = routing.index_BTX
            found[f"router.{i}.topk_weight"] = routing.weight_BTX
        x_BTD, stats, _ = block(x_BTD, context, None, selected_BTW)
        selected_BTW = stats.selected_BTW
        for name, value in zip(outputs, (attended_BTD, y_BTD, x_BTD), strict=True):
            outputs[name].append(value)
    found |= {name: jnp.stack(values) for name, values in outputs.items()}
    return found | {"final_norm_out": model.final_norm(x_BTD)}


@all_variants
def test_every_layer(variant):
    model, want = loaded(variant), golden(variant)
    with jax.set_mesh(model.mesh):
        found = quick_jit(functools.partial(run_layers, model.pure))(model.arrays, batch_of(want["input_ids"], model))
    found = {name: np.asarray(value) for name, value in found.items()}
    for name in [name for name in found if name.endswith("topk_index")]:
        order = np.argsort(found[name], axis=-1)
        weights = name.replace("index", "weight")
        found[name] = np.take_along_axis(found[name], order, axis=-1)
        found[weights] = np.take_along_axis(found[weights], order, axis=-1)
        np.testing.assert_array_equal(found.pop(name), want[name])
    routers = {name for name in want if name.startswith("router.") and not name.endswith("index")}
    assert found.keys() == {"embed_out", "attn_out", "mlp_out", "layer_out", "final_norm_out"} | routers
    for name, value in found.items():
        np.testing.assert_allclose(value, want[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@all_variants
def test_rotary_settings(variant):
    attention, want = loaded(variant).config.attention, golden(variant)
    attention = attention.dense if isinstance(attention, DsaConfig) else attention
    frequencies = attention.rope.inverse_frequencies(attention.rotary_dim)
    np.testing.assert_allclose(frequencies, want["rope.inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(attention.rope.table_factor, want["rope.attention_scaling"], rtol=1e-6)
    scale = attention.softmax_scale if isinstance(attention, MlaConfig) else attention.head_dim**-0.5
    np.testing.assert_allclose(np.full(want["attn.softmax_scale"].shape, scale), want["attn.softmax_scale"], rtol=1e-6)


# ---- loss and gradients


@functools.cache
def loss_and_gradients(variant: str):
    """Terms, and the gradient of the main loss in the place of the parameters."""
    model = loaded(variant)
    batch = batch_of(golden(variant)["input_ids"], model)
    counts = count_targets(
        batch["segment_ids"][None], model.config.mtp.num_nextn_predict_layers if model.config.mtp else 0
    )

    def loss(params):
        terms = loss_terms(model.pure.merge(params, model.arrays["buffers"]), batch, LossWeights(), counts)
        return terms.loss, terms

    with jax.set_mesh(model.mesh):
        gradients, terms = quick_jit(jax.grad(loss, has_aux=True))(model.arrays["params"])
    return terms, {"params": gradients, "buffers": model.arrays["buffers"]}


@all_variants
def test_loss_and_gradients(variant):
    model, want = loaded(variant), golden(variant)
    terms, arrays = loss_and_gradients(variant)
    table = hf.family(read_config(GOLDEN / variant)).TABLE
    gradients = dict(export_tensors(arrays, model.config, table))

    np.testing.assert_allclose(terms.loss, want["loss"], rtol=1e-5)
    names = [name for name in want if name.startswith("grad/")]
    assert names
    for name in names:
        ours, theirs = gradients[name.removeprefix("grad/")], want[name]
        # Relative to the largest entry: small ones are sums that cancel.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max(), err_msg=name)
    norms = np.array([np.linalg.norm(gradients[name].astype(np.float64)) for name in want["grad_norm.names"]])
    np.testing.assert_allclose(norms, want["grad_norm.values"], rtol=TOLERANCE, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(norms), want["grad_norm.global"], rtol=TOLERANCE)


# ---- multi-token prediction


def test_multi_token_prediction():
    model, want = loaded("deepseek_v3_mtp"), golden("deepseek_v3_mtp")

    def predict(arrays, batch):
        module = model.pure.merge(arrays["params"], arrays["buffers"])
        tokens_BT = batch["tokens"]
        inputs = (batch["positions"][:, :-1], batch["segment_ids"][:, :-1])
        hidden_BTD = module(tokens_BT[:, :-1], *inputs).hidden_BTD
        ((ahead_BTD, _),) = module.predict_ahead(hidden_BTD, tokens_BT[:, 1:], *inputs)
        return ahead_BTD, module.logits(ahead_BTD)

    with jax.set_mesh(model.mesh):
        hidden_BTD, logits_BTV = quick_jit(predict)(model.arrays, batch_of(want["input_ids"], model))
    close(hidden_BTD, want["mtp.hidden"])
    close(logits_BTV, want["mtp.logits"])
    terms, _ = loss_and_gradients("deepseek_v3_mtp")
    np.testing.assert_allclose(terms.mtp[0], want["mtp.loss"], rtol=1e-5)


# ---- config files


@pytest.mark.parametrize("variant", ["deepseek_v3", "deepseek_v3_yarn", "deepseek_v2_lite", "deepseek_v32"])
def test_both_spellings_of_the_config(variant):
    hub_style = json.loads((GOLDEN / variant / "config.hub_style.json").read_text())
    assert hf.model_config(hub_style) == loaded(variant).config


# ---- parts at the sizes of real models

ROPES = {
    "v3_real": YarnConfig(mscale=1.0, mscale_all_dim=1.0),
    "v2lite_real": YarnConfig(mscale=0.707, mscale_all_dim=0.707),
    "mscale_unequal": YarnConfig(mscale=1.0, mscale_all_dim=0.707),
    "no_mscale_keys": YarnConfig(),
    "default": RopeConfig(),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables(name):
    rope = ROPES[name]
    want = {key.removeprefix(f"rope.{name}."): value for key, value in golden("components").items()}
    positions = want["positions"]
    np.testing.assert_allclose(rope.inverse_frequencies(64), want["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(rope.table_factor, want["attention_scaling"], rtol=1e-12)
    np.testing.assert_allclose(192**-0.5 * rope.softmax_factor, want["softmax_scale_192"], rtol=1e-12)
    # Both sides round frequency and angle to float32: an angle of 160,000 radians is known to 0.03.
    unsure = 1e-6 + 2 * np.finfo(np.float32).eps * positions[:, None] * want["inv_freq"]
    for ours, key in zip(rotary_tables(rope, 64, jnp.asarray(positions)[None]), ("cos", "sin"), strict=True):
        assert np.all(np.abs(ours[0] - want[key][:, :32]) <= unsure), key


@pytest.mark.parametrize(("interleaved", "key"), [(True, "interleaved_in_halfsplit_out"), (False, "halfsplit")])
def test_rotary_layouts(interleaved, key):
    parts = golden("components")
    tables = tuple(jnp.asarray(parts[f"rope.v3_real.{name}"])[None, :, :32] for name in ("cos", "sin"))
    for name in "qk":
        x_BTNR = jnp.asarray(parts[f"rope_apply.{name}"]).transpose(0, 2, 1, 3)
        ours_BTNR = apply_rotary(x_BTNR, tables, interleaved=interleaved)
        want = parts[f"rope_apply.{key}.{name}"].transpose(0, 2, 1, 3)
        np.testing.assert_allclose(ours_BTNR, want, rtol=1e-6, atol=1e-6)


V3_ROUTER = RouterConfig(n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
ROUTERS = {
    "zero_mean_bias": V3_ROUTER,
    "negative_bias": V3_ROUTER,
    "one_group": dataclasses.replace(V3_ROUTER, n_group=1, topk_group=1),
    "no_norm": dataclasses.replace(V3_ROUTER, norm_topk_prob=False),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_with_256_experts(name):
    parts = golden("components")
    router: Router = ROUTERS[name].build(32, init=Init(nnx.Rngs(0), 1.0, PrecisionConfig(compute="float32")))
    assert router.bias is not None
    router.weight[...] = jnp.asarray(parts[f"router.{name}.weight"].T)
    router.bias[...] = jnp.asarray(parts[f"router.{name}.bias"])
    x_BTD = jnp.asarray(parts["router.x"])[None]
    routing = router(x_BTD)

    np.testing.assert_allclose(router.logits(x_BTD)[0], parts[f"router.{name}.logits"], rtol=1e-5, atol=1e-5)
    index, weight = np.asarray(routing.index_BTX[0]), np.asarray(routing.weight_BTX[0])
    order = np.argsort(index, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(index, order, -1), parts[f"router.{name}.topk_index"])
    np.testing.assert_allclose(np.take_along_axis(weight, order, -1), parts[f"router.{name}.topk_weight"], rtol=1e-5)
