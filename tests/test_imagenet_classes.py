"""The label names: complete, in label order, and equal to what torchvision says."""

import re

import pytest

from imagenet_classes import IMAGENET2012_CLASSES


def test_there_are_a_thousand_sorted_wordnet_ids() -> None:
    ids = list(IMAGENET2012_CLASSES)
    assert len(ids) == 1000
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in ids)


def test_names_are_distinct_and_clean() -> None:
    names = list(IMAGENET2012_CLASSES.values())
    assert len(set(names)) == 1000
    assert all(name and name == name.strip() for name in names)


def test_names_are_torchvisions_in_order() -> None:
    meta = pytest.importorskip("torchvision.models._meta", exc_type=ImportError)
    assert list(IMAGENET2012_CLASSES.values()) == list(meta._IMAGENET_CATEGORIES)


@pytest.mark.parametrize(
    ("label", "wnid", "name"),
    [
        (0, "n01440764", "tench"),
        (1, "n01443537", "goldfish"),
        (134, "n02012849", "crane bird"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby"),
        (386, "n02504458", "African elephant"),
        (517, "n03126707", "crane"),
        (817, "n04285008", "sports car"),
        (913, "n04606251", "wreck"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_known_labels(label: int, wnid: str, name: str) -> None:
    assert list(IMAGENET2012_CLASSES.items())[label] == (wnid, name)
