"""Joining several hosts into one run."""

import dataclasses
import os
from collections.abc import Mapping

from experiments.environment import Environment
from experiments.errors import UserError
from experiments.tpu_slice import count_hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedFlags:
    coordinator_address: str | None = None  # host:port of process 0; needed only where the cluster does not tell
    num_processes: int | None = None  # processes of the run, with coordinator_address
    process_id: int | None = None  # this process, from 0, with coordinator_address


def launched_on_several_hosts(environment: Mapping[str, str]) -> bool:
    """Whether a TPU pod, SLURM or Open MPI started this process as one of several."""
    tpu_workers = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    return (
        tpu_workers > 1
        or int(environment.get("SLURM_NTASKS", "1")) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "JAX_COORDINATOR_ADDRESS" in environment
    )


def check_slurm(environment: Mapping[str, str]) -> None:
    """UserError in a job of several tasks if neither srun nor anything else started this process: JAX would not find the others."""
    tasks = environment.get("SLURM_NTASKS", "1")
    others = {"SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"}
    if int(tasks) > 1 and not others & set(environment):
        raise UserError(
            f"this SLURM job has {tasks} tasks, and srun did not start this process as one of them; put srun in front of the "
            "command, or SLURM_NTASKS=1 to run it alone"
        )


def initialize(flags: DistributedFlags) -> None:
    """Connects this process with the others, before any device is used; does nothing for a run of one process."""
    given = (flags.coordinator_address, flags.num_processes, flags.process_id)
    if any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator_address, --num_processes and --process_id belong together; give all three")
        _connect(*given)
    elif launched_on_several_hosts(os.environ) or count_hosts(Environment.find()) > 1:
        check_slurm(os.environ)
        _connect()


def _connect(*given) -> None:
    import jax

    from experiments import peers

    peers.explain_abort(
        lambda: "not all processes of this run have come within 5 minutes; look at what they said, and start all again"
    )
    jax.distributed.initialize(*given)
