"""Whether two networks compute the same: every entry of every output is compared by its own scale.

With one scale for all outputs, small values next to large ones would never be checked: logits next to a mask of -1e9,
or scores near 1e-4 next to boxes in pixels, in one array or in several. So each entry has its own scale:

    moved   how far the entry moves when every kernel is multiplied by 1 - s·u, where s = `TOLERANCE` and u is random
            in [0, 2): the maximum of `DRAWS` draws, and no less than is typical of the entry over the examples
    scale   (moved + `ULPS`·eps·|entry|) / `TOLERANCE`

The scale of an entry is set by the contribution of the kernels, not by a constant added to it, be it an offset
(1e4 + x) or a mask. An entry that no kernel moves (the mean of an input, a learned vector) is measured by how far it
moves with all other parameters and the inputs. An entry that does not move at all (a mask, an infinity, NaN, a
constant, a saturated sigmoid) must be equal up to rounding. If a function computes in bfloat16 or float16 anywhere, eps
is that type's, and s is eps / 2.

Integer and boolean outputs have no scale. Among the entries that did not change in any draw, a share of up to `FLIPS`
may differ, since in an argmax over a million pixels a few depend on the last bit; with fewer than 1 / `FLIPS` entries
all must be equal.

Equality proves nothing about an entry that is the same for every input. `compare` reports which entries respond to the
input: floating point entries that the kernels move and that differ between two inputs by at least ten times the
tolerance.
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
RESPONDS = 10 * TOLERANCE, 1e3  # in units of an entry's scale; above that, a mask has changed
FLOAT32 = float(np.finfo(np.float32).eps)

Arrays = Mapping[str, Any]  # {name of an output: array}
Function = Callable[..., Arrays]  # (variables, *inputs) → arrays


@dataclass(frozen=True)
class Reference:
    """The outputs of a network for a batch, as NumPy arrays by name, and the scale of every entry.

    Attributes:
      values: the outputs.
      scales: of the same shapes; for integers and booleans 0 if the entry kept its value in all draws, else infinity.
      moved: of the same shapes, whether the kernels move the entry; False for integers and booleans.
      batch: number of examples.
    """

    values: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]
    batch: int


@dataclass
class Comparison:
    """The result of comparing two networks.

    Attributes:
      differences: {name: largest difference of an entry over its own scale}, in the order of the outputs.
      responding: {name: which entries respond to the input, without the batch axis}, floating point outputs only.
      undefined: outputs that are entirely NaN in the reference network.
    """

    differences: dict[str, float] = field(default_factory=dict)
    responding: dict[str, np.ndarray] = field(default_factory=dict)
    undefined: set[str] = field(default_factory=set)

    @property
    def worst(self) -> str | None:
        """The output that differs most, by more than is allowed; None if all are equal."""
        name = max(self.differences, key=self.differences.__getitem__, default=None)
        return name if name is not None and self._differs(name) else None

    @property
    def first(self) -> str | None:
        """The first output that differs by more than is allowed; None if all are equal."""
        return next(filter(self._differs, self.differences), None)

    @property
    def difference(self) -> float:
        """The largest of `differences`."""
        return max(self.differences.values(), default=0.0)

    @property
    def silent(self) -> list[str]:
        """Outputs with entries that do not respond to the input."""
        return [name for name in self.differences if name not in self.responding or not self.responding[name].all()]

    @property
    def share(self) -> float:
        """The share of all floating point entries that respond, in [0, 1]."""
        size = sum(responds.size for responds in self.responding.values())
        return sum(int(responds.sum()) for responds in self.responding.values()) / size if size else 0.0

    def _differs(self, name: str) -> bool:
        return not self.differences[name] <= TOLERANCE


def reference_outputs(
    function: Function, variables: Any, inputs: Sequence[Any], rounding: float = FLOAT32
) -> Reference:
    """The outputs of a network and the scale of every entry; calls the function 1 + `DRAWS` or 1 + 2·`DRAWS` times.

    Args:
      function: (variables, *inputs) → {name: array}.
      variables: {"params": …, other collections}, or any pytree of arrays.
      inputs: a batch: pytrees of arrays with a leading batch axis.
      rounding: eps of the coarsest type that the function computes with, see `rounding_of`.
    """
    batch, share = _batch_size(inputs), max(TOLERANCE, rounding / 2)
    values = _host(function(variables, *inputs))

    def largest_move(perturb: Callable[[np.random.Generator], tuple[Any, Any]]) -> dict[str, np.ndarray]:
        largest = {name: np.zeros(value.shape, np.float32) for name, value in values.items()}
        for draw in range(DRAWS):
            new_variables, new_inputs = perturb(np.random.default_rng(draw))
            outputs = _host(function(new_variables, *new_inputs))
            largest = {name: np.maximum(far, _distance(values[name], outputs[name])) for name, far in largest.items()}
        return largest

    moves = largest_move(lambda rng: (_perturbed(variables, _kernels(variables), share, rng), inputs))
    moved = {name: (far > 0) & _is_float(values[name]) for name, far in moves.items()}
    if any((_is_float(value) & (moves[name] == 0) & np.isfinite(value)).any() for name, value in values.items()):
        numbers, floats = _numbers(inputs), [x for x in jax.tree.leaves(variables) if _is_number(x)]
        by_all = largest_move(
            lambda rng: (_perturbed(variables, floats, share, rng), _perturbed(inputs, numbers, share, rng))
        )
        moves = {name: np.where(far > 0, far, by_all[name]) for name, far in moves.items()}
    scales = {name: _scale(values[name], far, batch, rounding) for name, far in moves.items()}
    return Reference(values, scales, moved, batch)


def differences(expected: Reference, got: Arrays) -> dict[str, float]:
    """{name: largest difference of an entry over its own scale}, for names in both.

    It is infinite if shapes or infinities differ.
    """
    result = {}
    for name, other in _host({name: got[name] for name in expected.values if name in got}).items():
        value, scale = expected.values[name], expected.scales[name]
        if other.shape != value.shape:
            result[name] = math.inf
        elif _is_float(value):
            result[name] = float(_over(_distance(value, other), scale).max(initial=0.0))
        else:
            share = float(((value != other) & (scale == 0)).mean()) if value.size else 0.0
            result[name] = TOLERANCE * share / FLIPS
    return result


def difference(expected: Reference, got: Arrays) -> float:
    """The largest of the `differences`; infinity if the names differ."""
    same = expected.values.keys() == got.keys()
    return max(differences(expected, got).values(), default=0.0) if same else math.inf


def compare(
    reference: Function,
    variables: Any,
    other: Function,
    other_variables: Any,
    inputs: Sequence[Any],
    rounding: float = FLOAT32,
    *,
    common: bool = False,
) -> Comparison:
    """Compares two functions on a batch, each with its own variables.

    If nothing of an output responds to the examples of the batch, the functions are also compared on a batch close to
    it, and then on a random one.

    Args:
      rounding: as for `reference_outputs`.
      common: compares only arrays that both functions return in the same shape; one that responds is enough.
    """
    result, first = Comparison(), None
    for batch in _batches(jax.tree.map(jnp.asarray, inputs)):
        try:
            expected = reference_outputs(reference, variables, batch, rounding)
        except Exception:
            if first is None:
                raise
            continue  # the model refuses a batch that was made up here, such as tokens without an end of sequence
        got = other(other_variables, *batch)
        if common:
            expected = _only(expected, {name for name, value in got.items() if _shape(expected, name) == value.shape})
        elif expected.values.keys() != got.keys():
            return Comparison(dict.fromkeys(expected.values.keys() ^ got.keys(), math.inf))
        for name, far in differences(expected, got).items():
            result.differences[name] = max(result.differences.get(name, 0.0), far)
            if _is_float(expected.values[name]):
                responds = _responding(expected, first, name)
                result.responding[name] = responds | result.responding.get(name, np.zeros_like(responds))
                if first is None and responds.size and np.isnan(expected.values[name]).all():
                    result.undefined.add(name)
        first = first or expected
        enough = [bool(responds.any()) for responds in result.responding.values()]
        if result.first or (any(enough) if common else enough and all(enough)):
            break
    return result


def rounding_of(jaxpr: Any) -> float:
    """The eps of the coarsest floating point type in a jaxpr, between float32's and bfloat16's."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    avals = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars] + [v.aval for v in jaxpr.invars]
    types = {aval.dtype for aval in avals if hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)}
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
    """The geometric mean of how far an entry moves over those examples in which it moves.

    Without it, an entry that happens not to move in any draw would get too small a scale.
    """
    axis = _batch_axis(moved, batch)
    if axis is None:
        return 0.0
    known = (moved > 0) & np.isfinite(moved)
    logs = np.log(moved, out=np.zeros_like(moved), where=known).sum(axis, keepdims=True)
    count = known.sum(axis, keepdims=True)
    return np.where(count, np.exp(logs / np.maximum(count, 1)), 0).astype(moved.dtype)


