"""How a network becomes a file for others, and how such a file is checked and read again."""

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
from kdsearch_jax.storage.arrays import describe, flatten, unflatten, verified
from kdsearch_jax.storage.files import DamagedError, flush, naming, parse_json, read_object, seal
from kdsearch_jax.storage.networks import BASE, fitting_module, in_boxes, load_network
from kdsearch_jax.tracing.topology import path_string

Format = Literal["safetensors", "stablehlo"]
FORMATS: tuple[Format, ...] = ("safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")
_BATCH_SIZES = (2, 5)
Expected = dict[int, Reference]  # {batch size: outputs}
_EXPECTED = ".expected.npz"
_USE = {
    "safetensors": "module, variables = kdsearch_jax.load_safetensors({file!r}{trust}); "
    "{outputs} = module.apply(variables, {inputs})",
    "stablehlo": "{outputs} = jax.export.deserialize(bytearray(open({file!r}, 'rb').read())).call({inputs})",
}
_CHECK = (
    "import json, sys; from kdsearch_jax.storage import export_formats as export; "
    "print(json.dumps(export.check(*sys.argv[1:3], sys.argv[3:], trust_code=True)))"  # its parent does
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
    """Writes a network in each format, checked by a fresh process, and manifest.json; returns the manifest.

    Args:
      network_dir: what `kdsearch_jax.storage.networks.save_network` wrote.
      out_dir: made if it is not there; may be `network_dir`. Files of the same names are replaced.
      formats: of "safetensors" and "stablehlo".
      module: the base model, where the network is of a module object.
      trust_code: as for `load_network`.

    Raises:
      ValueError: no such format, the network does not allow a free batch size, or a file computes something else than
        the network. No file is left behind.
      FileNotFoundError, CheckpointError: as `load_network` does.
    """
    if unknown := [given for given in formats if given not in FORMATS]:
        raise ValueError(f"format {unknown[0]!r} is unknown; there are {', '.join(FORMATS)}")
    base = module
    network_dir, out = storage.local(network_dir, "network_dir"), storage.local(out_dir, "out_dir").absolute()
    module, variables, architecture, info = load_network(network_dir, base, trust_code=trust_code)
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with naming(out), tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
            temporary = Path(folder)
            for format in formats:
                content = (
                    packed(architecture, variables, info)
                    if format == "safetensors"
                    else _stablehlo(module, variables, architecture)
                )
                (temporary / f"student.{format}").write_bytes(content)
            if base is not None:
                stored: Any = _stored(_expected(module, variables, architecture))
                np.savez(temporary / _EXPECTED, **stored)
            differences = _checked_elsewhere(network_dir, temporary, formats)
            (temporary / _EXPECTED).unlink(missing_ok=True)
            manifest = _manifest(temporary, architecture, info, differences)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "manifest.json"):
                flush(path)
                path.replace(out / path.name)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    storage.publish()
    return manifest


def load_safetensors(path: str | Path, module: Any = None, *, trust_code: bool = False) -> tuple[Any, dict[str, Any]]:
    """The network in a file that `export` wrote: (module, variables).

    module: the base model, for a network of a module object.
    trust_code: a network of `package.module:factory` may import that package, that is, run its code.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file of this package, is damaged, or describes no network.
    """
    made, variables, architecture, info = read_safetensors(path, module, trust_code=trust_code)
    return made, in_boxes(made, variables, architecture, info)


def read_safetensors(
    path: str | Path, module: Any = None, *, trust_code: bool = False
) -> tuple[Any, dict[str, Any], Architecture, dict[str, Any]]:
    """The same with what the file says of it: (module, variables, architecture, info)."""
    path = storage.local(path, "path")
    architecture, variables, info = _read_safetensors(path)
    if module is None:
        check_trust(architecture.model, trust_code)
    return fitting_module(architecture, variables, info, path, module), variables, architecture, info


