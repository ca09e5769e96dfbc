"""What a disk does to us: damage is named, a full one is said in one sentence, a power cut leaves nothing empty."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import main
from core.artifacts import (
    DamagedError,
    appending_array,
    extending,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from core.choices import MachineError, UserError
from core.config import PROJECT_ROOT
from core.store import MANIFEST, RUNNING, build_stage, clear_dead, locked, read_manifest, running, write_manifest
from reporter import drawn_in

# --- damage is seen ---------------------------------------------------------------------------------------


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_no_flipped_bit_of_a_json_file_passes(tmp_path):
    """Wherever it is: the content is what was written, or the file is named."""
    path, value = tmp_path / "a.json", {"figure": 97.25, "names": ["a", None], "inner": {"sound": True}}
    write_json(path, value)
    data, found = path.read_bytes(), []
    for place in range(-1, len(data)):
        path.write_bytes(flipped(data, place) if place >= 0 else data)
        try:
            assert read_json(path) == value
        except DamagedError as error:
            found.append(error.found)
    assert 0.9 * len(data) < len(found) <= len(data)
    assert all(one.startswith(f"{path} is damaged (") for one in found)


def test_a_damaged_file_of_the_users_is_to_be_copied_again(tmp_path):
    """What a run made is made anew without a question, so that the sentence is for files that somebody named."""
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is damaged \(.*\): copy it again .*, or give another path$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"there is no file .*none\.json: check the path$"):
        read_json(tmp_path / "none.json")


def test_no_flipped_bit_of_a_tensor_file_passes(tmp_path):
    path, facts = tmp_path / "a.safetensors", {"epoch": 3, "shape": (2, 3), "by": {1: "a", 10: "b", 2: "c"}}
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3), "none": np.zeros((0, 2))}
    write_tensors(path, arrays, facts)
    data, again = path.read_bytes(), json.loads(json.dumps(facts))
    expected, seen = {name: (value.tobytes(), value.dtype) for name, value in arrays.items()}, 0
    for place in range(-1, len(data)):
        path.write_bytes(flipped(data, place) if place >= 0 else data)
        try:
            tensors, read = read_tensors(path)
        except DamagedError:
            seen += 1
            continue
        assert read == again
        assert {name: (value.tobytes(), value.dtype) for name, value in tensors.items()} == expected
    assert 0.9 * len(data) < seen <= len(data)


def test_exchanged_names_of_arrays_are_seen(tmp_path):
    """Same bytes, same shapes, other names: what a hash over the arrays alone would let pass."""
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    a, b = np.ones(3, np.float32), np.zeros(3, np.float32)
    write_tensors(path, {"a": a, "b": b}, {"x": 1})
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        facts = file.metadata()
    save_file({"a": b, "b": a}, path, metadata=facts)
    with pytest.raises(DamagedError, match="its content is not what its digest says"):
        read_tensors(path)
    save_file({"a": b, "b": a}, path, metadata={"facts": json.dumps({"x": 1})})
    with pytest.raises(DamagedError, match="no digest"):
        read_tensors(path)
    assert read_tensors(path, foreign=True)[1] == {"x": 1}, "of another origin, nothing was promised"


def no_list(manifest: dict) -> None:
    manifest["files"] = 3


def fewer(manifest: dict) -> None:
    manifest["files"].popitem()


STAGE_DAMAGE = {
    "byte": lambda folder: (folder / "a.txt").write_text("contenT"),
    "empty": lambda folder: (folder / "a.txt").write_text(""),
    "gone": lambda folder: (folder / "a.txt").unlink(),
    "more": lambda folder: (folder / "c.txt").write_text("more"),
    "exchanged": lambda folder: shutil.copy(folder / "a.txt", folder / "b.txt"),
    "a folder": lambda folder: ((folder / "a.txt").unlink(), (folder / "a.txt").mkdir()),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 40),
    "edited manifest": lambda folder: edited(folder / MANIFEST, lambda manifest: manifest["facts"].update(figure=8)),
    "shorter list": lambda folder: edited(folder / MANIFEST, fewer, resigned=True),
    "no list": lambda folder: edited(folder / MANIFEST, no_list, resigned=True),
    "another key": lambda folder: edited(folder / MANIFEST, lambda manifest: manifest.update(key="x"), resigned=True),
}


def edited(path: Path, change, resigned: bool = False) -> None:
    """A manifest after a change; `resigned`: with a digest that fits again."""
    value = read_json(path) if resigned else json.loads(path.read_text())
    change(value)
    write_json(path, value) if resigned else path.write_text(json.dumps(value))


@pytest.mark.parametrize("damage", STAGE_DAMAGE.values(), ids=STAGE_DAMAGE)
def test_a_damaged_stage_is_made_anew_and_that_is_said_in_one_line(damage, tmp_path, capsys):
    def make(folder):
        for name in "ab":
            write_text(folder / f"{name}.txt", f"content {name}")
        return {"figure": 7}

    stage = build_stage(tmp_path, "stage", {}, make)
    before = {path.name: path.read_bytes() for path in stage.path.iterdir() if path.name != MANIFEST}
    damage(stage.path)
    capsys.readouterr()
    again = build_stage(tmp_path, "stage", {}, make)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is damaged (" in line
    assert line.endswith("), so that it is made anew")
    assert again.facts == {"figure": 7}
    assert {path.name: path.read_bytes() for path in stage.path.iterdir() if path.name != MANIFEST} == before
    assert build_stage(tmp_path, "stage", {}, make).facts == {"figure": 7}
    assert "unchanged" in capsys.readouterr().err


def test_a_drawn_folder_is_its_files_not_their_names(tmp_path, capsys):
    write_text(tmp_path / "a.svg", "<svg>whole</svg>")
    write_manifest(tmp_path, {"key": "k"})
    assert drawn_in(tmp_path)["key"] == "k"
    (tmp_path / ".DS_Store").write_text("litter")
    assert drawn_in(tmp_path)["key"] == "k", "hidden files are not ours"
    os.truncate(tmp_path / "a.svg", 8)
    assert drawn_in(tmp_path) == {}
    assert f"{tmp_path / 'a.svg'} is damaged" in capsys.readouterr().err
    assert drawn_in(tmp_path / "none") == {}


def test_a_given_folder_of_an_earlier_version_is_held_against_its_list(tmp_path):
    write_text(tmp_path / "a.npy", "1")
    write_manifest(tmp_path, {"key": "k"})
    old = read_json(tmp_path / MANIFEST)
    (tmp_path / MANIFEST).write_text(json.dumps(old))
    with pytest.raises(DamagedError, match="no digest"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, foreign=True) == old
    (tmp_path / "a.npy").write_text("2")
    with pytest.raises(DamagedError, match=r"a\.npy is damaged"):
        read_manifest(tmp_path, foreign=True)


# --- what the machine does --------------------------------------------------------------------------------

WRITES = {
    "text": lambda place: write_text(place / "x", "text"),
    "json": lambda place: write_json(place / "x", {"a": 1}),
    "tensors": lambda place: write_tensors(place / "x", {"a": np.zeros(9)}, {}),
    "array": lambda place: fill(place / "x"),
    "extending": lambda place: lengthen(place / "x"),
    "stage": lambda place: build_stage(place, "s", {}, lambda folder: fill(folder / "x") or {}),
}


def fill(path: Path) -> None:
    with appending_array(path, (4, 2)) as append:
        append(np.ones((4, 2)))


def lengthen(path: Path) -> None:
    with extending(path, 0) as append:
        append(memoryview(b"abc"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.EROFS])
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_failing_disk_is_one_sentence_and_the_next_run_goes_on(number, operation, write, tmp_path, monkeypatch):
    """Whichever operation fails: nothing is left but what was there, and afterwards the same call works."""
    write_text(tmp_path / "before", "")  # so that a disk that cannot be written has failed
    original = getattr(os, operation)

    def fails(*arguments, **named):
        if operation == "open" and not arguments[1] & os.O_CREAT:
            return original(*arguments, **named)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, fails)
        if operation == "replace" and write in (WRITES["array"], WRITES["extending"]):
            return  # written in place, into a folder that is renamed
        with pytest.raises(MachineError, match=rf"^cannot (write|lock) .* \({os.strerror(number)}\): .* run again"):
            write(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in left if name.startswith(".")} == set()
    write(tmp_path)


def test_a_place_that_was_never_writable_is_the_users(tmp_path):
    """Another process, as writability counts from the first write of a process on."""
    code = (
        "import errno, os, sys\n"
        "from pathlib import Path\n"
        "from core.store import running\n"
        "def fails(*_, **__): raise OSError(errno.EROFS, 'Read-only file system')\n"
        "os.open = fails\n"
        "from core.choices import UserError\n"
        "try:\n"
        "    with running(Path(sys.argv[1])): pass\n"
        "except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert "choose a folder that can be written with --output-dir" in result.stdout, result.stderr


def test_the_commands_exit_code_is_1_without_a_traceback(tmp_path, monkeypatch, capsys):
    def fails() -> None:
        raise MachineError("cannot write x (No space left on device): make room there and run again")

    monkeypatch.setitem(main.COMMANDS, "run", fails)
    assert main.main(["run"]) == 1
    said = capsys.readouterr().err
    assert said == "error: cannot write x (No space left on device): make room there and run again\n"


def limited(kind: int, most: int, code: str, folder: Path) -> str:
    """What a process prints that may write only so much, or open only so many files."""

    def limit() -> None:
        resource.setrlimit(kind, (most, most))

    head = "import sys, numpy as np\nfrom pathlib import Path\n"
    head += "from core.artifacts import *\nfrom core.choices import MachineError\n"
    head += "place = Path(sys.argv[1])\n"
    text = head + "try:\n    " + code + "\nexcept MachineError as error:\n    print(error)\n"
    command = [sys.executable, "-c", text, str(folder)]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, preexec_fn=limit)
    return result.stdout + result.stderr


@pytest.mark.slow
def test_real_limits(tmp_path):
    """The system's own limits on the size of a file and the number of open files."""
    said = limited(resource.RLIMIT_FSIZE, 4096, "write_tensors(place / 'x', {'a': np.zeros(9999)}, {})", tmp_path)
    assert said == f"cannot write {tmp_path / 'x'} (File too large): raise the limit of file sizes (ulimit -f)" + (
        " and run again, what is finished is kept\n"
    )
    assert list(tmp_path.iterdir()) == []
    write_tensors(tmp_path / "x", {"a": np.zeros(3)}, {})
    full = "\n    ".join(
        [
            "import contextlib",
            "read_tensors(place / 'x')",
            "held = []",
            "with contextlib.suppress(OSError):",
            "    while True: held.append(open('/dev/null'))",
            "read_tensors(place / 'x')",
        ]
    )
    said = limited(resource.RLIMIT_NOFILE, 64, full, tmp_path)
    assert f"cannot read {tmp_path / 'x'} (Too many open files): raise the limit of open files (ulimit -n)" in said


