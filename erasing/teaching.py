"""What a guide is trained for: that the soft mask of its every answer has a small loss, on classifiers of its lessons.

`trainer.GCNTrainer` is the loop. Nothing is descended on beforehand: the loss of the descent itself is the teacher.
"""

from collections.abc import Iterator, Sequence

import torch

from core.config import GCNConfig
from erasing.descent import Descent
from erasing.guide import Guide
from graphs.subsets import sinkhorn_topk
from trainer import Objective, Part


class Teaching(Objective):
    """The loss of random requests at the soft mask of theta, after every pass.

    Features are pushed down as long as a batch tells more than it may: a running mean, by which a descent is steered,
    would be of the network as it was many steps ago.

    Args:
        guide: its network is trained in place.
        lessons: requests of several classifiers; each step draws some of them.
        kappa: of all requests.
        config, seed: as `Objective`.
    """

    seeds, terms, unit, remedy = "erasing", ("loss", "kept", "forget", "excess"), "requests", "gcn.lr"
    label, clip, one_cycle = "GCN that guides descents", 1.0, True

    def __init__(self, guide: Guide, lessons: Sequence[Descent], kappa: int, config: GCNConfig, seed: int):
        super().__init__(guide.gcn, config, seed, lessons[0].weight.device)
        self.guide, self.lessons, self.kappa = guide, lessons, kappa

    def parts(self, temperature: float) -> Iterator[Part]:
        """As `Objective.parts`: every pass of a request is a part."""
        count = self.config.requests_per_step
        for place in torch.randint(len(self.lessons), (count,), generator=self.order).tolist():
            lesson = self.lessons[place]
            for theta in self.guide.thetas(lesson, self.kappa):
                degrees = sinkhorn_topk(theta.flatten()[lesson.places], self.kappa, temperature)
                found = lesson.terms(degrees)
                excess = (found.tell - lesson.target).clamp_min(0).sum()
                loss = found.kept + found.forget + lesson.how.by.features * excess
                terms = {"loss": loss, "kept": found.kept, "forget": found.forget, "excess": excess}
                yield Part(terms, 1, lambda mean: mean / (count * self.guide.passes))
