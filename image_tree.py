"""The index of a folder tree of images: paths, labels, sizes and times as arrays, cached; nothing is decoded here.

Two layouts. `folders`: DIR/<class>/..., or DIR/{train,val,test}/<class>/... . `wnids` (ImageNet): DIR/<any shard>/...,
where an image's class is the nearest folder named like a WordNet id, or else the last `_` token of its file name.
Only folder times are compared when a cached index is loaded (a file added, removed or renamed changes its folder's);
`image_check` looks at every file that is used. No torch here.
"""

import os
import re
import stat
import time
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from artifacts import read_tensors, write_tensors
from config import UserError
from hashes import code_key, key_of
from image_files import DIGEST, EMPTY, UNREADABLE, mark_of, raise_if_machine
from imagenet_classes import IMAGENET2012_CLASSES
from observe import log

UNSPLIT, TRAIN, VAL, TEST = range(4)
SPLIT_FOLDERS = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".parquet")
WNID = re.compile(r"n\d{8}")
LOOP, SPECIAL, HOMELESS, NO_IMAGES = "symlink loop", "not a regular file", "in no class folder", "empty class folder"
NO_CLASS = "no WordNet id in its path"
UNKNOWN = "class outside the 1,000 of ImageNet"
RACE_NS = 20_000_000  # a folder changed this shortly before it was read may change again without a new time


@dataclass
class _Scan:
    """What a walk gathers, folder by folder, so that no Python object per file stays alive."""

    root: str
    folders: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    # `os` rather than Path here: a Path for each of a million files is slow
    def walk(self, relative: str, above: tuple = ()) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
        """(folder, [(file name, bytes, mark)]) of a folder and all below it, by name; links are followed."""
        path = f"{self.root}/{relative}"
        try:
            facts = os.stat(path)  # noqa: PTH116
            above = above or self._parents(relative)
            if (facts.st_dev, facts.st_ino) in above:
                self.problems.append((relative, LOOP))
                return
            self.folders[relative] = facts.st_mtime_ns
            with os.scandir(path) as entries:
                found = sorted(entries, key=attrgetter("name"))
        except OSError as error:
            raise_if_machine(error, path)
            self.problems.append((relative, f"{UNREADABLE} ({error.strerror})"))
            return
        files, below = [], []
        for entry in found:
            try:
                if entry.is_dir():
                    below.append(f"{relative}/{entry.name}")
                    continue
                about = entry.stat()
            except OSError as error:
                raise_if_machine(error, entry.path)
                self.problems.append((f"{relative}/{entry.name}", f"{UNREADABLE} ({error.strerror})"))
                continue
            if stat.S_ISREG(about.st_mode) and about.st_size:
                files.append((entry.name, about.st_size, mark_of(about)))
            else:
                reason = EMPTY if stat.S_ISREG(about.st_mode) else SPECIAL
                self.problems.append((f"{relative}/{entry.name}", reason))
        yield relative, files
        for name in below:
            if not name.rpartition("/")[2].startswith("."):
                yield from self.walk(name, (*above, (facts.st_dev, facts.st_ino)))

    def _parents(self, relative: str) -> tuple[tuple[int, int], ...]:
        """Device and inode of the folders that a walk begins below, the root first."""
        places = [self.root, *(f"{self.root}/{parent}" for parent in Path(relative).parents if parent.name)]
        return tuple((facts.st_dev, facts.st_ino) for facts in map(os.stat, places))

    def add(
        self, folder: str, files: list[tuple[str, int, int]], split: int, labels: np.ndarray, group: str = ""
    ) -> None:
        """Take in the files of one folder with their labels [F]; splits are drawn by group and file name."""
        if not files:
            return
        names = [name.encode(errors="surrogateescape") for name, _, _ in files]
        prefix, start = os.fsencode(f"{folder}/"), zlib.crc32(os.fsencode(f"{group}/"))
        self.names.append(prefix + prefix.join(names))
        lengths = np.fromiter(map(len, names), np.int64, len(names)) + len(prefix)
        arrays: dict[str, np.ndarray] = {"lengths": lengths, "labels": labels}
        arrays["sizes"] = np.array([size for _, size, _ in files], np.int64)
        arrays["marks"] = np.array([mark for _, _, mark in files], np.uint64)
        arrays["splits"] = np.full(len(files), split, np.uint8)
        arrays["hashes"] = np.array([zlib.crc32(name, start) for name in names], np.uint64)
        for name, values in arrays.items():
            self.parts.setdefault(name, []).append(values)


