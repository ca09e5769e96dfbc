"""Plans: counts against what a real tiny run leaves, sweeps that count shared stages once, and refusals."""

from dataclasses import replace
from pathlib import Path

import pytest

import main
from core.artifacts import read_json
from core.choices import Objectives, SupportedVisionModels
from core.config import PROJECT_ROOT, UserError
from core.observe import be_quiet
from data import GraphDataset
from model import HookedModel
from pipeline import Pipeline
from planning import units as room
from planning.asking import Asked, Foreseen, foresee
from planning.extent import Extent, at_its_place
from planning.forecast import line, stages
from planning.units import Cost, Probe, Units
from tests.helpers.common import TINY, tiny
from utils_data import SPLITS

METHODS = ("mimu", "mimu_refined", "taylor_mask", "random", "logit_drop", "retrain", "default")


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Units are measured for a moment: what is asserted is no time."""
    monkeypatch.setattr(room, "ENOUGH", 0.01)


def config_of(folder: Path, objective: Objectives):
    base = tiny(folder)
    metrics = ("core", "train", "retrain") if objective is Objectives.unlearning else ("core",)
    judged = replace(base.eval, methods=METHODS, metrics=metrics, references=1)
    return replace(base, gcn=replace(base.gcn, objective=objective), eval=judged)


def planned(config, store: Path) -> tuple[Extent, Units]:
    extent = Extent.of(Pipeline(at_its_place(config, store)).stages.setup)
    (store / "probe").mkdir()
    return extent, Probe(extent, store / "probe").measure(Cost(), Cost())


@pytest.mark.parametrize("objective", Objectives)
def test_counts_are_those_of_a_real_run(objective, tmp_path, monkeypatch):
    """Steps, images and graphs from histories and manifests; images seen, counted where they enter the classifier."""
    config = config_of(tmp_path / "out", objective)
    be_quiet()
    extent, units = planned(config, tmp_path)
    assert not (tmp_path / "out").exists()
    run = Pipeline(config)
    run.run_vision_model_training()
    graphs = run.run_gcn_graph_generation()
    networks = {run.run_gcn_training(top_k) for top_k in config.topK_list}
    run.stages.retrained(0)
    _ = run.evaluation.eval, run.stages.head
    seen, prefix = [], HookedModel.prefix

    def counted(self, images, mask_layer):
        seen.append(len(images))
        return prefix(self, images, mask_layer)

    whole = HookedModel.__call__

    def called(self, images):
        seen.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(HookedModel, "prefix", counted)
    monkeypatch.setattr(HookedModel, "__call__", called)
    records = run.eval()
    sizes = {name: len(run.stages.data.splits[name]) for name in SPLITS}
    assert {name: len(labels) for name, labels in extent.labels.items()} == sizes == records[0]["split_sizes"]
    assert extent.graphs == len(GraphDataset(graphs))
    steps = [len(read_json(path.parent / "history.json")["history"]) for path in networks]
    assert extent.networks * config.gcn.steps == sum(steps)
    history = read_json(run.stages.classifier_path.parent / "history.json")["history"]
    epochs = [entry for entry in history if "epoch" in entry]
    assert extent.trained_images == len(epochs) * sizes["train"]
    assert extent.retrained_images == len(epochs) * len(run.stages.data.retained(0).splits["train"])
    assert extent.points == len(records)
    assert sum(extent.side(*one) for one in units.judging.passes) == sum(seen)
    left = {one.name: one.disk for one in stages(extent, units)}
    folders = {"classifier": {run.stages.classifier_path.parent}, "graphs": {graphs}}
    folders |= {"gcn": {path.parent for path in networks}}
    for name, found in folders.items():
        files = [path for folder in found for path in folder.iterdir() if path.name != "manifest.json"]
        size = sum(path.stat().st_size for path in files)  # beside weights and curves, headers that are not foreseen
        assert left[name] == pytest.approx(size, rel=0.25, abs=5_000), name


def test_images_of_a_plan_differ_and_take_next_to_no_memory(tmp_path):
    """Where all were equal, no ResNet could be trained on them: BatchNorm divides by their differences."""
    config = replace(
        config_of(tmp_path / "out", Objectives.unlearning), model_architecture=SupportedVisionModels("HookedResnet")
    )
    extent = Extent.of(Pipeline(at_its_place(config, tmp_path)).stages.setup)
    for name, part in extent.drawn().splits.items():
        assert len(part.pixels.flatten(1).unique(dim=0)) == len(part.pixels) == len(extent.labels[name])
        assert part.pixels.untyped_storage().nbytes() < len(extent.labels["train"]) + part.pixels[0].numel() + 1
    (tmp_path / "probe").mkdir()
    assert Probe(extent, tmp_path / "probe").training().seconds > 0


def asked(folder: Path, text: str, *words: str) -> Foreseen:
    """What is foreseen of a file."""
    from commands.sweep import planned as runs

    path = folder / "plan.yaml"
    path.write_text(f"{TINY}\noutput_dir: {folder / 'out'}\n{text}\n")
    numbers = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    return foresee(Asked(*runs([path], (), numbers.get("--machines"), numbers.get("--workers"))))


def test_a_sweep_counts_shared_stages_once(tmp_path):
    be_quiet()
    over = "sweep: {over: {forget_class: [0, 3, 5], seed: [0, 1]}, workers: 3}"
    found = asked(tmp_path, over, "--machines", "2").forecast
    made = {stage.name: times for stage, times in found.stages}
    once = {"classifier": 2, "graphs": 2, "gcn": 2}
    assert made == once | {"start": 6, "images": 6, "evaluation": 6, "retrained": 6}
    assert found.workers == 6
    assert len(found.jobs) == 6
    jobs = found.jobs
    by_hand = sum(s.cost.seconds for job in jobs for s in (job[1], job[6]))
    by_hand += sum(s.cost.seconds for job in jobs[:2] for s in job[2:5]) + 6 * jobs[0][0].cost.seconds
    by_hand += sum(s.cost.seconds for job in jobs for s in job[5:6])
    assert found.total.cost.seconds == pytest.approx(by_hand)
    assert found.seconds <= found.total.cost.seconds
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_table_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(TINY.replace("metrics: [core]", "metrics: [core, AIN]").replace("[mimu,", "[mimu, ssd,"))
    before = sorted(tmp_path.rglob("*"))
    with path.open("a") as file:
        file.write(f"output_dir: {tmp_path / 'out'}\n")
    assert main.main(["plan", "--config", str(path)]) == 0
    out, err = capsys.readouterr()
    rows = [row.strip("|").split("|")[0].strip() for row in out.splitlines() if row[:1] == "|"]
    assert rows[2:] == ["start", "images", "classifier", "graphs", "gcn", "retrained", "evaluation", "total"]
    assert "not foreseen: the report (figures, tables, page); methods: ssd; metrics: AIN" in out
    assert "epoch" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--machines", "0"], "--machines is 0: give a number from 1 to 100,000"),
        (["--workers", "-2"], "--workers is -2: give a number from 1 to 100,000"),
        (["--workers", "2"], "--workers is 2, but no file has a section `sweep`: a run is foreseen on one"),
        (["--seed", "2"], "plan found --seed: it takes --config FILE, --machines and --workers, see docs/usage.md"),
    ],
)
def test_refusals(words, said, capsys):
    assert main.main(["plan", *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_what_is_given_costs_nothing(tmp_path):
    be_quiet()
    network = PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors"
    found = {stage.name: stage for stage, _ in asked(tmp_path, f"gcn_path: {network}").forecast.stages}
    assert (found["gcn"].work, found["gcn"].disk) == ("0 steps", 0)
    assert (found["retrained"].cost, found["retrained"].disk) == (Cost(), 0)


def test_a_line_by_hand():
    measured = {100: Cost(2.0, 1.0), 200: Cost(3.0, 1.5)}
    assert line(measured, 400) == Cost(5.0, 2.5)
    assert line(measured, 200) == Cost(3.0, 1.5)
    assert line({100: Cost(3.0, 1.0), 200: Cost(2.0, 1.5)}, 400) == Cost(2.0, 2.5)  # a clock that was disturbed


def test_a_configuration_that_cannot_be_run_is_said(tmp_path):
    with pytest.raises(UserError, match="99"):
        asked(tmp_path, "forget_class: [99]")
