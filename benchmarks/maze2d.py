r"""Maze2D in numbers: how far from MuJoCo, and the returns that D4RL's scores are made of.

  python -m benchmarks.maze2d                 # about 3 minutes on two CPU cores; needs mujoco ([dev], [envs])
  python -m benchmarks.maze2d --episodes=4000

Differences are those of one step from MuJoCo's own state, the larger one of position (m) and velocity (m/s), over
3000 steps of random pushes in each maze.  Returns are means over episodes with their standard errors, beside D4RL's
constants, which are means of 100 episodes: z counts standard errors of such a mean.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.rl import controllers, maze2d, mazes, waypoints

STEPS, HOLD, RESET = 3000, 40, 600


def differences(name: str) -> dict[str, float]:
    """Largest difference of one step in free space and in contact, and how many steps were in contact."""
    import mujoco

    maze = mazes.standard(name)
    model = mujoco.MjModel.from_xml_string(maze2d.mjcf(maze))
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    step = jax.jit(lambda p, v, a: maze2d.simulate(jnp.asarray(maze.walls), p, v, a))
    found = {"free": 0.0, "contact": 0.0, "contacts": 0}
    action = np.zeros(2)
    for t in range(STEPS):
        if t % RESET == 0:
            data.qpos[:] = maze.free[rng.integers(len(maze.free))] + rng.uniform(-0.1, 0.1, 2)
            data.qvel[:] = 0
        if t % HOLD == 0:
            action = rng.uniform(-1.5, 1.5, 2)
        data.qvel[:] = np.clip(data.qvel, -maze2d.FASTEST, maze2d.FASTEST)
        before = data.qpos.copy(), data.qvel.copy()
        data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(model, data)
        error = float(np.abs(np.concatenate(step(*before, action)) - np.concatenate([data.qpos, data.qvel])).max())
        kind = "contact" if data.ncon else "free"
        found[kind] = max(found[kind], error)
        found["contacts"] += data.ncon > 0
    return found


def returns(name: str, reward: str, episodes: int) -> list[str]:
    """A line for each policy."""
    maze, (_, steps, constants) = mazes.standard(name), mazes.STANDARD[name]
    env = maze2d.make(maze, steps, reward)
    low, high = constants[reward]
    policies = {
        "random actions": (controllers.uniform(env), low),
        "controller, waypoints lost": (waypoints.controller(maze, stale=True), high),
        "controller": (waypoints.controller(maze), None),
    }
    lines = []
    for who, (policy, constant) in policies.items():
        keys = jax.random.split(jax.random.key(0), episodes)
        found = np.asarray(jax.jit(controllers.execute(env, policy, steps))(keys).episode_return)
        line = f"{name:7} {reward:7} {who:27} {found.mean():8.2f} +- {found.std() / np.sqrt(episodes):5.2f}"
        if constant is not None:
            line += f"   D4RL {constant:8.2f}, z = {(found.mean() - constant) / (found.std() / 10):+.2f}"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000)
    args = parser.parse_args()
    for double in (False, True):
        with jax.enable_x64(double):
            for name in mazes.STANDARD:
                found = differences(name)
                print(
                    f"{name:7} float{64 if double else 32}: {found['free']:.1e} in free space, "
                    f"{found['contact']:.1e} in {found['contacts']} contacts",
                    flush=True,
                )
    for name in mazes.STANDARD:
        for reward in ("sparse", "dense"):
            print("\n".join(returns(name, reward, args.episodes)), flush=True)


if __name__ == "__main__":
    main()
