"""A small experiment on the digits whose network has no kinks: what `benchmarks/processes.py` runs.

Where a relu's input is 0 but for rounding, its slope is 0 on one machine and 1 on another, and from there on the two
train apart, a thousand times faster than by rounding alone; black pixels make thousands of inputs cross 0 together. So
two ways to add up a batch are compared on silu, whose slope has no steps. All else is as elsewhere: convolutions with
BatchNorm, a residual block, random crops, the search down to half of the MACs.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from kdsearch_jax.config import BudgetConfig, DataConfig, Experiment, ModelConfig, RunConfig, StageConfig
from kdsearch_jax.models.blocks import batch_norm, conv


class Unit(nn.Module):
    """Convolution, BatchNorm, silu."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        return nn.silu(batch_norm(train, name="bn")(conv(self.features, 3, stride=self.stride, name="conv")(x)))


class Smooth(nn.Module):
    """Three units, a residual block of two more between the second and the third."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels)."""
        x = Unit(self.width, name="stage1")(x, train)
        x = Unit(2 * self.width, stride=2, name="stage2")(x, train)
        x = x + Unit(2 * self.width, name="block2")(Unit(2 * self.width, name="block1")(x, train), train)
        x = Unit(4 * self.width, stride=2, name="stage3")(x, train)
        return nn.Dense(self.num_classes, name="dense")(x.mean(axis=(1, 2)))


def make(*, num_classes: int, width: int = 8) -> nn.Module:
    """The network, by `--model smooth:make`."""
    return Smooth(num_classes, width)


def experiment(quick: bool = False) -> Experiment:
    """50 updates a stage; the quick variant has a narrower network and 10."""
    stage = StageConfig(steps=10 if quick else 50, batch_size=16 if quick else 64, learning_rate=0.02)
    return Experiment(
        name="smooth",
        model=ModelConfig("smooth:make", {"width": 4 if quick else 8}),
        data=DataConfig("digits", crop=1, train_limit=160 if quick else None),
        teacher=stage,
        search=dataclasses.replace(stage, learning_rate=0.005, schedule="constant"),
        retrain=stage,
        budget=BudgetConfig(macs=0.5),
        run=RunConfig(steps_per_dispatch=5, checkpoint_every=20, evaluate_every=20),
    )
