"""Numbers that can be drawn in proportion to their size while they change (Schaul et al., arXiv:1511.05952, B.2.1).

A tree whose every node is the sum of its eight children, one array [nodes, 8] for each level, the leaves first.  Eight
and not two: a level costs a fixed time, and eight numbers are added in the time of one.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = tuple[Array, ...]
CHILDREN = 8


def init(size: int) -> Tree:
    """`size` zeros."""
    levels: list[Array] = []
    while not levels or size > 1:
        size = -(-size // CHILDREN)
        levels.append(jnp.zeros((size, CHILDREN), jnp.float32))
    return tuple(levels)


def total(tree: Tree) -> Array:
    """The sum of all numbers, a scalar."""
    return tree[-1].sum()


def get(tree: Tree, index: Array) -> Array:
    """The numbers [B] at index [B]."""
    return tree[0][index // CHILDREN, index % CHILDREN]


def put(tree: Tree, index: Array, value: Array) -> Tree:
    """The tree with value [B] >= 0 at index int32 [B]; where an index is given twice the larger value stands."""
    place = index // CHILDREN, index % CHILDREN
    levels = [tree[0].at[place].set(0.0).at[place].max(value)]
    for level in tree[1:]:
        index = index // CHILDREN
        level = level.at[index // CHILDREN, index % CHILDREN].set(levels[-1][index].sum(axis=-1))
        levels.append(level)
    return tuple(levels)


def find(tree: Tree, mass: Array) -> Array:
    """The index int32 [B] whose number holds mass [B] in [0, total), all numbers laid end to end.

    Never one whose number is 0, whatever the rounding, unless all are.
    """
    index = jnp.zeros(mass.shape, jnp.int32)
    for level in reversed(tree):
        children = level[index]
        before = jnp.cumsum(children, axis=-1) - children
        fits = (before <= mass[:, None]) & (children > 0)
        child = jnp.max(jnp.where(fits, jnp.arange(CHILDREN), 0), axis=-1)
        mass = mass - jnp.take_along_axis(before, child[:, None], axis=-1)[:, 0]
        index = index * CHILDREN + child
    return index