def test_a_folder_that_goes_while_it_is_written_is_said(tmp_path):
    def make(folder):
        shutil.rmtree(folder.parent)
        write_text(folder / "x", "recreated")
        shutil.rmtree(folder.parent)
        return {}

    with pytest.raises(MachineError, match="leave its folder alone while a run works there"):
        build_stage(tmp_path / "out", "s", {}, make)


# --- a power cut ------------------------------------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch) -> list[tuple[str, str]]:
    """Every fsync and rename, with the path as it was then."""
    seen: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def fsync(file: int) -> None:
        seen.append(("sync", str(Path(f"/proc/self/fd/{file}").readlink())))
        sync(file)

    def replace(source, target) -> None:
        seen.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, trace):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    (first, temporary), *rest = trace
    assert first == "sync"
    assert Path(temporary).name.startswith(".a.json.")
    assert rest == [("rename", str(path)), ("sync", str(tmp_path))]
    trace.clear()
    write_text(path, "drawn from other files", lasting=False)
    assert trace == [("rename", str(path))]


def test_all_of_a_stage_is_on_the_disk_before_it_has_its_name(tmp_path, trace):
    def make(folder):
        fill(folder / "h.npy")
        write_json(folder / "layout.json", {})
        return {}

    stage = build_stage(tmp_path, "s", {}, make)
    place = trace.index(("rename", str(stage.path)))
    before = {Path(path).name: Path(path) for kind, path in trace[:place] if kind == "sync"}
    assert {"h.npy", "layout.json", MANIFEST} <= set(before)
    part = before[MANIFEST].parent
    assert trace[place - 1] == ("sync", str(part)), "its names too"
    assert trace[place + 1] == ("sync", str(tmp_path)), "and its own"


