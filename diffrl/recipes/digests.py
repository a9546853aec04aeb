"""By what name a result is kept: a digest of the settings that it was made with, under which no others find it."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from diffrl import config as config_lib


def settings(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The leaves that a result depends on, by dotted name: all but the free ones and those of `without`."""
    found = config_lib.leaves(config).items()
    return {path: leaf.value for path, leaf in found if not leaf.free and path not in without}


def digest(settings: Any) -> str:
    """Eight hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
