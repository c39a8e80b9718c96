"""Who may import whom: read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kdsearch_jax"

# From the lowest: a package imports only from those above it in this list. Commands and `__init__` come last.
ORDER = [
    "models",
    "tracing",
    "adapters",
    "pruning",
    "storage",
    "models.pretrained",
    "reporting",
    "data",
    "training",
    "distill",
    "runs",
]

# Of other packages, these import only what is named here (and the standard library).
ONLY = {
    "tracing": {"jax", "numpy", "scipy"},
    "adapters": {"flax", "jax", "numpy"},
    "pruning": {"flax", "jax", "numpy", "optax", "scipy"},
    "models": {"flax", "jax", "numpy"},
}

STANDARD = sys.stdlib_module_names
FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "tensorflow", "jaxopt"}


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


def package(name: str) -> str | None:
    """The entry of ORDER that a module belongs to; None for commands and the top level."""
    parts = name.split(".")[1:]
    if parts[:2] == ["models", "pretrained"]:
        return "models.pretrained"
    return parts[0] if parts and parts[0] in ORDER else None


def test_packages_import_one_way():
    rank = {name: number for number, name in enumerate(ORDER)}
    wrong = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imports(path)
        if other.split(".")[0] == "kdsearch_jax" and package(name) is not None
        if rank.get(package(other) or "", len(ORDER)) > rank[package(name) or ""]
    ]
    assert not wrong
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == {
        name for name in ORDER if "." not in name
    } | {"search"}


def test_there_are_no_cycles():
    graph = {name: {o for o in imports(path) if o in FILES} - {name} for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_inner_packages_need_few_others_and_nothing_private_or_unsafe():
    wrong = []
    for path in EVERYTHING:
        name = module_name(path) if PACKAGE in path.parents else path.stem
        for other in imports(path):
            top, *rest = other.split(".")
            private = top in ("jax", "flax", "optax", "orbax") and any(part.startswith("_") for part in rest)
            allowed = ONLY.get(package(name) or "")
            foreign = allowed is not None and top not in allowed | STANDARD | {"kdsearch_jax"}
            if private or foreign or top in FORBIDDEN:
                wrong.append(f"{name} imports {other}")
        if "jax._src" in path.read_text():
            wrong.append(f"{name} names jax._src")
    assert not wrong


def test_a_module_only_defines():
    """At the top of a module stand imports, definitions and constants, and no statement that does something."""
    defines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    wrong = []
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not (guard or text or isinstance(node, defines)):
                wrong.append(f"{name}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong


def test_importing_everything_is_quiet(tmp_path, python):
    """In a process of its own, in an empty folder: no backend, no file, no output, no warning, nothing optional.

    And pruning alone loads neither settings files nor storage, models or reports.
    """
    names = sorted(name for name in FILES if not name.endswith("__main__") and name.count(".") > 1)
    optional = ["torch", "tensorflow", "tensorflow_datasets", "grain", "matplotlib.pyplot", "tyro"]
    pruning = [name for name in names if name.startswith("kdsearch_jax.pruning")]
    code = (
        "import importlib, sys\n"
        f"for name in {pruning}: importlib.import_module(name)\n"
        "outer = {name.split('.')[1] for name in sys.modules if name.startswith('kdsearch_jax.')}\n"
        "assert outer <= {'pruning', 'tracing', 'adapters', 'search'}, outer\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"loaded = sorted(set({optional}) & set(sys.modules))\n"
        "assert not loaded, loaded"
    )
    # A platform that does not exist: whatever starts a backend, by making an array say, fails.
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout + done.stderr == "" and done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_0_1_are_found_with_a_warning(python):
    """The imports that programs for 0.1 use, each of what the new name has."""
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from kdsearch_jax import budget, gates, losses, surgery\n"
        "    from kdsearch_jax.config import BudgetConfig, Experiment\n"
        "    from kdsearch_jax.functional import Functional\n"
        "    from kdsearch_jax.network import trace\n"
        "    from kdsearch_jax.student import Architecture\n"
        "import kdsearch_jax as kd\n"
        "assert trace is kd.trace and kd.surgery is surgery\n"
        "assert {w.category for w in caught} == {DeprecationWarning} and len(caught) == 5, caught"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