# --- locks ------------------------------------------------------------------------------------------------


def _count(folder: Path, rounds: int) -> None:
    number = folder / "number"
    for _ in range(rounds):
        with locked(folder / ".count.lock"):
            number.write_text(str(int(number.read_text()) + 1))


def test_processes_exclude_each_other(tmp_path):
    """Every hand-over removes the file that the others wait for: none is lost, none fails, none is left."""
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(tmp_path, 200)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "number").read_text() == "800"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_the_lock_of_a_dead_owner_goes_with_the_next_run(tmp_path):
    """Of any stage of the folder, though this one is there already; one that is held stays."""
    build_stage(tmp_path, "s", {}, lambda folder: {})
    pid = os.fork()
    if not pid:
        with locked(tmp_path / ".other.lock"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".other.lock").exists()
    with locked(tmp_path / ".held.lock"):
        build_stage(tmp_path, "s", {}, lambda folder: {})
        assert {path.name for path in tmp_path.glob(".*")} == {".held.lock"}


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_strange_lock_is_named(kind, tmp_path):
    path = tmp_path / ".x.lock"
    {"folder": path.mkdir, "link": lambda: path.symlink_to("y"), "pipe": lambda: os.mkfifo(path)}[kind]()
    said = rf"{path} is a (folder|link|special file), where a lock file has its place"
    with pytest.raises(UserError, match=said), locked(path):
        pass
    clear_dead(path)
    assert path.is_symlink() or path.exists(), "not ours to remove"


