"""From an answer to a mask that names its parent."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.choices import UserError
from core.config import AutoConfig
from erasing.erasure import SHARE
from forgetting.answers import Answer, Answering, Twice, Ways
from forgetting.scores import judge
from mimu import Config, Mask, MaskError, Parent, describe_parent
from mimu.mask import FILE
from models.class_names import ClassNames
from models.foreign import ForeignClassifier
from models.targets import AUTO, DEEP

AUTO_KAPPA = "auto"
THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+")  # no other comma is dropped: "0,3%" would become 3 %


def kappa_of(text: str | int, size: int, way: Ways = Ways.refined) -> int | None:
    """`auto` -> None (to erase: SHARE); `2000` or `0.3%` of all target weights -> how many.

    Raises:
        UserError: it is none of these, or not between 1 and all of them.
    """
    if text == AUTO_KAPPA:
        return max(1, round(SHARE * size)) if way is Ways.erase else None
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


def usual_layers(way: Ways) -> tuple[str, ...]:
    """Which layers a way works on where nobody names any."""
    return (DEEP,) if way is Ways.erase else (AUTO,)


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
    flat, values = positions(answering.model, answer.off), None
    about = parent(flat)
    if answer.values is not None:
        parts = zip(answering.model.targets, answering.model.weight_graph().split(answer.values), strict=True)
        held = {target.name: part.flatten() for target, part in parts}
        values = {name: held[name][at].to(getattr(torch, about.targets[name].dtype)) for name, at in flat.items()}
    scores = judge(answering, answer) | _biases(answering.model, answer.classes)
    absent = int((answering.parts.counts == 0).sum())
    config = Config.read({
        "forgotten": [{"index": label, "name": names.names[label]} for label in answer.classes],
        "parent": about,
        "preprocessing": dict(preprocessing) if preprocessing else None,
        "scores": scores | {"classes_without_images": absent},
        "method": _method(answer, target),
        "kappa": answer.kappa,
        "data_sha256": answering.parts.digest,
    })  # fmt: skip
    return Mask(flat, config, values)


def mask_there(place: Path, parent: str, classes: Sequence[str]) -> Mask | None:
    """Read the mask that a folder already holds, if it is of the same classes of the same model: one to replace.

    Args:
        parent: the model's `state_sha256`. classes: names of those to forget, in the order of their outputs.

    Raises:
        UserError: it is of another request or cannot be read, so that replacing it might lose something.
    """
    if not (place / FILE).exists():
        return None
    instead = "choose another folder with --out, or move that one away"
    try:
        older = Mask.load(place)
    except MaskError as error:
        raise UserError(f"{place} holds a mask that cannot be read ({error}): {instead}") from None
    other = "" if older.config.parent.state_sha256 == parent else " of another model"
    if other or older.forgotten != tuple(classes):
        raise UserError(f"{place} holds the mask that forgets {', '.join(older.forgotten)}{other}: {instead}")
    return older


def _biases(model: ForeignClassifier, classes: Sequence[int]) -> dict[str, str]:
    """`class_bias`: what the last layer adds to the logits of classes to forget, and of others; no mask changes it."""
    try:
        added = model.class_biases
    except UserError:  # no weight gives the logits by itself
        return {}
    if added is None:
        return {}
    of = torch.isin(torch.arange(len(added)), torch.tensor(classes))
    own = ", ".join(f"{value:+.3f}" for value in added[of].tolist())
    others = f" (others {float(added[~of].min()):+.3f} to {float(added[~of].max()):+.3f})" if not of.all() else ""
    return {"class_bias": own + others}


def _method(answer: Answer, target: AutoConfig) -> str:
    """Say in one line how the weights and their number were found."""
    if answer.way is Ways.erase:
        return f"{answer.way}, with new rows of the last layer; no retrained model was there to compare features with"
    if answer.search is None:
        return f"{answer.way}, kappa given"
    met = "meets" if answer.search.achieved else "comes nearest to, without meeting it,"
    kind = "smallest tried that" if answer.search.achieved else "the one tried that"
    wanted = f"forget <= {target.tau:g} % and loss <= {target.epsilon:g} points with 95 % confidence"
    if any(isinstance(one, Twice) and one.anew for one in answer.search.attempts):
        wanted += ", with the model's BatchNorm statistics and with new ones,"
    return f"{answer.way}, kappa auto: {kind} {met} {wanted} on validation images"


def answer_to(answering: Answering, classes: Sequence[int], kappa: int | None, way: Ways, target: AutoConfig) -> Answer:
    """Answer a request for a number of weights, or (None) for as few as meet a target."""
    chosen = tuple(sorted(set(classes)))
    return answering.search(chosen, target, way) if kappa is None else answering.answer(chosen, kappa, way)


def described(model: nn.Module, names: Iterable[str], **more: Any) -> Parent:
    """As `mimu.describe_parent`.

    Raises:
        UserError: a mask on these parameters would not hold.
    """
    try:
        return describe_parent(model, names, **more)
    except MaskError as error:
        raise UserError(str(error)) from None
