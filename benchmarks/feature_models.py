"""Classifiers whose features are judged, and models retrained without a class to judge them beside; Fashion-MNIST."""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import DataConfig, EvalConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels
from eval import Eval
from model import HookedModel, vision_model_loader
from unlearn.registry import Context, NotApplicable
from utils_data import UnlearningDataset, get_unlearning_dataset

IMAGES, RATE, BATCH = 15_000, 2e-3, 128
REFERENCES, FIRST_REFERENCE = 3, 100
DATASET = SupportedDatasets.FASHION_MNIST


@dataclass(frozen=True)
class Recipe:
    """How classifiers of one kind are trained, with AdamW at a one-cycle rate, and what is measured of them.

    Args:
        mask_layer: of methods that have one. metrics: groups or names.
    """

    architecture: SupportedVisionModels
    epochs: int
    mask_layer: tuple[int, ...]
    metrics: tuple[str, ...]

    def file(self, seed: int, without: int | None) -> str:
        """Name of a trained classifier's file, by all that it depends on here."""
        return f"{self.architecture}-{IMAGES}-{BATCH}-{RATE}-{self.epochs}-{seed}-{without}.pt"


CHEAP = ("probe_layers_gap", "auc_layers_gap", "knn_layers_gap", "forget_auroc", "constant_recall")
RECIPES = {
    "mlp": Recipe(SupportedVisionModels.HookedMLPClassifier, 10, (0, 1, 2), ("core", "features")),
    "resnet": Recipe(
        SupportedVisionModels.HookedResnet, 2, (0, 1), ("core", *CHEAP, "relearn_area_10", "fresh_head_10")
    ),
}


@cache
def images_of(label: int) -> UnlearningDataset:
    """The images, one class of which is to forget."""
    return get_unlearning_dataset(DATASET, BATCH, label, data=DataConfig(max_train_samples=IMAGES))


class Models:
    """Classifiers of one recipe, by their seeds.

    Args:
        folder: where trained ones are kept, and taken from; None: they are trained by every process.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None):
        self.recipe, self.folder = recipe, folder
        self.known: dict[tuple[int, int | None], HookedModel] = {}

    def fresh(self, seed: int) -> HookedModel:
        """A classifier with initial weights."""
        torch.manual_seed(seed)  # of layers' initial weights, which have no argument for it
        return vision_model_loader(self.recipe.architecture, 10, 1, 28)

    def trained(self, seed: int, without: int | None = None) -> HookedModel:
        """A classifier, or one that never sees a class."""
        key = seed, without
        if key not in self.known:
            file = self.folder and self.folder / self.recipe.file(*key)
            model = self.fresh(seed)
            if file and file.exists():
                model.load_state_dict(torch.load(file, weights_only=True))
            else:
                self._train(model, *key)
            if file and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), file)
            self.known[key] = model.eval().requires_grad_(False)
        return self.known[key]

    def _train(self, model: HookedModel, seed: int, without: int | None) -> None:
        pixels, labels = images_of(0 if without is None else without).splits["train"].batch(slice(None))
        kept = labels != (-1 if without is None else without)
        pixels, labels = pixels[kept], labels[kept]
        optimizer, order = torch.optim.AdamW(model.train().parameters(), RATE), torch.Generator().manual_seed(seed)
        steps = self.recipe.epochs * -(-len(labels) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(self.recipe.epochs):
            for part in torch.randperm(len(labels), generator=order).split(BATCH):
                loss = nn.functional.cross_entropy(model(pixels[part]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def judge(self, seed: int, label: int) -> Eval:
        """What measures edits of a classifier that is to forget a class."""
        judged = EvalConfig(metrics=self.recipe.metrics, references=REFERENCES)
        config = PipelineConfig(forget_class=(label,), vision_dataset=DATASET, eval=judged)
        config = replace(config, mask_layer=self.recipe.mask_layer, seed=seed)
        context = Context(
            self.trained(seed),
            images_of(label),
            config,
            torch.device("cpu"),
            _no_network,
            retrain=partial(self._retrained, label),
            untrained=lambda: self.fresh(seed),
        )
        return Eval(context)

    def _retrained(self, label: int, index: int) -> HookedModel:
        return self.trained(FIRST_REFERENCE + index, label)


MLPS = Models(RECIPES["mlp"])


def _no_network(_: int) -> Tensor:
    """No method of these tables asks a graph network."""
    raise NotApplicable("asks a graph network, and there is none")
