"""Small inputs that went wrong once: image trees, checkpoints and dataset files, made where a case needs them."""

import gzip
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (200, 40, 200), (40, 200, 200))
RANDOM = np.random.default_rng(0)


def photo(colour: tuple[int, int, int], side: int = 40, noise: int = 30) -> Image.Image:
    """A noisy square of one colour."""
    pixels = np.array(colour) + RANDOM.integers(-noise, noise + 1, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def put(folder: Path, count: int = 10, colour: tuple[int, int, int] = COLOURS[0]) -> None:
    """`count` photos of a colour in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo(colour).save(folder / f"img{number:03d}.jpg")


def tree(
    root: Path, classes: Sequence[str] = ("cat", "dog", "owl"), splits: Sequence[str] = ("",), count: int = 10
) -> Path:
    """A tree of class folders, each class of its own colour; returns its root."""
    for split in splits:
        for number, name in enumerate(classes):
            put(root / split / name, count, COLOURS[number % len(COLOURS)])
    return root


def white_png(path: Path, side: int) -> None:
    """A white image of one bit a pixel: any side in a few kilobytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (1 + side // 8)) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def turned(root: Path) -> Path:
    """A tree whose owls are white on the left as stored and, by their EXIF orientation, on top as shown."""
    tree(root)
    half = np.zeros((40, 40, 3), np.uint8)
    half[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (root / "owl").iterdir():
        Image.fromarray(half).save(path, exif=exif, quality=95)
    return root


def twelve_bits(root: Path) -> Path:
    """A tree whose owls are PNG files of 16 bits that hold values below 4,096."""
    tree(root)
    for path in list((root / "owl").iterdir()):
        path.unlink()
        Image.fromarray(RANDOM.integers(0, 4096, (40, 40)).astype(np.uint16)).save(path.with_suffix(".png"))
    return root


def same_on_both_sides(root: Path) -> Path:
    """A tree whose test images are its training images."""
    tree(root, splits=("train",))
    shutil.copytree(root / "train", root / "test")
    return root


def with_scan(root: Path, side: int) -> Path:
    """A tree with one image of side x side pixels."""
    white_png(tree(root) / "owl/scan.png", side)
    return root


def with_litter(root: Path) -> Path:
    """A tree with what operating systems leave in folders."""
    tree(root)
    (root / "cat/.DS_Store").write_bytes(b"\0\0\0\1Bud1" + b"\0" * 100)
    (root / "cat/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + b"\0" * 500)
    (root / "owl/._img000.jpg").write_bytes(b"\0\5\x16\7" + b"\0" * 200)
    return root


def with_odd_name(root: Path) -> Path:
    """A tree with a class folder whose name is no UTF-8."""
    tree(root)
    (root / "owl").rename(Path(root, b"caf\xe9".decode("utf-8", "surrogateescape")))
    return root


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def mnist(raw: Path, count: int = 400) -> None:
    """MNIST's four files with a bright column for each digit."""
    raw.mkdir(parents=True, exist_ok=True)
    labels = np.arange(count) % 10
    images = RANDOM.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    images[np.arange(count), :, 2 * labels] = 255
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def bomb(raw: Path) -> None:
    """MNIST's files, the training images as a .gz file that holds a gigabyte more than its header says."""
    mnist(raw)
    path = raw / "train-images-idx3-ubyte"
    with gzip.open(path.with_name(path.name + ".gz"), "wb", 1) as packed:
        packed.write(path.read_bytes())
        for _ in range(64):
            packed.write(bytes(1 << 24))
    path.unlink()


def odd_checkpoints(classifier: Path, folder: Path) -> None:
    """Copies of a classifier's file as others would hand it in: bfloat16, prefixed, with NaN, saved by torch."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(classifier, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {name: value for name, value in (file.metadata() or {}).items() if name != "digest"}
    broken = {name: value.clone() for name, value in state.items()}
    broken[[name for name, value in state.items() if value.dim() == 2][-2]][0, 0] = float("nan")
    changes: dict[str, Callable[[], dict]] = {
        "bf16": lambda: {name: value.bfloat16() for name, value in state.items()},
        "module": lambda: {f"module.{name}": value for name, value in state.items()},
        "nan": lambda: broken,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, change in changes.items():
        save_file(change(), folder / f"{name}.safetensors", metadata=facts)
    torch.save(state, folder / "state.pt")
