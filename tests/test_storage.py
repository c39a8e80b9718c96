"""Directories in an object store behave like directories on a disk, whatever is killed or fails.

The store is `tests/object_store.py`: objects by name, no folders, nothing renamed, nothing appended.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
import jax.numpy as jnp
import numpy as np
import object_store
import pytest

import kdsearch_jax
from kdsearch_jax import storage, teacher
from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.evaluate import main as evaluate_main
from kdsearch_jax.runs import command_line
from kdsearch_jax.storage import arrays, export_formats, mirror, networks, scratch
from kdsearch_jax.storage.manifest import MANIFEST, FileRecord, Manifest
from kdsearch_jax.storage.mirror import Mirror
from kdsearch_jax.training.checkpoints import Checkpointer

TINY = str(Path(__file__).parent / "tiny.py")
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


class Killed(BaseException):
    """Simulates the death of a process at a request."""


class Store:
    """The stand-in store, as tests use it."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment

    def path(self, key: str) -> Path:
        return self.folder / quote(key, safe="")

    def objects(self) -> set[str]:
        return {unquote(name) for name in os.listdir(self.folder) if not name.startswith(".")}

    def put(self, key: str, content: bytes) -> None:
        self.path(key).write_bytes(content)

    def put_directory(self, key: str, directory: Path) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(directory).as_posix()}", path.read_bytes())

    def fails(self, pattern: str | None) -> None:
        path = self.folder / ".fails"
        path.unlink(missing_ok=True)
        if pattern is not None:
            path.write_text(pattern)

    def requests(self) -> list[str]:
        return (self.folder / ".log").read_text().splitlines()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Any:
    environment = object_store.install(tmp_path)
    monkeypatch.setenv("STORE", environment["STORE"])
    fsspec.register_implementation("bucket", object_store.ObjectStore, clobber=True)
    yield Store(Path(environment["STORE"]), environment)
    storage.discard_copies()


@pytest.fixture
def other_machine() -> Any:
    """Simulates another machine, without local copies; call it to do so again."""
    storage.discard_copies()
    yield storage.discard_copies
    storage.discard_copies()


def write(directory: Path, files: dict[str, str]) -> None:
    """Makes the directory contain exactly these files."""
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix() not in files:
            path.unlink()
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.1")
        part.write_text(text)
        part.replace(path)


def read(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): p.read_text() for p in directory.rglob("*") if p.is_file()}


BEFORE = {"config.json": "{}", "search/a": "old", "search/b": "same", "teacher/network/x": "gone", "metrics.txt": "1"}
AFTER = {"config.json": "{}", "search/a": "new", "search/b": "same", "search/network/y": "1", "metrics.txt": "2"}


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("gs://b/run", "gs://b/run"),
        (Path("gs://b/run"), "gs://b/run"),  # one slash was lost
        ("GS://b//run/", "gs://b/run"),
        ("gs://b/runs/./7", "gs://b/runs/7"),
        ("runs/x", None),
        ("/data/gs/x", None),
        ("file:///data/x", None),
        ("a:b", None),
    ],
)
def test_addresses_are_recognised(path, address):
    assert storage.remote_address(path) == address


@pytest.mark.parametrize(
    "path", ["gs://", "gs:///", "gs://b/../c", "simplecache::gs://b/x/../y", "gs://b/x::memory://"]
)
def test_invalid_addresses_are_refused(path):
    if "::" in path.partition("://")[0]:
        assert storage.remote_address(path) is None
    else:
        with pytest.raises(ValueError, match=r"^workdir: "):
            storage.local_copy(path, "workdir")


