"""What the command line answers: the text of `--help`, and the nearest name to a mistyped one."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffrl.config_leaf import in_words
from diffrl.config_tree import Leaf, leaves

_HELP = """{doc}

usage: python -m experiments.{name} [--preset=NAME] [--workdir=DIR] [--config.LEAF=VALUE ...]

presets:
{presets}

flags:
  --workdir=DIR        where the run lives (runs/{name}/PRESET)
  --mode=MODE          {modes}
  --accept_changes     go on with another config than the one saved in the workdir

config, with the values of {preset} (* may change when a run goes on):
{leaves}"""


def help_text(doc: str, name: str, presets: Mapping[str, Callable[[], Any]], modes: Sequence[str], preset: str) -> str:
    """Everything that can be said to experiments/`name`.py, with the values of `preset`."""
    return _HELP.format(
        doc=inspect.cleandoc(doc),
        name=name,
        preset=preset,
        modes=" | ".join(modes),
        presets=_table((f"--preset={key}", _summary(make)) for key, make in presets.items()),
        leaves=_table(
            (f"--config.{key}={plain(leaf.value)}", type_name(leaf.hint), "*" if leaf.free else "", _about(leaf))
            for key, leaf in leaves(presets[preset]()).items()
        ),
    )


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A question after the nearest of `names`; by its last part where `name` leaves the sections out."""
    tails = {_tail(candidate): candidate for candidate in names}
    close = difflib.get_close_matches(name, names, 1, cutoff=0.8)
    close += [tails[tail] for tail in difflib.get_close_matches(_tail(name), tails, 1)]
    close += difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else ""


def plain(value: Any) -> str:
    """A value as one types it: without the spaces at which a shell would split."""
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)


def type_name(hint: Any) -> str:
    """int, tuple[int, ...], str | None."""
    return inspect.formatannotation(hint)


def _about(leaf: Leaf) -> str:
    return "; ".join(filter(None, (leaf.help, in_words(leaf.limits))))


def _tail(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def _summary(make: Callable[[], Any]) -> str:
    """The first line of a preset's docstring, of a partial that of its function.

    The one that dataclass() itself writes says nothing.
    """
    if isinstance(make, functools.partial):
        make = make.func
    first = (make.__doc__ or "").strip().partition("\n")[0]
    return "" if isinstance(make, type) and first.startswith(f"{make.__name__}(") else first


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  " + "  ".join(row).rstrip() for row in cells)
