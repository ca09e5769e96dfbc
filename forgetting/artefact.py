"""From an answer to a mask that names its parent, and a `forget` for Python that gives one."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from core.choices import UserError
from core.config import AutoConfig
from forgetting.answers import TARGET, Answer, Answering, Ways
from forgetting.pictures import Folder, Loader, Source, examples, labels_of, open_folder
from forgetting.samples import read_samples
from forgetting.scores import check_clean, judge
from mimu import Config, Mask, MaskError, Parent, describe_parent
from mimu.parent import unwrap
from models.class_names import ClassNames, choose_names
from models.foreign import ForeignClassifier
from models.prefix import PROBE
from models.specs import ends_in_softmax, logits_of
from models.targets import AUTO

AUTO_KAPPA = "auto"
THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+")  # no other comma is dropped: "0,3%" would become 3 %


def kappa_of(text: str | int, size: int) -> int | None:
    """`auto` -> None; `2000` or `0.3%` of all target weights -> how many.

    Raises:
        UserError: it is none of these, or not between 1 and all of them.
    """
    if text == AUTO_KAPPA:
        return None
    word = str(text).strip().replace("_", "")
    word = word.replace(",", "") if THOUSANDS.fullmatch(word) else word
    try:
        number = float(word.removesuffix("%"))
    except ValueError:
        number = math.nan
    share = word.endswith("%")
    kappa = number * size / 100 if share else number
    if not math.isfinite(kappa) or not 1 <= round(kappa) <= size or (not share and kappa % 1):
        raise UserError(f"kappa is {text!r}, the target weights are {size:,}: give auto, a whole number from 1 to "
                        f"{size:,}, or a share such as 0.3%")  # fmt: skip
    return round(kappa)


def positions(model: ForeignClassifier, off: Tensor) -> dict[str, Tensor]:
    """Parameter -> flat C-order positions that are switched off; parameters without any are left out."""
    parts = model.weight_graph().split(off)
    found = {target.name: part.flatten().nonzero().flatten() for target, part in zip(model.targets, parts, strict=True)}
    return {name: flat for name, flat in found.items() if len(flat)}


def to_mask(
    answering: Answering,
    answer: Answer,
    names: ClassNames,
    parent: Callable[[Iterable[str]], Parent],
    preprocessing: Mapping[str, Any] | None,
    target: AutoConfig,
) -> Mask:
    """Judge an answer on test images, and write down all that a mask says of itself.

    Args:
        parent: names of parameters -> what is to be said of the model.
        target: what kappa was searched for with, if it was.
    """
    flat = positions(answering.model, answer.off)
    scores = judge(answering, answer)
    absent = int((answering.parts.counts == 0).sum())
    config = Config.read({
        "forgotten": [{"index": label, "name": names.names[label]} for label in answer.classes],
        "parent": parent(flat),
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "scores": scores | {"classes_without_images": absent},
        "method": _method(answer, target),
        "kappa": answer.kappa,
        "data_sha256": answering.parts.digest,
    })  # fmt: skip
    return Mask(flat, config)


def _method(answer: Answer, target: AutoConfig) -> str:
    """Say in one line how the weights and their number were found."""
    if answer.search is None:
        return f"{answer.way}, kappa given"
    met = "meets" if answer.search.achieved else "comes nearest to, without meeting it,"
    kind = "smallest tried that" if answer.search.achieved else "the one tried that"
    wanted = f"forget <= {target.tau:g} % and loss <= {target.epsilon:g} points with 95 % confidence"
    return f"{answer.way}, kappa auto: {kind} {met} {wanted} on validation images"


def answer_to(answering: Answering, classes: Sequence[int], kappa: int | None, way: Ways, target: AutoConfig) -> Answer:
    """Answer a request for a number of weights, or (None) for as few as meet a target."""
    chosen = tuple(sorted(set(classes)))
    return answering.search(chosen, target, way) if kappa is None else answering.answer(chosen, kappa, way)


# --- Python -----------------------------------------------------------------------------------------------


def forget(
    model: nn.Module,
    images: Path | str | Iterable,
    classes: Sequence[str | int],
    *,
    names: Sequence[str] | None = None,
    prepare: Callable[[Image.Image], Tensor] | None = None,
    layers: Sequence[str] = (AUTO,),
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
        layers: names of the weights to mask; `auto`, the last one before the head; `all`.
        kappa: how many weights: a number, a share such as "0.3%", or "auto", as few as meet `target`.
        way: how they are chosen. target: limits on validation images, percent and points, for `auto`.

    Returns:
        A mask with scores on held-out images. `mask.applied(model)` forgets for the length of a block.

    Raises:
        UserError: the model or the images cannot be used, or the target was met by no mask.
    """
    tree = open_folder(Path(images)) if isinstance(images, Path | str) else None
    if tree is not None and prepare is None:
        raise UserError("a folder of images needs prepare=, which turns an opened image into a tensor [C, H, W]")
    working = copy.deepcopy(unwrap(model)).eval()
    if tree is None:
        first, images = _looked_at(images)  # ty: ignore[invalid-argument-type]
    else:
        first = examples(Folder(tree, range(len(tree.classes)), prepare), PROBE)  # ty: ignore[invalid-argument-type]
    outputs, logits = _asked(working, first)
    known = _names(outputs, names, tree.classes if tree else None)
    source: Source = Folder(tree, labels_of(tree.classes, known), prepare) if tree else Loader(images, outputs)  # ty: ignore
    classifier = ForeignClassifier(working, logits, first, outputs, layers)
    labels = sorted({known.find(one) for one in classes})
    answering = Answering(classifier, read_samples(classifier, source))
    answering.check(labels, known.names)
    number = kappa_of(kappa, classifier.weight_graph().num_vertices)
    if number is None:
        answering.check_target(labels, target)
    check_clean(answering, known)
    answer = answer_to(answering, labels, number, way, target)
    if answer.search is not None and not answer.search.achieved:
        best = min(answer.search.attempts, key=lambda one: abs(one.kappa - answer.kappa))
        raise UserError(f"no mask meets the target (best: kappa {best.kappa:,}, forget {best.forget_score:.1f} %, loss "
                        f"{best.retain_drop:.1f} points): raise tau or epsilon, or give kappa")  # fmt: skip
    return to_mask(answering, answer, known, lambda flat: described(model, flat), None, target)


def described(model: nn.Module, names: Iterable[str], **more: Any) -> Parent:
    """As `mimu.describe_parent`.

    Raises:
        UserError: a mask on these parameters would not hold.
    """
    try:
        return describe_parent(model, names, **more)
    except MaskError as error:
        raise UserError(str(error)) from None


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
