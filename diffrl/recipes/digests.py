"""By what name a result is kept: a digest of the settings that it was made with, under which no others find it."""

import hashlib
import json
import sys
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from diffrl import config as config_lib
from diffrl.train import mesh


def settings(config: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The leaves that a result depends on, by dotted name: all but the free ones and those of `without`."""
    found = config_lib.leaves(config).items()
    return {path: leaf.value for path, leaf in found if not leaf.free and path not in without}


def digest(settings: Any) -> str:
    """Eight hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def weights(params: Any) -> str:
    """A name for these very weights, the same on all processes."""
    known = hashlib.blake2b(digest_size=8)
    for path, weight in jax.tree.leaves_with_path(params):
        known.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(mesh.fetch(weight)).tobytes())
    return known.hexdigest()


def own_folder(run: config_lib.Run, name: str, made_by: Any) -> config_lib.Run:
    """The part `name` of a run, in a folder of its own: other settings never find what these have made.

    Says so on stderr where the folder is new and others of that name, made by other settings, lie beside it.
    """
    place = run.workdir / f"{name}-{digest(made_by)}"
    others = [path.name for path in sorted(run.workdir.glob(f"{name}-*")) if path.is_dir()]
    if others and not place.exists():
        print(
            f"{place} begins anew: {', '.join(others)} came of other settings; give those again to go on with them",
            file=sys.stderr,
        )
    return run._replace(workdir=place)
