"""The tree keeps the rules of the house, and each rule is shown to bite on a few lines that break it."""

import pytest
from house_rules import (
    HOUSE_RULES,
    LONGEST,
    MAY_IMPORT,
    RULES,
    devices,
    experiments_are_leaves,
    folders,
    import_time_work,
    leftovers,
    module,
    modules,
    one_brax_adapter,
    packages,
    size,
    string_dispatch,
    type_dispatch,
    typed_keys,
)


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
    (experiments_are_leaves, "diffrl/nets/a.py", "from benchmarks import common"),
    (experiments_are_leaves, "benchmarks/a.py", "from tests.conftest import CACHE"),
    (packages, "diffrl/train/loop.py", "from absl import flags"),
    (packages, "diffrl/data/a.py", "import absl.flags as f"),
    (packages, "diffrl/config_tree.py", "from ml_collections import config_flags"),
    (devices, "diffrl/diffusion/a.py", "from jax.sharding import NamedSharding"),
    (devices, "diffrl/train/loop.py", "from jax import shard_map"),
    (devices, "diffrl/rl/a.py", "import jax\ndef f(x): return jax.lax.pmean(x, 'data')"),
    (devices, "diffrl/rl/a.py", "from jax import lax\ndef f(x): return lax.psum(x, 'data')"),
    (devices, "diffrl/data/a.py", "import jax\ndef f(g): return jax.sharding.Mesh(g, ('data',))"),
    (devices, "experiments/a.py", "import jax\ndef f(g): return jax.jit(g, donate_argnums=0)"),
    (devices, "experiments/a.py", "import jax\ndef f(): jax.distributed.initialize()"),
    (packages, "diffrl/train/loop.py", "import orbax.checkpoint as ocp"),
    (packages, "experiments/a.py", "from orbax import checkpoint"),
    (packages, "diffrl/diffusion/a.py", "import flax.linen as nn"),
    (packages, "experiments/a.py", "from flax import linen"),
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
    (experiments_are_leaves, "benchmarks/a.py", "from benchmarks.common import Pair"),
    (packages, "diffrl/config.py", "from absl import flags"),
    (packages, "diffrl/train/loop.py", "from absl import logging"),
    (devices, "diffrl/train/mesh.py", "from jax.sharding import NamedSharding"),
    (
        devices,
        "diffrl/recipes/a.py",
        "import jax\ndef f(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh: return mesh",
    ),
    (devices, "diffrl/evaluate/a.py", "import meshlib\ndef f(x): return meshlib.Mesh(x)"),
    (packages, "diffrl/train/checkpoint.py", "import orbax.checkpoint as ocp"),
    (packages, "diffrl/nets/a.py", "import flax.linen as nn"),
    (typed_keys, "diffrl/rl/brax.py", "import brax, jax\ndef f(): return jax.random.PRNGKey(0)"),
    (string_dispatch, "diffrl/train/a.py", "def f(config, name): return getattr(config, name)"),
    (
        string_dispatch,
        "benchmarks/a.py",
        "import importlib\ndef f(name): return importlib.import_module(name)",
    ),
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
    assert not list(type_dispatch([process, module("diffrl/a.py", "def f(x): return isinstance(x, (int, dict))")]))


def test_a_second_brax_adapter_is_found():
    first, second = (module(f"diffrl/rl/{name}.py", "from brax import envs") for name in ("a", "b"))
    assert not list(one_brax_adapter([first]))
    assert list(one_brax_adapter([first, second]))
