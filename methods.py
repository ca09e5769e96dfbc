"""Every compared method, ours included: one decorated context manager each, through one registry.

A method enters with the shared classifier and yields a model that has (or has not) forgotten; on leaving,
the shared classifier is bit-identical. To add one, decorate a generator function here; nothing else changes.
"""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from config import MaskStrategies, PipelineConfig, UserError, derive_seed
from graph import WeightGraph
from masks import Mask, feasibility_mask, masked, random_mask, set_difference_mask
from model import HookedModel
from trainer import SFTTrainer
from utils_data import UnlearningDataset


@dataclass(frozen=True)
class Point:
    """One point of the sweep."""

    topK: int
    kappa: int
    seed: int


@dataclass
class Context:
    """What every method may use. `learn_importance(topK)` gives theta [C, *graph.shape], one logit per weight."""

    model: HookedModel
    data: UnlearningDataset
    config: PipelineConfig
    device: torch.device
    learn_importance: Callable[[int], Tensor]
    charged: float = 0.0
    """Seconds of shared, cached work that the current method would have spent on its own."""
    _theta: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """W [m, n] of every target layer."""
        return self.model.weights(self.config.mask_layer)

    @property
    def graph(self) -> WeightGraph:
        """Layout of their weights."""
        return self.model.weight_graph(self.config.mask_layer)

    def theta(self, topK: int) -> Tensor:
        """theta [C, *graph.shape], computed once per topK; later callers are charged what it cost the first."""
        if topK in self._theta:
            theta, seconds = self._theta[topK]
            self.charged += seconds
            return theta
        begun = time.perf_counter()
        theta = self.learn_importance(topK)
        self._theta[topK] = (theta, time.perf_counter() - begun)
        return theta

    def importance(self, topK: int) -> Tensor:
        """Graded importance [C, *graph.shape] as configured: theta, or the mask prior q = softmax(theta)."""
        theta = self.theta(topK)
        if self.config.eval.importance.value == "theta":
            return theta
        return theta.flatten(1).softmax(1).view_as(theta)


Entering = Callable[[Context, Point], AbstractContextManager[HookedModel]]


@dataclass(frozen=True)
class Method:
    """A registered method. `axes` are the fields of `Point` that its result depends on."""

    name: str
    label: str
    axes: tuple[str, ...]
    enter: Entering

    def key(self, point: Point) -> tuple:
        """What tells one result of this method from another."""
        return (self.name, *(getattr(point, axis) for axis in self.axes))


METHODS: dict[str, Method] = {}


def method(name: str, label: str, axes: tuple[str, ...] = ()) -> Callable[[Callable], Entering]:
    """Register a generator function (context, point) -> yields a model, as a method."""

    def register(function: Callable[[Context, Point], Generator[HookedModel]]) -> Entering:
        entering = contextmanager(function)
        METHODS[name] = Method(name, label, axes, entering)
        return entering

    return register


def check_methods(names: tuple[str, ...]) -> None:
    """Raise `UserError` if a name is not registered."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"there is no method {unknown[0]!r}: choose from {', '.join(METHODS)}")


def mimu_mask(context: Context, point: Point) -> Mask:
    """The unlearning mask from the class importances, by the configured strategy."""
    importance, forget_class = context.importance(point.topK), context.config.forget_class
    if context.config.eval.mask_strategy is MaskStrategies.set_difference:
        return set_difference_mask(importance, forget_class, point.topK, context.graph)
    return feasibility_mask(importance, forget_class, point.kappa, context.graph)


@method("mimu", "MIMU (ours)", axes=("topK", "kappa"))
def mimu(context: Context, point: Point) -> Generator[HookedModel]:
    """Switch off the weights that the graph network finds important for the forget class alone."""
    with masked(context.weights, mimu_mask(context, point)):
        yield context.model


@method("random", "random mask", axes=("kappa", "seed"))
def random(context: Context, point: Point) -> Generator[HookedModel]:
    """Switch off kappa weights drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(point.seed, "random", point.kappa))
    with masked(context.weights, random_mask(context.graph, point.kappa, generator)):
        yield context.model


@method("sft", "SFT randomisation", axes=("seed",))
def sft(context: Context, point: Point) -> Generator[HookedModel]:
    """Fine-tune the target layers on random labels (or as `sft.mode` says)."""
    config = context.config
    yield SFTTrainer(context.model, context.data, config.mask_layer, config.sft, point.seed, context.device).train()


@method("default", "untouched")
def default(context: Context, point: Point) -> Generator[HookedModel]:
    """The classifier as it is."""
    yield context.model
