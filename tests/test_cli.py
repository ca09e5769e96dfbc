"""The command line: help, what a run prints, reports without torch, refusals, exit codes, tracking."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import main
from commands.forget import AS_USUAL, Asked
from commands.inspect import AS_IT_IS, Read
from commands.run import _inputs
from core.artifacts import write_tensors
from core.choices import Choice, OpenChoice, bare, hints
from core.config import GCNConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels, UserError, plain
from core.records import read_records
from model import save_classifier, vision_model_loader
from showing import terminal
from tests.helpers.common import LOG_LINE, TINY, settings_of
from unlearn.masks import Mask

ROOT = Path(main.__file__).parent
METHODS = ("MIMU (ours)", "MIMU refined (ours)", "signed Taylor", "random mask", "SFT randomisation", "untouched")
SPENT = ("once per classifier", "one request alone", "per request")
METRICS = ("forget_loss", "retain_loss", "forget_probability", "forget_score", "retain_score", "worst_retained_drop")


def environment(folder: Path) -> dict[str, str]:
    own = {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return os.environ | own


def process(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in the project's folder, trackio below `folder`."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(folder), timeout=120)


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path) -> None:
    """What `main` sets in the environment ends with the test."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY.replace("formats: []", "formats: [png], dpi: 40"))
    return path


# --- threads ----------------------------------------------------------------------------------------------

