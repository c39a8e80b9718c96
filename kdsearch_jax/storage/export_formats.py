"""Exports a network as safetensors or StableHLO, checks the files in a fresh process, and loads them again."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kdsearch_jax import storage
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.adapters.base import call_arguments
from kdsearch_jax.adapters.convolution.dispatch import fast_convolutions
from kdsearch_jax.adapters.memoize import memoize
from kdsearch_jax.adapters.registry import OBJECT_PREFIX, check_trust
from kdsearch_jax.pruning import equality
from kdsearch_jax.pruning.equality import TOLERANCE, Reference
from kdsearch_jax.storage import safe_readers
from kdsearch_jax.storage.arrays import check_digests, describe, flatten, unflatten
from kdsearch_jax.storage.files import (
    DamagedError,
    fsync,
    json_digest,
    name_in_errors,
    one_line,
    parse_json,
    read_json_object,
)
from kdsearch_jax.storage.networks import BASE, build_module, load_network, restore_boxes
from kdsearch_jax.tracing.topology import path_string

Format = Literal["safetensors", "stablehlo"]
FORMATS: tuple[Format, ...] = ("safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")
_BATCH_SIZES = (2, 5)  # on which exported files are compared with the network
ExpectedOutputs = dict[int, Reference]  # by batch size
_EXPECTED_FILE = ".expected.npz"
_USAGE = {
    "safetensors": "module, variables = kdsearch_jax.load_safetensors({file!r}{trust}); "
    "{outputs} = module.apply(variables, {inputs})",
    "stablehlo": "{outputs} = jax.export.deserialize(bytearray(open({file!r}, 'rb').read())).call({inputs})",
}
_CHECK_SCRIPT = (
    "import json, sys; from kdsearch_jax.storage import export_formats; "
    "print(json.dumps(export_formats.check(*sys.argv[1:3], sys.argv[3:], trust_code=True)))"  # as its parent does
)


class CannotExportError(ValueError):
    """The model's code does not allow this format."""


def export(
    network_dir: str | Path,
    out_dir: str | Path,
    formats: Sequence[Format] = FORMATS,
    module: Any = None,
    *,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Writes a network in each format, checks the files in a fresh process, and returns the manifest it writes.

    Args:
      network_dir: what `kdsearch_jax.storage.networks.save_network` wrote.
      out_dir: created if needed; may be `network_dir`. Files of the same names are replaced.
      formats: of "safetensors" and "stablehlo".
      module: the base model, if the network directory cannot name it.
      trust_code: as for `load_network`.

    Raises:
      ValueError: a format is unknown, the network does not allow a free batch size, or a file's outputs differ from the
        network's. No file is left behind.
      FileNotFoundError, CheckpointError: as `load_network` does.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"format {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")
    base = module
    network_dir, out = (
        storage.local_copy(network_dir, "network_dir"),
        storage.local_copy(out_dir, "out_dir").absolute(),
    )
    module, variables, architecture, info = load_network(network_dir, base, trust_code=trust_code)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with name_in_errors(out), tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
            temporary = Path(folder)
            for format in formats:
                if format == "safetensors":
                    content = to_safetensors(architecture, variables, info)
                else:
                    content = _to_stablehlo(module, variables, architecture)
                (temporary / f"student.{format}").write_bytes(content)
            if base is not None:  # the fresh process cannot build the network
                arrays: Any = _to_arrays(_expected_outputs(module, variables, architecture))
                np.savez(temporary / _EXPECTED_FILE, **arrays)
            differences = _check_in_subprocess(network_dir, temporary, formats)
            (temporary / _EXPECTED_FILE).unlink(missing_ok=True)
            manifest = _manifest(temporary, architecture, info, differences)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "manifest.json"):
                fsync(path)
                path.replace(out / path.name)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    storage.publish()
    return manifest


def load_safetensors(path: str | Path, module: Any = None, *, trust_code: bool = False) -> tuple[Any, dict[str, Any]]:
    """Loads the network in a file that `export` wrote: (module, variables).

    Args:
      path: the file.
      module: the base model, if the file cannot name it.
      trust_code: allow a network of `package.module:factory` to import that package, which runs its code.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file of this package, is damaged, or does not describe a network.
    """
    loaded, variables, architecture, info = read_safetensors(path, module, trust_code=trust_code)
    return loaded, restore_boxes(loaded, variables, architecture, info)


