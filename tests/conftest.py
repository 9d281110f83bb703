"""One environment for every test: eight virtual CPU devices and a compilation cache that survives the run."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path(__file__).parents[1] / ".jax_cache")
# Subprocesses that tests start (entry points, second hosts) share the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    """The notebooks first: at the end, one process would run the two minutes of them while the others have nothing left."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module():
    """Compiled programs stay in memory while JAX remembers them: six gigabytes by the end of the tests, half of that without."""
    yield
    jax.clear_caches()
