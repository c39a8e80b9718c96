"""Networks of `flaxmodels`: ResNet and VGG at their sizes on small images, GPT-2, StyleGAN2 and its few-shot kin."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.coverage.variant import CallSpec, Package, Variant, images, tokens

GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": None,
    "n_ctx": 16,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "initializer_range": 0.02,
    "use_cache": False,
}
GAN = {"resolution": 16, "fmap_base": 128, "fmap_max": 16}
GENERATOR = {**GAN, "z_dim": 16, "w_dim": 16, "mapping_layer_features": 16, "num_ws": 6, "num_mapping_layers": 2}


def _resnet(name: str, output: str, size: int) -> CallSpec:
    import flaxmodels

    module = getattr(flaxmodels, name)(output=output, pretrained=None, num_classes=10, normalize=False)
    return CallSpec(module, (images(size, size, 3),), {"train": False})


def _vgg(architecture: str, head: bool, output: str, size: int) -> CallSpec:
    import flaxmodels

    module = getattr(flaxmodels, architecture.upper())(
        output=output, pretrained=None, include_head=head, num_classes=10, normalize=False
    )
    return CallSpec(module, (images(size, size, 3),), {"train": False})


def _gpt2(name: str) -> CallSpec:
    from flaxmodels import gpt2

    return CallSpec(getattr(gpt2, name)(config=SimpleNamespace(**GPT2)), (tokens(8),), {"training": False})


def _gan(folder: str, name: str, arguments: dict[str, Any]) -> CallSpec:
    import flaxmodels

    module = getattr(getattr(flaxmodels, folder), name)(**arguments)
    if name == "Discriminator":
        return CallSpec(module, (images(16, 16, 3),), {})
    noise = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    off = {"train": False, "noise_mode": "const"} if name == "Generator" else {"train": False}
    return CallSpec(module, (noise,), off)


PACKAGE = Package(
    "flaxmodels",
    (
        "flaxmodels==0.1.3",
        "h5py",
        "requests",
        "filelock",
        "tqdm",
        "regex",
        "pillow",
        "charset-normalizer",
        "idna",
        "urllib3",
        "certifi",
    ),
    (
        Variant("ResNet18", partial(_resnet, "ResNet18", "logits", 32)),
        Variant("ResNet18, log-softmax", partial(_resnet, "ResNet18", "log_softmax", 32)),
        Variant("ResNet18, activations", partial(_resnet, "ResNet18", "activations", 32)),
        Variant("ResNet34", partial(_resnet, "ResNet34", "logits", 32)),
        Variant("ResNet50", partial(_resnet, "ResNet50", "softmax", 32)),
        Variant("VGG16 without head", partial(_vgg, "vgg16", False, "logits", 32)),
        Variant("VGG16, activations", partial(_vgg, "vgg16", False, "activations", 32)),
        Variant("GPT2Model", partial(_gpt2, "GPT2Model")),
        Variant("GPT2LMHeadModel", partial(_gpt2, "GPT2LMHeadModel")),
        Variant(
            "StyleGAN2 mapping",
            partial(
                _gan,
                "stylegan2",
                "MappingNetwork",
                {"z_dim": 16, "w_dim": 16, "layer_features": 16, "num_ws": 6, "num_layers": 3},
            ),
        ),
        Variant("StyleGAN2 generator", partial(_gan, "stylegan2", "Generator", GENERATOR)),
        Variant("StyleGAN2 discriminator", partial(_gan, "stylegan2", "Discriminator", GAN)),
        Variant(
            "StyleGAN2 discriminator, orig",
            partial(_gan, "stylegan2", "Discriminator", {**GAN, "architecture": "orig"}),
        ),
        Variant("few-shot generator", partial(_gan, "few_shot_gan_adaption", "Generator", GENERATOR)),
        Variant("few-shot discriminator", partial(_gan, "few_shot_gan_adaption", "Discriminator", GAN)),
        *(
            Variant(f"{name}, full size", partial(_resnet, name, "logits", 224), True)
            for name in ("ResNet50", "ResNet101", "ResNet152")
        ),
        *(Variant(f"{name}, full size", partial(_vgg, name, True, "logits", 224), True) for name in ("vgg16", "vgg19")),
    ),
)
