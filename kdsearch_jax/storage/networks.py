"""Networks as directories: DIRECTORY/{architecture.json, network.json, variables}.

`save` and `load` (`kd.save`, `kd.load`) handle students; `save_network` and `load_network` the same directories with
their info, {"data": …, "mean": …, …}, for the commands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kdsearch_jax import storage
from kdsearch_jax.adapters import boxes as boxes_lib
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture, base_module
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.call_spec import DTYPE, CallSpec, class_of
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.adapters.registry import check_trust
from kdsearch_jax.models import MODELS
from kdsearch_jax.pruning.student import Student
from kdsearch_jax.storage.arrays import (
    check_digests,
    describe,
    flatten,
    orbax_handler,
    restore_args,
    save_args,
    single_process,
    to_host,
    unflatten,
)
from kdsearch_jax.storage.files import (
    CheckpointError,
    as_json,
    atomic_directory,
    attempt,
    check_free_space,
    json_digest,
    read_json,
    seal,
    unseal,
)
from kdsearch_jax.storage.safe_readers import check_directory

FORMAT, VERSION = "kdsearch_jax network", 1
BASE = "base"  # key of a network's info: `initial_shapes` of its base model, unless that is one of `models`
BOXES = "boxes"  # key of a network's info: the boxes of its arrays, see `kdsearch_jax.adapters.boxes`
MODE = "mode"  # key of a network's info: "train" or "eval", for an NNX module that has such a mode
MAX_JSON = 1 << 24  # bytes: 100,000 arrays


def save(student: Student, path: str | Path, *, overwrite: bool = False) -> None:
    """Saves a student's architecture and arrays, with their digests, for `load`.

    Args:
      student: what the search or `kd.prune` returned.
      path: a directory, or an address in an object store such as gs://BUCKET/NAME.
      overwrite: replace the network that the directory contains.

    Raises:
      OSError: the directory is not empty and `overwrite` is False, or it cannot be written.
    """
    module, variables = student
    if isinstance(module, flax.nnx.Module):
        module, variables = FunctionalModule.split(module)
    with storage.addresses_in_errors():
        save_network(path, student.architecture, variables, module_info(module, student.architecture), overwrite)


def load(path: str | Path, module: Any = None, *, trust_code: bool = False) -> Student:
    """Loads the network in a directory, such as RUN/student, RUN/teacher/network or gs://BUCKET/NAME.

    Args:
      path: the directory or address.
      module: the model that was searched, Linen or NNX. Needed if the directory could not name it, because its class is
        local or it was passed as an object. Pass a module; an abstract one,
        `nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))`; or a callable that builds one, such as a class or
        `functools.partial(Net, width=64)`. It needs the constructor arguments of the original; its parameters are
        ignored.
      trust_code: allow importing the package that defines the network, which runs that package's code.

    Raises:
      ValueError, OSError: the directory does not contain a network, is damaged, or `module` does not match.
    """
    with storage.addresses_in_errors():
        loaded, variables, architecture, info = load_network(path, module, trust_code=trust_code)
        variables = restore_boxes(loaded, variables, architecture, info)
    if isinstance(loaded, FunctionalModule):
        loaded = loaded.bind(variables)
    return Student(loaded, variables, architecture)


def save_network(
    directory: str | Path,
    architecture: Architecture,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes architecture.json, network.json (info and digests) and variables/ atomically.

    Every process of a run calls it; process 0 writes.

    Args:
      directory: must not exist, or be empty, unless `overwrite`.
      architecture: describes the network; `architecture.module()` builds it.
      variables: of the network, nested by module. Empty collections are dropped; boxes are described in `info`.
      info: plain JSON values: data set, normalisation, accuracy, …
      overwrite: replace the network that the directory contains, and everything else in it.

    Raises:
      ValueError: info is not JSON, a leaf is not an array, or the directory to overwrite does not contain a network.
      OSError: the directory is not empty, or cannot be written; its previous content is intact.
    """
    target = storage.local_copy(directory, "directory").absolute()
    arrays = {name: to_host(name, leaf) for name, leaf in flatten(boxes_lib.unboxed(variables)).items()}
    if boxes := boxes_lib.boxes_of(variables):
        info = {**info, BOXES: boxes_lib.boxes_to_json(boxes)}
    if not any(array.size for array in arrays.values()):
        raise ValueError("variables contain no array with elements; there is nothing to save")
    architecture_json = architecture.to_json()
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": json_digest(as_json(architecture_json, "architecture")),
        "info": as_json(info, "info"),
        "leaves": {name: describe(array) for name, array in arrays.items()},
    }
    storage.sync_processes("before saving a network")
    if jax.process_index() == 0:
        occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
        if occupied and not overwrite:
            raise FileExistsError(f"{target} already exists; give another directory, or overwrite=True to replace it")
        if occupied and not (target / "network.json").is_file():
            raise ValueError(f"{target} does not contain a network, so it is not overwritten; delete it yourself")
        with atomic_directory(target) as temporary:
            check_free_space(temporary, arrays)
            with _orbax() as orbax:
                orbax.save(temporary / "variables", args=save_args(arrays))
            (temporary / "architecture.json").write_text(json.dumps(architecture_json, indent=1) + "\n")
            (temporary / "network.json").write_text(json.dumps(seal(payload), indent=1) + "\n")
    storage.sync_processes("after saving a network")


