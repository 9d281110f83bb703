"""The train step: any split into micro-batches is the same step, and what it does to biases, averages and bad gradients."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import ExperimentConfig, LossConfig, TrainConfig
from experiments.errors import UserError
from experiments.optim import trainable
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import PiecewiseConfig
from experiments.step import init_state, load_metrics, make_eval_step, make_train_step
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.pure import PureModel
from mdl.sharding import MeshConfig, spec
from mdl.transformer import TransformerConfig

ROWS, T, V, SPEED, DECAY, LAMBDA = 8, 12, 64, 0.01, 0.75, (0.5, 0.1)
CONFIG = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=3,
        attention=MlaConfig(
            num_attention_heads=2,
            q_lora_rank=None,
            kv_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=4,
        ),
        mlp=MlpConfig(intermediate_size=24),
        moe=MoeConfig(
            moe_intermediate_size=6,
            router=RouterConfig(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2),
        ),
        mtp=MtpConfig(),
        initializer_range=0.3,
        precision=PrecisionConfig(compute="float32"),
    ),
    # Weights far larger than in training, so that no term hides behind the main one.
    loss=LossConfig(
        mtp_loss_weight=PiecewiseConfig(values=LAMBDA, boundaries=(1000.0,), unit="tokens"),
        aux_loss_alpha=0.7,
        z_loss_weight=0.05,
        bias_update_speed=PiecewiseConfig(values=(SPEED,)),
    ),
    optim=AdamWConfig(clip_norm=None, b1=0.5),
    train=TrainConfig(num_steps=10, batch_size=ROWS, seq_len=T, ema_decay=DECAY),
)
MODEL = PureModel(CONFIG.model)
ROUNDING = 1e-5  # two float32 orders of the same sums, relative to the largest entry of an array


def batch(parts: int) -> dict[str, np.ndarray]:
    """The same rows in `parts` micro-batches, whose counts of tokens, targets and rows all differ."""
    rng = np.random.default_rng(0)
    shape = (ROWS, T + 1)
    out = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    out["tokens"][:] = rng.integers(0, V, shape)
    for row, documents in enumerate([[13], [5, 4, 4], [1, 6, 5, 1], [12], [3], [], [2, 2], []]):
        start = 0
        for i, size in enumerate(documents):
            out["segment_ids"][row, start : start + size] = i + 1
            out["positions"][row, start : start + size] = np.arange(size)
            start += size
    return {name: x.reshape(parts, ROWS // parts, T + 1) for name, x in out.items()}


@pytest.fixture(scope="module")
def state():
    """As `init_state` shapes it, with random parameters and router biases and empty moments."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        path = jax.tree_util.keystr(path)
        if leaf.dtype != np.float32 or "['opt']" in path:
            return np.zeros(leaf.shape, leaf.dtype)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return 1 + 0.2 * noise if "norm" in path else (0.1 if "['bias']" in path else 0.3) * noise

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(functools.partial(init_state, CONFIG, MODEL)))


def test_state_of_step_zero():
    """Parameters by the seed, averages that start at them in arrays of their own (both are donated), the rest zero."""
    model = types.SimpleNamespace(init=lambda key: {"params": {"w": jax.random.normal(key, (3,))}, "buffers": {}})
    state = init_state(dataclasses.replace(CONFIG, seed=7), model)
    np.testing.assert_array_equal(state["params"]["w"], jax.random.normal(jax.random.key(7), (3,)))
    np.testing.assert_array_equal(state["ema"]["w"], state["params"]["w"])
    assert state["ema"]["w"].unsafe_buffer_pointer() != state["params"]["w"].unsafe_buffer_pointer()
    assert state["step"] == state["skipped"] == state["skipped_in_a_row"] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt"]))
    without = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, ema_decay=None))
    assert "ema" not in init_state(without, model)


