"""A small classifier that knows its digits, asked to forget two of them, for tests of other people's methods."""

import torch
from torch import Tensor
from torch.nn import functional

from core.config import PipelineConfig, SupportedDatasets, SupportedVisionModels
from model import HookedModel, capture, inspecting, vision_model_loader
from unlearn.registry import Context
from utils_data import UnlearningDataset, get_unlearning_dataset

CLASSES, CPU = (4, 7), torch.device("cpu")


class Flat(HookedModel):
    """One linear layer on the pixels."""

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C H W]."""
        return images.flatten(1)


def digits() -> UnlearningDataset:
    """DIGITS, CLASSES to forget."""
    return get_unlearning_dataset(SupportedDatasets.DIGITS, 32, CLASSES)


def context_of(model: HookedModel, data: UnlearningDataset, untrained: HookedModel | None = None) -> Context:
    """A request to forget CLASSES; `untrained`: the same classifier with initial weights."""
    made = None if untrained is None else lambda: untrained
    config = PipelineConfig(forget_class=CLASSES)
    return Context(model, data, config, CPU, lambda top_k: torch.zeros(1), untrained=made)


def knowing(data: UnlearningDataset) -> Context:
    """An MLP with some knowledge: 60 steps on all training images."""
    torch.manual_seed(0)
    fresh, model = (vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8).eval() for _ in range(2))
    images, labels = data.splits["train"].batch(slice(None))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return context_of(model, data, fresh)


def read_by_the_last(model: HookedModel, images: Tensor) -> Tensor:
    """What the last layer reads in a forward pass of images, [B, n]."""
    with inspecting(model), torch.inference_mode(), capture(model.linears[-1]) as record:
        model(images)
    return record.take()[0].clone()
