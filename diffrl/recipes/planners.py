"""Models of trajectories that plan: their networks, their losses, and how plans are drawn from them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffrl.config import leaf
from diffrl.data.normalisers import normalise, unnormalise
from diffrl.diffusion import classifier_guidance, guidance
from diffrl.diffusion.constraints import climb
from diffrl.diffusion.sampling import Sampler, fold
from diffrl.diffusion.times import discrete
from diffrl.errors import UserError
from diffrl.nets.perceptron import Perceptron
from diffrl.nets.temporal_transformer import TemporalTransformer
from diffrl.nets.temporal_unet import TemporalUNet, TemporalValue
from diffrl.planning import decision_diffuser, diffuser, policies
from diffrl.planning.diffuser import Draws, Planner
from diffrl.planning.plans import Space, known
from diffrl.recipes import denoising
from diffrl.recipes.denoising import Diffusion, DiffusionConfig, SampleConfig
from diffrl.train.state import Aux

Array = jax.Array
VALUE = 204  # what a sample's key is folded with for the value's own noise


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
    temperature: float = leaf(
        1.0, "factor on the noise that plans begin with and, ancestral, on that of its steps", free=True, at_least=0
    )
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
        "goals stay at their time, and fewer steps before it no plan is made; 0: always at a plan's end",
        free=True,
        at_least=0,
    )
    gain: float = leaf(1.0, "mazes: of the controller that follows a plan, 1 in the paper", free=True, above=0)
    seed: int = leaf(0, "of episodes and plans", free=True, at_least=0)


@dataclasses.dataclass
class ValueConfig:
    """Diffuser's value of noisy plans, and how it guides.

    The paper's scale of 0.1 is of raw returns: of our hopper's, whose deviation is 114 with a penalty of 100,
    it would be 11 here.  What is best depends on the robot, as in the paper: 100 on hopper, where values that know no
    penalty gain nothing at any scale tried, and 0 on the walker.
    """

    train: bool = leaf(False, "train a value beside the plans; where there is no goal it is what they are for")
    discount: float = leaf(0.99, "of the returns that it learns", above=0, at_most=1)
    penalty: float = leaf(0.0, "what a termination, a fall, takes from the return: 100 in the paper's code", at_least=0)
    multipliers: tuple[int, ...] = leaf((1, 2, 4), "width of each level, in units of net.channels", at_least=1)
    scale: float = leaf(
        0.1,
        "of the climb before each step, of returns in units of their spread; 0: candidates are only ranked",
        free=True,
        at_least=0,
    )
    climbs: int = leaf(2, "gradient steps before each step of the sampler", free=True, at_least=1)
    until: int = leaf(2, "steps of the table at the end that are not guided", free=True, at_least=0)
    through: str = leaf(
        "state", "state: Diffuser's climb; estimate: the denoiser's estimate is shifted instead", free=True
    )


@dataclasses.dataclass
class DecisionConfig:
    """What is particular to Decision Diffuser."""

    drop: float = leaf(0.25, "how often the model is told no return in training", at_least=0, at_most=1)
    inverse: tuple[int, ...] = leaf((256, 256), "widths of the inverse model's hidden layers", at_least=1)
    target: float = leaf(
        0.0,
        "return that plans are asked for, as its rank, 0 to 1, among the demonstrations'; 0: by quantile",
        free=True,
        at_least=0,
        at_most=1,
    )
    quantile: float = leaf(
        0.0,
        "learn, and ask for, this quantile of the returns that demonstrations had from where a plan begins; 0: none",
        at_least=0,
        below=1,
    )
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


def check_every(config: ModelConfig, every: int) -> None:
    """Raises UserError for a replanning interval that plans of this model cannot have."""
    policies.check_every(Space(config.horizon, 0, 0, stride=config.stride), every)


def make_network(config: NetConfig, outputs: int, conditions: int = 0) -> Any:
    """The flax module (x [B, H, C], t [B], cond) -> [B, H, outputs]."""
    if config.kind == "unet" and not config.multipliers:
        raise UserError("net.multipliers=(): give one for each level, as in (1,4,8)")
    dtype = denoising.choose("net.dtype", config.dtype, {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    makers = {
        "unet": lambda: TemporalUNet(outputs, config.channels, config.multipliers, conditions=conditions, dtype=dtype),
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


def make_diffusion(config: DiffusionConfig) -> Diffusion:
    """Without a learned variance, whose loss knows no pinned entries, and without labels to drop."""
    if config.drop_label != DiffusionConfig().drop_label:
        raise UserError(f"diffusion.drop_label={config.drop_label}: plans have no labels; leave it out")
    if config.learned_variance:
        raise UserError(
            "diffusion.learned_variance=True: plans are pinned, which that loss does not know; leave it out"
        )
    return denoising.make_diffusion(config)


def _check_clip(config: Any) -> None:
    """Raises UserError where plans would be clipped to one standard deviation."""
    if config.plan.clip and config.task.normaliser == "gaussian":
        raise UserError("plan.clip=True with task.normaliser=gaussian: such plans leave [-1, 1]; take plan.clip=False")


def initialiser(network: Any, *example: Any) -> Callable[[Array], Any]:
    """key -> the network's parameters."""

    def init(key):
        fast = jax.random.key(jax.random.bits(key), impl="rbg")
        return jax.jit(network.init)(fast, *example)["params"]

    return init


