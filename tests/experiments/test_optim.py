"""AdamW against optax and against float64 NumPy; schedules against the formulas in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.errors import UserError
from experiments.optim.adamw import AdamWConfig, decays
from experiments.optim.clip import global_norm
from experiments.optim.schedule import (
    ConstantConfig,
    CosineConfig,
    DeepSeekV3ScheduleConfig,
    PiecewiseConfig,
    StepDecayConfig,
    WsdConfig,
)


def make_params(rng, dtype=np.float32):
    shapes = {"embedding": (7, 4), "stack": {"ffn_norm": {"weight": (3, 4)}, "up": {"weight": (3, 4, 5)}}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def run(config, params, grads, learning_rate=0.01):
    optimizer = config.build(num_steps=len(grads))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params, learning_rate=learning_rate, grad_norm=global_norm(g))
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return params, state


def numpy_adamw(params, grads, lr, c, *, round_moments=lambda x: x):
    """The equations of arXiv:1711.05101 in float64, leaf by leaf; norms are not decayed."""
    flat = {jax.tree_util.keystr(k): np.asarray(v, np.float64) for k, v in jax.tree.leaves_with_path(params)}
    mu, nu = ({k: np.zeros_like(v) for k, v in flat.items()} for _ in range(2))
    for t, tree in enumerate(grads, 1):
        g = {jax.tree_util.keystr(k): np.asarray(v, np.float64) for k, v in jax.tree.leaves_with_path(tree)}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        scale = 1.0 if c.clip_norm is None else min(1.0, c.clip_norm / norm)
        for k in flat:
            x = g[k] * scale
            m, v = c.b1 * mu[k] + (1 - c.b1) * x, c.b2 * nu[k] + (1 - c.b2) * x**2
            step = m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.eps)
            decay = 0.0 if "norm" in k or ("embedding" in k and not c.decay_embeddings) else c.weight_decay
            flat[k] = flat[k] - lr * (step + decay * flat[k])
            mu[k], nu[k] = round_moments(m), round_moments(v)
    return flat


def assert_close(params, reference, **tolerance):
    for path, value in jax.tree.leaves_with_path(params):
        np.testing.assert_allclose(value, reference[jax.tree_util.keystr(path)], **tolerance)


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_adamw_against_numpy(clip_norm, decay_embeddings):
    rng = np.random.default_rng(0)
    config = AdamWConfig(clip_norm=clip_norm, decay_embeddings=decay_embeddings)
    params, grads = make_params(rng), [make_params(rng) for _ in range(10)]
    new, state = run(config, params, grads)
    assert state.count == 10
    assert_close(new, numpy_adamw(params, grads, 0.01, config), rtol=2e-6, atol=2e-6)


def test_adamw_against_optax():
    rng = np.random.default_rng(1)
    params, grads = make_params(rng), [make_params(rng) for _ in range(10)]
    config = AdamWConfig(clip_norm=0.7)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.7), optax.adamw(0.01, config.b1, config.b2, config.eps, weight_decay=0.1, mask=mask)
    )
    state, expected = theirs.init(params), params
    for g in grads:
        updates, state = theirs.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    ours, _ = run(config, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, expected)


def test_bfloat16_moments_round_once_per_step():
    rng = np.random.default_rng(2)
    params, grads = make_params(rng), [make_params(rng) for _ in range(10)]
    config = AdamWConfig(moment_dtype="bfloat16")
    new, state = run(config, params, grads)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype(jnp.bfloat16)}
    rounded = numpy_adamw(
        params, grads, 0.01, config, round_moments=lambda x: x.astype(np.float32).astype(jnp.bfloat16).astype(float)
    )
    exact = numpy_adamw(params, grads, 0.01, config)
    # A float32 value next to a rounding boundary may round the other way: one bfloat16 ulp of one moment, times lr.
    assert_close(new, rounded, rtol=0, atol=0.01 * 2**-7)
    distance = [np.abs(np.asarray(v) - exact[jax.tree_util.keystr(k)]).max() for k, v in jax.tree.leaves_with_path(new)]
    assert 0 < max(distance) < 0.01 * 10 * 2**-7


def test_bfloat16_parameters_and_gradients_are_updated_in_float32():
    rng = np.random.default_rng(3)
    params, grads = make_params(rng, jnp.bfloat16), [make_params(rng, jnp.bfloat16) for _ in range(2)]
    config = AdamWConfig()
    optimizer = config.build(num_steps=10)
    updates, _ = optimizer.update(
        grads[0], optimizer.init(params), params, learning_rate=0.01, grad_norm=global_norm(grads[0])
    )
    reference = numpy_adamw(params, grads[:1], 0.01, config)
    for update in jax.tree.leaves(updates):
        assert update.dtype == jnp.float32
    start = {jax.tree_util.keystr(k): np.asarray(v, np.float64) for k, v in jax.tree.leaves_with_path(params)}
    assert_close(updates, {k: reference[k] - start[k] for k in start}, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads[0])))
    np.testing.assert_allclose(global_norm(grads[0]), norm, rtol=1e-6)


def test_sharded_parameters_give_the_same_numbers_and_sharded_moments():
    rng = np.random.default_rng(4)
    params = {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)}
    grads = [{"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)} for _ in range(3)]
    config = AdamWConfig(clip_norm=0.5)
    one, _ = run(config, params, grads)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        many, state = run(config, *jax.device_put((params, grads), sharding))
    assert {leaf.sharding for leaf in (many["w"], state.mu["w"], state.nu["w"])} == {sharding}
    np.testing.assert_allclose(many["w"], one["w"], rtol=1e-6, atol=1e-6)


def test_decay_goes_by_name_not_by_rank():
    tree = {
        "embedding": 0,
        "head": 0,
        "final_norm": {"weight": 0},
        "stack": {"attention": {"q_norm": {"weight": 0}, "output": {"weight": 0, "bias": 0}}, "router": {"weight": 0}},
    }
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: decays(path, embeddings=False), tree)
    assert decayed == {
        "embedding": False,
        "head": True,
        "final_norm": {"weight": False},
        "stack": {
            "attention": {"q_norm": {"weight": False}, "output": {"weight": True, "bias": False}},
            "router": {"weight": True},
        },
    }
    assert decays((jax.tree_util.DictKey("embedding"),), embeddings=True)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"b1": 1.0}, "b1"),
        ({"b2": -0.1}, "b2"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"b2": 0.999, "moment_dtype": "bfloat16"}, "b2=0.999 with moment_dtype=bfloat16"),
    ],
)
def test_values_out_of_range(values, field):
    with pytest.raises(UserError, match=field):
        AdamWConfig(**values)


# ---- schedules


def curve(schedule, steps, tokens=None):
    tokens = [0.0] * len(steps) if tokens is None else tokens
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32), jnp.asarray(tokens, jnp.float32)))


def test_wsd():
    steps = np.arange(100)

    def expected(power, floor):
        for s in steps:
            warm = min((s + 1) / 10, 1)
            progress = max(s - 75, 0) / 25
            yield 3e-4 * warm * (floor + (1 - floor) * (1 - progress**power))

    for power, floor in [(0.5, 0.0), (1.0, 0.1)]:
        config = WsdConfig(warmup_fraction=0.1, decay_fraction=0.25, decay_power=power, final_fraction=floor)
        got = curve(config.build(3e-4, 100), steps)
        np.testing.assert_allclose(got, list(expected(power, floor)), rtol=1e-5)
        assert (got > 0).all()
        stretched = curve(config.build(3e-4, 1000), steps * 10 + 9)
        np.testing.assert_allclose(stretched[:75], got[:75], rtol=1e-5)
    assert curve(WsdConfig(warmup_steps=4).build(1.0, 100), [0, 3, 50])[:3].tolist() == [0.25, 1.0, 1.0]


def test_cosine():
    steps = np.arange(200)
    expected = [
        min((s + 1) / 20, 1) if s < 20 else 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 20) / 180)) / 2 for s in steps
    ]
    config = CosineConfig(warmup_fraction=0.1, final_fraction=0.1)
    np.testing.assert_allclose(curve(config.build(1.0, 200), steps), expected, rtol=1e-5)
    np.testing.assert_allclose(curve(config.build(1.0, 200), [200, 300]), 0.1, rtol=1e-6)


def test_deepseek_v3_as_published():
    schedule = DeepSeekV3ScheduleConfig().build(2.2e-4, num_steps=7)
    tokens = [0, 0, 1e9, 1e10, 9.99e12, 12.15e12, 14.3e12, 14.6e12, 14.64e12, 14.8e12]
    steps = [0, 999, 1999, 5000, 10**6, 10**6, 10**6, 10**6, 10**6, 10**6]
    expected = [1.1e-7, 1.1e-4, 2.2e-4, 2.2e-4, 2.2e-4, (2.2e-4 + 2.2e-5) / 2, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6]
    np.testing.assert_allclose(curve(schedule, steps, tokens), expected, rtol=1e-4)
    np.testing.assert_allclose(schedule(10**6, 14_700_000_000_000), 7.3e-6, rtol=1e-6)


def test_step_decay():
    config = StepDecayConfig(warmup_steps=2, boundaries=(0.5, 0.9), factor=0.1)
    np.testing.assert_allclose(curve(config.build(1.0, 10), [0, 1, 4, 5, 8, 9]), [0.5, 1, 1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_constant():
    assert curve(ConstantConfig(warmup_steps=2).build(0.5, 10), [0, 1, 9]).tolist() == [0.25, 0.5, 0.5]
    assert curve(ConstantConfig().build(0.5, 10), [0]).tolist() == [0.5]


def test_piecewise():
    weight = PiecewiseConfig(values=(0.3, 0.1), boundaries=(10e12,), unit="tokens").build(num_steps=5)
    np.testing.assert_allclose(curve(weight, [0, 0, 0], [0, 9.99e12, 10.01e12]), [0.3, 0.3, 0.1])
    speed = PiecewiseConfig(values=(1.0, 2.0, 3.0), boundaries=(0.5, 0.9)).build(num_steps=10)
    assert curve(speed, range(10)).tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert curve(PiecewiseConfig(values=(4.0,)).build(num_steps=10), [0, 9]).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: WsdConfig(warmup_fraction=1.5), "warmup_fraction=1.5"),
        (lambda: WsdConfig(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: WsdConfig(decay_power=0.0), "decay_power"),
        (lambda: WsdConfig(warmup_steps=300).build(1.0, 200), "warmup_steps=300 is more than num_steps=200"),
        (lambda: WsdConfig(warmup_fraction=0.9, decay_fraction=0.2).build(1.0, 100), "do not fit into num_steps=100"),
        (lambda: CosineConfig(final_fraction=-0.1), "final_fraction=-0.1"),
        (lambda: CosineConfig(warmup_steps=300).build(1.0, 200), "warmup_steps=300"),
        (lambda: ConstantConfig(warmup_steps=11).build(1.0, 10), "warmup_steps=11"),
        (lambda: DeepSeekV3ScheduleConfig(decay_tokens=-1.0), "decay_tokens=-1.0"),
        (lambda: PiecewiseConfig(values=(1.0, 2.0)), "values"),
        (lambda: PiecewiseConfig(values=(1.0, 2.0, 3.0), boundaries=(0.5, 0.4)), "boundaries"),
        (lambda: PiecewiseConfig(values=(1.0, 2.0), boundaries=(5.0,)), "unit"),
    ],
)
def test_bad_schedules(make, field):
    with pytest.raises(UserError, match=field):
        make()
