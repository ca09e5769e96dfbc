"""How much may features tell of a class that was never learned? Two small networks answer, without retraining.

A network that never saw a class still tells it apart to some extent, which is a property of data and architecture. Two
small proxies are trained from fresh weights on the same few images, one with the class and one without. What features
tell in the second over what they tell in the first carries over to the untouched classifier:

    may = explained(untouched) * explained(proxy without) / explained(proxy with)

An edit is sought on training images and holds a little less on others: the target lies below by OVERSHOOT of the way.

Everything ahead of the first target weight stays as it is, since no mask changes it.
"""

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from core.config import derive_seed
from erasing.stages import MANY, Stages
from erasing.terms import Sides
from models.foreign import ForeignClassifier
from training.optimisers import AdamW

IMAGES, EPOCHS = 3000, 8
BATCH, RATE = 64, 2e-3
FAST = 128, 4e-3  # of less than MANY weights: half the steps, the same distance to retrained models
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
OVERSHOOT = 0.25  # of the way from what features tell to what they may
DRAWS = 6  # batches that `explained` is averaged over


class Proxies:
    """Small networks trained on some of the images; the one that sees all classes serves every request.

    Args:
        model: the classifier. h: rows of its images, [S, numbers]. labels: [S]. seed: of weights and draws.
    """

    def __init__(self, model: ForeignClassifier, h: Tensor, labels: Tensor, seed: int):
        self.model, self.h, self.labels, self.seed = model, h, labels, seed

    @cached_property
    def places(self) -> Tensor:
        """Of the images that proxies are trained on."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "proxies", "images"))
        return torch.randperm(len(self.labels), generator=generator)[:IMAGES]

    @cached_property
    def _with_all(self) -> Stages:
        return self.trained(())

    def trained(self, without: Sequence[int]) -> Stages:
        """A network from fresh weights, trained on the images of all classes but some."""
        labels = self.labels[self.places]
        places = self.places[~torch.isin(labels, torch.tensor(without, dtype=torch.long, device=labels.device))]
        seed = derive_seed(self.seed, "proxies", "training")
        stages, generator = Stages(fresh(self.model, seed)), torch.Generator().manual_seed(seed)
        tail = [value for name, value in stages.model.net.named_parameters() if not self._ahead(name)]
        for value in tail:
            value.requires_grad_(True)
        batch, rate = FAST if self.model.weight_graph().num_vertices < MANY else (BATCH, RATE)
        optimizer = AdamW(tail, rate)
        steps = EPOCHS * -(-len(places) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        with torch.enable_grad():
            for _ in range(EPOCHS):
                for part in places[torch.randperm(len(places), generator=generator)].split(batch):
                    if len(part) > 1:  # of a single row BatchNorm has no statistics
                        logits = stages.model.head(self.h[part])
                        loss = nn.functional.cross_entropy(logits.float(), self.labels[part])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    schedule.step()
        stages.model.eval().requires_grad_(False)
        return stages

    def _ahead(self, name: str) -> bool:
        return self.model.in_prefix()(name)

    def allowance(self, sides: Sides, without: Stages) -> tuple[Tensor, Tensor, Tensor]:
        """After every stage but the last, [stages] each: what features tell, may tell, and are brought down to.

        Args:
            without: the proxy that never saw the request's classes.
        """
        seed = derive_seed(self.seed, "proxies", "judged")

        def told(stages: Stages) -> Tensor:
            return sides.tells(stages, torch.Generator().manual_seed(seed), DRAWS)

        share = told(without) / told(self._with_all).clamp_min(1e-6)
        now = told(sides.stages)
        may = now * share.clamp(0, 1)
        return now, may, (may - OVERSHOOT * (now - may)).clamp_min(0)


def fresh(model: ForeignClassifier, seed: int) -> ForeignClassifier:
    """A copy in training mode, with new weights in everything from the first target on.

    Matrices and kernels are drawn as PyTorch draws those of a Linear layer (Kaiming uniform, a = sqrt(5)), biases are
    0, normalising layers start at scale 1 and shift 0; any other parameter (a layer scale, a position) stays.
    """
    ahead, other = model.in_prefix(), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, module in other.net.named_modules():
        norm = isinstance(module, NORMS)
        for own, parameter in module.named_parameters(name, recurse=False):
            if not ahead(own):
                _draw(own.rpartition(".")[2], parameter, norm, generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not ahead(f"{name}.running_mean"):
            module.reset_running_stats()
    return other.train()


def _draw(name: str, parameter: nn.Parameter, norm: bool, generator: torch.Generator) -> None:
    if parameter.dim() > 1 and name.endswith("weight"):
        nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
    elif name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif norm:
        nn.init.ones_(parameter)
