"""ResNet-20, -32, -44, -56, -110 for 32x32 images: He et al., arXiv:1512.03385, section 4.2.

Three stages of n blocks at 16, 32 and 64 channels make 6n + 2 layers.  The shortcut across a stage's border
has no parameters (the paper's option A): it takes every second pixel and pads the new channels with zeros,
half on either side.

It is a metric network, for inference only: each batch normalisation is a fixed affine map there, and is
folded into the kernel and the bias of the convolution before it (`diffrl.pretrained.cifar_resnet`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CifarResNet(nn.Module):
    """Normalised images [B, 32, 32, 3] -> (logits [B, num_classes], pooled features [B, 64])."""

    blocks: int = 9  # per stage: 3 for ResNet-20, 9 for ResNet-56
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(_conv(16, 1, "conv")(x))
        for stage, channels in enumerate((16, 32, 64)):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(channels, stride, name=f"stage{stage}_block{block}")(x)
        features = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(features), features


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, H, W, C] -> [B, H/stride, W/stride, channels]."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(_conv(self.channels, self.stride, "conv1")(x))
        h = _conv(self.channels, 1, "conv2")(h)
        new = self.channels - x.shape[-1]
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
        return nn.relu(h + shortcut)


def _conv(channels: int, stride: int, name: str) -> nn.Conv:
    # Not "SAME": with stride 2 that pads on the right only, and the published weights pad on both sides.
    return nn.Conv(channels, (3, 3), strides=stride, padding=((1, 1), (1, 1)), name=name)
