"""One request answered: the mask, the new rows, and what features told before, may tell, and tell now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from core.config import derive_seed
from erasing.descent import Descent, Schedule, usual
from erasing.head import last_layer, new_rows
from erasing.proxies import DRAWS, Proxies
from erasing.stages import Stages
from erasing.terms import Sides
from models.foreign import ForeignClassifier

SHARE = 0.02  # of the target weights, which an edit switches off where nobody says how many


@dataclass(frozen=True)
class Erasure:
    """What an erasing edit does to a classifier.

    Args:
        off: parameter -> which of its weights are switched off, bool [*shape]; none in the rows that are drawn anew.
        head: name of the last layer's weight. rows: what stands in the classes' rows of it, [classes, d].
        before, may, after: what features tell after each stage but the last, see `terms.explained`: untouched, as
            retraining is expected to leave it, and with the edit. [stages] each.
    """

    classes: tuple[int, ...]
    off: Mapping[str, Tensor]
    head: str
    rows: Tensor
    before: Tensor
    may: Tensor
    after: Tensor

    def write(self, module: nn.Module) -> dict[str, Tensor]:
        """Put the edit into the classifier that it was made for, or a copy of it.

        Returns:
            Parameter -> which of its entries may differ now, bool [*shape].
        """
        touched = {name: part.clone() for name, part in self.off.items()}
        with torch.no_grad():
            for name, part in self.off.items():
                module.get_parameter(name).masked_fill_(part, 0)
            last, chosen = module.get_parameter(self.head), list(self.classes)
            last[chosen] = self.rows
        touched.setdefault(self.head, torch.zeros_like(last, dtype=torch.bool))[chosen] = True
        return touched


class Eraser:
    """Answers requests for one classifier and one set of images.

    Args:
        model: its targets are the weights that may be switched off. h: rows of images, [S, numbers]. labels: [S].
        seed: of everything that is drawn.

    Raises:
        NoLinearHead: there are no rows of a last layer to draw anew.
    """

    def __init__(self, model: ForeignClassifier, h: Tensor, labels: Tensor, seed: int):
        self.model, self.stages, self.h, self.labels, self.seed = model, Stages(model), h, labels, seed
        self.proxies = Proxies(model, h, labels, seed)
        self.head = f"{last_layer(self.stages)[0]}.weight"

    @cached_property
    def logits(self) -> Tensor:
        """What the untouched classifier answers, [S, C]; computed once for all requests."""
        return self.stages.logits(self.h)

    def erase(self, classes: Sequence[int], kappa: int, schedule: Schedule | None = None) -> Erasure:
        """Erase classes with kappa weights and new rows of the last layer; schedule: None, as `descent.usual` has it.

        Raises:
            UserError: kappa is not between 1 and all weights.
        """
        descent, before, may = self.descent(classes, schedule)
        sides, off = descent.sides, descent.run(kappa)
        weights = descent.graph.split(descent.weight.masked_fill(off, 0))
        rows = new_rows(self.stages, weights, self.h[sides.retain], sides.classes, self.seed)

        def told() -> Tensor:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "proxies", "judged"))
            return sides.tells(self.stages, generator, DRAWS, weights)

        pairs = zip(self.model.targets, descent.graph.split(off), strict=True)
        where = {one.name: part.view(one.shape) for one, part in pairs if bool(part.any())}
        return Erasure(sides.classes, where, self.head, rows, before, may, told())

    def descent(self, classes: Sequence[int], schedule: Schedule | None = None) -> tuple[Descent, Tensor, Tensor]:
        """What seeks the mask of a request; what features tell, and what they may, [stages] each."""
        sides = Sides(self.stages, self.h, self.labels, classes, self.logits)
        without = self.proxies.trained(sides.classes)
        before, may, target = self.proxies.allowance(sides, without)
        barred = self._rows(sides.classes)
        schedule = schedule or usual(barred.numel())
        if schedule.sure:
            sides.as_sure_as(without)
        return Descent(sides, target, self.seed, schedule, barred), before, may

    def _rows(self, classes: Sequence[int]) -> Tensor:
        """Which target weights lie in the rows that are drawn anew, bool [*graph.shape]."""
        parts = [torch.zeros(target.matrix, dtype=torch.bool, device=self.h.device) for target in self.model.targets]
        for part, target in zip(parts, self.model.targets, strict=True):
            if target.name == self.head:
                part[list(classes)] = True
        return self.model.weight_graph().join(parts)
