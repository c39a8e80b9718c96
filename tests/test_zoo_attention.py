"""ConvNeXt, MLP-Mixer, DeiT, Swin and ViT: published sizes, what can be pruned, and Swin's windows."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import proof
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.models.swin import FAR, WindowAttention, merge_windows, relative_positions, shift_mask, split_windows

TINY = {  # name, arguments, shape of an image
    "convnext": ("convnext", {"stage_blocks": [1, 1], "widths": [8, 12], "patch": 2}, (8, 8, 3)),
    "mixer": (
        "mixer",
        {"patch": 4, "width": 12, "depth": 1, "token_neurons": 10, "channel_neurons": 20},
        (12, 8, 3),
    ),
    "deit distilled": (
        "vit",
        {"patch": 4, "width": 12, "depth": 1, "heads": 3, "mlp_dim": 16, "distillation": "head"},
        (8, 8, 3),
    ),
    "swin": (
        "swin",
        {"stage_blocks": [2, 1], "heads": [3, 6], "width": 12, "window": 4, "patch": 2, "mlp_ratio": 2},
        (12, 14, 3),
    ),
}

CONVNEXT_B = {"stage_blocks": [3, 3, 27, 3], "widths": [128, 256, 512, 1024]}
MIXER_L = {"width": 1024, "depth": 24, "token_neurons": 512, "channel_neurons": 4096}
SWIN_B = {"stage_blocks": [2, 2, 18, 2], "width": 128, "heads": [4, 8, 16, 32]}
VIT_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}


@pytest.mark.parametrize(
    ("name", "arguments", "published"),
    [
        ("convnext", {}, 28_589_128),
        ("convnext", CONVNEXT_B, 88_591_464),
        ("mixer", {}, 59_880_472),
        ("mixer", MIXER_L, 208_196_168),
        ("deit", {"size": "tiny"}, 5_717_416),
        ("deit", {"size": "small"}, 22_050_664),
        ("deit", {"size": "base"}, 86_567_656),
        ("deit", {"size": "tiny", "distilled": True}, 5_910_800),
        ("swin", {}, 28_288_354),
        ("swin", SWIN_B, 87_768_224),
        ("vit", VIT_L, 304_326_632),
    ],
)
def test_parameters_are_as_many_as_published(name, arguments, published):
    module = registry.build(name, {"num_classes": 1000, **arguments})
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == published


# Pruning


@cache
def network_of(case):
    name, arguments, shape = TINY[case]
    module = registry.build(name, {"num_classes": 5, **arguments})
    image = proof.image(*shape)
    return proof.traced(module, image), proof.variables_of(module, image), image


GROUPS = {
    "convnext": {
        "stage1/block1/dense1": ("neurons", 32),
        "stage2/block1/dense1": ("neurons", 48),
        "stage1/block1:branch": ("branches", 1),
        "stage2/block1:branch": ("branches", 1),
    },
    "mixer": {
        "block1/tokens/dense1": ("neurons", 10),
        "block1/channels/dense1": ("neurons", 20),
        "block1:branch": ("branches", 1),
        "block1:branch#2": ("branches", 1),
    },
    "deit distilled": {
        "block1/attention/key": ("heads", 3),
        "block1/attention/value": ("values", 4),
        "block1/dense1": ("neurons", 16),
        "block1:branch": ("branches", 1),
        "block1:branch#2": ("branches", 1),
        "distillation_dense:branch": ("branches", 1),  # without it, the other classifier's logits are left
    },
    "swin": {
        f"{block}{part}": found
        for block, heads, neurons in (
            ("stage1/block1", 3, 24),
            ("stage1/block2", 3, 24),
            ("stage2/block1", 6, 48),
        )
        for part, found in (
            ("/attention/key", ("heads", heads)),
            ("/attention/value", ("values", 4)),
            ("/dense1", ("neurons", neurons)),
            (":branch", ("branches", 1)),
            (":branch#2", ("branches", 1)),
        )
    },
}


@pytest.mark.parametrize("case", TINY)
def test_what_is_inside_a_branch_can_be_pruned_and_so_can_the_branch(case, quick_compilation):
    network, variables, image = network_of(case)
    assert GROUPS[case].items() <= proof.groups(network).items()
    proof.prove(network, variables, image, hows=("half",) if case == "swin" else ("half", "one"))


def test_a_head_of_swin_takes_its_position_bias_along():
    group = next(g for g in network_of("swin")[0].topology.groups if g.name == "stage1/block2/attention/key")
    leaves = {member.leaf.removeprefix("params/stage1/block2/attention/") for member in group.members}
    of_layers = {f"{layer}/{leaf}" for layer in ("query", "key", "value") for leaf in ("kernel", "bias")}
    assert leaves == of_layers | {"out/kernel", "relative_bias"}


# Windows


@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_are_squares_of_neighbours_and_come_back(size):
    image = np.arange(2 * size * 3 * size, dtype=np.float32).reshape(1, 2 * size, 3 * size, 1)
    windows = split_windows(jnp.asarray(image), size)
    np.testing.assert_array_equal(np.asarray(windows)[0, 4, :, 0], image[0, size:, size : 2 * size, 0].ravel())
    np.testing.assert_array_equal(merge_windows(windows, size, 2 * size, 3 * size), image)


def test_relative_positions_number_the_offsets():
    """Equal offsets have equal numbers, from the upper left (0) to the lower right; no offset has the middle number."""
    places = relative_positions(2)
    np.testing.assert_array_equal(places, [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


@pytest.mark.parametrize(("height", "width", "size", "shift"), [(4, 4, 2, 1), (8, 12, 4, 2), (6, 9, 3, 1)])
def test_only_old_neighbours_in_a_shifted_window_attend_to_each_other(height, width, size, shift):
    """After the shift, pixels share a region if and only if they were less than a window apart before it."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = np.stack([rows, columns], -1).astype(np.float32)[None]
    windows = np.asarray(split_windows(jnp.roll(places, (-shift, -shift), (1, 2)), size))[0]
    near = (np.abs(windows[:, :, None] - windows[:, None]) < size).all(-1)
    np.testing.assert_array_equal(shift_mask(height, width, size, shift) == 0, near)
    assert (shift_mask(height, width, size, shift)[~near] == FAR).all()


