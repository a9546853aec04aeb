"""AlexNet's convolutions in the one-tower form of Krizhevsky, arXiv:1404.5997, as torchvision publishes them.

It is a metric network, for inference only: LPIPS reads the five activations, and the classifier on top is left out.
"""

import flax.linen as nn
import jax

# (channels, kernel, stride, padding) of each convolution, and whether a 3x3 maximum of stride 2 comes before it.
LAYERS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)
SMALLEST = 31  # pixels: below, the second maximum has nothing to look at


class AlexNet(nn.Module):
    """Normalised images [B, H, W, 3], H and W at least `SMALLEST` -> the five rectified activations [B, h, w, C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        activations = []
        for i, (channels, size, stride, padding, pooled) in enumerate(LAYERS):
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2))
            around = ((padding, padding),) * 2
            x = nn.relu(nn.Conv(channels, (size, size), stride, around, name=f"conv{i}")(x))
            activations.append(x)
        return tuple(activations)
