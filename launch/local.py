"""Start N processes of one command on this machine, joined by JAX's coordinator, to develop and test without a cluster.

    python launch/local.py -n 2 -- python -m kdsearch_jax.search --workdir runs/two

A bare `python` is the interpreter that runs this file. The output of process 0 is shown; the others write to
launch-1.log and so on. SIGINT, SIGTERM and SIGHUP are forwarded, so that every process can shut down cleanly and save
on SIGTERM; a second signal kills all of them. When one fails, the others get a grace period before they are killed, and
the status is that of the first failure (128 + signal if a signal ended it).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOWN = 20  # lines of the log of a process that failed


@contextlib.contextmanager
def reserved_port(tries: int = 200) -> Iterator[int]:
    """Reserves a free TCP port of this machine among concurrent launchers.

    The coordinator must open the port itself, so it cannot stay open here. It is chosen below the range of ephemeral
    ports, and holding the UDP port of the same number marks it as taken.
    """
    for _ in range(tries):
        port = random.randrange(15000, 32000)
        with socket.socket(type=socket.SOCK_DGRAM) as mark, socket.socket() as probe:
            try:
                mark.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            probe.close()
            yield port
            return
    raise OSError(f"no free port found in {tries} tries")


class Processes:
    """The processes of a run. Leaving the context kills whatever is still running."""

    def __init__(self, command: list[str], count: int, devices: int | None, logs: Path, grace: float):
        self.command, self.count, self.devices, self.logs, self.grace = command, count, devices, logs, grace
        self.running: list[subprocess.Popen[bytes]] = []
        self.signals = 0
        self._stack = ExitStack()

    def __enter__(self) -> Processes:
        """Forwards signals; starts nothing yet."""
        for number in PASSED_ON:
            self._stack.callback(signal.signal, number, signal.signal(number, self._pass_on))
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the remaining processes and their children."""
        for process in self.running:
            _kill(process)
            process.wait()
        self._stack.close()

    def _pass_on(self, number: int, _frame: object) -> None:
        self.signals += 1
        for process in self.running:
            if self.signals > 1:
                _kill(process)
            elif process.poll() is None:
                process.send_signal(number)

    def start(self) -> None:
        """Starts all processes, or fewer if a signal arrives in the meantime."""
        port = self._stack.enter_context(reserved_port())
        address = f"127.0.0.1:{port}"
        common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.count)}
        common["JAX_COORDINATOR_BIND_ADDRESS"] = address  # by default JAX listens on all interfaces
        if self.devices is not None:
            common["JAX_NUM_CPU_DEVICES"] = str(self.devices)
        for rank in range(self.count):
            output = None
            if rank:
                output = self._stack.enter_context(self.log(rank).open("wb"))
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **common, "JAX_PROCESS_ID": str(rank)},
                stdin=subprocess.DEVNULL if rank else None,
                stdout=output,
                stderr=subprocess.STDOUT if rank else None,
                preexec_fn=_end_with_launcher if sys.platform == "linux" else None,
                start_new_session=True,  # Ctrl-C reaches only the launcher, which forwards it once
            )
            self.running.append(process)
            if self.signals:
                process.terminate()
                return

    def log(self, rank: int) -> Path:
        """The log file of process `rank`."""
        return self.logs / f"launch-{rank}.log"

    def wait(self) -> int:
        """Waits for all processes or the first failure; returns its status, 0 if there is none."""
        while True:
            states = {rank: process.poll() for rank, process in enumerate(self.running)}
            # If two ended since the last check, the one ended by a signal is more likely the consequence.
            failed = sorted((state < 0, rank) for rank, state in states.items() if state)
            if failed:
                rank = failed[0][1]
                return self._failed(rank, states[rank] or 0)
            if None not in states.values():
                return 0
            time.sleep(0.05)

    def _failed(self, rank: int, state: int) -> int:
        deadline = time.monotonic() + self.grace
        # After a signal they may take as long as they need to save; a second signal kills them.
        while None in [p.poll() for p in self.running] and (self.signals or time.monotonic() < deadline):
            time.sleep(0.05)
        status = 128 - state if state < 0 else state
        if not self.signals:
            left = [str(i) for i, process in enumerate(self.running) if process.poll() is None]
            end = f"; ending {', '.join(left)}" if left else ""
            print(f"launch: process {rank} ended with status {status}{end}", file=sys.stderr)
            if rank:
                lines = self.log(rank).read_text(errors="replace").splitlines()[-SHOWN:]
                print(f"launch: the end of {self.log(rank)}:", *lines, sep="\n", file=sys.stderr)
        return status


def _end_with_launcher() -> None:
    """In a new process, before it begins: Linux will kill it when the launcher is killed, which can pass nothing on."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with what it has started; one that has ended may have left something, too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def main(argv: list[str]) -> int:
    """The command line: options, then what to run."""
    parser = argparse.ArgumentParser(
        prog="local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="local.py -n N [--devices D] [--logs DIR] [--grace S] -- COMMAND ...",
    )  # fmt: skip
    parser.add_argument("-n", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--devices", type=int, metavar="D", help="virtual devices of each process, on CPUs")
    parser.add_argument("--logs", type=Path, default=Path(), metavar="DIR", help="where launch-1.log and so on go (.)")
    parser.add_argument("--grace", type=float, default=15.0, metavar="S",
                        help="seconds that the others have to end by themselves after a failure (15)")  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help="such as python -m kdsearch_jax.search")
    arguments = parser.parse_args(argv)
    command = arguments.command[arguments.command[:1] == ["--"] :]
    for name, value in (("-n", arguments.n), ("--devices", arguments.devices)):
        if value is not None and value < 1:
            parser.error(f"{name}: {value} is not possible; give at least 1")
    if not arguments.logs.is_dir():
        parser.error(f"--logs: {arguments.logs} is not a directory")
    if not command:
        parser.error("no command; give one after --, such as -- python -m kdsearch_jax.search")
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    with Processes(command, arguments.n, arguments.devices, arguments.logs, arguments.grace) as processes:
        try:
            processes.start()
        except OSError as error:
            parser.error(str(error))
        return processes.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
