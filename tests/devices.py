"""How many devices a test has."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """What a laptop has: programs compile in two thirds of the time that they take for the suite's eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("devices", "local_devices"):
            found = getattr(jax, name)
            patch.setattr(jax, name, lambda *args, found=found, **options: found(*args, **options)[:1])
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *args: 1)
        yield
