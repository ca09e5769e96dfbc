"""A small classifier of four coloured patterns, trained in a second, and its images as a folder of PNG files."""

from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

NAMES = ("bars", "checks", "dots", "rings")  # in the order of the outputs, which is that of the folders
SIDE = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
FLAGS = ("--size", str(SIDE), "--mean", *map(str, MEAN), "--std", *map(str, STD))
CODE = '''
"""A network of a user's: two convolutions with BatchNorm, and a head with a bias."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, outputs=4, end="logits"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, outputs)
        self.end = end

    def forward(self, images):
        h = torch.relu(self.bn1(self.conv1(images)))
        h = torch.relu(self.bn2(self.conv2(h)))
        out = self.fc(h.mean((2, 3)))
        return {"logits": out, "sigmoid": out.sigmoid(), "softmax": out.softmax(1)}[self.end]


def net(**settings):
    return Net(**settings)
'''


def pattern(label: int, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 [SIDE, SIDE, 3]: a shape in one of two shades, and much noise."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.integers(0, 8, (2, 1, 1))
    shape = (x // 2 % 2, (x // 2 + y // 2) % 2, (x % 4 == 0) & (y % 4 == 0), np.hypot(x % 8 - 4, y % 8 - 4) // 2 % 2)
    shade = np.array(((90, 130, 130), (130, 90, 130), (130, 130, 90), (120, 120, 120))[label])
    levels = shade + 60 * (shape[label][..., None] - 0.5) + rng.normal(0, 120, (SIDE, SIDE, 3))
    return levels.clip(0, 255).astype(np.uint8)


def write_folder(root: Path, each: int = 60, names: Sequence[str] = NAMES, seed: int = 0) -> Path:
    """`each` PNG files in a folder for each class, in the order of the outputs."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.fromarray(pattern(label, rng)).save(root / name / f"{number}.png")
    return root


def prepared(picture: Image.Image) -> Tensor:
    """What the model was trained on: [3, SIDE, SIDE], by plain torch."""
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (levels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """Every image of a folder of classes, prepared by plain torch, and its label."""
    found = [
        (prepared(Image.open(path)), label)
        for label, name in enumerate(NAMES)
        for path in sorted((folder / name).iterdir())
    ]
    return torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])


def network(code: Path, **settings: Any) -> nn.Module:
    """The module that a user's file makes."""
    spec = spec_from_file_location("users_net", code)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.net(**settings)


def trained(root: Path, steps: int = 60) -> nn.Module:
    """Write `root`/net.py and a checkpoint of it, `root`/net.pt, in eval mode."""
    (root / "net.py").write_text(CODE)
    torch.manual_seed(0)
    net, rng = network(root / "net.py"), np.random.default_rng(1)
    labels = torch.arange(len(NAMES)).repeat(128)
    images = torch.stack([prepared(Image.fromarray(pattern(label, rng))) for label in labels.tolist()])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(steps):
        some = torch.arange(step * 64, step * 64 + 64) % len(labels)
        loss = nn.functional.cross_entropy(net(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(net.state_dict(), root / "net.pt")
    return net.eval()


def spec_of(root: Path, file: str = "net.pt", **settings: str) -> str:
    """The model of `trained` as the command line names it."""
    words = "".join(f",{name}={value}" for name, value in settings.items())
    return f"py:{root}/net.py:net{words}@{root}/{file}"


def words_for(
    root: Path, *more: object, images: Path | None = None, file: str = "net.pt", **settings: str
) -> list[str]:
    """What every command that reads this model and a folder of images has after its name."""
    folder = root / "photos" if images is None else images
    return [spec_of(root, file, **settings), *map(str, more), "--images", str(folder), *FLAGS, "--quiet"]