# --- layouts ----------------------------------------------------------------------------------------------


def _subfolders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _split_tops(root: Path, tops: list[str]) -> dict[str, int]:
    """Top folder -> split. `train` holding images only is a class of that name, not a split."""
    found = {name: SPLIT_FOLDERS[name.lower()] for name in tops if name.lower() in SPLIT_FOLDERS}
    train = next((name for name, split in found.items() if split == TRAIN), None)
    return found if train and _subfolders(root / train) else {}


def _scan_folders(scan: _Scan) -> tuple[str, ...]:
    """Gather a `folders` tree; returns its class names, sorted."""
    root = Path(scan.root)
    tops = _subfolders(root)
    splits = _split_tops(root, tops)
    scan.folders[""] = root.stat().st_mtime_ns
    if ignored := sorted(set(tops) - set(splits)) if splits else []:
        log(f"{root}: beside {', '.join(splits)}, left out: {', '.join(ignored)}")
    places = [(top, UNSPLIT, top) for top in tops] if not splits else []
    for top, split in splits.items():
        scan.folders[top] = (root / top).stat().st_mtime_ns
        places += [(f"{top}/{name}", split, name) for name in _subfolders(root / top)]
        loose = [path for path in (root / top).iterdir() if not path.is_dir()]
        kept = sorted(path.name for path in loose if path.suffix != ".cache" and not path.name.startswith("."))
        scan.problems += [(f"{top}/{name}", HOMELESS) for name in kept]
    numbers: dict[str, int] = {}
    for place, split, name in places:
        count, known = len(scan.names), len(scan.problems)
        for folder, files in scan.walk(place):
            if not files:
                continue
            label = numbers.setdefault(name, len(numbers))
            scan.add(folder, files, split, np.full(len(files), label, np.int32), name)
        if len(scan.names) == count and len(scan.problems) == known:
            scan.problems.append((place, NO_IMAGES))
    _no_twins(root, {name for _, _, name in places})
    numeric = all(name.isdecimal() for name in numbers)  # then 2 comes before 10, and a label is its name if it can be
    classes = sorted(numbers, key=lambda name: (int(name) if numeric else 0, name))
    order = np.array([classes.index(name) for name in numbers], np.int32)
    scan.parts["labels"] = [order[labels] for labels in scan.parts.get("labels", [])]
    return tuple(classes)


