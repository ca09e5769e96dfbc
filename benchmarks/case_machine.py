"""Cases of the machine around a run: streams, users, disks, limits and processes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from benchmarks import case_inputs as make
from benchmarks.case_outcome import QUICK, Checkout, Judged, both, case, shell, small_disk


@case("L", "a stream that is no UTF-8")
def narrow_streams(b: Checkout) -> Judged:
    root = make.tree(b.place / "tree", ("кот", "dog", "owl"))
    ended = b.tree(root, "--forget-class", "кот", env={"PYTHONIOENCODING": "latin-1"})
    return ended.code == 0, ended.last


@case("M", "a closed pipe")
def closed_pipe(b: Checkout) -> Judged:
    command = f"{b.python} {b.project / 'main.py'} run --help | head -1"
    ended = shell(["bash", "-c", command])
    return ended.stderr == "", "quiet" if not ended.stderr else ended.stderr.strip().splitlines()[-1][:100]


@case("N", "no HOME, and a user without an entry")
def homeless(b: Checkout) -> Judged:
    if os.getuid() != 0:
        return None, "skipped: needs root"
    b.place.chmod(0o777)
    wrap = "env -u HOME setpriv --reuid 54321 --clear-groups"
    ended = b.call(["datasets", "--output-dir", b.place / "out"], wrap=wrap)
    return ended.code == 0 and "DIGITS" in ended.out, ended.last


@case("V", "an output folder that cannot be written")
def the_true_cause(b: Checkout) -> Judged:
    root = make.tree(b.place / "tree")
    with small_disk(b.place / "sealed", "ro,size=1m") as sealed:
        if sealed is None:
            return None, "skipped: cannot mount"
        ended = b.tree(root, "--forget-class", "cat", "--output-dir", sealed)
    return ended.code in (1, 2) and "cannot read FOLDER" not in ended.err and "sealed" in ended.err, ended.last


@case("J", "no space left")
def no_space(b: Checkout) -> Judged:
    with small_disk(b.place / "disk", "size=300k") as disk:
        if disk is None:
            return None, "skipped: cannot mount"
        ended = b.run(["digits"], "--output-dir", disk)
    return ended.code == 1 and ended.in_one_sentence, ended.last


@case("AE", "too many open files, files too large")
def disk_errors(b: Checkout) -> Judged:
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


@case("AJ", "several processes, one of them")
def one_worker(b: Checkout) -> Judged:
    ended = b.run(["digits"], "--train.use-ddp")
    return ended.code == 0, ended.last


@case("AK", "the launcher is killed while its workers start")
def no_orphans(b: Checkout) -> Judged:
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


@case("AH", "clean.sh beside a run")
def clean_beside_a_run(b: Checkout) -> Judged:
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