SPINS = re.compile(r"GOMP_SPINCOUNT = '(\d+)'")
# Loads the library that torch comes with, and nothing else of torch: a second less.
LIBRARY = """
import ctypes, importlib.util, pathlib
(folder,) = importlib.util.find_spec("torch").submodule_search_locations
(library,) = pathlib.Path(folder, "lib").glob("libgomp*")
ctypes.CDLL(str(library))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["import main; main.main(['nonsense'])", "import benchmarks", "import tests.conftest"]
)
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, main.SPIN_COUNT), ({"GOMP_SPINCOUNT": "777"}, "777"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["bounded", "the user's count", "the user's policy"],
)
def test_waiting_threads_do_not_spin_for_long(first, given, expected, tmp_path):
    """What the OpenMP library itself says that it has read, when torch loads it."""
    own = environment(tmp_path) | {"OMP_DISPLAY_ENV": "verbose"}
    bare = {name: value for name, value in own.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    loads = LIBRARY if given or "main" not in first else "import torch"
    command = [sys.executable, "-c", f"{first}\n{loads}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=bare | given, timeout=120)
    counts = SPINS.findall(told.stderr)
    assert counts, "this torch comes with another OpenMP library"
    assert set(counts) == {expected}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3"), ({"OMP_NUM_THREADS": "3"}, "None")],
    ids=["one", "the user's number", "the user's number for all libraries"],
)
def test_numpy_takes_one_thread_unless_the_user_says_otherwise(given, expected, tmp_path):
    """Its library reads the number when it is loaded, which must come after the command line has set it."""
    code = "import os, sys, main; print('numpy' in sys.modules); main.main(['nonsense'])"
    code += "; print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    bare = {name: value for name, value in environment(tmp_path).items() if name not in names}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=bare | given)
    assert told.stdout.split() == ["False", expected]


def test_sums_on_a_gpu_repeat_unless_the_user_says_otherwise(monkeypatch):
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if given:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        main.main(["nonsense"])
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


# --- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["nonsense"]])
def test_help_needs_no_torch(arguments, tmp_path):
    code = (
        "import sys, main\n"
        "try:\n    code = main.main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "print(code, sorted({'torch', 'torchvision', 'torch_geometric', 'trackio', 'matplotlib'} & set(sys.modules)))"
    )
    result = process(tmp_path, "-c", code, *arguments)
    assert result.stdout.splitlines()[-1] == ("2 []" if arguments == ["nonsense"] else "0 []")


def fields(values: dict, prefix: str = "") -> list[str]:
    nested = [fields(value, f"{prefix}{name}.") for name, value in values.items() if isinstance(value, dict)]
    own = [prefix + name for name, value in values.items() if not isinstance(value, dict)]
    return own + [name for names in nested for name in names]


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["run", "--help"])
    assert stop.value.code == 0
    text, names = capsys.readouterr().out, fields(plain(PipelineConfig()))
    assert len(names) > 50
    missing = [name for name in names if not re.search(rf"--{re.escape(name.replace('_', '-'))}(?![\w.-])", text)]
    assert missing == []


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])
    said = capsys.readouterr()
    assert ended.value.code == 0
    assert f"main.py {command}" in said.out
    assert not said.err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"main.py {name}" in text for name in main.COMMANDS)


# --- a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One real run, tracked by trackio; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ("main.py", "run", "--config", tiny, "--tracker", "trackio", "--output-dir", folder / "out")
    return folder, process(folder, *arguments)


def one_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


@pytest.mark.slow
def test_run_prints_its_table(finished):
    folder, result = finished
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    written = one_file(folder, "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    assert tuple(row[0] for row in rows[2:]) == METHODS
    assert tuple(cell.split(" [")[0] for cell in rows[0] if " [" in cell) == (*METRICS, *SPENT)
    assert re.split(r" {2,}", lines[0]) == ["method", *terminal.COLUMNS, "verdict"]
    assert [re.split(r" {2,}", line)[0] for line in lines[2 : 2 + len(METHODS)]] == list(METHODS)
    column = rows[0].index(next(cell for cell in rows[0] if cell.startswith("forget_score")))
    shown = [float(re.split(r" {2,}", line)[2]) for line in lines[2 : 2 + len(METHODS)]]
    assert shown == [round(float(row[column].strip("*").split()[0]), 1) for row in rows[2:]]
    assert re.search(r"^Switching off \d+ weights \(.* class 0 \(zero\) is recognised", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_run_prints_where_things_lie(finished):
    folder, result = finished
    places = dict(re.findall(r"^(mask|JSON|plots|page|logs) +(\S+)", result.stdout, re.MULTILINE))
    assert set(places) == {"mask", "JSON", "plots", "page", "logs"}
    mask = Mask.load(Path(places.pop("mask")))
    assert f"Switching off {mask.switched_off} weights" in result.stdout
    assert re.search(r"with masked\(classifier.weights\(-2\), Mask.load\(path\)\)", result.stdout)
    assert "Switching off" in Path(places.pop("page")).read_text()
    assert all(Path(place).is_dir() and folder in Path(place).parents for place in places.values())
    assert len(list(Path(places["JSON"]).rglob("*.json"))) == 2
    assert one_file(Path(places["plots"]), "trade_off.png").stat().st_size > 0


@pytest.mark.slow
def test_stdout_is_for_results(finished):
    out, err = finished[1].stdout, finished[1].stderr
    assert not [line for line in out.splitlines() if LOG_LINE.match(line)]
    assert "rackio" not in out.replace("/trackio", "")
    assert "\x1b" not in out
    assert "\r" not in out + err
    assert len([line for line in err.splitlines() if LOG_LINE.match(line)]) >= 5


@pytest.mark.slow
def test_quiet_json_is_all_that_is_said(finished, tiny):
    """The same run again, everything found: stdout is one JSON object with the figures of the records."""
    folder, _ = finished
    where = ("--tracker", "none", "--output-dir", folder / "out")
    result = process(folder, "main.py", "run", "--config", tiny, *where, "--quiet", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    said = json.loads(result.stdout)
    assert [one["label"] for one in said["methods"]] == list(METHODS)
    records = [json.loads(Path(path).read_text()) for path in said["records"]]
    assert {(record["top_k"], record["kappa"]) for record in records} == {(300, 100), (300, 400)}
    by_kappa = {record["kappa"]: record for record in records}
    for one in said["methods"]:
        record = by_kappa.get(one["kappa"], records[0])
        assert one["forget_score"] == record["methods"][one["method"]]["forget_score"]
    assert said["headline"].startswith("Switching off ")
    assert said["exit"] == 0
    assert said["headline"].startswith(f"Switching off {Mask.load(Path(said['mask'])).switched_off} weights")


@pytest.mark.slow
def test_several_seeds_in_one_command(finished, tiny, tmp_path):
    """The seed that is there is found; means and intervals are those of the records, by Student's t."""
    folder, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    where = ("--config", tiny, "--output-dir", tmp_path / "out", "--seeds", "0", "1", "--quiet")
    result = process(folder, "main.py", "run", *where, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    said = json.loads(result.stdout)
    assert [run["seed"] for run in said["runs"]] == [0, 1]
    for one, *points in zip(said["over_seeds"], *(run["methods"] for run in said["runs"]), strict=True):
        a, b = (point["retain_score"] for point in points)
        half = 12.706204736 * abs(a - b) / 2  # t of one degree of freedom, times the standard error of two values
        found = one["retain_score"]
        assert (found["value"], found["n"]) == (pytest.approx((a + b) / 2), 2)
        assert found["high"] - found["value"] == pytest.approx(half, rel=1e-6, abs=1e-9)
    words = process(folder, "main.py", "run", *where)
    assert "mean ± 95 % interval over the seeds, n = 2 runs (classes 0; seeds 0, 1)" in words.stdout
    assert re.findall(r"^seed (\d): Switching off", words.stdout, re.MULTILINE) == ["0", "1"]
    places = dict(re.findall(r"^(plots|page) +(\S+)", words.stdout, re.MULTILINE))
    assert Path(places["plots"], "table.md").is_file()
    assert "n = 2 runs" in Path(places["page"]).read_text()


def test_seeds_are_checked_before_anything_is_made(tiny, tmp_path, capsys):
    for seeds, message in ((("1", "1"), "name each seed once"), (("-1",), "seed is -1")):
        line = ["run", "--config", str(tiny), "--output-dir", str(tmp_path / "out"), "--seeds", *seeds]
        assert main.main(line) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_seed_beside_seeds_is_said_to_have_no_effect(tiny, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("commands.run._measured", lambda config, _: seen.append(config.seed))  # as in torchrun's helper
    for seed, count in (("3", 1), ("1", 0), ("0", 0)):
        line = ["run", "--config", str(tiny), "--output-dir", str(tmp_path / "out"), "--seeds", "1", "--seed", seed]
        assert main.main(line) == 0
        assert capsys.readouterr().err.count("no effect: seed 3 (--seeds says which)") == count
    assert seen == [1, 1, 1]


@pytest.mark.slow
def test_an_unchanged_run_needs_no_torch(finished, tiny):
    """Most of the seconds of a run that changes nothing were the import of torch."""
    folder, first = finished
    code = (
        "import sys, main\n"
        "code = main.main(sys.argv[1:])\n"
        "loaded = {'torch', 'torchvision', 'torch_geometric', 'sklearn', 'scipy', 'pandas', 'trackio', 'matplotlib'}\n"
        "print(code, sorted(loaded & set(sys.modules)))"
    )
    where = ("--tracker", "trackio", "--output-dir", folder / "out")
    again = process(folder, "-c", code, "run", "--config", tiny, *where)
    *said, last = again.stdout.splitlines()
    assert last == "0 []", again.stderr
    assert said == first.stdout.splitlines()
    lines = [[line.partition("] ")[2] for line in result.stderr.splitlines()] for result in (first, again)]
    lines[0] = [line for line in lines[0] if not line.startswith("loading torch")]
    understood = lines[0][: next(place for place, line in enumerate(lines[0]) if line.startswith("model: ")) + 1]
    assert lines[1][: len(understood)] == understood
    found = [line.partition(": unchanged, using ")[0] for line in lines[1] if ": unchanged, using " in line]
    assert found == [f"HookedMLPClassifier_DIGITS{end}" for end in ("", "", "_top-300")]


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"device": "cpu"}, True),
        ({"vision_dataset": SupportedDatasets.MNIST}, False),
        ({"gcn": GCNConfig(train_seeds=(1,))}, False),
        ({"gcn_path": Path("nowhere.safetensors")}, False),
        ({"gcn_path": Path(main.__file__)}, True),
        ({"graph_dir": Path(main.__file__).parent / "configs"}, True),
    ],
)
def test_what_a_run_reads_is_known_without_torch(changes, known, monkeypatch):
    monkeypatch.setattr("commands.run.ACCELERATORS", ())
    found = _inputs(replace(PipelineConfig(), **changes))
    assert (found is not None) is known
    if found:
        assert {"images", *changes} - {"device"} == {*found}
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found.values())


