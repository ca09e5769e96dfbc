"""What a method is: it gets a `Context`, returns an `Edit`, and registers under a name by one decorator.

A method leaves the shared classifier bit-identical. `rivals.compared` lists the modules whose methods are compared.
"""

import time
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.choices import Registry
from core.config import MaskStrategies, PipelineConfig
from core.observe import progress
from data import ROWS_AT_ONCE
from graphs.layout import WeightGraph
from model import HookedModel, inspecting, predictions
from models.classifier import Classifier
from unlearn.masks import Mask, masked
from unlearn.requests import FrozenHead, Request, Unlearner
from utils_data import UnlearningDataset

OURS = "this project"
GRAPHS, STATISTICS = "graphs", "checkpoint"  # stages of a run: graphs, and class statistics made from them
BUDGET = 5  # settings, at most, that a method may try on validation images: the same for all
Made = TypeVar("Made")


class NotApplicable(Exception):
    """A method cannot be used on this classifier; the text says why, as the end of a sentence about the method."""


@dataclass(frozen=True)
class Point:
    """One point of the sweep."""

    top_k: int
    kappa: int
    seed: int


@dataclass(frozen=True)
class Edit:
    """What a method did to forget.

    Args:
        model: the classifier that has forgotten, in eval mode. A copy, or the shared classifier itself where nothing
            is changed or where a mask holds until the method is left.
        allowed: which entries may differ from the untouched classifier's: a bool tensor for each parameter by name; a
            parameter without one may not differ at all, so {} allows nothing. None: anything may differ.
        seconds: from the request to the model, once all is there that serves any request to this classifier. Work
            that methods share counts as if it were done for this request alone. None in what a method returns:
            `Method.enter` fills in what it measures.
        seconds_offline: spent once for this classifier, ahead of all requests; None: unknown. `Method.enter` fills
            it in.
    """

    model: Classifier
    allowed: Mapping[str, Tensor] | None = None
    seconds: float | None = None
    seconds_offline: float | None = 0.0

    @property
    def seconds_alone(self) -> float | None:
        """Of one request to a classifier for which nothing was prepared; None: unknown."""
        return None if self.seconds is None or self.seconds_offline is None else self.seconds + self.seconds_offline


def clock() -> float:
    """Seconds; read when a GPU has done all that it was given before."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Timed(Generic[Made]):
    """A value and the seconds that it takes somebody who starts from nothing.

    Args:
        own: without the shared values that were used. used: keys of these, and of those that they rest on.
        seconds: with all of them, each counted once.
        standing: of these, the seconds of values that serve any request to the classifier.
        stages: names of the run's stages whose products were used; their seconds are in none of the above.
    """

    value: Made
    own: float
    used: frozenset[Hashable]
    seconds: float
    standing: float
    stages: frozenset[str]


class Shared:
    """Values that several methods use: each is computed once, and its seconds are charged to every method that uses it.

    The clock alone would favour whoever comes second. So what a value costs is measured apart from the shared values
    that it rests on, and `timed` adds up the costs of all that was used, found here or computed.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Timed[Any]] = {}
        self._standing: set[Hashable] = set()
        self._used: set[Hashable] = set()  # by the innermost call that is being timed
        self._stages: set[str] = set()
        self._apart = 0.0  # seconds on the clock, so far, in which shared values were made

    def timed(self, make: Callable[[], Made]) -> Timed[Made]:
        """Call `make`, and charge it with the shared values that it uses; calls may be nested."""
        outside, begun, apart = (self._used, self._stages), clock(), self._apart
        self._used, self._stages = set(), set()
        try:
            made = make()
        finally:
            used, stages = self._used, self._stages
            self._used, self._stages = outside[0] | used, outside[1] | stages
        own = clock() - begun - (self._apart - apart)
        standing = sum((self._made[key].own for key in used & self._standing), 0.0)
        rest = sum((self._made[key].own for key in used - self._standing), 0.0)
        return Timed(made, own, frozenset(used), own + standing + rest, standing, frozenset(stages))

    def once(
        self, key: Hashable, make: Callable[[], Made], *, charged: bool = True, standing: bool = False
    ) -> Timed[Made]:
        """Return `make()`, called only if nothing is kept under the key, and the seconds that its only call took.

        Args:
            key: names everything that varies within a run and that the value depends on.
            charged: whether an enclosing `timed` is charged. False is for what the evaluation computes for itself.
            standing: whether the value serves any request to the classifier: its seconds, and those of the shared
                values that it rests on, are spent once for the classifier and not for each request.
        """
        before = self._used, self._stages
        if key not in self._made:
            begun, apart = clock(), self._apart
            self._made[key] = self.timed(make)
            self._apart = apart + clock() - begun
            self._standing |= {key, *self._made[key].used} if standing else set()
        found = self._made[key]
        self._used, self._stages = before
        if charged:
            self._used, self._stages = before[0] | {key} | found.used, before[1] | found.stages
        return found

    def uses(self, *stages: str) -> None:
        """Note that what is being timed uses products of these stages of the run."""
        self._stages = self._stages | set(stages)


