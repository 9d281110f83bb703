import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported, expert_mlp
from kernels_pallas.expert_mlp import chunks, grouped, xla
from kernels_pallas.expert_mlp.api import BACK_ENDS
from kernels_pallas.grouped_gemm import xla as grouped_products

IMPLEMENTATIONS = ["reference", "xla", "grouped"]
D, F = 6, 5


@pytest.fixture(autouse=True)
def grouped_without_a_kernel(monkeypatch):
    """What "tpu" and "gpu" do around their kernels, around products that any device has."""
    monkeypatch.setitem(BACK_ENDS, "grouped", grouped.Grouped(grouped_products))


def index_of(name, rng):
    """[T, X] choices and the number of experts."""
    distinct = lambda t, e, x: np.stack([rng.permutation(e)[:x] for _ in range(t)])  # noqa: E731
    return {
        "ordinary": lambda: (distinct(64, 8, 2), 8),
        "all to one expert": lambda: (np.full((300, 1), 2), 4),
        "a third to one expert, empty experts": lambda: (np.stack([np.full(200, 1), rng.integers(2, 6, 200)], 1), 8),
        "experts that are not here": lambda: (distinct(50, 12, 3) - 4, 4),
        "none is here": lambda: (np.full((20, 2), 7), 4),
        "single token": lambda: (np.array([[3, 0]]), 16),
        "fewer choices than experts": lambda: (distinct(3, 16, 2), 16),
        "one expert": lambda: (np.zeros((9, 1), int), 1),
        "the same expert twice": lambda: (np.zeros((40, 2), int), 3),
    }[name]()


CASES = [
    "ordinary",
    "all to one expert",
    "a third to one expert, empty experts",
    "experts that are not here",
    "none is here",
    "single token",
    "fewer choices than experts",
    "one expert",
    "the same expert twice",
]


def inputs(name):
    rng = np.random.default_rng(1)
    index, experts = index_of(name, rng)
    x, dy = rng.standard_normal((2, len(index), D))
    gate, up = rng.standard_normal((2, experts, D, F))
    return x, index, rng.random(index.shape), gate, up, rng.standard_normal((experts, F, D)), dy


def expected(x, index, weight, gate, up, down, dy):
    """The sum over choices, and the chain rule by hand, one choice at a time."""
    y, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weight)
    dgate, dup, ddown = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for t, k in np.ndindex(index.shape):
        e, w = index[t, k], weight[t, k]
        if not 0 <= e < len(gate):
            continue
        g, u = x[t] @ gate[e], x[t] @ up[e]
        s = 1 / (1 + np.exp(-g))
        h = g * s * u
        y[t] += w * (h @ down[e])
        dweight[t, k] = (h @ down[e]) @ dy[t]
        ddown[e] += w * np.outer(h, dy[t])
        dh = w * (down[e] @ dy[t])
        dg, du = dh * u * (s + g * s * (1 - s)), dh * g * s
        dgate[e] += np.outer(x[t], dg)
        dup[e] += np.outer(x[t], du)
        dx[t] += gate[e] @ dg + up[e] @ du
    return y, dx, dweight, dgate, dup, ddown


def value_and_gradients(implementation, **options):
    @jax.jit
    def run(x, index, weight, gate, up, down, dy):
        def op(x, weight, gate, up, down):
            return expert_mlp(x, index, weight, gate, up, down, implementation=implementation, **options)

        y, vjp = jax.vjp(op, x, weight, gate, up, down)
        return y, *vjp(dy)

    return run


def temporaries(implementation, **options):
    """Bytes for the value and gradients of 4,096 tokens with four choices each."""
    x, matrix, down = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4096, 32), (4, 32, 64), (4, 64, 32)))
    index, weight = (jax.ShapeDtypeStruct((4096, 4), dtype) for dtype in (jnp.int32, jnp.float32))
    run = value_and_gradients(implementation, **options).lower(x, index, weight, matrix, matrix, down, x)
    return run.compile().memory_analysis().temp_size_in_bytes


