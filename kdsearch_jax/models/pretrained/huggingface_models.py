"""Maps Hugging Face's config.json to one of our networks.

An unknown key is an error, and so is an unsupported option that would change what the network computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdsearch_jax.models.mobilenet import V2_STAGES
from kdsearch_jax.models.pretrained.config_reader import MAX_PIXELS, ConfigReader
from kdsearch_jax.models.resnet import EXPANSION, STAGE_BLOCKS

_MAX_CHANNELS, _MAX_BLOCKS, _MAX_PATCHES = 1 << 14, 256, 256

# Keys that do not affect what a trained network computes: training, storage, calling conventions, and options of text
# generation, which some versions write for every kind of network.
_IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels",
    "architectures", "attention_probs_dropout_prob", "classifier_dropout_prob", "drop_path_rate", "dtype",
    "encoder_stride", "finetuning_task", "gradient_checkpointing", "hidden_dropout_prob", "id2label", "image_size",
    "initializer_range", "label2id", "model_type", "num_labels", "out_features", "out_indices", "output_attentions",
    "output_hidden_states", "path_norm", "pooler_act", "pooler_output_size", "problem_type", "return_dict",
    "semantic_loss_ignore_index", "stage_names", "torch_dtype", "torchscript", "transformers_version", "use_cache",
    "use_return_dict",
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "is_decoder", "is_encoder_decoder", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id",
    "padding", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "typical_p", "use_bfloat16",
}  # fmt: skip


class ModelSpec(NamedTuple):
    """A network for `kdsearch_jax.adapters.registry.build`.

    input_shape: (height, width, channels), or None if the configuration does not determine it.
    """

    model: str
    arguments: dict[str, Any]
    channels: int
    input_shape: tuple[int, int, int] | None = None


def family(path: Path, config: Mapping[str, Any]) -> str:
    """The `model_type`; ValueError if it is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; choose from {', '.join(sorted(_FAMILIES))}")
    return kind


def model_spec(path: Path, config: Mapping[str, Any], head: str, num_classes: int) -> ModelSpec:
    """Our network that computes the same outputs as the configured one.

    Args:
      path: of the configuration, for messages.
      config: its content.
      head: name of the classifier among the tensors.
      num_classes: number of its outputs.

    Raises:
      ValueError: an unsupported model_type or option, an unknown key, or a size out of bounds.
    """
    options = ConfigReader(path, config, _IGNORED)
    options.require("pruned_heads", {})
    spec = _FAMILIES[family(path, config)](options, head, num_classes)
    options.check_all_read()
    return spec


def _patches(options: ConfigReader, default: int) -> tuple[int, tuple[int, int, int]]:
    """(side of a patch, shape of an image (height, width, channels))."""
    channels = options.size("num_channels", 3, 64)
    height, width = options.sides("image_size", 224, MAX_PIXELS)
    sides = options.sides("patch_size", default, MAX_PIXELS)
    if sides[0] != sides[1]:
        raise options.error("patch_size", "square")
    if max(height, width) > _MAX_PATCHES * sides[0]:
        raise options.error("image_size", f"at most {_MAX_PATCHES} patches of {sides[0]} pixels")
    return sides[0], (height, width, channels)


