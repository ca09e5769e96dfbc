"""Node features of a request to forget: named sets, one decorated function each, and what they are computed from.

A request names the classes to forget; every column has one value per weight [*graph.shape].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.choices import Registry
from core.config import FeatureSets, UserError
from data import EPSILON, GraphDataset
from graphs.layout import WeightGraph
from graphs.subsets import signed_log

TAYLOR_LAMBDA = 9.0  # of the signed Taylor score, where nothing is tuned
MOST_MEMBERS = 2**22  # values of a matrix of images x classes that is made at once: 10,240 images of 400 classes
MOST_KEPT = 2**28  # values of all classes' gradients that are kept (1 GB); more are computed again for each request


def standardised(column: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-8) over all nodes."""
    return (column - column.mean()) / (column.std(correction=0) + EPSILON)


def centred_rank(column: Tensor) -> Tensor:
    """Rank of each value, from -1 (smallest) to 1; ties in the order of their index."""
    order = column.flatten().argsort(stable=True)
    ranks = torch.empty_like(column).flatten()
    ranks[order] = torch.linspace(-1, 1, len(order), dtype=column.dtype, device=column.device)
    return ranks.view(column.shape)


def class_means(values: Sequence[Tensor], labels: Tensor, num_classes: int, most: int = MOST_MEMBERS) -> list[Tensor]:
    """Mean of every class's rows, [S, k] -> [C, k], for each of some tensors.

    Args:
        labels: of the rows, [S]; a class without rows has no mean, NaN.
        most: values of the matrix [S, classes] of who belongs where. With more, it is made for some classes at a time:
            with as many images for each class, a whole one would grow with the square of the number of classes.
    """
    counts, blocks = torch.bincount(labels, minlength=num_classes), []
    for classes in torch.arange(num_classes).split(max(1, most // len(labels))):
        members = ((labels[:, None] == classes).float() / counts[classes]).T
        blocks.append([members.to(one.device) @ one for one in values])
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


class ClassStatistics:
    """Per-class means of a classifier's activations and gradients, and its first-order importances t = -W * dL/dW.

    Args:
        graph: layout of the target weights.
        weight: W of all of them, [*graph.shape].
        counts: images of each class, [C].
        h, z: mean input and output activations of each class, one [C, n] and [C, m] for each layer.
        gradient: label -> mean dL/dW over the class's images, [*graph.shape].
        most_kept: values of all classes' gradients, from which on they are computed again for each request.
        total: computes the sum of all classes' gradients at once, [*graph.shape]; None: they are added up.
    """

    def __init__(
        self,
        graph: WeightGraph,
        weight: Tensor,
        counts: Tensor,
        h: list[Tensor],
        z: list[Tensor],
        gradient: Callable[[int], Tensor],
        most_kept: int = MOST_KEPT,
        total: Callable[[], Tensor] | None = None,
    ):
        self.graph, self.weight, self.counts, self.h, self.z = graph, weight, counts, h, z
        self.num_classes, self.gradient, self._sum = len(counts), gradient, total
        few = self.num_classes * graph.num_vertices <= most_kept
        self._kept = [gradient(label) for label in range(self.num_classes)] if few else []

    @classmethod
    def of_graphs(
        cls,
        graphs: GraphDataset,
        num_classes: int,
        device: torch.device | str = "cpu",
        most_kept: int = MOST_KEPT,
    ) -> "ClassStatistics":
        """Compute the statistics of a classifier's graphs.

        Args:
            num_classes: of the dataset.
            device: where columns are computed. most_kept: as in the constructor.

        Raises:
            UserError: a class has no graph, or a graph is of no class.
        """
        graphs.check_classes(num_classes)
        counts = torch.bincount(graphs.labels, minlength=num_classes)
        vectors = graphs.vectors(torch.arange(len(graphs))).to(torch.device(device))

        def gradient(label: int) -> Tensor:
            """Mean over the outer products delta h^T of the class: one matrix product per layer."""
            indices = (graphs.labels == label).nonzero().flatten()
            vectors = graphs.vectors(indices).to(torch.device(device))
            pairs = zip(vectors.delta, vectors.h, strict=True)
            return graphs.graph.join([delta.T @ h / len(indices) for delta, h in pairs])

        h, z = (class_means(values, graphs.labels, num_classes) for values in (vectors.h, vectors.z))
        return cls(graphs.graph, graphs.weight.to(device), counts, h, z, gradient, most_kept)

    def gradient_of(self, label: int) -> Tensor:
        """Mean dL/dW of a class, [*graph.shape]."""
        return self._kept[label] if self._kept else self.gradient(label)

    def gradients(self) -> Iterator[Tensor]:
        """Mean dL/dW of every class, in order. [*graph.shape] each."""
        return map(self.gradient_of, range(self.num_classes))

    def sides(self, classes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Labels to forget, and all others; classes without images are left out of both: nothing is known of them.

        Raises:
            UserError: a side is empty.
        """
        held, chosen = (self.counts > 0).tolist(), set(classes)
        forget = [label for label in classes if held[label]]
        retain = [label for label in range(self.num_classes) if held[label] and label not in chosen]
        if not forget or not retain:
            raise UserError(f"there are images of {len(forget)} classes to forget and of {len(retain)} to retain: "
                            "at least one of each is needed")  # fmt: skip
        return forget, retain

    def mean(self, values: Tensor, classes: Sequence[int]) -> Tensor:
        """Mean over some classes, each class alike. [C, k] -> [k]."""
        return values[list(classes)].mean(0)

    @cached_property
    def _total(self) -> Tensor:
        """Sum of t over all classes. [*graph.shape]."""
        if self._sum is not None:
            return -self.weight * self._sum()
        total = torch.zeros_like(self.weight)
        for gradient in self.gradients():
            total -= self.weight * gradient
        return total

    def signed_taylor(self, classes: Sequence[int], weight_retain: float = TAYLOR_LAMBDA) -> Tensor:
        """t_f - lambda max(0, t_r), as of `Contributions`, up to the order of a sum. [*graph.shape].

        The gradients of all classes are passed over once for all requests: what is retained is the total less what is
        forgotten, so that a request among 1,000 classes costs as much as one among ten. Classes without images are
        left out of both means.
        """
        held, others = self.sides(classes)
        forget = torch.zeros_like(self.weight)
        for label in held:
            forget -= self.weight * self.gradient_of(label)
        retain = (self._total - forget) / len(others)
        return forget / len(held) - weight_retain * retain.clamp_min(0)

    def contributions(self, classes: Sequence[int]) -> "Contributions":
        """First-order importances of a request, in one pass over the classes."""
        return Contributions(self, classes)


class Contributions:
    """t = -W * dL/dW, the first-order growth of the loss when a weight is switched off, of a request's two sides.

    Attributes:
        forget: mean over the classes to forget. retain, highest, lowest, positive: mean, largest, smallest and
            mean of max(0, t) over the retained classes. gradient: mean dL/dW over the classes to forget.
            All [*graph.shape].

    Raises:
        UserError: as `ClassStatistics.sides`.
    """

    def __init__(self, statistics: ClassStatistics, classes: Sequence[int]):
        chosen, others = statistics.sides(classes)
        zero = torch.zeros_like(statistics.weight)
        forget, gradient, retain, positive = zero, zero, zero, zero
        highest, lowest = torch.full_like(zero, -torch.inf), torch.full_like(zero, torch.inf)
        for label in sorted(chosen + others):
            mean_gradient = statistics.gradient_of(label)
            t = -statistics.weight * mean_gradient
            if label in chosen:
                forget, gradient = forget + t / len(chosen), gradient + mean_gradient / len(chosen)
            else:
                retain, positive = retain + t / len(others), positive + t.clamp_min(0) / len(others)
                highest, lowest = torch.maximum(highest, t), torch.minimum(lowest, t)
        self.forget, self.retain, self.positive, self.gradient = forget, retain, positive, gradient
        self.highest, self.lowest = highest, lowest

    def signed_taylor(self, weight_retain: float = TAYLOR_LAMBDA) -> Tensor:
        """t_f - lambda max(0, t_r): the score that needs no training. [*graph.shape]."""
        return self.forget - weight_retain * self.retain.clamp_min(0)


# --- the sets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What node features of a request to forget are computed from.

    Args:
        statistics: of the checkpoint's classes. contributions: first-order importances of this request.
        forgotten, retained: labels of the classes on either side.
    """

    statistics: ClassStatistics
    contributions: Contributions
    forgotten: tuple[int, ...]
    retained: tuple[int, ...]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the classes to forget, each class alike. [C, k] -> [k]."""
        return self.statistics.mean(values, self.forgotten)

    def contrast(self, values: Tensor) -> Tensor:
        """Mean over the classes to forget minus mean over the retained ones. [C, k] -> [k]."""
        return self.mean(values) - self.statistics.mean(values, self.retained)

    def over_inputs(self, values: Sequence[Tensor]) -> Tensor:
        """A value of each input neuron, [n] for each layer, as one of each weight. [*graph.shape]."""
        graph = self.statistics.graph
        return graph.join([v.expand(shape) for v, shape in zip(values, graph.shapes, strict=True)])

    def over_outputs(self, values: Sequence[Tensor]) -> Tensor:
        """A value of each output neuron, [m] for each layer, as one of each weight. [*graph.shape]."""
        graph = self.statistics.graph
        return graph.join([v[:, None].expand(shape) for v, shape in zip(values, graph.shapes, strict=True)])


Compute = Callable[[Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class FeatureSet:
    """A registered set of node features: the columns of another set, then its own."""

    own: tuple[str, ...]
    compute: Compute
    extends: FeatureSets | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in order."""
        return (*(FEATURES[self.extends].columns if self.extends else ()), *self.own)

    def tensors(self, inputs: Inputs) -> list[Tensor]:
        """All columns for a request, [*graph.shape] each.

        Raises:
            ValueError: the function returns another number of columns than it has names, or columns of another shape.
        """
        before = FEATURES[self.extends].tensors(inputs) if self.extends else []
        found, shape = list(self.compute(inputs)), inputs.statistics.weight.shape
        if len(found) != len(self.own) or any(column.shape != shape for column in found):
            shapes = [list(column.shape) for column in found]
            needed = f"one of shape {list(shape)} for each of {', '.join(self.own)}"
            raise ValueError(f"the node features' function returns columns of shapes {shapes}, needed is {needed}")
        return before + found


FEATURES: Registry[FeatureSet] = Registry("feature set", FeatureSets)
"""By name, as `gcn.features` says it."""


def feature_set(name: str, columns: Sequence[str], extends: str | None = None) -> Callable[[Compute], Compute]:
    """Register a function `Inputs` -> columns [*graph.shape] as a set of node features.

    Args:
        columns: names of what the function returns, in order. extends: the set whose columns come first.

    Raises:
        ValueError: the name is taken, or there is no set to extend.
    """

    def register(function: Compute) -> Compute:
        base = FeatureSets(extends) if extends else None
        FEATURES.add(name, FeatureSet(tuple(columns), function, base), function.__module__)
        return function

    return register


@feature_set("basic", ("h", "z", "W", "g"))
def basic(r: Inputs) -> list[Tensor]:
    """Mean activations of the forgotten classes at a weight's two neurons, the weight, and its mean gradient."""
    h, z = ([r.mean(v) for v in values] for values in (r.statistics.h, r.statistics.z))
    columns = [r.over_inputs(h), r.over_outputs(z), r.statistics.weight, r.contributions.gradient]
    return [standardised(column) for column in columns]


@feature_set("contrast", ("h_contrast", "z_contrast", "t_forget", "t_retain"), extends="basic")
def contrast(r: Inputs) -> list[Tensor]:
    """The forgotten classes against the retained: activations less the others', and both sides' importances."""
    h, z = ([r.contrast(v) for v in values] for values in (r.statistics.h, r.statistics.z))
    return [
        *(standardised(r.over_inputs(h)), standardised(r.over_outputs(z))),
        *(signed_log(r.contributions.forget), signed_log(r.contributions.retain)),
    ]


@feature_set(
    "taylor", ("taylor", "taylor_rank", "t_retain_max", "t_retain_min", "t_retain_positive"), extends="contrast"
)
def taylor(r: Inputs) -> list[Tensor]:
    """The signed Taylor score and its rank, and the extremes of the retained classes' importances."""
    t, score = r.contributions, r.contributions.signed_taylor()
    return [signed_log(score), centred_rank(score), *(signed_log(v) for v in (t.highest, t.lowest, t.positive))]


def request_features(
    statistics: ClassStatistics, contributions: Contributions, classes: Sequence[int], kind: FeatureSets
) -> Tensor:
    """The columns of a feature set for a request, [*graph.shape, len(FEATURES[kind].columns)]."""
    forgotten, retained = statistics.sides(classes)
    inputs = Inputs(statistics, contributions, tuple(forgotten), tuple(retained))
    return torch.stack(FEATURES[kind].tensors(inputs), -1)
