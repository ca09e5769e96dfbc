"""How a photograph becomes the tensor that a classifier was made for, and where that is known from.

Three libraries do nearly the same in ways that differ in the last bits, which `engine` tells apart:

- "PIL" (torchvision's and timm's transforms): resize and crop the picture with PIL, then levels / 255, then mean, std;
- "tensor" (transformers' image processors): resize and crop uint8 levels as a tensor, the corner of the crop rounded
  down, and divide once, by std / scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional

from core.config import UserError

Channels = Literal["RGB", "BGR", "grey"]
CHANNELS = ("RGB", "BGR", "grey")
LEVELS = 255
PREPROCESSOR = "preprocessor_config.json"  # of a folder that save_pretrained wrote
FLAGS = "--size, --mean and --std (and --channels if they are not RGB)"


@dataclass(frozen=True)
class Preprocessing:
    """Picture -> tensor, as at test time.

    Args:
        size: (height, width) that the model gets, in pixels.
        resize: what the picture is brought to before the crop: its shorter side, or (height, width); None: nothing.
        interpolation: of the resizing: nearest, bilinear, bicubic, lanczos, box or hamming.
        mean, std: one number a channel, in the order in which the model sees the channels, in units of scale * level.
        scale: what a level of 0 to 255 is multiplied with before mean and std.
        channels: their order, or grey for one.
        engine: whose arithmetic; see above.
        source: where all this is known from.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | tuple[int, int] | None
    interpolation: str = "bilinear"
    scale: float = 1 / LEVELS
    channels: Channels = "RGB"
    engine: Literal["PIL", "tensor"] = "PIL"
    source: str = ""

    def __post_init__(self) -> None:
        """Check what a person may have typed.

        Raises:
            UserError: a size or std is not positive, or the channels and their numbers do not fit.
        """
        number = 1 if self.channels == "grey" else 3
        if self.channels not in CHANNELS:
            raise UserError(f"channels are {self.channels!r}: choose from {', '.join(CHANNELS)}")
        if {len(self.mean), len(self.std)} != {number}:
            found = f"mean {list(self.mean)} and std {list(self.std)}"
            raise UserError(f"{found} do not fit {self.channels}: give {number} numbers of each, or one of each")
        if min(*self.size, *self.std, self.scale) <= 0:
            raise UserError(f"size {self.size}, std {list(self.std)} and scale {self.scale} must be above 0")
        if self.interpolation not in {mode.value for mode in InterpolationMode}:
            modes = ", ".join(mode.value for mode in InterpolationMode)
            raise UserError(f"interpolation is {self.interpolation!r}: choose from {modes}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of one prepared image."""
        return len(self.mean), *self.size

    def __call__(self, image: Image.Image) -> Tensor:
        """One picture as float32 [C, H, W].

        Raises:
            UserError: the picture has levels of more than 8 bits, which PIL would clip.
        """
        if image.mode[0] in "IF":
            raise UserError(f"a picture of mode {image.mode} has levels of more than 8 bits: save it with 8 bits")
        image = image.convert("L" if self.channels == "grey" else "RGB")
        return self._from_tensor(image) if self.engine == "tensor" else self._from_picture(image)

    def _from_picture(self, image: Image.Image) -> Tensor:
        """As torchvision and timm do it."""
        if self.resize is not None:
            height, width = self._before_the_crop(image.height, image.width)
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        levels = _centre(pil_to_tensor(image), self.size, round).float()
        levels = levels.flip(0) if self.channels == "BGR" else levels
        scaled = levels / LEVELS if self.scale == 1 / LEVELS else levels * self.scale
        return functional.normalize(scaled, list(self.mean), list(self.std))

    def _from_tensor(self, image: Image.Image) -> Tensor:
        """As transformers' image processors do it; they normalise before they turn the channels round."""
        levels = pil_to_tensor(image)
        if self.resize is not None:
            to = self._before_the_crop(image.height, image.width)
            levels = functional.resize(levels, list(to), InterpolationMode(self.interpolation), antialias=True)
        turn = -1 if self.channels == "BGR" else 1
        mean = torch.tensor(self.mean[::turn]) * (1.0 / self.scale)
        std = torch.tensor(self.std[::turn]) * (1.0 / self.scale)
        whole = _centre(levels, self.size, int).float()
        ready = functional.normalize(whole, mean, std)  # ty: ignore[invalid-argument-type]
        return ready.flip(0) if turn < 0 else ready

    def _before_the_crop(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing; of a longer side the part of a pixel is dropped."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        long = int(self.resize * max(height, width) / min(height, width))
        return (self.resize, long) if height <= width else (long, self.resize)

    def describe(self) -> dict[str, Any]:
        """What a model card says of it; `Preprocessing(**...)` with tuples for lists is the same again."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def said(self) -> str:
        """One line for people."""
        if self.resize is None:
            first = "as it is"
        elif isinstance(self.resize, int):
            first = f"shorter side to {self.resize}"
        else:
            first = f"to {self.resize[0]}x{self.resize[1]}"
        ways = f"{first} ({self.interpolation}), centre {self.size[0]}x{self.size[1]}, {self.channels}"
        scale = "1/255" if self.scale == 1 / LEVELS else f"{self.scale:g}"
        numbers = f"mean {', '.join(f'{m:.4g}' for m in self.mean)}, std {', '.join(f'{s:.4g}' for s in self.std)}"
        return f"{ways}, x {scale}, {numbers}; from {self.source}"


def _centre(levels: Tensor, size: tuple[int, int], rounded: Callable[[float], int]) -> Tensor:
    """The centre of [C, H, W], padded with 0 where it is smaller; `rounded` decides where an odd pixel is left over."""
    tall, wide = (max(0, need - have) for need, have in zip(size, levels.shape[-2:], strict=True))
    if tall or wide:
        levels = functional.pad(levels, [wide // 2, tall // 2, (wide + 1) // 2, (tall + 1) // 2])
    top, left = (rounded((have - need) / 2) for need, have in zip(size, levels.shape[-2:], strict=True))
    return levels[..., top : top + size[0], left : left + size[1]]


# --- from a person's flags --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a person says of the preprocessing; None: the model's own files say it.

    Args:
        size: height and width in pixels, or one number for both.
        mean, std: one number a channel, or one for all, in units of scale * level.
        channels: RGB, BGR or grey. scale: what levels of 0 to 255 are multiplied with first (1/255 if nothing is said).
        resize: the shorter side before the centre is cut out; without it, the size's own.
        interpolation: of the resizing (bilinear if nothing is said).
    """

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: Channels | None = None
    scale: float | None = None
    resize: int | None = None
    interpolation: str | None = None

    def over(self, found: Preprocessing | None) -> Preprocessing:
        """What was found with what was given in its place.

        Raises:
            UserError: nothing was found, and size, mean or std is not given.
        """
        given: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if found is None and not {"size", "mean", "std"} <= set(given):
            raise UserError(f"nothing says how this model's images become tensors: give {FLAGS}, as in its training")
        if not given:
            assert found is not None
            return found
        flags = ", ".join(f"--{name}" for name in given)
        channels = given.get("channels", found.channels if found else "RGB")
        number = 1 if channels == "grey" else 3
        for name in ("mean", "std"):
            if len(given.get(name, ())) == 1:
                given[name] = given[name] * number
        if "size" in given:
            size = given["size"]
            given["size"] = (size, size) if isinstance(size, int) else size
            given.setdefault("resize", min(given["size"]) if len(set(given["size"])) == 1 else given["size"])
        if found is None:
            return Preprocessing(**given, source=f"the flags {flags}")
        return replace(found, **given, source=f"{found.source}, but for the flags {flags}")


# --- from what frameworks write ---------------------------------------------------------------------------


def from_torchvision(transform: Any, source: str) -> Preprocessing:
    """Of the transform that belongs to torchvision's weights (`weights.transforms()`)."""
    return Preprocessing(
        size=(transform.crop_size[0], transform.crop_size[-1]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        resize=transform.resize_size[0] if len(transform.resize_size) == 1 else tuple(transform.resize_size),
        interpolation=transform.interpolation.value,
        source=source,
    )


def of_timm(
    timm: Any, module: Any, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """What timm itself would take for a model, checked against its own transform; and notes.

    Args:
        settings: what the model was built with beside its name. Those that change what goes in (img_size, in_chans)
            leave the architecture's own preprocessing behind: then nothing is known, unless a folder says it.
        config: config.json of a folder; empty for a file.

    Raises:
        UserError: it asks for what `Preprocessing` cannot do.
    """
    said = bool(config.get("pretrained_cfg"))
    if {"img_size", "in_chans"} & set(settings) and not said:
        return None, ()
    resolved = timm.data.resolve_data_config({}, model=module)
    name = module.pretrained_cfg.get("architecture")
    where = "pretrained_cfg in config.json" if said else f"timm's pretrained_cfg of {name}"
    preprocessing = from_timm(resolved, where)
    if not agrees(preprocessing, timm.data.create_transform(**resolved, is_training=False)):
        raise UserError(f"{where} asks for a preprocessing that is not supported: give {FLAGS}")
    return preprocessing, (() if said else (f"preprocessing is assumed: {where}; the checkpoint says nothing",))


def from_timm(config: Mapping[str, Any], source: str) -> Preprocessing:
    """Of what `timm.data.resolve_data_config` gives.

    Raises:
        UserError: a crop mode or shape that is not the centre of a square or a squashed picture.
    """
    height, width = config["input_size"][-2:]
    before = (int(height / config["crop_pct"]), int(width / config["crop_pct"]))
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise UserError(f"{source} has crop mode {mode} at {height}x{width}, which is not supported: give {FLAGS}")
    return Preprocessing(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=before[0] if mode == "center" else before,
        interpolation=config["interpolation"],
        channels="grey" if config["input_size"][0] == 1 else "RGB",
        source=source,
    )


PIL_MODES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by the number that PIL gives them


def of_transformers(transformers: Any, folder: Path) -> Preprocessing | None:
    """What a folder's PREPROCESSOR says, checked against the library's own; None if there is none.

    Raises:
        UserError: it asks for what `Preprocessing` cannot do.
    """
    file = folder / PREPROCESSOR
    if not file.is_file():
        return None
    try:
        theirs = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        mine = from_transformers(theirs.to_dict(), file)
    except UserError:
        raise
    except Exception as error:  # whatever the library meets in a file that it does not understand
        said = " ".join(str(error).split())[:160]
        raise UserError(f"{file} is not understood ({said}): put it right, or remove it and give {FLAGS}") from None

    def prepared(picture: Image.Image) -> Tensor:
        return theirs(picture, return_tensors="pt")["pixel_values"][0]

    if not agrees(mine, prepared):
        name = type(theirs).__name__
        raise UserError(f"{file} prepares pictures by {name} in a way that is not supported: give {FLAGS}")
    return mine


def from_transformers(config: Mapping[str, Any], file: Path) -> Preprocessing:
    """Of an image processor's settings.

    Raises:
        UserError: they do not bring pictures to one size.
    """
    wanted = {name: config.get(name) for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop")}
    size, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    resize = dict(config.get("size") or {}).get("shortest_edge") or size
    if (fraction := config.get("crop_pct")) and isinstance(resize, int):  # ConvNeXT, ResNet
        crop, wanted["do_center_crop"] = (resize, resize), resize < 384
        resize = int(resize / fraction) if resize < 384 else (resize, resize)
    whole = crop if wanted["do_center_crop"] else resize
    if not isinstance(whole, tuple):
        raise UserError(f"{file} does not bring pictures to one size: give {FLAGS}")
    normal = wanted["do_normalize"]
    return Preprocessing(
        size=whole,
        mean=tuple(config["image_mean"]) if normal else (0.0,) * 3,
        std=tuple(config["image_std"]) if normal else (1.0,) * 3,
        resize=resize if wanted["do_resize"] else None,
        interpolation=PIL_MODES[int(config.get("resample", 2))],
        scale=config["rescale_factor"] if wanted["do_rescale"] else 1.0,
        channels="BGR" if config.get("do_flip_channel_order") else "RGB",
        engine="tensor",
        source=str(file),
    )


def _sides(said: Mapping[str, int] | None) -> tuple[int, int] | None:
    """(height, width) of an image processor's size, if it names both."""
    sides = dict(said or {})
    return (sides["height"], sides["width"]) if {"height", "width"} <= set(sides) else None


def agrees(mine: Preprocessing, theirs: Callable[[Image.Image], Tensor]) -> bool:
    """Whether both make the same tensor, bit for bit, of pictures that are wide, tall, small and square."""
    generator = torch.Generator().manual_seed(0)
    for width, height in ((301, 200), (97, 130), (31, 24), (64, 64)):
        levels = torch.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(levels.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.convert("L") if mine.channels == "grey" else picture
        if not torch.equal(mine(picture), theirs(picture)):
            return False
    return True
