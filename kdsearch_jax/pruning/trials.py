"""Trial cuts: which groups the model's own code can shrink, and which other sizes have to follow them.

The analysis reads a network at one set of sizes. Its author may have hard-coded a size: `reshape(b, n, 4, 16)`,
`self.heads`, `split(x, 2)`. So the student's code is traced with units removed and compared with what the analysis
predicted (`tracing.size_check`). If a set of groups fails, bisection finds the groups at fault, and for each of them,
in this order:

1. *Set a number.* An integer attribute of one of the user's modules is set to the group's new size (`SizeAttribute`).
2. *Pair.* Parts that the code treats alike, such as the halves of `split(x, 2)`, are joined index by index, so that
   they stay equally long (`tracing.analysis.SplitSite`). The analysis is then repeated.
3. *Freeze.* The group stays whole; the reason is the error of the trial with this group alone.

Nothing is computed: every trial is an abstract trace.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kdsearch_jax.tracing import size_check
from kdsearch_jax.tracing import topology as topology_lib
from kdsearch_jax.tracing.analysis import Analysis, AxisTie, SplitSite
from kdsearch_jax.tracing.interpreter import reanalyze
from kdsearch_jax.tracing.program import flatten_jaxpr, line_of
from kdsearch_jax.tracing.rescaling import Rescale, find_rescales
from kdsearch_jax.tracing.size_check import RescaleCheck
from kdsearch_jax.tracing.topology import Group, Topology

if TYPE_CHECKING:
    from kdsearch_jax.pruning.network import Network

Pairing = SplitSite | AxisTie

_SMALL = 12  # units; a smaller group has no room for the cuts of `_units_left`
_CANDIDATES = 8  # numbers to try for one group, and as many sets of them


@dataclass(frozen=True)
class SizeAttribute:
    """An integer in the user's code that is a size: `name` of the module at `path` is `times / over` of an axis.

    Attributes:
      leaf, axis: the axis of a parameter whose length it is proportional to. leaf "": the number stays `times`.
    """

    path: str
    name: str
    times: int
    over: int = 1
    leaf: str = ""
    axis: int = 0

    def value(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number for parameters of these shapes."""
        return self.times if not self.leaf else shapes[self.leaf][self.axis] * self.times // self.over


