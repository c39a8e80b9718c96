"""Budgets on a target that is not here: time and memory of networks as its compiler estimates them, in bfloat16.

The estimates take the place of measurements: the cost model of a search is fitted to students of several widths per
class of groups, and the student that is cut is compiled and must be within the budget.

`width_steps` reads off the compiler to which widths a group may be cut without waste. A layer of n channels with its
consumer is compiled as two products, (rows, n)·(n, w)·(w, n), at widths w from n/4 to n. The step of the group is the
largest power of two up to n/4 for which rounding w up to its next multiple costs at most 2% more cycles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.pruning.budgets import BudgetError
from kdsearch_jax.pruning.hardware import WIDTHS
from kdsearch_jax.pruning.settings import BudgetConfig
from kdsearch_jax.runs.latency.timing import Instruments, Networks, Turn, measured_bounds
from kdsearch_jax.runs.targets import Estimates, Target, compile_for, parse_target
from kdsearch_jax.tracing.topology import Topology

SHARES = (0.75, 0.5, 0.25)  # widths of each class of groups that are compiled, as shares of their sizes
ROWS = 4096  # of the products that `width_steps` compiles
FREE = 1.02  # relative cycles that count as no more


def check_target(budget: BudgetConfig) -> None:
    """Raises ValueError if the budget needs a target's compiler that is not installed, or a batch does not divide."""
    if budget.target is None or not (measured_bounds(budget) or budget.round_to == "hardware"):
        return
    target = parse_target(budget.target, "budget.target")
    if measured_bounds(budget):
        _check_batch(target, budget.batch_size)
    target.mesh()


def instruments_for(budget: BudgetConfig) -> Instruments:
    """How networks are measured for a budget: on this device, or by compiling them for `budget.target`."""
    if budget.target is None:
        return Instruments()
    target = parse_target(budget.target, "budget.target")

    def timer(networks: Networks, batch_size: int, call: CallSpec) -> Turn:
        found = _estimates(target, networks, batch_size, call)
        times = {name: each.milliseconds for name, each in found.items()}
        for name, value in times.items():
            if not value > 0:
                raise BudgetError(f"budget.latency: the compiler's estimate for the {name} network is {value} ms")
        return lambda: times

    def memory(networks: Networks, batch_size: int, call: CallSpec) -> Mapping[str, float]:
        return {n: e.memory["peak"] for n, e in _estimates(target, networks, batch_size, call).items()}

    return Instruments(timer, memory)


def _check_batch(target: Target, batch_size: int) -> None:
    if batch_size % target.devices:
        near = max(target.devices, batch_size - batch_size % target.devices)
        raise BudgetError(
            f"budget.batch_size: {batch_size} is not a multiple of the {target.devices} devices of {target.name}; "
            f"give {near}, for example"
        )


def _estimates(target: Target, networks: Networks, batch_size: int, call: CallSpec) -> dict[str, Estimates]:
    _check_batch(target, batch_size)
    mesh, found = target.mesh(), {}
    whole, by_batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def abstract(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    for name, (module, variables) in networks.items():

        def forward(variables: Any, inputs: Any, module: Any = module) -> Any:
            return apply_eval(module, variables, inputs, "bf16", call)

        arguments = abstract(variables, whole), abstract(call.example(batch_size), by_batch)
        estimates = compile_for(target, jax.jit(forward), *arguments, name=f"the {name} network")
        if not estimates.fits:
            raise BudgetError(
                f"budget.batch_size: a call of the {name} network with {batch_size} examples does not fit into "
                f"{target.name}; give fewer"
            )
        found[name] = estimates
    return found


def target_multiples(budget: BudgetConfig, topology: Topology) -> dict[str, int] | None:
    """The `width_steps` of a budget's target if its widths are rounded to the hardware; None otherwise."""
    if budget.target is None or budget.round_to != "hardware":
        return None
    return width_steps(parse_target(budget.target, "budget.target"), topology)


def width_steps(target: Target, topology: Topology) -> dict[str, int]:
    """{group: the multiple that its width should have on the target}; 1 for groups that are no axis of an array."""
    return {g.name: _step(target, g.size) if g.kind in WIDTHS else 1 for g in topology.groups}


@functools.cache
def _step(target: Target, size: int) -> int:
    cycles = functools.cache(functools.partial(_product_cycles, target, size))
    best = 1
    for step in (8, 16, 32, 64, 128, 256):
        if 4 * step > size:
            break
        rounded = {w: -(-w // step) * step for w in range(max(size // 4, step), size, max(step // 2, size // 16))}
        if all(cycles(up) <= FREE * cycles(width) for width, up in rounded.items() if up <= size):
            best = step
    return best


def _product_cycles(target: Target, size: int, width: int) -> float:
    sharding = NamedSharding(target.mesh(), PartitionSpec())
    shapes = ((ROWS, size), (size, width), (width, size))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return compile_for(target, jax.jit(_two_products), *arrays, name=f"products of width {width}").cycles


def _two_products(x: Any, first: Any, second: Any) -> Any:
    return x @ first @ second
