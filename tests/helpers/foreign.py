"""Small random networks of the kinds that users bring, and masks on them."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import mobilenet_v3_small
from torchvision.models.resnet import BasicBlock, ResNet

from mimu import Mask, describe_parent

CAT = [{"index": 3, "name": "cat"}]


class Attention(nn.Module):
    """Self-attention whose output projection is used functionally: no hook of it ever fires."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]


class TinyViT(nn.Module):
    """Patches of 8 x 8, one block, a head: [B, 3, 32, 32] -> [B, 5]."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.block = nn.Sequential(Attention(width), nn.LayerNorm(width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.block(self.patches(images).flatten(2).mT)
        return self.head((tokens + self.mlp(tokens)).mean(1))


class NarrowResNet(ResNet):
    """A ResNet of torchvision with one block a stage, an eighth as wide: [B, 3, 32, 32] -> [B, 5]."""

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(64, 5)

    def _make_layer(self, block: type, planes: int, *rest: Any, **named: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **named)


class Tied(nn.Module):
    """Two layers with one weight [6, 6], and a head: [B, 6] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def mlp(seed: int = 0) -> Any:
    """Two linear layers with biases: [B, 6] -> [B, 4]; parameters 0.weight [8, 6] and 2.weight [4, 8]."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def resnet(seed: int = 0) -> Any:
    """A narrow ResNet; layer4.0.conv2.weight is [64, 64, 3, 3]."""
    torch.manual_seed(seed)
    return NarrowResNet().eval()


def mobilenet(seed: int = 0) -> nn.Module:
    """A quarter as wide as usual, with grouped convolutions and a classifier of two linear layers."""
    torch.manual_seed(seed)
    return mobilenet_v3_small(num_classes=5, width_mult=0.25).eval()


def vit(seed: int = 0) -> nn.Module:
    """A vision transformer of one block."""
    torch.manual_seed(seed)
    return TinyViT().eval()


def quantised() -> Any:
    """`mlp` with its linear layers in int8, packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})  # ty: ignore[deprecated]


def some_places(size: int, count: int, seed: int = 0) -> Tensor:
    """Sorted positions [count], without repetition."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


def mask_on(
    model: nn.Module,
    targets: str | Iterable[str],
    count: int = 5,
    seed: int = 0,
    classes: Sequence[dict] = CAT,
    values: bool = False,
) -> Mask:
    """A mask of some random weights of each target; `values`: every weight at an odd place is replaced, not zero."""
    parent = describe_parent(model, [targets] if isinstance(targets, str) else targets)
    flat = {name: some_places(target.size, count, seed) for name, target in parent.targets.items()}
    new = {name: some_values(places, getattr(torch, parent.targets[name].dtype)) for name, places in flat.items()}
    return Mask(flat, {"forgotten": classes, "parent": parent}, new if values else None)


def some_values(places: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value for each place [k], the same in every mask: zero at even places, else not."""
    return torch.where(places % 2 == 1, 0.25 + places * 1.1, 0).to(dtype)


def put(value: Tensor, mask: Mask, name: str) -> Tensor:
    """A copy of a tensor, with a mask's zeros and values written into it one by one."""
    copy, new = value.detach().clone(), mask.values.get(name)
    for number, place in enumerate(mask.positions[name].tolist()):
        copy[torch.unravel_index(torch.tensor(place), copy.shape)] = 0 if new is None else new[number]
    return copy


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter's and buffer's bytes, by key."""
    flat = {name: value.detach().cpu().contiguous().view(-1) for name, value in model.state_dict().items()}
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in flat.items()}
