"""A finished network as one file for others: `python -m kdsearch_jax.export NETWORK --out DIRECTORY`.

    student.safetensors   the arrays under flat names ("params/stage1/conv/kernel"); architecture, info and digests as
                          metadata. `load_safetensors` makes the module of it; any other program can read the arrays.
    student.stablehlo     the compiled-to-be function images → logits with its arrays inside, for CPU, CUDA and TPU and
                          any batch size. `jax.export.deserialize` runs it; neither Flax nor this package is needed.
    manifest.json         what each file holds, takes and returns, and how far it was off.

Both take what the network takes (normalised float32 images, or the inputs that `architecture.json` describes) and
return its outputs. Each file is read again by a fresh process, run on random inputs at two batch sizes, and compared
with the network's own outputs before it gets its name. That process runs on the CPU, in full float32, always.
A network of a module object, which no other process can make again, gives that process its outputs along.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kdsearch_jax import cli, foreign, storage
from kdsearch_jax.checkpoint import describe, fitting_module, flatten, load_network, unflatten, verified
from kdsearch_jax.convolution import fast_convolutions
from kdsearch_jax.files import DamagedError, flush, naming, parse_json, read_object, seal
from kdsearch_jax.library import bound
from kdsearch_jax.models import GIVEN, check_trust
from kdsearch_jax.student import Architecture
from kdsearch_jax.tracing.topology import path_string

Format = Literal["safetensors", "stablehlo"]
FORMATS: tuple[Format, ...] = ("safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5  # of the largest logit
_BATCH_SIZES = (2, 5)
_EXPECTED = ".expected.npz"
_USE = {
    "safetensors": "module, variables = kdsearch_jax.export.load_safetensors({file!r}{trust}); "
    "{outputs} = module.apply(variables, {inputs})",
    "stablehlo": "{outputs} = jax.export.deserialize(bytearray(open({file!r}, 'rb').read())).call({inputs})",
}
_CHECK = (
    "import json, sys; from kdsearch_jax import export; "
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
      network_dir: what `kdsearch_jax.checkpoint.save_network` wrote.
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
                expected: Any = _expected(module, variables, architecture)
                np.savez(temporary / _EXPECTED, **expected)
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
    path = storage.local(path, "path")
    architecture, variables = _read_safetensors(path)
    if module is None:
        check_trust(architecture.model, trust_code)
    return fitting_module(architecture, variables, path, module), variables


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


def _read_safetensors(path: Path) -> tuple[Architecture, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .safetensors file written by kdsearch_jax.export")
    try:
        arrays, metadata = foreign.read_safetensors(path)
        if "architecture" not in metadata or "leaves" not in metadata:
            raise ValueError("it holds no architecture; kdsearch_jax.export writes one")
        if "sha256" in metadata and seal({k: v for k, v in metadata.items() if k != "sha256"}) != metadata["sha256"]:
            raise ValueError("what it says of itself is not what was saved")  # a file of an older version has no digest
        architecture = Architecture.from_json(parse_json(metadata["architecture"]))
        leaves = parse_json(metadata["leaves"])
        if not isinstance(leaves, dict) or leaves.keys() != arrays.keys():
            raise ValueError("its arrays are not those that were saved")
        variables = unflatten({name: jnp.asarray(array) for name, array in verified(leaves, arrays).items()})
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split()).removeprefix(f"{path} ")
        raise ValueError(f"{path} cannot be loaded: {said}") from error
    return architecture, variables


def check(
    network_dir: str | Path, out_dir: str | Path, formats: Sequence[Format] = FORMATS, *, trust_code: bool = False
) -> dict[str, dict[str, float]]:
    """Compares exported files with the network: {format: {"max_difference", "logits_scale"}}.

    Runs both on random inputs at two batch sizes, where JAX runs by default. On a GPU or TPU, whose matrix products are
    not full float32 by default, the comparison fails for that alone: set JAX_PLATFORMS=cpu.

    Raises:
      ValueError: some output is further off than 1e-5 of the largest, or a file cannot be read.
    """
    network_dir, out_dir = storage.local(network_dir, "network_dir"), storage.local(out_dir, "out_dir")
    stored = out_dir / _EXPECTED
    if stored.is_file():
        architecture, expected = (
            Architecture.from_json(read_object(Path(network_dir) / "architecture.json")),
            {},
        )
        with np.load(stored, allow_pickle=False) as file:
            expected = dict(file)
        formats_run = [format for format in formats if format != "safetensors"]
    else:
        module, variables, architecture, _ = load_network(network_dir, trust_code=trust_code)
        expected, formats_run = _expected(module, variables, architecture), list(formats)
    if not all(np.isfinite(value).all() for value in expected.values()):
        raise ValueError(f"the logits of {network_dir} are not finite; its training diverged")
    scale = max(float(np.abs(value).max()) for value in expected.values())
    found = {}
    for format in formats:
        path, difference = Path(out_dir) / f"student.{format}", 0.0
        if format in formats_run:
            for name, actual in _outputs(_runner(path, format, trust_code), architecture).items():
                if actual.shape != expected[name].shape:
                    raise ValueError(f"{path} returns {actual.shape}, the network {expected[name].shape}")
                # A maximum that meets NaN is NaN, which no comparison below accepts.
                difference = np.maximum(difference, np.abs(actual - expected[name]).max())
        else:
            _read_safetensors(path)  # every array is compared with its digest
        if not difference <= TOLERANCE * scale:
            raise ValueError(
                f"{path} computes something else than the network: logits differ by {difference:.3g}, allowed are "
                f"{TOLERANCE:g} of {scale:.3g}"
            )
        found[format] = {"max_difference": float(difference), "logits_scale": scale}
    return found


def _expected(module: Any, variables: Any, architecture: Architecture) -> dict[str, np.ndarray]:
    """The network's own outputs on the inputs of `check`."""
    return _outputs(jax.jit(_function(module, variables, architecture)), architecture)


