"""Runs that are stopped: Ctrl-C, kill -9 in every stage, what they leave, and how the next run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import main
from core import artifacts
from core.config import PipelineConfig
from core.yaml_files import load_config
from pipeline import Pipeline
from tests.helpers.common import LOG_LINE, TINY
from tests.helpers.records import untimed

ROOT = Path(main.__file__).parent
STAGES = ("checkpoints/classifier", "datasets/Graphs", "checkpoints/gcn")

# One process imports everything, then forks one child for each place where a run is to be killed.
DRIVER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import sklearn.datasets, torch
from core.yaml_files import (load_config)
from data import GraphGenerator
from eval import Eval
from pipeline import Pipeline
from tests.helpers.common import LOG_LINE, TINY
from trainer import GCNTrainer, VisionModelTrainer

torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports the rest of torch
folder = Path(sys.argv[1])
config = load_config([folder / "tiny.yaml"])

def run(name):
    Pipeline(replace(config, output_dir=folder / name)).eval()

def kill_at(owner, name, is_it):
    original, calls = getattr(owner, name), []
    def counted(*arguments, **named):
        calls.append(arguments)
        if is_it(len(calls), arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)
    setattr(owner, name, counted)

def child(name, *place):
    pid = os.fork()
    if pid == 0:
        if place:
            kill_at(*place)
        run(name)
        os._exit(0)
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

PLACES = {
    "classifier": (VisionModelTrainer, "_step", lambda count, _: count == 5),
    "graphs": (GraphGenerator, "capture_batch", lambda count, _: count == 2),
    "gcn": (GCNTrainer, "step", lambda count, _: count == 2),
    "evaluation": (Eval, "eval_unlearning", lambda _, arguments: arguments[2].kappa == 400),
    "record": (os, "replace", lambda _, arguments: "json" in Path(arguments[1]).parts),
}
for name, place in PLACES.items():
    print(name, end(child(name, *place)))
together = [child("together"), child("together")]
print("together", *map(end, together))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("interrupt")
    (path / "tiny.yaml").write_text(TINY)
    return path


@pytest.fixture(scope="module")
def config(folder) -> PipelineConfig:
    return load_config([folder / "tiny.yaml"])


@pytest.fixture(scope="module")
def reference(folder, config) -> list[dict]:
    """The records of a run that nobody stops."""
    return [untimed(record) for record in Pipeline(replace(config, output_dir=folder / "reference")).eval()]


@pytest.fixture(scope="module")
def killed(folder) -> dict[str, str]:
    """Exit codes of the driver's children, by name; each had the folder of that name."""
    command = [sys.executable, "-c", DRIVER, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".part", ".tmp")]


def made(folder: Path) -> dict[Path, tuple[int, str]]:
    """Each finished stage's manifest: when it was written, and what it says about that."""
    found = (path for place in ("checkpoints", "datasets") for path in (folder / place).rglob("manifest.json"))
    manifests = [path for path in found if not path.parent.name.endswith(".part")]
    return {path: (path.stat().st_mtime_ns, json.loads(path.read_text())["made"]) for path in manifests}


def written_records(folder: Path) -> list[Path]:
    return list(folder.glob("eval/metrics_and_plots/json/*/*.json"))


# --- kill -9 ----------------------------------------------------------------------------------------------

KILLED = {"classifier": (0, 0), "graphs": (1, 0), "gcn": (2, 0), "evaluation": (3, 1), "record": (3, 0)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "finished"), KILLED.items(), ids=KILLED)
def test_killed_run_goes_on(name, finished, folder, config, reference, killed):
    """Finished stages are not made again, and the records are those of a run that nobody stopped."""
    assert killed[name] == str(-signal.SIGKILL)
    out = folder / name
    before, records = made(out), {path: path.read_bytes() for path in written_records(out)}
    assert (len(before), len(records)) == finished
    assert bool(leftovers(out)) == (name != "evaluation"), "what the kill leaves is what this test is about"
    found = Pipeline(replace(config, output_dir=out)).run()
    assert [untimed(record) for record in found] == reference
    after = made(out)
    assert len(after) == len(STAGES)
    assert {path: after[path] for path in before} == before
    assert {path: path.read_bytes() for path in records} == records
    assert len(written_records(out)) == len(reference)
    assert leftovers(out) == []


@pytest.mark.slow
def test_two_runs_at_once(folder, config, reference, killed):
    """In one folder, from nothing: both end well, and neither leaves or spoils anything."""
    assert killed["together"] == "0 0"
    out = folder / "together"
    assert leftovers(out) == []
    assert len(made(out)) == len(STAGES)
    assert [untimed(record) for record in Pipeline(replace(config, output_dir=out)).eval()] == reference


# --- leftovers --------------------------------------------------------------------------------------------


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


HERE = artifacts._host()
OWNERS = {
    "a dead process": (dead_pid, HERE, False),
    "this process": (os.getpid, HERE, False),
    "another process": (os.getppid, HERE, True),
    "a process of another machine": (dead_pid, "0123abcd", True),
}


@pytest.mark.parametrize(("pid", "host", "stays"), OWNERS.values(), ids=OWNERS)
def test_leftover(pid, host, stays, folder, config, reference, tmp_path):
    """A part without a living owner goes; in a container, a killed run's number is often the next run's own."""
    (stage,) = (folder / "reference/checkpoints/classifier").iterdir()
    part = tmp_path / "checkpoints/classifier" / f".{stage.name}.{pid()}-{host}.part"
    part.mkdir(parents=True)
    (part / "classifier.safetensors").write_text("half")
    assert [untimed(record) for record in Pipeline(replace(config, output_dir=tmp_path)).eval()] == reference
    assert leftovers(tmp_path) == ([part.name] if stays else [])


@pytest.mark.parametrize("stage", STAGES)
def test_stage_cut_short_is_made_again(stage, folder, config, reference, tmp_path):
    """As after a power cut: the folder is there, its largest file is not whole."""
    shutil.copytree(folder / "reference", tmp_path, dirs_exist_ok=True)
    path = max((tmp_path / stage).glob("*/*"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert [untimed(record) for record in Pipeline(replace(config, output_dir=tmp_path)).eval()] == reference
    assert path.read_bytes() == data


# --- Ctrl-C, and a log in a file --------------------------------------------------------------------------


def wait_for(text: str, path: Path, process: subprocess.Popen) -> None:
    """Until a line with `text` stands in a log."""
    end = time.monotonic() + 120
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_interrupted_run_goes_on(folder, config, reference, tmp_path):
    """Ctrl-C in a long GCN training whose output goes to a file, as with nohup."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ("main.py", "--config", folder / "tiny.yaml", "--output-dir", out, "--gcn.steps", "20000")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may ignore it
        )
    try:
        wait_for("GCN, top_k 300: ", log, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    text = log.read_bytes().decode()
    *lines, last = text.removesuffix("\n").split("\n")
    assert "\r" not in text
    assert [line for line in lines if not LOG_LINE.match(line)] == []
    assert re.search(r"GCN, top_k 300: \d+/20000, [\d.]+/s, \d+ (s|min) left", text)
    assert last == "interrupted: finished stages are kept, the next run goes on from there"
    assert leftovers(out) == []
    before = made(out)
    assert len(before) == 2
    assert [untimed(record) for record in Pipeline(replace(config, output_dir=out)).eval()] == reference
    after = made(out)
    assert {path: after[path] for path in before} == before
