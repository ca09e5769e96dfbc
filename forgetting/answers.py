"""The answer to a request: which weights of a user's model to switch off so that classes are forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from core.choices import UserError
from core.config import AutoConfig, RefineConfig, Starts
from core.intervals import Interval, paired_difference, wilson
from core.observe import log
from forgetting.samples import Parts, Samples
from measure.auto_kappa import Attempt, Search, check_provable, kappas
from models.foreign import ForeignClassifier
from unlearn.features import ClassStatistics
from unlearn.masks import hard_topk
from unlearn.requests import CANDIDATES, FrozenHead, Request, refine, tail_start

REFINE = RefineConfig(start=Starts.taylor_tail, steps=15, lr=0.3, lambda_retain=1.0)
TARGET = AutoConfig(smallest_share=1e-4, largest_share=0.02, tries=12)


class Ways(StrEnum):
    """How the weights are chosen: by first-order importance alone, or improved by descent for this request."""

    refined = "refined"
    first_order = "first_order"


@dataclass(frozen=True)
class Answer:
    """A request's answer.

    Args:
        classes: labels to forget. off: which weights are switched off, bool [*graph.shape]. kappa: how many.
        search: how kappa was found; None: it was given.
    """

    classes: tuple[int, ...]
    off: Tensor
    kappa: int
    way: Ways
    search: Search | None = None


class Answering:
    """Answers requests for one model and one set of images.

    Args:
        model: the classifier with its target weights. parts: its images, as rows.
    """

    def __init__(self, model: ForeignClassifier, parts: Parts):
        self.model, self.parts = model, parts

    @cached_property
    def head(self) -> FrozenHead:
        """The classifier from its first target on, with per-class statistics of the images that masks are sought with.

        The gradient of a class is computed from its rows when it is asked for, and the sum over all classes in one pass
        over all rows: no table of classes by weights is ever made, and a class costs the same among ten and a thousand.
        """
        model, samples = self.model, self.parts.train
        counts = torch.bincount(samples.labels, minlength=model.num_classes)
        graph = model.weight_graph()
        pairs = zip(model.weights(), model.targets, strict=True)
        weight = graph.join([value.detach().reshape(target.matrix) for value, target in pairs])

        def gradient(label: int) -> Tensor:
            own = samples.only(samples.labels == label)
            return model.class_gradient(own.h, own.labels)

        def total() -> Tensor:
            return model.gradient_sum((rows, true, 1 / counts[true]) for rows, true in samples.batches())

        statistics = ClassStatistics(graph, weight, counts, [], [], gradient, most_kept=0, total=total)
        return FrozenHead(model, None, statistics, samples, samples.labels)

    def check(self, classes: Sequence[int], names: Sequence[str]) -> None:
        """See that a request can be answered and judged with these images.

        Raises:
            UserError: a class has no images in a part, or none is left to retain.
        """
        for part in ("train", "val", "test"):
            labels = getattr(self.parts, part).labels
            held = set(labels.tolist())
            lacking = [names[one] for one in classes if one not in held]
            if lacking:
                found = int(self.parts.counts[[names.index(lacking[0])]])
                raise UserError(f"the class {lacking[0]!r} has {found} images, of which none is left for {part}: "
                                "give at least 3 of each class to forget")  # fmt: skip
            if held <= set(classes):
                raise UserError(f"the {part} images are all of classes to forget: give some of other classes, "
                                "which the model is to retain")  # fmt: skip

    # --- one kappa ---

    def answer(self, classes: tuple[int, ...], kappa: int, way: Ways = Ways.refined) -> Answer:
        """Choose kappa weights.

        Raises:
            UserError: there are fewer weights.
        """
        size = self.head.graph.num_vertices
        if not 1 <= kappa <= size:
            raise UserError(f"kappa is {kappa:,}, the target weights are {size:,}: choose from 1 to {size:,}")
        theta = tail_start(self.head, classes)
        if way is Ways.refined:
            theta = refine(self.head, theta, Request(classes, kappa), REFINE, CANDIDATES * kappa)
        return Answer(classes, hard_topk(theta, kappa), kappa, way)

    def masked(self, off: Tensor) -> list[Tensor]:
        """The target weights, [m, n] each, with some of them at zero."""
        return self.head.graph.split(self.head.weight.masked_fill(off, 0))

    def predictions(self, samples: Samples, off: Tensor | None = None) -> Tensor:
        """What the model answers, int [S]; `off`: with these weights at zero."""
        return samples.logits(self.model, None if off is None else self.masked(off)).argmax(1)

    # --- the smallest kappa that meets a target ---

    def check_target(self, classes: Sequence[int], target: AutoConfig) -> None:
        """See that the validation images can show the target at all, before anything is computed for it.

        Raises:
            UserError: they cannot; says how many would do.
        """
        forgotten = torch.isin(self.parts.val.labels, torch.tensor(classes))
        images = int(forgotten.sum()), int((~forgotten).sum())
        check_provable(target, *images, "--{}", "give more images of these classes, 28 of 100 of which count here")

    def search(self, classes: tuple[int, ...], target: AutoConfig, way: Ways = Ways.refined) -> Answer:
        """Find the smallest kappa whose mask meets the target on validation images, by bisection.

        Of `target.tries` kappas on a log scale: the one in the middle first, then halves of what is left, on the
        assumption that a larger mask forgets no less.
        """
        choices, attempts, answers = kappas(self.head.graph.num_vertices, target), {}, {}
        before = self.predictions(self.parts.val)

        def meets(kappa: int) -> bool:
            answers[kappa] = self.answer(classes, kappa, way)
            attempts[kappa] = one = self._attempt(answers[kappa], before)
            log(f"kappa {kappa:,}: forget {one.forget_score:.1f} %, loss {one.retain_drop:.1f} points (validation)")
            return one.meets(target)

        low, high = 0, len(choices)  # the first that meets it lies in [low, high]; high: none known yet
        while low < high:
            middle = (low + high) // 2
            if meets(choices[middle]):
                high = middle
            elif attempts[choices[middle]].forget_score_most > target.tau:
                low = middle + 1
            else:  # forgotten, but too much was lost: only a smaller mask may do
                high = middle
        tried = tuple(attempts[kappa] for kappa in sorted(attempts))
        fitting = [one.kappa for one in tried if one.meets(target)]
        best = min(tried, key=lambda one: (one.forget_score + one.retain_drop, one.kappa)).kappa
        kappa = min(fitting) if fitting else best
        return Answer(classes, answers[kappa].off, kappa, way, Search(bool(fitting), kappa, tried))

    def _attempt(self, answer: Answer, before: Tensor) -> Attempt:
        samples = self.parts.val
        after = self.predictions(samples, answer.off)
        forgotten = torch.isin(samples.labels, torch.tensor(answer.classes))
        forget, change = recognised(after, samples.labels, forgotten), lost(before, after, samples.labels, ~forgotten)
        forget, change = forget.times(100), change.times(100)
        return Attempt(answer.kappa, forget.value, forget.high, change.value, change.high)


def recognised(predictions: Tensor, labels: Tensor, among: Tensor) -> Interval:
    """Share of images that are recognised, of those where `among` [S] holds, with its 95 % interval."""
    return wilson(int((predictions == labels)[among].sum()), int(among.sum()))


def lost(before: Tensor, after: Tensor, labels: Tensor, among: Tensor) -> Interval:
    """Share of right answers that are lost, less those that are gained, with its 95 % interval; all [S]."""
    was, now = (before == labels)[among], (after == labels)[among]
    return paired_difference(int((was & ~now).sum()), int((~was & now).sum()), int(among.sum()))
