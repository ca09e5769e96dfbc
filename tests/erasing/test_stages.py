"""Stages of a network: which take part in an edit of the features, and that features are what each of them reads."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from erasing.stages import Stages, rows_of
from model import HookedMLPClassifier
from models.foreign import ForeignClassifier
from models.targets import DEEP, choose, find_targets, stage_of
from tests.helpers.foreign import resnet, vit


def opened(module: nn.Module, images: torch.Tensor, outputs: int) -> ForeignClassifier:
    return ForeignClassifier(module, lambda said: said, images, outputs, (DEEP,))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("parameter", "stage"),
    [
        ("layer3.0.downsample.0.weight", "layer3.0"),
        ("backbone.layer4.1.conv2.weight", "backbone.layer4.1"),
        ("vit.encoder.layer.11.output.dense.weight", "vit.encoder.layer.11"),
        ("features.5.1.block.0.weight", "features.5"),
        ("linears.2.weight", "linears.2"),
        ("encoder.layers.encoder_layer_11.mlp.3.weight", "encoder.layers.encoder_layer_11"),
        ("fc.weight", "fc"),
        ("head.fc.weight", "head"),
        ("weight", ""),
    ],
)
def test_a_stage_is_the_first_numbered_module_on_the_way(parameter, stage):
    assert stage_of(parameter) == stage


@pytest.mark.parametrize("make", [resnet, vit, lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5)])
def test_the_last_stages_hold_nine_tenths_of_the_weights_and_not_without_the_first_of_them(make, images):
    module = make().eval()
    outputs = module(images).shape[1]
    every = find_targets(module, images)
    chosen = [target.name for target in choose(every, (DEEP,), outputs, bool)]
    sizes = {target.name: target.size for target in every}
    stages = list(dict.fromkeys(map(stage_of, chosen)))
    without = sum(sizes[name] for name in chosen if stage_of(name) != stages[0])
    assert without < 0.9 * sum(sizes.values()) <= sum(sizes[name] for name in chosen)
    assert all((stage_of(name) in stages) == (name in chosen) for name in sizes)


def test_of_a_resnet_18_these_are_the_last_two_groups_of_blocks_and_the_head(images):
    targets = find_targets(ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5).eval(), images)
    chosen = {stage_of(target.name) for target in choose(targets, (DEEP,), 5, bool)}
    assert chosen == {"layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc"}


def test_features_of_a_perceptron_are_its_hidden_layers():
    model = HookedMLPClassifier(10, 1, 8).eval()
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    deep = opened(model, images, 10)
    features, logits = Stages(deep)(rows_of(deep, [images[:2], images[2:]]))
    first, second, third = model.weights(None)
    hidden = torch.relu(images.flatten(1) @ first.T)
    assert torch.allclose(features[0], hidden, atol=1e-6)
    assert torch.allclose(features[1], torch.relu(hidden @ second.T), atol=1e-6)
    assert torch.allclose(logits, torch.relu(hidden @ second.T) @ third.T, atol=1e-6)


def test_features_of_a_residual_network_are_means_over_positions(images):
    module = resnet().eval()
    deep = opened(module, images, module(images).shape[1])
    stages = Stages(deep)
    features, _ = stages(rows_of(deep, [images]))
    x = module.maxpool(module.relu(module.bn1(module.conv1(images))))
    seen = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for place, block in enumerate(getattr(module, name)):
            seen[f"{name}.{place}"] = x.mean((2, 3))
            x = block(x)
    seen["fc"] = x.mean((2, 3))
    assert list(stages.taps) == [name for name in seen if name in stages.taps]
    assert len(stages.taps) > 2
    for name, value in zip(stages.taps, features, strict=True):
        assert torch.allclose(value, seen[name], atol=1e-5), name


def test_weights_stand_in_and_the_gradient_reaches_them(images):
    module = resnet().eval()
    deep = opened(module, images, module(images).shape[1])
    stages, rows = Stages(deep), rows_of(deep, [images])
    pairs = zip(deep.weights(), deep.targets, strict=True)
    weights = [weight.detach().reshape(target.matrix).clone().requires_grad_() for weight, target in pairs]
    features, _ = stages(rows, weights)
    same, _ = stages(rows)
    assert all(torch.equal(a, b) for a, b in zip(features, same, strict=True))
    gradients = torch.autograd.grad(features[0].sum(), weights, allow_unused=True)
    assert gradients[0].abs().sum() > 0
    with torch.no_grad():
        weights[0].zero_()
        assert not torch.equal(stages(rows, weights)[0][0], features[0])