FAST_COMPILE = {"xla_backend_optimization_level": 0}  # half the time; what XLA does before LLVM stays the same
# Not donated: every test starts from the same state.
train_step = jax.jit(make_train_step(CONFIG, MODEL), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def stepped(state):
    """stepped(parts) -> (state, metrics) after one step."""
    return functools.cache(lambda parts: jax.device_get(train_step(state, batch(parts), jnp.float32(0))))


def leaves(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(got, want, tolerance=ROUNDING):
    for path, leaf in leaves(want).items():
        atol = tolerance * np.abs(leaf).max()
        np.testing.assert_allclose(leaves(got)[path], leaf, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_split_is_the_same_step(stepped, parts):
    (want, want_metrics), (got, metrics) = stepped(1), stepped(parts)
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=ROUNDING, err_msg=name)
    # The first moment is the gradient, (1 - b1) of it; parameters would hide its scale.
    assert_close(got["opt"].mu, want["opt"].mu)
    # Loads are whole numbers, so biases move exactly alike: once a step, however many micro-batches.
    for path, bias in leaves(want["buffers"]).items():
        np.testing.assert_array_equal(leaves(got["buffers"])[path], bias)
    assert got["step"] == want["step"] == 1


def test_the_loss_is_the_sum_of_its_terms(state, stepped):
    for tokens_seen, weight in zip((0, 1000), LAMBDA, strict=True):
        metrics = jax.device_get(train_step(state, batch(1), jnp.float32(tokens_seen))[1])
        terms = {name: float(metrics[f"loss/{name}"]) for name in ("main", "mtp_1", "balance", "z")}
        assert min(terms.values()) > 0.1
        want = terms["main"] + weight * terms["mtp_1"] + 0.7 * terms["balance"] + 0.05 * terms["z"]
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)


def test_biases_move_by_the_speed_against_the_load(state, stepped):
    after, _ = stepped(4)
    moved = 0
    for path, before in leaves(state["buffers"]).items():
        move = leaves(after["buffers"])[path] - before
        steps = np.round(move / SPEED)
        np.testing.assert_allclose(move, steps * SPEED, atol=1e-7, err_msg=path)  # one rounding of a bias below 1
        assert set(np.unique(steps)) <= {-1, 0, 1}
        assert np.all(steps.max(axis=-1) == 1) and np.all(steps.min(axis=-1) == -1)  # someone is over, someone under
        moved += np.count_nonzero(steps)
    assert moved > 16


def test_no_gradient_and_no_decay_moves_biases(state):
    config = dataclasses.replace(CONFIG.loss, bias_update_speed=None)
    step = make_train_step(dataclasses.replace(CONFIG, loss=config), MODEL)
    after = jax.eval_shape(step, state, batch(1), jnp.float32(0))[0]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not any("bias" in path for path in leaves(state["params"]))


def test_ema(state, stepped):
    after, _ = stepped(1)
    for path, average in leaves(after["ema"]).items():
        want = DECAY * leaves(state["ema"])[path] + (1 - DECAY) * leaves(after["params"])[path]
        np.testing.assert_allclose(average, want, rtol=1e-6, atol=1e-7, err_msg=path)  # a float32 sum of two parts
        assert "norm" in path or not np.array_equal(average, leaves(state["ema"])[path]), path


def test_frozen_parameters_rest(state, stepped):
    """They keep their bits, have no moments, and their gradients, which others are divided by when clipped, do not count."""
    patterns = ("*/kv_b_proj/*", "head")
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, trainable=patterns))
    trained, _ = trainable.split(state["params"], patterns)
    opt = jax.tree.map(np.asarray, config.optim.build(10).init(trained))
    step = jax.jit(make_train_step(config, MODEL), compiler_options=FAST_COMPILE)
    after, metrics = jax.device_get(step({**state, "opt": opt}, batch(1), jnp.float32(0)))

    whole, _ = stepped(1)
    grads, moved = leaves(whole["opt"].mu), leaves(whole["params"])
    of_trained = leaves(trained).keys()
    assert len(of_trained) == 4  # of the prefix, the stack, the MTP module, and the head
    for path, leaf in leaves(after["params"]).items():
        if path in of_trained:
            np.testing.assert_allclose(leaf, moved[path], rtol=1e-5, atol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, leaves(state["params"])[path], err_msg=path)
    assert leaves(after["opt"].mu).keys() == of_trained
    want = np.sqrt(
        sum(np.sum(np.square(grads[path] / 0.5)) for path in of_trained)
    )  # the first moment is half the gradient
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("*/indexer/*", ("train.trainable=*/indexer/* matches no parameter", "paths look like")),
        ("*/kv_b_porj/*", ("did you mean kv_b_proj?",)),
    ],
)
def test_patterns_that_match_nothing_are_refused(pattern, parts):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, trainable=("head", pattern)))
    with pytest.raises(UserError) as refused:
        config.check_parameters()
    assert all(part in str(refused.value) for part in parts), refused.value


def test_biases_of_frozen_routers_would_move():
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, trainable=("head",)))
    with pytest.raises(UserError, match=r"set loss\.bias_update_speed=none"):
        config.check_parameters()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(state, bad):
    params = jax.tree.map(np.copy, state["params"])
    params["final_norm"]["weight"][3] = bad
    broken = {**state, "params": params, "skipped": np.int32(5), "skipped_in_a_row": np.int32(2)}
    after, metrics = jax.device_get(train_step(broken, batch(1), jnp.float32(0)))
    for path, leaf in leaves({**broken, "step": 1, "skipped": 6, "skipped_in_a_row": 3}).items():
        np.testing.assert_array_equal(leaves(after)[path], leaf, err_msg=path)
    assert metrics["skipped_steps"] == 6 and metrics["skipped_in_a_row"] == 3

    again, metrics = jax.device_get(train_step({**after, "params": state["params"]}, batch(1), jnp.float32(0)))
    assert again["skipped"] == 6 and again["skipped_in_a_row"] == 0 and again["step"] == 2
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(again["params"]["embedding"], state["params"]["embedding"])


