"""Errors of the machine instead of the user's: chips that JAX does not see or cannot have, and memory that is not enough.

What the machine has is read from files, variables and the metadata of packages; `root` stands in for / in tests.
"""

import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Self

from experiments.versions import installed, numbers

# The oldest NVIDIA driver of each CUDA: "Installation" in JAX's documentation, "CUDA Toolkit - Release Notes" in NVIDIA's.
_OLDEST_DRIVER = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
# PCI ids of TPUs, v3 to v7: jax/_src/hardware_utils.py
_GOOGLE, _TPUS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
_PACKAGES = ("jaxlib", "libtpu", *_OLDEST_DRIVER)
# CPU: Out of memory allocating 8 bytes. GPU: Out of memory while trying to allocate 8 bytes. TPU: Ran out of memory in memory space
# hbm (vmem would be a kernel's fault); Attempting to allocate 8G, or to reserve 8G at the bottom of memory.
_NO_MEMORY = re.compile(r"Out of memory (allocating|while)|memory space hbm|Attempting to (allocate|reserve)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """What can be known of the machine without JAX."""

    variables: Mapping[str, str]
    versions: Mapping[str, str | None]  # of the packages that bring JAX its devices; None: not installed
    num_gpus: int = 0  # NVIDIA's, of which there is a device file
    driver: str | None = None  # NVIDIA's, such as 580.65.06
    num_tpus: int = 0  # chips on this host's PCI bus

    @classmethod
    def find(cls, root: pathlib.Path = pathlib.Path("/")) -> Self:
        devices = (root / "sys/bus/pci/devices").glob("*")
        driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read(root / "proc/driver/nvidia/version"))
        return cls(
            variables=os.environ,
            versions={package: installed(package) for package in _PACKAGES},
            num_gpus=len(list((root / "dev").glob("nvidia[0-9]*"))) or int((root / "dev/dxg").exists()),  # dxg: WSL
            driver=driver and driver[1],
            num_tpus=sum(_read(each / "vendor") == _GOOGLE and _read(each / "device") in _TPUS for each in devices),
        )

    @property
    def leaves_only_cpu(self) -> bool:
        """Whether JAX can choose nothing but the CPU."""
        return self.variables.get("JAX_PLATFORMS", "").lower() == "cpu" or not (self.num_gpus or self.num_tpus)


def why_only_cpu(machine: Environment) -> str | None:
    """Why JAX computes on the CPU of a machine with chips, and what mends it; None if the machine has no chips."""
    if machine.num_tpus:
        return _why_no_tpu(machine)
    return _why_no_gpu(machine) if machine.num_gpus else None


def _why_no_tpu(machine: Environment) -> str | None:
    if hidden := _hidden_from_jax(machine, "tpu"):
        return f"the TPU of this machine is not used: {hidden}"
    if machine.versions["libtpu"] is None:
        return "the TPU of this machine is not used: libtpu is not installed; run `pip install -e '.[tpu]'`"
    return None  # where there is a libtpu, JAX does not go on without its devices


def _why_no_gpu(machine: Environment) -> str:
    unused = "the NVIDIA GPU of this machine is not used"
    if hidden := _hidden_from_jax(machine, "cuda", "gpu"):
        return f"{unused}: {hidden}"
    visible = machine.variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"{unused}: CUDA_VISIBLE_DEVICES={visible} hides it; unset it"
    plugins = {package: version for package in _OLDEST_DRIVER if (version := machine.versions[package])}
    if not plugins:
        return f"{unused}: JAX's CUDA plugin is not installed; run `pip install -e '.[gpu]'`"
    plugin, version = next(iter(plugins.items()))
    jaxlib, cuda = machine.versions["jaxlib"] or "", plugin.split("-")[1]
    if numbers(version) != numbers(jaxlib):
        return f"{unused}: {plugin} {version} does not go with jaxlib {jaxlib}; run `pip install -U 'jax[{cuda}]=={jaxlib}'`"
    oldest = _OLDEST_DRIVER[plugin]
    if machine.driver and numbers(machine.driver) < (oldest,):
        older = f", or uninstall {plugin} and run `pip install 'jax[cuda12]=={jaxlib}'`" if cuda != "cuda12" else ""
        return f"{unused}: NVIDIA's driver {machine.driver} is older than CUDA {cuda[4:]} needs; install {oldest} or newer{older}"
    libraries = machine.variables.get("LD_LIBRARY_PATH")
    advice = f"; other CUDA libraries on LD_LIBRARY_PATH={libraries} may be why: unset it" if libraries else ""
    return f"{unused}: {plugin} {version} did not start, JAX says why above{advice}"


def _hidden_from_jax(machine: Environment, *platforms: str) -> str | None:
    chosen = machine.variables.get("JAX_PLATFORMS")
    if not chosen or set(chosen.lower().split(",")) & set(platforms):
        return None
    return f"JAX_PLATFORMS={chosen} says so; unset it to use it"


@functools.cache
def warn_of_unused_chips() -> None:
    """Says once why JAX computes on a CPU though there are chips. To be called when devices may be used for the first time."""
    import jax

    if jax.default_backend() == "cpu" and (why := why_only_cpu(Environment.find())):
        print(f"warning: {why}", file=sys.stderr, flush=True)


def explain(error: RuntimeError, machine: Environment) -> str | None:
    """What an error of JAX means where the cause lies in the machine, and what mends it; None for all others."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text and _NO_MEMORY.search(text):
        return (
            "a device has too little memory; in training raise train.grad_accum_steps, set model.remat=full, or split the model "
            "over more devices (mesh.fsdp): experiments.compile says beforehand what fits; elsewhere lower --batch_size"
        )
    if in_use := re.search(r"already in use by (?:another )?process(?: with pid (\d+))?", text):
        process = (
            f"process {in_use[1]}"
            if in_use[1]
            else "another process (`sudo lsof -w /dev/accel* /dev/vfio/*` tells which)"
        )
        return f"the TPU is in use by {process}; end that, or set JAX_PLATFORMS=cpu to do without"
    if re.search(r"libtpu.*lockfile", text):
        return "a process that had the TPU left its lock behind; if none is running, run `sudo rm /tmp/libtpu_lockfile`"
    if "Unable to initialize backend 'cuda'" in text:
        return why_only_cpu(machine) or "there is no NVIDIA GPU on this machine; unset JAX_PLATFORMS"
    return None


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
