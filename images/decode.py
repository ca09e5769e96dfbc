"""Decode one image file to the pixels that a viewer shows, or give the reason why it has none. No torch here."""

import ctypes
import errno
import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from core.artifacts import told
from core.choices import MachineError, UserError

EMPTY, UNREADABLE, CHANGED = "empty file", "unreadable", "changed since it was indexed"
FOREIGN, CUT, FLOATS = "not an image", "damaged image", "floating-point pixels"
UNREAD = "format not read"
TOO_LARGE, NO_WHITE = "too many pixels", "32-bit levels, of which none is known to be white"
MAX_PIXELS = 178_956_970  # an image of 512 MiB; the limit of PIL, which stands aside for ours
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine lacks something: no file is to blame
DIGEST = 16
CHUNK = 64
RACE_NS = 20_000_000  # a file or folder changed this shortly before it was read may change again without a new time
READ = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"8BPS": "Photoshop",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
NOT_READ = {
    b"%PDF": "PDF",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "NumPy array",
    b"\x89HDF": "HDF5",
    b"FUJIFILM": "camera raw",
    b"<svg": "SVG",
    b"<!doctype html": "web page",
    b"<html": "web page",
    b"version https://git-lfs": "Git LFS pointer",
}
_BOXES = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
# EXIF orientation -> how the stored square [H, W, C] is turned into the one that is shown.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda square: square[:, ::-1],
    3: lambda square: square[::-1, ::-1],
    4: lambda square: square[::-1],
    5: lambda square: square.transpose(1, 0, 2),
    6: lambda square: square[::-1].transpose(1, 0, 2),
    7: lambda square: square[::-1, ::-1].transpose(1, 0, 2),
    8: lambda square: square[:, ::-1].transpose(1, 0, 2),
}
Image.MAX_IMAGE_PIXELS = None
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


class BadImageError(Exception):
    """A file that gives no pixels; its text is the reason."""