def test_local_paths_are_unchanged(tmp_path):
    assert storage.local_copy("runs/x") == Path("runs/x") and storage.local_copy(tmp_path) == tmp_path
    assert storage.local_copy("file:///data/x") == Path("/data/x")
    assert scratch.directory.cache_info().currsize == 0  # nothing is created for them


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("foo://b/run", "foo://"),
        ("adl://b/run", "pip install adlfs"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(storage.StoreError) as caught:
        teacher.main(["--config", TINY, "--workdir", path])
    line = command_line.error_line(caught.value)
    assert command_line.exit_status(caught.value) == 1
    assert line.startswith("--workdir: ") and message in line and "\n" not in line
    assert not any(tmp_path.iterdir())


# --- directories ----------------------------------------------------------------------------------------------------


def test_round_trip_of_a_directory(store, other_machine, caplog):
    run = storage.local_copy("bucket://b/run")
    assert not run.exists()
    for files in (BEFORE, AFTER):
        write(run, files)
        storage.publish()
    own = {f"b/run/{name}" for name in AFTER}
    assert {key for key in store.objects() if "/.kdsearch/" not in key} == own  # by their names, and nothing else
    assert all(store.path(f"b/run/{name}").read_text() == text for name, text in AFTER.items())
    other_machine()
    assert read(storage.local_copy("bucket://b/run")) == AFTER
    write(storage.local_copy("bucket://b/run"), BEFORE)
    storage.publish()
    assert not caplog.records
    other_machine()
    write(storage.local_copy("bucket://b/run"), AFTER)
    storage.publish()
    assert not caplog.records
    other_machine()
    part = storage.local_copy("bucket://b/run/search")
    assert read(part.parent) == {name: text for name, text in AFTER.items() if name.startswith("search/")}
    assert storage.local_copy("bucket://b/run/config.json").read_text() == "{}"
    assert storage.display_paths(f"see {part}/a") == "see bucket://b/run/search/a"


def test_unchanged_files_are_not_uploaded_again(store):
    run = storage.local_copy("bucket://b/run")
    write(run, BEFORE)
    storage.publish()
    count = len(store.requests())
    storage.publish()
    assert len(store.requests()) == count
    write(run, {**BEFORE, "search/a": "new"})
    storage.publish()
    sent = [line for line in store.requests()[count:] if line.startswith("PUT") and "/.kdsearch/" not in line]
    assert sent == []  # changed files are put aside first, then copied
    assert "COPY b/run/search/a" in store.requests()[count:]


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_kill_at_any_request_leaves_the_old_or_new_directory(store, other_machine, monkeypatch, how):
    """A writer that dies at its nth request leaves one of the two; its successor removes all leftovers."""
    real, outcomes = object_store.ObjectStore._file, []
    for last in itertools.count():
        for key in store.objects():
            store.path(key).unlink()
        other_machine()
        run = storage.local_copy("bucket://b/run")
        write(run, BEFORE)
        storage.publish()
        write(run, AFTER)
        left = itertools.count(last, -1)

        def request(self, key, what, left=left):
            if what in ("PUT", "COPY", "DELETE") and next(left) <= 0:
                raise ConnectionError("no answer") if how == "fails" else Killed
            return real(self, key, what)

        monkeypatch.setattr(object_store.ObjectStore, "_file", request)
        complete = True
        try:
            storage.publish()
        except (OSError, Killed) as error:
            complete = False
            if isinstance(error, OSError):
                assert re.fullmatch(r"bucket://b/run/\S+ could not be written: no answer", str(error))
        ended = next(left) > 0
        monkeypatch.setattr(object_store.ObjectStore, "_file", real)
        other_machine()
        found = read(storage.local_copy("bucket://b/run"))
        assert found in (BEFORE, AFTER) and (found == AFTER or not complete)
        outcomes.append(found == AFTER)
        other_machine()
        run = storage.local_copy("bucket://b/run")
        storage.claim(run)
        assert {k for k in store.objects() if "/.kdsearch/" not in k} == {f"b/run/{name}" for name in found}
        assert {k for k in store.objects() if "/.kdsearch/" in k} == {f"b/run/{MANIFEST}"}
        assert all(store.path(f"b/run/{name}").read_text() == text for name, text in found.items())
        if ended:
            break
    assert outcomes == sorted(outcomes) and outcomes[0] is False and outcomes[-1] is True and len(outcomes) > 8


def test_a_writer_recovers_from_a_failure(store, other_machine):
    run = storage.local_copy("bucket://b/run")
    write(run, BEFORE)
    storage.publish()
    write(run, AFTER)
    store.fails("search/network")
    with pytest.raises(storage.StoreError, match="search/network/y .*503: the store is unwell"):
        storage.publish()
    store.fails(None)
    write(run, {**AFTER, "more": "1"})
    storage.publish()
    other_machine()
    assert read(storage.local_copy("bucket://b/run")) == {**AFTER, "more": "1"}


def test_readers_never_see_two_versions_mixed(store, other_machine):
    """All files contain their version's number; a concurrent reader finds equal numbers."""
    writer = Mirror("bucket://b/run", scratch.copy_path("bucket://b/writer"))
    reader = Mirror("bucket://b/run", scratch.copy_path("bucket://b/reader"))
    seen, done = [], threading.Event()

    def work() -> None:
        try:
            for version in range(12):
                names = ["a", "b/c", f"only/{version}", f"each/{version // 3}/d"]
                write(writer.directory, dict.fromkeys(names, str(version)))
                writer.push()
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not done.is_set():
            reader.pull()
            files = read(reader.directory)
            assert len(set(files.values())) <= 1 and len(files) in (0, 4), files
            seen.append(files.get("a"))
    finally:
        thread.join()
    assert len(set(seen)) > 2  # it saw several, or it proves nothing


def test_an_object_that_is_moved_into_place_while_it_is_read_is_found(store, other_machine, monkeypatch):
    """A reader finds the old object, and the new one, staged until then, in its place when it looks again."""
    writer = Mirror("bucket://b/run", scratch.copy_path("bucket://b/writer"))
    write(writer.directory, {"a": "old"})
    writer.push()
    write(writer.directory, {"a": "new"})
    store.fails("run/a$")  # committed, not yet in place
    writer.push()
    store.fails(None)
    get_file, heir = object_store.ObjectStore.get_file, Mirror("bucket://b/run", scratch.copy_path("bucket://b/heir"))

    def get_then_move(self: Any, rpath: str, *rest: Any, **options: Any) -> None:
        get_file(self, rpath, *rest, **options)
        if rpath.endswith("/a"):
            heir.claim()  # completes the commit

    monkeypatch.setattr(object_store.ObjectStore, "get_file", get_then_move)
    reader = Mirror("bucket://b/run", scratch.copy_path("bucket://b/reader"))
    reader.pull()
    assert read(reader.directory) == {"a": "new"}


def test_a_published_version_existed_at_one_moment(store):
    """Files are created one after the other: each published version contains all that precede its newest file."""
    run = storage.local_copy("bucket://b/run")
    done = threading.Event()

    def work() -> None:
        for number in range(120):
            write_one(run / f"{'zyx'[number % 3]}/{number:03}")
        done.set()

    def write_one(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        time.sleep(0.0005)

    thread = threading.Thread(target=work)
    thread.start()
    versions = set()
    try:
        while not done.is_set():
            storage.publish()
            content = store.path(f"b/run/{MANIFEST}")
            if content.exists():
                numbers = sorted(int(name[2:]) for name in Manifest.from_json(content.read_bytes(), "").files)
                assert numbers == list(range(len(numbers)))
                versions.add(len(numbers))
    finally:
        thread.join()
    assert versions


def test_growing_files_do_not_delay_publishing(store, other_machine):
    """Logs that grow while they are published, and reports, which nothing depends on."""
    run = storage.local_copy("bucket://b/run")
    write(run, {"config.json": "{}", "search/metrics.jsonl": "1\n", "report/index.html": "first"})
    storage.publish()
    other_machine()
    other = storage.local_copy("bucket://b/run")
    write(other, {**read(other), "report/index.html": "second"})
    storage.publish()
    other_machine()
    assert read(storage.local_copy("bucket://b/run"))["report/index.html"] == "second"
    listed = Manifest.from_json(store.path(f"b/run/{MANIFEST}").read_bytes(), "").files
    assert listed["search/metrics.jsonl"] == FileRecord(2) and listed["config.json"].sha256


def test_checkpoints_and_events_are_downloaded_on_request(store, other_machine):
    files = {"config.json": "{}", "search/checkpoints/4/state": "4", "search/tensorboard/events": "e"}
    write(storage.local_copy("bucket://b/run"), files)
    storage.publish()
    other_machine()
    run = storage.local_copy("bucket://b/run", entire_run=True)
    assert read(run) == {"config.json": "{}"}
    storage.refresh(run / "search" / "checkpoints")
    assert read(run) == {name: text for name, text in files.items() if "tensorboard" not in name}
    write(run, {**read(run), "config.json": "{ }"})
    storage.publish()  # does not remove what was never here
    assert {f"b/run/{name}" for name in files} <= store.objects()


@pytest.mark.filterwarnings("ignore:Sending a large body")  # aiohttp on gcsfs
def test_gcsfs(tmp_path, monkeypatch, other_machine):
    """gcsfs against a server with Google's API: paged listings, chunked uploads, permission errors."""
    pytest.importorskip("gcsfs")
    from gcs_server import Cloud

    with Cloud() as cloud:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", cloud.address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
        cloud.page = 2
        run = storage.local_copy("gs://b/run")
        for files in (BEFORE, AFTER):
            write(run, files)
            storage.publish()
        (run / "large").write_bytes(large := os.urandom(6 << 20))
        storage.publish()
        listed = {f"run/{name}" for name in (*AFTER, "large")}
        assert {name for _, name in cloud.objects if "/.kdsearch/" not in name} == listed
        other_machine()
        found = storage.local_copy("gs://b/run", entire_run=True)
        assert (found / "large").read_bytes() == large
        (found / "large").unlink()
        assert read(found) == AFTER
        write(found, BEFORE)
        cloud.refuses = lambda method, name: (method, name) == ("POST", "run/teacher/network/x")
        with pytest.raises(storage.StoreError, match=r"gs://b/run/teacher/network/x .*Forbidden"):
            storage.publish()
        cloud.refuses = lambda method, name: False
        other_machine()
        (run := storage.local_copy("gs://b/run") / "large").unlink()
        assert read(run.parent) == AFTER
        storage.claim(run.parent)
        assert ("b", "run/teacher/network/x") not in cloud.objects
        cloud.refuses = lambda method, name: True
        with pytest.raises(storage.StoreError, match=r"^--workdir: gs://b/other\S* .*Forbidden"):
            storage.local_copy("gs://b/other", "--workdir")


# --- other writers ----------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_directory_stops_the_first(store):
    first = Mirror("bucket://b/run", scratch.copy_path("bucket://b/first"))
    write(first.directory, BEFORE)
    first.push()
    second = Mirror("bucket://b/run", scratch.copy_path("bucket://b/second"))
    second.pull()
    second.claim()
    write(second.directory, AFTER)
    second.push()
    write(first.directory, {**BEFORE, "search/a": "newer"})
    with pytest.raises(storage.StoreError, match=r"bucket://b/run: .*metrics\.txt"):
        first.push()
    third = Mirror("bucket://b/run", scratch.copy_path("bucket://b/third"))
    third.pull()
    assert read(third.directory) == AFTER


def test_changes_of_other_files_are_merged(store):
    """A student is exported into the directory of a run that is still active."""
    run = Mirror("bucket://b/run", scratch.copy_path("bucket://b/first"))
    write(run.directory, BEFORE)
    run.push()
    other = Mirror("bucket://b/run", scratch.copy_path("bucket://b/second"))
    other.pull("search")
    write(other.directory, {**read(other.directory), "student/file": "1"})
    other.push()
    write(run.directory, AFTER)
    run.push()
    reader = Mirror("bucket://b/run", scratch.copy_path("bucket://b/third"))
    reader.pull()
    assert read(reader.directory) == {**AFTER, "student/file": "1"}


def test_files_of_a_user_are_kept(store, other_machine):
    store.put("b/run/notes.txt", b"mine")
    store.put("b/run/search/.zarray", b"mine too")
    run = storage.local_copy("bucket://b/run")
    assert read(run) == {"notes.txt": "mine", "search/.zarray": "mine too"}
    write(run, {**read(run), **BEFORE})
    storage.claim(run)
    storage.publish()
    write(run, {**read(run), **AFTER})
    storage.publish()
    assert store.path("b/run/notes.txt").read_bytes() == b"mine"
    assert store.path("b/run/search/.zarray").read_bytes() == b"mine too"
    store.put("b/run/teacher/later.bin", b"later")
    other_machine()
    assert storage.local_copy("bucket://b/run/teacher/later.bin").read_bytes() == b"later"
    assert storage.local_copy("bucket://b/run/notes.txt").read_bytes() == b"mine"


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_damaged_objects_are_skipped_with_a_warning(store, other_machine, caplog, damage):
    write(storage.local_copy("bucket://b/run"), BEFORE)
    storage.publish()
    path = store.path("b/run/search/a")
    {"flipped": lambda: path.write_bytes(b"oldd"[1:]), "cut": lambda: path.write_bytes(b""), "lost": path.unlink}[
        damage
    ]()
    other_machine()
    run = storage.local_copy("bucket://b/run")
    assert read(run) == {name: text for name, text in BEFORE.items() if name != "search/a"}
    assert "bucket://b/run/search/a" in caplog.text
    write(run, {**read(run), "search/a": "made again"})
    storage.publish()
    other_machine()
    assert read(storage.local_copy("bucket://b/run"))["search/a"] == "made again"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../../x", "", "a/.", "a\\..\\x", "a\0"])
def test_manifests_cannot_name_files_outside_the_directory(store, name):
    manifest = json.loads(Manifest({"a": FileRecord(1, "0" * 64)}, "w", 1).to_json())
    manifest["files"] = {name: manifest["files"]["a"]}
    store.put(f"b/run/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(ValueError, match=r"bucket://b/run/\.kdsearch/manifest\.json"):
        storage.local_copy("bucket://b/run")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"files": {}}', b'{"format": "kdsearch_jax directory", "version": 2, "files": {}}',
     b"[" * 100_000, b'{"format": "kdsearch_jax directory", "version": 1, "writer": "", "sequence": 1, "files": [1]}',
     b'{"format": "kdsearch_jax directory", "version": 1, "writer": "", "sequence": 1, "files": {"a": {"bytes": -1}}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_refused_in_one_line(store, content):
    store.put(f"b/run/{MANIFEST}", content)
    with pytest.raises(ValueError, match=r"^workdir: bucket://b/run/\.kdsearch/manifest\.json") as caught:
        storage.local_copy("bucket://b/run", "workdir")
    assert "\n" not in command_line.error_line(caught.value)


def test_objects_outside_the_directory_are_refused(store):
    store.put("b/run/../../etc/x", b"")
    with pytest.raises(ValueError, match="etc/x"):
        storage.local_copy("bucket://b/run")


def test_free_space_is_checked_before_downloading(store, other_machine, monkeypatch):
    write(storage.local_copy("bucket://b/run"), BEFORE)
    storage.publish()
    other_machine()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: usage._replace(free=3))
    with pytest.raises(storage.StoreError, match=r"bucket://b/run: .*TMPDIR"):
        storage.local_copy("bucket://b/run")


# --- copies on this machine -----------------------------------------------------------------------------------------


def test_copies_of_killed_processes_are_deleted(store, tmp_path, python, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile; from kdsearch_jax.storage import scratch\n"
        "tempfile.tempdir = sys.argv[1]; print(scratch.directory(), flush=True); input()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    start = [python, "-c", code, str(tmp_path)]
    killed, alive = (subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "12")
    dead, other = (Path(process.stdout.readline().strip()) for process in (killed, alive))
    killed.communicate("\n")
    for path in (dead, other):
        os.utime(path, (0, 0))
    own = scratch.directory()
    assert own.exists() and other.exists() and not dead.exists()
    alive.kill()
    alive.communicate()


# --- networks and checkpoints ---------------------------------------------------------------------------------------


def network(seed: int = 0) -> tuple[Architecture, dict[str, Any]]:
    architecture = Architecture("small_cnn", {"width": 2, "num_classes": 10}, input_shape=(8, 8, 1))
    rng = np.random.default_rng(seed)
    import jax

    shapes = jax.eval_shape(architecture.module().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    draw = lambda leaf: jnp.asarray(rng.uniform(0.1, 1.0, leaf.shape), leaf.dtype)  # noqa: E731
    return architecture, jax.tree.map(draw, shapes)


INFO = {"dataset": "digits", "num_classes": 10, "mean": [0.5], "std": [0.5], "class_names": list("0123456789")}


def test_networks_in_a_store(store, other_machine, tmp_path, capsys):
    architecture, variables = network()
    networks.save_network(tmp_path / "net", architecture, variables, INFO)
    networks.save_network("bucket://b/net", architecture, variables, INFO)
    store.put_directory("b/copied", tmp_path / "net")  # as gsutil would
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), jnp.float32)
    module, local = kdsearch_jax.load(tmp_path / "net")
    expected = np.asarray(module.apply(local, images))
    for address in ("bucket://b/net", Path("bucket://b/net"), "bucket://b/copied"):
        other_machine()
        module, found = kdsearch_jax.load(address)
        np.testing.assert_array_equal(np.asarray(module.apply(found, images)), expected)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        networks.save_network("bucket://b/net", architecture, variables, INFO)
    labels = np.arange(40, dtype=np.int32) % 10
    data = {"images": np.random.default_rng(2).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8), "labels": labels}
    np.savez(tmp_path / "x.npz", **data)
    store.put("b/data/x.npz", (tmp_path / "x.npz").read_bytes())
    rows = []
    for net, file in ((tmp_path / "net", f"npz:{tmp_path}/x.npz"), ("bucket://b/net", "npz:bucket://b/data/x.npz")):
        assert evaluate_main([str(net), "--data", file]) == 0
        rows.append(capsys.readouterr().out.splitlines()[-1].split())
    assert rows[1] == ["bucket://b/net", *rows[0][1:]]


