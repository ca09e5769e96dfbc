"""README, docs and EXPERIMENTS hold together: sizes, links, anchors, tables against their JSON, version and licence."""

import re
import struct
import tomllib
from pathlib import Path

import benchmarks.docs_tables as docs_tables

import pytest
import yaml

from artifacts import read_json, write_json
from config import PROJECT_ROOT, UserError

README = PROJECT_ROOT / "README.md"
PICTURE = PROJECT_ROOT / "docs" / "picture.png"
PAGES = {page.relative_to(PROJECT_ROOT).as_posix(): page for page in docs_tables.pages()}
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}
NAMES = sorted(path.stem for path in docs_tables.RESULTS.glob("*.json"))


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        there = text if file == page else file.read_text(encoding="utf-8") if anchor and file.exists() else ""
        if not file.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


def shown() -> list[str]:
    """Names of the tables that pages show."""
    return [found[2] for text in TEXTS.values() for found in docs_tables.TABLE.finditer(text)]


def test_the_readme_and_its_picture_are_small() -> None:
    assert README.stat().st_size <= 9_000
    assert PICTURE.stat().st_size <= 60_000
    width, height = struct.unpack(">II", PICTURE.read_bytes()[16:24])
    assert 800 <= width <= 1600
    assert height < width


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert broken(PAGES[name], TEXTS[name]) == []


@pytest.mark.parametrize("link", ["gone.md", "LICENSE#x", "docs/usage.md#gone", "#gone"])
def test_a_broken_link_is_seen(link: str) -> None:
    assert broken(README, f"# Here\n\n[a]({link})") == [link]
    assert broken(README, "# Here and there\n\n[a](#here-and-there) [b](docs/usage.md) [c](https://x.org)") == []


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (PAGES[name].parent / path).resolve()
        for name, text in TEXTS.items()
        for path in re.findall(r"\]\(([^)#\s:]+)", text)
    }
    assert [name for name, page in PAGES.items() if name != "README.md" and page not in linked] == []


# --- tables -----------------------------------------------------------------------------------------------


def test_every_table_has_its_json_and_every_json_its_table() -> None:
    assert sorted(shown()) == NAMES


def test_every_marker_is_closed_and_no_table_of_values_stands_outside() -> None:
    for name in ("docs/results.md", "docs/speed.md", "docs/scaling.md"):
        outside = docs_tables.TABLE.sub("", TEXTS[name])
        assert "<!--" not in outside
        assert not re.search(r"^\|", outside, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_tables_say_what_their_json_says(name: str) -> None:
    stale = "stale: run `uv run benchmarks/docs_tables.py` and commit the pages"
    assert docs_tables.refreshed(TEXTS[name]) == TEXTS[name], stale


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_whole(name: str) -> None:
    """It says over what it averages, what measured it and in which commit; every row has every column."""
    table = docs_tables.load(name)
    assert table["n"]
    assert table["command"]
    assert ("commit" in table) != ("published" in table)
    assert re.fullmatch(r"[0-9a-f]{7}( with changes)?", table.get("commit") or table["published"])
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    script = re.search(r"benchmarks/\w+\.py", table["command"])
    assert script is None or (PROJECT_ROOT / script[0]).is_file()


def test_the_table_of_the_readme_is_small() -> None:
    assert len(docs_tables.load("readme")["rows"]) <= 8


def test_a_page_follows_its_json(tmp_path, monkeypatch) -> None:
    """By hand: what stands between markers is replaced, cells are made safe, a part of a table is looked up."""
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path)
    whole = {"columns": ["method", "a|b"], "rows": [["x", "1"], ["y", "2 ± 1"]], "n": "3 runs", "command": "uv run q"}
    write_json(tmp_path / "whole.json", whole | {"commit": "abcdef0"})
    write_json(tmp_path / "part.json", {"of": "whole", "columns": {"method": "name", "a|b": "c"}, "rows": ["y"]})
    page = "Before.\n<!-- table: whole -->\nold\n<!-- end -->\n<!-- table: part -->\n<!-- end -->\nAfter.\n"
    below = "\nn: 3 runs. Command: `uv run q` (commit abcdef0).\n"
    first = "| method | a\\|b |\n| --- | --- |\n| x | 1 |\n| y | 2 ± 1 |\n" + below
    second = "| name | c |\n| --- | --- |\n| y | 2 ± 1 |\n" + below
    expected = (
        f"Before.\n<!-- table: whole -->\n{first}<!-- end -->\n<!-- table: part -->\n{second}<!-- end -->\nAfter.\n"
    )
    assert docs_tables.refreshed(page) == expected
    assert docs_tables.refreshed(expected) == expected


def test_a_table_that_is_not_there_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path)
    with pytest.raises(UserError, match=r"shows the table gone, but there is no .*gone\.json"):
        docs_tables.refreshed("<!-- table: gone -->\n<!-- end -->\n")
    write_json(tmp_path / "whole.json", {"columns": ["a"], "rows": [["x"]]})
    write_json(tmp_path / "part.json", {"of": "whole", "columns": {"b": "b"}, "rows": ["y"]})
    with pytest.raises(UserError, match="shows b, y, which whole lacks"):
        docs_tables.load("part")


def test_a_benchmark_writes_its_table_and_the_pages(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(docs_tables, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path / "docs" / "results")
    monkeypatch.setattr(docs_tables.sys, "argv", ["/x/benchmarks/q.py", "--full", "--json", "a.json", "--docs"])
    monkeypatch.setattr(docs_tables, "provenance", lambda: {"commit": "abcdef0123", "dirty": True})
    for name in ("README.md", "EXPERIMENTS.md", "docs/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<!-- table: t -->\n<!-- end -->\n" if name == "docs/a.md" else "Nothing.\n")
    docs_tables.publish("t", [["what"], ["5"]], "1 run")
    said = "Command: `uv run benchmarks/q.py --full` (commit abcdef0 with changes)."
    table = f"| what |\n| --- |\n| 5 |\n\nn: 1 run. {said}\n"
    assert (tmp_path / "docs/a.md").read_text() == f"<!-- table: t -->\n{table}<!-- end -->\n"
    assert read_json(tmp_path / "docs/results/t.json")["rows"] == [["5"]]


# --- version and licence ----------------------------------------------------------------------------------


def test_version_and_licence_agree() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((PROJECT_ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0" in (PROJECT_ROOT / "LICENSE").read_text("utf-8")
    assert "Apache-2.0" in TEXTS["README.md"]


def test_the_citation_is_one() -> None:
    citation = yaml.safe_load((PROJECT_ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "date-released"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "MIMU contributors"}]
