"""The rules of the house as functions of source code, by `ast`: what each finds wrong, in words.

1. Folders: `diffusion`, `compression`, `nets`, `rl`, `data`, `train` and `evaluate` do not know one another; what
   may know them is in `MAY_IMPORT`.  Nothing imports an experiment.
2. Flags, devices, checkpoints, networks and brax's keys each have their files.
3. No dispatch on our own types or on strings that name code, and no work at import time.
"""

import ast
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("diffrl", "experiments", "benchmarks")

ROLES = {"diffusion", "compression", "nets", "rl", "data", "train", "evaluate"}
TOPICS = {"planning", "alignment"}
ANY = ROLES | TOPICS | {"pretrained", "safety", "serve", "recipes", "config", "config_help", "config_tree"}
FOR_ALL = {"errors", "config_leaf"}  # they import nothing of the house
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

# Packages, and the files that may import them.
ONLY_IN = {
    ("absl.flags", "absl.app", "ml_collections.config_flags"): re.compile(r"diffrl/config\.py|experiments/.*"),
    ("orbax",): re.compile(r"diffrl/train/checkpoint\.py"),
    ("flax",): re.compile(r"diffrl/(nets|rl|pretrained)/.*"),
}
DEVICES_IN = re.compile(r"diffrl/train/(mesh|step)\.py")
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
    r"|pathlib\.Path|frozenset|set|dict|tuple|float|range|object|np\.\w+\d|math\.\w+|logging\.getLogger"
    r"|nn\.initializers\.\w+|os\.environ\.setdefault|types\.MappingProxyType|jax\.tree_util\.register_dataclass|\w+\.def(vjp|jvp|jvps)"
)
BY_NAME = {"globals", "locals", "eval", "exec", "__import__", "import_module", "importlib.import_module"}
LEFTOVER = re.compile(r"\b(?:raise NotImplementedError|TODO|FIXME|XXX)\b|[\"'](?:/home|/root|/Users)/")
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


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        kind = getattr(node, "returns" if isinstance(node, ast.FunctionDef) else "annotation", None)
        if kind is not None:
            yield kind


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


# --- rules that look at one module ---


def folders(mod: Module) -> Iterator[str]:
    allowed = MAY_IMPORT.get(mod.room, set()) | {mod.room, *FOR_ALL, "__version__", ""}
    for name in imports(mod):
        top, _, rest = name.partition(".")
        if top == "diffrl" and rest.partition(".")[0] not in allowed:
            yield f"{mod.room} imports {name}"


def experiments_are_leaves(mod: Module) -> Iterator[str]:
    for name in imports(mod):
        # A benchmark may measure an experiment's recipe: that is what users run.
        if is_under(name, "tests") or (mod.room != "benchmarks" and is_under(name, "experiments", "benchmarks")):
            yield f"imports {name}"


def packages(mod: Module) -> Iterator[str]:
    for names, files in ONLY_IN.items():
        if not files.fullmatch(mod.path):
            yield from (f"imports {name}" for name in imports(mod) if is_under(name, *names))


def devices(mod: Module) -> Iterator[str]:
    """An annotation may say that something is a mesh; making or using one is another matter."""
    if DEVICES_IN.fullmatch(mod.path):
        return
    for name in imports(mod):
        jaxes = is_under(name, "jax") and name.rpartition(".")[2] in DEVICE_NAMES
        if is_under(name, *DEVICE_MODULES) or jaxes:
            yield f"imports {name}"
    types = {part for kind in annotations(mod.tree) for part in ast.walk(kind)}
    for node in ast.walk(mod.tree):
        chain = dotted(node) if isinstance(node, ast.Attribute) and node not in types else ""
        root, _, last = chain.rpartition(".")
        if is_under(chain, *DEVICE_MODULES) or (last in DEVICE_NAMES and is_under(root, "jax", "lax")):
            yield f"{chain} in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in DEVICE_KEYWORDS:
            yield f"{node.arg} in line {node.lineno}"


def typed_keys(mod: Module) -> Iterator[str]:
    """Raw keys belong to the adapter of brax, which wants them."""
    if not any(is_under(name, "brax") for name in imports(mod)):
        for node in ast.walk(mod.tree):
            if dotted(node).endswith("random.PRNGKey"):
                yield f"a raw key in line {node.lineno}; use jax.random.key"


def string_dispatch(mod: Module) -> Iterator[str]:
    """Strings that name code; reading a field by its name is no dispatch, nor is a benchmark's look for a library."""
    if mod.room == "benchmarks":
        return
    known_modules = {name.rpartition(".")[2] for name in imports(mod)} | aliases(mod)
    called = {call.func for call in calls(mod.tree)}
    for call in calls(mod.tree):
        name = dotted(call.func)
        if name in BY_NAME:
            yield f"{name}() in line {call.lineno}"
        elif name == "getattr" and not isinstance(call.args[1], ast.Constant):
            picks = call in called or dotted(call.args[0]) in known_modules
            yield from [f"getattr picks code by name in line {call.lineno}"] if picks else []


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
            for default in (*arguments.defaults, *filter(None, arguments.kw_defaults)):
                yield from reach(default)
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
        for word in LEFTOVER.findall(line):
            yield f"{word} in line {number}"


RULES: list[Callable[[Module], Iterator[str]]] = [
    folders,
    experiments_are_leaves,
    packages,
    devices,
    typed_keys,
    string_dispatch,
    import_time_work,
    size,
    leftovers,
]


# --- rules that need the whole house ---


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
    # A benchmark that measures us against brax has to know it.
    known = [mod for mod in house if mod.room != "benchmarks"]
    users = [mod.path for mod in known if any(is_under(name, "brax") for name in imports(mod))]
    if len(users) > 1:
        yield f"brax is known to {', '.join(users)}; one adapter is enough"


HOUSE_RULES: list[Callable[[list[Module]], Iterator[str]]] = [type_dispatch, one_brax_adapter]
