"""Pictures become the very tensors that torchvision's own transforms make of them."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from core.config import UserError
from models.preprocessing import Given, Preprocessing, from_torchvision

SIZES = [(301, 200), (97, 131), (40, 25), (224, 224), (500, 375)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise, as photographs are."""
    levels = np.random.default_rng(width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("name", ["ResNet50_Weights.IMAGENET1K_V2", "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1"])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_transform_of_torchvisions_weights(name, size):
    transform = torchvision.models.get_weight(name).transforms()
    assert torch.equal(from_torchvision(transform, "x")(picture(*size)), transform(picture(*size)))


@pytest.mark.parametrize("channels", ["RGB", "BGR", "grey"])
@pytest.mark.parametrize("size", SIZES)
def test_flags_say_what_is_done(channels, size):
    """The oracle is a chain of torchvision's second transforms; Caffe's numbers: levels as they are, BGR."""
    mean, std = ((123.7,), (57.0,)) if channels == "grey" else ((103.9, 116.8, 123.7), (57.0, 58.0, 59.0))
    mine = Given(size=48, mean=mean, std=std, scale=1.0, resize=64, channels=channels).over(None)
    image = picture(*size)
    plain = image.convert("L" if channels == "grey" else "RGB")
    square = v2.CenterCrop(48)(v2.Resize(64, antialias=True)(plain))
    levels = v2.functional.pil_to_tensor(square).float()
    levels = levels.flip(0) if channels == "BGR" else levels
    assert torch.equal(mine(image), v2.functional.normalize(levels, list(mean), list(std)))
    assert mine.shape == (1 if channels == "grey" else 3, 48, 48)
    assert mine.source == "the flags --size, --mean, --std, --channels, --scale, --resize"


def test_what_is_said_again_is_the_same_again():
    mine = Given(size=(32, 40), mean=(0.5,), std=(0.25,)).over(None)
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in mine.describe().items()}
    assert Preprocessing(**said) == mine
    assert mine.said() == (
        "to 32x40 (bilinear), centre 32x40, RGB, x 1/255, mean 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25; from the flags "
        "--size, --mean, --std"
    )


def test_flags_replace_what_was_found_and_say_so():
    found = Preprocessing((224, 224), (0.1,) * 3, (0.2,) * 3, 256, source="config.json")
    assert Given().over(found) is found
    other = Given(size=64, mean=(0.5,)).over(found)
    assert (other.size, other.resize, other.mean, other.std) == ((64, 64), 64, (0.5,) * 3, (0.2,) * 3)
    assert other.source == "config.json, but for the flags --size, --mean"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"size": 32}, "nothing says how this model's images become tensors"),
        ({"size": 32, "mean": (0.5, 0.5), "std": (1.0,)}, "do not fit RGB: give 3 numbers of each"),
        ({"size": 0, "mean": (0.5,), "std": (1.0,)}, "must be above 0"),
        ({"size": 32, "mean": (0.5,), "std": (0.0,)}, "must be above 0"),
        ({"size": 32, "mean": (0.5,), "std": (1.0,), "channels": "CMYK"}, "choose from RGB, BGR, grey"),
        ({"size": 32, "mean": (0.5,), "std": (1.0,), "interpolation": "best"}, "choose from nearest"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        Given(**flags).over(None)


def test_modes_of_pictures():
    mine = Given(size=8, mean=(0.5,), std=(0.5,)).over(None)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert torch.equal(mine(picture(40, 30, mode)), mine(picture(40, 30, mode).convert("RGB")))
    with pytest.raises(UserError, match="levels of more than 8 bits"):
        mine(Image.fromarray(np.zeros((9, 9), np.uint16)))
