"""Small models of transformers; a test that asks for one is skipped where the library is not installed."""

from typing import Any

import pytest
import torch


def made_by_transformers(kind: str, **more: Any) -> tuple[Any, Any]:
    """A small model of a kind, and the image processor that goes with it."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"num_labels": 5, "image_size": 32, **more}
    tokens = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    square = {"height": 32, "width": 32}
    if kind == "vit":
        made = t.ViTForImageClassification(t.ViTConfig(**tokens, patch_size=8, **small))
        return made, t.ViTImageProcessor(size=square)
    if kind == "deit":
        made = t.DeiTForImageClassification(t.DeiTConfig(**tokens, patch_size=8, **small))
        return made, t.DeiTImageProcessor(size={"height": 37, "width": 37}, crop_size=square)
    if kind == "swin":
        sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 2}
        return t.SwinForImageClassification(t.SwinConfig(**sizes, **small)), t.ViTImageProcessor(size=square)
    small.pop("image_size")
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        made = t.ResNetForImageClassification(t.ResNetConfig(**sizes, **small))
    else:
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
        made = t.ConvNextForImageClassification(t.ConvNextConfig(**sizes, **small))
    return made, t.ConvNextImageProcessor(size={"shortest_edge": 32})
