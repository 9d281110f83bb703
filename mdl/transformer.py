"""The language model: embedding, an unrolled prefix of dense layers, a scanned stack of equal layers, norm, head, MTP modules."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from kernels_pallas.flash_attention.api import SAVED_NAMES
from mdl import sharding
from mdl.attention.cache import Cache
from mdl.attention.core import Context, Measure
from mdl.attention.dsa import DsaConfig
from mdl.attention.mla import MlaConfig
from mdl.attention.selection import SAVED_NAMES as SELECTION_SAVED_NAMES
from mdl.block import AttentionConfig, Block, BlockStats
from mdl.kernels import KernelsConfig
from mdl.linear import Init, matmul
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.mtp import MtpConfig, MtpModule
from mdl.norm import RmsNorm
from mdl.precision import PrecisionConfig
from mdl.rope import rotary_tables

Remat = Literal["auto", "none", "dots", "attention", "full"]
LONG = 16384  # tokens of a row; beyond, attention costs more than making all the rest again
_KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES, *SELECTION_SAVED_NAMES)
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, _KEEP_ATTENTION
    ),
    "attention": _KEEP_ATTENTION,
    "full": None,  # jax.checkpoint's own default: keep a layer's input only
}


class Output(NamedTuple):
    hidden_BTD: jax.Array  # after the final norm
    stats: BlockStats  # experts: of the stack's layers, the balance loss summed; indexer: of all layers, [L]
    cache: dict[str, Any] | None


class Transformer(nnx.Module):
    """Decoder-only language model. `stack` holds its layers' parameters with a leading layer axis, or each layer for itself."""

    stack: "Block | nnx.Dict"

    def __init__(self, config: "TransformerConfig", *, rngs: nnx.Rngs):
        self.config = config
        self.precision = config.precision
        D, V, eps = config.hidden_size, config.vocab_size, config.rms_norm_eps
        init = Init(rngs, config.initializer_range, config.precision, config.kernels)

        def block(init: Init, mlp: MlpConfig | MoeConfig, layer: int) -> Block:
            return Block(config.attention_of(layer), mlp, D, eps=eps, init=init)

        deep, first, depth = config.moe or config.mlp, config.num_prefix_layers, config.num_stack_layers
        self.embedding = init.normal((V, D), ("vocab", "embed"))
        self.prefix = nnx.Dict({str(i): block(init, config.mlp, i) for i in range(first)})
        if config.layers_differ:
            self.stack = nnx.Dict({str(i): block(init, deep, first + i) for i in range(depth)})
        else:
            self.stack = nnx.vmap(lambda key: block(dataclasses.replace(init, rngs=nnx.Rngs(params=key)), deep, first))(
                jax.random.split(rngs.params(), depth)
            )
        self.final_norm = RmsNorm(D, eps=eps, init=init)
        self.head = None if config.tie_word_embeddings else init.normal((D, V), ("embed", "vocab"))
        modules = config.mtp.num_nextn_predict_layers if config.mtp else 0
        self.mtp = nnx.Dict({str(k): MtpModule(block(init, deep, 0), D, eps=eps, init=init) for k in range(modules)})

    # --- pieces, each usable alone -------------------------------------------------------------------------------------------

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The tokens' rows of the embedding; beyond the vocabulary those of its last token."""
        axes, dtype = self.embedding.axes, self.precision.compute_dtype
        last = self.embedding.shape[0] - 1

        def local(table_VD, tokens_bt):
            table_vD = sharding.gather(table_VD, dtype, *axes)
            row_bt = jnp.clip(tokens_bt, 0, last)
            if not sharding.mesh_is_set():
                return table_vD.at[row_bt].get(mode="promise_in_bounds")
            row_bt = row_bt - jax.lax.axis_index("tensor") * table_vD.shape[0]
            is_here_bt = (row_bt >= 0) & (row_bt < table_vD.shape[0])
            x_btD = table_vD.at[jnp.where(is_here_bt, row_bt, 0)].get(mode="promise_in_bounds")
            return jax.lax.psum(jnp.where(is_here_bt[..., None], x_btD, 0), "tensor")

        return sharding.local(
            local,
            in_specs=(sharding.spec(*axes), sharding.spec("batch", None)),
            out_specs=sharding.spec("batch", None, None),
            vary=sharding.ROWS,
        )(self.embedding[...], tokens_BT)

    @property
    def head_parameter(self) -> nnx.Param:
        """w_DV; w_VD, the embedding, if they are tied."""
        return self.embedding if self.head is None else self.head

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Scores of every token of the vocabulary, [B, T, V] in the logits dtype; training never calls this."""
        w, axes = self.head_parameter[...], self.head_parameter.axes
        if self.head is None:
            w, axes = w.T, axes[::-1]
        return matmul(hidden_BTD, w, axes, self.precision, out_dtype=jnp.dtype(self.precision.logits))

    def context(
        self, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, measure: Measure = "nothing"
    ) -> Context:
        attention = self.config.attention
        rotary = rotary_tables(attention.rope, attention.rotary_dim, positions_BT)
        return Context(positions_BT, segment_ids_BT, rotary, measure)

    def empty_cache(self, batch: int, length: int) -> dict[str, Any]:
        """One buffer per layer; those of the stack have a leading layer axis."""

        def of(layer: Block) -> Cache:
            return layer.attention.empty_cache(batch, length, self.precision.compute_dtype)

        def each(layers: nnx.Dict) -> dict[str, Cache]:
            return {i: of(layer) for i, layer in layers.items()}

        if isinstance(self.stack, nnx.Dict):
            return {"prefix": each(self.prefix), "stack": each(self.stack)}
        depth = self.config.num_stack_layers
        stacked = jax.tree.map(lambda buffer: jnp.zeros((depth, *buffer.shape), buffer.dtype), of(self.stack))
        return {"prefix": each(self.prefix), "stack": stacked}

    def with_layers_apart(self) -> "Transformer":
        """The same model, each layer of the stack with its own parameters: nothing is sliced, and nothing scanned."""
        if isinstance(self.stack, nnx.Dict):
            return self
        graph, state = nnx.split(self.stack)

        def layer(i: int) -> nnx.Module:
            return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))

        model = nnx.merge(*nnx.split(self))
        model.stack = nnx.Dict({str(i): layer(i) for i in range(self.config.num_stack_layers)})
        return model

    # --- the whole -----------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        *,
        measure: Measure = "nothing",
    ) -> Output:
        """Hidden states of a packed batch (segment_ids_BT given), or of the next tokens of cached rows (cache given).

        measure: what indexers are to report of packed batches.
        """
        if (segment_ids_BT is None) == (cache is None):
            raise ValueError("give segment_ids_BT (packed rows) or cache (generation), one of the two")
        context = self.context(positions_BT, segment_ids_BT, measure)
        x_BTD = self.embed(tokens_BT)
        x_BTD, prefix, prefix_cache, selected_BTW = self._run_apart(
            self.prefix, x_BTD, context, cache and cache["prefix"], None
        )
        x_BTD, stack, stack_cache = self._run_stack(x_BTD, context, cache and cache["stack"], selected_BTW)
        experts = _joined([stats.experts for stats in stack])
        if experts is not None:
            experts = experts._replace(balance_loss=jnp.sum(experts.balance_loss))
        stats = BlockStats(experts, _joined([stats.indexer for stats in (*prefix, *stack)]), None)
        new_cache = None if cache is None else {"prefix": prefix_cache, "stack": stack_cache}
        return Output(self.final_norm(x_BTD), stats, new_cache)

    def _run_stack(
        self, x_BTD: jax.Array, context: Context, cache: Any, selected_BTW: jax.Array | None
    ) -> tuple[jax.Array, list[BlockStats], Any]:
        """The stats of a scan are one entry, whose arrays have a leading layer axis."""
        if isinstance(self.stack, nnx.Dict):
            return self._run_apart(self.stack, x_BTD, context, cache, selected_BTW)[:3]
        graph, state = nnx.split(self.stack)

        def layer(x_BTD, layer_state_and_cache):
            layer_state, layer_cache = layer_state_and_cache
            x_BTD, stats, layer_cache = nnx.merge(graph, layer_state)(x_BTD, context, layer_cache, selected_BTW)
            return x_BTD, (stats._replace(selected_BTW=None), layer_cache)  # all of these select, or none does

        layer = self._remat(layer, x_BTD, scanned=self.config.scan_layers)
        if self.config.scan_layers:
            x_BTD, (stats, cache) = jax.lax.scan(layer, x_BTD, (state, cache))
            return x_BTD, [stats], cache
        outputs = []
        for i in range(self.config.num_stack_layers):
            x_BTD, output = layer(x_BTD, jax.tree.map(lambda leaf, i=i: leaf[i], (state, cache)))
            outputs.append(output)
        stats, cache = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return x_BTD, [stats], cache

    def _run_apart(
        self,
        layers: nnx.Dict,
        x_BTD: jax.Array,
        context: Context,
        cache: dict[str, Cache] | None,
        selected_BTW: jax.Array | None,
    ) -> tuple[jax.Array, list[BlockStats], dict[str, Cache | None] | None, jax.Array | None]:
        reports: list[BlockStats] = []
        new_cache: dict[str, Cache | None] = {}
        for i, layer in layers.items():
            run = self._remat(lambda *args, layer=layer: layer(args[0], context, *args[1:]), x_BTD)
            x_BTD, stats, new_cache[i] = run(x_BTD, cache and cache[i], selected_BTW)
            selected_BTW = stats.selected_BTW
            reports.append(jax.tree.map(lambda leaf: leaf[None], stats._replace(selected_BTW=None)))
        return x_BTD, reports, None if cache is None else new_cache, selected_BTW

    def predict_ahead(
        self,
        hidden_BTD: jax.Array,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        *,
        measure: Measure = "nothing",
    ) -> list[tuple[jax.Array, BlockStats]]:
        """Hidden states of each MTP module: entry k - 1 at position t predicts token t + 1 + k.

        tokens_BT holds at t the token t + 1; segment_ids_BT is 0 wherever that token is of another document. The last k positions
        of a document have no input at depth k: they are padding there, in the loads and the balance loss too.
        """
        ahead = []
        for module in self.mtp.values():
            context = self.context(positions_BT, segment_ids_BT, measure)
            run = self._remat(
                lambda h_BTD, e_BTD, module=module, context=context: module(h_BTD, e_BTD, context)[:2], hidden_BTD
            )
            hidden_BTD, stats = run(hidden_BTD, self.embed(tokens_BT))
            ahead.append((hidden_BTD, stats))
            tokens_BT = shift_left(tokens_BT)
            segment_ids_BT = jnp.where(shift_left(segment_ids_BT) == segment_ids_BT, segment_ids_BT, 0)
        return ahead

    def _remat(self, fn: Callable, x_BTD: jax.Array, *, scanned: bool = False) -> Callable:
        """fn, whose first argument is x_BTD, with as much of it recomputed in the backward pass as the config says.

        Devices that split heads share out the tokens of what is kept of x_BTD: each would hold all of it otherwise.
        """
        length, devices = x_BTD.shape[1], sharding.axis_size("tensor")
        remat = self.config.remat_of(length)
        if remat == "none":
            return fn
        whole = sharding.spec("batch", None, None)
        kept = P(sharding.RULES["batch"], "tensor") if devices > 1 and length % devices == 0 else whole

        def run(x_BTD: jax.Array, *args: Any) -> Any:
            return fn(sharding.reshard(x_BTD, whole), *args)

        # Inside a scan nothing can merge the recomputation with the first pass, so the barriers against that are left out.
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=not scanned)
        return lambda x_BTD, *args: run(sharding.reshard(x_BTD, kept), *args)


def _joined(parts: list[Any]) -> Any:
    """Statistics of all layers from those of some after those of others; None where there are none at all."""
    parts = [part for part in parts if part is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if parts else None


def shift_left(x: jax.Array) -> jax.Array:
    """x at t + 1 along the last dim; the last position gets 0."""
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    vocab_size: int = 4096  # tokens V that embedding and head can tell apart; at least the tokenizer's
    hidden_size: int = 256  # width D of the residual stream
    num_hidden_layers: int = 4  # layers L, MTP modules not counted
    max_position_embeddings: int = 2048  # longest sequence
    attention: AttentionConfig = dataclasses.field(default_factory=MlaConfig)  # attention of every layer
    mlp: MlpConfig = dataclasses.field(default_factory=MlpConfig)  # feed-forward network of dense layers
    moe: MoeConfig | None = dataclasses.field(
        default_factory=MoeConfig
    )  # feed-forward of the other layers; none: all dense
    first_k_dense_replace: int = 1  # leading layers that stay dense when the others are mixtures of experts
    mtp: MtpConfig | None = None  # multi-token-prediction modules
    rms_norm_eps: float = 1e-6  # epsilon of the layer norms
    initializer_range: float = 0.006  # standard deviation of every initial matrix
    tie_word_embeddings: bool = False  # the head is the transposed embedding
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)  # dtypes
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)  # ops that run as Pallas kernels
    scan_layers: bool = True  # one compiled layer for the whole stack; off: unrolled, same numbers to rounding
    # recomputed: nothing | all but products and attention | all but attention | everything; auto: nothing, and all but attention in
    # rows of more than 16K tokens
    remat: Remat = "auto"

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.moe and not 0 <= self.first_k_dense_replace < self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} must be below num_hidden_layers={self.num_hidden_layers}"
                " (moe=none for an all-dense model)"
            )

        types = self.attention.indexer_types if isinstance(self.attention, DsaConfig) else None
        if types is not None and (len(types) != self.num_hidden_layers or types[0] == "shared"):
            raise ValueError(
                f"attention.indexer_types={types} must say of each of num_hidden_layers={self.num_hidden_layers} layers what it "
                "has, and begin with full"
            )

    @property
    def num_prefix_layers(self) -> int:
        return self.first_k_dense_replace if self.moe else 0

    @property
    def num_stack_layers(self) -> int:
        return self.num_hidden_layers - self.num_prefix_layers

    def attention_of(self, layer: int) -> AttentionConfig:
        """Of one layer; that of an MTP module is as of layer 0."""
        return self.attention.of_layer(layer) if isinstance(self.attention, DsaConfig) else self.attention

    @property
    def layers_differ(self) -> bool:
        """Whether the layers of the stack cannot be one scan, since some share the indexers of others."""
        return len({self.attention_of(layer) for layer in range(self.num_prefix_layers, self.num_hidden_layers)}) > 1

    def remat_of(self, length: int) -> Remat:
        """What is recomputed in rows of so many tokens."""
        if self.remat == "auto":
            return "attention" if length > LONG else "none"
        return self.remat

    def build(self, rngs: nnx.Rngs) -> Transformer:
        return Transformer(self, rngs=rngs)
