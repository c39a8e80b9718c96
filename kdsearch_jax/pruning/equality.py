"""Whether two networks compute the same: every entry of every output is compared by its own scale.

One scale for all outputs lets anything pass that is small next to something else: logits next to a mask of -1e9, or
scores near 1e-4 next to boxes in pixels, whether they are in one array or in several. So each entry has its own scale:

    moved   how far the entry moves when every kernel is multiplied by 1 - s·u, where s = `TOLERANCE` and u is random
            in [0, 2): the largest of `DRAWS` draws, and no less than is typical of the entry over the examples
    scale   (moved + `ULPS`·eps·|entry|) / `TOLERANCE`

The kernels' contribution to an entry decides its scale. A constant added to it does not, whether it is an offset
(1e4 + x) or a mask. An entry that no kernel moves (the mean of an input, a learned vector) is measured by how far it
moves with all other parameters and the inputs, and one that does not move at all (a mask, an infinity, NaN, a constant,
a saturated sigmoid) must be equal up to the rounding of its own size. Where a function computes in bfloat16 or float16
anywhere, eps is that type's, and s is eps / 2.

Outputs of integers and booleans have no scale. Of the entries that did not change in any draw, the share that differs
may be up to `FLIPS`, since in an argmax over a million pixels a few depend on the last bit; below 1 / `FLIPS` entries
all must be equal.

Equality says nothing about an entry that is the same for every input. `compare` finds the entries that respond: those
of floating point that the kernels move and that differ between two inputs by ten times what is tolerated, or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 1e-5  # of an entry's own scale
FLIPS = 1e-4  # share of the entries of an integer output
ULPS, DRAWS = 2, 4
RESPONDS = 10 * TOLERANCE, 1e3  # of an entry's own scale; entries that are further apart have crossed a mask
FLOAT32 = float(np.finfo(np.float32).eps)

Arrays = Mapping[str, Any]  # {name of an output: array}
Function = Callable[..., Arrays]  # (variables, *inputs) → arrays


@dataclass(frozen=True)
class Measured:
    """What a network returns for a batch, in NumPy, and the scale of every entry.

    scales: of integers and booleans, 0 where the entry kept its value in all draws and infinity where it changed.
    moved: whether the kernels move the entry, of floating point only. batch: the number of examples.
    """

    values: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    batch: int


@dataclass
class Comparison:
    """What a comparison of two networks has found.

    differences: {name: largest difference of an entry over its own scale}, in the order of the outputs.
    responding: {name: which entries respond to the input, without the axis of the batch}, of floating point only.
    undefined: outputs that are nothing but NaN in the network itself.
    """

    differences: dict[str, float] = field(default_factory=dict)
    responding: dict[str, np.ndarray] = field(default_factory=dict)
    undefined: set[str] = field(default_factory=set)

    @property
    def worst(self) -> str | None:
        """The output that differs most, by more than is allowed; None where all are equal."""
        name = max(self.differences, key=self._rank, default=None)
        return name if name is not None and self._differs(name) else None

    @property
    def first(self) -> str | None:
        """The first output that differs by more than is allowed."""
        return next(filter(self._differs, self.differences), None)

    @property
    def difference(self) -> float:
        """The largest of `differences`."""
        return max(self.differences.values(), default=0.0)

    @property
    def silent(self) -> list[str]:
        """Outputs with entries for which no difference between inputs was seen."""
        return [name for name in self.differences if name not in self.responding or not self.responding[name].all()]

    @property
    def share(self) -> float:
        """The share of all entries of floating point that respond, in [0, 1]."""
        size = sum(each.size for each in self.responding.values())
        return sum(int(each.sum()) for each in self.responding.values()) / size if size else 0.0

    def _rank(self, name: str) -> float:
        return self.differences[name]

    def _differs(self, name: str) -> bool:
        return not self.differences[name] <= TOLERANCE


def measure(function: Function, variables: Any, inputs: Sequence[Any], rounding: float = FLOAT32) -> Measured:
    """The outputs of a network and the scale of every entry. Calls the function 1 + `DRAWS` times, or 1 + 2·`DRAWS`.

    Args:
      function: (variables, *inputs) → {name: array}.
      variables: {"params": …, other collections}, or any pytree of arrays.
      inputs: a batch: pytrees of arrays with a leading batch axis.
      rounding: of the coarsest type that the function computes with, see `rounding_of`.
    """
    batch, share = _batch_size(inputs), max(TOLERANCE, rounding / 2)
    values = _host(function(variables, *inputs))

    def farthest(shaken: Callable[[np.random.Generator], tuple[Any, Any]]) -> dict[str, np.ndarray]:
        found = {name: np.zeros(value.shape, np.float32) for name, value in values.items()}
        for draw in range(DRAWS):
            others, changed = shaken(np.random.default_rng(draw))
            made = _host(function(others, *changed))
            found = {name: np.maximum(far, _distance(values[name], made[name])) for name, far in found.items()}
        return found

    moved = farthest(lambda rng: (_shaken(variables, _kernels(variables), share, rng), inputs))
    made = {name: (far > 0) & _is_float(values[name]) for name, far in moved.items()}
    if any((_is_float(value) & (moved[name] == 0) & np.isfinite(value)).any() for name, value in values.items()):
        numbers, floats = _numbers(inputs), [x for x in jax.tree.leaves(variables) if _is_number(x)]
        others = farthest(lambda rng: (_shaken(variables, floats, share, rng), _shaken(inputs, numbers, share, rng)))
        moved = {name: np.where(far > 0, far, others[name]) for name, far in moved.items()}
    return Measured(
        values, {name: _scale(values[name], far, batch, rounding) for name, far in moved.items()}, made, batch
    )


def differences(expected: Measured, got: Arrays) -> dict[str, float]:
    """{name: the largest difference of an entry over its own scale}; infinity where shapes or infinities differ.

    Names are those that are in both.
    """
    found = {}
    for name, other in _host({name: got[name] for name in expected.values if name in got}).items():
        value, scale = expected.values[name], expected.scales[name]
        if other.shape != value.shape:
            found[name] = math.inf
        elif _is_float(value):
            found[name] = float(_over(_distance(value, other), scale).max(initial=0.0))
        else:
            share = float(((value != other) & (scale == 0)).mean()) if value.size else 0.0
            found[name] = TOLERANCE * share / FLIPS
    return found


def difference(expected: Measured, got: Arrays) -> float:
    """The largest of `differences`; infinity where the names are not the same."""
    same = expected.values.keys() == got.keys()
    return max(differences(expected, got).values(), default=0.0) if same else math.inf


def compare(
    one: Function,
    variables: Any,
    other: Function,
    others: Any,
    inputs: Sequence[Any],
    rounding: float = FLOAT32,
    *,
    common: bool = False,
) -> Comparison:
    """Compares the function `other` of the variables `others` with the function `one` of `variables` on a batch.

    Where nothing of an output responds to the examples of the batch, they are compared on a batch near it as well, and
    then on a random one.

    Args:
      rounding: as for `measure`.
      common: whether only arrays that both return in the same shape are compared, and one that responds is enough.
    """
    found, first = Comparison(), None
    for batch in _batches(inputs):
        expected, got = measure(one, variables, batch, rounding), other(others, *batch)
        if common:
            expected = _only(expected, {name for name, value in got.items() if _shape(expected, name) == value.shape})
        elif expected.values.keys() != got.keys():
            return Comparison(dict.fromkeys(expected.values.keys() ^ got.keys(), math.inf))
        for name, far in differences(expected, got).items():
            found.differences[name] = max(found.differences.get(name, 0.0), far)
            if _is_float(expected.values[name]):
                responds = _responding(expected, first, name)
                found.responding[name] = responds | found.responding.get(name, np.zeros_like(responds))
                if first is None and responds.size and np.isnan(expected.values[name]).all():
                    found.undefined.add(name)
        first = first or expected
        enough = [bool(each.any()) for each in found.responding.values()]
        if found.first or (any(enough) if common else enough and all(enough)):
            break
    return found


def rounding_of(jaxpr: Any) -> float:
    """The rounding (eps) of the coarsest type of floating point in a jaxpr, from float32's to bfloat16's."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars] + [v.aval for v in jaxpr.invars]
    types = {aval.dtype for aval in made if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)}
    inner = [
        rounding_of(body)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for body in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(body, "jaxpr") or hasattr(body, "eqns")
    ]
    coarsest = max([float(jnp.finfo(dtype).eps) for dtype in types] + inner, default=FLOAT32)
    return min(max(coarsest, FLOAT32), float(jnp.finfo(jnp.bfloat16).eps))


