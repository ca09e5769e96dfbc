"""Runs that are killed, meet a broken disk, work in one folder or find damaged files: the short form of
benchmarks/faults.py, and that its eyes are open."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.damage import WAYS, damage_file, unnamed
from benchmarks.disk import Operation, unsynced
from benchmarks.faults import ill_said
from benchmarks.undisturbed import Ended, Plan, leftovers, snapshot

import pytest

from reporting.tables import SPENT

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"kills": 12, "errors": 4, "together": 3, "damage": 16, "workers": 0}  # damage: one of each kind

SECONDS = 900  # beside a busy machine; 60 on an idle one

# --- the short form ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    """Trials of the command, by kind of fault."""
    place = tmp_path_factory.mktemp("faults") / "rows.json"
    words = [word for name, count in COUNTS.items() for word in (f"--{name}", str(count))]
    command = [sys.executable, "benchmarks/faults.py", *words, "--json", str(place)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert place.exists(), result.stderr[-2000:]
    return {row["fault"]: row for row in json.loads(place.read_text())["rows"]}


KINDS = {
    "synced before it counts": 3,
    "killed at an operation": 6,
    "killed at a random moment": 6,
    "error of an operation": 4,
    "at once in one folder": 3,
    "damaged": 16,
}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rerun_is_undisturbed(kind, rows):
    """Records, masks, stages, tables and figures are those of a run that nothing disturbed."""
    chosen = [row for name, row in rows.items() if name.startswith(kind)]
    assert [one for row in chosen for one in row["differing"]] == []
    assert sum(row["trials"] for row in chosen) == KINDS[kind]


# --- its eyes are open ------------------------------------------------------------------------------------

RECORD, MASK = "eval/metrics_and_plots/json/a/b.json", "eval/metrics_and_plots/masks/a/b_mimu.safetensors"
FIGURE, TABLE = "eval/metrics_and_plots/plots/a/f.svg", "eval/metrics_and_plots/plots/a/table.csv"


def made(folder: Path) -> Path:
    files = {
        RECORD: json.dumps({"score": 1.5, "seconds": {"evaluation": 2.0}, "provenance": {"started": "now"}}),
        MASK: "mask",
        FIGURE: "<svg></svg>\n",
        TABLE: "\n".join((",".join(("score", *SPENT)), ",".join(("7", *("8.1" for _ in SPENT))))),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def plan_of(folder: Path) -> Plan:
    return Plan("plan", ["run"], left=snapshot(made(folder)), timed={FIGURE}, lines={"unchanged, using stage-a"})


CHANGES = {
    "a clock": (RECORD, lambda text: text.replace("2.0", "3.0").replace("now", "then"), []),
    "a digit": (RECORD, lambda text: text.replace("1.5", "1.6"), [f"different: {RECORD}"]),
    "half a record": (RECORD, lambda text: text[:9], [f"different: {RECORD}"]),
    "a table's clock": (TABLE, lambda text: text.replace("8.1", "9.2"), []),
    "a table's digit": (TABLE, lambda text: text.replace("7", "6"), [f"different: {TABLE}"]),
    "a mask": (MASK, lambda text: text + "x", [f"different: {MASK}"]),
    "a timed figure": (FIGURE, lambda text: text.replace("<svg>", "<svg>9 s"), []),
    "half a timed figure": (FIGURE, lambda text: text[:6], [f"cut off: {FIGURE}"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_difference_is_seen(change, tmp_path):
    name, spoil, expected = CHANGES[change]
    plan, out = plan_of(tmp_path / "whole"), made(tmp_path / "out")
    assert plan.differences(out) == []
    (out / name).write_text(spoil((out / name).read_text()))
    assert plan.differences(out) == expected


def test_missing_and_left_over_are_seen(tmp_path):
    plan, out = plan_of(tmp_path / "whole"), made(tmp_path / "out")
    (out / MASK).unlink()
    (out / ".stage.123-abc.part").mkdir()
    (out / "new").write_text("")
    assert plan.differences(out) == ["left over: .stage.123-abc.part", "left over: new", f"missing: {MASK}"]
    assert leftovers(out) == [".stage.123-abc.part"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_damages(way, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(f'{{"{name}": 12345}}')
    before = (tmp_path / "a.json").read_bytes()
    damage_file(tmp_path / "a.json", way, [tmp_path / "a.json", tmp_path / "b.json"], random.Random(0))
    assert (tmp_path / "a.json").read_bytes() != before


def test_only_a_line_of_its_own_names_damage(tmp_path):
    """What an undisturbed run says of a place as well does not count."""
    plan, path = plan_of(tmp_path), Path("checkpoints/gcn/stage-a/gcn.safetensors")
    assert unnamed("[    1.0 s] unchanged, using stage-a", path, plan, tmp_path)
    assert unnamed("[    1.0 s] damaged, made anew", path, plan, tmp_path)
    assert not unnamed("[   11.0 s] stage-a is damaged, made anew", path, plan, tmp_path)


def test_errors_must_be_told_in_one_sentence(tmp_path):
    told = f"[ 1.0 s] begun\nerror: cannot write {tmp_path}/a (no space left)\n"
    assert ill_said(Ended(1, told), tmp_path) == []
    for ended in (Ended(1, f"Traceback ...\n{told}"), Ended(70, told), Ended(None, told), Ended(1, told + "more\n")):
        assert ill_said(ended, tmp_path)
    assert ill_said(Ended(1, "error: a stage failed (No space left)\n"), tmp_path)


# --- operations -------------------------------------------------------------------------------------------

CHILD = """
import os, sys
from pathlib import Path
from benchmarks.disk import killed_at, refused_at, watch
folder = Path(sys.argv[1])
{arm}
def work():
    (folder / "new").mkdir()
    (folder / "new/a").write_text("a")
    with open(folder / "new/a", "a") as file:
        os.fsync(file)
    os.replace(folder / "new/a", folder / "b")
    (folder / "b").read_text()
    (folder.parent / "elsewhere").write_text("")
    (folder / "new").rmdir()
    (folder / "b").unlink()
