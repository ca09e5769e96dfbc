"""Every dataset, in its true format and tiny, goes through the whole pipeline with both models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.cifar as cifar
import torchvision.datasets.svhn as svhn

from core.config import (
    DataConfig,
    EvalConfig,
    GCNConfig,
    GraphConfig,
    PipelineConfig,
    ReporterConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TrainConfig,
)
from imagenet_classes import IMAGENET2012_CLASSES
from pipeline import Pipeline
from tests.helpers.formats import write_cifar, write_mnist, write_svhn, write_tree

PLANTS = [f"plant_{i:02}" for i in range(6)]


def _mnist(root: Path) -> None:
    write_mnist(root, np.arange(80) % 10)


def _cifar10(root: Path) -> None:
    names = {**{f"data_batch_{i}": 20 for i in range(1, 6)}, "test_batch": 20}
    write_cifar(root, "cifar-10-batches-py", names, "labels", 10)


def _imagenet(root: Path) -> None:
    """Shards as the archives unpack: flat, the class at the end of the name; all 1,000 classes."""
    for place, wnid in enumerate(IMAGENET2012_CLASSES):
        write_tree(root, [f"train_images_{place % 2}"], 2, f"{wnid}_{{}}_{wnid}.JPEG")
        write_tree(root, ["val_images"], 1, f"ILSVRC2012_val_{{:08}}_{wnid}.JPEG")


def _pokemon(root: Path) -> None:
    """Splits that share no class, as the official ones nearly do."""
    write_tree(root, ["train/Abra", "train/Onix", "valid/Mew", "test/Zubat"], 9)


# dataset -> writer, a class to forget by name, and its number
SETS: dict[str, tuple[Callable[[Path], object], str | int, int]] = {
    "DIGITS": (lambda root: None, "three", 3),
    "FASHION_MNIST": (_mnist, "Ankle Boot", 9),
    "MNIST": (_mnist, 4, 4),
    "CIFAR10": (_cifar10, "airplane", 0),
    "CIFAR100": (
        lambda root: write_cifar(root, "cifar-100-python", {"train": 400, "test": 100}, "fine_labels", 100),
        "aquarium fish",
        1,
    ),
    "SVHN": (lambda root: write_svhn(root, 80), "zero", 0),
    "IMAGENET_SMALL": (_imagenet, "n15075141", 999),
    "PLANT_CLASSIFICATION": (
        lambda root: write_tree(root, [f"{split}/{name}" for split in ("train", "test") for name in PLANTS], 5),
        "plant 05",
        5,
    ),
    "POKEMON_CLASSIFICATION": (_pokemon, "zubat", 3),
}
# Figures take longer than all else; these have the fewest and the most classes.
DRAWN = {("POKEMON_CLASSIFICATION", "HookedMLPClassifier"), ("IMAGENET_SMALL", "HookedMLPClassifier")}
SHAPES = {"DIGITS": (10, 1, 8), "FASHION_MNIST": (10, 1, 28), "MNIST": (10, 1, 28)}
SHAPES |= {"CIFAR10": (10, 3, 32), "CIFAR100": (100, 3, 32), "SVHN": (10, 3, 32)}
SHAPES |= {"IMAGENET_SMALL": (1000, 3, 12), "PLANT_CLASSIFICATION": (6, 3, 12), "POKEMON_CLASSIFICATION": (4, 3, 12)}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, (write, _, _) in SETS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write(made[name])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("model", list(SupportedVisionModels))
@pytest.mark.parametrize("name", SETS)
def test_whole_pipeline(name, model, roots, tmp_path, monkeypatch):
    for room in (cifar, svhn):
        monkeypatch.setattr(room, "check_integrity", lambda *_: True)
    _, forget, label = SETS[name]
    config = PipelineConfig(
        model_architecture=model,
        vision_dataset=SupportedDatasets[name],
        forget_class=(forget,),
        dataset_path=roots[name],
        output_dir=tmp_path,
        device="cpu",
        topK_list=(300,),
        kappa_list=(100,),
        data=DataConfig(image_size=12, num_workers=0, max_train_samples=200 if name == "DIGITS" else None),
        train=TrainConfig(epochs=1, batch_size=64),
        graph=GraphConfig(num_samples=64, min_per_class=4),
        gcn=GCNConfig(steps=2, hidden_dim=4, passes=1, requests_per_step=2),
        eval=EvalConfig(methods=("mimu", "default"), metrics=("core",), references=0),
        reporter=ReporterConfig(dpi=20, formats=("png",) if (name, model.value) in DRAWN else ()),
    )
    (record,) = Pipeline(config).run()
    assert Pipeline(config).stages.setup.shape == SHAPES[name]
    assert (record["forget_class"], record["dataset"], record["skipped_images"]) == ([label], name, [])
    assert record["methods"]["mimu"]["weights_changed"] == 100
    assert all(np.isfinite(record["methods"][method]["forget_loss"]) for method in ("mimu", "default"))
    assert (tmp_path / record["mask_path"]).exists()
