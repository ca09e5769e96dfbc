"""The whole pipeline, in this process, on DIGITS: records, repeatability, reuse, and every stage alone."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from core.artifacts import read_json, read_tensors
from core.config import (
    Aggregations,
    DataConfig,
    EvalConfig,
    GCNConfig,
    GCNPriorDistribution,
    GraphConfig,
    MaskStrategies,
    PipelineConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
    TrainConfig,
    UserError,
    derive_seed,
)
from core.records import Record
from data import GraphGenerator
from eval import Eval
from model import save_classifier, vision_model_loader
from pipeline import Pipeline
from tests.helpers.common import GCN, tiny
from tests.helpers.records import untimed
from trainer import GCNTrainer, VisionModelTrainer
from utils_data import stratified

MLP, RESNET = SupportedVisionModels.HookedMLPClassifier, SupportedVisionModels.HookedResnet
POINTS = [(300, 100), (300, 400), (2000, 100), (2000, 400)]
METHODS = {"mimu", "mimu_refined", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default"}
KEYS = {
    *("schema", "id", "model", "dataset", "forget_class", "mask_layer", "num_graph_vertices", "num_graph_edges"),
    *("top_k", "kappa", "seed", "classifier_path", "gcn_path", "mask_path", "provenance", "methods"),
    *("objective", "auto", "answer", "mask_paths"),
}
FIVE = {"forget_loss", "retain_loss", "forget_probability", "forget_score", "retain_score"}


def json_path(output_dir: Path, record: dict) -> Path:
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / "eval/metrics_and_plots/json" / point / f"{record['id']}.json"


def untimed_bytes(path: Path) -> str:
    return json.dumps(untimed(read_json(path)), indent=1, sort_keys=True)


def figures(record: dict) -> object:
    return untimed({split: record[split] for split in ("methods", "validation", "class_probability")})


def forbid(monkeypatch, *places: tuple[type, str]) -> None:
    def never(*_, **__):
        raise AssertionError("this stage was to be taken from where it lies")

    for owner, name in places:
        monkeypatch.setattr(owner, name, never)


MAKERS = ((VisionModelTrainer, "train"), (GraphGenerator, "generate"), (GCNTrainer, "train"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[PipelineConfig, list[Record]]:
    """One run of four points; tests only read it."""
    config = tiny(tmp_path_factory.mktemp("whole"))
    return config, Pipeline(config).run()


@pytest.fixture(scope="module")
def products(whole) -> dict[str, Path]:
    """That run's stages, as they are passed in."""
    pipeline = Pipeline(whole[0])
    return {
        "trained_vision_model_path": pipeline.run_vision_model_training(),
        "graph_dir": pipeline.run_gcn_graph_generation(),
        "gcn_path": pipeline.run_gcn_training(300),
    }


# --- what a run returns and writes ------------------------------------------------------------------------


def test_one_record_per_point(whole):
    assert [(record["top_k"], record["kappa"]) for record in whole[1]] == POINTS
    assert len({record["id"] for record in whole[1]}) == len(POINTS)


def test_records_say_what_is_documented(whole):
    config, records = whole
    for record in records:
        assert set(record) >= KEYS
        assert set(record["provenance"]) == {
            *("commit", "dirty", "versions", "device", "repeatability", "started", "seconds", "plugins"),
        }
        assert set(record["methods"]) == METHODS
        for values in record["methods"].values():
            assert set(values) == set(record["metrics"]) | set(record["costs"])
            assert set(values) >= FIVE | {"UA", "RA", "MIA_efficacy", "avg_gap"}
        assert (record["model"], record["dataset"], record["schema"]) == ("HookedMLPClassifier", "DIGITS", "mimu/4")
        assert (record["num_graph_vertices"], record["num_graph_edges"]) == (8192, 1556480)
        assert (record["forget_class"], record["mask_layer"], record["seed"]) == ([0], [-2], 0)
        assert record["provenance"]["device"] == "cpu"
        said = {int(label) for one in record["said_of_samples"].values() for label, _ in one or ()}
        names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        assert record["samples"]["names"] == {str(label): names[label] for label in sorted({0} | said)}
        assert record["provenance"]["repeatability"] == "the same to the bit on this processor with 1 thread"
        for key in ("classifier_path", "gcn_path", "mask_path"):
            assert (config.output_dir / record[key]).is_file()


