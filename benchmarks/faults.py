"""Is a run that was killed, met a full disk or found its files damaged, then run again, the run that nothing disturbed?

    uv run benchmarks/faults.py [--kills 96] [--errors 38] [--together 13] [--damage 49] [--workers 2] [--seed 0]

Tiny real pipelines (DIGITS, a tree of image files, a sweep) run in children of one process that has everything
imported. Each trial has a folder of its own and one fault; what the rerun leaves is compared, file by file, with what
undisturbed runs left: every record, mask, stage, table and figure, apart from what a clock says. Prints a row for each
kind of fault and every difference; exits with 1 if there is one. Writes into a temporary folder alone.

kills    half at numbered operations on the disk (before one, or in the middle of a write), half at random moments
errors   an operation fails (ENOSPC, EIO, ...), a real tmpfs is full, no file can be opened; the run must say so in one
         sentence, without a traceback, with exit code 1 or 2
together that many processes in one folder
damage   a product is flipped, cut, emptied, exchanged, ...: the rerun names it in its log and makes it anew
workers  kill -9 of a worker of --train.use-ddp, and of the one that started it: equal, and no process is left
"""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import keep, parser
from benchmarks.damage import damage
from benchmarks.disk import (
    FILLS,
    killed_after,
    killed_at,
    refused_at,
    torn_at,
    unsynced,
    with_few_files,
)
from benchmarks.undisturbed import (
    SECONDS,
    STATES,
    Ended,
    Plan,
    Row,
    begin,
    end,
    fresh,
    measured,
    nothing,
    snapshot,
    warm_up,
    write_plans,
)

from core.config import PROJECT_ROOT

REDRAWN = re.compile(r"/plots/|/reports/")  # each use compares it with what its records say: no wait for the disk
ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EROFS)
REMOVALS = ("remove", "rmdir", "rename")


def spread(count: int, total: int, shift: float) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    return [min(total - 1, int((place + shift) * total / count)) for place in range(count)]


