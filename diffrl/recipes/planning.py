"""A model of trajectories that plans: networks, losses, how plans are drawn, and the run that trains them."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.config import Run, leaf
from diffrl.data.catalog import DataConfig
from diffrl.data.normalisers import normalise, unnormalise
from diffrl.data.source import Source
from diffrl.diffusion import guidance
from diffrl.errors import UserError
from diffrl.nets.perceptron import Perceptron
from diffrl.nets.temporal_transformer import TemporalTransformer
from diffrl.nets.temporal_unet import TemporalUNet
from diffrl.planning import decision_diffuser, diffuser, policies
from diffrl.planning.diffuser import Draws, Planner
from diffrl.planning.plans import Space
from diffrl.recipes import denoising, training
from diffrl.recipes.denoising import Diffusion, DiffusionConfig, SampleConfig
from diffrl.recipes.training import TrainConfig, Training
from diffrl.train import hooks, mesh, optim, state, step
from diffrl.train.checkpoint import Checkpoints
from diffrl.train.optim import OptimConfig
from diffrl.train.state import Aux, TrainState
from diffrl.train.writers import Writers

Array = jax.Array


@dataclasses.dataclass
class NetConfig:
    """The network of plans."""

    kind: str = leaf("unet", "unet (Diffuser's) or transformer")
    channels: int = leaf(32, "unet: width of the first level", at_least=1)
    multipliers: tuple[int, ...] = leaf((1, 4, 8), "unet: width of each level, in units of channels", at_least=1)
    width: int = leaf(128, "transformer", at_least=1)
    depth: int = leaf(6, "transformer", at_least=1)
    heads: int = leaf(4, "transformer", at_least=1)
    dtype: str = leaf("float32", "of products: float32, or bfloat16 on GPU and TPU")


@dataclasses.dataclass
class ModelConfig:
    """What is diffused, and its loss."""

    horizon: int = leaf(128, "rows of a plan", at_least=2)
    stride: int = leaf(1, "steps of the world from row to row", at_least=1)
    any_arrival: bool = leaf(False, "goals are pinned anywhere in half of all windows, else at the end only")
    action_weight: float = leaf(1.0, "of the first action's error", at_least=0)
    discount: float = leaf(1.0, "of the weight of the error, from step to step", above=0, at_most=1)


@dataclasses.dataclass
class PlanConfig:
    """How plans are drawn and carried out; may differ from one use of a model to the next."""

    sampler: str = leaf("ancestral", "ancestral, ddim, heun, dpmpp_2m, dpmpp_2m_sde or unipc", free=True)
    steps: int = leaf(0, "of the sampler, 0: all of the table's", free=True, at_least=0)
    temperature: float = leaf(1.0, "ancestral: factor on the noise of its steps", free=True, at_least=0)
    clip: bool = leaf(True, "keep the estimate of the plan in [-1, 1]", free=True)
    candidates: int = leaf(1, "plans of which the best is taken", free=True, at_least=1)
    every: int = leaf(0, "steps from plan to plan; 0: the first is carried out to its end", free=True, at_least=0)
    warm: float = leaf(
        0.0,
        "noise level from which a plan starts anew from the one before, as part of the table; 0: from pure noise",
        free=True,
        at_least=0,
        at_most=1,
    )
    remaining: int = leaf(
        0,
        "goals stay at their time, and from then on so many steps ahead; 0: always at the plan's end",
        free=True,
        at_least=0,
    )
    seed: int = leaf(0, "of episodes and plans", free=True)


@dataclasses.dataclass
class DecisionConfig:
    """What is particular to Decision Diffuser."""

    drop: float = leaf(0.25, "how often the model is told no return in training", at_least=0, at_most=1)
    inverse: tuple[int, ...] = leaf((256, 256), "widths of the inverse model's hidden layers", at_least=1)
    target: float = leaf(0.9, "return that plans are asked for, as part of the demonstrations' best", free=True)
    guidance: float = leaf(1.2, "classifier-free guidance: 0 unconditional, 1 conditional, more is stronger", free=True)


class Model(NamedTuple):
    """What a config comes to for one task.

    Attributes:
        init: key -> params.
        loss: of the training step.
        planner: (params, the state's frozen) -> Planner.
        act: the same -> how its plans are carried out.
    """

    init: Callable[[Array], Any]
    loss: Callable
    planner: Callable[[Any, Any], Planner]
    act: Callable[[Any, Any], policies.Act]


class Session(NamedTuple):
    """A run that is open."""

    config: Any
    workdir: pathlib.Path
    source: Source
    fitted: Any
    model: Model
    devices: jax.sharding.Mesh
    checkpoints: Checkpoints
    best: Checkpoints
    writers: Writers


def open_session(config: Any, run: Run, source: Source, fitted: Any, model: Model) -> Session:
    """Devices, checkpoints and writers of a run of a config with `mesh`, `train`, `optim` and `seed`."""
    sizes = config.mesh
    return Session(
        config,
        run.workdir,
        source,
        fitted,
        model,
        mesh.make_mesh(sizes.data, sizes.fsdp, sizes.tensor),
        Checkpoints(run.workdir / "checkpoints", config.train.keep),
        Checkpoints(run.workdir / "best", 1),
        Writers(run.workdir),
    )


def make_network(config: NetConfig, outputs: int, conditions: int = 0) -> Any:
    """The flax module (x [B, H, C], t [B], cond) -> [B, H, outputs]."""
    dtype = denoising.choose("net.dtype", config.dtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    makers = {
        "unet": lambda: TemporalUNet(
            outputs, config.channels, config.multipliers, conditions=conditions, dtype=dtype
        ),
        "transformer": lambda: TemporalTransformer(
            outputs, config.width, config.depth, config.heads, conditions=conditions, dtype=dtype
        ),
    }
    return denoising.choose("net.kind", config.kind, makers)()


def make_space(frozen: Any, config: ModelConfig, actions: bool = True) -> Space:
    """The plans of a model whose normalisers lie in its state's `frozen`; actions: whether plans hold them."""
    seen, done = frozen["observations"], frozen["actions"]
    return Space(
        config.horizon,
        done.data.shape[-1] if actions else 0,
        seen.data.shape[-1],
        functools.partial(normalise, seen),
        functools.partial(unnormalise, seen),
        functools.partial(normalise, done),
        functools.partial(unnormalise, done),
        config.stride,
    )


def initialiser(network: Any, *example: Any) -> Callable[[Array], Any]:
    """key -> the network's parameters."""

    def init(key):
        fast = jax.random.key(jax.random.bits(key), impl="rbg")
        return jax.jit(network.init)(fast, *example)["params"]

    return init


def make_drawing(diffusion: Diffusion, table_steps: int, plan: PlanConfig) -> Callable[..., Draws]:
    """(denoiser, score or None) -> how plans are drawn.

    The grids are made here, once and outside of jit.
    """
    settings = SampleConfig(
        sampler=plan.sampler, steps=plan.steps or table_steps, grid="table", clip=plan.clip,
        temperature=plan.temperature,
    )  # fmt: skip
    grid = denoising.make_grid(diffusion, settings, table_steps)
    warm = warm_grid(grid, plan.warm)

    def draws(denoise, score=None):
        sampler = denoising.make_sampler(diffusion, settings, denoise, None)
        return Draws(diffusion.process, lambda fixed: sampler, grid, warm, plan.candidates, score)

    return draws


def warm_grid(grid: Array, level: float) -> Array | None:
    """The part of a grid that begins nearest to time `level`; None for 0.

    Raises:
        UserError: no step is left.
    """
    if not level:
        return None
    begin = int(jnp.argmin(jnp.abs(grid[:-1] - level)))
    return grid[begin:]


def diffuser_model(config: Any, fitted: Any, example_shape: tuple[int, int]) -> Model:
    """Diffuser's model of actions and observations that end at a goal; of a config with net, model, diffusion, plan."""
    settings = config.model
    diffusion = denoising.make_diffusion(config.diffusion)
    drawing = make_drawing(diffusion, config.diffusion.table_steps, config.plan)
    network = make_network(config.net, example_shape[1])
    compute = diffuser.objective(
        diffusion.objective,
        make_space(fitted, settings),
        any_arrival=settings.any_arrival,
        action_weight=settings.action_weight,
        discount=settings.discount,
    )

    def apply(params, x, t, cond, keys):
        return network.apply({"params": params}, x, t, cond, keys)

    def loss(params, state, batch, keys):
        def model(x, t, cond):
            return apply(params, x, diffusion.network_time(t), cond, keys)

        value, metrics = compute(model, batch["x"], batch["mask"], None, keys)
        return value.mean(), Aux({name: metric.mean() for name, metric in metrics.items()})

    def planner(params, frozen):
        denoise = denoising.make_denoiser(diffusion, apply, params)
        return diffuser.planner(make_space(frozen, settings), drawing(denoise))

    init = initialiser(network, jnp.zeros((1, *example_shape)), jnp.zeros(1), None)
    return Model(init, loss, planner, lambda params, frozen: policies.towards_waypoints)


def decision_model(config: Any, fitted: Any, example_shape: tuple[int, int]) -> Model:
    """Decision Diffuser's model of observations and its inverse model; of a config with `decision` as well."""
    settings, asked = config.model, config.decision
    actions, seen = (fitted[name].data.shape[-1] for name in ("actions", "observations"))
    diffusion = denoising.make_diffusion(config.diffusion)
    drawing = make_drawing(diffusion, config.diffusion.table_steps, config.plan)
    network = make_network(config.net, seen, conditions=1)
    inverse = Perceptron(actions, asked.inverse, jax.nn.relu, orthogonal=False)
    compute = decision_diffuser.objective(
        diffusion.objective, make_space(fitted, settings, actions=False), actions, asked.drop
    )

    def init(key):
        keys = jax.random.split(key)
        plans = initialiser(network, jnp.zeros((1, settings.horizon, seen)), jnp.zeros(1), decision_diffuser.untold(1))
        return {"plans": plans(keys[0]), "inverse": initialiser(inverse, jnp.zeros((1, 2 * seen)))(keys[1])}

    def apply(params, x, t, cond, keys):
        return network.apply({"params": params["plans"]}, x, t, cond, keys)

    def make_inverse(params):
        return lambda o, after: inverse.apply({"params": params["inverse"]}, jnp.concatenate([o, after], axis=-1))

    def loss(params, state, batch, keys):
        def model(x, t, cond):
            return apply(params, x, diffusion.network_time(t), cond, keys)

        value, metrics = compute(model, make_inverse(params), batch["x"], batch["mask"], batch["returns"], keys)
        return value.mean(), Aux({name: metric.mean() for name, metric in metrics.items()})

    def planner(params, frozen):
        denoise = denoising.make_denoiser(diffusion, apply, params)
        guided = guidance.classifier_free(denoise, asked.guidance, decision_diffuser.untold(1))
        space = make_space(frozen, settings, actions=False)
        return diffuser.planner(space, drawing(guided), decision_diffuser.asked(asked.target))

    def act(params, frozen):
        return policies.inverse_dynamics(make_space(frozen, settings, actions=False), make_inverse(params))

    return Model(init, loss, planner, act)


def _fresh(session: Session) -> Callable[[], TrainState]:
    config = session.config
    key = jax.random.key(config.seed)
    optimizer = optim.make(config.optim, config.train.steps)

    def make():
        params = session.model.init(jax.random.fold_in(key, 1))
        return state.create(params, optimizer, key, frozen=session.fitted)

    return make


def train(session: Session, every: Sequence[hooks.Hook] = ()) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one."""
    config = session.config
    settings = config.train
    fresh = mesh.initialise(session.devices, _fresh(session))
    size = sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
    kind = session.devices.devices.flat[0].device_kind
    print(
        f"{session.source.name}: {session.source.length:,} windows of {session.source.shape[0]} steps; "
        f"{size / 1e6:.2f} M parameters on {session.devices.size} x {kind}",
        file=sys.stderr,
    )
    update = step.make_update(
        session.model.loss,
        optim.make(config.optim, settings.steps),
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        accumulate=settings.accumulate,
    )
    job = Training(
        settings, DataConfig(name=session.source.name), config.seed, session.source, step.global_step(update),
        session.devices, session.checkpoints, session.writers,
    )  # fmt: skip
    return training.train(job, fresh, every)


def restored(session: Session, best: bool = False) -> TrainState:
    """The newest checkpoint's state, or that of the best score; raises UserError where there is none."""
    folder = session.best if best else session.checkpoints
    found = folder.restore(mesh.abstract(session.devices, _fresh(session)))
    if found is None:
        raise UserError(f"{folder.folder} has no checkpoint yet: train first (--mode=train)")
    return found[0]
