"""Finished networks: DIRECTORY/{architecture.json, network.json, variables}."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kdsearch_jax.adapters import boxes as boxes_lib
from kdsearch_jax.adapters.apply import apply_eval
from kdsearch_jax.adapters.architecture import Architecture, base_module
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.call_spec import DTYPE, CallSpec, class_of
from kdsearch_jax.adapters.functional_module import FunctionalModule
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.adapters.registry import check_trust
from kdsearch_jax.models import MODELS
from kdsearch_jax.storage.arrays import (
    alone,
    array_handler,
    copied,
    describe,
    flatten,
    to_read,
    to_store,
    unflatten,
    verified,
)
from kdsearch_jax.storage.checkpoint_files import (
    CheckpointError,
    attempt,
    check_room,
    local,
    meet,
    plain,
    sealed,
    unsealed,
    written_whole,
)
from kdsearch_jax.storage.files import read_json, seal
from kdsearch_jax.storage.safe_readers import check_directory

FORMAT, VERSION = "kdsearch_jax network", 1
BASE = "base"  # in a network's info: `own_shapes` of its base model, where that is not one of `models`
BOXES = "boxes"  # in a network's info: the boxes of its arrays, see `kdsearch_jax.adapters.boxes`
MODE = "mode"  # in a network's info: that of an NNX module, "train" or "eval", where it has such
MAX_JSON = 1 << 24  # bytes: 100,000 arrays


def save_network(
    directory: str | Path,
    architecture: Architecture,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a network: architecture.json, network.json (info, digests) and variables/, all or nothing.

    Every process of a run calls it; the first writes.

    Args:
      directory: does not exist, or is empty, unless `overwrite`.
      architecture: what `architecture.module()` makes the network of.
      variables: the network's, nested by module; empty collections are not kept. Boxes are described in `info`.
      info: plain JSON values: data set, normalisation, accuracy, …
      overwrite: replace the network that the directory holds, and all else in it.

    Raises:
      ValueError: info is not JSON, a leaf is not an array, or what shall be overwritten is not a network.
      OSError: the directory is not empty, or cannot be written; what was there before is intact.
    """
    target = local(directory)
    arrays = {name: copied(name, leaf) for name, leaf in flatten(boxes_lib.unboxed(variables)).items()}
    if boxes := boxes_lib.boxes_of(variables):
        info = {**info, BOXES: boxes_lib.boxes_to_json(boxes)}
    if not any(array.size for array in arrays.values()):
        raise ValueError("variables have no array with elements; there is nothing to save")
    described = architecture.to_json()
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": seal(plain(described, "architecture")),
        "info": plain(info, "info"),
        "leaves": {name: describe(array) for name, array in arrays.items()},
    }
    meet("network is due")
    if jax.process_index() == 0:
        occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
        if occupied and not overwrite:
            raise FileExistsError(f"{target} exists already; give another directory, or overwrite=True to replace it")
        if occupied and not (target / "network.json").is_file():
            raise ValueError(
                f"{target} is not the directory of a network, so it is not overwritten; remove it yourself"
            )
        with written_whole(target) as temporary:
            check_room(temporary, arrays)
            with _array_store() as store:
                store.save(temporary / "variables", args=to_store(arrays))
            (temporary / "architecture.json").write_text(json.dumps(described, indent=1) + "\n")
            (temporary / "network.json").write_text(json.dumps(sealed(payload), indent=1) + "\n")
    meet("network is written")