def test_stages_report_their_seconds(whole):
    for record in whole[1]:
        seconds = record["provenance"]["seconds"]
        assert {"classifier", "graphs", f"gcn_top-{record['top_k']}", "evaluation"} <= set(seconds)
        assert all(value > 0 for value in seconds.values())
        spent = record["methods"]
        assert spent["retrain"]["seconds"] == pytest.approx(seconds["retrained-0"], rel=1e-3)
        assert spent["random"]["seconds_offline"] == spent["retrain"]["seconds_offline"] == 0
        assert spent["taylor_mask"]["seconds_offline"] == pytest.approx(seconds["graphs"] + seconds["checkpoint"])
        learned = seconds["graphs"] + seconds[f"gcn_top-{record['top_k']}"]
        assert learned < spent["mimu"]["seconds_offline"] < learned + 10  # and the importances of all classes
        for values in spent.values():
            assert values["seconds_alone"] == pytest.approx(values["seconds"] + values["seconds_offline"])


def test_disk_holds_what_is_returned(whole):
    config, records = whole
    for record in records:
        assert read_json(json_path(config.output_dir, record)) == record
    written = list((config.output_dir / "eval/metrics_and_plots/json").rglob("*"))
    assert sum(path.is_file() for path in written) == len(records)


def test_mask_files(whole):
    config, records = whole
    for record in records:
        assert set(record["mask_paths"]) == {"mimu", "mimu_refined", "taylor_mask", "random"}
        assert record["mask_path"] == record["mask_paths"]["mimu_refined"]
        for name, place in record["mask_paths"].items():
            tensors, facts = read_tensors(config.output_dir / place)
            mask = tensors["mask"]
            assert list(tensors) == ["mask"]
            assert (mask.shape, mask.dtype, set(np.unique(mask))) == ((64, 128), np.uint8, {0, 1})
            assert (mask == 0).sum() == record["kappa"] == record["methods"][name]["weights_changed"]
            for key in ("id", "model", "dataset", "forget_class", "mask_layer", "top_k", "kappa", "seed"):
                assert facts[key] == record[key]
            assert facts["method"] == name


def test_weights_changed_of_the_others(whole):
    for record in whole[1]:
        changed = {name: values["weights_changed"] for name, values in record["methods"].items()}
        assert (changed["random"], changed["default"]) == (record["kappa"], 0)
        assert 0 < changed["sft"] <= 8192


