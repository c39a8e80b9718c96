"""`GatedSearch`: the search, for any training loop.

    network = kd.trace(model, x)
    search = kd.GatedSearch(network, kd.Budget(macs=0.5), steps=4000)
    params = search.init(variables)
    tx = search.optimizer(optax.adamw(1e-3))
    state = tx.init(params)
    …                            # search.apply(params, x) in the loss, then tx.update(grads, state, params)
    student = search.finish(params, state, x)

For Linen, `params` is {"params": weights, "gates": {group: (size,)}}: Flax variables with a collection of gates. Other
collections, such as `batch_stats`, stay with the user, who passes them to `apply` and `finish`. For NNX, `params` is an
nnx.Module: the user's model with gates, called, trained and saved like any other. The search of the commands is a loop
of this kind too (`kdsearch_jax.distill.search_step`).
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from kdsearch_jax.adapters.boxes import boxed, boxes_of, unboxed
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning import transform
from kdsearch_jax.pruning.budget_path import BudgetPath, budget_path
from kdsearch_jax.pruning.budgets import Budget, BudgetError, Limits, fewest_units
from kdsearch_jax.pruning.control import Controller, Penalty
from kdsearch_jax.pruning.counting import Costs
from kdsearch_jax.pruning.gated_module import Gated, fold_module
from kdsearch_jax.pruning.landing import choose, land, warn_of
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.rules import Rule, Ruled, apply_rules
from kdsearch_jax.pruning.selection import Selection
from kdsearch_jax.pruning.student import Student, cut_student, variables_of
from kdsearch_jax.pruning.transform import GATES, SearchState
from kdsearch_jax.tracing.masking import masked
from kdsearch_jax.tracing.topology import Topology, leaf_shapes

MET = 1.02  # up to this share of the budget, `finish` removes the excess without a warning
SNAPSHOTS = 200
COARSE = 512  # up to so many units, the cost of the nearest student is searched for before the search begins


@dataclass(frozen=True, eq=False)
class GatedSearch:
    """Distils into a gated network while a proximal L1 penalty removes structures until a budget is met.

    Args:
      network: from `trace`.
      budget: what the student may cost: a `Budget`, or `Limits` in absolute numbers. Of several, the largest first,
        each is met at one of `ends`: the cost falls to the first, stays there for a while, falls to the next, and so
        on.
      steps: updates of the whole search. In the first `ramp` share of them the cost falls to the budget in a straight
        line, and then it stays. In the first `warmup` share of the ramp importances are measured and no unit is
        removed.
      rules: what may be removed, see `Rule`.
      every: updates between two calls of the controller, which re-estimates α and moves λ2; by default 10, or fewer in
        a search of less than 400 steps.
      learning_rate, momentum: of the accelerated proximal step on gates.
      penalty: α: "importance" (cost over Fisher information, to the power `sharpness`), "macs", "params" or "one".
      importance_decay: of the running mean of importances.
      lambda2: a fixed λ2 instead of the closed loop.
      initial_gates: "one", or "norm": the norm of the kernel entries that read the unit, 1 on average over a group,
        with these entries divided by it. Either way the gated network starts as the network itself.
      snapshots: rows of the history in the optimiser's state.

    Raises:
      ValueError: a setting is out of range, or a rule matches nothing.
      BudgetError: the budget cannot be met.
    """

    network: Network
    budget: Budget | Limits | Sequence[Budget | Limits]
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
    initial_gates: Literal["one", "norm"] = "one"
    snapshots: int = SNAPSHOTS

    def __post_init__(self) -> None:
        if not isinstance(self.network, Network):
            kind = type(self.network).__name__
            raise ValueError(f"GatedSearch: network must come from kd.trace(model, x), not {kind}")
        if not self.budgets or not all(isinstance(budget, (Budget, Limits)) for budget in self.budgets):
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
            "initial_gates": self.initial_gates in ("one", "norm"),
            "snapshots": self.snapshots >= 1,
        }
        for name, valid in ranges.items():
            if not valid:
                raise ValueError(f"GatedSearch: {name}={getattr(self, name)!r} is out of range; see its docstring")
        self.path  # noqa: B018  raises if a budget cannot be met

    # --- the problem ------------------------------------------------------------------------------------------------

    @property
    def budgets(self) -> tuple[Budget | Limits, ...]:
        """All budgets, the largest first."""
        return tuple(self.budget) if isinstance(self.budget, Sequence) else (self.budget,)

    @cached_property
    def _ruled(self) -> Ruled:
        return apply_rules(self.network, tuple(self.rules), self.budgets[0].round_to)

    @property
    def topology(self) -> Topology:
        """The groups that may be pruned under the rules, with costs."""
        return self._ruled.network.topology

    @cached_property
    def limits(self) -> tuple[Limits, ...]:
        """The budgets in absolute numbers."""
        limits = [self._limits(budget) for budget in self.budgets]
        for before, after in pairwise(limits):
            if before.names != after.names or before.round_to != after.round_to:
                raise ValueError("GatedSearch: several budgets must bound the same costs, with the same round_to")
            if not 0 < _fall(before, after) < 1:
                raise ValueError("GatedSearch: of several budgets each must be below the one before it")
        return tuple(limits)

    def _limits(self, budget: Budget | Limits) -> Limits:
        """The limits of a budget; if widths are so coarse that no student costs 0.98 to 1 of it, with a lower floor."""
        if isinstance(budget, Limits):
            return budget
        ruled = self._ruled
        limits = budget.limits(self.topology, ruled.round_to, ruled.least, self.network.topology)
        if self.topology.units > COARSE:
            return limits
        worth = np.random.default_rng(0).uniform(0.1, 1.0, self.topology.units)
        least = np.array([fewest_units(limits.round_to, ruled.least, group) for group in self.topology.groups])
        chosen = choose(self.topology, limits, worth, least)
        return replace(limits, floor=chosen.pressure) if chosen.note and chosen.exact else limits

    def limits_at(self, step: int) -> Limits:
        """The limits that the update after `step` approaches."""
        return self.limits[bisect.bisect_right(self.ends[:-1], step)]

    @cached_property
    def least(self) -> np.ndarray:
        """(groups,) units that must stay."""
        groups, round_to = self.topology.groups, self.limits[0].round_to
        return np.array([fewest_units(round_to, self._ruled.least, group) for group in groups])

    @cached_property
    def path(self) -> BudgetPath:
        """The target cost over the search."""
        assert self.every is not None
        falls = [1.0, *(_fall(before, after) for before, after in pairwise(self.limits))]
        pressure = self.limits[0].pressure(self.topology, np.ones(self.topology.units))
        return budget_path(falls, pressure, self.steps, self.ramp, self.warmup, self.every)

    @property
    def ends(self) -> tuple[int, ...]:
        """Updates after which `finish` cuts the student of each budget; the last is `steps`."""
        return self.path.end

    @cached_property
    def controller(self) -> Controller:
        """Moves the penalty, on the device."""
        assert self.every is not None
        measured = [cost for cost, _ in self.limits[0].measured]
        costs, bounds = Costs.of(self.topology, measured), [_bounds(limits) for limits in self.limits]
        bounded = tuple(number for number, name in enumerate(costs.names) if name in bounds[0])
        return Controller(
            topology=self.topology,
            costs=costs,
            bounded=bounded,
            path=self.path,
            per_limit=np.array([[costs.whole[i] / bound[costs.names[i]] for i in bounded] for bound in bounds]),
            floor=np.array([limits.floor for limits in self.limits]),
            least=self.least,
            every=self.every,
            rate=self.learning_rate / (1.0 - self.momentum),
            penalty=self.penalty,
            sharpness=self.sharpness,
            lambda2=self.lambda2,
        )

    # --- in the loop ------------------------------------------------------------------------------------------------

    def init(self, variables: Any) -> Any:
        """Weights and gates to train; the gated network starts as the network itself.

        Args:
          variables: Linen variables, {"params": …} and other collections; or the nnx.Module that was traced.

        Returns:
          {"params": copies of the weights, boxes included, "gates": {group: (size,) float32}}; for an nnx.Module, a
          `Gated` module around a copy of it. Copies, so that donating them does not delete the teacher.

        Raises:
          ValueError: the variables do not belong to the network.
        """
        plain = variables_of(self.network, variables)
        norms = self.initial_gates == "norm"
        gates = gates_lib.kernel_norms(plain, self.topology) if norms else gates_lib.init(self.topology)
        if isinstance(variables, flax.nnx.Module):
            model = flax.nnx.clone(variables)
            if norms:
                model = fold_module(model, gates_lib.inverse(gates), self._ruled.network)
            return Gated(model, gates, self._ruled.network)
        params = boxed(plain, boxes_of(variables))
        if norms:
            params = gates_lib.fold(params, gates_lib.inverse(gates), self.topology)
        return {"params": jax.tree.map(jnp.copy, params["params"]), GATES: gates}

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """One transformation: `tx` for weights, the proximal L1 step for gates, the controller in between.

        `update(gradients, state, params)` needs the parameters. Apply its updates unchanged: scaling or delaying them
        breaks exact zeros. Put clipping inside `tx` or in front.
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

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Applies the gated Linen network; for NNX, call the `Gated` module.

        Args:
          variables: {"params": …, "gates": …, other collections}.
          args, kwargs: those of `module.apply`: inputs, and keywords such as `mutable` and `rngs`.

        Returns:
          what `module.apply` returns.

        Raises:
          ValueError: variables have no gates, or those of another network.
        """
        folded, (_, gates) = self._fold(variables, {}), transform.split(variables, self.topology)
        module, boxes, kept = self.network.module, boxes_of(folded), gates_lib.kept(gates, self.topology)

        def run(plain: Any, *args: Any, **kwargs: Any) -> Any:
            return module.apply(boxed(plain, boxes), *args, **kwargs)

        return masked(run, self.topology, kept)(unboxed(folded), *args, **kwargs)

    def fold(self, params: Any, **collections: Any) -> Any:
        """Variables of the gated network, for `module.apply`; `apply` does both, for every network.

        Args:
          params: {"params": …, "gates": …}.
          collections: other collections of the module, such as `batch_stats=…`.

        Returns:
          {"params": weights times gates, …}; for a `Gated` module, the plain nnx.Module with its gates folded in.

        Raises:
          ValueError: params has no gates, or those of another network; or groups are masked, such as channels that a
            norm averages over, so that `module.apply` is not the gated network.
        """
        if isinstance(params, Gated):
            return params.folded()
        folded = self._fold(params, collections)
        for group in self.topology.groups:
            if group.masked:
                raise ValueError(
                    f"fold: units of {group.name} are masked where the model averages over them, which module.apply "
                    "does not do; use search.apply({**params, …}, x), or exclude these groups"
                )
        return folded

    def _fold(self, params: Any, collections: Mapping[str, Any]) -> Any:
        rest, gates = transform.split(params, self.topology)
        transform.flatten(gates, self.topology)  # checks sizes
        folded = gates_lib.fold({**rest, **collections}, dict(gates), self.topology)
        for leaf in sorted(self._read - leaf_shapes(unboxed(folded)).keys()):
            collection = leaf.split("/", 1)[0]
            way = f"give the collection, as in search.fold(params, {collection}={collection})"
            if collection in folded:
                way = "begin with params = search.init(variables), and keep its structure"
            raise ValueError(f"fold: gates multiply {leaf}, which is missing; {way}")
        return folded

    @cached_property
    def _read(self) -> frozenset[str]:
        """Arrays that gates multiply."""
        return gates_lib.multiplied(self.topology)

    # --- progress and result ----------------------------------------------------------------------------------------

    def progress(self, state: Any) -> dict[str, float]:
        """{"step", "pressure", "lambda2", "macs", "params"} at the last decision of the controller.

        "pressure" is the cost over the budget; "macs" and "params" are shares of the network's.
        """
        found = search_state(state)
        rows = _written(found.history)[0]
        macs, params = (float(rows[-1, i]) for i in (1, 2)) if len(rows) else (1.0, 1.0)
        return {
            "step": int(found.count), "pressure": float(found.pressure), "lambda2": float(found.lambda2),
            "macs": macs, "params": params,
        }  # fmt: skip

    def history(self, params: Any, state: Any) -> dict[str, np.ndarray]:
        """What happened so far, as arrays over T snapshots, the last of which is now.

        Returns:
          "steps", "lambda2", "cost_macs" and "cost_params" (T,), costs as shares of the network's; and the gates of
          each group, "gate/GROUP" (T, size).
        """
        topology, found = self.topology, search_state(state)
        now = self._flat_gates(params).astype(np.float32)
        shares = np.array(topology.cost((now > 0).astype(float))) / topology.total()
        rows, gates = _written(found.history)
        earlier = rows[:, 0] < int(found.count)
        rows = np.vstack([rows[earlier], np.array([[found.count, *shares, found.lambda2]], np.float32)])
        gates = np.vstack([gates[earlier], now])
        names = ("steps", "cost_macs", "cost_params", "lambda2")
        starts = np.cumsum([0] + [group.size for group in topology.groups])
        return dict(zip(names, rows.T, strict=True)) | {
            f"gate/{group.name}": gates[:, a:b] for group, (a, b) in zip(topology.groups, pairwise(starts), strict=True)
        }

    def select(self, params: Any, state: Any) -> Selection:
        """The units to keep: those with g > 0, adjusted to meet the budget exactly.

        Raises:
          BudgetError: no choice of units is within the budget.
        """
        importance = _fetched(search_state(state).importance).astype(float)
        limits = self._limits_ending(search_state(state))
        return land(self.topology, limits, self._flat_gates(params), importance, self.least)

    def _flat_gates(self, params: Any) -> np.ndarray:
        """(units,) float64 gates."""
        _, gates = transform.split(_pure(params), self.topology)
        return self.topology.flatten({name: _fetched(gate).astype(float) for name, gate in gates.items()})

    def _limits_ending(self, state: SearchState) -> Limits:
        """The limits of the budget whose stay ends with this state, or next."""
        return self.limits[min(bisect.bisect_left(self.ends, int(state.count)), len(self.limits) - 1)]

    def finish(self, params: Any, state: Any, *inputs: Any, **collections: Any) -> Student:
        """Cuts the student and proves on a batch that it equals the gated network.

        Args:
          params: as trained.
          state: the optimiser's, or the nnx.Optimizer.
          inputs: a batch as the module takes it.
          collections: other collections of the module, such as `batch_stats=…`.

        Returns:
          the student: the gated network without its removed units, equal to it within 1e-5, within the budget.

        Warns:
          BudgetWarning: the student costs less than 0.98 of the budget.

        Raises:
          BudgetError: the budget is not met yet, or no choice of units is within it.
          ValueError: params or state belong to another search.
          SurgeryError: the student would differ.
        """
        found = search_state(state)
        _, gates = transform.split(_pure(params), self.topology)
        gates = {name: _fetched(gate).astype(np.float32) for name, gate in gates.items()}
        transform.flatten(gates, self.topology)
        self._check_met(gates, int(found.count), self._limits_ending(found))
        if isinstance(params, Gated):
            variables = variables_of(self.network, params.model)
        else:
            rest, _ = transform.split(params, self.topology)
            variables = {**rest, **collections}
            self._check_collections(variables)
        variables = jax.tree.map(_fetched, variables)
        selection = self.select(params, state)
        warn_of(selection)
        return cut_student(self._ruled.network, variables, gates, selection.keep, inputs)

    def _check_met(self, gates: Mapping[str, np.ndarray], step: int, limits: Limits) -> None:
        alive = (self.topology.flatten(gates) > 0).astype(float)
        pressure = limits.pressure(self.topology, alive)
        if pressure <= MET:
            return
        status = f"the network still costs {pressure:.2f} of the budget after {step} of {self.steps} updates"
        if step not in self.ends and step < self.steps:
            raise BudgetError(
                f"finish: {status}; continue training, or shorten the search with GatedSearch(steps=…), so that it "
                "meets the budget by its end"
            )
        warnings.warn(
            f"finish: {status}; the excess is removed by importance, without the weights having adapted. Give more "
            "steps, or a larger GatedSearch(learning_rate=…)",
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
    """The bounds of one budget over those of the one before: of the first that differs; 0 if none does."""
    high, low = _bounds(before), _bounds(after)
    return next((low[name] / high[name] for name in high if low[name] != high[name]), 0.0)


def search_state(state: Any) -> SearchState:
    """The `SearchState` inside an optimiser's state, however deeply nested.

    Raises:
      ValueError: there is none, or more than one.
    """
    state = getattr(state, "opt_state", state)
    leaves = jax.tree.leaves(_pure(state), is_leaf=lambda node: isinstance(node, SearchState))
    found = [leaf for leaf in leaves if isinstance(leaf, SearchState)]
    if len(found) != 1:
        raise ValueError(
            f"state: contains {len(found)} search states, one is expected; give the state of search.optimizer(tx), "
            "restored into the structure of tx.init(params) if it comes from a checkpoint"
        )
    return found[0]


def _written(history: transform.History) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a history that hold a snapshot: ((T, 4), (T, units))."""
    rows, gates = _fetched(history.rows), _fetched(history.gates)
    written = np.isfinite(rows[:, 0])
    return rows[written], gates[written]


def _fetched(leaf: Any) -> np.ndarray:
    """An array on the host; every process must call it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _pure(tree: Any) -> Any:
    """The tree without NNX's Variables; for a module, its parameters."""
    if isinstance(tree, flax.nnx.Module):
        tree = flax.nnx.state(tree, flax.nnx.Param)
    return flax.nnx.as_pure(tree)
