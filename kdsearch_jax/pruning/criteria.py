"""Pruning without a search: criteria by which units are ranked, and `prune`.

    student = kd.prune(kd.trace(model, x), variables, kd.magnitude(), kd.Budget(macs=0.5))

A criterion is a function (network, variables) → {group: (size,) scores ≥ 0}, of groups it says nothing about none; so
one of your own is a function like these. `prune` keeps the units of the largest scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.adapters.boxes import boxed, boxes_of
from kdsearch_jax.pruning import baselines
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.budget import BudgetError
from kdsearch_jax.pruning.budgets import Budget, fewest_units
from kdsearch_jax.pruning.landing import choose, warn_of
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.rules import Rule, apply_rules
from kdsearch_jax.pruning.student import Student, cut, variables_of

Scores = Mapping[str, np.ndarray]
Criterion = Callable[[Network, Any], Scores]


def magnitude() -> Criterion:
    """Mean |weight| of the kernel slices that make a unit, over its layer's mean (Li et al. 2017, L1 norm)."""

    def scores(network: Network, variables: Any) -> Scores:
        return baselines.relative_norms(network.topology, variables)

    return scores


def batch_norm_scale() -> Criterion:
    """|scale| of the BatchNorm behind a unit (Network Slimming, Liu et al. 2017); layers without one stay whole."""

    def scores(network: Network, variables: Any) -> Scores:
        found = baselines.batch_norm_scales(network.topology, variables)
        if not found:
            raise BudgetError("batch_norm_scale: no unit that may go is followed by a BatchNorm; take magnitude()")
        return found

    return scores


def random(seed: int = 0) -> Criterion:
    """Random scores."""

    def scores(network: Network, variables: Any) -> Scores:
        rng = np.random.default_rng(seed)
        return {group.name: 1.0 + rng.random(group.size) for group in _no_branches(network)}

    return scores


def taylor(loss: Callable[..., Any], batches: Iterable[Any]) -> Criterion:
    """|Σ g ∂loss/∂g| over batches: what the loss loses to first order (Molchanov et al. 2017), branches included.

    loss: (variables, batch) → (); variables are the gated network's, as for `module.apply`.
    """
    return _by_gradient(loss, batches, lambda slope: slope, np.abs)


def fisher(loss: Callable[..., Any], batches: Iterable[Any]) -> Criterion:
    """Mean over batches of (g ∂loss/∂g)², the Fisher information at each gate, by which a search chooses as well.

    loss: (variables, batch) → (); variables are the gated network's, as for `module.apply`.
    """
    return _by_gradient(loss, batches, jnp.square, lambda total: total)


def _by_gradient(loss: Any, batches: Iterable[Any], each: Any, end: Any) -> Criterion:
    def scores(network: Network, variables: Any) -> Scores:
        topology = network.topology

        @jax.jit
        def slopes(variables: Any, batch: Any) -> Any:
            gates = gates_lib.init(topology)
            gradient = jax.grad(lambda gates: loss(gates_lib.fold(variables, gates, topology), batch))(gates)
            return jax.tree.map(each, gradient)

        total = None
        for batch in batches:
            found = slopes(variables, batch)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        if total is None:
            raise ValueError("batches: there is none to take the gradient of the loss on; give a list of batches")
        return {name: end(np.asarray(value, float)) for name, value in total.items()}

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
    """Cuts the units of the smallest scores until the budget is met, and proves the student on a batch.

    Args:
      network: from `trace`. variables: Linen variables, or the nnx.Module that was traced; neither is changed.
      criterion: such as `magnitude()`. Units of a loss's criteria are ranked by score per cost, others by score.
      inputs: a batch as the module takes it; random numbers where none is given. rules: what may go.

    Returns:
      the student, not trained further, at a cost in [0.98, 1] of the budget.

    Raises:
      ValueError: a rule matches nothing. BudgetError: no choice lands in the budget. SurgeryError: it would differ.
    """
    boxes, variables = boxes_of(variables), variables_of(network, variables)
    ruled = apply_rules(network, tuple(rules), budget.round_to)
    found = dict(criterion(ruled.network, variables))
    names = {group.name for group in ruled.network.topology.groups}
    if odd := sorted(set(found) - names):
        raise ValueError(
            f"criterion: it scores {', '.join(map(repr, odd[:3]))}, which the network has not or may not lose"
        )
    silent = dict.fromkeys(names - set(found), "the criterion says nothing of it")
    topology = ruled.network.topology.without(silent)
    limits = budget.limits(topology, ruled.round_to, ruled.least, network.topology)
    least = np.array([fewest_units(limits.round_to, ruled.least, group) for group in topology.groups])
    per_cost = getattr(criterion, "per_cost", False)
    selection = choose(topology, limits, topology.flatten(found), least, per_cost=per_cost)
    warn_of(selection)
    whole = {group.name: np.ones(group.size, bool) for group in ruled.network.topology.groups}
    gates = gates_lib.init(ruled.network.topology)
    return cut(ruled.network, boxed(variables, boxes), gates, {**whole, **selection.keep}, inputs)


def _no_branches(network: Network) -> Any:
    return [group for group in network.topology.groups if group.kind != "branches"]
