"""What a record's name depends on: every field of the schema is either in it, or cannot move a figure."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from core.choices import OpenChoice
from core.config import (
    GIVEN,
    PROJECT_ROOT,
    EvalConfig,
    GCNConfig,
    GraphConfig,
    KappaModes,
    MaskStrategies,
    Objectives,
    PipelineConfig,
    RefineConfig,
    SFTConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TrainConfig,
)
from core.hashes import key_of
from core.records import Record
from core.store import Stage
from data import GraphGenerator
from measure.auto_kappa import Search
from model import save_classifier, vision_model_loader
from pipeline import Pipeline
from stages import gcn, setup
from stages.classifier import CLASSIFIER_FILE
from stages.evaluation import Evaluation
from unlearn.requests import Unlearner
from utils_data import get_unlearning_dataset

MLP = SupportedVisionModels.HookedMLPClassifier
CPU = torch.device("cpu")

SAME = {
    "output_dir": "says where files lie",
    "resume": "an interrupted training that goes on ends in the same weights (test_resume)",
    "tracker": "shows curves, changes none",
    "reporter.formats": "records are drawn, not measured",
    "reporter.dpi": "records are drawn, not measured",
    "data.num_workers": "threads that decode images; the pixels are the same",
    "data.cache_gb": "whether decoded pixels are kept; they are the same",
    "data.max_pixels": "an image of more is refused or left out: which images take part is told by the images",
    "data.skip_bad_images": "which images take part is told by the images themselves",
    "train.ddp_timeout": "when a training fails, not what it learns",
    "train.ddp_restarts": "when a training fails, not what it learns",
    "train.save_seconds": "how often a state is saved",
}
"""Fields that two runs of one name may differ in, and why no figure can. Every other field, a new one too, counts."""

OTHER: dict[str, object] = {
    "forget_class": (1,),
    "mask_layer": (-1,),
    "topK_list": (500,),
    "kappa_list": (50,),
    "model_architecture": SupportedVisionModels.HookedResnet,
    "device": "cuda",
    "auto.method": "mimu",
    "data.max_train_samples": 900,
    "data.max_test_samples": 200,
    "data.image_size": 16,
    "data.num_workers": 1,
    "data.sample_bits": 12,
    "gcn.train_classes": (0, 1),
    "gcn.train_seeds": (1,),
    "gcn.train_batch_sizes": (32,),
    "eval.methods": ("mimu", "default"),
    "eval.metrics": ("core",),
    "eval.mask_strategy": MaskStrategies.feasibility,
    "reporter.formats": ("svg",),
    "plugins": (PROJECT_ROOT / "tests/helpers/plugin.py",),
}
"""Another value, where none follows from the field's own."""


def names(config: object, prefix: str = "") -> Iterator[str]:
    """Every field of a configuration, dotted."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from names(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def value_of(config: object, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def changed(config: Any, name: str, value: object) -> Any:
    head, _, rest = name.partition(".")
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def another(config: PipelineConfig, name: str) -> object:
    """A value of a field that it does not have."""
    value = value_of(config, name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum | OpenChoice):
        return next(one for one in type(value) if one is not value)
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 0.9
    raise AssertionError(f"{name} is a new kind of field: give it another value in OTHER")


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Stages whose products hold nothing but the hash of what they would be made from; no point is measured."""

    def build(folder: Path, label: str, inputs: dict, make: object) -> Stage:
        key = key_of({"folder": folder.name} | inputs)
        path = tmp_path / "stages" / key
        path.mkdir(parents=True, exist_ok=True)
        for name in (CLASSIFIER_FILE, gcn.GCN_FILE):
            (path / name).write_text(key)
        return Stage(path, key, {}, 0.0)

    monkeypatch.setattr(setup, "build_stage", build)
    monkeypatch.setattr(Evaluation, "_measure", lambda self, record, path: record)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gcn, "check_memory", lambda *_: None)  # of a GPU that is not here


def records(config: PipelineConfig) -> list[Record]:
    """The records of a run's points, not measured."""
    run, search = Pipeline(config), Search(kappa=100, achieved=True, attempts=())
    if config.kappa is KappaModes.auto:
        return [run.run_single_evaluation_round(top_k, 100, search) for top_k in config.topK_list]
    return [run.run_single_evaluation_round(top_k, kappa) for top_k in config.topK_list for kappa in config.kappa_list]


def ids(config: PipelineConfig) -> set[str]:
    return {record["id"] for record in records(config)}


def runs(config: PipelineConfig) -> set[str]:
    return {record["run"] for record in records(config)}


def tree(folder: Path, shift: int) -> Path:
    for number, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (16, 16), (20 * number + shift, 5 * index, 90)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Path]:
    """A classifier, graphs of it, and a network for them, as files; tests only read them."""
    tmp_path = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    model = vision_model_loader(MLP, 10, 1, 8).eval()
    paths = {"trained_vision_model_path": tmp_path / "classifier.safetensors", "gcn_path": tmp_path / "gcn.safetensors"}
    save_classifier(model, paths["trained_vision_model_path"], MLP, (10, 1, 8), {})
    unlearner = Unlearner.fresh(GCNConfig(hidden_dim=8))
    unlearner.gcn.save(paths["gcn_path"], unlearner.facts)
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 64)
    paths["graph_dir"] = tmp_path / "graphs"
    paths["graph_dir"].mkdir()
    GraphGenerator(model, data, -2, GraphConfig(num_samples=640)).generate(paths["graph_dir"])
    return paths


