"""Split a folder tree into images for training, validation and test, leave out what is no image, and read the rest.

Splits are drawn by hashes of file names, class by class: neither the order of the files nor the machine moves them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.choices import SupportedDatasets, UserError
from core.config import DataConfig, derive_seed
from core.observe import log
from images.decode import CHANGED, BadImageError, How, decode_many, examine
from images.index import Tree, check, forget, mix, open_tree
from images.layouts import NoTreeError
from images.names import TEST, TRAIN, UNSPLIT, VAL
from images.pixel_cache import PixelCache
from images.specs import SPECS, dataset_root, how_to_get

if TYPE_CHECKING:  # torch takes seconds, and who lists datasets needs none
    from torch import Tensor

ACROSS = "across classes"


def find_duplicates(
    digests: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], name_of: Callable[[str, int], str]
) -> dict[str, dict]:
    """Find images that occur more than once, within and across splits and classes.

    Args:
        digests: of each split's images, uint8 [S, 16], equal where images are. labels: int [S], as many.
        name_of: what an image is called, from its split and place.

    Returns:
        {kind: {"images": how many, "example": [name, name of its equal]}} of the kinds that occur: a split (an image
        that equals an earlier one of it), two splits as `train/test` (an image of the second that equals one of the
        first), and `across classes` (an image that equals one of another class).
    """
    names = list(digests)
    split = np.repeat(np.arange(len(names)), [len(digests[name]) for name in names])
    place = np.concatenate([np.arange(len(digests[name])) for name in names])
    whole = np.ascontiguousarray(np.concatenate([digests[name] for name in names]))
    _, group, sizes = np.unique(whole.view("V16")[:, 0], return_inverse=True, return_counts=True)
    twins = np.flatnonzero(sizes[group] > 1)
    split, place, group = split[twins], place[twins], group[twins]
    label = np.concatenate([labels[name] for name in names])[twins]
    found: dict[str, dict] = {}

    def note(kind: str, copies: np.ndarray, others: np.ndarray) -> None:
        """Count `copies`, each of which equals some of `others`; both are places among the twins."""
        if len(copies):
            equal = others[(group[others] == group[copies[0]]) & (others != copies[0])][0]
            pair = [name_of(names[split[one]], int(place[one])) for one in (copies[0], equal)]
            found[kind] = {"images": len(copies), "example": pair}

    for a, b in combinations(range(len(names)), 2):
        left, right = np.flatnonzero(split == a), np.flatnonzero(split == b)
        note(f"{names[a]}/{names[b]}", right[np.isin(group[right], group[left])], left)
    for number, name in enumerate(names):
        members = np.flatnonzero(split == number)
        _, first = np.unique(group[members], return_index=True)
        note(name, np.delete(members, first), members)
    lowest = np.full(len(sizes), np.iinfo(np.int64).max)
    np.minimum.at(lowest, group, label)
    highest = np.zeros(len(sizes), np.int64)
    np.maximum.at(highest, group, label)
    mixed = np.flatnonzero(lowest[group] < highest[group])
    if len(mixed):
        note(ACROSS, mixed, mixed[label[mixed] != label[mixed[0]]])
    return found


def say_duplicates(found: Mapping[str, dict]) -> str:
    """Describe the copies in one line."""
    parts = [f"{one['images']} {kind}" for kind, one in found.items()]
    first = next(iter(found.values()))["example"]
    return f"the same image more than once: {', '.join(parts)}; e.g. {first[0]} is {first[1]}"


@lru_cache
def _say_once(text: str) -> None:
    log(text)


@dataclass(frozen=True)
class LazyPixels:
    """Images of a folder tree, decoded when they are indexed; used like a uint8 tensor [S, 3, size, size].

    Args:
        tree: the index, after `check`.
        rows: places of the images in the index, int64 [S].
        how: the settings of decoding.
        threads: how many decode at a time.
        cache: the decoded pixels that were kept; None: there are none.
        places: of the images in the cache, int64 [S].
    """

    tree: Tree
    rows: np.ndarray
    how: How
    threads: int
    cache: PixelCache | None = None
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def kept(cls, tree: Tree, rows: np.ndarray, how: How, threads: int, cache: PixelCache | None) -> "LazyPixels":
        """Return the pixels of these rows, found in the cache."""
        return cls(
            tree,
            rows,
            how,
            threads,
            cache,
            cache.places(tree.digests[rows]) if cache is not None else np.zeros(0, np.int64),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept in memory; pixels are not."""
        return self.rows.nbytes + self.places.nbytes

    def take(self, keep: "Tensor | list[int] | slice") -> "LazyPixels":
        """Return the subset at indices, or where a mask holds; nothing is read."""
        which = keep if isinstance(keep, slice | list) else np.asarray(keep)
        return replace(
            self, rows=self.rows[which], places=self.places[which] if self.cache is not None else self.places
        )

    def __getitem__(self, indices: "Tensor | list[int] | slice") -> "Tensor":
        """Pixels, uint8 [B, 3, size, size].

        Raises:
            UserError: a file has other contents than when the run began, or can no longer be decoded.
        """
        import torch

        which = indices if isinstance(indices, slice | list) else np.asarray(indices)
        rows = self.rows[which]
        if self.cache is None:
            return torch.from_numpy(self._decoded(rows))
        pixels, broken = self.cache.read(self.places[which])
        if broken.any():
            _say_once(f"{self.cache.data} is damaged: what is broken is decoded anew, all of it by the next run")
            self.cache.distrust()
            pixels[broken] = self._decoded(rows[broken])
        return torch.from_numpy(pixels)

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        paths, stamps = [self.tree.path(row) for row in rows.tolist()], [self.tree.stamp(row) for row in rows.tolist()]
        pixels, bad = decode_many(paths, stamps, self.how, self.threads)
        for place, reason in bad.items():
            if reason == CHANGED:
                pixels[place] = self._as_it_was(int(rows[place]))
                continue
            forget(self.tree, rows[list(bad)].tolist(), self.how)
            raise UserError(f"{paths[place]}: {reason}, which it was not when this run began: repair it and run again")
        return pixels

    def _as_it_was(self, row: int) -> np.ndarray:
        """Decode a file that was touched, if its bytes are those it had when the run began."""
        path = self.tree.path(row)
        try:
            seen = examine(path, self.how)
        except BadImageError as error:
            raise UserError(f"{path} was changed while this run used it ({error}): repair it and run again") from None
        if seen.digest != self.tree.digests[row].tobytes():
            raise UserError(f"{path} was changed while this run used it: run again to work with its new contents")
        _say_once(
            f"{self.tree.root}: files were touched since this run began, such as {path}: their contents are the same"
        )
        return seen.pixels

    def key(self) -> np.ndarray:
        """Return the hashes of the files' bytes, uint8 [S, 16]."""
        return self.tree.digests[self.rows]


