"""The answer to a request: which weights of a user's model to switch off so that classes are forgotten."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from core.choices import UserError
from core.config import PROJECT_ROOT, AutoConfig, ForgetLosses, RefineConfig, Starts, derive_seed
from core.intervals import Interval, paired_difference, wilson
from core.observe import log
from erasing.erasure import Eraser, Erasure
from erasing.head import NoLinearHead
from forgetting.samples import Parts, Samples
from graphs.subsets import hard_topk, tail
from measure.auto_kappa import Attempt, Search, check_provable, kappas
from model import inspecting
from models.foreign import ForeignClassifier
from models.targets import stage_of
from unlearn.features import TAYLOR_LAMBDA, ClassStatistics
from unlearn.requests import CANDIDATES, FrozenHead, Request, Sides, Unlearner, refine, tail_start

REFINE = RefineConfig(start=Starts.taylor_tail, steps=15, lr=0.3, lambda_retain=1.0)
DRAWN = replace(REFINE, steps=30)  # of batches of so many images to forget and to retain:
FORGOTTEN, RETAINED = 64, 128
SEEN = 256  # images of a class, at most, that its mean activations are of
STARTS = 4  # batches that a first-order start is the mean of
SHIPPED = PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors"
TARGET = AutoConfig(smallest_share=1e-4, largest_share=0.02, tries=12)
NORMS = (nn.modules.batchnorm._BatchNorm,)
RECALIBRATED = 2000  # retained images, at most, that BatchNorm statistics are computed anew with


class Ways(StrEnum):
    """How the weights are chosen: by first-order importance alone, or improved by descent for this request.

    network: by the graph network that is shipped, alone; network_refined: improved by descent from there.
    robust: improved so that the class stays forgotten when BatchNorm statistics are computed anew.
    erase: such that features do not tell the class either, and with new rows of the last layer (`erasing`).
    """

    refined = "refined"
    robust = "robust"
    first_order = "first_order"
    network = "network"
    network_refined = "network_refined"
    erase = "erase"


BY_NETWORK = (Ways.network, Ways.network_refined)


@dataclass(frozen=True)
class Answer:
    """A request's answer.

    Args:
        classes: labels to forget. off: which weights are switched off or replaced, bool [*graph.shape].
        kappa: how many are switched off. search: how kappa was found; None: it was given.
        values: what stands in their place, [*graph.shape]; None: zeros.
        erasure: of the way `erase`, what features tell.
    """

    classes: tuple[int, ...]
    off: Tensor
    kappa: int
    way: Ways
    search: Search | None = None
    values: Tensor | None = None
    erasure: Erasure | None = None


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

    @cached_property
    def in_stages(self) -> bool:
        """Whether target weights lie in several stages, so that a pass through all of them is dear."""
        return len({stage_of(target.name) for target in self.model.targets}) > 1

    @cached_property
    def for_network(self) -> FrozenHead:
        """The head with all that a graph network reads: every class's mean activations, and gradients that are kept."""
        samples, plain = self.parts.train, self.head.statistics
        some = [samples.only(samples.labels == label).h[:SEEN] for label in range(self.model.num_classes)]
        seen = [self.model.mean_activations(rows) for rows in some]
        h, z = ([torch.stack(one) for one in zip(*side, strict=True)] for side in zip(*seen, strict=True))
        statistics = ClassStatistics(plain.graph, plain.weight, plain.counts, h, z, plain.gradient)
        return FrozenHead(self.model, None, statistics, self.head.h, self.head.labels)

    def by_network(self, request: Request) -> Tensor:
        """The theta that the shipped graph network gives, [*graph.shape]."""
        with torch.no_grad():
            return shipped().theta(self.for_network, request)

    def searching(self, request: Request, way: Ways) -> tuple[FrozenHead, Tensor]:
        """What a request's losses are computed with, and where its theta starts, [*graph.shape]."""
        classes, norms = request.classes, list(self.norms.values()) if way is Ways.robust else []
        drawn = torch.Generator().manual_seed(derive_seed(0, "drawn", *classes)) if self.in_stages else None
        head = RequestHead(self.head, norms, drawn)
        if way in BY_NETWORK:
            return head, self.by_network(request)
        return head, head.start(classes) if norms or drawn else tail_start(self.head, classes)

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
        if way is Ways.erase:
            return self._erased(classes, kappa)
        request = Request(classes, kappa)
        head, theta = self.searching(request, way)
        if way not in (Ways.first_order, Ways.network):
            theta = refine(head, theta, request, DRAWN if self.in_stages else REFINE, CANDIDATES * kappa)
        return Answer(classes, hard_topk(theta, kappa), kappa, way)

    @cached_property
    def eraser(self) -> Eraser:
        """What answers requests to erase.

        Raises:
            UserError: the last layer has no rows that could be drawn anew, or is not among the targets.
        """
        samples = self.parts.train
        try:
            eraser = Eraser(self.model, samples.h, samples.labels, 0)
        except NoLinearHead as reason:
            raise UserError(f"erasing draws rows of the last layer anew, and {reason}: use --depth suppress") from None
        if eraser.head not in {target.name for target in self.model.targets}:
            raise UserError(f"erasing draws rows of {eraser.head} anew: name it with --layer as well")
        return eraser

    def _erased(self, classes: tuple[int, ...], kappa: int) -> Answer:
        erasure, graph = self.eraser.erase(classes, kappa), self.model.weight_graph()
        off, values = [], []
        for target in self.model.targets:
            gone = erasure.off.get(target.name, torch.zeros(target.shape, dtype=torch.bool)).clone()
            new = torch.zeros(target.shape)
            if target.name == erasure.head:
                gone[list(classes)], new[list(classes)] = True, erasure.rows.float()
            off.append(gone.view(target.matrix))
            values.append(new.view(target.matrix))
        joined = graph.join(off), graph.join(values)
        return Answer(classes, joined[0], kappa, Ways.erase, values=joined[1], erasure=erasure)

    def masked(self, off: Tensor, values: Tensor | None = None) -> list[Tensor]:
        """The target weights, [m, n] each, with some of them at zero, or at `values`; both [*graph.shape]."""
        return self.head.graph.split(torch.where(off, 0 if values is None else values, self.head.weight))

    def predictions(self, samples: Samples, off: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        """What the model answers, int [S]; `off`: with these weights at zero, or at `values`."""
        return samples.logits(self.model, None if off is None else self.masked(off, values)).argmax(1)

    # --- BatchNorm ---

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """BatchNorm layers behind the target weights, by name.

        Layers ahead of a mask see what they saw before. Of a model whose pass cannot be resumed, all count as behind.
        """
        inside = self.model.in_prefix()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, NORMS) and module.track_running_stats and not inside(f"{name}.running_mean")
        }

    def anew(
        self, samples: Samples, off: Tensor | None, classes: Sequence[int], values: Tensor | None = None
    ) -> Tensor | None:
        """What the model answers, int [S], with BatchNorm statistics that were computed anew with retained images.

        A mask shifts the activations behind it, to which the statistics of a BatchNorm layer no longer fit; computing
        them anew may bring a class back (arXiv 2609.08901). None: no such layer is behind the mask.

        Args:
            off: with these weights at zero, or at `values`. classes: to forget; images of all others are retained.
        """
        train, weights = self.parts.train, None if off is None else self.masked(off, values)
        retained = train.only(~torch.isin(train.labels, torch.tensor(classes)))
        retained = retained.only(torch.arange(len(retained)) < RECALIBRATED)
        if not self.norms or len(retained) < 2:
            return None
        with _learning(self.norms):
            for rows, _ in retained.batches():
                if len(rows) > 1:
                    with torch.no_grad():
                        self.model.head(rows, None, weights)
            for module in self.norms.values():
                module.eval()
            return self.predictions(samples, off, values)

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

        Where a BatchNorm layer is behind the mask, the target is to be met twice: with the model's own statistics, and
        with statistics computed anew, in the masked model and in the untouched one that it is held against. What is
        refined is then refined for both (`Ways.robust`).

        Of `target.tries` kappas on a log scale: the one in the middle first, then halves of what is left, on the
        assumption that a larger mask forgets no less.
        """
        choices, attempts, answers = kappas(self.head.graph.num_vertices, target), {}, {}
        way = Ways.robust if way is Ways.refined and self.norms else way
        before = self.predictions(self.parts.val)
        before_anew = self.anew(self.parts.val, None, classes)

        def meets(kappa: int) -> bool:
            answers[kappa] = self.answer(classes, kappa, way)
            attempts[kappa] = one = self.attempt(answers[kappa], before, before_anew)
            log(f"kappa {kappa:,}: {one.said} (validation)")
            return one.meets(target)

        low, high = 0, len(choices)  # the first that meets it lies in [low, high]; high: none known yet
        while low < high:
            middle = (low + high) // 2
            if meets(choices[middle]):
                high = middle
            elif attempts[choices[middle]].most_left > target.tau:
                low = middle + 1
            else:  # forgotten, but too much was lost: only a smaller mask may do
                high = middle
        tried = tuple(attempts[kappa] for kappa in sorted(attempts))
        fitting = [one.kappa for one in tried if one.meets(target)]
        best = min(tried, key=lambda one: (one.trade_off, one.kappa)).kappa
        kappa = min(fitting) if fitting else best
        return Answer(classes, answers[kappa].off, kappa, way, Search(bool(fitting), kappa, tried))

    def attempt(self, answer: Answer, before: Tensor, before_anew: Tensor | None) -> "Twice":
        """Judge an answer on validation images; `before`, `before_anew`: what the untouched model answers, int [S]."""
        samples = self.parts.val
        plain = self._scored(answer, before, self.predictions(samples, answer.off))
        if before_anew is None:
            return Twice(**vars(plain))
        after = self.anew(samples, answer.off, answer.classes)
        assert after is not None
        return Twice(**vars(plain), anew=self._scored(answer, before_anew, after))

    def _scored(self, answer: Answer, before: Tensor, after: Tensor) -> Attempt:
        labels = self.parts.val.labels
        forgotten = torch.isin(labels, torch.tensor(answer.classes))
        forget, change = recognised(after, labels, forgotten), lost(before, after, labels, ~forgotten)
        forget, change = forget.times(100), change.times(100)
        return Attempt(answer.kappa, forget.value, forget.high, change.value, change.high)


@dataclass(frozen=True)
class Twice(Attempt):
    """An attempt with the model's own statistics, and `anew` with BatchNorm statistics computed anew.

    None: no BatchNorm layer is behind the mask.
    """

    anew: Attempt | None = None

    def meets(self, auto: AutoConfig) -> bool:
        """Return whether the target is met both times."""
        return super().meets(auto) and (self.anew is None or self.anew.meets(auto))

    @property
    def both(self) -> tuple[Attempt, ...]:
        """The one attempt, or both."""
        return (self, self.anew) if self.anew else (self,)

    @property
    def most_left(self) -> float:
        """The upper end of the forget score's interval, where more is left."""
        return max(one.forget_score_most for one in self.both)

    @property
    def trade_off(self) -> float:
        """What is left of the classes to forget and lost of the others, together, where that is worse."""
        return max(one.forget_score + one.retain_drop for one in self.both)

    @property
    def said(self) -> str:
        """The scores in words."""
        return super().said + (f"; BatchNorm anew: {self.anew.said}" if self.anew else "")


