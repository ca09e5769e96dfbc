"""Specify each dataset in one place, and read the files of those that fit into memory."""

import gzip
import math
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from core.choices import Registry, SupportedDatasets, UserError, at_home
from core.config import derive_seed
from imagenet_classes import IMAGENET2012_CLASSES

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

FASHION_NAMES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_NAMES = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
    *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
    *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur"),
    *("dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
    *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree"),
    *("plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket"),
    *("rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger"),
    *("tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
)

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [S, C, H, W], labels int64 [S]
MOST_BYTES = 2**30  # of a dataset that is held in memory; a .gz of 1 MB can unpack to as much
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


# --- formats ----------------------------------------------------------------------------------------------


def read_idx(path: Path, item: tuple[int, ...] | None = None) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or beside it as `.gz`.

    No more is read, or unpacked, than its header says, and no more than `MOST_BYTES`.

    Args:
        item: shape of one item that is needed, () for numbers (None: any).

    Raises:
        FileNotFoundError: neither file is there. ValueError: wrong magic number, shape or length, or a damaged .gz.
    """
    packed = path.with_name(path.name + ".gz")
    path = path if path.is_file() else packed
    with path.open("rb") as plain, gzip.open(plain) if path == packed else nullcontext(plain) as file:
        try:
            shape = _idx_shape(file.read(4), file.read, path.name)
            if item is not None and shape[1:] != item:
                raise ValueError(f"{path.name} holds items of shape {shape[1:]}, needed is {item}")
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise ValueError(f"{path.name} says that it holds {size} bytes, more than any dataset of its kind")
            data = bytearray()
            while len(data) <= size and (block := file.read(min(2**20, size + 1 - len(data)))):
                data += block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path.name} is damaged: {error}") from None
    if len(data) != size:
        found = "more than that" if len(data) > size else f"only {len(data)}"
        raise ValueError(f"{path.name} should hold {size} bytes of data by its header, and holds {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(magic: bytes, read: Callable[[int], bytes], name: str) -> tuple[int, ...]:
    """Read the shape from an IDX file's header; `read` continues behind the magic number."""
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] == 0:
        raise ValueError(f"{name} is empty" if not magic else f"{name} does not begin like an IDX file of bytes")
    sizes = read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise ValueError(f"{name} ends within its header")
    return tuple(int.from_bytes(sizes[place : place + 4], "big") for place in range(0, len(sizes), 4))


def _read_mnist(root: Path, train: bool) -> Arrays:
    part = "train" if train else "t10k"
    images = read_idx(root / f"{part}-images-idx3-ubyte", (28, 28))
    return images[:, None], read_idx(root / f"{part}-labels-idx1-ubyte", ()).astype(np.int64)


def digits_file() -> Path:
    """Find the file of scikit-learn that holds the digits; the package itself, which takes seconds, is not imported.

    Raises:
        UserError: scikit-learn is not installed, or has no such file.
    """
    found = find_spec("sklearn")
    path = Path(found.origin).parent / "datasets/data/digits.csv.gz" if found and found.origin else None
    if path is None or not path.is_file():
        where = f"there is no {path}" if path else "scikit-learn is not there"
        raise UserError(f"DIGITS lies inside scikit-learn, and {where}: install scikit-learn 1.6 or later, by pip")
    return path


def _read_digits(root: Path, train: bool) -> Arrays:
    table = np.loadtxt(digits_file(), delimiter=",")  # a row an image: 64 pixels from 0 to 16, and the label
    images = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    labels = table[:, -1].astype(np.int64)
    test, rest = stratified(labels, 0.2, derive_seed(0, "DIGITS", "test"))
    chosen = rest if train else test
    return images[chosen], labels[chosen]


def _read_cifar10(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import CIFAR10

    class Here(CIFAR10):
        base_folder = ""

    data = Here(str(root), train=train, download=False)
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets, np.int64)


def _read_cifar100(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import CIFAR100

    class Here(CIFAR100):
        base_folder = ""

    data = Here(str(root), train=train, download=False)
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets, np.int64)


