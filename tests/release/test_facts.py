"""What a certificate says of a mask, against values computed by hand or found by trying everything."""

import itertools
from typing import Any

import pytest

from core.intervals import paired_difference
from measure.verdicts import CHECKS, meanings
from mimu import Config, Mask
from release.facts import (
    LABELS,
    differing,
    facts_of,
    features_of,
    flags_of,
    how_to_verify,
    not_checked,
    scores_of,
    who_can_lift,
    widest_pair,
    words_of,
)
from tests.helpers.foreign import CAT, mask_on, mlp

SCORES = {
    "clean_forget": 96.0,
    "clean_retain": 86.0,
    "forget": 0.0,
    "retain": 86.0,
    "retain_change": 0.0,
    "p_forget": 1.5,
    "classes_retained": 3,
    "classes_without_images": 0,
    "intervals": {"forget": [0.0, 1.2], "retain": [84.0, 88.0], "retain_change": [-0.5, 0.5]},
    "n": {"forget": 300, "retain": 900, "retain_change": 900, "p_forget": 300},
}


def mask(values: bool = False, **more: Any) -> Mask:
    """A mask of four classes' model, with other fields of its config."""
    made = mask_on(mlp(), "2.weight", values=values)
    return Mask(made.positions, made.config.plain() | {"scores": SCORES} | more, made.values)


def config(scores: Any = None, **more: Any) -> Config:
    return mask(**more, **({} if scores is None else {"scores": {**SCORES, **scores}})).config


# --- the word ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 5, 9])
def test_the_widest_pair_is_the_widest_of_all_that_have_these_counts(images):
    for before, after in itertools.product(range(images + 1), repeat=2):
        possible = [  # of each: right in both, lost, gained
            (both, before - both, after - both)
            for both in range(min(before, after) + 1)
            if before + after - both <= images
        ]
        widths = [paired_difference(lost, gained, images) for _, lost, gained in possible]
        pair = widest_pair(before, after, images)
        assert (pair.lost, pair.gained) in {(lost, gained) for _, lost, gained in possible}
        found = paired_difference(pair.lost, pair.gained, images)
        assert found.high - found.low == max(one.high - one.low for one in widths)


@pytest.mark.parametrize(("scores", "keys"), [
    ({}, ["suppressed"]),
    ({"forget": 4.9}, ["suppressed"]),
    ({"forget": 20.0}, ["half forgotten"]),
    ({"forget": 95.0}, ["no-op"]),  # 288 and 285 of 300
    ({"retain": 70.0}, ["collapsed", "suppressed"]),  # 16 points below
    ({"clean_retain": 33.0, "retain": 29.0}, ["collapsed", "suppressed"]),  # 4 classes: chance is 25, and 5 points more
    ({"clean_retain": 33.0, "retain": 31.0}, ["suppressed"]),
    ({"n": {"forget": 2, "retain": 900}, "clean_forget": 100.0, "forget": 50.0}, ["too few images"]),
    ({"n": {"forget": 0, "retain": 900}}, []),
    ({"n": None}, []),
    ({"n": {"forget": 10**400, "retain": 900}}, []),
    ({"forget": 10**400}, []),
    ({"forget": "0"}, []),
    ({"forget": -1.0}, []),
    ({"clean_forget": 101.0}, []),
    ({"classes_retained": None}, []),
])  # fmt: skip
def test_the_word_is_that_of_the_verdicts(scores, keys):
    found = words_of(config(scores), changed=5)
    assert [one.key for one in found] == keys
    assert {one.key for one in found} <= set(CHECKS)


def test_a_mask_without_scores_has_no_word():
    assert words_of(mask(scores=None).config, 5) == []


# --- scores -----------------------------------------------------------------------------------------------


def test_scores_are_the_cards_and_in_one_order():
    found = scores_of(config())
    assert [one.name for one in found] == [name for name in LABELS if name in SCORES]
    forget, retain, p_forget, change = found
    assert (forget.value, forget.low, forget.high, forget.images, forget.untouched) == (0.0, 0.0, 1.2, 300, 96.0)
    assert (retain.untouched, retain.unit) == (86.0, "%")
    assert (p_forget.low, p_forget.untouched) == (None, None)
    assert (change.unit, change.low, change.untouched) == ("points", -0.5, None)


@pytest.mark.parametrize(("scores", "gone"), [
    ({"forget": "none"}, "forget"),
    ({"forget": True}, "forget"),
    ({"forget": 1e300}, "forget"),
    ({"forget": [0.0]}, "forget"),
])  # fmt: skip
def test_a_value_of_another_kind_counts_as_not_measured(scores, gone):
    assert gone not in [one.name for one in scores_of(config(scores))]


