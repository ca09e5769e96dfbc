"""A finished run is known again by all that it used and left, and not at the slightest doubt."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core.artifacts import write_json, write_text
from core.config import GCNConfig, PipelineConfig, ReporterConfig, Trackers
from core.hashes import sha256_file
from core.store import RUNS, Finished, build_stage, recall, remember

INPUTS = {"images": "a" * 64}


def left_by(folder: Path) -> tuple[PipelineConfig, Finished]:
    """A run of one stage, one record and one mask, remembered."""

    def make(place: Path) -> dict:
        write_text(place / "weights.txt", "0 1 2")
        return {}

    stage = build_stage(folder / "checkpoints/kind", "label", {}, make)
    write_json(folder / "record.json", {"value": 1})
    write_text(folder / "mask.txt", "1 0 1")
    digests = {name: sha256_file(folder / name) for name in ("record.json", "mask.txt")}
    records, masks = ({name: digests[name]} for name in digests)
    stages = {str(stage.path.relative_to(folder)): stage.key}
    config = PipelineConfig(output_dir=folder)
    finished = Finished(dict(INPUTS), stages, records, masks, ["dataset: DIGITS"])
    remember(config, finished)
    return config, finished


def test_a_run_is_known_again_wherever_it_was_moved_and_however_it_is_shown(tmp_path):
    config, finished = left_by(tmp_path / "a")
    assert recall(config, INPUTS) == finished
    shown = replace(config, tracker=Trackers.trackio, reporter=ReporterConfig(dpi=77))
    assert recall(shown, INPUTS) == finished
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert recall(config, INPUTS) is None
    assert recall(replace(config, output_dir=tmp_path / "b"), INPUTS) == finished


DAMAGE = {
    "stage changed": lambda folder: write_text(next(folder.rglob("weights.txt")), "0 1 3"),
    "stage gone": lambda folder: shutil.rmtree(folder / "checkpoints/kind"),
    "stage of other inputs": lambda folder: write_json(next(folder.rglob("manifest.json")), {"key": "b", "files": {}}),
    "record changed": lambda folder: write_json(folder / "record.json", {"value": 2}),
    "record gone": lambda folder: (folder / "record.json").unlink(),
    "mask changed": lambda folder: write_text(folder / "mask.txt", "1 1 1"),
    "mask gone": lambda folder: (folder / "mask.txt").unlink(),
    "what is kept of the run changed": lambda folder: write_text(next((folder / RUNS).iterdir()), "{}"),
    "what is kept of the run cut": lambda folder: os.truncate(next((folder / RUNS).iterdir()), 20),
    "what is kept of the run gone": lambda folder: next((folder / RUNS).iterdir()).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_changed_is_not_known_again(damage, tmp_path):
    config, _ = left_by(tmp_path)
    damage(tmp_path)
    assert recall(config, INPUTS) is None


def test_other_inputs_settings_code_and_versions_are_another_run(tmp_path, monkeypatch):
    config, finished = left_by(tmp_path)
    assert recall(config, {"images": "b" * 64}) is None
    assert recall(config, INPUTS | {"gcn_path": "c" * 64}) is None
    for other in (replace(config, seed=1), replace(config, gcn=GCNConfig(steps=7)), replace(config, device="cpu")):
        assert recall(other, INPUTS) is None
    with monkeypatch.context() as changed:
        changed.setattr("core.store.whole_code", lambda plugins: "other")
        assert recall(config, INPUTS) is None
    with monkeypatch.context() as changed:
        changed.setattr("core.store.versions", lambda: {"torch": "0"})
        assert recall(config, INPUTS) is None
    assert recall(config, INPUTS) == finished
