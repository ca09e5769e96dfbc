"""One request answered: the mask, the new rows, and what features told before, may tell, and tell now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import derive_seed
from erasing.descent import Descent, Schedule
from erasing.head import head_name, new_rows
from erasing.proxies import DRAWS, Proxies
from erasing.stages import Stages
from erasing.terms import Sides
from models.foreign import ForeignClassifier


@dataclass(frozen=True)
class Erasure:
    """What an erasing edit does to a classifier.

    Args:
        off: weights that are switched off, bool [*graph.shape]; none in the rows that are drawn anew.
        rows: parameter of the last layer -> what stands in the classes' rows, [classes, ...].
        before, target, after: what features tell after each stage but the last, see `terms.explained`: untouched, the
            most that they may, and with the edit. [stages] each.
    """

    classes: tuple[int, ...]
    off: Tensor
    rows: Mapping[str, Tensor]
    before: Tensor
    target: Tensor
    after: Tensor

    @property
    def changed(self) -> int:
        """Numbers that differ from the untouched classifier's: weights off, and the new rows."""
        return int(self.off.sum()) + sum(value.numel() for value in self.rows.values())


class Eraser:
    """Answers requests for one classifier and one set of images.

    Args:
        model: its targets are the weights that may be switched off. h: rows of images, [S, numbers]. labels: [S].
        seed: of everything that is drawn.
    """

    def __init__(self, model: ForeignClassifier, h: Tensor, labels: Tensor, seed: int):
        self.stages, self.h, self.labels, self.seed = Stages(model), h, labels, seed
        self.proxies = Proxies(model, h, labels, seed)

    def erase(self, classes: Sequence[int], kappa: int, schedule: Schedule | None = None) -> Erasure:
        """Erase classes with kappa weights and new rows of the last layer.

        Raises:
            UserError: kappa is not between 1 and all weights. NoLinearHead: there are no rows to draw anew.
        """
        sides = Sides(self.stages, self.h, self.labels, classes)
        target = self.proxies.targets(sides)
        descent = Descent(sides, target, self.seed, schedule or Schedule(), self._rows(sides.classes))
        off = descent.run(kappa)
        weights = descent.graph.split(descent.weight.masked_fill(off, 0))
        kept = sides.retain
        rows = new_rows(self.stages, weights, self.h[kept], self.labels[kept], sides.classes, self.seed)

        def told(instead: Sequence[Tensor] | None) -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "proxies", "judged"))
            return sides.tells(self.stages, generator, DRAWS, instead)

        return Erasure(sides.classes, off, rows, told(None), target, told(weights))

    def _rows(self, classes: Sequence[int]) -> Tensor:
        """Which target weights lie in the rows that are drawn anew, bool [*graph.shape]."""
        model, name = self.stages.model, f"{head_name(self.stages)}.weight"
        parts = [torch.zeros(target.matrix, dtype=torch.bool) for target in model.targets]
        for part, target in zip(parts, model.targets, strict=True):
            if target.name == name:
                part[list(classes)] = True
        return model.weight_graph().join(parts)
