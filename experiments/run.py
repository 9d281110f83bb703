"""Trains, or evaluates, one configuration.

    python -m experiments.run --config=configs/tiny.py --workdir=runs/tiny
    python -m experiments.run --config=configs/tiny.py --config.model.attention=GqaConfig --workdir=runs/gqa
    python -m experiments.run --config=configs/tiny.py --workdir=runs/tiny --eval_only

The same command again resumes the run in `workdir`.
"""

import dataclasses
import signal

from experiments.cli import parse_argv, run_main
from experiments.config import ExperimentConfig
from experiments.distributed import DistributedFlags, initialize
from experiments.environment import warn_of_unused_chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(DistributedFlags):
    workdir: str  # where checkpoints, metrics and the resolved config go; an existing run there is resumed
    eval_only: bool = False  # evaluate the newest checkpoint of workdir and leave


def main(argv: list[str]) -> int:
    config, flags = parse_argv(argv, RunFlags, ExperimentConfig)
    config.check_training()
    from experiments.backend import set_up_memory

    set_up_memory()
    initialize(flags)
    from experiments import agreement, peers
    from experiments.resume import what_remains
    from experiments.train import evaluate, train

    try:
        with peers.Watch(lambda: what_remains(config, flags.workdir)):
            agreement.check_start(config, flags.workdir)
            warn_of_unused_chips()  # before the mesh is found too large for a CPU
            return (evaluate if flags.eval_only else train)(config, flags.workdir)
    except KeyboardInterrupt:  # before the first step, or while evaluating: there is nothing to save
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run_main(main)