def _read_svhn(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import SVHN

    data = SVHN(str(root), split="train" if train else "test", download=False)
    return data.data, data.labels.astype(np.int64)


# --- specs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSpec:
    """All that is known of one dataset.

    Either `read(root, train)` gives uint8 images [S, C, H, W] and labels [S] of an official split, or `layout` says how
    a tree of image files is laid out (see `image_tree`), which is decoded batch by batch.
    """

    channels: int
    size: int
    """Side of the square images [C, size, size]; a tree's are scaled to it."""
    folder: str = ""
    """Default place: below datasets/, or with a leading ~ anywhere."""
    files: str = "none"
    """The files that are needed there."""
    licence: str = "not stated"
    source: str = "not stated"
    """Where it comes from, for those who fetch it by hand."""
    read: Callable[[Path, bool], Arrays] | None = None
    layout: str = ""
    classes: tuple[str, ...] = ()
    """Class names in label order; empty: those of the tree's folders, sorted."""
    ids: tuple[str, ...] = ()
    """Other names by which a class may be called."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Normalisation, levels 0..255 per channel; empty: measured on the training images."""
    torchvision: str = ""
    """Class of torchvision that downloads it."""
    inner: str = ""
    """Folder in which torchvision keeps its files."""
    marker: str = ""
    """A file (plain or .gz) by which that folder is known."""
    hub: str = ""
    """Dataset of the Hugging Face hub that holds it."""
    pooled: bool = False
    """Draw the splits anew from all images, whatever splits the files lie in."""
    expected_classes: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: a folder tree decides."""
        return len(self.classes)


_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz"
_TREE = "{train,test}/<class>/ with image files"
_tree = partial(DatasetSpec, 3, 128, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))  # of ImageNet
SPECS: Registry[DatasetSpec] = Registry("dataset", SupportedDatasets)
"""By name."""


def dataset(name: str, spec: DatasetSpec) -> SupportedDatasets:
    """Register a dataset.

    Raises:
        ValueError: the name is taken, or the spec says neither or both of how arrays are read and how a tree is laid
            out, or arrays without the names of their classes.
    """
    if (spec.read is None) == (not spec.layout) or (spec.read and not spec.classes):
        raise ValueError(f"dataset {name!r} needs either `read` and the names of its `classes`, or a `layout`")
    SPECS.add(name, spec, sys._getframe(1).f_globals["__name__"])  # a spec of a tree holds nothing that says it
    return SupportedDatasets[name]


dataset(
    "DIGITS",
    DatasetSpec(
        *(1, 8, "", "none (inside scikit-learn)", "CC BY 4.0 (UCI)", "sklearn.datasets.load_digits"),
        *(_read_digits, "", DIGIT_NAMES),
    ),
)
dataset(
    "FASHION_MNIST",
    DatasetSpec(
        *(1, 28, "FashionMNIST/raw", _IDX, "MIT", "https://github.com/zalandoresearch/fashion-mnist"),
        *(_read_mnist, "", FASHION_NAMES),
        torchvision="FashionMNIST",
        inner="raw",
        marker="train-images-idx3-ubyte",
    ),
)
dataset(
    "MNIST",
    DatasetSpec(
        *(1, 28, "MNIST/raw", _IDX, "CC BY-SA 3.0", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        *(_read_mnist, "", DIGIT_NAMES),
        torchvision="MNIST",
        inner="raw",
        marker="train-images-idx3-ubyte",
    ),
)
dataset(
    "CIFAR10",
    DatasetSpec(
        *(3, 32, "", "cifar-10-batches-py/", "none stated", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        *(_read_cifar10, "", CIFAR10_NAMES),
        torchvision="CIFAR10",
        inner="cifar-10-batches-py",
        marker="data_batch_1",
    ),
)
dataset(
    "CIFAR100",
    DatasetSpec(
        *(3, 32, "", "cifar-100-python/", "none stated", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        *(_read_cifar100, "", CIFAR100_NAMES),
        torchvision="CIFAR100",
        inner="cifar-100-python",
        marker="train",
    ),
)
dataset(
    "SVHN",
    DatasetSpec(
        *(3, 32, "", "{train,test}_32x32.mat", "non-commercial use", "http://ufldl.stanford.edu/housenumbers/"),
        *(_read_svhn, "", DIGIT_NAMES),
        torchvision="SVHN",
        marker="train_32x32.mat",
    ),
)
dataset(
    "IMAGENET_SMALL",
    _tree(
        folder="~/Datasets/ImageNet-small",
        files="{train,val}*/ with n01440764/*.JPEG or *_n01440764.JPEG, or the same as *.tar.gz",
        licence="non-commercial research, terms of image-net.org",
        source="https://huggingface.co/datasets/ILSVRC/imagenet-1k (accept the terms, set HF_TOKEN in .env)",
        layout="wnids",
        classes=tuple(IMAGENET2012_CLASSES.values()),
        ids=tuple(IMAGENET2012_CLASSES),
        hub="ILSVRC/imagenet-1k",
    ),
)
dataset(
    "PLANT_CLASSIFICATION",
    _tree(
        folder="~/Datasets/Plant-classification",
        files=_TREE,
        licence="as its source says",
        source="the dataset's own page",
        layout="folders",
        expected_classes=64,
    ),
)
dataset(
    "POKEMON_CLASSIFICATION",
    _tree(
        folder="~/Datasets/Pokemon-classification",
        files="{train,valid,test}/<class>/ with image files, or the same as .zip or .parquet",
        licence="as its source says",
        source="https://huggingface.co/datasets/keremberke/pokemon-classification",
        layout="folders",
        hub="keremberke/pokemon-classification",
        pooled=True,
    ),
)
dataset(
    "FOLDER",
    _tree(
        folder="images",
        files="<class>/ or {train,test}/<class>/ with image files",
        licence="yours",
        source="yours: name it with --dataset-path",
        layout="folders",
    ),
)


def dataset_root(dataset: SupportedDatasets, dataset_path: Path | None, datasets_dir: Path) -> Path:
    """Return where a dataset lies: the given folder, or its usual place."""
    folder = SPECS[dataset].folder
    if dataset_path is not None:
        return at_home(dataset_path)
    if dataset is SupportedDatasets.FASHION_MNIST and DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    return at_home(Path(folder)) if folder.startswith("~") else datasets_dir / folder


def how_to_get(dataset: SupportedDatasets) -> str:
    """Return the command that gets a dataset, or where it is."""
    spec = SPECS[dataset]
    if dataset is SupportedDatasets.FOLDER:
        return "name it with --dataset-path"
    if not spec.torchvision and not spec.hub:
        return "nothing to get" if spec.read else f"put it there by hand: {spec.source}"
    get = f"get it with `uv run main.py download {dataset.value}`"
    return f"{get}, or on Debian `apt-get install dataset-fashion-mnist`" if dataset == "FASHION_MNIST" else get


def _places(spec: DatasetSpec, root: Path) -> list[Path]:
    """List where a dataset's files may lie below a folder: torchvision's ROOT, ROOT/<Name>, or the files' own folder.

    A folder <Name> may be written in any case, and with dashes.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\W_]", "", name).casefold()

    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    named = [path for path in below if plain(path.name) == plain(spec.torchvision)] or [root / spec.torchvision]
    places = [root, root / spec.inner, *named, *(path / spec.inner for path in named)]
    return list(dict.fromkeys(places))