def test_a_damaged_network_in_a_store_is_refused(store, other_machine):
    architecture, variables = network()
    networks.save_network("bucket://b/net", architecture, variables, INFO)
    largest = max((p for p in store.folder.iterdir() if "variables" in p.name), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    other_machine()
    with pytest.raises(ValueError, match="^bucket://b/net "):
        kdsearch_jax.load("bucket://b/net")
    with pytest.raises(FileNotFoundError, match="^bucket://b/nothing "):
        kdsearch_jax.load("bucket://b/nothing")


def state(step: int) -> dict[str, np.ndarray]:
    return {"kernel": np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32), "step": np.array(step)}


def test_checkpoints_are_published_as_they_are_written(store, other_machine, monkeypatch):
    with Checkpointer("bucket://b/run/checkpoints", keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state(step), {"config": 1}, {"validation_accuracy": 1 / step})
        checkpoints.wait()
        store.fails("checkpoints/6")
        checkpoints.save(6, state(6), {"config": 1})
        with pytest.raises(OSError, match=r"step 6 .*503: the store is unwell"):
            checkpoints.wait()
        store.fails(None)
    other_machine()
    with Checkpointer("bucket://b/run/checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 5, 6] and checkpoints.best_step() == 1  # the newest, and the best
        step, found, meta = checkpoints.restore(state(0))
        assert meta == {"config": 1}
        np.testing.assert_array_equal(found["kernel"], state(step)["kernel"])
        newest = step
    other_machine()
    for key in store.objects():
        if f"checkpoints/{newest}/state/" in key and "/d/" in key:
            store.path(key).write_bytes(b"\0" * store.path(key).stat().st_size)
    with Checkpointer("bucket://b/run/checkpoints", keep=2) as checkpoints:
        step, found, _ = checkpoints.restore(state(0))
        assert step < newest
        np.testing.assert_array_equal(found["kernel"], state(step)["kernel"])


# --- runs -----------------------------------------------------------------------------------------------------------

# Many short calls with a checkpoint each.
LONG = ("--teacher.steps", "8", "--search.steps", "24", "--retrain.steps", "4", "--baselines",
        "--run.steps-per-dispatch", "2", "--run.checkpoint-every", "2", "--run.checkpoint-share", "None")  # fmt: skip
SAME = ("teacher/network", "search/network", "retrain/network", "student")


def machine(store: Store, folder: Path) -> dict[str, str]:
    """The environment of a process on another machine: another directory for copies."""
    folder.mkdir()
    return {**os.environ, **QUICK, **store.environment, "TMPDIR": str(folder)}


def command(python: str, workdir: str, *more: str) -> list[str]:
    return [python, "-m", "kdsearch_jax.search", "--config", TINY, "--workdir", workdir, *LONG, *more]


def published(store: Store, key: str) -> dict[str, FileRecord]:
    path = store.path(f"{key}/{MANIFEST}")
    return dict(Manifest.from_json(path.read_bytes(), "").files) if path.exists() else {}


def same_results(run: Path, reference: Path) -> None:
    """Asserts that two runs have equal networks, selection and table, apart from measured times and memory."""
    for name in SAME:
        left, right = (json.loads((d / name / "network.json").read_text())["payload"] for d in (run, reference))
        assert left["leaves"] == right["leaves"] and left["architecture"] == right["architecture"], name
    assert (run / "search" / "selection.json").read_text() == (reference / "search" / "selection.json").read_text()
    tables = [
        [{k: v for k, v in r.items() if k != "memory" and not k.startswith("ms_")} for r in json.loads(text)["rows"]]
        for text in ((d / "results.json").read_text() for d in (run, reference))
    ]
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, python_path) -> Path:
    """A run on the local disk; read-only."""
    run = tmp_path_factory.mktemp("reference") / "run"
    subprocess.run(command(python_path, str(run)), env={**os.environ, **QUICK}, check=True, capture_output=True)
    return run