work()
"""


def child(arm: str, folder: Path) -> subprocess.CompletedProcess:
    folder.mkdir()
    command = [sys.executable, "-c", CHILD.format(arm=arm), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_operations_are_counted_and_stopped(tmp_path):
    """In order, those below the folder alone; the kill comes before the operation, the error instead of it."""
    noted = child("watch(folder, lambda n, o: print(n, o.kind, Path(o.target or o.path).name))", tmp_path / "a")
    kinds = ["mkdir new", "open a", "open a", "fsync a", "rename b", "rmdir new", "remove b"]
    assert noted.stdout.splitlines() == [f"{number} {kind}" for number, kind in enumerate(kinds)], noted.stderr
    killed = child("killed_at(folder, 4)", tmp_path / "b")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "b").rglob("*")) == ["a", "new"]
    refused = child("refused_at(folder, 5, 28, False)", tmp_path / "c")  # reads count here: number 5 is one
    assert "OSError: [Errno 28] No space left on device" in refused.stderr
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["b", "new"]


def operations(*words: str) -> list[Operation]:
    return [Operation(kind, path, target) for kind, path, target in (f"{word}  ".split(" ")[:3] for word in words)]


SAFE = operations("open /o/.a.tmp", "fsync /o/.a.tmp", "rename /o/.a.tmp /o/a", "fsync /o")
STAGE = operations(
    *("mkdir /o/.s.part", "save /o/.s.part/w", "open /o/.s.part/.m.tmp", "rename /o/.s.part/.m.tmp /o/.s.part/m"),
    *("fsync /o/.s.part/w", "fsync /o/.s.part/m", "fsync /o/.s.part", "rename /o/.s.part /o/s", "fsync /o"),
)


def test_order_of_a_safe_write():
    assert unsynced(SAFE) == []
    assert unsynced(SAFE[:-1]) == ["/o is not synced after /o/a appeared"]
    assert unsynced([SAFE[0], *SAFE[2:]]) == ["/o/.a.tmp is not synced before /o/a appears"]
    late = [SAFE[0], SAFE[2], SAFE[1], SAFE[3]]
    assert unsynced(late) == ["/o/.a.tmp is not synced before /o/a appears"]


@pytest.mark.parametrize("lacking", ["/o/.s.part/w", "/o/.s.part/m", "/o/.s.part"])
def test_order_of_a_safe_folder(lacking):
    ill = [one for one in STAGE if (one.kind, one.path) != ("fsync", lacking)]
    assert f"{lacking} is not synced before /o/s appears" in unsynced(ill)
    assert [said for said in unsynced(STAGE) if said.endswith("before /o/s appears")] == []
