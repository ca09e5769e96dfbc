"""The index of a folder tree of images, and what its files hold.

The index holds paths, labels, sizes and times as arrays and is cached; making it decodes nothing. `layouts` says which
folders are classes and which are splits. When a cached index is loaded, only the times of folders are compared (a file
that is added, removed or renamed changes the time of its folder). `check` looks at every file that is used: it decodes
and hashes each once, keeps the pixels, and knows the file again until it changes. No torch here.
"""

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from core.artifacts import read_tensors, write_tensors
from core.choices import MachineError, UserError
from core.hashes import code_key, key_of
from core.observe import log, progress, visible
from core.store import locked
from images.decode import (
    CHANGED,
    DIGEST,
    EMPTY,
    RACE_NS,
    UNREADABLE,
    BadImageError,
    How,
    Seen,
    examine,
    in_threads,
    mark_of,
    raise_if_machine,
)
from images.layouts import LAYOUTS, SPECIAL, NoTreeError, Scan, has_splits, innermost, nothing_there
from images.pixel_cache import EVERY_EPOCH, PixelCache


@dataclass(frozen=True)
class Tree:
    """Every image file of a tree, in the order of its path.

    Arrays: paths (one blob and the end of each), sizes in bytes, marks (`decode.mark_of`), labels, splits
    (UNSPLIT, TRAIN, ...) and hashes of file names (what splits are drawn by, so that neither order nor machine moves
    them), [S] each.
    `problems`: (path, reason) of what can be no image whatever its content; `passed`: kinds of litter with their
    counts; `notes`: what was decided about the layout, a sentence each.
    Filled by `check`, where rows were checked: `bad`, reason by row; `digests` of the files' bytes [S, 16];
    `bits` (`decode.Seen`) [S].
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
        """Return the path of an image below the root."""
        return os.fsdecode(self.blob[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes())

    def path(self, row: int) -> str:
        """Return the path of an image."""
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
        """Return whether no folder has a new modification time, and none changed just before it was read."""
        return self.stands() and max(self.folders.values(), default=0) < self.made - RACE_NS

    def stands(self) -> bool:
        """Return whether every folder has the modification time that the index holds."""
        try:
            times = {name: os.stat(f"{self.root}/{name}").st_mtime_ns for name in self.folders}  # noqa: PTH116
        except OSError:
            return False
        return times == self.folders


def mix(values: np.ndarray) -> np.ndarray:
    """Mix bits by the finaliser of splitmix64, a bijection of uint64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
    """Load the index of a tree from `store`; if it is not there or not fresh, make it anew and keep it there.

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
    key = key_of({"root": str(root), "layout": layout, "notes": notes, "code": code_key("images.index")})
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


# --- what the files hold -----------------------------------------------------------------------------------

LEAST_SPAN, MOST_SPAN, SPAN_BYTES, SECONDS_BETWEEN_SAVES = 64, 1024, 2**26, 15
TRIES = 3  # for a file that is being written


class _Known:
    """The results of earlier checks with the same limits, by the key of a file (its name, size and mark)."""

    def __init__(self, tree: Tree, how: How):
        limits = {"max_pixels": how.max_pixels, "sample_bits": how.sample_bits, "pil": PIL.__version__}
        code = key_of(limits | {"code": code_key("images.index")})[:8]
        self.file = tree.file.with_suffix(f".{code}.checked.safetensors")
        try:
            arrays, facts = read_tensors(self.file) if self.file.exists() else ({}, {})
            self.keys = arrays.get("keys", np.zeros(0, np.uint64))
            self.digests = arrays.get("digests", np.zeros((0, DIGEST), np.uint8))
            self.bits = arrays.get("bits", np.zeros(0, np.uint8))
            if not len(self.keys) == len(self.bits) == len(self.digests):
                raise UserError("lengths differ")
        except UserError:
            log(f"{self.file} is damaged: images are checked again")
            facts = {}
            self.keys, self.digests = np.zeros(0, np.uint64), np.zeros((0, DIGEST), np.uint8)
            self.bits = np.zeros(0, np.uint8)
        self.reasons = {int(key): reason for key, reason in facts.items()}

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Find the place of each key; -1: it is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        order = np.argsort(self.keys)
        found = order[np.searchsorted(self.keys[order], keys).clip(0, len(order) - 1)]
        return np.where(self.keys[found] == keys, found, -1)

    def add(self, keys: np.ndarray, seen: list[Seen]) -> None:
        digests = np.frombuffer(b"".join(one.digest for one in seen), np.uint8).reshape(-1, DIGEST)
        self.keys, self.digests = np.concatenate([self.keys, keys]), np.concatenate([self.digests, digests])
        self.bits = np.concatenate([self.bits, np.array([one.bits for one in seen], np.uint8)])

    def forget(self, keys: np.ndarray) -> None:
        kept = ~np.isin(self.keys, keys)
        self.keys, self.digests, self.bits = self.keys[kept], self.digests[kept], self.bits[kept]

    def save(self) -> None:
        reasons = {str(key): reason for key, reason in self.reasons.items()}
        write_tensors(self.file, {"keys": self.keys, "digests": self.digests, "bits": self.bits}, reasons)


def check(tree: Tree, rows: np.ndarray, how: How, threads: int, limit: float) -> tuple[Tree, PixelCache | None]:
    """Decode each of these images once, keep its pixels, and hash its file; what is known from earlier is not repeated.

    Several processes that need the same do it once. What was found is kept every few seconds.

    Args:
        limit: bytes that kept pixels may take; 0 keeps none.

    Returns:
        (the tree with the present sizes and marks of these files, `bad`, `digests` and `bits`; their pixels, if kept).

    Raises:
        MachineError: memory, file handles or room for what was found are lacking.
    """
    tree, bad = _restamped(tree, rows)
    rows = rows[~np.isin(rows, list(bad))]
    known, cache = _Known(tree, how), PixelCache(tree.file.with_suffix(""), how, limit) if limit else None
    if limit == 0:
        log(f"{EVERY_EPOCH}: data.cache_gb is 0")
    if len(_left(tree, rows, known, cache)):
        with locked(tree.file.with_name(f".{tree.file.stem}.check.lock")):
            known = _Known(tree, how)
            cache = _with_room(tree, rows, known, cache)
            found, cache = _examine_all(tree, _left(tree, rows, known, cache), how, threads, known, cache)
            bad |= found
    keys = tree.keys(rows)
    if known.reasons:
        bad |= {
            int(row): known.reasons[key] for row, key in zip(rows, keys.tolist(), strict=True) if key in known.reasons
        }
    places = known.places(keys)
    sound = places >= 0
    tree.digests[rows[sound]], tree.bits[rows[sound]] = known.digests[places[sound]], known.bits[places[sound]]
    if cache is not None:
        cache.used()
    return replace(tree, bad=bad), cache


def forget(tree: Tree, rows: list[int], how: How) -> None:
    """See that these images are checked again by the next run."""
    known = _Known(tree, how)
    known.forget(tree.keys(np.array(rows)))
    known.save()


def _restamped(tree: Tree, rows: np.ndarray) -> tuple[Tree, dict[int, str]]:
    """Return the tree with these files' present sizes and marks, and why a row is no file any more, by row."""
    sizes, marks, bad = tree.sizes.copy(), tree.marks.copy(), {}
    for row in rows.tolist():
        try:
            facts = os.stat(tree.path(row))  # noqa: PTH116
        except OSError as error:
            raise_if_machine(error, tree.path(row))
            bad[row] = f"{UNREADABLE} ({error.strerror})"
            continue
        if not stat.S_ISREG(facts.st_mode) or facts.st_size == 0:
            bad[row] = EMPTY if stat.S_ISREG(facts.st_mode) else SPECIAL
        sizes[row], marks[row] = facts.st_size, mark_of(facts)
    changed = (sizes != tree.sizes) | (marks != tree.marks)
    blank = np.zeros((len(tree), DIGEST), np.uint8), np.zeros(len(tree), np.uint8)
    tree = replace(tree, sizes=sizes, marks=marks, digests=blank[0], bits=blank[1])
    if changed.any():
        example = tree.name(int(np.flatnonzero(changed)[0]))
        log(
            f"{tree.root}: {changed.sum()} files were touched since they were indexed, such as {example}: looking again"
        )
        save_tree(tree)
    return tree, bad


