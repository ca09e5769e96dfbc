"""A user's images as rows of numbers: what lies ahead of the target weights, computed once, in three parts."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from core.choices import UserError
from core.observe import log
from forgetting.pictures import NO_IMAGES, SEED, Batch, Folder, Source
from images.names import TEST, TRAIN, UNSPLIT, VAL
from images.splits import by_hash, mix
from model import inspecting
from models.foreign import ForeignClassifier

MOST_BYTES = 2**31  # of all rows that are kept in memory; more lie in a temporary file, which the system maps
MOST_TRAIN_BYTES = 2**30  # of the rows that masks are sought with
TEST_SHARE, VAL_SHARE = 0.3, 0.4  # of a class's images; of those that are left
AT_ONCE = 256  # rows that pass through the head together


@dataclass(frozen=True)
class Samples:
    """Some of the rows of `Classifier.prefix`, and their labels; rows are copied when they are used.

    Args:
        rows: of all images, [all, numbers]. places: of these images among them, [S]. labels: [S].
    """

    rows: Tensor
    places: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def h(self) -> Tensor:
        """All of the rows, [S, numbers]."""
        return self.rows[self.places]

    @property
    def device(self) -> torch.device:
        """Where rows are."""
        return self.rows.device

    def __getitem__(self, index: Tensor) -> Tensor:
        """Some of the rows, [index, numbers]."""
        return self.rows[self.places[index]]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [B, numbers] and labels [B], all of them in turn."""
        for places, labels in zip(self.places.split(AT_ONCE), self.labels.split(AT_ONCE), strict=True):
            if len(labels):
                yield self.rows[places], labels

    def only(self, keep: Tensor) -> "Samples":
        """The subset where `keep` [S] holds."""
        return replace(self, places=self.places[keep], labels=self.labels[keep])

    def logits(self, model: ForeignClassifier, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [S, classes] float32 of a classifier, some weights replaced."""
        if not len(self):
            return torch.zeros(0, model.num_classes)
        with torch.no_grad():
            parts = [model.head(self.rows[places], None, weights).float() for places in self.places.split(AT_ONCE)]
        return torch.cat(parts)


class _Rows:
    """Rows that come in batches; from `MOST_BYTES` on they go to a file that vanishes with the process."""

    def __init__(self, most: int):
        self.most, self.parts, self.count, self.file = most, list[Tensor](), 0, None
        self.bytes = 0

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.bytes += rows.nbytes
        self.parts.append(rows.contiguous())
        if self.file is None and self.bytes > self.most:
            self.file: BinaryIO | None = tempfile.TemporaryFile()  # noqa: SIM115 - `whole` closes it
        if self.file is not None:
            for part in self.parts:
                self.file.write(memoryview(part.numpy()).cast("B"))
            self.kind, self.width, self.parts = rows.dtype, rows.shape[1], []

    def whole(self) -> Tensor:
        if self.file is None:
            return torch.cat(self.parts)
        with self.file:  # the map keeps what it maps
            self.file.flush()
            mapped = mmap.mmap(self.file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(mapped, dtype=self.kind).view(self.count, self.width)


@dataclass(frozen=True)
class Parts:
    """A user's images in three parts: masks are sought with `train`, chosen with `val`, judged with `test`.

    Args:
        counts: images of each class, [classes].
        digest: SHA-256 of the images.
    """

    train: Samples
    val: Samples
    test: Samples
    counts: Tensor
    digest: str


def read_samples(model: ForeignClassifier, source: Source, most: int = MOST_BYTES) -> Parts:
    """Run the model once over all images, up to the first target weight, and part them.

    Args:
        most: bytes that are kept in memory.

    Raises:
        UserError: there are no images, or as `Source`.
    """
    rows, batches = _Rows(most), list[Batch]()
    with inspecting(model), torch.no_grad():
        for batch in source:
            rows.add(model.prefix(batch.images))
            batches.append(replace(batch, images=batch.images[:0]))
    if not rows.count:
        raise UserError(NO_IMAGES)
    parts = in_parts(rows.whole(), batches, model.num_classes, source.digest())
    if again := seen_before(parts, batches):
        log(f"{again:,} of {len(parts.test):,} test images are also among those that masks are sought or chosen with: "
            "scores flatter by as much")  # fmt: skip
    return parts


def seen_before(parts: Parts, batches: Sequence[Batch]) -> int:
    """How many test images are equal to one of another part, where that is known: copies under two names."""
    known = [batch.contents for batch in batches if batch.contents is not None]
    if len(known) < len(batches):
        return 0
    contents = np.concatenate(known)
    before = torch.cat([parts.train.places, parts.val.places]).numpy()
    return int(np.isin(contents[parts.test.places.numpy()], contents[before]).sum())


def foreseen(source: Folder, outputs: int) -> Parts:
    """Which images each part gets, from their names alone, before any is read: without rows and digest.

    Files that turn out to give no image are still among them.
    """
    labels, keys, splits = source.listed()
    return in_parts(torch.zeros(len(labels), 0), [Batch(labels[:0], labels, keys, splits)], outputs, "")


def in_parts(h: Tensor, batches: Sequence[Batch], outputs: int, digest: str) -> Parts:
    """Part images, of which only labels, keys and splits count; `h`: rows of all of them."""
    labels = torch.cat([batch.labels for batch in batches])
    keys, splits = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("keys", "splits"))
    places = _parted(labels.numpy(), keys, splits)
    # A loader may come class by class, and a request retains the first rows alone: an order drawn by the keys is fair.
    drawn = places["train"][np.argsort(mix(keys[places["train"]] ^ np.uint64(SEED)), kind="stable")]
    train = _capped(drawn, labels.numpy(), MOST_TRAIN_BYTES // max(1, h[:1].nbytes))
    chosen = {name: torch.from_numpy(place) for name, place in (places | {"train": train}).items()}
    parts = {name: Samples(h, place, labels[place]) for name, place in chosen.items()}
    return Parts(**parts, counts=torch.bincount(labels, minlength=outputs), digest=digest)


def _parted(labels: np.ndarray, keys: np.ndarray, splits: np.ndarray) -> dict[str, np.ndarray]:
    """Places of the images of each part: as their owner has put them, and drawn by their keys where he has not."""
    rest = np.flatnonzero((splits == TRAIN) | (splits == UNSPLIT))
    val, test = np.flatnonzero(splits == VAL), np.flatnonzero(splits == TEST)
    if not len(test):
        test, rest = _drawn(rest, labels, keys, TEST_SHARE)
    if not len(val):
        val, rest = _drawn(rest, labels, keys, VAL_SHARE)
    return {"train": rest, "val": val, "test": test}


def _drawn(places: np.ndarray, labels: np.ndarray, keys: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    chosen, rest = by_hash(labels[places], keys[places], share, SEED)
    return places[chosen], places[rest]


def _capped(places: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the places, of each class alike."""
    if len(places) <= most:
        return places
    each, kept, counts = max(1, most // len(np.unique(labels[places]))), [], dict[int, int]()
    for place in places.tolist():
        counts[labels[place]] = counts.get(labels[place], 0) + 1
        kept += [place] if counts[labels[place]] <= each else []
    return np.array(kept)
