"""The CIFAR ResNet's size and shapes; its values are tested with published weights in tests/pretrained."""

import jax
import jax.numpy as jnp
import pytest

from diffrl.nets.resnet import Block, CifarResNet


@pytest.mark.parametrize(("blocks", "millions"), [(3, 0.27), (9, 0.85), (18, 1.7)])
def test_parameter_counts_of_the_paper(blocks, millions):
    """He et al., table 6: ResNet-20, -56 and -110."""
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model = CifarResNet(blocks)
    (logits, features), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert logits.shape == (2, 10)
    assert features.shape == (2, 64)


def test_shortcut_halves_the_image_and_pads_channels_evenly():
    """With zero kernels a block is its shortcut: every second pixel, new channels around the old ones."""
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 4))
    block = Block(8, stride=2)
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    )
    y = block.apply({"params": params}, x)
    assert y.shape == (1, 4, 4, 8)
    assert jnp.array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert not y[..., :2].any()
    assert not y[..., 6:].any()