def make_drawing(diffusion: Diffusion, table_steps: int, plan: PlanConfig) -> Callable[..., Draws]:
    """(denoiser, score or None, (Sampler, fixed entries) -> Sampler) -> how plans are drawn.

    The grids are made here, once and outside of jit.
    """
    settings = SampleConfig(
        sampler=plan.sampler, steps=plan.steps or table_steps, grid="table", clip=plan.clip,
        temperature=plan.temperature,
    )  # fmt: skip
    grid = denoising.make_grid(diffusion, settings, table_steps, "plan")
    warm = warm_grid(grid, plan.warm)
    denoising.make_sampler(
        diffusion, settings, lambda x, t, cond: x, None, "plan"
    )  # an unknown name is found before training

    def draws(denoise, score=None, around=lambda sampler, fixed: sampler):
        sampler = denoising.make_sampler(diffusion, settings, denoise, None)
        return Draws(
            diffusion.process,
            lambda fixed: around(sampler, fixed),
            grid,
            warm,
            plan.temperature,
            plan.candidates,
            score,
        )

    return draws


def warm_grid(grid: Array, level: float) -> Array | None:
    """The part of a grid that begins nearest to time `level`; None for 0."""
    if not level:
        return None
    begin = int(jnp.argmin(jnp.abs(grid[:-1] - level)))
    return grid[begin:]


def diffuser_model(config: Any, fitted: Any, example_shape: tuple[int, ...], goal: bool = True) -> Model:
    """Diffuser's model of actions and observations; of a config with net, model, value, diffusion and plan.

    goal: plans end at a goal, and are followed by Diffuser's controller for mazes; else their actions are carried out.
    """
    settings, valued = config.model, config.value
    _check_clip(config)
    diffusion = make_diffusion(config.diffusion)
    table = config.diffusion.table_steps
    drawing = make_drawing(diffusion, table, config.plan)
    told = fitted["observations"].data.shape[-1] + 1 if settings.any_arrival else 0
    network = make_network(config.net, example_shape[1], conditions=told)
    critic = TemporalValue(config.net.channels, valued.multipliers)
    space = make_space(fitted, settings)
    through = denoising.choose("value.through", valued.through, {"state": False, "estimate": True})
    if settings.any_arrival and not goal:
        raise UserError("model.any_arrival=True: there is no goal here; leave it out")
    if config.plan.remaining and not settings.any_arrival:
        raise UserError(
            f"plan.remaining={config.plan.remaining}: this model knows goals at a plan's end only; train with "
            "model.any_arrival=True, or take 0"
        )
    if config.plan.candidates > 1 and not valued.train:
        raise UserError(
            f"plan.candidates={config.plan.candidates}: nothing ranks them in a model that was trained with "
            "value.train=False; take 1"
        )
    compute = diffuser.objective(
        diffusion.objective,
        space,
        goal=goal,
        any_arrival=settings.any_arrival,
        action_weight=settings.action_weight,
        discount=settings.discount,
    )
    regression = classifier_guidance.regression(diffusion.process, discrete(table))

    def init(key):
        keys, example = jax.random.split(key), (jnp.zeros((1, *example_shape)), jnp.zeros(1), None)
        told = tell(jnp.zeros((1, space.observations)), jnp.zeros((1, space.observations)), None)
        made = {"plans": initialiser(network, *example[:2], told)(keys[0])}
        return {**made, "value": initialiser(critic, *example)(keys[1])} if valued.train else made

    def apply(params, x, t, cond, keys):
        return network.apply({"params": params["plans"]}, x, t, cond, keys)

    def tell(obs, aim, arrival):
        return diffuser.told(space, space.encode(aim), arrival) if settings.any_arrival else None

    def value_of(params):
        return lambda x, t, cond: critic.apply({"params": params["value"]}, x, diffusion.network_time(t), None)

    def loss(params, state, batch, keys):
        def model(x, t, cond):
            return apply(params, x, diffusion.network_time(t), cond, keys)

        error, metrics = compute(model, batch["x"], batch["mask"], None, keys)
        if valued.train:
            held = known(space, batch["mask"], goal=goal)
            off = regression(value_of(params), batch["x"], batch["returns"], fold(keys, VALUE), held)[0]
            error, metrics = error + off, {**metrics, "planning": error, "value": off}
        return error.mean(), Aux({name: metric.mean() for name, metric in metrics.items()})

    def planner(params, frozen):
        denoise = denoising.make_denoiser(diffusion, apply, params)
        if not valued.train:
            return diffuser.planner(make_space(frozen, settings), drawing(denoise), tell)
        value = value_of(params)
        # Before the last `until` steps of the table, half a step later for the sake of rounding.
        until = (valued.until + 0.5) / table

        def gently(t):
            return jnp.where(t <= until, 0.0, valued.scale)

        def around(sampler: Sampler, fixed: Array) -> Sampler:
            if through or not valued.scale:
                return sampler
            return climb(sampler, diffusion.process, value, valued.scale, valued.climbs, until, fixed)

        if through and valued.scale:
            denoise = classifier_guidance.classifier(diffusion.process, denoise, value, gently)
        draws = drawing(denoise, lambda x, aim: value(x, jnp.full(len(x), 1 / table), None), around)
        return diffuser.planner(make_space(frozen, settings), draws, tell)

    act = policies.towards_waypoints(config.plan.gain) if goal else policies.planned_actions
    return Model(init, loss, planner, lambda params, frozen: act)


