"""CartPole, Acrobot, Pendulum and MountainCar: Gymnasium's dynamics in float32, step for step, with its time limits.

Sources: the cart and pole are Barto, Sutton & Anderson's (1983), the acrobot is Sutton's (1996) with the equations of
Sutton & Barto (2018), the car on the mountain is Moore's (1990); the pendulum is OpenAI Gym's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrl.rl import drawing
from diffrl.rl.environment import Actions, Environment, State
from diffrl.rl.wrappers import time_limit

Array = jax.Array


def _environment(
    name: str,
    steps: int,
    start: Callable[[Array], Array],
    move: Callable[[Array, Array], tuple[Array, Array | float, Array]],
    observe: Callable[[Array], Array],
    actions: Actions,
    draw: Callable[[Any], np.ndarray],
) -> Environment:
    """From functions of the physical state alone: start(key) -> x, move(x, action) -> (x, reward, terminated)."""

    def reset(key: Array) -> State:
        x = start(key)
        off = jnp.zeros((), bool)
        return State(x, observe(x), jnp.zeros((), jnp.float32), off, off)

    def step(state: State, action: Array) -> State:
        x, reward, terminated = move(state.inner, action)
        return State(x, observe(x), jnp.asarray(reward, jnp.float32), terminated, jnp.zeros((), bool))

    obs = jax.eval_shape(lambda: observe(start(jax.random.key(0))))
    world = Environment(name, reset, step, actions, obs, lambda state: draw(np.asarray(state.inner, float)))
    return time_limit(world, steps)


def _angle(x: Array) -> Array:
    """The same angle within [-pi, pi)."""
    return jnp.mod(x + jnp.pi, 2 * jnp.pi) - jnp.pi


def cartpole() -> Environment:
    """CartPole-v1: push a cart left (0) or right (1), so that the pole on it stays up.

    obs = (x, dx/dt, theta, dtheta/dt) in m, m/s, rad and rad/s, theta = 0 upright.  Reward 1 for every step, 500 of
    them at most; terminates where |x| > 2.4 m or |theta| > 12 degrees.
    """
    gravity, pole, total, half_length, push, dt = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02
    moment = pole * half_length

    def start(key: Array) -> Array:
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def move(state: Array, action: Array) -> tuple[Array, float, Array]:
        _, dx, theta, dtheta = state
        sin, cos = jnp.sin(theta), jnp.cos(theta)
        force = jnp.where(action == 1, push, -push)
        pushed = (force + moment * dtheta**2 * sin) / total
        turn = (gravity * sin - cos * pushed) / (half_length * (4 / 3 - pole * cos**2 / total))
        new = state + dt * jnp.stack([dx, pushed - moment * turn * cos / total, dtheta, turn])
        return new, 1.0, (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * np.pi / 180)

    return _environment("CartPole-v1", 500, start, move, lambda x: x, Actions(num=2), _draw_cartpole)


def acrobot() -> Environment:
    """Acrobot-v1: swing two links up to a height of one link above the pivot, by a torque between them.

    Actions 0, 1, 2 are torques of -1, 0 and 1 Nm.  obs = (cos theta_1, sin theta_1, cos theta_2, sin theta_2,
    dtheta_1/dt, dtheta_2/dt), theta_1 = 0 hanging and theta_2 relative to the first link; the speeds are clipped at
    4 pi and 9 pi rad/s.  Reward -1 for every step, 0 for the one that arrives; 500 steps at most.
    """
    gravity, length, centre, inertia, dt = 9.8, 1.0, 0.5, 1.0, 0.2  # both links weigh 1 kg
    fastest = np.array([4 * np.pi, 9 * np.pi], np.float32)

    def start(key: Array) -> Array:
        return jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)

    def slope(state: Array, torque: Array) -> Array:
        theta1, theta2, speed1, speed2 = state
        sin2, cos2 = jnp.sin(theta2), jnp.cos(theta2)
        d1 = centre**2 + (length**2 + centre**2 + 2 * length * centre * cos2) + 2 * inertia
        d2 = centre**2 + length * centre * cos2 + inertia
        phi2 = centre * gravity * jnp.sin(theta1 + theta2)
        phi1 = -length * centre * (speed2**2 + 2 * speed2 * speed1) * sin2 + phi2
        phi1 += (centre + length) * gravity * jnp.sin(theta1)
        pull = torque + d2 / d1 * phi1 - length * centre * speed1**2 * sin2 - phi2
        turn2 = pull / (centre**2 + inertia - d2**2 / d1)
        return jnp.stack([speed1, speed2, -(d2 * turn2 + phi1) / d1, turn2])

    def move(state: Array, action: Array) -> tuple[Array, Array, Array]:
        torque = jnp.asarray(action, jnp.float32) - 1
        k1 = slope(state, torque)
        k2 = slope(state + dt / 2 * k1, torque)
        k3 = slope(state + dt / 2 * k2, torque)
        k4 = slope(state + dt * k3, torque)
        new = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        new = jnp.concatenate([_angle(new[:2]), jnp.clip(new[2:], -fastest, fastest)])
        arrived = -jnp.cos(new[0]) - jnp.cos(new[0] + new[1]) > 1
        return new, jnp.where(arrived, 0.0, -1.0), arrived

    def observe(state: Array) -> Array:
        cos, sin = jnp.cos(state[:2]), jnp.sin(state[:2])
        return jnp.stack([cos[0], sin[0], cos[1], sin[1], state[2], state[3]])

    return _environment("Acrobot-v1", 500, start, move, observe, Actions(num=3), _draw_acrobot)


def pendulum() -> Environment:
    """Pendulum-v1: swing a rod up and hold it there, by a torque of at most 2 Nm; beyond that it is clipped.

    obs = (cos theta, sin theta, dtheta/dt), theta = 0 upright, the speed within 8 rad/s.  reward =
    -(theta^2 + 0.1 (dtheta/dt)^2 + 0.001 torque^2), of what was before the step; 200 steps.
    """
    gravity, dt, fastest, strongest = 10.0, 0.05, 8.0, 2.0

    def start(key: Array) -> Array:
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * np.array([np.pi, 1.0], np.float32)

    def move(state: Array, action: Array) -> tuple[Array, Array, Array]:
        theta, speed = _angle(state[0]), state[1]
        torque = jnp.clip(action[0], -strongest, strongest)
        cost = theta**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = jnp.clip(speed + dt * (1.5 * gravity * jnp.sin(theta) + 3 * torque), -fastest, fastest)
        return jnp.stack([theta + dt * speed, speed]), -cost, jnp.zeros((), bool)

    def observe(state: Array) -> Array:
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    actions = Actions(shape=(1,), low=-strongest, high=strongest)
    return _environment("Pendulum-v1", 200, start, move, observe, actions, _draw_pendulum)


def mountain_car() -> Environment:
    """MountainCar-v0: a car too weak for the hill has to gain way.  Actions: left, nothing, right.

    obs = (x within [-1.2, 0.6], its change in a step within 0.07).  Reward -1 for every step; terminates at x >= 0.5;
    200 steps at most.
    """

    def start(key: Array) -> Array:
        return jnp.stack([jax.random.uniform(key, (), minval=-0.6, maxval=-0.4), jnp.zeros(())])

    def move(state: Array, action: Array) -> tuple[Array, float, Array]:
        x, speed = state
        speed = speed + (jnp.asarray(action, jnp.float32) - 1) * 0.001 - 0.0025 * jnp.cos(3 * x)
        speed = jnp.clip(speed, -0.07, 0.07)
        x = jnp.clip(x + speed, -1.2, 0.6)
        speed = jnp.where((x <= -1.2) & (speed < 0), 0.0, speed)
        return jnp.stack([x, speed]), -1.0, (x >= 0.5) & (speed >= 0)

    return _environment("MountainCar-v0", 200, start, move, lambda x: x, Actions(num=3), _draw_mountain_car)


def _draw_cartpole(state: np.ndarray) -> np.ndarray:
    x, _, theta, _ = state
    paper = drawing.canvas(200, 300, -2.4, 2.4, -0.8)
    paper.rod([(-2.4, 0.0), (2.4, 0.0)], 0.03, drawing.GREY)
    for wheel in (-0.18, 0.18):
        paper.circle((x + wheel, 0.06), 0.07, drawing.STEEL)
    paper.box((x, 0.22), (0.64, 0.26), 0.05, drawing.INK)
    joint = x, 0.35
    paper.rod([joint, (x + 1.4 * np.sin(theta), 0.35 + 1.4 * np.cos(theta))], 0.1, drawing.AMBER)
    paper.circle(joint, 0.05, drawing.PAPER)
    return paper.picture()


def _draw_acrobot(state: np.ndarray) -> np.ndarray:
    theta1, theta2 = state[:2]
    elbow = np.sin(theta1), -np.cos(theta1)
    hand = elbow[0] + np.sin(theta1 + theta2), elbow[1] - np.cos(theta1 + theta2)
    paper = drawing.canvas(240, 240, -2.3, 2.3, -2.3)
    paper.rod([(-2.3, 1.0), (2.3, 1.0)], 0.03, drawing.GREY)
    for ends, colour in (((elbow, hand), drawing.AMBER), (((0.0, 0.0), elbow), drawing.TEAL)):
        paper.rod(ends, 0.2, colour)
    for joint in ((0.0, 0.0), elbow):
        paper.circle(joint, 0.06, drawing.PAPER)
    return paper.picture()


def _draw_pendulum(state: np.ndarray) -> np.ndarray:
    theta = state[0]
    paper = drawing.canvas(240, 240, -1.4, 1.4, -1.4)
    paper.circle((0.0, 0.0), 1.22, drawing.GREY)
    paper.circle((0.0, 0.0), 1.205, drawing.PAPER)
    paper.rod([(0.0, 0.0), (-np.sin(theta), np.cos(theta))], 0.2, drawing.RED)
    paper.circle((0.0, 0.0), 0.06, drawing.INK)
    return paper.picture()


def _draw_mountain_car(state: np.ndarray) -> np.ndarray:
    def height(x: Any) -> Any:
        return 0.45 * np.sin(3 * x) + 0.55

    x = state[0]
    paper = drawing.canvas(200, 300, -1.2, 0.6, 0.0)
    ground = np.linspace(-1.2, 0.6, 200)
    paper.polygon([(-1.2, 0.0), *zip(ground, height(ground), strict=True), (0.6, 0.0)], drawing.GREY)
    paper.rod([(0.5, height(0.5)), (0.5, height(0.5) + 0.16)], 0.01, drawing.INK)
    paper.polygon([(0.5, height(0.5) + y) for y in (0.16, 0.1)] + [(0.43, height(0.5) + 0.13)], drawing.RED)
    tilt = np.arctan(1.35 * np.cos(3 * x))
    along, up = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    base = np.array([x, height(x)])
    for wheel in (-0.04, 0.04):
        paper.circle(tuple(base + wheel * along + 0.02 * up), 0.022, drawing.STEEL)
    body = [(-0.075, 0.03), (0.075, 0.03), (0.06, 0.07), (-0.06, 0.07)]
    paper.polygon([tuple(base + a * along + b * up) for a, b in body], drawing.INK)
    return paper.picture()
