"""Tell which folders of a tree are classes and which are splits, and gather every file in them.

There are two layouts. `folders`: DIR/<class>/..., or DIR/{train,val,test}/<class>/... . `wnids` (ImageNet):
DIR/<any shard>/..., where an image's class is the nearest folder named like a WordNet id, or else the last `_` token
of its file name. A folder that only wraps the others is looked through. A tree that can be read in two ways is refused.
No torch here.
"""

import os
import re
import stat
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import numpy as np

from core.config import UserError
from core.observe import visible
from imagenet_classes import IMAGENET2012_CLASSES
from images.archives import SUFFIXES
from images.decode import EMPTY, UNREADABLE, mark_of, raise_if_machine
from images.names import (
    TEST,
    TRAIN,
    UNSPLIT,
    is_image_name,
    litter_file,
    litter_folder,
    same_but_for_numbers,
    same_form,
    splits_by_name,
)

WNID = re.compile(r"n\d{8}")
LOOP, SPECIAL, HOMELESS, NO_IMAGES = "symlink loop", "not a regular file", "in no class folder", "empty class folder"
NO_CLASS = "no WordNet id in its path"
UNKNOWN = "class outside the 1,000 of ImageNet"
MOST_WRAPPERS, MOST_LOOKED_INTO = 16, 20


class NoTreeError(UserError):
    """A folder that cannot be read as a tree of classes."""


@dataclass
class Scan:
    """The files of a tree, gathered as arrays folder by folder, because a Python object per file would fill the memory.

    `problems`: (path, reason) of what gives no image; `passed`: kinds of litter with their counts; `notes`: what was
    decided about the layout, a sentence each.
    """

    root: str
    folders: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    # `os` rather than Path here: a Path for each of a million files is slow
    def walk(self, relative: str, above: tuple = ()) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
        """Yield (folder, [(file name, bytes, mark)]) of a folder and of all below it, by name; links are followed."""
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
                is_folder = entry.is_dir()
                litter = litter_folder(entry.name) if is_folder else litter_file(path, entry.name)
                if litter is not None:
                    self.passed[litter] += 1
                    continue
                if is_folder:
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


# --- one folder ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What lies in one folder, litter apart: names of folders, how many files are named as images, other files."""

    folders: list[str]
    images: int
    others: list[str]
    litter: Counter[str]


