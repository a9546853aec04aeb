"""Diffusion models and reinforcement learning on one small JAX core."""

__version__ = "0.1.0"