def _no_twins(root: Path, names: set[str]) -> None:
    """Raise `UserError` where two class names differ by case or Unicode form alone."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise UserError(f"{root} has class folders {other!r} and {name!r}, one name but for its case: rename one")


def _scan_wnids(scan: _Scan) -> tuple[str, ...]:
    """Gather an ImageNet tree; labels are the global ones whichever classes are there."""
    ranks = {wnid: rank for rank, wnid in enumerate(IMAGENET2012_CLASSES)}
    root = Path(scan.root)
    for top in _subfolders(root):
        low = top.lower()
        if low.startswith("test"):
            log(f"{root}: {top} is left out, ImageNet's test images have no labels")
            continue
        split = TRAIN if low.startswith("train") else TEST if low.startswith("val") else UNSPLIT
        for folder, files in scan.walk(top):
            named = next((part for part in reversed(folder.split("/")) if WNID.fullmatch(part)), None)
            wnids = [named or name.partition(".")[0].rpartition("_")[2] for name, _, _ in files]
            labels = np.array([ranks.get(wnid, -1) for wnid in wnids], np.int32)
            for (name, _, _), wnid, label in zip(files, wnids, labels, strict=True):
                if label < 0:
                    scan.problems.append((f"{folder}/{name}", UNKNOWN if WNID.fullmatch(wnid) else NO_CLASS))
            scan.add(
                folder, [file for file, y in zip(files, labels, strict=True) if y >= 0], split, labels[labels >= 0]
            )
    scan.folders[""] = root.stat().st_mtime_ns
    return tuple(IMAGENET2012_CLASSES.values())


LAYOUTS = {"folders": _scan_folders, "wnids": _scan_wnids}


# --- the index --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Every image file of a tree, in the order of its path.

    Arrays: paths (one blob and the end of each), sizes in bytes, marks (`image_files.mark_of`), labels, splits
    (UNSPLIT, TRAIN, ...) and hashes of file names (what splits are drawn by, so that neither order nor machine moves
    them), [S] each.
    `problems`: (path, reason) of what can be no image whatever its content.
    Filled by `image_check.check`, where rows were checked: `bad`, reason by row; `digests` of the files' bytes [S, 16];
    `bits` (`image_files.Seen`) [S].
    """

    root: str
    classes: tuple[str, ...]
    blob: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    marks: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    hashes: np.ndarray
    folders: dict[str, int]
    problems: tuple[tuple[str, str], ...]
    made: int
    file: Path
    bad: dict[int, str] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.zeros((0, DIGEST), np.uint8))
    bits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """Path of an image below the root."""
        return os.fsdecode(self.blob[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes())

    def path(self, row: int) -> str:
        """Path of an image."""
        return f"{self.root}/{self.name(row)}"

    def stamp(self, row: int) -> tuple[int, int]:
        """(bytes, mark) of an image when it was looked at last."""
        return int(self.sizes[row]), int(self.marks[row])

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """uint64 [R], another one as soon as name, size or mark differ."""
        return mix(mix(self.hashes[rows] ^ mix(self.sizes[rows].astype(np.uint64))) ^ self.marks[rows])

    @property
    def found(self) -> list[tuple[str, str]]:
        """(path, reason) of everything that gives no image, by path."""
        return sorted([*self.problems, *((self.name(row), reason) for row, reason in self.bad.items())])

    def is_fresh(self) -> bool:
        """Whether every folder still has its time, and had it for long enough when it was read."""
        return self.stands() and max(self.folders.values(), default=0) < self.made - RACE_NS

    def stands(self) -> bool:
        """Whether every folder still has its time."""
        try:
            times = {name: os.stat(f"{self.root}/{name}").st_mtime_ns for name in self.folders}  # noqa: PTH116
        except OSError:
            return False
        return times == self.folders


def mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: uint64 -> uint64, one to one, well mixed (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


ARRAYS = ("blob", "ends", "sizes", "marks", "labels", "splits", "hashes")


def scan_tree(root: Path, layout: str, file: Path) -> Tree:
    """Walk a tree and index it, without the cache.

    Raises:
        UserError: no such folder, no images, or class names that differ by case alone.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    made = time.time_ns()
    scan = _Scan(str(root))
    classes = LAYOUTS[layout](scan)
    if not scan.parts:
        packed = [path.name for path in root.iterdir() if path.name.endswith(ARCHIVES)]
        hint = (
            f", only archives ({', '.join(sorted(packed)[:3])}): unpack them with `main.py prepare`" if packed else ""
        )
        raise UserError(f"{root} holds no class folders with files{hint}")
    arrays: dict[str, Any] = {name: np.concatenate(values) for name, values in scan.parts.items()}
    arrays["ends"] = np.cumsum(arrays.pop("lengths"))
    arrays["blob"] = np.frombuffer(b"".join(scan.names), np.uint8)
    problems = tuple(sorted(scan.problems))
    return Tree(str(root), classes, folders=scan.folders, problems=problems, made=made, file=file, **arrays)


def open_tree(root: Path, layout: str, store: Path) -> Tree:
    """The index of a tree, from `store` if it is there and fresh, else made anew and kept there.

    Raises:
        UserError: as `scan_tree`.
    """
    root = root.resolve()
    code = code_key("image_tree.py", "image_files.py", "imagenet_classes.py")
    file = store / f"{root.name}-{key_of({'root': str(root), 'layout': layout, 'code': code})[:12]}.safetensors"
    if file.exists():
        try:
            arrays, facts = read_tensors(file)
            problems = tuple((name, reason) for name, reason in facts.pop("problems"))
            tree = Tree(str(root), tuple(facts.pop("classes")), problems=problems, file=file, **facts, **arrays)
            if tree.is_fresh():
                return tree
            log(f"{root}: changed since it was indexed, indexing it again")
        except (UserError, KeyError, TypeError, ValueError):
            log(f"{file} is damaged, indexing again")
    tree = scan_tree(root, layout, file)
    save_tree(tree)
    return tree


def save_tree(tree: Tree) -> None:
    """Keep an index in its file."""
    facts = {name: getattr(tree, name) for name in ("folders", "problems", "made", "classes")}
    write_tensors(tree.file, {name: getattr(tree, name) for name in ARRAYS}, facts)
