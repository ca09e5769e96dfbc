"""Image datasets by name, and their splits: train / val / test, and in each the forget and the retain set.

Nothing here downloads unless `download` is called. Images stay uint8 in memory; loaders normalise batches.
"""

import gzip
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from artifacts import sha256_arrays
from config import DataConfig, SupportedDatasets, UserError, as_tuple, derive_seed

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [S, C, H, W], labels int64 [S]
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SPLITS = ("train", "val", "test")


# --- reading ----------------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or beside it as `.gz`.

    Raises:
        FileNotFoundError: neither file is there. ValueError: wrong magic number or length.
    """
    packed = path.with_name(path.name + ".gz")
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} does not begin like an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(np.int64)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path.name} holds {values.size} bytes of data, its header says {shape.prod()}")
    return values.reshape(shape)


def _read_mnist(root: Path, train: bool) -> Arrays:
    part = "train" if train else "t10k"
    images = read_idx(root / f"{part}-images-idx3-ubyte")
    return images[:, None], read_idx(root / f"{part}-labels-idx1-ubyte").astype(np.int64)


def _read_digits(root: Path, train: bool) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)
    labels = digits.target.astype(np.int64)
    test, rest = stratified(labels, 0.2, derive_seed(0, "DIGITS", "test"))
    chosen = rest if train else test
    return images[chosen], labels[chosen]


def _read_cifar10(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(root), train=train, download=False)
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets, np.int64)


def _read_cifar100(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import CIFAR100

    data = CIFAR100(str(root), train=train, download=False)
    return data.data.transpose(0, 3, 1, 2), np.asarray(data.targets, np.int64)


def _read_svhn(root: Path, train: bool) -> Arrays:
    from torchvision.datasets import SVHN

    data = SVHN(str(root), split="train" if train else "test", download=False)
    return data.data, data.labels.astype(np.int64)


def _fetch(name: str) -> Callable[[Path], None]:
    """A function that lets torchvision download one of its datasets below a folder."""

    def fetch(root: Path) -> None:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, name)
        for part in ({"split": "train"}, {"split": "test"}) if name == "SVHN" else ({},):
            kind(str(root), download=True, **part)

    return fetch


@dataclass(frozen=True)
class DatasetSpec:
    """All that is known of one dataset. `read(root, train)` gives uint8 images [S, C, H, W] and labels [S]."""

    num_classes: int
    channels: int
    size: int
    folder: str
    files: str
    read: Callable[[Path, bool], Arrays] | None
    fetch: Callable[[Path], None] | None = None


_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz"
SPECS: dict[SupportedDatasets, DatasetSpec] = {
    SupportedDatasets.DIGITS: DatasetSpec(10, 1, 8, "", "none (inside scikit-learn)", _read_digits),
    SupportedDatasets.FASHION_MNIST: DatasetSpec(
        10, 1, 28, "FashionMNIST/raw", _IDX, _read_mnist, _fetch("FashionMNIST")
    ),
    SupportedDatasets.MNIST: DatasetSpec(10, 1, 28, "MNIST/raw", _IDX, _read_mnist, _fetch("MNIST")),
    SupportedDatasets.CIFAR10: DatasetSpec(10, 3, 32, "", "cifar-10-batches-py/", _read_cifar10, _fetch("CIFAR10")),
    SupportedDatasets.CIFAR100: DatasetSpec(100, 3, 32, "", "cifar-100-python/", _read_cifar100, _fetch("CIFAR100")),
    SupportedDatasets.SVHN: DatasetSpec(10, 3, 32, "", "{train,test}_32x32.mat", _read_svhn, _fetch("SVHN")),
    SupportedDatasets.IMAGENET_SMALL: DatasetSpec(1000, 3, 128, "", "", None),
    SupportedDatasets.PLANT_CLASSIFICATION: DatasetSpec(64, 3, 128, "", "", None),
    SupportedDatasets.POKEMON_CLASSIFICATION: DatasetSpec(150, 3, 128, "", "", None),
}


def dataset_spec(dataset: SupportedDatasets) -> DatasetSpec:
    """The spec of a dataset that can be read.

    Raises:
        UserError: its loading is not available yet.
    """
    spec = SPECS[dataset]
    if spec.read is None:
        able = ", ".join(name.value for name, other in SPECS.items() if other.read)
        raise UserError(f"{dataset.value} is not available yet: choose one of {able}")
    return spec


def _default_root(dataset: SupportedDatasets, datasets_dir: Path) -> Path:
    if dataset is SupportedDatasets.FASHION_MNIST and DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    return datasets_dir / SPECS[dataset].folder


def _read(dataset: SupportedDatasets, root: Path, train: bool) -> Arrays:
    """Read one official split and check it against the spec."""
    spec = dataset_spec(dataset)
    assert spec.read is not None
    get = f"get it with `uv run main.py download {dataset.value}`"
    if dataset is SupportedDatasets.FASHION_MNIST:
        get += ", or on Debian `apt-get install dataset-fashion-mnist`"
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


def download(dataset: SupportedDatasets, datasets_dir: Path) -> Path:
    """Fetch a dataset below `datasets_dir`, whole or not at all; returns where it lies.

    Raises:
        UserError: it comes by another way, or the download failed.
    """
    spec = dataset_spec(dataset)
    target = datasets_dir / spec.folder
    if spec.fetch is None:
        raise UserError(f"{dataset.value} needs no download ({spec.files}): run it as it is")
    datasets_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=datasets_dir, prefix=".download-") as temporary:
        try:
            spec.fetch(Path(temporary))
        except (OSError, RuntimeError) as error:
            what = " ".join(str(error).split())
            raise UserError(f"downloading {dataset.value} failed ({what}): put {spec.files} in {target}") from None
        for made in Path(temporary).iterdir():
            if not (datasets_dir / made.name).exists():
                os.replace(made, datasets_dir / made.name)
    _read(dataset, target, train=True)
    return target


# --- splits -----------------------------------------------------------------------------------------------


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


def _cap(arrays: Arrays, most: int | None, seed: int) -> Arrays:
    """A stratified subset of about `most` images (None: all)."""
    images, labels = arrays
    if most is None or most >= len(labels):
        return arrays
    chosen, _ = stratified(labels, most / len(labels), seed)
    return images[chosen], labels[chosen]


@dataclass(frozen=True)
class Images(Dataset):
    """Images [S, C, H, W] uint8 with labels [S]; items are normalised float32. Subsets share nothing mutable."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | list[int] | slice) -> tuple[Tensor, Tensor]:
        """Normalised images [B, C, H, W] and labels [B]."""
        return (self.pixels[indices].float() - self.mean) / self.std, self.labels[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.batch(indices)

    def only(self, keep: Tensor) -> "Images":
        """The subset where `keep` [S] (bool, or indices) holds."""
        return replace(self, pixels=self.pixels[keep], labels=self.labels[keep])


def make_loader(dataset: Dataset, batch_size: int, shuffle_seed: int | None = None) -> DataLoader:
    """A loader of whole batches (one indexing call each, last one may be short); shuffled if seeded."""
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=generator is not None,
        generator=generator,
        collate_fn=lambda batch: batch,
    )


