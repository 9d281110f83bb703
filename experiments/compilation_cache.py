"""Compiled programs survive the process."""

import os

import jax

from experiments.data.cache import default_cache_dir


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another one."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
