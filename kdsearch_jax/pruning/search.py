"""`GatedSearch`: the search for use in anybody's training loop.

    network = kd.trace(model, x)
    search = kd.GatedSearch(network, kd.Budget(macs=0.5), steps=4000)
    params = search.init(variables)
    tx = search.optimizer(optax.adamw(1e-3))
    state = tx.init(params)
    …                            # in the loss model.apply(search.fold(params), x), then tx.update(grads, state, params)
    student = search.finish(params, state, x)

For Linen, `params` is {"params": weights, "gates": {group: (size,)}}: Flax variables with a collection of gates. Other
collections, such as `batch_stats`, stay with the user, who hands them to `fold` and `finish`. For NNX, `params` is an
nnx.Module: the user's model with gates, called, trained and saved as any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from kdsearch_jax.adapters.boxes import boxed, boxes_of, unboxed
from kdsearch_jax.pruning import budget_path, transform
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning.budgets import Budget, BudgetError, Limits, fewest_units
from kdsearch_jax.pruning.control import Controller, Path, Penalty
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.pruning.gated_module import Gated
from kdsearch_jax.pruning.landing import choose, land
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.rules import Rule, Ruled, apply_rules
from kdsearch_jax.pruning.student import Student, cut_student, variables_of
from kdsearch_jax.pruning.transform import GATES, SearchState
from kdsearch_jax.tracing.topology import Topology, leaf_shapes

MET = 1.02  # the living may cost so much of the budget when the search is finished; the landing removes the rest
SNAPSHOTS = 200
COARSE = 512  # units up to which it is looked for what the nearest student costs


@dataclass(frozen=True, eq=False)
class GatedSearch:
    """Distils into a gated network while a proximal L1 penalty removes structures until a budget is met.

    Args:
      network: from `trace`. rules: what may go, see `Rule`.
      budget: what the student may cost. Of several, the largest first, each is met at one of `ends`: the cost falls to
        the first, stays there for a while, falls to the next, and so on.
      steps: updates of the whole search. Over the first `ramp` share of them, after a `warmup` share of that in which
        importances are measured, the cost falls to the budget in a straight line; there it stays.
      every: updates between two calls of the controller, which re-estimates α and moves λ2; None: 10, or fewer where a
        search has less than 400 steps.
      learning_rate, momentum: of the gates' accelerated proximal step.
      penalty: α: "importance" (cost over Fisher information, to the power `sharpness`), or "macs", "params", "one".
      importance_decay: of the running mean of importances. lambda2: a fixed λ2 instead of the closed loop.
      snapshots: rows of the history in the optimiser's state.

    Raises:
      ValueError: a setting is out of range, or a rule matches nothing.
      BudgetError: the budget cannot be met.
    """

    network: Network
    budget: Budget | Sequence[Budget]
    steps: int
    rules: Sequence[Rule] = ()
    every: int | None = None
    learning_rate: float = 0.01
    momentum: float = 0.9
    ramp: float = 0.5
    warmup: float = 0.05
    penalty: Penalty = "importance"
    sharpness: float = 8.0
    importance_decay: float = 0.97
    lambda2: float | None = None
    snapshots: int = SNAPSHOTS

    def __post_init__(self) -> None:
        if not isinstance(self.network, Network):
            kind = type(self.network).__name__
            raise ValueError(f"GatedSearch: network must come from kd.trace(model, x), not {kind}")
        if not self.budgets or not all(isinstance(each, Budget) for each in self.budgets):
            raise ValueError(f"GatedSearch: budget={self.budget!r} must be a Budget, such as Budget(macs=0.5)")
        if self.every is None and self.steps >= 1:
            object.__setattr__(self, "every", min(10, max(1, self.steps // 40)))
        ranges = {
            "steps": self.steps >= 1,
            "every": self.every is None or self.every >= 1,
            "learning_rate": self.learning_rate > 0,
            "momentum": 0 <= self.momentum < 1,
            "ramp": 0 < self.ramp <= 1,
            "warmup": 0 <= self.warmup < 1,
            "penalty": self.penalty in ("importance", "macs", "params", "one"),
            "sharpness": self.sharpness > 0,
            "importance_decay": 0 <= self.importance_decay < 1,
            "lambda2": self.lambda2 is None or self.lambda2 >= 0,
            "snapshots": self.snapshots >= 1,
        }
        for name, holds in ranges.items():
            if not holds:
                raise ValueError(f"GatedSearch: {name}={getattr(self, name)!r} is out of range; see its docstring")
        self._path  # noqa: B018  a budget that cannot be met is an error here, not after an hour

    # --- what is searched -------------------------------------------------------------------------------------------

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """All budgets, the largest first."""
        return tuple(self.budget) if isinstance(self.budget, Sequence) else (self.budget,)

    @cached_property
    def _ruled(self) -> Ruled:
        return apply_rules(self.network, tuple(self.rules), self.budgets[0].round_to)

    @property
    def topology(self) -> Topology:
        """What may go, under the rules."""
        return self._ruled.network.topology

    @cached_property
    def limits(self) -> tuple[Limits, ...]:
        """The budgets in absolute numbers."""
        ruled, whole = self._ruled, self.network.topology
        found = [each.limits(self.topology, ruled.round_to, ruled.least, whole) for each in self.budgets]
        for before, after in pairwise(found):
            if before.names != after.names or before.round_to != after.round_to:
                raise ValueError("GatedSearch: several budgets must bound the same costs, with the same round_to")
            if not 0 < _fall(before, after) < 1:
                raise ValueError("GatedSearch: of several budgets each must be below the one before it")
        return tuple(map(self._reachable, found))

    def _reachable(self, limits: Limits) -> Limits:
        """The limits with the pressure of the nearest student, where widths are so coarse that none costs 0.98 to 1."""
        if self.topology.units > COARSE:
            return limits
        worth = np.random.default_rng(0).uniform(0.1, 1.0, self.topology.units)
        least = np.array([fewest_units(limits.round_to, self._ruled.least, group) for group in self.topology.groups])
        chosen = choose(self.topology, limits, worth, least)
        return replace(limits, floor=chosen.pressure) if chosen.note and chosen.exact else limits

    @cached_property
    def _least(self) -> np.ndarray:
        """(groups,) units that must stay."""
        groups, round_to = self.topology.groups, self.limits[0].round_to
        return np.array([fewest_units(round_to, self._ruled.least, group) for group in groups])

    @cached_property
    def _path(self) -> Path:
        """See `kdsearch_jax.pruning.budget_path`, whose path this is."""
        assert self.every is not None
        falls = [1.0, *(_fall(before, after) for before, after in pairwise(self.limits))]
        pressure = self.limits[0].pressure(self.topology, np.ones(self.topology.units))
        legs = budget_path.legs(self.limits, falls, pressure, self.steps, self.ramp, self.warmup, self.every)
        return Path(*(tuple(getattr(leg, name) for leg in legs) for name in Path._fields))

    @property
    def ends(self) -> tuple[int, ...]:
        """Updates after which `finish` cuts the student of each budget; the last is `steps`."""
        return self._path.end

    @cached_property
    def controller(self) -> Controller:
        """What moves the penalty, on the device."""
        assert self.every is not None
        measured = [cost for cost, _ in self.limits[0].measured]
        costs, bounds = Costs.of(self.topology, measured), [_bounds(limits) for limits in self.limits]
        bounded = tuple(number for number, name in enumerate(costs.names) if name in bounds[0])
        per_limit = np.array([[costs.whole[i] / each[costs.names[i]] for i in bounded] for each in bounds])
        rate = self.learning_rate / (1.0 - self.momentum)
        return Controller(
            self.topology, costs, bounded, per_limit, self._path, self._least, self.every, rate,
            self.penalty, self.sharpness, self.lambda2, min(limits.floor for limits in self.limits),
        )  # fmt: skip

    # --- in the loop ------------------------------------------------------------------------------------------------

    def init(self, variables: Any) -> Any:
        """Weights and gates to train; the gated network starts as the network itself.

        Args:
          variables: Linen variables, {"params": …} and other collections; or the nnx.Module that was traced.

        Returns:
          {"params": copies of the weights, boxes included, "gates": {group: (size,) ones}}; of an nnx.Module a `Gated`
          module around a copy of it. Copies, so that donating them does not delete the teacher.

        Raises:
          ValueError: they are not those of the network.
        """
        gates = gates_lib.init(self.topology)
        if isinstance(variables, flax.nnx.Module):
            variables_of(self.network, variables)
            return Gated(flax.nnx.clone(variables), gates, self._ruled.network)
        params = boxed(variables_of(self.network, variables), boxes_of(variables))["params"]
        return {"params": jax.tree.map(jnp.copy, params), GATES: gates}

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """One transformation: `tx` for weights, the proximal L1 step for gates, the controller in between.

        Its updates need parameters, `update(gradients, state, params)`, and are to be applied as they come: what
        scales or delays them afterwards breaks exact zeros. Put clipping inside `tx` or in front.
        """
        return transform.gated_optimizer(
            tx,
            self.controller,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            importance_decay=self.importance_decay,
            spacing=max(self.controller.every, -(-self.steps // self.snapshots)),
            snapshots=min(self.snapshots, self.steps) + 1,
        )

    def fold(self, params: Any, **collections: Any) -> Any:
        """Variables of the gated network, for `module.apply`.

        Args:
          params: {"params": …, "gates": …}. collections: others of the module, such as `batch_stats=…`.

        Returns:
          {"params": weights times gates, …}; of a `Gated` module the plain nnx.Module with its gates folded in.

        Raises:
          ValueError: there are no gates in params, or those of another network.
        """
        if isinstance(params, Gated):
            return params.folded()
        rest, gates = transform.split(params, self.topology)
        transform.flatten(gates, self.topology)  # sizes
        folded = gates_lib.fold({**rest, **collections}, dict(gates), self.topology)
        for leaf in sorted(self._read - leaf_shapes(unboxed(folded)).keys()):
            collection = leaf.split("/", 1)[0]
            way = f"give the collection, as in search.fold(params, {collection}={collection})"
            if collection in folded:
                way = "begin with params = search.init(variables), and leave its structure as it is"
            raise ValueError(f"fold: gates multiply {leaf}, which is not there; {way}")
        return folded

    @cached_property
    def _read(self) -> frozenset[str]:
        """Arrays that gates multiply."""
        members = (member for group in self.topology.groups for member in group.members)
        return frozenset(member.leaf for member in members if member.consumes)

    # --- at the end -------------------------------------------------------------------------------------------------

    def progress(self, state: Any) -> dict[str, float]:
        """{"step", "pressure" (cost of the living over the budget), "lambda2", "macs", "params" (shares)}."""
        found = search_state(state)
        rows = np.asarray(found.history.rows)
        seen = rows[np.isfinite(rows[:, 0])]
        macs, params = (float(seen[-1, i]) for i in (1, 2)) if len(seen) else (1.0, 1.0)
        return {
            "step": int(found.count), "pressure": float(found.pressure), "lambda2": float(found.lambda2),
            "macs": macs, "params": params,
        }  # fmt: skip

    def select(self, params: Any, state: Any) -> dict[str, np.ndarray]:
        """{group: (size,) bool}: the units to keep; the living, from there exactly into the budget.

        Raises:
          BudgetError: no choice of units is within the budget.
        """
        _, gates = transform.split(_pure(params), self.topology)
        flat = self.topology.flatten({name: _fetched(gate).astype(float) for name, gate in gates.items()})
        importance = _fetched(search_state(state).importance).astype(float)
        return land(self.topology, self._limits_at(state), flat, importance, self._least)

    def _limits_at(self, state: Any) -> Limits:
        """The limits of the leg that ends with this state, or next."""
        step = int(search_state(state).count)
        return next(
            (limits for limits, end in zip(self.limits, self.ends, strict=True) if step <= end), self.limits[-1]
        )

    def finish(self, params: Any, state: Any, *inputs: Any, **collections: Any) -> Student:
        """Cuts the student and proves on a batch that it is the gated network.

        Args:
          params: as trained; state: the optimiser's, or the nnx.Optimizer. inputs: a batch as the module takes it.
          collections: others of the module, such as `batch_stats=…`.

        Returns:
          the student: the gated network without its dead units, equal to it within 1e-5, at most at the budget's cost.

        Raises:
          BudgetError: the budget is not met yet, or no choice lands in it. ValueError: params or state are others'.
          SurgeryError: the student would differ.
        """
        found = search_state(state)
        _, gates = transform.split(_pure(params), self.topology)
        gates = {name: _fetched(gate).astype(np.float32) for name, gate in gates.items()}
        transform.flatten(gates, self.topology)
        self._check_met(gates, int(found.count), self._limits_at(found))
        if isinstance(params, Gated):
            variables = variables_of(self.network, params.model)
        else:
            rest, _ = transform.split(params, self.topology)
            variables = {**rest, **collections}
            self._check_collections(variables)
        variables = jax.tree.map(_fetched, variables)
        return cut_student(self._ruled.network, variables, gates, self.select(params, state), inputs)

    def _check_met(self, gates: Mapping[str, np.ndarray], step: int, limits: Limits) -> None:
        alive = (self.topology.flatten(gates) > 0).astype(float)
        pressure = limits.pressure(self.topology, alive)
        if pressure <= MET:
            return
        told = f"the living units still cost {pressure:.2f} of the budget after {step} of {self.steps} updates"
        if step not in self.ends and step < self.steps:
            raise BudgetError(
                f"finish: {told}; train on, or make the search shorter with GatedSearch(steps=…), so that the budget "
                "is met by its end"
            )
        warnings.warn(
            f"finish: {told}; the rest is removed by importance, which the weights did not adapt to. Give more steps "
            "or a larger learning_rate of the gates",
            stacklevel=3,
        )

    def _check_collections(self, variables: Any) -> None:
        needed = {path.split("/", 1)[0] for path in self.topology.shapes} - {"params"}
        for name in sorted(needed):
            if name not in variables:
                raise ValueError(
                    f"finish: the network has the collection {name!r}; give it, as in finish(…, {name}={name})"
                )


def _bounds(limits: Limits) -> dict[str, float]:
    """{name: absolute bound}."""
    counted = {name: bound for name, bound in (("macs", limits.macs), ("params", limits.params)) if bound}
    return counted | {cost.name: bound for cost, bound in limits.measured}


def _fall(before: Limits, after: Limits) -> float:
    """By what factor the bounds of one budget are below another's: that of the first that differs; 0 for none."""
    high, low = _bounds(before), _bounds(after)
    return next((low[name] / high[name] for name in high if low[name] != high[name]), 0.0)


def search_state(state: Any) -> SearchState:
    """The search's part of an optimiser's state, wherever it lies.

    Raises:
      ValueError: there is none.
    """
    state = getattr(state, "opt_state", state)
    leaves = jax.tree.leaves(_pure(state), is_leaf=lambda node: isinstance(node, SearchState))
    found = [leaf for leaf in leaves if isinstance(leaf, SearchState)]
    if len(found) != 1:
        raise ValueError(
            f"state: {len(found)} states of a search are in it, one is expected; give the state of "
            "search.optimizer(tx), restored into the structure of tx.init(params) if it comes from a checkpoint"
        )
    return found[0]


def _fetched(leaf: Any) -> np.ndarray:
    """An array on the host; of several processes every one calls it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _pure(tree: Any) -> Any:
    """The same tree without NNX's Variables; of a module its parameters."""
    if isinstance(tree, flax.nnx.Module):
        tree = flax.nnx.state(tree, flax.nnx.Param)
    return flax.nnx.as_pure(tree)