def _outputs(run: Callable[..., Any], architecture: Architecture) -> dict[str, np.ndarray]:
    """Every output at every batch size, by a flat name."""
    found = {}
    for size in _BATCH_SIZES:
        args, keywords = bound(architecture.called.random(size, np.random.default_rng(size)), {})
        outputs = run(*args, **keywords)
        found |= {f"{size}/{i}": np.asarray(leaf, np.float32) for i, leaf in enumerate(jax.tree.leaves(outputs))}
    return found


def _function(module: Any, variables: Any, architecture: Architecture) -> Callable[..., Any]:
    """The network in inference mode as a function of its inputs alone."""
    static = architecture.called.keywords(module, train=False)
    return lambda *args, **keywords: _plain(module.apply(variables, *args, **keywords, **static))


def _plain(outputs: Any) -> Any:
    """Outputs of a type of the model's own, which a file cannot hold, as {path: array}; others as they are."""

    def builtin(tree: Any) -> bool:
        if isinstance(tree, (dict, list, tuple)) and type(tree) in (dict, list, tuple):
            return all(map(builtin, tree.values() if isinstance(tree, dict) else tree))
        return tree is None or jax.tree_util.all_leaves([tree])

    named = jax.tree_util.tree_flatten_with_path(outputs)[0]
    return outputs if builtin(outputs) else {path_string(path): leaf for path, leaf in named}


def _runner(path: Path, format: Format, trust_code: bool) -> Callable[..., Any]:
    """The network's function of its inputs, by the file alone."""
    if format == "safetensors":
        architecture, _ = _read_safetensors(path)
        return jax.jit(_function(*load_safetensors(path, trust_code=trust_code), architecture))
    return _deserialized(path).call


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
    return safetensors.numpy.save(arrays, {**metadata, "sha256": seal(metadata)})


def _stablehlo(module: Any, variables: Mapping[str, Any], architecture: Architecture) -> bytes:
    (batch,) = jax.export.symbolic_shape("batch")
    args, keywords = bound(architecture.called.example(batch), {})
    function = jax.jit(_function(module, variables, architecture))
    try:
        with fast_convolutions(portable=True):
            exported = jax.export.export(function, platforms=PLATFORMS)(*args, **keywords)
        return bytes(exported.serialize())
    except Exception as error:  # whatever the model's code does with a size that is not a number
        raise CannotExportError(
            f"model {architecture.model!r} cannot be exported as stablehlo with a free batch size: "
            f"{' '.join(str(error).split())[:300]}; export safetensors only"
        ) from error


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
    images = architecture.call is None
    trust = ", trust_code=True" if ":" in architecture.model and not architecture.model.startswith(GIVEN) else ""
    inputs, outputs = ("images", "logits") if images else (", ".join(architecture.called.arguments), "outputs")
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
        "input": taken if images else architecture.called.to_json()["inputs"],
        "output": {"dtype": "float32", "what": "logits (batch, classes)" if images else "as the network's"},
        "architecture": architecture.to_json(),
        "info": dict(info),
        "jax": jax.__version__,  # a newer one reads the stablehlo file as well, an older one may not
        "platforms": list(PLATFORMS),
        "files": files,
    }


def main(argv: list[str]) -> int:
    """Exports a network, or checks what was exported before, and prints the files' names."""
    import tyro  # 0.1 s, for the command only

    @dataclass(frozen=True, kw_only=True)
    class ExportOptions(cli.Options):
        network: tyro.conf.Positional[Path]
        """The network's directory, such as RUN/student."""
        out: Path
        """The directory to write to; may be the network's."""
        formats: tuple[Format, ...] = FORMATS
        """What to write."""
        check: bool = False
        """Only compare the files that are there with the network."""

    options = cli.parse_options(argv, ExportOptions, "kdsearch_jax.export", (__doc__ or "").split("\n\n")[0])
    if options.check:
        found = check(options.network, options.out, options.formats, trust_code=options.trust_code)
    else:
        found = export(options.network, options.out, options.formats, trust_code=options.trust_code)["files"]
    for name, file in found.items():
        told = f"{name}: largest difference {file['max_difference']:.2g}, of logits up to {file['logits_scale']:.3g}"
        print(storage.shown(f"{options.out}: {told}"))
    return 0


if __name__ == "__main__":
    cli.run(main)
