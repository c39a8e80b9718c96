"""MobileNetV2 (Sandler et al. 2018) and MobileNetV3 (Howard et al. 2019), as torchvision has them.

Weights of torchvision load with `kdsearch_jax.models.pretrained`. The networks downsample by 32; with `stem="small"`,
for small images, by 16.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn

from kdsearch_jax.models import blocks
from kdsearch_jax.models.inverted import Block, InvertedNet, Style, check_shared_arguments, check_width, divisible

# expansion, channels, blocks, stride of the first block
V2_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip

# by stage and block: kernel size, expanded channels, channels, squeeze-and-excitation, hard-swish, stride
V3_STAGES = {
    "large": (
        ((3, 16, 16, False, False, 1),),
        ((3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
        ((5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1)),
        ((3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
         (3, 184, 80, False, True, 1)),
        ((3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
        ((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
    ),
    "small": (
        ((3, 16, 16, True, False, 2),),
        ((3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1)),
        ((5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1)),
        ((5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1)),
        ((5, 288, 96, True, True, 2), (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1)),
    ),
}  # fmt: skip
V3_HIDDEN = {"large": 1280, "small": 1024}
V3_STYLE = Style(nn.hard_swish, gate=nn.hard_sigmoid, epsilon=1e-3, momentum=0.99)


class MobileNetV2(InvertedNet):
    """MobileNetV2."""


class MobileNetV3(InvertedNet):
    """MobileNetV3."""


def mobilenet_v2(
    *,
    num_classes: int,
    width: float = 1.0,
    stem: Literal["large", "small"] = "large",
    dropout: float = 0.0,
    padding: blocks.Padding = "symmetric",
    epsilon: float = 1e-5,
) -> MobileNetV2:
    """MobileNetV2.

    Args:
      num_classes: number of classes.
      width: multiplier of the published channels, each rounded to a multiple of 8.
      stem: "large" halves the image at once, "small" keeps it.
      dropout: rate before the classifier.
      padding: "symmetric" as in PyTorch, or "same" as in TensorFlow and weights converted from it.
      epsilon: of BatchNorm; 0.001 in weights converted from TensorFlow.

    Raises:
      ValueError: an argument is out of range.
    """
    check_shared_arguments(num_classes, stem, dropout)
    check_width(width)
    blocks.check_choice("padding", padding, ("symmetric", "same"))
    blocks.check_rate("epsilon", epsilon)
    incoming, stages = divisible(32 * width), []
    first = incoming
    for expansion, channels, count, stride in V2_STAGES:
        features, stage = divisible(channels * width), []
        for i in range(count):
            stage.append(
                Block(
                    features,
                    incoming * expansion,
                    stride=stride if i == 0 else 1,
                    expand=expansion > 1,
                    residual=incoming == features and (i > 0 or stride == 1),
                )
            )
            incoming = features
        stages.append(tuple(stage))
    last = divisible(1280 * max(1.0, width))
    style = Style(nn.relu6, epsilon=epsilon, padding=padding)
    return MobileNetV2(tuple(stages), num_classes, first, last, style, stem=stem, dropout=dropout)


def mobilenet_v3(
    *,
    num_classes: int,
    size: Literal["large", "small"] = "large",
    width: float = 1.0,
    stem: Literal["large", "small"] = "large",
    dropout: float = 0.0,
) -> MobileNetV3:
    """MobileNetV3.

    Args:
      num_classes: number of classes.
      size: the "large" or the "small" network.
      width: multiplier of the published channels, each rounded to a multiple of 8.
      stem: "large" halves the image at once, "small" keeps it.
      dropout: rate before the classifier.

    Raises:
      ValueError: an argument is out of range.
    """
    check_shared_arguments(num_classes, stem, dropout)
    check_width(width)
    blocks.check_choice("size", size, tuple(V3_STAGES))
    first = incoming = divisible(16 * width)
    stages = []
    for table in V3_STAGES[size]:
        stage = []
        for kernel, middle, channels, squeeze, swish, stride in table:
            expanded, features = divisible(middle * width), divisible(channels * width)
            stage.append(
                Block(
                    features,
                    expanded,
                    kernel,
                    stride,
                    squeezed=divisible(expanded // 4) if squeeze else 0,
                    expand=expanded != incoming,
                    residual=stride == 1 and incoming == features,
                    activation=None if swish else nn.relu,
                )
            )
            incoming = features
        stages.append(tuple(stage))
    hidden = V3_HIDDEN[size]
    return MobileNetV3(tuple(stages), num_classes, first, 6 * incoming, V3_STYLE, hidden, stem, dropout)
