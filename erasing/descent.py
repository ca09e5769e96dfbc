"""The mask of an erasing edit: an exact number of weights over all target layers, by descent on a score of each."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.config import derive_seed
from erasing.guide import Guide, Look, standardised, started
from erasing.stages import MANY
from erasing.terms import Sides, Terms, Weights
from graphs.layout import check_budget
from graphs.subsets import hard_topk, sinkhorn_topk
from trainer import annealed
from training.optimisers import Adam

GUIDED_STEPS = 100  # on classes that it learned on about as good as 300 from first order (docs/results.md)
MEMORY = 0.8  # of the running mean of what features tell
WIDTH = 0.02  # above the target, in shares of the variance: from there on features are pushed in full


@dataclass(frozen=True)
class Schedule:
    """How a mask is sought.

    Args:
        steps: of Adam, at rate `lr`. hot, cold: temperatures of the soft mask, first and last, annealed geometrically.
        ramp: share of the steps over which the soft mask grows to its size. A network with BatchNorm that loses all of
            the weights at once does not find back.
        candidates: so many times as many weights as are switched off take part, those where the start is largest;
            None: all.
        start: batches that the first-order start is averaged over. by: weights of the loss's terms.
        guide: says where to start; None: at the first-order start.
        sure: forgotten images are to be answered as surely as a proxy without the class answers them, not as the
            untouched classifier does.
    """

    steps: int = 300
    lr: float = 0.3
    hot: float = 0.5
    cold: float = 0.05
    ramp: float = 0.3
    candidates: int | None = None
    start: int = 4
    by: Weights = field(default_factory=Weights)
    guide: Guide | None = None
    sure: bool = True

    def temperature(self, step: int) -> float:
        """Of the soft mask at a step."""
        return annealed(self.hot, self.cold, step, self.steps)

    def size(self, step: int, kappa: int) -> int:
        """Of the soft mask at a step."""
        return max(1, min(kappa, round(kappa * (step + 1) / max(1.0, self.ramp * self.steps))))


def usual(size: int) -> Schedule:
    """The schedule for so many target weights: of very many a share takes part, in fewer steps."""
    return Schedule() if size < MANY else Schedule(steps=100, candidates=8)


def guided(guide: Guide | None, steps: int = GUIDED_STEPS) -> Schedule:
    """The schedule from a network's start: the mask has its size at once, and is softer than at the network's looks."""
    return Schedule(steps=steps, hot=0.3, ramp=0, candidates=8, guide=guide)


class Descent:
    """Seeks the weights to switch off for one request.

    Args:
        sides: its images. target: most that features may tell, [stages]. seed: of the batches.
        barred: weights that may not be switched off, bool [*graph.shape].
    """

    def __init__(self, sides: Sides, target: Tensor, seed: int, schedule: Schedule, barred: Tensor):
        self.sides, self.target, self.how = sides, target, schedule
        self.told: Tensor | None = None
        """Running mean of what features tell, [stages]."""
        self.places = (~barred).flatten().nonzero().flatten()
        model = sides.stages.model
        self.graph = model.weight_graph()
        pairs = zip(model.weights(), model.targets, strict=True)
        self.weight = self.graph.join([value.detach().reshape(one.matrix) for value, one in pairs])
        self.generator = torch.Generator().manual_seed(derive_seed(seed, "erasing", *sides.classes))

    def terms(self, degrees: Tensor) -> Terms:
        """Of one batch; degrees: of the weights at `places`."""
        every = self.weight.new_zeros(self.weight.numel()).scatter(0, self.places, degrees)
        weights = self.graph.split(self.weight * (1 - every.view(self.weight.shape)))
        return self.sides.terms(weights, self.generator, self.how.by)

    def look(self, degrees: Tensor) -> Look:
        """How fast the terms of one batch fall when weights are switched off further; degrees: of all weights."""
        weights = [part.detach().requires_grad_() for part in self.graph.split(self.weight * (1 - degrees))]
        with torch.enable_grad():
            terms = self.sides.terms(weights, self.generator, self.how.by)
            excess = terms.tell.detach() - self.target
            pushed = self.how.by.features * ((excess / WIDTH).clamp(0, 1) * terms.tell).sum()
            losses = (terms.kept, terms.forget, pushed)
            found = [torch.autograd.grad(one, weights, retain_graph=True, materialize_grads=True) for one in losses]
        falls = [self.weight * self.graph.join(gradients) for gradients in found]
        return Look(*falls, float(excess.mean()))

    def _loss(self, degrees: Tensor) -> Tensor:
        """Of one batch; degrees: of the weights at `places`.

        The term of features is pushed down in full while their running mean is WIDTH above the target, not at all once
        it is below: a hinge on single batches would be pushed by their noise, and end lower than asked.
        """
        terms = self.terms(degrees)
        now = terms.tell.detach()
        self.told = now if self.told is None else MEMORY * self.told + (1 - MEMORY) * now
        push = ((self.told - self.target) / WIDTH).clamp(0, 1)
        return terms.kept + terms.forget + self.how.by.features * (push * terms.tell).sum()

    def first_order(self) -> Tensor:
        """How fast the loss falls when a weight is switched off, at the untouched classifier. [places]."""
        degrees, total = (self.weight.new_zeros(len(self.places)) for _ in range(2))
        degrees.requires_grad_()
        with torch.enable_grad():
            for _ in range(self.how.start):
                total -= torch.autograd.grad(self._loss(degrees), degrees)[0]
        return total

    def run(self, kappa: int) -> Tensor:
        """Choose kappa weights, bool [*graph.shape].

        Raises:
            UserError: there are fewer.
        """
        check_budget(kappa, len(self.places), "kappa")
        guide = self.how.guide
        start = guide.theta(self, kappa).flatten()[self.places] if guide else self.first_order()
        most = start.topk(min(len(start), (self.how.candidates or len(start)) * kappa)).indices.sort().values
        theta = standardised(start[most]) if guide else started(start[most])
        self.places, theta = self.places[most], theta.requires_grad_()
        optimizer = Adam([theta], self.how.lr)
        with torch.enable_grad():
            for step in range(self.how.steps):
                loss = self._loss(sinkhorn_topk(theta, self.how.size(step, kappa), self.how.temperature(step)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        off = torch.zeros_like(self.weight, dtype=torch.bool).flatten()
        off[self.places[hard_topk(theta.detach(), kappa)]] = True
        return off.view(self.weight.shape)
