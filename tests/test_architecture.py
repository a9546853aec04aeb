"""The rules of the house, read from the source with `ast`; each is shown to bite on a few lines that break it.

1. Folders: `diffusion`, `nets`, `rl`, `data`, `train` and `evaluate` do not know one another; what may know them is in
   `MAY_IMPORT`.  Nothing imports an experiment, nor tests.
2. Flags, devices, checkpoints, networks and brax's keys each have their files.
3. No dispatch on our own types or on strings that name code, and no work at import time.
"""

import ast
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("diffrl", "experiments", "benchmarks")

ROLES = {"diffusion", "nets", "rl", "data", "train", "evaluate"}
TOPICS = {"planning", "alignment"}
ANY = ROLES | TOPICS | {"pretrained", "safety", "serve", "recipes", "config", "config_help", "config_tree"}
MAY_IMPORT = {
    **{role: set() for role in ROLES},
    **{topic: {"diffusion", "rl"} for topic in TOPICS},
    "pretrained": {"nets"},
    "recipes": ROLES | TOPICS | {"pretrained", "config"},
    "safety": ROLES | TOPICS | {"pretrained", "recipes", "config"},
    "serve": ROLES | TOPICS | {"pretrained", "recipes", "safety", "config"},
    "config": {"config_help", "config_tree"},
    "config_help": {"config_tree"},
    "experiments": ANY,
    "benchmarks": ANY,
}

FLAGS_IN = re.compile(r"diffrl/config\.py|experiments/.*")
DEVICES_IN = re.compile(r"diffrl/train/(mesh|step)\.py")
ORBAX_IN = re.compile(r"diffrl/train/checkpoint\.py")
FLAX_IN = re.compile(r"diffrl/(nets|rl|pretrained)/.*")

DEVICE_MODULES = (
    "jax.sharding",
    "jax.experimental.shard_map",
    "jax.experimental.multihost_utils",
    "jax.distributed",
)
DEVICE_NAMES = {
    *("Mesh", "NamedSharding", "PartitionSpec", "PositionalSharding", "make_mesh", "set_mesh"),
    *("shard_map", "pmap", "with_sharding_constraint", "make_array_from_process_local_data"),
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "ppermute", "all_gather", "all_to_all", "axis_index"),
}
DEVICE_KEYWORDS = {"donate_argnums", "donate_argnames", "in_shardings", "out_shardings"}
# Constructors that only describe; everything else that runs when a module is imported is work.
CHEAP = re.compile(
    r"(dataclasses\.)?field|(\w+\.)?leaf|(typing\.)?(TypeVar|NamedTuple|ParamSpec)|(functools\.)?partial|re\.compile"
    r"|pathlib\.Path|frozenset|set|dict|tuple|float|range|object|np\.\w+\d|math\.\w+|logging\.getLogger|nn\.initializers\.\w+"
    r"|types\.MappingProxyType|jax\.tree_util\.register_dataclass|\w+\.def(vjp|jvp|jvps)"
)
LONGEST = 400


class Module(NamedTuple):
    path: str  # from the root, with slashes
    source: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """Where a file belongs: nets for diffrl/nets/unet.py, config for diffrl/config.py, experiments, benchmarks."""
        parts = pathlib.PurePosixPath(self.path).with_suffix("").parts
        return parts[1] if parts[0] == "diffrl" and len(parts) > 1 else parts[0]


def module(path: str, source: str) -> Module:
    return Module(path, source, ast.parse(source))


