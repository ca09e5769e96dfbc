"""Datasets: true formats are read, wrong ones refused in a sentence, splits are splits."""

import gzip
import pickle
import subprocess
import sys
import tracemalloc
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from core.config import PROJECT_ROOT, DataConfig, SupportedDatasets, UserError, derive_seed
from images.specs import _read_digits
from images.splits import find_duplicates
from tests.helpers.formats import idx_bytes, write_cifar, write_mnist, write_svhn
from utils_data import SPLITS, download, get_unlearning_dataset, read_idx, stratified

LABELS = np.arange(60) % 10


@pytest.mark.parametrize("pack", [False, True])
def test_idx_is_read_as_written(tmp_path, pack):
    written = write_mnist(tmp_path, LABELS, pack)
    assert (read_idx(tmp_path / "train-images-idx3-ubyte") == written["train"]).all()
    data = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 1, tmp_path)
    assert (data.splits["test"].pixels[:, 0].numpy() == written["t10k"]).all()
    assert data.splits["test"].labels.tolist() == LABELS.tolist()


def test_loaded_batches_are_normalised_by_the_training_images(tmp_path):
    write_mnist(tmp_path, LABELS)
    data = get_unlearning_dataset(SupportedDatasets.MNIST, 7, 1, tmp_path)
    every = torch.cat([batch for batch, _ in data.get_train_loader()])
    assert float(every.mean()) == pytest.approx(0, abs=1e-4)
    assert float(every.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("dataset", "folder", "names", "key", "classes"),
    [
        (
            SupportedDatasets.CIFAR10,
            "cifar-10-batches-py",
            {**{f"data_batch_{i}": 20 for i in range(1, 6)}, "test_batch": 20},
            "labels",
            10,
        ),
        (SupportedDatasets.CIFAR100, "cifar-100-python", {"train": 400, "test": 100}, "fine_labels", 100),
    ],
)
def test_cifar(tmp_path, monkeypatch, dataset, folder, names, key, classes):
    import torchvision.datasets.cifar as cifar

    write_cifar(tmp_path, folder, names, key, classes)
    with pytest.raises(UserError, match=r"corrupted.*download"):  # the md5 check stands
        get_unlearning_dataset(dataset, 8, 0, tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    data = get_unlearning_dataset(dataset, 8, 0, tmp_path)
    assert data.splits["test"].pixels.shape == (names.get("test_batch", names.get("test")), 3, 32, 32)
    raw = pickle.loads((tmp_path / folder / ("test_batch" if classes == 10 else "test")).read_bytes())
    assert (data.splits["test"].pixels.numpy().reshape(-1, 3072) == raw["data"]).all()


def test_svhn(tmp_path, monkeypatch):
    import torchvision.datasets.svhn as svhn

    monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)
    pixels = write_svhn(tmp_path, 40)
    data = get_unlearning_dataset(SupportedDatasets.SVHN, 8, 0, tmp_path)
    assert data.splits["test"].labels.tolist() == [i % 10 for i in range(40)]
    assert (data.splits["test"].pixels.numpy() == pixels.transpose(0, 3, 1, 2)).all()


def test_real_digits_and_real_fashion_mnist():
    digits = get_unlearning_dataset(SupportedDatasets.DIGITS, 64)
    assert sum(len(digits.splits[split]) for split in SPLITS) == 1797
    fashion = get_unlearning_dataset(SupportedDatasets.FASHION_MNIST, 64)
    assert len(fashion.splits["train"]) + len(fashion.splits["val"]) == 60_000
    train = torch.bincount(fashion.splits["train"].labels) + torch.bincount(fashion.splits["val"].labels)
    assert train.tolist() == [6000] * 10
    assert torch.bincount(fashion.splits["test"].labels).tolist() == [1000] * 10


def test_digits_are_what_scikit_learn_loads():
    """Bit for bit, of the same types, and without an import of scikit-learn, which takes seconds."""
    command = "import sys; import images.specs as s; s._read_digits(None, True); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=PROJECT_ROOT, check=False).returncode == 0
    digits = load_digits()
    pixels = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)
    chosen = stratified(digits.target.astype(np.int64), 0.2, derive_seed(0, "DIGITS", "test"))
    for train, rows in zip((False, True), chosen, strict=True):
        images, labels = _read_digits(Path(), train)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert (images == pixels[rows]).all()
        assert (labels == digits.target[rows]).all()


