"""A config is a tree of plain dataclasses: its leaves by dotted name, its file, and what differs between two.

Leaves are int, float, bool, str, tuples of these, or one of them `| None`; a section is a nested dataclass.
Annotations are written as types, not as strings (no `from __future__ import annotations` beside a config).
"""

import copy
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import platform
import shutil
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

import diffrl
from diffrl.errors import UserError

FILE = "config.json"


class Leaf(NamedTuple):
    value: Any
    hint: Any  # the annotation, resolved
    help: str
    free: bool
    limits: Mapping[str, float]  # see `config_leaf.leaf`


def leaves(config: Any, prefix: str = "") -> dict[str, Leaf]:
    """The leaves of a tree of dataclasses by dotted name, in the order of declaration."""
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name, about = getattr(config, field.name), prefix + field.name, field.metadata
        if dataclasses.is_dataclass(value):
            found |= leaves(value, name + ".")
        else:
            found[name] = Leaf(
                value, hints[field.name], about.get("help", ""), about.get("free", False), about.get("limits", {})
            )
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as nested dicts of JSON values: what config.json holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(default: Any, tree: Mapping[str, Any]) -> Any:
    """A copy of `default` with the leaves of `tree`.

    Leaves that `default` has not, or of another type, are left out; `differences` tells of them.
    """
    config = copy.deepcopy(default)
    saved = {name: _tuples(value) for name, value in _flat(tree).items()}
    for name, old in leaves(default).items():
        if name in saved and fits(saved[name], old.hint):
            set_leaf(config, name, saved[name])
    return config


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two trees of `to_dict`: {"optim.learning_rate": "0.001 saved, 0.0003 now"}."""
    old, new = _flat(saved), _flat(now)
    lines = {name: f"{old[name]!r} saved, no longer a leaf" for name in old.keys() - new.keys()}
    lines |= {name: f"not saved, {new[name]!r} now" for name in new.keys() - old.keys()}
    lines |= {
        name: f"{old[name]!r} saved, {new[name]!r} now" for name in old.keys() & new.keys() if old[name] != new[name]
    }
    return {name: lines[name] for name in [*new, *old] if name in lines}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def set_leaf(config: Any, name: str, value: Any) -> None:
    """Set the leaf with a dotted name, in place."""
    *sections, last = name.split(".")
    setattr(functools.reduce(getattr, sections, config), last, value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that its annotation promises, down to a tuple's elements and length."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in kinds)
    if origin is tuple:
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) is hint or (hint is float and type(value) is int)


def save(workdir: pathlib.Path, preset: str, config: Any, experiment: str = "") -> pathlib.Path | None:
    """Write `<workdir>/config.json` atomically; the one that was there is kept as `config.<n>.json`, which is returned.

    Raises:
      UserError: where the workdir cannot be made.
      OSError: where the file cannot be written.
    """
    path, before = workdir / FILE, None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: {error.strerror}; choose another --workdir") from error
    if path.exists():
        kept = (path.with_name(f"config.{n}.json") for n in itertools.count(1))
        before = next(file for file in kept if not file.exists())
        shutil.copy2(path, before)
    versions = {"diffrl": diffrl.__version__, "jax": jax.__version__, "python": platform.python_version()}
    tree = {"experiment": experiment, "preset": preset, "config": to_dict(config), "versions": versions}
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(tree, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return before


def restore(workdir: pathlib.Path, kept: pathlib.Path | None) -> None:
    """Undoes `save`, which returned `kept`."""
    if kept is None:
        (workdir / FILE).unlink()
    else:
        kept.replace(workdir / FILE)


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What `save` wrote there, or None.

    Raises:
      UserError: where the file is not what `save` writes.
    """
    path = workdir / FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend it or choose another --workdir") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path}: holds no config; mend it or choose another --workdir")
    return {"preset": "", "experiment": "", **saved}
