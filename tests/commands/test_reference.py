"""The generated pages: committed text equals what is registered now, and wrong examples are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import main
from commands.docs import (
    DOCS,
    EXAMPLE,
    extract,
    method_section,
    methods_page,
    metric_section,
    metrics_page,
    pages,
    source,
    write_docs,
)
from core.artifacts import SCHEMA, read_json
from core.config import UserError
from measure.metrics import METRICS
from rivals.compared import METHODS
from tests.helpers.records import whole
from unlearn.masks import Mask
from unlearn.registry import Context, Point

WHOLE = whole(64)
OTHERS = {"mimu": "taylor_mask", "novel": "sft"}  # names of methods that are registered


def renamed(value: Any) -> Any:
    """A part of a record with registered methods instead of the helper's."""
    return {OTHERS.get(key, key): item for key, item in value.items()} if isinstance(value, dict) else value


SCORES = {"forget_score": 1.23456, "retain_score": 88.0, "avg_gap": None, "weights_changed": 64, "seconds": 0.5}
RECORD: dict[str, Any] = {field: renamed(value) for field, value in WHOLE.items()}
RECORD |= {"forget_class": [1, 2], "forget_names": ["1", "2"], "seed": 3, "answer": "taylor_mask"}
RECORD["methods"] = RECORD["methods"] | {"taylor_mask": SCORES}
RECORD["settings"] = RECORD["settings"] | {"taylor_mask": {"lr": 0.1}}
RECORD["verdicts"] = RECORD["verdicts"] | {"taylor_mask": [{"key": "fine", "sentence": "nothing found"}]}
RECORD["provenance"] = RECORD["provenance"] | {"commit": "abc"}


def written(folder: Path, record: object) -> Path:
    path = folder / "record.json"
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("name", ["methods.md", "metrics.md"])
def test_committed_pages_are_what_is_registered(name):
    expected = pages(read_json(DOCS / EXAMPLE))[name]
    assert (DOCS / name).read_text(encoding="utf-8") == expected, "stale: run `uv run main.py docs` and commit docs/"


def test_pages_change_with_the_registries(tmp_path):
    example = extract(written(tmp_path, RECORD))
    page = methods_page(METHODS, example)
    assert all(f"## `{name}`: {entry.label}\n\n{entry.definition}\n" in page for name, entry in METHODS.items())
    assert methods_page({**METHODS, "sft": replace(METHODS["sft"], label="another")}, example) != page
    assert methods_page({name: METHODS[name] for name in ("sft", "default")}, example) != page
    page = metrics_page(METRICS, example)
    assert all(f"## `{name}` [{entry.unit}]\n\n{entry.definition}\n" in page for name, entry in METRICS.items())
    assert metrics_page({**METRICS, "UA": replace(METRICS["UA"], target="another")}, example) != page


def test_sections_by_hand(tmp_path):
    example = extract(written(tmp_path, RECORD))

    def ranking(context: Context, point: Point) -> Mask:
        """It
        ranks.
        """
        raise NotImplementedError

    grid = ({"lr": 0.1, "steps": 3}, {"lr": 1})
    tuned = replace(METHODS["taylor_mask"], source="2310.12508", mask=ranking, grid=grid)
    assert method_section(tuned, example) == (
        "## `taylor_mask`: signed Taylor\n\nIt ranks.\n\n"
        "- source: [arXiv:2310.12508](https://arxiv.org/abs/2310.12508)\n"
        "- depends on: kappa\n"
        "- settings: lr = 0.1, steps = 3; lr = 1 (the first is the default)\n"
        "- example: forget_score 1.235, retain_score 88, avg_gap -, weights_changed 64, edit_bytes -, "
        "seconds 0.5; with lr = 0.1\n"
        "- verdict: fine (nothing found)\n"
    )
    assert "example" not in method_section(METHODS["random"], example)
    assert metric_section(METRICS["forget_score"], example) == (
        "## `forget_score` [%]\n\n"
        "Accuracy on T's images of the forgotten classes (FA-test), the share with argmax_c p_c = y.\n\n"
        "- better: down; target: as retrained, 0\n"
        "- group: core (outputs on T)\n"
        "- source: accuracy\n"
        "- example: untouched 90\n"
    )
    assert source("control: the trivial answer, 12.5 %") == "control: the trivial answer, 12.5 %"
    assert source("e.g. arXiv:1611.06440, v2") == "e.g. [arXiv:1611.06440](https://arxiv.org/abs/1611.06440), v2"


def test_an_example_is_kept_and_used_again(tmp_path):
    folder = tmp_path / "docs"
    first = {path.name: path.read_text() for path in write_docs(written(tmp_path, RECORD), folder)}
    assert set(first) == {"methods.md", "metrics.md"}
    kept = read_json(folder / EXAMPLE)
    assert "confusion" not in kept
    assert kept["commit"] == "abc"
    assert "forgotten class 1, 2, kappa 64, seed 3" in first["methods.md"]
    (folder / "methods.md").unlink()
    assert {path.name: path.read_text() for path in write_docs(None, folder)} == first


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no"),
        ("{", "no whole JSON"),
        ("[1]", "a JSON list, not an object"),
        ("{}", f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"schema": "another"}), f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"methods": {"sft": {"forget_score": "low"}}}), f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"methods": [1]}), f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"verdicts": 3}), f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"verdicts": {"sft": ["fine"]}}), f"is no {SCHEMA} record"),
        (json.dumps(RECORD | {"settings": {"sft": 3}}), f"is no {SCHEMA} record"),
        (json.dumps({key: value for key, value in RECORD.items() if key != "verdicts"}), "has no verdicts"),
        (json.dumps(RECORD | {"provenance": None}), f"is no {SCHEMA} record"),
    ],
)
def test_a_wrong_example_is_refused_and_nothing_is_written(content, says, tmp_path, capsys):
    path, folder = tmp_path / "record.json", tmp_path / "docs"
    if content is not None:
        path.write_text(content)
    assert main.main(["docs", "--example", str(path), "--folder", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert str(path) in line
    assert not folder.exists()


def test_a_folder_without_an_example_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*example\.json: give --example RECORD\.json"):
        write_docs(None, tmp_path)
    (tmp_path / EXAMPLE).write_text("{}")
    with pytest.raises(UserError, match="is no extract of a record"):
        write_docs(None, tmp_path)
