"""One mixture-of-experts layer: router, dispatch, experts and shared experts, forward and backward, in tokens per second.

Without a config, the layers of the two small models that `benchmarks/rivals/torch_moe.py` times in torch, or others by flags. With
`--config=FILE.py`, the layer of that model on a micro-batch of its training, and then its whole train step.

Real routing (an untrained router's, on random rows) stands beside forced balance, and our expert products beside the same layer
with `jax.lax.ragged_dot` and, on TPU and GPU, with the kernels of `grouped_gemm`, in turns. On several devices every transport is
timed too, experts split over all of them; `JAX_NUM_CPU_DEVICES=8` in the environment makes eight of a CPU, which share its cores:
then only traffic compares.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.backend import set_up_backend
from experiments.benches import step
from experiments.benches.report import BenchFlags, interleaved_seconds, report
from experiments.cli import parse_argv, parse_flags
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from experiments.step import COMPILER_OPTIONS
from kernels_pallas import Unsupported, expert_mlp
from mdl import sharding
from mdl.linear import Init
from mdl.moe.dispatch import TransportConfig, check_platform
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.precision import PrecisionConfig
from mdl.sharding import MeshConfig, spec

ROUTINGS = ("real", "forced balance")
STD = 0.02  # of the parameters, as the rival's; rows are standard normal
BALANCE_ALPHA = 1e-4  # of the sequence-wise balance loss (V3 report, section 4.2)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeFlags(BenchFlags):
    ragged_dot: bool = True  # measure it too; outside TPUs it multiplies every row by every matrix
    limit_seconds: float = 120  # no further repetition of a layer's or step's turns begins after so long

    def __post_init__(self):
        super().__post_init__()
        if not self.limit_seconds > 0:
            raise UserError(f"--limit_seconds={self.limit_seconds} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFlags(MoeFlags):
    hidden_size: tuple[int, ...] = (256, 512)  # widths D, one for each layer
    moe_intermediate_size: tuple[int, ...] = (176, 256)  # widths F of one expert, one for each layer
    n_routed_experts: int = 16  # experts E
    num_experts_per_tok: int = 4  # experts X that each token visits
    n_shared_experts: int = 1  # experts that every token visits
    n_group: int = 4  # expert groups G; 1 means no groups
    topk_group: int = 2  # groups that a token may use
    batch: int = 8  # rows
    seq_len: int = 256  # tokens of a row
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and operands; parameters are float32

    def __post_init__(self):
        super().__post_init__()
        if len(self.hidden_size) != len(self.moe_intermediate_size):
            raise UserError(
                f"--hidden_size={_listed(self.hidden_size)} and --moe_intermediate_size="
                f"{_listed(self.moe_intermediate_size)} must have as many values, one for each layer"
            )
        for name in ("hidden_size", "batch", "seq_len"):
            value = getattr(self, name)
            if not value or (min(value) if isinstance(value, tuple) else value) < 1:
                raise UserError(f"--{name}={_listed(value)} must be at least 1")
        _ = self.layers  # what their configs refuse is refused here

    @property
    def layers(self) -> "list[Layer]":
        router = RouterConfig(
            n_routed_experts=self.n_routed_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        precision = PrecisionConfig(compute=self.dtype)
        return [
            Layer(
                hidden_size=D,
                moe=MoeConfig(moe_intermediate_size=F, n_shared_experts=self.n_shared_experts, router=router),
                precision=precision,
                batch=self.batch,
                seq_len=self.seq_len,
            )
            for D, F in zip(self.hidden_size, self.moe_intermediate_size, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer and the rows that it is given."""

    hidden_size: int
    moe: MoeConfig
    precision: PrecisionConfig
    batch: int
    seq_len: int

    @property
    def case(self) -> Row:
        """What a result says of it."""
        router = self.moe.router
        return {
            "hidden_size": self.hidden_size,
            "moe_intermediate_size": self.moe.moe_intermediate_size,
            "n_routed_experts": router.n_routed_experts,
            "num_experts_per_tok": router.num_experts_per_tok,
            "n_shared_experts": self.moe.n_shared_experts,
            "dtype": self.precision.compute,
            "tokens": self.batch * self.seq_len,
        }


def main(argv: list[str]) -> None:
    if not any(argument.partition("=")[0] == "--config" for argument in argv):
        flags = parse_flags(argv, LayerFlags)
        set_up_backend()
        report("moe", flags, measure_layers(flags.layers, flags))
        return
    config, flags = parse_argv(argv, MoeFlags, ExperimentConfig)
    config.check_training()
    config.check_mesh(jax.device_count(), jax.process_count())
    layer = layer_of(config)
    set_up_backend()
    results = measure_layers([layer], flags)
    report("moe", flags, {**results, "train_step": measure_steps(config, flags)})


