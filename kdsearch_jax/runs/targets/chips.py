"""TPU slices by name: `tpu:v5e:2x4`, `tpu:v5p:2x2x2`, two slices `tpu:v5e:16x16:2`, or Google's type `tpu:v5litepod-8`.

| chip | HBM, GiB | bf16, Tflop/s | HBM, GB/s | links, GB/s | clock, GHz | devices |
|---|---|---|---|---|---|---|
| v4 | 30.75 | 275 | 1228 | 270 | 1.05 | 1 |
| v5e | 15.75 | 197 | 819 | 200 | 1.5 | 1 |
| v5p | 95.74 | 459 | 2765 | 600 | 1.75 | 1 |
| v6e | 31.25 | 918 | 1640 | 448 | 1.75 | 1 |
| tpu7x | 94.75 | 1154 | 3690 | 600 | 2.2 | 2 |

Each number is that of one device as JAX sees it; a chip of tpu7x is two. HBM is what the compiler lets a program use,
read from its own error message. Peaks and links (all links of a chip, in one direction) are the vendor's, from
https://cloud.google.com/tpu/docs. The clock is the peak divided by the operations per cycle that the compiler's cost
model assumes (2¹⁷ for v5e, 2¹⁸ for v4 and v5p, 2¹⁹ for v6e and tpu7x). It turns estimated cycles into time.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import signal
import threading
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from kdsearch_jax.tracing.messages import nearest

GIB = 2.0**30
INSTALL = "pip install 'kdsearch-jax[tpu-compiler]' (213 MB; no TPU is needed)"


class TargetError(ValueError):
    """The target is unknown, does not exist, or cannot be compiled for here."""


@dataclass(frozen=True)
class Chip:
    """One device of a kind of chip: see the table of this module.

    Attributes:
      memory: bytes of HBM that a program may use.
      flops: bf16 operations a second. bandwidth: bytes a second of HBM. links: bytes a second sent over all links.
      clock: cycles a second. devices: devices per chip. axes: of a topology, 2 or 3.
      per_chip: the number in Google's type names counts cores; so many are one chip.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float
    axes: int
    devices: int = 1
    per_chip: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 275e12, 1228e9, 270e9, 1.05e9, 3, per_chip=2),
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9, 1.5e9, 2),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, 1.75e9, 3, per_chip=2),
        Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 448e9, 1.75e9, 2),
        Chip("tpu7x", 94.75 * GIB, 1154e12, 3690e9, 600e9, 2.2e9, 3, devices=2),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Without these, libtpu asks a metadata server which machine this is, and prints errors when there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
}


@dataclass(frozen=True)
class Target:
    """TPU slices that are not here.

    Attributes:
      chip: of which they are made. shape: chips along each axis of one slice. slices: how many of them.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """`tpu:v5e:2x4`, or `tpu:v5e:16x16:2`."""
        return ":".join(("tpu", self.chip.name, self.topology, *((str(self.slices),) if self.slices > 1 else ())))

    @property
    def topology(self) -> str:
        """`2x4`."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Devices in all slices."""
        return self.chips * self.chip.devices

    def mesh(self) -> Mesh:
        """A mesh with one axis, "data", over all devices, as `devices.data_mesh` makes it of those that are here.

        Raises:
          TargetError: libtpu is missing, or refuses the topology.
        """
        return _mesh(self)


def parse_target(text: str, setting: str = "--target") -> Target:
    """The target of this name.

    Args:
      setting: named in errors.

    Raises:
      TargetError: the chip is unknown (names the nearest), or there is no such slice.
    """
    platform, _, rest = text.strip().lower().partition(":")
    if platform == "gpu":
        raise TargetError(f"{setting}: {text!r} cannot be compiled for here, only TPUs can, such as tpu:v5e:2x4")
    if platform != "tpu":
        chip = CHIPS.get(platform, CHIPS.get(_ALIASES.get(platform.partition("-")[0], platform.partition("-")[0])))
        hint = f"did you mean 'tpu:{text}'?" if chip else "write tpu:CHIP:TOPOLOGY, such as tpu:v5e:2x4"
        raise TargetError(f"{setting}: {text!r} is unknown; {hint}")
    parts = rest.split(":")
    name, dash, number = parts[0].partition("-")
    chip = CHIPS.get(_ALIASES.get(name, name))
    if chip is None:
        raise TargetError(f"{setting}: {text!r} is unknown; {nearest(name, CHIPS)}")
    known = _PLANES if chip.axes == 2 else _CUBES
    if dash:
        cores = int(number) if number.isdecimal() else 0
        of_size = {math.prod(map(int, each.split("x"))) * chip.per_chip: each for each in known}
        if cores not in of_size or len(parts) > 2:
            sizes = ", ".join(f"{name}-{size}" for size in of_size)
            raise TargetError(f"{setting}: {text!r} does not exist; there are: {sizes}")
        parts = [parts[0], of_size[cores], *parts[1:]]
    if len(parts) not in (2, 3):
        raise TargetError(f"{setting}: {text!r} lacks its topology; give {' or '.join(_examples(chip, known))}")
    shape = tuple(int(n) for n in parts[1].split("x")) if re.fullmatch(r"\d+(x\d+)*", parts[1]) else ()
    slices = int(parts[2]) if len(parts) > 2 and parts[2].isdecimal() else int(len(parts) < 3)
    if not _exists(chip, shape) or not 1 <= slices <= 256:
        raise TargetError(f"{setting}: {text!r} does not exist; {chip.name} has {', '.join(known)}")
    return Target(chip, shape, slices)


def _examples(chip: Chip, known: tuple[str, ...]) -> list[str]:
    return [f"tpu:{chip.name}:{topology}" for topology in known[1:3]]


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether such a slice is offered: small ones of fixed shapes, larger ones of three axes in multiples of 4."""
    text = "x".join(map(str, shape))
    if chip.axes == 2:
        return text in _PLANES
    cube = len(shape) == 3 and all(n > 0 and n % 4 == 0 for n in shape) and list(shape) == sorted(shape)
    return text in _CUBES or (cube and math.prod(shape) <= 9216)


def compiler_version() -> str:
    """The version of libtpu. Raises TargetError if it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError(f"target: the TPU compiler is not installed: {INSTALL}")
    return importlib.metadata.version("libtpu")


@functools.cache
def _mesh(target: Target) -> Mesh:
    compiler_version()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A host of a slice has 4 chips where the shape allows it; a single chip is a host by itself.
    bounds = tuple(2 if n % 2 == 0 else 1 for n in target.shape[:2]) + (1,)
    options: dict[str, Any] = {"chips_per_host_bounds": bounds} if bounds != (2, 2, 1) else {}
    options |= {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
    options |= {"num_slices": target.slices} if target.slices > 1 else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.chip.name}:{target.topology}", **options
        )
    except Exception as error:  # of the runtime, whose kinds differ between versions
        line = " ".join(str(error).split())
        raise TargetError(f"--target: {target.name}: the TPU compiler refuses it ({line[:200]})") from error
    finally:  # libtpu installs its own, which end the process where a run would save a checkpoint
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if len(found.devices) != target.devices:
        raise TargetError(f"--target: {target.name}: {len(found.devices)} devices, not the expected {target.devices}")
    if target.slices > 1:  # in the order of the slices, so that only few links cross the data-centre network
        devices = sorted(found.devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))
        return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    return jax.make_mesh((target.devices,), ("data",), axis_types=(AxisType.Auto,), devices=found.devices)