def test_eight_devices_take_the_same_step(state, stepped):
    want, want_metrics = stepped(1)
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(functools.partial(init_state, CONFIG, MODEL))
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s.sharding.spec if s.sharding else P()), abstract)
        split = jax.device_put(state, shardings)
        rows = jax.device_put(batch(1), NamedSharding(mesh, spec(None, "batch", None)))
        got, metrics = train_step(split, rows, jnp.float32(0))
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=ROUNDING, err_msg=name)
    assert_close(got["opt"].mu, want["opt"].mu)
    for path, bias in leaves(want["buffers"]).items():
        np.testing.assert_array_equal(leaves(got["buffers"])[path], bias)
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_load_metrics_by_hand():
    loads = {"stack": jnp.array([[2.0, 2, 2, 2], [8, 0, 0, 0]]), "mtp_0": jnp.array([4.0, 4, 0, 0])}
    dropped = {"stack": jnp.array([0, 2]), "mtp_0": jnp.int32(2)}
    biases = {
        "mtp": {"0": {"bias": jnp.array([0.0, 0, 0, 9])}},
        "stack": {"bias": jnp.array([[3.0, 4, 0, 0], [0, 0, 0, 0]])},
    }
    got = load_metrics(loads, dropped, biases)
    np.testing.assert_allclose(got["load/max_violation"], (0 + 3 + 1) / 3)
    np.testing.assert_allclose(got["load/worst_violation"], 3)
    np.testing.assert_allclose(got["load/entropy"], (1 + 0 + 0.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(got["load/drop_rate"], (0 + 0.25 + 0.25) / 3)
    np.testing.assert_allclose(got["load/bias_norm"], (5 + 0 + 9) / 3)
    np.testing.assert_allclose(got["load/by_layer/max_violation"], [0, 3, 1])
    np.testing.assert_allclose(got["load/by_layer/entropy"], [1, 0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(got["load/by_layer/drop_rate"], [0, 0.25, 0.25])
    np.testing.assert_allclose(got["load/by_layer/bias_norm"], [5, 0, 9])
    without_bias = load_metrics(loads, dropped, {})
    assert without_bias.keys() == {name for name in got if "bias" not in name}
    assert load_metrics({}, {}, {}) == {}


def test_evaluation_is_the_main_loss(state, stepped):
    rows = {name: x[0] for name, x in batch(1).items()}
    sums = jax.jit(make_eval_step(MODEL))(state["params"], state["buffers"], rows)
    total, count, segments = sums.nll, sums.targets, rows["segment_ids"]
    assert sums.indexer is None and sums.tokens == np.sum(segments[:, :-1] > 0)
    assert count == np.sum((segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0))
    np.testing.assert_allclose(total / count, stepped(1)[1]["loss/main"], rtol=ROUNDING)


def test_acceptance_is_what_temperature_zero_would_accept(state):
    """Counted target by target from whole logits: the module at t against the model at t + 1, in documents of three tokens on."""
    rows = {name: x[0] for name, x in batch(1).items()}
    # A module that repeats what it reads of the newest token is right now and then where that says most; a random one is not.
    params = jax.tree.map(np.copy, state["params"])
    params["embedding"] *= 20
    weight = params["mtp"]["0"]["eh_proj"]["weight"]
    weight[...] = 6 * np.eye(*weight.shape) + weight
    tokens, segments = rows["tokens"], rows["segment_ids"]

    @jax.jit
    def chosen(params):
        model = MODEL.merge(params, state["buffers"])
        hidden_BTD = model(tokens[:, :-1], rows["positions"][:, :-1], segments[:, :-1]).hidden_BTD
        inside = np.where(segments[:, 1:] == segments[:, :-1], segments[:, :-1], 0)
        ((ahead_BTD, _),) = model.predict_ahead(hidden_BTD, tokens[:, 1:], rows["positions"][:, :-1], inside)
        return jnp.argmax(model.logits(hidden_BTD), axis=-1), jnp.argmax(model.logits(ahead_BTD), axis=-1)

    by_model, by_module = map(np.asarray, chosen(params))
    targets = [
        (row, t)
        for row in range(ROWS)
        for t in range(T - 1)
        if segments[row, t] > 0 and segments[row, t] == segments[row, t + 1] == segments[row, t + 2]
    ]
    right = sum(by_module[row, t] == by_model[row, t + 1] for row, t in targets)
    sums = jax.jit(make_eval_step(MODEL))(params, state["buffers"], rows)
    assert sums.mtp_targets == (len(targets),) and sums.mtp_right == (right,)
    assert 0 < right < len(targets)
