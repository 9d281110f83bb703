"""Transports of tokens to experts against each other, against one device, and against NumPy in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from models import FAST_COMPILE

from mdl import sharding
from mdl.linear import Init
from mdl.moe.dispatch import check_platform, dispatch
from mdl.moe.experts import Experts
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.moe.transport import Rows
from mdl.moe.transport_all_to_all import AllToAllConfig
from mdl.moe.transport_ragged import EmulatedRaggedConfig, RaggedAllToAllConfig, ragged_by_all_gather
from mdl.moe.transport_ring import RingConfig
from mdl.precision import PrecisionConfig
from mdl.sharding import MeshConfig, spec

B, T, D, F, E, X = 8, 6, 4, 6, 16, 3

TRANSPORTS = {
    "ring": RingConfig(),
    "ring, in parts": RingConfig(num_parts=4),
    "all_to_all": AllToAllConfig(capacity_factor=None),
    "ragged": EmulatedRaggedConfig(),
}
# Room for equal loads, for some of the others not: then the layer makes room for all tokens.
LITTLE = {
    "all_to_all, little room": AllToAllConfig(capacity_factor=1.0),
    "all_to_all, little room, in parts": AllToAllConfig(capacity_factor=0.7, num_parts=2),
    "ragged, little room": EmulatedRaggedConfig(capacity_factor=0.7),
    "ragged, in parts": EmulatedRaggedConfig(num_parts=2),
}
LIMITED = {
    "all_to_all": AllToAllConfig(capacity_factor=0.7, dropless=False),
    "ragged": EmulatedRaggedConfig(capacity_factor=0.7, dropless=False),
}
MESHES = {
    "expert": {"data": 1, "expert": 8},
    "data, expert": {"data": 2, "expert": 4},
    "fsdp, expert": {"data": 1, "fsdp": 4, "expert": 2},
    "expert, tensor": {"data": 1, "expert": 4, "tensor": 2},
}


def index_of(loads: str) -> np.ndarray:
    """[B, T, X] choices; E is none."""
    rng = np.random.default_rng(0)
    distinct = np.stack([rng.permutation(E)[:X] for _ in range(B * T)]).reshape(B, T, X)
    if loads == "ordinary":
        return distinct
    if loads == "equal":  # choices in turn, two devices' worth of experts apart
        return (np.arange(B * T).reshape(B, T, 1) + np.arange(X) * 5) % E
    if loads == "idle experts":  # only experts 5 to 8
        return 5 + distinct % 4
    if loads == "one expert":
        return np.concatenate([np.full((B, T, 1), 9), np.full((B, T, X - 1), E)], axis=-1)
    assert loads == "padding"
    return np.where(np.arange(T)[None, :, None] < np.array([6, 1, 0, 3, 6, 6, 2, 5])[:, None, None], distinct, E)


LOADS = ["ordinary", "equal", "idle experts", "one expert", "padding"]


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Arguments and the cotangent of the output, float64."""
    rng = np.random.default_rng(1)
    shapes = {
        "x": (B, T, D),
        "weight": (B, T, X),
        "gate": (E, D, F),
        "up": (E, D, F),
        "down": (E, F, D),
        "dy": (B, T, D),
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def truth(loads: str, kept_BTX: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """y and all gradients, dense over experts, from the equations; `kept_BTX` leaves choices out."""
    a, index = arrays(), index_of(loads)
    chosen = (index[..., None] == np.arange(E)) & (True if kept_BTX is None else kept_BTX[..., None])
    weight_BTE = np.einsum("btx,btxe->bte", a["weight"], chosen)
    g, u = (np.einsum("btd,edf->btef", a["x"], a[name]) for name in ("gate", "up"))
    s = 1 / (1 + np.exp(-g))
    h = g * s * u
    y_BTED = np.einsum("btef,efd->bted", h, a["down"])
    dh = np.einsum("bte,btd,efd->btef", weight_BTE, a["dy"], a["down"])
    dg, du = dh * u * (s + g * s * (1 - s)), dh * g * s
    return {
        "y": np.einsum("bte,bted->btd", weight_BTE, y_BTED),
        "x": np.einsum("btef,edf->btd", dg, a["gate"]) + np.einsum("btef,edf->btd", du, a["up"]),
        "weight": np.einsum("btxe,bted,btd->btx", chosen, y_BTED, a["dy"]),
        "gate": np.einsum("btd,btef->edf", a["x"], dg),
        "up": np.einsum("btd,btef->edf", a["x"], du),
        "down": np.einsum("bte,btef,btd->efd", weight_BTE, h, a["dy"]),
    }


@functools.cache
def compiled(transport, dtype: str):
    """(x, index, weight, matrices, dy) -> y, gradients of x, weight and the matrices, traffic; under a mesh."""
    precision = PrecisionConfig(param=dtype, compute=dtype)  # pyright: ignore[reportArgumentType]
    experts = nnx.eval_shape(lambda: Experts(E, D, F, init=Init(nnx.Rngs(0), 1.0, precision)))
    graph, state = nnx.split(experts)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def value_and_gradients(x, index, weight, matrices, dy):
        def layer(x, weight, matrices):
            nnx.replace_by_pure_dict(state, matrices)
            return dispatch(x, index, weight, nnx.merge(graph, state), transport)

        y, vjp, traffic = jax.vjp(layer, x, weight, matrices, has_aux=True)
        return y, *vjp(dy), traffic

    return value_and_gradients


def run(transport, mesh: dict[str, int], loads: str, dtype: str, permutation: np.ndarray | None = None):
    """({"y", gradients}, traffic) of the layer on a mesh."""
    a, index = {name: value.astype(dtype) for name, value in arrays().items()}, index_of(loads)
    matrices = {f"{name}_{'EFD' if name == 'down' else 'EDF'}": a[name] for name in ("gate", "up", "down")}
    if permutation is not None:  # expert i becomes number permutation[i]
        index = np.append(permutation, E)[index]
        matrices = {name: matrix[np.argsort(permutation)] for name, matrix in matrices.items()}
    mesh_in_use = build(mesh)
    with jax.enable_x64(dtype == "float64"), jax.set_mesh(mesh_in_use):
        put = {"gate_EDF": spec("experts", "embed", "mlp"), "up_EDF": spec("experts", "embed", "mlp")}
        put["down_EFD"] = spec("experts", "mlp", "embed")
        matrices = {n: jax.device_put(m, NamedSharding(mesh_in_use, put[n])) for n, m in matrices.items()}
        x, index, weight, dy = (
            jax.device_put(rows, NamedSharding(mesh_in_use, spec("batch", None, None)))
            for rows in (a["x"], index, a["weight"], a["dy"])
        )
        y, dx, dweight, dmatrices, traffic = jax.device_get(compiled(transport, dtype)(x, index, weight, matrices, dy))
    if permutation is not None:
        dmatrices = {name: matrix[permutation] for name, matrix in dmatrices.items()}
    return {"y": y, "x": dx, "weight": dweight} | {name[:-4]: matrix for name, matrix in dmatrices.items()}, traffic


def build(mesh: dict[str, int]):
    return MeshConfig(**mesh).build(jax.devices()[: math.prod(mesh.values())])


ONE = {"data": 1}


def rows_needed(loads: str, num_owners: int) -> int:
    """Pairs of a token and a device that owns an expert that it chose."""
    index = index_of(loads)
    return sum(len({e * num_owners // E for e in token if e < E}) for token in index.reshape(-1, X).tolist())


CASES = [
    *((name, "expert", LOADS) for name in TRANSPORTS),
    *((name, "data, expert", LOADS) for name in LITTLE),
    *((name, mesh, ["padding"]) for name in ("all_to_all", "ragged") for mesh in ("fsdp, expert", "expert, tensor")),
]


@pytest.mark.parametrize(("name", "mesh", "all_loads"), CASES)
def test_values_gradients_and_rows_moved(name, mesh, all_loads):
    for loads in all_loads:
        got, traffic = run((TRANSPORTS | LITTLE)[name], MESHES[mesh], loads, "float64")
        for part, want in truth(loads).items():
            np.testing.assert_allclose(
                got[part], want, rtol=0, atol=1e-10 * np.abs(want).max(), err_msg=f"{loads} {part}"
            )
        owners = MESHES[mesh]["expert"]
        assert traffic.dropped == 0
        assert traffic.moved == (B * T * owners if "ring" in name else rows_needed(loads, owners))


@pytest.mark.parametrize("name", ["ring", "all_to_all", "ragged"])
def test_float32_is_as_exact_as_on_one_device(name):
    """Norms of errors against the truth, at most twice those of one device: the same sums in another order."""
    plain, _ = run(RingConfig(), ONE, "ordinary", "float32")
    got, _ = run(TRANSPORTS[name], MESHES["data, expert"], "ordinary", "float32")
    for part, want in truth("ordinary").items():
        error, plain_error = (np.linalg.norm(values[part] - want) for values in (got, plain))
        assert error <= 2 * plain_error, part


@pytest.mark.parametrize("name", TRANSPORTS)
def test_numbers_of_experts_mean_nothing(name):
    want, _ = run(TRANSPORTS[name], MESHES["expert"], "ordinary", "float64")
    permutation = np.random.default_rng(2).permutation(E)
    got, _ = run(TRANSPORTS[name], MESHES["expert"], "ordinary", "float64", permutation)
    for part, value in want.items():
        np.testing.assert_allclose(got[part], value, rtol=0, atol=1e-10 * np.abs(value).max(), err_msg=part)


def kept(name: str, loads: str, num_owners: int, room: int) -> np.ndarray:
    """[B, T, X]: choices that find room, on a mesh of `data` x `expert`, one token after the other."""
    index, found = index_of(loads), np.zeros((B, T, X), bool)
    rows = B // 8  # of a device
    for group in range(8 // num_owners):
        taken = np.zeros((num_owners, num_owners), int)  # [from, to]
        for source in range(num_owners):
            first = (group * num_owners + source) * rows
            for b, t in np.ndindex(rows, T):
                owners = index[first + b, t] * num_owners // E
                for owner in set(owners[owners < num_owners].tolist()):
                    used = taken[source, owner] if name == "all_to_all" else taken[:, owner].sum()
                    if used < (room if name == "all_to_all" else room * num_owners):
                        taken[source, owner] += 1
                        found[first + b, t, owners == owner] = True
    return found


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("name", LIMITED)
def test_what_finds_no_room_is_dropped_and_counted(name, loads):
    mesh = MESHES["data, expert"]
    got, traffic = run(LIMITED[name], mesh, loads, "float64")
    found = kept(name, loads, mesh["expert"], math.ceil(0.7 * T * X / mesh["expert"]))
    for part, want in truth(loads, found).items():
        np.testing.assert_allclose(got[part], want, rtol=0, atol=1e-10 * np.abs(want).max(), err_msg=part)
    assert traffic.dropped == np.sum((index_of(loads) < E) & ~found)
    assert traffic.dropped > 0 or loads not in ("idle experts", "one expert")


@functools.cache
def visits(transport):
    """(x_BTD, index_BTX) -> each token times the number of devices that it visited, and the traffic of each device."""

    def local(x_btD, index_btX):
        def compute(rows):
            owner_MX = rows.index_MX // (E // 8)
            return rows.x_MD * jnp.any(owner_MX == jax.lax.axis_index("expert"), axis=1, keepdims=True)

        rows = Rows(x_btD[0], index_btX[0], jnp.zeros_like(index_btX[0], jnp.float32))
        y_tD, traffic = transport.carry(rows, compute, E // 8)
        return jax.tree.map(lambda a: jax.lax.psum(sharding.varying(a)[None], "tensor"), (y_tD, traffic))

    rows = spec("batch", None, None)
    layer = sharding.local(local, in_specs=(rows, rows), out_specs=(rows, spec("batch")))
    return jax.jit(lambda *arrays: layer(*(jax.reshard(a, rows) for a in arrays)), compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("loads", LOADS)
def test_rows_arrive_bit_for_bit(loads):
    """Rows that a device got come back as they were, each from every device that it needed and from no other."""
    index = index_of(loads)
    devices = [[len({e // 2 for e in token if e < E}) for token in row] for row in index.tolist()]
    x = arrays()["x"].astype(np.float32)
    with jax.set_mesh(build(MESHES["expert"])):
        for transport in (RingConfig(), LITTLE["all_to_all, little room"], CheckedConfig(capacity_factor=0.7)):
            got, traffic = jax.device_get(visits(transport)(x, index))
            # Sums of at most three equal numbers are rounded once, whatever the order.
            np.testing.assert_array_equal(got, x * np.array(devices, np.float32)[..., None])
            if transport != RingConfig():
                np.testing.assert_array_equal(traffic.moved, np.sum(devices, axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedConfig(EmulatedRaggedConfig):
    """NaN wherever the arguments break the contract of `jax.lax.ragged_all_to_all`."""

    @staticmethod
    def primitive(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        there = jax.lax.all_to_all(output_offsets, axis_name, 0, 0, tiled=True)
        size_of_others = jax.lax.all_to_all(send_sizes, axis_name, 0, 0, tiled=True)
        good = jnp.all(recv_sizes == size_of_others) & jnp.all(send_sizes >= 0)
        for starts, sizes, rows in ((input_offsets, send_sizes, operand), (there, recv_sizes, output)):
            good &= jnp.all(starts >= 0) & jnp.all(starts + sizes <= rows.shape[0])
            good &= jnp.all(starts[1:] >= (starts + sizes)[:-1])  # nothing is written twice
        arguments = operand, output, input_offsets, send_sizes, output_offsets, recv_sizes
        got = ragged_by_all_gather(*arguments, axis_name=axis_name)
        return jnp.where(good, got, jnp.nan if got.dtype == jnp.float32 else -1)


def test_group_limits_keep_tokens_within_groups_of_devices():
    """Four groups of experts on eight devices, one of them for a token, which takes all of its experts: two devices each."""
    router = RouterConfig(n_routed_experts=E, num_experts_per_tok=4, n_group=4, topk_group=1)
    config = MoeConfig(moe_intermediate_size=F, n_shared_experts=0, router=router, transport=TRANSPORTS["all_to_all"])
    with jax.set_mesh(build(MESHES["expert"])):
        layer = config.build(D, init=Init(nnx.Rngs(0), 1.0, PrecisionConfig(compute="float32")))
        x_BTD = jax.reshard(arrays()["x"].astype(np.float32), spec("batch", None, None))
        _, routing, traffic = nnx.jit(lambda layer, x_BTD: layer(x_BTD))(layer, x_BTD)
    assert traffic.moved == 2 * B * T
    assert np.sum(routing.load_E) == 4 * B * T


def test_the_emulation_does_what_the_collective_promises():
    """The example in the documentation of `jax.lax.ragged_all_to_all`."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    operand, output = np.array([[1, 2, 2], [3, 4, 0]]), np.array([[0, 0, 0, 0], [0, 0, 0, 0]])
    ways = (
        np.array([[0, 1], [0, 1]]),
        np.array([[1, 2], [1, 1]]),
        np.array([[0, 0], [1, 2]]),
        np.array([[1, 1], [2, 1]]),
    )

    def local(*arguments):
        return ragged_by_all_gather(*(a[0] for a in arguments), axis_name="i")[None]

    with jax.set_mesh(mesh):
        split = [jax.device_put(a, NamedSharding(mesh, jax.P("i", None))) for a in (operand, output, *ways)]
        got = jax.jit(jax.shard_map(local, in_specs=jax.P("i", None), out_specs=jax.P("i", None)))(*split)
    np.testing.assert_array_equal(got, [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_a_platform_without_the_collective_is_told_what_works():
    for transport in TRANSPORTS.values():
        check_platform(transport, "cpu")
    for platform in ("gpu", "tpu"):
        check_platform(RaggedAllToAllConfig(), platform)
    with pytest.raises(ValueError, match="does not run on cpu; RingConfig, AllToAllConfig, EmulatedRaggedConfig do"):
        check_platform(RaggedAllToAllConfig(), "cpu")
    with pytest.raises(ValueError, match="RaggedAllToAllConfig does not run on cpu"):
        run(RaggedAllToAllConfig(), MESHES["expert"], "ordinary", "float32")


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_no_room_at_all_is_refused(factor):
    for config in (AllToAllConfig, EmulatedRaggedConfig):
        with pytest.raises(ValueError, match=f"capacity_factor={factor} must be positive; none"):
            config(capacity_factor=factor)


def test_no_part_at_all_is_refused():
    with pytest.raises(ValueError, match="num_parts=0 must be at least 1"):
        RingConfig(num_parts=0)
