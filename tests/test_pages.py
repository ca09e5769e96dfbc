"""README, docs and EXPERIMENTS hold together: sizes, links, anchors, tables against their JSON, version and licence."""

import re
import struct
import tomllib
from argparse import Namespace
from pathlib import Path

from benchmarks import (
    comparison,
    docs_tables,
    graph_generation,
    image_trees,
    many_classes,
    message_passing,
    picture,
    scaling,
    sweep,
)

import pytest
import yaml

from core.artifacts import read_json, write_json
from core.config import PROJECT_ROOT, UserError
from reporting.tables import SPENT

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


def test_a_class_is_forgotten_in_ten_lines() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert broken(PAGES[name], TEXTS[name]) == []


@pytest.mark.parametrize("link", ["gone.md", "LICENSE#x", "docs/usage.md#gone", "#gone"])
def test_a_broken_link_is_seen(link: str) -> None:
    assert broken(README, f"# Here\n\n[a]({link})") == [link]
    assert broken(README, "# Here and there\n\n[a](#here-and-there) [b](docs/usage.md) [c](https://x.org)") == []


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_is_there(name: str) -> None:
    """Of this checkout: what runs write lies in other folders."""
    named = re.findall(r"\b(?:benchmarks|configs|pretrained|tests)/[\w/]+\.\w+", TEXTS[name])
    assert [path for path in named if not (PROJECT_ROOT / path).is_file()] == []


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (PAGES[name].parent / path).resolve()
        for name, text in TEXTS.items()
        for path in re.findall(r"\]\(([^)#\s:]+)", text)
    }
    assert [name for name, page in PAGES.items() if name != "README.md" and page not in linked] == []


# --- tables -----------------------------------------------------------------------------------------------


def test_every_table_has_its_json_and_every_json_its_table() -> None:
    """A table of which parts are shown need not be shown as a whole."""
    sources = {read_json(docs_tables.RESULTS / f"{name}.json", foreign=True).get("of") for name in NAMES}
    assert len(shown()) == len(set(shown()))
    assert set(shown()) <= set(NAMES)
    assert set(NAMES) - set(shown()) <= sources


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
    first = "| method | a\\|b |\n| --- | --- |\n| x | 1 |\n| y | 2\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1 |\n" + below
    second = "| name | c |\n| --- | --- |\n| y | 2\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1 |\n" + below
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
    write_json(tmp_path / "all.json", {"of": "whole", "columns": {"a": "c"}})
    assert docs_tables.load("all") == {"columns": ["c"], "rows": [["x"]]}
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


# --- what benchmarks write --------------------------------------------------------------------------------

WORKERS = dict.fromkeys(scaling.WORKERS, 100.0)
RATES = [{"1 x 1": 1.0, "1 x 2": 2.0, "2 x 1": value} for value in (1.04, 0.84, 1.14)]
SCALING = {
    "launches": [6.8, 0.5, 0.52, 0.54],
    "throughput": dict.fromkeys(
        ("MLP, batch 512", "MLP, batch 8,192", "ResNet-18, batch 64", "ResNet-18, batch 256"), RATES
    ),
    "simulated": {"together": WORKERS, "in turn": WORKERS | {16: 23409.4}},
}
PASSES = {
    "closed_large": [0.02],
    "edges_large": [35.4],
    "edges_large_is_scaled": False,
    "floor_seconds": 0.001,
    "bandwidth": 51e9,
    "extra_activations": 7.8,
    "head_seconds": 1.2,
    "head_peak_bytes": 2.6e9,
    "growth": {"exponent": 0.91},
}
GRAPHS = {
    "plain": [0.57],
    "generate_seconds_per_batch": 1.0,
    "share_of_plain": 1.87,
    "speed_up": 83.0,
    "times_smaller": {"128 x 512": 341.3},
}
TREES = {
    "ratio": 1.69,
    "images_per_second": 1321.0,
    "torchvision_images_per_second": 784.0,
    "busy": 0.94,
    "start_ratio": 53.0,
}
MILLION = {"cold_seconds": 5.8, "cold_peak_mib": 239.0, "cached_seconds": 0.061, "cached_peak_mib": 236.0}


def tables_by_hand() -> dict[str, tuple[str, list[list[str]]]]:
    """Tables of benchmarks for figures that were chosen so that their values are known."""
    tree, count = (Namespace(pictures=None, million=most, count=20_000, repeats=3) for most in (None, 1_280_000))
    made = [
        scaling.tables(SCALING),
        message_passing.tables(PASSES),
        graph_generation.tables(GRAPHS),
        image_trees.tables(TREES, tree),
        image_trees.tables(MILLION, count),
        sweep.tables({"full": [1.0], "points": {"mimu": [0.018], "random": [0.017]}}),
    ]
    return {name: (n, [list(row) for row in rows]) for tables in made for name, (n, rows) in tables.items()}


@pytest.mark.parametrize("name", tables_by_hand())
def test_a_benchmark_writes_the_rows_that_the_page_has(name: str) -> None:
    n, (head, *body) = tables_by_hand()[name]
    there = docs_tables.load(name)
    assert n
    assert head == there["columns"]
    assert [row[0] for row in body] == [row[0] for row in there["rows"]]


