"""Images of a user's, in batches that his model can take: from a folder, or from any loader of (image, label)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.choices import UserError, did_you_mean
from imagenet_classes import IMAGENET2012_CLASSES
from images.decode import BadImageError, How, Seen, examine
from images.index import Tree, mix, scan_tree
from images.layouts import NoTreeError, innermost
from images.names import TEST, UNSPLIT, same_form
from models.class_names import IMAGENET, ClassNames

BATCH = 64
THREADS = 4
SHOWN = 3
SEED = 0  # of the order in which images come, and of their parts
NO_IMAGES = "there are no images to forget with: give some of the classes to forget and of the others"


@dataclass(frozen=True)
class Batch:
    """Images [B, C, H, W] as the model takes them, and labels [B].

    Args:
        keys: uint64 [B], of what an image is known by: its part is drawn by it.
        splits: int [B], the part that the images' owner has put each into, `images.names.UNSPLIT` if none.
        contents: uint64 [B], equal for equal images; None: not known.
    """

    images: Tensor
    labels: Tensor
    keys: np.ndarray
    splits: np.ndarray
    contents: np.ndarray | None = None


class Source(Protocol):
    """Where images come from; each iteration gives all of them in the same order."""

    def __iter__(self) -> Iterator[Batch]: ...

    def digest(self) -> str:
        """SHA-256 of everything that the iteration before gave."""
        ...


# --- a folder ---------------------------------------------------------------------------------------------


def open_folder(root: Path) -> Tree:
    """Index a folder with a subfolder for each class, or such folders below train, val and test.

    Raises:
        UserError: it is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give one with a subfolder of images for each class")
    try:
        place, notes = innermost(root.resolve(), "folders")
        return scan_tree(place, "folders", Path(), notes)
    except NoTreeError as error:
        raise UserError(f"{error}: give a folder with a subfolder of images for each class") from None


def labels_of(folders: Sequence[str], names: ClassNames) -> list[int]:
    """The output that each folder's images are of, by its name.

    Raises:
        UserError: a folder has the name of no class, or two have that of one.
    """
    ids = dict(zip(IMAGENET2012_CLASSES, range(1000), strict=True)) if names.source == IMAGENET else {}
    known = {same_form(name.partition(",")[0]): label for label, name in enumerate(names.names)}
    known |= {same_form(name): label for label, name in enumerate(names.names)}
    found = [ids.get(folder, known.get(same_form(folder), -1)) for folder in folders]
    strange = [folder for folder, label in zip(folders, found, strict=True) if label < 0]
    if strange:
        shown = ", ".join(repr(name) for name in strange[:SHOWN])
        hint = did_you_mean(strange[0], list(names.names)) or f": {names.source}"
        raise UserError(
            f"{len(strange)} of {len(folders)} folders of images have the name of no class of the model ({shown}){hint}"
            "; rename them, or name the model's classes with --classes FILE, one a line"
        )
    twice = [folder for place, folder in enumerate(folders) if found.index(found[place]) != place]
    if twice:
        name = names.names[found[folders.index(twice[0])]]
        raise UserError(f"two folders of images are of the class {name!r}, {twice[0]!r} among them: join them")
    return found


@dataclass
class Folder:
    """Images of a folder, decoded and prepared anew at each iteration, in an order drawn by their names.

    Args:
        tree: as `open_folder` gives it.
        labels: the output that each of its folders is of.
        prepare: opened image -> tensor [C, H, W].
        skip: leave files out that give no image, instead of refusing.
        most: images of each class, at most; None: all.
    """

    tree: Tree
    labels: Sequence[int]
    prepare: Callable[[Image.Image], Tensor]
    skip: bool = False
    most: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Path -> why it gives no image, of the last iteration."""
    _hashes: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = np.argsort(mix(self.tree.hashes ^ np.uint64(SEED)), kind="stable")
        if self.most is not None:
            kept, counts = [], np.zeros((len(self.labels), TEST + 1), int)
            for row in order.tolist():
                place = self.tree.labels[row], self.tree.splits[row]
                counts[place] += 1
                kept += [row] if counts[place] <= self.most else []
            order = np.array(kept)
        self.rows = order

    def __len__(self) -> int:
        return len(self.rows)

    def listed(self) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Labels, keys and splits of all images, [S] each and as of `Batch`, without opening one."""
        labels = torch.tensor([self.labels[label] for label in self.tree.labels[self.rows]], dtype=torch.long)
        return labels, self.tree.hashes[self.rows], self.tree.splits[self.rows]

    def _seen(self, row: int) -> Seen | str:
        how = How(0, prepare=lambda image: self.prepare(image).numpy())
        try:
            return examine(self.tree.path(row), how)
        except BadImageError as error:
            return str(error)

    def __iter__(self) -> Iterator[Batch]:
        """Decode the next batch while the present one is worked on.

        Raises:
            UserError: a file gives no image, and such files are not to be left out.
        """
        self.left_out = dict(self.tree.found)
        self._hashes.clear()
        if self.left_out and not self.skip:
            self._refuse()
        spans = [self.rows[begin : begin + BATCH] for begin in range(0, len(self.rows), BATCH)]
        with ThreadPoolExecutor(THREADS) as pool:
            coming = [pool.submit(self._seen, row) for row in spans[0].tolist()]
            for span, following in zip(spans, [*spans[1:], np.zeros(0, int)], strict=True):
                seen = [one.result() for one in coming]
                coming = [pool.submit(self._seen, row) for row in following.tolist()]
                if batch := self._batch(span, seen):
                    yield batch

    def _batch(self, rows: np.ndarray, seen: list[Seen | str]) -> Batch | None:
        pairs = list(zip(rows.tolist(), seen, strict=True))
        self.left_out |= {self.tree.name(row): one for row, one in pairs if isinstance(one, str)}
        if self.left_out and not self.skip:
            self._refuse()
        good = [(row, one) for row, one in pairs if isinstance(one, Seen)]
        if not good:
            return None
        self._hashes |= {row: one.digest for row, one in good}
        kept = np.array([row for row, _ in good])
        labels = torch.tensor([self.labels[label] for label in self.tree.labels[kept]])
        images = torch.from_numpy(np.stack([one.pixels for _, one in good]))
        contents = _numbers([one.digest for _, one in good])
        return Batch(images, labels, self.tree.hashes[kept], self.tree.splits[kept], contents)

    def _refuse(self) -> None:
        path, reason = next(iter(self.left_out.items()))
        raise UserError(f"{path} below {self.tree.root} gives no image ({reason}): repair or remove it, or leave all "
                        "such files out with --skip-bad-images")  # fmt: skip

    def digest(self) -> str:
        """SHA-256 of the files' bytes and the outputs they are of, whatever their names and their order."""
        rows = [(int(self.labels[self.tree.labels[row]]), digest) for row, digest in self._hashes.items()]
        joined = b"".join(label.to_bytes(8, "little") + digest for label, digest in sorted(rows))
        return hashlib.sha256(joined).hexdigest()


