"""A generator of random Flax modules, and the proof that each must pass.

A network is a program: its inputs, a list of steps (`random_steps`), and its outputs. Decisions that depend on sizes
use those of the whole network, recorded on the first run, so that a student runs the same code.

The proof (`check`) of one network: each index of each parameter is in one group or frozen with a reason; the outputs
depend on inputs and gates; and several students with random gates, run by the module's own code, match the gated
network within 1e-5 of each output's scale and cost what was predicted. A student with noise in an important kernel must
fail the same comparison.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import random_blocks  # noqa: F401  (adds to STEPS)
import random_operations  # noqa: F401  (adds to STEPS)
import random_sizes  # noqa: F401  (adds to STEPS)
from hypothesis import strategies as st
from proof import traced, variables_of
from random_steps import STEPS, pooled, spread, widths

from kdsearch_jax.pruning import equality, surgery
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.tracing.masking import masked
from kdsearch_jax.tracing.topology import Topology

BATCH = 3
SHAPES = {"image": (4, 4, 3), "wide": (2, 6, 4), "tokens": (5, 4), "square": (4, 6), "vector": (7,), "ints": (4,)}
INPUTS = tuple((name,) for name in SHAPES) + (
    ("image", "vector"), ("tokens", "ints"), ("image", "tokens"), ("vector", "vector"),
)  # fmt: skip


class Program(NamedTuple):
    """inputs: names of `SHAPES`; steps: (name, a, b, c); end: how the network ends, and a number for it."""

    inputs: tuple[str, ...]
    steps: tuple[tuple[str, int, int, int], ...]
    end: tuple[int, int]


class Build:
    """A network under construction: its module, its values so far, the layers that may be called again."""

    def __init__(self, module: Random):
        self.module, self.values, self.layers = module, [], []
        self._shapes = list(module.shapes) or None
        self._named = self._asked = 0
        self.seen: list[tuple[int, ...]] = []

    def name(self, kind: str) -> str:
        """A name of its own for a layer, numbered as Flax numbers them."""
        self._named += 1
        return f"{kind}_{self._named}"

    def whole(self, x: Any) -> tuple[int, ...]:
        """The shape that x has in the whole network."""
        self._asked += 1
        self.seen.append(x.shape)
        return self._shapes[self._asked - 1] if self._shapes else x.shape

    def size(self, x: Any, literal: int) -> int:
        """The number of channels: asked of x, or written into the code."""
        n = self.whole(x)[-1]
        return n if literal % 2 else x.shape[-1]

    def param(self, name: str, shape: tuple[int, ...]) -> Any:
        return self.module.param(self.name(name), nn.initializers.normal(), shape)

    def keep(self, layer: nn.Module, x: Any) -> Any:
        """Calls a layer that may be called again."""
        y = layer(x)
        self.layers.append((layer, self.whole(x)[-1], self.whole(y)[-1], y.ndim))
        return y

    def before(self, back: int) -> Any:
        """An older value than the newest, if there is one."""
        older = self.values[:-1] or self.values
        return older[-1 - back % len(older)]

    def older(self, back: int, x: Any) -> Any:
        """An older value with the pixels or tokens of x: as it is, or its mean."""
        value = self.before(back)
        if self.whole(value)[:-1] == self.whole(x)[:-1]:
            return value
        return jnp.broadcast_to(spread(pooled(value), x), (*x.shape[:-1], value.shape[-1]))

    def tokens(self, back: int, x: Any) -> Any:
        """An older value as a sequence."""
        value = self.before(back)
        return value[:, None] if value.ndim == 2 else value.reshape(value.shape[0], -1, value.shape[-1])


class Random(nn.Module):
    """The module of a program; shapes: those that its decisions hang on, in the order in which they are asked for."""

    program: Program
    shapes: tuple[tuple[int, ...], ...] = ()
    record: Callable[[list[Any]], None] | None = None

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        build = Build(self)
        for name, x in reversed(list(zip(self.program.inputs, inputs, strict=True))):
            build.values.append(nn.Embed(9, 6, name=build.name("embed"))(x) if name == "ints" else x)
        for name, *numbers in self.program.steps:
            build.values.append(STEPS[name](build, build.values[-1], *numbers))
        output = self.finish(build, *self.program.end)
        if self.record is not None:
            self.record(build.seen)
        return output

    def finish(self, s: Build, how: int, number: int) -> Any:
        """One output, or several."""
        x = s.values[-1]
        head = nn.Dense(3, name="out")
        if how == 0:
            return head(pooled(x))
        if how == 1:
            return head(x)
        if how == 2:
            return {"new": head(pooled(x)), "old": nn.Dense(2, name="old")(pooled(s.older(number, x)))}
        if how == 3:
            return head(x), s.before(number).mean()
        if how == 4:
            return head(nn.relu(nn.Dense(widths(number), name="hidden")(pooled(x))))
        return x


def module_of(program: Program) -> Random:
    """The module, with the shapes that its decisions hang on."""
    seen: list[tuple[int, ...]] = []
    jax.eval_shape(Random(program, record=seen.extend).init, jax.random.key(0), *inputs_of(program))
    return Random(program, tuple(seen))


def inputs_of(program: Program) -> tuple[np.ndarray, ...]:
    """A batch of random inputs."""
    rng = np.random.default_rng(1)
    return tuple(
        rng.integers(0, 9, (BATCH, *SHAPES[name])).astype(np.int32)
        if name == "ints"
        else rng.normal(size=(BATCH, *SHAPES[name])).astype(np.float32)
        for name in program.inputs
    )


NAMES = [*STEPS, *(3 * ["hidden"])]  # most networks have plain layers between the strange ones
ENDS = (0, 1, 2, 3, 4, 4, 5)


def programs() -> st.SearchStrategy[Program]:
    """All programs; the simplest are those with few steps and small numbers."""
    number = st.integers(0, 7)
    steps = st.lists(st.tuples(st.sampled_from(NAMES), number, number, number), min_size=3, max_size=10)
    return st.builds(Program, st.sampled_from(INPUTS), steps.map(tuple), st.tuples(st.sampled_from(ENDS), number))


def sample(seed: int) -> Program:
    """One program, by a seed."""
    rng = random.Random(seed)
    steps = tuple((rng.choice(NAMES), *(rng.randrange(8) for _ in range(3))) for _ in range(rng.randint(3, 10)))
    return Program(rng.choice(INPUTS), steps, (rng.choice(ENDS), rng.randrange(8)))


# --- cuts -------------------------------------------------------------------------------------------------------------

HOWS = ("half", "one group", "branches", "single", "least")


def cut(topology: Topology, rng: np.random.Generator, how: str) -> dict[str, np.ndarray]:
    """What to keep: about "half" of the units and of the branches, half of "one group", half of the "branches", a
    "single" unit of each group, or the "least" possible: that, and no branch."""
    keep = {group.name: np.ones(group.size, bool) for group in topology.groups}
    chosen = topology.groups[rng.integers(len(topology.groups))].name
    for group in topology.groups:
        is_branch = group.kind == "branches"
        if is_branch and (how in ("half", "branches") or (how == "one group" and group.name == chosen)):
            keep[group.name] = rng.uniform(size=1) < (0.0 if how == "one group" else 0.5)
        elif is_branch and how == "least":
            keep[group.name] = np.zeros(1, bool)
        elif not is_branch and (how in ("half", "single", "least") or (how == "one group" and group.name == chosen)):
            many = 1 if how in ("single", "least") else int(rng.integers(1, group.size))
            keep[group.name] = np.isin(np.arange(group.size), rng.choice(group.size, many, replace=False))
    return keep


def random_gates(topology: Topology, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Gates from 0.3 to 1.5; few of them are zero though the unit stays."""
    return {
        group.name: np.where(rng.uniform(size=group.size) < 0.03, 0.0, rng.uniform(0.3, 1.5, group.size)).astype("f4")
        for group in topology.groups
    }


