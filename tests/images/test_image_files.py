"""One image file: pixels are what a viewer shows, and what gives none says why."""

import errno
import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.choices import MachineError
from core.config import PROJECT_ROOT
from images.decode import RACE_NS, BadImageError, How, decode, examine, in_threads, mark_of
from tests.helpers.formats import images, photo


def shown(path, size=16):
    return decode(str(path), How(size))


def reason(path, **how):
    with pytest.raises(BadImageError) as error:
        decode(str(path), How(16, **how))
    return str(error.value)


# --- as a viewer shows them -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (400, 300)])  # JPEG of the last is decoded at a smaller scale
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied(tmp_path, suffix, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    photo(*size).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {"quality": 95}))
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    side = min(size)
    left, top = (turned.width - side) / 2, (turned.height - side) / 2
    wanted = turned.resize((16, 16), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    assert np.abs(shown(path).astype(int) - np.asarray(wanted).transpose(2, 0, 1)).mean() < 5  # another turn: 40


CLEAR = np.zeros((16, 16, 4), np.uint8)  # red, whose left half cannot be seen and whose lowest rows are half there
CLEAR[..., 0] = 200
CLEAR[:, 8:, 3] = 255
CLEAR[12:, 8:, 3] = 51


def with_alpha(mode, path):
    image = Image.fromarray(CLEAR)
    if mode == "P":
        indices = np.zeros((16, 16), np.uint8)
        indices[:, 8:], indices[12:, 8:] = 1, 2
        palette = Image.fromarray(indices, "L")
        image = palette.convert("P")
        image.putpalette([200, 0, 0] * 256)
        image.save(path, transparency=bytes([0, 255, 51]))
    elif mode == "LA":
        Image.merge("LA", (image.getchannel("R"), image.getchannel("A"))).save(path)
    else:
        image.save(path, lossless=True)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("P", "png"), ("LA", "png")]
)
def test_transparent_parts_lie_on_white(tmp_path, mode, suffix):
    with_alpha(mode, tmp_path / f"a.{suffix}")
    red, green, _ = shown(tmp_path / f"a.{suffix}").astype(int)
    assert (red[:, :8] == 255).all()
    assert (green[:, :8] == 255).all()
    assert (red[:12, 8:] == 200).all()
    assert np.abs(red[12:, 8:] - (255 * 0.8 + 200 * 0.2)).max() <= 1
    assert (green[:12, 8:] == (200 if mode == "LA" else 0)).all()


def test_hidden_colours_bleed_into_no_neighbour(tmp_path):
    """Green that cannot be seen beside red that can, shrunk to one pixel: half red, half white, no green."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4], pixels[:, 4:] = (0, 255, 0, 0), (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(shown(tmp_path / "a.png", 1)[:, 0, 0].astype(int) - (255, 128, 128)).max() <= 2


def test_a_colour_that_stands_for_transparent(tmp_path):
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "a.png", transparency=(1, 2, 3))
    Image.new("L", (9, 9), 7).save(tmp_path / "b.png", transparency=7)
    for name in ("a.png", "b.png"):
        assert (shown(tmp_path / name) == 255).all()


def test_white_cmyk_is_white(tmp_path):
    Image.new("CMYK", (9, 9), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert (shown(tmp_path / "a.jpg") >= 254).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_plain_images_are_those_of_pil(tmp_path, mode):
    image = photo(64, 48).convert(mode)
    image.save(tmp_path / "a.png")
    wanted = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR, (8, 0, 56, 48))
    assert (shown(tmp_path / "a.png") == np.asarray(wanted).transpose(2, 0, 1)).all()


# --- more than 8 bits -------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_sbit(path, levels, bits):
    """A 16-bit grey PNG that says how many bits are significant."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    data = buffer.getvalue()
    path.write_bytes(data[:33] + chunk(b"sBIT", bytes([bits])) + data[33:])


RAMP12 = np.linspace(0, 4095, 256).round().astype(np.uint16).reshape(16, 16)
RAMP8 = np.round(RAMP12 / 4095 * 255)


def near_the_ramp(pixels):
    return np.abs(pixels[0].astype(int) - RAMP8).max() <= 1