@dataclass(frozen=True)
class Context:
    """What every method may read.

    Args:
        learn_importance: top_k -> theta [C, *graph.shape], one logit per weight, for the strategies that weigh all
            classes.
        head: the classifier from its first target layer on, with what a request is answered from. unlearner: the graph
            network that answers a request in a few passes; None: the GCN learned the ELBO.
        retrain: number of the training seed -> the classifier retrained without the classes to forget.
        untrained: makes a classifier with initial weights.
        stage_seconds: what each of the run's stages took when it was made, by name.
        shared: what is computed once for all methods.
    """

    model: Classifier
    data: UnlearningDataset
    config: PipelineConfig
    device: torch.device
    learn_importance: Callable[[int], Tensor]
    head: FrozenHead | None = None
    unlearner: Unlearner | None = None
    retrain: Callable[[int], Classifier] | None = None
    untrained: Callable[[], Classifier] | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)

    @property
    def own(self) -> HookedModel:
        """The classifier, for a method that takes it apart as only this project's own can be.

        Raises:
            NotApplicable: it is somebody else's.
        """
        if not isinstance(self.model, HookedModel):
            raise NotApplicable("takes apart the stack of linear layers that this project's own classifiers end in")
        return self.model

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """W of every target layer, [m, n] or [m, n, kh, kw]."""
        return self.model.weights(self.config.mask_layer)

    @property
    def graph(self) -> WeightGraph:
        """Layout of the target layers' weights."""
        return self.model.weight_graph(self.config.mask_layer)

    def offline_seconds(self, stages: Collection[str], top_k: int, learned: bool) -> float | None:
        """Seconds that products of the run's stages took, once for this classifier.

        A graph network that was trained in the run counts; one that was given does not, because it serves many
        classifiers.

        Args:
            stages: whose products a method used. learned: whether it asks the graph network.

        Returns:
            None: unknown, because a product's file was given.
        """
        wanted = set(stages)
        if learned and not self.config.gcn_path:
            wanted.add(f"gcn_top-{top_k}" if self.unlearner is None else "gcn")
        if "gcn" in wanted:
            wanted -= {STATISTICS}  # they were made in that stage, on its clock
        known = [self.stage_seconds.get(name) for name in sorted(wanted)]
        return None if None in known else sum(filter(None, known), 0.0)

    @property
    def strategy(self) -> MaskStrategies:
        """How `mimu` forms its mask: as configured, else as the GCN's objective asks for."""
        own = MaskStrategies.feasibility if self.unlearner is None else MaskStrategies.direct
        return self.config.eval.mask_strategy or own

    def within_targets(self, chosen: Sequence[Tensor]) -> dict[str, Tensor]:
        """For `Edit.allowed`: bool [m, n] for each target layer, and nothing else."""
        shaped = [part.reshape(weight.shape) for part, weight in zip(chosen, self.weights, strict=True)]
        return dict(zip(self.graph.names, shaped, strict=True))

    def request(self, kappa: int) -> Request:
        """Forget the run's classes with kappa weights."""
        return Request(self.config.forget_labels, kappa)

    @property
    def known_head(self) -> FrozenHead:
        """Return `head`, without which the method cannot work; it is charged graphs and class statistics."""
        assert self.head is not None, "this method needs Context.head"
        self.shared.uses(GRAPHS, STATISTICS)
        return self.head

    def theta(self, top_k: int) -> Tensor:
        """theta [C, *graph.shape], computed once per top_k."""

        def make() -> Tensor:
            self.shared.uses(GRAPHS)
            return self.learn_importance(top_k)

        return self.shared.once(("theta", top_k), make, standing=True).value

    def importance(self, top_k: int) -> Tensor:
        """Graded importance [C, *graph.shape] as configured: theta, or the mask prior q = softmax(theta)."""
        theta = self.theta(top_k)
        if self.config.eval.importance.value == "theta":
            return theta
        return theta.flatten(1).softmax(1).view_as(theta)

    def class_theta(self, top_k: int) -> Tensor:
        """What the GCN holds to be the forgotten classes' own weights. [*graph.shape]."""
        if self.unlearner is not None:
            with torch.no_grad():
                return self.unlearner.theta(self.known_head, self.request(top_k))
        return self.theta(top_k)[list(self.config.forget_labels)].amax(0)

    def images(self, split: str, is_forget_set: bool) -> DataLoader:
        """The forget or the retain set of a split, in the evaluation's batch size."""
        return self.data.get_forget_set(split) if is_forget_set else self.data.get_retain_set(split)

    def activations(self, split: str, is_forget_set: bool) -> tuple[Tensor, Tensor]:
        """The same set as h [S, n] of the first target layer, which no mask changes, and labels [S]; made once."""

        def make() -> tuple[Tensor, Tensor]:
            h, labels = [], []
            with inspecting(self.model), torch.inference_mode():
                for batch, true in progress(self.images(split, is_forget_set), name):
                    h.append(self.model.prefix(batch.to(self.device), self.config.mask_layer))
                    labels.append(true)
            return torch.cat(h), torch.cat(labels).to(self.device)

        name = f"{'forget' if is_forget_set else 'retain'} set of {split}"
        return self.shared.once(("activations", split, is_forget_set), make, charged=False).value

    def score(self, mask: Mask, split: str, is_forget_set: bool) -> float:
        """Accuracy of the masked classifier on a set, percent."""
        h, labels = self.activations(split, is_forget_set)
        with masked(self.weights, mask), torch.inference_mode():
            said = [predictions(self.model.head(part, self.config.mask_layer)) for part in h.split(ROWS_AT_ONCE)]
        return 100 * float((torch.cat(said) == labels).double().mean())


