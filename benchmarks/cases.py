"""Inputs that once gave a silently wrong answer, each judged by what the command line does with it today.

    uv run benchmarks/cases.py                              every kind on this checkout, about ten minutes
    uv run benchmarks/cases.py --only A F AA                some kinds
    uv run benchmarks/cases.py --project OTHER --json FILE  another checkout (its own code answers), outcomes kept

Each kind is a letter with a small input and a right outcome, judged from outside: exit code, what was printed, the
records that were written. Exit code 1 where an outcome is not the right one. Nothing outside a temporary folder is
written; mounts and other user ids need root, and such a case says "skipped" without it.
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import case_inputs as make

QUICK = """--train.epochs 2 --train.batch-size 16 --kappa-list 200 --eval.methods mimu random default
 --eval.references 0 --eval.metrics core --reporter.formats svg --tracker none"""
LIMIT = 900  # seconds that one command may take


@dataclass
class Outcome:
    """What a command did: exit code, both streams, seconds, the largest memory of its process in MB."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float

    @property
    def said(self) -> str:
        """Both streams."""
        return self.out + self.err

    @property
    def in_one_sentence(self) -> bool:
        """Whether it ended with one line `error: ...` and no traceback."""
        last = [line for line in self.err.splitlines() if line.startswith("error:")]
        return "Traceback" not in self.said and len(last) == 1

    @property
    def refused(self) -> bool:
        """Whether the input was refused as bad input is: exit code 2, one sentence."""
        return self.code == 2 and self.in_one_sentence

    @property
    def last(self) -> str:
        """The last line of stderr, shortened."""
        lines = self.err.strip().splitlines() or [""]
        return f"exit {self.code}: {lines[-1][-150:]}"


