"""The figures of a compiled step for people."""

from collections.abc import Iterator
from typing import Any

from experiments.progress import format_count

GIB = 2**30


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A few lines of text; all amounts are those of one device and one step."""
    batch, memory, flops, roof = (found[name] for name in ("batch", "memory", "flops", "roofline"))
    count, mesh = found["parameters"], found["mesh"]
    rows = batch["rows"] // batch["micro_batches"]
    per_device = rows / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    each = f"{found['device_kind']}, {memory['hbm'] / GIB:.1f} GiB each"
    yield f"topology     {found['topology']}: {found['devices']} devices ({each})"
    yield f"mesh         {' '.join(f'{axis}={size}' for axis, size in mesh.items())}"
    mtp = f" + {format_count(count['mtp'])} MTP" if count["mtp"] else ""
    yield f"model        {format_count(count['total'])} parameters{mtp}, {format_count(count['active'])} active per token"
    yield (
        f"batch        {batch['rows']} rows of {batch['seq_len']} tokens in {batch['micro_batches']} micro-batches of {rows}, "
        f"{per_device:g} rows a device"
    )
    yield (
        f"compiled     in {found['compile_seconds']:.0f} s, after {found['trace_seconds']:.0f} s of tracing; "
        f"{found['processor_seconds']:.0f} s of processor time"
    )
    parts = ", ".join(f"{name} {memory[name] / GIB:.3g}" for name in ("arguments", "outputs", "temporaries"))
    verdict = "fits" if found["fits"] else "does not fit"
    yield f"memory       GiB: {parts}; peak {memory['peak'] / GIB:.3g} of {memory['hbm'] / GIB:.1f}: {verdict}"
    yield "collectives  bytes sent by a device in a step"
    for line in found["collectives"]:
        spread = f" on {line['hosts']} hosts" if line["hosts"] > 1 else ""
        network = f", {amount(line['network_bytes'])}B by network" if line["network_bytes"] else ""
        group = f"{line['group']} devices{spread}"
        yield f"  {line['kind']:20} {group:26} {line['count']:>9,} times  {amount(line['bytes']):>9}B{network}"
    silent = f"; products of {flops['silent_kernels']:,} runs of kernels not counted" if flops["silent_kernels"] else ""
    compiler = "none given" if flops["compiler"] is None else amount(flops["compiler"])
    yield (
        f"FLOPs        {amount(flops['model'])} of the model, {amount(flops['program'])} of the program's matrix products "
        f"({flops['program'] / flops['model']:.2f}x; {flops['loops_of_unknown_length']} loops of unknown length counted once, "
        f"the lighter branch of {flops['conditionals']} conditionals"
        f"{silent}); "
        f"the compiler's count with every loop once: {compiler}"
    )
    yield f"memory read and written  {amount(found['memory_bytes'])}B"
    network = f", network {roof['network']:.3g} s" if roof["network"] else ""
    yield (
        f"roofline     compute {roof['compute']:.3g} s (of which {roof['useful']:.3g} s the model's), "
        f"memory {roof['memory']:.3g} s, links {roof['links']:.3g} s{network}"
    )
    yield (
        f"step         at least {roof['step']['overlapped']:.3g} s, MFU {100 * roof['mfu']['overlapped']:.1f} %, if all of it "
        f"overlaps; {roof['step']['in_turn']:.3g} s, {100 * roof['mfu']['in_turn']:.1f} %, if communication does not (estimates)"
    )


def amount(value: float) -> str:
    """Three digits and an SI unit: 1.05 G, 62.9 T."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
