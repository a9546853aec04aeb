"""Test setup: eight virtual CPU devices, a persistent compilation cache, and where real data may be found."""

import os
import pathlib

# Before jax is imported: the sharding tests need several devices on one CPU, and the suite compiles for longer than it
# computes, so that LLVM's lowest optimisation saves a fifth of it.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import devices
import jax
import pytest

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "diffrl" / "tests")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    value = os.environ.get("DIFFRL_DATA_DIR")
    if not value:
        pytest.skip("real data: DIFFRL_DATA_DIR is not set")
    path = pathlib.Path(value)
    if not path.is_dir():
        pytest.skip(f"real data: DIFFRL_DATA_DIR={value} is not a folder")
    return path


@pytest.fixture
def one_device():
    """See `devices`."""
    with devices.one_device():
        yield


def pytest_collection_modifyitems(items):
    """Whole programs first: with files handed to whichever worker is free, the longest ones must not come last."""
    items.sort(key=lambda item: item.path.parent != pathlib.Path(__file__).parent)