# --- the proof --------------------------------------------------------------------------------------------------------


class Nothing(Exception):
    """Nothing in the network can be pruned, and it was said why."""


def check(program: Program, hows: Sequence[str] = HOWS, seed: int = 0, gradient: bool = True) -> str:
    """Proves one network; the gradient by the gates only if asked, since it takes longest to compile.

    Returns:
      "exact"; "partly frozen", where more stays than in any network; "insensitive", where its outputs depend on
      neither inputs nor gates, so that equality would prove nothing; or "outgrown", where squares of squares have left
      what float32 can add up, so that the network itself is not finite under another order of operations.

    Raises:
      AssertionError, SurgeryError: where a promise is broken.
      Nothing: where nothing can be pruned.
    """
    module, inputs = module_of(program), inputs_of(program)
    try:
        network = traced(module, *inputs)
    except ValueError as error:
        message = str(error)
        assert "nothing in this network can be pruned (" in message and (": " in message or "no parameters" in message)
        raise Nothing(message) from error
    topology, rng = network.topology, np.random.default_rng(seed)
    # Without XLA's optimisations, the gradient of a maximum is NaN where its operand is recomputed with other rounding.
    options = {"xla_backend_optimization_level": 3} if gradient else None
    gated = jax.jit(functools.partial(_gated, network, gradient), compiler_options=options)
    ones, everything = gates_lib.init(topology), gates_lib.keep_all(topology)
    for turn in range(6):  # a few rectifiers may all be off, but hardly for every choice of parameters
        variables = variables_of(module, *inputs, seed=seed + turn)
        if _largest(module, variables, inputs) > OUTGROWN:
            return "outgrown"
        if _sensitive(*gated(variables, random_gates(topology, rng), everything, inputs)):
            break
    else:
        return "insensitive"
    for how in hows:
        keep = cut(topology, rng, how)
        gates = {name: np.where(keep[name], gate, 0) for name, gate in random_gates(topology, rng).items()}
        folded, _, _ = gated(variables, gates, keep, inputs)
        sliced, student = surgery.slice_variables(folded, network, keep), network.student(keep)
        run = jax.jit(student.apply)
        expected = equality.reference_outputs(lambda v, *xs: _named(gated(v, ones, keep, xs)[1]), folded, inputs)  # noqa: B023
        got, wrong = _named(run(sliced, *inputs)), _named(run(_noisy(sliced, rng), *inputs))
        difference = equality.difference(expected, got)
        assert difference <= surgery.TOLERANCE, f"{how}: the student differs by {difference:.1e} of its own scale"
        noticed = equality.difference(expected, wrong) > surgery.TOLERANCE
        assert noticed or not _far(got, wrong), f"{how}: a wrong student goes unnoticed"
        surgery.verify_cost(network, keep, student)
    by_choice = [f for f in topology.frozen if f.axis >= 0 and not any(part in f.reason for part in NATURAL)]
    return "partly frozen" if by_choice or topology.excluded else "exact"


