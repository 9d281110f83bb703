"""The whole train step of a config, compiled for a cluster from shapes alone."""

import dataclasses
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.compilation.memory import Memory
from experiments.config import ExperimentConfig
from experiments.feed import abstract_batch
from experiments.resume import abstract_state
from experiments.step import init_state, jit_train_step
from kernels_pallas.aot_cluster import Cluster
from mdl.pure import PureModel


class DoesNotFit(Exception):  # noqa: N818 (what is said of the step, not that something broke)
    """The compiler cannot place the program in the memory of a device; the message is its own first line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    mesh: Mesh
    trace_seconds: float  # tracing and lowering
    compile_seconds: float
    processor_seconds: float  # of all cores, for both
    memory: Memory
    text: str  # optimized HLO
    flops_once: float | None  # the compiler's own count, in which every loop runs once; XLA:GPU gives none


def compile_step(config: ExperimentConfig, cluster: Cluster, say: Callable[[str], None]) -> CompiledStep:
    """As `train` builds it, with a state and a batch that are never made. Raises DoesNotFit."""
    began, processor_began = time.perf_counter(), time.process_time()
    with cluster.compiling():
        mesh, model = config.mesh.build(cluster.devices), PureModel(config.model)
        # The schedules' constants are made here: under the mesh they would be put on devices that are not there.
        step = jit_train_step(config, model, mesh)
        with jax.set_mesh(mesh):
            state = abstract_state(lambda: init_state(config, model), mesh)
            tokens_seen = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, P()))
            traced = step.trace(state, abstract_batch(config.train, mesh), tokens_seen)
            lowered = traced.lower(lowering_platforms=(cluster.chip.platform,))
            trace_seconds = time.perf_counter() - began
            say(f"traced in {trace_seconds:.0f} s; compiling for {cluster}, which may take minutes")
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise DoesNotFit(_first_sentence(str(error))) from error
                raise
    return CompiledStep(
        mesh=mesh,
        trace_seconds=trace_seconds,
        compile_seconds=time.perf_counter() - began - trace_seconds,
        processor_seconds=time.process_time() - processor_began,
        memory=Memory.of(compiled),
        text=compiled.as_text() or "",
        flops_once=(compiled.cost_analysis() or {}).get("flops"),
    )


def _first_sentence(message: str) -> str:
    """`RESOURCE_EXHAUSTED: ...: Ran out of memory in memory space hbm. Used 120G of 95G hbm. ...` without what lists buffers."""
    found = re.search(r"Ran out of memory.*?(?:\.\s|$).*?(?:hbm\.|$)", message, re.MULTILINE)
    return (found[0] if found else message.splitlines()[0]).strip()
