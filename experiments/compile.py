"""Compiles the whole train step for devices that are not there, and says whether it fits and how fast it could be.

    python -m experiments.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x8

Topologies: TPUs by the chips along each axis of their torus (v5e:2x4, v6e:16x16, v5p:8x8x8, tpu7x:4x8x8), GPUs by slices, hosts and
GPUs of a host (h100:1x8x8, h200:1x128x8). No parameter is made; large models take minutes. Exit code 1: the step does not fit.
"""

import dataclasses
import json
import pathlib
import sys

import jax

from experiments.benches.report import ReportFlags, provenance
from experiments.cli import did_you_mean, parse_argv, run_main
from experiments.compilation.describe import lines
from experiments.compilation.figures import figures
from experiments.compilation.step import DoesNotFit, compile_step
from experiments.config import ExperimentConfig
from experiments.errors import UserError
from kernels_pallas import aot
from kernels_pallas.aot_cluster import CHIPS, Cluster, cluster


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileFlags(ReportFlags):
    topology: str  # devices to compile for, such as v5p:8x8x8, tpu7x:4x8x8, v5e:2x4 or h200:1x128x8

    def __post_init__(self):
        if self.out is not None and not pathlib.Path(self.out).parent.is_dir():
            raise UserError(f"--out={self.out}: no such directory")


def main(argv: list[str]) -> int:
    config, flags = parse_argv(argv, CompileFlags, ExperimentConfig)
    jax.config.update("jax_platforms", "cpu")  # the machine's own devices are not needed, and may be in use
    target = prepare(config, flags.topology)
    try:
        step = compile_step(config, target, lambda line: print(line, file=sys.stderr, flush=True))
        found = figures(config, target, step)
    except DoesNotFit as error:
        found = {"topology": str(target), "fits": False, "error": str(error)}
    if flags.out is not None:
        pathlib.Path(flags.out).write_text(json.dumps({**provenance(), "results": found}, indent=2) + "\n")
    if "error" not in found:
        print("\n".join(lines(found)))
    if not found["fits"]:
        reason = found.get("error") or "peak {peak} of {hbm} bytes".format(**found["memory"])
        print(f"does not fit {target}: {reason}", file=sys.stderr)
    return 0 if found["fits"] else 1


def prepare(config: ExperimentConfig, topology: str) -> Cluster:
    """The cluster; UserError, before anything is compiled, for what cannot be trained there or compiled here."""
    try:
        target = cluster(topology)
        devices = target.devices
    except aot.Unavailable as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        chip = topology.partition(":")[0]
        near = "" if chip in CHIPS else did_you_mean(chip, CHIPS)
        raise UserError(f"--topology={topology}: {error}{near}") from error
    config.check_training()
    config.check_mesh(len(devices), len({device.process_index for device in devices}), platform=devices[0].platform)
    config.check_parameters()
    config.optim.build(config.train.num_steps)  # UserError if its schedule does not fit
    return target


if __name__ == "__main__":
    run_main(main)
