"""Flax networks of `transformers` (its last versions with Flax): small ones, and published ones to be traced only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.coverage.variant import CallSpec, Package, Variant, images, tokens

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**TEXT, "max_position_embeddings": 40}
DECODER = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
LLAMA = {**TEXT, "max_position_embeddings": 40, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT = {**VISION, "image_size": 32, "patch_size": 8}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
}


def _call(model: str, config: str, arguments: dict[str, Any], length: int = 8, pixels: Any = None) -> CallSpec:
    import transformers

    made = getattr(transformers, config)(**arguments)
    module = getattr(transformers, model)(made, _do_init=False).module
    short = length if "Classification" in model else length - 2  # a classifier gives its decoder the same tokens
    return CallSpec(module, _inputs(module, length, short, pixels, arguments), {})


def _inputs(module: Any, length: int, short: int, pixels: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """An input for each argument that the module asks for, up to the first that is a switch."""
    values: dict[str, Callable[[], Any]] = {
        "input_ids": lambda: tokens(length, min(arguments.get("vocab_size", 64), 64)),
        "decoder_input_ids": lambda: tokens(length, 64)[:, :short],
        "attention_mask": lambda: np.ones((2, length), np.int32),
        "decoder_attention_mask": lambda: np.ones((2, short), np.int32),
        "token_type_ids": lambda: np.zeros((2, length), np.int32),
        "position_ids": lambda: np.tile(np.arange(length, dtype=np.int32), (2, 1)),
        "decoder_position_ids": lambda: np.tile(np.arange(short, dtype=np.int32), (2, 1)),
        "pixel_values": lambda: images(*(pixels or (32, 32, 3))),
        "input_features": lambda: images(*(pixels or (8, 16))),
        "input_values": lambda: images(400),
    }
    inputs = []
    for name, parameter in inspect.signature(type(module).__call__).parameters.items():
        if name == "self":
            continue
        if name in values:
            inputs.append(values[name]())
        elif parameter.default is parameter.empty:
            inputs.append(None)  # `head_mask`, which a few ask for
        else:
            break
    return tuple(inputs)


def _variant(
    name: str, model: str, config: str, arguments: dict[str, Any], full: bool = False, **given: Any
) -> Variant:
    return Variant(name, partial(_call, model, config, arguments, **given), full)


SMALL: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "Bert", BERT),
    ("roberta", "Roberta", BERT),
    ("roberta-prelayernorm", "RobertaPreLayerNorm", BERT),
    ("xlm-roberta", "XLMRoberta", BERT),
    ("electra", "Electra", {**BERT, "embedding_size": 16}),
    (
        "distilbert",
        "DistilBert",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    ),
    ("albert", "Albert", {**BERT, "embedding_size": 16}),
    ("roformer", "RoFormer", {**BERT, "embedding_size": 32}),
    ("big-bird", "BigBird", {**BERT, "attention_type": "original_full"}),
    ("gpt2", "GPT2", DECODER),
    (
        "gpt-neo",
        "GPTNeo",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
        },
    ),
    ("gpt-j", "GPTJ", {**DECODER, "rotary_dim": 4}),
    (
        "opt",
        "OPT",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
        },
    ),
    ("bloom", "Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    (
        "xglm",
        "XGLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 40,
        },
    ),
    ("llama", "Llama", LLAMA),
    ("mistral", "Mistral", LLAMA),
    ("gemma", "Gemma", {**LLAMA, "head_dim": 8}),
    ("t5", "T5", T5),
    ("t5-gated", "T5", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("mt5", "MT5", T5),
    ("long-t5", "LongT5", {**T5, "local_radius": 3, "global_block_size": 4}),
    ("bart", "Bart", BART),
    ("mbart", "MBart", BART),
    ("pegasus", "Pegasus", BART),
    ("marian", "Marian", {**BART, "pad_token_id": 0}),
    ("blenderbot", "Blenderbot", BART),
    ("blenderbot-small", "BlenderbotSmall", BART),
    ("vit", "ViT", VIT),
    ("beit", "Beit", VIT),
    ("beit-relative", "Beit", {**VIT, "use_relative_position_bias": True}),
    ("dinov2", "Dinov2", VIT),
    ("clip", "CLIP", {"text_config": {**BERT}, "vision_config": VIT, "projection_dim": 16}),
    ("regnet", "RegNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}),
    (
        "regnet-y",
        "RegNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8, "layer_type": "y"},
    ),
    (
        "resnet-basic",
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
    ),
    ("resnet-bottleneck", "ResNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}),
    (
        "wav2vec2",
        "Wav2Vec2",
        {
            **TEXT,
            "conv_dim": [16, 16],
            "conv_stride": [4, 2],
            "conv_kernel": [4, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
        },
    ),
    (
        "whisper",
        "Whisper",
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 40,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
]

# Networks with a head for a task, at the same sizes.
HEADS = [
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForTokenClassification"),
    ("bert", "BertForPreTraining"),
    ("roberta", "RobertaForMaskedLM"),
    ("roberta", "RobertaForSequenceClassification"),
    ("electra", "ElectraForMaskedLM"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("albert", "AlbertForMaskedLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt-neo", "GPTNeoForCausalLM"),
    ("gpt-j", "GPTJForCausalLM"),
    ("opt", "OPTForCausalLM"),
    ("bloom", "BloomForCausalLM"),
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("gemma", "GemmaForCausalLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("t5", "T5EncoderModel"),
    ("bart", "BartForConditionalGeneration"),
    ("bart", "BartForSequenceClassification"),
    ("marian", "MarianMTModel"),
    ("pegasus", "PegasusForConditionalGeneration"),
    ("vit", "ViTForImageClassification"),
    ("beit", "BeitForImageClassification"),
    ("dinov2", "Dinov2ForImageClassification"),
    ("resnet-bottleneck", "ResNetForImageClassification"),
    ("regnet-y", "RegNetForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForCTC"),
    ("whisper", "WhisperForConditionalGeneration"),
    ("whisper", "WhisperForAudioClassification"),
]

FULL = [
    ("bert-base", "BertModel", "BertConfig", {}, 128),
    (
        "bert-large",
        "BertModel",
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        128,
    ),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", {}, 128),
    ("llama-7b", "LlamaForCausalLM", "LlamaConfig", {}, 128),
    (
        "t5-base",
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        128,
    ),
    ("vit-base", "ViTForImageClassification", "ViTConfig", {}, 0),
    ("resnet-50", "ResNetForImageClassification", "ResNetConfig", {}, 0),
    ("whisper-tiny", "WhisperForConditionalGeneration", "WhisperConfig", {}, 64),
]

_KINDS = {name: (kind, arguments) for name, kind, arguments in SMALL}
_SIZES: dict[str, dict[str, Any]] = {"whisper": {"pixels": (8, 16)}, "t5": {"length": 8}, "long-t5": {"length": 12}}


def _small(name: str, model: str) -> Variant:
    kind, arguments = _KINDS[name]
    return _variant(f"{model} ({name})", f"Flax{model}", f"{kind}Config", arguments, **_SIZES.get(name, {}))


def variants() -> tuple[Variant, ...]:
    """All of them."""
    base = [_small(name, f"{kind}Model") for name, kind, _ in SMALL]
    heads = [_small(name, model) for name, model in HEADS]
    full = [
        _variant(
            f"{name}, full size",
            f"Flax{model}",
            config,
            arguments,
            True,
            length=length or 8,
            pixels=(80, 3000) if "whisper" in name else (224, 224, 3),
        )
        for name, model, config, arguments, length in FULL
    ]
    return (*base, *heads, *full)


PACKAGE = Package(
    "transformers",
    (
        "transformers==4.57.3",
        "huggingface-hub<1",
        "tokenizers>=0.22,<0.23.1",
        "regex",
        "requests",
        "tqdm",
        "filelock",
        "packaging",
        "pyyaml",
        "charset-normalizer",
        "idna",
        "urllib3",
        "certifi",
        "fsspec",
    ),
    variants(),
)
