"""The directory of a run: which run it holds, who is at work in it, what a killed process has left behind in it.

    config.json       the experiment; whoever continues must have the same
    run.json          the command, whether it has ended, the digest of config.json, and a fingerprint of the data
    environment.json  what else results depend on, of this start and of the earlier ones

The command line that began a run goes on with it, by itself, until the run has ended. `--resume` goes on with whatever
the directory holds: nothing yet, a run that has ended, or one that another command began.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from kdsearch_jax import storage
from kdsearch_jax.runs.config import Experiment, differences, from_json, to_json
from kdsearch_jax.runs.consensus import check_shared, first_says
from kdsearch_jax.runs.locks import check_free, locked
from kdsearch_jax.runs.provenance import code, environment
from kdsearch_jax.storage.files import (
    MAX_SETTINGS,
    DamagedError,
    json_digest,
    read_json,
    read_json_object,
    read_sealed,
    write_json,
    write_sealed,
)

log = logging.getLogger(__name__)

_FOLDERS = re.compile("(teacher|search|retrain|report|student|at|uniform|magnitude)(-.+)?")
_FILES = ("config.json", "run.json", "environment.json", "results.json", "front.json", "evidence.npz")
_UNFINISHED = re.compile(
    r"\.(?P<target>.+)\.[0-9a-f]{8}\.(?P<end>tmp|old)"  # atomic_directory
    r"|\.(?P<file>.+)\.\d+\.part"  # files.write_bytes
    r"|\.export-.+"
    r"|metrics\.jsonl\.new"
    r"|.+\.orbax-checkpoint-tmp.*"
)


def goes_on(workdir: Path, experiment: Experiment, command: Mapping[str, Any], resume: bool) -> bool:
    """Whether to go on with a run that `workdir` holds; writes nothing. Every process of a run calls it.

    command: JSON of what a command line asks for beside the experiment, such as {"command": "search"}.
    resume: go on, whatever it holds.

    Raises:
      ValueError: it holds another experiment; or, without `resume`, a run that has ended or is of another command.
      InUseError: another process is at work in it.
    """
    answer = first_says(lambda: _goes_on(workdir, experiment, command, resume))
    if answer:
        check_shared(workdir, "config.json")
    return answer


def is_under_way(workdir: Path, command: Mapping[str, Any]) -> bool:
    """Whether this command was begun in `workdir`, and has not ended; every process of a run asks."""

    def ask() -> bool:
        known = _run(workdir)
        return bool(known) and not known["finished"] and known["command"] == json.loads(json.dumps(command))

    return first_says(ask)


@contextlib.contextmanager
def run_directory(
    workdir: Path,
    experiment: Experiment,
    command: Mapping[str, Any],
    *,
    resume: bool,
    data: str | None = None,
    extends: bool = False,
) -> Iterator[None]:
    """Makes `workdir` the directory of this run, this process's alone; its end without an error is the run's.

    Every process of a run enters it; the first looks, locks and writes.

    Args:
      resume: what `goes_on` said.
      data: fingerprint of the data set; who resumes must have the same.
      extends: the experiment is another than that of the run there, on purpose.

    Raises:
      ValueError: it holds a run and `resume` is False, or one of another experiment or of other data.
      OSError: it cannot be written, or another process is at work in it. What was there stays as it was.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            existed, held = workdir.exists(), (workdir / "config.json").exists()
            stack.enter_context(locked(workdir))
            stack.callback(_forget, workdir, existed)
            known = _run(workdir) if resume else None
            if known and data and known.get("data", data) != data:
                raise ValueError(
                    f"data: {workdir} was begun with others (fingerprint {known['data']}, now {data}); give those, or "
                    "choose another --workdir"
                )
            storage.claim(workdir)
            state = {"command": dict(command), "finished": False, **({"data": data} if data else {})}
            _new_run_directory(workdir, experiment, resume, state=state, extends=extends)
            if held:  # and is this run, or it would have been refused
                sweep(workdir)
            storage.publish()
            return True

        first_says(begin)
        storage.refresh()
        check_shared(workdir, "environment.json")
        yield
        if jax.process_index() == 0:
            write_sealed(workdir / "run.json", {**(_run(workdir) or {}), "finished": True})
            storage.publish()


def new_run_directory(workdir: Path, experiment: Experiment, resume: bool = False) -> Path:
    """Writes `config.json` and `environment.json` of a run into `workdir`; every process of a run calls it.

    Raises ValueError where it holds a run already, unless `resume` says to go on with it and its experiment is the
    same; OSError where it cannot be written. Either way what was there stays as it was.
    """

    def begin() -> bool:
        storage.claim(workdir)
        _new_run_directory(workdir, experiment, resume)
        storage.publish()
        return True

    first_says(begin)
    storage.refresh()
    return workdir