def kills(plans: list[Plan], count: int, folder: Path, chance: random.Random) -> list[Row]:
    """Half at numbered operations, of which some in the middle of a write; half at random moments."""
    numbered, anytime = Row("killed at an operation"), Row("killed at a random moment")
    for share, plan in zip(_shares((count + 1) // 2, len(plans)), plans, strict=True):
        for turn, number in enumerate(spread(share, len(plan.operations), chance.random())):
            operation = plan.operations[number]
            torn = operation.kind in FILLS and turn % 2
            with fresh(folder) as out:
                arm = (
                    partial(torn_at, out, number, chance.randint(0, 600), True)
                    if torn
                    else partial(killed_at, out, number)
                )
                ended = plan.run(out, arm)
                expected = -signal.SIGXFSZ if torn else -signal.SIGKILL
                # A file smaller than the limit is written whole: the next larger one ends the run.
                hit = ended.code == expected or (torn and ended.code == 0)
                ill = [] if hit else [f"not killed: {ended.code}, {ended.said[-300:]}"]
                where = f"{plan.name}, {'in' if torn else 'before'} {operation.kind} {number}"
                numbered.add(where, ill + plan.rerun(out, resume=bool(turn % 3))[0])
    for share, plan in zip(_shares(count // 2, len(plans)), plans, strict=True):
        for turn in range(share):
            with fresh(folder) as out:
                seconds = plan.seconds * (turn + chance.random()) / share * 0.95
                ended = plan.run(out, partial(killed_after, seconds))
                ill = [] if ended.code in (0, -signal.SIGPROF) else [f"not killed: {ended.code}, {ended.said[-300:]}"]
                anytime.add(f"{plan.name}, {seconds:.2f} s", ill + plan.rerun(out, resume=bool(turn % 3))[0])
    return [numbered, anytime]


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (place < count % parts) for place in range(parts)]


def ill_said(ended: Ended, out: Path) -> list[str]:
    """What is wrong with how a run ended that met an error of the disk."""
    lines = ended.said.strip().splitlines() or [""]
    if ended.code == 0:
        return []  # it went on without what failed; what it left is compared
    ill = [] if ended.code in (1, 2) else [f"exit code {ended.code}: {lines[-1][:200]}"]
    if "Traceback" in ended.said:
        frames = [line.strip() for line in lines if line.lstrip().startswith('File "')]
        ill += [f"a traceback, {frames[-1] if frames else 'no frame'}: {lines[-1][:200]}"]
    ill += [] if lines[-1].startswith("error: ") else [f"the last line is no error: {lines[-1][:200]}"]
    named = str(out.parent) in lines[-1]  # below the output folder, or of an image beside it
    return ill + ([] if named else [f"no path is named: {lines[-1][:200]}"])


def errors(plans: list[Plan], count: int, folder: Path, chance: random.Random) -> list[Row]:
    """Injected errors, for the larger part; then real ones: a full tmpfs, no free file."""
    few, full = count // 8, count // 8 if os.geteuid() == 0 else 0
    injected, opened, filled = Row("error of an operation"), Row("too many open files"), Row("tmpfs is full")
    for share, plan in zip(_shares(count - few - full, len(plans)), plans, strict=True):
        for turn, number in enumerate(spread(share, len(plan.reads), chance.random())):
            operation = plan.reads[number]
            error = chance.choice(ERRORS if operation.kind not in REMOVALS else (errno.EIO, errno.EROFS))
            with fresh(folder) as out:
                fault = partial(refused_at, out, number, error, bool(turn % 2))
                if operation.kind in FILLS and turn % 3 == 0:
                    place = sum(one.kind != "read" for one in plan.reads[:number])
                    fault, error = partial(torn_at, out, place, chance.randint(0, 600), False), errno.EFBIG
                ill = ill_said(plan.run(out, fault), out)
                where = f"{plan.name}, {errno.errorcode[error]} at {operation.kind} {number}"
                injected.add(where, ill + plan.rerun(out)[0])
    for turn in range(few):
        plan = plans[turn % len(plans)]
        with fresh(folder) as out:
            ill = ill_said(plan.run(out, partial(with_few_files, turn)), out)
            opened.add(f"{plan.name}, room for {turn}", ill + plan.rerun(out)[0])
    for turn in range(full):
        plan = plans[turn % len(plans)]
        with fresh(folder) as out, tmpfs(out, (turn + 1) * 2000 // (full + 1)):
            ill = ill_said(plan.run(out), out)
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
            filled.add(f"{plan.name}, {(turn + 1) * 2000 // (full + 1)} kB", ill + plan.rerun(out)[0])
    return [row for row in (injected, opened, filled) if row.trials]


@contextmanager
def tmpfs(place: Path, kilobytes: int) -> Generator[None]:
    """A file system of a given size on a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def together(plan: Plan, count: int, folder: Path) -> Row:
    """That many processes at once in one folder."""
    row = Row("at once in one folder")
    with fresh(folder) as out:
        ended = [end(child) for child in [begin(plan.command(out), nothing) for _ in range(count)]]
        differing = plan.differences(out)
        for one in ended:
            row.add(plan.name, ([] if one.code == 0 else [f"ended with {one.code}: {one.said[-300:]}"]) + differing)
    return row


def relatives(mark: str) -> dict[int, int]:
    """Processes that have `mark` in their environment: number -> their parent's number."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def workers(plan: Plan, count: int, folder: Path) -> Row:
    """In turn a worker and the launcher get kill -9 in the middle of a training in two processes."""
    row = Row("worker or launcher killed")
    long = [
        *plan.words,
        "--train.use-ddp",
        "--train.num-workers",
        "2",
        "--train.epochs",
        "40",
        "--eval.references",
        "0",
    ]
    plan = replace(plan, name="ddp", words=[*long, "--eval.methods", "mimu", "random", "default"], lines=set())
    whole = folder / "ddp-whole"
    ended = plan.run(whole)
    if ended.code:
        raise SystemExit(f"an undisturbed training in two processes ended with {ended.code}:\n{ended.said}")
    plan.left = snapshot(whole)
    plan.timed = {name for name in plan.left if "/plots/" in name or name.startswith("reports/")}
    for turn in range(count):
        who, mark = ("launcher" if turn % 2 else "worker"), f"{folder}/{turn}"
        with fresh(folder) as out:
            child = begin(plan.command(out, resume=True), partial(os.environ.update, {"FAULTS": mark}))
            last = time.monotonic() + SECONDS
            while not list(out.glob(STATES)) and time.monotonic() < last:
                time.sleep(0.02)
            there = relatives(mark)
            own = [pid for pid, parent in there.items() if parent in there]
            os.kill(child[0] if who == "launcher" else own[-1], signal.SIGKILL)
            ended = end(child)
            ill = [] if who == "launcher" or ended.code == 0 else [f"ended with {ended.code}: {ended.said[-300:]}"]
            last = time.monotonic() + 10
            while relatives(mark) and time.monotonic() < last:
                time.sleep(0.1)
            orphans = relatives(mark)
            ill += [f"{len(orphans)} processes are left"] if orphans else []
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            row.add(who, ill + (plan.rerun(out, resume=True)[0] if who == "launcher" else plan.differences(out)))
    return row


def show(rows: list[Row]) -> None:
    """A table, and every difference below it."""
    print("| fault | trials | equal | differing |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.fault} | {row.trials} | {row.trials - len(row.differing)} | {len(row.differing)} |")
    for row in rows:
        print("".join(f"\n{row.fault}: {one}" for one in row.differing), end="")
    print()


def campaign(given: object, folder: Path) -> list[Row]:
    """All trials that were asked for."""
    asked = vars(given)
    chance = random.Random(asked["seed"])
    plans = write_plans(folder)
    warm_up(folder)
    plans = [measured(plan, folder) for plan in plans if plan.name in asked["plans"]]
    print(", ".join(f"{p.name}: {len(p.operations)} operations, {p.seconds:.1f} s" for p in plans), file=sys.stderr)
    single = [plan for plan in plans if plan.words[0] == "run"]
    order = Row("synced before it counts")
    for plan in plans:
        order.add(plan.name, unsynced([one for one in plan.operations if not REDRAWN.search(one.target)]))
    rows = [order, *kills(plans, asked["kills"], folder, chance), *errors(single, asked["errors"], folder, chance)]
    rows += [together(plans[0], asked["together"], folder)] if asked["together"] else []
    rows += damage(plans, asked["damage"], folder, chance) if asked["damage"] else []
    return rows + ([workers(plans[0], asked["workers"], folder)] if asked["workers"] else [])


def main() -> None:
    """Measure, print, keep; 1 if anything differs."""
    made = parser(__doc__)
    counts = {"kills": 96, "errors": 38, "together": 13, "damage": 49, "workers": 2, "seed": 0}
    for name, count in counts.items():
        made.add_argument(f"--{name}", type=int, default=count)
    made.add_argument("--plans", nargs="+", default=["digits", "tree", "sweep"], help="which command lines")
    given = made.parse_args()
    os.chdir(PROJECT_ROOT)
    with tempfile.TemporaryDirectory(prefix="mimu-faults-") as name:
        rows = campaign(given, Path(name).resolve())
    show(rows)
    keep(given.json, {"rows": [vars(row) for row in rows]})
    sys.exit(1 if any(row.differing for row in rows) else 0)


if __name__ == "__main__":
    main()
