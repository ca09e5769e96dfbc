"""Which weights are nodes and which of them are neighbours: layout, neurons and degrees.

There is one node per weight of the masked layers, numbered layer by layer, row by row. Two weights are neighbours when
they touch the same neuron: one m x n layer gives the rook's graph K_m x K_n. Where the outputs of one masked layer are
the inputs of the next, their weights meet at those neurons as well. The k weights of a neuron form a clique, and no two
weights share two neurons, so that degrees and edges follow from a count of weights at each neuron.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.config import UserError


@dataclass(frozen=True)
class Neurons:
    """A row of neurons between two layers.

    Args:
        below: place in the graph of the layer whose outputs they are; None: that layer is not masked.
        above: place in the graph of the layer whose inputs they are; None: that layer is not masked.
    """

    below: int | None
    above: int | None


@dataclass(frozen=True)
class WeightGraph:
    """The graph of some bias-free linear layers.

    Args:
        shapes: (m, n) = (out, in) of each layer, inputs first.
        joined: for each layer but the last, whether its outputs are the next one's inputs.
        names: parameter names of the layers, e.g. "linears.1.weight"; empty where it does not matter.
    """

    shapes: tuple[tuple[int, int], ...]
    joined: tuple[bool, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.joined) == len(self.shapes) - 1, "one link between each two layers"
        for place, joined in enumerate(self.joined):
            assert not joined or self.shapes[place][0] == self.shapes[place + 1][1], "joined layers share neurons"

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of weights of each layer."""
        return tuple(m * n for m, n in self.shapes)

    @cached_property
    def num_vertices(self) -> int:
        """Return the number of nodes N, one per weight."""
        return sum(self.sizes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a tensor of one value per node: (m, n) for one layer, (N,) for several."""
        return self.shapes[0] if len(self.shapes) == 1 else (self.num_vertices,)

    @cached_property
    def neurons(self) -> tuple[Neurons, ...]:
        """List all rows of neurons that a weight touches, each once, from the inputs on."""
        rows = []
        for place in range(len(self.shapes)):
            if place == 0 or not self.joined[place - 1]:
                rows.append(Neurons(None, place))
            last = place == len(self.joined)
            rows.append(Neurons(place, None if last or not self.joined[place] else place + 1))
        return tuple(rows)

    def weights_of(self, row: Neurons) -> tuple[int, int]:
        """Return (number of neurons in the row, number of weights that touch each)."""
        count = touching = 0
        if row.below is not None:
            count, touching = self.shapes[row.below]
        if row.above is not None:
            touching, count = touching + self.shapes[row.above][0], self.shapes[row.above][1]
        return count, touching

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Return the number of neighbours of a weight, for each layer: all weights of a layer have as many."""
        found = [0] * len(self.shapes)
        for row in self.neurons:
            for place in (row.below, row.above):
                if place is not None:
                    found[place] += self.weights_of(row)[1] - 1
        return tuple(found)

    @cached_property
    def num_edges(self) -> int:
        """Return the number of directed edges: m n (m + n - 2) for one layer."""
        return sum(size * degree for size, degree in zip(self.sizes, self.degrees, strict=True))

    def split(self, values: Tensor, trailing: int = 0) -> list[Tensor]:
        """Split one value per node into one view for each layer.

        Args:
            values: [..., *shape, ...].
            trailing: how many dimensions follow those of the nodes.

        Returns:
            For each layer, [..., m, n, ...].
        """
        begin = values.dim() - trailing - len(self.shape)
        flat = values.flatten(begin, begin + len(self.shape) - 1)
        parts = flat.split(self.sizes, begin)
        return [part.unflatten(begin, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[Tensor], trailing: int = 0) -> Tensor:
        """Join one tensor for each layer into one value per node, the inverse of `split`; one layer is not copied."""
        begin = parts[0].dim() - trailing - 2
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.flatten(begin, begin + 1) for part in parts], begin)


def layer_graph(m: int, n: int) -> WeightGraph:
    """Return the graph of one m x n layer."""
    return WeightGraph(((m, n),))


def check_budget(k: int, size: int, name: str = "k") -> None:
    """Raise `UserError` unless a number of weights, called `name`, is at least 1 and at most all `size` of them."""
    if not 1 <= k <= size:
        raise UserError(f"{name} is {k}, but the masked layers have {size} weights: choose from 1 to {size}")
