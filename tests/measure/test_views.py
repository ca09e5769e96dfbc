"""Images of forgotten classes and maps of masks, as records hold them: each against a naive count of its own."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.config import SupportedDatasets
from graphs.layout import WeightGraph
from measure.exhibits import (
    MAP_SIDE,
    MOST_CLASSES,
    SAMPLES,
    WIDEST,
    many_classes,
    mask_map,
    said_of_samples,
    sampled,
    tables_of,
    thumbnails,
)
from measure.metrics import Outputs
from model import NO_ANSWER, HookedMLPClassifier, predictions
from reporting import figures
from tests.helpers.common import APART, held
from tests.helpers.records import record
from unlearn.masks import Mask
from utils_data import Images, UnlearningDataset

MEAN, STD = 100.0, 50.0


def dataset(shape: tuple[int, ...], forget: tuple[int, ...] = (3, 7), each: int = 6) -> UnlearningDataset:
    """Random images [C, H, W] of ten classes, `each` of each class in an order of chance, the same in every split."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(each)[torch.randperm(10 * each, generator=generator)]
    pixels = torch.randint(256, (len(labels), *shape), dtype=torch.uint8, generator=generator)
    images = Images(pixels, labels, torch.tensor(MEAN), torch.tensor(STD))
    return UnlearningDataset(SupportedDatasets.CIFAR10, dict.fromkeys(("train", "val", "test"), images), 4, forget, 0)


def decoded(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture, validate=True))))


def outputs(said: list[int], labels: list[int], classes: int) -> Outputs:
    return Outputs(torch.eye(classes)[said], torch.tensor(labels))


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "places"), [(0, []), (3, [0, 1, 2]), (8, list(range(8))), (20, [0, 2, 5, 7, 10, 12, 15, 17])]
)
def test_places_are_spread_evenly(count, places):
    assert sampled(torch.full((count,), 3)) == places


def test_every_class_has_its_places():
    assert sampled(torch.tensor([5] * 9 + [2, 7])) == [0, 3, 6, 9, 10]  # shares of 3, 3, 2; 2 and 7 have one image each
    assert sampled(torch.arange(20)) == list(range(8))
    assert sampled(torch.tensor([1, 0] * 10)) == [0, 1, 4, 5, 10, 11, 14, 15]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20)], ids=["grey", "colour, not square"])
def test_thumbnails_are_the_images_before_they_were_normalised(shape):
    data = dataset(shape)
    forgotten = [(image, label) for image, label in data.splits["test"] if label in (3, 7)]
    places = {label: [i for i, (_, true) in enumerate(forgotten) if true == label] for label in (3, 7)}
    chosen = [forgotten[i] for i in sorted(places[c][k] for c in (3, 7) for k in (0, 1, 3, 4))]  # four of six each
    found = thumbnails(data)
    assert found["labels"] == [label for _, label in chosen]
    assert set(found["labels"]) == {3, 7}
    for picture, (image, _) in zip(found["images"], chosen, strict=True):
        raw = (image * STD + MEAN).round().numpy().transpose(1, 2, 0)  # [H, W, C]
        assert (decoded(picture) == (raw[:, :, 0] if shape[0] == 1 else raw)).all()


def test_large_images_shrink_to_thumbnails_of_the_same_shape():
    data = dataset((3, 30, 2 * WIDEST))
    pixels = data.splits["test"].pixels
    assert isinstance(pixels, Tensor)
    pixels[:, 0] = 200
    for picture in thumbnails(data)["images"]:
        assert decoded(picture).shape == (15, WIDEST, 3)
        assert (decoded(picture)[:, :, 0] == 200).all()


def test_images_are_chosen_by_the_data_alone():
    data = dataset((1, 8, 8))
    state = torch.get_rng_state()
    first = thumbnails(data)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert thumbnails(dataset((1, 8, 8))) == first
    assert thumbnails(dataset((1, 8, 8), forget=(2,))) != first


def test_said_is_what_the_model_says_of_the_very_images_shown():
    torch.manual_seed(0)
    data, model = dataset((1, 8, 8), each=20), HookedMLPClassifier(10, 1, 8).eval()
    batches = list(data.get_forget_set("test"))
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
        said = said_of_samples(Outputs(logits, torch.cat([labels for _, labels in batches])))
        shown = [torch.tensor(decoded(picture)).float()[None, None] for picture in thumbnails(data)["images"]]
        answers = [model((pixels - MEAN) / STD)[0].softmax(0) for pixels in shown]
    assert said is not None
    assert len(said) == SAMPLES
    assert [label for label, _ in said] == [int(answer.argmax()) for answer in answers]
    assert [p for _, p in said] == pytest.approx([float(answer.max()) for answer in answers], abs=1e-4)


