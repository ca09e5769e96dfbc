"""One image file -> pixels: what can be decoded is converted, what cannot is said by its reason. No torch here."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

EMPTY, UNREADABLE, CHANGED = "empty file", "unreadable", "changed since it was indexed"
FOREIGN, CUT, FLOATS = "not an image", "damaged image", "floating-point pixels"
CHUNK = 64
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


class BadImageError(Exception):
    """A file that gives no pixels; its text is the reason."""


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, from any mode: 16-bit levels are divided by 256, alpha is dropped, an animation's first frame."""
    if image.mode == "F":
        raise BadImageError(FLOATS)
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16; PIL's own conversion would clip at 255
        levels = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or int(levels.max(initial=0)) > 255
        image = Image.fromarray((levels >> 8 if wide else levels).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA", "LA"):  # a palette with transparency is only converted cleanly by way of RGBA
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(path: str, size: int, stamp: tuple[int, int] | None = None) -> np.ndarray:
    """The centre square of an image, at `size` x `size`.

    JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that still covers that size.

    Args:
        path: any file that PIL reads. stamp: (bytes, mtime in ns) it must still have.

    Returns:
        uint8 [3, size, size].

    Raises:
        BadImageError: it cannot be opened or decoded, or was changed.
    """
    try:
        with Path(path).open("rb") as file:
            facts = os.fstat(file.fileno())
            if stamp is not None and (facts.st_size, facts.st_mtime_ns) != stamp:
                raise BadImageError(CHANGED)
            if facts.st_size == 0:
                raise BadImageError(EMPTY)
            return _pixels(file, size)
    except OSError as error:
        raise BadImageError(f"{UNREADABLE} ({error.strerror})") from None


def _pixels(file: object, size: int) -> np.ndarray:
    """Decode an open file. PIL meets damage with errors of a dozen kinds, all of which mean the same here."""
    try:
        image = Image.open(file)  # ty: ignore[invalid-argument-type]
    except Exception:
        raise BadImageError(FOREIGN) from None
    try:
        image.draft("RGB", (size, size))
        image = _eight_bit(image)
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        square = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    except BadImageError:
        raise
    except Exception:
        raise BadImageError(CUT) from None
    return np.asarray(square).transpose(2, 0, 1)


def in_threads(work: Callable[[int], object], count: int, threads: int) -> None:
    """Call `work(i)` for i in 0..count-1; PIL decodes without the interpreter's lock, so threads share the cores.

    Args:
        threads: 0 works in the calling thread. The first error is raised after all chunks are done or cancelled.
    """
    if threads == 0 or count < 2:
        for place in range(count):
            work(place)
        return
    step = max(1, min(CHUNK, -(-count // (4 * threads))))

    def span(begin: int) -> None:
        for place in range(begin, min(begin + step, count)):
            work(place)

    with _lock:
        pool = _pools.setdefault(threads, ThreadPoolExecutor(threads, thread_name_prefix="decode"))
    futures = [pool.submit(span, begin) for begin in range(0, count, step)]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()


def decode_many(
    paths: Sequence[str],
    stamps: Sequence[tuple[int, int]],
    size: int,
    threads: int,
    scale: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Many images at once.

    Args:
        scale: (mean, std) [3, 1, 1] float32, to normalise each image while it is in the processor's cache.

    Returns:
        ([B, 3, size, size], uint8 or, normalised, float32; reason by place of those that could not be decoded, whose
        pixels are 0).
    """
    pixels, bad = np.zeros((len(paths), 3, size, size), np.uint8 if scale is None else np.float32), {}

    def work(place: int) -> None:
        try:
            image = decode(paths[place], size, stamps[place])
        except BadImageError as error:
            bad[place] = str(error)
            return
        if scale is None:
            pixels[place] = image
        else:
            np.subtract(image, scale[0], out=pixels[place])
            np.divide(pixels[place], scale[1], out=pixels[place])

    in_threads(work, len(paths), threads)
    return pixels, bad
