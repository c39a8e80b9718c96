"""kdsearch_jax: structured pruning by distillation, for unmodified Flax models (Linen and NNX).

    import kdsearch_jax as kd

    network = kd.trace(model, x)                          # what can be pruned, and what it costs
    search = kd.GatedSearch(network, kd.Budget(macs=0.5), steps=4000, rules=[kd.Rule("head/.*", freeze=True)])
    params = search.init(variables)                       # weights and gates
    tx = search.optimizer(optax.adamw(1e-3))              # yours for weights, proximal L1 for gates
    state = tx.init(params)
    ...                                                   # any training loop, with search.fold(params) in the loss
    student = search.finish(params, state, x)             # cut, and verified to 1e-5

`kd.prune(network, variables, kd.magnitude(), kd.Budget(macs=0.5))` prunes without a search, and `kd.search(...)` runs
everything: search, cut, retraining, report. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdsearch_jax.search import search

if TYPE_CHECKING:
    from kdsearch_jax.distill import losses
    from kdsearch_jax.pruning.budget import BudgetError
    from kdsearch_jax.pruning.budgets import Budget
    from kdsearch_jax.pruning.criteria import batch_norm_scale, fisher, magnitude, prune, random, taylor
    from kdsearch_jax.pruning.gated_module import Gated
    from kdsearch_jax.pruning.network import Network, trace
    from kdsearch_jax.pruning.prox import accelerated_proximal_l1, soft_threshold
    from kdsearch_jax.pruning.rules import Rule
    from kdsearch_jax.pruning.search import GatedSearch
    from kdsearch_jax.pruning.student import Student, fold, verify
    from kdsearch_jax.pruning.surgery import SurgeryError
    from kdsearch_jax.pruning.tables import Part, Table
    from kdsearch_jax.pruning.transform import SearchState
    from kdsearch_jax.storage.export_formats import load_safetensors, load_stablehlo
    from kdsearch_jax.storage.students import load, save
    from kdsearch_jax.tracing.topology import Topology

__all__ = [
    "Budget",
    "BudgetError",
    "Gated",
    "GatedSearch",
    "Network",
    "Part",
    "Rule",
    "SearchState",
    "Student",
    "SurgeryError",
    "Table",
    "Topology",
    "accelerated_proximal_l1",
    "batch_norm_scale",
    "fisher",
    "fold",
    "load",
    "load_safetensors",
    "load_stablehlo",
    "losses",
    "magnitude",
    "prune",
    "random",
    "save",
    "search",
    "soft_threshold",
    "taylor",
    "trace",
    "verify",
]

__version__ = "0.1.0"

# Modules that are used by their names, as in `kd.losses.kl`.
_MODULES = {
    "budget": "pruning.budget",
    "gates": "pruning.gates",
    "losses": "distill.losses",
    "surgery": "pruning.surgery",
}
_HOMES = {
    "pruning.budget": ("BudgetError",),
    "pruning.network": ("Network", "trace"),
    "pruning.prox": ("accelerated_proximal_l1", "soft_threshold"),
    "pruning.budgets": ("Budget",),
    "pruning.criteria": ("batch_norm_scale", "fisher", "magnitude", "prune", "random", "taylor"),
    "pruning.gated_module": ("Gated",),
    "pruning.rules": ("Rule",),
    "pruning.search": ("GatedSearch",),
    "pruning.student": ("Student", "fold", "verify"),
    "storage.export_formats": ("load_safetensors", "load_stablehlo"),
    "storage.students": ("load", "save"),
    "pruning.tables": ("Part", "Table"),
    "pruning.transform": ("SearchState",),
    "pruning.surgery": ("SurgeryError",),
    "tracing.topology": ("Topology",),
}


def __getattr__(name: str) -> Any:
    """A public name, imported from where it lives when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"kdsearch_jax.{_MODULES[name]}")
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kdsearch_jax.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
