"""Run the command line on one small input, and say what it did: what every case is judged by."""

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class Checkout:
    """The checkout that is judged, and a fresh folder for one case."""

    project: Path
    python: str
    place: Path
    default: Path
    """Output folder of a finished default run of this checkout; to be copied, not changed."""

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
CASES: dict[str, tuple[str, Callable[[Checkout], Judged]]] = {}


def case(letter: str, what: str) -> Callable[[Callable[[Checkout], Judged]], Callable[[Checkout], Judged]]:
    """Register a case under the letter of its kind."""

    def register(function: Callable[[Checkout], Judged]) -> Callable[[Checkout], Judged]:
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
