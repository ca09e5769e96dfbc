"""Which weights are nodes and which of them are neighbours: layout, neurons and degrees.

One node per weight of the masked layers, numbered layer by layer, row by row. Two weights are neighbours when they
touch the same neuron: in one layer that is the rook's graph K_m x K_n; where the outputs of one masked
layer are the inputs of the next, their weights meet at those neurons as well. A neuron with k weights is a clique of
k nodes, no two weights share two neurons, and so everything follows from the neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.config import UserError


@dataclass(frozen=True)
class Neurons:
    """A row of neurons: outputs of layer `below` and inputs of layer `above` (places in the graph, or None)."""

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
        """Weights of each layer."""
        return tuple(m * n for m, n in self.shapes)

    @cached_property
    def num_vertices(self) -> int:
        """Nodes N: one per weight."""
        return sum(self.sizes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one value per node: (m, n) for one layer, (N,) for several."""
        return self.shapes[0] if len(self.shapes) == 1 else (self.num_vertices,)

    @cached_property
    def neurons(self) -> tuple[Neurons, ...]:
        """All rows of neurons that a node touches, each once, inputs first."""
        rows = []
        for place in range(len(self.shapes)):
            if place == 0 or not self.joined[place - 1]:
                rows.append(Neurons(None, place))
            last = place == len(self.joined)
            rows.append(Neurons(place, None if last or not self.joined[place] else place + 1))
        return tuple(rows)

    def weights_of(self, row: Neurons) -> tuple[int, int]:
        """(neurons in the row, weights that touch each)."""
        count = touching = 0
        if row.below is not None:
            count, touching = self.shapes[row.below]
        if row.above is not None:
            touching, count = touching + self.shapes[row.above][0], self.shapes[row.above][1]
        return count, touching

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Neighbours of each weight, layer by layer: the graph is regular within a layer."""
        found = [0] * len(self.shapes)
        for row in self.neurons:
            for place in (row.below, row.above):
                if place is not None:
                    found[place] += self.weights_of(row)[1] - 1
        return tuple(found)

    @cached_property
    def num_edges(self) -> int:
        """Directed edges; m n (m + n - 2) for one layer."""
        return sum(size * degree for size, degree in zip(self.sizes, self.degrees, strict=True))

    def split(self, values: Tensor, trailing: int = 0) -> list[Tensor]:
        """One value per node -> one view per layer. [..., *shape, (trailing)] -> [..., m, n, (trailing)]."""
        begin = values.dim() - trailing - len(self.shape)
        flat = values.flatten(begin, begin + len(self.shape) - 1)
        parts = flat.split(self.sizes, begin)
        return [part.unflatten(begin, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[Tensor], trailing: int = 0) -> Tensor:
        """The inverse of `split`; for one layer without a copy."""
        begin = parts[0].dim() - trailing - 2
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.flatten(begin, begin + 1) for part in parts], begin)


def layer_graph(m: int, n: int) -> WeightGraph:
    """The graph of one m x n layer."""
    return WeightGraph(((m, n),))


def check_budget(k: int, size: int, name: str = "k") -> None:
    """Raise `UserError` unless a number of weights, called `name`, is at least 1 and at most all `size` of them."""
    if not 1 <= k <= size:
        raise UserError(f"{name} is {k}, but the masked layers have {size} weights: choose from 1 to {size}")
