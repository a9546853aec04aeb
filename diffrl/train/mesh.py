"""The only place that knows devices: meshes, shardings, and the ways to map a pure step over them.

The usual form is `compile_step(global_step(update), mesh, state)`: one program for the global batch, batches split over
the axes "data" and "fsdp", the state replicated over "data" and split over "fsdp" and "tensor" as `rules` says; the
collectives are those that XLA's partitioner finds.  `shard_map_step` and `pmap_step` map the same update by hand, with
a mean over devices as its `reduce`; they exist for those who want the collectives explicit.
"""

import dataclasses
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffrl.config_leaf import leaf
from diffrl.errors import UserError
from diffrl.train import rules
from diffrl.train.state import batch_keys
from diffrl.train.step import batch_size, repeat

BATCH_AXES = ("data", "fsdp")
# Below this many elements, gathering a leaf costs more than keeping it everywhere.
SMALL = 2**14


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis; one of them may be -1 = all that remain.

    Attributes:
        data: splits the batch, replicates the state.
        fsdp: splits the batch and the state.
        tensor: splits the heads of attention and the hidden channels of residual blocks and MLPs, state and work
            alike (see `rules`); choose a divisor of the heads, and few devices that are close to one another.
    """

    # Where a run goes on, and on how many devices, does not change what it computes.
    data: int = leaf(-1, free=True)
    fsdp: int = leaf(1, free=True)
    tensor: int = leaf(1, free=True)


def init_distributed():
    """Joins the other processes, if the environment says that there are any; call it before any other use of jax.

    Coordinator, process count and index come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    where they are set, and from the cluster (SLURM, Open MPI, TPU pod, Kubernetes) otherwise.  DIFFRL_DISTRIBUTED=1
    asks for it where neither shows, as on a TPU pod; 0 forbids it.  An empty variable counts as unset.

    Raises:
        UserError: a variable is no number, the others cannot be joined, or JAX_PLATFORMS names a device first that
            is not there.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    several = any((_number(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    asked = _number("DIFFRL_DISTRIBUTED")
    if asked or (asked is None and (address or several)):
        count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
        try:
            jax.distributed.initialize(address, num_processes=count, process_id=index)
        except ValueError as error:
            raise UserError(
                f"cannot join the other processes ({error}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID, or DIFFRL_DISTRIBUTED=0 for one process alone"
            ) from error
    _check_platform()


def _number(name):
    """An environment variable as a number, or None where it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text}: expected a number; set one or unset it")
    return int(text) if text else None


def _check_platform():
    """Raises UserError where the first of JAX_PLATFORMS has no device: jax would go on with the next, in silence."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.split(",")[0]
    if not wanted:
        return
    extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(wanted)
    remedy = f'pip install -e ".[{extra}]" on a host that has one, or choose' if extra else "choose"
    try:
        jax.devices(wanted)
    except (AssertionError, RuntimeError) as error:  # an AssertionError where the plugin is missing
        raise UserError(f"no {wanted} device for JAX_PLATFORMS={platforms}: {remedy} another platform") from error


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None) -> jax.sharding.Mesh:
    """A mesh with axes ("data", "fsdp", "tensor") over `devices` (default: all).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices: "
            "their product must be that number (one of them may be -1)"
        )
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices)


def state_sharding(mesh, state, small=SMALL):
    """A tree of shardings for a state: leaves above `small` elements as `rules.axes` says, all others replicated."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, P(*rules.axes(name, leaf.shape, mesh.shape)) if leaf.size > small else P())

    return jax.tree.map_with_path(sharding, state)


def abstract(mesh, make_state, small=SMALL):
    """What `initialise` would make, as jax.ShapeDtypeStructs with shardings: all that `Checkpoints.restore` needs."""
    shapes = jax.eval_shape(make_state)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes, small),
    )


def initialise(mesh, make_state, small=SMALL):
    """`make_state()`, made where it shall lie: no device ever holds more of the state than its own part.

    Args:
        make_state: a function without arguments that jit can trace, e.g. `lambda: state.create(init(key), ...)`.
    """
    spread = state_sharding(mesh, jax.eval_shape(make_state), small)
    return jax.jit(make_state, out_shardings=spread)()


