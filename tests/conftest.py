"""The test session: warnings are errors (pyproject.toml), seeds are fixed, nothing is fetched and nothing is shown."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Before anything imports jax or matplotlib. Commands started by tests find the package in a checkout not installed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")) if part
)

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("default", deadline=None, max_examples=20)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else os.environ.get("HYPOTHESIS_PROFILE", "default"))

# An array of rank 1 silently broadcast against a matrix has hidden many a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = ("stages", "resume", "compare", "api", "configs", "random_networks", "train")  # files, test_….py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: of two workers none is then left alone with one of them at the end."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """What one test has compiled the next need not; of this session and process only.

    JAX writes its cache files in place: a process killed meanwhile, as some tests do, leaves half of one behind.
    """
    with tempfile.TemporaryDirectory(prefix="kdsearch-xla-", ignore_cleanup_errors=True) as directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def quick_compilation():
    """XLA without most of its optimisations: for tests that compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key of the test's own: the same in every session, another in every test."""
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(request.node.name)) % 2**32
    return jax.random.key(seed)


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parent.parent


@pytest.fixture
def python() -> str:
    """The interpreter that commands are to be started with."""
    return sys.executable


@pytest.fixture
def full_compilation():
    """XLA with its optimisations, in a module that does without: on some CPUs a gradient is coarse otherwise."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
