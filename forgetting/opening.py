"""A user's model and images from files, ready to be asked to forget."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.choices import UserError
from core.observe import log
from forgetting.answers import Answering
from forgetting.artefact import described
from forgetting.pictures import NO_IMAGES, Batch, Folder, examples, labels_of, open_folder
from forgetting.samples import foreseen, in_parts, read_samples
from mimu import Mask, Parent
from models.foreign import ForeignClassifier
from models.prefix import PROBE
from models.preprocessing import Given
from models.specs import Loaded, load, parse
from models.targets import AUTO

Check = Callable[[Answering], object]


@dataclass(frozen=True)
class Opening:
    """How a model's files and a folder of images are to be read; as `models.specs.load` and `Folder` say."""

    classes: Path | None = None
    given: Given = Given()  # noqa: RUF009
    ema: Any = None
    by_order: bool = False
    skip: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Opened:
    """A model from files with a folder of images.

    Args:
        loaded: the model as its files say it, never changed here. source: its images, None without a folder.
    """

    loaded: Loaded
    source: Folder | None

    @property
    def images(self) -> Folder:
        """The images.

        Raises:
            UserError: no folder was given.
        """
        if self.source is None:
            raise UserError("images are needed for this: give a folder of them with --images")
        return self.source

    def classifier(self, layers: Sequence[str] = (AUTO,)) -> ForeignClassifier:
        """The model with its target weights, a copy of it in float32."""
        module = copy.deepcopy(self.loaded.module)
        if self.loaded.dtype != torch.float32:
            log(f"the model's numbers are {str(self.loaded.dtype).removeprefix('torch.')}: computed with in float32")
            module = module.float()
        first = examples(self.images, PROBE)
        return ForeignClassifier(module, self.loaded.logits, first, len(self.loaded.classes), layers)

    def foreseen(self, layers: Sequence[str] = (AUTO,)) -> Answering:
        """An answering that knows which images there are, and has none of them: the model does not run over them."""
        classifier = self.classifier(layers)
        return Answering(classifier, foreseen(self.images, classifier.num_classes))

    def answering(self, layers: Sequence[str] = (AUTO,), check: Check | None = None) -> Answering:
        """Run the model once over all images, up to its target weights.

        Args:
            check: is asked before that, about an answering that knows which images there are and has none of them.
        """
        asked = self.foreseen(layers)
        if check is not None:
            check(asked)
        classifier = asked.model
        answering = Answering(classifier, read_samples(classifier, self.images))
        for path, reason in self.images.left_out.items():
            log(f"left out: {path} ({reason})")
        return answering

    def parent(self, names: Iterable[str]) -> Parent:
        """What a mask on these parameters says of the model.

        Raises:
            UserError: a mask on them would not hold.
        """
        return described(
            self.loaded.module,
            names,
            load=str(self.loaded.spec),
            names_on_disk=self.loaded.disk_names,
            framework=self.loaded.framework,
        )


def open_model(spec: str, images: Path | None, how: Opening) -> Opened:
    """Load a model, and index the images that are beside it.

    Raises:
        UserError: either cannot be used.
    """
    parse(spec)  # a wrong path is said before a large folder is walked
    tree = open_folder(images) if images else None
    loaded = load(
        spec,
        classes=how.classes,
        folders=tree.classes if tree else None,
        preprocessing=how.given,
        ema=how.ema,
        by_order=how.by_order,
    )
    if tree is None:
        return Opened(loaded, None)
    labels = labels_of(tree.classes, loaded.classes)
    return Opened(loaded, Folder(tree, labels, loaded.preprocessing, how.skip, how.most))


def answers_to(opened: Opened) -> tuple[Tensor, Tensor]:
    """What the whole model answers to each image, and the image's label, both int [images].

    Raises:
        UserError: no file gives an image.
    """
    found, labels = list[Tensor](), list[Tensor]()
    for batch in opened.images:
        with torch.no_grad():
            found.append(opened.loaded(batch.images).argmax(1))
        labels.append(batch.labels)
    if not found:
        raise UserError(NO_IMAGES)
    return torch.cat(found), torch.cat(labels)


def scores_again(opened: Opened, mask: Mask, module: nn.Module) -> dict[str, tuple[int, int]]:
    """Score a module with a mask on, image by image through the whole of it, on the test images of the mask's card.

    Returns:
        `forget`, `retain`: (recognised, images).

    Raises:
        UserError: no file gives an image.
    """
    right, batches = list[Tensor](), list[Batch]()
    for batch in opened.images:
        with torch.no_grad():
            answers = opened.loaded.logits(module(batch.images.to(opened.loaded.dtype))).argmax(1)
        right.append(answers == batch.labels)
        batches.append(Batch(batch.images[:0], batch.labels, batch.keys, batch.splits))
    if not batches:
        raise UserError(NO_IMAGES)
    every = torch.cat(right)
    test = in_parts(every[:, None], batches, len(opened.loaded.classes), opened.images.digest()).test
    correct, of = test.h[:, 0], torch.isin(test.labels, torch.tensor([one.index for one in mask.config.forgotten]))
    return {
        "forget": (int(correct[of].sum()), int(of.sum())),
        "retain": (int(correct[~of].sum()), int((~of).sum())),
    }