def load_network(
    directory: str | Path, module: Any = None, *, trust_code: bool = False
) -> tuple[Any, dict[str, Any], Architecture, dict[str, Any]]:
    """Loads what `save_network` wrote: (module, variables, architecture, info); every array is checked by its digest.

    Args:
      directory: a directory or address.
      module: the base model, if the directory cannot name it; see `load`.
      trust_code: allow a network of `package.module:factory` to import that package, which runs its code.

    Raises:
      FileNotFoundError: the directory does not exist, or lacks a part of a network (named).
      CheckpointError: it is damaged (names the array), of another version, or its arrays do not fit the architecture.
      ValueError: architecture.json does not describe a network, or names a package that has not been imported yet.
    """
    source = storage.local_copy(directory, "directory").absolute()
    if not source.is_dir():
        old = next(source.parent.glob(f".{source.name}.*.old"), None)  # a process was killed while replacing it
        hint = f"rename {old}, its previous content" if old else "give one that save_network wrote"
        raise FileNotFoundError(f"{source} is not a directory; {hint}")
    missing = [name for name in ("network.json", "architecture.json", "variables") if not (source / name).exists()]
    if missing:
        raise FileNotFoundError(f"{source} does not contain a network: it has no {', '.join(missing)}")
    payload = _read_network_json(source / "network.json")
    architecture_json = read_json(source / "architecture.json", MAX_JSON)
    try:
        architecture = Architecture.from_json(architecture_json)
    except ValueError as error:
        raise ValueError(f"{source / 'architecture.json'}: {error}") from error
    if attempt(json_digest, architecture_json)[0] != payload["architecture"]:
        raise CheckpointError(f"{source / 'architecture.json'} differs from the one saved with this network")
    if module is None:
        check_trust(architecture.model, trust_code)
    built = _build(architecture, source, module, payload["info"])  # before anything large is read
    arrays, problem = attempt(_read_arrays, source / "variables", payload["leaves"])
    if arrays is None:
        raise CheckpointError(f"{source} is damaged: {problem}; use another copy")
    variables = unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
    _check_runs(built, architecture, variables, source)
    return built, variables, architecture, payload["info"]


def build_module(
    architecture: Architecture, variables: Mapping[str, Any], info: Mapping[str, Any], source: Path, base: Any = None
) -> Any:
    """Builds the architecture's module and checks that it runs with these variables.

    Args:
      source: where the network comes from, for error messages.
      base: the base model, if the architecture cannot name it.

    Raises:
      ValueError: the module cannot be built, or does not run.
    """
    module = _build(architecture, source, base, info)
    _check_runs(module, architecture, variables, source)
    return module


def module_info(
    module: Any, architecture: Architecture, shapes: Callable[[], Mapping[str, tuple[int, ...]]] | None = None
) -> dict[str, Any]:
    """The entries of a network's info by which `load_network` recognises its module.

    Args:
      module: a Linen module or `FunctionalModule`.
      shapes: returns `initial_shapes` of the base model, if they are known.
    """
    info = {MODE: module.mode} if isinstance(module, FunctionalModule) and module.mode else {}
    if architecture.model in MODELS:
        return info
    found = initial_shapes(base_module(module), architecture.call_spec) if shapes is None else shapes()
    return info | {BASE: {name: list(shape) for name, shape in found.items()}}


def restore_boxes(module: Any, variables: Any, architecture: Architecture, info: Mapping[str, Any]) -> Any:
    """Puts a loaded network's variables back into the boxes they were saved from, if any.

    Raises:
      CheckpointError: the description of the boxes in `info` is damaged.
    """
    record = info.get(BOXES)
    if not isinstance(record, dict) or not record:
        return variables
    boxes, problem = attempt(boxes_lib.boxes_from_json, record, lambda: initial_boxes(module, architecture.call_spec))
    if boxes is None:
        raise CheckpointError(f"the network's info is damaged: {problem}")
    return boxes_lib.boxed(variables, boxes)


def initial_boxes(module: Any, call: CallSpec) -> dict[str, Any]:
    """{path: box} of the arrays that a module initialises; NNX modules have no boxes."""
    return {} if isinstance(module, FunctionalModule) else boxes_lib.boxes_of(_abstract_variables(module, call))


def initial_shapes(module: Any, call: CallSpec) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays that a module initialises."""
    if isinstance(module, FunctionalModule):
        return {leaf.name: leaf.shape for leaf in module.leaves if not leaf.random}
    return {name: leaf.shape for name, leaf in flatten(boxes_lib.unboxed(_abstract_variables(module, call))).items()}


def _abstract_variables(module: Any, call: CallSpec) -> Any:
    """The boxed `jax.ShapeDtypeStruct`s of a Linen module's `init`."""
    return _initialised(module, json.dumps(call.to_json()))


