"""Building blocks that several models share: convolution and normalisation with PyTorch's defaults, blocks, stages.

Every submodule has an explicit name. The network decides whether a block has a projection; a block never compares its
input's channels with `features`, which would break when either is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Shortcut = Literal["identity", "pad", "project"]
Padding = Literal["symmetric", "same"]

# The largest size, number of blocks and number of stages that an architecture from an untrusted file can ask for.
LARGEST, DEEPEST, STAGES = 1 << 20, 2048, 64

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    size: int,
    *,
    name: str,
    stride: int = 1,
    use_bias: bool = False,
    groups: int = 1,
    padding: Padding = "symmetric",
) -> nn.Conv:
    """A square convolution with `size // 2` zeros on every side.

    This is PyTorch's padding. TensorFlow's, "same", pads an even image at stride 2 on one side only, so weights that
    were trained with one see shifted images with the other.
    """
    pads: Any = ((size // 2, size // 2),) * 2 if padding == "symmetric" else "SAME"
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        pads,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        name=name,
    )


def batch_norm(train: bool, *, name: str, epsilon: float = 1e-5, momentum: float = 0.9) -> nn.BatchNorm:
    """BatchNorm with PyTorch's constants; its momentum of .1 (of the new batch) is .9 (of the old) in Flax."""
    return nn.BatchNorm(use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name)


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """The parameter-free shortcut ("option A", He et al. 2016): subsamples, then pads zero channels, half on each side.

    Args:
      x: activations (batch, height, width, features / 2).
      features: output channels.
      stride: keeps every `stride`-th row and column.

    Returns:
      activations (batch, height / stride, width / stride, features).
    """
    pad = features // 4
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    features: int
    stride: int = 1
    shortcut: Shortcut = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        y = conv(self.features, 3, stride=self.stride, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="bn1")(y))
        y = conv(self.features, 3, name="conv2")(y)
        y = batch_norm(train, name="bn2")(y)
        if self.shortcut == "pad":
            x = pad_shortcut(x, self.features, self.stride)
        elif self.shortcut == "project":
            x = conv(self.features, 1, stride=self.stride, name="shortcut_conv")(x)
            x = batch_norm(train, name="shortcut_bn")(x)
        return nn.relu(x + y)


class Stage(nn.Module):
    """`blocks` blocks in sequence, named block1, block2, …; stride and shortcut apply to the first one.

    Attributes:
      block: creates a block from `features`, `stride`, `shortcut` and `name`.
    """

    block: Callable[..., Any]
    blocks: int
    features: int
    stride: int = 1
    shortcut: Shortcut = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        stride, shortcut = self.stride, self.shortcut
        for i in range(self.blocks):
            x = self.block(features=self.features, stride=stride, shortcut=shortcut, name=f"block{i + 1}")(x, train)
            stride, shortcut = 1, "identity"
        return x


def check_positive(**arguments: int) -> None:
    """Raises ValueError, naming the argument, unless all are integers from 1 up to the largest size allowed."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r:.80}")
        most = DEEPEST if name.partition("[")[0] in ("depth", "stage_blocks") else LARGEST
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value!r:.80}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError, naming the argument and the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r:.80}")


def check_rate(name: str, value: float) -> None:
    """Raises ValueError unless a dropout rate or an epsilon is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r:.80}")


def check_sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple; raises ValueError, naming the argument, unless they are positive integers."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not 0 < len(sizes) <= STAGES:
        raise ValueError(f"{name} must be a list of 1 to {STAGES} integers, got {sizes!r:.80}")
    check_positive(**{f"{name}[{i}]": size for i, size in enumerate(sizes)})
    return tuple(sizes)


def check_patches(network: str, shape: tuple[int, ...], patch: int) -> None:
    """Raises ValueError unless images of this shape (batch, height, width, channels) divide into patches."""
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"{network} needs images whose sides are multiples of patch={patch}, got {shape[1]}x{shape[2]}"
        )