TEST_SHARE = 0.2
MOST_NAMED = 1000


def open_tree_of(dataset: SupportedDatasets, path: Path | None, datasets_dir: Path) -> Tree:
    """Return the index of a dataset's folder tree.

    Raises:
        UserError: it is not there, or no such tree.
    """
    spec, root = SPECS[dataset], dataset_root(dataset, path, datasets_dir)
    try:
        tree = open_tree(root, spec.layout, datasets_dir / "index")
    except NoTreeError as error:
        raise UserError(
            f"cannot read {dataset.value} ({error}): it needs {spec.files}; {how_to_get(dataset)}"
        ) from None
    if spec.expected_classes not in (None, len(tree.classes)):
        log(f"{dataset.value}: {spec.expected_classes} classes were expected, {root} has {len(tree.classes)}")
    return tree


def by_hash(labels: np.ndarray, hashes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices class by class into `share` of each class (at least one) and the rest, both sorted.

    Args:
        labels: int [S]. hashes: uint64 [S], of what an image is known by. share: 0..1. seed: of the choice.

    Returns:
        (chosen [A], rest [S - A]).
    """
    salted = mix(hashes ^ np.uint64(seed))
    order = np.lexsort((salted, labels))
    counts = np.bincount(labels) if len(labels) else np.zeros(1, np.int64)
    begins = np.cumsum(counts) - counts
    take = np.where(counts > 0, np.maximum(1, np.round(share * counts)), 0).astype(np.int64)
    ordered = labels[order]
    first = np.arange(len(labels)) - begins[ordered] < take[ordered]
    return np.sort(order[first]), np.sort(order[~first])


def split_rows(dataset: SupportedDatasets, tree: Tree, data: DataConfig) -> dict[str, np.ndarray]:
    """Split the rows into train, val and test without those that give no image; the next in line takes its place.

    Official splits are kept (a lone `val` is the test set), what is missing is drawn from the training images; a
    `pooled` dataset's are all drawn anew.
    """
    official = np.full(len(tree), UNSPLIT, np.uint8) if SPECS[dataset].pooled else tree.splits
    sound = ~np.isin(np.arange(len(tree)), list(tree.bad)) if tree.bad else np.ones(len(tree), bool)
    train, val, test = (np.flatnonzero(sound & (official == code)) for code in (TRAIN, VAL, TEST))
    train = np.sort(np.concatenate([train, np.flatnonzero(sound & (official == UNSPLIT))]))
    if len(test) == 0:
        test, val = val, val[:0]

    def part(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        chosen, rest = by_hash(tree.labels[rows], tree.hashes[rows], share, seed)
        return rows[chosen], rows[rest]

    def cap(rows: np.ndarray, most: int | None) -> np.ndarray:
        seed = derive_seed(data.split_seed, dataset.value, "cap")
        return rows if most is None or most >= len(rows) else np.sort(part(rows, most / len(rows), seed)[0])

    if len(test) == 0:
        test, train = part(train, TEST_SHARE, derive_seed(0, dataset.value, "test"))
    train, test = cap(train, data.max_train_samples), cap(test, data.max_test_samples)
    if len(val) == 0:
        val, train = part(train, data.val_fraction, derive_seed(data.split_seed, dataset.value, "val"))
    return {"train": train, "val": val, "test": test}


def usable_splits(
    dataset: SupportedDatasets, path: Path | None, datasets_dir: Path, data: DataConfig, how: How, threads: int
) -> tuple[Tree, dict[str, np.ndarray], PixelCache | None]:
    """Read every image of a tree once; return the tree, the rows of each split that give an image, and their pixels.

    Raises:
        UserError: files give no image (unless they are to be skipped), or a class has too few images.
    """
    tree, reopened = open_tree_of(dataset, path, datasets_dir), False
    while True:
        parts = split_rows(dataset, tree, data)
        rows = np.unique(np.concatenate(list(parts.values())))
        checked, cache = check(tree, rows, how, threads, data.cache_gb * 1e9)
        if not reopened and not checked.stands():  # files came or went since the index was opened
            tree, reopened = open_tree_of(dataset, path, datasets_dir), True
            continue
        fresh = checked.bad
        tree = replace(checked, bad=tree.bad | fresh)
        if not (fresh and data.skip_bad_images):
            break
    _say_what_was_decided(tree)
    if tree.found:
        _name_them(dataset, tree, data.skip_bad_images)
    _enough_of_each(dataset, tree, parts)
    return tree, parts, cache


def _say_what_was_decided(tree: Tree) -> None:
    """Say in the log how the layout was read and what litter was passed over."""
    for note in tree.notes:
        log(f"{tree.root}: {note}")
    if tree.passed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tree.passed.items())
        log(f"{tree.root}: passed over {sum(tree.passed.values())} files and folders that are no images ({kinds})")


def _name_them(dataset: SupportedDatasets, tree: Tree, skip: bool) -> None:
    """Name every file that gives no image in the log; raise `UserError` unless they are to be skipped."""
    for path, reason in tree.found[:MOST_NAMED]:
        log(f"{'left out' if skip else 'no image'}: {path} ({reason})")
    if len(tree.found) > MOST_NAMED:
        log(f"... and {len(tree.found) - MOST_NAMED} more")
    if not skip:
        counts = Counter(reason.partition(" (")[0] for _, reason in tree.found)
        summary = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        path, reason = tree.found[0]
        raise UserError(
            f"{dataset.value} in {tree.root} has {len(tree.found)} paths that give no image ({summary}; "
            f"e.g. {path}{''.join(reason.partition(' (')[1:])}): repair or remove them, or leave them out with "
            "--skip-bad-images"
        )


def _enough_of_each(dataset: SupportedDatasets, tree: Tree, parts: dict[str, np.ndarray]) -> None:
    """Raise `UserError` where a class has no images, or no training image is left of it."""
    counts = np.bincount(tree.labels, minlength=len(tree.classes))
    trained = np.bincount(tree.labels[parts["train"]], minlength=len(tree.classes))
    if absent := np.flatnonzero(counts == 0).tolist():
        raise UserError(
            f"{dataset.value} in {tree.root} has no images of {len(absent)} of its {len(counts)} classes, such as "
            f"{tree.classes[absent[0]]!r}: complete it, or name it as FOLDER to work with the classes that are there"
        )
    if lacking := np.flatnonzero((counts > 0) & (trained == 0)).tolist():
        named = ", ".join(f"{tree.classes[label]!r} ({counts[label]})" for label in lacking[:5])
        raise UserError(
            f"{dataset.value} in {tree.root} has too few images for training, validation and test of {len(lacking)} "
            f"classes, {named}: give them more images, raise data.max_train_samples, or remove the classes"
        )
