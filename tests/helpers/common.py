"""What several test files use: a tiny run, the shape of a log line, small graphs over several layers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from commands.command_line import Environment, Settings, call
from core.config import (
    GCNConfig,
    GraphConfig,
    Objectives,
    PipelineConfig,
    RefineConfig,
    ReporterConfig,
    SFTConfig,
    TrainConfig,
)
from graphs.layout import WeightGraph
from measure.metrics import Choose, Evidence, Outputs
from model import HookedMLPClassifier, HookedModel

LOG_LINE = re.compile(r"\[ *\d+\.\d s\] \S")
TINY = """
device: cpu
topK_list: [300]
kappa_list: [100, 400]
train: {epochs: 2, batch_size: 64}
graph: {num_samples: 640}
gcn: {objective: elbo, steps: 3, batch_size: 4, hidden_dim: 8}
refine: {steps: 2}
sft: {steps: 3}
eval: {methods: [mimu, mimu_refined, taylor_mask, random, sft, default], metrics: [core], references: 0}
reporter: {formats: []}
"""
GCN = GCNConfig(objective=Objectives.elbo, steps=3, batch_size=4, hidden_dim=8)
NO_MODEL = HookedMLPClassifier(3, 1, 2)
NET_5432 = WeightGraph(((4, 5), (3, 4), (2, 3)), (True, True))
APART = WeightGraph(((4, 5), (2, 3)), (False,))
MIXED = WeightGraph(((4, 5), (7, 6), (3, 7)), (False, True))


def settings_of(words: list[str]) -> PipelineConfig:
    """The configuration that `main.py run` makes of these words."""
    found = []

    def command(settings: Settings) -> None:
        found.append(settings)

    assert call(command, words, "run", Environment(lambda folder: folder)) == 0
    return found[0]


def held(outputs: Outputs) -> torch.Tensor:
    """Logits [S, C] of outputs that hold theirs."""
    assert isinstance(outputs.logits, torch.Tensor)
    return outputs.logits


def twice(outputs: Outputs) -> Outputs:
    """Every image two times in a row, so that both halves of the set are the outputs written down."""
    kept, places = outputs.logits, torch.arange(len(outputs.labels)).repeat_interleave(2)
    if isinstance(kept, torch.Tensor):
        return Outputs(kept[places], outputs.labels[places])
    again = replace(kept, make=lambda: (part.repeat_interleave(2, 0) for part in kept.make()))
    return Outputs(again, outputs.labels[places], outputs.per_image.at(places))


def evidence(split: str = "test", model: HookedModel | None = None, **given: Any) -> Evidence:
    """Evidence of a model from outputs written down: test=(forget, retain), val=..., train=...

    Metrics of training images read half of them: `train` holds what they shall read. Other keywords (original,
    retrained, untrained, images, forget_class) go to `Evidence` as they are.
    """
    sets = {name: given.pop(name) for name in ("train", "val", "test") if name in given}
    if "train" in sets:
        sets["train"] = tuple(map(twice, sets["train"]))

    def outputs(split: str, is_forget_set: bool) -> Outputs:
        return sets[split][0 if is_forget_set else 1]

    def images(split: str, is_forget_set: bool, choose: Choose | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("this evidence has no images")

    facts: dict[str, Any] = {"mask_layer": -2, "forget_class": (0,), "seed": 0, "device": torch.device("cpu")}
    return Evidence(model or NO_MODEL, outputs, split, **({"images": images} | facts | given))


def tiny(output_dir: Path, **changes: Any) -> PipelineConfig:
    """Four points on DIGITS in seconds, without figures."""
    config = PipelineConfig(
        output_dir=output_dir,
        device="cpu",
        topK_list=(300, 2000),
        kappa_list=(100, 400),
        train=TrainConfig(epochs=2, batch_size=64),
        graph=GraphConfig(num_samples=640),
        gcn=GCN,
        refine=RefineConfig(steps=2),
        sft=SFTConfig(steps=3),
        reporter=ReporterConfig(formats=()),
    )
    return replace(config, **changes)
