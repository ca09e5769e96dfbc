"""Benchmarks start as their docstrings say, from any folder, without installing anything."""

import ast
import re
from pathlib import Path

from benchmarks.many_classes import make_tree
from benchmarks.run_all import commands

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if '"__main__"' in path.read_text("utf-8")]
ON_THE_PATH = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"


def imported(statement: ast.stmt) -> set[str]:
    """First part of the name of every module that a statement imports."""
    if isinstance(statement, ast.Import):
        return {alias.name.partition(".")[0] for alias in statement.names}
    return {(statement.module or "").partition(".")[0]} if isinstance(statement, ast.ImportFrom) else set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_finds_the_project(path: Path) -> None:
    """`uv run benchmarks/X.py` puts benchmarks/ on the path: the project comes from this line, ahead of its rooms."""
    body = ast.parse(path.read_text("utf-8")).body
    added = [place for place, statement in enumerate(body) if ast.unparse(statement) == ON_THE_PATH]
    siblings = {other.stem for other in path.parent.glob("*.py")} - ROOMS
    assert len(added) == any(imported(statement) & ROOMS for statement in body)  # one of numpy alone needs no line
    for place, statement in enumerate(body):
        assert not imported(statement) & siblings, "say benchmarks.X: X alone is found from this folder only"
        assert not imported(statement) & ROOMS or place > added[0]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_sets_the_spin_count_before_torch_is_loaded(path: Path) -> None:
    """The package does, when its first module is imported; a script imports it ahead of torch and of the project."""
    names = [imported(statement) for statement in ast.parse(path.read_text("utf-8")).body]
    heavy = [place for place, found in enumerate(names) if found & (ROOMS - {"benchmarks"} | {"torch"})]
    package = [place for place, found in enumerate(names) if "benchmarks" in found]
    assert path not in SCRIPTS or not heavy or package[0] < heavy[0]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_that_can_be_run_does_something(path: Path) -> None:
    """Without its last lines a script ends at once, with exit code 0 and no result."""
    text = path.read_text("utf-8")
    told = f"benchmarks/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert "def main(" not in text or told == ('\n\nif __name__ == "__main__":\n' in text)


def test_a_tree_of_many_classes_is_made_once_and_of_different_images(tmp_path: Path) -> None:
    """Equal files would be one row of kept pixels, and a classifier of theirs would be judged by what it was taught."""
    tree = make_tree(tmp_path, 3, 5)
    files = sorted(tree.rglob("*.png"))
    assert [len(list(folder.iterdir())) for folder in sorted(tree.iterdir())] == [5, 5, 5]
    assert len({file.read_bytes() for file in files}) == 15
    times = [file.stat().st_mtime_ns for file in files]
    assert make_tree(tmp_path, 3, 5) == tree
    assert [file.stat().st_mtime_ns for file in files] == times
    assert not list(tmp_path.glob("*.part"))


def test_what_measures_everything_publishes_everything(tmp_path: Path) -> None:
    """Every part ends in a benchmark that writes its table; each table of the page is made here or said not to be."""
    parts = commands(tmp_path, docs=True)
    lines = [line for part in parts.values() for line in part]
    assert all(Path(line[1]).is_file() for line in lines)
    assert all(part[-1][-1] == "--docs" for part in parts.values())
    assert not any("--docs" in line for part in commands(tmp_path, docs=False).values() for line in part)
    told = (ROOT / "benchmarks" / "run_all.py").read_text("utf-8").partition('"""\n')[0]
    for name in re.findall(r"<!-- table: speed_(\w+) -->", (ROOT / "docs" / "speed.md").read_text("utf-8")):
        short = {"many_classes_mlp": "many_classes", "million": "--million"}.get(name, name)
        assert short in parts or short in told or name == "pictures"  # pictures need a package of the system