@dataclass(frozen=True)
class How:
    """The settings that decide, beside the bytes of a file, which pixels it gives.

    Args:
        size: side of the square that comes out. max_pixels: an image of more is not decoded.
        sample_bits: grey levels of more than 8 bits end at 2 ** sample_bits - 1 (None: where the file says).
        prepare: makes an array of the opened image, in place of all that is done here: transparency, orientation and
            size are then its own affair.
    """

    size: int
    max_pixels: int = MAX_PIXELS
    sample_bits: int | None = None
    prepare: Callable[[Image.Image], np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size


@dataclass(frozen=True)
class Seen:
    """The pixels of a file, uint8 [3, size, size], and the hash of its bytes, `DIGEST` bytes long.

    bits: how many bits its largest level takes, if it has levels of 16 and does not say which of them is white; else 0.
    """

    pixels: np.ndarray
    digest: bytes
    bits: int


def mark_of(facts: os.stat_result) -> int:
    """64 bits that differ as soon as a file was written, replaced or moved into another's place.

    Times of writing can be set and sizes be equal; a file's number and the time of its last change of any kind cannot.
    """
    return hash((facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)) & (2**64 - 1)


def examine(path: str, how: How, stamp: tuple[int, int] | None = None, hashed: bool = True) -> Seen:
    """Read an image file; JPEG is decoded at the smallest scale (1, 1/2, 1/4, 1/8) that still covers the size.

    Args:
        stamp: (bytes, mark) it must still have. hashed: False leaves the digest empty.

    Raises:
        BadImageError: it cannot be opened or decoded, or was changed.
        MachineError: memory or file handles are lacking.
    """
    try:
        with Path(path).open("rb") as file:
            facts = os.fstat(file.fileno())
            if stamp is not None and (facts.st_size, mark_of(facts)) != stamp:
                raise BadImageError(CHANGED)
            if facts.st_size == 0:
                raise BadImageError(EMPTY)
            # The system's clock of changes ticks every few milliseconds: within the tick of this file's last change,
            # other bytes could be written after these were read, and its mark would stay the same.
            age = time.time_ns() - facts.st_ctime_ns
            if 0 <= age < RACE_NS:
                time.sleep((RACE_NS - age) / 1e9)
            digest = hashlib.file_digest(file, "sha256").digest()[:DIGEST] if hashed else b""
            file.seek(0)
            pixels, bits = _pixels(file, how)
            if mark_of(os.fstat(file.fileno())) != mark_of(facts):
                raise BadImageError(CHANGED)
            return Seen(pixels, digest, bits)
    except MemoryError:
        raise MachineError(
            f"not enough memory to decode {path}: free some, decode fewer at a time (--data.num-workers), or leave "
            "out what is as large (--data.max-pixels)"
        ) from None
    except OSError as error:
        raise_if_machine(error, path)
        raise BadImageError(f"{UNREADABLE} ({error.strerror})") from None


def raise_if_machine(error: OSError, path: str) -> None:
    """Raise `MachineError` if the machine, not the file, is to blame: what it cannot read now may be a good image."""
    if error.errno in MACHINE:
        with told(Path(path), "read"):
            raise error


def decode(path: str, how: How, stamp: tuple[int, int] | None = None) -> np.ndarray:
    """Return the pixels alone, uint8 [3, size, size]. Raises as `examine` does."""
    return examine(path, how, stamp, hashed=False).pixels


def _pixels(file: IO[bytes], how: How) -> tuple[np.ndarray, int]:
    """Decode an open file. PIL meets damage with errors of a dozen kinds, all of which mean the same here."""
    _hush()
    try:
        image = Image.open(file)
    except Exception as error:
        _raise_if_of_the_system(error)
        raise BadImageError(_why_not(file, error)) from None
    width, height = image.size
    if width * height > how.max_pixels:
        raise BadImageError(f"{TOO_LARGE} ({width} x {height}: raise --data.max-pixels to read it)")
    try:
        if how.prepare is not None:
            return how.prepare(image), 0
        image.draft("RGB", (how.size, how.size))
        sixteen = ";16" in str(image.tile)
        square, bits = _square(image, file, how)
        if sixteen and image.mode in ("RGB", "RGBA"):  # PIL keeps the upper half of each level
            bits = int(square.max()).bit_length() + 8
        return np.ascontiguousarray(_turned(square, image).transpose(2, 0, 1)), bits
    except BadImageError:
        raise
    except UserError as error:
        raise BadImageError(str(error)) from None
    except Exception as error:
        _raise_if_of_the_system(error)
        raise BadImageError(f"{CUT} ({_told(error)})") from None


def _raise_if_of_the_system(error: Exception) -> None:
    """Raise what the disk or the memory did, which is no damage of the file; PIL's own errors have no number."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        raise error


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _why_not(file: IO[bytes], error: Exception) -> str:
    """Say why PIL cannot open a file, judged by its first bytes."""
    file.seek(0)
    head = file.read(4096)
    if head[4:8] == b"ftyp" and head[8:12] in _BOXES:
        return f"{UNREAD} (HEIC: convert it to JPEG or PNG)"
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis"):
        return f"{UNREAD} (film: take frames out of it)"
    if head[128:132] == b"DICM":
        return f"{UNREAD} (DICOM: convert it to PNG)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<?xml") and b"<svg" in text:
        return f"{UNREAD} (SVG: convert it to JPEG or PNG)"
    for start, name in NOT_READ.items():
        if head.startswith(start) or text.startswith(start):
            what = "run `git lfs pull`" if "LFS" in name else "convert or remove it"
            return f"{UNREAD} ({name}: {what})"
    for start, name in READ.items():
        if head.startswith(start):
            told = "" if isinstance(error, UnidentifiedImageError) else f": {_told(error)}"
            return f"{CUT} (begins as {name}, and cannot be opened{told})"
    return FOREIGN


def _square(image: Image.Image, file: IO[bytes], how: How) -> tuple[np.ndarray, int]:
    """Cut the centre square and scale it: uint8 [size, size, 3], transparent parts on white; and `Seen.bits`."""
    bits = 0
    if image.mode == "F":
        raise BadImageError(FLOATS)
    if image.mode.startswith("I"):
        image, bits = _eight_bit(image, file, how.sample_bits)
    elif image.has_transparency_data:
        image = image.convert("RGBA").convert("RGBa")  # times alpha: what is invisible bleeds into no neighbour
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    small = image.resize((how.size, how.size), Image.Resampling.BILINEAR, box)
    if small.mode == "RGBa":
        levels = np.asarray(small).astype(np.uint16)
        return (levels[..., :3] + (255 - levels[..., 3:])).clip(0, 255).astype(np.uint8), bits
    return np.asarray(small if small.mode == "RGB" else small.convert("RGB")), bits


def _eight_bit(image: Image.Image, file: IO[bytes], given: int | None) -> tuple[Image.Image, int]:
    """Scale grey levels of more than 8 bits to 8, where PIL would clip at 255; also return `Seen.bits`."""
    levels = np.asarray(image)
    if levels.dtype != np.uint16:
        levels = levels.clip(0, 65535).astype(np.uint16)
    largest = int(levels.max(initial=0))
    white = 2**given - 1 if given else _white(image, file, levels)
    table = ((np.arange(65536).clip(0, white or 65535) * 255 + (white or 65535) // 2) // (white or 65535)).astype(
        np.uint8
    )
    if image.format == "TIFF" and _tag(image, 262) == 0:  # WhiteIsZero
        table = 255 - table
    return Image.fromarray(table[levels]), 0 if white else largest.bit_length()


def _tag(image: Image.Image, number: int) -> int | None:
    """Return the first value of a TIFF tag, if it is there and a whole number."""
    value = image.tag_v2.get(number)  # ty: ignore[missing-attribute]
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _white(image: Image.Image, file: IO[bytes], levels: np.ndarray) -> int | None:
    """Read from the file which level is white; None: the file does not say, and a viewer takes 65,535.

    Raises:
        BadImageError: levels of 32 bits.
    """
    if image.format == "TIFF":
        bits, largest = _tag(image, 258) or 1, _tag(image, 281)
        if largest is not None and levels.max(initial=0) <= largest <= 65535:
            return largest
        if bits > 16:
            raise BadImageError(f"{NO_WHITE} (say how many bits are used with --data.sample-bits)")
        signed = _tag(image, 339) == 2
        return None if bits == 16 and not signed else 2 ** (bits - signed) - 1
    if image.format == "PNG" and (bits := _significant_bits(file)) and bits < 16:
        # By the standard the upper bits of a level are the significant ones. Some writers use the lower ones.
        shifted = levels.max(initial=0) < 2**bits and bool((levels % 2 ** (16 - bits)).any())
        return 2**bits - 1 if shifted else 65535
    return None


def _significant_bits(file: IO[bytes]) -> int | None:
    """Read how many significant bits a PNG's sBIT chunk gives for the first channel."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT":
            return (file.read(1) or b"\0")[0]
        file.seek(length + 4, os.SEEK_CUR)
    return None


def _turned(square: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn a centre square as the EXIF orientation of the (loaded) image says."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception as error:  # damaged EXIF data, of which viewers make nothing either
        _raise_if_of_the_system(error)
        orientation = None
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return turn(square) if turn else square


# --- what libraries print ---------------------------------------------------------------------------------


def _hush() -> None:
    """Keep PIL's warnings (odd metadata; damage is an error) off the log: one a file would bury all else.

    Asked for with each image, since `warnings.catch_warnings` anywhere in the process undoes it.
    """
    _hush_libtiff()
    if not warnings.filters or warnings.filters[0][3] is None or warnings.filters[0][3].pattern != r"PIL\.":
        warnings.filterwarnings("ignore", module=r"PIL\.")


@lru_cache(maxsize=1)
def _hush_libtiff() -> None:
    """Take the printing handlers out of the libtiff that PIL brings; its errors come as exceptions as well."""
    for library in (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libtiff*"):
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            handler = getattr(ctypes.CDLL(str(library)), name)
            handler.restype = ctypes.c_void_p
            handler(None)


# --- many files -------------------------------------------------------------------------------------------


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
    paths: Sequence[str], stamps: Sequence[tuple[int, int]], how: How, threads: int
) -> tuple[np.ndarray, dict[int, str]]:
    """Many images at once.

    Returns:
        (uint8 [B, 3, size, size], reason by place of those that could not be decoded, whose pixels are 0).
    """
    pixels, bad = np.zeros((len(paths), *how.shape), np.uint8), {}

    def work(place: int) -> None:
        try:
            pixels[place] = decode(paths[place], how, stamps[place])
        except BadImageError as error:
            bad[place] = str(error)

    in_threads(work, len(paths), threads)
    return pixels, bad