def test_where_a_gpu_may_be_torch_is_asked_which_device_it_is(monkeypatch):
    monkeypatch.setattr("commands.run.ACCELERATORS", ("/dev/null",))
    assert _inputs(PipelineConfig()) is None
    assert _inputs(PipelineConfig(device="cpu")) is not None


@pytest.mark.slow
def test_dashboard_serves_this_projects_data(finished):
    """Started for real; its page and its runs are read over HTTP."""
    folder, _ = finished
    command = [sys.executable, "main.py", "dashboard", "--output-dir", str(folder / "out")]
    own = environment(folder) | {"BROWSER": "true"}
    with (folder / "dashboard.log").open("w+b") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=own)
        try:
            address = None
            for _ in range(240):
                found = re.search(r"http://[\w.]+:\d+", (folder / "dashboard.log").read_text())
                if found or server.poll() is not None:
                    address = found and found[0]
                    break
                time.sleep(0.5)
            assert address, (folder / "dashboard.log").read_text()
            with urllib.request.urlopen(address, timeout=30) as page:
                assert page.status == 200
                assert "trackio" in page.read().decode().lower()
            asked = urllib.request.Request(
                f"{address}/api/get_runs_for_project",
                json.dumps({"project": "mimu"}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=30) as answer:
                text = answer.read().decode()
            assert f"HookedMLPClassifier_DIGITS_classifier_seed-0_{TRAINED}" in text
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.mark.slow
def test_log_in_a_file_has_no_escapes(finished):
    """stderr is no terminal here: colours would be noise in a log."""
    assert "\x1b" not in finished[1].stderr


TRAINED = "train.epochs-2_train.batch_size-64"
LEARNED = "graph.num_samples-640_gcn.objective-elbo_gcn.hidden_dim-8_gcn.steps-3_and-1-more"


def mask_of(out: str) -> str:
    """The mask that a run named."""
    return re.findall(r"^mask +(\S+)", out, re.MULTILINE)[0]


@pytest.mark.slow
def test_trackio_holds_the_history(finished):
    """Every number of every step, read back through trackio in a process of its own."""
    folder, _ = finished
    code = (
        "import json, trackio\n"
        "runs = trackio.Api().runs('mimu')\n"
        "logs = {run.name: trackio.SQLiteStorage.get_logs('mimu', run.name, run_id=run.id) for run in runs}\n"
        "print(json.dumps(logs))"
    )
    result = process(folder, "-c", code)
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout.splitlines()[-1])
    histories = {
        f"HookedMLPClassifier_DIGITS_classifier_seed-0_{TRAINED}": "checkpoints/classifier/*/history.json",
        f"HookedMLPClassifier_DIGITS_gcn_top-300_seed-0_{TRAINED}_{LEARNED}": "checkpoints/gcn/*/history.json",
    }
    (name,) = (name for name in runs if "results" in name)
    assert name.startswith(f"HookedMLPClassifier_DIGITS_class-0_results_seed-0_{TRAINED}")
    results = runs.pop(name)
    assert {entry["step"] for entry in results} == {100, 400}
    shown = [value for entry in results for name, value in entry.items() if name.startswith("linears.1.weight")]
    assert {value["_type"] for value in shown} == {"trackio.image"}
    records = {record["kappa"]: record for record in read_records(folder / "out")}
    for kappa, record in records.items():
        (scores,) = (entry for entry in results if entry.get("kappa") == kappa)
        for method, label in record["labels"].items():
            assert scores[f"{label}: forget_score"] == record["methods"][method]["forget_score"]
    last = records[results[-1]["answer: kappa"]]
    assert results[-1]["answer: retain_score"] == last["methods"][last["answer"]]["retain_score"]
    assert folder.joinpath("out", last["mask_path"]).name == Path(mask_of(finished[1].stdout)).name
    assert set(runs) == set(histories)
    for name, pattern in histories.items():
        history = json.loads(one_file(folder / "out", pattern).read_text())["history"]
        numbers = {(entry["step"], *item) for entry in history for item in entry.items()}
        logged = {(entry["step"], *item) for entry in runs[name] for item in entry.items() if item[0] != "timestamp"}
        assert len(numbers) > 10
        assert logged == numbers


