"""Diagonal empirical Fisher information: mean squared gradients of the cross-entropy, one value per parameter.

Two estimates of different meaning. Of batch means, as the original SSD computes it (arXiv:2308.07707):
I = mean_b (dL_b/dW)^2 with L_b the mean loss of a batch. Per sample: I = mean_s (dL_s/dW)^2, free of the batch size.
Labels are the true ones; BatchNorm is in eval mode; nothing is drawn, so equal images give equal results.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import HookedModel, capture, inspecting
from utils_data import Images, make_loader

Fisher = dict[str, Tensor]
"""I >= 0 in nats squared per unit of weight squared, float64, by parameter name, of the parameter's shape."""
SSD_BATCH = 64  # of the original SSD
LINEAR_BATCH = 1024  # of samples whose gradients stay outer products


def batch_fisher(model: HookedModel, images: Images, device: torch.device, batch_size: int = SSD_BATCH) -> Fisher:
    """Mean over batches of the squared gradient of a batch's mean loss; the last batch may be short.

    Args:
        images: in this order, S of them. batch_size: the estimate shrinks with it, roughly as 1 / batch_size.
    """
    with inspecting(model), torch.enable_grad():
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        loader = make_loader(images, batch_size)
        for batch, labels in loader:
            loss = functional.cross_entropy(model(batch.to(device)), labels.to(device))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.double().square()
    return {name: value / len(loader) for name, value in total.items()}


def sample_fisher(model: HookedModel, images: Images, device: torch.device) -> Fisher:
    """Mean over samples of the squared gradient of a sample's own loss.

    The gradient of a linear layer is delta h^T, so the sum over samples is (delta^2)^T (h^2), delta [S, m], h [S, n];
    a model with parameters of other kinds is differentiated sample by sample (faster on a CPU than `torch.func.vmap`).
    """
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if set(layers) != {name for name, _ in model.named_parameters()}:
        return batch_fisher(model, images, device, batch_size=1)
    return {name: total / len(images) for name, total in _linear_squares(model, layers, images, device).items()}


def _linear_squares(
    model: HookedModel, layers: Mapping[str, nn.Linear], images: Images, device: torch.device
) -> Fisher:
    """Sum over samples of squared gradients, [m, n] for each linear layer."""
    total = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}
    with inspecting(model), torch.enable_grad(), ExitStack() as stack:
        for layer in layers.values():
            layer.requires_grad_(True)
        records = [stack.enter_context(capture(layer)) for layer in layers.values()]
        for batch, labels in make_loader(images, LINEAR_BATCH):
            loss = functional.cross_entropy(model(batch.to(device)), labels.to(device), reduction="sum")
            inputs, outputs = zip(*(record.take() for record in records), strict=True)
            deltas = torch.autograd.grad(loss, outputs)
            for name, h, delta in zip(layers, inputs, deltas, strict=True):
                total[name] += delta.double().square().T @ h.detach().double().square()
    return total