def load_network(
    directory: str | Path, module: Any = None, *, trust_code: bool = False
) -> tuple[Any, dict[str, Any], Architecture, dict[str, Any]]:
    """What `save_network` wrote: (module, variables, architecture, info), every array compared with its digest.

    module: the base model, for a network of a module object that could not be named in a file, see
      `registry.as_module`.
    trust_code: a network of `package.module:factory` may import that package, that is, run its code.

    Raises:
      FileNotFoundError: there is no such directory, or it lacks a part of a network (named).
      CheckpointError: damaged (names the array), of another version, or the arrays are not the architecture's.
      ValueError: architecture.json describes no network, or names a package that is not imported yet.
    """
    source = local(directory)
    if not source.is_dir():
        old = next(source.parent.glob(f".{source.name}.*.old"), None)  # killed while it replaced one by another
        hint = f"rename {old}, which was there before" if old else "give one that save_network wrote"
        raise FileNotFoundError(f"{source} is not a directory; {hint}")
    missing = [name for name in ("network.json", "architecture.json", "variables") if not (source / name).exists()]
    if missing:
        raise FileNotFoundError(f"{source} is not the directory of a network: it has no {', '.join(missing)}")
    payload = _network_payload(source / "network.json")
    described = read_json(source / "architecture.json", MAX_JSON)
    try:
        architecture = Architecture.from_json(described)
    except ValueError as error:
        raise ValueError(f"{source / 'architecture.json'}: {error}") from error
    if attempt(seal, described)[0] != payload["architecture"]:
        raise CheckpointError(f"{source / 'architecture.json'} is not the one that was saved with this network")
    if module is None:
        check_trust(architecture.model, trust_code)
    made = _made(architecture, source, module, payload["info"])  # before much is read
    arrays, problem = attempt(_network_arrays, source / "variables", payload["leaves"])
    if arrays is None:
        raise CheckpointError(f"{source} is damaged: {problem}; take another copy")
    variables = unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
    _check_fit(made, architecture, variables, source)
    return made, variables, architecture, payload["info"]


def fitting_module(
    architecture: Architecture, variables: Mapping[str, Any], info: Mapping[str, Any], source: Path, base: Any = None
) -> Any:
    """The architecture's module; raises ValueError, naming `source`, where it cannot be made or run with these.

    base: the base model, where the architecture cannot name it.
    """
    module = _made(architecture, source, base, info)
    _check_fit(module, architecture, variables, source)
    return module


def _made(architecture: Architecture, source: Path, base: Any, info: Mapping[str, Any]) -> Any:
    module, problem = attempt(architecture.module, base)
    if module is None:
        raise ValueError(f"{source}: the architecture's module cannot be made: {problem}")
    if base is not None and isinstance(expected := info.get(BASE), dict):
        _check_base(base_module(module), architecture, expected, source)
    if isinstance(module, FunctionalModule) and (mode := info.get(MODE)) in ("train", "eval"):
        module = module.in_mode(mode)
    return module


def _check_base(base: Any, architecture: Architecture, expected: Mapping[str, Any], source: Path) -> None:
    """Raises ValueError where the base model that is given has other sizes than the one that the network is of."""
    kind, call = class_of(base).__name__, architecture.call_spec
    shapes, problem = attempt(own_shapes, base, call)
    if shapes is None:
        raise ValueError(f"{source}: the {kind} that is given does not run as this network is called: {problem}")
    for name in [*expected, *shapes]:
        own, told = shapes.get(name), expected.get(name)
        if own is None or told is None or list(own) != told:
            has = "has no" if own is None else f"has {tuple(own)} for"
            raise ValueError(
                f"{source}: the {kind} that is given {has} {name}, the one that this network was made of "
                f"{'none' if told is None else tuple(told)}; give it with the same arguments"
            )


def module_info(
    module: Any, architecture: Architecture, shapes: Callable[[], Mapping[str, tuple[int, ...]]] | None = None
) -> dict[str, Any]:
    """What a network's info says of its module, by which `load_network` recognizes it.

    module: Linen's or a `FunctionalModule`; shapes: `own_shapes` of its base model, where they are known.
    """
    info = {MODE: module.mode} if isinstance(module, FunctionalModule) and module.mode else {}
    if architecture.model in MODELS:
        return info
    found = own_shapes(base_module(module), architecture.call_spec) if shapes is None else shapes()
    return info | {BASE: {name: list(shape) for name, shape in found.items()}}


def in_boxes(module: Any, variables: Any, architecture: Architecture, info: Mapping[str, Any]) -> Any:
    """A network's variables as they were given: in boxes, where they had such.

    Raises:
      CheckpointError: what `info` says of boxes is damaged.
    """
    record = info.get(BOXES)
    if not isinstance(record, dict) or not record:
        return variables
    boxes, problem = attempt(boxes_lib.boxes_from_json, record, lambda: own_boxes(module, architecture.call_spec))
    if boxes is None:
        raise CheckpointError(f"the network's info is damaged: {problem}")
    return boxes_lib.boxed(variables, boxes)


