"""Show what a classifier that a user brings consists of: `inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from commands.command_line import Group, show
from core.choices import at_home
from core.config import UserError
from core.observe import be_quiet

if TYPE_CHECKING:
    from torch import nn

    from forgetting.opening import Opened

FORMS = "torchvision:NAME@FILE, timm:NAME@FILE, timm:FOLDER, hf:FOLDER or py:FILE.py:FUNCTION@FILE."
Spec = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC", help=FORMS)]


@dataclass(frozen=True)
class Reading(Group):
    """How the model and the images are read."""

    classes: Path | None = None
    """File of class names, one a line, in the order of the outputs."""
    ema: str | None = None
    """Of a file with a model and its average over training: ema or plain."""
    by_order: bool = False
    """Take tensors in their order where names differ altogether and all shapes agree."""
    size: int | None = None
    """Height and width in pixels that the model gets."""
    mean: tuple[float, ...] | None = None
    """One number a channel, or one for all, in units of levels / 255."""
    std: tuple[float, ...] | None = None
    """As mean."""
    channels: str | None = None
    """RGB, BGR or grey."""
    skip_bad_images: bool = False
    """Leave files out that give no image."""
    most: int | None = None
    """Images of each class that are used, at most."""

    def opened(self, spec: str, images: Path | None) -> "Opened":
        """Load the model, and index the images.

        Raises:
            UserError: either cannot be used.
        """
        from forgetting.opening import Opening, open_model
        from models.preprocessing import Given

        self._check_ema()
        if self.most is not None and self.most < 3:
            raise UserError(
                f"--most is {self.most}: give at least 3, for the three parts that a class's images go into"
            )
        given = Given(self.size, self.mean, self.std, self.channels)  # ty: ignore[invalid-argument-type]
        names = self.classes and at_home(self.classes)
        how = Opening(names, given, self.ema, self.by_order, self.skip_bad_images, self.most)
        return open_model(spec, images and at_home(images), how)

    def module(self, spec: str) -> "nn.Module":
        """Load the model alone: nothing needs to be known of its images.

        Raises:
            UserError: it cannot be loaded.
        """
        from models.specs import module_of

        self._check_ema()
        return module_of(spec, self.ema, self.by_order)  # ty: ignore[invalid-argument-type]

    def _check_ema(self) -> None:
        if self.ema not in (None, "ema", "plain"):
            raise UserError(f"--ema is {self.ema!r}: choose ema or plain")


Read = Annotated[Reading, tyro.conf.arg(name="")]
AS_IT_IS = Reading()


def inspect(spec: Spec, images: Path | None = None, read: Read = AS_IT_IS, quiet: bool = False) -> None:
    """List a classifier's layers, head, classes and preprocessing, and where each is known from.

    Args:
        spec: Which classifier.
        images: Folder with a subfolder of images for each class: how many of each are recognised is listed, too.
        quiet: Print nothing about progress on stderr.
    """
    from models.specs import describe
    from reporting.write import as_text

    be_quiet(quiet)
    opened = read.opened(spec, images)
    said = describe(opened.loaded)
    rows = [["layer", "on disk", "kind", "shape", "weights", "maskable"]]
    rows += [
        [
            " = ".join((row.name, *row.aliases)),
            row.on_disk or "-",
            row.kind,
            "x".join(map(str, row.shape)),
            f"{row.weights:,}",
            "yes" if row.maskable else "-",
        ]
        for row in said.layers
    ]
    show(as_text(rows))
    for name, value in said.facts:
        show(f"{name}: {value}")
    for note in said.notes:
        show(f"note: {note}")
    if images:
        _show_classes(opened)
        _show_layers(opened)


def _show_layers(opened: "Opened") -> None:
    """Print which weights the words for layers mean here."""
    from models.targets import AUTO, CUT, DEEP

    for word in (AUTO, CUT, DEEP):
        targets = opened.classifier((word,)).targets
        names = " to ".join(dict.fromkeys((targets[0].name, targets[-1].name)))
        count = f"{len(targets)} tensor{'s' * (len(targets) > 1)}"
        show(f"--layer {word}: {names}, {sum(one.size for one in targets):,} weights in {count}")


def _show_classes(opened: "Opened") -> None:
    """Print which share of each class's images is recognised, as they are, through the whole model."""
    import torch

    from core.intervals import wilson
    from forgetting.opening import answers_to
    from forgetting.scores import at_chance
    from reporting.write import as_text

    predicted, labels = answers_to(opened)
    sides = (labels[predicted == labels], labels)
    counts = list(
        zip(*(torch.bincount(one, minlength=len(opened.loaded.classes)).tolist() for one in sides), strict=True)
    )
    rows = [["output", "class", "images", "recognised", "95 % interval"]]
    for label, (right, images) in enumerate(counts):
        if images:
            share = wilson(right, images).times(100)
            span = f"{share.low:.1f} to {share.high:.1f}"
            rows.append([str(label), opened.loaded.classes.names[label], str(images), f"{share.value:.1f} %", span])
    show(as_text(rows))
    right, images = (sum(column) for column in zip(*counts, strict=True))
    show(f"clean accuracy: {100 * right / images:.1f} % of {images} images")
    if absent := sum(not images for _, images in counts):
        show(f"{absent} of {len(counts)} classes have no images")
    if doubt := at_chance(predicted.numpy(), labels.numpy(), opened.loaded.classes):
        show(f"note: {doubt}")
