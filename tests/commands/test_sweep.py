"""Sweeps: jobs from lists, shared stages made once, failures recorded, only what is missing run again."""

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

import commands.sweep as room
import main
from commands.sweep import SweepConfig, expand, load_sweep, plain_settings, run_sweep
from core.artifacts import write_json, write_text
from core.choices import Objectives, SupportedDatasets
from core.config import PROJECT_ROOT, PipelineConfig, UserError, plain
from core.hashes import sha256_file
from core.records import read_records, record_path
from core.store import locked
from core.yaml_files import load_config
from pipeline import Pipeline
from tests.helpers.common import TINY
from tests.helpers.records import whole
from training.engines import EXECUTORS, local, progress_line

OVER = "over: {kappa_list: [[100], [9000], [400]]}"


def written(folder: Path, section: str, more: str = "") -> Path:
    path = folder / "sweep.yaml"
    path.write_text(f"{TINY.replace('kappa_list: [100, 400]', '')}\noutput_dir: {folder / 'out'}\n{more}\n{section}\n")
    return path


def fresh(monkeypatch) -> None:
    """Jobs in threads of this process's settings must not meet a fork server of another test."""
    monkeypatch.chdir(PROJECT_ROOT)


def measured(record: dict) -> dict:
    """What a record says of its methods, without what a clock says."""
    figures = {
        part: {
            method: {k: v for k, v in values.items() if not k.startswith("seconds")}
            for method, values in record[part].items()
        }
        for part in ("methods", "validation")
    }
    return {"kappa": record["kappa"], **figures}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[dict]:
    """What plain runs measure at the two points that exist."""
    folder = tmp_path_factory.mktemp("plain")
    _, base = load_sweep([written(folder, f"sweep: {{{OVER}}}")])
    return [measured(r) for r in Pipeline(replace(base, kappa_list=(100, 400))).eval()]


