"""Rules: which structures may be pruned, by regular expressions over paths of layers and parameters.

    rules=[Rule("head/.*", freeze=True), Rule("encoder/.*/mlp", round_to=64), Rule(".*", kinds=("neurons", "heads"))]

An expression must match a whole path (`re.fullmatch`), without the name of the collection: "head/kernel" is a
parameter, "head" is its layer and stands for everything inside of it, and a group has the name of the layer that
produces its units. `freeze` keeps the shape of every parameter that matches, so it also freezes the units that a
matching kernel reads. All other settings apply to groups whose units a matching layer produces. If several rules give
the same setting, the first one applies.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kdsearch_jax.pruning import hardware
from kdsearch_jax.pruning.budgets import RoundTo, width_multiple
from kdsearch_jax.pruning.network import Network
from kdsearch_jax.tracing.kinds import KINDS
from kdsearch_jax.tracing.topology import Group, Topology


@dataclass(frozen=True)
class Rule:
    """Settings for the paths that match; None leaves a setting to later rules.

    Attributes:
      path: regular expression, matched against whole paths of parameters, layers and groups.
      freeze: True: nothing that matches may be removed. False: an exception to later rules.
      least: number of units that must stay; below 1 a share of the group. For a residual branch, 1 keeps it.
      round_to: widths are multiples of this number, or unchanged.
      kinds: those of "channels", "neurons", "heads", "queries", "values", "width", "groups" and "branches" that may be
        removed.

    Raises:
      ValueError: the expression or a setting is not valid.
    """

    path: str
    freeze: bool | None = None
    least: float | None = None
    round_to: int | None = None
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"Rule({self.path!r}): not a regular expression ({error}); '.*' matches everything"
            ) from None
        if self.freeze is None and self.least is None and self.round_to is None and self.kinds is None:
            raise ValueError(f"Rule({self.path!r}): has no setting; give freeze, least, round_to or kinds")
        if self.least is not None and not self.least > 0:
            raise ValueError(f"Rule({self.path!r}): least={self.least!r} must be above 0")
        if self.round_to is not None and (not isinstance(self.round_to, int) or self.round_to < 1):
            raise ValueError(f"Rule({self.path!r}): round_to={self.round_to!r} must be a whole number, at least 1")
        kinds = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        for kind in kinds or ():
            if kind not in KINDS:
                raise ValueError(f"Rule({self.path!r}): kind {kind!r} is not one of {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", None if kinds is None else tuple(kinds))

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return re.fullmatch(self.path, path) is not None


@dataclass(frozen=True)
class Ruled:
    """A network under rules.

    Attributes:
      network: without the groups that rules freeze.
      least: {group: units that must stay}, for groups with such a rule.
      round_to: {group: multiple} for all groups, or {} if no rule sets one.
    """

    network: Network
    least: Mapping[str, int]
    round_to: Mapping[str, int]


def apply_rules(network: Network, rules: Sequence[Rule], round_to: RoundTo | Mapping[str, int] = 1) -> Ruled:
    """Applies rules to a network.

    Args:
      round_to: multiple of widths for groups without such a rule, as in `Budget` or `Limits`.

    Raises:
      ValueError: a rule matches nothing, with the nearest path; or nothing is left to prune.
    """
    topology = network.topology
    paths = _paths(topology)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"rules: {rule!r:.80} is not a Rule; write Rule({str(rule)!r:.40}, freeze=True)")
        if not any(map(rule.matches, paths)):
            raise ValueError(f"Rule({rule.path!r}) matches nothing in this network{_nearest(rule.path, paths)}")
    reasons, least, multiples = {}, {}, {}
    for group in topology.groups:
        affected, produced_by = _affected_paths(group, topology), _producer_paths(group)
        rule = next((r for r in rules if r.freeze is not None and any(map(r.matches, affected))), None)
        if rule is not None and rule.freeze:
            reasons[group.name] = f"frozen by Rule({rule.path!r})"
            continue
        matching = [r for r in rules if any(map(r.matches, produced_by))]
        kinds = next((r for r in matching if r.kinds is not None), None)
        if kinds is not None and group.kind not in (kinds.kinds or ()):
            reasons[group.name] = f"kind {group.kind} is not among those of Rule({kinds.path!r})"
            continue
        asked = next((r.least for r in matching if r.least is not None), None)
        if asked is not None:
            units = asked if asked >= 1 else -(-asked * group.size // 1)
            least[group.name] = min(int(units), group.size)
        multiple = next((r.round_to for r in matching if r.round_to is not None), None)
        if multiple is not None:
            multiples[group.name] = multiple
    kept = topology.without(reasons).require_groups()
    if multiples:
        default = hardware.multiples(kept) if isinstance(round_to, str) else round_to
        multiples = {group.name: multiples.get(group.name, width_multiple(default, group)) for group in kept.groups}
    return Ruled(replace(network, topology=kept), least, multiples)


def _paths(topology: Topology) -> list[str]:
    """Everything that a rule can match: parameters, the layers around them, and groups."""
    leaves = [leaf.split("/", 1)[-1] for leaf in topology.shapes]
    layers = [_parents(leaf) for leaf in leaves]
    names = [group.name for group in topology.groups]
    return list(dict.fromkeys([*leaves, *(path for parents in layers for path in parents), *names, *topology.excluded]))


def _parents(leaf: str) -> list[str]:
    parts = leaf.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _affected_paths(group: Group, topology: Topology) -> list[str]:
    """Paths that removing units of the group changes: the group, its parameters, and the layers around them."""
    leaves = [member.leaf.split("/", 1)[-1] for member in group.members]
    if group.layers:
        inside = tuple(f"{layer}/" for layer in group.layers)
        leaves += [leaf for name in topology.shapes if (leaf := name.split("/", 1)[-1]).startswith(inside)]
    layers = [layer for leaf in leaves for layer in _parents(leaf)]
    return list(dict.fromkeys([group.name, *leaves, *layers]))


def _producer_paths(group: Group) -> list[str]:
    """Paths of the layers that produce the group's units, and of their parameters; for a branch, its layers."""
    leaves = [m.leaf.split("/", 1)[-1] for m in group.members if not m.consumes]
    layers = [layer for leaf in leaves for layer in _parents(leaf)]
    return list(dict.fromkeys([group.name, *leaves, *layers, *group.layers]))


def _nearest(path: str, known: Sequence[str]) -> str:
    plain = re.sub(r"[\\^$]|\.\*|\.\+", "", path).strip("/")
    near = difflib.get_close_matches(plain, known, 1, 0.0)
    return f"; the nearest path is {near[0]!r}" if near else ""
