"""How folders are understood: splits, wrappers, litter, names of classes, and what cannot be understood."""

import os
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest

from core import artifacts
from core.choices import SupportedDatasets, UserError
from core.config import DataConfig, PipelineConfig, Trackers
from core.observe import Tracker
from images import specs as readers
from images.fetch import listing, prepare
from images.index import open_tree
from images.layouts import NoTreeError
from images.names import TEST, TRAIN, UNSPLIT, VAL, litter_file, splits_by_name
from tests.helpers.formats import photo, write_cifar, write_mnist, write_svhn, write_tree
from utils_data import SPLITS, dataset_facts, get_unlearning_dataset

FOLDER = SupportedDatasets.FOLDER
ANIMALS = ("cat", "dog")


def load(root, store, forget=0, dataset=FOLDER, **options):
    return get_unlearning_dataset(
        dataset, 8, forget, root, datasets_dir=store, data=DataConfig(image_size=16, num_workers=0, **options)
    )


def under(*tops: str, classes=ANIMALS) -> list[str]:
    return [f"{top}/{name}".removeprefix("./") for top in tops for name in classes]


# --- splits and wrappers ----------------------------------------------------------------------------------

READ = {
    "classes": (under("."), ANIMALS, {UNSPLIT}),
    "splits": (under("train", "val", "test"), ANIMALS, {TRAIN, VAL, TEST}),
    "training": (under("training", "testing"), ANIMALS, {TRAIN, TEST}),
    "capitals": (under("TRAIN", "Validation"), ANIMALS, {TRAIN, VAL}),
    "affixes": (under("train_images", "test-images"), ANIMALS, {TRAIN, TEST}),
    "glued": (under("TrainSet", "testset"), ANIMALS, {TRAIN, TEST}),
    "sets": (under("training_set", "test_set"), ANIMALS, {TRAIN, TEST}),
    "years": (under("train2017", "val2017"), ANIMALS, {TRAIN, VAL}),
    "numbers": (under("train_0", "train_1", "test"), ANIMALS, {TRAIN, TEST}),
    "shared name": (under("seg_train", "seg_test"), ANIMALS, {TRAIN, TEST}),
    "holdout": (under("train", "hold-out"), ANIMALS, {TRAIN, TEST}),
    "eval beside test": (under("train", "eval", "test"), ANIMALS, {TRAIN, VAL, TEST}),
    "eval beside val": (under("train", "dev", "eval"), ANIMALS, {TRAIN, VAL, TEST}),
    "trainval": (under("train_val", "test"), ANIMALS, {TRAIN, TEST}),
    "train alone": (under("train"), ANIMALS, {TRAIN}),
    "test alone": (under("test"), ANIMALS, {UNSPLIT}),
    "wrapped": (under("photos"), ANIMALS, {UNSPLIT}),
    "wrapped thrice": (under("a/b/c"), ANIMALS, {UNSPLIT}),
    "wrapped splits": (under("data/train", "data/test"), ANIMALS, {TRAIN, TEST}),
    "wrapped within splits": (under("train/data", "test/data"), ANIMALS, {TRAIN, TEST}),
    "wrapped in its own name": (under("training_set/training_set", "test_set/test_set"), ANIMALS, {TRAIN, TEST}),
    "beside the mac's": ([*under("photos"), "__MACOSX/photos/cat"], ANIMALS, {UNSPLIT}),
    "hidden": ([*under("photos"), ".git/objects"], ANIMALS, {UNSPLIT}),
    "class called test": ([*under("."), "test"], (*ANIMALS, "test"), {UNSPLIT}),
    "class called train": (["bus", "car", "train"], ("bus", "car", "train"), {UNSPLIT}),
    "folders within classes": (["cat/young", "cat/old", "dog/young"], ANIMALS, {UNSPLIT}),
    "test of one class": ([*under("train"), "test/cat/a", "test/cat/b"], ANIMALS, {TRAIN, TEST}),
}


@pytest.mark.parametrize(("folders", "classes", "splits"), READ.values(), ids=READ)
def test_folders_are_understood(folders, classes, splits, tmp_path):
    write_tree(tmp_path / "t", folders, 2)
    tree = open_tree(tmp_path / "t", "folders", tmp_path / "store")
    assert tree.classes == classes
    assert set(tree.splits.tolist()) == splits
    wanted = [folder for folder in folders if not folder.startswith(("__MACOSX", "."))]
    assert len(tree) == 2 * len(wanted)
    assert tree.found == []
    labels = {tree.classes[label] for label in tree.labels}
    assert labels == set(classes)
    for row in range(len(tree)):
        assert tree.classes[tree.labels[row]] in tree.path(row).split("/")


