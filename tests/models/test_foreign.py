"""Any module as a classifier: which weights can be masked, and a forward pass that is resumed where they come in.

The oracles are the module's own forward pass, bit for bit, and autograd on the module itself.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from core.choices import UserError
from models.foreign import INSIDE, ForeignClassifier
from models.prefix import NotResumable, Prefix
from models.targets import choose, find_targets, head_of, stage_of

CLASSES = 7


def never(_: Sequence[str]) -> bool:
    """No set of weights is a cut."""
    return False


def small(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **more)
    return net.eval().requires_grad_(False)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    kind = torchvision.models.VisionTransformer
    net = kind(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES)
    nn.init.normal_(net.heads.head.weight)  # zero at first: the logits would depend on nothing
    return net.eval().requires_grad_(False)


def convnext() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.convnext.CNBlockConfig
    net = torchvision.models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=CLASSES)
    return net.eval().requires_grad_(False)


# Architecture -> the last weight before its head, from the printed structure of the model.
LAST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: small("resnet18"), "layer4.1.conv2.weight"),
    "mobilenet": (lambda: small("mobilenet_v3_small"), "classifier.0.weight"),
    "convnext": (convnext, "features.3.0.block.5.weight"),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=CLASSES).eval().requires_grad_(False),
        "features.denseblock2.denselayer2.conv2.weight",
    ),
    "squeezenet": (lambda: small("squeezenet1_1"), "features.12.expand3x3.weight"),
    "vit": (transformer, "encoder.layers.encoder_layer_1.mlp.3.weight"),
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAST)
def test_the_last_weight_before_the_head_is_found(name: str, images: Tensor) -> None:
    make, last = LAST[name]
    targets = find_targets(make(), images)
    assert [target.name for target in choose(targets, ["auto"], CLASSES, never)] == [last]
    assert head_of(targets, CLASSES).shape[0] == CLASSES
    assert [target.order for target in targets] == sorted(target.order for target in targets)


@pytest.mark.parametrize("name", LAST)
def test_resumed_pass_equals_the_full_one_bit_for_bit(name: str, images: Tensor) -> None:
    make, last = LAST[name]
    net = make()
    model = ForeignClassifier(net, lambda output: output, images, CLASSES)
    assert model.plan is not None
    before = {key: value.clone() for key, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    weight = net.get_parameter(last)
    other = weight * (torch.rand(weight.shape, generator=generator) < 0.7)
    with torch.no_grad():
        h = model.prefix(images)
        assert torch.equal(model.head(h), net(images))
        assert torch.equal(model.head(h[1:3]), net(images[1:3]))
        resumed = model.head(h, None, [other.reshape(len(other), -1)])
        assert torch.equal(resumed, functional_call(net, {last: other}, (images,)))
        assert not torch.equal(resumed, net(images))
        assert torch.equal(model.head(h), net(images))  # what was stored is as it was
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any("forward" in vars(module) for module in net.modules())  # nothing is left on the model
    assert torch.equal(copy.deepcopy(model)(images), net(images))


@pytest.mark.parametrize("weight", ["self_attention.in_proj_weight", "self_attention.out_proj.weight"])
def test_weight_that_no_module_of_its_own_uses_is_cut_at_the_module_around_it(weight: str, images: Tensor) -> None:
    net, name = transformer(), f"encoder.layers.encoder_layer_1.{weight}"
    plan = Prefix(net, [name], images, lambda output: output)
    assert plan.start[-1][0] == "encoder.layers.encoder_layer_1.self_attention"
    other = {name: net.get_parameter(name) * 0.5}
    with torch.no_grad():
        resumed = plan.after(net, plan.before(net, images), other)
        assert torch.equal(resumed, functional_call(net, other, (images,)))


class Awkward(nn.Module):
    """Works in place on what a layer gave, calls one layer twice, and reads the images again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 12, bias=False)
        self.last = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.first(images.flatten(1)))
        x += 1
        x = self.act(self.second(x))
        return self.last(x + images.flatten(1))


def test_code_between_modules_runs_again_and_spoils_nothing() -> None:
    torch.manual_seed(0)
    net, images = Awkward().eval().requires_grad_(False), torch.randn(4, 3, 2, 2)
    model = ForeignClassifier(net, lambda output: output, images, CLASSES, ("second",))
    assert model.plan is not None
    with torch.no_grad():
        h = model.prefix(images)
        kept = h.clone()
        for _ in range(2):
            assert torch.equal(model.head(h), net(images))
        assert torch.equal(h, kept)


class Writing(nn.Module):
    """Writes, before it takes the last layer, to an output on which no logit depends."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        aside, x = self.early(images.flatten(1)), self.second(images.flatten(1))
        aside += 1
        return self.last(x)


def test_an_output_that_is_written_to_in_place_is_stood_in_for_by_real_zeros() -> None:
    torch.manual_seed(0)
    net, images = Writing().eval().requires_grad_(False), torch.randn(4, 3, 2, 2)
    model = ForeignClassifier(net, lambda output: output, images, CLASSES, ("last",))
    assert model.plan is not None
    assert not model.plan.thin
    usual = ForeignClassifier(small("resnet18"), lambda output: output, torch.randn(4, 3, 32, 32), CLASSES)
    assert usual.plan is not None
    assert usual.plan.thin
    with torch.no_grad():
        assert torch.equal(model.head(model.prefix(images)), net(images))


class Sneaky(nn.Module):
    """Uses a layer's weight by itself, ahead of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Identity(), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.flatten(1) @ self.layer.weight)
        return self.last(self.layer(x))