def sweep(workdir: Path) -> None:
    """Removes what killed processes of a run have left half-written; puts back what one was about to replace.

    Of the directory itself only what has our names; below it only our folders.
    """
    for entry in list(workdir.iterdir()):
        found = _UNFINISHED.fullmatch(entry.name)
        if found is None and entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            sweep_folder(entry)
        elif found and (_FOLDERS.fullmatch(found["target"] or "") or found["file"] in _FILES):
            _settle(entry, found)


def sweep_folder(folder: Path) -> None:
    """`sweep` of a folder in which everything is ours, and of all below it."""
    for entry in list(folder.iterdir()):
        if found := _UNFINISHED.fullmatch(entry.name):
            _settle(entry, found)
        elif entry.is_dir() and not entry.is_symlink():
            sweep_folder(entry)


def _settle(path: Path, found: re.Match[str]) -> None:
    """Puts back what was about to be replaced and has not been; removes all else."""
    if found["end"] == "old" and not (target := path.with_name(found["target"])).exists():
        path.rename(target)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _goes_on(workdir: Path, experiment: Experiment, command: Mapping[str, Any], resume: bool) -> bool:
    if not (workdir / "config.json").exists():
        if resume:
            log.info("%s holds no run to resume: starting one", workdir)
        return resume
    check_free(workdir)
    if resume:
        return True  # the experiment is compared where it is written
    known = _run(workdir)
    if known is None or known["finished"]:
        what = "a run, which has ended" if known else "a run"
        raise ValueError(f"{workdir} already holds {what}; add --resume to go on with it, or choose another --workdir")
    check_same(workdir, experiment)
    if known["command"] != (now := json.loads(json.dumps(command))):
        raise ValueError(
            f"{workdir} already holds a run, of another command ({_told(known['command'])}, not {_told(now)}); add "
            "--resume to go on with it by this one, or choose another --workdir"
        )
    log.info("%s holds this run, which has not ended: going on with it", workdir)
    return True


def _new_run_directory(
    workdir: Path,
    experiment: Experiment,
    resume: bool,
    *,
    state: Mapping[str, Any] | None = None,
    extends: bool = False,
) -> None:
    path, earlier, settings = workdir / "config.json", [], to_json(experiment)
    if path.exists():
        if not resume:
            raise ValueError(
                f"{workdir} already holds a run; add --resume to go on with it, or choose another --workdir"
            )
        if not extends:
            check_same(workdir, experiment)
        with contextlib.suppress(OSError, ValueError):
            last = read_json_object(workdir / "environment.json")
            earlier = last.pop("earlier", [])
            earlier = [*(earlier if isinstance(earlier, list) else []), last]
    workdir.mkdir(parents=True, exist_ok=True)
    about = {**_about(state), "code": code(experiment)}
    write_json(workdir / "environment.json", {**environment(), **about, "earlier": earlier})
    if state is not None:
        write_sealed(workdir / "run.json", {**state, "config": json_digest(settings)})
    if extends or not path.exists():
        write_json(path, settings)  # last: without it there is no run


def _about(state: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"data": state["data"]} if state and "data" in state else {}


def check_same(workdir: Path, experiment: Experiment) -> None:
    """Raises ValueError where the run is of another experiment, with the settings that differ."""
    path, known = workdir / "config.json", _run(workdir)
    try:
        stored = read_json(path, MAX_SETTINGS)
        if known and known.get("config") not in (None, json_digest(stored)):
            raise DamagedError("not what the run began with, says run.json; put it back, or choose another --workdir")
        old = from_json(stored)
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; this run cannot be resumed by this version") from error
    if different := differences(old, experiment):
        raise ValueError(
            f"{workdir} holds a run of another experiment ({'; '.join(different)}); "
            f"resume with --config {path}, or choose another --workdir"
        )


def _run(workdir: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none."""
    path = workdir / "run.json"
    return read_sealed(path, MAX_SETTINGS, has={"command": dict, "finished": bool}) if path.is_file() else None


def _told(command: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in command.items() if value is not None)


def _forget(workdir: Path, existed: bool) -> None:
    """Removes the directory again where nothing came of it."""
    if not existed and not any(path.name != ".lock" for path in workdir.iterdir()):
        with contextlib.suppress(OSError):
            (workdir / ".lock").unlink(missing_ok=True)
            workdir.rmdir()