def test_before_and_after_differ_by_hand():
    before = Outputs(torch.tensor([[0.0, np.log(3)], [np.log(4), 0.0]]), torch.tensor([1, 0]))
    assert said_of_samples(before) == [[1, 0.75], [0, 0.8]]
    after = Outputs(torch.tensor([[0.0, -np.log(9)], [0.0, np.log(2)]]), torch.tensor([1, 0]))
    assert said_of_samples(after) == [[0, 0.9], [1, 0.6667]]


# --- where images go --------------------------------------------------------------------------------------


def test_tables_of_many_classes_by_hand():
    forget, retain = outputs([1, 4, 4, 0], [1, 1, 1, 1], 5), outputs([0, 2, 4, 4], [0, 0, 4, 2], 5)
    assert many_classes(forget, retain) == {
        "class_score": [50.0, 25.0, 0.0, None, 100.0],
        "taken_for": [1, 1, 0, 0, 2],
    }


@pytest.mark.parametrize("classes", [MOST_CLASSES, MOST_CLASSES + 1])
def test_the_table_of_all_pairs_gives_way_to_two_of_single_classes(classes):
    tables = tables_of(outputs([1, 0], [1, 1], classes), outputs([0], [0], classes))
    rest = {"class_score", "taken_for"} if classes > MOST_CLASSES else {"confusion"}
    assert set(tables) == {"class_probability", "said_of_samples"} | rest


def test_an_image_without_an_answer_is_in_no_table_of_answers():
    """A table that left it out would count too few images of its class; NaN has no place in a record either."""
    forget, retain = outputs([1, 0], [1, 1], 3), outputs([0, 2], [0, 2], 3)
    lost = Outputs(held(forget).clone().index_fill_(0, torch.tensor([0]), math.nan), forget.labels)
    assert predictions(held(lost)).tolist() == [NO_ANSWER, 0]
    assert tables_of(lost, retain) == {"said_of_samples": None, "class_score": [100.0, 0.0, 100.0]}
    gone = Outputs(held(retain).clone().index_fill_(0, torch.tensor([1]), math.nan), retain.labels)
    tables = tables_of(forget, gone)
    assert set(tables) == {"class_probability", "said_of_samples", "class_score", "taken_for"}
    assert (tables["class_score"], tables["taken_for"]) == ([100.0, 50.0, 0.0], [1, 1, 0])


# --- maps of masks ----------------------------------------------------------------------------------------


def naive(off: Tensor) -> list[list[int]]:
    """Counts of True [m, n], in blocks of as few rows and columns as make MAP_SIDE cells or fewer of each."""
    down, across = (next(b for b in range(1, 9999) if b * MAP_SIDE >= size) for size in off.shape)
    cells = [[0] * -(-off.shape[1] // across) for _ in range(-(-off.shape[0] // down))]
    for row, column in off.nonzero().tolist():
        cells[row // down][column // across] += 1
    return cells


def test_map_of_a_small_layer_is_the_mask_itself():
    keep = torch.tensor([[True, False, True], [False, False, True]])
    graph = WeightGraph(((2, 3),), (), ("linears.1.weight",))
    assert mask_map(Mask(keep, graph)) == [
        {"layer": "linears.1.weight", "shape": [2, 3], "cells": [[0, 1, 0], [1, 1, 0]]}
    ]


def test_map_of_several_layers_has_each_in_its_place():
    graph = WeightGraph(APART.shapes, APART.joined, ("a", "b"))
    keep = torch.ones(26, dtype=torch.bool)
    keep[[6, 19, 20, 25]] = False  # (1, 1) of the 4 x 5 layer's 20 weights, (3, 4) of it; (0, 0), (1, 2) of 2 x 3
    first, second = mask_map(Mask(keep, graph))
    assert (first["layer"], first["shape"], second["layer"], second["shape"]) == ("a", [4, 5], "b", [2, 3])
    assert first["cells"] == [[0] * 5, [0, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 1]]
    assert second["cells"] == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("shape", [(32, 33), (40, 64), (128, 784), (2, 1000), (65, 31)])
def test_map_of_a_large_layer_counts_equal_blocks(shape):
    off = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    graph = WeightGraph((shape,), (), ("w",))
    (layer,) = mask_map(Mask(~off, graph))
    assert layer["shape"] == list(shape)
    assert layer["cells"] == naive(off)
    assert max(len(layer["cells"]), len(layer["cells"][0])) <= MAP_SIDE
    assert sum(map(sum, layer["cells"])) == int(off.sum())


@pytest.mark.parametrize(("m", "n", "block"), [(32, 33, "1 x 2"), (40, 65, "2 x 3"), (97, 784, "4 x 25")])
def test_figures_name_the_size_of_the_blocks(m, n, block):
    mask = Mask(torch.zeros(m, n, dtype=torch.bool), WeightGraph(((m, n),), (), ("w",)))
    (panel,) = figures.mask_map_panels([[record(5, 100, (50, 80), (50, 80)) | {"mask_map": mask_map(mask)}]])
    assert f"cells of {block} weights" in panel.title
    assert panel.cells
    assert panel.cells[0][0] == np.prod([int(side) for side in block.split(" x ")])