Settings = Mapping[str, Any]
"""Hyper-parameters of a method, by keyword."""
EditFunction = Callable[..., Edit]
"""(context, point, **settings) -> edit."""
MaskFunction = Callable[[Context, Point], Mask]


@dataclass(frozen=True)
class Method:
    """A registered method: a function that returns an `Edit`, or one that returns the mask to apply.

    Args:
        axes: fields of `Point` that the result depends on.
        function: (context, point, **settings) -> `Edit`; None: the method is a mask.
        mask: (context, point) -> `Mask`; None: the method is no mask.
        source: arXiv id or reference.
        grid: settings that the method is tuned over, on validation images, its default first.
        learned: whether the method asks the graph network.
    """

    name: str
    label: str
    axes: tuple[str, ...]
    function: EditFunction | None = None
    mask: MaskFunction | None = None
    source: str = OURS
    grid: tuple[Settings, ...] = ({},)
    learned: bool = False

    @property
    def _written(self) -> Callable:
        """The decorated function."""
        written = self.function or self.mask
        assert written is not None, f"{self.name} has neither a function nor a mask"
        return written

    @property
    def module(self) -> str:
        """Name of the module that registers the method."""
        return self._written.__module__

    @property
    def definition(self) -> str:
        """The decorated function's docstring, in one line."""
        return " ".join((self._written.__doc__ or "").split())

    def axes_in(self, context: Context) -> tuple[str, ...]:
        """Its axes in a run: with masks by `direct`, nothing depends on top_k."""
        direct = context.strategy is MaskStrategies.direct
        return tuple(axis for axis in self.axes if not (direct and axis == "top_k"))

    def key(self, context: Context, point: Point) -> tuple:
        """What tells one result of this method from another."""
        return (self.name, *(getattr(point, axis) for axis in self.axes_in(context)))

    def mask_at(self, context: Context, point: Point) -> Mask:
        """Return the method's mask at a point, made once; whoever takes it again is charged what it cost."""
        make = self.mask
        assert make is not None, f"{self.name} makes no mask"
        return context.shared.once(("mask", *self.key(context, point)), lambda: make(context, point)).value

    @contextmanager
    def enter(self, context: Context, point: Point, **settings: Any) -> Generator[Edit]:
        """Yield what the method does at a point; on leaving, the shared classifier is bit-identical to before.

        A mask is on the shared classifier, and not on a copy, from entering until leaving.
        """
        with ExitStack() as stack:
            timed = context.shared.timed(lambda: self._edited(context, point, settings, stack))
            edit = timed.value
            seconds = timed.seconds - timed.standing if edit.seconds is None else edit.seconds
            parts = context.offline_seconds(timed.stages, point.top_k, self.learned), edit.seconds_offline
            offline = None if None in parts else timed.standing + sum(filter(None, parts))
            yield replace(edit, seconds=seconds, seconds_offline=offline)

    def _edited(self, context: Context, point: Point, settings: Settings, stack: ExitStack) -> Edit:
        """The method's edit; a mask is entered on `stack`."""
        if self.function is not None:
            return self.function(context, point, **settings)
        mask = self.mask_at(context, point)
        stack.enter_context(masked(context.weights, mask))
        return Edit(context.model, context.within_targets(context.graph.split(~mask.keep)))