def _left(tree: Tree, rows: np.ndarray, known: _Known, cache: PixelCache | None) -> np.ndarray:
    """Return the rows that were not checked yet."""
    keys = tree.keys(rows)
    places = known.places(keys)
    missing = places < 0
    if cache is not None:
        missing |= cache.places(known.digests[places]) < 0 if len(known.keys) else True
    return rows[missing & ~np.isin(keys, np.array(list(known.reasons), np.uint64))]


def _with_room(tree: Tree, rows: np.ndarray, known: _Known, cache: PixelCache | None) -> PixelCache | None:
    """Return the cache, if the images that are still to be read fit in."""
    if cache is None:
        return None
    cache.reload()
    return cache if cache.make_room(len(rows), len(_left(tree, rows, known, cache))) else None


def _examine(tree: Tree, row: int, how: How) -> Seen:
    """Read one image; a file that is touched meanwhile is read again. Raises as `examine` does."""
    for left in reversed(range(TRIES)):
        try:
            return examine(tree.path(row), how, tree.stamp(row))
        except BadImageError as error:
            if str(error) != CHANGED or left == 0:
                raise
        try:
            facts = os.stat(tree.path(row))  # noqa: PTH116
        except OSError as error:
            raise BadImageError(f"{UNREADABLE} ({error.strerror})") from None
        tree.sizes[row], tree.marks[row] = facts.st_size, mark_of(facts)
    raise AssertionError