def digits_test_images() -> tuple[np.ndarray, np.ndarray]:
    """Images [S, 64], normalised by the training images' mean and standard deviation, and labels [S]."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8).reshape(-1, 64)
    test, rest = stratified(digits.target, 0.2, derive_seed(0, "DIGITS", "test"))
    _, train = stratified(digits.target[rest], 0.1, derive_seed(0, "DIGITS", "val"))
    seen = pixels[rest][train].astype(float)
    return (pixels[test] - seen.mean()) / seen.std(), digits.target[test]


def test_numbers_follow_from_the_files(whole):
    """Classifier and mask alone, in numpy, give the recorded test values."""
    config, records = whole
    images, labels = digits_test_images()
    for record in records:
        layers = load_file(config.output_dir / record["classifier_path"])
        first, target, last = (layers[f"linears.{i}.weight"].astype(float) for i in range(3))
        masks = {name: load_file(config.output_dir / path)["mask"] for name, path in record["mask_paths"].items()}
        for name, weight in {"default": target, **{name: target * mask for name, mask in masks.items()}}.items():
            h = np.maximum(images @ first.T, 0)
            logits = np.maximum(h @ weight.T, 0) @ last.T
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            loss = -log_p[np.arange(len(labels)), labels]
            right, forget = logits.argmax(1) == labels, labels == record["forget_class"][0]
            expected = {
                "forget_score": 100 * right[forget].mean(),
                "retain_score": 100 * right[~forget].mean(),
            }
            found = record["methods"][name]
            assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)
            expected = {
                "forget_loss": loss[forget].mean(),
                "retain_loss": loss[~forget].mean(),
                "forget_probability": np.exp(-loss[forget]).mean(),
            }
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


# --- repeatability ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_seed_same_bytes(whole, tmp_path):
    config, records = whole
    for record in Pipeline(replace(config, output_dir=tmp_path)).eval():
        assert untimed_bytes(json_path(tmp_path, record)) == untimed_bytes(json_path(config.output_dir, record))
    for record in records:
        for key in ("classifier_path", "gcn_path"):
            assert (tmp_path / record[key]).read_bytes() == (config.output_dir / record[key]).read_bytes()


@pytest.mark.slow
def test_other_seed_other_numbers(whole, tmp_path):
    config, records = whole
    (record,) = Pipeline(replace(config, output_dir=tmp_path, seed=1, topK_list=(300,), kappa_list=(100,))).eval()
    assert record["id"] != records[0]["id"]
    for name in METHODS:
        assert record["methods"][name]["retain_loss"] != records[0]["methods"][name]["retain_loss"]


@pytest.mark.slow
def test_a_point_alone_is_the_same_point(whole, tmp_path):
    config, records = whole
    (record,) = Pipeline(replace(config, output_dir=tmp_path, topK_list=(2000,), kappa_list=(400,))).eval()
    assert record["id"] == records[-1]["id"]
    assert figures(record) == figures(records[-1])


@pytest.mark.slow
def test_leaving_methods_out_moves_no_number(whole, products, tmp_path):
    config, records = whole
    only = replace(config, output_dir=tmp_path, topK_list=(300,), eval=EvalConfig(methods=("sft", "mimu")), **products)
    for record, known in zip(Pipeline(only).eval(), records[:2], strict=True):
        assert list(record["methods"]) == ["sft", "mimu"]
        assert untimed(record["methods"]) == untimed({name: known["methods"][name] for name in ("sft", "mimu")})


# --- reuse ------------------------------------------------------------------------------------------------


def test_second_run_makes_nothing_again(whole, monkeypatch):
    config, records = whole
    files = {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()}
    forbid(monkeypatch, *MAKERS, (Eval, "eval"))
    assert Pipeline(config).run() == records
    assert {path: path.read_bytes() for path in config.output_dir.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_changed_stage_leaves_earlier_ones(monkeypatch, tmp_path):
    """Another GCN setting, then another kappa, on the same folder."""
    config = tiny(tmp_path, topK_list=(300,), kappa_list=(100,))
    (first,) = Pipeline(config).eval()
    forbid(monkeypatch, *MAKERS[:2])
    (other,) = Pipeline(replace(config, gcn=replace(GCN, lr=0.02))).eval()
    assert other["classifier_path"] == first["classifier_path"]
    assert (other["gcn_path"], other["id"]) != (first["gcn_path"], first["id"])
    forbid(monkeypatch, MAKERS[2])
    (more,) = Pipeline(replace(config, kappa_list=(400,))).eval()
    assert more["gcn_path"] == first["gcn_path"]


@pytest.mark.slow
def test_damaged_stage_is_made_again(whole, tmp_path):
    config = replace(whole[0], output_dir=tmp_path, topK_list=(300,), kappa_list=(100,))
    (record,) = Pipeline(config).eval()
    for key in ("classifier_path", "gcn_path"):
        path = tmp_path / record[key]
        whole_bytes = path.read_bytes()
        path.write_bytes(whole_bytes[:-8])
        assert Pipeline(config).eval() == [record]
        assert path.read_bytes() == whole_bytes


@pytest.mark.slow
def test_lost_mask_is_made_again(products, tmp_path):
    """A record never points at a mask that is not there."""
    config = tiny(tmp_path, topK_list=(300,), kappa_list=(100,), **products)
    (record,) = Pipeline(config).eval()
    path = tmp_path / record["mask_path"]
    mask = path.read_bytes()
    path.unlink()
    (again,) = Pipeline(config).eval()
    assert path.read_bytes() == mask
    assert untimed(again) == untimed(record)


# --- every stage alone ------------------------------------------------------------------------------------


def test_stages_alone(tmp_path):
    """Each call on a pipeline of its own, none of the earlier stages asked for."""
    config = tiny(tmp_path, topK_list=(300,), kappa_list=(100,))
    assert set(load_file(Pipeline(config).run_vision_model_training())) == {f"linears.{i}.weight" for i in range(3)}
    folder = Pipeline(replace(config, output_dir=tmp_path / "graphs")).run_gcn_graph_generation()
    shapes = {name: np.load(folder / f"{name}.npy").shape for name in ("h", "z", "delta", "labels", "weight")}
    assert shapes == {"h": (640, 128), "z": (640, 64), "delta": (640, 64), "labels": (640,), "weight": (64, 128)}
    gcn = Pipeline(replace(config, output_dir=tmp_path / "gcn")).run_gcn_training(700)
    assert all(np.isfinite(value).all() for value in load_file(gcn).values())


@pytest.mark.slow
def test_point_alone_on_a_fresh_pipeline(whole, tmp_path):
    config, records = whole
    record = Pipeline(replace(config, output_dir=tmp_path)).run_single_evaluation_round(300, 400)
    assert figures(record) == figures(records[1])
    assert read_json(json_path(tmp_path, record)) == record


def test_products_passed_in_give_the_same_figures(whole, products, monkeypatch, tmp_path):
    config, records = whole
    shutil.copytree(config.output_dir / "checkpoints/retrained", tmp_path / "checkpoints/retrained")
    forbid(monkeypatch, *MAKERS)
    found = Pipeline(replace(config, output_dir=tmp_path, topK_list=(300,), **products)).eval()
    assert [figures(record) for record in found] == [figures(record) for record in records[:2]]
    assert Path(found[0]["classifier_path"]) == products["trained_vision_model_path"].resolve()


@pytest.mark.parametrize(
    ("architecture", "shape", "message"),
    [(RESNET, (10, 1, 8), "architecture HookedResnet"), (MLP, (7, 1, 8), "num_classes 7"), (MLP, (10, 3, 8), "chan")],
)
def test_classifier_of_another_kind(architecture, shape, message, tmp_path):
    model, path = vision_model_loader(MLP, *shape), tmp_path / "other.safetensors"
    save_classifier(model, path, architecture, shape, {})
    with pytest.raises(UserError, match=message):
        Pipeline(tiny(tmp_path / "out", trained_vision_model_path=path)).run()


def test_graphs_of_another_classifier(products, tmp_path):
    with pytest.raises(UserError, match="graphs of another classifier"):
        Pipeline(tiny(tmp_path, seed=1, graph_dir=products["graph_dir"])).run()


def test_graphs_of_another_layer(products, tmp_path):
    with pytest.raises(UserError, match="graphs of another layer"):
        Pipeline(tiny(tmp_path, mask_layer=0, graph_dir=products["graph_dir"])).run()


def test_classifier_in_place_of_a_gcn(products, tmp_path):
    wrong = products | {"gcn_path": products["trained_vision_model_path"]}
    with pytest.raises(UserError, match="is a classifier, no GCN"):
        Pipeline(tiny(tmp_path, **wrong)).run()


@pytest.mark.parametrize("name", ["trained_vision_model_path", "gcn_path"])
def test_folder_in_place_of_a_file(name, products, tmp_path):
    with pytest.raises(UserError):
        Pipeline(tiny(tmp_path / "out", **(products | {name: tmp_path}))).run()


# --- other settings ---------------------------------------------------------------------------------------


def test_set_difference(whole, products, tmp_path):
    config = replace(whole[0], output_dir=tmp_path, topK_list=(300,), kappa_list=(100,), **products)
    config = replace(config, eval=EvalConfig(methods=("mimu",), mask_strategy=MaskStrategies.set_difference))
    (record,) = Pipeline(config).eval()
    changed = record["methods"]["mimu"]["weights_changed"]
    assert changed <= 300
    assert (load_file(tmp_path / record["mask_path"])["mask"] == 0).sum() == changed


@pytest.mark.slow
def test_every_gcn_setting_learns_something_else(whole, products, tmp_path):
    config = replace(whole[0], output_dir=tmp_path, **{**products, "gcn_path": None})
    choices = [
        *({"sampler": sampler} for sampler in TopKSamplers),
        *({"prior": prior} for prior in GCNPriorDistribution if prior is not GCN.prior),
        *({"aggregation": aggregation} for aggregation in Aggregations if aggregation is not GCN.aggregation),
    ]
    assert len(choices) == 3 + 3 + 1
    learned = [load_file(Pipeline(replace(config, gcn=replace(GCN, **one))).run_gcn_training(300)) for one in choices]
    vectors = [np.concatenate([value.ravel() for _, value in sorted(found.items())]) for found in learned]
    assert all(np.isfinite(vector).all() for vector in vectors)
    assert not [(a, b) for a, b in combinations(range(len(choices)), 2) if np.array_equal(vectors[a], vectors[b])]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.slow
def test_resnet_from_end_to_end(tmp_path):
    """HookedResnet on files in FASHION_MNIST's format: 65,536 vertices, 41,811,968 edges."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 100)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 100, (count, 28, 28)) + 15 * labels[:, None, None]
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    config = tiny(
        tmp_path / "out",
        model_architecture=RESNET,
        vision_dataset=SupportedDatasets.FASHION_MNIST,
        dataset_path=tmp_path,
        forget_class=3,
        topK_list=(1000,),
        kappa_list=(500,),
        data=DataConfig(max_train_samples=150, max_test_samples=80),
        train=TrainConfig(epochs=1, batch_size=64),
        graph=GraphConfig(num_samples=80, min_per_class=8),
        gcn=GCNConfig(steps=1, requests_per_step=1, hidden_dim=4),
    )
    (record,) = Pipeline(config).run()
    assert (record["num_graph_vertices"], record["num_graph_edges"]) == (65536, 41811968)
    assert load_file(config.output_dir / record["mask_path"])["mask"].shape == (128, 512)
    changed = {name: values["weights_changed"] for name, values in record["methods"].items()}
    assert (changed["mimu"], changed["mimu_refined"], changed["random"], changed["default"]) == (500, 500, 500, 0)
    figures = [value for values in record["methods"].values() for value in values.values() if value is not None]
    assert np.isfinite(figures).all()