REGISTERED: Registry[Method] = Registry("method", reserved=("all",), home="rivals.compared")
"""By name. `rivals.compared.METHODS` is the same, with the modules imported that register."""


def method(
    name: str, label: str, axes: tuple[str, ...] = (), *, source: str = OURS, grid: Sequence[Settings] = ({},)
) -> Callable[[EditFunction], EditFunction]:
    """Register a function (context, point, **settings) -> `Edit` as a method; its docstring is its definition.

    Args:
        axes: fields of `Point` that it depends on. source: arXiv id or reference. grid: at most BUDGET settings, the
            default first; the one to use is chosen on validation images.

    Raises:
        ValueError: the name is taken.
    """
    assert 1 <= len(grid) <= BUDGET, f"{name} has {len(grid)} settings, {BUDGET} are allowed"

    def register(function: EditFunction) -> EditFunction:
        entry = Method(name, label, axes, function=function, source=source, grid=tuple(grid))
        REGISTERED.add(name, entry, entry.module)
        return function

    return register


def mask_method(
    name: str, label: str, axes: tuple[str, ...] = (), *, source: str = OURS, learned: bool = False
) -> Callable[[MaskFunction], MaskFunction]:
    """Register a function (context, point) -> mask as a method: the classifier with those weights switched off.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: MaskFunction) -> MaskFunction:
        entry = Method(name, label, axes, mask=function, source=source, learned=learned)
        REGISTERED.add(name, entry, entry.module)
        return function

    return register
