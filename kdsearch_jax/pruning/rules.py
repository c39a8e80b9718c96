"""Rules: which structures may go, by regular expressions over paths of layers and parameters.

    rules=[Rule("head/.*", freeze=True), Rule("encoder/.*/mlp", round_to=64), Rule(".*", kinds=("neurons", "heads"))]

A path is matched as a whole (`re.fullmatch`), without the collection's name: "head/kernel" is a parameter, "head" its
layer, which stands for all that is in it, and a group carries the name of the layer that makes its units. `freeze`
keeps the shape of every parameter that matches, so it also freezes the units that a matching kernel reads. Other
settings are of the groups whose units a matching layer makes. Of several rules that say something of the same setting
the first counts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kdsearch_jax.pruning.network import Network
from kdsearch_jax.tracing.topology import KINDS, Group, Topology


@dataclass(frozen=True)
class Rule:
    """Settings for what a path matches; None says nothing.

    Attributes:
      path: regular expression, matched against whole paths of parameters, layers and groups.
      freeze: True: nothing of it may go. False: an exception to later rules.
      least: units that stay at least; below 1 a share of the group. For a residual branch, 1 keeps it.
      round_to: widths are multiples of it, or untouched.
      kinds: of "channels", "neurons", "heads", "values", "groups" and "branches", those that may go.

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
            raise ValueError(f"Rule({self.path!r}): no regular expression ({error}); '.*' matches everything") from None
        if self.freeze is None and self.least is None and self.round_to is None and self.kinds is None:
            raise ValueError(f"Rule({self.path!r}): says nothing; give freeze, least, round_to or kinds")
        if self.least is not None and not self.least > 0:
            raise ValueError(f"Rule({self.path!r}): least={self.least!r} must be above 0")
        if self.round_to is not None and (not isinstance(self.round_to, int) or self.round_to < 1):
            raise ValueError(f"Rule({self.path!r}): round_to={self.round_to!r} must be a whole number from 1 on")
        kinds = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        for kind in kinds or ():
            if kind not in KINDS:
                raise ValueError(f"Rule({self.path!r}): kind {kind!r} is not one of {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", None if kinds is None else tuple(kinds))

    def matches(self, path: str) -> bool:
        """Whether the whole path fits."""
        return re.fullmatch(self.path, path) is not None


@dataclass(frozen=True)
class Ruled:
    """A network under rules. least, round_to: {group: units}, for groups of which a rule says something."""

    network: Network
    least: Mapping[str, int]
    round_to: Mapping[str, int]


def apply_rules(network: Network, rules: Sequence[Rule], round_to: int = 1) -> Ruled:
    """The network with what rules freeze frozen, and what else they say of the groups left.

    round_to: of groups of which no rule says it.

    Raises:
      ValueError: a rule matches nothing, with the nearest path; or nothing is left that may go.
    """
    topology = network.topology
    known = _paths(topology)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"rules: {rule!r:.80} is not a Rule; write Rule({str(rule)!r:.40}, freeze=True)")
        if not any(map(rule.matches, known)):
            raise ValueError(f"Rule({rule.path!r}) matches nothing in this network{_nearest(rule.path, known)}")
    reasons, least, multiples = {}, {}, {}
    for group in topology.groups:
        touched, made = _touched(group, topology), _made(group)
        rule = next((r for r in rules if r.freeze is not None and any(map(r.matches, touched))), None)
        if rule is not None and rule.freeze:
            reasons[group.name] = f"frozen by Rule({rule.path!r})"
            continue
        own = [r for r in rules if any(map(r.matches, made))]
        kinds = next((r for r in own if r.kinds is not None), None)
        if kinds is not None and group.kind not in (kinds.kinds or ()):
            reasons[group.name] = f"kind {group.kind} is not among those of Rule({kinds.path!r})"
            continue
        asked = next((r.least for r in own if r.least is not None), None)
        if asked is not None:
            units = asked if asked >= 1 else -(-asked * group.size // 1)
            least[group.name] = min(int(units), group.size)
        multiple = next((r.round_to for r in own if r.round_to is not None), None)
        if multiple is not None:
            multiples[group.name] = multiple
    kept = topology.without(reasons).require_groups()
    if multiples:
        multiples = {group.name: multiples.get(group.name, round_to) for group in kept.groups}
    return Ruled(replace(network, topology=kept), least, multiples)


def _paths(topology: Topology) -> list[str]:
    """All that a rule can match: parameters, the layers that hold them, groups."""
    leaves = [leaf.split("/", 1)[-1] for leaf in topology.shapes]
    layers = [_parents(leaf) for leaf in leaves]
    names = [group.name for group in topology.groups]
    return list(dict.fromkeys([*leaves, *(path for each in layers for path in each), *names, *topology.excluded]))


def _parents(leaf: str) -> list[str]:
    parts = leaf.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _touched(group: Group, topology: Topology) -> list[str]:
    """Paths of which something goes with the group: the group, its parameters, and the layers around them."""
    leaves = [member.leaf.split("/", 1)[-1] for member in group.members]
    if group.layers:
        held = tuple(f"{layer}/" for layer in group.layers)
        leaves += [leaf for name in topology.shapes if (leaf := name.split("/", 1)[-1]).startswith(held)]
    layers = [layer for leaf in leaves for layer in _parents(leaf)]
    return list(dict.fromkeys([group.name, *leaves, *layers]))


def _made(group: Group) -> list[str]:
    """Paths of the layers that make the group's units, with their parameters; of a branch, its layers."""
    leaves = [m.leaf.split("/", 1)[-1] for m in group.members if not m.consumes]
    layers = [layer for leaf in leaves for layer in _parents(leaf)]
    return list(dict.fromkeys([group.name, *leaves, *layers, *group.layers]))


def _nearest(path: str, known: Sequence[str]) -> str:
    plain = re.sub(r"[\\^$]|\.\*|\.\+", "", path).strip("/")
    near = difflib.get_close_matches(plain, known, 1, 0.0)
    return f"; the nearest path is {near[0]!r}" if near else ""
