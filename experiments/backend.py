"""How the process uses its devices: compiled programs are kept on disk, and a CPU's memory is kept by the process."""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator

import jax

from experiments.data.cache import default_cache_dir
from experiments.environment import Environment, warn_of_unused_chips

# glibc's mallopt parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def set_up_memory() -> None:
    """To be called by an entry point that saves checkpoints, before JAX starts its threads: later there is more than one heap.

    glibc gives each of the first threads a heap of its own, and later ones, such as those that write a checkpoint, any of these
    in turn. What lies free in one heap is of no use to another: all of them grow, a little with every save.
    """
    if Environment.find().leaves_only_cpu:
        keep_memory()


def set_up_backend() -> None:
    """To be called once by an entry point, before it makes large arrays."""
    warn_of_unused_chips()
    use_compilation_cache()
    if jax.default_backend() == "cpu":
        keep_memory()


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another one."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def saying_choices(say: Callable[[str], None]) -> Iterator[None]:
    """Has `say` told which implementation each op takes, when it is first traced."""
    handler, logger = logging.Handler(), logging.getLogger("kernels_pallas")
    handler.emit = lambda record: say(record.getMessage())
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or a handler of the root logger, which some libraries install, says it once more
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def keep_memory() -> bool:
    """Makes malloc keep freed memory instead of giving it back to the kernel; True where that is possible (glibc).

    XLA:CPU allocates its buffers anew in every step. Large ones come as fresh pages by default, and touching each for the first
    time costs more than many of the operations on them (20 % of a train step).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1, _M_TOP_PAD: 64 << 20}
    accepted = [mallopt(parameter, value) for parameter, value in settings.items()]  # all of them, whatever one answers
    return all(accepted)


def give_memory_back() -> None:
    """Gives the kernel the pages that lie free within the heap; does nothing without glibc.

    Copies of the state that are written while steps go on leave holes of all sizes, more after every checkpoint, though none of
    it is in use any more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