def test_runs_share_a_folder_and_leave_it_as_it_was(tmp_path):
    place = tmp_path / "a/b"
    with running(place):
        with running(place):
            assert [path.name for path in place.iterdir()] == [RUNNING]
        assert [path.name for path in place.iterdir()] == [RUNNING], "the first still works"
    assert list(tmp_path.iterdir()) == [], "where nothing was made, no folder is left"
    with running(place):
        (place / "made").touch()
    assert [path.name for path in place.iterdir()] == ["made"]


def test_a_run_waits_while_the_folder_is_tidied(tmp_path, capsys):
    done = []

    def work() -> None:
        with running(tmp_path):
            done.append(1)

    with locked(tmp_path / RUNNING):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.3)
        assert done == []
    thread.join(10)
    assert done == [1]
    assert "waiting for another process: clean.sh tidies this folder" in capsys.readouterr().err


# --- the code that runs -----------------------------------------------------------------------------------

EDITS = """
import sys
sys.path.insert(0, "{house}")
from core import hashes
{before}
open("{house}/unlearn/masks.py", "a").write("# edited\\n")
{after}
"""


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of the source files that may be edited."""
    place = tmp_path / "house"
    for path in (
        *PROJECT_ROOT.glob("*.py"),
        *(init for room in PROJECT_ROOT.glob("*/__init__.py") for init in room.parent.glob("*.py")),
    ):
        (place / path.relative_to(PROJECT_ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / path.relative_to(PROJECT_ROOT))
    return place


def told(house: Path, before: str, after: str) -> str:
    code = EDITS.format(house=house, before=before, after=after)
    result = subprocess.run([sys.executable, "-c", code], cwd=house, capture_output=True, text=True)
    return (result.stdout + result.stderr).strip()


@pytest.mark.slow
def test_code_is_what_was_imported_not_what_lies_there_now(house):
    """An edit during a run changes no key of it; the next process has another."""
    same = told(house, 'key = hashes.code_key("unlearn.masks")', 'print(key == hashes.code_key("unlearn.masks"))')
    assert same == "True"
    same = told(house, "hashes.whole_code()", 'print(hashes.code_key("unlearn.registry"))')
    other = told(house, "hashes.whole_code()", 'print(hashes.code_key("unlearn.registry"))')
    assert same != other, "edited twice"


def test_an_edit_while_a_run_starts_is_refused(house):
    said = told(house, "", 'hashes.code_key("graphs.layout")')
    assert said.endswith("UserError: unlearn/masks.py was changed while this run started: run it again")


def test_a_worker_with_other_code_refuses(house):
    before = "other = hashes.whole_code()\nhashes.check_same_code(other)"
    assert told(house, before, "hashes.check_same_code(other)") == "", "its own edits do not matter"
    said = told(house, "hashes.whole_code()", 'hashes.check_same_code("another")')
    assert said.endswith("so that its processes differ: start it again")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_machine_is_one_sentence_wherever_it_comes_up(monkeypatch, capsys, tmp_path, number):
    """A file that is only read, a folder that is listed: no place needs to expect the disk to fail."""

    def fails() -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "h.npy"))

    monkeypatch.setitem(main.COMMANDS, "run", fails)
    assert main.main(["run"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"error: cannot use {tmp_path / 'h.npy'} ({os.strerror(number)}): ")


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    def fails() -> None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "a")

    monkeypatch.setitem(main.COMMANDS, "run", fails)
    assert main.main(["run"]) == 1
    assert "Traceback" in capsys.readouterr().err
