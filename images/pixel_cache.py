"""Cache decoded images as rows of one memory-mapped file, found by the hash of the image files' bytes.

A row is known by the hash of the bytes it was decoded from, so that neither a file's path nor its time matters, and it
carries a checksum that is compared when a process first reads it. The file only grows, under a lock; rows count from
the moment when the index beside it names them, so that an interrupted process leaves nothing that is half-trusted.
No torch here.
"""

import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL

from core.artifacts import extending, map_rows, read_tensors, told, write_tensors
from core.config import UserError
from core.hashes import code_key, key_of
from core.observe import log
from images.decode import DIGEST, How

DATA, INDEX = ".pixels", ".rows.safetensors"
SPARE = 2**26  # bytes that are left free on the disk
EVERY_EPOCH = "images are decoded anew in every epoch"


def reading_key(how: How) -> str:
    """Hash what pixels depend on beside the bytes of a file: settings, this project's decoding code, PIL."""
    settings = {"size": how.size, "sample_bits": how.sample_bits}
    return key_of(settings | {"pil": PIL.__version__, "code": code_key("images.pixel_cache")})[:12]


class PixelCache:
    """The rows of one tree at one size.

    Args:
        stem: where its files lie, without their endings. how: what the rows are decoded by.
        limit: bytes that all caches in this folder may take together.
    """

    def __init__(self, stem: Path, how: How, limit: float):
        stem = stem.with_name(f"{stem.name}-{how.size}-{reading_key(how)}")
        self.data, self.index = stem.with_name(stem.name + DATA), stem.with_name(stem.name + INDEX)
        self.how, self.limit = how, limit
        self.row_bytes = int(np.prod(how.shape))
        self.reload()

    def reload(self) -> None:
        """Read the index anew: other processes may have added rows."""
        self._drop_derived()
        self._trusted = np.zeros(0, bool)
        self.digests, self.sums = np.zeros((0, DIGEST), np.uint8), np.zeros(0, np.uint32)
        if not self.index.exists():
            return
        try:
            arrays, _ = read_tensors(self.index)
            digests, sums = arrays["digests"], arrays["sums"]
            if digests.shape != (len(sums), DIGEST) or self.data.stat().st_size < len(sums) * self.row_bytes:
                raise ValueError
        except (UserError, OSError, KeyError, ValueError):
            log(f"{self.data} is damaged: images are decoded again")
            self.drop()
            return
        self.digests, self.sums = digests, sums

    def __getstate__(self) -> dict:
        """Leave the memory map out: a copy in another process maps the file itself."""
        return {name: value for name, value in vars(self).items() if name not in self._derived}

    _derived = ("_map", "_sorted")

    def _drop_derived(self) -> None:
        for name in self._derived:
            vars(self).pop(name, None)

    def __len__(self) -> int:
        return len(self.sums)

    # --- finding and reading ---

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The first 8 bytes of every digest, in order, and whose they are."""
        heads = _heads(self.digests)
        order = np.argsort(heads)
        return heads[order], order

    def places(self, digests: np.ndarray) -> np.ndarray:
        """Find the row of each digest [R, 16]; -1: there is none."""
        if not len(self):
            return np.full(len(digests), -1)
        heads, order = self._sorted
        found = order[np.searchsorted(heads, _heads(digests)).clip(0, len(self) - 1)]
        return np.where((self.digests[found] == digests).all(1), found, -1)

    @cached_property
    def _map(self) -> np.ndarray:
        """All rows. A row that was read once and is whole is trusted from then on."""
        self._trusted = np.zeros(len(self), bool)
        return map_rows(self.data, (len(self), *self.how.shape))

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read pixels uint8 [B, 3, size, size] of rows; also which rows [B] fail their checksum."""
        try:
            pixels = self._map[places]
        except (OSError, ValueError):
            return np.zeros((len(places), *self.how.shape), np.uint8), np.ones(len(places), bool)
        broken = places < 0
        for one in np.flatnonzero(~broken & ~self._trusted[places]):
            broken[one] = zlib.crc32(pixels[one].data) != self.sums[places[one]]
        self._trusted[places[~broken]] = True
        return pixels, broken

    # --- filling ---

    def make_room(self, wanted: int, fresh: int) -> bool:
        """Make room on the disk for `fresh` more rows, of a set of `wanted`; return whether they fit.

        The caches that were used longest ago are removed first, and the log says so. Old rows of this cache itself are
        dropped where they take the room.
        """
        gigabytes = wanted * self.row_bytes / 1e9
        if wanted * self.row_bytes > self.limit:
            told = f"{wanted} images of {self.how.size} x {self.how.size} take {gigabytes:.3g} GB"
            log(f"{EVERY_EPOCH}: {told}, data.cache_gb allows {self.limit / 1e9:.3g}")
            return False
        if (len(self) + fresh) * self.row_bytes > self.limit:
            log(f"{self.data}: full of pixels of other contents, begun anew")
            self.drop()
            fresh = wanted
        needed = fresh * self.row_bytes
        self.data.parent.mkdir(parents=True, exist_ok=True)
        others = [path for path in self.data.parent.glob(f"*{DATA}") if path != self.data]
        others.sort(key=lambda path: _facts(path)[1], reverse=True)
        while True:
            total = sum(_facts(path)[0] for path in others) + len(self) * self.row_bytes + needed
            free = shutil.disk_usage(self.data.parent).free
            if total <= self.limit and free >= needed + SPARE:
                return True
            if not others:
                log(f"{EVERY_EPOCH}: their pixels need {needed / 1e6:.0f} MB, {self.data.parent} has {free // 10**6}")
                return False
            gone = others.pop()
            log(f"removed {gone} to make room: the cache of pixels that was used longest ago")
            _remove(gone)

    def append(self, digests: Sequence[bytes], pixels: np.ndarray) -> None:
        """Add rows [R, 3, size, size]; contents that are there already are passed over.

        Raises:
            OSError: no room.
        """
        block = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)
        _, first = np.unique(block, axis=0, return_index=True)
        new = np.sort(first[self.places(block[first]) < 0])
        if not len(self):  # a running process may still have the old file mapped: cut short, its pages would be gone
            with told(self.data):
                self.data.unlink(missing_ok=True)
        with extending(self.data, len(self) * self.row_bytes) as append:
            for one in new:
                append(pixels[one].data)
        sums = np.array([zlib.crc32(pixels[one].data) for one in new], np.uint32)
        self.digests, self.sums = np.concatenate([self.digests, block[new]]), np.concatenate([self.sums, sums])
        self._drop_derived()

    def save(self) -> None:
        """Make what was added count."""
        write_tensors(self.index, {"digests": self.digests, "sums": self.sums}, {})

    def drop(self) -> None:
        """Remove its files and rows."""
        _remove(self.data)
        self.digests, self.sums = self.digests[:0], self.sums[:0]
        self._drop_derived()

    def distrust(self) -> None:
        """See that the next run fills it anew; this one goes on with the rows that are whole."""
        self.index.unlink(missing_ok=True)

    def used(self) -> None:
        """Note that it is of use: what was used longest ago goes first."""
        with suppress(OSError):
            os.utime(self.data)


def _heads(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view(np.uint64)[:, 0]


def _facts(path: Path) -> tuple[int, float]:
    """(bytes, time of its last use) of a file; (0, 0) if it is gone."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0.0
    return facts.st_size, facts.st_mtime


def _remove(data: Path) -> None:
    """Remove a cache: its index first, without which its rows count for nothing."""
    data.with_name(data.name.removesuffix(DATA) + INDEX).unlink(missing_ok=True)
    data.unlink(missing_ok=True)
