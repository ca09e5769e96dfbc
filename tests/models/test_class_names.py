"""Names of classes with their sources, found as a person types them; and folders whose order is not the model's."""

import numpy as np
import pytest

from core.config import UserError
from models.class_names import ClassNames, choose_names, clean_accuracy, is_at_chance, permutation_that_fits

ANIMALS = ClassNames(("cat", "dog, hound", "Dog", "7"), "here")


@pytest.mark.parametrize(
    ("typed", "label"),
    [("cat", 0), ("CAT", 0), ("dog, hound", 1), ("label:2", 2), ("7", 3), ("name:7", 3), (2, 2), ("0", 0)],
)
def test_a_class_is_found_as_typed(typed, label):
    assert ANIMALS.find(typed) == label


def test_classes_that_are_none_or_several():
    with pytest.raises(UserError, match=r"no class of the model: did you mean 'cat'\?"):
        ANIMALS.find("cats")
    with pytest.raises(UserError, match=r"fits several classes of the model, 2 \(Dog\), 1 \(dog\): give one of these"):
        ANIMALS.find("dog")


def test_sources_in_their_order(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("a\nb\nc\n\n")
    own = ClassNames(("x", "y", "z"), "id2label")
    names, notes = choose_names(3, own, file)
    assert (names, len(notes)) == (own, 1)
    assert "names.txt is not used: id2label names the classes" in notes[0]
    assert choose_names(3, None, file, ["p", "q", "r"])[0] == ClassNames(("a", "b", "c"), str(file))
    assert choose_names(3, None, None, ["r", "p", "q"])[0].names == ("p", "q", "r")
    numbers, notes = choose_names(3, None, None, ["r", "p"])
    assert (numbers.names, notes) == (("0", "1", "2"), ("the images' 2 folders do not name the model's 3 outputs",))
    assert choose_names(1000)[0].names[:2] == ("tench", "goldfish")
    file.write_text("a\n\nc\n")
    with pytest.raises(UserError, match="has no name in line 2"):
        choose_names(3, None, file)
    file.write_text("a\nb\n")
    with pytest.raises(UserError, match="names 2 classes, the model has 3 outputs"):
        choose_names(3, None, file)
    with pytest.raises(UserError, match="id2label names 3 classes, the model has 4 outputs"):
        choose_names(4, own)


def test_accuracy_is_the_mean_over_classes():
    """Oracle by hand: one class of 90 all right, one of 10 all wrong: 50 %, at chance for two outputs."""
    labels = np.repeat([0, 1], [90, 10])
    found = clean_accuracy(np.zeros(100, dtype=int), labels)
    assert found.value == 0.5
    assert is_at_chance(found, 2)
    assert not is_at_chance(clean_accuracy(labels, labels), 2)


@pytest.mark.parametrize("outputs", [6, 40])
def test_a_permutation_that_fits_is_found(outputs):
    """The oracle is the permutation itself; a tenth of the answers is drawn at random."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 20)
    order = np.roll(np.arange(outputs), 1)[:6] if outputs == 6 else rng.permutation(np.arange(6, outputs))[:6]
    predictions = np.where(rng.random(120) < 0.1, rng.integers(0, outputs, 120), order[labels])
    assert permutation_that_fits(predictions, labels, outputs) == {i: int(order[i]) for i in range(6)}


def test_no_permutation_is_claimed_where_none_fits():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 8)
    claimed = [permutation_that_fits(rng.integers(0, 10, 80), labels, 10) for _ in range(100)]
    assert sum(one is not None for one in claimed) <= 5
    assert permutation_that_fits(labels, labels, 10) is None  # right as it is
