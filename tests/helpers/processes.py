"""Commands of this project as processes of their own, what they say, and whether they are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import main
from tests.helpers.common import TINY

ROOT = Path(main.__file__).parent


def relatives(mark: str) -> list[int]:
    """Processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def start(folder: Path, *words: object, **environment: str) -> subprocess.Popen:
    """A command of this project in a process group of its own; its output goes to `folder`/log."""
    (folder / "tiny.yaml").write_text(TINY)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MIMU_MARK": str(folder), **environment}
    with (folder / "log").open("a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_for(text: str, folder: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.1)


def gone(mark: str, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while relatives(mark) and time.monotonic() < end:
        time.sleep(0.1)
    return relatives(mark) == []