def check(executor: str, folder: Path, expected: list[dict], capsys, more: str = "") -> None:
    """Three jobs, one of which cannot be: table, exit code, records, one copy of each stage; then again."""
    path = written(folder, f"sweep: {{{OVER}, executor: {executor}, workers: 2{more}}}")
    assert main.main(["sweep", "--config", str(path)]) == 1
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in rows[2:]] == [["[100]", "done"], ["[9000]", "failed"], ["[400]", "done"]]
    assert "choose from 1 to 8192" in rows[3][-1]
    assert "sweep: 2 done, 0 running, 1 failed, 0 waiting" in err
    found = sorted((measured(record) for record in read_records(folder / "out")), key=lambda record: record["kappa"])
    assert found == expected
    _, _, scores = out.partition("HookedMLPClassifier on DIGITS")
    chosen = read_records(folder / "out")[0]
    assert re.findall(r"^(\S.*?) {2,}", scores.split("---\n")[1], re.MULTILINE) == list(chosen["labels"].values())
    manifests = list((folder / "out").rglob("manifest.json"))
    assert len(manifests) == 3, "classifier, graphs and GCN, each made once"
    assert not [p for p in (folder / "out").rglob(".*") if p.suffix in (".lock", ".part", ".tmp")]
    before = {p: p.stat().st_mtime_ns for p in [*manifests, *(folder / "out/eval/metrics_and_plots").rglob("*.json")]}
    jobs = {p: p.stat().st_mtime_ns for p in (folder / "out/eval/sweeps").glob("*.json")}
    time.sleep(0.05)
    settings, base = load_sweep([path])
    again = run_sweep(replace(settings, executor="local", workers=1), base)
    assert [outcome["status"] for _, outcome in again] == ["done", "failed", "done"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    changed = [p for p in jobs if p.stat().st_mtime_ns != jobs[p]]
    assert [json.loads(p.read_text())["status"] for p in changed] == ["failed"], "only what failed ran again"


@pytest.mark.slow
def test_local(tmp_path, expected, capsys):
    check("local", tmp_path, expected, capsys)


def test_slurm(tmp_path, expected, capsys, monkeypatch):
    """By submitit's own executor for one machine."""
    pytest.importorskip("submitit")
    fresh(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `expected`: with more, sums are rounded differently
    check("slurm", tmp_path, expected, capsys, ", slurm: {cluster: local, timeout_min: 5}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray(tmp_path, expected, capsys, monkeypatch):
    """A real Ray on this machine."""
    pytest.importorskip("ray")
    fresh(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    check("ray", tmp_path, expected, capsys)


# --- jobs -------------------------------------------------------------------------------------------------


def test_all_combinations_once(tmp_path):
    over = {"seed": [0, 1], "forget_class": [3, [0, 1]], "train.lr": [0.1, 0.1], "gcn.objective": ["elbo"]}
    jobs = expand(SweepConfig(over), PipelineConfig(output_dir=tmp_path))
    found = [(job.config.seed, job.config.forget_class, job.config.train.lr, job.config.gcn.objective) for job in jobs]
    assert found == [(s, c, 0.1, "elbo") for s in (0, 1) for c in ((3,), (0, 1))]
    assert len({job.path for job in jobs}) == 4
    base = PipelineConfig()
    assert jobs[0].config.train == replace(base.train, lr=0.1), "what is not named stays"


def test_keys_do_not_depend_on_where_or_how_to_resume(tmp_path):
    a, b = (expand(SweepConfig({"seed": [4]}), PipelineConfig(output_dir=tmp_path / n, resume=n == "b")) for n in "ab")
    assert a[0].key == b[0].key
    assert a[0].key != expand(SweepConfig({"seed": [5]}), PipelineConfig())[0].key


BAD = {
    "no section": ("", "no file has a section `sweep`"),
    "a number": ("sweep: 3", "no file has a section `sweep` of fields"),
    "a list": ("sweep: [3]", "no file has a section `sweep` of fields"),
    "nothing": ("sweep:", "names no field"),
    "unknown key": ("sweep: {over: {seed: [0]}, worker: 3}", "no field 'worker': did you mean 'workers'?"),
    "unknown field": ("sweep: {over: {nonsense: [0]}}", "has no field 'nonsense'"),
    "nested": ("sweep: {over: {train.nonsense: [0]}}", "train has no field 'nonsense'"),
    "section": ("sweep: {over: {train: [{lr: 1}]}}", "fields of a section: name each field by itself"),
    "no list": ("sweep: {over: {seed: 3}}", "write it as [value, value]"),
    "value": ("sweep: {over: {train.epochs: [0]}}", "train.epochs is 0: give a whole number from 1"),
    "type": ("sweep: {over: {seed: [many]}}", "seed"),
    "executor": ("sweep: {over: {seed: [0]}, executor: cloud}", "choose from local, slurm, ray"),
    "workers": ("sweep: {over: {seed: [0]}, workers: 0}", "give a number >= 1"),
}


@pytest.mark.parametrize(("section", "message"), BAD.values(), ids=BAD)
def test_refused_in_one_sentence(section, message, tmp_path, capsys):
    path = written(tmp_path, section)
    assert main.main(["sweep", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["sweep"], ["sweep", "--config", "x.yaml", "--seed", "1"]])
def test_takes_config_files_alone(words, capsys):
    assert main.main(words) == 2
    assert "it takes --config FILE alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_absent_engine_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    executor = {"submitit": "slurm", "ray": "ray"}[name]
    with pytest.raises(UserError, match=f"needs {name}, which is not here: uv sync --extra {executor}"):
        list(EXECUTORS[executor]([], SweepConfig({"seed": [0]}, executor=executor)))


def test_progress():
    """By hand: after a first round of 3 tasks in 600 s, 3 more end within 15 s, so that 4 take 20 s more."""
    ends = [0.0, 590.0, 595.0, 600.0, 605.0, 610.0, 615.0]
    assert progress_line(5, 1, 4, 3, ends) == "5 done, 3 running, 1 failed, 1 waiting, about 20 s left"
    assert progress_line(2, 0, 2, 3, ends) == "2 done, 2 running, 0 failed, 0 waiting, about 10 min left"
    assert progress_line(0, 0, 2, 4, ends[:1]) == "0 done, 2 running, 0 failed, 0 waiting"


# --- a process that is killed, a lock ---------------------------------------------------------------------


@dataclass(frozen=True)
class Deadly(room.Job):
    """A job whose process is killed when it asks where to leave its outcome, but not in the test's own process."""

    parent: int = 0

    @property
    def path(self) -> Path:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().path


@pytest.mark.slow
def test_killed_job_does_not_take_the_others_along(tmp_path, expected):
    settings, base = load_sweep([written(tmp_path, "sweep: {over: {kappa_list: [[100], [400]]}}")])
    good, bad = expand(settings, base)
    deadly = Deadly(**vars(bad), parent=os.getpid())
    outcomes = {job.key: outcome for job, outcome in local([deadly, good], settings)}
    assert outcomes[good.key]["status"] == "done"
    assert outcomes[bad.key]["error"] == "its process died (killed, or out of memory)"
    assert json.loads(bad.path.read_text())["status"] == "failed"


def test_lock_lets_one_in_at_a_time(tmp_path):
    """Twenty threads that read, wait and write lose no count; a lock file that is left behind is no obstacle."""
    (tmp_path / "number").write_text("0")
    (tmp_path / "x.lock").touch()

    def count() -> None:
        with locked(tmp_path / "x.lock"):
            number = int((tmp_path / "number").read_text())
            time.sleep(0.002)
            (tmp_path / "number").write_text(str(number + 1))

    threads = [threading.Thread(target=count) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "number").read_text() == "20"
    assert not (tmp_path / "x.lock").exists()


@pytest.mark.parametrize("damage", ["none", "outcome", "half", "record", "mask", "gone"])
def test_what_is_there_counts_only_whole(damage, tmp_path, capsys):
    """A job is there if its outcome, its records and their masks are what was written; else it is done again."""
    settings, base = load_sweep([written(tmp_path, "sweep: {over: {seed: [3]}}")])
    (job,) = expand(settings, base)
    one = record_as_written(tmp_path / "out")
    path = record_path(tmp_path / "out", one)
    outcome = {"key": job.key, "status": "done", "records": [str(path.relative_to(tmp_path / "out"))], "seconds": 1.0}
    write_json(job.path, outcome)
    target = {"outcome": job.path, "half": job.path, "record": path, "mask": tmp_path / "out" / one["mask_path"]}
    if damage == "gone":
        path.unlink()
    elif damage in target:
        text = target[damage].read_text()
        target[damage].write_text(text[:-9] if damage == "half" else text.replace("1", "2", 1))
    assert (room.finished(job) is not None) == (damage == "none")
    said = capsys.readouterr().err
    assert (f"{target[damage]} is damaged" in said) if damage in target else said == ""


def record_as_written(folder: Path) -> dict:
    """A whole record and its mask below a folder."""
    one = whole()
    write_text(folder / one["mask_path"], "mask 1")
    one["mask_sha256"] = {"mimu": sha256_file(folder / one["mask_path"])}
    write_json(record_path(folder, one), one)
    return one


def every_field() -> dict:
    """Dotted name -> default of every field that a file may set."""

    def below(values: dict, prefix: str = "") -> dict:
        found: dict = {}
        for name, value in values.items():
            found |= below(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return below(plain(PipelineConfig()))


@pytest.mark.parametrize("name", [name for name in every_field() if name not in ("output_dir", "plugins")])
def test_a_sweep_takes_what_a_run_takes(name, tmp_path):
    """Every field, its own default as a value of the sweep, as in a file: the job is the run's configuration."""
    value = every_field()[name]
    path = written(tmp_path, f"sweep: {{over: {{{name}: {json.dumps([value])}}}}}")
    settings, base = load_sweep([path])
    (job,) = expand(settings, base)
    *parents, last = name.split(".")
    nested: dict = {last: value}
    for part in reversed(parents):
        nested = {part: nested}
    (tmp_path / "run.yaml").write_text(json.dumps(nested))
    assert job.config == load_config([path, tmp_path / "run.yaml"], aside=("sweep",))


@pytest.mark.parametrize(
    ("over", "wanted"),
    [
        ("forget_class: [cat, dog]", [("cat",), ("dog",)]),
        ("forget_class: [[cat, dog], 3, '4', no, 007]", [("cat", "dog"), ("3",), ("4",), ("no",), ("007",)]),
        ("mask_layer: [None, ~, -2, [-2, -1]]", [None, (-2,), (-2, -1)]),
        ("kappa_list: [100, [1, 2]]", [(100,), (1, 2)]),
        ("vision_dataset: [digits, FASHION_MNIST]", [SupportedDatasets.DIGITS, SupportedDatasets.FASHION_MNIST]),
        ("dataset_path: [a/b, 2024, null]", [Path("a/b"), Path("2024"), None]),
    ],
)
def test_values_of_a_sweep_are_read_as_those_of_a_file(over, wanted, tmp_path):
    jobs = expand(*load_sweep([written(tmp_path, f"sweep: {{over: {{{over}}}}}")]))
    found = [getattr(job.config, over.partition(":")[0]) for job in jobs]
    assert list(dict.fromkeys(found)) == wanted
    assert all(json.loads(json.dumps(plain_settings(job))) for job in jobs)


def test_python_gives_a_sweep_tuples_and_choices(tmp_path):
    over = {"forget_class": [(0, 1), "two"], "gcn.objective": [Objectives.elbo], "dataset_path": [Path("x")]}
    jobs = expand(SweepConfig(over), PipelineConfig(output_dir=tmp_path))
    assert [job.config.forget_class for job in jobs] == [(0, 1), ("two",)]
    assert {job.config.gcn.objective for job in jobs} == {Objectives.elbo}
    assert all(json.dumps(plain_settings(job)) for job in jobs)


# --- contents, not paths ----------------------------------------------------------------------------------


def tree(folder: Path) -> Path:
    for shade, name in ((10, "cat"), (90, "dog"), (200, "owl")):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (16, 16), (shade, 7 * index, 40)).save(folder / name / f"{index}.png")
    return folder


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def test_what_lies_behind_a_path_decides(tmp_path, monkeypatch):
    """Class folders that change places, a network or graphs that are exchanged: done again, and only then."""
    done = []

    def stand_in(jobs, sweep):
        for job in jobs:
            done.append(job.key)
            yield job, room._leave(job, {"key": job.key, "status": "done", "records": [], "seconds": 1.0})

    monkeypatch.setitem(EXECUTORS, "local", stand_in)
    photos, network, graphs = tree(tmp_path / "photos"), tmp_path / "gcn.safetensors", tmp_path / "graphs"
    network.write_bytes(b"one")
    graphs.mkdir()
    (graphs / "h.npy").write_bytes(b"one")
    base = PipelineConfig(
        vision_dataset=SupportedDatasets.FOLDER,
        dataset_path=photos,
        gcn_path=network,
        graph_dir=graphs,
        output_dir=tmp_path / "out",
    )

    def jobs_done() -> int:
        done.clear()
        run_sweep(SweepConfig({"seed": [0, 1]}), base)
        return len(done)

    assert [jobs_done(), jobs_done()] == [2, 0]
    swap(photos / "cat", photos / "dog")
    assert [jobs_done(), jobs_done()] == [2, 0]
    network.write_bytes(b"two")
    assert [jobs_done(), jobs_done()] == [2, 0]
    (graphs / "h.npy").write_bytes(b"two")
    assert [jobs_done(), jobs_done()] == [2, 0]
    network.write_bytes(b"one")
    (graphs / "h.npy").write_bytes(b"one")
    swap(photos / "cat", photos / "dog")
    assert jobs_done() == 0, "as at first"


def test_a_path_that_cannot_be_read_fails_its_own_job(tmp_path):
    over = {"dataset_path": [str(tree(tmp_path / "photos")), str(tmp_path / "none")]}
    base = PipelineConfig(vision_dataset=SupportedDatasets.FOLDER, output_dir=tmp_path / "out")
    assert len(expand(SweepConfig(over), base)) == 2


@pytest.mark.slow
def test_launcher_of_a_sweep_killed(tmp_path):
    """Its workers end with it, whatever they are at."""
    from tests.helpers.processes import gone, relatives, start

    path = written(tmp_path, "sweep: {over: {seed: [0, 1], train.epochs: [1000000]}, workers: 2}")
    process = start(tmp_path, "main.py", "sweep", "--config", path)
    try:
        end = time.monotonic() + 120
        while len(relatives(str(tmp_path))) < 5:  # with the fork server and a helper
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert gone(str(tmp_path), 10)
    finally:
        for pid in relatives(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