def place(mesh, state, small=SMALL):
    """A copy of a state, spread over the mesh as `state_sharding` says (every process must hold the same values)."""
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=state_sharding(mesh, state, small))
    return copy(state)


def batch_parts(mesh) -> int:
    """Into how many parts a batch is split: the devices along "data" and "fsdp"."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh, inner=False):
    """Batches [B, ...], or [k, B, ...] if `inner`, split over "data" and "fsdp"."""
    return NamedSharding(mesh, P(None, BATCH_AXES) if inner else P(BATCH_AXES))


def spread(mesh):
    """A function, for use under jit, that splits an array's first axis over "data" and "fsdp"."""
    return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def put_batch(mesh, inner=False):
    """A function from this process's part of a batch (numpy) to the global arrays on the devices.

    The function raises UserError if the global batch does not divide among the devices.
    """
    sharding = batch_sharding(mesh, inner)

    def put(batch):
        local = jax.tree.leaves(batch)[0].shape[int(inner)]
        _check_batch(local * jax.process_count(), mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    return put


def put_global(mesh, tree):
    """Whole numpy arrays [B, ...], the same on every process, as global arrays split over "data" and "fsdp"."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), tree)


def fetch(array) -> np.ndarray:
    """The whole of a global array as numpy, on every process."""
    if jax.process_count() > 1:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def compile_step(step, mesh, state, *, inner=False, small=SMALL):
    """`jit` of `(state, batch) -> (state, metrics)` over the mesh; the old state's memory is given to the new one.

    Args:
        step: from `step.global_step`, or `step.repeat` of it.
        state: concrete or abstract; only its shapes are used.
        inner: whether batches are [k, B, ...].
    """
    spread = state_sharding(mesh, state, small)

    def on_mesh(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which tells `step` how its parameters lie
            return step(state, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(spread, batch_sharding(mesh, inner)),
        out_shardings=(spread, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def compile_repeated(step, mesh, state, k, *, small=SMALL):
    """`k` updates a call, `(state, batches [k, B, ...]) -> (state, metrics [k])`, or one on a plain batch if k is 1.

    A scan in one program, but on CPUs k calls of one: XLA there brings only the convolutions of a program's outermost
    computation into its fast form, and the gradient of one in a loop's body takes thirty times as long.

    Args:
        step: from `step.global_step`.
    """
    if k == 1:
        return compile_step(step, mesh, state, small=small)
    if mesh.devices.flat[0].platform != "cpu":
        return compile_step(repeat(step, k), mesh, state, inner=True, small=small)
    one = compile_step(step, mesh, state, small=small)
    pick = jax.jit(lambda batches, i: jax.tree.map(lambda x: x[i], batches), out_shardings=batch_sharding(mesh))

    def several(state, batches):
        rows = []
        for i in range(k):
            state, metrics = one(state, pick(batches, i))
            rows.append(metrics)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *rows)

    return several


def per_shard(mesh, size, unit="worlds"):
    """`jax.vmap`'s twin for devices: (f, in_axes, out_axes) -> f on every device's share of `size` worlds, by itself.

    Adaptive loops (a simulator's solver) then run as long as the device's own worlds need, and nothing is exchanged.
    Axes are numbers, None or trees of them.

    Args:
        unit: what messages call the worlds.

    Raises:
        UserError: the worlds do not divide among the devices.
    """
    if size % batch_parts(mesh):
        parts = batch_parts(mesh)
        raise UserError(f"{size} {unit} cannot be split over {parts} devices: choose a multiple of {parts}")

    def wrap(f, in_axes, out_axes):
        if batch_parts(mesh) == 1:
            return f
        specs = [jax.tree.map(_along, axes, is_leaf=lambda axis: axis is None) for axes in (in_axes, out_axes)]
        if len(out_axes) == 1:
            specs[1] = specs[1][0]
        mapped = jax.shard_map(f, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)

        def checked(*arguments):
            for argument, axis in zip(arguments, in_axes, strict=True):
                if isinstance(axis, int):
                    _check_groups({leaf.shape[axis] for leaf in jax.tree.leaves(argument)}, batch_parts(mesh))
            return mapped(*arguments)

        return checked

    return wrap


def _check_groups(sizes, parts):
    for size in sizes:
        if size % parts:
            raise UserError(
                f"{size} groups of worlds cannot be split over {parts} devices: choose a multiple of {parts}"
            )


def place_run(mesh, run, axes):
    """A copy of a run of reinforcement learning, worlds or seeds spread over "data" and "fsdp", the rest replicated.

    axes: a tree prefix of `run`: which axis of its arrays counts the worlds or seeds, or None.
    """
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=_run_sharding(mesh, axes))(run)


def compile_run(step, mesh, axes):
    """`jit` of (run, None) -> (run, metrics) over the mesh, as `place_run` lays it; the old run's memory is reused."""
    spread = _run_sharding(mesh, axes)
    whole = NamedSharding(mesh, P())
    return jax.jit(step, in_shardings=(spread, None), out_shardings=(spread, whole), donate_argnums=0)


def _along(axis):
    return P() if axis is None else P(*[None] * axis, BATCH_AXES)


def _run_sharding(mesh, axes):
    if batch_parts(mesh) == 1:  # worlds of the host have a state without axes
        return NamedSharding(mesh, P())
    return jax.tree.map(lambda axis: NamedSharding(mesh, _along(axis)), axes, is_leaf=lambda axis: axis is None)


def shard_map_step(make_update, mesh):
    """The step with its collectives written out: `(state, batch) -> (state, metrics)`, to be compiled as usual.

    Args:
        make_update: `step.make_update` with all but `reduce` filled in.
    """
    update = make_update(reduce=_mean_over(BATCH_AXES))
    split = P(BATCH_AXES)
    # check_vma would insert a second sum over devices into the gradients of the replicated parameters.
    mapped = jax.shard_map(update, mesh=mesh, in_specs=(P(), split, split), out_specs=(P(), P()), check_vma=False)
    return lambda state, batch: mapped(state, batch, batch_keys(state, batch_size(batch)))


def pmap_step(make_update, devices=None):
    """The step through `jax.pmap`, on the devices of one process: batches come in whole and are cut here.

    Args:
        make_update: `step.make_update` with all but `reduce` filled in.
    """
    devices = jax.local_devices() if devices is None else devices
    update = make_update(reduce=_mean_over("device"))
    mapped = jax.pmap(update, "device", in_axes=(None, 0, 0), out_axes=(None, None), devices=devices)
    line = jax.make_mesh((len(devices),), ("device",), (AxisType.Auto,), devices=devices)

    def step(state, batch):
        size = batch_size(batch)
        if size % len(devices):
            raise _indivisible(size, len(devices))
        parts = jax.tree.map(
            lambda x: x.reshape(len(devices), size // len(devices), *x.shape[1:]),
            (batch, batch_keys(state, size)),
        )
        # pmap refuses arrays that already lie on devices in another layout, keys above all.
        state, parts = jax.device_put((state, parts), (NamedSharding(line, P()), NamedSharding(line, P("device"))))
        return mapped(state, *parts)

    return step


def first_process_decides(choose) -> int:
    """`choose()`, called on the first process only, and its answer told to all."""
    choice = choose() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(choice))) if jax.process_count() > 1 else choice


def gather_json(value) -> list:
    """Every process's JSON-able value, in the order of the processes; on one process a list of one copy."""
    line = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(line)]
    text = np.frombuffer(line.encode(), np.uint8)
    width = int(np.max(multihost_utils.process_allgather(np.int32(text.size))))
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in np.asarray(rows, np.uint8)]


def preempted(step) -> bool:
    """Whether a process of several was told to stop (SIGTERM, kept by jax) and `step` is where all should."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def _mean_over(axes):
    """The mean over devices of a tree's real leaves; keys and counters are the same everywhere."""

    def mean(leaf):
        return jax.lax.pmean(leaf, axes) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return lambda tree: jax.tree.map(mean, tree)


def _check_batch(size, mesh):
    if size % batch_parts(mesh):
        raise _indivisible(size, batch_parts(mesh))


def _indivisible(size, devices):
    return UserError(f"a batch of {size} cannot be split over {devices} devices: choose a multiple of {devices}")
