"""`forget` for programs: any module, and any loader of images with labels or a folder of them -> a mask."""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from core.choices import UserError
from core.config import AutoConfig
from forgetting.answers import TARGET, Answering, Ways
from forgetting.artefact import AUTO_KAPPA, answer_to, described, kappa_of, to_mask, usual_layers
from forgetting.pictures import Folder, Loader, Source, examples, labels_of, open_folder
from forgetting.samples import read_samples
from forgetting.scores import check_clean
from mimu import Mask, MaskError
from mimu.parent import refuse_quantised, unwrap
from models.class_names import ClassNames, choose_names
from models.foreign import ForeignClassifier
from models.prefix import PROBE
from models.specs import ends_in_softmax, logits_of


def forget(
    model: nn.Module,
    images: Path | str | Iterable,
    classes: Sequence[str | int],
    *,
    names: Sequence[str] | None = None,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    layers: Sequence[str] | None = None,
    kappa: str | int = AUTO_KAPPA,
    way: Ways = Ways.refined,
    target: AutoConfig = TARGET,
) -> Mask:
    """Find the weights that a class depends on, as a mask; the model itself is left as it is, to the bit.

    Args:
        model: any image classifier, images [B, C, H, W] -> logits [B, classes], or an answer that holds them
            (`.logits`, a tuple, a dict). Its parameters are float32.
        images: a folder with a subfolder for each class, or a loader of (images [B, C, H, W], labels [B]), iterated
            once. Some of them are held out: what the mask's card says was measured on these.
        classes: to forget, by name or number.
        names: of the model's outputs, in their order; without them, the sorted names of the folder's subfolders.
        prepare: opened image -> tensor [C, H, W], as at test time; needed for a folder.
        layers: names of the weights to mask; `auto`, the last one before the head; `cut`, the last stages that nothing
            goes around; `all`; `deep`, the last stages with nine tenths of all weights. None: `auto`, and to erase
            `deep`.
        kappa: how many weights: a number, a share such as "0.3%", or "auto", as few as meet `target` (to erase: 2 %).
        way: how they are chosen; with `auto`, refined is robust where BatchNorm is behind the weights.
        target: limits on validation images, percent and points, for `auto`.

    Returns:
        A mask with scores on held-out images. `mask.applied(model)` forgets for the length of a block.

    Raises:
        UserError: the model or the images cannot be used, or the target was met by no mask.
    """
    tree = open_folder(Path(images)) if isinstance(images, Path | str) else None
    if tree is not None and prepare is None:
        raise UserError("a folder of images needs prepare=, which turns an opened image into a tensor [C, H, W]")
    working = _copied(model)
    if tree is None:
        first, images = _looked_at(images)  # ty: ignore[invalid-argument-type]
    else:
        first = examples(Folder(tree, range(len(tree.classes)), prepare), PROBE)  # ty: ignore[invalid-argument-type]
    outputs, logits = _asked(working, first)
    known = _names(outputs, names, tree.classes if tree else None)
    source: Source = Folder(tree, labels_of(tree.classes, known), prepare) if tree else Loader(images, outputs)  # ty: ignore
    classifier = ForeignClassifier(working, logits, first, outputs, layers or usual_layers(way))
    described(model, [target.name for target in classifier.targets])  # before the images are gone over
    labels = sorted({known.find(one) for one in classes})
    answering = Answering(classifier, read_samples(classifier, source))
    answering.check(labels, known.names)
    number = kappa_of(kappa, classifier.weight_graph().num_vertices, way)
    if number is None:
        answering.check_target(labels, target)
    check_clean(answering, known)
    answer = answer_to(answering, labels, number, way, target)
    if answer.search is not None and not answer.search.achieved:
        best = min(answer.search.attempts, key=lambda one: abs(one.kappa - answer.kappa))
        raise UserError(
            f"no mask meets the target (best: kappa {best.kappa:,}, {best.said}): raise tau or epsilon, or give kappa"
        )
    return to_mask(answering, answer, known, lambda flat: described(model, flat), None, target)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, without wrappers.

    Raises:
        UserError: it is quantised, or cannot be copied.
    """
    try:
        refuse_quantised(model)
        return copy.deepcopy(unwrap(model)).eval()
    except (MaskError, RuntimeError) as error:
        said = " ".join(str(error).split())
        how = ": fold old weight norms first, with torch.nn.utils.remove_weight_norm" if "weight_norm" in said else ""
        raise UserError(f"the model cannot be copied{how}" if how else said) from None


def _looked_at(loader: Iterable) -> tuple[Tensor, Iterable]:
    """The first images of a loader, and what it gives from the first on: some loaders can be gone over once alone."""
    rest = iter(loader)
    taken = list(islice(rest, PROBE))
    return examples(Loader(taken, None), PROBE), chain(taken, rest)


def _asked(model: nn.Module, images: Tensor) -> tuple[int, Callable[[Any], Tensor]]:
    """Ask a model about images: how many outputs it has, and how its logits are found in what it answers.

    Raises:
        UserError: it does not take them, or answers as no classifier of one class an image does.
    """
    try:
        with torch.enable_grad():
            answer = model(images.detach().clone().requires_grad_())
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        said, kind = " ".join(str(error).split())[:200], str(images.dtype).removeprefix("torch.")
        raise UserError(
            f"the model does not take {kind} images {list(images.shape)} ({said}): give images as in its training, and "
            "a model of float32"
        ) from None
    found = logits_of(answer)
    probabilities = ends_in_softmax(found, "the model")
    return found.shape[1], (lambda output: logits_of(output).log()) if probabilities else logits_of


def _names(outputs: int, given: Sequence[str] | None, folders: Sequence[str] | None) -> ClassNames:
    if given is None:
        return choose_names(outputs, folders=folders)[0]
    if len(given) != outputs:
        raise UserError(f"names are {len(given)}, the model has {outputs} outputs: give one for each, in their order")
    return ClassNames(tuple(given), "the names given")