class UnlearningDataset:
    """A dataset with classes to forget: three splits, each whole, by class, and as forget and retain set.

    `train` and `val` part the official training data (stratified, seeded); `test` is the official test split.
    """

    def __init__(
        self,
        name: SupportedDatasets,
        splits: dict[str, Images],
        batch_size: int,
        forget_class: int | Sequence[int],
        seed: int,
    ):
        self.name, self.splits, self.batch_size = name, splits, batch_size
        self.forget_class, self.seed = as_tuple(forget_class), seed
        last = self.spec.num_classes - 1
        for label in self.forget_class:
            if not 0 <= label <= last:
                raise UserError(f"forget_class is {label}, but {name.value} has classes 0 to {last}: choose from them")
        if len(set(self.forget_class)) > last:
            raise UserError(f"forget_class names all {last + 1} classes of {name.value}: leave at least one to retain")
        self._check_classes()

    def _check_classes(self) -> None:
        present = {split: set(images.labels.tolist()) for split, images in self.splits.items()}
        missing = sorted((present["test"] | present["val"] | set(self.forget_class)) - present["train"])
        if missing:
            raise UserError(f"{self.name.value} has no training images of class {missing[0]}: use more images")
        for split in ("val", "test"):
            if absent := sorted(set(self.forget_class) - present[split]):
                raise UserError(f"{self.name.value} has no {split} images of class {absent[0]}: use more images")

    def is_forgotten(self, labels: Tensor) -> Tensor:
        """Whether each label [S] is of a class to forget, bool [S]."""
        return torch.isin(labels, torch.tensor(self.forget_class))

    @property
    def spec(self) -> DatasetSpec:
        """What is known of the dataset; looked up, because its functions cannot be sent to another process."""
        return SPECS[self.name]

    @property
    def num_classes(self) -> int:
        """Classes of the dataset."""
        return self.spec.num_classes

    def retained(self, seed: int) -> "UnlearningDataset":
        """The same without the images of the classes to forget: what a model is retrained on, in another order."""
        kept = {name: part.only(~self.is_forgotten(part.labels)) for name, part in self.splits.items()}
        return _Retained(self.name, kept, self.batch_size, self.forget_class, seed)

    def fingerprint(self) -> str:
        """SHA-256 of every image and label of every split."""
        parts = [self.splits[split] for split in SPLITS]
        return sha256_arrays(array.numpy() for part in parts for array in (part.pixels, part.labels))

    def get_train_loader(self) -> DataLoader:
        """Training images, shuffled by the run's seed."""
        return make_loader(self.splits["train"], self.batch_size, derive_seed(self.seed, "shuffle"))

    def get_val_loader(self) -> DataLoader:
        """Held-out training images, for choosing."""
        return make_loader(self.splits["val"], self.batch_size)

    def get_test_loader(self) -> DataLoader:
        """The official test images, for reporting."""
        return make_loader(self.splits["test"], self.batch_size)

    def get_single_class(self, label: int, split: str = "train") -> DataLoader:
        """Images of one class."""
        images = self.splits[split]
        return make_loader(images.only(images.labels == label), self.batch_size)

    def get_forget_set(self, split: str = "train") -> DataLoader:
        """Images of the classes to forget."""
        images = self.splits[split]
        return make_loader(images.only(self.is_forgotten(images.labels)), self.batch_size)

    def get_retain_set(self, split: str = "train") -> DataLoader:
        """Images of all other classes."""
        images = self.splits[split]
        return make_loader(images.only(~self.is_forgotten(images.labels)), self.batch_size)


