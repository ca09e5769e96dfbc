"""Images of a folder tree that are read when a batch asks for them: from what was kept, or from their files."""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from core.config import UserError
from core.observe import log
from images.check import forget
from images.decode import CHANGED, BadImageError, How, decode_many, examine
from images.index import Tree
from images.pixel_cache import PixelCache


@lru_cache
def _say_once(text: str) -> None:
    log(text)


@dataclass(frozen=True)
class LazyPixels:
    """Images of a folder tree, read when they are indexed: stands in for a uint8 tensor [S, 3, size, size].

    Args:
        tree: the index, checked. rows: places in it, int64 [S]. how: they are decoded. threads: that decode at a time.
        cache: what was kept of them, where there is one. places: of the rows in it, int64 [S].
    """

    tree: Tree
    rows: np.ndarray
    how: How
    threads: int
    cache: PixelCache | None = None
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def kept(cls, tree: Tree, rows: np.ndarray, how: How, threads: int, cache: PixelCache | None) -> "LazyPixels":
        """The pixels of these rows, found in the cache."""
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
        """What is held in memory."""
        return self.rows.nbytes + self.places.nbytes

    def take(self, keep: Tensor | list[int] | slice) -> "LazyPixels":
        """The subset at indices, or where a mask holds; nothing is read."""
        which = keep.numpy() if isinstance(keep, Tensor) else keep
        return replace(
            self, rows=self.rows[which], places=self.places[which] if self.cache is not None else self.places
        )

    def __getitem__(self, indices: Tensor | list[int] | slice) -> Tensor:
        """Pixels, uint8 [B, 3, size, size].

        Raises:
            UserError: a file has other contents than when the run began, or can no longer be decoded.
        """
        which = indices.numpy() if isinstance(indices, Tensor) else indices
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
        """Pixels of a file that was touched: used if it holds what it held when the run began."""
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
        """Hashes of the files' bytes, uint8 [S, 16]."""
        return self.tree.digests[self.rows]
