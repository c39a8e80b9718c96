"""ResNeXt, DenseNet, MobileNets, EfficientNet and U-Net: published sizes, the common call, and exact students."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import check_call, check_names
from proof import groups, image, prove, reasons, traced, variables_of

from kdsearch_jax import models
from kdsearch_jax.adapters import registry
from kdsearch_jax.models.densenet import DenseNet
from kdsearch_jax.models.efficientnet import STYLE, EfficientNet
from kdsearch_jax.models.inverted import Block, Style
from kdsearch_jax.models.mobilenet import V3_STYLE, MobileNetV2, MobileNetV3
from kdsearch_jax.models.resnet import ResNet
from kdsearch_jax.models.unet import UNet
from kdsearch_jax.models.vgg import VGG
from kdsearch_jax.pruning.network import shapes_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)

# Every network at a size that computes at once, and its input shape.
SMALL: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "resnext": (ResNet((1, 2), 5, True, "small", width=3, groups=3, group_width=2), (8, 8, 3)),
    "vgg": (VGG((1, 1), 5, "flattened", pools=1, width=4, hidden=6, norm=False), (8, 8, 3)),
    "densenet": (DenseNet((2, 2), 5, growth=3, first=6), (16, 16, 3)),
    "cifar_densenet": (models.cifar_densenet(num_classes=5, depth=10, growth=4), (8, 8, 3)),
    "mobilenet_v2": (
        MobileNetV2(
            ((Block(4, 6, expand=False),), (Block(5, 8, stride=2), Block(5, 9, residual=True))),
            5,
            first=6,
            last=7,
            style=Style(nn.relu6),
        ),
        (16, 16, 3),
    ),
    "mobilenet_v2 same": (
        MobileNetV2(((Block(4, 6, stride=2),),), 5, first=6, last=7, style=Style(nn.relu6, padding="same")),
        (16, 16, 3),
    ),
    "mobilenet_v3": (
        MobileNetV3(
            ((Block(6, 8, 5, 2, squeezed=3), Block(6, 9, 5, squeezed=4, residual=True, activation=nn.relu)),),
            5,
            first=6,
            last=8,
            style=V3_STYLE,
            hidden=7,
        ),
        (16, 16, 3),
    ),
    "efficientnet": (
        EfficientNet(
            ((Block(4, 6, squeezed=2, expand=False),), (Block(5, 8, 5, 2, 2), Block(5, 9, 5, 1, 1, residual=True))),
            5,
            first=6,
            last=7,
            style=STYLE,
            stem="small",
        ),
        (8, 8, 3),
    ),
    "unet": (UNet(2, width=3, depth=2), (8, 12, 3)),
}


def parameters(module: nn.Module, shape: tuple[int, ...]) -> int:
    shapes = shapes_of(module, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return sum(math.prod(size) for leaf, size in shapes.items() if leaf.startswith("params/"))


# torchvision's counts at 1,000 classes but where it says otherwise.
@pytest.mark.parametrize(
    ("module", "shape", "published"),
    [
        (models.resnet(num_classes=1000, depth=101), IMAGENET, 44_549_160),
        (models.resnet(num_classes=1000, depth=152), IMAGENET, 60_192_808),
        (models.resnext(num_classes=1000), IMAGENET, 25_028_904),
        (models.resnext(num_classes=1000, depth=101, group_width=8), IMAGENET, 88_791_336),
        (models.resnext(num_classes=1000, groups=1, group_width=128), IMAGENET, 68_883_240),  # Wide ResNet-50-2
        (models.vgg(num_classes=1000, depth=11, head="flattened", norm=False), IMAGENET, 132_863_336),
        (models.vgg(num_classes=1000, depth=16, head="flattened", norm=False), IMAGENET, 138_357_544),
        (models.densenet(num_classes=1000), IMAGENET, 7_978_856),
        (models.cifar_densenet(num_classes=10), CIFAR, 769_162),  # .8M in the paper
        (models.mobilenet_v2(num_classes=1000), IMAGENET, 3_504_872),
        (models.mobilenet_v2(num_classes=1000, width=0.5), IMAGENET, 1_968_680),
        (models.mobilenet_v3(num_classes=1000), IMAGENET, 5_483_032),
        (models.mobilenet_v3(num_classes=1000, size="small"), IMAGENET, 2_542_856),
        (models.efficientnet(num_classes=1000), IMAGENET, 5_288_548),
        (models.efficientnet(num_classes=1000, variant=4), (380, 380, 3), 19_341_616),
        (models.unet(num_classes=1), (256, 256, 3), 31_037_633),  # github.com/milesial/Pytorch-UNet
        (models.unet(num_classes=1, width=32), (256, 256, 3), 7_763_041),  # brain segmentation of PyTorch's hub
    ],
)
def test_parameters_are_as_many_as_published(module, shape, published):
    assert parameters(module, shape) == published


@pytest.mark.parametrize("case", SMALL)
def test_call(case):
    module, shape = SMALL[case]
    check_call(module, shape, (*shape[:2], 2) if case == "unet" else (5,))


@pytest.mark.parametrize("case", SMALL)
def test_every_layer_has_its_own_name(case):
    check_names(*SMALL[case])


@pytest.mark.parametrize("case", SMALL)
def test_a_random_half_is_cut_exactly(case):
    module, shape = SMALL[case]
    network = traced(module, image(*shape))
    variables = variables_of(module, image(*shape))
    prove(network, variables, image(*shape), hows=("half", "branches"))
    # Nothing stays but what must: images, classes, windows and the inputs of each of several groups.
    expected = ("window", "output", "reads an axis of fixed size", "the inputs of each group")
    assert [reason for reason in reasons(network).values() if not any(part in reason for part in expected)] == []


def test_a_group_of_resnext_is_one_unit():
    network = traced(SMALL["resnext"][0], image(8, 8, 3))
    found = [size for kind, size in groups(network).values() if kind == "groups"]
    assert found == [3, 3, 3]


def test_a_channel_of_an_inverted_residual_goes_with_its_filter_and_its_scale():
    network = traced(SMALL["mobilenet_v3"][0], image(16, 16, 3))
    group = next(g for g in network.topology.groups if g.name == "stage1/block1/depthwise_conv")
    assert group.size == 8
    block = "params/stage1/block1/"
    assert {(m.leaf.removeprefix(block), m.axis) for m in group.members if m.leaf.startswith(block)} >= {
        ("expand_conv/kernel", 3), ("depthwise_conv/kernel", 3), ("squeeze/reduce/kernel", 2),
        ("squeeze/restore/kernel", 3), ("squeeze/restore/bias", 0), ("project_conv/kernel", 2),
    }  # fmt: skip


def test_a_dense_layer_reads_all_before_it():
    network = traced(SMALL["densenet"][0], image(16, 16, 3))
    group = next(g for g in network.topology.groups if g.name.endswith("block1/layer1/conv2"))
    readers = {member.leaf for member in group.members if member.consumes}
    assert readers == {"params/block1/layer2/conv1/kernel", "params/transition1/conv/kernel"}


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("resnext", {"depth": 18}, ["depth", "50, 101, 152", "18"]),
        ("resnext", {"groups": 0}, ["groups", "at least 1", "0"]),
        ("densenet", {"depth": 100}, ["depth", "121, 161, 169, 201", "100"]),
        ("cifar_densenet", {"depth": 101}, ["6n + 4", "got 101", "nearest is 100"]),
        ("cifar_densenet", {"growth": 0}, ["growth", "at least 1"]),
        ("mobilenet_v2", {"width": 0}, ["width", "above 0", "got 0"]),
        ("mobilenet_v2", {"padding": "valid"}, ["padding", "'symmetric', 'same'", "'valid'"]),
        ("mobilenet_v3", {"size": "medium"}, ["size", "'large', 'small'", "'medium'"]),
        ("mobilenet_v3", {"dropout": 1}, ["dropout", "got 1"]),
        ("efficientnet", {"variant": 8}, ["variant", "0, 1, 2", "got 8"]),
        ("efficientnet", {"stem": "tiny"}, ["stem", "'large', 'small'"]),
        ("unet", {"depth": 0}, ["depth", "at least 1"]),
    ],
)
def test_refusals_say_the_way_out(name, arguments, parts):
    with pytest.raises(ValueError) as raised:
        registry.build(name, {"num_classes": 10, **arguments})
    for part in parts:
        assert part in str(raised.value)


def test_unet_refuses_images_that_do_not_halve():
    with pytest.raises(ValueError, match="multiples of 4, got 8x10"):
        jax.eval_shape(SMALL["unet"][0].init, jax.random.key(0), jnp.zeros((1, 8, 10, 3)))


def test_the_paddings_differ_at_stride_2():
    """A kernel with a single one in its middle subsamples rows 0, 2, … with PyTorch's padding, 1, 3, … with
    TensorFlow's."""
    picture = image(6, 6, 1, batch=1)
    kernel = {"params": {"kernel": np.zeros((3, 3, 1, 1), np.float32)}}
    kernel["params"]["kernel"][1, 1] = 1
    for padding, start in (("symmetric", 0), ("same", 1)):
        out = models.blocks.conv(1, 3, stride=2, padding=padding, name="conv").apply(kernel, picture)
        np.testing.assert_array_equal(out, picture[:, start::2, start::2])
