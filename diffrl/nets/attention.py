"""Scaled dot-product attention, softmax(q kᵀ / √H) v (Vaswani et al. 2017, arXiv:1706.03762).

One entry point for every network, so that the choice of kernel is made once: cuDNN's fused kernel never
writes the [T, S] logits to memory (Dao et al. 2022, arXiv:2205.14135) but exists only for half precision,
certain head sizes and CUDA; everything else, TPUs and CPUs included, takes XLA's.
"""

from typing import Literal

import jax
from jax import Array
from jax.typing import DTypeLike

Capability = tuple[int, int]

# Below one tile of the fused kernel most of its work is padding, and the logits are small anyway.
MIN_LENGTH = 64
MAX_HEAD_DIM = 128


def attention(q: Array, k: Array, v: Array, *, implementation: Literal["xla", "cudnn"] | None = None) -> Array:
    """Every query's average of the values, weighted by softmax in float32.

    Args:
        q: [B, T, N, H] queries of N heads; the logits are divided by sqrt(H).
        k: [B, S, N, H] keys.
        v: [B, S, N, H] values.
        implementation: None picks cuDNN where `cudnn_fits`, else XLA; a name forces that one.

    Returns:
        [B, T, N, H] in the dtype of v.
    """
    if implementation is None:
        fits = cudnn_fits(cuda_capability(), q.dtype, q.shape[-1], q.shape[1], k.shape[1])
        implementation = "cudnn" if fits else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def cudnn_fits(capability: Capability | None, dtype: DTypeLike, head_dim: int, queries: int, keys: int) -> bool:
    """Whether cuDNN's fused attention is legal, and worth it, for this dtype and these sizes.

    `capability` is the GPU's, None where there is no CUDA device; queries and keys are sequence lengths.
    """
    return (
        capability is not None
        and capability >= (8, 0)
        and jax.numpy.dtype(dtype).name in ("bfloat16", "float16")
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and min(queries, keys) >= MIN_LENGTH
    )


def cuda_capability() -> Capability | None:
    """Compute capability of the default backend's first device, e.g. (9, 0); None if it is no NVIDIA GPU."""
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)
