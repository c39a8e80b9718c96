"""Rules for loops and conditionals, whose bodies are analyzed like the rest of the program."""

from __future__ import annotations

from typing import Any

from kdsearch_jax.tracing.analysis import Analysis, Rule, RuleContext
from kdsearch_jax.tracing.labels import FIXED, AbstractValue, combine, has_labels
from kdsearch_jax.tracing.program import Program, flatten_jaxpr


def _scan(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Analyzes the body until the carry's abstract value is a fixed point, and joins what it returns to what entered.

    Only the last pass counts: in the first one, a carry of zeros has no labels yet.
    """
    p = ctx.op.params
    body = flatten_jaxpr(p["jaxpr"], ctx.op)
    ins = [ctx.analysis.resolve_splits(v) for v in ins]
    # Operands are constants, carry and slices; results are carry and slices. Slices have one more axis outside of the
    # body, by which they are counted here, since the primitive's parameters differ between versions of JAX.
    sliced = sum(len(ctx.shape(i)) > len(body.shape(v)) for i, v in enumerate(body.inputs))
    stacked = sum(len(ctx.out_shape(i)) > len(body.shape(v)) for i, v in enumerate(body.outputs))
    carried = len(body.outputs) - stacked
    fixed = len(body.inputs) - sliced - carried
    xs = []
    for v in ins[fixed + carried :]:
        ctx.freeze(v.axes[0], "stacked over the steps of")
        xs.append(v._replace(axes=v.axes[1:]))
    carry = list(ins[fixed : fixed + carried])
    ctx.count(2)  # its counter
    while True:
        before = _snapshot(ctx.analysis)
        outs = _body(ctx, body, ins[:fixed] + carry + xs, ctx.times * p["length"])
        entered, carry = carry, _next_carry(ctx, carry, outs[:carried])
        if [_outline(v) for v in entered] == [_outline(v) for v in carry]:
            _unroll(ctx.analysis, before, p["length"], int(p["unroll"]))
            return carry + [v._replace(axes=(FIXED, *v.axes), number=None) for v in outs[carried:]]
        _rewind(ctx.analysis, before)


def _while(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Like `_scan`. The number of iterations is unknown, so products are counted once, as XLA does."""
    p = ctx.op.params
    test, body = flatten_jaxpr(p["cond_jaxpr"], ctx.op), flatten_jaxpr(p["body_jaxpr"], ctx.op)
    ctx.analysis.uncounted.add(ctx.op.name)
    ins = [ctx.analysis.resolve_splits(v) for v in ins]
    tested, fixed = ins[: p["cond_nconsts"]], ins[p["cond_nconsts"] : p["cond_nconsts"] + p["body_nconsts"]]
    carry = ins[len(tested) + len(fixed) :]
    while True:
        before = _snapshot(ctx.analysis)
        _body(ctx, test, tested + carry, ctx.times)
        entered, carry = carry, _next_carry(ctx, carry, _body(ctx, body, fixed + carry, ctx.times))
        if [_outline(v) for v in entered] == [_outline(v) for v in carry]:
            _freeze_sites(ctx, before)
            return carry
        _rewind(ctx.analysis, before)


def _next_carry(ctx: RuleContext, carry: list[AbstractValue], outs: list[AbstractValue]) -> list[AbstractValue]:
    """What enters the next iteration: what entered this one, joined to what it returned."""
    return [
        combine([a, b], [ctx.analysis.merge([x, y], ctx) for x, y in zip(a.axes, b.axes, strict=True)])
        for a, b in zip(carry, outs, strict=True)
    ]


def _unroll(analysis: Analysis, before: tuple[dict[str, int], float, float], length: int, unroll: int) -> None:
    """Adds the FLOPs of an unrolled loop: XLA counts a loop's body once, an unrolled one as often as it is repeated."""
    _, flops, foldable_flops = before
    more = (unroll + length % unroll if unroll < length else length) - 1
    if unroll > 1 and more > 0:
        analysis.flops += more * (analysis.flops - flops)
        analysis.foldable_flops += more * (analysis.foldable_flops - foldable_flops)


def _cond(ctx: RuleContext, ins: list[AbstractValue]) -> list[AbstractValue]:
    """Analyzes every branch, joins their results, and adds up their costs."""
    ctx.analysis.uncounted.add(ctx.op.name)
    ins, before = [ctx.analysis.resolve_splits(v) for v in ins], _snapshot(ctx.analysis)
    results = [_body(ctx, flatten_jaxpr(body, ctx.op), ins[1:], ctx.times) for body in ctx.op.params["branches"]]
    _freeze_sites(ctx, before)
    return [
        combine([ins[0], *same], [ctx.analysis.merge(axes, ctx) for axes in zip(*(v.axes for v in same), strict=True)])
        for same in zip(*results, strict=True)
    ]


def _body(ctx: RuleContext, body: Program, ins: list[AbstractValue], times: float) -> list[AbstractValue]:
    values: list[AbstractValue | None] = [None] * len(body.avals)
    for number, value in zip(body.inputs, ins, strict=True):
        values[number] = value
    return [ctx.analysis.resolve_splits(v) for v in ctx.run(body, values, ctx.analysis, times)]


def _freeze_sites(ctx: RuleContext, before: tuple[dict[str, int], float, float]) -> None:
    """Freezes units that are mixed in bodies which the gated network cannot correct."""
    for site in ctx.analysis.sites[before[0]["sites"] :]:
        ctx.freeze(site.labels, "its units are mixed inside of")
    del ctx.analysis.sites[before[0]["sites"] :]


def _outline(value: AbstractValue) -> tuple[Any, ...]:
    """What is known about a value, except for the identity of its labels."""
    return (*value._replace(summed=())[1:], *("labels" if has_labels(axis) else axis for axis in value.axes))


_LISTS = ("joins", "freezes", "contracted", "produced", "sites", "read_together", "kind_marks", "terms", "ops",
          "contractions", "products")  # fmt: skip


def _snapshot(analysis: Analysis) -> tuple[dict[str, int], float, float]:
    """The extent of the analysis so far."""
    return {name: len(getattr(analysis, name)) for name in _LISTS}, analysis.flops, analysis.foldable_flops


def _rewind(analysis: Analysis, before: tuple[dict[str, int], float, float]) -> None:
    """Discards what was added since `before`."""
    lengths, analysis.flops, analysis.foldable_flops = before
    for name, length in lengths.items():
        del getattr(analysis, name)[length:]


RULES: dict[str, Rule] = {"scan": _scan, "while": _while, "cond": _cond}