@pytest.mark.parametrize(
    "spans",
    [None, {"forget": [0.0]}, {"forget": [0.0, 1e300]}, {"forget": ["a", "b"]}, {"forget": [0.0, 1.0, 2.0]}, [1]],
)
def test_an_interval_of_another_kind_is_left_out(spans):
    (forget,) = [one for one in scores_of(config({"intervals": spans})) if one.name == "forget"]
    assert (forget.value, forget.low, forget.high) == (0.0, None, None)


# --- what is not known ------------------------------------------------------------------------------------


def said(sentences: list[str], word: str) -> list[str]:
    return [one for one in sentences if word in one]


def test_what_was_not_checked_depends_on_the_card():
    bare = not_checked(config())
    assert said(bare, "BatchNorm")
    assert said(bare, "3 had test images")
    assert not said(bare, "without images")
    assert said(not_checked(config({"classes_without_images": 7})), "The 7 classes without images.")
    assert not said(not_checked(config({"forget_recalibrated": 0.0})), "BatchNorm")
    told = dict.fromkeys(("features_before", "features_may", "features_now"), "fc 9")
    assert said(not_checked(config(told)), "sought with")
    assert features_of(config(told)) == told
    assert features_of(config()) == {}


def test_of_a_mask_that_nobody_measured_nothing_is_said():
    (only,) = not_checked(mask(scores=None, composition={"parts": [], "shared": 0}).config)
    assert "Nothing was measured" in only
    assert "composed" in only
    assert "composed" not in not_checked(mask(scores=None).config)[0]
    facts = facts_of(mask(scores=None), "0" * 64)
    assert (facts["word"], facts["measured"], facts["rules"]) == ([], [], {})


def test_a_mask_with_values_says_that_they_are_not_the_parents():
    assert not said(who_can_lift(mask()), "in place of others")
    assert said(who_can_lift(mask(values=True)), "in place of others")


# --- the commands -----------------------------------------------------------------------------------------

PREPARED = {"size": [28, 28], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.3, 0.35], "channels": "BGR"}


@pytest.mark.parametrize(("known", "words"), [
    (None, ""),
    ({**PREPARED, "source": "timm's pretrained_cfg"}, ""),
    ({**PREPARED, "source": "the flags --size, --mean, --std"}, "--size 28 --mean 0.5 --std 0.25 0.3 0.35"),
    ({**PREPARED, "source": "timm's, but for the flags --size"}, "--size 28"),
    ({**PREPARED, "source": "the flags --channels"}, "--channels BGR"),
    ({"source": "the flags --size, --mean", "size": ["a"], "mean": None}, ""),
    ({"source": 3}, ""),
])  # fmt: skip
def test_flags_of_the_preprocessing_are_those_that_were_given(known, words):
    assert " ".join(flags_of(known)) == words


def test_commands_are_quoted_for_a_shell():
    parent = {**config().plain()["parent"], "load": "py:a b.py:net@'x'.pt"}
    *_, last = how_to_verify(mask(parent=parent).config)
    assert "verify 'py:a b.py:net@'\"'\"'x'\"'\"'.pt' MASK" in last["command"]
    assert "--images" in last["command"]
    assert not [one for one in how_to_verify(mask(scores=None).config) if "--images" in one["command"]]
    assert " SPEC MASK " in how_to_verify(config())[1]["command"]  # nobody has said how that model is loaded


# --- the whole --------------------------------------------------------------------------------------------


def test_facts_are_the_masks():
    one = mask(values=True)
    facts = facts_of(one, "a" * 64)
    assert facts["forgets"] == CAT
    assert facts["mask"]["digest"] == one.digest
    assert facts["mask"]["file_sha256"] == "a" * 64
    assert (facts["mask"]["switched_off"], facts["mask"]["replaced"]) == (one.switched_off, one.replaced)
    assert facts["parent"]["state_sha256"] == one.config.parent.state_sha256
    about = facts["mask"]["parameters"]["2.weight"]
    assert about["sha256"] == one.config.parent.targets["2.weight"].sha256
    assert about["switched_off"] + about["replaced"] == len(one.positions["2.weight"])
    assert facts["rules"] == {"suppressed": meanings()["suppressed"]}
    assert list(differing(facts, facts_of(one, "a" * 64))) == []


@pytest.mark.parametrize(("stored", "now", "where"), [
    ({"a": 1}, {"a": 1}, []),
    ({"a": 1}, {"a": 2}, ["a"]),
    ({"a": 1}, {"a": 1.0}, ["a"]),
    ({"a": 0}, {"a": False}, ["a"]),
    ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b.1"]),
    ({"a": [1, 2]}, {"a": [1]}, ["a"]),
    ({"a": 1, "c": 1}, {"b": 1, "a": 1}, ["b", "c"]),
    ({"a": [{"b": None}]}, {"a": [{"b": "x"}]}, ["a.0.b"]),
])  # fmt: skip
def test_differences_are_named(stored, now, where):
    assert list(differing(stored, now)) == where
