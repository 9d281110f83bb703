"""Everything that defines a run, as one frozen tree of dataclasses; each part's Config lives beside the class it builds."""

import dataclasses

import jax

from experiments.checkpoint import CheckpointConfig
from experiments.data.pipeline import DataConfig
from experiments.errors import UserError
from experiments.metrics import LogConfig
from experiments.optim import trainable
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import PiecewiseConfig
from mdl.attention.dsa import DsaConfig
from mdl.flops import train_flops_per_token
from mdl.moe.dispatch import check_platform
from mdl.pure import PureModel
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig

OptimConfig = AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """A batch that grows linearly with the tokens seen, in whole micro-batches (DeepSeek-V3 report, section 4.2)."""

    start_batch_size: int = 3072  # rows of the first steps
    tokens: float = 469e9  # tokens over which the batch grows to train.batch_size

    def __post_init__(self):
        if self.start_batch_size < 1:
            raise UserError(f"start_batch_size={self.start_batch_size} must be at least 1")
        if not self.tokens > 0:
            raise UserError(f"tokens={self.tokens} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = 1000  # optimizer steps; schedules stretch with it
    batch_size: int = 8  # rows of an optimizer step, over all devices
    seq_len: int = 256  # predicted tokens of a row
    grad_accum_steps: int = 1  # micro-batches that a step is split into
    batch_ramp: BatchRampConfig | None = None  # growth of the batch; none: batch_size throughout
    trainable: tuple[str, ...] | None = None  # globs of the parameters that are trained, */indexer/* say; none: all
    ema_decay: float | None = None  # decay of an exponential moving average of the parameters; none: not kept
    max_skipped_steps: int = 10  # stop after so many steps in a row whose loss or gradient is not finite
    profile_steps: tuple[int, int] | None = None  # write a profiler trace of these steps, first:last

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "seq_len", "grad_accum_steps", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.grad_accum_steps:
            raise UserError(f"grad_accum_steps={self.grad_accum_steps} does not divide batch_size={self.batch_size}")
        if self.trainable == ():
            raise UserError("trainable=() trains nothing; none trains every parameter")
        if self.batch_ramp:
            start = self.batch_ramp.start_batch_size
            if start % self.micro_batch_size or start > self.batch_size:
                raise UserError(
                    f"batch_ramp.start_batch_size={start} must be a multiple of the micro-batch "
                    f"(batch_size / grad_accum_steps = {self.micro_batch_size}) and at most batch_size={self.batch_size}"
                )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must lie between 0 and 1; none switches it off")
        if self.profile_steps and not 0 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise UserError(f"profile_steps={self.profile_steps} must be first:last with 0 <= first <= last")

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch, over all devices; constant while the batch ramps."""
        return self.batch_size // self.grad_accum_steps

    def micro_batches_at(self, rows_seen: int) -> int:
        """Micro-batches of the step that begins after `rows_seen` rows: a pure function, so that resuming changes nothing."""
        if self.batch_ramp is None:
            return self.grad_accum_steps
        first = self.batch_ramp.start_batch_size // self.micro_batch_size
        progress = min(rows_seen * self.seq_len / self.batch_ramp.tokens, 1.0)
        return first + int(progress * (self.grad_accum_steps - first))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms beside next-token cross-entropy, with the constants of the DeepSeek-V3 report (section 4.2)."""

    mtp_loss_weight: PiecewiseConfig | None = dataclasses.field(  # lambda of multi-token prediction
        default_factory=lambda: PiecewiseConfig(values=(0.3,))
    )
    aux_loss_alpha: float | None = 1e-4  # alpha of the sequence-wise balance loss
    bias_update_speed: PiecewiseConfig | None = dataclasses.field(  # gamma of the router bias, per step
        default_factory=lambda: PiecewiseConfig(values=(1e-3,))
    )
    z_loss_weight: float | None = None  # weight of the mean log(Z)^2 of the output softmax
    # weight of the KL of attention to the indexer, summed over layers (DeepSeek-V3.2-Exp report, section 2.1: 1)
    indexer_loss_weight: float | None = None

    def __post_init__(self):
        for name in ("aux_loss_alpha", "z_loss_weight", "indexer_loss_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be positive; none switches it off")
        for name in ("mtp_loss_weight", "bias_update_speed"):
            value = getattr(self, name)
            if value is not None and (min(value.values) < 0 or max(value.values) == 0):
                raise UserError(
                    f"{name}.values={value.values} must be positive somewhere and never negative; none switches it off"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 500  # steps between two evaluations; the last step is always evaluated
    batch_size: int | None = None  # rows of an evaluation batch; none: as the micro-batch
    sample_prompt: str | None = "def "  # what the sample at the end of the run continues; none: no sample
    sample_tokens: int = 128  # length of the sample

    def __post_init__(self):
        for name in ("every", "batch_size", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    seed: int = 0  # the one seed: parameters, order of the data, sampling
    init_from: str | None = None  # model whose parameters a new run begins with (run, step, Hugging Face); none: random
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)  # architecture
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # corpus and tokenizer
    optim: OptimConfig = dataclasses.field(default_factory=AdamWConfig)  # optimizer
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)  # weights of the loss terms
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)  # length and batches
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # devices
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)  # what is measured on held-out documents
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)  # when and what is kept
    log: LogConfig = dataclasses.field(default_factory=LogConfig)  # where metrics go

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")

    def check_training(self) -> None:
        """UserError where parts contradict each other or a feature that is switched on would do nothing."""
        model, loss, train = self.model, self.loss, self.train
        if train.seq_len > model.max_position_embeddings:
            raise UserError(
                f"train.seq_len={train.seq_len} is more than model.max_position_embeddings={model.max_position_embeddings}"
            )
        if model.mtp and not loss.mtp_loss_weight:
            raise UserError(
                "model.mtp is set but loss.mtp_loss_weight is none: it would not be trained; set it or model.mtp=none"
            )
        if loss.mtp_loss_weight and not model.mtp:
            raise UserError(
                "loss.mtp_loss_weight is set but model.mtp is none; set model.mtp=MtpConfig or loss.mtp_loss_weight=none"
            )
        if model.mtp and model.mtp.num_nextn_predict_layers >= train.seq_len:
            depth = model.mtp.num_nextn_predict_layers
            raise UserError(f"model.mtp.num_nextn_predict_layers={depth} must be below train.seq_len={train.seq_len}")
        if loss.aux_loss_alpha and not model.moe:
            raise UserError(
                "loss.aux_loss_alpha is set but model.moe is none: nothing to balance; set loss.aux_loss_alpha=none"
            )
        router = model.moe and model.moe.router
        if router and router.n_group > 1 and (router.topk_method == "greedy" or router.topk_group == router.n_group):
            raise UserError(
                f"model.moe.router.n_group={router.n_group} limits nothing with topk_method={router.topk_method} and "
                f"topk_group={router.topk_group}; set n_group=1, or a smaller topk_group with another method"
            )
        if isinstance(model.attention, DsaConfig):
            if not model.attention.warmup and model.attention.index_topk >= train.seq_len:
                raise UserError(
                    f"model.attention.index_topk={model.attention.index_topk} selects every key of train.seq_len={train.seq_len}; "
                    f"set it below, or model.attention={type(model.attention.dense).__name__} for dense attention"
                )
            if not loss.indexer_loss_weight and train.trainable is None:
                raise UserError(
                    "loss.indexer_loss_weight is none: nothing would train the indexers of model.attention=DsaConfig; set it (to 1)"
                )
        elif loss.indexer_loss_weight:
            raise UserError(
                "loss.indexer_loss_weight is set but model.attention has no indexer; set model.attention=DsaConfig or "
                "loss.indexer_loss_weight=none"
            )
        has_bias = router is not None and router.has_bias
        if loss.bias_update_speed and not has_bias:
            raise UserError(
                "loss.bias_update_speed is set but no router has a bias (model.moe with topk_method=noaux_tc); "
                "set loss.bias_update_speed=none"
            )

    def check_parameters(self) -> None:
        """UserError where `train.trainable` names no parameter, or the loss does not fit what it names. Makes shapes only."""
        patterns, loss = self.train.trainable, self.loss
        if patterns is None:
            return
        params = PureModel(self.model).abstract()["params"]
        trainable.check(params, patterns)

        def trains(module: str) -> bool:
            return any(trainable.trains(path, patterns) for path in trainable.paths(params) if f"/{module}/" in path)

        if loss.bias_update_speed and not trains("router"):
            raise UserError(
                "loss.bias_update_speed moves the biases of routers, of which train.trainable trains none; "
                "set loss.bias_update_speed=none"
            )
        if trains("indexer") != bool(loss.indexer_loss_weight):
            raise UserError(
                "train.trainable trains no indexer, but loss.indexer_loss_weight is set; set it to none"
                if loss.indexer_loss_weight
                else "train.trainable trains indexers, but loss.indexer_loss_weight is none; set it (to 1)"
            )

    def check_mesh(self, num_devices: int, num_processes: int = 1, *, platform: str | None = None) -> None:
        """UserError where the batch or a parameter does not divide over the mesh on `num_devices` devices, or what connects them is
        not there on `platform` (none: that of this process)."""
        try:
            data, fsdp, expert, tensor = self.mesh.shape(num_devices)
        except ValueError as error:
            raise UserError(str(error)) from error
        model, attention, rows = self.model, self.model.attention, data * fsdp * expert
        dense = attention.dense if isinstance(attention, DsaConfig) else attention
        heads = getattr(dense, "num_key_value_heads", dense.num_attention_heads)
        index_heads = attention.index_n_heads if isinstance(attention, DsaConfig) else 0
        experts, width = (model.moe.router.n_routed_experts, model.moe.moe_intermediate_size) if model.moe else (0, 0)
        query_latent, latent = (getattr(dense, name, None) or 0 for name in ("q_lora_rank", "kv_lora_rank"))
        for name, value, parts, axis in (
            ("train.batch_size / train.grad_accum_steps", self.train.micro_batch_size, rows, "data x fsdp x expert"),
            ("eval.batch_size", self.eval_batch_size, rows, "data x fsdp x expert"),
            ("model.hidden_size", model.hidden_size, fsdp, "fsdp"),
            ("model.attention.q_lora_rank", query_latent, fsdp, "fsdp"),
            ("model.attention.kv_lora_rank", latent, fsdp, "fsdp"),
            ("model.vocab_size", model.vocab_size, tensor, "tensor"),
            ("model.attention heads", heads, tensor, "tensor"),
            ("model.attention.index_n_heads", index_heads, tensor, "tensor"),
            ("model.mlp.intermediate_size", model.mlp.intermediate_size, tensor, "tensor"),
            ("model.moe.moe_intermediate_size", width, tensor, "tensor"),
            ("model.moe.router.n_routed_experts", experts, expert, "expert"),
        ):
            if value % parts:
                raise UserError(f"{name}={value} is not divisible by mesh {axis}={parts}; change one of them")
        if rows % num_processes:
            raise UserError(
                f"mesh data x fsdp x expert={rows} is not divisible by the {num_processes} processes, each of which reads rows "
                "of its own; change one of them"
            )
        if model.moe and expert > 1:
            router = model.moe.router
            if router.limits_groups and router.n_group % expert and expert % router.n_group:
                raise UserError(
                    f"model.moe.router.n_group={router.n_group} does not fit mesh expert={expert}: a device must hold whole groups "
                    "of experts, or a group lie on whole devices; change one of them"
                )
            try:
                check_platform(model.moe.transport, platform or jax.default_backend())
            except ValueError as error:
                raise UserError(f"model.moe.transport: {error}") from error

    @property
    def train_flops_per_token(self) -> float:
        """Of the model that is trained as `train` says."""
        return train_flops_per_token(
            self.model, self.train.seq_len, lambda path: trainable.trains(path, self.train.trainable)
        )

    @property
    def eval_batch_size(self) -> int:
        return self.eval.batch_size or self.train.micro_batch_size
