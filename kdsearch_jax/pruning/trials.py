"""Trial cuts: which groups the model's own code can shrink, and what has to follow them.

The walk reads a network at one set of sizes. Its author may have written a size down: `reshape(b, n, 4, 16)`,
`self.heads`, `split(x, 2)`. So the student's code is traced with units removed and compared with what the walk foresaw
(`tracing.size_check`). Where a set of groups fails, the ones at fault are found by bisection, and for each of them, in
turn:

1. *Follow.* A whole number that one of the user's modules holds is set to the group's new size (`Follow`).
2. *Pair.* Parts that the code treats alike, such as the halves of `split(x, 2)`, are joined index by index, so that
   they stay equally long (`tracing.analysis.SplitSite`). The walk then has to be repeated.
3. *Freeze.* The group stays whole, with the error of the trial that it failed by itself.

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
from kdsearch_jax.tracing.topology import Group, Topology

if TYPE_CHECKING:
    from kdsearch_jax.pruning.network import Network

Pairing = SplitSite | AxisTie

_SMALL = 12  # units; a smaller group has no room for the cuts of `_units_left`
_CANDIDATES = 8  # numbers to try for one group, and as many sets of them


@dataclass(frozen=True)
class Follow:
    """A number in the user's own code that is a size: `name` of the module at `path` is `times / over` of an axis.

    leaf, axis: the axis of a parameter whose length it follows; "" for a number that keeps its value, `times`.
    """

    path: str
    name: str
    times: int
    over: int = 1
    leaf: str = ""
    axis: int = 0

    def value(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The number, where parameters have these shapes."""
        return self.times if not self.leaf else shapes[self.leaf][self.axis] * self.times // self.over