def read_safetensors(
    path: str | Path, module: Any = None, *, trust_code: bool = False
) -> tuple[Any, dict[str, Any], Architecture, dict[str, Any]]:
    """As `load_safetensors`, with what the file says about the network: (module, variables, architecture, info)."""
    path = storage.local_copy(path, "path")
    architecture, variables, info = _read_safetensors(path)
    if module is None:
        check_trust(architecture.model, trust_code)
    return build_module(architecture, variables, info, path, module), variables, architecture, info


def is_exported_student(path: Path) -> bool:
    """Whether this is a file that `export` wrote of a pruned network, whose sizes differ from its base model's."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        architecture = Architecture.from_json(parse_json(safe_readers.read_safetensors_metadata(path)["architecture"]))
    except (KeyError, TypeError, ValueError):  # a file of another origin
        return False
    return bool(architecture.layers or architecture.dropped)


def load_stablehlo(path: str | Path) -> jax.export.Exported:
    """Loads a StableHLO file that `export` wrote, after comparing it with its digest; call the result's `.call`.

    `jax.export.deserialize` alone accepts a file with flipped bits and computes something else.

    Raises:
      FileNotFoundError: there is no such file, or no manifest.json next to it.
      ValueError: it differs from the file in the manifest, or this version of JAX cannot read it.
    """
    path = storage.local_copy(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    files = read_json_object(path.parent / "manifest.json").get("files")
    record = files.get(path.name) if isinstance(files, dict) else None
    if not isinstance(record, dict) or record.get("sha256") != _sha256(path):
        raise DamagedError(f"{path} is damaged: it does not match its digest in manifest.json; export it again")
    return _deserialize(path)


def is_complete_export(directory: Path) -> bool:
    """Whether a directory has a manifest.json, which is written last, and all files in it match their digests."""
    try:
        files = read_json_object(directory / "manifest.json")["files"]
        return files.keys() <= {f"student.{format}" for format in FORMATS} and all(
            _sha256(directory / name) == record["sha256"] for name, record in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_safetensors(path: Path) -> tuple[Architecture, dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .safetensors file written by kdsearch_jax.export")
    try:
        arrays, metadata = safe_readers.read_safetensors(path)
        if "architecture" not in metadata or "leaves" not in metadata:
            raise ValueError("its metadata has no architecture; kdsearch_jax.export writes one")
        digest = metadata.pop("sha256", None)  # files of older versions have none
        if digest not in (None, json_digest(metadata)):
            raise ValueError("its metadata does not match its digest")
        architecture = Architecture.from_json(parse_json(metadata["architecture"]))
        leaves, info = parse_json(metadata["leaves"]), parse_json(metadata.get("info", "{}"))
        if not isinstance(info, dict):
            raise ValueError("its info is not a JSON object")
        if not isinstance(leaves, dict) or leaves.keys() != arrays.keys():
            raise ValueError("its arrays are not those that were saved")
        variables = unflatten({name: jnp.asarray(array) for name, array in check_digests(leaves, arrays).items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be loaded: {one_line(error).removeprefix(f'{path} ')}") from error
    return architecture, variables, info


def check(
    network_dir: str | Path, out_dir: str | Path, formats: Sequence[Format] = FORMATS, *, trust_code: bool = False
) -> dict[str, dict[str, float]]:
    """Compares exported files with the network: {format: {"difference": largest error over the entry's own scale}}.

    Both run on random inputs of two batch sizes on JAX's default device. On GPUs and TPUs, whose matrix products are
    not full float32 by default, that alone makes the comparison fail: set JAX_PLATFORMS=cpu.

    Raises:
      ValueError: an output entry differs by more than `TOLERANCE` of its own scale, or a file cannot be read.
    """
    network_dir, out_dir = storage.local_copy(network_dir, "network_dir"), storage.local_copy(out_dir, "out_dir")
    expected_file = out_dir / _EXPECTED_FILE
    if expected_file.is_file():
        architecture = Architecture.from_json(read_json_object(Path(network_dir) / "architecture.json"))
        with np.load(expected_file, allow_pickle=False) as file:
            expected = _from_arrays(dict(file))
        runnable = [format for format in formats if format != "safetensors"]
    else:
        module, variables, architecture, _ = load_network(network_dir, trust_code=trust_code)
        expected, runnable = _expected_outputs(module, variables, architecture), list(formats)
    for value in (value for measured in expected.values() for value in measured.values.values()):
        if np.isnan(value).any() or (value.size and not np.isfinite(value).any()):
            raise ValueError(f"the outputs of {network_dir} are not finite; its training diverged")
    differences = {}
    for format in formats:
        path = Path(out_dir) / f"student.{format}"
        if format in runnable:
            difference = _difference(path, _runner(path, format, trust_code), architecture, expected)
        else:
            _read_safetensors(path)  # compares every array with its digest
            difference = 0.0
        differences[format] = {"difference": difference}
    return differences


def _difference(
    path: Path, run: Callable[..., dict[str, Any]], architecture: Architecture, expected: ExpectedOutputs
) -> float:
    """The largest difference of a file's outputs from the network's; ValueError above TOLERANCE."""
    worst = 0.0
    for size, measured in expected.items():
        outputs = run(*_inputs(architecture, size))
        shapes = [{name: np.shape(value) for name, value in arrays.items()} for arrays in (outputs, measured.values)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} returns {[*shapes[0].values()]}, the network {[*shapes[1].values()]}")
        worst = max(worst, equality.difference(measured, outputs))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{path} and the network disagree: outputs differ by {worst:.3g} of their own scale, more than "
            f"{TOLERANCE:g}"
        )
    return worst


def _expected_outputs(module: Any, variables: Any, architecture: Architecture) -> ExpectedOutputs:
    """The network's outputs on the inputs of `check`, with the scale of each entry."""
    run, expected = _compiled(module, json.dumps(architecture.to_json())), {}
    for size in _BATCH_SIZES:
        inputs = _inputs(architecture, size)
        rounding = equality.rounding_of(run.trace(variables, *inputs).jaxpr)
        expected[size] = equality.reference_outputs(run, variables, inputs, rounding)
    return expected


@memoize(2)
def _compiled(module: Any, architecture_json: str) -> Any:
    """(variables, *inputs) → {name: array}, compiled once for equal modules."""
    architecture = Architecture.from_json(json.loads(architecture_json))

    def function(variables: Any, *inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, {})
        return _by_index(_inference(module, variables, architecture)(*args, **keywords))

    return jax.jit(function)


def _inputs(architecture: Architecture, size: int) -> tuple[Any, ...]:
    return architecture.call_spec.random(size, np.random.default_rng(size))


def _by_index(outputs: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(outputs))}


def _to_arrays(expected: ExpectedOutputs) -> dict[str, np.ndarray]:
    return {
        f"{size}/{kind}/{name}": array
        for size, measured in expected.items()
        for kind, arrays in (("values", measured.values), ("scales", measured.scales))
        for name, array in arrays.items()
    }


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> ExpectedOutputs:
    """Inverts `_to_arrays`."""
    expected: ExpectedOutputs = {}
    for key, array in arrays.items():
        size, kind, name = key.split("/")
        measured = expected.setdefault(int(size), Reference({}, {}, {}, int(size)))
        (measured.values if kind == "values" else measured.scales)[name] = array
    return expected


def _inference(module: Any, variables: Any, architecture: Architecture) -> Callable[..., Any]:
    """The network in inference mode as a function of its inputs."""
    static = architecture.call_spec.keywords(module, train=False)
    return lambda *args, **keywords: _builtin_outputs(module.apply(variables, *args, **keywords, **static))


def _builtin_outputs(outputs: Any) -> Any:
    """Outputs of a type that a file cannot contain as {path: array}; others unchanged."""

    def is_builtin(tree: Any) -> bool:
        if isinstance(tree, (dict, list, tuple)) and type(tree) in (dict, list, tuple):
            return all(map(is_builtin, tree.values() if isinstance(tree, dict) else tree))
        return tree is None or jax.tree_util.all_leaves([tree])

    if is_builtin(outputs):
        return outputs
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]}


