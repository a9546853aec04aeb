"""One training step as pure functions of arrays, with no device in sight.

`make_update` turns a loss into `(state, batch, keys) -> (state, metrics)`.  `global_step` gives it the keys of the
global batch: that is the step which `jit` spreads over a mesh, where the compiler finds the collectives.  The mapped
forms (`shard_map`, `pmap`, in `mesh`) pass a mean over devices as `reduce` and hand each shard its part of the same
keys; both draw the same noise and take the same step.

The average of the parameters follows Polyak with the warm-up of TensorFlow's ExponentialMovingAverage:
`ema += (1 - d) (params - ema)`, `d = min(decay, (1 + n) / (10 + n))` after n earlier updates.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from diffrl.errors import UserError
from diffrl.train import post_hoc, rules
from diffrl.train.gather import at_use
from diffrl.train.state import batch_keys


def make_update(
    loss,
    optimizer,
    *,
    ema_decay=0.9999,
    ema_warmup=True,
    profiles=post_hoc.STORED,
    accumulate=1,
    reduce=lambda tree: tree,
):
    """The update `(state, batch, keys [B]) -> (state, metrics)` of a loss.

    Args:
        loss: (params, state, batch, keys [B]) -> (scalar, Aux), a mean over the samples.
        optimizer: an optax.GradientTransformation.
        ema_decay: in [0, 1); what remains of the average after one step.
        ema_warmup: whether early steps forget faster (see above).
        profiles: sigma_rel of each of the state's averages of power functions, if it has them.
        accumulate: microbatches per update; the batch is cut so that each keeps every device busy.
        reduce: applied to the gradients, the metrics and a changed `extra` before the optimiser sees them.

    Metrics are those of the loss, `loss`, `grad_norm` (before clipping) and, where the optimiser's state has one,
    `learning_rate`.

    Raises:
        UserError: at trace time, if the batch cannot be cut into `accumulate` parts.
    """

    def update(state, batch, keys):
        grads, metrics, extra = _gradients(loss, state, batch, keys, accumulate)
        grads, metrics, extra = reduce((grads, metrics, extra))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_decay
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params) if state.ema is not None else None
        powers = post_hoc.track(state.profiles, params, state.step, profiles) if state.profiles is not None else None
        metrics = {**metrics, "grad_norm": optax.global_norm(grads), **_learning_rate(opt_state)}
        state = state._replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state, profiles=powers)
        return (state if extra is None else state._replace(extra=extra)), metrics

    return update


def global_step(update):
    """`(state, batch) -> (state, metrics)`: the update, written for the global batch."""
    return lambda state, batch: update(state, batch, batch_keys(state, batch_size(batch)))


def repeat(step, k):
    """k steps in one dispatch: batches have leading axes [k, B], metrics [k]."""
    return lambda state, batches: jax.lax.scan(step, state, batches, length=k)


def batch_size(batch):
    """The leading axis of a batch's arrays."""
    return jax.tree.leaves(batch)[0].shape[0]


def _gradients(loss, state, batch, keys, parts):
    """Mean gradients, mean metrics and the last new extra (or None) over `parts` microbatches."""

    def one(state, batch, keys):
        whole_at_use = _gathering(loss, (state.params, state, batch, keys))
        (value, aux), grads = jax.value_and_grad(whole_at_use, has_aux=True)(state.params, state, batch, keys)
        return grads, {"loss": value, **aux.metrics}, aux.extra

    if parts == 1:
        return one(state, batch, keys)

    def body(carry, part):
        total, extra = carry
        grads, metrics, new = one(state._replace(extra=extra), *part)
        return (jax.tree.map(jnp.add, total, grads), extra if new is None else new), metrics

    start = jax.tree.map(jnp.zeros_like, state.params), state.extra
    (total, extra), metrics = jax.lax.scan(body, start, _split((batch, keys), parts))
    return jax.tree.map(lambda g: g / parts, total), jax.tree.map(lambda m: m.mean(0), metrics), extra


def _gathering(loss, arguments):
    """The loss, its parameters put together at use where `mesh.compile_step` splits them over "fsdp"."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("fsdp") != AxisType.Auto or mesh.shape["fsdp"] == 1:  # within shard_map they are whole already
        return loss

    def mark(path, leaf):
        names = rules.axes(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh.shape)
        return (*names, *(None,) * (leaf.ndim - len(names))) if "fsdp" in names else None

    def whole(leaf, mark):
        return jax.lax.with_sharding_constraint(leaf, P(*(None if name == "fsdp" else name for name in mark)))

    params, state, *rest = arguments
    marks = [mark(path, leaf) for path, leaf in jax.tree.leaves_with_path((params, state))]
    return at_use(loss, whole, [*marks, *(None for _ in jax.tree.leaves(rest))])


def _split(tree, parts):
    """[B, ...] -> [parts, B / parts, ...], dealt like cards: a device that holds a block of B keeps its samples."""
    size = batch_size(tree)
    if size % parts:
        raise UserError(f"a batch of {size} cannot be accumulated in {parts} parts: choose a multiple of {parts}")
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(size // parts, parts, *x.shape[1:]), 1, 0), tree)


def _learning_rate(opt_state):
    """{"learning_rate": ...} if the optimiser was made with optax.inject_hyperparams, {} otherwise."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "hyperparams")
    rates = [value["learning_rate"] for _, value in found if "learning_rate" in value]
    return {"learning_rate": rates[0]} if rates else {}