# --- scales -----------------------------------------------------------------------------------------------------------


def _scale(value: np.ndarray, moved: np.ndarray, batch: int, rounding: float) -> np.ndarray:
    if not _is_float(value):
        return np.where(moved > 0, np.inf, 0.0).astype(np.float32)
    size = np.where(np.isfinite(value), np.abs(value), 0)
    with np.errstate(over="ignore"):
        return (np.maximum(moved, _typical(moved, batch)) + np.float32(ULPS * rounding) * size) / np.float32(TOLERANCE)


def _typical(moved: np.ndarray, batch: int) -> np.ndarray | float:
    """The geometric mean over the examples of how far an entry moves, of those in which it does.

    Draws in which an entry happens to stay where it is would make its scale too small.
    """
    axis = _batch_axis(moved, batch)
    if axis is None:
        return 0.0
    known = (moved > 0) & np.isfinite(moved)
    logs = np.log(moved, out=np.zeros_like(moved), where=known).sum(axis, keepdims=True)
    count = known.sum(axis, keepdims=True)
    return np.where(count, np.exp(logs / np.maximum(count, 1)), 0).astype(moved.dtype)


def _kernels(variables: Any) -> list[Any]:
    """The parameters with two axes or more; all parameters where there are none."""
    params = variables["params"] if isinstance(variables, Mapping) and variables.get("params") else variables
    floats = [x for x in jax.tree.leaves(params) if _is_number(x)]
    return [x for x in floats if x.ndim > 1] or floats