def modules() -> list[Module]:
    files = sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py"))
    return [module(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names, and nothing for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imports(mod: Module) -> Iterator[str]:
    """Every name that a module imports, absolute: "diffrl.nets.unet", and "diffrl.nets.unet.UNet" for a `from`."""
    package = mod.path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(mod.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def aliases(mod: Module) -> set[str]:
    """The names that imports bind by `as`."""
    nodes = (node for node in ast.walk(mod.tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {alias.asname for node in nodes for alias in node.names if alias.asname}


def is_under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


# --- the rules: each looks at one module and says what is wrong -----------------------------------------------------


def folders(mod: Module) -> Iterator[str]:
    allowed = MAY_IMPORT.get(mod.room, set()) | {mod.room, "errors", "__version__", ""}
    for name in imports(mod):
        top, _, rest = name.partition(".")
        if top == "diffrl" and rest.partition(".")[0] not in allowed:
            yield f"{mod.room} imports {name}"


def experiments_are_leaves(mod: Module) -> Iterator[str]:
    yield from (
        f"imports {name}" for name in imports(mod) if is_under(name, "experiments", "tests", "benchmarks")
    )


def flags(mod: Module) -> Iterator[str]:
    if not FLAGS_IN.fullmatch(mod.path):
        yield from (
            f"imports {name}"
            for name in imports(mod)
            if is_under(name, "absl.flags", "absl.app", "ml_collections.config_flags")
        )


def devices(mod: Module) -> Iterator[str]:
    if DEVICES_IN.fullmatch(mod.path):
        return
    for name in imports(mod):
        jaxes = is_under(name, "jax") and name.rpartition(".")[2] in DEVICE_NAMES
        if is_under(name, *DEVICE_MODULES) or jaxes:
            yield f"imports {name}"
    for node in ast.walk(mod.tree):
        chain = dotted(node) if isinstance(node, ast.Attribute) else ""
        root, _, last = chain.rpartition(".")
        if is_under(chain, *DEVICE_MODULES) or (last in DEVICE_NAMES and is_under(root, "jax", "lax")):
            yield f"{chain} in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in DEVICE_KEYWORDS:
            yield f"{node.arg} in line {node.lineno}"


def orbax(mod: Module) -> Iterator[str]:
    if not ORBAX_IN.fullmatch(mod.path):
        yield from (f"imports {name}" for name in imports(mod) if is_under(name, "orbax"))


def flax(mod: Module) -> Iterator[str]:
    if not FLAX_IN.fullmatch(mod.path):
        yield from (f"imports {name}" for name in imports(mod) if is_under(name, "flax"))


def typed_keys(mod: Module) -> Iterator[str]:
    """Raw keys belong to the adapter of brax, which wants them."""
    if not any(is_under(name, "brax") for name in imports(mod)):
        for node in ast.walk(mod.tree):
            if dotted(node).endswith("random.PRNGKey"):
                yield f"a raw key in line {node.lineno}; use jax.random.key"


def string_dispatch(mod: Module) -> Iterator[str]:
    """Strings that name code; reading a field by its name is no dispatch."""
    modules_here = {name.rpartition(".")[2] for name in imports(mod)} | aliases(mod)
    called = {call.func for call in calls(mod.tree)}
    for call in calls(mod.tree):
        name = dotted(call.func)
        if name in {
            "globals",
            "locals",
            "eval",
            "exec",
            "__import__",
            "importlib.import_module",
            "import_module",
        }:
            yield f"{name}() in line {call.lineno}"
        elif name == "getattr" and not isinstance(call.args[1], ast.Constant):
            if call in called or dotted(call.args[0]) in modules_here:
                yield f"getattr picks code by name in line {call.lineno}"


def import_time_work(mod: Module) -> Iterator[str]:
    for node in executed_on_import(mod.tree.body):
        if isinstance(node, ast.For | ast.While):
            yield f"a loop in line {node.lineno}"
        elif isinstance(node, ast.Call) and not CHEAP.fullmatch(dotted(node.func)):
            yield f"{dotted(node.func) or 'a call'}() in line {node.lineno}"


def executed_on_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when a module is imported: no decorators, bodies of functions, or what `__main__` guards."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            arguments = statement.args
            yield from (
                n
                for default in (*arguments.defaults, *arguments.kw_defaults)
                if default
                for n in reach(default)
            )
        elif isinstance(statement, ast.ClassDef):
            yield from executed_on_import(statement.body)
        elif not (isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)):
            yield from reach(statement)


def reach(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what is evaluated with it."""
    yield node
    if not isinstance(node, ast.Lambda | ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from reach(child)


def size(mod: Module) -> Iterator[str]:
    lines = mod.source.count("\n")
    if lines > LONGEST:
        yield f"{lines} lines; split it"


def leftovers(mod: Module) -> Iterator[str]:
    for number, line in enumerate(mod.source.splitlines(), 1):
        for word in re.findall(
            r"\b(?:raise NotImplementedError|TODO|FIXME|XXX)\b|[\"'](?:/home|/root|/Users)/", line
        ):
            yield f"{word} in line {number}"


RULES: list[Callable[[Module], Iterator[str]]] = [
    folders,
    experiments_are_leaves,
    flags,
    devices,
    orbax,
    flax,
    typed_keys,
    string_dispatch,
    import_time_work,
    size,
    leftovers,
]


# --- two rules need the whole house -----------------------------------------------------------------------------------


def own_types(house: list[Module]) -> set[str]:
    return {node.name for mod in house for node in ast.walk(mod.tree) if isinstance(node, ast.ClassDef)}


def type_dispatch(house: list[Module]) -> Iterator[str]:
    """isinstance, `type(x) is`, and class patterns on classes of our own."""
    own = own_types(house)
    for mod in house:
        for node in ast.walk(mod.tree):
            kinds: list[ast.AST] = []
            if isinstance(node, ast.Call) and dotted(node.func) in {"isinstance", "issubclass"}:
                kinds = list(ast.walk(node.args[1]))
            elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
                kinds = [kind for part in node.comparators for kind in ast.walk(part)]
            elif isinstance(node, ast.MatchClass):
                kinds = [node.cls]
            named = {dotted(kind).rpartition(".")[2] for kind in kinds} & own
            if named:
                yield f"{mod.path}: asks for {', '.join(sorted(named))} in line {node.lineno}"


def one_brax_adapter(house: list[Module]) -> Iterator[str]:
    users = [mod.path for mod in house if any(is_under(name, "brax") for name in imports(mod))]
    if len(users) > 1:
        yield f"brax is known to {', '.join(users)}; one adapter is enough"


HOUSE_RULES: list[Callable[[list[Module]], Iterator[str]]] = [type_dispatch, one_brax_adapter]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps(rule):
    assert [f"{mod.path}: {complaint}" for mod in modules() for complaint in rule(mod)] == []


@pytest.mark.parametrize("rule", HOUSE_RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert list(rule(modules())) == []


def test_the_house_is_read():
    """No rule holds because nothing was looked at, or because a room is missing from the table."""
    house = modules()
    assert {"diffusion", "nets", "data", "train", "evaluate", "config"} <= {mod.room for mod in house}
    rooms = {mod.room for mod in house if mod.path.count("/") > 1 or not mod.path.startswith("diffrl/")}
    assert rooms <= MAY_IMPORT.keys()


BROKEN = [
    (folders, "diffrl/nets/a.py", "from diffrl.diffusion import process"),
    (folders, "diffrl/nets/a.py", "from diffrl import data"),
    (folders, "diffrl/nets/a.py", "from ..train.state import TrainState"),
    (folders, "diffrl/nets/deep/a.py", "from ...train import state"),
    (folders, "diffrl/nets/a.py", "from .. import rl"),
    (folders, "diffrl/train/a.py", "def f():\n    import diffrl.evaluate.frechet"),
    (folders, "diffrl/train/a.py", "from diffrl import config"),
    (folders, "diffrl/planning/a.py", "from diffrl.nets.unet import UNet"),
    (folders, "diffrl/pretrained/a.py", "import diffrl.diffusion"),
    (folders, "diffrl/recipes/a.py", "from diffrl.serve import http"),
    (folders, "diffrl/errors.py", "from diffrl import nets"),
    (experiments_are_leaves, "diffrl/recipes/a.py", "from experiments import ddpm"),
    (experiments_are_leaves, "experiments/a.py", "import experiments.ddpm"),
    (experiments_are_leaves, "experiments/a.py", "from . import ddpm"),
    (experiments_are_leaves, "benchmarks/a.py", "from experiments.ddpm import Config"),
    (flags, "diffrl/train/loop.py", "from absl import flags"),
    (flags, "diffrl/data/a.py", "import absl.flags as f"),
    (flags, "diffrl/config_tree.py", "from ml_collections import config_flags"),
    (devices, "diffrl/diffusion/a.py", "from jax.sharding import NamedSharding"),
    (devices, "diffrl/train/loop.py", "from jax import shard_map"),
    (devices, "diffrl/rl/a.py", "import jax\ndef f(x): return jax.lax.pmean(x, 'data')"),
    (devices, "diffrl/rl/a.py", "from jax import lax\ndef f(x): return lax.psum(x, 'data')"),
    (devices, "diffrl/data/a.py", "import jax\ndef f(g): return jax.sharding.Mesh(g, ('data',))"),
    (devices, "experiments/a.py", "import jax\ndef f(g): return jax.jit(g, donate_argnums=0)"),
    (devices, "experiments/a.py", "import jax\ndef f(): jax.distributed.initialize()"),
    (orbax, "diffrl/train/loop.py", "import orbax.checkpoint as ocp"),
    (orbax, "experiments/a.py", "from orbax import checkpoint"),
    (flax, "diffrl/diffusion/a.py", "import flax.linen as nn"),
    (flax, "experiments/a.py", "from flax import linen"),
    (typed_keys, "diffrl/rl/a.py", "import jax\nk = jax.random.PRNGKey(0)"),
    (string_dispatch, "diffrl/train/a.py", "def f(name): return globals()[name]()"),
    (string_dispatch, "diffrl/train/a.py", "import optax\ndef f(name): return getattr(optax, name)"),
    (string_dispatch, "diffrl/train/a.py", "import optax as ox\ndef f(name): return getattr(ox, name)"),
    (string_dispatch, "diffrl/train/a.py", "def f(x, name): return getattr(x, name)()"),
    (string_dispatch, "experiments/a.py", "import importlib\ndef f(n): return importlib.import_module(n)"),
    (import_time_work, "diffrl/nets/a.py", "import jax\nKEY = jax.random.key(0)"),
    (import_time_work, "diffrl/nets/a.py", "import numpy as np\ndef f(x=np.zeros(3)): return x"),
    (import_time_work, "diffrl/nets/a.py", "class A:\n    table = build()"),
    (import_time_work, "diffrl/nets/a.py", "for i in (1, 2): pass"),
    (import_time_work, "diffrl/nets/a.py", "if True:\n    register('x')"),
    (size, "diffrl/nets/a.py", "x = 1\n" * (LONGEST + 1)),
    (leftovers, "diffrl/nets/a.py", "def f(): raise NotImplementedError"),
    (leftovers, "diffrl/nets/a.py", "x = 1  # TODO: more"),
    (leftovers, "diffrl/nets/a.py", "DATA = '/home/someone/data'"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_a_broken_rule_is_found(rule, path, source):
    assert list(rule(module(path, source)))


KEPT = [
    (
        folders,
        "diffrl/nets/a.py",
        "from diffrl.nets.unet import UNet\nfrom . import blocks\nfrom diffrl import errors",
    ),
    (
        folders,
        "diffrl/alignment/a.py",
        "from diffrl.diffusion import samplers\nfrom diffrl.rl import returns",
    ),
    (folders, "experiments/a.py", "from diffrl.train import loop\nfrom diffrl import config, nets, recipes"),
    (flags, "diffrl/config.py", "from absl import flags"),
    (flags, "diffrl/train/loop.py", "from absl import logging"),
    (devices, "diffrl/train/mesh.py", "from jax.sharding import NamedSharding"),
    (devices, "diffrl/evaluate/a.py", "import meshlib\ndef f(x): return meshlib.Mesh(x)"),
    (orbax, "diffrl/train/checkpoint.py", "import orbax.checkpoint as ocp"),
    (flax, "diffrl/nets/a.py", "import flax.linen as nn"),
    (typed_keys, "diffrl/rl/brax.py", "import brax, jax\ndef f(): return jax.random.PRNGKey(0)"),
    (string_dispatch, "diffrl/train/a.py", "def f(config, name): return getattr(config, name)"),
    (string_dispatch, "diffrl/train/a.py", "def f(x): return getattr(x, 'shape', ())"),
    (import_time_work, "experiments/a.py", "if __name__ == '__main__':\n    run(main)"),
    (
        import_time_work,
        "diffrl/nets/a.py",
        "import jax\n@jax.jit\ndef f(x=(1, 2)): return g(x)\nh = lambda x: g(x)",
    ),
    (
        import_time_work,
        "diffrl/nets/a.py",
        "import functools\n@functools.partial(jit, static_argnums=0)\ndef f(): ...",
    ),
    (size, "diffrl/nets/a.py", "x = 1\n" * LONGEST),
]


@pytest.mark.parametrize(("rule", "path", "source"), KEPT)
def test_what_is_allowed_is_not_found(rule, path, source):
    assert list(rule(module(path, source))) == []


def test_dispatch_on_our_own_types_is_found():
    process = module("diffrl/diffusion/process.py", "class Process: ...")
    for source in (
        "def f(x): return isinstance(x, Process)",
        "def f(x): return isinstance(x, (int, process.Process))",
        "def f(x): return isinstance(x, int | Process)",
        "def f(x): return type(x) is Process",
        "def f(x):\n    match x:\n        case Process(): return 1",
    ):
        assert list(type_dispatch([process, module("diffrl/diffusion/a.py", source)]))
    assert not list(
        type_dispatch([process, module("diffrl/a.py", "def f(x): return isinstance(x, (int, dict))")])
    )


def test_a_second_brax_adapter_is_found():
    first, second = (module(f"diffrl/rl/{name}.py", "from brax import envs") for name in ("a", "b"))
    assert not list(one_brax_adapter([first]))
    assert list(one_brax_adapter([first, second]))