def decision_model(config: Any, fitted: Any, example_shape: tuple[int, ...]) -> Model:
    """Decision Diffuser's model of observations and its inverse model; of a config with `decision` as well."""
    settings, asked = config.model, config.decision
    _check_clip(config)
    if config.plan.remaining or config.plan.candidates > 1:
        raise UserError(
            f"plan.remaining={config.plan.remaining}, plan.candidates={config.plan.candidates}: Decision Diffuser has "
            "no goal to keep and no value to rank by; take 0 and 1"
        )
    if not asked.target and not asked.quantile:
        raise UserError("decision.target=0 and decision.quantile=0: what returns are plans to be asked for? Set one")
    actions, seen = (fitted[name].data.shape[-1] for name in ("actions", "observations"))
    diffusion = make_diffusion(config.diffusion)
    drawing = make_drawing(diffusion, config.diffusion.table_steps, config.plan)
    network = make_network(config.net, seen, conditions=1)
    inverse = Perceptron(actions, asked.inverse, jax.nn.relu, orthogonal=False)
    prospects = Perceptron(1, asked.inverse, jax.nn.relu, orthogonal=False)
    compute = decision_diffuser.objective(
        diffusion.objective, make_space(fitted, settings, actions=False), actions, asked.drop
    )

    def init(key):
        keys = jax.random.split(key, 3)
        plans = initialiser(network, jnp.zeros((1, settings.horizon, seen)), jnp.zeros(1), decision_diffuser.untold(1))
        made = {"plans": plans(keys[0]), "inverse": initialiser(inverse, jnp.zeros((1, 2 * seen)))(keys[1])}
        if not asked.quantile:
            return made
        return {**made, "quantile": initialiser(prospects, jnp.zeros((1, seen)))(keys[2])}

    def apply(params, x, t, cond, keys):
        return network.apply({"params": params["plans"]}, x, t, cond, keys)

    def prospect(params, obs):
        return jnp.asarray(prospects.apply({"params": params["quantile"]}, obs))[:, 0]

    def make_inverse(params):
        return lambda o, after: inverse.apply({"params": params["inverse"]}, jnp.concatenate([o, after], axis=-1))

    def loss(params, state, batch, keys):
        def model(x, t, cond):
            return apply(params, x, diffusion.network_time(t), cond, keys)

        value, metrics = compute(model, make_inverse(params), batch["x"], batch["mask"], batch["returns"], keys)
        if asked.quantile:
            guess = prospect(params, batch["x"][:, 0, actions:])
            off = decision_diffuser.quantile_error(guess, batch["returns"], asked.quantile)
            value, metrics = value + off, {**metrics, "quantile": off}
        return value.mean(), Aux({name: metric.mean() for name, metric in metrics.items()})

    def planner(params, frozen):
        denoise = denoising.make_denoiser(diffusion, apply, params)
        guided = guidance.classifier_free(denoise, asked.guidance, decision_diffuser.untold(1))
        space = make_space(frozen, settings, actions=False)
        cond = decision_diffuser.asked(asked.target)
        if not asked.target:
            cond = lambda obs, *_: decision_diffuser.told(prospect(params, space.encode(obs)))  # noqa: E731
        return diffuser.planner(space, drawing(guided), cond)

    def act(params, frozen):
        return policies.inverse_dynamics(make_space(frozen, settings, actions=False), make_inverse(params))

    return Model(init, loss, planner, act)