def holds_student(path: Path) -> bool:
    """Whether it is a file that `export` wrote, of a network whose sizes are not those of the model that it names."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        architecture = Architecture.from_json(parse_json(safe_readers.read_safetensors_metadata(path)["architecture"]))
    except (KeyError, TypeError, ValueError):  # whatever it is, it says nothing of itself
        return False
    return bool(architecture.layers or architecture.dropped)


def load_stablehlo(path: str | Path) -> jax.export.Exported:
    """The network in a file that `export` wrote, of its inputs by `.call`; its bytes are those that were written.

    `jax.export.deserialize` alone takes a file in which bits have changed, and computes something else.

    Raises:
      FileNotFoundError: there is no such file, or no manifest.json beside it.
      ValueError: it is not the file that the manifest describes, or no network that this version of JAX can read.
    """
    path = storage.local(path, "path")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    files = read_object(path.parent / "manifest.json").get("files")
    told = files.get(path.name) if isinstance(files, dict) else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not isinstance(told, dict) or told.get("sha256") != digest:
        raise DamagedError(f"{path} is damaged: it is not the file that manifest.json beside it describes; export anew")
    return _deserialized(path)


def _read_safetensors(path: Path) -> tuple[Architecture, dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .safetensors file written by kdsearch_jax.export")
    try:
        arrays, metadata = safe_readers.read_safetensors(path)
        if "architecture" not in metadata or "leaves" not in metadata:
            raise ValueError("it holds no architecture; kdsearch_jax.export writes one")
        if "sha256" in metadata and seal({k: v for k, v in metadata.items() if k != "sha256"}) != metadata["sha256"]:
            raise ValueError("what it says of itself is not what was saved")  # a file of an older version has no digest
        architecture = Architecture.from_json(parse_json(metadata["architecture"]))
        leaves, info = parse_json(metadata["leaves"]), parse_json(metadata.get("info", "{}"))
        if not isinstance(info, dict):
            raise ValueError("what it says of its data is no object")
        if not isinstance(leaves, dict) or leaves.keys() != arrays.keys():
            raise ValueError("its arrays are not those that were saved")
        variables = unflatten({name: jnp.asarray(array) for name, array in verified(leaves, arrays).items()})
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split()).removeprefix(f"{path} ")
        raise ValueError(f"{path} cannot be loaded: {said}") from error
    return architecture, variables, info


def check(
    network_dir: str | Path, out_dir: str | Path, formats: Sequence[Format] = FORMATS, *, trust_code: bool = False
) -> dict[str, dict[str, float]]:
    """Compares exported files with the network: {format: {"difference"}}, of an entry over its own scale.

    Runs both on random inputs at two batch sizes, where JAX runs by default. On a GPU or TPU, whose matrix products are
    not full float32 by default, the comparison fails for that alone: set JAX_PLATFORMS=cpu.

    Raises:
      ValueError: an entry of an output is further off than `TOLERANCE` of its own scale, or a file cannot be read.
    """
    network_dir, out_dir = storage.local(network_dir, "network_dir"), storage.local(out_dir, "out_dir")
    stored = out_dir / _EXPECTED
    if stored.is_file():
        architecture = Architecture.from_json(read_object(Path(network_dir) / "architecture.json"))
        with np.load(stored, allow_pickle=False) as file:
            expected = _restored(dict(file))
        formats_run = [format for format in formats if format != "safetensors"]
    else:
        module, variables, architecture, _ = load_network(network_dir, trust_code=trust_code)
        expected, formats_run = _expected(module, variables, architecture), list(formats)
    for value in (value for each in expected.values() for value in each.values.values()):
        if np.isnan(value).any() or (value.size and not np.isfinite(value).any()):
            raise ValueError(f"the outputs of {network_dir} are not finite; its training diverged")
    found = {}
    for format in formats:
        path = Path(out_dir) / f"student.{format}"
        if format in formats_run:
            found[format] = {"difference": _difference(path, _runner(path, format, trust_code), architecture, expected)}
        else:
            _read_safetensors(path)  # every array is compared with its digest
            found[format] = {"difference": 0.0}
    return found


def _difference(
    path: Path, run: Callable[..., dict[str, Any]], architecture: Architecture, expected: Expected
) -> float:
    """The largest difference of a file's outputs from the network's, over their own scales; ValueError above 1e-5."""
    worst = 0.0
    for size, each in expected.items():
        got = run(*_inputs(architecture, size))
        shapes = [{name: np.shape(value) for name, value in arrays.items()} for arrays in (got, each.values)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} returns {[*shapes[0].values()]}, the network {[*shapes[1].values()]}")
        worst = max(worst, equality.difference(each, got))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{path} computes something else than the network: outputs differ by {worst:.3g} of their own scale, "
            f"allowed are {TOLERANCE:g}"
        )
    return worst


def _expected(module: Any, variables: Any, architecture: Architecture) -> Expected:
    """The network's own outputs on the inputs of `check`, with the scale of every entry."""

    run, found = _compiled(module, json.dumps(architecture.to_json())), {}
    for size in _BATCH_SIZES:
        inputs = _inputs(architecture, size)
        rounding = equality.rounding_of(run.trace(variables, *inputs).jaxpr)
        found[size] = equality.reference_outputs(run, variables, inputs, rounding)
    return found