def _numbers(digests: Sequence[bytes]) -> np.ndarray:
    """The first 64 bits of each."""
    return np.frombuffer(b"".join(digest[:8] for digest in digests), np.uint64)


# --- a loader ---------------------------------------------------------------------------------------------


@dataclass
class Loader:
    """Batches of any loader: (images [B, C, H, W], labels [B]), or single (image [C, H, W], label).

    Parts are drawn by the images' values, so that no order moves an image into another part, and each further
    image moves two at most.

    Args:
        loader: iterated once for each pass; its images are prepared already.
        outputs: of the model; labels lie below. None: not known yet.
    """

    loader: Iterable
    outputs: int | None
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[Batch]:
        """Take whatever comes as batches.

        Raises:
            UserError: what comes is no pair of images and labels, or a label is none of the model's.
        """
        self._hash = hashlib.sha256()
        single: list[tuple[Tensor, int]] = []
        for item in self.loader:
            images, labels = _pair(item)
            if not isinstance(images, Tensor) or images.dim() not in (3, 4):
                what = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
                raise UserError(f"the loader gives {what} for images: give tensors [B, C, H, W] or [C, H, W]")
            if images.dim() == 4:
                yield self._batch(images, labels)
                continue
            single.append((images, int(labels)))
            if len(single) == BATCH:
                yield self._of_single(single)
                single = []
        if single:
            yield self._of_single(single)

    def _of_single(self, single: list[tuple[Tensor, int]]) -> Batch:
        return self._batch(torch.stack([image for image, _ in single]), torch.tensor([label for _, label in single]))

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        labels = labels.long().cpu()
        if labels.shape != images.shape[:1]:
            raise UserError(
                f"the loader gives {len(images)} images with labels {list(labels.shape)}: give one for each"
            )
        most = self.outputs
        if most is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < most:
            raise UserError(f"a label lies outside of 0 to {most - 1}, the model's outputs: number them as it does")
        plain = images.detach().cpu().contiguous()
        digests = [hashlib.sha256(one.view(torch.uint8).numpy()).digest() for one in plain.flatten(1)]
        for label, digest in zip(labels.tolist(), digests, strict=True):
            self._hash.update(label.to_bytes(8, "little") + digest)
        keys = _numbers(digests)
        return Batch(images, labels, keys, np.full(len(labels), UNSPLIT, np.uint8), keys)

    def digest(self) -> str:
        """SHA-256 of the values and labels of all images, in their order."""
        return self._hash.hexdigest()


def _pair(item: object) -> tuple[object, Tensor]:
    """Images and labels in what a loader gives.

    Raises:
        UserError: it is no pair, or labels are no whole numbers.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
        raise UserError(f"the loader gives {what}: give pairs of images and labels")
    try:
        labels = torch.as_tensor(item[1])
    except (TypeError, ValueError, RuntimeError):
        labels = torch.zeros(())
    if labels.is_floating_point() or labels.is_complex():
        raise UserError("the loader gives labels that are no whole numbers: give the number of the output of each "
                        "image")  # fmt: skip
    return item[0], labels


def examples(source: Iterable[Batch], most: int) -> Tensor:
    """The first images of a source, [B, C, H, W], `most` at most.

    Raises:
        UserError: there are none, or as the source.
    """
    found, count = [], 0
    for batch in source:
        found.append(batch.images)
        count += len(batch.images)
        if count >= most:
            break
    if not count:
        raise UserError(NO_IMAGES)
    return torch.cat(found)[:most]
