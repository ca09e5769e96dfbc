"""Show what a classifier that a user brings consists of: `inspect`."""

from pathlib import Path
from typing import Annotated

import tyro

from commands.command_line import show
from core.choices import at_home
from core.config import UserError

FORMS = "torchvision:NAME@FILE, timm:NAME@FILE, timm:FOLDER, hf:FOLDER or py:FILE.py:FUNCTION@FILE."
Spec = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC", help=FORMS)]


def inspect(
    spec: Spec,
    classes: Path | None = None,
    ema: str | None = None,
    by_order: bool = False,
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    channels: str | None = None,
) -> None:
    """List a classifier's layers, head, classes and preprocessing, and where each is known from.

    Args:
        spec: Which classifier, as `--model` takes it.
        classes: File of class names, one a line, in the order of the outputs.
        ema: Of a file with a model and its average over training: ema or plain.
        by_order: Take tensors in their order where names differ altogether and all shapes agree.
        size: Height and width in pixels that the model gets.
        mean: One number a channel, or one for all, in units of levels / 255.
        std: As mean.
        channels: RGB, BGR or grey.
    """
    from models.preprocessing import Given
    from models.specs import describe, load
    from reporting.write import as_text

    if ema not in (None, "ema", "plain"):
        raise UserError(f"--ema is {ema!r}: choose ema or plain")
    given = Given(size, mean, std, channels)  # ty: ignore[invalid-argument-type]
    loaded = load(spec, classes=classes and at_home(classes), preprocessing=given, ema=ema, by_order=by_order)
    said = describe(loaded)
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