def layer_of(config: ExperimentConfig) -> Layer:
    """The layer of a config's model, and one device's rows of a micro-batch."""
    model = config.model
    if model.moe is None:
        raise UserError("model.moe is none: the model has no mixture-of-experts layer to measure")
    data, fsdp, expert, _ = config.mesh.shape(jax.device_count())
    return Layer(
        hidden_size=model.hidden_size,
        moe=model.moe,
        precision=model.precision,
        batch=config.train.micro_batch_size // (data * fsdp * expert),
        seq_len=config.train.seq_len,
    )


def measure_layers(layers: list[Layer], flags: MoeFlags) -> dict[str, Any]:
    num_devices = jax.device_count()
    one_device = "left out: there is one device"
    return {
        "layers": [row for layer in layers for row in measure_products(layer, flags)],
        "transports": one_device
        if num_devices == 1
        else [row for layer in layers for row in measure_transports(layer, num_devices, flags)],
    }


def measure_products(layer: Layer, flags: MoeFlags) -> Iterator[Row]:
    """On one device: a row for each routing, expert products and pass; of other products maybe why they failed."""
    runs: dict[Any, Callable[[], Any]] = {}
    facts: dict[Any, Row] = {}
    with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
        for routing in ROUTINGS:
            passes, facts[routing, "ours"] = prepare(with_routing(layer, routing))
            runs |= {(routing, "ours", name): run for name, run in passes.items()}
        for products, experts in others(flags).items():
            try:
                with products_by(experts):
                    passes, facts["real", products] = prepare(layer)
                jax.block_until_ready([run() for run in passes.values()])
                runs |= {("real", products, name): run for name, run in passes.items()}
            except (jax.errors.JaxRuntimeError, Unsupported) as reason:  # too much memory, or float32 on a GPU
                yield {**layer.case, "experts": products, "failed": _first_line(reason)}
        times: dict[Any, float] = interleaved_seconds(runs, flags.repeats, limit=flags.limit_seconds)
    for (routing, products, name), seconds in times.items():
        rival = times.get(("real", "ragged_dot", name))
        yield {
            **layer.case,
            "routing": routing,
            "busiest_over_mean": facts[routing, products]["busiest_over_mean"],
            "experts": products,
            "pass": name,
            "ms": 1000 * seconds,
            "tokens_per_second": layer.batch * layer.seq_len / seconds,
            "times_real": times["real", products, name] / seconds,
            "times_ragged_dot": rival and rival / seconds,
        }


def measure_transports(layer: Layer, num_devices: int, flags: MoeFlags) -> Iterator[Row]:
    """Experts split over as many devices as divide them: a row for each transport and pass, or why there is none."""
    expert = math.gcd(num_devices, layer.moe.router.n_routed_experts)
    if expert == 1 or layer.batch % num_devices:
        what = f"{num_devices} devices share neither {layer.moe.router.n_routed_experts} experts nor {layer.batch} rows"
        yield {**layer.case, "unsupported": f"{what} evenly; change --n_routed_experts or --batch"}
        return
    runs: dict[Any, Callable[[], Any]] = {}
    facts: dict[str, Row] = {}
    with jax.set_mesh(MeshConfig(data=None, expert=expert).build()):
        for transport in TransportConfig.__args__:
            name = transport.__name__.removesuffix("Config")
            try:
                check_platform(transport(), jax.default_backend())
            except ValueError as reason:
                yield {**layer.case, "transport": name, "unsupported": str(reason)}
                continue
            moe = dataclasses.replace(layer.moe, transport=transport())
            passes, facts[name] = prepare(dataclasses.replace(layer, moe=moe))
            runs |= {(name, of): run for of, run in passes.items()}
        times: dict[Any, float] = interleaved_seconds(runs, flags.repeats, limit=flags.limit_seconds)
    for name, of in runs:
        yield {
            **layer.case,
            "transport": name,
            "mesh": {"data": num_devices // expert, "expert": expert},
            **facts[name],
            "pass": of,
            "ms": 1000 * times[name, of],
            "tokens_per_second": layer.batch * layer.seq_len / times[name, of],
            "times_ring": times["Ring", of] / times[name, of],
        }


def prepare(layer: Layer) -> tuple[dict[str, Callable[[], Any]], Row]:
    """The two passes of a layer, compiled for the mesh in use, and what one of them counts."""
    init, forward, forward_and_backward = functions(layer)
    params, rest, x_BTD, dy_BTD = jax.jit(init)()
    options = COMPILER_OPTIONS.get(jax.default_backend())
    one_way = jax.jit(forward).lower(params, rest, x_BTD).compile(options)
    both_ways = jax.jit(forward_and_backward).lower(params, rest, x_BTD, dy_BTD).compile(options)
    load_E, traffic = jax.device_get(one_way(params, rest, x_BTD)[1])
    counted = {
        "busiest_over_mean": float(load_E.max() / load_E.mean()),
        "rows_moved": int(traffic.moved),
        "choices_dropped": int(traffic.dropped),
    }
    passes = {
        "forward": functools.partial(one_way, params, rest, x_BTD),
        "forward and backward": functools.partial(both_ways, params, rest, x_BTD, dy_BTD),
    }
    return passes, counted


def functions(layer: Layer) -> tuple[Callable, Callable, Callable]:
    """init() -> (params, rest, x_BTD, dy_BTD), forward(params, rest, x_BTD) and forward_and_backward(params, rest, x_BTD, dy_BTD).

    They return what training uses: the output, the loads and the balance loss; backward, also the gradients of rows and parameters.
    """

    def build() -> nnx.Module:
        return layer.moe.build(layer.hidden_size, init=Init(nnx.Rngs(0), std=STD, precision=layer.precision))

    graph = nnx.split(nnx.eval_shape(build), nnx.Param, ...)[0]
    shape = layer.batch, layer.seq_len, layer.hidden_size

    def init() -> tuple[Any, ...]:
        rows = sharding.optional_sharding(spec("batch", None, None))
        draw = functools.partial(jax.random.normal, shape=shape, dtype=layer.precision.compute_dtype, out_sharding=rows)
        return *nnx.split(build(), nnx.Param, ...)[1:], *map(draw, jax.random.split(jax.random.key(1)))

    def forward(params: Any, rest: Any, x_BTD: jax.Array) -> tuple[Any, Any]:
        y_BTD, routing, traffic = nnx.merge(graph, params, rest, copy=True)(x_BTD)
        return (y_BTD, routing.balance_loss), (routing.load_E, traffic)

    def forward_and_backward(params: Any, rest: Any, x_BTD: jax.Array, dy_BTD: jax.Array) -> Any:
        outputs, transpose, counts = jax.vjp(lambda p, x: forward(p, rest, x), params, x_BTD, has_aux=True)
        return outputs, transpose((dy_BTD, jnp.full_like(outputs[1], BALANCE_ALPHA))), counts

    return init, forward, forward_and_backward


def measure_steps(config: ExperimentConfig, flags: MoeFlags) -> dict[str, Row]:
    """The train step with real routing, with forced balance, and by other products, which may need more memory than there is."""
    layer = layer_of(config)
    rows: dict[str, Row] = {}
    for routing in ROUTINGS:
        moe = with_routing(layer, routing).moe
        rows[routing] = _step(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), flags)
    for products, experts in others(flags).items():
        try:
            with products_by(experts):
                rows[f"real, {products}"] = _step(config, flags)
        except (jax.errors.JaxRuntimeError, Unsupported) as reason:  # their trouble; the run's own were measured
            rows[f"real, {products}"] = {"failed": _first_line(reason)}
    real = rows["real"]["tokens_per_second"]
    return {
        name: {**row, "of_real": row["tokens_per_second"] / real} if "tokens_per_second" in row else row
        for name, row in rows.items()
    }


