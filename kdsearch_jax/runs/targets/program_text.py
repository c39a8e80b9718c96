"""Reads a program that XLA has compiled for a TPU: estimated cycles, matrix operations, padding and collectives.

Every instruction of the text has its shapes with layouts (`bf16[8,32,32,20]{3,0,2,1:T(8,128)(2,1)}`: axis 3 lies
along 128 lanes, axis 0 along 8 sublanes, and both are padded to these), the scope that it comes from (`op_name`), and
the cycles that the backend's cost model expects (`estimated_cycles`). A loop's body is counted as often as the loop
runs if its condition compares a counter with a constant, and once otherwise. Cycles see padding. They ignore that
operations overlap, and they do not include collectives and custom calls.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(-?\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SMALL = 1 << 16  # bytes up to which an exchange is one of statistics, which the next layer waits for
_FREE = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
)  # hints, no work


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: result, operands, and what it calls.

    Attributes:
      kind: opcode, such as `fusion`. result: its type as text. operands: names; of a constant none.
      called: {attribute: names of computations}. value: of a constant, as text. rest: the attributes.
    """

    name: str
    kind: str
    result: str
    operands: tuple[str, ...]
    called: Mapping[str, tuple[str, ...]]
    value: str
    rest: str

    @property
    def scope(self) -> str:
        """`jit(update)/jvp(Net)/stage1/conv1/conv_general_dilated`, or ""."""
        match = _SCOPE.search(self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """The cost model's cycles; 0 where it has none."""
        match = _CYCLES.search(self.rest)
        return max(0, int(match[1])) if match else 0


@dataclass
class Scope:
    """What the operations of one scope take together.

    Attributes:
      cycles: of all. matrix: of those fusions that contain a convolution or product. elements, padded: of the arrays
        that these read and write, without and with the padding of their layouts.
    """

    cycles: float = 0.0
    matrix: float = 0.0
    elements: float = 0.0
    padded: float = 0.0


@dataclass
class ProgramCounts:
    """What a program's text says, of one device.

    Attributes:
      cycles: of everything that always runs. conditional: more, of the branches that may run, the longest of each.
      loops: loops whose number of rounds is unknown, counted once.
      scopes: {op_name: Scope}.
      matrix: {type of the operands, such as `bf16` or `bf16*f32`: [number, cycles]} of convolutions and products.
      not_bf16: scopes of convolutions and products with other operands.
      collectives: {kind: {"count", "arrays", "bytes", "small"}}; small: with at most `SMALL` bytes.
      custom_calls: {target: number} of calls that have no estimate.
    """

    cycles: float = 0.0
    conditional: float = 0.0
    loops: int = 0
    scopes: dict[str, Scope] = field(default_factory=dict)
    matrix: dict[str, list[float]] = field(default_factory=dict)
    not_bf16: list[str] = field(default_factory=list)
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    custom_calls: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def read_program(text: str) -> ProgramCounts:
    """Counts what a compiled program does; text: `compiled.as_text()`."""
    computations, entry = _parse(text)
    counts = ProgramCounts()
    for instruction, times, optional, where in _executed(computations, entry, 1.0, False, counts):
        kind = instruction.kind.removesuffix("-start")
        if kind in COLLECTIVES and not instruction.kind.endswith("-done"):
            _add_collective(counts, kind, instruction.result)
            continue
        if instruction.kind == "custom-call" and not instruction.cycles:
            target = match[1] if (match := _TARGET.search(instruction.rest)) else "unknown"
            if target not in _FREE:
                counts.custom_calls[target] = counts.custom_calls.get(target, 0) + 1
        cycles = instruction.cycles * times
        if optional:
            counts.conditional += cycles
            continue
        counts.cycles += cycles
        scope = counts.scopes.setdefault(instruction.scope, Scope())
        scope.cycles += cycles
        products = list(_products(computations, instruction, where))
        if products:
            scope.matrix += cycles
        for product, body in products:
            _add_product(counts, scope, product, body, cycles / len(products))
    return counts


# --- text -> instructions ---------------------------------------------------------------------------------------------

Body = dict[str, Instruction]


def _parse(text: str) -> tuple[dict[str, Body], str]:
    """({computation: {name: instruction}}, name of the entry)."""
    computations: dict[str, Body] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            if match := _HEAD.match(line):
                body = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            body = None
        elif match := _LINE.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            if instruction is not None:
                body[match[2]] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> Instruction | None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    match = _OPCODE.match(text, end)
    if match is None:
        return None
    close = _closing(text, match.end() - 1)
    inside, rest = text[match.end() : close], text[close + 1 :]
    called = {
        key: tuple(each.strip().lstrip("%") for each in names.strip("{}").split(","))
        for key, names in _CALLED.findall(rest)
    }
    value = inside if match[1] == "constant" else ""
    return Instruction(name, match[1], text[:end], tuple(_NAME.findall(inside)), called, value, rest)


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text) - 1


