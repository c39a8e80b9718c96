"""VGG networks with or without BatchNorm: five stages of 3x3 convolutions with pooling between them.

There are two heads: "pooled" averages the final feature map and has one dense layer, as is usual for 32x32 images;
"flattened" is the published head with two wide dense layers on the flattened feature map. Convolutions have a bias, as
in torchvision, whose weights load with `kdsearch_jax.models.pretrained`.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

from kdsearch_jax.models import blocks

STAGE_CONVS = {8: (1,) * 5, 11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (1, 2, 4, 8, 8)  # of the stages, times `width`


class VGGStage(nn.Module):
    """`convs` times: convolution, BatchNorm if `norm`, relu."""

    convs: int
    features: int
    norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Activations (batch, height, width, channels) in and out."""
        for i in range(1, self.convs + 1):
            x = blocks.conv(self.features, 3, use_bias=True, name=f"conv{i}")(x)
            x = nn.relu(blocks.batch_norm(train, name=f"bn{i}")(x) if self.norm else x)
        return x


class VGG(nn.Module):
    """Stages of `stage_convs` convolutions; a 2x2 max pooling after each of the first `pools` stages."""

    stage_convs: tuple[int, ...]
    num_classes: int
    head: Literal["pooled", "flattened"] = "pooled"
    pools: int = 5
    width: int = 64
    hidden: int = 4096
    dropout: float = 0.0
    norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes) of normalised images (batch, height, width, channels).

        Raises:
          ValueError: the image is too small for the number of poolings.
        """
        if min(x.shape[1:3]) < 2**self.pools:
            raise ValueError(
                f"vgg with pools={self.pools} needs images of at least {2**self.pools} pixels a side, got "
                f"{x.shape[1]}x{x.shape[2]}; use fewer pools or larger images"
            )
        for i, convs in enumerate(self.stage_convs):
            x = VGGStage(convs, self.width * CHANNELS[i], self.norm, name=f"stage{i + 1}")(x, train)
            if i < self.pools:
                x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        if self.head == "flattened":
            batch, height, width, channels = x.shape
            x = x.reshape(batch, height * width * channels)
            for name in ("dense1", "dense2"):
                x = nn.relu(nn.Dense(self.hidden, name=name)(x))
                x = nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)
        else:
            x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="dense")(x)


def vgg(
    *,
    num_classes: int,
    depth: int = 16,
    head: Literal["pooled", "flattened"] = "pooled",
    pools: int = 5,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.0,
    norm: bool = True,
) -> VGG:
    """A VGG network.

    Args:
      num_classes: number of classes.
      depth: 8, 11, 13, 16 or 19.
      head: "pooled" or "flattened", see the module's docstring.
      pools: number of max poolings, 0 to 5; the distillation literature (CRD, DKD) uses 3 for 32x32 images.
      width: channels of the first stage.
      hidden: neurons of the two inner dense layers of the flattened head.
      dropout: rate after each of these layers.
      norm: whether a BatchNorm follows every convolution.

    Raises:
      ValueError: an argument is out of range.
    """
    blocks.check_positive(num_classes=num_classes, width=width, hidden=hidden)
    blocks.check_choice("depth", depth, tuple(STAGE_CONVS))
    blocks.check_choice("head", head, ("pooled", "flattened"))
    blocks.check_choice("pools", pools, tuple(range(6)))
    blocks.check_rate("dropout", dropout)
    return VGG(STAGE_CONVS[depth], num_classes, head, pools, width, hidden, dropout, norm)
