"""What numpy alone makes of written files: the scores on a card, and the probe of a record."""

import ast
import inspect
import json
from dataclasses import replace
from pathlib import Path

from benchmarks import recompute

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import nn

import main
from core.config import EvalConfig
from eval import Eval
from measure.probes import probed_images
from pipeline import Pipeline
from tests.helpers.common import tiny
from tests.helpers.patterns import NAMES, SIDE, network, pattern, prepared
from unlearn.registry import Edit

WANTED, MEAN, STD = 1, 0.4, 0.3
CODE = f"""
from torch import nn


def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear({3 * SIDE * SIDE}, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )
"""
FLAGS = ("--size", str(SIDE), "--mean", *[str(MEAN)] * 3, "--std", *[str(STD)] * 3)


def drawn(rng: np.random.Generator, each: int) -> tuple[list[np.ndarray], list[int]]:
    labels = [label for label in range(len(NAMES)) for _ in range(each)]
    return [pattern(label, rng) for label in labels], labels


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A perceptron of a user's, trained for a second, its images in train, val and test, and a mask that erases."""
    root, rng = tmp_path_factory.mktemp("numpy"), np.random.default_rng(0)
    (root / "net.py").write_text(CODE)
    for part, each in (("train", 120), ("val", 40), ("test", 40)):
        for number, (levels, label) in enumerate(zip(*drawn(rng, each), strict=True)):
            place = root / "photos" / part / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels).save(place / f"{number}.png")
    torch.manual_seed(0)
    net, (levels, labels) = network(root / "net.py"), drawn(rng, 300)
    images, true = (torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2) / 255 - MEAN) / STD, torch.tensor(labels)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(images), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({name: value.numpy() for name, value in net.state_dict().items()}, root / "net.safetensors")
    words = [f"py:{root}/net.py:net@{root}/net.safetensors", "--class", NAMES[WANTED], "--depth", "erase", "--quiet"]
    assert main.main(["forget", *words, "--out", str(root / "mask"), "--images", str(root / "photos"), *FLAGS]) == 0
    return root


def test_it_needs_nothing_of_this_project():
    names = [node for node in ast.walk(ast.parse(inspect.getsource(recompute))) if isinstance(node, ast.Import)]
    froms = [node for node in ast.walk(ast.parse(inspect.getsource(recompute))) if isinstance(node, ast.ImportFrom)]
    found = {alias.name for node in names for alias in node.names} | {str(node.module) for node in froms}
    assert found == {"gzip", "json", "sys", "collections.abc", "pathlib", "numpy", "safetensors.numpy", "PIL"}


def test_a_card_s_scores_are_numpy_s_to_the_last_digit(home, capsys):
    """Of a mask of version 2: zeros in every layer, and a new row with its bias."""
    positions, values, config = recompute.read_mask(home / "mask")
    parent = load_file(home / "net.safetensors")
    edited = recompute.with_mask(parent, positions, values)
    assert config["version"] == 2
    assert set(values) <= {"5.weight", "5.bias"}
    assert set(positions) >= {"1.weight", "3.weight", "5.weight"}
    for name, value in parent.items():
        off = np.zeros(value.size, bool)
        off[positions.get(name, [])] = True
        assert (edited[name].ravel()[~off] == value.ravel()[~off]).all()
    rows, labels = recompute.pictures(home / "photos" / "test", MEAN, STD)
    found = recompute.scores(recompute.through(edited, rows)[-1], labels, [WANTED])
    clean = recompute.scores(recompute.through(parent, rows)[-1], labels, [WANTED])
    card = config["scores"]
    assert (card["n"]["forget"], card["n"]["retain"]) == (40, 120)
    assert found == pytest.approx((card["forget"], card["retain"]), abs=1e-9)
    assert clean == pytest.approx((card["clean_forget"], card["clean_retain"]), abs=1e-9)
    assert found[0] < 10 < 60 < min(clean)
    recompute.of_card(home / "mask", home / "net.safetensors", home / "photos" / "test", MEAN, STD)
    said = capsys.readouterr().out
    assert f"forget: {found[0]:.4f} % of these images, the card says {card['forget']:.4f} %" in said
    assert f"retain: {found[1]:.4f} % of these images, the card says {card['retain']:.4f} %" in said


def test_pictures_are_what_torch_makes_of_them(home):
    paths = [path for name in sorted(NAMES) for path in sorted((home / "photos" / "test" / name).iterdir())]
    rows, labels = recompute.pictures(home / "photos" / "test", 0.0, 1.0)
    assert len(rows) == 160
    assert labels.tolist() == [sorted(NAMES).index(path.parent.name) for path in paths]
    plain = np.asarray(Image.open(paths[7]).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert np.allclose(rows[7], plain.ravel())
    assert prepared(Image.open(paths[7])).shape == (3, SIDE, SIDE)


def test_the_probe_is_the_least_of_its_loss():
    """At the solution the gradient is nothing, and any other solver with a small tolerance names the same classes."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    labels = np.arange(300) % 3
    rows = rng.normal(size=(300, 12)) * 3 + labels[:, None] * rng.normal(size=12)
    asked = rng.normal(size=(200, 12)) * 3 + 1
    scale = (rows - rows.mean(0)) / rows.std(0)
    other = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(scale, labels)
    expected = other.predict((asked - rows.mean(0)) / rows.std(0))
    assert (recompute.probe(rows, labels, asked) == expected).mean() > 0.99


@pytest.mark.slow
def test_a_record_s_probe_is_numpy_s(tmp_path, monkeypatch):
    """mimu_deep, mean over stages. The record's solver stops at a gradient of 1e-3, numpy's goes on: two of the class's
    test images may fall on another side.
    """
    kept, real = {}, Eval._judge

    def judge(self: Eval, name: str, key: tuple, edit: Edit) -> dict:
        kept[name] = {one: value.numpy().copy() for one, value in edit.model.state_dict().items()}
        return real(self, name, key, edit)

    monkeypatch.setattr(Eval, "_judge", judge)
    judged = EvalConfig(methods=("mimu", "default", "mimu_deep"), metrics=("core", "probe_layers"), references=0)
    config = tiny(tmp_path, topK_list=(300,), kappa_list=(100,), eval=judged, forget_class=(8,))
    pipeline = Pipeline(replace(config, mask_layer=(0, 1, 2)))
    (record,) = pipeline.eval()
    saved = json.loads(next(tmp_path.rglob("json/*/*.json")).read_text())["methods"]["mimu_deep"]
    assert saved == record["methods"]["mimu_deep"]
    e = pipeline.evaluation.eval.reference("test")  # which images are looked at; all else is numpy's
    (images, labels), (asked, true) = probed_images(e), e.images("test", True)
    train, told = (
        [np.maximum(h, 0) for h in recompute.through(kept["mimu_deep"], rows.flatten(1).numpy())[1:]]
        for rows in (images, asked)
    )
    right = recompute.through(kept["mimu_deep"], asked.flatten(1).numpy())[-1].argmax(1) == true.numpy()
    assert saved["forget_score"] == pytest.approx(100 * right.mean())
    recalls = [
        100 * (recompute.probe(a, labels.numpy(), b) == true.numpy()).mean()
        for a, b in zip(train[:-1], told[:-1], strict=True)
    ]
    assert len(recalls) == 2
    assert np.mean(recalls) == pytest.approx(saved["probe_layers"], abs=100 * 2 / len(true))
