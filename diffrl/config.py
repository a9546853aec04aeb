"""One tree of dataclasses is the config of an experiment; every leaf of it is a flag.

An experiment names complete configs and hands them to `run`:

    PRESETS = {"digits": Config, "cifar10": cifar10}     # name -> () -> Config; the first is the default

    def main(config: Config, run: config_lib.Run) -> None: ...

    if __name__ == "__main__":
        config_lib.run(main, PRESETS, modes=("train", "sample", "eval"))

and is then driven by

    python -m experiments.NAME --preset=cifar10 --workdir=DIR --mode=sample --config.optim.learning_rate=3e-4

The first mode makes a run, and so does each of `makers`, in a workdir of its own.  Its base is the `--preset` if one is
given, else what the workdir has saved, else the first preset; flags replace single leaves of it, and
`<workdir>/config.json` saves the whole.  A resume with another config says what differs and stops, unless the leaf is
`free` or `--accept_changes` is given; one that the experiment refuses before it has done anything leaves no trace.  The
other modes start from what the run has saved, and save nothing.

ml_collections' config_flags reads the values; names, None, the types inside tuples and the limits of leaves are
checked here, so that every mistake is one line.
"""

import copy
import errno
import hashlib
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging
from ml_collections import config_flags

from diffrl.config_help import did_you_mean, help_text, plain, type_name
from diffrl.config_leaf import in_words, is_within, leaf
from diffrl.config_tree import (
    FILE,
    Leaf,
    differences,
    fits,
    from_dict,
    leaves,
    read,
    restore,
    save,
    set_leaf,
    to_dict,
)
from diffrl.errors import UserError

__all__ = ["Run", "differences", "from_dict", "leaf", "leaves", "parse", "read", "run", "save", "to_dict"]

_TOLD = 5  # differences in a message, at most
_ROOM = "make room or choose another --workdir"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "choose a --workdir that can be written",
    errno.EACCES: "mend its permissions or choose another --workdir",
}

Presets = Mapping[str, Callable[[], Any]]


class Run(NamedTuple):
    """What `main` gets beside its config; `resumed` says that the workdir held a config before."""

    workdir: pathlib.Path
    mode: str
    preset: str
    resumed: bool = False


def run(
    main: Callable[[Any, Run], None],
    presets: Presets,
    modes: Sequence[str] = (),
    setup: Callable[[], Any] | None = None,
    argv: Sequence[str] | None = None,
    makers: Sequence[str] = (),
) -> None:
    """The entry point of an experiment: flags -> config -> `main(config, run)`.

    Args:
      main: the experiment; its module's docstring opens `--help`, its file's name is in the default workdir.
      presets: name -> function that makes a complete config; the first is the default.
      modes: values of `--mode`; the first makes a run, the others need one.  None: only "train".
      makers: those of the others that make a run, too.
      setup: called once before the first use of devices (multi-host initialisation).
      argv: arguments without the program's name; those of the process if None.

    Raises:
      SystemExit: 2 after a `UserError`, a full disk or a path without permission, 130 after Ctrl-C, each with one
        line on stderr.  Any other exception passes with its traceback.
    """
    try:
        _run(main, presets, modes or ("train",), setup, sys.argv[1:] if argv is None else argv, makers)
    except UserError as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def parse(
    argv: Sequence[str],
    presets: Presets,
    modes: Sequence[str] = ("train",),
    name: str = "experiment",
    makers: Sequence[str] = (),
) -> tuple[Any, Run, dict[str, str]]:
    """Arguments without the program's name -> (config, run, what differs from the workdir's config.json).

    Raises:
      UserError: for whatever is wrong with the arguments or with the saved file; in a mode that makes runs also where
        the config differs from the saved one in more than free leaves, and that was not accepted.
    """
    top, rest = _top_flags(argv, presets, modes)
    makes = top.mode == modes[0] or top.mode in makers
    own = f"_{top.mode}" if makes and top.mode != modes[0] else ""
    workdir = pathlib.Path(os.path.expanduser(top.workdir or f"runs/{name}/{top.preset or next(iter(presets))}{own}"))
    saved = read(workdir)
    if saved is not None and saved["experiment"] not in ("", name):
        raise UserError(f"{workdir} holds a run of {saved['experiment']}, this is {name}: choose another --workdir")
    if not makes:
        _must_hold_run(workdir, saved, top.preset, modes[0])

    preset = top.preset or (saved["preset"] if saved is not None else "")
    if preset not in presets:
        preset = next(iter(presets))
    config = copy.deepcopy(presets[preset]())
    if saved is not None and (top.preset is None or not makes):
        config = from_dict(config, saved["config"])
    for path, text in _overrides(rest, leaves(config)).items():
        config = _override(config, path, text)
    for path, found in leaves(config).items():
        if not is_within(found.value, found.limits):
            raise UserError(
                f"--config.{path}={plain(found.value)}: expected {in_words(found.limits) or 'a finite number'}"
            )

    changes = differences(saved["config"], to_dict(config)) if saved is not None else {}
    free = {path for path, leaf in leaves(config).items() if leaf.free}
    grave = [f"{path}: {change}" for path, change in changes.items() if path not in free]
    if grave and makes and not top.accept_changes:
        more = [f"and {len(grave) - _TOLD} more"] if len(grave) > _TOLD else []
        raise UserError(
            f"{workdir} was made with another config ({'; '.join(grave[:_TOLD] + more)}): "
            "choose another --workdir, or go on with --accept_changes"
        )
    return config, Run(workdir, top.mode, preset, saved is not None), changes