def test_model_that_cannot_be_resumed_is_found_out_and_runs_as_a_whole(capsys) -> None:
    torch.manual_seed(0)
    net, images = Sneaky().eval().requires_grad_(False), torch.randn(4, 3, 2, 2)
    with pytest.raises(NotResumable, match="other logits"):
        Prefix(net, ["layer.weight"], images, lambda output: output)
    model = ForeignClassifier(net, lambda output: output, images, CLASSES, ("layer",))
    other = net.layer.weight * 0.5
    with torch.no_grad():
        resumed = model.head(model.prefix(images), None, [other])
        assert torch.equal(resumed, functional_call(net, {"layer.weight": other}, (images,)))
    assert "the forward pass of Sneaky cannot be resumed, the whole of it runs each time: " in capsys.readouterr().err


def test_gradient_of_a_class_is_autograds_on_the_whole_model(images: Tensor) -> None:
    net = small("resnet18")
    model = ForeignClassifier(net, lambda output: output, images, CLASSES, ("layer4.1.conv1", "layer4.1.conv2"))
    labels, names = torch.tensor([3, 3, 3, 3, 3]), [target.name for target in model.targets]
    with torch.no_grad():
        h = model.prefix(images)
    found = model.weight_graph().split(model.class_gradient(h, labels, batch=2))
    weights = [net.get_parameter(name).detach().clone().requires_grad_() for name in names]
    loss = nn.functional.cross_entropy(functional_call(net, dict(zip(names, weights, strict=True)), (images,)), labels)
    for ours, theirs in zip(found, torch.autograd.grad(loss, weights), strict=True):
        assert torch.allclose(ours.view(theirs.shape), theirs, rtol=1e-4, atol=1e-6)


def test_what_the_prefix_depends_on_is_told_by_name(images: Tensor) -> None:
    model = ForeignClassifier(small("resnet18"), lambda output: output, images, CLASSES)
    inside = model.in_prefix()
    assert inside(f"{INSIDE}conv1.weight")
    assert inside(f"{INSIDE}layer4.1.bn1.running_mean")
    assert not inside(f"{INSIDE}layer4.1.conv2.weight")
    assert not inside(f"{INSIDE}layer4.1.bn2.running_mean")
    assert not inside(f"{INSIDE}fc.bias")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ("layer4.0.downsample.0", "layer4.1.conv2", "fc")),
        ("vit", ("encoder.layers.encoder_layer_1.mlp.3",)),
    ],
)
def test_mean_activations_are_those_of_hooks_on_the_plain_model(
    name: str, layers: tuple[str, ...], images: Tensor
) -> None:
    net = LAST[name][0]()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        own = net.get_submodule(layer)
        own.register_forward_hook(lambda _, h, z, layer=layer: seen.update({layer: (h[0], z)}))
    net(images)
    classifier = ForeignClassifier(copy.deepcopy(net), lambda said: said, images, CLASSES, layers)
    found = classifier.mean_activations(classifier.prefix(images))
    for target, h, z in zip(classifier.targets, *found, strict=True):
        given, said = seen[target.name.removesuffix(".weight")]
        wide = len(target.shape) == 4
        rows = given.movedim(1, -1) if wide else given
        taps = target.matrix[1] // target.inputs
        assert torch.allclose(h.view(-1, taps), rows.flatten(0, -2).mean(0)[:, None].expand(-1, taps), atol=1e-5)
        assert torch.allclose(z, (said.movedim(1, -1) if wide else said).flatten(0, -2).mean(0), atol=1e-5)
    nothing = classifier.mean_activations(classifier.prefix(images)[:0])
    assert not any(value.any() for side in nothing for value in side)


def _spread(net: nn.Module, images: Tensor, names: list[str]) -> float:
    """How far logits of several images are apart with some weights at zero, on a copy of the model."""
    net = copy.deepcopy(net)
    for name in names:
        net.get_parameter(name).zero_()
    said = net(images)
    return float((said - said[:1]).abs().max())


# Architecture -> weights of its last stages that nothing goes around, from the printed structure of the model.
CUTS = {
    "resnet18": ["layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2"],
    "mobilenet": ["classifier.0"],
    "vit": [
        f"encoder.layers.encoder_layer_{block}.{part}"
        for block in (0, 1)
        for part in ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight", "mlp.3.weight")
    ],
}


@pytest.mark.parametrize("name", LAST)
def test_nothing_of_an_image_goes_around_a_cut(name: str, images: Tensor) -> None:
    net = LAST[name][0]()
    before = copy.deepcopy(net.state_dict())
    cut = [target.name for target in ForeignClassifier(net, lambda said: said, images, CLASSES, ("cut",)).targets]
    assert _spread(net, images, cut) <= 1e-3 * _spread(net, images, [])
    first = stage_of(cut[0])
    later = [one for one in cut if stage_of(one) != first]
    assert not later or _spread(net, images, later) > 1e-2 * _spread(net, images, [])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    if name in CUTS:
        assert {one.removesuffix(".weight") for one in cut} == {one.removesuffix(".weight") for one in CUTS[name]}


def test_layer_is_named_or_the_nearest_names_are_said(images: Tensor) -> None:
    targets = find_targets(small("resnet18"), images)
    assert [t.name for t in choose(targets, ["fc", "conv1.weight"], CLASSES, never)] == ["conv1.weight", "fc.weight"]
    assert len(choose(targets, ["all"], CLASSES, never)) == len(targets) - 1
    with pytest.raises(UserError, match=r"no Linear or Conv2d weight 'layer4.1.conv3'.*layer4.1.conv"):
        choose(targets, ["layer4.1.conv3"], CLASSES, never)
    with pytest.raises(UserError, match="twice"):
        choose(targets, ["fc", "fc.weight"], CLASSES, never)
