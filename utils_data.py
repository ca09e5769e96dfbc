"""Image datasets by name, and their splits: train / val / test, and in each the forget and the retain set.

Nothing here downloads unless `download` is called. Images stay uint8 in memory, those of folder trees decoded on the
disk, until a batch asks for them; loaders normalise batches.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.choices import SupportedDatasets, UserError
from core.config import DataConfig, as_tuple, derive_seed
from core.hashes import sha256_arrays
from core.observe import log, visible
from images.decode import DIGEST, How
from images.fetch import download
from images.names import Classes, resolve_classes
from images.specs import SPECS, Arrays, dataset_root, read_arrays, read_idx, stratified
from images.splits import LazyPixels, find_duplicates, open_tree_of, say_duplicates, usable_splits

SPLITS = ("train", "val", "test")
TREE_SETTINGS = ("image_size", "num_workers", "cache_gb", "max_pixels", "sample_bits", "skip_bad_images")
__all__ = ["SPLITS", "SupportedDatasets", "UnlearningDataset", "download", "get_unlearning_dataset", "read_idx"]


def _cap(arrays: Arrays, most: int | None, seed: int) -> Arrays:
    """Return a stratified subset of about `most` images (None: all)."""
    images, labels = arrays
    if most is None or most >= len(labels):
        return arrays
    chosen, _ = stratified(labels, most / len(labels), seed)
    return images[chosen], labels[chosen]


@dataclass(frozen=True)
class Images(Dataset):
    """Images [S, C, H, W] uint8, in memory or not, with labels [S]; items are normalised float32.

    Subsets share nothing mutable.
    """

    pixels: Tensor | LazyPixels
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | list[int] | slice) -> tuple[Tensor, Tensor]:
        """Return normalised images [B, C, H, W] and labels [B]."""
        return self.pixels[indices].float().sub_(self.mean).div_(self.std), self.labels[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.batch(indices)

    def only(self, keep: Tensor) -> "Images":
        """Return the subset where `keep` [S] (bool, or indices) holds."""
        lazy = isinstance(self.pixels, LazyPixels)
        return replace(self, pixels=self.pixels.take(keep) if lazy else self.pixels[keep], labels=self.labels[keep])

    def key(self) -> np.ndarray:
        """Return an array that differs as soon as an image does."""
        return self.pixels.key() if isinstance(self.pixels, LazyPixels) else self.pixels.numpy()

    def digests(self) -> np.ndarray:
        """Return a hash of each image, or of its file, uint8 [S, 16]."""
        if isinstance(self.pixels, LazyPixels):
            return self.pixels.key()
        whole = self.pixels.numpy().reshape(len(self), -1)
        hashes = b"".join(hashlib.sha256(image.data).digest()[:DIGEST] for image in whole)
        return np.frombuffer(hashes, np.uint8).reshape(-1, DIGEST)

    def name(self, place: int) -> str:
        """Return what an image is called: its path below the tree, or else its number."""
        return (
            self.pixels.tree.name(int(self.pixels.rows[place])) if isinstance(self.pixels, LazyPixels) else str(place)
        )


class _Ahead(DataLoader):
    """A loader that prepares the next batch, in a thread, while the present one is worked on."""

    def __iter__(self) -> Iterator:  # ty: ignore[incompatible-method-override]
        batches = super().__iter__()
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch


def make_loader(dataset: Dataset, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """Return a loader of whole batches (one indexing call each, last one may be short); shuffled if seeded."""
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    decodes = isinstance(dataset, Images) and isinstance(dataset.pixels, LazyPixels) and dataset.pixels.cache is None
    return (_Ahead if decodes else DataLoader)(
        dataset,
        batch_size=batch_size,
        shuffle=generator is not None,
        generator=generator,
        collate_fn=lambda batch: batch,
    )


def _to_forget(given: Classes, classes: Sequence[str], dataset: SupportedDatasets) -> tuple[int, ...]:
    """Return labels of the classes to forget, ascending.

    Raises:
        UserError: there is no such class, or none would be left.
    """
    labels = resolve_classes(given, classes, SPECS[dataset].ids, dataset.value)
    if len(labels) == len(classes):
        raise UserError(f"forget_class names all {len(classes)} classes of {dataset.value}: leave one to retain")
    return labels


class UnlearningDataset:
    """A dataset with classes to forget: three splits, each whole, by class, and as forget and retain set.

    `train` and `val` part the official training data (stratified, seeded); `test` is the official test split.
    """

    def __init__(
        self,
        name: SupportedDatasets,
        splits: dict[str, Images],
        batch_size: int,
        forget_class: int | str | Sequence[int | str],
        seed: int,
    ):
        self.name, self.splits, self.batch_size = name, splits, batch_size
        self.seed = seed
        pixels = splits["train"].pixels
        self.tree = pixels.tree if isinstance(pixels, LazyPixels) else None
        self.classes = self.tree.classes if self.tree else SPECS[name].classes
        self.forget_class = _to_forget(as_tuple(forget_class), self.classes, name)
        self._check_classes()

    def _check_classes(self) -> None:
        present = {split: set(images.labels.tolist()) for split, images in self.splits.items()}
        missing = sorted((present["test"] | present["val"] | set(self.forget_class)) - present["train"])
        if missing:
            raise UserError(
                f"{self.name.value} has no training images of class {self._named(missing[0])}: use more images"
            )
        for split in ("val", "test"):
            if absent := sorted(set(self.forget_class) - present[split]):
                raise UserError(
                    f"{self.name.value} has no {split} images of class {self._named(absent[0])}: use more images"
                )

    def _named(self, label: int) -> str:
        return f"{label} ({self.classes[label]})"

    def is_forgotten(self, labels: Tensor) -> Tensor:
        """Return whether each label [S] is of a class to forget, bool [S]."""
        return torch.isin(labels, torch.tensor(self.forget_class, device=labels.device))

    @property
    def num_classes(self) -> int:
        """Classes of the dataset."""
        return len(self.classes)

    @property
    def skipped_images(self) -> list[dict[str, str]]:
        """Path and reason of every file that was left out because it gives no image."""
        return [{"path": path, "reason": reason} for path, reason in (self.tree.found if self.tree else ())]

    @property
    def understood(self) -> dict:
        """How the dataset was read, as plain data.

        `splits`: images of each; `forget`: labels with their names; `left_out`: reasons with their counts; `passed`:
        kinds of litter with theirs; `notes`: how folders were read, a sentence each.
        """
        reasons = Counter(one["reason"].partition(" (")[0] for one in self.skipped_images)
        return {
            "dataset": self.name.value,
            "root": self.tree and visible(self.tree.root),
            "classes": list(self.classes),
            "forget": {label: self.classes[label] for label in self.forget_class},
            "splits": {split: len(self.splits[split]) for split in SPLITS},
            "left_out": dict(sorted(reasons.items())),
            "passed": dict(self.tree.passed) if self.tree else {},
            "notes": list(self.tree.notes) if self.tree else [],
        }

    @property
    def image_facts(self) -> dict:
        """Facts for records: images that were left out, copies, and what could not be decided about them."""
        return {
            "skipped_images": self.skipped_images,
            "duplicates": self.duplicates,
            "image_notes": self.image_notes,
        }

    def retained(self, seed: int) -> "UnlearningDataset":
        """Return the images that a model is retrained on: all but the forgotten classes', in an order of their own."""
        kept = {name: part.only(~self.is_forgotten(part.labels)) for name, part in self.splits.items()}
        return _Retained(self.name, kept, self.batch_size, self.forget_class, seed)

    @cached_property
    def duplicates(self) -> dict[str, dict]:
        """Images that occur more than once, by kind (`images.splits.find_duplicates`)."""
        digests = {name: self.splits[name].digests() for name in SPLITS}
        labels = {name: self.splits[name].labels.numpy() for name in SPLITS}

        def name_of(split: str, place: int) -> str:
            name = self.splits[split].name(place)
            return name if self.tree else f"{split} image {name}"

        return find_duplicates(digests, labels, name_of)

    @property
    def image_notes(self) -> list[str]:
        """Doubts about how the images of a tree are to be shown, a sentence each."""
        rows = [part.pixels.rows for part in self.splits.values() if isinstance(part.pixels, LazyPixels)]
        bits = self.tree.bits[np.concatenate(rows)] if self.tree else np.zeros(0, np.uint8)
        most, count = int(bits.max(initial=0)), int((bits > 0).sum())
        if not 0 < most < 16:
            return []
        return [
            f"{count} images have levels of 16 bits, of which none uses more than {most}: they are shown dark, as by a "
            f"viewer; if {most} bits are meant, say so with --data.sample-bits {max(most, 9)} (grey images)"
        ]

    def fingerprint(self) -> str:
        """Hash every image of every split, in order, with its label; of a tree also the class names.

        Neither the paths nor the times of files have a part in it.
        """
        parts = [self.splits[split] for split in SPLITS]
        arrays = [array for part in parts for array in (part.key(), part.labels.numpy())]
        if isinstance(pixels := parts[0].pixels, LazyPixels):
            shown = {"classes": self.classes, "size": pixels.how.size, "sample_bits": pixels.how.sample_bits}
            arrays.append(np.frombuffer(json.dumps(shown).encode(), np.uint8))
        return sha256_arrays(arrays)

    def get_train_loader(self) -> DataLoader:
        """Return a loader of the training images, shuffled by the run's seed."""
        return make_loader(self.splits["train"], self.batch_size, derive_seed(self.seed, "shuffle"))

    def get_val_loader(self) -> DataLoader:
        """Return a loader of the validation images, on which settings are chosen."""
        return make_loader(self.splits["val"], self.batch_size)

    def get_test_loader(self) -> DataLoader:
        """Return the official test images, for reporting."""
        return make_loader(self.splits["test"], self.batch_size)

    def get_single_class(self, label: int, split: str = "train") -> DataLoader:
        """Return images of one class."""
        images = self.splits[split]
        return make_loader(images.only(images.labels == label), self.batch_size)

    def get_forget_set(self, split: str = "train") -> DataLoader:
        """Return images of the classes to forget."""
        images = self.splits[split]
        return make_loader(images.only(self.is_forgotten(images.labels)), self.batch_size)

    def get_retain_set(self, split: str = "train") -> DataLoader:
        """Return images of all other classes."""
        images = self.splits[split]
        return make_loader(images.only(~self.is_forgotten(images.labels)), self.batch_size)


