"""A teacher's weights from wherever users keep them, as variables of a module.

    directory of Orbax      a pytree as `StandardCheckpointer` or `PyTreeCheckpointer` saves it, or the newest step of a
                            `CheckpointManager`
    .safetensors            arrays under flat names, "params/conv/kernel"; or PyTorch's names
    .msgpack                `flax.serialization.to_bytes`
    .pth, .pt, .th          PyTorch (see `kdsearch_jax.models.pretrained`)

The tree may be {"params": …, "batch_stats": …}, the parameters alone, a train state that has them among other things,
or an NNX state. Every array of the module must be there in its shape; optimiser states and the like are left alone.
Where something is missing, the error lists what the module needs and what the file has. No code of a file is run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from kdsearch_jax import storage
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.boxes import unboxed
from kdsearch_jax.adapters.call_spec import CallSpec
from kdsearch_jax.adapters.devices import gathered
from kdsearch_jax.models import pretrained
from kdsearch_jax.pruning.network import adapter_for
from kdsearch_jax.storage import safe_readers
from kdsearch_jax.storage.arrays import OneByOne, unflatten
from kdsearch_jax.storage.files import DamagedError, line, memory
from kdsearch_jax.tracing.messages import nearest

LISTED = 8  # entries of each side of a mismatch
_TORCH = (".pth", ".pt", ".th")
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding", "checkpoint")  # of Orbax's directories

log = logging.getLogger(__name__)


def load(path: str | Path, module: Any, call: CallSpec, input_shape: tuple[int, ...] = ()) -> dict[str, Any]:
    """The variables of `module` with the weights at `path`.

    Args:
      path: a file or a directory, see above.
      call: how the module is called, by which its variables are known.
      input_shape: of one image, for weights of PyTorch.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it cannot be read, or does not fit the module; lists both sides.
    """
    path = storage.local(path, "teacher_from")
    if not path.exists():
        raise FileNotFoundError(f"teacher_from: {path} does not exist")
    if _is_torch(path):
        return pretrained.load_torch(path, module, input_shape)
    return fit(read(path), module, call, str(path))


def _is_torch(path: Path) -> bool:
    if path.is_dir():
        return pretrained.is_huggingface(path)
    if path.suffix == ".safetensors":
        return not any(name.startswith("params/") for name in _read(safe_readers.read_safetensors, path)[0])
    return path.suffix in _TORCH


def read(path: Path) -> Any:
    """The pytree of arrays at `path`, whatever is in it.

    Raises:
      ValueError: it cannot be read.
    """
    if path.is_dir():
        return _read_orbax(path)
    if path.suffix == ".safetensors":
        return unflatten(_read(safe_readers.read_safetensors, path)[0])
    if path.suffix == ".msgpack":
        return _read(safe_readers.read_msgpack, path)
    raise ValueError(
        f"teacher_from: {path} is of no kind that is known; give a directory (of a run, of Orbax, of Hugging Face) or "
        f"a file .safetensors, .msgpack, {', '.join(_TORCH)}"
    )


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    try:
        return read(path)
    except DamagedError as error:
        raise ValueError(f"teacher_from: {error}") from error


def _read_orbax(path: Path) -> Any:
    """The pytree that Orbax saved, as NumPy arrays: devices and shardings of then are of no interest."""
    for folder in _candidates(path.absolute()):
        try:
            safe_readers.check_directory(folder)
            with (
                warnings.catch_warnings(action="ignore", category=UserWarning),
                ocp.Checkpointer(_handler()) as store,
            ):
                found: Any = store.metadata(folder).item_metadata
                tree = getattr(found, "tree", found)
                safe_readers.check_declared(tree, min(safe_readers.LARGEST, memory()))
                arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                return store.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
        except Exception as error:  # TensorStore's, Orbax's, the file system's
            told = f"{folder} cannot be read by Orbax ({line(error)}); is it complete?"
            raise ValueError(f"teacher_from: {told}") from error
    raise ValueError(
        f"teacher_from: {path} is no directory that is known: neither of a run or a network (network.json), nor of "
        "Orbax (_METADATA), nor of Hugging Face (config.json)"
    )


class _InTurn(OneByOne):
    """JAX's arrays as NumPy's: one after the other, and nobody asks on which devices they were."""

    def typestr(self) -> str:
        return ocp.type_handlers.ArrayHandler().typestr()


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax for whatever a pytree may hold; an error in one array leaves no other half-read."""
    kinds, scalar = ocp.type_handlers, ocp.type_handlers.ScalarHandler()
    registry = kinds.create_type_handler_registry(
        (int, scalar), (float, scalar), (bytes, scalar), (np.number, scalar), (str, kinds.StringHandler()),
        (np.ndarray, OneByOne()), (jax.Array, _InTurn()),
    )  # fmt: skip
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _candidates(path: Path) -> Iterator[Path]:
    """The directories of a pytree meant by `path`: itself, an item of it, or one of the newest step."""
    steps = sorted((p for p in path.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    if not any((path / mark).exists() for mark in _MARKS[:1] + _MARKS[2:]):
        for folder in [*steps[::-1][:1], path]:
            names = ("default", "state", "model", "params", "items")
            yield from (folder / name for name in names if _is_tree(folder / name))
            if folder != path and _is_tree(folder):
                yield folder
    if _is_tree(path):
        yield path


def _is_tree(path: Path) -> bool:
    return path.is_dir() and ((path / "_METADATA").is_file() or (path / "manifest.ocdbt").is_file())


# --- fitting --------------------------------------------------------------------------------------------------------


def fit(tree: Any, module: Any, call: CallSpec, source: str) -> dict[str, Any]:
    """What of `tree` are the module's variables, without boxes.

    Raises:
      ValueError: nothing in it fits; lists the differences of what comes nearest.
    """
    shapes = adapter_for(module).abstract_variables(module, call.example(2), call.keywords(module, train=False))
    needed: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(stored(shapes))
    readings = [_reading(part, needed) for part in _parts(_plain(unboxed(tree)))]
    best = max(readings, key=lambda found: sum(_same(found.get(path), leaf) for path, leaf in needed.items()))
    wrong = [path for path, leaf in needed.items() if not _same(best.get(path), leaf)]
    if wrong:
        raise ValueError(_mismatch(source, needed, best, wrong))
    for path, leaf in needed.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.issubdtype(best[path].dtype, jnp.floating):
            raise ValueError(
                f"teacher_from: {source}: {'/'.join(path)} is of {best[path].dtype}, where {leaf.dtype} is needed"
            )
    values = {path: jnp.asarray(gathered(best[path]), leaf.dtype) for path, leaf in needed.items()}
    for path, value in values.items():
        if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(np.asarray(value, np.float32)).all():
            raise ValueError(f"teacher_from: {source}: {'/'.join(path)} holds values that are not finite")
    return traverse_util.unflatten_dict(values)


def fresh(module: Any, call: CallSpec, seed: int) -> dict[str, Any]:
    """A module's variables before any training, without boxes. Raises ValueError where it cannot be asked for them."""
    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), call.example(2))
    args, keywords = call_arguments(inputs, call.keywords(module, train=False))
    return stored(jax.jit(lambda key: unboxed(module.init(key, *args, **keywords)))(jax.random.key(seed)))