def _kernels(variables: Any) -> list[Any]:
    """The parameters with two axes or more; all parameters if there are none."""
    params = variables["params"] if isinstance(variables, Mapping) and variables.get("params") else variables
    floats = [x for x in jax.tree.leaves(params) if _is_number(x)]
    return [x for x in floats if x.ndim > 1] or floats


def _perturbed(tree: Any, leaves: list[Any], share: float, rng: np.random.Generator) -> Any:
    """The tree with every number of these leaves reduced by a random share of itself, `share` on average."""
    chosen = {id(x) for x in leaves}

    def perturbed(leaf: Any) -> Any:
        if id(leaf) not in chosen:
            return leaf
        value = np.asarray(leaf)
        return jnp.asarray((value * (1 - 2 * share * rng.random(value.shape, np.float32))).astype(value.dtype))

    return jax.tree.map(perturbed, tree)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float32 or wider; 0 if both are the same infinity or NaN, infinity if only one is."""
    if not _is_float(a):
        return (a != b).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(a - b)
    far = np.where(np.isnan(far), np.inf, far)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, far).astype(far.dtype)


def _over(far: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """far / scale; 0 if the scale is infinite, which it is if a perturbation made the entry infinite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where((far == 0) | np.isinf(scale), 0, far / scale)


