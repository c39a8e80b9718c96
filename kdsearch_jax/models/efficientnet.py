"""EfficientNet-B0 to B7 (Tan & Le 2019), as torchvision has them.

Each variant is B0 with its widths and depths multiplied, and is meant for images of its own size, 224 to 600 pixels.
There is no stochastic depth, unlike in the paper. Weights of torchvision load with
`kdsearch_jax.models.pretrained`.
"""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn

from kdsearch_jax.models import blocks
from kdsearch_jax.models.inverted import Block, InvertedNet, Style, check_shared_arguments, divisible

# expansion, kernel size, stride of the first block, channels, blocks
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip
# width multiplier, depth multiplier
VARIANTS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
STYLE = Style(nn.silu, squeeze=nn.silu)


class EfficientNet(InvertedNet):
    """EfficientNet."""


def efficientnet(
    *, num_classes: int, variant: int = 0, stem: Literal["large", "small"] = "large", dropout: float = 0.0
) -> EfficientNet:
    """An EfficientNet.

    Args:
      num_classes: number of classes.
      variant: 0 for B0 to 7 for B7.
      stem: "large" halves the image at once, "small" keeps it.
      dropout: rate before the classifier.

    Raises:
      ValueError: an argument is out of range.
    """
    check_shared_arguments(num_classes, stem, dropout)
    blocks.check_choice("variant", variant, tuple(range(len(VARIANTS))))
    wider, deeper = VARIANTS[variant]
    first = incoming = divisible(32 * wider)
    stages = []
    for expansion, size, stride, channels, count in STAGES:
        features, stage = divisible(channels * wider), []
        for i in range(math.ceil(count * deeper)):
            stage.append(
                Block(
                    features,
                    divisible(incoming * expansion),
                    size,
                    stride if i == 0 else 1,
                    squeezed=max(1, incoming // 4),
                    expand=expansion > 1,
                    residual=incoming == features and (i > 0 or stride == 1),
                )
            )
            incoming = features
        stages.append(tuple(stage))
    # B5 to B7 were trained with other BatchNorm constants.
    style = STYLE._replace(epsilon=1e-3, momentum=0.99) if variant >= 5 else STYLE
    return EfficientNet(tuple(stages), num_classes, first, 4 * incoming, style, stem=stem, dropout=dropout)
