"""The search: distils into the gated network while a proximal L1 penalty removes structures.

    min over w, g ≥ 0 of   E KL(teacher, student(w, g))  +  λ1 ‖w‖²  +  λ2 Σ_j α_j |g_j|

λ1 is the weight decay of the stage. λ2 follows the budget, or a path through several
(`kdsearch_jax.pruning.budget_path`), in a
closed loop (`budget.level`). α_j decides what dies, see `kdsearch_jax.pruning.penalty`; a residual branch goes as a
whole, by
its own gate. What is dead may be left out of the computation (`kdsearch_jax.distill.shrinking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdsearch_jax.distill.distiller import Distiller
from kdsearch_jax.distill.objective import Objective
from kdsearch_jax.distill.shrinking import Part
from kdsearch_jax.pruning import budget_path, selection
from kdsearch_jax.pruning import gates as gates_lib
from kdsearch_jax.pruning import penalty as penalty_lib
from kdsearch_jax.pruning.budget_path import Leg
from kdsearch_jax.pruning.budgets import Limits
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.pruning.prox import accelerated_proximal_l1
from kdsearch_jax.pruning.selection import Selection
from kdsearch_jax.pruning.settings import GatesConfig
from kdsearch_jax.tracing.topology import Topology, path_string
from kdsearch_jax.training.optimizer import make_optimizer
from kdsearch_jax.training.settings import RunConfig, StageConfig
from kdsearch_jax.training.state import Step, TrainState, create_state

SNAPSHOTS = 200  # rows of gate history kept at most
LAG, GAIN = 1.02, 1.5  # λ2 is raised by GAIN at every call while the cost is LAG times its target or more
HOLD = 1e6  # penalty of a gate at 0: the dead stay dead, also at the budget where λ2 is 0; but for those recalled


def make_transformation(stage: StageConfig, config: GatesConfig) -> optax.GradientTransformationExtraArgs:
    """Over {"weights": …, "gates": …}: the stage's optimiser for weights, the proximal step for gates.

    Its update takes `penalty` with the structure of the parameters; the entries for weights are not used.
    """
    return optax.partition(
        {"weights": make_optimizer(stage), "gates": accelerated_proximal_l1(config.learning_rate, config.momentum)},
        {"weights": "weights", "gates": "gates"},
        mask_compatible_extra_args=True,
    )


def begin(
    variables: Any,
    topology: Topology,
    tx: Any,
    stage: StageConfig,
    init: Literal["one", "norm"] = "one",
    learned: Any = None,
) -> TrainState:
    """The state before the first update: the teacher, as weights and gates; nothing known of importance.

    learned: what losses of features learn beside, never delivered; see `kdsearch_jax.distill.distiller`.
    """
    variables, gates = started(variables, topology, init)
    zeros = jax.tree.map(jnp.zeros_like, gates)
    rows = min(SNAPSHOTS, stage.steps) + 1
    history = {"gates": jnp.full((rows, topology.units), jnp.nan), "rows": jnp.full((rows, 4), jnp.nan)}
    whole = {"gates": jnp.concatenate(list(gates.values())), "importance": jnp.zeros(topology.units)}
    extra = {
        "gates": gates, "importance": zeros, "penalty": zeros, "gain": jnp.ones(()), "history": history, "whole": whole,
        **({} if learned is None else {"learned": learned}),
    }  # fmt: skip
    state = create_state(variables, optax.identity(), extra=extra)
    return state.replace(opt_state=tx.init({"weights": state.params, "gates": gates}))


def started(variables: Any, topology: Topology, init: str) -> tuple[Any, gates_lib.Gates]:
    """(variables, gates) whose gated network is the network of the given variables.

    `one`: gates of 1. `norm`: g_j = n_j / mean n over the group, n_j the L2 norm of all kernel entries that read unit
    j, and these entries divided by g_j. A unit that is read by zeros only starts dead.
    """
    gates = gates_lib.init(topology)
    if init == "one":
        return variables, gates
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]}
    for group in topology.groups:
        squares = np.zeros(group.size + 1)
        for member in group.members:
            if member.consumes and member.units is not None:
                leaf = np.moveaxis(np.asarray(leaves[member.leaf], float), member.axis, 0)
                np.add.at(squares, member.units, np.square(leaf).reshape(len(leaf), -1).sum(1))
        norms = np.sqrt(squares[:-1])  # the last: entries of no unit
        if group.kind != "branches" and norms.any():
            gates[group.name] = jnp.asarray(norms / norms.mean(), jnp.float32)
    inverse = {name: 1.0 / jnp.where(gate > 0, gate, 1.0) for name, gate in gates.items()}
    return gates_lib.fold(variables, inverse, topology), gates


def search_step(
    network: Network,
    teacher: Any,
    tx: Any,
    task: Objective,
    config: GatesConfig,
    run: RunConfig,
    distiller: Distiller | None = None,
) -> Step:
    """One update of weights, gates and importance.

    distiller: what teaches, and by which losses; None: `teacher`, by the task's distance. Constants are those that it
    wants, of one teacher its variables.
    """
    decay, frozen = config.importance_decay, config.batch_norm == "frozen"
    by = distiller or Distiller.of(task, teacher, run)

    def step(state: TrainState, batch: Any, key: jax.Array, constants: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        target = by.target(constants, batch)

        def loss(both: Any, maps: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            gates = both["gates"]
            folded = gates_lib.fold({"params": both["weights"]}, gates, network.topology)["params"]
            shown, kept = by.train(network.module, folded, state.model_state, batch, key, gates, frozen=frozen)
            return by.distance(maps, shown, target, batch).mean(), (shown.outputs, kept)

        both: Any = {"weights": state.params, "gates": state.extra["gates"]}
        graded = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (outputs, kept)), (gradient, slope) = graded(both, by.learned(state.extra))
        # A running mean from the first step on, an exponential one once there are enough steps.
        rate = jnp.minimum(decay, state.step / (state.step + 1.0))
        importance = jax.tree.map(
            lambda old, g, d: rate * old + (1 - rate) * jnp.square(g * d),
            state.extra["importance"],
            both["gates"],
            gradient["gates"],
        )
        penalty = {"weights": jax.tree.map(jnp.zeros_like, state.params), "gates": state.extra["penalty"]}
        updates, opt_state = tx.update(gradient, state.opt_state, both, penalty=penalty)
        new: Any = optax.apply_updates(both, updates)
        extra = {**state.extra, "gates": new["gates"], "importance": importance, **by.advance(state.extra, slope)}
        measured = {**task.right(outputs, batch), **task.agrees(outputs, target.outputs)}
        metrics = {"loss": value, **{name: each.mean() for name, each in measured.items()}}
        state = state.replace(
            step=state.step + 1, params=new["weights"], model_state=kept, opt_state=opt_state, extra=extra
        )
        return state, metrics

    return step


def controller(
    part: Part, path: Sequence[Leg], stage: StageConfig, config: GatesConfig, run: RunConfig
) -> Callable[[TrainState], tuple[TrainState, dict[str, float]]]:
    """The hook between compiled calls: re-estimates α, moves λ2, keeps the history.

    Everything is reckoned in the units of the whole network, whatever part of it is computed.
    """
    topology = part.whole.topology
    spacing = -(-stage.steps // SNAPSHOTS)

    def between(state: TrainState) -> tuple[TrainState, dict[str, float]]:
        done = int(state.step)
        leg = budget_path.at(path, done)
        limits, gates, importance = leg.limits, part.gates(state), part.importance(state)
        goal = leg.goal(done + run.steps_per_dispatch)
        alpha = penalty_lib.weights(topology, limits, config, gates, importance, goal)
        alive = (gates > 0).astype(float)
        pressure, gain = limits.pressure(topology, alive), float(state.extra["gain"])
        if config.lambda2 is not None:
            lambda2 = config.lambda2 if pressure > 1.0 else 0.0
        else:
            # The loss may push gates up against the penalty: λ2 grows for as long as the cost lags behind.
            behind = pressure > leg.goal(done) * LAG
            gain = min(gain * GAIN, 1e6) if behind else max(gain / GAIN, 1.0)
            rate = config.learning_rate / (1.0 - config.momentum)
            lambda2 = gain * penalty_lib.level(topology, limits, gates, alpha, rate, run.steps_per_dispatch, goal)
        free = gates > 0
        if pressure < limits.floor:
            cost = penalty_lib.cost_of(topology, limits, alive, importance, goal)
            worth = np.divide(importance, cost, out=np.zeros_like(cost), where=cost > 0)
            free |= penalty_lib.recalled(topology, limits, alive, worth)
        weights = np.where(free, lambda2 * alpha, HOLD)
        penalty = {name: value.astype(np.float32) for name, value in part.take(weights).items()}
        macs, params = topology.cost(alive)
        full_macs, full_params = topology.total()
        history = {name: np.array(value) for name, value in state.extra["history"].items()}
        row = min(done // spacing, len(history["rows"]) - 1)
        history["gates"][row] = gates
        history["rows"][row] = (done, macs / full_macs, params / full_params, lambda2)
        metrics = {
            "macs": macs / full_macs,
            "params": params / full_params,
            "lambda2": lambda2,
            "alive": float(alive.mean()),
        }
        extra = {**state.extra, "penalty": penalty, "gain": np.float32(gain), "history": history}
        return state.replace(extra=extra), metrics

    return between


def landing(topology: Topology, limits: Limits, gates: Any, importance: Any) -> Selection:
    """The units to keep after the search: those whose gates live, and from there exactly into the budget.

    Raises:
      BudgetError: even the smallest student costs more.
    """
    gates, importance = (topology.flatten(jax.tree.map(np.asarray, tree)).astype(float) for tree in (gates, importance))
    # The dead go first, whatever their last importance was; among the living, importance per cost decides.
    return selection.choose(topology, limits, np.where(gates > 0, importance + 1e-30, 0.0))


def history(topology: Topology, state: TrainState) -> dict[str, np.ndarray]:
    """What `history.npz` holds: steps, costs, λ2, and each group's gates over the search."""
    rows = np.asarray(state.extra["history"]["rows"])
    seen = np.isfinite(rows[:, 0])
    gates = np.asarray(state.extra["history"]["gates"])[seen]
    names = ("steps", "cost_macs", "cost_params", "lambda2")
    result = {name: rows[seen, i] for i, name in enumerate(names)}
    starts = np.cumsum([0] + [group.size for group in topology.groups])
    for group, a, b in zip(topology.groups, starts, starts[1:], strict=False):
        result[f"gate/{group.name}"] = gates[:, a:b]
    return result
