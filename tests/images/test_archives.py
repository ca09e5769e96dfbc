"""Archives: unpacked whole or not at all, never out of their folder; parquet files of the hub; downloads."""

import gzip
import io
import json
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from core.config import SupportedDatasets, UserError
from images import archives
from images.archives import unpack_all
from images.fetch import download, listing, prepare
from images.index import open_tree
from tests.helpers.formats import photo, write_mnist, write_tree


def jpeg() -> bytes:
    stream = io.BytesIO()
    photo().save(stream, "JPEG")
    return stream.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def write_tar(path, members) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))


def test_tar_becomes_a_folder_of_its_name(tmp_path, capsys):
    data = {f"n01440764_{i}_n01440764.JPEG": jpeg() for i in range(3)}
    write_tar(tmp_path / "train_images_0.tar.gz", [member(name, data=content) for name, content in data.items()])
    assert unpack_all(tmp_path) == [tmp_path / "train_images_0"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "train_images_0").iterdir()} == data
    assert unpack_all(tmp_path) == []
    assert "unpacked already" in capsys.readouterr().err


UNSAFE = {
    "parent": member("../out.jpg", data=b"1"),
    "deep parent": member("a/../../out.jpg", data=b"1"),
    "absolute": member("/tmp/out.jpg", data=b"1"),
    "symlink": member("a.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
    "inner symlink": member("a.jpg", tarfile.SYMTYPE, link="b.jpg"),
    "hard link": member("a.jpg", tarfile.LNKTYPE, link="b.jpg"),
    "device": member("a.jpg", tarfile.CHRTYPE),
    "fifo": member("a.jpg", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("bad", UNSAFE.values(), ids=UNSAFE)
def test_unsafe_tar_is_refused_and_leaves_nothing(bad, tmp_path):
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    write_tar(root / "x.tar.gz", [member("b.jpg", data=jpeg()), bad])
    with pytest.raises(UserError, match=r"x.tar.gz holds .*(link or device|path out of its folder).*not safe"):
        unpack_all(root)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "deep/root/x.tar.gz"
    ]


@pytest.mark.parametrize("name", ["../out.jpg", "/out.jpg", "a\\..\\..\\out.jpg"])
def test_unsafe_zip_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b.jpg", jpeg())
        archive.writestr(name, b"1")
    with pytest.raises(UserError, match=r"x.zip holds .*path out of its folder"):
        unpack_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("a.jpg")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="a link or device"):
        unpack_all(tmp_path)


def test_damaged_archives_are_refused_and_the_others_are_kept(tmp_path):
    write_tar(tmp_path / "a.tar.gz", [member("b.jpg", data=jpeg())])
    write_tar(tmp_path / "b.tar.gz", [member(f"{i}.jpg", data=jpeg()) for i in range(20)])
    whole = (tmp_path / "b.tar.gz").read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(bytes(20_000)))
    with pytest.raises(UserError, match=r"b.tar.gz holds no files: download it again"):
        unpack_all(tmp_path)
    (tmp_path / "b.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b.tar.gz cannot be unpacked .*download it again"):
        unpack_all(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tar.gz", "b.tar.gz"]
    write_tar(tmp_path / "b.tar.gz", [member("c.jpg", data=jpeg())])
    assert unpack_all(tmp_path) == [tmp_path / "b"]


def test_interrupted_unpacking_goes_on(tmp_path, monkeypatch):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar.gz", [member(f"{i}.jpg", data=jpeg()) for i in range(3)])
    real = archives._untar

    def interrupted(path, part):
        real(path, part)
        if path.name == "b.tar.gz":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_untar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack_all(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tar.gz", "b.tar.gz"]
    assert unpack_all(tmp_path) == [tmp_path / "b"]


def test_zip_that_holds_its_own_folder(tmp_path):
    for split, inner in (("train", "train/Abra"), ("valid", "Mew")):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for i in range(5):
                archive.writestr(f"{inner}/{i}.jpg", jpeg())
    store = tmp_path / "store"
    prepare(SupportedDatasets.POKEMON_CLASSIFICATION, store, tmp_path)
    assert open_tree(tmp_path, "folders", store).classes == ("Abra", "Mew")


def write_parquet(path, rows, names) -> None:
    features = {"image": {"_type": "Image"}, "labels": {"_type": "ClassLabel", "names": names}}
    image = pyarrow.array([{"bytes": data, "path": name} for name, data, _ in rows])
    table = pyarrow.table({"image": image, "labels": pyarrow.array([label for *_, label in rows])})
    facts = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(facts), path)


def test_parquet_becomes_class_folders(tmp_path):
    one, two = jpeg(), jpeg()
    rows = [("x/1.jpg", one, 0), ("y/1.jpg", two, 0), ("1.jpg", two, 1), (None, one, 1)]
    write_parquet(tmp_path / "full/train/0000.parquet", rows, ["Mew", "Abra"])
    assert unpack_all(tmp_path) == [tmp_path / "train"]
    found = {path.relative_to(tmp_path / "train").as_posix(): path.read_bytes() for path in tmp_path.rglob("train/*/*")}
    assert len(found) == 4
    assert (found["Mew/1.jpg"], found["Abra/1.jpg"]) == (one, two)
    assert sorted(data for name, data in found.items() if name.startswith("Mew")) == sorted([one, two])


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden"])
def test_parquet_class_names_cannot_be_paths(name, tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", [("1.jpg", jpeg(), 0)], [name])
    with pytest.raises(UserError, match="no plain class name"):
        unpack_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]


@pytest.mark.parametrize("label", [-1, 2, None])
def test_parquet_row_without_a_known_label_is_refused(label, tmp_path):
    """The hub writes -1 where a label is hidden; as a Python index this would be the last class."""
    write_parquet(tmp_path / "test-00000.parquet", [("1.jpg", jpeg(), 0), ("2.jpg", jpeg(), label)], ["Mew", "Abra"])
    with pytest.raises(UserError, match="is no image dataset of the hub"):
        unpack_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["test-00000.parquet"]


def test_packed_tree_says_that_it_must_be_unpacked(tmp_path):
    (tmp_path / "train_images_0.tar.gz").write_bytes(b"1")
    with pytest.raises(UserError, match=r"only archives \(train_images_0.tar.gz\): unpack them with"):
        open_tree(tmp_path, "wnids", tmp_path / "store")


# --- downloads --------------------------------------------------------------------------------------------


def test_download_replaces_what_is_damaged_and_keeps_what_is_sound(tmp_path, monkeypatch):
    import numpy as np
    import torchvision.datasets

    fetched = []

    def fetch(root: str, download: bool) -> None:
        fetched.append(root)
        raw = archives.Path(root) / "MNIST/raw"
        raw.mkdir(parents=True)
        write_mnist(raw, np.arange(60) % 10)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"half")
    assert download(SupportedDatasets.MNIST, tmp_path) == raw
    assert (raw / "train-images-idx3-ubyte").stat().st_size == 16 + 60 * 784
    assert download(SupportedDatasets.MNIST, tmp_path) == raw
    assert len(fetched) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_damaged_download_does_not_replace_anything(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: None)
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/note").write_text("mine")
    with pytest.raises(UserError, match="cannot read MNIST"):
        download(SupportedDatasets.MNIST, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["note"]


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def fails(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"failed \(no route to host\): run it again .*by hand, from https://hugg"):
        download(SupportedDatasets.IMAGENET_SMALL, tmp_path, tmp_path / "imagenet")
    assert list(tmp_path.iterdir()) == []


def test_listing_counts_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "Datasets/Plant-classification", ["train/a", "train/b", "test/a"], 3)
    lines = listing(tmp_path / "datasets").splitlines()

    def row(name: str) -> list[str]:
        (place,) = [i for i, line in enumerate(lines) if line.startswith(name)]
        return [*lines[place].split(), lines[place + 1].strip()]

    assert row("DIGITS")[3:5] == ["10", "1797"]
    assert row("PLANT")[3:5] == ["2", "9"]
    assert row("MNIST")[4] == "missing"
    assert row("MNIST")[-1] == "get it with `uv run main.py download MNIST`"
