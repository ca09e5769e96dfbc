"""What a model is judged by: one decorated function per metric, each with its unit, direction, target and definition.

A metric reads an `Evidence`: what one model says about every image set, beside the untouched classifier and the ones
retrained without the forgotten classes. Sets: D_f and D_r are the training images of the classes to forget and of all
others; T is the judged split (test images for the report, validation images for choices), in its two parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from attacks import called_members
from config import UserError
from model import HookedModel

OutputsOf = Callable[[str, bool], "Outputs"]
Compute = Callable[["Evidence"], float | None]
Choose = Tensor | Callable[[Tensor], Tensor]
"""Positions of images within a set [k], or what finds them given the set's labels [S]."""
Figure = TypeVar("Figure")


class ImagesOf(Protocol):
    """(split, is_forget_set, which of them) -> images [S, C, H, W], normalised, and labels [S]; None: the whole set."""

    def __call__(self, split: str, is_forget_set: bool, choose: Choose | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Outputs:
    """What a model said about one set: logits [S, C] and true labels [S]."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def log_p(self) -> Tensor:
        """Log-probabilities [S, C], float64."""
        return self.logits.double().log_softmax(1)

    @cached_property
    def right(self) -> Tensor:
        """Which images are recognised, bool [S]."""
        return self.logits.argmax(1) == self.labels

    def loss(self) -> float:
        """Mean cross-entropy of the true labels, nats."""
        return float(functional.nll_loss(self.log_p, self.labels))

    def score(self) -> float:
        """Accuracy, percent."""
        return 100 * float(self.right.double().mean())

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the true class, per image. [S]."""
        return self.log_p.gather(1, self.labels[:, None]).squeeze(1).exp()

    def probability(self) -> float:
        """Mean probability of the true class, over the whole set."""
        return float(self.confidence.mean())


@dataclass(frozen=True)
class Evidence:
    """Everything that metrics may look at; outputs are computed when first asked for, once.

    Args:
        model: the judged model, eval mode; metrics leave it as it is.
        outputs: (split, is_forget_set) -> `Outputs` of the model on a set of "train", "val" or "test".
        split: the split T, "test" or "val".
        mask_layer, forget_class, seed: as in the run. device: where the model is.
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
    _figures: dict[Callable, Any] = field(default_factory=dict)

    def figure(self, of: Callable[["Evidence"], Figure]) -> Figure:
        """A metric of this model, or what several of them share, computed once."""
        if of not in self._figures:
            self._figures[of] = of(self)
        return self._figures[of]

    @property
    def forget(self) -> Outputs:
        """T, the classes to forget."""
        return self.outputs(self.split, True)

    @property
    def retain(self) -> Outputs:
        """T, all other classes."""
        return self.outputs(self.split, False)

    @property
    def train_forget(self) -> Outputs:
        """D_f."""
        return self.outputs("train", True)

    @property
    def train_retain(self) -> Outputs:
        """D_r."""
        return self.outputs("train", False)


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
        """What travels into records."""
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
}
METRICS: dict[str, Metric] = {}


def metric(
    name: str, unit: str, better: str, *, group: str = "core", target: str = "", source: str = "", first: bool = False
) -> Callable[[Compute], Compute]:
    """Register a function Evidence -> float (None: cannot be said here) as a metric; its docstring is its definition.

    Args:
        better: "higher", "lower" or "retrain". group: one of GROUPS.
    """
    assert better in ("higher", "lower", "retrain"), better
    assert group in GROUPS, group

    def register(function: Compute) -> Compute:
        METRICS[name] = Metric(name, unit, better, function, group, target, source, first)
        return function

    return register


def chosen_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics named, singly, by group, or by "all".

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


@metric("forget_loss", "nats", "higher", target="as retrained", first=True)
def forget_loss(e: Evidence) -> float:
    """Mean cross-entropy of the true labels on T's images of the forgotten classes."""
    return e.forget.loss()


@metric("retain_loss", "nats", "lower", target="as retrained", first=True)
def retain_loss(e: Evidence) -> float:
    """Mean cross-entropy of the true labels on T's images of the retained classes."""
    return e.retain.loss()


@metric("forget_probability", "probability", "lower", target="as retrained, 0", first=True)
def forget_probability(e: Evidence) -> float:
    """Mean probability of the true class on T's images of the forgotten classes."""
    return e.forget.probability()


@metric("forget_score", "%", "lower", target="as retrained, 0", first=True)
def forget_score(e: Evidence) -> float:
    """Accuracy on T's images of the forgotten classes (FA-test)."""
    return e.forget.score()


@metric("retain_score", "%", "higher", target="as retrained or above", first=True)
def retain_score(e: Evidence) -> float:
    """Accuracy on T's images of the retained classes (TA)."""
    return e.retain.score()


# --- training images --------------------------------------------------------------------------------------


@metric("UA", "%", "retrain", group="train", target="as retrained, 100", source="2304.04934")
def unlearning_accuracy(e: Evidence) -> float:
    """100 - accuracy on D_f (some tools print the accuracy itself under this name)."""
    return 100 - e.train_forget.score()


@metric("RA", "%", "higher", group="train", target="as retrained", source="2304.04934")
def remaining_accuracy(e: Evidence) -> float:
    """Accuracy on D_r."""
    return e.train_retain.score()


# --- membership inference ---------------------------------------------------------------------------------


@metric("MIA_efficacy", "%", "retrain", group="attack", target="as retrained", source="2304.04934")
def mia_efficacy(e: Evidence) -> float:
    """Share of D_f that an attack calls non-members: an SVC (RBF, C = 3, gamma auto) on the true class's probability,
    members from D_r against T's retained images as non-members, as many of each (at most SVC_SAMPLES).
    """
    return 100 * (1 - called_members(e.train_retain.confidence, e.retain.confidence, e.train_forget.confidence))


# --- against the retrained models -------------------------------------------------------------------------


def retrained_mean(e: Evidence, of: Compute) -> float | None:
    """Mean of a figure over the retrained models; None if there are none."""
    values = [value for value in (r.figure(of) for r in e.retrained) if value is not None]
    return sum(values) / len(values) if values else None


@metric("avg_gap", "points", "lower", group="retrain", target="0", source="2310.12508", first=True)
def avg_gap(e: Evidence) -> float | None:
    """Mean of |m_u - m_r| over UA, RA, TA and MIA-efficacy, m_r the mean over the retrained models."""
    if not e.retrained:
        return None
    pairs = [
        (e.figure(of), retrained_mean(e, of))
        for of in (unlearning_accuracy, remaining_accuracy, retain_score, mia_efficacy)
    ]
    gaps = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    return sum(gaps) / len(gaps)
