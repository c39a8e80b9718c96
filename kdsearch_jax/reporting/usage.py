"""How to use the student: the lines of code, what they are fed, and the files that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdsearch_jax import storage
from kdsearch_jax.reporting import files
from kdsearch_jax.reporting.markup import code, escape, paragraph, table
from kdsearch_jax.reporting.record import Run
from kdsearch_jax.reporting.results import size

_FILES = {
    "student.safetensors": "weights, with flat names, for any framework",
    "student.stablehlo": "the whole network, any batch size; needs JAX alone and no code of the model",
    "architecture.json": "what was found, in plain JSON",
}


def use(run: Run) -> str:
    """The section of a run."""
    path = student_path(run)
    here = path.is_absolute() and path.is_relative_to(Path.cwd())
    shown = str(path.relative_to(Path.cwd())) if here else storage.display_paths(str(path))
    architecture = run.architecture or {}
    if (call := architecture.get("call")) is not None:
        lines, text = _call(shown, architecture, call)
    else:
        lines, text = _images(shown, architecture, _info(path))
    if not path.is_dir():
        text += " This works once the run has written its student."
    others = sorted(p for p in run.directory.glob("student-*") if p.is_dir() and p != path)
    more = paragraph(f"The students of the other budgets lie beside it: {', '.join(p.name for p in others)}.")
    return code(lines) + paragraph(text) + (more if others else "") + _files(path)


def student_path(run: Run) -> Path:
    """The directory of the student; of a front, of its smallest."""
    path = run.directory / "student"
    if path.is_dir() or run.front is None or not run.front.points:
        return path
    name = str(run.front.points[-1].get("name", ""))
    return run.directory / name.replace("at-", "student-", 1) if Path(name).name == name else path


def _info(path: Path) -> dict[str, Any]:
    info = ((files.json_object(path / "network.json") or {}).get("payload") or {}).get("info")
    return info if isinstance(info, dict) else {}


def _images(student: str, architecture: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[str, str]:
    lines = _load(student, architecture)
    lines += "logits = module.apply(variables, images)" + _or_nnx(architecture, "images")
    sizes = ", ".join(map(str, ("batch", *(architecture.get("input_shape") or ["height", "width", "channels"]))))
    if not (info.get("mean") and info.get("std")):
        return lines, f"images: float32 ({sizes}), normalised as the training images were."
    mean, std = (", ".join(f"{value:.4g}" for value in info[key]) for key in ("mean", "std"))
    scale = info.get("scale") if isinstance(info.get("scale"), int | float) else 255
    text = (
        f"images: float32 ({sizes}), (value / {scale:g} − mean) / std of values from 0 to {scale:g}, with "
        f"mean ({mean}) and std ({std}), one a channel."
    )
    names = info.get("class_names") or []
    if names and len(names) <= 20:
        text += f" The logits are those of {', '.join(map(str, names))}."
    return lines, text


def _call(student: str, architecture: Mapping[str, Any], call: Mapping[str, Any]) -> tuple[str, str]:
    """(code, sentence) for a network that is not fed one image."""
    given = str(architecture.get("model", "")).startswith("given:")
    static = [f"{name}={value!r}" for name, value in call.get("eval", {}).items()]
    arguments = ", ".join(["variables", *call.get("arguments", []), *static])
    own = arguments.removeprefix("variables").removeprefix(", ")
    lines = _load(student, architecture) + f"outputs = module.apply({arguments})" + _or_nnx(architecture, own)
    taken = "; ".join(f"{name}: {json.dumps(spec)} an example" for name, spec in call.get("inputs", {}).items())
    return lines, f"It takes {taken}." + (" net is the module that was searched." if given else "")


def _load(student: str, architecture: Mapping[str, Any]) -> str:
    """The lines that load the student; a module object is brought along, a package of somebody's may be imported."""
    model = str(architecture.get("model", ""))
    more = ", module=net" if model.startswith("given:") else ", trust_code=True" if ":" in model else ""
    return f"import kdsearch_jax\n\nmodule, variables = kdsearch_jax.load({student!r}{more})\n"


def _or_nnx(architecture: Mapping[str, Any], arguments: str) -> str:
    """How a module that may be an nnx.Module is called instead; the package's own models are Linen modules."""
    return f"  # an nnx.Module: module({arguments})" if ":" in str(architecture.get("model", "")) else ""


def _files(path: Path) -> str:
    found = [(name, said) for name, said in _FILES.items() if (path / name).is_file()]
    rows = [[escape(n), size((path / n).stat().st_size), escape(said)] for n, said in found]
    return table("Files of the student", ["File", "Size", "What it is"], rows, spoken=False) if rows else ""