REFUSED = {
    "splits of images": (["train", "test"], r"test, train with 4 images in no class folders: sort them into test/<c"),
    "train of images": (["train", *under("test")], r"train with 2 images in no class folders: sort them into train/<c"),
    "no train": (under("val", "test"), "test, val but no train: put the class folders to train on into .*t/train"),
    "classes beside test": ([*under("."), *under("test")], "test beside cat, dog but no train"),
    "train beside classes": (["bus", "car", "train/a", "train/b"], "train with folders of its own beside bus, car"),
    "one split twice": (under("train", "training"), "train, training, which are one split by name: merge or rename"),
    "parts": (under("part1", "part2"), "part1, part2, which all hold the folders cat, dog: are these the classes"),
    "one class": (["photos"], "one class folder, 'photos' with 2 files: at least two classes are needed"),
    "one class, wrapped": (["a/photos"], "one class folder, 'photos' with 2 files"),
}


@pytest.mark.parametrize(("folders", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(folders, message, tmp_path):
    write_tree(tmp_path / "t", folders, 2)
    with pytest.raises(NoTreeError, match=message):
        open_tree(tmp_path / "t", "folders", tmp_path / "store")


@pytest.mark.parametrize(
    "name", ["attest", "trainer", "retrain", "valley", "testament", "evil", "train again", "x_train"]
)
def test_other_names_are_no_splits(name):
    assert splits_by_name(["cat", name]) == {}


def test_a_link_back_up_is_not_looked_through_for_ever(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/again").symlink_to(tmp_path / "t")
    with pytest.raises(NoTreeError):
        open_tree(tmp_path / "t", "folders", tmp_path / "store")


def test_what_was_decided_is_said_every_time_and_can_be_asked_for(tmp_path, capsys):
    root = tmp_path / "t"
    write_tree(root / "photos", [*under("train", "test"), "train_again/cat"], 6)
    photo().save(root / "cover.jpg")
    (root / "photos/train/cat/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for _ in range(2):
        data = load(root, tmp_path / "store")
        said = capsys.readouterr().err
        assert said.count("photos is the only folder, what it holds is looked at; 1 images beside it are left out") == 1
        assert said.count("beside test, train, left out: train_again") == 1
        assert said.count("passed over 1 files and folders that are no images (1 .DS_Store)") == 1
    known = data.understood
    assert known["splits"] == {"train": 10, "val": 2, "test": 12}
    assert (known["classes"], known["forget"], known["passed"]) == (["cat", "dog"], {0: "cat"}, {".DS_Store": 1})
    facts = dataset_facts(FOLDER, ("dog",), root, tmp_path / "store", DataConfig())
    assert (facts.images, facts.passed, list(facts.notes)) == (24, {".DS_Store": 1}, known["notes"])
    write_tree(root, ["other"], 1)  # now the wrapper is one of two classes
    with pytest.raises(UserError, match=r"'other' \(1\)"):
        load(root, tmp_path / "store")


def test_wrapped_imagenet_keeps_its_splits(tmp_path):
    write_tree(tmp_path / "t", ["imagenet/train/n01440764", "imagenet/val/n01440764", "imagenet/train/n01443537"], 1)
    tree = open_tree(tmp_path / "t", "wnids", tmp_path / "store")
    assert sorted(tree.splits.tolist()) == [TRAIN, TRAIN, TEST]


def zipped(path, members) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            photo().save(path.parent / "spare.png")
            archive.write(path.parent / "spare.png", f"{name}/0.png")
            archive.write(path.parent / "spare.png", f"{name}/1.png")
        (path.parent / "spare.png").unlink()


@pytest.mark.parametrize(
    ("archive", "members"),
    [
        ("photos.zip", ANIMALS),
        ("photos.zip", under("photos")),
        ("photos.zip", [*under("photos"), "__MACOSX/photos/cat"]),
        ("photos.zip", under("a/b")),
        ("photos.ZIP", ANIMALS),
    ],
)
def test_prepare_of_one_archive_gives_its_classes(archive, members, tmp_path):
    root = tmp_path / "t"
    root.mkdir()
    zipped(root / archive, members)
    prepare(FOLDER, tmp_path / "store", root)
    assert open_tree(root, "folders", tmp_path / "store").classes == ANIMALS


def test_output_is_not_taken_for_a_class(tmp_path):
    """It would be, from the second run on."""
    write_tree(tmp_path, under("."), 8)
    with pytest.raises(UserError, match=r"would go into the dataset .*: choose an --output-dir outside"):
        load(tmp_path, tmp_path / "out/datasets")
    write_tree(tmp_path / "w", under("photos"), 8)
    with pytest.raises(UserError, match="would go into the dataset"):
        load(tmp_path / "w", tmp_path / "w/out/datasets")
    write_tree(tmp_path / "s", under("train", "test"), 8)
    for _ in range(2):
        assert load(tmp_path / "s", tmp_path / "s/out/datasets").classes == ANIMALS


# --- nothing to read --------------------------------------------------------------------------------------


def test_nothing_to_read_is_said_with_what_is_there(tmp_path):
    root = tmp_path / "t"

    def said() -> str:
        with pytest.raises(UserError, match=r"cannot read FOLDER \(.*\): it needs <class>/ or ") as caught:
            load(root, tmp_path / "store")
        return str(caught.value)

    assert f"there is no folder {root}" in said()
    root.mkdir()
    assert f"{root} is empty" in said()
    (root / "notes.txt").write_text("none")
    assert "no folders, only files (notes.txt)" in said()
    photo().save(root / "1.jpg")
    assert "holds 1 images in no class folder: sort them into" in said()
    (root / "1.jpg").unlink()
    (root / "all.tar.gz").write_bytes(b"x")
    assert "only archives (all.tar.gz): unpack them with `main.py prepare`" in said()
    (root / "all.tar.gz").unlink()
    for name in "abcd":
        (root / name / "within").mkdir(parents=True)
    assert "holds folders (a, b, c and 1 more), but no files in them" in said()
    shutil.rmtree(root)
    root.write_bytes(b"x")
    assert f"{root} is a file, no folder" in said()
    root = root.rename(tmp_path / "t.zip")
    assert "t.zip is a file, no folder: unpack it with `main.py prepare`" in said()


# --- litter -----------------------------------------------------------------------------------------------

LITTER = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"",
    "._0.jpg": b"\0\5\x16\7" + b"\0" * 50,
    "._1.jpg": b"",
    ".nomedia": b"",
    "README.md": b"what",
    "LICENSE": b"mine",
    "labels.cache": b"?",
    "~$notes.docx": b"?",
}


def test_litter_is_passed_over_and_damage_is_not(tmp_path, capsys):
    root = tmp_path / "t"
    write_tree(root, under("."), 8)
    for name, data in LITTER.items():
        (root / "cat" / name).write_bytes(data)
    for name in ("@eaDir/0.jpg", "__MACOSX", ".ipynb_checkpoints", "lost+found"):
        (root / "dog" / name).mkdir(parents=True)
        photo().save(root / "dog" / name / "x.png")
    data = load(root, tmp_path / "store")
    assert sum(len(data.splits[split]) for split in SPLITS) == 16
    assert sum(data.understood["passed"].values()) == len(LITTER) + 4
    assert data.understood["passed"]["._*"] == 2
    assert data.skipped_images == []
    assert "passed over 14 files and folders" in capsys.readouterr().err
    damage = {"._real.jpg": b"\xff\xd8 cut", ".hidden.jpg": b"x", "notes.txt": b"x", "empty.jpg": b"", "a.part": b"x"}
    for name, bytes_ in damage.items():
        (root / "dog" / name).write_bytes(bytes_)
    with pytest.raises(UserError, match="5 paths that give no image"):
        load(root, tmp_path / "store")


def test_a_real_image_with_an_apples_prefix_is_an_image(tmp_path):
    photo().save(tmp_path / "._real.png")
    assert litter_file(str(tmp_path), "._real.png") is None


# --- names ------------------------------------------------------------------------------------------------


def test_unicode_forms_of_a_name_are_one(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_tree(tmp_path / "t", [apart, "dog"], 8)
    for typed in (composed, apart, composed.upper()):
        assert load(tmp_path / "t", tmp_path / "store", typed).forget_class == (0,)
    write_tree(tmp_path / "t", [composed], 1)
    with pytest.raises(UserError, match=r"'cafe\\u0301' and 'caf\\xe9', one name but for its Unicode form: rename one"):
        load(tmp_path / "t", tmp_path / "store", "dog")


def test_names_that_are_no_utf8_are_shown_escaped(tmp_path, capsys):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/ph\xf6to")
    write_tree(tmp_path / "t", under("."), 8)
    (tmp_path / "t").rename(root)
    os.rename(f"{root}/cat", os.fsencode(root) + b"/caf\xe9")  # noqa: PTH104
    (tmp_path / root / "dog/bad\udce9.jpg").write_bytes(b"x")
    for typed in ("caf\udce9", r"caf\xe9"):
        data = load(tmp_path / root, tmp_path / "store", typed, skip_bad_images=True)
        assert data.classes == (r"caf\xe9", "dog")
        assert data.forget_class == (0,)
    for text in (str(data.understood), str(data.skipped_images), *data.classes):
        text.encode()
    assert data.skipped_images[0]["path"] == r"dog/bad\xe9.jpg"
    assert r"dog/bad\xe9.jpg" in capsys.readouterr().err
    assert all(path.name.startswith(r"ph\xf6to") for path in (tmp_path / "store/index").iterdir())
    assert len(data.splits["train"].batch(slice(None))[0]) > 0


def test_a_tracker_is_given_text_that_its_database_takes(monkeypatch):
    class Trackio:
        init = staticmethod(lambda **given: asked.append(given))
        finish = staticmethod(lambda: None)

    asked: list[dict] = []
    monkeypatch.setattr("core.observe._trackio", lambda: Trackio)
    with Tracker(Trackers.trackio, "x", {"dataset_path": "ph\udcf6to", "forget_class": ["caf\udce9", 1]}):
        pass
    assert asked[0]["config"] == {"dataset_path": r"ph\xf6to", "forget_class": [r"caf\xe9", 1]}


def test_long_names_make_no_file_name_too_long(tmp_path):
    write_tree(tmp_path / ("n" * 250), under("."), 8)
    assert load(tmp_path / ("n" * 250), tmp_path / "store").classes == ANIMALS


# --- whose fault it is ------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_written_is_blamed_itself(tmp_path):
    write_tree(tmp_path / "t", under("."), 8)
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*store/index") as caught:
        load(tmp_path / "t", tmp_path / "store")
    assert "cannot read FOLDER" not in str(caught.value)
    assert str(tmp_path / "t") not in str(caught.value)


def test_a_dataset_is_only_read(tmp_path, monkeypatch):
    write_tree(tmp_path / "t", under("train", "test"), 4)
    written, writing = [], artifacts.writing
    monkeypatch.setattr(artifacts, "writing", lambda path, *more: written.append(path) or writing(path, *more))
    before = sorted(str(path) for path in (tmp_path / "t").rglob("*"))
    load(tmp_path / "t", tmp_path / "store")
    assert sorted(str(path) for path in (tmp_path / "t").rglob("*")) == before
    assert written
    assert all(path.is_relative_to(tmp_path / "store") for path in written)


def without_home(monkeypatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_no_home_folder(tmp_path, monkeypatch):
    without_home(monkeypatch)
    monkeypatch.setattr(readers, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    lines = listing(tmp_path)
    assert "scikit-learn" in lines
    assert "~/Datasets/ImageNet-small needs the home folder" in lines
    with pytest.raises(UserError, match=r"~/Datasets/ImageNet-small needs the home folder, .* set HOME"):
        dataset_facts(SupportedDatasets.IMAGENET_SMALL, (0,), None, tmp_path, DataConfig())
    with pytest.raises(UserError, match="~/mine needs the home folder"):
        PipelineConfig(dataset_path=readers.Path("~/mine"))
    write_tree(tmp_path / "t", under("."), 8)
    assert load(tmp_path / "t", tmp_path / "store").classes == ANIMALS


# --- torchvision's folders --------------------------------------------------------------------------------


def made_by_torchvision(name: str, root) -> str:
    """Files of a dataset in torchvision's layout below root; returns the folder that holds them."""
    if name in ("MNIST", "FASHION_MNIST"):
        raw = root / {"MNIST": "MNIST", "FASHION_MNIST": "FashionMNIST"}[name] / "raw"
        raw.mkdir(parents=True)
        write_mnist(raw, np.arange(60) % 10, pack=name == "MNIST")
        return f"{raw.parent.name}/raw"
    if name == "SVHN":
        write_svhn(root, 60)
        return "."
    folder, key, classes = {
        "CIFAR10": ("cifar-10-batches-py", "labels", 10),
        "CIFAR100": ("cifar-100-python", "fine_labels", 100),
    }[name]
    batches = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 20}
    write_cifar(root, folder, batches if classes == 10 else {"train": 200, "test": 100}, key, classes)
    return folder


@pytest.mark.parametrize("name", ["MNIST", "FASHION_MNIST", "CIFAR10", "CIFAR100", "SVHN"])
def test_every_folder_of_torchvisions_layout_will_do(name, tmp_path, monkeypatch):
    for kind in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(f"torchvision.datasets.{kind}._check_integrity", lambda _: True)
        monkeypatch.setattr(f"torchvision.datasets.{kind}._load_meta", lambda _: None)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    root, dataset = tmp_path / "root", SupportedDatasets[name]
    root.mkdir()
    files = made_by_torchvision(name, root)
    own = "FashionMNIST" if name == "FASHION_MNIST" else name
    places = [root, root / files, root / files.partition("/")[0]]
    (tmp_path / "named").mkdir()
    shutil.copytree(root / own if (root / own).is_dir() else root, tmp_path / "named" / own.lower())
    places += [tmp_path / "named", tmp_path / "named" / own.lower()]
    for place in places:
        images, labels = readers.read_arrays(dataset, place, train=True)
        assert len(images) == len(labels) >= 60
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"no {readers.SPECS[dataset].marker} in {tmp_path}/empty, .*{own}"):
        readers.read_arrays(dataset, tmp_path / "empty", train=True)