class _Retained(UnlearningDataset):
    """A dataset from which the classes to forget are gone."""

    def _check_classes(self) -> None:
        pass


def _statistics(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [C, 1, 1] each, of uint8 images [S, C, H, W]."""
    levels = np.arange(256)
    counts = np.stack([np.bincount(pixels[:, c].reshape(-1), minlength=256) for c in range(pixels.shape[1])])
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels**2 / counts.sum(1) - mean**2
    std = np.sqrt(variance) + 1e-8
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return mean, std


def get_unlearning_dataset(
    dataset: SupportedDatasets,
    batch_size: int,
    forget_class: int | Sequence[int] = 0,
    dataset_path: Path | None = None,
    *,
    datasets_dir: Path = Path("datasets"),
    data: DataConfig | None = None,
    seed: int = 0,
) -> UnlearningDataset:
    """Read a dataset and split it.

    Args:
        dataset_path: the folder with its files; by default its place below `datasets_dir`, and for
            FASHION_MNIST the Debian package `dataset-fashion-mnist` where that is installed.
        data: subset sizes and validation share. seed: of the order of the training loader.

    Raises:
        UserError: files are missing or damaged, or the forget class does not exist.
    """
    data = data or DataConfig()
    root = dataset_path or _default_root(dataset, datasets_dir)
    split_seed = derive_seed(data.split_seed, dataset.value, "val")
    pixels, labels = _cap(_read(dataset, root, train=True), data.max_train_samples, split_seed)
    test = _cap(_read(dataset, root, train=False), data.max_test_samples, split_seed)
    val, train = stratified(labels, data.val_fraction, split_seed)
    parts = {"train": (pixels[train], labels[train]), "val": (pixels[val], labels[val]), "test": test}
    mean, std = _statistics(parts["train"][0])
    splits = {
        name: Images(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y)), mean, std)
        for name, (x, y) in parts.items()
    }
    return UnlearningDataset(dataset, splits, batch_size, forget_class, seed)
