"""What must never be committed is not, and the hooks that see to it are local."""

import re
import subprocess
import tomllib
from functools import lru_cache
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# Written so that they do not match themselves.
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(org|com)|[/.]simple/|--(extra-)?index-url"
    r"|--find[-]links|/packages/[0-9a-f]{2}/[0-9a-f]{2}/"
)
MACHINE_PATH = re.compile(r"(?<![\w.~/<}-])/(root|home|Users|work|opt|mnt|srv)/\w")


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}:\n{result.stdout}{result.stderr}"
    return result.stdout


@lru_cache
def tracked() -> list[str]:
    files = run("git", "ls-files", "-z").split("\0")[:-1]
    assert files, "nothing is tracked: this test reads the files that git knows"
    return files


def lines_that_match(pattern: re.Pattern[str]) -> list[str]:
    paths = {name: path for name in tracked() if (path := ROOT / name).is_file()}
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, path in paths.items()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]


def test_committed_env_has_an_empty_token() -> None:
    """The index is read, not the file: a person's own copy holds a token."""
    lines = run("git", "show", ":.env").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["HF_TOKEN="]


def test_no_lock_that_names_hosts_is_tracked() -> None:
    assert not [name for name in tracked() if re.search(r"(^|/)(uv\.lock|pylock(\.[^/]+)?\.toml)$", name)]


def test_no_artifact_is_tracked_and_every_room_is() -> None:
    folders = ("datasets", "checkpoints", "eval", "reports", "observability", ".venv")
    assert not [name for name in tracked() if name.split("/")[0] in folders]
    assert {path.name for path in ROOT.glob("*.py")} <= set(tracked())


def test_no_registry_is_named() -> None:
    assert lines_that_match(REGISTRY) == []


def test_no_path_of_a_machine_is_named() -> None:
    assert lines_that_match(MACHINE_PATH) == []


def test_patterns_match_what_they_are_for() -> None:
    assert REGISTRY.search("https://" + "pypi" + ".org/project")
    assert REGISTRY.search("pip install --index" + "-url x")
    assert MACHINE_PATH.search("cd /" + "home/me/project")
    assert MACHINE_PATH.search('"/' + 'root/x"')
    assert not MACHINE_PATH.search("~/home/x, https://example.com/home/x, and ./work/x")


def test_hooks_are_local() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]


def test_pins_are_the_same_in_both_places() -> None:
    """Name and version of every package; the lock adds hashes, the constraints are what `uv lock` obeys."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lock = (ROOT / "requirements.lock.txt").read_text(encoding="utf-8")
    locked = [line.removesuffix("\\") for line in lock.splitlines() if line and line[0] not in " #"]

    def pins(requirements: list[str]) -> list[tuple[str, str]]:
        return sorted((r.name, str(r.specifier)) for r in map(Requirement, requirements))

    constraints = pins(project["tool"]["uv"]["constraint-dependencies"])
    assert constraints == pins(locked)
    assert all(specifier.startswith("==") for _, specifier in constraints)
    assert lock.count("--hash=sha256:") >= len(constraints)


def test_no_note_is_named_that_is_not_here() -> None:
    """References to notes that are in no checkout, by their section."""
    assert lines_that_match(re.compile(r"\b(METHOD|PEERS)" + r"( \d|'s)")) == []
