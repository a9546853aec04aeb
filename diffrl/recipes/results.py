"""What an experiment has measured, in files that are there whole or not at all: a killed run is taken up from them."""

import contextlib
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[Any]:
    """A binary file to write into, which takes the place of `path` when the block ends without an error.

    On processes other than the first it leads nowhere: a file has one author.
    """
    if jax.process_index() != 0:
        yield io.BytesIO()
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: pathlib.Path, default: Any) -> Any:
    """What `save` wrote there, or `default`.

    A file that is not JSON is set aside as `<name>.damaged`, with a word on stderr.
    """
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        aside = path.with_name(f"{path.name}.damaged")
        print(f"{path} cannot be read: kept as {aside.name}, and measured anew", file=sys.stderr)
        if jax.process_index() == 0:
            path.replace(aside)
        return default


def save(path: pathlib.Path, results: Any) -> None:
    """Writes JSON."""
    with whole(path) as file:
        file.write(json.dumps(results, indent=1, default=float).encode() + b"\n")
