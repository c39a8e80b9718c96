"""Runs a model's own code with some units masked, so that it computes what the code would compute without them.

A gate of zero on the kernel rows that read a unit removes it from every operation but those that mix units without a
stored kernel: the sums of a LayerNorm over its channels, the number by which it divides them, the product of queries
and keys. `masked` traces the code, finds these operations by the labels of what they read (`Analysis.sites`), and
evaluates the same equations with removed units set to 0 there and with the number of those that stay. Whatever such an
operation returns for the units that stay is then what the smaller model computes:

    Σᵢ xᵢ / N   →   Σᵢ mᵢ xᵢ / Σᵢ mᵢ            qᵀk   →   Σᵢ mᵢ qᵢ kᵢ

Every other equation is evaluated as it is, custom derivatives included; calls, `remat` and scans are opened only where
they hold such an operation. It works for whatever the code does around it: training or inference, Linen or NNX, a norm
of Flax's or one written out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.tracing.analysis import COMBINED, Analysis, MixingSite
from kdsearch_jax.tracing.interpreter import reanalyze
from kdsearch_jax.tracing.labels import Labels
from kdsearch_jax.tracing.program import called_body, flatten_jaxpr
from kdsearch_jax.tracing.topology import Topology, path_string

Path = tuple[int, ...]
_REMAT = ("remat", "remat2", "checkpoint")


def masked(
    function: Callable[..., Any], topology: Topology, kept: Mapping[str, Any], dropped: Collection[str] = ()
) -> Callable[..., Any]:
    """The function with the units outside of `kept` masked where it mixes units.

    Args:
      function: (variables, *args, **kwargs) → any pytree; every traced array that it depends on is among its arguments.
      topology: of the network; arrays of `variables` are found by their paths, others count as inputs.
      kept: {group: (size,) bool} of all groups that are masked.
      dropped: layers that the function does without, whose parameters may be missing.

    Returns:
      a function with the same arguments. It raises ValueError if variables are missing, or if it reads units in a way
      that the trace of the network did not: in another mode of the model, say.
    """
    groups = [group for group in topology.groups if group.masked]
    if not groups:
        return function
    alive = jnp.concatenate([*(jnp.asarray(kept[group.name], bool) for group in groups), jnp.ones(1, bool)])

    def call(variables: Any, *args: Any, **kwargs: Any) -> Any:
        flat, _ = jax.tree_util.tree_flatten_with_path(variables)
        leaves, structure = jax.tree.flatten((variables, args, kwargs))
        names = [path_string(path) for path, _ in flat]
        needed = {member.leaf for group in groups for member in group.members}
        needed = {leaf for leaf in needed if leaf.partition("/")[2].rpartition("/")[0] not in dropped}
        if missing := sorted(needed - set(names)):
            raise ValueError(f"variables: {missing[0]} is missing, whose units are masked; give those of the network")
        known = [i for i, name in enumerate(names) if name in topology.shapes]
        order = known + [i for i, leaf in enumerate(leaves) if i not in set(known) and _is_array(leaf)]
        results: list[tuple[list[Any], Any]] = []

        def run(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for i, array in zip(order, arrays, strict=True):
                filled[i] = array
            variables, args, kwargs = jax.tree.unflatten(structure, filled)
            results.append(jax.tree.flatten(function(variables, *args, **kwargs)))
            return [leaf for leaf in results[-1][0] if _is_array(leaf)]

        arrays = [leaves[i] for i in order]
        closed = jax.make_jaxpr(run)(*arrays)
        labels = Labels.of([topology.shapes[names[i]] for i in known])
        unit_of = _units_of_labels(labels, [names[i] for i in known], topology)
        sites = _sites(reanalyze(flatten_jaxpr(closed), labels, len(known)), unit_of)
        evaluation = _Evaluation(sites, lambda axis: alive[unit_of[axis]])
        outs = iter(evaluation.run(closed.jaxpr, closed.consts, arrays))
        made, result = results[-1]
        return jax.tree.unflatten(result, [next(outs) if _is_array(leaf) else leaf for leaf in made])

    return call


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def _units_of_labels(labels: Labels, names: Sequence[str], topology: Topology) -> np.ndarray:
    """(labels,) the unit of each label among all units of masked groups; -1 for none."""
    number = {name: i for i, name in enumerate(names)}
    unit_of, start = np.full(len(labels.leaf), -1), 0
    for group in (group for group in topology.groups if group.masked):
        for member in (member for member in group.members if member.leaf in number):
            axis = None if member.units is None else labels.value_axes(number[member.leaf])[member.axis]
            if axis is not None and member.units is not None:  # an axis of length 1 has no labels
                unit_of[axis[member.units >= 0]] = start + member.units[member.units >= 0]
        start += group.size
    return unit_of


def _sites(found: Analysis, unit_of: np.ndarray) -> dict[Path, list[MixingSite]]:
    """The operations that mix masked units, by path.

    Raises:
      ValueError: units are read in a way that cannot be corrected.
    """
    for ids, reason in found.freezes:
        if (unit_of[ids[ids > 0]] >= 0).any() and not reason.startswith(COMBINED):
            raise ValueError(f"the gated network cannot be computed in this call: {reason}")
    sites: dict[Path, list[MixingSite]] = {}
    for site in found.sites:
        if (unit_of[site.labels] >= 0).any():
            sites.setdefault(site.path, []).append(site)
    return sites


class _Evaluation:
    """Evaluates a jaxpr with corrected operands at `sites`; stays(labels) → bool array, which of them stay."""

    def __init__(self, sites: Mapping[Path, Sequence[MixingSite]], stays: Callable[[np.ndarray], Any]):
        self.sites, self.stays = sites, stays
        self.around = {path[:n] for path in sites for n in range(1, len(path))}

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], path: Path = ()) -> list[Any]:
        """The results of a jaxpr at a path."""
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            here = (*path, index)
            operands = [read(atom) for atom in eqn.invars]
            for site in self.sites.get(here, ()):
                operands[site.operand] = self.corrected(site, operands[site.operand], eqn.invars[site.operand].aval)
            outs = self.open(eqn, operands, here) if here in self.around else _bind(eqn, operands)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def corrected(self, site: MixingSite, value: Any, aval: Any) -> Any:
        """An operand with removed units set to 0, or with the number of those that stay."""
        if site.count:
            fixed = math.prod(n for n in site.count if isinstance(n, int))
            number = jnp.asarray(float(fixed))
            for labels in (n for n in site.count if not isinstance(n, int)):
                number = number * jnp.maximum(self.stays(labels).sum(), 1)
            number = (1.0 / number if site.inverse else number).astype(aval.dtype)
            return jnp.broadcast_to(number, aval.shape)
        for axis, labels in site.masked.items():
            mask = self.stays(labels).reshape([-1 if i == axis else 1 for i in range(len(aval.shape))])
            value = jnp.where(mask, value, jnp.zeros((), aval.dtype))
        return value

    def open(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """The results of a call or loop with sites inside of it."""
        if eqn.primitive.name == "scan":
            return self.scan(eqn, operands, path)
        body = called_body(eqn)
        assert body is not None, eqn.primitive.name
        jaxpr, consts, first = body
        if eqn.primitive.name in _REMAT:
            policy, cse = eqn.params.get("policy"), eqn.params.get("prevent_cse", True)
            inside = jax.checkpoint(lambda *xs: self.run(jaxpr, consts, xs, path), policy=policy, prevent_cse=cse)
            return inside(*operands)
        return self.run(jaxpr, consts, operands[first:], path)

    def scan(self, eqn: Any, operands: list[Any], path: Path) -> list[Any]:
        """A scan whose body is corrected: of constants, carry and slices, it returns carry and slices."""
        p, body = eqn.params, eqn.params["jaxpr"]
        outer, inner = [v.aval for v in eqn.invars], [v.aval for v in body.jaxpr.invars]
        sliced = sum(len(a.shape) > len(b.shape) for a, b in zip(outer, inner, strict=True))
        stacked = sum(
            len(a.aval.shape) > len(b.aval.shape) for a, b in zip(eqn.outvars, body.jaxpr.outvars, strict=True)
        )
        carried = len(eqn.outvars) - stacked
        fixed = len(operands) - sliced - carried

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            outs = self.run(body.jaxpr, body.consts, [*operands[:fixed], *carry, *xs], path)
            return outs[:carried], outs[carried:]

        carry, xs = operands[fixed : fixed + carried], operands[fixed + carried :]
        carry, ys = jax.lax.scan(step, carry, xs, p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*carry, *ys]


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*operands, **params)
    return list(result) if eqn.primitive.multiple_results else [result]