def as_float32(arrays):
    return [jnp.asarray(a, jnp.int32 if a.dtype == int else jnp.float32) for a in arrays]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    arrays = inputs(name)
    got = value_and_gradients(implementation)(*as_float32(arrays))
    for actual, wanted in zip(got, expected(*arrays), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "xla") for name in CASES), ("experts that are not here", "grouped")]
)
def test_chunks_of_tokens_change_nothing(name, implementation, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 3)
    arrays = inputs(name)
    got = value_and_gradients(implementation)(*as_float32(arrays))
    for actual, wanted in zip(got, expected(*arrays), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_chunks_keep_nothing_but_the_inputs(monkeypatch):
    """What the gradient of many tokens needs beside its arguments, by the compiler's count."""
    whole = temporaries("xla")
    monkeypatch.setattr(chunks, "ROWS", 256)
    assert temporaries("xla") < 0.25 * whole


@pytest.mark.parametrize("implementation", ["xla", "grouped"])
@pytest.mark.parametrize("expected_choices", [1, 12, 60, 10**6])
def test_any_number_of_expected_choices_is_exact(expected_choices, implementation):
    arrays = inputs("experts that are not here")
    got = value_and_gradients(implementation, expected_choices=expected_choices)(*as_float32(arrays))
    for actual, wanted in zip(got, expected(*arrays), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["a third to one expert, empty experts", "experts that are not here"])
def test_choices_that_have_no_key_in_an_int32_are_sorted_alike(name, monkeypatch):
    _, index, *_, down, _ = arrays = inputs(name)
    by_key = xla.sort(jnp.asarray(index), len(down))
    assert (len(down) + 1) * index.size <= xla.MOST_KEYS == jnp.iinfo(jnp.int32).max + 1
    monkeypatch.setattr(xla, "MOST_KEYS", (len(down) + 1) * index.size - 1)
    for got, wanted in zip(xla.sort(jnp.asarray(index), len(down)), by_key, strict=True):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(value_and_gradients("xla")(*as_float32(arrays)), expected(*arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_many_tokens_are_combined_in_parts(monkeypatch):
    monkeypatch.setattr(xla, "COMBINED", 24)  # of 64 tokens: two parts and a rest
    arrays = inputs("ordinary")
    for actual, wanted in zip(value_and_gradients("xla")(*as_float32(arrays)), expected(*arrays), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_work_is_done_for_the_expected_choices_only():
    """Of a shard: slots for all T·X choices would be experts / local experts times the products."""
    arrays = as_float32(inputs("experts that are not here"))

    def flops(expected_choices):
        run = value_and_gradients("xla", expected_choices=expected_choices)
        return run.lower(*arrays).compile().cost_analysis()["flops"]

    assert flops(50) < 0.6 * flops(None)


@pytest.mark.parametrize(("implementation", "rows"), [("xla", 3), ("xla", 2048), ("grouped", 2048)])
def test_a_shard_of_experts_per_device_sums_to_the_whole(implementation, rows, monkeypatch):
    """Inside shard_map with varying loads (overflow, or another round, on some devices only) and the mesh's type checks on."""
    monkeypatch.setattr(chunks, "ROWS", rows)
    x, index, weight, gate, up, down, dy = inputs("a third to one expert, empty experts")
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Explicit,))

    def local(x, index, weight, gate, up, down):
        first = jax.lax.axis_index("expert") * gate.shape[0]
        choices = {"expected_choices": index.size // 4, "implementation": implementation}
        return jax.lax.psum(expert_mlp(x, index - first, weight, gate, up, down, **choices), "expert")

    @jax.jit
    def run(x, index, weight, gate, up, down, dy):
        sharded = jax.shard_map(local, in_specs=(P(), P(), P(), *[P("expert")] * 3), out_specs=P())
        y, vjp = jax.vjp(lambda x, w, *m: sharded(x, index, w, *m), x, weight, gate, up, down)
        return y, *vjp(dy)

    arrays = as_float32((x, index, weight, gate, up, down, dy))
    specs = [P(), P(), P(), *[P("expert")] * 3, P()]
    with jax.set_mesh(mesh):
        got = run(*(jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)))
    for actual, wanted in zip(got, expected(x, index, weight, gate, up, down, dy), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_absent_experts_are_not_made():
    """What the gradient of a shard needs beside its arguments, by the compiler's count: an eighth of the choices is expected."""
    assert temporaries("grouped", expected_choices=2048) < 0.5 * temporaries("grouped")


def test_the_kernels_of_tpus_are_called():
    """On a simulated chip, in float32: some 10 terms a sum."""
    arrays = inputs("experts that are not here")
    with interpreted("tpu"):
        got = jax.block_until_ready(value_and_gradients("tpu")(*as_float32(arrays)))
    for actual, wanted in zip(got, expected(*arrays), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_hopper_are_called():
    arrays = [a if a.dtype == jnp.int32 else a.astype(jnp.bfloat16) for a in as_float32(inputs("ordinary"))]
    lowered = value_and_gradients("gpu").trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("mosaic_gpu") >= 9  # three products, and two gradients of each


def test_under_scan_and_remat():
    x, index, weight, gate, up, down, _ = as_float32(inputs("ordinary"))

    def loss(x, remat):
        def layer(x, _):
            return x + expert_mlp(x, index, weight, gate, up, down), None

        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x * 0.1, length=2)[0] ** 2)

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(x, remat) for remat in (False, True)]
    np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_refuses_what_does_not_fit():
    x, index, weight, gate, up, down, _ = as_float32(inputs("ordinary"))
    with pytest.raises(ValueError, match="down"):
        expert_mlp(x, index, weight, gate, up, up)
    with pytest.raises(ValueError, match="index and weight"):
        expert_mlp(x, index, weight[:, :1], gate, up, down)
    with pytest.raises(ValueError, match="integer indices"):
        expert_mlp(x, index.astype(jnp.float32), weight, gate, up, down)
    with pytest.raises(Unsupported, match="no implementation 'cuda'; it has xla, tpu, gpu, reference"):
        expert_mlp(x, index, weight, gate, up, down, implementation="cuda")  # pyright: ignore
    with pytest.raises(Unsupported, match="takes bfloat16 or float16"):
        expert_mlp(x, index, weight, gate, up, down, implementation="gpu")