def _place(dataset: SupportedDatasets, root: Path) -> Path:
    """Return the folder that holds a dataset's files.

    Raises:
        UserError: it is none of those where they are looked for.
    """
    spec = SPECS[dataset]
    if not spec.marker:
        return root
    places = _places(spec, root)
    for place in places:
        if _holds(spec.marker, place):
            return place
    looked = f"no {spec.marker} in {', '.join(map(str, places))}" if root.is_dir() else f"there is no folder {root}"
    raise UserError(f"cannot read {dataset.value} ({looked}): it needs {spec.files}; {how_to_get(dataset)}")


def _holds(marker: str, place: Path) -> bool:
    return any((place / name).is_file() for name in (marker, f"{marker}.gz"))


def read_arrays(dataset: SupportedDatasets, root: Path, train: bool) -> Arrays:
    """Read one official split and check it against the spec.

    Raises:
        UserError: files are missing or damaged, or hold something else.
    """
    spec, get = SPECS[dataset], how_to_get(dataset)
    assert spec.read is not None
    root = _place(dataset, root)
    try:
        images, labels = spec.read(root, train)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AssertionError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {dataset.value} in {root} ({what}): it needs {spec.files}; {get}") from None
    shape = (spec.channels, spec.size, spec.size)
    if images.shape[1:] != shape or len(images) != len(labels):
        found = f"{len(images)} images {images.shape[1:]} and {len(labels)} labels"
        raise UserError(f"{dataset.value} in {root} holds {found}, needed are as many of each, {shape}: {get}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= spec.num_classes:
        found = f"labels {labels.min()}..{labels.max()}" if len(labels) else "no images"
        raise UserError(f"{dataset.value} in {root} holds {found}, needed are 0..{spec.num_classes - 1}: {get}")
    return images, labels


# --- samples ---------------------------------------------------------------------------------------------


def stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices class by class into `share` of each class (at least one) and the rest, both sorted.

    Args:
        labels: int [S]. share: 0..1. seed: of the choice.

    Returns:
        (chosen [A], rest [S - A]).
    """
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(share * len(members)))]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