def stored(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables without collections that a module writes for its caller to look at (`sow`)."""

    def sown(tree: Any) -> bool:
        if isinstance(tree, Mapping):
            return any(map(sown, tree.values()))
        return isinstance(tree, tuple)

    return {name: leaves for name, leaves in dict(variables).items() if leaves and not sown(leaves)}


def _plain(tree: Any) -> Any:
    """Nested dictionaries; lists by their numbers; an NNX variable's {"value": array} as the array."""
    if isinstance(tree, Mapping):
        if set(tree) == {"value"} and not isinstance(tree["value"], (Mapping, list, tuple)):
            return tree["value"]
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return {str(i): _plain(value) for i, value in enumerate(tree)}
    return tree


def _parts(tree: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The dictionaries that may be variables: the tree, and what it holds, three levels deep."""
    if isinstance(tree, dict):
        yield tree
        if depth < 3:
            for value in tree.values():
                yield from _parts(value, depth + 1)


def _reading(part: dict[str, Any], needed: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """`part` as variables: by collections if it has "params", else each array in the collection it belongs to."""
    collections = {path[0] for path in needed}
    if isinstance(part.get("params"), dict) and isinstance(part["params"].get("params"), dict):
        part = {**part, **part["params"]}
    flat = traverse_util.flatten_dict(part)
    if "params" in part:
        return {path: leaf for path, leaf in flat.items() if path[0] in collections}
    return {next((p for p in needed if p[1:] == path), ("params", *path)): leaf for path, leaf in flat.items()}


def _same(found: Any, leaf: Any) -> bool:
    return found is not None and hasattr(found, "shape") and tuple(found.shape) == tuple(leaf.shape)


def _mismatch(source: str, needed: Mapping[Any, Any], found: Mapping[Any, Any], wrong: list[Any]) -> str:
    """Both sides of what does not fit."""

    def listed(lines: list[str]) -> str:
        more = f", and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        return ", ".join(lines[:LISTED]) + more if lines else "nothing"

    have = {"/".join(path): tuple(getattr(leaf, "shape", ())) for path, leaf in found.items()}
    lacks = [f"{'/'.join(path)} {tuple(needed[path].shape)}" for path in wrong]
    spare = [f"{path} {shape}" for path, shape in have.items() if path not in {"/".join(p) for p in needed}]
    other = [f"{'/'.join(p)} {have['/'.join(p)]}" for p in wrong if "/".join(p) in have]
    near = nearest("/".join(wrong[0]), have) if have and not other else ""
    return (
        f"teacher_from: {source} holds another network: the model needs {listed(lacks)}; "
        f"there is {listed(other + spare)}" + (f"; {near}" if near.startswith("did you mean") else "")
    )
