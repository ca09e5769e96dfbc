"""From weights and images to a sealed file and back, over the architectures that users bring, narrow and random.

The oracles are the module itself with some of its weights set to zero by hand, and the bytes of its files.
"""

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers

from forgetting.answers import Answer, Answering, Ways
from forgetting.artefact import positions
from forgetting.pictures import Loader
from forgetting.samples import read_samples
from mimu import Mask, describe_parent, seal, state_sha256
from models.foreign import ForeignClassifier
from models.specs import logits_of
from tests.helpers.foreign import Tied, bits

OUTPUTS = 5
IMAGES = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % OUTPUTS


class NarrowResNet(ResNet):
    """A ResNet an eighth as wide, with one block in every stage but the last, which has two."""

    def __init__(self, block: type[BasicBlock | Bottleneck] = BasicBlock, **more: int):
        super().__init__(block, [1, 1, 1, 2], **more)
        self.fc = nn.Linear(64 * block.expansion, OUTPUTS)

    def _make_layer(self, block: type, planes: int, *rest: Any, **named: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **named)


class NarrowVGG(VGG):
    """A VGG with BatchNorm, its three linear layers 24 wide."""

    def __init__(self):
        nn.Module.__init__(self)
        self.features, self.avgpool = make_layers([8, "M", 16, "M"], batch_norm=True), nn.AdaptiveAvgPool2d((2, 2))
        wide = [nn.Linear(64, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(True), nn.Dropout()]
        self.classifier = nn.Sequential(*wide, nn.Linear(24, OUTPUTS))


def efficientnet() -> nn.Module:
    rows = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 1)]
    return EfficientNet(rows, 0.2, num_classes=OUTPUTS, last_channel=32)


def convnext() -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=OUTPUTS, layer_scale=1.0)


def vit() -> nn.Module:
    net = models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=OUTPUTS)
    nn.init.normal_(net.heads.head.weight)  # zero at first: the logits would depend on nothing
    return net


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4], num_classes=OUTPUTS)


# Architecture -> (its constructor, the weight that `auto` means, further choices of weights).
NETS: dict[str, tuple[Callable[[], nn.Module], str, tuple[tuple[str, ...], ...]]] = {
    "resnet18": (NarrowResNet, "layer4.1.conv2.weight", (("fc",), ("layer4.1.conv1", "layer4.1.conv2"), ("all",))),
    "resnet50": (partial(NarrowResNet, Bottleneck), "layer4.1.conv3.weight", (("layer4.1.conv2",),)),
    "resnext": (
        partial(NarrowResNet, Bottleneck, groups=4, width_per_group=16),
        "layer4.1.conv3.weight",
        (("layer4.1.conv2",),),
    ),
    "vgg16_bn": (NarrowVGG, "classifier.3.weight", (("classifier.0", "classifier.3"), ("features.4",), ("all",))),
    "mobilenet_v3_small": (
        partial(models.mobilenet_v3_small, num_classes=OUTPUTS, width_mult=0.25),
        "classifier.0.weight",
        (("features.11.block.1.0",), ("features.11.block.2.fc1",)),  # depthwise; squeeze and excitation
    ),
    "efficientnet_b0": (efficientnet, "features.3.0.weight", (("features.2.0.block.1.0",), ("classifier.1",))),
    "convnext": (convnext, "features.3.0.block.5.weight", (("features.3.0.block.0",), ("features.3.0.block.3",))),
    "vit": (
        vit,
        "encoder.layers.encoder_layer_1.mlp.3.weight",
        (
            ("encoder.layers.encoder_layer_1.self_attention.in_proj_weight",),
            ("encoder.layers.encoder_layer_0.self_attention.out_proj", "conv_proj"),
        ),
    ),
    "swin": (
        swin,
        "features.3.1.mlp.3.weight",
        (("features.3.0.attn.qkv",), ("features.3.1.attn.proj",), ("features.2.reduction",)),
    ),
    "densenet121": (
        lambda: models.DenseNet(8, (2, 2), 8, num_classes=OUTPUTS),
        "features.denseblock2.denselayer2.conv2.weight",
        (("features.conv0",),),
    ),
    "squeezenet1_1": (
        partial(models.squeezenet1_1, num_classes=OUTPUTS),
        "features.12.expand3x3.weight",
        (("classifier.1",), ("features.12.squeeze",)),  # the head is a convolution of one tap, with a bias
    ),
}
CASES = [(name, layers) for name, (_, _, further) in NETS.items() for layers in (("auto",), *further)]


def network(name: str) -> nn.Module:
    """Random weights, and BatchNorm statistics that are no longer 0 and 1."""
    torch.manual_seed(0)
    net = NETS[name][0]()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    return net.eval()


def asking(net: nn.Module, *layers: str) -> Answering:
    model = ForeignClassifier(copy.deepcopy(net), logits_of, IMAGES, OUTPUTS, layers)
    return Answering(model, read_samples(model, Loader([(IMAGES, LABELS)], OUTPUTS)))


def mask_of(net: nn.Module, asked: Answering, answer: Answer) -> Mask:
    flat = positions(asked.model, answer.off)
    return Mask(flat, {"forgotten": [{"index": 1, "name": "one"}], "parent": describe_parent(net, flat)})