# --- responses --------------------------------------------------------------------------------------------------------


def _responding(reference: Reference, before: Reference | None, name: str) -> np.ndarray:
    """Which entries of an output, without the batch axis, differ between examples or from the batch before."""
    value, scale, moved = reference.values[name], reference.scales[name], reference.moved[name]
    axis = _batch_axis(value, reference.batch)
    others = [] if before is None else [(before.values[name], before.scales[name], before.moved[name])]
    if axis is not None:
        others.append((np.roll(value, 1, axis), np.roll(scale, 1, axis), np.roll(moved, 1, axis)))
    responds = np.zeros(value.shape, bool)
    for other_value, other_scale, other_moved in others:
        far = _over(_distance(value, other_value), np.maximum(scale, other_scale))
        responds |= moved & other_moved & (far >= RESPONDS[0]) & (far <= RESPONDS[1])
    return responds if axis is None else np.asarray(responds.any(axis))


def _batches(inputs: Sequence[Any]) -> Iterator[Any]:
    """The batch, one close to it with the same masks, and a random one."""
    rng = np.random.default_rng(0)
    yield inputs
    numbers = {id(x) for x in _numbers(inputs)}
    if numbers:
        yield jax.tree.map(lambda x: _near(x, rng) if id(x) in numbers else x, inputs)
    else:
        yield jax.tree.map(_other_examples, inputs)
    yield jax.tree.map(lambda x: _random(x, rng), inputs)


def _numbers(inputs: Any) -> list[Any]:
    """The floating point inputs with more than two distinct values; others are masks."""
    return [x for x in jax.tree.leaves(inputs) if _is_number(x) and len(np.unique(np.asarray(x, np.float32))) > 2]


def _near(x: Any, rng: np.random.Generator) -> Any:
    """Every number changed by a random share of itself, so that signs and zeros are kept."""
    return jnp.asarray((np.asarray(x, np.float32) * rng.uniform(0.7, 1.3, x.shape)).astype(x.dtype))


def _random(x: Any, rng: np.random.Generator) -> Any:
    """Normal numbers for floating point; integers in another order, so that they stay valid; booleans unchanged."""
    if _is_number(x):
        return jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))
    integers = jnp.issubdtype(x.dtype, jnp.integer) and x.ndim
    return jnp.asarray(np.roll(np.flip(np.asarray(x)), 1, axis=-1)) if integers else x


def _other_examples(x: Any) -> Any:
    return jnp.roll(x, 1, axis=0) if x.ndim else x


# --- arrays -----------------------------------------------------------------------------------------------------------


def _host(arrays: Arrays) -> dict[str, np.ndarray]:
    """As NumPy arrays; floating point ones in float32 or wider."""
    return {name: _widened(value) for name, value in arrays.items()}


def _widened(x: Any) -> np.ndarray:
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x, np.float32) if _is_number(x) and jnp.finfo(x.dtype).bits < 32 else np.asarray(x)


def _only(reference: Reference, names: set[str]) -> Reference:
    values, scales, moved = (
        {name: arrays[name] for name in arrays if name in names}
        for arrays in (reference.values, reference.scales, reference.moved)
    )
    return Reference(values, scales, moved, reference.batch)


def _shape(reference: Reference, name: str) -> tuple[int, ...] | None:
    return reference.values[name].shape if name in reference.values else None


def _is_number(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _is_float(x: np.ndarray) -> bool:
    return np.issubdtype(x.dtype, np.inexact)


def _batch_axis(x: np.ndarray, batch: int) -> int | None:
    return next((axis for axis, size in enumerate(x.shape) if size == batch), None) if batch > 1 else None


def _batch_size(inputs: Any) -> int:
    return next((x.shape[0] for x in jax.tree.leaves(inputs) if x.ndim), 1)
