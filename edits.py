"""Rivals that change a classifier's weights or outputs in closed form: nothing is trained.

Each is a decorated function as in `methods.py`, with its source and the settings that it is tuned over.
"""

import copy
from collections.abc import Generator

import torch
from torch import Tensor, nn

from methods import Context, Point, method
from model import HookedModel

LOW_LOGIT = -1e4  # stands for -inf, whose product with a probability of 0 is no number


class DroppedLogits(nn.Linear):
    """A classifier's last layer with the logits of some classes set to LOW_LOGIT."""

    def __init__(self, layer: nn.Linear, classes: tuple[int, ...]):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.classes = classes

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).index_fill(-1, torch.tensor(self.classes, device=input.device), LOW_LOGIT)


@method("logit_drop", "logit drop", source="control: the trivial answer")
def logit_drop(context: Context, point: Point) -> Generator[HookedModel]:
    """Never answer with a forgotten class: its logit is set to -inf, no weight is changed."""
    context.allowed = {}
    model = copy.deepcopy(context.model)
    model.linears[-1] = DroppedLogits(model.target(-1), context.config.forget_labels)
    yield model.eval()
