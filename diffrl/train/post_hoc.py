"""Averages of the parameters whose length is chosen after training (EDM2, Karras et al. 2023, arXiv:2312.02696).

Power functions of time replace the exponential (section 3.1): after t updates the average with exponent gamma is

    theta_gamma(t) = (gamma + 1) / t^(gamma + 1)  times the integral of  tau^gamma theta(tau)  from 0 to t,

whose width, the standard deviation of its weights over t, is the same at every t:

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2).

Training tracks two of them, in `TrainState.profiles`, and saves both now and then.  Any other width is then a linear
combination of the saved ones, the one whose weights over time are nearest in least squares (section 3.2, appendix C).
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.errors import UserError
from diffrl.train.hooks import every

STORED = (0.05, 0.10)  # the paper's pair of widths
WIDEST = 12**-0.5  # of a uniform average, gamma = 0


def exponent(sigma_rel) -> float:
    """The gamma of a width, the one positive root of a cubic.

    Raises:
        UserError: the width is not in (0, 0.288].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"sigma_rel={sigma_rel}: choose a width above 0 and up to {WIDEST:.4f}, a uniform average")
    return max(float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max()), 0.0)


def track(profiles, params, step, widths):
    """The averages after one more update; the first one copies the parameters.

    Args:
        profiles: a tuple of trees, one for each width.
        params: after the update.
        step: the number of updates done before it.
        widths: each average's sigma_rel.
    """

    def one(profile, sigma_rel):
        # What is new, 1 - (1 - 1/t)^(gamma + 1), is small: float32 would lose it in the difference from 1.
        new = -jnp.expm1((exponent(sigma_rel) + 1) * jnp.log1p(-1 / (step + 1)))
        return jax.tree.map(lambda e, p: e + new * (p - e), profile, params)

    return tuple(one(*pair) for pair in zip(profiles, widths, strict=True))


def snapshots_every(n, snapshots, widths=STORED, inner=1):
    """A hook that saves the averages every n updates; what a run that was resumed has saved before is left as it is.

    Args:
        snapshots: a `Checkpoints(folder, keep=None)` of their own; close it after training.
        widths: as given to `make_update`.
        inner: as of `hooks.every`.
    """

    def save(step, state):
        if not snapshots.has(step):
            snapshots.save(step, _snapshot(state.profiles, widths))

    return every(n, save, inner)


def reconstruct(snapshots, like, sigma_rel, step=None, widths=STORED):
    """The average of the parameters with any width, float32, from snapshots that are read one after another.

    Args:
        snapshots: the `Checkpoints` that `snapshots_every` wrote.
        like: the parameters, as arrays or jax.ShapeDtypeStructs: their structure, shapes and shardings.
        sigma_rel: the width, best between the stored ones or near them.
        step: at which the average ends; None: the last snapshot's.
        widths: the stored ones.

    Raises:
        UserError: there are no snapshots, none as late as `step`, or of other widths; or a width is out of range.
    """
    steps = snapshots.steps()
    if not steps:
        raise UserError(f"{snapshots.folder} holds no snapshots: train with profiles, or name another folder")
    step = steps[-1] if step is None else step
    if not 0 < step <= steps[-1]:
        raise UserError(f"step={step}: the snapshots in {snapshots.folder} reach from 1 to {steps[-1]}; choose between")
    # Whatever ends before the step, and the first that does not: it knows what came after the others.
    steps = [t for i, t in enumerate(steps) if i == 0 or steps[i - 1] < step]
    weights = mixture([(t, width) for t in steps for width in widths], (step, sigma_rel)).reshape(len(steps), -1)
    like, total = jax.tree.map(_float32, like), None
    for t, row in zip(steps, weights, strict=True):
        saved, _ = snapshots.restore(_snapshot((like,) * len(widths), widths), t)
        if not np.allclose(saved["sigma_rel"], widths):
            have = ", ".join(f"{width:.4g}" for width in saved["sigma_rel"])
            raise UserError(f"{snapshots.folder} holds averages of widths {have}, not {widths}: name those")
        total = _add(total, saved["profiles"], row.astype(np.float32))
    return total


def mixture(stored, wanted) -> np.ndarray:
    """The weight of each stored average in the one that is nearest to the wanted one; they sum to about 1.

    Args:
        stored: pairs (t, sigma_rel).
        wanted: one pair.
    """
    t, gamma = np.array([(t, exponent(width)) for t, width in stored]).T
    end, wish = wanted[0], exponent(wanted[1])
    gram = _inner_product(t[:, None], gamma[:, None], t, gamma)
    # Early snapshots of a long run weigh little: in units of its norm every average counts alike.
    norm = np.sqrt(np.diag(gram))
    found = np.linalg.lstsq(gram / np.outer(norm, norm), _inner_product(t, gamma, end, wish) / norm, rcond=1e-12)[0]
    return found / norm


def _inner_product(t_a, gamma_a, t_b, gamma_b):
    """The integral of the product of two averages' weights over time."""
    ratio = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(t_a, t_b)


def _snapshot(profiles, widths):
    return {"profiles": profiles, "sigma_rel": jnp.array(widths, jnp.float32)}


def _float32(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=getattr(leaf, "sharding", None))


@jax.jit
def _add(total, profiles, weights):
    """The sum so far, or None, and one snapshot's averages by their weights."""
    part = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *profiles)
    return part if total is None else jax.tree.map(jnp.add, total, part)
