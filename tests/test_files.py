"""Atomic writes and bounded reads of `kdsearch_jax.storage.files`."""

import io
import json
import resource
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsearch_jax.storage import files


def test_round_trip(tmp_path):
    arrays = {"a/b": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 4), np.int8), "number": np.float32(2)}
    for compress in (False, True):
        files.write_arrays(tmp_path / "x.npz", arrays, compress=compress)
        found = files.read_arrays(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value)
    files.write_json(tmp_path / "x.json", {"a": [1, None, "ä"]})
    assert files.read_json_object(tmp_path / "x.json") == {"a": [1, None, "ä"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]


def test_flipped_bits_of_sealed_json_are_detected_or_harmless(tmp_path):
    path, value = tmp_path / "x.json", {"kept": [1, 2], "budget": {"macs": 0.5}, "step": 16}
    files.write_sealed(path, value)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 3, 5):
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
            try:
                found = files.read_sealed(path)
            except files.DamagedError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                # If the key of the digest is damaged, the file counts as one of an older version; the rest is intact.
                assert {key: found[key] for key in value} == value
    path.write_text(json.dumps(value))
    assert files.read_sealed(path) == value  # written by an older version


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, 1)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left.*x.json"):
        files.write_json(path, 2)
    assert json.loads(path.read_text()) == 1 and len(list(tmp_path.iterdir())) == 1


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_flipped_bits_of_an_npz_are_detected_or_harmless(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    arrays = {"weights": np.random.default_rng(0).normal(size=(20, 3)), "keep": np.arange(9) % 2 == 0}
    files.write_arrays(path, arrays)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = files.read_arrays(path)
    except files.DamagedError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)


def _npz(path, header: dict, content: bytes, compression=zipfile.ZIP_DEFLATED):
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)


def test_declared_sizes_are_checked_before_memory_is_allocated(tmp_path):
    bomb, liar = tmp_path / "bomb.npz", tmp_path / "liar.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 28,)}
    _npz(bomb, header, bytes(1 << 28))
    assert bomb.stat().st_size < 1 << 20
    _npz(liar, {**header, "shape": (1 << 40,)}, b"abc")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(files.DamagedError, match="limit"):
        files.read_arrays(bomb, 1 << 20)
    with pytest.raises(files.DamagedError, match="declares"):
        files.read_arrays(liar)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


class _Evil:
    def __reduce__(self):
        return sys.exit, ("ran",)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([_Evil()], object))
    with pytest.raises(files.DamagedError, match="objects"):
        files.read_arrays(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"{}", b"[" * 10**5, b"\xff\xfe"])
def test_invalid_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(files.DamagedError) as error:
        files.read_arrays(path)
    assert "\n" not in str(error.value)
    if content != b"{}":
        with pytest.raises(files.DamagedError):
            files.read_json(path)
    with pytest.raises(files.DamagedError, match="bytes"):
        files.read_json(path, -1)


def test_a_single_array_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    (tmp_path / "x.npy").write_bytes(buffer.getvalue())
    with pytest.raises(files.DamagedError, match="single array"):
        files.read_arrays(tmp_path / "x.npy")