def test_levels_are_scaled_to_where_white_is(tmp_path):
    wide = (RAMP12.astype(int) * 65535 // 4095).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "full.png")
    Image.fromarray(RAMP12).save(tmp_path / "told.tif", tiffinfo={281: 4095})
    Image.fromarray(65535 - wide).save(tmp_path / "inverse.tif", tiffinfo={262: 0})
    write_sbit(tmp_path / "low.png", RAMP12, 12)  # wrong by the standard, and what cameras' tools write
    write_sbit(tmp_path / "high.png", RAMP12 << 4, 12)  # right by the standard
    (tmp_path / "full.pgm").write_bytes(b"P5 16 16 4095\n" + RAMP12.astype(">u2").tobytes())
    for name in ("full.png", "told.tif", "inverse.tif", "low.png", "high.png", "full.pgm"):
        assert near_the_ramp(shown(tmp_path / name)), name


def test_levels_of_12_bits_that_nothing_tells_are_dark_and_noted(tmp_path):
    Image.fromarray(RAMP12).save(tmp_path / "a.png")
    seen = examine(str(tmp_path / "a.png"), How(16))
    assert seen.pixels.max() == 16  # as a viewer shows it
    assert seen.bits == 12
    meant = examine(str(tmp_path / "a.png"), How(16, sample_bits=12))
    assert near_the_ramp(meant.pixels)
    assert meant.bits == 0


def test_levels_of_32_bits_have_no_white(tmp_path):
    Image.fromarray(RAMP12.astype(np.int32)).save(tmp_path / "a.tif")
    assert "of which none is known to be white" in reason(tmp_path / "a.tif")
    assert near_the_ramp(decode(str(tmp_path / "a.tif"), How(16, sample_bits=12)))


# --- why not ----------------------------------------------------------------------------------------------

JPEG = io.BytesIO()
photo(64, 48).save(JPEG, "JPEG")
FILES = {
    "a.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "format not read (HEIC: convert"),
    "a.jxl": (b"\xff\x0a" + bytes(99), "format not read (JPEG XL"),
    "a.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "format not read (SVG"),
    "b.svg": (b"<svg/>", "format not read (SVG"),
    "a.pdf": (b"%PDF-1.4", "format not read (PDF"),
    "a.mp4": (b"\0\0\0\x18ftypisom" + bytes(99), "format not read (film"),
    "a.npy": (b"\x93NUMPY" + bytes(99), "format not read (NumPy array"),
    "a.jpg": (b"\n<!DOCTYPE html><html>404", "format not read (web page"),
    "b.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "format not read (Git LFS pointer: run `git lfs pull`"),
    "c.jpg": (JPEG.getvalue()[:40], "damaged image (begins as JPEG"),
    "d.jpg": (JPEG.getvalue()[:-40], "damaged image (image file is truncated"),
    "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged image (begins as PNG"),
    "a.txt": (b"hello", "not an image"),
    "b.txt": (b"", "empty file"),
}


@pytest.mark.parametrize("name", FILES)
def test_reasons(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name][0])
    assert reason(tmp_path / name).startswith(FILES[name][1])


def test_too_many_pixels_is_a_limit_that_can_be_lifted(tmp_path):
    photo(40, 30).save(tmp_path / "a.png")
    assert reason(tmp_path / "a.png", max_pixels=1199) == (
        "too many pixels (40 x 30: raise --data.max-pixels to read it)"
    )
    decode(str(tmp_path / "a.png"), How(16, max_pixels=1200))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_machine_lacks_is_no_fault_of_the_file(tmp_path, monkeypatch, number):
    photo().save(tmp_path / "a.png")

    def lacks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", lacks)
    with pytest.raises(MachineError, match=rf"a.png \({os.strerror(number)}\): .* and run again"):
        decode(str(tmp_path / "a.png"), How(16))


def test_memory_that_is_lacking_is_no_damage(tmp_path, monkeypatch):
    photo().save(tmp_path / "a.png")

    def lacks(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", lacks)
    with pytest.raises(MachineError, match=r"not enough memory .*a.png: free some"):
        decode(str(tmp_path / "a.png"), How(16))


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    photo().save(tmp_path / "a.png")

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Image.Image, "resize", fails)
    assert reason(tmp_path / "a.png") == "unreadable (Input/output error)"


LOUD = """
import sys
import time
from images.decode import BadImageError, How, decode, in_threads
def one(place):
    try:
        decode(sys.argv[1 + place], How(16))
    except BadImageError as error:
        print(error)
in_threads(one, len(sys.argv) - 1, 2)
"""


@pytest.mark.slow
def test_libraries_say_nothing(tmp_path):
    """Neither Python's warnings of PIL nor what libtiff prints by itself."""
    Image.fromarray(images(300, 300, 3)).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[2000:2400] = b"\xff\0" * 200
    (tmp_path / "a.tif").write_bytes(data)
    photo().save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    Image.new("1", (11000, 11000)).save(tmp_path / "c.png")
    (tmp_path / "d.tif").write_bytes(bytes(data[: len(data) // 2]))
    photo().convert("P").save(tmp_path / "e.png", transparency=b"\0\x80")
    paths = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-c", LOUD, *paths]
    run = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "damaged image (decoder error" in run.stdout


def test_the_filter_of_warnings_is_set_once(tmp_path):
    photo().save(tmp_path / "a.png")
    with warnings.catch_warnings():
        before = len(warnings.filters)
        for _ in range(5):
            decode(str(tmp_path / "a.png"), How(16))
        assert len(warnings.filters) <= before + 1


def test_work_in_threads_raises_its_first_error():
    def work(place):
        if place == 70:
            raise BadImageError("seventy")

    with pytest.raises(BadImageError, match="seventy"):
        in_threads(work, 200, 2)


# --- files that change ------------------------------------------------------------------------------------


def test_bytes_are_read_only_when_another_change_would_show(tmp_path, monkeypatch):
    """Two changes within one tick of the system's clock have one time: a file that was just written is waited for."""
    path, begun = tmp_path / "a.png", []
    digest = hashlib.file_digest

    def noted(file, name):
        begun.append(time.time_ns() - os.fstat(file.fileno()).st_ctime_ns)
        return digest(file, name)

    monkeypatch.setattr("images.decode.hashlib.file_digest", noted)
    for level in range(3):
        Image.new("RGB", (20, 20), (level, 9, 9)).save(path)
        before = mark_of(path.stat())
        assert (examine(str(path), How(16)).pixels[0] == level).all()
        Image.new("RGB", (20, 20), (200, 9, 9)).save(path)  # as many bytes, at once
        assert mark_of(path.stat()) != before
    assert min(begun) >= RACE_NS
