"""Pruning without a search: criteria that score units, and `prune`.

    student = kd.prune(kd.trace(model, x), variables, kd.magnitude(), kd.Budget(macs=0.5))

A criterion is a function (network, variables) → {group: (size,) scores ≥ 0}, so you can write your own. Groups that it
does not score stay whole. `prune` keeps the units of the highest scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kdsearch_jax.adapters.boxes import boxed, boxes_of
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.budgets import Budget, BudgetError, fewest_units
from kdsearch_jax.pruning.landing import warn_of
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.rules import Rule, apply_rules
from kdsearch_jax.pruning.selection import choose
from kdsearch_jax.pruning.student import Student, cut_student, variables_of
from kdsearch_jax.tracing.topology import Group, Topology

Scores = Mapping[str, np.ndarray]
Criterion = Callable[[Network, Any], Scores]


def magnitude() -> Criterion:
    """Mean |weight| of the kernel slices that produce a unit, over the mean of its layer (L1 norm, Li et al. 2017)."""
    return lambda network, variables: relative_norms(network.topology, variables)


def batch_norm_scale() -> Criterion:
    """|scale| of the BatchNorm after a unit (Network Slimming, Liu et al. 2017); layers without one stay whole."""

    def scores(network: Network, variables: Any) -> Scores:
        scales = batch_norm_scales(network.topology, variables)
        if not scales:
            raise BudgetError("batch_norm_scale: no prunable unit is followed by a BatchNorm; use magnitude()")
        return scales

    return scores


def random(seed: int = 0) -> Criterion:
    """Random scores."""
    return lambda network, variables: random_scores(network.topology, np.random.default_rng(seed))


def taylor(loss: Callable[..., Any], batches: Iterable[Any]) -> Criterion:
    """|Σ g ∂loss/∂g| over batches: first-order change of the loss (Molchanov et al. 2017), residual branches included.

    Args:
      loss: (variables, batch) → (), where variables are those of the gated network, as for `module.apply`.
    """
    return _by_gradient(loss, batches, lambda slope: slope, np.abs)


def fisher(loss: Callable[..., Any], batches: Iterable[Any]) -> Criterion:
    """Sum over batches of (g ∂loss/∂g)², the Fisher information at each gate, which the search uses as well.

    Args:
      loss: (variables, batch) → (), where variables are those of the gated network, as for `module.apply`.
    """
    return _by_gradient(loss, batches, jnp.square, lambda total: total)


def _by_gradient(loss: Any, batches: Iterable[Any], per_batch: Any, at_end: Any) -> Criterion:
    def scores(network: Network, variables: Any) -> Scores:
        topology = network.topology

        @jax.jit
        def slopes(variables: Any, batch: Any) -> Any:
            gates = gates_lib.init(topology)
            gradient = jax.grad(lambda gates: loss(gates_lib.fold(variables, gates, topology), batch))(gates)
            return jax.tree.map(per_batch, gradient)

        total = None
        for batch in batches:
            values = slopes(variables, batch)
            total = values if total is None else jax.tree.map(jnp.add, total, values)
        if total is None:
            raise ValueError(
                "batches: there are no batches to compute the gradient of the loss on; give a list of them"
            )
        return {name: at_end(np.asarray(value, float)) for name, value in total.items()}

    scores.per_cost = True  # type: ignore[attr-defined]
    return scores


def prune(
    network: Network,
    variables: Any,
    criterion: Criterion,
    budget: Budget,
    *inputs: Any,
    rules: Sequence[Rule] = (),
) -> Student:
    """Removes the units of the lowest scores until the budget is met, and verifies the student on a batch.

    Args:
      network: from `trace`.
      variables: Linen variables, or the nnx.Module that was traced; neither is changed.
      criterion: such as `magnitude()`. `taylor` and `fisher` rank units by score per cost, the others by score.
      budget: what the student may cost.
      inputs: a batch as the module takes it; random numbers if none is given.
      rules: what may be removed, see `Rule`.

    Returns:
      The student, not trained any further, at a cost in [0.98, 1] of the budget.

    Warns:
      BudgetWarning: no student lands in the budget; the costliest below it is returned.

    Raises:
      ValueError: a rule matches nothing, or the criterion scores unknown groups.
      BudgetError: no student is within the budget.
      SurgeryError: the student would compute something else than the network.
    """
    boxes, variables = boxes_of(variables), variables_of(network, variables)
    ruled = apply_rules(network, tuple(rules), budget.round_to)
    scores = dict(criterion(ruled.network, variables))
    names = {group.name for group in ruled.network.topology.groups}
    if unknown := sorted(set(scores) - names):
        raise ValueError(
            f"criterion: it scores {', '.join(map(repr, unknown[:3]))}, which are not prunable groups of the network"
        )
    topology = ruled.network.topology.without(dict.fromkeys(names - set(scores), "the criterion does not score it"))
    limits = budget.limits(topology, ruled.round_to, ruled.least, network.topology)
    least = [fewest_units(limits.round_to, ruled.least, group) for group in topology.groups]
    per_cost = getattr(criterion, "per_cost", False)
    selection = choose(topology, limits, topology.flatten(scores), least, per_cost=per_cost)
    warn_of(selection)
    keep = {**gates_lib.keep_all(ruled.network.topology), **selection.keep}
    gates = gates_lib.init(ruled.network.topology)
    return cut_student(ruled.network, boxed(variables, boxes), gates, keep, inputs)


# --- scores by weights ------------------------------------------------------------------------------------------------


def relative_norms(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) L1 norms of the kernel slices that produce its units, over their mean}, without branches."""
    norms = producer_norms(topology, variables)
    return {name: values / max(values.mean(), 1e-30) for name, values in norms.items()}


