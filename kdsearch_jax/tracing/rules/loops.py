"""Rules for loops and choices, whose bodies are walked like the rest."""

from __future__ import annotations

from typing import Any

from kdsearch_jax.tracing.findings import Context, Rule, Walk
from kdsearch_jax.tracing.labels import FIXED, Value, blend, labelled
from kdsearch_jax.tracing.program import Program, flatten


def _scan(c: Context, ins: list[Value]) -> list[Value]:
    """The body is walked until it is known what comes around in the carry; then all of it is joined to what entered.

    Only the last of these walks counts: in the first, a carry of zeros is still of no one's size.
    """
    p = c.op.params
    body = flatten(p["jaxpr"], c.op)
    ins = [c.found.settle(v) for v in ins]
    # Constants, carry, slices come in, carry and slices go out; what is sliced has an axis more outside. (How the
    # primitive's parameters say so differs between versions of JAX.)
    sliced = sum(len(c.shape(i)) > len(body.shape(v)) for i, v in enumerate(body.inputs))
    stacked = sum(len(c.out_shape(i)) > len(body.shape(v)) for i, v in enumerate(body.outputs))
    carried = len(body.outputs) - stacked
    fixed = len(body.inputs) - sliced - carried
    xs = []
    for v in ins[fixed + carried :]:
        c.freeze(v.axes[0], "stacked over the steps of")
        xs.append(v._replace(axes=v.axes[1:]))
    carry = list(ins[fixed : fixed + carried])
    c.count(2)  # its counter
    while True:
        before = _mark(c.found)
        outs = _body(c, body, ins[:fixed] + carry + xs, c.times * p["length"])
        entered, carry = carry, _around(c, carry, outs[:carried])
        if [_outline(v) for v in entered] == [_outline(v) for v in carry]:
            _unroll(c.found, before, p["length"], int(p["unroll"]))
            return carry + [v._replace(axes=(FIXED, *v.axes), number=None) for v in outs[carried:]]
        _forget(c.found, before)


def _while(c: Context, ins: list[Value]) -> list[Value]:
    """As a scan. How often it turns is not known before it runs, so its products are counted once, as XLA does."""
    p = c.op.params
    test, body = flatten(p["cond_jaxpr"], c.op), flatten(p["body_jaxpr"], c.op)
    c.found.uncounted.add(c.op.name)
    ins = [c.found.settle(v) for v in ins]
    tested, fixed = ins[: p["cond_nconsts"]], ins[p["cond_nconsts"] : p["cond_nconsts"] + p["body_nconsts"]]
    carry = ins[len(tested) + len(fixed) :]
    while True:
        before = _mark(c.found)
        _body(c, test, tested + carry, c.times)
        entered, carry = carry, _around(c, carry, _body(c, body, fixed + carry, c.times))
        if [_outline(v) for v in entered] == [_outline(v) for v in carry]:
            return carry
        _forget(c.found, before)


def _around(c: Context, carry: list[Value], outs: list[Value]) -> list[Value]:
    """What enters the next turn of a loop: what entered this one, joined to what it returned."""
    return [
        blend([a, b], [c.found.merge([x, y], c) for x, y in zip(a.axes, b.axes, strict=True)])
        for a, b in zip(carry, outs, strict=True)
    ]


def _unroll(found: Walk, before: tuple[dict[str, int], float, float], length: int, unroll: int) -> None:
    """XLA counts a loop's body once, and an unrolled one as often as it is written out."""
    _, flops, foldable = before
    more = (unroll + length % unroll if unroll < length else length) - 1
    if unroll > 1 and more > 0:
        found.flops += more * (found.flops - flops)
        found.foldable += more * (found.foldable - foldable)


def _cond(c: Context, ins: list[Value]) -> list[Value]:
    """Each of the branches is walked, and what they return is joined; the costs of all are added up."""
    c.found.uncounted.add(c.op.name)
    ins = [c.found.settle(v) for v in ins]
    results = [_body(c, flatten(body, c.op), ins[1:], c.times) for body in c.op.params["branches"]]
    return [
        blend([ins[0], *same], [c.found.merge(axes, c) for axes in zip(*(v.axes for v in same), strict=True)])
        for same in zip(*results, strict=True)
    ]


def _body(c: Context, body: Program, ins: list[Value], times: float) -> list[Value]:
    values: list[Value | None] = [None] * len(body.avals)
    for number, value in zip(body.inputs, ins, strict=True):
        values[number] = value
    return [c.found.settle(v) for v in c.run(body, values, c.found, times)]


def _outline(value: Value) -> tuple[Any, ...]:
    """What is known of a value, but for whose the labels are."""
    return (*value[1:], *("labels" if labelled(axis) else axis for axis in value.axes))


_LISTS = ("pairs", "freezes", "reads", "alongside", "kinds", "terms", "steps", "orders")


def _mark(found: Walk) -> tuple[dict[str, int], float, float]:
    """How much had been found."""
    return {name: len(getattr(found, name)) for name in _LISTS}, found.flops, found.foldable


def _forget(found: Walk, before: tuple[dict[str, int], float, float]) -> None:
    """Takes back what was found since `before`."""
    lengths, found.flops, found.foldable = before
    for name, length in lengths.items():
        del getattr(found, name)[length:]


RULES: dict[str, Rule] = {"scan": _scan, "while": _while, "cond": _cond}
