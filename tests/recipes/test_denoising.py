"""From words to a process and samples: tables end in noise at any length, chunks do not show."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffrl.errors import UserError
from diffrl.recipes import denoising
from diffrl.recipes.denoising import DiffusionConfig
from diffrl.train.mesh import make_mesh


@pytest.mark.parametrize("name", ["ddpm", "improved"])
@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
def test_a_table_of_any_length_ends_in_noise(name, steps):
    process = denoising.make_diffusion(DiffusionConfig(process=name, table_steps=steps)).process
    t = jnp.arange(steps + 1) / steps
    assert np.all(np.diff(process.alpha(t)) < 0)
    assert 0 < process.alpha(t[-1]) < 0.04  # what is left of the data at the time where samples start from noise


def test_the_table_of_a_thousand_is_the_papers():
    process = denoising.make_diffusion(DiffusionConfig(process="ddpm")).process
    assert float(process.alpha(jnp.ones(())) ** 2) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al., section 4


def test_a_learned_variance_has_its_own_draw_of_times():
    config = DiffusionConfig(process="improved", learned_variance=True, table_steps=4)
    for config.times in ("uniform", "discrete"):
        assert denoising.make_diffusion(config).learned
    config.times = "log_normal"
    with pytest.raises(UserError, match=r"diffusion.times=log_normal: .* set diffusion.times=discrete"):
        denoising.make_diffusion(config)


@pytest.mark.parametrize("num", [1, 4, 7, 8])
def test_chunks_are_padded_and_shared_by_the_devices_that_split_a_batch(num):
    """Eight devices, two by two of which split a batch: chunks of four for a batch of five."""
    sizes = []

    def draw(part):
        sizes.append(len(part["id"]))
        return part["id"] * 10 + part["label"]

    labels = np.arange(num) % 3
    made = denoising.in_chunks(draw, labels, num, 5, make_mesh(2, 2, 2))
    np.testing.assert_array_equal(made, np.arange(num) * 10 + labels)
    assert set(sizes) == {4}
