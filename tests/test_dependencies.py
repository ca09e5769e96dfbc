"""Every import is declared in pyproject.toml, and everything declared there is imported or run."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Distributions whose import has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "dotenv": "python-dotenv",
    "mpl_toolkits": "matplotlib",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

# Imported, but declared nowhere.
NOT_DECLARED = {
    "erasus": "a rival that benchmarks/public.py measures: its command brings it by `uv run --with`",
    "typeguard": "tyro needs it: benchmarks/undisturbed.py loads it ahead of a measurement",
}

# Declared, but imported by no file here.
RUN_NOT_IMPORTED = {
    "pre-commit": "a command: runs the hooks",
    "pytest-timeout": "a plugin: reads `timeout` of [tool.pytest.ini_options]",
    "pytest-xdist": "a plugin: tests/conftest.py sets its options",
    "ruff": "a command: formats and lints",
    "ty": "a command: checks types",
}


@cache  # three tests read the whole tree
def imported(source: str) -> frozenset[str]:
    """First words of all absolute imports of a source text, at any depth; `_import` of training/engines.py is one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_import":
            found |= {str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return frozenset(found)


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def without_tests() -> list[Path]:
    return [path for path in sources() if not path.is_relative_to(ROOT / "tests")]


def distributions(paths: list[Path]) -> set[str]:
    """Distributions that files import: neither the standard library nor the project's own modules."""
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources()}
    names = {name for path in paths for name in imported(path.read_text(encoding="utf-8"))}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names - own - sys.stdlib_module_names}


def declared() -> tuple[set[str], set[str]]:
    """(what the project and its extras need, what the dev group adds), by distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = [line for lines in project["project"]["optional-dependencies"].values() for line in lines]
    groups = project["dependency-groups"]
    needed = map(Requirement, [*project["project"]["dependencies"], *groups["pipeline"], *extras])
    dev = map(Requirement, groups["dev"])
    return {canonicalize_name(r.name) for r in needed}, {canonicalize_name(r.name) for r in dev}


def test_imports_are_found_at_every_depth() -> None:
    text = "import a.b\ndef f():\n    from c.d import e\n    if x:\n        import g as h\nfrom . import i\n"
    assert imported(text + "j = _import('j', 'extra')\n") == {"a", "c", "g", "j"}


def test_every_import_of_the_source_is_declared() -> None:
    needed, _ = declared()
    assert distributions(without_tests()) - needed == set(NOT_DECLARED)


def test_every_import_of_the_tests_is_declared() -> None:
    needed, dev = declared()
    assert distributions(sources()) - needed - dev == set(NOT_DECLARED)


def test_the_package_needs_what_it_imports() -> None:
    """`pip install .` brings the folder mimu alone, so that its imports are the project's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {canonicalize_name(Requirement(line).name) for line in project["project"]["dependencies"]}
    assert distributions([path for path in sources() if path.parent == ROOT / "mimu"]) == needed
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == ["mimu"]
    assert project["tool"]["uv"]["default-groups"] == ["dev", "pipeline"]


def test_everything_declared_is_used() -> None:
    needed, dev = declared()
    assert needed - distributions(without_tests()) == set()
    assert dev - distributions(sources()) == set(RUN_NOT_IMPORTED)


def test_every_dependency_has_a_lower_bound() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)
    groups = project["dependency-groups"].values()
    lines = [*project["project"]["dependencies"], *(line for group in groups for line in group)]
    assert [line for line in lines if not re.search(r">=\d", line)] == []
