"""Bad files of arrays and images: npz, safetensors, msgpack, of PyTorch, Orbax, Hugging Face and TFDS."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import seeds
from benchmarks.fuzz.cases import IMAGES, TRAIN, WRONG, Case, Write, both, config, copied, mutated, replaced

TERA = 10**12
TEACHER = (*TRAIN, "--teacher-from", "teacher")
NAMED = ("--model.name", "cifar_resnet", "--model.arguments", "depth=8")  # which has names in PyTorch


def file(name: str, content: bytes) -> Write:
    """A case's only file."""
    return lambda box: (box / name).write_bytes(content) and None


def npz(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Data sets of one file."""
    valid = (root / "data.npz").read_bytes()
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.arange(8)

    def saved(**arrays: Any) -> bytes:
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()

    def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", kind) as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        return content.getvalue()

    def npy(shape: str, dtype: str = "|u1", data: bytes = b"") -> bytes:
        head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data

    good = npy("(8,)", "<i8", labels.tobytes())
    contents = {
        "empty": b"",
        "text": b"hello",
        "npy": npy("(1,)", data=b"x"),
        "no arrays": saved(),
        "objects": saved(images=np.array([{}, []], object), labels=labels),
        "no labels": saved(images=images),
        "labels 2D": saved(images=images, labels=images),
        "float labels": saved(images=images, labels=labels / 2),
        "negative": saved(images=images, labels=-labels),
        "gaps": saved(images=images, labels=labels * 1000),
        "large labels": saved(images=images, labels=labels + 2**40),
        "text images": saved(images=np.array(["a"] * 8), labels=labels),
        "NaN": saved(images=np.full((8, 8, 8, 1), np.nan), labels=labels),
        "range": saved(images=images + 300.0, labels=labels),
        "complex": saved(images=images * 1j, labels=labels),
        "no examples": saved(images=images[:0], labels=labels[:0]),
        "no pixels": saved(images=images[:, :0], labels=labels),
        "two examples": saved(images=images[:2], labels=labels[:2]),
        "one class": saved(images=images, labels=labels * 0),
        "uneven": saved(images=images, labels=labels[:3]),
        "6D": saved(images=images[..., None, None], labels=labels),
        "dates": saved(images=images, labels=labels.astype("M8[s]")),
        "tera": zipped({"images.npy": npy(f"({TERA},)"), "labels.npy": good}),
        "tera deflated": zipped({"images.npy": npy(f"({TERA},)"), "labels.npy": good}, zipfile.ZIP_DEFLATED),
        "bomb": zipped({"images.npy": npy(f"({2**35},)") + bytes(1 << 24), "labels.npy": good}, zipfile.ZIP_DEFLATED),
        "negative shape": zipped({"images.npy": npy("(-1,)"), "labels.npy": good}),
        "code": zipped({"images.npy": npy("(__import__('os').system('touch outside'),)"), "labels.npy": good}),
        "deep header": zipped({"images.npy": npy("(" * 5000 + ")" * 5000), "labels.npy": good}),
        "outside": zipped({"../outside.npy": good, "/tmp/outside.npy": good}),
        "not npy": zipped({"images": b"x", "labels": b"y"}),
        "twice": zipped({"images.npy": good}) + zipped({"images.npy": good}),
        "pickle": zipped({"images.npy": npy("(1,)", "|O", b"\x80\x04cos\nsystem\n."), "labels.npy": good}),
        "structured": zipped({"images.npy": npy("(1,)", "|V8", bytes(8)), "labels.npy": good}),
        "version": zipped({"images.npy": b"\x93NUMPY\x09\x00" + npy("(1,)")[8:], "labels.npy": good}),
        "lzma": zipped({"images.npy": npy("(9,)", data=bytes(8)), "labels.npy": good}, zipfile.ZIP_LZMA),
    }
    line = (*TRAIN, "--data.name", "npz:x.npz")
    for name, content in contents.items():
        yield Case("npz", name, "teacher", line, both(config(root), file("x.npz", content)))
    network = copied(root, "net")
    for i in range(20):
        yield Case(
            "npz",
            f"mutant {i}",
            "evaluate",
            ("net", "--data", "npz:x.npz"),
            both(network, file("x.npz", mutated(valid, random))),
            "npz",
        )


def safetensors(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Weights as teachers, and exported students."""
    valid = (root / "weights.safetensors").read_bytes()
    size = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    name = "params/dense/kernel"

    def packed(record: Any, more: bytes = b"") -> bytes:
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        return struct.pack("<Q", len(text)) + text + data + more

    def changed(**entry: Any) -> bytes:
        return packed({**header, name: {**header[name], **entry}})

    contents = {
        "empty": b"",
        "short": b"\x01",
        "header of 2**63": struct.pack("<Q", 2**63 - 1) + valid[8:],
        "header of 2**62": struct.pack("<Q", 2**62) + valid[8:],
        "header of 0": bytes(8) + data,
        "no object": packed([]),
        "deep": packed(b"[" * 100_000),
        "metadata of numbers": packed({**header, "__metadata__": {"a": 1}}),
        "more bytes": packed(header, b"x"),
        "fewer bytes": valid[:-1],
        "tera": changed(shape=[TERA]),
        "negative": changed(shape=[-1]),
        "overflow": changed(shape=[2**62, 8]),
        "no such type": changed(dtype="F12"),
        "type of 8 bits": changed(dtype="F8_E4M3"),
        "offsets back": changed(data_offsets=[8, 0]),
        "offsets beyond": changed(data_offsets=[0, 2**60]),
        "overlap": changed(data_offsets=[0, 160]),
        "other names": packed({f"x/{key}": value for key, value in header.items()}),
        "array and folder": packed(
            {(f"{name}/x" if key == "params/dense/bias" else key): value for key, value in header.items()}
        ),
        "no arrays": struct.pack("<Q", 2) + b"{}",
        "integers": changed(dtype="I32"),
        "NaN": valid[:-4] + struct.pack("<f", float("nan")),
        "inf": valid[:-4] + struct.pack("<f", float("inf")),
        "torch names": packed({key.replace("/", "."): value for key, value in header.items()}),
        "many": packed({f"params/{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}),
    }
    line = (*TRAIN, "--teacher-from", "x.safetensors")
    for key, content in contents.items():
        yield Case("safetensors", key, "teacher", line, both(config(root), file("x.safetensors", content)))
    exported = (root / "out/student.safetensors").read_bytes()
    size = struct.unpack("<Q", exported[:8])[0]
    record, tail = json.loads(exported[8 : 8 + size]), exported[8 + size :]
    for i in range(24):
        if i % 2:
            metadata = dict(record["__metadata__"])
            part = ("architecture", "leaves")[i // 2 % 2]
            metadata[part] = json.dumps(replaced(json.loads(metadata[part]), random))
            text = json.dumps({**record, "__metadata__": metadata}).encode()
            content = struct.pack("<Q", len(text)) + text + tail
        else:
            content = mutated(exported, random)
        yield Case(
            "safetensors",
            f"mutant {i}",
            "export",
            ("net", "--out", "out", "--check", "--formats", "safetensors"),
            both(
                lambda box: shutil.copytree(root / "net", box / "net") and None,
                lambda box: (box / "out").mkdir(),
                file("out/student.safetensors", content),
            ),
            "check",
        )


def others(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """Weights of other kinds: Flax's msgpack, PyTorch's files, directories of Orbax and of Hugging Face."""
    for kind in (_msgpack, _torch, _orbax, _huggingface):
        yield from kind(root, random)


def _msgpack(root: Path, random: np.random.Generator) -> Iterator[Case]:
    packed = (root / "weights.msgpack").read_bytes()
    contents = {
        "empty": b"",
        "nil": b"\xc0",
        "a billion": b"\xdd\x3b\x9a\xca\x00",
        "many empty": b"\xdd\x01\x00\x00\x00" + b"\x80" * (1 << 24),
        "deep": b"\x91" * 100_000 + b"\xc0",
        "reserved": b"\xc1",
        "two": packed + b"\xc0",
        "ext of 4 GiB": b"\xc9\xff\xff\xff\xff\x01",
        "ext of dictionaries": b"\xc9\x01\x00\x00\x00\x01" + b"\xdd\x00\xff\xff\xfb" + b"\x80" * (0x1000000 - 5),
        "objects": b"\xc7\x0a\x01\x93\x91\x01\xa1O\xc4\x03abc",
        "cut": packed[:-9],
        "text": b"hello",
    }
    line = (*TRAIN, "--teacher-from", "x.msgpack")
    for name, content in contents.items():
        yield Case("others", f"msgpack {name}", "teacher", line, both(config(root), file("x.msgpack", content)))
    for i in range(12):
        write = both(config(root), file("x.msgpack", mutated(packed, random)))
        yield Case("others", f"msgpack mutant {i}", "teacher", line, write, "msgpack")


def _torch(root: Path, _: np.random.Generator) -> Iterator[Case]:
    torch = (root / "weights.pth").read_bytes()
    code = b"\x80\x02cos\nsystem\nX\x0d\x00\x00\x00touch outside\x85R."
    with zipfile.ZipFile(io.BytesIO(torch)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    hostile, deflated = io.BytesIO(), io.BytesIO()
    for target, kind in ((hostile, zipfile.ZIP_STORED), (deflated, zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(target, "w", kind) as archive:
            for name, member in members.items():
                archive.writestr(name, code if kind == zipfile.ZIP_STORED and name.endswith("data.pkl") else member)
    pickles = {
        "empty": b"",
        "text": b"hello",
        "code": code,
        "code in a zip": hostile.getvalue(),
        "deflated": deflated.getvalue(),
        "cut": torch[: len(torch) // 2],
    }
    for name, content in pickles.items():
        for suffix in (".pth", ".th"):
            line = (*TRAIN, "--teacher-from", f"x{suffix}", *NAMED)
            yield Case("others", f"{suffix} {name}", "teacher", line, both(config(root), file(f"x{suffix}", content)))


def _orbax(root: Path, random: np.random.Generator) -> Iterator[Case]:
    files = sorted(path.relative_to(root / "orbax") for path in (root / "orbax").rglob("*") if path.is_file())
    for i in range(12):
        path, seed = files[random.integers(len(files))], int(random.integers(2**31))

        def damage(box: Path, path: Path = path, seed: int = seed) -> None:
            shutil.copytree(root / "orbax", box / "teacher")
            content = (box / "teacher" / path).read_bytes()
            # A flipped byte of a foreign checkpoint, which has no digests, may pass: whole halves are cut off here.
            (box / "teacher" / path).write_bytes(content[: np.random.default_rng(seed).integers(len(content) // 2 + 1)])

        yield Case(
            "others",
            f"orbax {i} {path.name}",
            "teacher",
            TEACHER,
            both(config(root), damage),
            "orbax",
        )


def _huggingface(root: Path, _: np.random.Generator) -> Iterator[Case]:
    for i, value in enumerate(WRONG):
        for key in ("model_type", "hidden_size", "depths", "image_size"):
            record = {"model_type": "vit" if key != "depths" else "resnet", key: value}

            def hub(box: Path, record: Any = record) -> None:
                (box / "teacher").mkdir()
                (box / "teacher/config.json").write_text(json.dumps(record))
                shutil.copy(root / "weights.safetensors", box / "teacher/model.safetensors")

            if (i + len(key)) % 4 == 0:
                yield Case("others", f"hub {key} {value!r:.12}", "teacher", TEACHER, both(config(root), hub))
    for shards in (
        {"a": "../x.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "missing.safetensors"},
        {"a": 1},
        [],
        {"a": "x\u0000.safetensors"},
    ):

        def index(box: Path, shards: Any = shards) -> None:
            (box / "teacher").mkdir()
            (box / "teacher/config.json").write_text('{"model_type": "vit"}')
            (box / "teacher/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

        yield Case("others", f"hub shards {shards!r:.30}", "teacher", TEACHER, both(config(root), index))


def images(root: Path, random: np.random.Generator) -> Iterator[Case]:
    """A data set of TFDS with one bad image."""
    png, jpeg = seeds.encoded("PNG"), seeds.encoded("JPEG")
    large = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    contents = {
        "empty": b"",
        "text": b"hello",
        "PNG cut": png[: len(png) // 2],
        "JPEG cut": jpeg[: len(jpeg) // 2],
        "TIFF": seeds.encoded("TIFF"),
        "PPM": seeds.encoded("PPM"),
        "ICO": seeds.encoded("ICO", 16, "RGB"),
        "PDF": b"%PDF-1.4\n",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(outside) (w) file\n",
        "3.6 billion pixels": large + b"\0\0\0\0" + bytes(64),
        "GIF of 65535²": b"GIF89a"
        + b"\xff" * 4
        + b"\x80\0\0"
        + bytes(3)
        + b"\xff" * 3
        + b","
        + bytes(4)
        + b"\xff" * 4
        + b"\0\2\2D\1\0;",
        "BMP of 2**31": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 8, 0, 0, 0, 0, 0, 0),
    }

    def write(content: bytes) -> Write:
        return both(copied(root, "net"), lambda box: seeds.tfds_images(box / "tfds", [*[png] * 23, content]))

    for name, content in contents.items():
        yield Case("images", name, "evaluate", IMAGES, write(content))
    for i in range(8):  # of PNG, which has checksums: a changed JPEG is another picture
        yield Case("images", f"mutant {i}", "evaluate", IMAGES, write(mutated(png, random)), "images")
