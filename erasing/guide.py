"""Where a descent may start: a graph network says how far each weight of all layers is to be switched off.

It reads, of every weight, how fast each of the loss's terms falls when the weight is switched off: first at the
untouched classifier, then, in each further pass, at the soft mask that its own last answer makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from core.config import Activations, Aggregations, UserError
from graphs.layout import WeightGraph
from graphs.subsets import signed_log, sinkhorn_topk, tail
from model import MaskingGCN

COLUMNS = ("W", "kept", "forget", "features", "together", "theta", "degree", "excess", "depth", "last")
PASSES, ROUNDS, WIDTH = 4, 2, 16
TEMPERATURE = 0.15  # of the soft mask at which a pass looks, in units of std(theta)
EXCESS = 0.1  # shares of the variance above the target that read as 1


@dataclass(frozen=True)
class Look:
    """How fast the loss's terms fall when a weight is switched off further, [*graph.shape] each.

    Args:
        kept, forget, features: weighed terms; see `terms.Terms`, and of features as far as they are pushed.
        excess: by which features tell more than they may, mean over stages.
    """

    kept: Tensor
    forget: Tensor
    features: Tensor
    excess: float


class Asked(Protocol):
    """One request: the weights, which of them may be switched off, and what doing so would change."""

    graph: WeightGraph
    weight: Tensor
    """[*graph.shape]."""
    places: Tensor
    """Flat positions of those that may be."""

    def look(self, degrees: Tensor) -> Look:
        """Of one batch, at weights switched off so far, [*graph.shape]."""
        ...


def standardised(scores: Tensor) -> Tensor:
    """(v - mean) / std. [*shape] -> [*shape]."""
    return (scores - scores.mean()) / scores.std()


def started(scores: Tensor) -> Tensor:
    """`tail` of scores, standardised: what descent begins at. [*shape] -> [*shape]."""
    return standardised(tail(scores))


class Guide:
    """A graph network and how it is asked.

    Args:
        gcn: reads COLUMNS. passes: how often it corrects theta.
        joined: for each layer but the last, whether messages pass from it to the next; empty: within layers alone.
    """

    def __init__(self, gcn: MaskingGCN, passes: int = PASSES, joined: tuple[bool, ...] = ()):
        self.gcn, self.passes, self.joined = gcn, passes, joined

    @classmethod
    def fresh(cls, joined: tuple[bool, ...] = (), messages: bool = True) -> "Guide":
        """An untrained one, which answers with the first-order start.

        Args:
            messages: False: every weight is read by itself, the neighbours' matrices are held at 0.
        """
        gcn = MaskingGCN(len(COLUMNS), ROUNDS, WIDTH, Aggregations.mean, Activations.relu, residual=True)
        for value in gcn.readout.parameters():
            nn.init.zeros_(value)
        for matrix in () if messages else gcn.neighbours:
            nn.init.zeros_(matrix).requires_grad_(False)
        return cls(gcn, joined=joined)

    def thetas(self, asked: Asked, kappa: int) -> Iterator[Tensor]:
        """theta after each pass, large where a weight is to be switched off, [*graph.shape].

        A pass takes the theta before it for data, so that a gradient reaches its own correction alone.
        """
        graph = WeightGraph(asked.graph.shapes, self.joined or (False,) * (len(asked.graph.shapes) - 1))
        degrees, theta = torch.zeros_like(asked.weight), None
        for _ in range(self.passes):
            look = asked.look(degrees)
            together = look.kept + look.forget + look.features
            theta = started(together) if theta is None else theta.detach()
            columns = _columns(asked, look, together, theta, degrees)
            theta = theta + self.gcn(columns.unsqueeze(0), graph)[0]
            yield theta
            chosen = sinkhorn_topk(theta.detach().flatten()[asked.places], kappa, TEMPERATURE)
            flat = torch.zeros_like(degrees).flatten().index_put((asked.places,), chosen)
            degrees = flat.view(degrees.shape)

    def theta(self, asked: Asked, kappa: int) -> Tensor:
        """theta of the last pass, without a gradient. [*graph.shape].

        Raises:
            UserError: it is not finite.
        """
        with torch.no_grad():
            *_, theta = self.thetas(asked, kappa)
        if not bool(theta.isfinite().all()):
            raise UserError("the graph network's scores are not finite for this classifier: erase without it")
        return theta

    def save(self, path: Path, facts: dict) -> None:
        """Write the network with what `load` needs, and facts."""
        own = {"objective": "erasing", "columns": list(COLUMNS), "passes": self.passes, "joined": list(self.joined)}
        self.gcn.save(path, facts | own)

    @classmethod
    def load(cls, path: Path) -> tuple["Guide", dict]:
        """Read a guide and all facts of its file.

        Raises:
            UserError: the file is of another kind, or names other columns than this version makes.
        """
        gcn, facts = MaskingGCN.load(path)
        if facts.get("objective") != "erasing":
            raise UserError(f"{path} was trained with another objective than erasing")
        passes, joined = facts.get("passes"), facts.get("joined")
        if facts.get("columns") != list(COLUMNS) or gcn.num_node_features != len(COLUMNS):
            raise UserError(f"{path} reads the columns {facts.get('columns')}, this version makes {list(COLUMNS)}")
        if not isinstance(passes, int) or not 1 <= passes <= 100 or not isinstance(joined, list):
            raise UserError(f"{path} says {passes!r} passes and {joined!r} joined layers: it is of another version")
        return cls(gcn.eval().requires_grad_(False), passes, tuple(map(bool, joined))), facts


def _columns(asked: Asked, look: Look, together: Tensor, theta: Tensor, degrees: Tensor) -> Tensor:
    """COLUMNS, [*graph.shape, len(COLUMNS)]."""
    graph = asked.graph
    parts = graph.split(asked.weight)
    scaled = graph.join([part / part.std().clamp_min(1e-12) for part in parts])
    depth = graph.join([torch.full_like(part, place / max(1, len(parts) - 1)) for place, part in enumerate(parts)])
    last = graph.join([torch.full_like(part, float(place == len(parts) - 1)) for place, part in enumerate(parts)])
    excess = torch.full_like(theta, min(2.0, max(-2.0, look.excess / EXCESS)))
    falls = [signed_log(one) for one in (look.kept, look.forget, look.features, together)]
    return torch.stack([scaled, *falls, theta, 4 * degrees, excess, depth, last], -1)
