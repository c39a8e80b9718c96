"""What the tests of topology, surgery and student share: random variables, random cuts, and the proof of equality."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsearch_jax.adapters.architecture import Architecture
from kdsearch_jax.pruning import surgery
from kdsearch_jax.pruning.network import Network, trace
from kdsearch_jax.tracing.topology import Topology

ANY = Architecture("none", {}, input_shape=(1,))  # where only the sizes matter


def image(*shape: int, batch: int = 3, seed: int = 1) -> np.ndarray:
    """A batch of normal inputs."""
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def variables_of(module: nn.Module, *inputs: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Random variables, statistics and scales included, at sizes that keep activations near 1; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def value(path: Any, leaf: Any) -> np.ndarray:
        if getattr(path[-1], "key", None) in ("scale", "var", "gamma"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    spec = jax.eval_shape(lambda *xs: module.init(rngs, *xs, **kwargs), *inputs)
    return jax.tree_util.tree_map_with_path(value, spec)


def random_gates(topology: Topology, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {group.name: rng.uniform(0.2, 1.5, group.size).astype(np.float32) for group in topology.groups}


def random_keep(topology: Topology, rng: np.random.Generator, how: str = "half") -> dict[str, np.ndarray]:
    """What to keep: "half" of all, "one" unit a group (three of a width) and no branch, or all units of "branches"."""
    keep = {}
    for group in topology.groups:
        share = {"half": 0.5, "one": 0.0, "branches": 1.0}[how]
        mask = rng.uniform(size=group.size) < share
        if group.kind == "branches":
            mask = rng.uniform(size=1) < {"half": 0.7, "one": 0.0, "branches": 0.5}[how]
        elif mask.sum() < (few := 3 if group.kind == "width" else 1):  # a LayerNorm over few units loses its input
            mask[rng.permutation(group.size)[:few]] = True
        keep[group.name] = mask
    return keep


def prove(network: Network, variables: Any, *inputs: Any, hows: tuple[str, ...] = ("half",), seed: int = 0) -> None:
    """Cuts at random and verifies: equal logits, counts equal to a fresh trace of the student, XLA's count near."""
    rng = np.random.default_rng(seed)
    for how in hows:
        gates, keep = random_gates(network.topology, rng), random_keep(network.topology, rng, how)
        sliced, _ = surgery.slice_network(variables, gates, keep, network, ANY)
        proof = surgery.verify(network, variables, gates, keep, sliced, *inputs)
        assert proof["difference"] <= surgery.TOLERANCE
        assert proof["macs"] <= network.topology.total()[0]


def traced(module: nn.Module, *inputs: Any, **kwargs: Any) -> Network:
    """The network, with every index of every parameter accounted for: in one group, or frozen for a reason."""
    network = trace(module, *inputs, **kwargs)
    topology = network.topology
    counted = {(path, axis): 0 for path, shape in topology.shapes.items() for axis, n in enumerate(shape) if n > 1}
    for group in topology.groups:
        for member in group.members:
            if member.units is not None:
                counted[member.leaf, member.axis] += int((member.units >= 0).sum())
    for frozen in topology.frozen:
        assert frozen.reason
        if frozen.axis >= 0:
            counted[frozen.leaf, frozen.axis] += frozen.count
    assert counted == {(path, axis): topology.shapes[path][axis] for path, axis in counted}
    return network


def groups(network: Network) -> dict[str, tuple[str, int]]:
    """{name: (kind, size)}."""
    return {group.name: (group.kind, group.size) for group in network.topology.groups}


def reasons(network: Network) -> dict[str, str]:
    """{"path[axis]": reason, or several} of what is frozen."""
    found: dict[str, str] = {}
    for item in network.topology.frozen:
        name = f"{item.leaf.removeprefix('params/')}[{item.axis}]" if item.axis >= 0 else item.leaf
        found[name] = "; ".join(filter(None, [found.get(name), item.reason]))
    return found


def network(function: Any) -> nn.Module:
    """A module from the body of its `__call__`."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return function(self, x)

    Net.__name__ = function.__name__.strip("_")
    return Net()


class Cases(list[Any]):
    """Networks, each with the groups and some of the frozen axes to be found in it: parameters of a test."""

    def __call__(self, shape: tuple[int, ...], free: dict[str, tuple[str, int]], frozen: Any = None) -> Any:
        """A decorator: a network with its groups, and a part of the reason for some of its frozen axes."""

        def register(function: Any) -> Any:
            self.append(pytest.param(network(function), shape, free, frozen or {}, id=function.__name__.strip("_")))
            return function

        return register


def check(module: nn.Module, shape: tuple[int, ...], free: Any, frozen: Any, hows: tuple[str, ...]) -> None:
    """Just these groups, frozen for these reasons, and proved."""
    x = image(*shape)
    found = traced(module, x)
    assert groups(found) == free
    why = reasons(found)
    for axis, part in frozen.items():
        assert axis in why and part in why[axis]
    prove(found, variables_of(module, x), x, hows=hows)


def channels(**sizes: int) -> dict[str, tuple[str, int]]:
    """Groups of this kind."""
    return {name: ("channels", size) for name, size in sizes.items()}


def neurons(**sizes: int) -> dict[str, tuple[str, int]]:
    """Groups of this kind."""
    return {name: ("neurons", size) for name, size in sizes.items()}


def branch(name: str) -> dict[str, tuple[str, int]]:
    """A residual branch."""
    return {f"{name}:branch": ("branches", 1)}


def out(x: jax.Array) -> jax.Array:
    """Three logits."""
    return nn.Dense(3, name="out")(x)


def norm(name: str) -> nn.BatchNorm:
    """A BatchNorm that uses its statistics."""
    return nn.BatchNorm(use_running_average=True, name=name)


def pooled(x: jax.Array) -> jax.Array:
    """The mean over the pixels."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
