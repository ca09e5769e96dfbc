"""What the README and docs show is what happens: every command is taken, every Python block runs and learns."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from core.observe import be_quiet

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
CONFIGS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))}


def blocks(language: str) -> list[str]:
    return [found for text in TEXTS.values() for found in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[str]:
    """Every `uv run main.py ...` of a bash block and of the first line of a config."""
    texts = [*blocks("bash"), *(text.splitlines()[0] for text in CONFIGS.values())]
    found = [re.findall(r"uv run main\.py([^#\n>&\"]*)", text) for text in texts]
    return sorted({" ".join(line.split()) for lines in found for line in lines})


class Reached(Exception):
    """The command was taken: what it is about to do begins."""


@pytest.mark.parametrize("line", commands())
def test_every_command_shown_is_taken(line, monkeypatch, tmp_path):
    """Up to the first thing that it would do."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    for name in (
        "planning.asking.foresee",  # first: its module imports the next name
        "pipeline.Pipeline",
        "commands.sweep.run_sweep",
        "reporter.Reporter",
        "showing.leaderboard.write_leaderboard",
        "showing.answers.Pipeline",
        "commands.docs.write_docs",
        "forgetting.opening.open_model",
        "models.specs.parse",
        "mimu.Mask.load",
        "mimu.restore",
    ):
        monkeypatch.setattr(name, reached)
    for name in ("images.fetch.download", "images.fetch.prepare", "images.fetch.listing", "trackio.show"):
        monkeypatch.setattr(name, reached)
    monkeypatch.setattr("commands.command_line.load_plugins", lambda paths: {})  # the files are the reader's own
    monkeypatch.setattr(main, "_trackio_folder", lambda _: tmp_path)
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    try:
        with pytest.raises((Reached, SystemExit)) as ended:
            main._command(words)
    finally:
        be_quiet(False)
    assert ended.type is Reached or (ended.value.code == 0 and "--help" in words)


def photos(folder: Path) -> None:
    """A tree of three classes that anything can tell apart."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("bird", "cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 90, (24, 24, 3))
            pixels[..., number] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


# One process imports everything, then forks one child for each block, which finds what those before it have left.
DRIVER = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import pipeline, reporter, trainer

reporter.save = lambda *figure: None  # figures take longest, and are not in question
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports the rest of torch
made = pipeline.Pipeline.__init__


def with_few_steps(self, config):
    # classifiers are as shown; the graph network need not be good
    made(self, replace(config, gcn=replace(config.gcn, steps=5)))


pipeline.Pipeline.__init__ = with_few_steps
for number, block in enumerate(json.load(sys.stdin)):
    pid = os.fork()
    if pid == 0:
        names = {'__name__': '__main__'}
        exec(block, names)
        Path(f"{number}.json").write_text(json.dumps(names.get("records", [])))
        os._exit(0)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"ended with {code}: {block}")
"""
BEFORE = """
import glob, torch
from model import vision_model_loader
path_of_mask = sorted(glob.glob("eval/metrics_and_plots/masks/*DIGITS*/*_mimu.safetensors"))[0]
(path_of_classifier,) = glob.glob("checkpoints/classifier/*DIGITS*/classifier.safetensors")
from pathlib import Path
from core.config import SupportedVisionModels
classifier = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, 10, 1, 8, Path(path_of_classifier))
"""


BEFORE_FORGETTING = """
import torch
from torchvision import datasets, transforms
images = datasets.ImageFolder("photos", transforms.ToTensor())
loader = torch.utils.data.DataLoader(images, 30)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU(),
                            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(8):
    for batch, labels in torch.utils.data.DataLoader(images, 30, shuffle=True):
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_python_block_runs_and_its_classifier_learned(tmp_path):
    """In the order of the pages, in one folder, as a reader would; no classifier is near chance."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    photos(tmp_path / "photos")
    # tests/mimu/test_mask.py runs that page's block, beside a mask; tests/forgetting/test_walk.py the other's programs
    elsewhere = TEXTS["mask-format.md"] + TEXTS["your-model.md"]
    shown = [block for block in blocks("python") if "import" in block and block not in elsewhere]
    before = {"path_of_mask": BEFORE, "forgetting.python": BEFORE_FORGETTING}
    texts = ["".join(text for word, text in before.items() if word in block) + block for block in shown]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, input=json.dumps(texts), cwd=tmp_path, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(len(shown))]
    standings = [record["footing"] for records in found for record in records]
    assert len(standings) >= 3
    assert [one for one in standings if one["near_chance"]] == []
    assert min(one["accuracy"] for one in standings) > 90
    (place,) = [number for number, block in enumerate(shown) if "SupportedDatasets.FOLDER" in block]
    assert [record["forget_class"] for record in found[place]] == [[1]]
    assert len(shown[place].strip().splitlines()) <= 10
