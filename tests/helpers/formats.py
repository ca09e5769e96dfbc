"""Tiny datasets in the true formats of the real ones, from random pixels."""

import gzip
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

RANDOM = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def images(count: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8)


def write_mnist(root, labels: np.ndarray, pack: bool = False) -> dict:
    written = {}
    for part in ("train", "t10k"):
        written[part] = images(len(labels), 28, 28)
        for name, array in (("images-idx3", written[part]), ("labels-idx1", labels)):
            data, path = idx_bytes(array), root / f"{part}-{name}-ubyte"
            if pack:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return written


def write_cifar(root, folder: str, names: dict[str, int], key: str, classes: int) -> None:
    """Files of pickled dicts, as the originals: rows of 3,072 bytes, red plane first."""
    (root / folder).mkdir()
    for name, count in names.items():
        entry = {"data": images(count, 3072), key: [i % classes for i in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(entry))
    meta = {"batches.meta": "label_names", "meta": "fine_label_names"}
    for name, entry in meta.items():
        (root / folder / name).write_bytes(pickle.dumps({entry: [str(i) for i in range(classes)]}))


def write_svhn(root: Path, count: int) -> np.ndarray:
    """Two .mat files, which store height, width, channel, sample, and digit 0 as 10; returns [S, H, W, C]."""
    pixels = images(count, 32, 32, 3)
    for part in ("train", "test"):
        labels = np.where(np.arange(count) % 10 == 0, 10, np.arange(count) % 10)[:, None]
        savemat(root / f"{part}_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    return pixels


def photo(width: int = 40, height: int = 30, value: int | None = None) -> Image.Image:
    """A smooth random image, or one of a single grey level."""
    if value is not None:
        return Image.new("RGB", (width, height), (value,) * 3)
    return Image.fromarray(images(6, 8, 3)).resize((width, height))


def write_tree(root: Path, folders: Iterable[str], count: int, names: str = "{}.jpg") -> list[Path]:
    """JPEG files in each of these folders; `names` is filled with the number (and with the folder's last part)."""
    paths = [root / folder / names.format(number, Path(folder).name) for folder in folders for number in range(count)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        photo().save(path, "JPEG")
    return paths
