"""A training that was interrupted and goes on is, bit for bit, one that nobody stopped."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from core.artifacts import read_tensors
from core.config import DataConfig, PipelineConfig, SupportedDatasets, Trackers, TrainConfig
from core.observe import Tracker
from model import HookedMLPClassifier, HookedModel, HookedResnet
from stages.chain import Stages
from trainer import VisionModelTrainer
from training.resume import StateFile
from utils_data import get_unlearning_dataset

CPU = torch.device("cpu")


@dataclass
class Stopping(Tracker):
    """Ends a training at one step, as a signal would."""

    at: int = 10**9
    seen: list[int] = field(default_factory=list)

    def log(self, step: int, **values: float) -> None:
        self.seen.append(step)
        if step == self.at:
            raise KeyboardInterrupt
        super().log(step, **values)


class Dropping(HookedMLPClassifier):
    """An MLP that draws from the global generator while it trains."""

    def embed(self, images):
        return torch.nn.functional.dropout(images.flatten(1), 0.3, self.training)


def trainer(
    kind: Callable[[int, int, int], HookedModel], state: StateFile | None, at: int = 10**9, **train
) -> VisionModelTrainer:
    """Of 30 images in batches of 7: five steps an epoch, four epochs, AdamW."""
    data = get_unlearning_dataset(SupportedDatasets.DIGITS, 7, data=DataConfig(max_train_samples=40))
    assert len(data.splits["train"]) == 30
    torch.manual_seed(5)
    config = TrainConfig(**({"epochs": 4, "batch_size": 7, "save_seconds": 0} | train))
    return VisionModelTrainer(kind(10, 1, 8), data, config, CPU, Stopping(Trackers.none, "", {}, at=at), state)


def curves(made: VisionModelTrainer) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in made.tracker.history]


def same(a: VisionModelTrainer, b: VisionModelTrainer) -> bool:
    pairs = list(zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True))
    return curves(a) == curves(b) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


@pytest.mark.parametrize("kind", [HookedMLPClassifier, pytest.param(HookedResnet, marks=pytest.mark.slow), Dropping])
def test_interrupted_and_resumed_is_uninterrupted(kind, tmp_path):
    """Stopped in epoch 2 and again in epoch 4; BatchNorm's statistics and dropout's draws are as they would be."""
    whole = trainer(kind, None)
    expected = whole.train(tmp_path)
    steps = whole.tracker.history[-1]["step"]
    place = StateFile(tmp_path / "state.safetensors", "key", resume=True)
    for at, first in ((7, 1), (steps - 1, 6)):
        stopped = trainer(kind, place, at=at)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(tmp_path)
        assert stopped.tracker.seen[0] == first, "whole epochs are not trained again"
        torch.manual_seed(99)  # what the process does meanwhile does not matter
    resumed = trainer(kind, place)
    assert resumed.train(tmp_path) == expected
    assert resumed.tracker.seen[0] == 16
    assert same(resumed, whole)
    assert not same(resumed, stopped)


def test_after_the_last_epoch_nothing_is_left_to_do(tmp_path):
    """Killed between the last state and the end of the stage: the figures are there all the same."""
    place = StateFile(tmp_path / "state.safetensors", "key", resume=True)
    whole = trainer(HookedMLPClassifier, place, epochs=3)
    whole.train(tmp_path)
    short = trainer(HookedMLPClassifier, place, epochs=2)
    figures = short.train(tmp_path)
    assert short.tracker.seen == []
    assert figures == {k: v for k, v in curves(short)[-1].items() if k != "step"}
    assert figures["epoch"] == 2


def test_without_resume_it_begins_anew(tmp_path):
    path = tmp_path / "state.safetensors"
    whole, stopped = trainer(HookedMLPClassifier, None), trainer(HookedMLPClassifier, StateFile(path, "key"), at=7)
    whole.train(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(tmp_path)
    assert path.exists()
    again = trainer(HookedMLPClassifier, StateFile(path, "key"))
    again.train(tmp_path)
    assert again.tracker.seen[0] == 1
    assert same(again, whole)


def test_state_is_saved_at_most_so_often(tmp_path):
    path = tmp_path / "state.safetensors"
    trainer(HookedMLPClassifier, StateFile(path, "key"), save_seconds=1000).train(tmp_path)
    assert not path.exists()
    trainer(HookedMLPClassifier, StateFile(path, "key")).train(tmp_path)
    assert read_tensors(path)[1]["epoch"] == 3, "what comes after the last epoch is the checkpoint"


def test_unfit_state_is_named_and_not_used(tmp_path, capsys):
    place = StateFile(tmp_path / "state.safetensors", "key", resume=True)
    trainer(HookedMLPClassifier, place).train(tmp_path)
    data = place.path.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 0x40
    late = data.replace(b'\\"epoch\\": 3', b'\\"epoch\\": 9')
    assert late != data
    whole = trainer(HookedMLPClassifier, None)
    whole.train(tmp_path)
    for content, key, why in (
        (data, "other", "it is the state of another training"),
        (data[:-100], "key", "not a whole safetensors file"),
        (bytes(flipped), "key", "its content is not what its digest says"),
        (late, "key", "its content is not what its digest says"),
    ):
        place.path.write_bytes(content)
        again = trainer(HookedMLPClassifier, replace(place, key=key))
        again.train(tmp_path)
        said = capsys.readouterr().err
        assert f"{place.path} is damaged ({why}" in said
        assert "begins anew" in said
        assert same(again, whole)


# --- as a stage -------------------------------------------------------------------------------------------


def stages(folder: Path, **changes) -> Stages:
    train = TrainConfig(**({"epochs": 4, "batch_size": 64, "save_seconds": 0} | changes.pop("train", {})))
    return Stages(PipelineConfig(output_dir=folder, device="cpu", train=train, **changes))


@pytest.mark.parametrize("kind", ["classifier", "retrained"])
def test_stage_goes_on(kind, tmp_path, monkeypatch):
    """`resume` in the configuration; the stage is the one of an uninterrupted run, and the state is gone."""

    def make(run: Stages) -> None:
        run.run_vision_model_training() if kind == "classifier" else run.retrained()

    def weights(folder: Path) -> bytes:
        (path,) = folder.glob(f"checkpoints/{kind}/*/classifier.safetensors")
        return path.read_bytes()

    make(stages(tmp_path / "whole"))
    original, calls = VisionModelTrainer._step, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 50:  # in epoch 3
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(VisionModelTrainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(stages(tmp_path / "out"))
    (state,) = (tmp_path / "out/checkpoints/resume").iterdir()
    # Another seed, and the other kind of training, are not this one.
    assert {path.name for path in (tmp_path / "out/checkpoints/resume").iterdir()} == {state.name}
    before = len(calls)
    make(stages(tmp_path / "out", resume=True, train={"save_seconds": 5.0}))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    steps = -(-1295 // 64) if kind == "classifier" else -(-1167 // 64)
    assert len(calls) - before == (4 - (49 // steps)) * steps
    assert list((tmp_path / "out/checkpoints/resume").iterdir()) == []


def test_resume_without_a_state_is_a_plain_run(tmp_path):
    plain, asked = stages(tmp_path / "a"), stages(tmp_path / "b", resume=True)
    a, b = (run.run_vision_model_training() for run in (plain, asked))
    assert a.read_bytes() == b.read_bytes()
    assert a.parent.name == b.parent.name, "one key: resuming changes no result"


def test_torn_write_leaves_the_last_state(tmp_path, monkeypatch):
    """A crash while a state is written: the one before it is whole."""
    place = StateFile(tmp_path / "state.safetensors", "key", resume=True)
    original, calls = os.replace, []

    def crash(*paths):
        if Path(paths[1]) == place.path:
            calls.append(paths)
            if len(calls) == 3:
                raise KeyboardInterrupt
        original(*paths)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        trainer(HookedMLPClassifier, place).train(tmp_path)
    assert read_tensors(place.path)[1]["epoch"] == 2
    whole, resumed = trainer(HookedMLPClassifier, None), trainer(HookedMLPClassifier, place)
    whole.train(tmp_path)
    resumed.train(tmp_path)
    assert same(resumed, whole)
