"""The index of a folder tree of images: paths, labels, sizes and times as arrays, cached; nothing is decoded here.

`tree_layouts` says which folders are classes and which are splits. Only folder times are compared when a cached index
is loaded (a file added, removed or renamed changes its folder's); `image_check` looks at every file that is used.
No torch here.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.artifacts import read_tensors, write_tensors
from core.config import UserError
from core.hashes import code_key, key_of
from core.observe import log, visible
from images.decode import DIGEST
from images.layouts import LAYOUTS, NoTreeError, Scan, has_splits, innermost, nothing_there

RACE_NS = 20_000_000  # a folder changed this shortly before it was read may change again without a new time


@dataclass(frozen=True)
class Tree:
    """Every image file of a tree, in the order of its path.

    Arrays: paths (one blob and the end of each), sizes in bytes, marks (`image_files.mark_of`), labels, splits
    (UNSPLIT, TRAIN, ...) and hashes of file names (what splits are drawn by, so that neither order nor machine moves
    them), [S] each.
    `problems`: (path, reason) of what can be no image whatever its content; `passed`: kinds of litter with their
    counts; `notes`: what was decided about the layout, a sentence each.
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
    passed: dict[str, int]
    notes: tuple[str, ...]
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
        found = [*self.problems, *((self.name(row), reason) for row, reason in self.bad.items())]
        return sorted((visible(path), reason) for path, reason in found)

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


CODE = (
    "images/index.py",
    "images/layouts.py",
    "images/split_names.py",
    "images/litter.py",
    "images/decode.py",
    "imagenet_classes.py",
)
PACKED = (".zip", ".tar", ".gz", ".tgz", ".parquet")
ARRAYS = ("blob", "ends", "sizes", "marks", "labels", "splits", "hashes")


def scan_tree(root: Path, layout: str, file: Path, notes: Sequence[str] = ()) -> Tree:
    """Walk a tree and index it, without the cache; `notes` are what is to be said of how its root was found.

    Raises:
        NoTreeError: no such folder, no images, or folders that can be read in two ways.
    """
    made = time.time_ns()
    scan = Scan(str(root), notes=list(notes))
    classes = LAYOUTS[layout](scan)
    if not scan.parts.get("sizes"):
        raise NoTreeError(nothing_there(root))
    arrays: dict[str, Any] = {name: np.concatenate(values) for name, values in scan.parts.items()}
    arrays["ends"] = np.cumsum(arrays.pop("lengths"))
    arrays["blob"] = np.frombuffer(b"".join(scan.names), np.uint8)
    facts: dict[str, Any] = {"problems": tuple(sorted(scan.problems)), "passed": dict(sorted(scan.passed.items()))}
    facts |= {"notes": tuple(scan.notes), "folders": scan.folders, "made": made, "file": file}
    return Tree(str(root), classes, **facts, **arrays)


def open_tree(root: Path, layout: str, store: Path) -> Tree:
    """The index of a tree, from `store` if it is there and fresh, else made anew and kept there.

    Raises:
        NoTreeError: as `scan_tree`. UserError: the store cannot be written.
    """
    if not root.is_dir():
        packed = ": unpack it with `main.py prepare`, which is given its folder" * (root.suffix in PACKED)
        raise NoTreeError(f"{root} is a file, no folder{packed}" if root.exists() else f"there is no folder {root}")
    if layout == "folders" and store.resolve().is_relative_to(root.resolve()) and not has_splits(root):
        raise UserError(
            f"the output would go into the dataset {root}, where it would be taken for classes: choose an --output-dir "
            "outside"
        )
    root, notes = innermost(root.resolve(), layout)
    key = key_of({"root": str(root), "layout": layout, "notes": notes, "code": code_key(*CODE)})
    file = store / f"{visible(root.name)[:40]}-{key[:12]}.safetensors"
    if file.exists():
        try:
            arrays, facts = read_tensors(file)
            problems = tuple((name, reason) for name, reason in facts.pop("problems"))
            facts |= {"problems": problems, "notes": tuple(facts.pop("notes"))}
            tree = Tree(str(root), tuple(facts.pop("classes")), file=file, **facts, **arrays)
            if tree.is_fresh():
                return tree
            log(f"{root}: changed since it was indexed, indexing it again")
        except (UserError, KeyError, TypeError, ValueError):
            log(f"{file} is damaged, indexing again")
    tree = scan_tree(root, layout, file, notes)
    save_tree(tree)
    return tree


def save_tree(tree: Tree) -> None:
    """Keep an index in its file."""
    facts = {name: getattr(tree, name) for name in ("folders", "problems", "passed", "notes", "made", "classes")}
    write_tensors(tree.file, {name: getattr(tree, name) for name in ARRAYS}, facts)
