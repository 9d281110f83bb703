"""Everything that is known of a compiled step, as JSON has it."""

import dataclasses
from typing import Any

from experiments.compilation.chips import CHIP_RATES
from experiments.compilation.collectives import collectives
from experiments.compilation.hlo import Program
from experiments.compilation.roofline import roofline
from experiments.compilation.step import CompiledStep
from experiments.config import ExperimentConfig
from experiments.peak_flops import peak_flops
from kernels_pallas.aot_cluster import Cluster
from mdl.flops import count_parameters


def figures(config: ExperimentConfig, cluster: Cluster, step: CompiledStep) -> dict[str, Any]:
    """FLOPs, bytes and counts are those of one device and one step, times in seconds."""
    train, rates, num_devices = config.train, CHIP_RATES[cluster.chip.name], len(cluster.devices)
    device = cluster.devices[0]
    peak = peak_flops(device.device_kind)
    assert peak is not None
    tokens = train.batch_size * train.seq_len
    model_flops = tokens * config.train_flops_per_token / num_devices
    program = Program(step.text)
    program_flops, memory_bytes = program.product_flops(), program.memory_bytes()
    traffic = collectives(program, num_devices, cluster.devices_per_host)
    least = roofline(
        model_flops=model_flops,
        program_flops=program_flops,
        memory_bytes=memory_bytes,
        traffic=traffic,
        peak=peak,
        rates=rates,
    )
    return {
        "topology": str(cluster),
        "devices": num_devices,
        "device_kind": device.device_kind,
        "mesh": dict(step.mesh.shape),
        "parameters": count_parameters(config.model)._asdict(),
        "batch": {"rows": train.batch_size, "seq_len": train.seq_len, "micro_batches": train.grad_accum_steps},
        "trace_seconds": step.trace_seconds,
        "compile_seconds": step.compile_seconds,
        "processor_seconds": step.processor_seconds,
        "memory": {**dataclasses.asdict(step.memory), "hbm": rates.hbm_bytes},
        "fits": step.memory.peak <= rates.hbm_bytes,
        "collectives": [dataclasses.asdict(line) for line in traffic],
        "flops": {
            "model": model_flops,  # by formula, recomputation left out
            "program": program_flops,  # matrix products of the compiled text, loops multiplied out
            "silent_kernels": program.silent_kernels,  # runs of kernels whose products are not in it
            "compiler": step.flops_once,  # as the compiler counts: every loop once
            "loops_of_unknown_length": len(program.unknown_loops),  # counted once
            "conditionals": len(program.conditionals),  # the branch with the least products is counted
        },
        "memory_bytes": memory_bytes,
        "roofline": {
            **dataclasses.asdict(least),
            "step": {"overlapped": least.overlapped, "in_turn": least.in_turn},
            "mfu": dict(zip(("in_turn", "overlapped"), least.mfu, strict=True)),
            "peak_flops": peak,
        },
    }