@pytest.mark.slow
def test_report_needs_no_torch(finished):
    folder, _ = finished
    plots = folder / "out/eval/metrics_and_plots/plots"
    before = {path.relative_to(plots): path.read_bytes() for path in plots.rglob("*") if path.is_file()}
    assert {Path(path).suffix for path in before} == {".md", ".csv", ".tex", ".png", ".json"}
    shutil.rmtree(plots)
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'torch_geometric', 'trackio'):\n"
        "            raise ImportError(f'{name} is not installed')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import main\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    result = process(
        folder,
        "-c",
        code,
        "report",
        "--output-dir",
        folder / "out",
        "--reporter.dpi",
        "40",
        "--reporter.formats",
        "png",
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    folders = [path for path in plots.iterdir() if path.is_dir() and path.name != "grid"]
    assert [Path(line) for line in result.stdout.splitlines()] == [*folders, folder / "out/reports/index.html"]
    after = {path.relative_to(plots): path.read_bytes() for path in plots.rglob("*") if path.is_file()}
    assert set(after) == set(before)
    assert [path for path in before if before[path] != after[path]] == []


# --- layering ---------------------------------------------------------------------------------------------


def test_later_files_win_and_flags_win_over_files(tiny, tmp_path, monkeypatch, capsys):
    other, seen = tmp_path / "other.yaml", []
    other.write_text("seed: 5\nkappa_list: [7]\ntrain: {lr: 0.5}\n")

    class Caught:
        def __init__(self, config):
            seen.append(config)
            raise UserError("seen")

    monkeypatch.setattr("pipeline.Pipeline", Caught)
    for arguments in (["run", "--config", str(tiny), f"--config={other}"], ["--config", str(tiny)]):
        assert main.main([*arguments, "--seed", "9", "--train.epochs", "4"]) == 2
    both, one = seen
    assert (both.seed, both.kappa_list, both.train.lr, both.train.epochs) == (9, (7,), 0.5, 4)
    assert (both.train.batch_size, both.topK_list, both.gcn.hidden_dim) == (64, (300,), 8)
    assert (one.seed, one.kappa_list) == (9, (100, 400))
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not LOG_LINE.match(line)] == ["error: seen"] * 2