def _runner(path: Path, format: Format, trust_code: bool) -> Callable[..., dict[str, Any]]:
    """The network in a file as a function: *inputs → {name: array}."""
    if format == "safetensors":
        module, variables, architecture, info = read_safetensors(path, trust_code=trust_code)
        run = _compiled(module, json.dumps(architecture.to_json()))
        return partial(run, restore_boxes(module, variables, architecture, info))
    exported = _deserialize(path)

    def call(*inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, {})
        return _by_index(exported.call(*args, **keywords))

    return call


def _deserialize(path: Path) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers fails in many ways on damaged files
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error


def to_safetensors(architecture: Architecture, variables: Mapping[str, Any], info: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file with a network."""
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in flatten(variables).items()}
    metadata = {
        "format": "kdsearch_jax",
        "architecture": json.dumps(architecture.to_json()),
        "info": json.dumps(dict(info)),
        "leaves": json.dumps({name: describe(array) for name, array in arrays.items()}),
    }
    return _sort_metadata(safetensors.numpy.save(arrays, {**metadata, "sha256": json_digest(metadata)}))


def _sort_metadata(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted by name; safetensors writes it in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _to_stablehlo(module: Any, variables: Mapping[str, Any], architecture: Architecture) -> bytes:
    (batch,) = jax.export.symbolic_shape("batch")
    args, keywords = call_arguments(architecture.call_spec.example(batch), {})
    function = jax.jit(_inference(module, variables, architecture))
    try:
        with fast_convolutions(portable=True), _without_call_stacks():
            exported = jax.export.export(function, platforms=PLATFORMS)(*args, **keywords)
        return bytes(exported.serialize())
    except Exception as error:  # the model's code may do anything with a symbolic size
        raise CannotExportError(
            f"model {architecture.model!r} cannot be exported as stablehlo with a free batch size: {one_line(error)}; "
            "export safetensors only"
        ) from error


@contextlib.contextmanager
def _without_call_stacks() -> Iterator[None]:
    """Lowers programs without the call stacks of the Python code, so that equal networks give equal files."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _check_in_subprocess(
    network_dir: str | Path, folder: Path, formats: Sequence[Format]
) -> dict[str, dict[str, float]]:
    """Runs `check` in a fresh process on the CPU; raises ValueError with its last line of output."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", _CHECK_SCRIPT, str(Path(network_dir).absolute()), str(folder), *formats]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise ValueError(f"an exported file failed its check in a fresh process: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def _manifest(
    folder: Path, architecture: Architecture, info: Mapping[str, Any], differences: Mapping[str, Any]
) -> dict[str, Any]:
    takes_images = architecture.custom_call is None
    trust = (
        ", trust_code=True" if ":" in architecture.model and not architecture.model.startswith(OBJECT_PREFIX) else ""
    )
    inputs = "images" if takes_images else ", ".join(architecture.call_spec.arguments)
    outputs = "logits" if takes_images else "outputs"
    image = {"shape": ["batch", *architecture.input_shape], "dtype": "float32", "what": "(image/255 - mean)/std"}
    files = {
        f"student.{format}": {
            "format": format,
            "bytes": (folder / f"student.{format}").stat().st_size,
            "sha256": _sha256(folder / f"student.{format}"),
            **difference,
            "use": _USAGE[format].format(file=f"student.{format}", inputs=inputs, outputs=outputs, trust=trust),
        }
        for format, difference in differences.items()
    }
    return {
        "input": image if takes_images else architecture.call_spec.to_json()["inputs"],
        "output": {"dtype": "float32", "what": "logits (batch, classes)" if takes_images else "as the network's"},
        "architecture": architecture.to_json(),
        "info": {name: value for name, value in info.items() if name != BASE},
        "jax": jax.__version__,  # newer versions can read the StableHLO file as well, older ones may not
        "platforms": list(PLATFORMS),
        "files": files,
    }