@dataclass(frozen=True)
class Verdict:
    """The result of the trials. If there is anything to pair or release, only that counts and the analysis is repeated.

    Attributes:
      size_attributes: numbers that change with the size of a group. frozen: {group: reason}.
      rescales: numbers in the code that follow a size, and the parameters that undo it.
      pair: sites and axes to pair. release: pairings to undo because they did not help.
    """

    size_attributes: tuple[SizeAttribute, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    pair: frozenset[Pairing] = frozenset()
    release: frozenset[Pairing] = frozenset()
    rescales: tuple[Rescale, ...] = ()


def judge(network: Network, found: Analysis, variables: Any, released: Collection[Pairing]) -> Verdict:
    """Finds the groups that the network's code cannot shrink.

    Args:
      network: as traced, before any trial.
      found: the analysis that its topology comes from.
      variables: shapes of its variables.
      released: pairings that did not help.
    """
    trials = _Trials(network, found, variables)
    free = [group.name for group in network.topology.groups if group.kind != "branches"]
    frozen: dict[str, str] = {}
    while free and (reason := trials.failure(free)):
        name, partner, reason = _culprit(trials, free, reason)
        together = [name] if partner is None else [name, partner]
        if trials.set_attributes(name, together):
            _set_similar_attributes(trials, name, free)
            continue
        if verdict := _paired_or_released(trials, name, free, released):
            return verdict
        frozen[name] = reason if partner is None else f"{reason}, when units of {partner} go as well"
        free.remove(name)
        for other, why in _failing(trials, [other for other in free if _pattern(other) == _pattern(name)]):
            if verdict := _paired_or_released(trials, other, free, released):
                return verdict
            frozen[other] = why
            free.remove(other)
    rescales = tuple(check.found for check in trials.rescales.values() if check.follows)
    return Verdict(tuple(trials.size_attributes), frozen, rescales=rescales)


def _paired_or_released(
    trials: _Trials, name: str, free: Sequence[str], released: Collection[Pairing]
) -> Verdict | None:
    """What to pair for a group that fails, or which pairing to release; None if the group has to be frozen."""
    touched, paired = trials.sites(name), set(trials.found.paired)
    if new := (similar_sites(touched, trials.found) | trials.ties(name, free)) - paired - set(released):
        return Verdict(pair=frozenset(new))
    if touched & paired:
        return Verdict(release=frozenset(touched & paired))
    return None


def _culprit(trials: _Trials, free: Sequence[str], reason: str) -> tuple[str, str | None, str]:
    """(a group that fails, a group without which it does not fail or None, the reason), for a set that fails."""
    prefix, reason = _shortest(lambda n: trials.failure(free[:n]), len(free), reason)
    name = free[prefix - 1]
    if why := trials.failure([name]):
        return name, None, why
    others, reason = _shortest(lambda n: trials.failure([*free[:n], name]), prefix - 1, reason)
    return name, free[others - 1], reason


def _shortest(failure: Callable[[int], str | None], wrong: int, reason: str) -> tuple[int, str]:
    """(n, reason): an n up to `wrong`, which fails, such that n fails and n - 1 does not."""
    intact = 0
    while wrong - intact > 1:
        middle = (intact + wrong) // 2
        why = failure(middle)
        intact, wrong, reason = (intact, middle, why) if why else (middle, wrong, reason)
    return wrong, reason


def _failing(trials: _Trials, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(group, reason) of those that fail by themselves; a single trial if none does."""
    if len(names) > 1 and trials.failure(names) is None:
        return
    for name in names:
        if why := trials.failure([name]):
            yield name, why


def _set_similar_attributes(trials: _Trials, name: str, free: Sequence[str]) -> None:
    """Sets the attributes of layers with a similar name for their groups, as was done for `name`, without a trial.

    The next trial of all groups shows if that is wrong.
    """
    keys = {(a.name, _pattern(a.path)) for a in trials.size_attributes if trials.owner.get(a) == name}
    for other in free:
        if other != name and _pattern(other) == _pattern(name):
            candidates: dict[tuple[str, str], SizeAttribute] = {}
            for candidate in trials.candidates(other):
                candidates.setdefault((candidate.name, _pattern(candidate.path)), candidate)
            for candidate in (candidates[key] for key in keys & set(candidates)):
                if not trials.is_taken(candidate):
                    trials.add(candidate, other)


class _Trials:
    """Trials of one network. size_attributes: those found so far; owner: {attribute: group}."""

    def __init__(self, network: Network, found: Analysis, variables: Any):
        self.network, self.found, self.variables = network, found, variables
        self.topology = network.topology
        self.groups = {group.name: group for group in self.topology.groups}
        self.small = [g.name for g in self.topology.groups if g.size < _SMALL and g.kind != "branches"]
        self.numbers = {g.name: i for i, g in enumerate(self.topology.groups)}
        self.numbers |= {name: i for i, name in enumerate(self.small)}
        self.size_attributes: list[SizeAttribute] = []
        self.owner: dict[SizeAttribute, str] = {}
        shapes = self.topology.shapes
        candidates = find_rescales(found, list(shapes), shapes)
        sizes = {path: shapes[rescale.leaf][rescale.axis] for path, rescale in candidates.items()}
        self.rescales = {path: RescaleCheck(r, sizes[path], sizes[path]) for path, r in candidates.items()}

    def failure(self, names: Collection[str], extra: Sequence[SizeAttribute] = ()) -> str | None:
        """Why the code fails without some units of all these groups, in any of the turns; None if it works."""
        chosen = set(names)
        turns = 2 * max(2, (len(self.small) - 1).bit_length()) if not chosen.isdisjoint(self.small) else 1
        return next((why for turn in range(turns) if (why := self._failure(chosen, turn, extra))), None)

    def _failure(self, chosen: Collection[str], turn: int, extra: Sequence[SizeAttribute]) -> str | None:
        keep = {g.name: _units_left(self.numbers[g.name], turn, g.size, g.name in chosen) for g in self.topology.groups}
        masks = self.topology.masks(keep)
        if not masks:
            return None
        attributes = (*self.network.size_attributes, *self.size_attributes, *extra)
        network = replace(self.network, size_attributes=attributes)
        left = size_check.remaining_labels(self.found, masks, list(self.topology.shapes))
        shapes = self.topology.sliced_shapes(keep)
        for check in self.rescales.values():
            check.size = shapes[check.found.leaf][check.found.axis]
        sliced = _sliced(self.topology, self.variables, keep)
        return _mismatch(network, self.found, keep, left, sliced, self.rescales)

    def sites(self, name: str) -> set[SplitSite]:
        """The sites at which the code treats parts of a group's axes alike."""
        component = self.found.components()
        own = np.zeros(int(component.max()) + 1, bool)
        for member in self.groups[name].members:
            if member.units is not None:
                axis = self.found.labels.axes_of(list(self.topology.shapes).index(member.leaf))[member.axis]
                own[component[axis[member.units >= 0]]] = True
        return {site for site, parts in self.found.split_sites.items() if any(own[component[p]].any() for p in parts)}

    def ties(self, name: str, free: Sequence[str]) -> set[AxisTie]:
        """Ties that keep a group as large as other failing groups whose size is the same number in the code."""
        group = self.groups[name]
        numbers = {(c.path, c.name) for c in self.candidates(name, around=True)}
        mates = [
            other
            for other in free
            if other != name
            and self.groups[other].size == group.size
            and any((c.path, c.name) in numbers for c in self.candidates(other, around=True))
            and self.failure([other])
        ]
        axes = [[a for a in _axes(self.groups[n], self.topology) if a[2] == group.size][:1] for n in (name, *mates)]
        first, *others = axes
        return {AxisTie(*first[0][:2], *other[0][:2]) for other in others if first and other}

    def candidates(self, name: str, around: bool = False) -> list[SizeAttribute]:
        """Integers that may be sizes of a group: those of the modules around its layers, the innermost first.

        around: only those of the modules around the layer that produces the group.
        """
        group = self.groups[name]
        axes = _axes(group, self.topology)
        layers = {m.leaf.split("/", 1)[1].rpartition("/")[0] for m in group.members}
        producer = group.name.split("#")[0]

        def distance(path: str) -> tuple[int, int]:
            around = not path or f"{producer}/".startswith(f"{path}/")
            near = around or any(not path or f"{layer}/".startswith(f"{path}/") for layer in layers)
            return (0 if around else 1 if near else 2), -path.count("/") - bool(path)

        result = []
        for path in sorted(self.network.layers, key=distance):
            if around and distance(path)[0]:
                break
            integers = self.network.layers[path].integers
            for attribute, number in sorted(integers.items(), key=lambda item: item[0].count(".")):
                for leaf, axis, length in axes:
                    if number in (length, group.size) and (length * number) % length == 0 and number % group.size == 0:
                        result.append(SizeAttribute(path, attribute, number, length, leaf, axis))
                        break
        return result

    def set_attributes(self, name: str, together: Sequence[str]) -> bool:
        """Looks for attributes that make the trial pass if they follow the group's size, and keeps those it finds."""
        free = [candidate for candidate in self.candidates(name) if not self.is_taken(candidate)]
        single = [[candidate] for candidate in free[:_CANDIDATES]]
        by_path = [[c for c in free if c.path == path] for path in dict.fromkeys(c.path for c in free)]
        by_name = [[c for c in free if c.name == same] for same in dict.fromkeys(c.name for c in free)]
        choices = [*single, *by_path, *by_name]
        several = [choice for i, choice in enumerate(choices) if len(choice) > 1 and choice not in choices[:i]]
        for chosen in [*single, *several[:_CANDIDATES]]:
            if self.failure(together, chosen) is None:
                for attribute in self._needed(together, chosen):
                    self.add(attribute, name)
                return True
        return False

    def _needed(self, together: Sequence[str], chosen: Sequence[SizeAttribute]) -> Sequence[SizeAttribute]:
        """Those without which the trial fails; a module's own attributes rather than those of its configuration.

        A number that need not change may be another size that happens to be equal.
        """
        own = [attribute for attribute in chosen if "." not in attribute.name]
        if 0 < len(own) < len(chosen) and self.failure(together, own) is None:
            chosen = own
        for attribute in sorted(chosen, key=lambda a: -a.name.count(".")) if len(chosen) > 1 else ():
            rest = [other for other in chosen if other != attribute]
            if self.failure(together, rest) is None:
                chosen = rest
        return chosen

    def is_taken(self, candidate: SizeAttribute) -> bool:
        """Whether the number is the size of a group already."""
        return any((a.path, a.name) == (candidate.path, candidate.name) for a in self.size_attributes)

    def add(self, attribute: SizeAttribute, name: str) -> None:
        """From now on the number follows the size of a group."""
        self.size_attributes.append(attribute)
        self.owner[attribute] = name


def similar_sites(sites: Collection[SplitSite], found: Analysis) -> set[Pairing]:
    """All sites on the same lines of code as `sites`; sites of unknown lines are matched by module names."""
    lines = {_pattern(site.line) if ":" not in site.line else site.line for site in sites}
    return {s for s in found.split_sites if (_pattern(s.line) if ":" not in s.line else s.line) in lines}


def idle(found: Analysis, topology: Topology) -> frozenset[SplitSite]:
    """Sites of grouped convolutions none of whose channels is in a group, for example because two groups are joined."""
    names = list(topology.shapes)
    free = np.zeros(len(found.labels.leaf), bool)
    for group in topology.groups:
        for member in group.members:
            if member.units is not None:
                axis = found.labels.axes_of(names.index(member.leaf))[member.axis]
                free[axis[member.units >= 0]] = True
    component = found.components()
    alive = np.zeros(int(component.max()) + 1, bool)
    alive[component[free]] = True
    why, _ = found.frozen()

    def stuck(parts: Iterable[np.ndarray]) -> bool:
        labels = np.concatenate([np.ravel(part) for part in parts])
        return not alive[component[labels]].any() and bool((why[labels] < 0).any())

    return frozenset(site for site, parts in found.split_sites.items() if site not in found.paired and stuck(parts))


def kept_groups(found: Analysis, names: Sequence[str], layers: Mapping[str, Any]) -> tuple[SizeAttribute, ...]:
    """Convolutions that lose channels from every one of their groups keep the number of groups."""
    result = []
    for leaf, groups in found.kept_groups.items():
        path = names[leaf].split("/", 1)[1].rpartition("/")[0]
        if path in layers and layers[path].grouped:
            result.append(SizeAttribute(path, "feature_group_count", groups))
    return tuple(dict.fromkeys(result))


def _axes(group: Group, topology: Topology) -> list[tuple[str, int, int]]:
    """(leaf, axis, length) of the axes that belong entirely to a group, those that produce it first."""
    whole = [m for m in group.members if m.units is not None and (m.units >= 0).all()]
    ordered = sorted(whole, key=lambda m: m.consumes)
    return [(m.leaf, m.axis, topology.shapes[m.leaf][m.axis]) for m in ordered if m.units is not None]


def _units_left(number: int, turn: int, size: int, shrinks: bool) -> np.ndarray:
    """The units of a group to keep in a trial, (size,) bool.

    Every group loses its first and its last unit, since code may index from either end; it loses more units in its
    first half than in its second, and not as many as the group before it, since even losses may go unnoticed. A small
    group has too few units for that: it loses its first unit, or most of its last ones (one may go unnoticed, 7 // 2 is
    6 // 2), in turns given by the bits of its number, so that of any two groups each shrinks alone in some turn.
    """
    keep = np.ones(size, bool)
    if shrinks and size < _SMALL:
        bit, value = divmod(turn, 2)
        keep[slice(max(2, size // 3) if size > 2 else 1, None) if bit % 2 else 0] = (number >> bit) % 2 != value
    elif shrinks:
        more = size // 4 - 1 + (number + turn) % (size // 4 - 1)
        inner = np.random.default_rng(number).choice(size // 2 - 2, more, replace=False)
        keep[[0, 1, *(2 + inner), -1]] = False
    return keep


def _mismatch(
    network: Network,
    found: Analysis,
    keep: Any,
    left: np.ndarray,
    variables: Any,
    rescales: Mapping[tuple[int, ...], RescaleCheck],
) -> str | None:
    """Why the module's code does not do at these sizes what the analysis predicted; None if it does."""
    try:
        student = network.student(keep)
        jaxpr = network.adapter.jaxpr(student, variables, network.inputs, network.kwargs)
    except Exception as error:  # the user's code may raise anything when a size changes
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        line = line_of(frames[::-1])
        return f"the model's code needs this size{f', at {line}' if line else ''} ({message[:120]})"
    return size_check.find_mismatch(
        found, reanalyze(flatten_jaxpr(jaxpr), found.labels.kept(left), len(network.topology.shapes)), left, rescales
    )


def _sliced(topology: Topology, variables: Any, keep: Mapping[str, Any]) -> Any:
    """The variables of the student, as shapes."""
    shapes = topology.sliced_shapes(keep)
    return topology_lib.map_left(
        lambda path, leaf: jax.ShapeDtypeStruct(shapes[path], leaf.dtype), variables, topology.dropped(keep)
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