def shipped() -> Unlearner:
    """The graph network that is shipped: it learned to unlearn on MLPs, and answers for any layer."""
    return Unlearner.load(SHIPPED)[0]


def recognised(predictions: Tensor, labels: Tensor, among: Tensor) -> Interval:
    """Share of images that are recognised, of those where `among` [S] holds, with its 95 % interval."""
    return wilson(int((predictions == labels)[among].sum()), int(among.sum()))


def lost(before: Tensor, after: Tensor, labels: Tensor, among: Tensor) -> Interval:
    """Share of right answers that are lost, less those that are gained, with its 95 % interval; all [S]."""
    was, now = (before == labels)[among], (after == labels)[among]
    return paired_difference(int((was & ~now).sum()), int((~was & now).sum()), int(among.sum()))


@contextmanager
def _learning(norms: Mapping[str, Any]) -> Generator[None]:
    """Let BatchNorm layers take the mean of what passes as their statistics; afterwards all is as before."""
    kept = {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
        yield
    finally:
        for name, norm in norms.items():
            norm.eval()
            norm.momentum = momenta[name]
            norm.load_state_dict(kept[name])


class RequestHead(FrozenHead):
    """A head whose losses are what one request asks for.

    New statistics undo what a mask does to all images alike: a mask that is found with losses that are means over two
    passes, with BatchNorm's own statistics and with those of retained rows, does less of that. Where a pass is dear,
    every loss is of a batch drawn anew.

    Args:
        head: the classifier and its samples. norms: BatchNorm layers behind the targets that new statistics are
            computed of; none: one pass. drawn: draws batches; None: every loss is of all samples.
    """

    def __init__(self, head: FrozenHead, norms: Sequence[Any], drawn: torch.Generator | None):
        super().__init__(head.model, None, head.statistics, head.h, head.labels)
        self.whole, self.norms, self.drawn = head, norms, drawn

    def sides(self, classes: tuple[int, ...]) -> Sides:
        """Samples to forget and to retain: all of the request's, or some of them, drawn with replacement."""
        whole = self.whole.sides(classes)
        if self.drawn is None:
            return whole
        forget = torch.randint(whole.forget, (FORGOTTEN,), generator=self.drawn)
        retain = torch.randint(whole.forget, len(whole.labels), (RETAINED,), generator=self.drawn)
        places = torch.cat([forget, retain])
        return Sides(whole.h[places], FORGOTTEN, whole.labels[places], whole.target[forget])

    def losses(self, degrees: Tensor, classes: tuple[int, ...], how: ForgetLosses) -> tuple[Tensor, Tensor]:
        """As `FrozenHead.losses`, means over both statistics where there are two."""
        return self._mean(classes, lambda: super(RequestHead, self).losses(degrees, classes, how))

    def start(self, classes: tuple[int, ...]) -> Tensor:
        """As `tail_start`, by the signed Taylor score of the mean over both statistics, at a request's samples."""
        found = [self._derivatives(classes) for _ in range(1 if self.drawn is None else STARTS)]
        t_forget, t_retain = (sum(one) / len(found) for one in zip(*found, strict=True))
        return tail(t_forget - TAYLOR_LAMBDA * t_retain.clamp_min(0))

    def _derivatives(self, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Of the cross-entropies of samples to forget and to retain, by degrees, where no weight is off."""
        sides = self.sides(classes)
        degrees = torch.zeros_like(self.weight).requires_grad_()

        def entropies() -> tuple[Tensor, Tensor]:
            logits = self.model.head(sides.h, None, self.graph.split(self.weight * (1 - degrees)))
            pairs = zip(logits.tensor_split([sides.forget]), sides.labels.tensor_split([sides.forget]), strict=True)
            forget, retain = (nn.functional.cross_entropy(found.float(), true) for found, true in pairs)
            return forget, retain

        with torch.enable_grad(), inspecting(self.model):
            forget, retain = self._mean(classes, entropies)
            (t_forget,) = torch.autograd.grad(forget, degrees, retain_graph=True)
            (t_retain,) = torch.autograd.grad(retain, degrees)
        return t_forget, t_retain

    def _mean(self, classes: tuple[int, ...], compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        own = compute()
        if not self.norms:
            return own
        with _standing_on(self.norms, FORGOTTEN if self.drawn else self.whole.sides(classes).forget):
            new = compute()
        return (own[0] + new[0]) / 2, (own[1] + new[1]) / 2


@contextmanager
def _standing_on(norms: Sequence[Any], first: int) -> Generator[None]:
    """Let BatchNorm layers use mean and variance of the rows from `first` on, for all rows; nothing is written to them.

    Differentiable in these statistics, which torch's own layer is in training mode alone, over all rows.
    """

    def forward_of(norm: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
            variance, mean = torch.var_mean(x[first:], dims, correction=0)
            scaled = (x - mean.view(shape)) * (variance + norm.eps).rsqrt().view(shape)
            return scaled * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else scaled

        return forward

    own = [vars(norm).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.forward = forward_of(norm)
        yield
    finally:
        for norm, forward in zip(norms, own, strict=True):
            del norm.forward
            if forward is not None:  # somebody's own, which hid the class's
                norm.forward = forward