@dataclass(frozen=True)
class Verdict:
    """What the trials found.

    follows: numbers that follow groups; frozen: {group: reason}. Where there is something to pair or to release,
    nothing else counts, and the walk is to be repeated.
    """

    follows: tuple[Follow, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    pair: frozenset[Pairing] = frozenset()
    release: frozenset[Pairing] = frozenset()


def judge(network: Network, found: Analysis, variables: Any, released: Collection[Pairing]) -> Verdict:
    """Finds the groups that the network's code cannot shrink.

    Args:
      network: not yet tried; found: the walk that its topology comes from; variables: its shapes.
      released: pairings that did not help.
    """
    trials = _Trials(network, found, variables)
    free = [group.name for group in network.topology.groups if group.kind != "branches"]
    frozen: dict[str, str] = {}
    while free and (reason := trials.failure(free)):
        name, partner, reason = _culprit(trials, free, reason)
        together = [name] if partner is None else [name, partner]
        if trials.follow(name, together):
            _follow_alike(trials, name, free)
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
    return Verdict(tuple(trials.follows), frozen)


def _paired_or_released(
    trials: _Trials, name: str, free: Sequence[str], released: Collection[Pairing]
) -> Verdict | None:
    """What to pair for a group that fails, or what was paired for it without help; None where it is to be frozen."""
    touched, paired = trials.sites(name), set(trials.found.paired)
    if new := (alike(touched, trials.found) | trials.ties(name, free)) - paired - set(released):
        return Verdict(pair=frozenset(new))
    if touched & paired:
        return Verdict(release=frozenset(touched & paired))
    return None


def _culprit(trials: _Trials, free: Sequence[str], reason: str) -> tuple[str, str | None, str]:
    """(a group that fails its trial, the group without which it does not, the reason), of a set that fails."""
    prefix, reason = _shortest(lambda n: trials.failure(free[:n]), len(free), reason)
    name = free[prefix - 1]
    if why := trials.failure([name]):
        return name, None, why
    others, reason = _shortest(lambda n: trials.failure([*free[:n], name]), prefix - 1, reason)
    return name, free[others - 1], reason


def _shortest(failure: Callable[[int], str | None], wrong: int, reason: str) -> tuple[int, str]:
    """The smallest n up to `wrong`, which fails, for which n fails and n - 1 does not; and its reason."""
    intact = 0
    while wrong - intact > 1:
        middle = (intact + wrong) // 2
        why = failure(middle)
        intact, wrong, reason = (intact, middle, why) if why else (middle, wrong, reason)
    return wrong, reason


def _failing(trials: _Trials, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(group, reason) of those that fail by themselves; one trial where none does."""
    if len(names) > 1 and trials.failure(names) is None:
        return
    for name in names:
        if why := trials.failure([name]):
            yield name, why


def _follow_alike(trials: _Trials, name: str, free: Sequence[str]) -> None:
    """Lets the numbers of layers that are named alike follow their groups, as they did for `name`, without a trial.

    The trial of all groups that comes next tells where that is wrong.
    """
    found = {(each.name, _pattern(each.path)) for each in trials.follows if trials.owner.get(each) == name}
    for other in free:
        if other != name and _pattern(other) == _pattern(name):
            near: dict[tuple[str, str], Follow] = {}
            for each in trials.candidates(other):
                near.setdefault((each.name, _pattern(each.path)), each)
            for each in (near[key] for key in found & set(near)):
                if not trials.taken(each):
                    trials.add(each, other)


class _Trials:
    """Trials of one network. follows: the numbers that follow a group by now; owner: {follow: group}."""

    def __init__(self, network: Network, found: Analysis, variables: Any):
        self.network, self.found, self.variables = network, found, variables
        self.topology = network.topology
        self.groups = {group.name: group for group in self.topology.groups}
        self.small = [g.name for g in self.topology.groups if g.size < _SMALL and g.kind != "branches"]
        self.numbers = {g.name: i for i, g in enumerate(self.topology.groups)}
        self.numbers |= {name: i for i, name in enumerate(self.small)}
        self.follows: list[Follow] = []
        self.owner: dict[Follow, str] = {}

    def failure(self, names: Collection[str], extra: Sequence[Follow] = ()) -> str | None:
        """Why the code does not work when units of all these groups go, in any of the turns; None where it does."""
        chosen = set(names)
        turns = 2 * max(2, (len(self.small) - 1).bit_length()) if not chosen.isdisjoint(self.small) else 1
        return next((why for turn in range(turns) if (why := self._failure(chosen, turn, extra))), None)

    def _failure(self, chosen: Collection[str], turn: int, extra: Sequence[Follow]) -> str | None:
        keep = {g.name: _units_left(self.numbers[g.name], turn, g.size, g.name in chosen) for g in self.topology.groups}
        masks = self.topology.masks(keep)
        if not masks:
            return None
        network = replace(self.network, follows=(*self.network.follows, *self.follows, *extra))
        left = size_check.remaining_labels(self.found, masks, list(self.topology.shapes))
        return _unforeseen(network, self.found, keep, left, _sliced(self.topology, self.variables, keep))

    def sites(self, name: str) -> set[SplitSite]:
        """Where parts of a group's axes are treated alike."""
        component = self.found.components()
        own = np.zeros(int(component.max()) + 1, bool)
        for member in self.groups[name].members:
            if member.units is not None:
                axis = self.found.labels.axes_of(list(self.topology.shapes).index(member.leaf))[member.axis]
                own[component[axis[member.units >= 0]]] = True
        return {site for site, parts in self.found.split_sites.items() if any(own[component[p]].any() for p in parts)}

    def ties(self, name: str, free: Sequence[str]) -> set[AxisTie]:
        """What would keep a group as large as others that fail too and are served by the same number in the code."""
        group = self.groups[name]
        own = {(each.path, each.name) for each in self.candidates(name, around=True)}
        mates = [
            other
            for other in free
            if other != name
            and self.groups[other].size == group.size
            and any((each.path, each.name) in own for each in self.candidates(other, around=True))
            and self.failure([other])
        ]
        axes = [[a for a in _axes(self.groups[n], self.topology) if a[2] == group.size][:1] for n in (name, *mates)]
        first, *others = axes
        return {AxisTie(*first[0][:2], *other[0][:2]) for other in others if first and other}

    def candidates(self, name: str, around: bool = False) -> list[Follow]:
        """Numbers that may be sizes of a group: those of the modules around its layers, the innermost first.

        around: of the modules around the layer that makes the group only.
        """
        group = self.groups[name]
        axes = _axes(group, self.topology)
        layers = {m.leaf.split("/", 1)[1].rpartition("/")[0] for m in group.members}
        made = group.name.split("#")[0]

        def distance(path: str) -> tuple[int, int]:
            around = not path or f"{made}/".startswith(f"{path}/")
            near = around or any(not path or f"{layer}/".startswith(f"{path}/") for layer in layers)
            return (0 if around else 1 if near else 2), -path.count("/") - bool(path)

        found = []
        for path in sorted(self.network.layers, key=distance):
            if around and distance(path)[0]:
                break
            integers = self.network.layers[path].integers
            for attribute, number in sorted(integers.items(), key=lambda item: item[0].count(".")):
                for leaf, axis, length in axes:
                    if number in (length, group.size) and (length * number) % length == 0 and number % group.size == 0:
                        found.append(Follow(path, attribute, number, length, leaf, axis))
                        break
        return found

    def follow(self, name: str, together: Sequence[str]) -> bool:
        """Whether numbers of the user's modules, set to the group's size, make its trial pass; they are kept then."""
        free = [each for each in self.candidates(name) if not self.taken(each)]
        choices = [[each] for each in free[:_CANDIDATES]]
        choices += [[each for each in free if each.path == path] for path in dict.fromkeys(each.path for each in free)]
        choices += [[each for each in free if each.name == same] for same in dict.fromkeys(each.name for each in free)]
        several = [choice for i, choice in enumerate(choices) if len(choice) > 1 and choice not in choices[:i]]
        for chosen in [*choices[: len(free[:_CANDIDATES])], *several[:_CANDIDATES]]:
            if self.failure(together, chosen) is None:
                for each in self._needed(together, chosen):
                    self.add(each, name)
                return True
        return False

    def _needed(self, together: Sequence[str], chosen: Sequence[Follow]) -> Sequence[Follow]:
        """Those without which the trial fails; a module's own attributes rather than those of its configuration.

        A number that need not change may be another size that happens to be equal.
        """
        own = [each for each in chosen if "." not in each.name]
        if 0 < len(own) < len(chosen) and self.failure(together, own) is None:
            chosen = own
        for each in sorted(chosen, key=lambda each: -each.name.count(".")) if len(chosen) > 1 else ():
            rest = [other for other in chosen if other != each]
            if self.failure(together, rest) is None:
                chosen = rest
        return chosen

    def taken(self, candidate: Follow) -> bool:
        """Whether the number follows a group already."""
        return any((each.path, each.name) == (candidate.path, candidate.name) for each in self.follows)

    def add(self, follow: Follow, name: str) -> None:
        """Lets a number follow a group from now on."""
        self.follows.append(follow)
        self.owner[follow] = name


def alike(sites: Collection[SplitSite], found: Analysis) -> set[Pairing]:
    """All sites of the lines of code that `sites` are on; those of unknown lines, by their modules' names."""
    lines = {_pattern(site.line) if ":" not in site.line else site.line for site in sites}
    return {s for s in found.split_sites if (_pattern(s.line) if ":" not in s.line else s.line) in lines}


def idle(found: Analysis, topology: Topology) -> frozenset[SplitSite]:
    """Sites of grouped convolutions none of whose channels are in any group, as where two groups are joined whole."""
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


def kept_groups(found: Analysis, names: Sequence[str], layers: Mapping[str, Any]) -> tuple[Follow, ...]:
    """Layers whose convolution loses channels of every group keep the number of their groups."""
    result = []
    for leaf, groups in found.kept_groups.items():
        path = names[leaf].split("/", 1)[1].rpartition("/")[0]
        if path in layers and layers[path].grouped:
            result.append(Follow(path, "feature_group_count", groups))
    return tuple(dict.fromkeys(result))


def _axes(group: Group, topology: Topology) -> list[tuple[str, int, int]]:
    """(leaf, axis, length) of the axes that belong to a group wholly, where it is made first."""
    whole = [m for m in group.members if m.units is not None and (m.units >= 0).all()]
    ordered = sorted(whole, key=lambda m: m.consumes)
    return [(m.leaf, m.axis, topology.shapes[m.leaf][m.axis]) for m in ordered if m.units is not None]


def _units_left(number: int, turn: int, size: int, shrinks: bool) -> np.ndarray:
    """What to keep of a group in a trial, (size,) bool.

    Each loses its first and its last unit, since places are counted from either end; more in its first half than in its
    second, and another number than the group before it, since what is lost evenly may go unnoticed. A small group has
    no room for all that: it loses its first unit, or most of its last (7 // 2 is 6 // 2: one unit may go unnoticed), in
    turns that are the bits of its number, so that of any two groups each shrinks without the other at some turn.
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


def _unforeseen(network: Network, found: Analysis, keep: Any, left: np.ndarray, variables: Any) -> str | None:
    """Why the module's code does not do at these sizes what the walk foresaw; None where it does."""
    try:
        student = network.student(keep)
        jaxpr = network.library.jaxpr(student, variables, network.inputs, network.kwargs)
    except Exception as error:  # whatever the user's code raises when a size changes
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        line = line_of(frames[::-1])
        return f"the model's code needs this size{f', at {line}' if line else ''} ({message[:120]})"
    return size_check.find_mismatch(
        found, reanalyze(flatten_jaxpr(jaxpr), found.labels.kept(left), len(network.topology.shapes)), left
    )


def _sliced(topology: Topology, variables: Any, keep: Mapping[str, Any]) -> Any:
    """Shapes of the student's variables."""
    shapes = topology.sliced_shapes(keep)
    return topology_lib.map_left(
        lambda path, leaf: jax.ShapeDtypeStruct(shapes[path], leaf.dtype), variables, topology.dropped(keep)
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