@pytest.mark.parametrize(("name", "said"), [(None, "scikit-learn is not there"), ("pytest", "there is no .*digits")])
def test_digits_that_are_not_there_are_said_to_be_missing(name, said, monkeypatch):
    monkeypatch.setattr("images.specs.find_spec", lambda _: name and find_spec(name))
    with pytest.raises(UserError, match=said):
        _read_digits(Path(), train=True)


def test_splits_part_the_training_data(tmp_path):
    written = write_mnist(tmp_path, LABELS)
    one = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path, seed=0)
    other = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path, seed=1)
    moved = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path, data=DataConfig(split_seed=1))

    def keys(data, split):
        return {bytes(image) for image in data.splits[split].pixels.numpy()}

    assert keys(one, "train") | keys(one, "val") == {bytes(image) for image in written["train"]}
    assert not keys(one, "train") & keys(one, "val")
    assert set(one.splits["val"].labels.tolist()) == set(range(10))
    assert keys(one, "val") == keys(other, "val") != keys(moved, "val")
    assert [y.tolist() for _, y in one.get_train_loader()] != [y.tolist() for _, y in other.get_train_loader()]


@pytest.mark.parametrize("split", SPLITS)
def test_forget_and_retain_are_everything(tmp_path, split):
    write_mnist(tmp_path, LABELS)
    data = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)
    forget = torch.cat([y for _, y in data.get_forget_set(split)])
    retain = torch.cat([y for _, y in data.get_retain_set(split)])
    assert set(forget.tolist()) == {3}
    assert 3 not in retain.tolist()
    assert len(forget) + len(retain) == len(data.splits[split])
    assert torch.cat([y for _, y in data.get_single_class(5, split)]).unique().tolist() == [5]


def test_stratified_takes_its_share_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    chosen, rest = stratified(labels, 0.2, 0)
    assert np.bincount(labels[chosen]).tolist() == [20, 2, 1]
    assert sorted([*chosen, *rest]) == list(range(111))


def test_subset_sizes(tmp_path):
    write_mnist(tmp_path, LABELS)
    small = DataConfig(max_train_samples=30, max_test_samples=20)
    data = get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path, data=small)
    assert len(data.splits["train"]) + len(data.splits["val"]) == 30
    assert torch.bincount(data.splits["test"].labels).tolist() == [2] * 10


HEADER = bytes([0, 0, 8, 3])
DAMAGED = {
    "cut": (lambda data: data[:-5], "by its header, and holds only 47035"),
    "longer": (lambda data: data + b"\0", "and holds more than that"),
    "magic": (lambda data: b"\0\0\x09" + data[3:], "does not begin like an IDX file"),
    "empty": (lambda data: b"", "is empty"),
    "cut header": (lambda data: data[:9], "ends within its header"),
    "no dimensions": (lambda data: b"\0\0\x08\0" + data[4:], "does not begin like an IDX file"),
    "other shape": (
        lambda data: HEADER + b"\0\0\0\x3c\0\0\0\x0e\0\0\0\x38" + data[16:],
        r"shape \(14, 56\), needed is",
    ),
    "absurd count": (lambda data: HEADER + b"\xff" * 4 + data[8:], "more than any dataset of its kind"),
    "labels": (lambda data: b"\0\0\x08\1\0\0\0\x3c" + bytes(60), r"shape \(\), needed is"),
}
PACKED = {
    "cut": (lambda data: data[:-50], "is damaged"),
    "two parts": (
        lambda data: gzip.compress(gzip.decompress(data)[:99]) + gzip.compress(gzip.decompress(data)[99:]),
        "",
    ),
    "garbage behind": (lambda data: data + b"garbage", "is damaged: Not a gzipped file"),
    "flipped": (lambda data: data[:200] + bytes([data[200] ^ 255]) + data[201:], "is damaged"),
    "no gzip": (gzip.decompress, "is damaged: Not a gzipped file"),
    "empty": (lambda data: b"", "is empty"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_file_is_named(tmp_path, how):
    write_mnist(tmp_path, LABELS)
    spoil, said = DAMAGED[how]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte .*{said}.*download MNIST"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)


@pytest.mark.parametrize("how", PACKED)
def test_damaged_gz_is_named(tmp_path, how):
    written = write_mnist(tmp_path, LABELS, pack=True)
    spoil, said = PACKED[how]
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    if not said:
        assert (read_idx(path.with_suffix("")) == written["t10k"]).all()
        return
    with pytest.raises(UserError, match=rf"t10k-images-idx3-ubyte.gz .*{said}.*download MNIST"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)


@pytest.mark.parametrize("count", [60, 2**26])
def test_a_gz_is_unpacked_no_further_than_its_header_says(tmp_path, count):
    """30 MB of zeros in 30 KB, behind a header that says 47 KB, or 53 GB; memory is that of the header's size."""
    write_mnist(tmp_path, LABELS, pack=True)
    shape = np.array([count, 28, 28], ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(HEADER + shape + bytes(30_000_000), 9))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"more than that|more than any dataset of its kind"):
            get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_copies_are_counted_and_said_once(tmp_path, capsys):
    labels = np.arange(300) % 10
    written = write_mnist(tmp_path, labels)
    load = partial(get_unlearning_dataset, SupportedDatasets.MNIST, 8, 3, tmp_path)
    assert load().duplicates == {}
    assert "more than once" not in capsys.readouterr().err
    written["t10k"][:5] = written["train"][:5]  # the same label, whatever split of train they are in
    written["t10k"][7] = written["t10k"][16]  # another label
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(written["t10k"]))
    found = load().duplicates
    counts = {kind: one["images"] for kind, one in found.items()}
    assert counts.pop("train/test", 0) + counts.pop("val/test", 0) == 5
    assert counts == {"test": 1, "across classes": 2}
    assert set(found["across classes"]["example"]) == {"test image 7", "test image 16"}
    assert capsys.readouterr().err.count("the same image more than once") == 1