def _named(outputs: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(outputs))}


def _noisy(variables: Any, rng: np.random.Generator) -> Any:
    """The variables with one kernel replaced by random numbers of its size."""
    leaves, structure = jax.tree.flatten(variables)
    kernels = [i for i, leaf in enumerate(leaves) if leaf.ndim > 1 and leaf.size]
    chosen = rng.choice(kernels)
    size = float(np.std(leaves[chosen])) or 1.0
    leaves[chosen] = jnp.asarray(size * rng.normal(size=leaves[chosen].shape), leaves[chosen].dtype)
    return structure.unflatten(leaves)


def _far(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an output differs by more than a thousandth of its largest number."""
    return any(jnp.abs(one[name] - other[name]).max() > 1e-3 * jnp.abs(one[name]).max() for name in one)


def _gated(network: Any, by_gates: bool, variables: Any, gates: Any, keep: Any, inputs: Any) -> tuple[Any, Any, Any]:
    """(folded variables, outputs, gradient of a function of the outputs by the gates)."""

    def loss(gates: Any) -> Any:
        folded = gates_lib.fold(variables, gates, network.topology, keep)
        outputs = masked(network.module.apply, network.topology, keep)(folded, *inputs)
        made = [jnp.ravel(leaf) for leaf in jax.tree.leaves(outputs)]
        return sum(jnp.sum(jnp.sin(leaf) * jnp.arange(1.0, leaf.size + 1)) for leaf in made), (folded, outputs)

    if not by_gates:
        _, (folded, outputs) = loss(gates)
        return folded, outputs, None
    gradient, (folded, outputs) = jax.grad(loss, has_aux=True)(gates)
    return folded, outputs, gradient


def _largest(module: Any, variables: Any, inputs: Any) -> float:
    """The largest absolute value that any layer of the network returns."""
    _, kept = module.apply(variables, *inputs, capture_intermediates=True, mutable=["intermediates"])
    return max(float(np.abs(np.asarray(leaf)).max(initial=0.0)) for leaf in jax.tree.leaves(kept))


def _sensitive(folded: Any, outputs: Any, gradient: Any) -> bool:
    """Whether outputs differ between examples, and with the gates: else the proof would be an empty one.

    Raises:
      AssertionError: where an output or a gradient is not finite.
    """
    made = [np.asarray(leaf) for leaf in jax.tree.leaves(outputs) if leaf.ndim]
    slopes = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    assert all(np.isfinite(leaf).all() for leaf in made), "outputs are not finite"
    assert all(np.isfinite(leaf).all() for leaf in slopes), "a gate's gradient is not finite"
    scale = max(np.abs(leaf).max() for leaf in made)
    varies = max(np.abs(leaf[1:] - leaf[:1]).max() for leaf in made) > 1e-4 * scale
    return bool(varies and (not slopes or max(np.abs(leaf).max() for leaf in slopes) > 1e-4))


OUTGROWN = 1e4  # of a layer: its products in attention, 1e8, have an error of several units in an exponent
NATURAL = (  # reasons for which any network has something frozen
    "the network's output", "an axis of fixed size", "a convolution's window", "no kernel reads it", "a single unit",
    "indexed by gather",
)  # fmt: skip
