"""Which images of a folder tree are for training, validation and test, and which give no image. No torch here.

Splits are drawn by hashes of file names, class by class: neither the order of the files nor the machine moves them.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.choices import SupportedDatasets, UserError
from core.config import DataConfig, derive_seed
from core.observe import log
from images.check import check
from images.decode import How
from images.index import Tree, mix, open_tree
from images.layouts import NoTreeError
from images.pixel_cache import PixelCache
from images.specs import SPECS, dataset_root, how_to_get
from images.split_names import TEST, TRAIN, UNSPLIT, VAL

TEST_SHARE = 0.2
MOST_NAMED = 1000


def open_tree_of(dataset: SupportedDatasets, path: Path | None, datasets_dir: Path) -> Tree:
    """The index of a dataset's folder tree.

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
    """Rows of train, val and test, those that are known as bad left out: no other image moves but the next in line.

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
    """A tree whose images were read once, the rows of its splits, of which all give an image, and their kept pixels.

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
