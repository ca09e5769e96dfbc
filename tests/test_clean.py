"""clean.sh deletes what the project made, asks first, and leaves everything else alone."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from core.store import RUNNING, running

SCRIPT = Path(__file__).resolve().parent.parent / "clean.sh"
ARTIFACTS = (
    "checkpoints/classifier/weights.safetensors",
    "eval/metrics_and_plots/json/point/record.json",
    "reports/report.html",
    "observability/mimu.db",
    "datasets/Graphs/graph.npy",
    "__pycache__/eval.cpython-311.pyc",
    "tests/__pycache__/test_eval.cpython-311.pyc",
    ".pytest_cache/README.md",
    ".ruff_cache/CACHEDIR.TAG",
    ".hypothesis/examples/one",
)
DOWNLOADS = ("datasets/MNIST/raw/train-images-idx3-ubyte", "datasets/builder/__pycache__/kept.pyc")
KEPT = (
    "eval.py",
    "tests/test_eval.py",
    "configs/digits.yaml",
    "my reports/a b.txt",
    ".venv/lib/__pycache__/kept.pyc",
    ".git/reports/HEAD",
    ".git/__pycache__/kept",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder, with a space in its name, that holds one file of every kind."""
    project = tmp_path / "a project"
    for name in ARTIFACTS + DOWNLOADS + KEPT:
        write(project / name)
    shutil.copy2(SCRIPT, project)
    return project


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("content")
    return path


