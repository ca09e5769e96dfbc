"""What a stage's key says of the code: every file that can run is in it, and no other, whoever imports whom."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core import hashes
from core.choices import OpenChoice
from core.config import PROJECT_ROOT

STAGES = ("stages.classifier", "stages.graphs", "stages.gcn", "stages.evaluation")
ENTRIES = ("images.index", "images.pixel_cache", *STAGES, "reporter")


def sources() -> set[str]:
    """The nine scripts and the files of rooms, a room being a folder with an `__init__.py`."""
    rooms = {path.parent for path in PROJECT_ROOT.glob("*/__init__.py")} - {
        PROJECT_ROOT / "tests",
        PROJECT_ROOT / "benchmarks",
    }
    files = [*PROJECT_ROOT.glob("*.py"), *(path for room in rooms for path in room.glob("*.py"))]
    return {path.relative_to(PROJECT_ROOT).as_posix() for path in files}


def told(place: Path, code: str) -> list[str]:
    """What a fresh process prints that runs `code` with the sources in `place`."""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(place)!r})\n{code}"]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stdout.split()


def write(place: Path, files: dict[str, str]) -> Path:
    """A project of its own: the files that `core.hashes` imports, those that it reads names from, and these."""
    read = [f"{kind.registered_in.replace('.', '/')}.py" for kind in OpenChoice.__subclasses__()]
    for name in (*hashes.closure("core.hashes"), *read):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT_ROOT / name, place / name)
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def keys(place: Path, modules: list[str]) -> list[str]:
    return told(place, f"from core import hashes\nfor m in {modules!r}: print(hashes.code_key(m))")


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_a_fresh_process_imports_is_in_the_closure(entry):
    """The interpreter is the oracle: it may import less (a function's imports wait), never more."""
    code = f"""
import {entry}
from pathlib import Path
files = [Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
for file in files:
    if file.exists() and file.is_relative_to({str(PROJECT_ROOT)!r}) and ".venv" not in file.parts:
        print(file.relative_to({str(PROJECT_ROOT)!r}).as_posix())
"""
    loaded = set(told(PROJECT_ROOT, code))
    found = hashes.closure(entry)
    assert f"{entry.replace('.', '/')}.py" in loaded
    assert loaded <= set(found) <= sources()
    assert list(found) == sorted(set(found))


@pytest.mark.slow
def test_every_way_to_import_counts(tmp_path):
    files = {
        "room/__init__.py": "from room import listed",
        "room/listed.py": "",
        "room/a.py": "def f():\n    if True:\n        import late",
        "room/b.py": "class A:\n    from . import c\n    from .d import x",
        "room/c.py": "",
        "room/d.py": "from library import x",
        "room/other.py": "import alone",
        "plain.py": "import os, room.b as b\nfrom json import a",
        "named.py": "from room import a",
        "late.py": "import named",  # a circle
        "alone.py": "",
        "folder/f.py": "",  # no room: it has no __init__.py
        "tests/__init__.py": "",
        "tests/t.py": "",
        "reads.py": "import tests.t\nimport folder.f\nfrom alone import anything",
    }
    code = "from core import hashes\nfor m in ({!r},): print(*hashes.closure(m), sep='\\n')"
    place = write(tmp_path, files)
    room = {"room/__init__.py", "room/listed.py"}
    expected = {
        "plain": {"plain.py", "room/b.py", "room/c.py", "room/d.py", *room},
        "named": {"named.py", "late.py", "room/a.py", *room},
        "reads": {"reads.py", "alone.py"},
        "room.other": {"room/other.py", "alone.py", *room},
        "alone": {"alone.py"},
    }
    assert {name: set(told(place, code.format(name))) for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_key_changes_with_the_files_within_reach_and_no_other(tmp_path, seed):
    """On a random project: reach is counted here by powers of who imports whom, not by walking."""
    draw, names = random.Random(seed), [f"m{number}" for number in range(7)]
    reach = {one: {other for other in names if one != other and draw.random() < 0.2} for one in names}
    place = write(tmp_path, {f"{one}.py": "".join(f"import {x}\n" for x in sorted(reach[one])) for one in names})
    for _ in names:
        reach = {one: {one} | near | {x for y in near for x in reach[y]} for one, near in reach.items()}
    before = keys(place, names)
    for edited in names:
        text = (place / f"{edited}.py").read_text()
        (place / f"{edited}.py").write_text(text + "# edited\n")
        changed = {one for one, a, b in zip(names, before, keys(place, names), strict=True) if a != b}
        assert changed == {one for one in names if edited in reach[one]}
        (place / f"{edited}.py").write_text(text)
    assert keys(place, names) == before


def test_the_keys_of_the_stages_change_with_their_closures_and_no_other_file(monkeypatch):
    """Every source file of this project, edited in turn."""
    closures = {entry: set(hashes.closure(entry)) for entry in ENTRIES}
    kept = hashes._imported()
    before = {entry: hashes._hash_of(closures[entry]) for entry in ENTRIES}
    for name in sources():
        edited = kept | {name: kept[name] + b"# edited\n"}
        monkeypatch.setattr(hashes, "_imported", lambda edited=edited: edited)
        changed = {entry for entry in ENTRIES if hashes._hash_of(closures[entry]) != before[entry]}
        assert changed == {entry for entry in ENTRIES if name in closures[entry]}


def test_an_edit_makes_anew_only_what_comes_after_it():
    """Nothing that draws or writes reports is in a record's closure, and no later stage in that of an earlier one."""
    later = {
        "stages.classifier": ("stages/graphs.py", "stages/gcn.py", "unlearn/methods.py"),
        "stages.graphs": ("stages/gcn.py", "unlearn/methods.py", "eval.py"),
        "stages.gcn": ("stages/evaluation.py", "unlearn/methods.py", "measure/metrics.py", "eval.py"),
        "stages.evaluation": ("pipeline.py", "main.py", "reporter.py", "stages/preflight.py"),
    }
    page = {name for name in sources() if name.startswith(("reporting/", "commands/"))} | {"reporter.py"}
    for entry in STAGES:
        found = set(hashes.closure(entry))
        assert set(later[entry]) <= sources()
        assert not found & {*later[entry], *page}, entry
    needed = {"eval.py", "unlearn/methods.py", "stages/gcn.py", "stages/setup.py"}
    assert needed <= set(hashes.closure("stages.evaluation"))
    assert not [name for name in hashes.closure("reporter") if name.startswith(("stages/", "unlearn/", "measure/"))]


def test_an_edit_for_the_graph_network_retrains_no_classifier():
    """Neither graphs' data nor samplers nor objectives are in reach of a classifier's training, nor of making graphs.

    `model.py` holds the graph network beside the classifiers, so that its operator and the layout are in reach.
    """
    classifier, graphs = hashes.closure("stages.classifier"), hashes.closure("stages.graphs")
    assert {"trainer.py", "model.py"} <= set(classifier)
    assert "data.py" not in classifier
    assert not [name for name in (*classifier, *graphs) if name.startswith("unlearn/")]
    of_graphs = [name for name in classifier if name.startswith("graphs/")]
    assert of_graphs == ["graphs/__init__.py", "graphs/layout.py", "graphs/message_passing.py"]
    assert "graphs/subsets.py" not in graphs
    assert {"data.py", "unlearn/objectives.py", "graphs/subsets.py"} <= set(hashes.closure("stages.gcn"))


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(AssertionError, match=r"images\.nothing is no module of this project"):
        hashes.closure("images.nothing")
