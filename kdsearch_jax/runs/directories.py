"""The directory of a run: which run it holds, and what killed processes left behind.

    config.json       the experiment; a run can only be resumed with the same one
    run.json          the command, whether it has finished, the digest of config.json, and a fingerprint of the data
    environment.json  everything else that results depend on, for this start and all earlier ones

The command line that began a run resumes it automatically until the run has finished. `--resume` continues whatever the
directory holds: nothing yet, a finished run, or one that another command began.
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
from kdsearch_jax.runs.coordination import check_shared, first_process_decides
from kdsearch_jax.runs.locks import check_free, locked
from kdsearch_jax.runs.provenance import code, environment
from kdsearch_jax.storage.files import (
    MAX_SETTINGS,
    DamagedError,
    read_json,
    read_json_object,
    read_sealed,
    seal,
    write_json,
    write_sealed,
)

log = logging.getLogger(__name__)

_FOLDERS = re.compile("(teacher|search|retrain|report|student|at|uniform|magnitude)(-.+)?")
_FILES = ("config.json", "run.json", "environment.json", "results.json", "front.json", "evidence.npz")
_LEFTOVER = re.compile(
    r"\.(?P<target>.+)\.[0-9a-f]{8}\.(?P<end>tmp|old)"  # written_whole
    r"|\.(?P<file>.+)\.\d+\.part"  # files.write_bytes
    r"|\.export-.+"
    r"|metrics\.jsonl\.new"
    r"|.+\.orbax-checkpoint-tmp.*"
)


def should_resume(workdir: Path, experiment: Experiment, command: Mapping[str, Any], resume: bool) -> bool:
    """Whether to resume the run in `workdir`. Writes nothing. Every process of a run calls it.

    Args:
      command: what the command line asks for besides the experiment, as JSON, such as {"command": "search"}.
      resume: resume whatever the directory holds.

    Raises:
      ValueError: the directory holds another experiment; or, without `resume`, a finished run or another command's.
      InUseError: another process uses the directory.
    """
    answer = first_process_decides(lambda: _should_resume(workdir, experiment, command, resume))
    if answer:
        check_shared(workdir, "config.json")
    return answer


def is_under_way(workdir: Path, command: Mapping[str, Any]) -> bool:
    """Whether this command was begun in `workdir` and has not finished. Every process of a run calls it."""

    def look() -> bool:
        known = _read_state(workdir)
        return bool(known) and not known["finished"] and known["command"] == json.loads(json.dumps(command))

    return first_process_decides(look)


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
    """A context that locks `workdir` for this run and, unless an error occurs, marks the run as finished at the end.

    Every process of a run enters it; the first one reads, locks and writes.

    Args:
      resume: the answer of `should_resume`.
      data: fingerprint of the data set; must not change when a run is resumed.
      extends: allow the experiment to differ from the existing run's, to add budgets.

    Raises:
      ValueError: it holds a run and `resume` is False, or a run of another experiment or other data.
      OSError: it cannot be written, or another process uses it. Its content is unchanged then.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            existed, holds_run = workdir.exists(), (workdir / "config.json").exists()
            stack.enter_context(locked(workdir))
            stack.callback(_remove_if_empty, workdir, existed)
            known = _read_state(workdir) if resume else None
            if known and data and known.get("data", data) != data:
                raise ValueError(
                    f"data: {workdir} was begun with other data (fingerprint {known['data']}, now {data}); give those, "
                    "or choose another --workdir"
                )
            storage.claim(workdir)
            state = {"command": dict(command), "finished": False, **({"data": data} if data else {})}
            _write_settings(workdir, experiment, resume, state=state, extends=extends)
            if holds_run:  # it is this run, or it would have been refused
                remove_leftovers(workdir)
            storage.publish()
            return True

        first_process_decides(begin)
        storage.refresh()
        check_shared(workdir, "environment.json")
        yield
        if jax.process_index() == 0:
            write_sealed(workdir / "run.json", {**(_read_state(workdir) or {}), "finished": True})
            storage.publish()


def new_run_directory(workdir: Path, experiment: Experiment, resume: bool = False) -> Path:
    """Writes `config.json` and `environment.json` into `workdir`. Every process of a run calls it.

    Raises:
      ValueError: it already holds a run, and `resume` is False or the experiment differs.
      OSError: it cannot be written. Its content is unchanged then.
    """

    def begin() -> bool:
        storage.claim(workdir)
        _write_settings(workdir, experiment, resume)
        storage.publish()
        return True

    first_process_decides(begin)
    storage.refresh()
    return workdir