def _vit(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    patch, shape = _patches(options, 16)
    options.require("hidden_act", "gelu")
    options.require("qkv_bias", True)
    width, heads = options.size("hidden_size", 768, _MAX_CHANNELS), options.size("num_attention_heads", 12, 1024)
    if width % heads:
        raise options.error("num_attention_heads", f"a divisor of hidden_size={width}")
    arguments = {
        "num_classes": num_classes,
        "patch": patch,
        "width": width,
        "depth": options.size("num_hidden_layers", 12, _MAX_BLOCKS),
        "heads": heads,
        "mlp_dim": options.size("intermediate_size", 3072, 4 * _MAX_CHANNELS),
        "epsilon": options.number("layer_norm_eps", 1e-12, 0, 0.1),
    }
    return ModelSpec("vit", arguments, shape[2], shape)


def _deit(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    """DeiT always has a distillation token; without a classifier of its own it is not read."""
    spec = _vit(options, head, num_classes)
    spec.arguments["distillation"] = "head" if head == "cls_classifier" else "token"
    return spec


def _convnext(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    patch, shape = _patches(options, 4)
    options.require("hidden_act", "gelu")
    counts = options.sizes("depths", (3, 3, 9, 3), _MAX_BLOCKS)
    widths = options.sizes("hidden_sizes", (96, 192, 384, 768), _MAX_CHANNELS)
    _same_length(options, counts, "hidden_sizes", widths)
    options.require("num_stages", len(counts))
    scale = options.number("layer_scale_init_value", 1e-6, -math.inf, math.inf)
    if not 0 < scale < 1:
        raise options.error(
            "layer_scale_init_value", "between 0 and 1 (networks without layer scale are not supported)"
        )
    arguments = {
        "num_classes": num_classes,
        "stage_blocks": counts,
        "widths": widths,
        "patch": patch,
        "layer_scale": scale,
        "epsilon": options.number("layer_norm_eps", 1e-12, 0, 0.1),
    }
    return ModelSpec("convnext", arguments, shape[2], shape)


def _swin(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    patch, shape = _patches(options, 4)
    options.require("hidden_act", "gelu")
    options.require("qkv_bias", True)
    options.require("use_absolute_embeddings", False)
    counts = options.sizes("depths", (2, 2, 6, 2), _MAX_BLOCKS)
    heads = options.sizes("num_heads", (3, 6, 12, 24), 1024)
    _same_length(options, counts, "num_heads", heads)
    options.require("num_layers", len(counts))
    width = options.size("embed_dim", 96, _MAX_CHANNELS)
    options.require("hidden_size", width * 2 ** (len(counts) - 1))
    arguments = {
        "num_classes": num_classes,
        "stage_blocks": counts,
        "heads": heads,
        "width": width,
        "window": options.size("window_size", 7, 64),
        "patch": patch,
        "mlp_ratio": options.number("mlp_ratio", 4.0, 0.01, 64),
        "epsilon": options.number("layer_norm_eps", 1e-5, 0, 0.1),
    }
    return ModelSpec("swin", arguments, shape[2], shape)


def _resnet(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    channels = options.size("num_channels", 3, 64)
    options.require("hidden_act", "relu")
    options.require("downsample_in_first_stage", False)
    options.require("downsample_in_bottleneck", False)
    kind = options.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck"):
        raise options.error("layer_type", "'basic' or 'bottleneck'")
    bottleneck = kind == "bottleneck"
    counts = options.sizes("depths", (3, 4, 6, 3), _MAX_BLOCKS)
    width = options.size("embedding_size", 64, _MAX_CHANNELS)
    expected = [width * 2**i * (EXPANSION if bottleneck else 1) for i in range(len(counts))]
    if options.sizes("hidden_sizes", (256, 512, 1024, 2048), _MAX_CHANNELS) != expected:
        raise options.error("hidden_sizes", f"{expected} for this embedding_size, layer_type and depths")
    depth = next((n for n, usual in STAGE_BLOCKS.items() if [*usual] == counts and (n >= 50) == bottleneck), None)
    if depth is not None:
        return ModelSpec("resnet", {"num_classes": num_classes, "depth": depth, "width": width}, channels)
    arguments = {"stage_blocks": counts, "num_classes": num_classes, "bottleneck": bottleneck, "width": width}
    return ModelSpec("kdsearch_jax.models.resnet:ResNet", arguments, channels)


def _mobilenet_v2(options: ConfigReader, head: str, num_classes: int) -> ModelSpec:
    channels = options.size("num_channels", 3, 64)
    options.require("hidden_act", "relu6")
    options.require("depth_divisible_by", 8)
    options.require("min_depth", 8)
    options.require("expand_ratio", V2_STAGES[1][0])
    options.require("output_stride", 32)
    options.require("first_layer_is_expansion", True)
    width = options.number("depth_multiplier", 1.0, 0.01, 64)
    if width < 1:
        options.require("finegrained_output", True)
    options.get("finegrained_output", True)
    same = options.get("tf_padding", True)
    if not isinstance(same, bool):
        raise options.error("tf_padding", "true or false")
    arguments = {
        "num_classes": num_classes,
        "width": width,
        "padding": "same" if same else "symmetric",
        "epsilon": options.number("layer_norm_eps", 1e-3, 0, 0.1),
    }
    return ModelSpec("mobilenet_v2", arguments, channels)


def _same_length(options: ConfigReader, counts: list[int], key: str, sizes: list[int]) -> None:
    if len(sizes) != len(counts):
        raise options.error(key, f"as long as 'depths', {len(counts)}")


_FAMILIES = {
    "resnet": _resnet,
    "vit": _vit,
    "deit": _deit,
    "convnext": _convnext,
    "swin": _swin,
    "mobilenet_v2": _mobilenet_v2,
}