def test_a_shifted_block_moves_with_the_image():
    """Translating an image by whole windows translates the output of the inner windows; only the border is special."""
    block = WindowAttention(heads=2, window=4, shifted=True)
    image = proof.image(16, 16, 6, batch=1)
    variables = proof.variables_of(block, image)
    here, moved = (np.asarray(block.apply(variables, x)) for x in (image, np.roll(image, 4, axis=1)))
    np.testing.assert_allclose(moved[:, 6:-2], here[:, 2:-6], rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("convnext", {"stage_blocks": [1, 2]}, ["stage_blocks and widths", "2 ([1, 2])", "4 ("]),
        ("convnext", {"widths": [96, 0, 1, 1]}, ["widths[1]", "at least 1", "0"]),
        ("convnext", {"layer_scale": -1}, ["layer_scale", "-1"]),
        ("swin", {"heads": [3, 6]}, ["stage_blocks and heads", "4 (", "2 ([3, 6])"]),
        ("swin", {"heads": [3, 5, 12, 24]}, ["heads[1]", "192", "5"]),
        ("swin", {"mlp_ratio": 0}, ["mlp_ratio", "0"]),
        ("swin", {"stage_blocks": 2}, ["stage_blocks", "list", "2"]),
        ("deit", {"size": "huge"}, ["size", "'tiny'", "'huge'"]),
        ("deit", {"distilled": "yes"}, ["distilled", "True", "'yes'"]),
        ("vit", {"distillation": "head", "pool": "mean"}, ["distillation='head'", "pool='token'", "'mean'"]),
        ("vit", {"distillation": True}, ["distillation", "'token'", "True"]),
        ("mixer", {"token_neurons": 0}, ["token_neurons", "at least 1"]),
    ],
)
def test_no_such_network(name, arguments, words):
    with pytest.raises(ValueError) as raised:
        registry.build(name, {"num_classes": 10, **arguments})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("convnext", (16, 32, 3), ["at least 32", "16x32"]),
        ("swin", (30, 32, 3), ["multiples of patch=4", "30x32"]),
        ("mixer", (16, 24, 3), ["multiples of patch=16", "16x24"]),
    ],
)
def test_images_of_an_unsuitable_size(name, shape, words):
    with pytest.raises(ValueError) as raised:
        jax.eval_shape(registry.build(name, {"num_classes": 10}).init, jax.random.key(0), jnp.zeros((1, *shape)))
    for word in words:
        assert word in str(raised.value)
