"""Hugging Face's config.json: which of our networks it describes.

Only keys that are known are read, an option that would change what the network computes and is not supported here is
an error, and so is a key that is not known at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdsearch_jax.models.mobilenet import V2_STAGES
from kdsearch_jax.models.pretrained.huggingface_options import MOST_PIXELS, Options
from kdsearch_jax.models.resnet import EXPANSION, STAGE_BLOCKS

_MOST_CHANNELS, _MOST_BLOCKS, _MOST_PATCHES = 1 << 14, 256, 256

# Keys that say nothing of what a trained network computes: how it is trained, stored and called, and what concerns text
# only, which some versions write for every kind of network.
_HARMLESS = {
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


class Described(NamedTuple):
    """A network as `kdsearch_jax.adapters.registry.build` takes it; input_shape: None where the configuration does
    not fix it."""

    model: str
    arguments: dict[str, Any]
    channels: int
    input_shape: tuple[int, int, int] | None = None


def family(path: Path, config: Mapping[str, Any]) -> str:
    """The `model_type`. Raises ValueError where it is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; there are {', '.join(sorted(_FAMILIES))}")
    return kind


def describe(path: Path, config: Mapping[str, Any], head: str, num_classes: int) -> Described:
    """Our network that computes what the configured one does.

    Args:
      path: of the configuration, for messages.
      config: what it holds.
      head: name of the classifier among the tensors.
      num_classes: its outputs.

    Raises:
      ValueError: an unsupported model_type or option, a key that is not known, a size out of bounds.
    """
    options = Options(path, config, _HARMLESS)
    options.only("pruned_heads", {})
    described = _FAMILIES[family(path, config)](options, head, num_classes)
    options.finish()
    return described


def _patches(options: Options, default: int) -> tuple[int, tuple[int, int, int]]:
    """(side of a patch, shape of an image)."""
    channels = options.size("num_channels", 3, 64)
    height, width = options.sides("image_size", 224, MOST_PIXELS)
    sides = options.sides("patch_size", default, MOST_PIXELS)
    if sides[0] != sides[1]:
        raise options.error("patch_size", "the same in both directions")
    if max(height, width) > _MOST_PATCHES * sides[0]:
        raise options.error("image_size", f"at most {_MOST_PATCHES} patches of {sides[0]} pixels")
    return sides[0], (height, width, channels)


def _vit(options: Options, head: str, num_classes: int) -> Described:
    patch, shape = _patches(options, 16)
    options.only("hidden_act", "gelu")
    options.only("qkv_bias", True)
    width, heads = options.size("hidden_size", 768, _MOST_CHANNELS), options.size("num_attention_heads", 12, 1024)
    if width % heads:
        raise options.error("num_attention_heads", f"a divisor of hidden_size={width}")
    arguments = {
        "num_classes": num_classes,
        "patch": patch,
        "width": width,
        "depth": options.size("num_hidden_layers", 12, _MOST_BLOCKS),
        "heads": heads,
        "mlp_dim": options.size("intermediate_size", 3072, 4 * _MOST_CHANNELS),
        "epsilon": options.number("layer_norm_eps", 1e-12, 0, 0.1),
    }
    return Described("vit", arguments, shape[2], shape)


def _deit(options: Options, head: str, num_classes: int) -> Described:
    """There is a distillation token always; its classifier may be missing, and then nobody reads it."""
    described = _vit(options, head, num_classes)
    described.arguments["distillation"] = "head" if head == "cls_classifier" else "token"
    return described


def _convnext(options: Options, head: str, num_classes: int) -> Described:
    patch, shape = _patches(options, 4)
    options.only("hidden_act", "gelu")
    counts = options.sizes("depths", (3, 3, 9, 3), _MOST_BLOCKS)
    widths = options.sizes("hidden_sizes", (96, 192, 384, 768), _MOST_CHANNELS)
    _same_length(options, counts, "hidden_sizes", widths)
    options.only("num_stages", len(counts))
    scale = options.number("layer_scale_init_value", 1e-6, -math.inf, math.inf)
    if not 0 < scale < 1:
        raise options.error("layer_scale_init_value", "between 0 and 1 (a network without such factors is not known)")
    arguments = {
        "num_classes": num_classes,
        "stage_blocks": counts,
        "widths": widths,
        "patch": patch,
        "layer_scale": scale,
        "epsilon": options.number("layer_norm_eps", 1e-12, 0, 0.1),
    }
    return Described("convnext", arguments, shape[2], shape)


def _swin(options: Options, head: str, num_classes: int) -> Described:
    patch, shape = _patches(options, 4)
    options.only("hidden_act", "gelu")
    options.only("qkv_bias", True)
    options.only("use_absolute_embeddings", False)
    counts = options.sizes("depths", (2, 2, 6, 2), _MOST_BLOCKS)
    heads = options.sizes("num_heads", (3, 6, 12, 24), 1024)
    _same_length(options, counts, "num_heads", heads)
    options.only("num_layers", len(counts))
    width = options.size("embed_dim", 96, _MOST_CHANNELS)
    options.only("hidden_size", width * 2 ** (len(counts) - 1))
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
    return Described("swin", arguments, shape[2], shape)


def _resnet(options: Options, head: str, num_classes: int) -> Described:
    channels = options.size("num_channels", 3, 64)
    options.only("hidden_act", "relu")
    options.only("downsample_in_first_stage", False)
    options.only("downsample_in_bottleneck", False)
    kind = options.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck"):
        raise options.error("layer_type", "'basic' or 'bottleneck'")
    bottleneck = kind == "bottleneck"
    counts = options.sizes("depths", (3, 4, 6, 3), _MOST_BLOCKS)
    width = options.size("embedding_size", 64, _MOST_CHANNELS)
    expected = [width * 2**i * (EXPANSION if bottleneck else 1) for i in range(len(counts))]
    if options.sizes("hidden_sizes", (256, 512, 1024, 2048), _MOST_CHANNELS) != expected:
        raise options.error("hidden_sizes", f"{expected} for this embedding_size, layer_type and depths")
    depth = next((n for n, usual in STAGE_BLOCKS.items() if [*usual] == counts and (n >= 50) == bottleneck), None)
    if depth is not None:
        return Described("resnet", {"num_classes": num_classes, "depth": depth, "width": width}, channels)
    arguments = {"stage_blocks": counts, "num_classes": num_classes, "bottleneck": bottleneck, "width": width}
    return Described("kdsearch_jax.models.resnet:ResNet", arguments, channels)


def _mobilenet_v2(options: Options, head: str, num_classes: int) -> Described:
    channels = options.size("num_channels", 3, 64)
    options.only("hidden_act", "relu6")
    options.only("depth_divisible_by", 8)
    options.only("min_depth", 8)
    options.only("expand_ratio", V2_STAGES[1][0])
    options.only("output_stride", 32)
    options.only("first_layer_is_expansion", True)
    width = options.number("depth_multiplier", 1.0, 0.01, 64)
    if width < 1:
        options.only("finegrained_output", True)
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
    return Described("mobilenet_v2", arguments, channels)


def _same_length(options: Options, counts: list[int], key: str, sizes: list[int]) -> None:
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