def own_boxes(module: Any, call: CallSpec) -> dict[str, Any]:
    """{path: box} of the arrays that a module makes by itself; an NNX module has no boxes."""
    return {} if isinstance(module, FunctionalModule) else boxes_lib.boxes_of(_made_by(module, call))


def own_shapes(module: Any, call: CallSpec) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays that a module makes by itself."""
    if isinstance(module, FunctionalModule):
        return {leaf.name: leaf.shape for leaf in module.leaves if not leaf.random}
    return {name: leaf.shape for name, leaf in flatten(boxes_lib.unboxed(_made_by(module, call))).items()}


def _made_by(module: Any, call: CallSpec) -> Any:
    """Shapes of what a Linen module's `init` makes, in boxes."""
    static = call.keywords(module, train=False)

    def init(rngs: Any, *inputs: Any) -> Any:
        args, keywords = call_arguments(inputs, static)
        return module.init(rngs, *args, **keywords)

    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    return jax.eval_shape(init, rngs, *call.example(1))


def _check_fit(module: Any, architecture: Architecture, variables: Mapping[str, Any], source: Path) -> None:
    leaves, structure = jax.tree.flatten(variables)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    _, problem = attempt(_outputs_of, module, json.dumps(architecture.to_json()), structure, kinds)
    if problem:
        kind = class_of(module).__name__
        raise ValueError(f"{source}: the arrays are not those of the architecture ({kind}): {problem}")


@memoize(8)
def _outputs_of(module: Any, described: str, structure: Any, kinds: tuple[tuple[Any, Any], ...]) -> Any:
    """Shapes of what the module returns with variables of this structure; raises whatever it raises."""
    architecture = Architecture.from_json(json.loads(described))
    variables = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    run = partial(apply_eval, module, call_spec=architecture.custom_call)
    return jax.eval_shape(
        lambda variables, *inputs: run(variables, inputs), variables, *architecture.call_spec.example(1)
    )


def _array_store() -> ocp.Checkpointer:
    return ocp.Checkpointer(array_handler(), multiprocessing_options=alone())


def _network_payload(path: Path) -> dict[str, Any]:
    """network.json, checked."""
    record = read_json(path, MAX_JSON)
    payload = record.get("payload") if isinstance(record, dict) else None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a network written by this package")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {payload.get('version')!r:.20} is not known here; {VERSION} is")
    payload, problem = attempt(unsealed, record)
    leaves = payload.get("leaves") if payload else None
    if payload is None or not isinstance(payload.get("info"), dict) or not isinstance(leaves, dict):
        raise CheckpointError(f"{path} is damaged: {problem or 'it lacks info or leaves'}; take another copy")
    for key in ("mean", "std"):
        if not _normalises(payload["info"].get(key, []), key):
            raise CheckpointError(
                f"{path}: info has {key}={payload['info'][key]!r:.80}, by which no image is normalised"
            )
    for name, leaf in leaves.items():
        shape = leaf.get("shape") if isinstance(leaf, dict) else None
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or set(leaf) != {"shape", "dtype", "sha256"} or not DTYPE.fullmatch(str(leaf["dtype"])):
            raise CheckpointError(f"{path}: {name!r:.80} is described wrongly")
    return payload


def _normalises(values: Any, key: str) -> bool:
    """Whether these are numbers that can be subtracted, or divided by."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return False
    return all(abs(value) < 1e9 and (key == "mean" or value > 1e-9) for value in values)


def _network_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The verified arrays of a network; reads nothing where the files are too small for what they should hold."""
    declared = sum(math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in leaves.values())
    present = check_directory(folder)
    if declared > present:
        raise CheckpointError(f"its arrays have {declared} bytes, the files {present}")
    with _array_store() as store:
        metadata = store.metadata(folder).item_metadata
        if metadata is None:
            raise CheckpointError("Orbax finds no arrays in it")
        for name, stored in metadata.items():
            chunk = stored.storage.chunk_shape if stored.storage else None
            if list(stored.shape) != leaves[name]["shape"] or math.prod(chunk or ()) > math.prod(stored.shape):
                raise CheckpointError(f"{name!r} is stored as {stored.shape} in pieces of {chunk}")
        restored = store.restore(folder, args=to_read(leaves))
    return verified(leaves, restored)
