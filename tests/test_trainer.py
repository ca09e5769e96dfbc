"""The loop that trains graph networks, with an objective whose gradient is known: one number for every parameter."""

import math

import pytest
import torch

from core.config import GCNConfig, Trackers, UserError
from core.observe import Tracker
from model import MaskingGCN
from trainer import GCNTrainer, Objective, Part


class Slope(Objective):
    """Two parts of a step whose losses are `slopes` times the sum of all parameters."""

    seeds, terms, unit, remedy = "slope", ("loss", "part"), "parts", "gcn.lr"
    slopes = (2.0, 6.0)

    def parts(self, temperature):
        for slope, share in zip(self.slopes, (0.25, 0.75), strict=True):
            loss = slope * sum(parameter.sum() for parameter in self.gcn.parameters())
            yield Part({"loss": loss, "part": torch.tensor(slope)}, 1, lambda mean, share=share: share * mean)


def slope_trainer(clip: float, slopes: tuple[float, float] = Slope.slopes) -> GCNTrainer:
    objective = Slope(MaskingGCN(1, 1, 2), GCNConfig(), 0, torch.device("cpu"))
    objective.clip, objective.slopes = clip, slopes
    return GCNTrainer(objective, Tracker(Trackers.none, "test", {}))


@pytest.mark.parametrize("clip", [math.inf, 1e9, 1.0])
def test_a_step_adds_up_its_parts_and_clips_what_it_has_measured(clip):
    trainer = slope_trainer(clip)
    count = sum(parameter.numel() for parameter in trainer.gcn.parameters())
    terms, parts = trainer.step(0.1)
    slope = 0.25 * 2 + 0.75 * 6
    assert (terms["part"], parts) == (slope, 2)
    assert terms["grad_norm"] == pytest.approx(slope * math.sqrt(count))
    gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.gcn.parameters()])
    assert float(gradients.norm()) == pytest.approx(min(clip, slope * math.sqrt(count)))
    if clip > slope * math.sqrt(count):
        assert torch.equal(gradients, torch.full((count,), slope))


def test_a_step_that_is_not_finite_leaves_the_network_as_it_was():
    trainer = slope_trainer(1.0, (1.0, math.inf))
    before = [parameter.detach().clone() for parameter in trainer.gcn.parameters()]
    with pytest.raises(UserError, match=r"the GCN's loss or gradient is not finite: lower gcn\.lr"):
        trainer.step(0.1)
    assert all(torch.equal(one, parameter) for one, parameter in zip(before, trainer.gcn.parameters(), strict=True))
