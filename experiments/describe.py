"""What a run says about itself before it starts."""

import gzip
from collections.abc import Callable

from jax.sharding import Mesh

from experiments.cli import format_config
from experiments.config import ExperimentConfig
from experiments.data.pipeline import Data
from experiments.peak_flops import Peak
from experiments.progress import format_count
from mdl.flops import cache_bytes_per_token, count_parameters


def describe(config: ExperimentConfig, data: Data, mesh: Mesh, peak: Peak, say: Callable[[str], None]) -> None:
    """The resolved config, the model's size, the corpus, the devices."""
    say(format_config(config))
    count, train = count_parameters(config.model), config.train
    mtp = f" + {format_count(count.mtp)} MTP" if count.mtp else ""
    say(
        f"model: {format_count(count.total)} parameters{mtp}, {format_count(count.active)} active per token, "
        f"{format_count(config.train_flops_per_token)}FLOP per trained token, "
        f"{cache_bytes_per_token(config.model)} bytes of cache per token"
    )
    tokens = train.num_steps * train.batch_size * train.seq_len
    if data.tokens_per_epoch:
        say(
            f"data: {format_count(data.tokens_per_epoch)} training tokens in {data.num_train_rows} rows of {train.seq_len} + 1, "
            f"{len(data.validation_rows())} held-out rows ({data.validation_bytes} bytes); "
            f"this run sees {format_count(tokens)} tokens, {tokens / data.tokens_per_epoch:.2f} epochs"
        )
    if data.validation_bytes:
        text = "".join(data.validation_texts()).encode()
        bits = 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
        say(f"to beat: gzip -9 packs the held-out text into {bits:.3f} bits per byte")
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    say(f"devices: {mesh.devices.size} {mesh.devices.flat[0].device_kind} ({shape})")
    say(peak.line)
    if config.model.moe and config.model.moe.router.forced_balance:
        say(
            "warning: model.moe.router.forced_balance sends tokens to experts in turn, not to those they fit; for benchmarks only"
        )
