"""The metrics that models are judged by: one decorated function each, with unit, direction, target and definition.

A metric reads an `Evidence`: what one model says about every image set, beside the untouched classifier and the ones
retrained without the forgotten classes. Sets: D_f and D_r are training images of the classes to forget and of all
others, one half of them for the report and the other for choices; T is the judged split (test images for the report,
validation images for choices), in its two parts. Metrics against the retrained models are in `measure/comparisons.py`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from core.choices import Registry
from core.config import UserError
from measure.attacks import caught, logistic_calls, separation, svc_calls
from measure.integrity import COSTS
from model import HookedModel, predictions

OutputsOf = Callable[[str, bool], "Outputs"]
Compute = Callable[["Evidence"], float | None]
Choose = Tensor | Callable[[Tensor], Tensor]
"""Positions of images within a set [k], or what finds them given the set's labels [S]."""
Value = TypeVar("Value")


class Undefined(Exception):
    """A metric has no value for a model. The text says why, as a clause: "the network has no BatchNorm layer"."""


class ImagesOf(Protocol):
    """(split, is_forget_set, which of them) -> images [S, C, H, W], normalised, and labels [S]; None: the whole set."""

    def __call__(self, split: str, is_forget_set: bool, choose: Choose | None = None) -> tuple[Tensor, Tensor]: ...


MOST_VALUES = 2**20  # of the logits of one set that are held at once: 100,000 images of ten classes


