"""A run of several processes: this one's place among them, how it joins the others, how it leaves when it has failed.

A place comes, in this order, from flags (`--coordinator HOST:PORT --num-processes N --process-id I`), from variables
(JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or from whatever started the process: JAX itself finds
Cloud TPU VMs, TPUs on GKE, Slurm, Open MPI, and Jobs of Kubernetes (with the package `kubernetes`).

Who was started alone, in a Slurm step of one task for example, joins nobody. Who was started as one of many and cannot
join them fails: several processes that each believe to be the only one would write over each other's files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

FLAGS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

# Launchers and the variables, in each process, of how many there are and which this is.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("Slurm", "SLURM_NTASKS", "SLURM_PROCID"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI; JAX does not know them
)
_SLURM_STEP = "SLURM_STEP_NODELIST"  # only what srun starts has it: a batch script or a shell of salloc is no task
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")
_LONGER = (
    60  # seconds that JAX waits beyond our own limit: where its own ends, it aborts the process with a stack trace
)


@dataclass(frozen=True)
class Place:
    """A process among others; what is None, JAX finds out.

    coordinator: "host:port" where process 0 listens.
    count: how many processes, at least 2.
    rank: which of them this is, from 0.
    launcher: who says that there are others; None where that is only possible.
    """

    coordinator: str | None = None
    count: int | None = None
    rank: int | None = None
    launcher: str | None = None


def find(flags: Mapping[str, str], environment: Mapping[str, str]) -> Place | None:
    """This process's place; None where it is alone.

    flags: those given of `FLAGS`, as text; each wins over its variable.

    Raises:
      ValueError: a value is impossible, or there are other processes and no way to find them.
    """
    given = {
        k: flags[k] if k in flags else environment[v] for k, v in FLAGS.items() if k in flags or environment.get(v)
    }
    names = {k: "--" + k.replace("_", "-") if k in flags else v for k, v in FLAGS.items()}
    count = _number(given, names, "num_processes", 1)
    rank = _number(given, names, "process_id", 0)
    if count is not None and rank is not None and rank >= count:
        raise ValueError(f"{names['process_id']}: {rank} is not possible with {count} processes; they count from 0")
    if count == 1:
        return None
    launcher, started, number = _started(environment)
    if not given:
        if launcher is None:
            return Place(launcher=_told(environment)) if _may_be_found(environment) else None
        return None if started == 1 else Place(count=started, rank=number, launcher=launcher)
    if launcher is not None:
        count, rank = started if count is None else count, number if rank is None else rank
    if count == 1:
        return None
    wanted = {"coordinator": given.get("coordinator"), "num_processes": count, "process_id": rank}
    if missing := [f"--{k.replace('_', '-')} (or {FLAGS[k]})" for k, value in wanted.items() if value is None]:
        raise ValueError(
            f"{', '.join(sorted(names[k] for k in given))} given, but not {' and '.join(missing)}; "
            "a run of several processes needs all three, one of a single process none"
        )
    address = given["coordinator"]
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{names['coordinator']}: {address!r} is not possible; give HOST:PORT of process 0")
    return Place(address, count, rank, "the command line" if flags else launcher or "the environment")


def _number(given: Mapping[str, str], names: Mapping[str, str], key: str, least: int) -> int | None:
    text = given.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{names[key]}: {text!r} is not possible; give a number, at least {least}")
    return int(text)


def _started(environment: Mapping[str, str]) -> tuple[str | None, int, int]:
    """(launcher, number of processes, number of this one) where a launcher has started it; (None, 1, 0) elsewhere."""
    for launcher, size, rank in _LAUNCHERS:
        if launcher == "Slurm" and _SLURM_STEP not in environment:
            continue
        if environment.get(size, "").isdigit() and environment.get(rank, "").isdigit():
            return launcher, int(environment[size]), int(environment[rank])
    return None, 1, 0


def _may_be_found(environment: Mapping[str, str]) -> bool:
    """Whether JAX should look for others: not in a pod of Kubernetes that no Job counts, where it would fail."""
    within = "KUBERNETES_SERVICE_HOST" in environment
    return not within or "JOB_COMPLETION_INDEX" in environment or any(name in environment for name in _TPU_HOSTS)


def _told(environment: Mapping[str, str]) -> str | None:
    """Who says that there are other processes, without saying how many."""
    if any("," in environment.get(name, "") for name in _TPU_HOSTS):
        return "a TPU slice"
    # The first of a Job may be its only one.
    return "a Job of Kubernetes" if environment.get("JOB_COMPLETION_INDEX", "0") != "0" else None


def join(place: Place, timeout: int) -> None:
    """Joins the others, within `timeout` seconds; before anything else is done with JAX.

    Where they do not come in time the process ends with status 1 and one line on stderr that says what is missing. It
    cannot be an exception: JAX would abort the process first.

    Raises:
      ValueError: whoever started this process said that there are others, and JAX does not find them. Where nobody
        said so, and there are none, it returns.
    """
    import jax

    def give_up() -> None:
        print(f"error: {_missing(place, timeout)}", file=sys.stderr, flush=True)
        os._exit(1)

    limit = threading.Timer(timeout, give_up)
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count if place.coordinator else None,  # JAX knows how a launcher that it has found counts
            place.rank if place.coordinator else None,
            initialization_timeout=timeout + _LONGER,
            shutdown_timeout_seconds=3600,  # the first process writes student and report when the others are done
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        if place.launcher is not None:
            raise ValueError(
                f"this is one of several processes of {place.launcher}, but JAX cannot join them ({reason}); give "
                "--coordinator HOST:PORT of process 0, or --num-processes 1 to run alone"
            ) from error
        if "coordinator_address" not in reason:  # which says that no cluster was found
            log.warning("running alone, as JAX could not find out whether there are other processes (%s)", reason)
    finally:
        limit.cancel()


def _missing(place: Place, timeout: int) -> str:
    """Why the others did not come, as far as it can be seen from here."""
    waited = f"the processes of this run have not come together within {timeout} s"
    if place.coordinator is None or place.count is None:
        who = f"all {place.count or ''} processes of {place.launcher or 'this cluster'}".replace("  ", " ")
        return f"{waited}: see that {who} run, and reach each other"
    host, _, port = place.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2).close()
    except OSError as error:
        if place.rank == 0:
            return f"{waited}: this is process 0, and {place.coordinator} is not an address of this machine ({error})"
        return f"{waited}: process 0 does not answer at {place.coordinator} ({error}); start it, and open this port"
    others = f"not each of 0 to {place.count - 1} is running (this is {place.rank})"
    return f"{waited}: process 0 answers at {place.coordinator}, but {others}"


def joined() -> bool:
    """Whether this process has joined others. Imports nothing: who has not imported JAX has joined nobody."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status: int, patience: float = 5.0) -> None:
    """Ends a process that has failed; returns at once where it has joined nobody.

    An ordinary exit waits for the others, who may be waiting for this one, for minutes. Here those who fail together
    leave together, and one that fails alone leaves after `patience` seconds, so that its launcher sees it and ends all.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return

    def shut_down() -> None:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    waiting = threading.Thread(target=shut_down, daemon=True)
    waiting.start()
    waiting.join(patience)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