def test_failing_stage_gives_one(tiny, tmp_path, monkeypatch, capsys):
    def broken(_):
        raise RuntimeError("something broke")

    monkeypatch.setattr("pipeline.Pipeline.measure", broken)
    assert main.main(["run", "--config", str(tiny), "--output-dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: a stage failed (RuntimeError: something broke)")


# --- refusals ---------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, cut: int = 0, pack: bool = False) -> None:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    data = gzip.compress(data, mtime=0) if pack else data
    path.with_name(path.name + ".gz" if pack else path.name).write_bytes(data[: len(data) - cut])


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Files that a run cannot use."""
    folder = tmp_path_factory.mktemp("material")
    for name, pack in (("cut", False), ("cut_gz", True)):
        (folder / name).mkdir()
        for part in ("train", "t10k"):
            write_idx(folder / name / f"{part}-images-idx3-ubyte", np.zeros((20, 28, 28)), cut=30, pack=pack)
            write_idx(folder / name / f"{part}-labels-idx1-ubyte", np.arange(20) % 10, pack=pack)
    (folder / "garbage.safetensors").write_bytes(b"no tensors " * 100)
    write_tensors(folder / "foreign.safetensors", {"a": np.zeros(3, np.float32)}, {})
    mlp = SupportedVisionModels.HookedMLPClassifier
    save_classifier(vision_model_loader(mlp, 7, 1, 8), folder / "seven.safetensors", mlp, (7, 1, 8), {})
    for name, text in {
        "key.yaml": "nonsense: 3",
        "nested.yaml": "train: {nonsense: 3}",
        "type.yaml": "train: {epochs: many}",
        "choice.yaml": "vision_dataset: NOPE",
        "value.yaml": "kappa_list: [0]",
        "broken.yaml": "kappa_list: [1",
        "list.yaml": "- 1",
        "null.yaml": "train: null",
        "text.yaml": "just words",
    }.items():
        (folder / name).write_text(text + "\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return folder


def refused(capsys, out: Path, *arguments: str) -> str:
    """stderr of a command that must end with 2, silent on stdout, and leave nothing behind."""
    try:
        code = main.main([*arguments])
    except SystemExit as stop:  # tyro's own refusals
        code = stop.code
    printed, err = capsys.readouterr()
    assert (code, printed) == (2, ""), err
    assert "Traceback" not in err
    files = [path for path in out.rglob("*") if path.is_file() or path.suffix in (".part", ".tmp")]
    assert files == []
    return err


def sentence(err: str) -> str:
    """The one line that is no progress."""
    (line,) = [line for line in err.splitlines() if not LOG_LINE.match(line)]
    assert line.startswith("error: ")
    return line


SENTENCES = {
    "unknown command": (
        "nonsense",
        "choose from run, sweep, plan, train-gcn, demo, report, leaderboard, docs, dashboard, datasets, download",
    ),
    "config without file": ("run --config", "--config names no file"),
    "forget class": ("--forget-class 10", "DIGITS has classes 0 to 9"),
    "kappa": ("--kappa-list 8193", "choose from 1 to 8192"),
    "top_k": ("--topK-list 8193", "choose from 1 to 8192"),
    "mask layer": ("--mask-layer 7", "choose from -3 to 2"),
    "forget name": ("--forget-class thre", "no class of DIGITS: did you mean 'three'?"),
    "tree missing": ("--vision-dataset FOLDER --dataset-path {material}/none", "there is no folder"),
    "dataset missing": ("--vision-dataset CIFAR10", "uv run main.py download CIFAR10"),
    "dataset cut": ("--vision-dataset FASHION_MNIST --dataset-path {material}/cut", "and holds only 15650"),
    "dataset cut gz": ("--vision-dataset FASHION_MNIST --dataset-path {material}/cut_gz", "cannot read FASHION_MNIST"),
    "dataset folder": ("--vision-dataset MNIST --dataset-path {material}/none", "cannot read MNIST"),
    "checkpoint missing": ("--trained-vision-model-path {material}/none", "nothing at"),
    "checkpoint garbage": ("--trained-vision-model-path {material}/garbage.safetensors", "neither a whole safetensors"),
    "checkpoint foreign": (
        "--trained-vision-model-path {material}/foreign.safetensors",
        "3 tensors are missing (linears.0",
    ),
    "checkpoint classes": ("--trained-vision-model-path {material}/seven.safetensors", "num_classes 7, needed 10"),
    "checkpoint folder": ("--trained-vision-model-path {material}", "safetensors"),
    "gcn missing": ("--gcn-path {material}/none", "nothing at"),
    "gcn folder": ("--gcn-path {material}", "safetensors"),
    "output below a file": ("--output-dir {material}/garbage.safetensors/out", "Not a directory"),
    "device missing": ("--device cuda:7", "CUDA devices are here"),
    "method": ("--eval.methods mimu nonsense", "choose from all, mimu, mimu_refined, mimu_deep, mimu_deep_network,"),
    "retrain alone": ("--eval.methods mimu retrain default --eval.references 0", "but eval.references is 0: ask for 1"),
    "GCN's class": ("--gcn.train-classes 3 10", "DIGITS has classes 0 to 9"),
    "GCN's class twice": ("--gcn.train-classes 3 three", "names a class twice: name each once"),
    "yaml missing": ("--config {material}/none.yaml", "there is no config file"),
    "yaml folder": ("--config {material}", "directory"),
    "yaml key": ("--config {material}/key.yaml", "has no field 'nonsense'"),
    "yaml nested key": ("--config {material}/nested.yaml", "train has no field 'nonsense'"),
    "yaml type": ("--config {material}/type.yaml", "train.epochs"),
    "yaml choice": ("--config {material}/choice.yaml", "vision_dataset is NOPE: give one of DIGITS,"),
    "yaml value": ("--config {material}/value.yaml", "kappa_list is 0: give a whole number from 1"),
    "yaml broken": ("--config {material}/broken.yaml", "broken.yaml"),
    "yaml list": ("--config {material}/list.yaml", "list.yaml"),
    "yaml null": ("--config {material}/null.yaml", "null.yaml"),
    "yaml text": ("--config {material}/text.yaml", "text.yaml"),
    "yaml binary": ("--config {material}/binary.yaml", "binary.yaml"),
}


@pytest.mark.parametrize(("line", "message"), SENTENCES.values(), ids=SENTENCES)
def test_refused_in_one_sentence(line, message, material, tiny, tmp_path, capsys):
    words = line.format(material=material).split()
    if words[0].startswith("--"):
        place = [] if "--output-dir" in words else ["--output-dir", str(tmp_path / "out")]
        words = ["run", "--config", str(tiny), "--tracker", "none", *place, *words]
    assert message in sentence(refused(capsys, tmp_path / "out", *words))


def test_unusable_gcn_is_refused(tiny, material, tmp_path, capsys):
    """Refused before anything is written."""
    out = tmp_path / "out"
    arguments = ["--config", str(tiny), "--tracker", "none", "--output-dir", str(out)]
    for name, message in (("garbage", "neither a whole safetensors"), ("seven", "no GCN")):
        assert main.main(["run", *arguments, "--gcn-path", str(material / f"{name}.safetensors")]) == 2
        assert message in sentence(capsys.readouterr().err)
    assert not [path for path in out.rglob("*") if path.suffix in (".part", ".tmp")]
    assert not list((out / "eval").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["unlearning", "elbo"])
def test_a_diverging_gcn_says_what_to_lower(objective, tiny, tmp_path, capsys):
    words = ["--config", str(tiny), "--output-dir", str(tmp_path), "--gcn.objective", objective, "--gcn.lr", "1e30"]
    assert main.main(["run", *words]) == 2
    err = capsys.readouterr().err
    assert "lower gcn.lr" in err.splitlines()[-1]
    assert "Traceback" not in err


FLAGS = {
    "flag": ("--nonsense 3", "--nonsense"),
    "dataset": ("--vision-dataset NOPE", "give one of DIGITS, FASHION_MNIST"),
    "model": ("--model-architecture NOPE", "give one of HookedMLPClassifier, HookedResnet"),
    "type": ("--train.epochs many", "--train.epochs"),
    "kappa": ("--kappa-list 0", "kappa_list is 0: give a whole number from 1"),
    "twice": ("--topK-list 5 5", "name each value once"),
    "device without number": ("--device cuda:", "choose auto, cpu, cuda or cuda:N"),
    "device of another digit": ("--device cuda:²", "choose auto, cpu, cuda or cuda:N"),
    "device": ("--device tpu", "choose auto, cpu, cuda or cuda:N"),
    "range": ("--train.epochs 0", "train.epochs is 0: give a whole number from 1"),
    "dpi": ("--reporter.dpi 9", "reporter.dpi is 9: give a whole number from 10"),
    "formats": ("--reporter.formats gif", "choose from png, svg, pdf"),
    "tracker": ("--tracker wandb", "give one of trackio, none"),
}


@pytest.mark.parametrize(("line", "message"), FLAGS.values(), ids=FLAGS)
def test_flag_refused(line, message, tiny, tmp_path, capsys):
    words = ["run", "--config", str(tiny), "--output-dir", str(tmp_path / "out"), *line.split()]
    err = refused(capsys, tmp_path / "out", *words)
    assert message in re.sub(r"[\s│]+", " ", err)


def test_other_commands_say_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRACKIO_DIR")
    place = ["--output-dir", str(tmp_path)]
    assert "make some with `uv run main.py`" in sentence(refused(capsys, tmp_path, "report", *place))
    assert "make some with `uv run main.py`" in sentence(refused(capsys, tmp_path, "dashboard", *place))
    assert "needs no download" in sentence(refused(capsys, tmp_path, "download", "DIGITS", *place))
    assert "cannot be downloaded" in sentence(refused(capsys, tmp_path, "download", "PLANT_CLASSIFICATION", *place))
    where = str(tmp_path / "datasets" / "MNIST")
    assert where in sentence(refused(capsys, tmp_path, "download", "MNIST", "--dataset-path", "elsewhere", *place))
    assert "needs no preparing" in sentence(refused(capsys, tmp_path, "prepare", "MNIST", *place))
    assert "give one of DIGITS" in refused(capsys, tmp_path, "download", "NOPE", *place)


@pytest.mark.slow
def test_refusals_of_a_real_process(material, tmp_path):
    for words, message in ((["nonsense"], "there is no command"), (["--config", material / "key.yaml"], "nonsense")):
        result = process(tmp_path, "main.py", *words)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in sentence(result.stderr)


def test_a_terminal_is_not_told_what_to_do_by_a_name(tmp_path, capsys):
    assert main.main(["report", "--output-dir", str(tmp_path / "\x1b[31mred\u202e")]) == 2
    said = capsys.readouterr().err
    assert r"no records below" in said
    assert r"\x1b[31mred\u202e" in said
    assert not {"\x1b", "\u202e"} & set(said)


# --- every way to write a flag ----------------------------------------------------------------------------


def leaf_flags(kind=PipelineConfig, prefix="") -> dict:
    """Dotted name -> (type, default) of every field."""
    found, fresh = {}, kind()
    for name, hint in hints(kind).items():
        if is_dataclass(bare(hint)):
            found |= {f"{name}.{inner}": pair for inner, pair in leaf_flags(bare(hint)).items()}
        else:
            found[name] = (hint, getattr(fresh, name))
    return found


SOME = {
    "forget_class": "three",
    "device": "cuda:3",
    "auto.method": "mimu",
    "auto.smallest_share": "0.01",
    "eval.methods": "mimu",
    "eval.metrics": "core",
    "reporter.formats": "svg",
    "data.sample_bits": "12",
}


def some_value(name: str, hint: object, default: object) -> str:
    """A value that is not the default, as it is typed."""
    inner = [bare(part) for part in (hint, *get_args(bare(hint)))]
    inner += [bare(part) for one in inner for part in get_args(one)]
    kinds = [one for one in inner if isinstance(one, type)]
    choice = next((one for one in kinds if issubclass(one, Choice | OpenChoice)), None)
    if name in SOME:
        return SOME[name]
    if choice:
        return next(one.value.lower() for one in choice if one != default)
    return "17" if int in kinds else "0.375" if float in kinds else "some/path"


def dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def negated(name: str) -> str:
    section, dot, own = dashed(name).removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{own}"


SWITCHES = [name for name, (hint, _) in leaf_flags().items() if hint is bool]
VALUES = {name: some_value(name, *about) for name, about in leaf_flags().items() if name not in SWITCHES}
WRITTEN = {  # every way to write: the words for one field
    "value": [
        lambda name: [dashed(name), VALUES[name]],
        lambda name: [f"{dashed(name)}={VALUES[name]}"],
        lambda name: [f"--{name}={VALUES[name]}"],
        lambda name: [f"--{name}", VALUES[name]],
    ],
    "on": [lambda name: [dashed(name)], lambda name: [f"{dashed(name)}=true"], lambda name: [f"--{name}=Yes"]],
    "off": [lambda name: [negated(name)], lambda name: [f"{dashed(name)}=false"], lambda name: [f"--{name}=off"]],
}


@pytest.fixture(scope="module")
def configured() -> dict[str, list[PipelineConfig]]:
    """The configurations of command lines that give every field at once, in each way to write."""
    names = {"value": list(VALUES), "on": SWITCHES, "off": SWITCHES}
    lines = {
        what: [[word for name in names[what] for word in way(name)] for way in ways] for what, ways in WRITTEN.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        return {what: [settings_of(words) for words in lines[what]] for what in lines}


@pytest.mark.parametrize("name", leaf_flags())
def test_equals_sign_and_underscores_mean_the_same(name, configured):
    """--x y, --x=y, --x_y=z for every field; a switch takes =true and =false."""

    def read(what: str) -> list[object]:
        return [reduce(getattr, name.split("."), config) for config in configured[what]]

    if name in SWITCHES:
        assert read("on") == [True] * 3
        assert read("off") == [False] * 3
        return
    found, *others = read("value")
    assert found != leaf_flags()[name][1]
    assert others == [found] * 3


SAME = [
    (["--methods=all"], ["--eval.methods", "all"]),
    (["--metrics=all"], ["--metrics", "all"]),
    (["--skip-bad-images=true"], ["--data.skip-bad-images"]),
    (["--skip_bad_images"], ["--skip-bad-images"]),
    (["--vision_dataset=fashion_mnist"], ["--vision-dataset", "FASHION_MNIST"]),
    (["--vision-dataset=Fashion_Mnist"], ["--vision-dataset", "FASHION_MNIST"]),
    (["--gcn.prior=uniform"], ["--gcn.prior", "UNIFORM"]),
    (["--mask-layer=None"], ["--mask-layer", "None"]),
    (["--mask_layer=-1"], ["--mask-layer", "-1"]),
    (["--config=configs/gcn_mlp.yaml"], ["--config", "configs/gcn_mlp.yaml"]),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=range(len(SAME)))
def test_short_forms_take_an_equals_sign(one, other, monkeypatch):
    monkeypatch.chdir(ROOT)
    found, wanted = (settings_of(words) for words in (one, other))
    assert found == wanted
    assert found != settings_of([])


def test_switches_of_commands_take_an_equals_sign(monkeypatch, capsys):
    said = []

    def command(quiet: bool = False, json: bool = False) -> None:
        said.append((quiet, json))

    monkeypatch.setitem(main.COMMANDS, "run", command)
    for words in (["--quiet=true", "--json=true"], ["--quiet=false", "--json=no"], ["--quiet"]):
        assert main.main(["run", *words]) == 0
    assert said == [(True, True), (False, False), (True, False)]
    assert main.main(["run", "--quiet=perhaps"]) == 2
    assert "--quiet is 'perhaps': give true or false" in capsys.readouterr().err


def test_switches_of_groups_take_an_equals_sign(monkeypatch):
    """A group's flags stand without its name."""
    said = []

    def command(asking: Asked = AS_USUAL, read: Read = AS_IT_IS) -> None:
        said.append((asking.quiet, read.by_order, read.skip_bad_images))

    monkeypatch.setitem(main.COMMANDS, "forget", command)
    assert main.main(["forget", "--quiet=true", "--by-order=yes", "--skip_bad_images=false"]) == 0
    assert said == [(True, True, False)]


# --- streams that are not what one thinks -----------------------------------------------------------------


def shell(folder: Path, line: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A command line of bash in the project's folder; `mimu` is this program."""
    script = f'set -o pipefail; mimu() {{ {sys.executable} main.py "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, env=environment(folder) | variables, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", ["run --help", "datasets", "--help"])
def test_a_closed_pipe_ends_quietly(tmp_path, line):
    """The reader is gone before the first word; 141 is what the shell gives for such a death."""
    ended = shell(tmp_path, f"mimu {line} | (exec 0<&-; sleep 0.01)")
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.slow
def test_closed_streams_lead_nowhere(tmp_path):
    for closed, out in ((">&-", b""), ("2>&-", b"DIGITS"), ("<&-", b"DIGITS"), (">&- 2>&- <&-", b"")):
        ended = shell(tmp_path, f"mimu datasets {closed}")
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert out in ended.stdout


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_sentence(tmp_path):
    ended = shell(tmp_path, "mimu datasets > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.decode().splitlines() == ["error: no space for what the command prints: let it print elsewhere"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_stream_shows_what_it_can(tmp_path, encoding):
    """Arrows and Greek letters of the help and of errors, on streams that have none."""
    ended = shell(tmp_path, "mimu run --help; mimu 'naïve→'", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert b"Traceback" not in ended.stderr
    assert b"there is no command" in ended.stderr
    assert b"\\u2192" in ended.stderr
    code = "import main; main._usable_streams(); print('→ é')"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert printed.stdout.strip() == "→ é".encode(encoding, "backslashreplace")
