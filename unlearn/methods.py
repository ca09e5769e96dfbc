"""The registry of compared methods, our own masks and the plain controls; one decorated function each.

A method enters with the shared classifier and yields a model that has (or has not) forgotten; on leaving,
the shared classifier is bit-identical. Rivals that train are in `trained`, closed-form edits in `closed_form`.
"""

import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.config import MaskStrategies, PipelineConfig, Starts, UserError, derive_seed
from core.observe import progress
from graphs.layout import WeightGraph
from model import HookedModel, inspecting, predictions
from trainer import SFTTrainer
from unlearn.features import centred_rank
from unlearn.masks import Mask, feasibility_score, masked, random_mask, set_difference_mask, top_mask
from unlearn.requests import Checkpoint, Request, Unlearner, noise_start, refine, taylor_start
from utils_data import UnlearningDataset

OURS = "this project"
Made = TypeVar("Made")
TAYLOR_LAMBDAS = (0.0, 1.0, 3.0, 9.0)  # what `taylor_mask` chooses from, on validation images


@dataclass(frozen=True)
class Point:
    """One point of the sweep."""

    topK: int
    kappa: int
    seed: int


@dataclass
class Context:
    """What every method may use.

    `learn_importance(topK)` gives theta [C, *graph.shape], one logit per weight, for the strategies that weigh all
    classes; `checkpoint` answers requests, `unlearner` (None: the GCN is the ELBO's) answers them in one go.
    """

    model: HookedModel
    data: UnlearningDataset
    config: PipelineConfig
    device: torch.device
    learn_importance: Callable[[int], Tensor]
    checkpoint: Checkpoint | None = None
    unlearner: Unlearner | None = None
    retrain: Callable[[int], HookedModel] | None = None
    """The classifier retrained without the classes to forget, by number of the training seed."""
    untrained: Callable[[], HookedModel] | None = None
    """A classifier with initial weights."""
    allowed: dict[str, Tensor] | None = None
    """What the entered method may change: a bool tensor for each parameter by name (None: anything)."""
    charged: float = 0.0
    """Seconds of shared, cached work that the current method would have spent on its own."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """What the run's stages took when they were made, by name."""
    masks: dict[tuple, tuple[Mask, float]] = field(default_factory=dict)
    """What the mask methods have made, by method key, and the seconds it took."""
    _once: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)
    _activations: dict[tuple[str, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """W [m, n] of every target layer."""
        return self.model.weights(self.config.mask_layer)

    @property
    def graph(self) -> WeightGraph:
        """Layout of their weights."""
        return self.model.weight_graph(self.config.mask_layer)

    def learning_seconds(self, topK: int) -> float | None:
        """What training the graph network took, once for all requests; None: unknown, its file was given."""
        return self.stage_seconds.get(f"gcn_top-{topK}" if self.unlearner is None else "gcn")

    @property
    def strategy(self) -> MaskStrategies:
        """How `mimu` forms its mask: as configured, else as the GCN's objective asks for."""
        own = MaskStrategies.feasibility if self.unlearner is None else MaskStrategies.direct
        return self.config.eval.mask_strategy or own

    def within_targets(self, chosen: Sequence[Tensor]) -> dict[str, Tensor]:
        """For `allowed`: bool [m, n] for each target layer, and nothing else."""
        return dict(zip(self.graph.names, chosen, strict=True))

    def request(self, kappa: int) -> Request:
        """Forget the run's classes with kappa weights."""
        return Request(self.config.forget_labels, kappa)

    @property
    def requests(self) -> Checkpoint:
        """The checkpoint that answers them."""
        assert self.checkpoint is not None, "this method needs Context.checkpoint"
        return self.checkpoint

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make()` gives, made once per key; later callers are charged the seconds that it cost the first.

        The key names everything that varies within a run and that the product depends on.
        """
        if key in self._once:
            made, seconds = self._once[key]
            self.charged += seconds
            return made
        begun, charged = time.perf_counter(), self.charged
        made = make()
        self._once[key] = made, time.perf_counter() - begun + self.charged - charged
        return made

    def theta(self, topK: int) -> Tensor:
        """theta [C, *graph.shape], computed once per topK."""
        return self.once(("theta", topK), lambda: self.learn_importance(topK))

    def importance(self, topK: int) -> Tensor:
        """Graded importance [C, *graph.shape] as configured: theta, or the mask prior q = softmax(theta)."""
        theta = self.theta(topK)
        if self.config.eval.importance.value == "theta":
            return theta
        return theta.flatten(1).softmax(1).view_as(theta)

    def class_theta(self, topK: int) -> Tensor:
        """What the GCN holds to be the forgotten classes' own weights. [*graph.shape]."""
        if self.unlearner is not None:
            with torch.no_grad():
                return self.unlearner.theta(self.requests, self.request(topK))
        return self.theta(topK)[list(self.config.forget_labels)].amax(0)

    def images(self, split: str, is_forget_set: bool) -> DataLoader:
        """The forget or the retain set of a split, in the evaluation's batch size."""
        return self.data.get_forget_set(split) if is_forget_set else self.data.get_retain_set(split)

    def activations(self, split: str, is_forget_set: bool) -> tuple[Tensor, Tensor]:
        """The same set as h [S, n] of the first target layer, which no mask changes, and labels [S]; made once."""
        if (split, is_forget_set) not in self._activations:
            name = f"{'forget' if is_forget_set else 'retain'} set of {split}"
            h, labels = [], []
            with inspecting(self.model), torch.inference_mode():
                for batch, true in progress(self.images(split, is_forget_set), name):
                    h.append(self.model.prefix(batch.to(self.device), self.config.mask_layer))
                    labels.append(true)
            self._activations[split, is_forget_set] = torch.cat(h), torch.cat(labels).to(self.device)
        return self._activations[split, is_forget_set]

    def score(self, mask: Mask, split: str, is_forget_set: bool) -> float:
        """Accuracy of the masked classifier on a set, percent."""
        h, labels = self.activations(split, is_forget_set)
        with masked(self.weights, mask), torch.inference_mode():
            right = predictions(self.model.head(h, self.config.mask_layer)) == labels
        return 100 * float(right.double().mean())


Settings = Mapping[str, Any]
"""Hyper-parameters of a method, by keyword."""
Entering = Callable[..., AbstractContextManager[HookedModel]]
"""(context, point, **settings)."""
MaskFunction = Callable[[Context, Point], Mask]
BUDGET = 5  # settings, at most, that a method may try on validation images: the same for all


@dataclass(frozen=True)
class Method:
    """A registered method. `axes` are the fields of `Point` that its result depends on; `mask` makes its mask.

    `grid` holds the settings it is tuned over, on validation images, its default first; `source` is where it is from.
    """

    name: str
    label: str
    axes: tuple[str, ...]
    enter: Entering
    mask: MaskFunction | None = None
    source: str = OURS
    grid: tuple[Settings, ...] = ({},)
    definition: str = ""
    learned: bool = False
    """Whether it asks the graph network."""

    def axes_in(self, context: Context) -> tuple[str, ...]:
        """Its axes in a run: with masks by `direct`, nothing depends on topK."""
        direct = context.strategy is MaskStrategies.direct
        return tuple(axis for axis in self.axes if not (direct and axis == "topK"))

    def key(self, context: Context, point: Point) -> tuple:
        """What tells one result of this method from another."""
        return (self.name, *(getattr(point, axis) for axis in self.axes_in(context)))


METHODS: dict[str, Method] = {}


def _definition(function: Callable) -> str:
    return " ".join((function.__doc__ or "").split())


def method(
    name: str, label: str, axes: tuple[str, ...] = (), *, source: str = OURS, grid: Sequence[Settings] = ({},)
) -> Callable[[Callable], Entering]:
    """Register a generator function (context, point, **settings) -> yields a model, as a method.

    Args:
        axes: fields of `Point` that it depends on. source: arXiv id or reference. grid: at most BUDGET settings, the
            default first; the one to use is chosen on validation images.
    """
    assert 1 <= len(grid) <= BUDGET, f"{name} has {len(grid)} settings, {BUDGET} are allowed"

    def register(function: Callable[..., Generator[HookedModel]]) -> Entering:
        entering = contextmanager(function)
        METHODS[name] = Method(name, label, axes, entering, None, source, tuple(grid), _definition(function))
        return entering

    return register


def mask_method(
    name: str, label: str, axes: tuple[str, ...] = (), *, source: str = OURS, learned: bool = False
) -> Callable[[MaskFunction], MaskFunction]:
    """Register a function (context, point) -> mask as a method: the classifier with those weights switched off."""

    def register(function: MaskFunction) -> MaskFunction:
        @contextmanager
        def entering(context: Context, point: Point) -> Generator[HookedModel]:
            mask = mask_of(name, context, point)
            context.allowed = context.within_targets(context.graph.split(~mask.keep))
            with masked(context.weights, mask):
                yield context.model

        said = _definition(function)
        METHODS[name] = Method(name, label, axes, entering, function, source, definition=said, learned=learned)
        return function

    return register


def mask_of(name: str, context: Context, point: Point) -> Mask:
    """The mask of a mask method at a point, made once; later callers are charged what it cost the first."""
    registered = METHODS[name]
    assert registered.mask is not None, f"{name} makes no mask"
    key = registered.key(context, point)
    if key in context.masks:
        mask, seconds = context.masks[key]
        context.charged += seconds
        return mask
    begun, charged = time.perf_counter(), context.charged
    mask = registered.mask(context, point)
    context.masks[key] = mask, time.perf_counter() - begun + context.charged - charged
    return mask


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods named; "all" names every one.

    Raises:
        UserError: a name is not registered.
    """
    unknown = [name for name in names if name not in METHODS and name != "all"]
    if unknown:
        raise UserError(f"there is no method {unknown[0]!r}: choose from all, {', '.join(METHODS)}")
    return tuple(METHODS) if "all" in names else tuple(names)


def mimu_score(context: Context, point: Point) -> Tensor:
    """What `mimu` ranks, largest switched off first. [*graph.shape]."""
    if context.strategy is not MaskStrategies.direct:
        return feasibility_score(context.importance(point.topK), context.config.forget_labels)
    if context.unlearner is None:
        raise UserError("eval.mask_strategy is direct, but the GCN was trained for the ELBO: choose feasibility")
    with torch.no_grad():
        return context.unlearner.theta(context.requests, context.request(point.kappa))


@mask_method("mimu", "MIMU (ours)", axes=("topK", "kappa"), learned=True)
def mimu(context: Context, point: Point) -> Mask:
    """Switch off the weights that the graph network finds the forgotten classes depend on."""
    if context.strategy is MaskStrategies.set_difference:
        classes = context.config.forget_labels
        return set_difference_mask(context.importance(point.topK), classes, point.topK, context.graph)
    return top_mask(mimu_score(context, point), point.kappa, context.graph)


def _start(context: Context, point: Point) -> Tensor:
    """theta that refinement starts from, as configured. [*graph.shape]."""
    start, request = context.config.refine.start, context.request(point.kappa)
    if start is Starts.taylor:
        return taylor_start(context.requests, request.classes)
    if start is Starts.noise:
        return noise_start(context.requests, request, point.seed)
    score = mimu_score(context, point)
    direct = context.strategy is MaskStrategies.direct
    return (score if direct else centred_rank(score)).to(context.device)  # q has tails that drown the rest


@mask_method("mimu_refined", "MIMU refined (ours)", axes=("topK", "kappa", "seed"), learned=True)
def mimu_refined(context: Context, point: Point) -> Mask:
    """The same, improved by a few steps of descent on theta for this request alone."""
    request = context.request(point.kappa)
    theta = refine(context.requests, _start(context, point), request, context.config.refine)
    return top_mask(theta, point.kappa, context.graph)


@mask_method("taylor_mask", "signed Taylor", axes=("kappa",), source="first-order saliency, e.g. 1611.06440")
def taylor_mask(context: Context, point: Point) -> Mask:
    """Rank by t_f - lambda max(0, t_r), first-order importances, nothing learned.

    lambda is the one that keeps and forgets most on validation images.
    """
    contributions = context.requests.statistics.contributions(context.config.forget_labels)
    scores = (contributions.signed_taylor(weight) for weight in TAYLOR_LAMBDAS)
    candidates = [top_mask(score, point.kappa, context.graph) for score in scores]
    return max(candidates, key=lambda mask: context.score(mask, "val", False) - context.score(mask, "val", True))


@mask_method("random", "random mask", axes=("kappa", "seed"), source="control")
def random(context: Context, point: Point) -> Mask:
    """Switch off kappa weights drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(point.seed, "random", point.kappa))
    return random_mask(context.graph, point.kappa, generator)


@method("sft", "SFT randomisation", axes=("seed",), source="control: random labels, target layers alone")
def sft(context: Context, point: Point) -> Generator[HookedModel]:
    """Fine-tune the target layers on random labels (or as `sft.mode` says)."""
    config = context.config
    context.allowed = context.within_targets([torch.ones_like(weight, dtype=torch.bool) for weight in context.weights])
    yield SFTTrainer(context.model, context.data, config.mask_layer, config.sft, point.seed, context.device).train()


@method("retrain", "retrained", source="the gold standard: same recipe, retained images only")
def retrain(context: Context, point: Point) -> Generator[HookedModel]:
    """Trained anew, by the classifier's own recipe, without the classes to forget."""
    assert context.retrain is not None, "this method needs Context.retrain"
    begun = time.perf_counter()
    model = context.retrain(0)
    if "retrained-0" in context.stage_seconds:  # what its training took, not the reading of its checkpoint
        context.charged += context.stage_seconds["retrained-0"] - (time.perf_counter() - begun)
    yield model


@method("default", "untouched", source="control")
def default(context: Context, point: Point) -> Generator[HookedModel]:
    """The classifier as it is."""
    context.allowed = {}
    yield context.model
