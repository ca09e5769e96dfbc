"""How well a mask forgets, on images that had no part in making it."""

from typing import Any

import numpy as np
import torch

from core.choices import UserError
from core.intervals import Interval
from erasing.erasure import Erasure
from forgetting.answers import Answer, Answering, lost, recognised
from models.class_names import ClassNames, clean_accuracy, is_at_chance, permutation_that_fits


def check_clean(answering: Answering, names: ClassNames) -> Interval:
    """Accuracy of the untouched model on all images but those that masks are sought with; refused at chance.

    Raises:
        UserError: the model does not recognise these images: another order of classes, or another preprocessing.
    """
    parts = answering.parts
    predicted = [answering.predictions(part).numpy() for part in (parts.val, parts.test)]
    labels = [part.labels.numpy() for part in (parts.val, parts.test)]
    found, true = np.concatenate(predicted), np.concatenate(labels)
    if doubt := at_chance(found, true, names):
        raise UserError(doubt)
    return clean_accuracy(found, true)


def at_chance(predicted: np.ndarray, labels: np.ndarray, names: ClassNames) -> str | None:
    """Say of answers that are no better than chance what may be the reason; None: they are better.

    Args:
        predicted, labels: int [n], outputs of the model.
    """
    accuracy = clean_accuracy(predicted, labels)
    if not is_at_chance(accuracy, len(names)):
        return None
    shown = f"the model recognises {100 * accuracy.value:.1f} % of {len(labels)} images, no more than chance"
    if fit := permutation_that_fits(predicted, labels, len(names)):
        moved = ", ".join([f"{names.names[a]!r} is output {b}" for a, b in fit.items() if a != b][:3])
        how = "name them in the order of the outputs, with --classes FILE"
        return f"{shown}, but does well in another order of classes ({moved}): {how}"
    how = "check the preprocessing (--size, --mean, --std, --channels) and the images"
    return f"{shown}: {how}; a class that is not known cannot be forgotten"


def judge(answering: Answering, answer: Answer) -> dict[str, Any]:
    """Scores on test images, percent; what a card says.

    Returns:
        `clean_forget`, `clean_retain`, of the untouched model; `forget`, `retain`; `retain_change`, points;
        `p_forget`, mean probability of the classes to forget on their images; `forget_recalibrated` and
        `retain_recalibrated`, with BatchNorm statistics computed anew, where the model has such layers behind the
        mask; of an erasing edit `features_before`, `features_may`, `features_now`, see `_told`; `intervals` (95 %) and
        `n`, by the same names; `classes_retained`, how many have test images.
    """
    samples = answering.parts.test
    forgotten = torch.isin(samples.labels, torch.tensor(answer.classes))
    before = answering.predictions(samples)
    logits = samples.logits(answering.model, answering.masked(answer.off, answer.values))
    after = logits.argmax(1)
    measured = {
        "clean_forget": recognised(before, samples.labels, forgotten),
        "clean_retain": recognised(before, samples.labels, ~forgotten),
        "forget": recognised(after, samples.labels, forgotten),
        "retain": recognised(after, samples.labels, ~forgotten),
    }
    change = lost(before, after, samples.labels, ~forgotten)
    measured["retain_change"] = Interval(0.0 - change.value, -change.high, -change.low, change.n)  # not -0.0
    if (again := answering.anew(samples, answer.off, answer.classes, answer.values)) is not None:
        measured["forget_recalibrated"] = recognised(again, samples.labels, forgotten)
        measured["retain_recalibrated"] = recognised(again, samples.labels, ~forgotten)
    probability = logits[forgotten].softmax(1)[:, list(answer.classes)].sum(1).mean()
    percent = {name: one.times(100) for name, one in measured.items()}
    facts: dict[str, Any] = {name: one.value for name, one in percent.items()}
    facts["p_forget"] = 100 * float(probability)
    if answer.erasure is not None:
        facts |= _told(answering, answer.erasure)
    facts["classes_retained"] = len(samples.labels[~forgotten].unique())
    facts["intervals"] = {name: [one.low, one.high] for name, one in percent.items()}
    facts["n"] = {name: one.n for name, one in percent.items()} | {"p_forget": int(forgotten.sum())}
    return facts


def _told(answering: Answering, erasure: Erasure) -> dict[str, str]:
    """How much of "forgotten or partner" features explain, percent of the variance, by the stage that reads them."""
    columns = {"features_before": erasure.before, "features_may": erasure.may, "features_now": erasure.after}
    stages = list(answering.eraser.stages.taps)
    return {
        name: ", ".join(f"{stage} {100 * float(one):.0f}" for stage, one in zip(stages, values, strict=True))
        for name, values in columns.items()
    }