def base(folder: Path, name: str, given: dict[str, Path]) -> PipelineConfig:
    """The configuration in which a field is changed: one in which it could have an effect."""
    config = PipelineConfig(output_dir=folder / "out", device="cpu", topK_list=(300,), kappa_list=(100, 200))
    if name.startswith("auto."):
        return replace(config, kappa=KappaModes.auto)
    if name in ("dataset_path", "data.image_size", "data.sample_bits", "data.cache_gb", "data.max_pixels"):
        return replace(config, vision_dataset=SupportedDatasets.FOLDER, dataset_path=tree(folder / "a", 0))
    if name == "train.num_workers":
        return replace(config, train=replace(config.train, use_ddp=True))
    if name == "graph_dir":
        return replace(config, trained_vision_model_path=given["trained_vision_model_path"])
    return config


@pytest.mark.parametrize("name", list(names(PipelineConfig())))
def test_every_field_counts_or_cannot_matter(name, given, stand_ins, tmp_path):
    config = base(tmp_path, name, given)
    if name in GIVEN:
        other = replace(config, **{name: given[name]})
    elif name == "vision_dataset":
        other = replace(config, vision_dataset=SupportedDatasets.FOLDER, dataset_path=tree(tmp_path / "a", 0))
    elif name == "dataset_path":
        other = replace(config, dataset_path=tree(tmp_path / "b", 100))
    else:
        value = tmp_path / "elsewhere" if name == "output_dir" else another(config, name)
        other = changed(config, name, value)
    one, two = ids(config), ids(other)
    assert one == two if name in SAME else not one & two


@pytest.mark.parametrize("name", sorted(set(names(TrainConfig(), "train.")) - set(SAME)))
def test_the_recipe_of_references_counts_where_a_classifier_is_given(name, given, stand_ins, tmp_path):
    """They are trained as `train` says, whoever trained the classifier."""
    config = replace(base(tmp_path, name, given), **given)
    other = changed(config, name, another(config, name))
    assert not ids(config) & ids(other)
    alone = EvalConfig(methods=("mimu", "default"), metrics=("core",), references=0)
    assert ids(replace(config, eval=alone)) == ids(replace(other, eval=alone))


def test_a_given_network_is_another_run(given, stand_ins, tmp_path):
    """By contents, not by path; kappa's mode and the target of a search count too."""
    config = base(tmp_path, "", given)
    handed, automatic = replace(config, gcn_path=given["gcn_path"]), replace(config, kappa=KappaModes.auto)
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(given["gcn_path"].read_bytes())
    changes = [config, handed, automatic, replace(handed, kappa=KappaModes.auto), changed(automatic, "auto.tau", 5.0)]
    found = [runs(one) for one in changes]
    assert all(len(one) == 1 for one in found)
    assert len(set.union(*found)) == len(changes)
    assert runs(replace(config, gcn_path=copied)) == runs(handed)
    unlearner = Unlearner.fresh(GCNConfig(hidden_dim=8))  # other random weights
    unlearner.gcn.save(copied, unlearner.facts)
    assert runs(replace(config, gcn_path=copied)) != runs(handed)


def test_networks_of_each_topk_are_one_run(given, stand_ins, tmp_path):
    """The ELBO trains one for each top_k, and a sweep over top_k is one run all the same."""
    config = replace(base(tmp_path, "", given), gcn=GCNConfig(objective=Objectives.elbo), topK_list=(300, 500))
    assert len({record["gcn_path"] for record in records(config)}) == 2
    assert len(runs(config)) == 1
    assert len(ids(config)) == 4


# --- by measuring -----------------------------------------------------------------------------------------


def tiny(folder: Path, given: dict[str, Path], **changes: Any) -> PipelineConfig:
    return replace(
        PipelineConfig(
            output_dir=folder,
            device="cpu",
            topK_list=(300,),
            kappa_list=(100,),
            refine=RefineConfig(steps=2),
            sft=SFTConfig(steps=3),
            eval=EvalConfig(methods=("mimu", "random", "default"), metrics=("core",), references=0),
            **given,
        ),
        **changes,
    )


def figures(record: dict) -> object:
    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untimed(item) for key, item in value.items() if not key.startswith("seconds")}
        return value

    return untimed({split: record[split] for split in ("methods", "validation", "class_probability")})


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.lr", 0.5), ("train.epochs", 7), ("graph.num_samples", 99), ("train.save_seconds", 0.0), ("resume", True)],
)
def test_one_name_one_set_of_figures(name, value, given, tmp_path):
    """Where everything is given and nothing retrained, these fields do nothing: measured anew, the same to the bit."""
    config = tiny(tmp_path / "one", given)
    (one,) = Pipeline(config).eval()
    (two,) = Pipeline(changed(replace(config, output_dir=tmp_path / "two"), name, value)).eval()
    assert one["id"] == two["id"]
    assert figures(one) == figures(two)


@pytest.mark.slow
def test_references_of_another_recipe_are_measured_anew(given, tmp_path):
    """In one folder, a second run with more epochs gives what it gives in a folder of its own."""
    measured = EvalConfig(methods=("mimu", "retrain", "default"), metrics=("core", "retrain"))
    short = tiny(tmp_path / "one", given, eval=measured, train=TrainConfig(epochs=1, batch_size=512))
    long = replace(short, train=TrainConfig(epochs=6, batch_size=64))
    (first,), (second,) = Pipeline(short).eval(), Pipeline(long).eval()
    (fresh,) = Pipeline(replace(long, output_dir=tmp_path / "two")).eval()
    assert figures(second) == figures(fresh)
    assert second["id"] == fresh["id"] != first["id"]
    assert second["methods"]["mimu"]["avg_gap"] != first["methods"]["mimu"]["avg_gap"]