def _shaken(tree: Any, leaves: list[Any], share: float, rng: np.random.Generator) -> Any:
    """The tree with every number of these leaves of it made smaller by a random share of itself, `share` on average."""
    chosen = {id(x) for x in leaves}

    def shaken(leaf: Any) -> Any:
        if id(leaf) not in chosen:
            return leaf
        value = np.asarray(leaf)
        return jnp.asarray((value * (1 - 2 * share * rng.random(value.shape, np.float32))).astype(value.dtype))

    return jax.tree.map(shaken, tree)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float32 or wider; 0 where both are the same infinity or NaN, infinity where they are not."""
    if not _is_float(a):
        return (a != b).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(a - b)
    far = np.where(np.isnan(far), np.inf, far)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, far).astype(far.dtype)


def _over(far: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """far/scale; 0 where the scale is infinite, as some draw left what is finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where((far == 0) | np.isinf(scale), 0, far / scale)


# --- responses --------------------------------------------------------------------------------------------------------


def _responding(found: Measured, before: Measured | None, name: str) -> np.ndarray:
    """Which entries of an output, without the axis of the batch, differ from example to example or from the batch
    before."""
    value, scale, moved = found.values[name], found.scales[name], found.moved[name]
    axis = _batch_axis(value, found.batch)
    others = [] if before is None else [(before.values[name], before.scales[name], before.moved[name])]
    if axis is not None:
        others.append((np.roll(value, 1, axis), np.roll(scale, 1, axis), np.roll(moved, 1, axis)))
    responds = np.zeros(value.shape, bool)
    for other, its, also in others:
        far = _over(_distance(value, other), np.maximum(scale, its))
        responds |= moved & also & (far >= RESPONDS[0]) & (far <= RESPONDS[1])
    return responds if axis is None else np.asarray(responds.any(axis))


def _batches(inputs: Sequence[Any]) -> Iterator[Any]:
    """The batch; one near it, in which masks are the same; and a random one."""
    rng = np.random.default_rng(0)
    yield inputs
    numbers = {id(x) for x in _numbers(inputs)}
    if numbers:
        yield jax.tree.map(lambda x: _near(x, rng) if id(x) in numbers else x, inputs)
    else:
        yield jax.tree.map(_other_examples, inputs)
    yield jax.tree.map(lambda x: _random(x, rng), inputs)


def _numbers(inputs: Any) -> list[Any]:
    """The inputs of floating point that are no masks: with more than two different values."""
    return [x for x in jax.tree.leaves(inputs) if _is_number(x) and len(np.unique(np.asarray(x, np.float32))) > 2]


def _near(x: Any, rng: np.random.Generator) -> Any:
    """Every number larger or smaller by a random share of itself: of the same sign, and 0 where it was."""
    return jnp.asarray((np.asarray(x, np.float32) * rng.uniform(0.7, 1.3, x.shape)).astype(x.dtype))


def _random(x: Any, rng: np.random.Generator) -> Any:
    """Normal numbers; integers in another order, so that each is one that was there; booleans as they were."""
    if _is_number(x):
        return jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))
    integers = jnp.issubdtype(x.dtype, jnp.integer) and x.ndim
    return jnp.asarray(np.roll(np.flip(np.asarray(x)), 1, axis=-1)) if integers else x


def _other_examples(x: Any) -> Any:
    return jnp.roll(x, 1, axis=0) if x.ndim else x


# --- arrays -----------------------------------------------------------------------------------------------------------


def _host(arrays: Arrays) -> dict[str, np.ndarray]:
    """In NumPy; of floating point in float32 or wider."""
    return {name: _widened(value) for name, value in arrays.items()}


def _widened(x: Any) -> np.ndarray:
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x, np.float32) if _is_number(x) and jnp.finfo(x.dtype).bits < 32 else np.asarray(x)


def _only(found: Measured, names: set[str]) -> Measured:
    values, scales, moved = (
        {name: each[name] for name in each if name in names} for each in (found.values, found.scales, found.moved)
    )
    return Measured(values, scales, moved, found.batch)


def _shape(found: Measured, name: str) -> tuple[int, ...] | None:
    return found.values[name].shape if name in found.values else None


def _is_number(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_float(x: np.ndarray) -> bool:
    return np.issubdtype(x.dtype, np.inexact)


def _batch_axis(x: np.ndarray, batch: int) -> int | None:
    return next((axis for axis, size in enumerate(x.shape) if size == batch), None) if batch > 1 else None


def _batch_size(inputs: Any) -> int:
    return next((x.shape[0] for x in jax.tree.leaves(inputs) if x.ndim), 1)