def _step(config: ExperimentConfig, flags: MoeFlags) -> Row:
    measured = step.measure(config, flags.repeats, limit=flags.limit_seconds)
    return {name: value for name, value in measured.items() if name != "peak_memory_bytes"}  # that of all together


def with_routing(layer: Layer, routing: str) -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forced balance: the result says so
        router = dataclasses.replace(layer.moe.router, forced_balance=routing == "forced balance")
    return dataclasses.replace(layer, moe=dataclasses.replace(layer.moe, router=router))


def others(flags: MoeFlags) -> dict[str, Callable]:
    """What takes the place of `expert_mlp`: our kernels where this platform has them (no run takes them yet), and the rival."""
    platform: Any = jax.default_backend()
    kernels = {"kernels": functools.partial(expert_mlp, implementation=platform)} if platform in ("tpu", "gpu") else {}
    return kernels | ({"ragged_dot": ragged_dot_experts} if flags.ragged_dot else {})


@contextlib.contextmanager
def products_by(experts: Callable) -> Iterator[None]:
    """What is traced meanwhile has these expert products."""
    jax.clear_caches()  # neither is what was traced with the one taken for the other
    try:
        with mock.patch.object(importlib.import_module("mdl.moe.dispatch"), "expert_mlp", experts):
            yield
    finally:
        jax.clear_caches()


def ragged_dot_experts(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weight_TX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    expected_choices: int | None = None,
) -> jax.Array:
    """`kernels_pallas.expert_mlp` as one writes it with `jax.lax.ragged_dot`: choices sorted by expert, rows gathered, and back."""
    del expected_choices  # every choice has a row
    (T, X), E = index_TX.shape, gate_EDF.shape[0]
    here_M = ((index_TX >= 0) & (index_TX < E)).reshape(-1)
    expert_M = jnp.where(here_M, index_TX.reshape(-1), E)
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = jnp.sum(expert_M[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, sizes_E, preferred_element_type=jnp.float32).astype(x_TD.dtype)

    x_MD = x_TD[order_M // X]
    h_MF = jax.nn.silu(product(x_MD, gate_EDF)) * product(x_MD, up_EDF)
    y_MD = jnp.where(here_M[order_M][:, None], product(h_MF, down_EFD), 0)
    y_TXD = y_MD[jnp.argsort(order_M)].reshape(T, X, -1)
    return jnp.sum(y_TXD * weight_TX[..., None], axis=1).astype(x_TD.dtype)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
