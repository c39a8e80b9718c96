"""Who may import whom: read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdsearch_jax"

# From the lowest: a module imports only from lines above its own, or from its own line without a cycle.
# `tracing`, `models` and the other packages stand for all their modules.
LAYERS = [
    {
        "config",
        "files",
        "formatting",
        "memo",
        "storage",
        "processes",
        "preemption",
        "locks",
        "spread",
        "consensus",
        "provenance",
        "library",
        "attributes",
        "boxes",
        "functional",
        "native",
        "grouped",
        "memory",
        "tracing",
    },
    {
        "losses",
        "models",
        "prox",
        "call",
        "images",
        "foreign",
        "batches",
        "devices",
        "optimizer",
        "widths",
        "dense",
        "convolution",
        "gates",
        "equality",
    },
    {"budget", "hardware", "parts"},
    {"penalty", "front"},
    {"pretrained", "student", "examples", "streaming", "forward", "events", "metrics", "rundir", "cli"},
    {"checkpoint", "data", "feeding", "task", "tfds"},
    {"linen", "nnx", "features", "ensemble", "cache", "distilling", "steps", "rollback", "train"},
    {"trials"},
    {"network"},
    {"surgery", "evaluate", "measured", "export", "report", "baselines", "shrinking", "gated", "weights"},
    {"pruning"},
    {"given", "road"},
    {"fitting", "cutting", "delivery"},
    {"stages"},
    {"teacher", "api", "search", "retrain", "inspect", "compare"},
    {"__init__"},
]

# Of other packages, these modules import only what is named here (and the standard library).
ONLY = {
    "config": set(),
    "tracing": {"jax", "numpy", "scipy"},
    "gates": {"jax", "numpy", "scipy"},
    "equality": {"jax", "numpy"},
    "budget": {"jax", "numpy", "scipy"},
    "hardware": {"jax", "numpy", "scipy"},
    "losses": {"jax", "optax"},
    "prox": {"jax", "optax"},
    "student": {"flax", "jax", "numpy"},
    "attributes": {"flax"},
    "functional": {"flax", "jax", "numpy"},
    "nnx": {"flax", "jax"},
    "models": {"flax", "jax", "numpy"},
}

STANDARD = sys.stdlib_module_names
FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    """`kdsearch_jax.models.vgg` of its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_configs" not in path.parts}
EVERYTHING = [*FILES.values(), *sorted((PACKAGE.parent / "configs").glob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it but under TYPE_CHECKING."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(), str(path))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            for alias in node.names:
                # `from package import module` imports the module; `from module import name` the module before `import`.
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES or node.module in ("jax", "jax._src") else str(node.module))
    return found


def unit(name: str) -> str:
    """The name that stands for a module in LAYERS."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@pytest.mark.parametrize("name", FILES)
def test_lower_layers_never_import_higher_ones(name):
    assert unit(name) in RANK, f"{unit(name)} is a new module: give it a line in LAYERS"
    for other in imports(FILES[name]):
        if other.split(".")[0] == "kdsearch_jax" and unit(other) != unit(name):
            assert RANK[unit(other)] <= RANK[unit(name)], f"{name} imports {other}, which is above it"


def test_there_are_no_cycles():
    graph = {name: {o for o in imports(path) if o in FILES} - {name} for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


@pytest.mark.parametrize("name", [name for name in FILES if unit(name) in ONLY])
def test_the_core_needs_few_packages(name):
    outside = {other.split(".")[0] for other in imports(FILES[name])} - STANDARD - {"kdsearch_jax"}
    assert outside <= ONLY[unit(name)]


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.stem)
def test_nothing_private_and_nothing_that_runs_what_it_reads(path):
    for other in imports(path):
        parts = other.split(".")
        assert not (parts[0] in ("jax", "flax", "optax", "orbax") and any(p.startswith("_") for p in parts)), other
        assert parts[0] not in FORBIDDEN, other
        assert parts[0] not in ("tensorflow", "jaxopt"), other
    assert "jax._src" not in path.read_text()


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__main__")])
def test_a_module_only_defines(name):
    """At the top of a module stand imports, definitions and constants, and no statement that does something."""
    tree = ast.parse(FILES[name].read_text())
    for node in tree.body:
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        defines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        assert guard or text or isinstance(node, defines), f"{name}, line {node.lineno}: {ast.unparse(node)[:80]}"


def test_importing_everything_is_quiet(tmp_path, python):
    """In a process of its own, in an empty folder: no backend, no file, no output, no warning, nothing optional."""
    names = sorted(name for name in FILES if not name.endswith("__main__"))
    optional = ["torch", "tensorflow", "tensorflow_datasets", "grain", "matplotlib.pyplot", "tyro"]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"loaded = sorted(set({optional}) & set(sys.modules))\n"
        "assert not loaded, loaded"
    )
    # A platform that does not exist: whatever starts a backend, by making an array say, fails.
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout + done.stderr == "" and done.returncode == 0
    assert list(tmp_path.iterdir()) == []
