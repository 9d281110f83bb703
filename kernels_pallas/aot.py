"""Compiles for chips that are not there, with the compilers that serve the real ones.

    report = chip("h200").compile(fn, jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16))

XLA:TPU and Mosaic come from libtpu, XLA:GPU and Mosaic GPU from the CUDA plugin, ptxas from NVIDIA's wheel: the extra `aot`. Works
in a process whose CPU devices are in use already, if that was started with JAX_PLATFORMS=cpu.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from kernels_pallas.bundles import DUMP_FLAGS, Bundles

# What the compilers ask the machine, answered; a value that the user has set stays.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
REPORTS = {  # what Mosaic GPU and ptxas print about each kernel
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # registers and spills
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",  # the launch, which carries the dynamic shared memory
}


def hopper(name: str, *, memory_rate: int, memory_bytes: int, cache_bytes: int) -> str:
    """XLA's GpuTargetConfigProto of an SXM board of that generation: one processor beside several kinds of memory."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {memory_rate} l2_cache_size: {cache_bytes} clock_rate_ghz: 1.98 device_memory_size: {memory_bytes}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


H200 = hopper("NVIDIA H200", memory_rate=4_800_000_000_000, memory_bytes=150_000_000_000, cache_bytes=62_914_560)


class Unavailable(RuntimeError):  # noqa: N818 (says what is missing, not that something broke)
    """The compilers are not installed, or the process was started in a way that keeps them from loading."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiler said of one function; None is what does not exist on that chip or was not said."""

    chip: str
    seconds: float  # tracing, lowering and compiling
    exception: Exception | None = dataclasses.field(default=None, repr=False)  # why it does not compile
    temp_bytes: int | None = None  # device memory beside arguments and results
    vmem_bytes: int | None = None  # TPU: of the kernel that takes most
    bundles: Bundles | None = None  # TPU, after `count_bundles()`: of the kernel with most matrix work
    registers: int | None = None  # GPU: per thread, of the Mosaic kernel that takes most
    spill_bytes: int | None = None  # GPU: stored and loaded, of the Mosaic kernel that spills most
    shared_memory_bytes: int | None = None  # GPU: static and dynamic, of the Mosaic kernel that takes most
    warnings: tuple[str, ...] = ()  # GPU: ptxas' own words, of wgmma that it had to serialize for example

    @property
    def compiled(self) -> bool:
        return self.exception is None

    @property
    def error(self) -> str | None:
        """Why it does not compile, in one line."""
        if self.exception is None:
            return None
        lines = [line.strip() for line in str(self.exception).splitlines() if line.strip()]
        return f"{type(self.exception).__name__}: {lines[0] if lines else ''}"[:300]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    name: str
    topology: str  # of the smallest slice
    platform: str = "tpu"
    target: str | None = None  # description of the chip, where the compiler has none of its own

    @functools.cached_property
    def device(self) -> Any:
        """A device to compile for. Raises Unavailable."""
        check_installed()
        options = {} if self.target is None else {"target_config": self.target, "topology": self.topology}
        name = self.topology if self.target is None else self.name
        with _environment(ENVIRONMENT):
            try:
                return topologies.get_topology_desc(name, self.platform, **options).devices[0]
            except NotImplementedError as error:  # the plugin did not load
                raise Unavailable(
                    f"no compiler for {self.name}: start the process with JAX_PLATFORMS=cpu ({error})"
                ) from error

    def compile(self, fn: Callable, *args: Any) -> Report:
        """Compiles `fn` for arguments like `args` (arrays, ShapeDtypeStructs or trees of them). Raises Unavailable.

        Not for several threads at once: it sets environment variables and listens to the process's stdout and stderr.
        """
        device, sharding = self.device, SingleDeviceSharding(self.device)
        avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
        # Code that asks for its device while it is traced finds this one.
        cores = getattr(device, "num_cores", None)
        abstract = AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=device.platform)
        mesh = AbstractMesh((1,), ("aot",), abstract_device=abstract)
        began = time.perf_counter()
        with compilers(reports=True), _said() as said:
            try:
                with use_abstract_mesh(mesh):
                    compiled = jax.jit(fn).trace(*avals).lower(lowering_platforms=(self.platform,)).compile()
            except Exception as error:  # whatever tracing, lowering or a compiler raises is the answer
                return Report(chip=self.name, seconds=time.perf_counter() - began, exception=error)
        seconds, text = time.perf_counter() - began, compiled.as_text() or ""
        memory = compiled.memory_analysis()
        return Report(
            chip=self.name,
            seconds=seconds,
            temp_bytes=None if memory is None else memory.temp_size_in_bytes,
            vmem_bytes=_vmem_bytes(text),
            bundles=_bundles(),
            **_gpu_kernels(text, said[0]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCase:
    """A call that must compile for every chip of its implementation; a kernel on GPU without spilling."""

    op: str
    shape: str  # in words
    implementation: str  # "tpu", "gpu", or one that runs on both
    fn: Callable
    args: tuple[Any, ...]  # arrays, ShapeDtypeStructs or trees of them
    every_time: bool  # in every run of the tests, not only among the slow ones
    max_registers: int = 255  # per thread
    too_small: tuple[str, ...] = ()  # chips whose memory does not hold the arrays
    crashes: tuple[str, ...] = ()  # chips whose compiler ends the process over it, by a mistake of its own

    def __str__(self) -> str:
        return f"{self.op}, {self.shape}, {self.implementation}"

    @property
    def chips(self) -> list[Chip]:
        platform = {"tpu": "tpu", "gpu": "cuda"}.get(self.implementation)
        left_out = (*self.too_small, *self.crashes)
        return [c for c in CHIPS.values() if platform in (None, c.platform) and c.name not in left_out]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(name="v5e", topology="v5e:2x2"),
        Chip(name="v5p", topology="v5p:2x2x1"),
        Chip(name="v6e", topology="v6e:2x2"),
        Chip(name="tpu7x", topology="tpu7x:2x2x1"),
        Chip(name="h200", topology="1x1x1", platform="cuda", target=H200),
    )
}