def _run(
    main: Callable[[Any, Run], None],
    presets: Presets,
    modes: Sequence[str],
    setup: Callable[[], Any] | None,
    argv: Sequence[str],
    makers: Sequence[str],
) -> None:
    module = sys.modules[main.__module__]
    name = pathlib.Path(module.__file__ or "experiment").stem
    top, _ = _top_flags(argv, presets, modes)
    if top.help:
        print(help_text(module.__doc__ or "", name, presets, modes, top.preset or next(iter(presets))))
        return
    config, started, changes = parse(argv, presets, modes, name, makers)
    flags.FLAGS([name])  # Grain's workers want absl's own flags parsed
    logging.set_verbosity(logging.WARNING)
    # Read before this, written after it: no process of a multi-host run sees what another has just written.
    if setup is not None:
        setup()
    _enable_compilation_cache()
    makes = started.mode in (modes[0], *makers) and (changes or not started.resumed)
    try:
        if jax.process_index() == 0:
            for path, change in changes.items():
                print(f"config.{path}: {change}", file=sys.stderr)
        if not makes or jax.process_index() != 0:
            main(config, started)
            return
        kept = save(started.workdir, started.preset, config, name)
        before = _contents(started.workdir)
        try:
            main(config, started)
        except UserError:
            if _contents(started.workdir) == before:  # refused: the same command without the mistake is to work
                restore(started.workdir, kept)
            raise
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = error.filename or started.workdir
        raise UserError(f"{where}: {error.strerror}; {_REMEDIES[error.errno]}") from error


def _contents(workdir: pathlib.Path) -> dict[str, str]:
    """What a run has saved, in a word for each file; locks and empty files say nothing."""
    found = {}
    for path in workdir.rglob("[!.]*"):
        if path.parent.name != "tensorboard" and path.is_file() and path.stat().st_size:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".jsonl" else ""
    return found


def _exit(line: str, status: int) -> typing.NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def _enable_compilation_cache() -> None:
    """Let compiled programs outlive the process; without a folder to write to, go on without."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # jax reads it
    try:
        folder = pathlib.Path.home() / ".cache" / "diffrl" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


class _Top(NamedTuple):
    """The flags that are not leaves of the config."""

    preset: str | None
    workdir: str | None
    mode: str
    accept_changes: bool
    help: bool


def _top_flags(argv: Sequence[str], presets: Presets, modes: Sequence[str]) -> tuple[_Top, list[str]]:
    """The flags that are not leaves, and the other arguments."""
    values = flags.FlagValues()
    values.set_gnu_getopt()  # they may stand behind other arguments
    for name in ("preset", "workdir", "mode"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_bool("accept_changes", False, "", flag_values=values)
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    try:
        _, *rest = values(["", *argv], known_only=True)
    except flags.Error as error:
        raise UserError(str(error)) from error
    top = _Top._make(values[name].value for name in _Top._fields)
    top = top._replace(mode=modes[0] if top.mode is None else top.mode)
    _one_of("--mode", top.mode, modes)
    if top.preset is not None:
        _one_of("--preset", top.preset, list(presets))
    if top.workdir == "":
        raise UserError("--workdir is empty: give a folder, or leave it out")
    if "://" in (top.workdir or ""):
        raise UserError(f"--workdir={top.workdir}: not a folder; mount the bucket and give the path")
    return top, rest


def _one_of(flag: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise UserError(f"{flag}={value}: expected one of {', '.join(names)}{did_you_mean(value, names)}")


def _must_hold_run(workdir: pathlib.Path, saved: Mapping[str, Any] | None, preset: str | None, mode: str) -> None:
    if saved is None:
        raise UserError(f"{workdir}: no run here (no {FILE}); make one with --mode={mode} or mend --workdir")
    if preset not in (None, saved["preset"]):
        raise UserError(f"--preset={preset}: {workdir} holds a run of {saved['preset']}; leave --preset out")


def _overrides(arguments: Iterable[str], known: Mapping[str, Leaf]) -> dict[str, str]:
    """`--config.leaf=text`, `--config.leaf text`, `--config.switch`, `--noconfig.switch` as {leaf: text}."""
    paths = {f"--config.{path}": path for path in known}
    negated = {f"--noconfig.{path}": path for path in known if known[path].hint is bool}
    given = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if flag in negated and not equals:
            given[negated[flag]] = "false"
            continue
        if flag not in paths:
            raise UserError(_unknown(flag, list(paths)))
        found = known[paths[flag]]
        if not equals:
            text = "true" if found.hint is bool else next(rest, "")
            if not text:
                raise UserError(f"{flag}: a value is missing, as in {flag}={plain(found.value)}")
        given[paths[flag]] = text  # the last of several wins
    return given


def _unknown(flag: str, paths: Sequence[str]) -> str:
    inside = [path for path in paths if path.startswith(f"{flag}.")]
    if inside:
        return f"{flag} is a section, not a value; set its leaves, as in {inside[0]}=VALUE"
    what = "unknown flag" if flag.startswith("-") else "not a flag:"
    return f"{what} {flag}{did_you_mean(flag, [*paths, *(f'--{name}' for name in _Top._fields)])}"


def _override(config: Any, path: str, text: str) -> Any:
    """`config` with one leaf as its text says."""
    before, hint, *_ = leaves(config)[path]
    if types.NoneType in typing.get_args(hint) and text.lower() == "none":
        set_leaf(config, path, None)
        return config
    argument = f"--config.{path}={text}"
    complaint = f"{argument}: expected {type_name(hint)}, as in --config.{path}={plain(before)}"
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=[argument])
        values(["", argument])
    except flags.Error as error:
        raise UserError(complaint) from error
    config = values["config"].value
    after = leaves(config)[path].value
    # config_flags reads an unquoted a,b as the one string "a,b".
    if not fits(after, hint) or (isinstance(after, tuple) and any("," in str(item) for item in after)):
        raise UserError(complaint)
    return config