def test_duplicates_are_those_of_a_naive_count():
    random = np.random.default_rng(0)
    digests = {name: np.zeros((size, 16), np.uint8) for name, size in (("train", 40), ("val", 9), ("test", 20))}
    labels = {name: random.integers(0, 3, len(values)) for name, values in digests.items()}
    for values in digests.values():
        values[:, 15] = random.integers(0, 60, len(values))
    every = [(s, i, v[15], labels[s][i]) for s, values in digests.items() for i, v in enumerate(values)]
    wanted = {}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        wanted[f"{a}/{b}"] = sum(s == b and any(o[0] == a and o[2] == v for o in every) for s, _, v, _ in every)
    for a in digests:
        wanted[a] = sum(s == a and any(o[0] == a and o[1] < i and o[2] == v for o in every) for s, i, v, _ in every)
    wanted["across classes"] = sum(any(o[2] == v and o[3] != y for o in every) for _, _, v, y in every)
    found = find_duplicates(digests, labels, lambda split, place: f"{split} {place}")
    assert {kind: one["images"] for kind, one in found.items()} == {k: n for k, n in wanted.items() if n}
    for kind, one in found.items():
        (a, i), (b, j) = (name.split() for name in one["example"])
        assert (digests[a][int(i)] == digests[b][int(j)]).all()
        assert (a, i) != (b, j)
        assert {a, b} == set(kind.split("/")) or kind == "across classes"


def test_missing_files_labels_out_of_range_and_unknown_classes(tmp_path):
    with pytest.raises(UserError, match=r"cannot read MNIST .*download MNIST"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)
    write_mnist(tmp_path, LABELS + 1)
    with pytest.raises(UserError, match=r"labels 1\.\.10, needed are 0\.\.9"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)
    write_mnist(tmp_path, LABELS)
    with pytest.raises(UserError, match="forget_class is 10, but MNIST has classes 0 to 9"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 10, tmp_path)
    write_mnist(tmp_path, np.zeros(60, int))
    with pytest.raises(UserError, match="no training images of class 3"):
        get_unlearning_dataset(SupportedDatasets.MNIST, 8, 3, tmp_path)


MISSING = {
    "IMAGENET_SMALL": "download IMAGENET_SMALL",
    "PLANT_CLASSIFICATION": "put it there by hand",
    "POKEMON_CLASSIFICATION": "download POKEMON_CLASSIFICATION",
    "FOLDER": "name it with --dataset-path",
}


@pytest.mark.parametrize(("name", "way"), MISSING.items())
def test_missing_trees_say_what_to_do(name, way, tmp_path):
    with pytest.raises(UserError, match=rf"cannot read {name} \(there is no folder .*/nowhere\): it needs .*{way}"):
        get_unlearning_dataset(SupportedDatasets[name], 8, 0, tmp_path / "nowhere", datasets_dir=tmp_path)


@pytest.mark.parametrize("name", ["PLANT_CLASSIFICATION", "FOLDER"])
def test_what_cannot_be_downloaded_is_said(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} cannot be downloaded: put .*<class>/ with image files"):
        download(SupportedDatasets[name], tmp_path)


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    import torchvision.datasets

    def fails(root: str, download: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fails)
    with pytest.raises(UserError, match=r"downloading MNIST failed \(no route to host\)"):
        download(SupportedDatasets.MNIST, tmp_path)
    assert list(tmp_path.iterdir()) == []
