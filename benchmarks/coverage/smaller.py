"""Networks of packages with one or a few of them, in Linen and in NNX."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from benchmarks.coverage import transformers_
from benchmarks.coverage.variant import CallSpec, Package, Variant, images, tokens


def _nnx(factory: Any, arguments: dict[str, Any], *inputs: Any, **kwargs: Any) -> CallSpec:
    from kdsearch_jax.adapters.functional_module import FunctionalModule

    return CallSpec(FunctionalModule.make(factory, arguments), inputs, kwargs)


def _image_classification(name: str, size: int = 32, **arguments: Any) -> CallSpec:
    from image_classification_jax.models import resnet

    return CallSpec(
        getattr(resnet, name)(num_classes=10, **arguments), (images(size, size, 3),), {"is_training": False}
    )


def _image_classification_vit(size: int = 32, **arguments: Any) -> CallSpec:
    from image_classification_jax.models import ViT

    return CallSpec(ViT.Transformer(**arguments), (images(size, size, 3),), {"is_training": False})


def _botnet(size: int = 64, **arguments: Any) -> CallSpec:
    from bottleneck_transformer_flax.botnet import BoTNet, BoTNetConfig

    return CallSpec(BoTNet(BoTNetConfig(**arguments)), (images(size, size, 3),), {"train": False})


def _tnt(size: int = 32, **arguments: Any) -> CallSpec:
    from transformer_in_transformer_flax.tnt import TNTConfig, TransformerInTransformer

    return CallSpec(TransformerInTransformer(TNTConfig(image_size=size, **arguments)), (images(size, size, 3),), {})


def _vanilla_transformer(**arguments: Any) -> CallSpec:
    from vtransformer.model import Transformer

    module = Transformer(src_vocab_size=64, trg_vocab_size=64, max_length=16, **arguments)
    return CallSpec(module, (tokens(8), tokens(6), np.array([1, 1, 1, 1, 0, 1], np.float32)), {})


def _potential(name: str, **arguments: Any) -> CallSpec:
    from ott.neural.networks import icnn, potentials

    return CallSpec(getattr(icnn if name == "ICNN" else potentials, name)(**arguments), (images(4, batch=6),), {})


def _velocity(**arguments: Any) -> CallSpec:
    from ott.neural.networks.velocity_field import mlp

    return CallSpec(mlp.MLP(output_dim=4, **arguments), (images(1, batch=6)[:, 0], images(4, batch=6)), {})


def _recurrentgemma(**arguments: Any) -> CallSpec:
    from recurrentgemma import common
    from recurrentgemma.jax import griffin

    kinds = (common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION)
    config = common.GriffinConfig(
        vocab_size=64,
        width=32,
        mlp_expanded_width=48,
        num_heads=2,
        block_types=kinds,
        attention_window_size=4,
        embeddings_scale_by_sqrt_dim=True,
        logits_soft_cap=30.0,
        **arguments,
    )
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    return CallSpec(griffin.Griffin(config), (tokens(8), positions), {"return_cache": False})


def _long_range(layer: str, pool: bool) -> CallSpec:
    import long_range_models as models

    inner = {"LRU": lambda: models.LRULayer(16, 8), "S5": lambda: models.S5Layer(16, 8)}[layer]()
    return CallSpec(models.ContinuousSequenceModel(inner, 5, emb_dim=16, pool=pool), (images(12, 3),), {})


def _jimmy_dinov2(**arguments: Any) -> CallSpec:
    from jimmy.models.vit import DinoV2

    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, **arguments}
    return _nnx(DinoV2, given, images(given["img_size"], given["img_size"], 3))


def _vitax(**arguments: Any) -> CallSpec:
    from vitax.models.vit import VisionTransformer

    size = arguments.get("img_size", 224)
    return _nnx(VisionTransformer, {"fsdp": False, **arguments}, images(size, size, 3))


def _jaxkit(**arguments: Any) -> CallSpec:
    from jaxkit import fully_connected

    return _nnx(fully_connected.FullyConnected, arguments, images(arguments["widths"][0], batch=6))


def _mamba2(name: str, **arguments: Any) -> CallSpec:
    import mamba2_jax

    if name == "Mamba2Forecaster":
        return _nnx(mamba2_jax.Mamba2Forecaster, {"input_dim": 3, **arguments}, images(16, 3))
    config = mamba2_jax.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, head_dim=16, chunk_size=8, num_hidden_layers=2, **arguments
    )
    return _nnx(getattr(mamba2_jax, name), {"cfg": config}, tokens(16))


def _named(module: str, name: str) -> CallSpec:
    """A network of a package that cannot be imported on current versions; should it be again, it needs a call here."""
    getattr(importlib.import_module(module), name)
    raise NotImplementedError(f"{module} can be imported: say in {__file__} how {name} is called")


TNT: dict[str, Any] = {
    "num_classes": 10,
    "depth": 2,
    "patch_size": 16,
    "inner_dim": 8,
    "inner_heads": 2,
    "inner_dim_head": 4,
    "outer_dim": 32,
    "outer_heads": 4,
    "outer_dim_head": 8,
}
BOTNET: dict[str, Any] = {"num_classes": 10, "num_heads": 2, "head_dim": 8, "initial_filters": 8}
VITAX: dict[str, Any] = {
    "num_classes": 10,
    "img_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 64,
    "hidden_size": 32,
}
VANILLA: dict[str, Any] = {"n_enc_layers": 1, "n_dec_layers": 1}

PACKAGES = (
    Package(
        "image-classification-jax",
        ("image-classification-jax==0.1.4", "einops"),
        (
            Variant("ResNetTiny", partial(_image_classification, "ResNetTiny", num_filters=8)),
            Variant("ResNet18", partial(_image_classification, "ResNet18", num_filters=8)),
            Variant(
                "ResNet18, max pooled",
                partial(_image_classification, "ResNet18", num_filters=8, first_layer_max_pool=True),
            ),
            Variant("ResNet50", partial(_image_classification, "ResNet50", num_filters=8)),
            Variant("ResNet18Local", partial(_image_classification, "ResNet18Local", 8, num_filters=8)),
            Variant(
                "Transformer", partial(_image_classification_vit, n_layers=2, enc_dim=32, n_heads=4, output_dim=10)
            ),
            Variant(
                "Transformer with registers",
                partial(
                    _image_classification_vit, n_layers=2, enc_dim=32, n_heads=4, n_empty_registers=3, output_dim=10
                ),
            ),
            Variant("ResNet152, full size", partial(_image_classification, "ResNet152", 224), True),
            Variant("Transformer, full size", partial(_image_classification_vit, 224), True),
        ),
    ),
    Package(
        "bottleneck-transformer-flax",
        ("bottleneck-transformer-flax==0.0.1", "einops"),
        (
            Variant("BoTNet", partial(_botnet, stage_sizes=(1, 1, 1, 1), **BOTNET)),
            Variant("BoTNet, strided", partial(_botnet, stage_sizes=(1, 1, 1, 2), stride_one=False, **BOTNET)),
            Variant("BoTNet-50, full size", partial(_botnet, 224, stage_sizes=(3, 4, 6, 3)), True),
        ),
    ),
    Package(
        "transformer-in-transformer-flax",
        ("transformer-in-transformer-flax==0.0.2", "einops"),
        (Variant("TNT", partial(_tnt, **TNT)), Variant("TNT-B, full size", partial(_tnt, 224), True)),
    ),
    Package(
        "vanilla-transformer-jax",
        ("vanilla-transformer-jax==0.0.4",),
        (
            Variant("Transformer", partial(_vanilla_transformer, **VANILLA)),
            Variant("Transformer, two layers", partial(_vanilla_transformer, n_enc_layers=2, n_dec_layers=2)),
        ),
    ),
    Package(
        "ott-jax",
        (
            "ott-jax==0.6.0",
            "jaxopt",
            "diffrax",
            "optimistix",
            "lineax",
            "equinox",
            "jaxtyping",
            "wadler-lindig",
            "typing_extensions",
        ),
        (
            Variant("ICNN", partial(_potential, "ICNN", dim_data=4, dim_hidden=(32, 32))),
            Variant("PotentialMLP", partial(_potential, "PotentialMLP", dim_hidden=(32, 32))),
            Variant(
                "PotentialMLP, a vector field",
                partial(_potential, "PotentialMLP", dim_hidden=(32, 16), is_potential=False),
            ),
            Variant("MLP", partial(_potential, "MLP", dim_hidden=(32, 32, 4))),
        ),
    ),
    Package(
        "recurrentgemma",
        ("recurrentgemma==1.0.1", "jaxtyping", "wadler-lindig", "typeguard<3", "sentencepiece", "einops"),
        (Variant("Griffin", _recurrentgemma),),
    ),
    Package(
        "long-range-models",
        ("long-range-models==0.0.1",),
        (
            Variant("LRU", partial(_long_range, "LRU", False)),
            Variant("LRU, pooled", partial(_long_range, "LRU", True)),
            Variant("S5", partial(_long_range, "S5", False)),
        ),
    ),
    Package(
        "jimmy-vision",
        (
            "jimmy-vision==0.0.7",
            *("einops", "requests", "charset-normalizer", "idna", "urllib3", "certifi"),
            *(
                "py7zr",
                "multivolumefile",
                "pybcj",
                "pyppmd",
                "inflate64",
                "brotli",
                "pycryptodomex",
                "texttable",
                "psutil",
            ),
        ),
        (
            Variant("DinoV2", _jimmy_dinov2),
            Variant("DinoV2 with registers", partial(_jimmy_dinov2, reg_tokens=2)),
            Variant("DinoV2, normalised queries", partial(_jimmy_dinov2, qk_norm=True)),
        ),
    ),
    Package(
        "vitax",
        (
            "vitax==0.0.10",
            "transformers==4.57.3",
            "huggingface-hub<1",
            *transformers_.PACKAGE.requirements[2:],
        ),
        (
            Variant("VisionTransformer", partial(_vitax, **VITAX)),
            Variant("VisionTransformer, full size", _vitax, True),
        ),
    ),
    Package(
        "jaxkit",
        ("jaxkit==0.0.2",),
        (
            Variant("FullyConnected", partial(_jaxkit, widths=[8, 32, 32, 32, 4])),
            Variant("FullyConnected without residuals", partial(_jaxkit, widths=[8, 32, 32, 32, 4], residual=False)),
            Variant("FullyConnected without norms", partial(_jaxkit, widths=[8, 32, 32, 32, 4], batchnorm=False)),
        ),
    ),
    Package(
        "mamba2-jax",
        ("mamba2-jax==1.1.2", "einops"),
        (
            Variant("Mamba2Model", partial(_mamba2, "Mamba2Model")),
            Variant("Mamba2ForCausalLM", partial(_mamba2, "Mamba2ForCausalLM")),
            Variant("Mamba2ForCausalLM, untied", partial(_mamba2, "Mamba2ForCausalLM", tie_word_embeddings=False)),
            Variant("Mamba2Forecaster", partial(_mamba2, "Mamba2Forecaster", d_model=32, n_layers=2)),
        ),
    ),
    Package(
        "flaim", ("flaim==0.0.5", "einops"), (Variant("resnet", partial(_named, "flaim.models.resnet", "ResNet")),)
    ),
    Package("vit-flax", ("vit-flax==0.0.3", "einops"), (Variant("ViT", partial(_named, "vit_flax.vit", "ViT")),)),
    Package(
        "deepvit-flax",
        ("deepvit-flax==0.0.3", "einops"),
        (Variant("DeepViT", partial(_named, "deepvit_flax", "DeepViT")),),
    ),
    Package(
        "jvt",
        ("jvt==9.7.22", "einops"),
        (Variant("ViT", partial(_named, "jvt", "ViT")), Variant("LeViT", partial(_named, "jvt", "LeViT"))),
    ),
)
