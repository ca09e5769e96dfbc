"""What a run says before it computes: its block, what has no effect, sizes that cannot fit, and models near chance."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import main
from core.choices import Importances, KappaModes, MaskStrategies, Objectives, Starts, UserError
from core.config import (
    AutoConfig,
    DataConfig,
    EvalConfig,
    GraphConfig,
    PipelineConfig,
    RefineConfig,
    SFTConfig,
    TrainConfig,
    changed_settings,
)
from core.observe import Tracker, be_quiet
from core.yaml_files import made, merged, typed
from pipeline import Pipeline
from reporting.sentences import warnings
from stages.chain import Stages
from stages.classifier import ClassifierStage
from stages.evaluation import Footing
from stages.preflight import changed, understood, without_effect
from stages.setup import Setup
from tests.helpers.common import TINY
from trainer import WARM_UP, GCNTrainer
from unlearn.objectives import Unlearning
from unlearn.requests import Unlearner


@pytest.fixture(autouse=True)
def loud():
    be_quiet(False)
    yield
    be_quiet(False)


def tiny(folder: Path, **over) -> PipelineConfig:
    small = {
        "gcn": {"objective": "unlearning", "passes": 1, "requests_per_step": 1},
        "eval": {"methods": ["mimu", "default"]},
    }
    values = merged(merged(yaml.safe_load(TINY), small), {"output_dir": str(folder)})
    return made(merged(typed(values, lambda _, text: UserError(text)), typed(over, lambda _, text: UserError(text))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """One tiny run, all of whose products can be given to others."""
    folder = tmp_path_factory.mktemp("first")
    pipeline = Pipeline(tiny(folder, kappa_list=[100]))
    (record,) = pipeline.eval()
    given = {
        "trained_vision_model_path": str(pipeline.run_vision_model_training()),
        "graph_dir": str(pipeline.run_gcn_graph_generation()),
        "gcn_path": str(pipeline.run_gcn_training(300)),
    }
    return folder, {"record": record, "given": given}


def figures(record: dict) -> dict:
    kept = {
        part: {
            name: {key: value for key, value in values.items() if not key.startswith("seconds")}
            for name, values in record[part].items()
        }
        for part in ("methods", "validation")
    }
    return kept | {"footing": record["footing"]}


IDLE = {
    "train": {"epochs": 7, "batch_size": 13, "lr": 0.5, "weight_decay": 0.3, "save_seconds": 3, "num_workers": 2},
    "graph": {"num_samples": 77, "min_per_class": 3, "batch_size": 11},
    "gcn": {"steps": 9, "hidden_dim": 5, "lr": 0.7, "beta": 0.9, "passes": 4, "lambda_retain": 9, "features": "basic"},
    "refine": {"steps": 1, "lr": 5, "start": "noise"},
    "sft": {"steps": 1, "lr": 1, "batch_size": 3},
    "auto": {"tau": 50, "epsilon": 40, "tries": 3},
    "data": {"image_size": 33, "num_workers": 0, "skip_bad_images": True},
    "eval": {"importance": "theta"},
    "resume": True,
    "topK_list": [17],
}


def test_what_is_said_to_have_no_effect_moves_no_figure(finished, tmp_path):
    """Every field that the function names, changed at once: the record's figures stay as they were, to the bit."""
    _, first = finished
    config = tiny(tmp_path, kappa_list=[100], **first["given"], **IDLE)
    pipeline = Pipeline(config)
    stages = pipeline.stages
    said = without_effect(stages.config, stages.objective)
    named = {name for line in said for name in line.removeprefix("no effect: ").partition(" (")[0].split(", ")}
    wanted = {f"{part}.{name}" for part, values in IDLE.items() if isinstance(values, dict) for name in values}
    assert wanted | {"resume", "topK_list"} <= named
    assert all(line.startswith("no effect: ") and line.endswith(")") for line in said)
    assert named <= set(changed(stages.config))
    (record,) = pipeline.eval()
    assert figures(record) == figures(first["record"])


