"""Start N processes of one command on this machine, joined by JAX's coordinator.

python launch/local.py [--devices D] 2 -m kdsearch_jax.search --workdir runs/two
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from types import FrameType


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(count: int, command: list[str], devices: int | None = None) -> int:
    """Run `python *command` in `count` processes; the first non-zero exit status stops the rest and is returned."""
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    if devices is not None:
        common["JAX_NUM_CPU_DEVICES"] = str(devices)
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    with ExitStack() as stack:
        for rank in range(count):
            output = None if rank == 0 else stack.enter_context(open(f"launch-{rank}.log", "wb"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **common, "JAX_PROCESS_ID": str(rank)},
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
                )
            )
        return wait(processes)


def wait(processes: list[subprocess.Popen[bytes]], grace: float = 30.0) -> int:
    """Wait for all; after a failure give the rest `grace` seconds, as they may be saving, then end them."""
    while True:
        states = [process.poll() for process in processes]
        failed = [state for state in states if state]
        if all(state is not None for state in states):
            break
        if failed:
            deadline = time.monotonic() + grace
            for process in processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            break
        time.sleep(0.1)
    return next((128 - state if state < 0 else state for state in failed), 0)


def main(argv: list[str]) -> int:
    """The command line: a count, options, then what `python` is to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="how many processes")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of python, such as -m kdsearch_jax.search")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"count: {arguments.count} is not possible; give at least 1")
    if not arguments.command:
        parser.error("no command; give what python is to run, such as -m kdsearch_jax.search")
    return launch(arguments.count, arguments.command, arguments.devices)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
