"""Node features of a request to forget: named, documented sets, and what they are computed from.

A request names the classes to forget; every column has one value per weight [*graph.shape]. `basic` are a graph's own;
`contrast` adds the forgotten classes against the retained ones; `taylor` adds first-order importances.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from core.config import FeatureSets, UserError
from data import EPSILON, GraphDataset
from graphs.layout import WeightGraph

BASIC = ("h", "z", "W", "g")
CONTRAST = ("h_contrast", "z_contrast", "t_forget", "t_retain")
TAYLOR = ("taylor", "taylor_rank", "t_retain_max", "t_retain_min", "t_retain_positive")
COLUMNS: dict[FeatureSets, tuple[str, ...]] = {
    FeatureSets.basic: BASIC,
    FeatureSets.contrast: BASIC + CONTRAST,
    FeatureSets.taylor: BASIC + CONTRAST + TAYLOR,
}
TAYLOR_LAMBDA = 9.0  # of the signed Taylor score, where nothing is tuned
MOST_KEPT = 2**28  # values of all classes' gradients that are kept (1 GB); more are computed again for each request


def standardised(column: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-8) over all nodes."""
    return (column - column.mean()) / (column.std(correction=0) + EPSILON)


def signed_log(column: Tensor) -> Tensor:
    """sign(v) log(1 + |v| / mean |v|): free of scale, and heavy tails stay in sight."""
    size = column.abs()
    return column.sign() * torch.log1p(size / size.mean().clamp_min(torch.finfo(column.dtype).tiny))


def centred_rank(column: Tensor) -> Tensor:
    """Rank of each value, from -1 (smallest) to 1; ties in the order of their index."""
    order = column.flatten().argsort(stable=True)
    ranks = torch.empty_like(column).flatten()
    ranks[order] = torch.linspace(-1, 1, len(order), dtype=column.dtype, device=column.device)
    return ranks.view(column.shape)


class ClassStatistics:
    """Per-class means of a classifier's activations and gradients, and its first-order importances t = -W * dL/dW.

    Args:
        graph: layout of the target weights.
        weight: W of all of them, [*graph.shape].
        counts: images of each class, [C].
        h, z: mean input and output activations of each class, one [C, n] and [C, m] for each layer.
        gradient: label -> mean dL/dW over the class's images, [*graph.shape].
    """

    def __init__(
        self,
        graph: WeightGraph,
        weight: Tensor,
        counts: Tensor,
        h: list[Tensor],
        z: list[Tensor],
        gradient: Callable[[int], Tensor],
    ):
        self.graph, self.weight, self.counts, self.h, self.z = graph, weight, counts, h, z
        self.num_classes, self._gradient = len(counts), gradient
        few = self.num_classes * graph.num_vertices <= MOST_KEPT
        self._kept = [gradient(label) for label in range(self.num_classes)] if few else []

    @classmethod
    def of_graphs(cls, graphs: GraphDataset, num_classes: int, device: torch.device | str = "cpu") -> "ClassStatistics":
        """Compute the statistics of a classifier's graphs.

        Args:
            num_classes: of the dataset.
            device: where columns are computed.

        Raises:
            UserError: a class has no graph, or a graph is of no class.
        """
        graphs.check_classes(num_classes)
        counts = torch.bincount(graphs.labels, minlength=num_classes)
        vectors = graphs.vectors(torch.arange(len(graphs))).to(torch.device(device))
        members = torch.nn.functional.one_hot(graphs.labels, num_classes).float()
        members = (members / counts).T.to(device)

        def gradient(label: int) -> Tensor:
            """Mean over the outer products delta h^T of the class: one matrix product per layer."""
            indices = (graphs.labels == label).nonzero().flatten()
            vectors = graphs.vectors(indices).to(torch.device(device))
            pairs = zip(vectors.delta, vectors.h, strict=True)
            return graphs.graph.join([delta.T @ h / len(indices) for delta, h in pairs])

        h, z = [members @ h for h in vectors.h], [members @ z for z in vectors.z]
        return cls(graphs.graph, graphs.weight.to(device), counts, h, z, gradient)

    def gradients(self) -> Iterator[Tensor]:
        """Mean dL/dW of every class, in order. [*graph.shape] each."""
        yield from self._kept or map(self._gradient, range(self.num_classes))

    def mean(self, values: Tensor, classes: Sequence[int]) -> Tensor:
        """Mean over some classes, each class alike. [C, k] -> [k]."""
        return values[list(classes)].mean(0)

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
        UserError: the request names every class.
    """

    def __init__(self, statistics: ClassStatistics, classes: Sequence[int]):
        chosen = set(classes)
        zero = torch.zeros_like(statistics.weight)
        forget, retain, positive = zero, zero, zero
        highest, lowest = torch.full_like(zero, -torch.inf), torch.full_like(zero, torch.inf)
        others = statistics.num_classes - len(chosen)
        if others < 1:
            raise UserError(f"forget_class names all {statistics.num_classes} classes: leave at least one to retain")
        gradient = zero
        for label, mean_gradient in enumerate(statistics.gradients()):
            t = -statistics.weight * mean_gradient
            if label in chosen:
                forget, gradient = forget + t / len(chosen), gradient + mean_gradient / len(chosen)
            else:
                retain, positive = retain + t / others, positive + t.clamp_min(0) / others
                highest, lowest = torch.maximum(highest, t), torch.minimum(lowest, t)
        self.forget, self.retain, self.positive, self.gradient = forget, retain, positive, gradient
        self.highest, self.lowest = highest, lowest

    def signed_taylor(self, weight_retain: float = TAYLOR_LAMBDA) -> Tensor:
        """t_f - lambda max(0, t_r): the score that needs no training. [*graph.shape]."""
        return self.forget - weight_retain * self.retain.clamp_min(0)


def request_features(
    statistics: ClassStatistics, contributions: Contributions, classes: Sequence[int], kind: FeatureSets
) -> Tensor:
    """The columns of a feature set for a request, [*graph.shape, len(COLUMNS[kind])]."""
    graph, others = statistics.graph, [c for c in range(statistics.num_classes) if c not in set(classes)]

    def over_inputs(values: Sequence[Tensor]) -> Tensor:
        return graph.join([v.expand(shape) for v, shape in zip(values, graph.shapes, strict=True)])

    def over_outputs(values: Sequence[Tensor]) -> Tensor:
        return graph.join([v[:, None].expand(shape) for v, shape in zip(values, graph.shapes, strict=True)])

    mean = statistics.mean
    h, z = [mean(v, classes) for v in statistics.h], [mean(v, classes) for v in statistics.z]
    columns = [over_inputs(h), over_outputs(z), statistics.weight, contributions.gradient]
    columns = [standardised(column) for column in columns]
    if kind is not FeatureSets.basic:
        h = [v - mean(all_, others) for v, all_ in zip(h, statistics.h, strict=True)]
        z = [v - mean(all_, others) for v, all_ in zip(z, statistics.z, strict=True)]
        columns += [standardised(over_inputs(h)), standardised(over_outputs(z))]
        columns += [signed_log(contributions.forget), signed_log(contributions.retain)]
    if kind is FeatureSets.taylor:
        score = contributions.signed_taylor()
        columns += [signed_log(score), centred_rank(score)]
        columns += [signed_log(v) for v in (contributions.highest, contributions.lowest, contributions.positive)]
    return torch.stack(columns, -1)