@pytest.fixture(scope="module")
def python_path() -> str:
    return sys.executable


@pytest.mark.slow
def test_a_run_killed_on_one_machine_resumes_on_another(store, other_machine, tmp_path, python, reference):
    """kill -9 in the teacher, in the search and while publishing; each time the same command on another machine."""
    for number, (stage, at) in enumerate((("teacher", 2), ("search", 6), ("search", 12))):
        home = tmp_path / str(number)
        process = subprocess.Popen(command(python, "bucket://b/run"), env=machine(store, home), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        folder = f"{stage}/checkpoints/"  # a machine that is slow to look may find later ones
        while not any(n.startswith(folder) and int(n.split("/")[2]) >= at for n in published(store, "b/run")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(np.random.default_rng().uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert f"{stage}/network/network.json" not in published(store, "b/run")
    done = subprocess.run(command(python, "bucket://b/run"), env=machine(store, tmp_path / "last"), capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert "student: bucket://b/run/student" in done.stdout and str(tmp_path) not in done.stdout + done.stderr
    assert not any((tmp_path / "last").glob("kdsearch-copies-*"))
    same_results(storage.local_copy("bucket://b/run"), reference)
    listed = {f"b/run/{name}" for name in published(store, "b/run")}
    others = {key for key in store.objects() if key not in listed and "/.kdsearch/" not in key}
    assert all("tensorboard" in key for key in others), others  # nothing that a killed one has left
    assert len([key for key in store.objects() if "/.kdsearch/" in key]) <= 2


@pytest.mark.slow
def test_other_commands_in_a_store(store, other_machine, tmp_path, python, reference):
    """A run that was uploaded by other means: report, export, evaluate, new runs from its teacher or search."""
    store.put_directory("b/old", reference)
    lines = [
        ("report", "bucket://b/old"),
        ("export", "bucket://b/old/student", "--out", "bucket://b/exported"),
        ("evaluate", "bucket://b/old/student", "--teacher", "bucket://b/old/teacher/network"),
        ("search", "--config", TINY, *LONG, "--teacher-from", "bucket://b/old", "--workdir", "bucket://b/new",
         "--stop-after", "teacher"),
        ("retrain", "--search-from", "bucket://b/old", "--workdir", "bucket://b/again", "--baselines"),
    ]  # fmt: skip
    for number, (name, *line) in enumerate(lines):
        whole = [python, "-m", f"kdsearch_jax.{name}", *line]
        home = machine(store, tmp_path / str(number))
        done = subprocess.run(whole, env=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert "kdsearch-copies" not in said and "bucket://b" in said
    assert {"b/exported/student.safetensors", "b/exported/manifest.json", "b/old/report/index.html"} <= store.objects()
    page = store.path("b/old/report/index.html").read_text()
    assert "bucket://b/old/student" in page and "kdsearch-copies" not in page
    _, variables = export_formats.load_safetensors("bucket://b/exported/student.safetensors")
    expected = kdsearch_jax.load(reference / "student").variables
    found, wanted = (arrays.flatten(tree) for tree in (variables, expected))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted) and found.keys() == wanted.keys()
    again, first = (storage.local_copy(address) for address in ("bucket://b/again", "bucket://b/old"))
    left, right = (json.loads((d / "student/network.json").read_text())["payload"]["leaves"] for d in (again, first))
    assert left == right


@pytest.mark.slow
def test_two_processes_share_only_the_store(store, other_machine, tmp_path, python, repository):
    """Killed together in the search and resumed, they end where two processes on one disk do."""
    script = tmp_path / "start.sh"
    # Each process has a home of its own, as each host of a pod has.
    script.write_text('#!/bin/sh\nexport TMPDIR="$HOMES/$JAX_PROCESS_ID"\nmkdir -p "$TMPDIR"\nexec "$@"\n')
    script.chmod(0o755)
    launch = [python, str(repository / "launch" / "local.py"), "-n", "2", "--"]
    local = subprocess.run([*launch, *command(python, str(tmp_path / "run"))], env={**os.environ, **QUICK}, check=False,
                           capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert local.returncode == 0, local.stderr
    environment = {**machine(store, tmp_path / "tmp"), "HOMES": str(tmp_path / "homes")}
    line = [*launch, str(script), *command(python, "bucket://b/run")]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not any(n.startswith("search/checkpoints/10/") for n in published(store, "b/run")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    for _ in "12":
        process.send_signal(signal.SIGTERM)  # the second one ends them at once
        time.sleep(0.1)
    process.communicate()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    homes = [tmp_path / "homes" / rank for rank in "01"]
    assert all(home.is_dir() for home in homes)
    same_results(storage.local_copy("bucket://b/run"), tmp_path / "run")
    assert json.loads(storage.local_copy("bucket://b/run/environment.json").read_text())["processes"] == 2