def test_values_of_benchmarks_by_hand() -> None:
    found = {name: rows for name, (_, rows) in tables_by_hand().items()}
    assert found["scaling_processes"][3][1] == "0.52 (0.52, 0.42, 0.57)"
    assert found["scaling_jobs"][5] == ["16", "100", "23,409"]
    assert [row[1] for row in found["speed_message_passing"][1:]] == ["1,770", "20.0", "7.8", "1.2 s, 2.6 GB", "N^0.91"]
    whole = "187 % of its rate; with reading images and writing graphs 57 %"
    assert [row[1] for row in found["speed_graph_generation"][1:]] == ["83 times faster", whole, "341"]
    assert [row[1] for row in found["speed_image_trees"][1:]] == ["1.69 (1,321 / 784), 2 cores 94 % busy", "53"]
    assert [row[1] for row in found["speed_million"][1:]] == ["5.8 s, 239 MiB", "0.061 s, 236 MiB"]
    assert found["speed_sweep"][1][1] == "1.8 % (1.7 %)"


def test_values_of_pictures_by_hand() -> None:
    rates = {"read_per_processor_second": 231_080.4, "read_per_second": 120_000.0}
    rates |= {"epochs_per_processor_second": 19_965.2, "epochs_per_second": 7_638.9}
    results: dict = {"first_pass_processor_ratio": 1.049, "first_pass_ratio": 1.2, "read": 508, "files": 8121}
    results |= {"kept_against_anew": 46_008.4} | {f"batch {batch}": rates for batch in image_trees.RUN_BATCHES}
    found = image_trees.tables(results, Namespace(pictures=Path("png"), million=None))
    ((n, (head, *body)),) = found.values()
    assert set(found) == {"speed_pictures"}
    assert n == "1 pass in 8 parts; 8 epochs; seconds of the processor"
    assert head == ["what", "value"]
    assert body[0] == ["first look at 508 of 8,121 real pictures / decoding each once", "1.05 (1.20 on the clock)"]
    assert [value for _, value in body[1:4]] == [
        "46,008",
        "231,080 (120,000 on the clock)",
        "19,965 (7,639 on the clock)",
    ]
    assert [what for what, _ in body if "batches" in what] == [
        f"images/s of later epochs, batches of {batch}: read and normalised" for batch in (32, 512)
    ]


@pytest.mark.parametrize(("power", "peaks"), [(1, (500, 590, 1490)), (2, (500, 500 + 90**2, 500 + 990**2))])
def test_growth_of_memory_by_hand(power: int, peaks: tuple[int, ...]) -> None:
    """The smallest run's memory, which has little to do with classes, is taken off first."""
    grown = many_classes.exponent(dict(zip((10, 100, 1000), peaks, strict=True)))
    assert grown == pytest.approx(power)
    one = {"peak_bytes": 1.468e9, "processor_seconds": 450.4, "seconds": 1812.0}
    found = many_classes.tables({"runs": {1000: one}, "exponent": grown}, Namespace(model="HookedResnet"))
    assert found == {
        "speed_many_classes_resnet": (
            f"1 run each; memory grows as classes^{power}.00",
            [
                ["classes", "images", "peak memory, GB", "processor seconds", "seconds on the clock"],
                ["1,000", "40,000", "1.47", "450", "1,812"],
            ],
        )
    }


def test_the_comparison_says_over_what_it_averages() -> None:
    values = {"forget_score": 1.0, "avg_gap": 2.0, "weights_changed": 1234, "seconds": 0.5}
    cells = [{"seed": seed, "class": 0, "methods": {"mimu": {"test": values}}} for seed in range(3)]
    n, (head, row) = comparison.tables("comparison_mlp", cells, ["mimu"])["comparison_mlp"]
    assert n == "1 classes x 3 classifiers (3 cells); ± is the 95 % t-interval over the 3 classifiers"
    assert head == docs_tables.load("comparison_mlp")["columns"]
    assert (row[0], row[1], row[-2]) == ("MIMU (ours)", "1 ± 0", "1,234")
    values |= {"seconds_offline": 12.0, "seconds_alone": 12.5}
    spent = comparison.table(cells, ["mimu"], {cost: head for head, cost in SPENT.items()})
    assert spent == [["method", *SPENT], ["MIMU (ours)", "12", "12.5", "0.5"]]


def test_saturated_terms_are_named() -> None:
    """UA is 99.4 and 100 of the methods that forget, RA 90 and 92; a method that forgets nothing does not count."""

    def values(*numbers: float) -> dict:
        names = ("forget_score", "UA", "RA", "retain_score", "MIA_efficacy")
        return {"test": dict(zip(names, numbers, strict=True))}

    methods = {
        "mimu": values(0, 100, 92, 88, 100),
        "salun": values(1, 99.4, 90, 88.5, 98.9),
        "default": values(88, 10, 50, 50, 0),
    }
    cells = [{"seed": seed, "class": 0, "methods": methods} for seed in range(2)]
    assert comparison.saturated_terms(cells, list(methods)) == (
        "saturated terms of Avg Gap, among the 2 methods that leave at most 1 % of the class: "
        "UA (99.4 to 100.0 %), TA (88.0 to 88.5 %)"
    )
    assert comparison.saturated_terms(cells, ["mimu", "default"]) == ""


def test_the_picture_shows_what_records_say() -> None:
    def record(kappa: int, score: float) -> dict:
        scores = {"forget_score": score, "retain_score": 90.0}
        return {"kappa": kappa, "methods": dict.fromkeys(picture.METHODS, scores)}

    records = [record(kappa, score) for kappa in (400, 8) for score in (10.0, float(kappa) / 10)]
    assert picture.values(records, "mimu", "forget_score").tolist() == [[10.0, 0.8], [10.0, 40.0]]
    assert struct.unpack(">II", picture.drawn(records)[16:24]) == (1200, 525)