# --- what is executed, and how often ----------------------------------------------------------------------------------


def _executed(
    computations: Mapping[str, Body], name: str, times: float, optional: bool, counts: ProgramCounts
) -> Iterator[tuple[Instruction, float, bool, Body]]:
    """(instruction, how often it runs, whether it is inside a conditional, its computation)."""
    body = computations.get(name, {})
    for instruction in body.values():
        called = instruction.called
        if instruction.kind == "while":
            rounds = _rounds(computations.get(called["condition"][0], {}))
            counts.loops += rounds is None
            yield from _executed(computations, called["body"][0], times * (rounds or 1), optional, counts)
        elif instruction.kind == "conditional":
            branches = [*called.get("branch_computations", ())]
            branches += [*called.get("true_computation", ()), *called.get("false_computation", ())]
            runs = [list(_executed(computations, branch, times, True, counts)) for branch in branches]
            yield from max(runs, key=lambda run: sum(each.cycles * n for each, n, *_ in run), default=[])
        elif instruction.kind in ("call", "async-start"):
            yield instruction, times, optional, body
            for target in (*called.get("to_apply", ()), *called.get("calls", ())):
                yield from _executed(computations, target, times, optional, counts)
        else:
            yield instruction, times, optional, body


def _rounds(condition: Body) -> int | None:
    """How often a loop runs whose condition is `counter < constant`; None if it is anything else."""
    root = list(condition.values())[-1:]
    if not root or root[0].kind != "compare" or "direction=LT" not in root[0].rest or len(root[0].operands) != 2:
        return None
    limit = condition.get(root[0].operands[1])
    return int(limit.value) if limit is not None and limit.value.isdecimal() else None


# --- convolutions, products, collectives ------------------------------------------------------------------------------


def _products(
    computations: Mapping[str, Body], instruction: Instruction, body: Body
) -> Iterator[tuple[Instruction, Body]]:
    """(convolution or product, its computation) of an instruction: itself, or those fused into it."""
    if instruction.kind in ("convolution", "dot"):
        yield instruction, body
    elif instruction.kind == "fusion":
        for name in instruction.called.get("calls", ()):
            inner = computations.get(name, {})
            for each in inner.values():
                yield from _products(computations, each, inner)


def _add_product(counts: ProgramCounts, scope: Scope, product: Instruction, body: Body, cycles: float) -> None:
    operands = [body[name].result for name in product.operands[:2] if name in body]
    types = sorted({match[1] for text in operands if (match := _ARRAY.match(text))})
    entry = counts.matrix.setdefault("*".join(types), [0, 0.0])
    entry[0] += 1
    entry[1] += cycles
    if types != ["bf16"]:
        counts.not_bf16.append(product.scope)
    for text in (product.result, *operands):
        for elements, padded in map(_sizes, _ARRAY.findall(text)):
            scope.elements += elements
            scope.padded += padded


def _sizes(array: Sequence[str]) -> tuple[int, int]:
    """(elements, elements with padding) of an array as `_ARRAY` finds it."""
    shape = [int(n) for n in array[1].split(",") if n]
    padded, tile = list(shape), _TILE.search(array[3])
    order = [int(n) for n in array[2].split(",") if n]  # the axis along the lanes first
    if tile:
        for axis, step in zip(order, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            padded[axis] = -(-padded[axis] // step) * step
    return math.prod(shape), math.prod(padded)


def _add_collective(counts: ProgramCounts, kind: str, result: str) -> None:
    arrays = _ARRAY.findall(result)
    size = sum(_sizes(array)[0] * _width(array[0]) for array in arrays)
    entry = counts.collectives.setdefault(kind, dict.fromkeys(("count", "arrays", "bytes", "small"), 0))
    entry["count"] += 1
    entry["arrays"] += len(arrays)
    entry["bytes"] += size
    entry["small"] += size <= SMALL


def _width(kind: str) -> int:
    """Bytes of one element."""
    bits = re.search(r"\d+", kind)
    return 1 if bits is None else max(1, int(bits[0]) // 8)