@pytest.mark.parametrize(
    ("config", "objective", "named", "not_named"),
    [
        (PipelineConfig(kappa_list=(7,)), Objectives.unlearning, set(), {"kappa_list"}),
        (PipelineConfig(kappa_list=(7,), kappa=KappaModes.auto), Objectives.unlearning, {"kappa_list"}, {"kappa"}),
        (PipelineConfig(auto=AutoConfig(tau=9)), Objectives.unlearning, {"auto.tau"}, set()),
        (PipelineConfig(auto=AutoConfig(tau=9), kappa=KappaModes.auto), Objectives.unlearning, set(), {"auto.tau"}),
        (PipelineConfig(topK_list=(7, 8)), Objectives.unlearning, {"topK_list"}, set()),
        (PipelineConfig(topK_list=(7, 8)), Objectives.elbo, set(), {"topK_list"}),
        (
            PipelineConfig(topK_list=(7,), eval=EvalConfig(mask_strategy=MaskStrategies.set_difference)),
            Objectives.unlearning,
            set(),
            {"topK_list"},
        ),
        (PipelineConfig(eval=EvalConfig(importance=Importances.theta)), Objectives.elbo, set(), {"eval.importance"}),
        (PipelineConfig(train=TrainConfig(lr=1)), Objectives.unlearning, set(), {"train.lr"}),
        (
            PipelineConfig(train=TrainConfig(lr=1), trained_vision_model_path=Path("c"), eval=EvalConfig(references=1)),
            Objectives.unlearning,
            set(),
            {"train.lr"},
        ),
        (PipelineConfig(refine=RefineConfig(start=Starts.noise)), Objectives.unlearning, set(), {"refine.start"}),
        (PipelineConfig(sft=SFTConfig(steps=3)), Objectives.unlearning, set(), {"sft.steps"}),
        (PipelineConfig(graph=GraphConfig(batch_size=3)), Objectives.unlearning, set(), {"graph.batch_size"}),
        (PipelineConfig(data=DataConfig(image_size=9)), Objectives.unlearning, {"data.image_size"}, set()),
        (
            PipelineConfig(data=DataConfig(image_size=9), vision_dataset="FOLDER"),
            Objectives.unlearning,
            set(),
            {"data.image_size"},
        ),
        (PipelineConfig(dataset_path=Path("x")), Objectives.unlearning, {"dataset_path"}, set()),
        (PipelineConfig(), Objectives.unlearning, set(), {"seed"}),
    ],
)
def test_no_effect_follows_the_settings(config, objective, named, not_named):
    text = " ".join(without_effect(config, objective)).replace(",", " ").split()
    assert named <= set(text)
    assert not not_named & set(text)


def test_the_block_says_what_was_understood(tmp_path, finished):
    _, first = finished
    path = first["given"]["gcn_path"]
    stages = Stages(tiny(tmp_path, forget_class=["three", "0"], gcn_path=path, data={"max_test_samples": 100}))
    lines = understood(stages)
    assert lines[0] == ("dataset: DIGITS, 10 classes (zero, one, two, three, four, five, six, seven, ...)")
    sizes = {name: len(part) for name, part in stages.data.splits.items()}
    assert lines[1] == f"images: {sizes['train']:,} train, {sizes['val']:,} val, {sizes['test']:,} test; 8x8 px, grey"
    assert "left out: images beyond data.max_test_samples 100" in lines
    assert "to forget: zero (label 0), three (label 3)" in lines
    assert f"given: graph network for unlearning {path}" in lines
    assert "to be made, unless it is there: classifier, graphs" in lines
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was computed"