class _Retained(UnlearningDataset):
    """A dataset without the images of the classes to forget."""

    def _check_classes(self) -> None:
        pass


def _statistics(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation per channel, [C, 1, 1] each, of uint8 images [S, C, H, W]."""
    levels = np.arange(256)
    counts = np.stack([np.bincount(pixels[:, c].reshape(-1), minlength=256) for c in range(pixels.shape[1])])
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels**2 / counts.sum(1) - mean**2
    std = np.sqrt(variance) + 1e-8
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return mean, std


@dataclass(frozen=True)
class DatasetFacts:
    """Facts of a dataset that need no image: class names in label order, and the images' shape.

    Of a folder tree also: `images`, how many files may be images; `passed`, kinds of litter with their counts; `notes`,
    how the folders were understood, a sentence each.
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    forget: tuple[int, ...]
    dataset: SupportedDatasets
    images: int | None = None
    passed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def labels(self, given: Classes, field: str) -> tuple[int, ...]:
        """Return labels of classes that a field names.

        Raises:
            UserError: there is no such class.
        """
        return resolve_classes(given, self.classes, SPECS[self.dataset].ids, self.dataset.value, field)


def dataset_facts(
    dataset: SupportedDatasets,
    forget_class: Classes,
    dataset_path: Path | None,
    datasets_dir: Path,
    data: DataConfig,
) -> DatasetFacts:
    """Classes, shape, and the classes to forget by number; a folder tree is indexed for it.

    Raises:
        UserError: there is no such tree or no such class.
    """
    spec = SPECS[dataset]
    tree = open_tree_of(dataset, dataset_path, datasets_dir) if spec.layout else None
    classes, size = tree.classes if tree else spec.classes, (data.image_size if tree else None) or spec.size
    facts = DatasetFacts(classes, spec.channels, size, _to_forget(forget_class, classes, dataset), dataset)
    return replace(facts, images=len(tree), passed=tree.passed, notes=tree.notes) if tree else facts


def _tree_splits(dataset: SupportedDatasets, path: Path | None, store: Path, data: DataConfig) -> dict[str, Images]:
    """Return the three splits of a folder tree."""
    spec = SPECS[dataset]
    how = How(data.image_size or spec.size, data.max_pixels, data.sample_bits)
    threads = 2 * len(os.sched_getaffinity(0)) if data.num_workers is None else data.num_workers
    tree, parts, cache = usable_splits(dataset, path, store, data, how, threads)
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    labels = {name: torch.from_numpy(tree.labels[rows].astype(np.int64)) for name, rows in parts.items()}
    pixels = {name: LazyPixels.kept(tree, parts[name], how, threads, cache) for name in SPLITS}
    return {name: Images(pixels[name], labels[name], mean, std) for name in SPLITS}


def get_unlearning_dataset(
    dataset: SupportedDatasets,
    batch_size: int,
    forget_class: int | str | Sequence[int | str] = 0,
    dataset_path: Path | None = None,
    *,
    datasets_dir: Path = Path("datasets"),
    data: DataConfig | None = None,
    seed: int = 0,
) -> UnlearningDataset:
    """Read a dataset and split it.

    Args:
        forget_class: class or classes, by number or name.
        dataset_path: the folder with its files; by default its place below `datasets_dir`, and for
            FASHION_MNIST the Debian package `dataset-fashion-mnist` where that is installed.
        data: subset sizes and validation share. seed: of the order of the training loader.

    Raises:
        UserError: files are missing or damaged, or the forget class does not exist.
    """
    data = data or DataConfig()
    if SPECS[dataset].layout:
        splits = _tree_splits(dataset, dataset_path, datasets_dir, data)
    else:
        splits = _array_splits(dataset, dataset_root(dataset, dataset_path, datasets_dir), data)
    made = UnlearningDataset(dataset, splits, batch_size, forget_class, seed)
    if made.duplicates:
        log(f"{dataset.value}: {say_duplicates(made.duplicates)}")
    for note in made.image_notes:
        log(f"{dataset.value}: {note}")
    return made


def _array_splits(dataset: SupportedDatasets, root: Path, data: DataConfig) -> dict[str, Images]:
    """Return the three splits of a dataset that fits into memory."""
    split_seed = derive_seed(data.split_seed, dataset.value, "val")
    pixels, labels = _cap(read_arrays(dataset, root, train=True), data.max_train_samples, split_seed)
    test = _cap(read_arrays(dataset, root, train=False), data.max_test_samples, split_seed)
    val, train = stratified(labels, data.val_fraction, split_seed)
    parts = {"train": (pixels[train], labels[train]), "val": (pixels[val], labels[val]), "test": test}
    if not len(train):
        needed = "use a smaller data.val_fraction, or more images (data.max_train_samples)"
        raise UserError(f"all {len(val)} training images of {dataset.value} go into the validation split: {needed}")
    mean, std = _statistics(parts["train"][0])
    return {
        name: Images(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y)), mean, std)
        for name, (x, y) in parts.items()
    }
