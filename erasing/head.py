"""The forgotten classes' rows of the last layer, as a network that never saw the classes would have them.

A mask alone leaves the old row, whose remaining weights still rank forgotten images above others, and ten images bring
it back. New rows are drawn and trained on retained images alone, features fixed: that is all that retraining would
ever tell them.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from core.config import derive_seed
from erasing.stages import Stages
from models.targets import find_targets, head_of
from training.optimisers import Adam

EPOCHS, BATCH, RATE = 8, 512, 3e-3
LEAST_STEPS = 200  # more epochs where there are few images


class NoLinearHead(Exception):
    """The logits do not come from a linear layer with a row for each class, so that no row can be drawn anew."""


def last_layer(stages: Stages) -> tuple[str, nn.Linear]:
    """Name of the module that gives the logits, and the module.

    Raises:
        NoLinearHead: it is no linear layer, or the logits are not its output.
    """
    model = stages.model
    name = head_of(find_targets(model.net, model.examples), model.num_classes).name.rpartition(".")[0]
    layer = model.net.get_submodule(name)
    if type(layer) is not nn.Linear:  # of a subclass the weight may not be what the layer multiplies with
        raise NoLinearHead(f"{name} is no linear layer")
    return name, layer


@contextmanager
def reading(module: nn.Module) -> Generator[list[Tensor]]:
    """What a module reads in each call within the block."""
    heard: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].detach()))
    try:
        yield heard
    finally:
        handle.remove()


def new_rows(stages: Stages, weights: Sequence[Tensor] | None, h: Tensor, classes: Sequence[int], seed: int) -> Tensor:
    """Draw the classes' rows anew and train them on retained images, Adam, everything else fixed.

    Args:
        stages: the classifier. weights: of its targets, masked, [m, n] each; None: as they are.
        h: rows of retained images, [S, numbers]; none is of the classes.

    Returns:
        The rows, [classes, d]; the classes' entries of a bias stay as they are.

    Raises:
        NoLinearHead: there are no such rows.
    """
    name, layer = last_layer(stages)
    with reading(layer) as heard:
        logits = stages.logits(h, weights)
    features = torch.cat(heard).float()
    if features.dim() != 2 or logits.shape[1] != layer.out_features:
        raise NoLinearHead(f"{name} reads {list(features.shape)}, and gives {layer.out_features} of the logits")
    generator = torch.Generator().manual_seed(derive_seed(seed, "erasing", "rows", *classes))
    bound, chosen = features.shape[1] ** -0.5, torch.tensor(classes, device=h.device)
    drawn = 2 * torch.rand(len(classes), features.shape[1], generator=generator) - 1
    row = (bound * drawn).to(h.device)
    bias = row.new_zeros(()) if layer.bias is None else layer.bias.detach()[chosen]
    rest = logits.index_fill(1, chosen, -torch.inf).logsumexp(1, keepdim=True)
    optimizer = Adam([row], RATE)
    for _ in range(max(EPOCHS, -(-LEAST_STEPS * BATCH // len(h)))):
        for part in torch.randperm(len(h), generator=generator).split(BATCH):
            # No image is of these classes, so that the gradient of the cross-entropy by their logits is their share.
            read = features[part]
            share = torch.cat([rest[part], read @ row.T + bias], 1).softmax(1)[:, 1:]
            row.grad = share.T @ read / len(part)
            optimizer.step()
    return row.to(layer.weight.dtype)
