"""What an erasing edit descends on: answers as if the class had never been there, and features that do not tell it.

For an image f of a class to forget, its *next class* is the retained one that the untouched classifier prefers for f.
A partner of f is an image of that class. Features tell the forgotten class as far as a classifier can separate its
images from their partners: not from all others, since a network that never saw the class takes its images for those of
some retained classes, and separates them from the rest as before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from erasing.stages import Stages

RIDGE = 0.3  # of the kernel's diagonal, in units of a standardised feature's variance
OWN = 3.0  # weight of directions of each next class's own, beside those that all pairs of classes share
LEAST_SPREAD = 0.1  # of the features' root mean square spread: below it a unit says nothing, and is not blown up
FORGOTTEN, RETAINED = 128, 256  # images in a batch: to forget (and as many partners), to retain
NEVER = -1e4  # a logit that is not there
TEMPERATURES, HALVINGS = (0.05, 20.0), 30  # at which forgotten images' answers are as sure as is asked


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the answers, nats. [B, C] -> []."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


def explained(forget: Tensor, partners: Tensor, retained: Tensor, groups: Tensor) -> Tensor:
    """Share of the variance of "forgotten or partner" that ridge regression on the features explains, in [0, 1].

    Features are divided by their spread over retained images, and centred. The kernel is (1 + OWN [same group]) x^T y
    / d: a direction that all pairs of classes share, and one of its own for each next class, because a probe that
    tells all classes apart has these. Dual form: one system of 2 A equations.

    Args:
        forget: [A, d]. partners: of the same images in turn, [A, d]. retained: [B, d]. groups: next classes, [A].
    """
    spread = retained.detach().std(0)
    spread = spread.clamp_min(float(LEAST_SPREAD * spread.square().mean().sqrt()) + 1e-12)
    both = torch.cat([forget, partners]) / spread
    both = both - both.mean(0)
    group = torch.cat([groups, groups])
    kernel = both @ both.T / both.shape[1] * (1 + OWN * (group[:, None] == group[None]))
    side = torch.ones_like(both[:, 0])
    side[len(forget) :] = -1
    diagonal = RIDGE * torch.eye(len(both), dtype=both.dtype, device=both.device)
    return 1 - RIDGE * (side @ torch.linalg.solve(kernel + diagonal, side)) / len(both)


@dataclass(frozen=True)
class Weights:
    """Of the loss's terms.

    Args:
        fit, far: cross-entropy on retained images, and their divergence from the untouched answers. partners: both on
            partners. forget: divergence of forgotten images from the untouched answers without the classes.
        features: of what features tell, while they tell more than they may.
    """

    fit: float = 1.5
    far: float = 4.5
    partners: float = 0.25
    forget: float = 2.0
    features: float = 20.0


@dataclass(frozen=True)
class Batch:
    """Rows of forgotten images, of their partners, and of retained ones, as places in `Sides.h`."""

    forget: Tensor
    partners: Tensor
    retain: Tensor


@dataclass(frozen=True)
class Terms:
    """Of one batch.

    Args:
        kept, forget: weighed losses of retained images and partners, and of forgotten images, nats.
        tell: what features tell, unweighed, [stages].
    """

    kept: Tensor
    forget: Tensor
    tell: Tensor


class Sides:
    """The images of a request, with what the untouched classifier would answer if the classes were not there.

    Args:
        stages: the classifier. h: rows, [S, numbers]. labels: [S]. classes: to forget. logits: untouched, [S, C].
    """

    def __init__(self, stages: Stages, h: Tensor, labels: Tensor, classes: Sequence[int], logits: Tensor):
        self.stages, self.h, self.labels, self.classes = stages, h, labels, tuple(classes)
        gone = torch.isin(labels, torch.tensor(self.classes, device=labels.device))
        self.forget, self.retain = gone.nonzero().flatten(), (~gone).nonzero().flatten()
        self.answers, self._logits = self.without(logits).softmax(1), logits
        counts = torch.bincount(labels[self.retain], minlength=self.answers.shape[1])
        self.next = self.answers[self.forget].masked_fill(counts == 0, -1).argmax(1)
        """Of each forgotten image the retained class, with images, that the untouched classifier prefers. [A]."""
        order = labels[self.retain].argsort(stable=True)
        self._by_class, self._counts = self.retain[order], counts
        self._begins = counts.cumsum(0) - counts

    def as_sure_as(self, stages: Stages) -> None:
        """Sharpen or soften what forgotten images are to be answered, until the mean entropy is another classifier's.

        The untouched classifier without the classes is in doubt where one that never saw them is sure: it knows that a
        boot is no sneaker. Its logits are divided by one temperature, so that the order of the classes stays.
        """
        logits = self.without(self._logits[self.forget])
        wanted = entropy(self.without(stages.logits(self.h[self.forget])))
        low, high = TEMPERATURES
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if entropy(logits / middle) > wanted else (middle, high)
        self.answers[self.forget] = (logits / low).softmax(1)

    def without(self, logits: Tensor) -> Tensor:
        """Logits [B, C] with those of the classes to forget out of the race."""
        return logits.index_fill(1, torch.tensor(self.classes, device=logits.device), NEVER)

    def draw(self, generator: torch.Generator) -> Batch:
        """A batch, with replacement."""

        def some(size: int, count: int) -> Tensor:
            return torch.randint(size, (count,), generator=generator).to(self.h.device)

        chosen = some(len(self.forget), FORGOTTEN)
        following = self.next[chosen]
        among = (torch.rand(FORGOTTEN, generator=generator).to(self.h.device) * self._counts[following]).long()
        partners = self._by_class[self._begins[following] + among]
        return Batch(self.forget[chosen], partners, self.retain[some(len(self.retain), RETAINED)])

    def tells(
        self, stages: Stages, generator: torch.Generator, draws: int = 4, weights: Sequence[Tensor] | None = None
    ) -> Tensor:
        """`explained` after every stage but the last, of a classifier on these images, mean over batches. [stages]."""
        total = torch.zeros(len(stages.taps), device=self.h.device)
        with torch.no_grad():
            for _ in range(draws):
                total += self._tell(stages(self._rows(batch := self.draw(generator)), weights)[0], batch)
        return total / draws

    def _rows(self, batch: Batch) -> Tensor:
        return self.h.index_select(0, torch.cat([batch.forget, batch.partners, batch.retain]))

    def _tell(self, features: Sequence[Tensor], batch: Batch) -> Tensor:
        sizes = [len(batch.forget), len(batch.partners), len(batch.retain)]
        groups = self.labels[batch.partners]
        return torch.stack([explained(*one.split(sizes), groups) for one in features])

    def terms(self, weights: Sequence[Tensor], generator: torch.Generator, by: Weights) -> Terms:
        """Losses of one batch's answers, and what its features tell.

        Args:
            weights: of the targets, [m, n] each. by: weights of terms.
        """
        batch = self.draw(generator)
        features, logits = self.stages(self._rows(batch), weights)
        sizes = [len(batch.forget), len(batch.partners), len(batch.retain)]
        forget, partners, retain = self.without(logits).split(sizes)
        kept = by.fit * self._fit(retain, batch.retain) + by.far * self._far(retain, batch.retain)
        kept += by.partners * (self._fit(partners, batch.partners) + self._far(partners, batch.partners))
        return Terms(kept, by.forget * self._far(forget, batch.forget), self._tell(features, batch))

    def _fit(self, logits: Tensor, places: Tensor) -> Tensor:
        """Cross-entropy, mean in nats."""
        return functional.cross_entropy(logits, self.labels[places])

    def _far(self, logits: Tensor, places: Tensor) -> Tensor:
        """KL(untouched without the classes || ours), mean in nats."""
        return functional.kl_div(logits.log_softmax(1), self.answers[places], reduction="batchmean")
