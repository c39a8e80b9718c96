"""What each reader of a format promises of any bytes: it reads them, or raises one of the errors that it names.

Every function takes the content of a file, calls a reader, and raises AssertionError where its promise is broken;
any other exception that is not caught here breaks it too. `EXAMPLES` are valid contents to begin from.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Reader = Callable[[bytes], None]


@cache
def _place() -> Path:
    """A file in memory, where there is such a file system."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="kdsearch-fuzz-", dir=shared if shared.is_dir() else None)) / "x"


def _stored(content: bytes) -> Path:
    _place().write_bytes(content)
    return _place()


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass" if content[:1] == b"{" else "replace")


def read_json(content: bytes) -> None:
    """What is read can be written and read again."""
    from kdsearch_jax.storage.files import DamagedError, read_json

    try:
        value = read_json(_stored(content))
    except DamagedError:
        return
    json.dumps(value)


def read_arrays(content: bytes) -> None:
    """No more than the limit, and plain."""
    from kdsearch_jax.storage.files import DamagedError, read_arrays

    try:
        arrays = read_arrays(_stored(content), limit=1 << 20)
    except DamagedError:
        return
    assert sum(array.nbytes for array in arrays.values()) <= 1 << 20
    assert not any(array.dtype.hasobject for array in arrays.values())


def read_safetensors(content: bytes) -> None:
    """No more than the file has."""
    from kdsearch_jax.storage import safe_readers
    from kdsearch_jax.storage.files import DamagedError

    try:
        arrays, metadata = safe_readers.read_safetensors(_stored(content))
    except DamagedError:
        return
    assert sum(array.nbytes for array in arrays.values()) <= len(content)
    assert all(isinstance(text, str) for text in metadata.values())


def read_msgpack(content: bytes) -> None:
    """Values are counted as msgpack counts them, and what Flax reads is not refused."""
    from flax import serialization

    from kdsearch_jax.storage import safe_readers
    from kdsearch_jax.storage.files import DamagedError

    try:
        safe_readers.read_msgpack(_stored(content))
    except DamagedError as error:
        try:
            serialization.msgpack_restore(content)
        except Exception:
            return
        raise AssertionError(f"Flax reads it: {content[:100]!r}") from error
    assert 0 < safe_readers.count_values(content) <= len(content)


def _parsed(content: bytes) -> Any:
    from kdsearch_jax.storage.files import parse_json

    try:
        return parse_json(_text(content))
    except ValueError:
        return None


def read_architecture(content: bytes) -> None:
    """What is read is written the same again, and asks for no input out of bounds."""
    from kdsearch_jax.adapters.architecture import Architecture
    from kdsearch_jax.adapters.call_spec import LARGEST

    try:
        found = Architecture.from_json(_parsed(content))
    except ValueError as error:
        assert len(str(error)) < 2000
        return
    assert Architecture.from_json(found.to_json()) == found
    assert int(np.prod(found.input_shape, dtype=object)) <= LARGEST


def build_module(content: bytes) -> None:
    """A network of ours is made, in no time, or an argument is named; no module is imported."""
    import sys

    from kdsearch_jax.adapters import registry

    record = _parsed(content)
    if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
        return
    name = str(record.get("model"))
    before = set(sys.modules)
    try:
        registry.check_trust(name)
        if ":" not in name:
            registry.build(name, record["arguments"])
    except (ValueError, TypeError) as error:
        assert len(str(error)) < 3000
    assert not {module for module in set(sys.modules) - before if not module.startswith(("jax", "flax", "numpy"))}


def read_config(content: bytes) -> None:
    """An experiment that is read is written, and read, the same again."""
    from kdsearch_jax.runs.config import from_json, to_json

    record = _parsed(content)
    if not isinstance(record, dict):
        return
    try:
        found = from_json(record)
    except ValueError as error:
        assert str(error)
        return
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def read_network(content: bytes) -> None:
    """network.json: digests of arrays whose sizes are numbers."""
    from kdsearch_jax.storage import networks
    from kdsearch_jax.storage.files import DamagedError

    record = _parsed(content)
    if isinstance(record, dict) and isinstance(record.get("payload"), dict):
        try:
            from kdsearch_jax.storage.files import json_digest

            content = json.dumps({"payload": record["payload"], "sha256": json_digest(record["payload"])}).encode()
        except ValueError:  # a lone surrogate
            return
    try:
        payload = networks._read_network_json(_stored(content))
    except DamagedError:
        return
    assert all(size >= 0 for leaf in payload["leaves"].values() for size in leaf["shape"])


def read_huggingface(content: bytes) -> None:
    """config.json of Hugging Face."""
    from kdsearch_jax.models.pretrained import config_reader, huggingface_models

    try:
        config = config_reader.read_json(_stored(content))
        huggingface_models.model_spec(Path("config.json"), config, "classifier", 10)
    except ValueError as error:
        assert str(error)


def decode_image(content: bytes) -> None:
    """uint8 of three channels, and no more pixels than allowed."""
    from kdsearch_jax.data import images
    from kdsearch_jax.storage.files import DamagedError

    try:
        found = images.open_image(content)
        if found.width * found.height > 1 << 20:  # allowed, and too slow to be tried a million times
            return
        array = images.to_array(found, 3)
    except DamagedError:
        return
    assert array.dtype == np.uint8
    assert array.ndim == 3
    assert array.shape[2] == 3


def read_manifest(content: bytes) -> None:
    """What is listed of an object store lies below its directory, and is written the same again."""
    from kdsearch_jax.storage.files import DamagedError
    from kdsearch_jax.storage.manifest import Manifest

    try:
        found = Manifest.from_json(content, "it")
    except DamagedError as error:
        assert len(str(error)) < 2000
        return
    assert Manifest.from_json(found.to_json(), "it") == found
    assert all(part not in ("", ".", "..") for name in found.files for part in name.split("/"))


READERS: dict[str, Reader] = {
    "json": read_json,
    "npz": read_arrays,
    "safetensors": read_safetensors,
    "msgpack": read_msgpack,
    "architecture": read_architecture,
    "models": build_module,
    "config": read_config,
    "network": read_network,
    "huggingface": read_huggingface,
    "images": decode_image,
    "manifest": read_manifest,
}


def examples(name: str) -> list[bytes]:
    """Valid contents for a reader."""
    arrays = {"params/a/kernel": np.ones((2, 3), np.float32), "params/b": np.arange(4, dtype=np.int32)}
    if name == "npz":
        plain, small = io.BytesIO(), io.BytesIO()
        np.savez(plain, **arrays)
        np.savez_compressed(small, **arrays)
        return [plain.getvalue(), small.getvalue()]
    if name == "safetensors":
        import safetensors.numpy

        return [safetensors.numpy.save(arrays, {"architecture": "{}"})]
    if name == "msgpack":
        from flax import serialization

        tree = {"params": {"a": arrays["params/b"], "b": np.float32(1), "c": 1 + 2j, "d": [1, None, "x", 1.5, True]}}
        return [serialization.msgpack_serialize(tree)]
    if name == "images":
        from benchmarks.fuzz import seeds

        return [seeds.encoded(kind, 4, mode) for kind in ("PNG", "JPEG", "GIF", "BMP") for mode in ("L", "RGB")]
    if name == "manifest":
        from kdsearch_jax.storage.manifest import FileRecord, Manifest

        files = {"a.json": FileRecord(3, "0" * 64, None), "search/log": FileRecord(5, None, None)}
        return [Manifest(files, "writer", 7).to_json()]
    from kdsearch_jax.adapters.architecture import Architecture
    from kdsearch_jax.runs.config import to_json

    if name == "config":
        from benchmarks.fuzz import seeds

        return [json.dumps(to_json(seeds.experiment())).encode()]
    if name == "network":
        leaf = {"shape": [2, 3], "dtype": "float32", "sha256": "0" * 64}
        payload = {
            "format": "kdsearch_jax network",
            "version": 1,
            "architecture": "0",
            "info": {},
            "leaves": {"a/b": leaf},
        }
        return [json.dumps({"payload": payload, "sha256": ""}).encode()]
    if name == "huggingface":
        kinds = ("resnet", "vit", "deit", "convnext", "swin", "mobilenet_v2")
        return [json.dumps({"model_type": kind, "image_size": 32, "num_channels": 3}).encode() for kind in kinds]
    call = {"arguments": ["x", "m=y"], "inputs": {"x": "float32[8,8]", "y": ["bool[3]"]}, "train": {}, "eval": {"a": 1}}
    plain = Architecture(
        "vit", {"num_classes": 10, "width": 8, "depth": 2, "heads": 2}, input_shape=(8, 8, 1)
    ).to_json()
    layers = {
        **plain,
        "model": "mlp",
        "arguments": {"num_classes": 2, "hidden": [4, 4]},
        "layers": {"dense1": {"features": 3}},
    }
    return [
        json.dumps(record).encode() for record in (plain, layers, {**plain, "call": call}, {**plain, "model": "a.b:C"})
    ]
