"""torchvision's own networks, at their own size, with random weights: our networks have their names and their logits.

Needs PyTorch and torchvision; where either is missing, every test is skipped.
"""

import jax
import numpy as np
import pytest

from kdsearch_jax.adapters import registry
from kdsearch_jax.models.pretrained import tensor_mapping, torchvision

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
# A build of torchvision for other hardware than PyTorch's fails with RuntimeError.
zoo = pytest.importorskip(
    "torchvision.models", reason="torchvision is not installed", exc_type=(ImportError, RuntimeError)
)

IMAGENET = (224, 224, 3)
FLATTENED = {"head": "flattened"}
NETWORKS = {  # torchvision's name: ours, its arguments
    "resnet18": ("resnet", {"depth": 18}),
    "resnet34": ("resnet", {"depth": 34}),
    "resnet50": ("resnet", {"depth": 50}),
    "resnet101": ("resnet", {"depth": 101}),
    "resnet152": ("resnet", {"depth": 152}),
    "resnext50_32x4d": ("resnext", {}),
    "resnext101_32x8d": ("resnext", {"depth": 101, "group_width": 8}),
    "resnext101_64x4d": ("resnext", {"depth": 101, "groups": 64}),
    "wide_resnet50_2": ("resnext", {"groups": 1, "group_width": 128}),
    "wide_resnet101_2": ("resnext", {"depth": 101, "groups": 1, "group_width": 128}),
    **{f"vgg{d}": ("vgg", {"depth": d, "norm": False, **FLATTENED}) for d in (11, 13, 16, 19)},
    **{f"vgg{d}_bn": ("vgg", {"depth": d, **FLATTENED}) for d in (11, 13, 16, 19)},
    **{f"densenet{d}": ("densenet", {"depth": d}) for d in (121, 161, 169, 201)},
    "mobilenet_v2": ("mobilenet_v2", {}),
    "mobilenet_v3_large": ("mobilenet_v3", {}),
    "mobilenet_v3_small": ("mobilenet_v3", {"size": "small"}),
    **{f"efficientnet_b{i}": ("efficientnet", {"variant": i}) for i in range(8)},
}
FAST = {"resnet18", "resnext50_32x4d", "vgg11", "vgg11_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small"}
FAST |= {"resnet50", "mobilenet_v3_large", "efficientnet_b0"}
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]


def built(name):
    ours, arguments = NETWORKS[name]
    return registry.build(ours, {"num_classes": 1000, **arguments})


def tensors_of(network):
    state = network.state_dict()
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def pictures(height, width):
    """Two images that differ at every scale, not in their noise alone: what noise does, a deep network averages out."""
    rng = np.random.default_rng(1)
    coarse = rng.normal(size=(2, 4, 4, 3)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]
    return (coarse + 0.5 * rng.normal(size=coarse.shape)).astype(np.float32)


def randomise(network, images):
    """Random weights, BatchNorm's included, and statistics near what the layers see, so that no signal dies out."""
    network.eval()
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1, generator=generator)
    for module in norms:
        module.weight.data.uniform_(0.5, 1.5, generator=generator)
        module.bias.data.normal_(0, 0.3, generator=generator)
        module.momentum = 1.0  # the statistics become those of the next batch
        module.train()  # and of nothing else: no layer is dropped at random
    network(images)
    for module in norms:
        module.running_var *= torch.rand(module.num_features, generator=generator) / 2 + 0.75
        module.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_its_name_and_shape(name):
    module = built(name)
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in tensors_of(getattr(zoo, name)()).items()}
    ours = tensor_mapping.leaf_sources(module, IMAGENET, torchvision.naming(module, IMAGENET)).values()
    assert {source.names[0]: source.shape for source in ours} == theirs


def check_logits(name, shape):
    images, network, module = pictures(*shape[:2]), getattr(zoo, name)(weights=None), built(name)
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        randomise(network, channels_first)
        theirs = network(channels_first).numpy()
    tensors = {key: value.numpy() for key, value in tensors_of(network).items()}
    variables = tensor_mapping.load_variables("torchvision", tensors, module, shape, torchvision.naming(module, shape))
    ours = np.asarray(jax.jit(module.apply)(variables, images))
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1 * np.abs(theirs).max()  # the images matter
    # On ResNet-101, PyTorch itself is 3e-5 from what it computes in double precision.
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_torchvision(name):
    check_logits(name, IMAGENET)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small"])
def test_logits_equal_torchvision_on_images_of_odd_sizes(name):
    """If a stride does not divide the image, rows are left over."""
    check_logits(name, (97, 65, 3))