def clean(project: Path, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(project / "clean.sh"), *options]
    return subprocess.run(command, cwd=cwd or project, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def left(project: Path) -> set[str]:
    paths = (path for path in project.rglob("*") if not path.is_dir())
    return {path.relative_to(project).as_posix() for path in paths} - {"clean.sh"}


def answer(project: Path, text: str) -> int:
    """The exit code when a person at a terminal types `text`."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, text.encode())
        command = ["bash", str(project / "clean.sh")]
        return subprocess.run(command, stdin=theirs, capture_output=True).returncode
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_script_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)


def test_yes_deletes_artifacts_and_keeps_downloads(project: Path) -> None:
    result = clean(project, "--yes")
    assert (result.returncode, result.stderr) == (0, "")
    assert left(project) == {*DOWNLOADS, *KEPT}


def test_all_deletes_downloads_too(project: Path) -> None:
    assert clean(project, "--all", "--yes").returncode == 0
    assert left(project) == set(KEPT)


def test_dry_run_lists_sizes_and_deletes_nothing(project: Path) -> None:
    before = left(project)
    result = clean(project, "--dry-run", "--yes", "--all")
    assert result.returncode == 0
    assert left(project) == before
    listed = dict(line.split("\t")[::-1] for line in result.stdout.splitlines() if "\t" in line)
    assert set(listed) == {
        *("checkpoints", "eval", "reports", "observability", "datasets"),
        *("__pycache__", "tests/__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"),
    }
    assert all(size[0].isdigit() for size in listed.values())


def test_without_a_terminal_it_lists_what_it_deletes_and_goes_on(project: Path) -> None:
    """As in `nohup bash -c "clear && bash clean.sh && uv run main.py" > output.log 2>&1 &`."""
    result = clean(project)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(name in result.stdout for name in ("checkpoints", "eval", "reports", "datasets/Graphs"))
    assert left(project) == {*DOWNLOADS, *KEPT}
    command = 'nohup bash -c "clear && bash clean.sh && echo next" > output.log 2>&1'
    write(project / "reports/again.html")
    subprocess.run(["bash", "-c", command], cwd=project, stdin=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm"})
    assert (project / "output.log").read_text().endswith("Deleted.\nnext\n")


def test_without_a_terminal_downloads_go_only_if_that_is_said_twice(project: Path) -> None:
    result = clean(project, "--all")
    assert result.returncode == 0
    assert "Kept: downloads in datasets/" in result.stderr
    assert left(project) == {*DOWNLOADS, *KEPT}


def test_beside_a_live_run_nothing_goes(project: Path) -> None:
    """Runs share the lock; it names their processes; the file of a killed run is no obstacle and goes."""
    before = left(project)
    with running(project), running(project):
        for options in ((), ("--yes",), ("--all", "--yes")):
            result = clean(project, *options)
            assert result.returncode == 1
            said = f"Nothing deleted: a run works in {project} (process {os.getpid()}); wait for it, or end it.\n"
            assert result.stderr == said
        assert answer(project, "y\n") == 1
        assert left(project) == {*before, RUNNING}
    assert left(project) == before
    (project / RUNNING).touch()
    assert clean(project).returncode == 0
    assert left(project) == {*DOWNLOADS, *KEPT}


def test_a_person_who_says_no_leaves_no_trace(project: Path) -> None:
    before = left(project)
    assert answer(project, "n\n") == 1
    assert left(project) == before


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_strange_marker_is_named(project: Path, kind: str) -> None:
    marker = project / RUNNING
    {"folder": marker.mkdir, "link": lambda: marker.symlink_to("eval.py"), "pipe": lambda: os.mkfifo(marker)}[kind]()
    result = clean(project)
    assert result.returncode == 1
    assert result.stderr == f"Nothing deleted: {marker} is no plain file; remove it.\n"
    assert (project / "checkpoints").exists()


@pytest.mark.parametrize(("text", "code"), [("y\n", 0), ("yes\n", 0), ("n\n", 1), ("\n", 1), ("\x04", 1)])
def test_a_person_is_asked(project: Path, text: str, code: int) -> None:
    assert answer(project, text) == code
    assert (project / "checkpoints").exists() == bool(code)


def test_another_working_directory_is_not_touched(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "reports/mine.txt")
    assert clean(project, "--yes", cwd=elsewhere).returncode == 0
    assert left(elsewhere) == {"reports/mine.txt"}
    assert left(project) == {*DOWNLOADS, *KEPT}


def test_called_through_a_link_it_cleans_its_own_project(project: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "bin"
    write(elsewhere / "reports/mine.txt")
    (elsewhere / "clean.sh").symlink_to(project / "clean.sh")
    assert clean(elsewhere, "--yes").returncode == 0
    assert left(elsewhere) == {"reports/mine.txt"}
    assert left(project) == {*DOWNLOADS, *KEPT}


@pytest.mark.parametrize("folder", ["checkpoints", "eval", "datasets", "datasets/Graphs"])
@pytest.mark.parametrize("options", [("--yes",), ("--yes", "--all")])
def test_nothing_behind_a_linked_folder_goes(
    project: Path, tmp_path: Path, folder: str, options: tuple[str, ...]
) -> None:
    outside = tmp_path / "outside"
    for name in ("Graphs/graph.npy", "__pycache__/kept.pyc"):
        write(outside / name)
    shutil.rmtree(project / folder)
    (project / folder).symlink_to(outside)
    result = clean(project, *options)
    assert result.returncode == 0
    assert left(outside) == {"Graphs/graph.npy", "__pycache__/kept.pyc"}
    if folder != "datasets/Graphs" or "--all" not in options:  # else the link goes with datasets/
        assert (project / folder).is_symlink()
        assert "symbolic link" in result.stderr


def test_links_inside_an_artifact_folder_go_but_not_what_they_point_to(project: Path, tmp_path: Path) -> None:
    kept = write(tmp_path / "outside/weights")
    (project / "checkpoints/link").symlink_to(kept.parent)
    assert clean(project, "--yes").returncode == 0
    assert kept.exists()
    assert not (project / "checkpoints").exists()


def test_a_clean_project_has_nothing_to_delete(project: Path) -> None:
    clean(project, "--yes")
    result = clean(project)
    assert (result.returncode, result.stdout) == (0, f"Nothing to delete in {project}.\n")


def test_unknown_option_is_one_sentence_and_exit_code_2(project: Path) -> None:
    before = left(project)
    result = clean(project, "--yes", "--force")
    assert result.returncode == 2
    assert "--force" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert left(project) == before


def test_help_names_every_option(project: Path) -> None:
    result = clean(project, "--help")
    assert result.returncode == 0
    assert all(option in result.stdout for option in ("--dry-run", "--yes", "--all"))