def _look(path: Path) -> _Look:
    """Look into a folder; one that cannot be listed seems empty, and the walk says why."""
    folders, images, others, litter = [], 0, [], Counter()
    try:
        with os.scandir(path) as entries:
            found = sorted(entries, key=attrgetter("name"))
    except OSError as error:
        raise_if_machine(error, str(path))
        found = []
    for entry in found:
        is_folder = _is_folder(entry)
        kind = litter_folder(entry.name) if is_folder else litter_file(str(path), entry.name)
        if kind is not None:
            litter[kind] += 1
        elif is_folder:
            folders.append(entry.name)
        elif is_image_name(entry.name):
            images += 1
        else:
            others.append(entry.name)
    return _Look(folders, images, others, litter)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Join the first names for a sentence."""
    return ", ".join(map(visible, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def innermost(root: Path, layout: str) -> tuple[Path, list[str]]:
    """Find the folder that holds the classes or splits, through folders that only wrap another.

    Returns:
        (that folder, a sentence for each one that was looked through).
    """
    notes, seen = [], set()
    while True:
        facts, look = root.stat(), _look(root)
        seen.add((facts.st_dev, facts.st_ino))
        if len(look.folders) != 1 or _is_part(look.folders[0], layout):
            return root, notes
        inner = root / look.folders[0]
        facts, below = inner.stat(), _look(inner)
        if below.images or not below.folders or (facts.st_dev, facts.st_ino) in seen:
            return root, notes
        beside = f"; {look.images} images beside it are left out" if look.images else ""
        only = "is the only split: all are drawn from it" if splits_by_name([inner.name]) else "is the only folder"
        notes.append(f"{visible(inner.name)} {only}, what it holds is looked at{beside}")
        root = inner


def _is_part(name: str, layout: str) -> bool:
    """Return whether a folder without siblings is a class or split rather than a wrapper."""
    if layout == "wnids":
        return WNID.fullmatch(name) is not None or name.lower().startswith(("train", "val", "test"))
    return TRAIN in splits_by_name([name]).values()


# --- class folders, in splits or not ----------------------------------------------------------------------


def has_splits(root: Path) -> bool:
    """Return whether folders of splits lie in a folder; whatever lies beside those is left out."""
    return bool(_splits_of(root, _look(root))[0])


def _splits_of(root: Path, top: _Look) -> tuple[dict[str, int], str]:
    """(top folder -> split, empty where the top folders are classes; what is to be said of that).

    Raises:
        NoTreeError: it can be read in two ways, or there is nothing to train on.
    """
    found = splits_by_name(top.folders)
    if not found:
        return {}, ""
    looks = {name: _look(root / name) for name in top.folders}
    flat = [name for name in found if not looks[name].folders]
    nested = [name for name in found if looks[name].folders]
    others = [name for name in top.folders if name not in found]
    classes = [name for name in others if looks[name].images]  # folders that hold images, as those of classes do
    train = [name for name, split in found.items() if split == TRAIN]
    if len(found) == 1 and flat and others:
        return {}, f"{visible(flat[0])} holds no folders: it is taken as a class of that name"
    if flat and (not nested or set(flat) & set(train)):
        raise NoTreeError(
            f"{root} has {_listed(flat)} with {sum(looks[name].images for name in flat)} images in no class folders: "
            f"sort them into {visible(flat[0])}/<class>/"
        )
    if not train:
        beside = f" beside {_listed(classes)}" if classes else ""
        raise NoTreeError(
            f"{root} has {_listed(nested)}{beside} but no train: put the class folders to train on into "
            f"{root / 'train'}"
        )
    if classes and len(found) == 1:
        raise NoTreeError(
            f"{root} has {_listed(train)} with folders of its own beside {_listed(classes)} with images: is it a "
            f"split, move the others out; is it a class, move its images up into {visible(train[0])}"
        )
    for split in set(found.values()):
        twins = [name for name, one in found.items() if one == split]
        if not same_but_for_numbers(twins):
            raise NoTreeError(f"{root} has {_listed(twins)}, which are one split by name: merge or rename them")
    return found, f"beside {_listed(list(found))}, left out: {_listed(others, 20)}" if others else ""


def _class_folders(scan: Scan, splits: dict[str, int]) -> list[tuple[str, int, str]]:
    """(path, split, class) of every class folder in the splits; one that only wraps the classes is looked through."""
    root, places = Path(scan.root), []
    looks = {name: (name, _look(root / name)) for name in splits}
    for split in splits:
        elsewhere = {name for key, (_, look) in looks.items() if key != split for name in look.folders}
        shared = len(looks) > 1 and any(len(look.folders) > 1 for _, look in looks.values())
        path, look = looks[split]
        scan.folders[path] = (root / path).stat().st_mtime_ns
        while len(look.folders) == 1 and not look.images and not (shared and look.folders[0] in elsewhere):
            inner = f"{path}/{look.folders[0]}"
            below = _look(root / inner)
            if below.images or not below.folders or len(Path(inner).parts) > MOST_WRAPPERS:
                break
            path, look = inner, below
            scan.folders[path] = (root / path).stat().st_mtime_ns
            scan.notes.append(f"{visible(path)} is the only folder in {visible(split)}, what it holds is looked at")
        looks[split] = path, look
        scan.passed += look.litter
        loose = [entry.name for entry in (root / path).iterdir() if is_image_name(entry.name) and not entry.is_dir()]
        scan.problems += [(f"{path}/{name}", HOMELESS) for name in sorted(loose) if not name.startswith(".")]
        if look.others:
            scan.notes.append(f"{len(look.others)} other files in {visible(path)} are left out: {_listed(look.others)}")
        places += [(f"{path}/{name}", splits[split], name) for name in look.folders]
    return places


def _scan_folders(scan: Scan) -> tuple[str, ...]:
    """Gather a `folders` tree; returns its class names, sorted."""
    root = Path(scan.root)
    top = _look(root)
    scan.passed += top.litter
    scan.folders[""] = root.stat().st_mtime_ns
    splits, said = _splits_of(root, top)
    scan.notes += [said] * bool(said)
    if top.images and top.folders:
        scan.notes.append(f"{top.images} images in no class folder are left out: they lie in {root}")
    places = _class_folders(scan, splits) if splits else [(name, UNSPLIT, name) for name in top.folders]
    if not splits:
        _no_parts(root, top.folders)
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
    if len(classes) == 1:
        held = f"{sum(map(len, scan.parts['labels']))} files"
        raise NoTreeError(
            f"{root} holds one class folder, {visible(classes[0])!r} with {held}: at least two classes are needed, "
            "so sort the images into a folder for each"
        )
    return tuple(map(visible, classes))


def _no_parts(root: Path, tops: Sequence[str]) -> None:
    """Raise `NoTreeError` where every top folder holds the same folders: those may be the classes, these parts."""
    below = [_look(root / name) for name in tops[:MOST_LOOKED_INTO]]
    alike = all(one.folders == below[0].folders and not one.images for one in below)
    if len(tops) > 1 and alike and len(below[0].folders) > 1:
        raise NoTreeError(
            f"{root} has {_listed(tops)}, which all hold the folders {_listed(below[0].folders)}: are these the "
            f"classes, merge the others or call them train, val and test; else move the images up into {tops[0]}"
        )


def _no_twins(root: Path, names: set[str]) -> None:
    """Raise `UserError` where two class names differ by case or Unicode form alone, or are shown alike."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(same_form(name), name)
        if other != name:
            composed = [unicodedata.normalize("NFC", one) for one in (other, name)]
            forms, shown = composed[0] == composed[1], (ascii(other), ascii(name))
            raise NoTreeError(
                f"{root} has class folders {shown[0] if forms else repr(visible(other))} and "
                f"{shown[1] if forms else repr(visible(name))}, one name but for its "
                f"{'Unicode form' if forms else 'case'}: rename one"
            )


def _scan_wnids(scan: Scan) -> tuple[str, ...]:
    """Gather an ImageNet tree; labels are the global ones whichever classes are there."""
    ranks = {wnid: rank for rank, wnid in enumerate(IMAGENET2012_CLASSES)}
    root = Path(scan.root)
    found = _look(root)
    scan.passed += found.litter
    for top in found.folders:
        low = top.lower()
        if low.startswith("test"):
            scan.notes.append(f"{visible(top)} is left out, ImageNet's test images have no labels")
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


def nothing_there(root: Path) -> str:
    """Say that no class folder in a folder holds a file."""
    look = _look(root)
    packed = [name for name in look.others if name.lower().endswith((*SUFFIXES, ".parquet"))]
    if look.images:
        return f"{root} holds {look.images} images in no class folder: sort them into {root}/<class>/"
    if packed:
        return f"{root} holds only archives ({_listed(packed)}): unpack them with `main.py prepare`"
    if look.folders:
        return f"{root} holds folders ({_listed(look.folders)}), but no files in them"
    return f"{root} holds no folders, only files ({_listed(look.others)})" if look.others else f"{root} is empty"