def producer_norms(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) mean |weight| of the kernel slices that produce each unit, summed over kernels}, no branches."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {group.name: _producer_norms(group, flat) for group in topology.groups if group.kind != "branches"}


def batch_norm_scales(topology: Topology, variables: Any) -> dict[str, np.ndarray]:
    """{group: (size,) mean |scale| of the BatchNorms after its units}, for groups that have one."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    scales = {group.name: _scales(group, flat) for group in topology.groups if group.kind != "branches"}
    return {name: values for name, values in scales.items() if values is not None}


def random_scores(topology: Topology, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{group: (size,) numbers from 1 to 2}, without branches."""
    return {group.name: 1.0 + rng.random(group.size) for group in topology.groups if group.kind != "branches"}


def _producer_norms(group: Group, flat: Mapping[str, Any]) -> np.ndarray:
    norms = np.zeros(group.size)
    for member in group.members:
        leaf = np.asarray(flat[member.leaf])
        reads = member.consumes and not (group.masked and member.gated)
        if member.units is None or reads or leaf.ndim < 2 or not member.leaf.startswith("params/"):
            continue
        slices = np.abs(np.moveaxis(leaf, member.axis, 0)).reshape(leaf.shape[member.axis], -1).mean(1)
        owned = member.units >= 0
        np.add.at(norms, member.units[owned], slices[owned])
    return norms


def _scales(group: Group, flat: Mapping[str, Any]) -> np.ndarray | None:
    """(size,) mean |scale| of each unit over layers that have a running mean; None if a unit has none."""
    total, count = np.zeros(group.size), np.zeros(group.size)
    for member in group.members:
        layer, _, last = member.leaf.removeprefix("params/").rpartition("/")
        is_scale = member.leaf.startswith("params/") and last == "scale"
        if not is_scale or member.units is None or not any(name.endswith(f"/{layer}/mean") for name in flat):
            continue
        owned = member.units >= 0
        np.add.at(total, member.units[owned], np.abs(np.asarray(flat[member.leaf]))[owned])
        np.add.at(count, member.units[owned], 1)
    return total / count if (count > 0).all() else None
