"""Parameters that lie in parts, put together where they are used and nowhere else (FSDP, Zhao et al. 2023,
arXiv:2304.11277; the third stage of ZeRO, arXiv:1910.02054).

Left alone, XLA's partitioner sees a batch and a kernel that are split over the same devices and may as well split the
work by channels and send activations around.  `at_use` leaves it no choice: it rewrites a function so that a marked
array is made whole in front of the operation that reads it, inside the loop where that is one over stacked blocks, and
once more in the backward pass instead of being kept for it.  One layer's parameters are then whole at a time.
"""

import jax
from jax.extend import core


def at_use(f, whole, marks):
    """A function that computes what f does, where every marked leaf of its arguments is `whole(leaf, mark)` at use.

    Args:
        f: a function of trees of arrays that jit can trace.
        whole: (array, mark) -> the same values.
        marks: for each leaf of the arguments a tuple with an entry for every axis, or None.  Within a scan over a
            leaf's first axis the rest of the tuple is the mark of its slices; only None there lets it be scanned.
    """

    def rewritten(*arguments):
        traced, shapes = jax.make_jaxpr(f, return_shape=True)(*arguments)
        leaves = _run(traced.jaxpr, traced.consts, jax.tree.leaves(arguments), marks, whole)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return rewritten


def _run(jaxpr, consts, arguments, marks, whole):
    """The outputs of a jaxpr, marked inputs made whole at use."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    marked = {var: mark for var, mark in zip(jaxpr.invars, marks, strict=True) if mark is not None}

    def read(var):
        return var.val if hasattr(var, "val") else values[var]

    def mark_of(var):
        return None if hasattr(var, "val") else marked.get(var)

    for equation in jaxpr.eqns:
        inputs, notes = [read(var) for var in equation.invars], [mark_of(var) for var in equation.invars]
        if equation.primitive.name == "convert_element_type" and notes[0] is not None:
            marked[equation.outvars[0]] = notes[0]  # half precision is half the traffic
            notes = [None]
        values.update(zip(equation.outvars, _apply(equation, inputs, notes, whole), strict=True))
    return [whole(read(var), mark_of(var)) if mark_of(var) is not None else read(var) for var in jaxpr.outvars]


def _apply(equation, inputs, marks, whole):
    """The outputs of one equation."""
    name, params = equation.primitive.name, equation.params
    if all(mark is None for mark in marks):
        return _bind(equation, inputs)
    if name in ("jit", "pjit", "closed_call"):
        inner = params["jaxpr" if "jaxpr" in params else "call_jaxpr"]
        return _run(inner.jaxpr, inner.consts, inputs, marks, whole)
    if name in ("remat2", "checkpoint"):
        inner = jax.checkpoint(
            lambda *inputs: _run(params["jaxpr"], (), inputs, marks, whole),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return inner(*inputs)
    if name == "scan":
        return _scan(equation, inputs, marks, whole)

    def use(*inputs):
        return _bind(equation, _made_whole(inputs, marks, whole))

    # Checkpointed, so that what is kept for the gradient is the part, not the whole.
    return jax.checkpoint(use)(*inputs)


def _scan(equation, inputs, marks, whole):
    """A scan whose constants and slices are made whole in its body; what is carried, before it."""
    params, inner = equation.params, equation.params["jaxpr"]
    # Slices have an axis less within than without; constants and carries, in this order, do not.
    last = _alike(equation.invars, inner.jaxpr.invars)
    first = last - _alike(equation.outvars, inner.jaxpr.outvars)
    late = [mark if i < first or (i >= last and mark and mark[0] is None) else None for i, mark in enumerate(marks)]
    now = [None if kept else mark for mark, kept in zip(marks, late, strict=True)]
    inputs = _made_whole(inputs, now, whole)
    consts = inputs[:first]
    notes = [*late[:last], *(mark and mark[1:] for mark in late[last:])]

    def body(carry, xs):
        outputs = _run(inner.jaxpr, inner.consts, [*consts, *carry, *xs], notes, whole)
        return outputs[: last - first], outputs[last - first :]

    carry, ys = jax.lax.scan(
        body,
        inputs[first:last],
        inputs[last:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _alike(outer, inner):
    """How many variables have as many axes within a loop as without."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))


def _made_whole(inputs, marks, whole):
    return [x if mark is None else whole(x, mark) for x, mark in zip(inputs, marks, strict=True)]


def _bind(equation, inputs):
    """The equation as it stands, by way of a program of its own: how one binds a primitive differs between versions."""
    given = {var: x for var, x in zip(equation.invars, inputs, strict=True) if not hasattr(var, "val")}
    alone = core.Jaxpr((), [*given], equation.outvars, [equation], equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
