"""Writes docs/api.md from the docstrings of the public API: `python scripts/api_docs.py`; `--check` only compares."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import kdsearch_jax
from kdsearch_jax.runs.config import Experiment

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"

SECTIONS = {
    "Trace and search": ["trace", "Network", "Topology", "Budget", "Rule", "GatedSearch", "SearchState", "Gated"],
    "Costs that are measured": ["Table", "Part"],
    "Prune without a search": ["prune", "magnitude", "batch_norm_scale", "random", "taylor", "fisher"],
    "Students": ["Student", "fold", "verify", "save", "load", "load_safetensors", "load_stablehlo"],
    "Proximal operators": ["accelerated_proximal_l1", "soft_threshold"],
    "Losses": ["losses"],
    "Whole runs": ["search"],
    "Errors": ["BudgetError", "SurgeryError"],
}
INTRODUCTION = """# API

Generated from the docstrings by `python scripts/api_docs.py`; do not edit.

    import kdsearch_jax as kd
"""
HEADINGS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")


def page() -> str:
    """The whole page."""
    documented = [name for names in SECTIONS.values() for name in names]
    if sorted(documented) != sorted(kdsearch_jax.__all__):
        odd = sorted(set(documented) ^ set(kdsearch_jax.__all__))
        raise SystemExit(f"api_docs: SECTIONS and kdsearch_jax.__all__ differ in {', '.join(odd)}")
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts.extend(entry(f"kd.{name}", getattr(kdsearch_jax, name)))
    parts += ["## Settings\n", "Of experiments and commands: `--budget.macs 0.5` sets `budget.macs`.\n", *settings()]
    return "\n".join(parts).rstrip() + "\n"


def entry(name: str, value: Any) -> Iterator[str]:
    """The heading, signature and docstring of a function, class or module."""
    if inspect.ismodule(value):
        yield f"### `{name}`\n"
        yield markdown(inspect.getdoc(value) or "")
        for member in sorted(n for n in vars(value) if not n.startswith("_")):
            if inspect.isfunction(function := getattr(value, member)) and function.__module__.startswith(
                value.__name__
            ):
                yield from entry(f"{name}.{member}", function)
        return
    yield f"### `{name}`\n"
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        yield f"```python\n{signature(name, value)}\n```\n"
    yield markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not issubclass(value, Exception):
        for member, attribute in vars(value).items():
            if not member.startswith("_") and (text := method(member, attribute)):
                yield text


def method(name: str, attribute: Any) -> str:
    """A public method or property of a class, as an item of a list; "" for anything else."""
    if isinstance(attribute, (staticmethod, classmethod)):
        attribute = attribute.__func__
    function = getattr(attribute, "fget", None) or getattr(attribute, "func", attribute)
    if not inspect.isfunction(function) or not function.__doc__:
        return ""
    call = signature(name, function, bound=True, width=10_000) if function is attribute else name
    return f"#### `.{call}`\n\n{markdown(inspect.getdoc(function) or '')}"


def signature(name: str, value: Any, bound: bool = False, width: int = 100) -> str:
    """The call as written in the source, one argument per line if it is wider than `width`.

    bound: without `self`.
    """
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    if isinstance(node, ast.ClassDef):
        functions = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        if "__init__" not in functions:
            return layout(name, fields, "", width)
        node, bound = functions["__init__"], True
    returns = "" if node.returns is None or node.name == "__init__" else f" -> {ast.unparse(node.returns)}"
    return layout(name, arguments(node.args)[bound:], returns, width)


def arguments(args: ast.arguments) -> list[str]:
    """Each argument with its annotation and default."""
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    found = [argument(a, d) for a, d in zip(positional, defaults, strict=True)]
    if args.vararg:
        found.append(f"*{ast.unparse(args.vararg)}")
    elif args.kwonlyargs:
        found.append("*")
    found += [argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [*found, f"**{ast.unparse(args.kwarg)}"] if args.kwarg else found


def argument(node: ast.arg, default: ast.expr | None) -> str:
    """`name: annotation = default`."""
    if default is None:
        return ast.unparse(node)
    return f"{ast.unparse(node)}{' = ' if node.annotation else '='}{ast.unparse(default)}"


def layout(name: str, items: list[str], returns: str, width: int) -> str:
    """`name(items)returns`, on one line if it fits."""
    line = f"{name}({', '.join(items)}){returns}"
    if len(line) <= width:
        return line
    return "\n".join([f"{name}(", *(f"    {item}," for item in items), f"){returns}"])


def markdown(text: str) -> str:
    """A docstring with its sections as lists; indented blocks stay code."""
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        if line in HEADINGS:
            section = True
            lines += [f"**{line[:-1]}**", ""]
        elif section and re.match(r"  \S", line):
            named = re.match(r"  (\*{0,2}\w+(?:, \w+)*): (.*)", line)
            lines.append(f"- `{named[1]}`: {named[2]}" if named else f"- {line.strip()}" if starts(lines) else line)
        elif section and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def starts(lines: list[str]) -> bool:
    """Whether the next line is the first of a section."""
    return len(lines) >= 2 and lines[-1] == "" and lines[-2].startswith("**")


def settings() -> Iterator[str]:
    """A table of every record of settings in an experiment."""
    hints = get_type_hints(Experiment)
    shown: dict[type, list[str]] = {}
    for field in dataclasses.fields(Experiment):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            shown.setdefault(kind, []).append(field.name)  # type: ignore[arg-type]
    for kind, names in shown.items():
        yield f"### {', '.join(f'`{name}`' for name in names)}\n"
        yield markdown(inspect.getdoc(kind) or "")
        yield "| setting | default |\n|---|---|"
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            default = field.default_factory() if callable(field.default_factory) else field.default
            yield f"| `{names[0]}.{field.name}` | `{default!r}` |"
        yield ""


def main(arguments: list[str]) -> int:
    """Writes the page, or says whether it is current."""
    text = page()
    if "--check" in arguments:
        if PAGE.is_file() and PAGE.read_text() == text:
            return 0
        print("docs/api.md is not current: run python scripts/api_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
