"""Runs of several processes: which process this is, how it joins the others, and how it exits after a failure.

The answer comes, in this order, from flags (`--coordinator HOST:PORT --num-processes N --process-id I`), environment
variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or the launcher: JAX itself detects Cloud TPU
VMs, TPUs on GKE, Slurm, Open MPI, and Kubernetes Jobs (with the package `kubernetes`).

A process that was started alone, for example in a Slurm step of one task, joins nobody. One that was started with
others and cannot join them fails, since several processes that each work alone would overwrite each other's files.
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

# Launchers, with the variables for the number of processes and the rank of this one.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("Slurm", "SLURM_NTASKS", "SLURM_PROCID"),
    ("MPI", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI; JAX does not detect them
)
_SLURM_STEP = "SLURM_STEP_NODELIST"  # only set by srun: a batch script or an salloc shell is not a task
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")
_EXTRA_TIMEOUT = 60  # seconds that JAX waits longer than we do: at its own limit it aborts with a stack trace


@dataclass(frozen=True)
class ProcessSpec:
    """This process among several; JAX detects what is None.

    Attributes:
      coordinator: "host:port" where process 0 listens.
      count: number of processes, at least 2.
      rank: of this process, from 0.
      launcher: what says that there are other processes; None if that is only a possibility.
    """

    coordinator: str | None = None
    count: int | None = None
    rank: int | None = None
    launcher: str | None = None


def detect(flags: Mapping[str, str], environment: Mapping[str, str]) -> ProcessSpec | None:
    """Detects the other processes of the run; returns None if this one is alone.

    Args:
      flags: the flags of `FLAGS` that were given, as text; each takes precedence over its variable.
      environment: the environment variables.

    Raises:
      ValueError: a value is invalid, or there are other processes but not enough settings to join them.
    """
    given = {
        k: flags[k] if k in flags else environment[v] for k, v in FLAGS.items() if k in flags or environment.get(v)
    }
    names = {k: "--" + k.replace("_", "-") if k in flags else v for k, v in FLAGS.items()}
    count = _number(given, names, "num_processes", 1)
    rank = _number(given, names, "process_id", 0)
    if count is not None and rank is not None and rank >= count:
        raise ValueError(f"{names['process_id']}: {rank} is invalid with {count} processes; ranks start at 0")
    if count == 1:
        return None
    launcher, started, number = _launcher(environment)
    if not given:
        if launcher is None:
            return ProcessSpec(launcher=_known_to_be_several(environment)) if _jax_may_detect(environment) else None
        return None if started == 1 else ProcessSpec(count=started, rank=number, launcher=launcher)
    if launcher is not None:
        count, rank = started if count is None else count, number if rank is None else rank
    if count == 1:
        return None
    wanted = {"coordinator": given.get("coordinator"), "num_processes": count, "process_id": rank}
    if missing := [f"--{k.replace('_', '-')} (or {FLAGS[k]})" for k, value in wanted.items() if value is None]:
        raise ValueError(
            f"{', '.join(sorted(names[k] for k in given))} given, but not {' and '.join(missing)}; "
            "a run of several processes needs all three, a single process none"
        )
    address = given["coordinator"]
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{names['coordinator']}: {address!r} is invalid; give HOST:PORT of process 0")
    return ProcessSpec(address, count, rank, "the command line" if flags else launcher or "the environment")


def _number(given: Mapping[str, str], names: Mapping[str, str], key: str, least: int) -> int | None:
    text = given.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{names[key]}: {text!r} is invalid; give an integer of at least {least}")
    return int(text)


def _launcher(environment: Mapping[str, str]) -> tuple[str | None, int, int]:
    """(launcher, number of processes, rank of this one); (None, 1, 0) without a launcher."""
    for launcher, size, rank in _LAUNCHERS:
        if launcher == "Slurm" and _SLURM_STEP not in environment:
            continue
        if environment.get(size, "").isdigit() and environment.get(rank, "").isdigit():
            return launcher, int(environment[size]), int(environment[rank])
    return None, 1, 0


def _jax_may_detect(environment: Mapping[str, str]) -> bool:
    """Whether JAX should look for others: not in a Kubernetes pod without a Job index, where it would fail."""
    within = "KUBERNETES_SERVICE_HOST" in environment
    return not within or "JOB_COMPLETION_INDEX" in environment or any(name in environment for name in _TPU_HOSTS)


def _known_to_be_several(environment: Mapping[str, str]) -> str | None:
    """What says that there are other processes, without their number."""
    if any("," in environment.get(name, "") for name in _TPU_HOSTS):
        return "a TPU slice"
    # Index 0 of a Job may be its only one.
    return "a Kubernetes Job" if environment.get("JOB_COMPLETION_INDEX", "0") != "0" else None


def join(spec: ProcessSpec, timeout: int) -> None:
    """Joins the other processes; to be called before anything else is done with JAX.

    If they do not come together in time, the process exits with status 1 and one line on stderr that says what is
    missing. It cannot raise: JAX would abort the process first.

    Args:
      spec: what `detect` returned.
      timeout: in seconds.

    Raises:
      ValueError: the launcher says that there are other processes, but JAX does not find them. Without such a launcher
        the process continues alone.
    """
    import jax

    def give_up() -> None:
        print(f"error: {_missing(spec, timeout)}", file=sys.stderr, flush=True)
        os._exit(1)

    limit = threading.Timer(timeout, give_up)
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            spec.coordinator,
            spec.count if spec.coordinator else None,  # JAX reads the number from a launcher that it detects
            spec.rank if spec.coordinator else None,
            initialization_timeout=timeout + _EXTRA_TIMEOUT,
            shutdown_timeout_seconds=3600,  # process 0 writes student and report after the others have finished
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        if spec.launcher is not None:
            raise ValueError(
                f"this is one of several processes of {spec.launcher}, but JAX cannot join them ({reason}); give "
                "--coordinator HOST:PORT of process 0, or --num-processes 1 to run alone"
            ) from error
        if "coordinator_address" not in reason:  # in the message when no cluster was detected
            log.warning("running alone: JAX could not determine whether there are other processes (%s)", reason)
    finally:
        limit.cancel()


def _missing(spec: ProcessSpec, timeout: int) -> str:
    """Why the others did not come together, as far as this process can tell."""
    waited = f"the processes of this run have not come together within {timeout} s"
    if spec.coordinator is None or spec.count is None:
        who = f"all {spec.count or ''} processes of {spec.launcher or 'this cluster'}".replace("  ", " ")
        return f"{waited}: check that {who} are running and can reach each other"
    host, _, port = spec.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2).close()
    except OSError as error:
        if spec.rank == 0:
            return f"{waited}: this is process 0, and {spec.coordinator} is not an address of this machine ({error})"
        return f"{waited}: process 0 does not answer at {spec.coordinator} ({error}); start it, and open this port"
    others = f"not each of 0 to {spec.count - 1} is running (this is {spec.rank})"
    return f"{waited}: process 0 answers at {spec.coordinator}, but {others}"


def is_distributed() -> bool:
    """Whether this process has joined others. Does not import JAX: without it, it cannot have joined any."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def exit_after_failure(status: int, patience: float = 5.0) -> None:
    """Exits a failed process of several; returns at once in a single process.

    An ordinary exit waits minutes for the other processes, which may be waiting for this one. Here processes that fail
    together exit together, and one that fails alone exits after `patience` seconds, so that its launcher ends the rest.
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
