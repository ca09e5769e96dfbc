"""What is no record, or says what no record says, is named and left out; nothing that is read ends a report."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import DIGEST, write_json
from core.hashes import key_of
from core.records import FIELDS, RECORDS, complaint, read_records, read_whole, record_path
from reporter import Reporter
from reporting.compare import compared, side
from reporting.families import families, runs_of
from reporting.figures import figures_of
from reporting.page import as_page
from reporting.sentences import headline, remarks
from reporting.tables import best_points, caption, table
from tests.helpers.records import whole

NUMBERS = (True, -1, 0, 3, 2**70, 0.5, math.nan, math.inf, 1e300)
MUTANTS = (None, *NUMBERS, "", "x", "../../x", "/etc/x", [], [1], {}, {"x": 1})


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside, containers too; of a list the first item alone."""
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(one: dict, path: tuple, mutant: object, missing: bool = False) -> dict:
    one = copy.deepcopy(one)
    *parents, last = path
    inner: Any = one
    for key in parents:
        inner = inner[key]
    if missing:
        del inner[last]
    else:
        inner[last] = mutant
    return one


def written(path: Path, value: dict) -> None:
    """With a right digest, whatever it holds: as a program other than ours would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value | {DIGEST: key_of(value)}))


def report(records: list[dict]) -> None:
    """All that a report makes of records, up to drawing."""
    runs = runs_of(records)
    for run in runs:
        json.dumps(table(run, every=True)), caption(run), remarks(run), figures_of([run]), best_points(run)
        if {run[0]["answer"], "default"} <= set(run[0]["labels"]):
            headline(run)
        Reporter.run_name(run[0])
    compared(side("a", runs), side("b", runs))
    as_page(families(runs), {})


def test_a_whole_record_has_nothing_wrong():
    assert complaint(whole()) == ""
    assert set(whole()) == set(FIELDS), "give this test's record the new field, too"


def mutants() -> Iterator[tuple[tuple, dict]]:
    one = whole()
    for path in places(one):
        yield path, changed(one, path, None, missing=True)
        for mutant in MUTANTS:
            yield path, changed(one, path, mutant)
    yield ("extra",), one | {"extra": 1}


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_no_value_of_a_record_ends_a_report(step):
    """Every value is replaced, every field removed: the schema says what is wrong, or a report can be made of it."""
    refused, kept = 0, 0
    for path, mutant in itertools.islice(mutants(), 0, None, step):
        wrong = complaint(mutant)
        refused += bool(wrong)
        if not wrong:
            kept += 1
            try:
                report([mutant, whole(200)] if path[0] not in ("run", "id") else [mutant])
            except Exception as error:
                raise AssertionError(f"{path} {mutant}") from error
    assert refused > 1000 / step
    assert kept > 100 / step


@pytest.mark.parametrize("field", ["id", "run", "model", "dataset", "seed", "forget_class", "top_k", "kappa"])
@pytest.mark.parametrize("value", ["../../../../x", "/x", "a/b", "a\0b", "..", "", ["../x"], [["../x"]]])
def test_a_record_leads_nowhere_else(field, value, tmp_path, capsys):
    """Beside a good one: that is reported, the other is named, and nothing appears outside."""
    folder = tmp_path / "deep/er/out"
    good, bad = whole(), whole(200) | {field: value}
    write_json(record_path(folder, good), good)
    path = folder / RECORDS / "point" / "x.json"
    written(path, bad)
    before = {p for p in tmp_path.rglob("*") if not p.is_relative_to(folder)}
    assert read_records(folder) == [good]
    assert f"left out: {path} is damaged ({field}" in capsys.readouterr().err
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(folder)} == before


@pytest.mark.parametrize("path", ["../x/c.safetensors", "a/../../x", "/a/../b", "a\0b", "", 3, None])
def test_files_of_a_record_lie_below_the_folder_or_say_where(path):
    assert "classifier_path" in complaint(whole() | {"classifier_path": path})
    assert "gcn_path" in complaint(whole() | {"gcn_path": path})
    assert "mask_paths" in complaint(whole() | {"mask_paths": {"mimu": path}})
    assert "mask_paths" in complaint(whole() | {"mask_paths": {"mimu": "/given/x.safetensors"}})
    assert complaint(whole() | {"classifier_path": "/given/x.safetensors"}) == ""


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "x" * 200])
def test_names_that_become_files_have_a_shape(name):
    for field in ("metrics", "labels", "methods"):
        one = whole()
        one[field][name] = one[field].popitem()[1]
        assert field in complaint(one)


def test_a_record_that_contradicts_its_run_is_left_out(tmp_path, capsys):
    first, second = whole(100), whole(200)
    second["labels"]["novel"] = "novel"
    third = whole(300) | {"seed": 4}
    for one in (first, second, third):
        write_json(record_path(tmp_path, one), one)
    assert read_records(tmp_path) == [first, second]
    said = capsys.readouterr().err
    assert f"left out: {record_path(tmp_path, third)}" in said
    assert "says other things of run abc" in said


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text.replace("69", "68", 1), "its content is not what its digest says"),
        (lambda text: "", "no whole JSON"),
        (lambda text: text[: len(text) // 2], "no whole JSON"),
        (lambda text: text + "{}", "no whole JSON"),
        (lambda text: "[]", "a JSON list"),
        (lambda text: "[" * 100_000, "no whole JSON"),
        (lambda text: '{"schema": "mimu/4"}', "it has no digest"),
    ],
    ids=["digit", "empty", "half", "appended", "list", "deep", "other"],
)
def test_a_broken_record_is_said_and_measured_again(damage, why, tmp_path, capsys):
    one = whole()
    path = record_path(tmp_path, one)
    write_json(path, one)
    mask = tmp_path / one["mask_path"]
    mask.parent.mkdir(parents=True)
    mask.write_bytes(b"mask")
    one["mask_sha256"] = {"mimu": "5cbb5ee8dd48e4a2b4a4d4b6e2a5b46e6b2c3f0a0f4a1dc50c5a0fd3c0f5f5f5"}
    assert read_whole(tmp_path, path) is None, "its mask is another"
    assert f"{mask} is damaged (its content is not what {path.name} says)" in capsys.readouterr().err
    one["mask_sha256"] = {"mimu": hashlib.sha256(b"mask").hexdigest()}
    write_json(path, one)
    assert read_whole(tmp_path, path) == one
    path.write_text(damage(path.read_text()))
    assert read_whole(tmp_path, path) is None
    said = capsys.readouterr().err
    assert f"{path} is damaged ({why}" in said
    assert "measured anew" in said
    mask.unlink()
    write_json(path, one)
    assert read_whole(tmp_path, path) is None
    assert "it is missing" in capsys.readouterr().err