@memoize(2)
def _compiled(module: Any, described: str) -> Any:
    """(variables, *inputs) → {name: array}, the same for equal modules; described: their architecture."""
    architecture = Architecture.from_json(json.loads(described))

    def function(variables: Any, *inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, {})
        return _named(_function(module, variables, architecture)(*args, **keywords))

    return jax.jit(function)


def _inputs(architecture: Architecture, size: int) -> tuple[Any, ...]:
    return architecture.call_spec.random(size, np.random.default_rng(size))


def _named(outputs: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(outputs))}


def _stored(expected: Expected) -> dict[str, np.ndarray]:
    """As arrays with flat names."""
    kinds = {"values": lambda each: each.values, "scales": lambda each: each.scales}
    return {
        f"{size}/{kind}/{name}": array
        for size, each in expected.items()
        for kind, of in kinds.items()
        for name, array in of(each).items()
    }


def _restored(arrays: Mapping[str, np.ndarray]) -> Expected:
    """Inverts the above."""
    found: Expected = {}
    for key, array in arrays.items():
        size, kind, name = key.split("/")
        each = found.setdefault(int(size), Reference({}, {}, {}, int(size)))
        (each.values if kind == "values" else each.scales)[name] = array
    return found


def _function(module: Any, variables: Any, architecture: Architecture) -> Callable[..., Any]:
    """The network in inference mode as a function of its inputs alone."""
    static = architecture.call_spec.keywords(module, train=False)
    return lambda *args, **keywords: _plain(module.apply(variables, *args, **keywords, **static))


def _plain(outputs: Any) -> Any:
    """Outputs of a type of the model's own, which a file cannot hold, as {path: array}; others as they are."""

    def builtin(tree: Any) -> bool:
        if isinstance(tree, (dict, list, tuple)) and type(tree) in (dict, list, tuple):
            return all(map(builtin, tree.values() if isinstance(tree, dict) else tree))
        return tree is None or jax.tree_util.all_leaves([tree])

    named = jax.tree_util.tree_flatten_with_path(outputs)[0]
    return outputs if builtin(outputs) else {path_string(path): leaf for path, leaf in named}


def _runner(path: Path, format: Format, trust_code: bool) -> Callable[..., dict[str, Any]]:
    """The network's function of its inputs, by the file alone: *inputs → {name: array}."""
    if format == "safetensors":
        module, variables, architecture, info = read_safetensors(path, trust_code=trust_code)
        run = _compiled(module, json.dumps(architecture.to_json()))
        return partial(run, in_boxes(module, variables, architecture, info))
    exported = _deserialized(path)

    def call(*inputs: Any) -> dict[str, Any]:
        args, keywords = call_arguments(inputs, {})
        return _named(exported.call(*args, **keywords))

    return call