def test_the_block_comes_before_the_training_and_quiet_silences_it(tmp_path, monkeypatch, capsys):
    """main.py run: the block, then the stages; with --quiet not a word."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)

    class Reached(UserError):
        pass

    def reached(_):
        raise Reached("training begins")

    monkeypatch.setattr(ClassifierStage, "train", reached)
    words = ["--config", str(path), "--output-dir", str(tmp_path / "out")]
    for more, quiet in (([], False), (["--quiet"], True)):
        for command in (["run"], ["train-gcn", "--out", str(tmp_path / "g.safetensors")]):
            assert main.main([*command, *words, *more]) == 2
            err = capsys.readouterr().err
            before, _, _ = err.partition("error: training begins")
            assert ("dataset: DIGITS, 10 classes" in before) is not quiet
            assert ("no effect: " in before) is (not quiet and command[0] == "train-gcn")


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"gcn": {"hidden_dim": 100_000}}, "gcn.hidden_dim 100,000, takes at least"),
        ({"gcn": {"hidden_dim": 4096, "num_message_passing_rounds": 1000}}, "lower gcn.hidden_dim"),
        ({"gcn": {"objective": "elbo", "hidden_dim": 64, "batch_size": 10**9}}, "gcn.batch_size"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_size(tmp_path, over, said):
    with pytest.raises(UserError, match="GB of memory, here are") as caught:
        Stages(tiny(tmp_path, **over))
    assert said in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_any_number_of_steps_has_a_schedule(finished, tmp_path, steps):
    """Ten steps leave no room for a warm-up; the rate never exceeds the one that was asked for."""
    _, first = finished
    stages = Stages(tiny(tmp_path, gcn={"steps": steps}, **{**first["given"], "gcn_path": None}))
    config = stages.config.gcn
    objective = Unlearning(Unlearner.fresh(config), [stages.head], config, 0, torch.device("cpu"))
    trainer = GCNTrainer(objective, Tracker(stages.config.tracker, "", {}))
    rates = []
    for _ in range(steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        assert trainer.schedule is not None
        trainer.schedule.step()
    assert all(0 < rate <= config.lr * (1 + 1e-9) for rate in rates)
    assert (rates[0] < 0.05 * config.lr) is (WARM_UP * steps > 1)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"gcn": {"lambda_retain": 1e30}}, "lower gcn.lr or gcn.lambda_retain"),
        ({"gcn": {"objective": "elbo", "beta": 1e30}}, "lower gcn.lr or gcn.beta"),
        ({"data": {"val_fraction": 0.999999}}, "use a smaller data.val_fraction"),
        ({"data": {"max_train_samples": 11}}, "use more images|data.max_train_samples"),
    ],
)
def test_the_ends_of_the_ranges_end_in_a_sentence(finished, tmp_path, over, said):
    """Numbers that the schema lets pass and that no arithmetic bears: an error that names what to change."""
    _, first = finished
    given = {key: value for key, value in first["given"].items() if "gcn" in over and key != "gcn_path"}
    with pytest.raises(UserError, match=said):
        Pipeline(tiny(tmp_path, kappa_list=[100], **over, **given)).eval()


# --- near chance ------------------------------------------------------------------------------------------


def test_an_untrained_classifier_is_said_to_be_near_chance(tmp_path, capsys):
    """Before the sweep in the log, after it in the warnings; a trained one is not."""
    config = tiny(tmp_path, kappa_list=[100], train={"epochs": 1, "lr": 1e-9})
    (record,) = Pipeline(config).eval()
    assert record["footing"]["low"] <= record["footing"]["chance"]
    assert "near chance" in capsys.readouterr().err
    assert warnings([record])[0].startswith("Warning: the untouched classifier recognises ")


def test_chance_is_inside_or_outside_the_interval(finished):
    _, first = finished
    standing = first["record"]["footing"]
    assert standing["near_chance"] is None
    assert standing["low"] > standing["chance"] >= 10
    assert not [line for line in warnings([first["record"]]) if "near chance" in line]
    assert Footing(20.0, 9.9, 30.0, 10.0).near_chance
    assert not Footing(20.0, 10.1, 30.0, 10.0).near_chance


def test_a_tracked_run_s_name_is_one_of_a_file(tmp_path):
    """All methods by name are more than a file's name may hold; runs that differ in one of them have other names."""
    methods = [f"method_{place}" for place in range(40)]
    names = []
    for chosen in (methods, [*methods[:-1], "another"]):
        config = PipelineConfig(eval=EvalConfig(methods=tuple(chosen)), dataset_path=Path("\u4e2d" * 90))
        setup = SimpleNamespace(config=config, label="HookedMLPClassifier_DIGITS")
        names.append(Setup.tracker(setup, "results").name)
    assert len(set(names)) == 2
    for name in names:
        assert name.startswith("HookedMLPClassifier_DIGITS_results_seed-0_")
        assert len(name.encode()) <= 200
    (tmp_path / names[0]).mkdir()
    (methods_said,) = (one for one in changed_settings(config) if one.startswith("eval.methods"))
    assert re.fullmatch(r"eval\.methods-40-[0-9a-f]{4}", methods_said)