@memoize(8)
def _initialised(module: Any, call_json: str) -> Any:
    call = CallSpec.from_json(json.loads(call_json))  # the JSON has a hash, the record has none
    static = call.keywords(module, train=False)

    def init(rngs: Any, *inputs: Any) -> Any:
        args, keywords = call_arguments(inputs, static)
        return module.init(rngs, *args, **keywords)

    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    return jax.eval_shape(init, rngs, *call.example(1))


def _build(architecture: Architecture, source: Path, base: Any, info: Mapping[str, Any]) -> Any:
    module, problem = attempt(architecture.module, base)
    if module is None:
        raise ValueError(f"{source}: the architecture's module cannot be built: {problem}")
    if base is not None and isinstance(expected := info.get(BASE), dict):
        _check_base(base_module(module), architecture, expected, source)
    if isinstance(module, FunctionalModule) and (mode := info.get(MODE)) in ("train", "eval"):
        module = module.in_mode(mode)
    return module


def _check_base(base: Any, architecture: Architecture, expected: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError if the base model has other shapes than the one the network was made from."""
    kind = class_of(base).__name__
    shapes, problem = attempt(initial_shapes, base, architecture.call_spec)
    if shapes is None:
        raise ValueError(f"{source}: the given {kind} cannot be called as this network is: {problem}")
    for name in [*expected, *shapes]:
        actual, wanted = shapes.get(name), expected.get(name)
        if actual is None or wanted is None or list(actual) != wanted:
            has = "lacks" if actual is None else f"has shape {tuple(actual)} for"
            original = "lacks it" if wanted is None else f"has {tuple(wanted)}"
            raise ValueError(
                f"{source}: the given {kind} {has} {name}, but the original {original}; construct it with the same "
                "arguments"
            )


def _check_runs(module: Any, architecture: Architecture, variables: Mapping[str, Any], source: Path) -> None:
    leaves, structure = jax.tree.flatten(variables)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    _, problem = attempt(_abstract_outputs, module, json.dumps(architecture.to_json()), structure, kinds)
    if problem:
        kind = class_of(module).__name__
        raise ValueError(f"{source}: the arrays do not fit the architecture ({kind}): {problem}")


@memoize(8)
def _abstract_outputs(module: Any, architecture_json: str, structure: Any, kinds: tuple[tuple[Any, Any], ...]) -> Any:
    """Shapes of the module's outputs with variables of this structure; raises whatever the module raises."""
    architecture = Architecture.from_json(json.loads(architecture_json))
    variables = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    run = partial(apply_eval, module, call_spec=architecture.custom_call)
    return jax.eval_shape(
        lambda variables, *inputs: run(variables, inputs), variables, *architecture.call_spec.example(1)
    )


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(orbax_handler(), multiprocessing_options=single_process())


def _read_network_json(path: Path) -> dict[str, Any]:
    """The checked payload of network.json."""
    record = read_json(path, MAX_JSON)
    payload = record.get("payload") if isinstance(record, dict) else None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a network written by this package")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: unknown version {payload.get('version')!r:.20}; this package reads {VERSION}")
    payload, problem = attempt(unseal, record)
    leaves = payload.get("leaves") if payload else None
    if payload is None or not isinstance(payload.get("info"), dict) or not isinstance(leaves, dict):
        raise CheckpointError(f"{path} is damaged: {problem or 'info or leaves are missing'}; use another copy")
    for key in ("mean", "std"):
        if not _is_normalisation(payload["info"].get(key, []), key):
            raise CheckpointError(f"{path}: info has {key}={payload['info'][key]!r:.80}, which cannot normalise images")
    for name, leaf in leaves.items():
        shape = leaf.get("shape") if isinstance(leaf, dict) else None
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or set(leaf) != {"shape", "dtype", "sha256"} or not DTYPE.fullmatch(str(leaf["dtype"])):
            raise CheckpointError(f"{path}: invalid description of {name!r:.80}")
    return payload


def _is_normalisation(values: Any, key: str) -> bool:
    """Whether these are numbers that can be subtracted (mean) or divided by (std)."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return False
    return all(abs(value) < 1e9 and (key == "mean" or value > 1e-9) for value in values)


def _read_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The verified arrays of a network; reads nothing if the files are smaller than the arrays they should contain."""
    declared = sum(math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in leaves.values())
    present = check_directory(folder)
    if declared > present:
        raise CheckpointError(f"its arrays take {declared} bytes, but its files only {present}")
    with _orbax() as orbax:
        metadata = orbax.metadata(folder).item_metadata
        if metadata is None:
            raise CheckpointError("Orbax finds no arrays in it")
        for name, stored in metadata.items():
            chunk = stored.storage.chunk_shape if stored.storage else None
            if list(stored.shape) != leaves[name]["shape"] or math.prod(chunk or ()) > math.prod(stored.shape):
                raise CheckpointError(f"{name!r} is stored with shape {stored.shape} and chunks {chunk}")
        restored = orbax.restore(folder, args=restore_args(leaves))
    return check_digests(leaves, restored)
