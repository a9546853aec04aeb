"""diffrl: diffusion models and reinforcement learning on one small JAX core."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
    name="diffrl",
    version="0.1.0",
    description="Diffusion models and reinforcement learning on one small JAX core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffrl", "diffrl.*", "experiments"]),
    package_data={"diffrl": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.5",
        "chex>=0.1.89",
        "flax>=0.10.6",
        "grain>=0.2.10",
        "importlib_resources",  # tensorflow-datasets imports it without declaring it
        "jax>=0.10",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=1.26",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11",
        "pillow>=10",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.7",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tfds": ["tensorflow-cpu>=2.16"],  # only to *prepare* a data set once; reading needs no TensorFlow
        "offline": ["h5py>=3.10"],  # demonstrations in D4RL's and Minari's files
        "ode": ["diffrax>=0.7"],  # probability flows to a tolerance instead of in steps
        # Other libraries' worlds for reinforcement learning.  mujoco has to be of mujoco-mjx's age, and mujoco 4 breaks
        # playground's control suite.  gymnax asks for jax < 0.12, though it runs with 0.12 too.  playground brings warp
        # along, 400 MB.
        "envs": [
            "ale-py>=0.12",
            "brax>=0.14.2",
            "gymnasium[mujoco]>=1.2",
            "gymnax>=1.0.1",
            "mujoco==3.17.*",
            "mujoco-mjx==3.17.*",
            "playground>=0.2",
        ],
        "dev": [
            "diffrax>=0.7",
            "h5py>=3.10",
            "mujoco==3.17.*",
            "mypy>=1.11",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
        ],
        # Reference implementations that tests compare with; never imported by the package.
        "oracles": [
            "brax>=0.14.2",
            "diffusers>=0.30",
            "gymnasium>=1.2",
            "minatar>=1.0.15",
            "rlax>=0.1.6",
            "scikit-image>=0.24",
            "torch==2.13.*",
        ],
    },
)