@dataclass
class Bench:
    """The checkout that is judged, and a fresh folder for one case."""

    project: Path
    python: str
    place: Path
    default: Path
    """Output folder of a finished default run of this checkout; to be copied, not changed."""
    counter: int = 0
    made: dict[str, Path] = field(default_factory=dict)

    def call(self, arguments: Sequence[str | Path], env: dict[str, str] | None = None, wrap: str = "") -> Outcome:
        """Run main.py; `wrap`: a shell prefix such as `setpriv ...`."""
        command = [*wrap.split(), self.python, str(self.project / "main.py"), *map(str, arguments)]
        kept = {name: value for name, value in os.environ.items() if name not in ("TRACKIO_DIR", "PYTHONPATH")}
        begun = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = subprocess.Popen(command, stdout=out, stderr=err, cwd=self.place, env=kept | (env or {}))
            limit = threading.Timer(LIMIT, child.kill)
            limit.start()
            _, status, usage = os.wait4(child.pid, 0)  # the memory of this child alone
            limit.cancel()
            child.returncode = os.waitstatus_to_exitcode(status)
            texts = [os.pread(file.fileno(), 1 << 26, 0).decode("utf-8", "backslashreplace") for file in (out, err)]
        return Outcome(child.returncode, *texts, time.monotonic() - begun, usage.ru_maxrss / 1024)

    def run(self, dataset: Sequence[str | Path], *more: str | Path, out: str = "out", **how: Any) -> Outcome:
        """A quick run with the network that ships, on a folder tree unless `dataset` says otherwise."""
        network = ["--gcn-path", self.project / "pretrained/gcn_mlp.safetensors"]
        given = [*network, *QUICK.split(), "--output-dir", self.place / out, "--vision-dataset", *dataset, *more]
        return self.call(given, **how)

    def tree(self, root: Path, *more: str | Path, out: str = "out", **how: Any) -> Outcome:
        """A quick run on a folder tree at 32 pixels."""
        return self.run(["folder", "--dataset-path", root, "--data.image-size", "32"], *more, out=out, **how)

    def records(self, out: str = "out") -> list[dict]:
        """The records of an output folder."""
        found = sorted((self.place / out / "eval/metrics_and_plots/json").glob("*/*.json"))
        return [json.loads(path.read_text()) for path in found]

    def forgotten(self, out: str = "out") -> list[str]:
        """Names of the classes that a folder's only run forgot."""
        return self.records(out)[0]["forget_names"] if self.records(out) else []

    def copy_of_default(self) -> Path:
        """A copy of the finished default run."""
        return Path(shutil.copytree(self.default, self.place / "default"))

    def python_says(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run Python inside the project."""
        return shell([self.python, "-c", code], self.project)


def shell(command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal; its streams as text."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd, timeout=LIMIT, check=False
    )


Judged = tuple[bool | None, str]
"""Whether the outcome is the right one (None: skipped), and what happened."""
CASES: dict[str, tuple[str, Callable[[Bench], Judged]]] = {}


def case(letter: str, what: str) -> Callable[[Callable[[Bench], Judged]], Callable[[Bench], Judged]]:
    """Register a case under the letter of its kind."""

    def register(function: Callable[[Bench], Judged]) -> Callable[[Bench], Judged]:
        CASES[letter] = what, function
        return function

    return register


@contextmanager
def small_disk(place: Path, options: str) -> Generator[Path | None]:
    """A file system of its own in memory; None where it cannot be mounted."""
    place.mkdir()
    mounted = shell(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place])
    try:
        yield place if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", place], check=True)


def both(*judged: Judged) -> Judged:
    """Several outcomes of one kind: right if all are."""
    return all(right for right, _ in judged), "; ".join(said for _, said in judged)


# --- what is typed, and which images are meant ------------------------------------------------------------


@case("A", "class names made of digits")
def digits_in_names(b: Bench) -> Judged:
    trees = {"1": ("1", "2", "3"), "12": tuple(map(str, range(1, 13))), "007": ("007", "7", "10")}
    judged = []
    for typed, classes in trees.items():
        root = make.tree(b.place / f"tree{typed}", classes)
        ended = b.tree(root, "--forget-class", typed, out=f"out{typed}")
        got = b.forgotten(f"out{typed}")
        judged.append((got == [typed], f"{typed} forgets {got[0] if got else ended.last}"))
    return both(*judged)


@case("B", "contents change under the same path: a sweep again")
def contents_decide(b: Bench) -> Judged:
    root = make.tree(b.place / "tree")
    flags = {"train": "{epochs: 2, batch_size: 16}", "kappa_list": "[200]", "data": "{image_size: 32}"}
    flags |= {"eval": "{methods: [mimu, random, default], references: 0, metrics: [core]}", "tracker": "none"}
    flags |= {
        "vision_dataset": "FOLDER",
        "dataset_path": str(root),
        "output_dir": str(b.place / "out"),
        "forget_class": "[cat]",
    }
    flags |= {"gcn_path": str(b.project / "pretrained/gcn_mlp.safetensors")}
    text = "\n".join(f"{name}: {value}" for name, value in flags.items())
    (b.place / "sweep.yaml").write_text(text + "\nsweep:\n  workers: 1\n  over:\n    seed: [0]\n")
    b.call(["sweep", "--config", b.place / "sweep.yaml"])
    (root / "cat").rename(root / "aside")
    (root / "dog").rename(root / "cat")
    (root / "aside").rename(root / "dog")
    again = b.call(["sweep", "--config", b.place / "sweep.yaml"])
    count = len(b.records())
    return count == 2 and again.code == 0, f"{count} records after the class folders were swapped"


@case("C", "two folders compared, one folder under two paths")
def datasets_by_contents(b: Bench) -> Judged:
    one, other = make.tree(b.place / "one"), make.tree(b.place / "other", count=12)
    shutil.copytree(one, b.place / "copy")
    for out, root in (("a", one), ("b", other), ("c", b.place / "copy")):
        b.tree(root, "--forget-class", "cat", out=out)
    different = b.call(["report", "--compare", b.place / "a", b.place / "b"])
    same = b.call(["report", "--compare", b.place / "a", b.place / "c"])
    return both(
        (different.refused, f"different images: exit {different.code}"),
        (same.code == 0, f"same images, two paths: exit {same.code}"),
    )


@case("D", "a reference that did not forget")
def references_are_checked(b: Bench) -> Judged:
    root = make.tree(b.place / "two", ("cat", "dog"))
    ended = b.tree(root, "--forget-class", "cat", "--eval.references", "1", "--eval.metrics", "core", "retrain")
    record = b.records()[0] if b.records() else {}
    gap = record.get("methods", {}).get("mimu", {}).get("avg_gap", "no record")
    return gap is None and "retrained" in ended.said, f"Avg Gap against it: {gap if gap is None else 'a number'}"


@case("E", "splits and wrappers are no classes")
def splits_are_splits(b: Bench) -> Judged:
    splits = b.tree(make.tree(b.place / "training", splits=("training", "testing")), "--forget-class", "cat", out="a")
    for split in ("train", "test"):
        make.put(b.place / "flat" / split, 8)
    flat = b.tree(b.place / "flat", out="b")
    wrapped = b.tree(make.tree(b.place / "wrap/dataset").parent, "--forget-class", "cat", out="c")
    zipped = b.place / "zipped"
    zipped.mkdir()
    shutil.make_archive(str(zipped / "photos"), "zip", make.tree(b.place / "base"))
    prepared = b.call(["prepare", "FOLDER", "--dataset-path", zipped, "--output-dir", b.place / "d"])
    after = b.tree(zipped, "--forget-class", "cat", out="d")
    return both(
        (b.forgotten("a") == ["cat"], f"training/testing: exit {splits.code}"),
        (flat.refused, f"images right in train/: exit {flat.code}"),
        (b.forgotten("c") == ["cat"], f"wrapper: exit {wrapped.code}"),
        (b.forgotten("d") == ["cat"], f"prepare: exit {prepared.code}, then {after.code}"),
    )


def _first_sample(b: Bench, out: str) -> np.ndarray | None:
    records = b.records(out)
    if not records:
        return None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(records[0]["samples"]["images"][0]))).convert("L"))


@case("F", "pixels as a viewer shows them")
def as_shown(b: Bench) -> Judged:
    b.tree(make.turned(b.place / "exif"), "--forget-class", "owl", out="a")
    turned = _first_sample(b, "a")
    upright = turned is not None and turned[:10].mean() > turned[-10:].mean() + 100
    deep = b.tree(make.twelve_bits(b.place / "dark"), "--forget-class", "owl", out="b")
    said = re.search(r"1[26][- ]bit|bits", deep.err) is not None
    return both(
        (upright, "orientation " + ("applied" if upright else "ignored")), (said, f"12 of 16 bits said: {said}")
    )


@case("G", "the same image for training and test")
def duplicates_are_counted(b: Bench) -> Judged:
    ended = b.tree(make.same_on_both_sides(b.place / "tree"), "--forget-class", "cat")
    said = re.search(r"same|duplicate|twice", ended.err) is not None
    return ended.code == 0 and said, "said" if said else "not a word"


@case("H", "nothing to read")
def nothing_there(b: Bench) -> Judged:
    make.put(b.place / "flat", 12)
    (b.place / "empty").mkdir()
    judged = []
    for name in ("flat", "empty"):
        ended = b.tree(b.place / name)
        judged.append((ended.refused, f"{name}: exit {ended.code}{'' if ended.in_one_sentence else ', traceback'}"))
    return both(*judged)


# --- what is given ----------------------------------------------------------------------------------------


def _given_classifier(b: Bench, name: str) -> Outcome:
    path = next((b.default / "checkpoints/classifier").glob("*/classifier.safetensors"))
    if not (b.place / "checkpoints").exists():
        make.odd_checkpoints(path, b.place / "checkpoints")
    return b.run(["digits"], "--trained-vision-model-path", b.place / "checkpoints" / name, out=name)


@case("I", "a checkpoint in bfloat16")
def odd_dtypes(b: Bench) -> Judged:
    ended = _given_classifier(b, "bf16.safetensors")
    return ended.refused or (ended.code == 0 and "bfloat16" in ended.said), ended.last


@case("O", "a checkpoint with NaN")
def numbers_that_are_none(b: Bench) -> Judged:
    ended = _given_classifier(b, "nan.safetensors")
    return ended.refused and "nan.safetensors" in ended.err and "finite" in ended.err, ended.last


@case("Q", "a checkpoint of one's own")
def own_checkpoints(b: Bench) -> Judged:
    judged = []
    for name in ("state.pt", "module.safetensors"):
        ended = _given_classifier(b, name)
        judged.append((ended.code == 0, f"{name}: {ended.last}"))
    return both(*judged)


@case("AQ", "NaN in a given network")
def network_is_blamed(b: Bench) -> Judged:
    code = """import sys; from safetensors import safe_open; from safetensors.torch import save_file
file = safe_open(sys.argv[1], "pt"); state = {k: file.get_tensor(k) for k in file.keys()}
facts = {k: v for k, v in file.metadata().items() if k != "digest"}
next(iter(state.values())).view(-1)[0] = float("nan"); save_file(state, sys.argv[2], metadata=facts)"""
    network = b.place / "nan_gcn.safetensors"
    shipped = b.project / "pretrained/gcn_mlp.safetensors"
    subprocess.run([b.python, "-c", code, shipped, network], check=True)
    ended = b.run(["digits"], "--gcn-path", network)
    return ended.refused and network.name in ended.err, ended.last


@case("AM", "files of other origins")
def foreign_files(b: Bench) -> Judged:
    make.bomb(b.place / "bomb/MNIST/raw")
    packed = b.run(["mnist", "--dataset-path", b.place / "bomb/MNIST/raw"], out="a")
    graphs = next((b.copy_of_default() / "datasets/Graphs").iterdir())
    victim = max(graphs.glob("*.npy"), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"")
    classifier = next((b.default / "checkpoints/classifier").glob("*/classifier.safetensors"))
    empty = b.run(["digits"], "--graph-dir", graphs, "--trained-vision-model-path", classifier, out="b")
    return both(
        (packed.refused and packed.megabytes < 1500, f".gz bomb: exit {packed.code}, {packed.megabytes:.0f} MB"),
        (empty.refused, f"empty .npy: {empty.last}"),
    )


@case("AI", "values that crash late")
def late_values(b: Bench) -> Judged:
    shapes = ("--gcn.hidden-dim", "100000"), ("--train.lr", "inf"), ("--data.val-fraction", "1e-300")
    network = ("--output-dir", b.place / "out", "--tracker", "none", "--reporter.formats", "svg")
    judged = []
    for flag, value in shapes:
        ended = b.call([*network, flag, value])
        said = ended.code == 2 and "Traceback" not in ended.err and re.search("give a|lower gcn", ended.err) is not None
        judged.append((said, f"{flag} {value}: exit {ended.code}"))
    few = b.call([*network, "--gcn.steps", "10"])
    return both(*judged, (few.code == 0, f"--gcn.steps 10: exit {few.code}"))


@case("AV", "a target that no number of these images can show")
def hopeless_target(b: Bench) -> Judged:
    ended = b.call(["--kappa", "auto", "--tracker", "none", "--output-dir", b.place / "out"])
    said = "images" in ended.err.strip().splitlines()[-1]
    return ended.code != 0 and said and ended.seconds < 20, f"{ended.seconds:.0f} s, {ended.last}"


@case("AX", "a mask meets a layer of another classifier")
def mask_knows_its_parent(b: Bench) -> Judged:
    mask = next((b.default / "eval/metrics_and_plots/masks").glob("*/*.safetensors"))
    code = f"""import torch; from unlearn.masks import Mask, masked; from model import HookedMLPClassifier
mask = Mask.load(__import__("pathlib").Path({str(mask)!r})); mask = mask[0] if isinstance(mask, tuple) else mask
model = HookedMLPClassifier(10, 1, 8)
with masked(model.weights(-2), mask): print("applied")"""
    said = b.python_says(code)
    refused = "applied" not in said.stdout and "another" in said.stderr
    return refused, "refused" if refused else "applied without a word"


# --- names, streams, places -------------------------------------------------------------------------------


@case("K", "a class folder whose name is no UTF-8")
def odd_bytes(b: Bench) -> Judged:
    root = make.with_odd_name(b.place / "tree")
    other = b.tree(root, "--forget-class", "cat", out="a")
    itself = b.tree(root, "--forget-class", b"caf\xe9".decode("utf-8", "surrogateescape"), out="b")
    report = b.call(["report", "--output-dir", b.place / "b"])
    return both(
        (other.code == 0, f"beside it: {other.last}"),
        (itself.code == 0 and len(b.records("b")) == 1, f"forgotten: {itself.last}"),
        (report.code == 0, f"report: exit {report.code}"),
    )


@case("T", "a name typed in another Unicode form")
def unicode_forms(b: Bench) -> Judged:
    root = make.tree(b.place / "tree", (unicodedata.normalize("NFD", "café"), "dog", "owl"))
    ended = b.tree(root, "--forget-class", unicodedata.normalize("NFC", "café"))
    return ended.code == 0, ended.last


@case("L", "a stream that is no UTF-8")
def narrow_streams(b: Bench) -> Judged:
    root = make.tree(b.place / "tree", ("кот", "dog", "owl"))
    ended = b.tree(root, "--forget-class", "кот", env={"PYTHONIOENCODING": "latin-1"})
    return ended.code == 0, ended.last


@case("M", "a closed pipe")
def closed_pipe(b: Bench) -> Judged:
    command = f"{b.python} {b.project / 'main.py'} run --help | head -1"
    ended = shell(["bash", "-c", command])
    return ended.stderr == "", "quiet" if not ended.stderr else ended.stderr.strip().splitlines()[-1][:100]


@case("N", "no HOME, and a user without an entry")
def homeless(b: Bench) -> Judged:
    if os.getuid() != 0:
        return None, "skipped: needs root"
    b.place.chmod(0o777)
    wrap = "env -u HOME setpriv --reuid 54321 --clear-groups"
    ended = b.call(["datasets", "--output-dir", b.place / "out"], wrap=wrap)
    return ended.code == 0 and "DIGITS" in ended.out, ended.last


@case("V", "an output folder that cannot be written")
def the_true_cause(b: Bench) -> Judged:
    root = make.tree(b.place / "tree")
    with small_disk(b.place / "sealed", "ro,size=1m") as sealed:
        if sealed is None:
            return None, "skipped: cannot mount"
        ended = b.tree(root, "--forget-class", "cat", "--output-dir", sealed)
    return ended.code in (1, 2) and "cannot read FOLDER" not in ended.err and "sealed" in ended.err, ended.last


@case("J", "no space left")
def no_space(b: Bench) -> Judged:
    with small_disk(b.place / "disk", "size=300k") as disk:
        if disk is None:
            return None, "skipped: cannot mount"
        ended = b.run(["digits"], "--output-dir", disk)
    return ended.code == 1 and ended.in_one_sentence, ended.last


@case("AE", "too many open files, files too large")
def disk_errors(b: Bench) -> Judged:
    judged = []
    for limit in ("ulimit -n 24", "ulimit -f 100"):
        command = f'{limit}; exec "$@"'
        run = [
            b.python,
            str(b.project / "main.py"),
            *QUICK.split(),
            "--output-dir",
            str(b.place / limit[-3:].strip()),
        ]
        ended = shell(["bash", "-c", command, "x", *run])
        fine = ended.returncode in (0, 1, 2) and "Traceback" not in ended.stderr
        judged.append((fine, f"{limit}: exit {ended.returncode}{'' if fine else ', traceback'}"))
    return both(*judged)


@case("W", "what operating systems leave in folders")
def litter(b: Bench) -> Judged:
    ended = b.tree(make.with_litter(b.place / "tree"), "--forget-class", "cat")
    return ended.code == 0, ended.last


@case("X", "torchvision's own layout")
def torchvision_layout(b: Bench) -> Judged:
    root = b.place / "root"
    make.mnist(root / "MNIST/raw")
    judged = []
    for number, path in enumerate((root, root / "MNIST", root / "MNIST/raw")):
        ended = b.run(["MNIST", "--dataset-path", path], out=str(number))
        judged.append((ended.code == 0, f"{path.relative_to(b.place)}: exit {ended.code}"))
    return both(*judged)


@case("P", "images too large")
def large_scans(b: Bench) -> Judged:
    big = b.tree(make.with_scan(b.place / "big", 14000), "--forget-class", "cat", out="a")
    large = b.tree(make.with_scan(b.place / "large", 11000), "--forget-class", "cat", out="b")
    reason = re.search(r"pixels", big.err) is not None
    return both(
        (big.code == 0 or (big.refused and reason), f"14,000 x 14,000: {'the limit' if reason else 'not an image'}"),
        (large.code == 0 and "Warning" not in large.err, f"11,000 x 11,000: exit {large.code}"),
    )


@case("U", "an image is touched between two runs")
def touched(b: Bench) -> Judged:
    root = make.tree(b.place / "tree")
    b.tree(root, "--forget-class", "cat")
    (root / "cat/img000.jpg").touch()
    ended = b.tree(root, "--forget-class", "cat")
    return ended.code == 0, ended.last


# --- configuration ----------------------------------------------------------------------------------------


@case("R", "the YAML library's own words")
def own_words(b: Bench) -> Judged:
    judged = []
    for text in ("mask_layer: None", "forget_class: no", "train: {epochs: many}"):
        (b.place / "c.yaml").write_text(text + "\n")
        ended = b.call(["--config", b.place / "c.yaml", "--output-dir", b.place / "out"])
        field_name = text.partition(":")[0] if "{" not in text else "epochs"
        clear = ended.code == 0 or (ended.refused and "$" not in ended.err and field_name in ended.err)
        judged.append((clear, f"{text}: {ended.last[:110]}"))
    return both(*judged)


@case("S", "a sweep takes what a run takes")
def sweeps_take_all(b: Bench) -> Judged:
    text = "sweep:\n  over:\n    forget_class: [zero, [one, two]]\n"
    (b.place / "s.yaml").write_text("train: {epochs: 1}\n" + text)
    code = f"""from pathlib import Path; from commands.sweep import load_sweep, expand
print(len(expand(*load_sweep([Path({str(b.place / "s.yaml")!r})]))))"""
    said = b.python_says(code)
    return said.stdout.strip() == "2", said.stdout.strip() or said.stderr.strip().splitlines()[-1][:150]


@case("AO", "a secret by interpolation")
def secrets(b: Bench) -> Judged:
    (b.place / "c.yaml").write_text("dataset_path: ${oc.env:HF_TOKEN}\n")
    ended = b.call(
        ["--config", b.place / "c.yaml", "--output-dir", b.place / "out", *QUICK.split()], env={"HF_TOKEN": "sesame"}
    )
    return ended.refused and "sesame" not in ended.said, "shown" if "sesame" in ended.said else ended.last


@case("AS", "two ways in, two defaults")
def one_default(b: Bench) -> Judged:
    code = """from core.config import PipelineConfig, plain; from core.yaml_files import load_config
from pathlib import Path
a, b = plain(PipelineConfig()), plain(load_config([Path("configs/default.yaml")]))
print(sorted(name for name in a if a[name] != b[name] and name not in ("tracker",)))"""
    said = b.python_says(code).stdout.strip()
    return said == "[]", f"fields that differ: {said}"


@case("AT", "the run of a given network")
def two_networks(b: Bench) -> Judged:
    flags = ["--output-dir", b.place / "out", "--tracker", "none", "--train.epochs", "2", "--gcn.steps", "20"]
    flags += ["--eval.references", "0", "--eval.methods", "mimu", "random", "default", "--reporter.formats", "svg"]
    b.call([*flags, "--kappa-list", "200"])
    b.call([*flags, "--kappa-list", "400", "--gcn-path", b.project / "pretrained/gcn_mlp.safetensors"])
    runs = {record["run"] for record in b.records()}
    return len(runs) == 2, f"{len(b.records())} records, {len(runs)} runs"


@case("AJ", "several processes, one of them")
def one_worker(b: Bench) -> Judged:
    ended = b.run(["digits"], "--train.use-ddp")
    return ended.code == 0, ended.last


@case("AK", "the launcher is killed while its workers start")
def no_orphans(b: Bench) -> Judged:
    slowest = 0.0
    for wait in (6.0, 8.0, 10.0):
        mark = f"{b.place}/out{wait:.0f}"
        flags = [*QUICK.split(), "--output-dir", mark, "--train.use-ddp", "--train.num-workers", "2"]
        launcher = subprocess.Popen(
            [b.python, b.project / "main.py", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(wait)
        launcher.kill()
        launcher.wait()
        begun = time.monotonic()
        while (found := shell(["ps", "-s", str(launcher.pid), "-o", "pid="]).stdout.split()) and slowest < 90:
            time.sleep(0.2)
            slowest = max(slowest, time.monotonic() - begun)
        for left in found:
            os.kill(int(left), signal.SIGKILL)
    return slowest <= 10, f"the last process was gone after {slowest:.1f} s"


@case("Z", "a folder of large pictures, several epochs")
def decoded_once(b: Bench) -> Judged:
    wave = np.add.outer(np.arange(1200), np.arange(1200))
    for number, name in enumerate(("cat", "dog", "owl")):
        (b.place / "tree" / name).mkdir(parents=True)
        for image in range(40):
            pixels = np.stack([(wave * (1 + number) + 7 * image + 80 * c) % 256 for c in range(3)], -1)
            Image.fromarray(pixels.astype(np.uint8)).save(b.place / "tree" / name / f"{image}.png")
    ended = b.tree(b.place / "tree", "--forget-class", "cat", "--train.epochs", "6")
    rates = [float(rate) for rate in re.findall(r"epoch 6/6.*?([\d.]+) images/s", ended.err)]
    return bool(rates) and rates[0] > 3000, f"last epoch: {rates[0] if rates else '?'} images/s"


# --- products that were damaged ---------------------------------------------------------------------------


def _again(b: Bench, out: Path) -> Outcome:
    return b.call(["--output-dir", out, "--tracker", "none"])


def _figures(out: Path) -> dict[str, object]:
    """What the records of a folder hold of every method, seconds left out: those of a new measurement differ."""
    found = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))
    records = [json.loads(path.read_text()) for path in found]

    def scores(of: dict) -> dict:
        return {
            name: {metric: value for metric, value in values.items() if not metric.startswith("seconds")}
            for name, values in of.items()
        }

    return {one["id"]: (scores(one["methods"]), scores(one["validation"]), one["confusion"]) for one in records}


@case("AA", "damaged products")
def damage_is_seen(b: Bench) -> Judged:
    judged, sound = [], _figures(b.default)
    for kind in ("record", "mask", "figure"):
        out = Path(shutil.copytree(b.default, b.place / kind))
        below = out / "eval/metrics_and_plots"
        if kind == "record":
            path = sorted((below / "json").glob("*/*.json"))[0]
            path.write_text(re.sub(r'("forget_loss": \d)\.(\d)', r"\1.9\2", path.read_text(), count=40))
        elif kind == "mask":
            one, two = sorted((below / "masks").glob("*/*_mimu.safetensors"))[:2]
            one.write_bytes(two.read_bytes())
            path = one
        else:
            path = sorted((below / "plots").glob("*/*.svg"))[0]
            path.write_bytes(path.read_bytes()[:1000])
        ended = _again(b, out)
        mended = path.stat().st_size > 1000 and _figures(out) == sound and path.name in ended.err
        judged.append((ended.code == 0 and mended, f"{kind}: {'made anew' if mended else 'used'}"))
    return both(*judged)


@case("AB", "a broken record")
def broken_record(b: Bench) -> Judged:
    out = b.copy_of_default()
    sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0].write_text("")
    ended = _again(b, out)
    return ended.code == 0 and _figures(out) == _figures(b.default), ended.last


@case("AC", "a record that leads out of the folder")
def paths_stay_inside(b: Bench) -> Judged:
    out = b.copy_of_default()
    path = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0]
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"run": "../../../../../outside", "seed": "../.."}))
    b.call(["report", "--output-dir", out])
    outside = [found.name for found in b.place.rglob("*outside*")]
    return not outside, f"written outside: {outside or 'nothing'}"


@case("AD", "one bad record")
def bad_record(b: Bench) -> Judged:
    judged = []
    for name, value in (("methods", {"mimu": 3}), ("intervals", 7), ("mask_map", "x"), ("dataset", float("nan"))):
        out = Path(shutil.copytree(b.default, b.place / name))
        path = sorted((out / "eval/metrics_and_plots/json").glob("*/*.json"))[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        ended = b.call(["report", "--output-dir", out])
        judged.append((ended.code == 0 and "Traceback" not in ended.err, f"{name}: exit {ended.code}"))
    return both(*judged)


@case("AF", "locks of the dead, and no locks at all")
def stale_locks(b: Bench) -> Judged:
    out = b.copy_of_default()
    stage = next((out / "checkpoints/classifier").iterdir())
    (stage.parent / f".{stage.name}.lock").touch()
    shutil.rmtree(stage)
    ended = _again(b, out)
    left = [path.name for path in out.rglob("*.lock") if path.stat().st_size == 0 and path.parent == stage.parent]
    return ended.code == 0 and not left, f"exit {ended.code}, left: {left or 'nothing'}"


@case("AR", "a damaged stage")
def damage_is_said(b: Bench) -> Judged:
    out = b.copy_of_default()
    path = next((out / "checkpoints/classifier").glob("*/classifier.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    ended = _again(b, out)
    said = re.search(r"damaged|\bchanged|does not match", ended.err) is not None
    return ended.code == 0 and said, "said" if said else "not a word"


@case("AH", "clean.sh beside a run")
def clean_beside_a_run(b: Bench) -> Judged:
    project = Path(shutil.copytree(b.project, b.place / "project", ignore=shutil.ignore_patterns(".venv", ".git")))
    flags = ["--tracker", "none", "--train.epochs", "300"]
    with (b.place / "log").open("wb") as log:
        running = subprocess.Popen([b.python, "main.py", *flags], stdout=log, stderr=log, cwd=project)
        for _ in range(200):
            time.sleep(0.2)
            if b"epoch" in (b.place / "log").read_bytes():
                break
        swept = shell(["bash", project / "clean.sh"])
        running.send_signal(signal.SIGINT)
        running.wait(60)
    alone = shell(["bash", project / "clean.sh"])
    return both(
        (swept.returncode != 0 and "run" in swept.stderr, f"beside a run: exit {swept.returncode}"),
        (alone.returncode == 0, f"without a terminal: exit {alone.returncode}"),
    )


# --- reports ----------------------------------------------------------------------------------------------


@case("AN", "cells of tables")
def cells(b: Bench) -> Judged:
    code = """from reporting.write import as_csv, as_text
print(as_csv([["a", "b", "c"], ["=1+1", "-3.2", "@a"]])); print(as_text([["a", "b"], ["x|y", "1"]]))"""
    said = b.python_says(code).stdout
    run = re.search(r"(^|,)\"?[=@]", said, re.MULTILINE) is None and "-3.2" in said
    whole = r"x\|y" in said or "x|y" not in said
    return both((run, f"CSV: {'safe' if run else 'a formula'}"), (whole, f"Markdown: {'whole' if whole else 'split'}"))


@case("AU", "a comparison says what it did")
def comparison_says(b: Bench) -> Judged:
    one, two = b.copy_of_default(), Path(shutil.copytree(b.default, b.place / "two"))
    ended = b.call(["report", "--compare", one, two, "--output-dir", b.place / "out"])
    named = "compare-1" in ended.said
    return ended.code == 0 and named and " ahead" not in ended.out, f"exit {ended.code}, files named: {named}"


@case("AW", "what passes for fine")
def fine_is_earned(b: Bench) -> Judged:
    words, scores = set(), []
    for record in b.records(str(b.default)):
        score = record["methods"]["mimu"]["forget_score"]
        if 20 < score < 95:
            scores.append(score)
            words |= {one["key"] for one in record["verdicts"]["mimu"]}
    return "fine" not in words, f"forget scores {scores}: {', '.join(sorted(words))}"


@case("AP", "memory of many classes")
def many_classes(b: Bench) -> Judged:
    most = {}
    for classes in (250, 1000):
        root = b.place / str(classes)
        for number in range(classes):
            folder = root / f"c{number:04d}"
            folder.mkdir(parents=True)
            for image in range(20):
                make.photo(make.COLOURS[number % 6], 16, 50).save(folder / f"{image}.png")
        methods = ["--eval.methods", "mimu", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default"]
        methods += ["--eval.references", "1", "--eval.metrics", "core", "train", "retrain"]
        ended = b.tree(root, "--data.image-size", "16", "--forget-class", "c0003", *methods, out=f"out{classes}")
        most[classes] = ended.megabytes
        if ended.code:
            return False, ended.last
    grown = (most[1000] - most[250]) / 750
    return grown < 1.0, f"{most[250]:.0f} MB at 250 classes, {most[1000]:.0f} MB at 1,000: {grown:.2f} MB a class"


# --- the whole --------------------------------------------------------------------------------------------


def judge(letter: str, bench: Bench) -> dict[str, object]:
    """Run one case; an exception of the case itself counts as wrong."""
    what, function = CASES[letter]
    begun = time.monotonic()
    try:
        right, said = function(bench)
    except (OSError, subprocess.SubprocessError, LookupError, ValueError, StopIteration) as error:
        right, said = False, f"{type(error).__name__}: {error}"[:200]
    seconds = round(time.monotonic() - begun, 1)
    return {"kind": letter, "what": what, "right": right, "said": " ".join(said.split()), "seconds": seconds}


def main() -> int:
    """Judge the kinds that were asked for; returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--project", type=Path, default=Path(__file__).resolve().parent.parent)
    arguments.add_argument("--python", default=sys.executable)
    arguments.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), metavar="KIND")
    arguments.add_argument("--json", type=Path, help="write the outcomes here")
    given = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="cases-") as folder:
        Path(folder).chmod(0o755)  # another user must find it
        base = Bench(given.project.resolve(), given.python, Path(folder), Path(folder) / "finished")
        ended = base.call(["--output-dir", base.default, "--tracker", "none"])
        print(f"default run: {ended.seconds:.0f} s, exit {ended.code}", flush=True)
        for letter in sorted(given.only, key=lambda name: (len(name), name)):
            place = Path(folder) / letter
            place.mkdir()
            rows.append(judge(letter, Bench(base.project, base.python, place, base.default)))
            row = rows[-1]
            word = {True: "right", False: "WRONG", None: "skipped"}[row["right"]]  # ty: ignore[invalid-argument-type]
            print(f"| {row['kind']} | {row['what']} | {word} | {row['said']} |", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    wrong = [row["kind"] for row in rows if row["right"] is False]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} kinds right"
        + (f"; wrong: {', '.join(map(str, wrong))}" * bool(wrong))
    )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