def _examine_all(
    tree: Tree, rows: np.ndarray, how: How, threads: int, known: _Known, cache: PixelCache | None
) -> tuple[dict[int, str], PixelCache | None]:
    """Read these images; returns reason by row of those that are no images, and the cache if all went into it."""
    bad: dict[int, str] = {}
    step = min(MOST_SPAN, max(LEAST_SPAN, SPAN_BYTES // int(np.prod(how.shape))))
    spans = [rows[begin : begin + step] for begin in range(0, len(rows), step)]
    saved = time.monotonic()
    log(f"reading {len(rows):,} images for the first time: they are decoded and checked once, and known from then on")
    for place, span in enumerate(progress(spans, f"reading images, {step} at a time"), 1):
        seen: dict[int, Seen] = {}

        def read(place: int, span: np.ndarray = span, seen: dict[int, Seen] = seen) -> None:
            row = int(span[place])
            try:
                seen[row] = _examine(tree, row, how)
            except BadImageError as error:
                bad[row] = str(error)

        in_threads(read, len(span), threads)
        good, lasting = (
            sorted(seen),
            [row for row in span.tolist() if row in bad and not bad[row].startswith((CHANGED, UNREADABLE))],
        )
        known.forget(tree.keys(np.array(good, int)))
        known.add(tree.keys(np.array(good, int)), [seen[row] for row in good])
        known.reasons |= {
            int(key): bad[row] for row, key in zip(lasting, tree.keys(np.array(lasting, int)), strict=True)
        }
        cache = _kept([seen[row] for row in good], cache)
        if place == len(spans) or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            saved = time.monotonic()
            cache = _saved(cache)
            known.save()
    return bad, cache


def _kept(seen: list[Seen], cache: PixelCache | None) -> PixelCache | None:
    """Put these images into the cache; None, with a line in the log, if the disk has no room for them."""
    if cache is None or not seen:
        return cache
    try:
        cache.append([one.digest for one in seen], np.stack([one.pixels for one in seen]))
    except (MachineError, UserError) as error:
        return _given_up(cache, error)
    return cache


def _saved(cache: PixelCache | None) -> PixelCache | None:
    """Return the cache, what it holds made to count; None, as above."""
    try:
        if cache is not None:
            cache.save()
    except (MachineError, UserError) as error:
        return _given_up(cache, error)
    return cache


def _given_up(cache: PixelCache, error: Exception) -> None:
    """Remove a cache that cannot be written: it is a help, and no reason to end a run."""
    log(f"{EVERY_EPOCH}: {error}")
    cache.drop()
