"""How long the digits run takes from the start of Python to the end of its first step, compilation included.

    python -m benchmarks.first_step

Twice in fresh processes: with an empty compilation cache, and with the one that the first left behind.
"""

import os
import subprocess
import sys
import tempfile
import time

CHILD = "--child"


def child() -> None:
    """One process: imports, data, initialisation, compilation, one step."""
    import jax

    from diffrl import config as config_lib
    from diffrl.recipes import images

    with tempfile.TemporaryDirectory() as folder:
        config, run, _ = config_lib.parse([f"--workdir={folder}"], {"digits": images.digits_config})
        config.train.sample_every = 0
        session = images.open_session(config, run)
        initialised = images.initial_state(session)
        jax.block_until_ready(initialised)
        print(f"initialised after {time.time() - float(os.environ['STARTED']):.1f} s", flush=True)
        program, state, data = images.prepare(session, initialised)
        jax.block_until_ready(program(state, next(data)))
        print(f"first step done after {time.time() - float(os.environ['STARTED']):.1f} s", flush=True)
        data.close()
        session.checkpoints.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "filled cache"):
            env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "STARTED": str(time.time())}
            print(name)
            subprocess.run([sys.executable, "-m", "benchmarks.first_step", CHILD], env=env, check=True)


if __name__ == "__main__":
    child() if CHILD in sys.argv else main()
