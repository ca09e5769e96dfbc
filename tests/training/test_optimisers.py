"""The optimisers without torch's compiler take torch's own steps, to the bit, and import no compiler."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from core.config import PROJECT_ROOT
from training import optimisers

RUN = """
import sys, torch
from torch.optim.lr_scheduler import OneCycleLR
from training.optimisers import SGD, Adam, AdamW
for kind in (SGD, Adam, AdamW):
    weight = torch.ones(3, requires_grad=True)
    optimizer = kind([weight], lr=0.1)
    schedule = OneCycleLR(optimizer, 0.1, total_steps=2)
    optimizer.zero_grad()
    weight.square().sum().backward()
    optimizer.step()
    schedule.step()
    kind([weight], lr=0.1).load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def _trained(kind: Callable[..., torch.optim.Optimizer], **settings: float) -> list[torch.Tensor]:
    """Weights after 12 steps, between which the state goes through a copy, as a resumed training does."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(6, 5)
    optimizer = kind(model.parameters(), lr=0.05, **settings)
    for step in range(12):
        if step == 5:
            state, optimizer = optimizer.state_dict(), kind(model.parameters(), lr=0.05, **settings)
            optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Adam", {}), ("AdamW", {"weight_decay": 0.1}), ("AdamW", {"fused": True}), ("SGD", {"momentum": 0.9})],
)
def test_steps_are_torchs_own(name: str, settings: dict) -> None:
    own, theirs = (_trained(getattr(place, name), **settings) for place in (optimisers, torch.optim))
    assert all(torch.equal(one, two) for one, two in zip(own, theirs, strict=True))


def test_no_compiler_is_imported() -> None:
    said = subprocess.run([sys.executable, "-c", RUN], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]