def remove_leftovers(workdir: Path) -> None:
    """Removes files that killed processes left half-written; restores what one of them was about to replace.

    Touches only names that this package uses, because users may keep other files in the directory.
    """
    for entry in list(workdir.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None and entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            remove_leftovers_below(entry)
        elif match and (_FOLDERS.fullmatch(match["target"] or "") or match["file"] in _FILES):
            _remove_or_restore(entry, match)


def remove_leftovers_below(folder: Path) -> None:
    """`remove_leftovers` for a folder that contains only files of this package, recursively."""
    for entry in list(folder.iterdir()):
        if match := _LEFTOVER.fullmatch(entry.name):
            _remove_or_restore(entry, match)
        elif entry.is_dir() and not entry.is_symlink():
            remove_leftovers_below(entry)


def _remove_or_restore(path: Path, match: re.Match[str]) -> None:
    """Restores a directory that was set aside but not replaced; removes everything else."""
    if match["end"] == "old" and not (target := path.with_name(match["target"])).exists():
        path.rename(target)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _should_resume(workdir: Path, experiment: Experiment, command: Mapping[str, Any], resume: bool) -> bool:
    if not (workdir / "config.json").exists():
        if resume:
            log.info("%s: no run to resume, starting one", workdir)
        return resume
    check_free(workdir)
    if resume:
        return True  # `run_directory` compares the experiment
    known = _read_state(workdir)
    if known is None or known["finished"]:
        what = "a finished run" if known else "a run"
        raise ValueError(f"{workdir} already holds {what}; add --resume to continue it, or choose another --workdir")
    check_same_experiment(workdir, experiment)
    if known["command"] != (now := json.loads(json.dumps(command))):
        raise ValueError(
            f"{workdir} already holds a run of another command ({_describe(known['command'])}, not {_describe(now)}); "
            "add --resume to continue it with this one, or choose another --workdir"
        )
    log.info("%s: resuming this run", workdir)
    return True


def _write_settings(
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
            raise ValueError(f"{workdir} already holds a run; add --resume to continue it, or choose another --workdir")
        if not extends:
            check_same_experiment(workdir, experiment)
        with contextlib.suppress(OSError, ValueError):
            last = read_json_object(workdir / "environment.json")
            earlier = last.pop("earlier", [])
            earlier = [*(earlier if isinstance(earlier, list) else []), last]
    workdir.mkdir(parents=True, exist_ok=True)
    data = {"data": state["data"]} if state and "data" in state else {}
    record = {**environment(), **data, "code": code(experiment), "earlier": earlier}
    write_json(workdir / "environment.json", record)
    if state is not None:
        write_sealed(workdir / "run.json", {**state, "config": seal(settings)})
    if extends or not path.exists():
        write_json(path, settings)  # last, because its presence marks a run


def check_same_experiment(workdir: Path, experiment: Experiment) -> None:
    """Raises ValueError if the run has another experiment; lists the settings that differ."""
    path, known = workdir / "config.json", _read_state(workdir)
    try:
        stored = read_json(path, MAX_SETTINGS)
        if known and known.get("config") not in (None, seal(stored)):
            raise DamagedError(
                "changed since the run began, according to run.json; restore it, or choose another --workdir"
            )
        old = from_json(stored)
    except DamagedError as error:
        raise DamagedError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; this version cannot resume this run") from error
    if different := differences(old, experiment):
        raise ValueError(
            f"{workdir} holds a run of another experiment ({'; '.join(different)}); "
            f"resume with --config {path}, or choose another --workdir"
        )


def _read_state(workdir: Path) -> dict[str, Any] | None:
    """The content of run.json; None if there is none."""
    path = workdir / "run.json"
    return read_sealed(path, MAX_SETTINGS, has={"command": dict, "finished": bool}) if path.is_file() else None


def _describe(command: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in command.items() if value is not None)


def _remove_if_empty(workdir: Path, existed: bool) -> None:
    """Removes a directory that this process created and left empty."""
    if not existed and not any(path.name != ".lock" for path in workdir.iterdir()):
        with contextlib.suppress(OSError):
            (workdir / ".lock").unlink(missing_ok=True)
            workdir.rmdir()
