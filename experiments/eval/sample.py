"""A sample at the end of a run."""

from collections.abc import Callable

from experiments.config import ExperimentConfig
from experiments.continuation import Continuation
from experiments.tokenizer import Tokenizer
from mdl.generate import Generator
from mdl.pure import PureModel, Tree
from mdl.sampling import Sampling

SAMPLING = Sampling(temperature=0.8)


def print_sample(
    config: ExperimentConfig, model: PureModel, state: Tree, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Continues `eval.sample_prompt`, drawn from `seed`. Every process takes part; under the mesh of the run."""
    if config.eval.sample_prompt is None:
        return
    ids = tokenizer.encode(config.eval.sample_prompt, bos=config.data.bos)
    length = min(config.eval.sample_tokens, config.model.max_position_embeddings - len(ids))
    if not ids or length < 1:
        say("no sample: eval.sample_prompt has no tokens, or more than model.max_position_embeddings leaves room for")
        return
    row = Continuation(tokenizer, eos_id=tokenizer.eos_id)
    stream = Generator(model, state).stream(
        [ids],
        max_new_tokens=length,
        sampling=SAMPLING,
        seeds=[config.seed % 2**32],
        ended=lambda index: row.finish is not None,
    )
    for _, [token] in stream:
        row.push(token)
    row.end()
    say(f"--- sample: {len(row.ids)} tokens, temperature {SAMPLING.temperature}, seed {config.seed}")
    say(f"{config.eval.sample_prompt}{row.text}")
    say("---")
