"""A jaxpr as a flat list of operations, with calls inlined, dead code removed and values numbered.

`jit`, `remat`, `custom_jvp` and similar primitives only group equations, so they are replaced by their bodies. Loops
keep their body (`Op.params["jaxpr"]`), and an einsum of three or more operands becomes one operation (`einsum`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax.core
import jax.extend
import jax.numpy as jnp
import numpy as np

from kdsearch_jax.tracing import einsum

_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "xla_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", "named_call", "composite", "custom_vmap_call",
}  # fmt: skip
_PASSED_THROUGH = ("contextlib.py", "functools.py")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")


@dataclass(frozen=True)
class Op:
    """One equation.

    Attributes:
      inputs, outputs: numbers of the values it reads and returns.
      scope: the path of the module that it belongs to.
      tracebacks: of the operation and of the calls around it, innermost first. The traceback of an operation in a
        jitted function, such as `jnp.linalg.norm`, ends at that function.
      path: its number among the equations of the jaxpr, after those of the calls and loops around it.
    """

    name: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str
    tracebacks: tuple[Any, ...] = ()
    path: tuple[int, ...] = ()

    def line(self) -> str | None:
        """The line of the model's code that the operation comes from, as file:line; None where it is unknown."""
        return line_of((f.file_name, f.line_num) for traceback in self.tracebacks for f in traceback.frames)

    def where(self) -> str:
        """The operation with its module and line of code, where these are known."""
        line = self.line()
        scope = "/".join(part for part in self.scope.split("/") if not part.endswith("()"))  # as in "vmap()"
        return self.name + (f" of {scope}" if scope else "") + (f" ({line})" if line else "")


def line_of(frames: Iterable[tuple[str, int]]) -> str | None:
    """The innermost frame in the model's own code, as file:line.

    Args:
      frames: (file, line), innermost first.
    """
    roots = [_root(sys.modules[name]) for name in ("jax", "jaxlib", "flax") if name in sys.modules]
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    for file, line in frames:
        if file == os.path.join(package, "pruning", "network.py"):
            return None  # the frames outside of it belong to the caller of `trace`
        ours = file.startswith(package) and not file.startswith(os.path.join(package, "models"))
        if not ours and not file.startswith((*roots, "<")) and os.path.basename(file) not in _PASSED_THROUGH:
            return f"{os.sep.join(file.split(os.sep)[-2:])}:{line}"
    return None


def _root(module: Any) -> str:
    return os.path.dirname(module.__file__ or "") + os.sep


@dataclass
class Program:
    """Operations on numbered values: `avals[v]` has shape and dtype, `constants[v]` the array where it is known."""

    ops: list[Op] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def new(self, aval: Any) -> int:
        """Adds a value and returns its number."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.avals[value].shape)


def flatten_jaxpr(closed: Any, inside: Op | None = None) -> Program:
    """The program of a ClosedJaxpr, without operations that no output needs.

    Args:
      inside: the loop whose body it is.
    """
    program = Program()
    program.inputs = [program.new(var.aval) for var in closed.jaxpr.invars]
    around = inside or Op("", {}, (), (), "")
    program.outputs = _inline(program, closed.jaxpr, closed.consts, program.inputs, replace(around, scope=""))
    _drop_dead(program)
    einsum.merge_einsums(program)
    return program


def called_body(eqn: Any) -> tuple[Any, Any, int] | None:
    """(jaxpr, constants, first operand) of what a call computes, where an equation only groups others; else None."""
    name, first = eqn.primitive.name, 0
    body = next((eqn.params[key] for key in _BODIES if key in eqn.params), None) if name in _CALLS else None
    platforms = eqn.params.get("branches_platforms") if name == "cond" else None
    if platforms and None in platforms:  # `jax.lax.platform_dependent`: all branches compute the same
        body, first = eqn.params["branches"][list(platforms).index(None)], 1
    if body is None:
        return None
    return (body.jaxpr, body.consts, first) if hasattr(body, "consts") else (body, (), first)


def _inline(program: Program, jaxpr: Any, consts: Any, inputs: list[int], around: Op) -> list[int]:
    """Adds the operations of a jaxpr to the program; around: the call or loop that it belongs to."""
    numbers = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        numbers[var] = program.new(var.aval)
        _set_constant(program, numbers[var], const)

    def number(atom: Any) -> int:
        if isinstance(atom, jax.extend.core.Literal):
            value = program.new(atom.aval)
            _set_constant(program, value, atom.val)
            return value
        return numbers[atom]

    scope, callers = around.scope, around.tracebacks
    for index, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        here = str(eqn.source_info.name_stack)
        here = f"{scope}/{here}" if scope and here else scope or here
        tracebacks = (eqn.source_info.traceback, *callers) if eqn.source_info.traceback else callers
        ins = [number(atom) for atom in eqn.invars]
        path = (*around.path, index)
        if (body := called_body(eqn)) is not None:
            inner, inner_consts, first = body
            call = Op(name, {}, (), (), here, tracebacks, path)
            outs = _inline(program, inner, inner_consts, ins[first:], call)
            numbers.update(zip(eqn.outvars, outs, strict=True))
            continue
        outs = [program.new(var.aval) for var in eqn.outvars]
        numbers.update(zip(eqn.outvars, outs, strict=True))
        program.ops.append(Op(name, eqn.params, tuple(ins), tuple(outs), here, tracebacks, path))
    return [number(atom) for atom in jaxpr.outvars]


def _set_constant(program: Program, value: int, constant: Any) -> None:
    extended = jnp.issubdtype(program.avals[value].dtype, jax.dtypes.extended)  # a random key has no array
    if not extended and not isinstance(constant, jax.core.Tracer):
        program.constants[value] = np.asarray(constant)


def _drop_dead(program: Program) -> None:
    needed = set(program.outputs)
    live = []
    for op in reversed(program.ops):
        if needed.intersection(op.outputs):
            live.append(op)
            needed.update(op.inputs)
    program.ops = live[::-1]