def blocks(parts: Iterable[Tensor], most: int = MOST_VALUES) -> Iterator[Tensor]:
    """The rows of batches [b, C] again, in blocks of as many as make `most` values; the last may be smaller.

    Two models' blocks of one set fit each other, whatever batches they come from.
    """
    held, rows = [], 0
    for part in parts:
        size = max(1, most // part.shape[1])
        held, rows = [*held, part], rows + len(part)
        while rows >= size:
            whole = torch.cat(held)
            yield whole[:size]
            held, rows = [whole[size:]], rows - size
    if rows:
        yield torch.cat(held)


@dataclass(frozen=True)
class PerImage:
    """One number of each kind for each image, made from its logits. All [S]; the latter three float64.

    Args:
        predicted: the class with the largest logit, or NO_ANSWER.
        true: log-probability of the label, nats.
        entropy: H(p) = -sum_c p_c log p_c, nats; classes with p_c = 0 add nothing.
        largest: max_c p_c.
    """

    predicted: Tensor
    true: Tensor
    entropy: Tensor
    largest: Tensor

    @classmethod
    def of(cls, logits: Tensor, log_p: Tensor, labels: Tensor) -> "PerImage":
        """Read the numbers from logits [S, C], their log-softmax [S, C] and labels [S]."""
        p = log_p.exp()
        entropy = -torch.where(p == 0, 0, p * log_p).sum(1)
        true = log_p.gather(1, labels[:, None]).squeeze(1)
        return cls(predictions(logits), true, entropy, log_p.amax(1).exp())

    def at(self, places: slice | Tensor) -> "PerImage":
        """The numbers of some of the images."""
        return PerImage(*(getattr(self, one.name)[places] for one in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["PerImage"]) -> "PerImage":
        """Join the numbers of several parts, in order."""
        names = [one.name for one in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Again:
    """Logits that are not kept: a function that makes them again, in batches [b, C] in the order of the set.

    Args:
        num_classes: C. most: values that a block of them may hold, see `blocks`.
    """

    make: Callable[[], Iterable[Tensor]]
    num_classes: int
    most: int = MOST_VALUES


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on one image set: logits [S, C] and true labels [S].

    Logits of more than MOST_VALUES values are not kept, because images x classes of them for every method and set would
    take memory that grows with the square of the number of classes. `logits` then says how to make them again, and
    `made` holds one number of each kind per image.
    """

    logits: Tensor | Again
    labels: Tensor
    made: PerImage | None = None

    @cached_property
    def _log_p(self) -> Tensor:
        """Log-probabilities [S, C], float64, of logits that are held."""
        assert isinstance(self.logits, Tensor)
        return self.logits.double().log_softmax(1)

    def log_p(self) -> Iterator[Tensor]:
        """Log-probabilities of the images in order, in blocks [b, C], float64: a single one where they are held."""
        if isinstance(self.logits, Tensor):
            yield self._log_p
        else:
            yield from (block.double().log_softmax(1) for block in blocks(self.logits.make(), self.logits.most))

    @cached_property
    def per_image(self) -> PerImage:
        """One number of each kind for each image."""
        if self.made is not None:
            return self.made
        assert isinstance(self.logits, Tensor)
        return PerImage.of(self.logits, self._log_p, self.labels)

    @cached_property
    def mean_p(self) -> Tensor:
        """Mean probability of each class. [C]."""
        if isinstance(self.logits, Tensor):
            return self._log_p.exp().mean(0)
        return torch.stack([block.exp().sum(0) for block in self.log_p()]).sum(0) / len(self.labels)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[1] if isinstance(self.logits, Tensor) else self.logits.num_classes

    @cached_property
    def halves(self) -> tuple["Outputs", "Outputs"]:
        """The images at odd and at even places as two sets; of a single image, which cannot be parted, both are it."""
        return (self, self) if len(self.labels) < 2 else (self._every_second(1), self._every_second(0))

    def _every_second(self, begin: int) -> "Outputs":
        """The images at every second place from 0 or 1 on."""
        labels, kept = self.labels[begin::2], self.logits
        if isinstance(kept, Tensor):
            return Outputs(kept[begin::2], labels)

        def make() -> Iterator[Tensor]:
            place = 0
            for block in kept.make():
                yield block[(begin - place) % 2 :: 2]
                place += len(block)

        return Outputs(replace(kept, make=make), labels, self.made and self.made.at(slice(begin, None, 2)))

    def at(self, places: Sequence[int]) -> Tensor:
        """Log-probabilities of some images [k, C]; places ascend."""
        if isinstance(self.logits, Tensor):
            return self._log_p[list(places)]
        chosen, begin = [], 0
        for block in self.log_p():
            chosen.append(block[[place - begin for place in places if begin <= place < begin + len(block)]])
            begin += len(block)
        return torch.cat(chosen)

    @property
    def predicted(self) -> Tensor:
        """The class that each image is taken for, or NO_ANSWER. [S]."""
        return self.per_image.predicted

    @cached_property
    def right(self) -> Tensor:
        """Which images are recognised, bool [S]."""
        return self.predicted == self.labels

    def loss(self) -> float:
        """Mean cross-entropy of the true labels, nats."""
        return float(functional.nll_loss(self.per_image.true[:, None], torch.zeros_like(self.labels)))

    def score(self) -> float:
        """Return accuracy, percent."""
        return 100 * float(self.right.double().mean())

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the true class, per image. [S]."""
        return self.per_image.true.exp()

    @property
    def entropy(self) -> Tensor:
        """H(p) per image, nats. [S]."""
        return self.per_image.entropy

    def probability(self) -> float:
        """Mean probability of the true class, over the whole set."""
        return float(self.confidence.mean())

    def class_scores(self) -> Tensor:
        """Return accuracy per class, percent; NaN for a class without images. [C]."""
        count = self.num_classes
        images, right = (torch.bincount(labels, minlength=count) for labels in (self.labels, self.labels[self.right]))
        return 100 * right.double() / images


@dataclass(frozen=True)
class Evidence:
    """Everything that metrics may read of one model; outputs are computed once, when first asked for.

    Args:
        model: the judged model, eval mode; metrics leave it as it is.
        outputs: (split, is_forget_set) -> `Outputs` of the model on a set of "train", "val" or "test".
        split: the split T, "test" or "val".
        mask_layer, forget_class, seed: as in the run.
        device: where the model is.
        images: (split, is_forget_set, choose=None) -> images [S, C, H, W], normalised, and labels [S]: of the whole
            set, or of the positions that `choose` says, so that a few images cost no pass over all.
        original: the untouched classifier's evidence; None for itself.
        retrained: evidence of the models retrained without the classes, one per training seed; empty if none was asked
            for. Judging a retrained model, they are the *other* ones.
        untrained: outputs of a freshly initialised model, for ZRF.
    """

    model: HookedModel
    outputs: OutputsOf
    split: str
    mask_layer: int | Sequence[int] | None
    forget_class: tuple[int, ...]
    seed: int
    device: torch.device
    images: ImagesOf
    original: "Evidence | None" = None
    retrained: tuple["Evidence", ...] = ()
    untrained: OutputsOf | None = None
    _values: dict[Callable, Any] = field(default_factory=dict)

    def value(self, of: Callable[["Evidence"], Value]) -> Value:
        """Compute a metric of this model, or a value that several metrics share, once.

        None where it is a number but not a finite one (logits that diverged), or where it is `Undefined`.
        """
        if of not in self._values:
            try:
                value = of(self)
            except Undefined as reason:
                value = reason
            self._values[of] = None if isinstance(value, float) and not math.isfinite(value) else value
        found = self._values[of]
        return None if isinstance(found, Undefined) else found  # ty: ignore[invalid-explicit-return]

    def needed(self, of: Callable[["Evidence"], Value | None]) -> Value:
        """The same of what another metric cannot do without.

        Raises:
            Undefined: there is no such value, for the reason that is known of it.
        """
        value = self.value(of)
        if value is None:
            raise Undefined(self.why(of) or "a value that it rests on is no finite number")
        return value

    def why(self, of: Callable[["Evidence"], object]) -> str | None:
        """Why a metric that was asked for is `Undefined`; None if it is not."""
        found = self._values.get(of)
        return str(found) if isinstance(found, Undefined) else None

    @property
    def forget(self) -> Outputs:
        """T, the classes to forget."""
        return self.outputs(self.split, True)

    @property
    def retain(self) -> Outputs:
        """T, all other classes."""
        return self.outputs(self.split, False)

    def half(self, training: Outputs) -> Outputs:
        """One half of outputs on training images: reports (T = "test") read another one than choices (T = "val").

        Settings and points are chosen by the training images too. Were the same ones reported, the report would be of
        the best among many tries on them.
        """
        return training.halves[self.split == "test"]

    @property
    def train_forget(self) -> Outputs:
        """The half of D_f that belongs to T, see `half`."""
        return self.half(self.outputs("train", True))

    @property
    def train_retain(self) -> Outputs:
        """The half of D_r that belongs to T, see `half`."""
        return self.half(self.outputs("train", False))


@dataclass(frozen=True)
class Metric:
    """A registered metric with what a reader must know about its values.

    `better` is "higher", "lower" or "retrain" (as the retrained model has it); `target` says in words what is best;
    `group` is how much it asks for (see GROUPS); `first` puts it into the short tables.
    """

    name: str
    unit: str
    better: str
    compute: Compute
    group: str = "core"
    target: str = ""
    source: str = ""
    first: bool = False

    @property
    def definition(self) -> str:
        """Its definition, the function's own docstring."""
        return " ".join((self.compute.__doc__ or "").split())

    def about(self) -> dict[str, object]:
        """Return the facts of the metric that records hold."""
        return {
            "unit": self.unit,
            "better": self.better,
            "target": self.target,
            "definition": self.definition,
            "first": self.first,
        }


GROUPS = {
    "core": "outputs on T",
    "train": "outputs on D_f and D_r as well",
    "attack": "membership inference: fits a small classifier",
    "retrain": "the retrained models' outputs",
    "deep": "the model itself: relearning, probes, representations",
    "features": "what answers do not show: held-back logits, features of every stage, relearning at several rates",
}
INSIDE = ("deep", "features")
"""Groups that look inside models of this project, and that no setting or point is chosen by: of test images alone."""
METRICS: Registry[Metric] = Registry("metric", reserved=("all", *GROUPS, *COSTS))
CONFIDENT = 0.9  # above this probability a model is sure of itself


def metric(
    name: str, unit: str, better: str, *, group: str = "core", target: str = "", source: str = "", first: bool = False
) -> Callable[[Compute], Compute]:
    """Register a function Evidence -> float (None: cannot be said here) as a metric; its docstring is its definition.

    Args:
        better: "higher", "lower" or "retrain". group: one of GROUPS.

    Raises:
        ValueError: the name is taken.
    """
    assert better in ("higher", "lower", "retrain"), better
    assert group in GROUPS, group

    def register(function: Compute) -> Compute:
        METRICS.add(name, Metric(name, unit, better, function, group, target, source, first), function.__module__)
        return function

    return register


def chosen_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics named, singly, by group, or by "all".

    Raises:
        UserError: there is no such metric or group.
    """
    for name in names:
        if name != "all" and name not in METRICS and name not in GROUPS:
            known = ", ".join(("all", *GROUPS, *METRICS))
            raise UserError(f"there is no metric or group {name!r}: choose from {known}")
    wanted = set(names)
    return {name: entry for name, entry in METRICS.items() if "all" in wanted or wanted & {name, entry.group}}


# --- the mission's five -----------------------------------------------------------------------------------


@metric("forget_loss", "nats", "higher", target="as retrained", source="cross-entropy", first=True)
def forget_loss(e: Evidence) -> float:
    """Mean cross-entropy -log p_y of the true labels y on T's images of the forgotten classes."""
    return e.forget.loss()


@metric("retain_loss", "nats", "lower", target="as retrained", source="cross-entropy", first=True)
def retain_loss(e: Evidence) -> float:
    """Mean cross-entropy -log p_y of the true labels y on T's images of the retained classes."""
    return e.retain.loss()


@metric("forget_probability", "probability", "lower", target="as retrained, 0", source="softmax", first=True)
def forget_probability(e: Evidence) -> float:
    """Mean probability p_y of the true class y on T's images of the forgotten classes."""
    return e.forget.probability()


@metric("forget_score", "%", "lower", target="as retrained, 0", source="accuracy", first=True)
def forget_score(e: Evidence) -> float:
    """Accuracy on T's images of the forgotten classes (FA-test), the share with argmax_c p_c = y."""
    return e.forget.score()


@metric("retain_score", "%", "higher", target="as retrained or above", source="accuracy", first=True)
def retain_score(e: Evidence) -> float:
    """Accuracy on T's images of the retained classes (TA), the share with argmax_c p_c = y."""
    return e.retain.score()


@metric("worst_retained_drop", "points", "lower", target="0 or below", source="per-class accuracy", first=True)
def worst_retained_drop(e: Evidence) -> float | None:
    """Loss of the retained class that suffers most: max over c of Acc_c(untouched) - Acc_c(model) on T."""
    if e.original is None:
        return None
    drops = e.original.retain.class_scores() - e.retain.class_scores()
    return float(drops[e.retain.labels.unique()].max())


# --- training images --------------------------------------------------------------------------------------


@metric("UA", "%", "retrain", group="train", target="as retrained, 100", source="2304.04934")
def unlearning_accuracy(e: Evidence) -> float:
    """100 - accuracy on D_f (some tools print the accuracy itself under this name)."""
    return 100 - e.train_forget.score()


@metric("RA", "%", "higher", group="train", target="as retrained", source="2304.04934")
def remaining_accuracy(e: Evidence) -> float:
    """Accuracy on D_r, the share of images with argmax_c p_c = y."""
    return e.train_retain.score()


@metric("entropy_forget", "share of log C", "retrain", group="train", target="as retrained", source="Shannon entropy")
def entropy_forget(e: Evidence) -> float:
    """Mean of H(p) / log C on D_f, H(p) = -sum_c p_c log p_c: 0 certain, 1 uniform over all C classes."""
    return float(e.train_forget.entropy.mean()) / math.log(e.train_forget.num_classes)


@metric("confident_wrong", "%", "retrain", group="train", target="as retrained", source="maximum softmax probability")
def confident_wrong(e: Evidence) -> float:
    """Share of D_f that is misclassified with max_c p_c > 0.9."""
    said = e.train_forget
    largest = said.per_image.largest
    wrong = ((largest > CONFIDENT) & ~said.right).double()
    return 100 * float(torch.where(largest.isnan(), math.nan, wrong).mean())


# --- membership inference ---------------------------------------------------------------------------------


@metric("MIA_efficacy", "%", "retrain", group="attack", target="as retrained", source="2304.04934")
def mia_efficacy(e: Evidence) -> float:
    """Share of D_f that an attack calls non-members: an SVC (RBF, C = 3, gamma auto) on the true class's probability,
    rounded to 0.01; members are D_r, non-members T's retained images, both sides weighing the same.
    """
    return 100 * (1 - svc_calls(e.train_retain.confidence, e.retain.confidence, e.train_forget.confidence))


@metric("entropy_MIA", "%", "lower", group="attack", target="0, as retrained", source="2205.08096")
def entropy_mia(e: Evidence) -> float:
    """Share of D_f that an attack calls members: logistic regression on the prediction entropy -sum_c p_c log p_c,
    rounded to 0.01 nats; members are D_r, non-members T's retained images, both sides weighing the same.
    """
    return 100 * logistic_calls(e.train_retain.entropy, e.retain.entropy, e.train_forget.entropy)


@metric("class_MIA_auc", "AUC", "retrain", group="attack", target="0.5", source="2112.03570")
def class_mia_auc(e: Evidence) -> float:
    """How well the true class's probability tells D_f from T's images of the same classes: the area under
    the ROC curve, P(D_f's > T's) + P(equal) / 2.
    """
    return separation(e.train_forget.confidence, e.forget.confidence)


@metric("class_MIA_tpr1", "%", "retrain", group="attack", target="1", source="2112.03570")
def class_mia_tpr1(e: Evidence) -> float:
    """Share of D_f found by a threshold on the true class's probability that 1 % of T's images of the same classes
    pass; equal values are guessed among.
    """
    return 100 * caught(e.train_forget.confidence, e.forget.confidence)


# --- against the retrained models: see measure/comparisons.py -----------------------------------------------------


def retrained_mean(e: Evidence, of: Compute) -> float | None:
    """Mean of a metric over the retrained models; None if there are none."""
    values = [value for value in (r.value(of) for r in e.retrained) if value is not None]
    return sum(values) / len(values) if values else None
