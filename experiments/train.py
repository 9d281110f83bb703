"""The training loop: data, state, then step, log, evaluate and save until the last step."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import agreement, init_from, peers, resume
from experiments.backend import saying_choices, set_up_backend
from experiments.checkpoint import Checkpointer, restore_params, saved_steps
from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.data.pipeline import Data
from experiments.describe import describe
from experiments.errors import UserError
from experiments.eval.held_out import HeldOut
from experiments.eval.sample import print_sample
from experiments.feed import Feed
from experiments.interrupt import Interrupt
from experiments.loading import ModelSource
from experiments.meter import Meter, Profiler
from experiments.metrics import NoMetricsWriter
from experiments.paths import local_path
from experiments.peak_flops import find_peak
from experiments.plot import plot_at_end
from experiments.progress import Progress
from experiments.step import init_state, jit_train_step
from mdl.pure import PureModel


def train(config: ExperimentConfig, workdir: str | os.PathLike) -> int:
    """Runs, or resumes, `config` in `workdir`; returns the exit code (130 and 143 after Ctrl-C and SIGTERM).

    Raises UserError, before anything is compiled or written, for what cannot be trained here or a workdir of another run.
    """
    directory = run_directory(workdir)
    data, source = prepare(config, directory)
    is_main = jax.process_index() == 0
    say = on_first_process(lambda line: print(line, flush=True))
    mesh, model = config.mesh.build(), PureModel(config.model)
    peak = find_peak(list(mesh.devices.flat))
    initial = source.load_arrays(model, mesh) if source else None
    resume.create(config, directory, data)

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        describe(config, data, mesh, peak, say)
        checkpointer = stack.enter_context(Checkpointer(resume.checkpoints(config, directory), config.checkpoint))
        # The initial state is computed once: on a CPU compiling it well would take longer than running it badly.
        quickly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        make_state = jax.jit(
            lambda initial: init_state(config, model, initial), donate_argnums=0, compiler_options=quickly
        )
        restored = checkpointer.restore_latest(resume.abstract_state(lambda: init_state(config, model), mesh))
        resume.report(restored, data, say)
        if initial is not None:
            say(f"the run begins with the parameters of {config.init_from}")
        state = restored.state if restored else make_state(initial)
        del initial  # donated
        done = restored.step if restored else 0

        feed = stack.enter_context(Feed(config, data, mesh, restored.data_state if restored else 0))
        writer = stack.enter_context(
            config.log.build(directory, restored_step=done, run_config=to_json(config))
            if is_main
            else NoMetricsWriter()
        )
        screen = None if is_main else stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(
            Progress(config.train.num_steps, every=config.log.every, first_step=done + 1, file=screen)
        )
        stack.enter_context(saying_choices(progress.say))
        interrupt = stack.enter_context(Interrupt())
        profiled = config.train.profile_steps if is_main else None
        profiler = stack.enter_context(Profiler(profiled, directory / "profile", progress.say))
        meter = Meter(config.train_flops_per_token, peak.flops)
        held_out = HeldOut(config, data, model, mesh)
        train_step = jit_train_step(config, model, mesh)
        # A CPU with virtual devices aborts when many steps are queued, and mixes up collectives that run side by side.
        one_step_in_flight = jax.default_backend() == "cpu"

        def log(step: int, metrics: dict[str, Any], scores: dict[str, Any]) -> None:
            values = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()} | scores
            values |= meter.finished(step)
            writer.write(step, values)
            progress.step(step, values)
            if values["skipped_in_a_row"] >= config.train.max_skipped_steps:
                checkpointer.check(wait=True)
                raise UserError(
                    f"stopped at step {step}: loss or gradient were not finite {config.train.max_skipped_steps} times in a row "
                    f"(train.max_skipped_steps); the last good checkpoint is of step {checkpointer.latest_step() or 'none'}; "
                    "lower optim.learning_rate or look at the data"
                )

        pending: tuple[int, dict[str, Any]] | None = None  # metrics are fetched one step late, to keep the device busy
        for step in range(done + 1, config.train.num_steps + 1):
            is_last = step == config.train.num_steps
            profiler.before(step)
            tokens_seen, batch = meter.waiting_for_data(step, feed.next_batch)
            if one_step_in_flight:
                jax.block_until_ready(state)
                if pending:
                    log(*pending, {})
                    pending = None
            state, metrics = train_step(state, batch, tokens_seen)
            if pending:
                log(*pending, {})
            pending = step, metrics
            profiler.after(step, state)

            if one_step_in_flight and jax.process_count() > 1:
                jax.block_until_ready(state)
            exit_code = interrupt.requested()
            evaluates = held_out.exists and (is_last or step % config.eval.every == 0) and not exit_code
            if evaluates or exit_code or is_last or step % config.checkpoint.every == 0:
                jax.block_until_ready(state)
                meter.pause()
                log(*pending, held_out.scores(state) if evaluates else {})
                pending = None
                if exit_code or is_last or step % config.checkpoint.every == 0:
                    checkpointer.save(
                        step,
                        state,
                        data_state=feed.state,
                        config_json=to_json(config),
                        extra=resume.provenance(data),
                        force=True,
                    )
                meter.resume()
            if exit_code:
                checkpointer.check(wait=True)
                if checkpointer.latest_step() == step:  # what could not be saved is told when the block is left
                    progress.say(f"stopped at step {step} and saved; the same command goes on from here")
                return exit_code
        if done >= config.train.num_steps:
            say(f"{directory} has all of its {done} steps; raise train.num_steps to go on")
        print_sample(config, model, state, data.tokenizer, say)
    if is_main:
        say(plot_at_end(directory))
    return 0


def evaluate(config: ExperimentConfig, workdir: str | os.PathLike) -> int:
    """Prints the held-out scores of the newest checkpoint in `workdir`; writes nothing."""
    directory = run_directory(workdir)
    checkpoints = resume.checkpoints(config, directory)
    if not saved_steps(checkpoints):
        raise UserError(f"--workdir={directory}: no checkpoint to evaluate")
    data, _ = prepare(config, directory)
    say = on_first_process(lambda line: print(line, flush=True))
    mesh = config.mesh.build()
    with jax.set_mesh(mesh):
        model = PureModel(config.model)
        held_out = HeldOut(config, data, model, mesh)
        if not held_out.exists:
            raise UserError("data.source: no document is held out, there is nothing to evaluate on")
        abstract = resume.abstract_state(jax.jit(lambda: model.init(jax.random.key(config.seed))), mesh)
        restored = restore_params(checkpoints, abstract)
        say(f"evaluating the checkpoint of step {restored.step}")
        state = restored.state
        if config.train.ema_decay is not None:
            averaged = restore_params(checkpoints, abstract, step=restored.step, ema=True, cast=True)
            state["ema"] = averaged.state["params"]
        started = time.monotonic()
        scores = held_out.scores(state).items()
        scores = "  ".join(f"{name} {value:.4f}" for name, value in scores if np.ndim(value) == 0)
        say(f"{scores}  ({time.monotonic() - started:.0f} s)")
    return 0


def prepare(config: ExperimentConfig, directory: pathlib.Path) -> tuple[Data, ModelSource | None]:
    """Refuses what cannot work, in the order of cost; returns the corpus, and where a new run takes its parameters from."""
    config.check_training()
    config.check_mesh(jax.device_count(), jax.process_count())
    config.check_parameters()
    config.optim.build(config.train.num_steps)  # UserError if its schedule does not fit
    with peers.together():
        config.log.check()
        resume.check_directory(config, directory)
        steps = saved_steps(resume.checkpoints(config, directory))
        source = None if steps else init_from.find_source(config)
        data = config.data.build(
            config.train.seq_len,
            config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            say=on_first_process(lambda line: print(line, file=sys.stderr, flush=True)),
        )
        resume.check_tokenizer(config, directory, data)
        if source:
            init_from.check_tokenizer(config, source, data)
    agreement.check_files(data, steps)
    set_up_backend()
    return data, source


def run_directory(workdir: str | os.PathLike) -> pathlib.Path:
    return local_path(workdir, "--workdir", f"name a directory, and checkpoint.directory={os.fspath(workdir)}")


def on_first_process(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` on process 0; on the others nothing is said."""
    return say if jax.process_index() == 0 else lambda line: None