def chip(name: str) -> Chip:
    if name not in CHIPS:
        raise ValueError(f"no chip {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def count_bundles() -> None:
    """Has every later compilation for a TPU count its bundles, at the cost of some 100 MB written and read.

    Raises Unavailable if the compiler is loaded already: it reads its flags once.
    """
    global _schedules
    if any("device" in vars(each) for each in CHIPS.values()):
        raise Unavailable("bundles are counted in a process that has compiled for no TPU before")
    _schedules = tempfile.TemporaryDirectory()
    flags = DUMP_FLAGS.format(directory=_schedules.name)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def unavailable() -> str | None:
    """Why nothing can be compiled here, in one line; None if all chips can be compiled for."""
    try:
        for each in CHIPS.values():
            _ = each.device
    except Unavailable as reason:
        return str(reason)
    return None


def check_installed() -> None:
    """Raises Unavailable if a compiler or ptxas is not installed."""
    packages = {"libtpu": "libtpu", "jax-cuda13-plugin": "jax_plugins.xla_cuda13"}
    missing = [package for package, module in packages.items() if not _has_module(module)]
    if _ptxas_folder() is None:
        missing.append("nvidia-cuda-nvcc")
    if missing:
        raise Unavailable(f"{', '.join(missing)} not installed: pip install 'mdl[aot]' on Linux, x86-64")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent
        return False


def _ptxas_folder() -> pathlib.Path | None:
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((pathlib.Path(place, "cu13", "bin") for place in places if _is_ptxas_in(place)), None)


def _is_ptxas_in(place: str) -> bool:
    return pathlib.Path(place, "cu13", "bin", "ptxas").is_file()


@contextlib.contextmanager
def compilers(*, reports: bool = False) -> Iterator[None]:
    """In this block compilers find the answers they ask for, and the persistent cache is out of the way. reports: see REPORTS."""
    with _environment(ENVIRONMENT | (REPORTS if reports else {})), _no_compilation_cache():
        yield


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These, where they are not set, and ptxas on PATH, for a while, so that processes started later inherit nothing."""
    wanted = {name: value for name, value in variables.items() if name not in os.environ}
    wanted["PATH"] = os.pathsep.join(filter(None, [str(_ptxas_folder()), os.environ.get("PATH")]))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A program found in the persistent cache cannot be loaded without its chip, and no compiler would report on it."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """Collects what compilers write to the file descriptors of stdout and stderr; the text is there when the block has ended."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for fd in kept:
            os.dup2(file.fileno(), fd)
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, original in kept.items():
                os.dup2(original, fd)
                os.close(original)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


_schedules: tempfile.TemporaryDirectory | None = None  # where libtpu's compiler writes, once bundles are counted


def _bundles() -> Bundles | None:
    """What was written since the last call, which is then deleted."""
    if _schedules is None:
        return None
    directory = pathlib.Path(_schedules.name)
    found = Bundles.read(directory)
    for file in directory.iterdir():
        file.unlink()
    return found


def _vmem_bytes(text: str) -> int | None:
    """The largest VMEM of a custom call, from the annotations in compiled HLO."""
    found = [
        int(size)
        for call in re.findall(r'"used_scoped_memory_configs":\[([^]]*)\]', text)
        for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', call)
    ]
    return max(found, default=None)


# The stream, three sizes each of grid, cluster and block, and then the dynamic shared memory.
LAUNCH = r"@mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr [^,]+,(?: i32 [^,]+,){9} i32 (\d+)"
WARNINGS = ("ptxas warning", "Potential Performance Loss")
# Mosaic GPU compiles a kernel once per process: what was said then is kept under the kernel's hash.
_KERNELS: dict[str, dict[str, Any]] = {}


def _gpu_kernels(text: str, said: str) -> dict[str, Any]:
    """The largest figures of the Mosaic GPU kernels in compiled HLO, from what ptxas and Mosaic said; {} if there are none."""
    hashes = set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text))
    found = {
        "registers": re.findall(r"Used (\d+) registers", said),
        "spill_bytes": re.findall(r"(\d+) bytes spill (?:stores|loads)", said),
        "static": re.findall(r"(\d+) bytes smem", said) or ["0"],
        "dynamic": re.findall(LAUNCH, said),
    }
    if all(found.values()):
        figures: dict[str, Any] = {name: max(map(int, numbers)) for name, numbers in found.items()}
        figures["shared_memory_bytes"] = figures.pop("static") + figures.pop("dynamic")
        figures["warnings"] = tuple(line for line in said.splitlines() if any(sign in line for sign in WARNINGS))
        _KERNELS.update(dict.fromkeys(hashes - _KERNELS.keys(), figures))
    known = [_KERNELS[kernel] for kernel in hashes & _KERNELS.keys()]
    return {name: max(figures[name] for figures in known) for name in known[0]} if known else {}
