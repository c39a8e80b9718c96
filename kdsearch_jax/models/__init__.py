"""The built-in models: ordinary Flax modules without any pruning code. `pretrained` reads their weights from PyTorch
and Hugging Face files.

Imports nothing of this package; `pretrained` also imports `storage`.

Each model is called as `module.apply(variables, images, train=False)` with float images (batch, height, width,
channels) and returns logits (batch, classes).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from kdsearch_jax.models.cifar_resnet import cifar_resnet
from kdsearch_jax.models.convnext import convnext
from kdsearch_jax.models.deit import deit
from kdsearch_jax.models.densenet import cifar_densenet, densenet
from kdsearch_jax.models.efficientnet import efficientnet
from kdsearch_jax.models.mixer import mixer
from kdsearch_jax.models.mobilenet import mobilenet_v2, mobilenet_v3
from kdsearch_jax.models.resnet import resnet, resnext
from kdsearch_jax.models.small import mlp, small_cnn
from kdsearch_jax.models.swin import swin
from kdsearch_jax.models.unet import unet
from kdsearch_jax.models.vgg import vgg
from kdsearch_jax.models.vit import vit
from kdsearch_jax.models.wide_resnet import wide_resnet

__all__ = [
    "MODELS",
    "cifar_densenet",
    "cifar_resnet",
    "convnext",
    "deit",
    "densenet",
    "efficientnet",
    "mixer",
    "mlp",
    "mobilenet_v2",
    "mobilenet_v3",
    "resnet",
    "resnext",
    "small_cnn",
    "swin",
    "unet",
    "vgg",
    "vit",
    "wide_resnet",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        cifar_resnet,
        wide_resnet,
        resnet,
        resnext,
        vgg,
        cifar_densenet,
        densenet,
        mobilenet_v2,
        mobilenet_v3,
        efficientnet,
        unet,
        convnext,
        vit,
        deit,
        swin,
        mixer,
        small_cnn,
        mlp,
    )
}