def zeroed(net: nn.Module, flat: dict[str, Tensor]) -> nn.Module:
    """A copy with these places at zero, one by one."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, places in flat.items():
            value = other.get_parameter(name)
            for place in places.tolist():
                value[torch.unravel_index(torch.tensor(place), value.shape)] = 0
    return other


def answers(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(IMAGES)


def sealed_and_loaded(net: nn.Module, mask: Mask, folder: Path, suffix: str, fresh: nn.Module) -> nn.Module:
    """What a fresh module makes of a sealed file, by torch alone; the parent's file stays as it is."""
    parent, out = folder / f"parent{suffix}", folder / f"sealed{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, parent)
    else:
        save_model(net, str(parent))
    before = hashlib.sha256(parent.read_bytes()).hexdigest()
    seal(parent, mask, out)
    assert hashlib.sha256(parent.read_bytes()).hexdigest() == before
    state = torch.load(out, weights_only=True)["state_dict"] if suffix == ".pt" else load_file(out)
    fresh.load_state_dict(state)
    return fresh.eval()


@pytest.mark.parametrize(("name", "layers"), CASES, ids=[f"{name}-{'+'.join(layers)}" for name, layers in CASES])
def test_there_and_back(name, layers, tmp_path):
    net = network(name)
    asked, before, digest = asking(net, *layers), bits(net), state_sha256(net)
    if layers == ("auto",):
        assert [target.name for target in asked.model.targets] == [NETS[name][1]]
    kappa = 41
    answer = asked.answer((1,), kappa, Ways.first_order)
    mask = mask_of(net, asked, answer)
    assert mask.switched_off == kappa
    expected = answers(zeroed(net, mask.positions))
    assert not torch.equal(expected, answers(net))
    found = asked.parts.test.logits(asked.model, asked.masked(answer.off))
    assert torch.allclose(found, expected[asked.parts.test.places], rtol=1e-4, atol=1e-4)
    mask.save(tmp_path / "m")
    loaded = Mask.load(tmp_path / "m")
    assert loaded.apply(net).grade == "parent"
    assert torch.equal(answers(net), expected)
    assert loaded.lift(net)
    assert bits(net) == before
    assert state_sha256(net) == digest == loaded.config.parent.state_sha256
    for suffix in (".pt", ".safetensors"):
        fresh = sealed_and_loaded(net, loaded, tmp_path, suffix, NETS[name][0]())
        assert torch.equal(answers(fresh), expected)


@pytest.mark.parametrize("name", ["resnet18", "vit", "swin", "mobilenet_v3_small", "squeezenet1_1"])
def test_what_is_refined_is_masked_where_it_was_found(name):
    """Scores of masked weights, as the search sees them, are those of the module with them at zero."""
    net = network(name)
    asked = asking(net, "auto")
    answer = asked.answer((1,), 30, Ways.refined)
    mask, rest = mask_of(net, asked, answer), asked.parts.train
    found = rest.logits(asked.model, asked.masked(answer.off))
    assert torch.allclose(found, answers(zeroed(net, mask.positions))[rest.places], rtol=1e-4, atol=1e-4)
    (target,) = asked.model.targets
    assert mask.keep()[target.name].shape == target.shape
    assert torch.equal(~mask.keep()[target.name].reshape(target.matrix), asked.head.graph.split(answer.off)[0])


def changed(net: nn.Module, kind: str) -> nn.Module:
    if kind == "channels_last":
        return net.to(memory_format=torch.channels_last)
    return net.to(torch.bfloat16) if kind == "bfloat16" else net


@pytest.mark.parametrize("kind", ["channels_last", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet18", "convnext", "vit"])
def test_the_mask_of_a_float_model_fits_it_in_another_layout_or_type(kind, name):
    """Applied to a cast of the parent, at the same places; lifted, the cast's own bits are back."""
    net = network(name)
    asked = asking(net, "auto")
    mask = mask_of(net, asked, asked.answer((1,), 41, Ways.first_order))
    other = changed(copy.deepcopy(net), kind)
    before, (weight,) = bits(other), mask.positions
    fit = mask.apply(other)
    assert fit.grade == ("parent" if kind == "channels_last" else "cast")
    assert torch.equal(other.get_parameter(weight) == 0, ~mask.keep()[weight])
    assert mask.lift(other)
    assert bits(other) == before


class Both(nn.Module):
    """Tied layers behind a flattening: [B, 3, 32, 32] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(3 * 32 * 32, 6), Tied()

    def forward(self, images: Tensor) -> Tensor:
        return self.tied(self.first(images.flatten(1)))


@pytest.mark.parametrize("layer", ["tied.first", "tied.second", "auto"])
def test_tied_weights_are_masked_wherever_they_are_used(layer, tmp_path):
    torch.manual_seed(0)
    net = Both().eval()
    model = ForeignClassifier(copy.deepcopy(net), logits_of, IMAGES, 3, (layer,))
    asked = Answering(model, read_samples(model, Loader([(IMAGES, torch.arange(30) % 3)], 3)))
    mask = mask_of(net, asked, asked.answer((1,), 9, Ways.first_order))
    assert list(mask.positions) == ["tied.first.weight"]
    expected = answers(zeroed(net, mask.positions))
    found = asked.parts.test.logits(model, asked.masked(~mask.keep()["tied.first.weight"]))
    assert torch.allclose(found, expected[asked.parts.test.places], rtol=1e-4, atol=1e-5)
    with mask.applied(net):
        assert torch.equal(answers(net), expected)
    fresh = sealed_and_loaded(net, mask, tmp_path, ".pt", Both())
    assert torch.equal(answers(fresh), expected)