def _deserialized(path: Path) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # flatbuffers trips over damage in ways of its own
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def packed(architecture: Architecture, variables: Mapping[str, Any], info: Mapping[str, Any]) -> bytes:
    """A network as the content of a safetensors file."""
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in flatten(variables).items()}
    metadata = {
        "format": "kdsearch_jax",
        "architecture": json.dumps(architecture.to_json()),
        "info": json.dumps(dict(info)),
        "leaves": json.dumps({name: describe(array) for name, array in arrays.items()}),
    }
    return _in_order(safetensors.numpy.save(arrays, {**metadata, "sha256": seal(metadata)}))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names; safetensors writes them in a random one."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _stablehlo(module: Any, variables: Mapping[str, Any], architecture: Architecture) -> bytes:
    (batch,) = jax.export.symbolic_shape("batch")
    args, keywords = call_arguments(architecture.call_spec.example(batch), {})
    function = jax.jit(_function(module, variables, architecture))
    try:
        with fast_convolutions(portable=True), _without_call_stacks():
            exported = jax.export.export(function, platforms=PLATFORMS)(*args, **keywords)
        return bytes(exported.serialize())
    except Exception as error:  # whatever the model's code does with a size that is not a number
        raise CannotExportError(
            f"model {architecture.model!r} cannot be exported as stablehlo with a free batch size: "
            f"{' '.join(str(error).split())[:300]}; export safetensors only"
        ) from error


@contextlib.contextmanager
def _without_call_stacks() -> Iterator[None]:
    """Programs that are lowered meanwhile do not say which code asked for them: equal networks are equal files."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _checked_elsewhere(network_dir: str | Path, folder: Path, formats: Sequence[Format]) -> dict[str, dict[str, float]]:
    """`check` in a fresh process, on the CPU; raises ValueError with what it says."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", _CHECK, str(Path(network_dir).absolute()), str(folder), *formats]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"an exported file failed its check in a fresh process: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def is_whole(directory: Path) -> bool:
    """Whether an export has ended here: manifest.json, written last, and all files that it names, by their digests."""
    try:
        files = read_object(directory / "manifest.json")["files"]
        return files.keys() <= {f"student.{format}" for format in FORMATS} and all(
            hashlib.sha256((directory / name).read_bytes()).hexdigest() == file["sha256"]
            for name, file in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _manifest(
    folder: Path, architecture: Architecture, info: Mapping[str, Any], differences: Mapping[str, Any]
) -> dict[str, Any]:
    images = architecture.custom_call is None
    trust = (
        ", trust_code=True" if ":" in architecture.model and not architecture.model.startswith(OBJECT_PREFIX) else ""
    )
    inputs, outputs = ("images", "logits") if images else (", ".join(architecture.call_spec.arguments), "outputs")
    taken: dict[str, Any] = {
        "shape": ["batch", *architecture.input_shape], "dtype": "float32", "what": "(image/255 - mean)/std"
    }  # fmt: skip
    files = {}
    for format, difference in differences.items():
        content = (folder / f"student.{format}").read_bytes()
        files[f"student.{format}"] = {
            "format": format,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            **difference,
            "use": _USE[format].format(file=f"student.{format}", inputs=inputs, outputs=outputs, trust=trust),
        }
    return {
        "input": taken if images else architecture.call_spec.to_json()["inputs"],
        "output": {"dtype": "float32", "what": "logits (batch, classes)" if images else "as the network's"},
        "architecture": architecture.to_json(),
        "info": {name: value for name, value in info.items() if name != BASE},
        "jax": jax.__version__,  # a newer one reads the stablehlo file as well, an older one may not
        "platforms": list(PLATFORMS),
        "files": files,
    }
