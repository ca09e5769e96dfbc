"""Folder trees of images: layouts, damage, splits, stale indexes, names of classes."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from core.config import DataConfig, SupportedDatasets, UserError
from imagenet_classes import IMAGENET2012_CLASSES
from images import index as image_tree
from images.decode import BadImageError, How, decode
from images.index import open_tree
from images.names import TEST, TRAIN, UNSPLIT
from images.splits import by_hash
from tests.helpers.formats import photo, write_tree
from utils_data import SPLITS, get_unlearning_dataset

FOLDER = SupportedDatasets.FOLDER
WNIDS = list(IMAGENET2012_CLASSES)


def load(root, store, dataset=FOLDER, forget=0, **options):
    data = DataConfig(image_size=16, num_workers=2, **options)
    return get_unlearning_dataset(dataset, 8, forget, root, datasets_dir=store, data=data)


def names(data, split):
    pixels = data.splits[split].pixels
    return {pixels.tree.name(row) for row in pixels.rows.tolist()}


@pytest.fixture
def tree(tmp_path):
    """Three classes of ten images; one class has a folder within."""
    root = tmp_path / "photos"
    write_tree(root, ["cat", "dog", "emu/young"], 10)
    return root


def old(root):
    """Set the times of all folders back, as those of a tree that was made a while ago."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
        os.utime(folder, ns=(10**18, 10**18))


# --- index and decoding -----------------------------------------------------------------------------------


def test_index_is_that_of_torchvision(tree, tmp_path):
    theirs, ours = ImageFolder(str(tree)), open_tree(tree, "folders", tmp_path)
    assert list(ours.classes) == theirs.classes
    found = {(ours.path(row), int(label)) for row, label in enumerate(ours.labels)}
    assert found == {(path, label) for path, label in theirs.samples}


def test_decoded_is_the_centre_square(tmp_path):
    left_to_right = np.zeros((20, 60, 3), np.uint8)
    left_to_right[:, 20:40] = 200
    Image.fromarray(left_to_right).save(tmp_path / "a.png")
    assert (decode(str(tmp_path / "a.png"), How(10))[:, :, 1:-1] == 200).all()  # filters reach over the edge
    photo(900, 700, 90).save(tmp_path / "b.jpg")
    pixels = decode(str(tmp_path / "b.jpg"), How(128))
    assert pixels.shape == (3, 128, 128)
    assert np.abs(pixels.astype(int) - 90).max() <= 1


def test_draft_is_close_to_a_full_decode(tmp_path):
    path = tmp_path / "a.jpg"
    image = photo(512, 512)
    image.save(path, quality=95)
    whole = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
    assert np.abs(decode(str(path), How(64)) - whole).mean() < 3


ODD = {
    "cmyk.jpg": lambda path: photo(value=100).convert("CMYK").save(path),
    "palette.png": lambda path: photo(value=100).convert("P", palette=Image.Palette.ADAPTIVE).save(path),
    "clear.png": lambda path: photo(value=100).convert("P").save(path, transparency=b"\x00\x80"),
    "grey_alpha.png": lambda path: photo(value=100).convert("LA").save(path),
    "rgba.png": lambda path: photo(value=100).convert("RGBA").save(path),
    "bits16.png": lambda path: Image.fromarray(np.full((30, 40), 100 * 256 + 7, np.uint16)).save(path),
    "bits16.tif": lambda path: Image.fromarray(np.full((30, 40), 100 * 256 + 7, np.uint16)).save(path),
    "one_bit.png": lambda path: photo(value=100).convert("1", dither=Image.Dither.NONE).save(path),
    "animated.gif": lambda path: photo(value=100).save(path, save_all=True, append_images=[photo(value=9)]),
    "png_named.jpg": lambda path: photo(value=100).save(path, "PNG"),
}


@pytest.mark.parametrize("name", ODD)
def test_decodable_oddities_are_converted(name, tmp_path):
    ODD[name](tmp_path / name)
    expected = 0 if name == "one_bit.png" else 100
    pixels = decode(str(tmp_path / name), How(16))
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)
    assert np.abs(pixels.astype(int) - expected).max() <= 9  # palettes are coarse


def damage(root) -> dict[str, str]:
    """Every kind of damage, once each; returns {path below the root: start of the reason}."""
    cat, jpeg = root / "cat", (root / "cat" / "0.jpg").read_bytes()
    (cat / "cut.jpg").write_bytes(jpeg[:-40])
    (cat / "zero.jpg").write_bytes(b"")
    (cat / "magic.jpg").write_bytes(b"\x00\x01" + jpeg[2:])
    (cat / "notes.txt").write_text("not an image")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(cat / "floats.tif")
    (cat / "gone.jpg").symlink_to(cat / "nothing.jpg")
    (cat / "self").symlink_to(cat / "self")
    (root / "dog" / "loop").symlink_to(root / "dog")
    (root / "dog" / "up").symlink_to(root)
    os.mkfifo(cat / "pipe.jpg")
    (root / "gnu").mkdir()
    return {
        "cat/cut.jpg": "damaged image",
        "cat/zero.jpg": "empty file",
        "cat/magic.jpg": "not an image",
        "cat/notes.txt": "not an image",
        "cat/floats.tif": "floating-point pixels",
        "cat/gone.jpg": "unreadable (No such file",
        "cat/self": "unreadable (Too many levels",
        "dog/loop": "symlink loop",
        "dog/up": "symlink loop",
        "cat/pipe.jpg": "not a regular file",
        "gnu": "empty class folder",
    }


@pytest.mark.timeout(60)
def test_damage_is_named_and_skipped_only_when_asked(tree, tmp_path, capsys):
    wanted = damage(tree)
    with pytest.raises(
        UserError, match=r"11 paths that give no image \(1 damaged image, 1 empty class folder, 1 empty"
    ):
        load(tree, tmp_path)
    said = capsys.readouterr().err
    assert all(f"no image: {path} ({reason}" in said for path, reason in wanted.items())
    data = load(tree, tmp_path, skip_bad_images=True)
    found = {one["path"]: one["reason"] for one in data.skipped_images}
    assert found.keys() == wanted.keys()
    assert all(found[path].startswith(reason) for path, reason in wanted.items())
    used = set().union(*(names(data, split) for split in SPLITS))
    good = {f"{folder}/{i}.jpg" for folder in ("cat", "dog", "emu/young") for i in range(10)}
    assert used == good
    assert data.classes == ("cat", "dog", "emu")


def test_skipping_moves_no_other_image(tree, tmp_path):
    """A bad image's place passes to the next in line of its class, and to none other."""
    before = load(tree, tmp_path)
    victim = min(names(before, "val"))
    (tree / victim).write_bytes(b"no image at all")
    after = load(tree, tmp_path, skip_bad_images=True)
    assert [one["path"] for one in after.skipped_images] == [victim]
    (heir,) = names(after, "val") - names(before, "val")
    assert heir.split("/")[0] == victim.split("/")[0]
    assert names(after, "val") == names(before, "val") - {victim} | {heir}
    assert names(after, "train") == names(before, "train") - {heir}
    assert names(after, "test") == names(before, "test")


def test_names_that_differ_by_case_alone_are_refused(tree, tmp_path):
    write_tree(tree, ["Cat"], 3)
    with pytest.raises(UserError, match="'Cat' and 'cat', one name but for its case"):
        load(tree, tmp_path)


def test_loose_files_beside_class_folders_are_named(tmp_path):
    root = tmp_path / "photos"
    write_tree(root, ["train/cat", "train/dog", "test/cat", "test/dog"], 5)
    photo().save(root / "train" / "lost.jpg")
    (root / "train" / "labels.cache").write_bytes(b"a pickle, perhaps")
    with pytest.raises(UserError, match=r"1 paths that give no image .1 in no class folder; e.g. train/lost.jpg"):
        load(root, tmp_path)


# --- stale indexes ----------------------------------------------------------------------------------------


def test_cached_index_is_used_and_noticed_when_stale(tree, tmp_path, monkeypatch):
    old(tree)
    scans, scan = [], image_tree.scan_tree
    monkeypatch.setattr(image_tree, "scan_tree", lambda *a: scans.append(a) or scan(*a))
    first, second = open_tree(tree, "folders", tmp_path), open_tree(tree, "folders", tmp_path)
    assert len(scans) == 1
    assert second.found == first.found
    for name in image_tree.ARRAYS:
        assert (getattr(first, name) == getattr(second, name)).all()
    write_tree(tree, ["cat"], 11)
    assert len(open_tree(tree, "folders", tmp_path)) == 31
    (tree / "emu/young/3.jpg").unlink()
    assert len(open_tree(tree, "folders", tmp_path)) == 30
    assert len(scans) == 3


def rewrite(path, data: bytes):
    """New contents in place: the folder's time stays, and so does the file's."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=times)


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_touched_file_is_looked_at_again_and_is_the_same_image(tree, tmp_path, cache_gb, capsys):
    old(tree)
    data = load(tree, tmp_path, cache_gb=cache_gb)
    before, pixels = data.fingerprint(), data.splits["train"].pixels[:]
    for path in tree.rglob("*.jpg"):
        path.touch()
    assert torch.equal(data.splits["train"].pixels[:], pixels)  # the run that is under way goes on
    again = load(tree, tmp_path, cache_gb=cache_gb)
    assert again.fingerprint() == before
    assert torch.equal(again.splits["train"].pixels[:], pixels)
    assert "30 files were touched since they were indexed, such as cat/0.jpg" in capsys.readouterr().err
    load(tree, tmp_path, cache_gb=cache_gb)
    assert "touched" not in capsys.readouterr().err


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_file_with_new_contents_is_never_taken_for_the_old_one(tree, tmp_path, cache_gb):
    """Same size, same time: only the contents differ."""
    old(tree)
    paths = [tree / "cat/0.png", tree / "cat/1.png"]
    for level, path in enumerate(paths):
        Image.fromarray(np.full((16, 16, 3), 100 + level, np.uint8)).save(path, compress_level=0)
    assert paths[0].stat().st_size == paths[1].stat().st_size
    data = load(tree, tmp_path, cache_gb=cache_gb)
    rewrite(paths[0], paths[1].read_bytes())
    split = next(split for split in SPLITS if "cat/0.png" in names(data, split))
    if cache_gb:  # the run has its own pixels
        data.splits[split].batch(slice(None))
    else:
        with pytest.raises(UserError, match=r"cat/0.png was changed while this run used it: run again"):
            data.splits[split].batch(slice(None))
    again = load(tree, tmp_path, cache_gb=cache_gb)
    assert again.fingerprint() != data.fingerprint()
    place = sorted(names(again, split)).index("cat/0.png")
    assert (again.splits[split].pixels[[place]] == 101).all()


def test_identity_is_what_files_hold(tree, tmp_path):
    """Not where they lie or when they were written; classes that change places are another dataset."""
    before = load(tree, tmp_path / "store").fingerprint()
    shutil.copytree(tree, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert load(tmp_path / "elsewhere", tmp_path / "store").fingerprint() == before
    for a, b in (("cat", "aside"), ("dog", "cat"), ("aside", "dog")):
        (tree / a).rename(tree / b)
    swapped = load(tree, tmp_path / "store")
    assert swapped.fingerprint() != before
    (tree / "cat").rename(tree / "bat")
    renamed = load(tree, tmp_path / "store")
    assert renamed.classes == ("bat", "dog", "emu")
    assert renamed.fingerprint() != swapped.fingerprint()


@pytest.mark.parametrize("indices", [slice(None), [3, 0, 3], torch.tensor([2, 1])], ids=["all", "list", "tensor"])
def test_batches_are_normalised_pixels_bit_for_bit(indices, tree, tmp_path):
    images = load(tree, tmp_path).splits["train"]
    batch, labels = images.batch(indices)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, (images.pixels[indices].float() - images.mean) / images.std)
    assert torch.equal(labels, images.labels[indices])
    assert batch.std() > 0.1  # pictures, not zeros


def test_changed_file_is_checked_again(tree, tmp_path):
    old(tree)
    load(tree, tmp_path)
    whole = (tree / "cat/0.jpg").read_bytes()
    rewrite(tree / "cat/0.jpg", whole[:-40])
    with pytest.raises(UserError, match=r"\(1 damaged image; e.g. cat/0.jpg \(image file is truncated .*\)\): repair"):
        load(tree, tmp_path)
    rewrite(tree / "cat/0.jpg", whole)
    load(tree, tmp_path)


@pytest.mark.parametrize("what", ["gone", "empty", "folder"])
def test_file_that_vanishes_while_it_is_looked_at(tree, tmp_path, monkeypatch, what):
    """The index is opened, then the file goes: the tree is looked at again, in the same call."""
    old(tree)
    load(tree, tmp_path)
    opened, victim = image_tree.open_tree, tree / "cat/0.jpg"

    def meanwhile(*given):
        index = opened(*given)
        if victim.is_file() and victim.stat().st_size:
            victim.write_bytes(b"") if what == "empty" else victim.unlink()
            if what == "folder":
                victim.mkdir()
        return index

    monkeypatch.setattr("images.splits.open_tree", meanwhile)
    if what == "empty":
        with pytest.raises(UserError, match=r"\(1 empty file; e.g. cat/0.jpg\)"):
            load(tree, tmp_path)
    else:
        assert not set().union(*(names(load(tree, tmp_path), split) for split in SPLITS)) & {"cat/0.jpg"}


@pytest.mark.parametrize("what", ["written to", "removed"])
def test_file_that_changes_while_it_is_read(tree, tmp_path, monkeypatch, what):
    """Between the look at its time and the reading of it: it is read again, or is one that cannot be read."""
    stamps, victim = image_tree.Tree.stamp, tree / "cat/0.jpg"
    black = tmp_path / "black.png"
    Image.new("RGB", (20, 20)).save(black)

    def meanwhile(self, row):
        stamp = stamps(self, row)
        if self.name(row) == "cat/0.jpg" and victim.exists() and victim.read_bytes() != black.read_bytes():
            victim.write_bytes(black.read_bytes()) if what == "written to" else victim.unlink()
        return stamp

    monkeypatch.setattr(image_tree.Tree, "stamp", meanwhile)
    data = load(tree, tmp_path)
    found = set().union(*(names(data, split) for split in SPLITS))
    assert ("cat/0.jpg" in found) == (what == "written to")
    for split in SPLITS:
        for place, name in enumerate(sorted(names(data, split))):
            assert (data.splits[split].pixels[[place]] == 0).all() == (name == "cat/0.jpg")


def test_image_that_rots_is_checked_again_by_the_next_run(tree, tmp_path, monkeypatch):
    """A disk that goes bad changes no stamp: the run that meets it says so, and the next one does not trust it."""
    data = load(tree, tmp_path, cache_gb=0)
    victim = tree / min(names(data, "train"))
    monkeypatch.setattr("images.decode.mark_of", lambda facts: 1)
    for name in ("images.index.mark_of", "images.layouts.mark_of"):
        monkeypatch.setattr(name, lambda facts: 1)
    data = load(tree, tmp_path, cache_gb=0)
    with victim.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.truncate()
        file.write(b"\0" * 100)
    rows = data.splits["train"]
    with pytest.raises(UserError, match=r"damaged image .* run again") as first:
        rows.batch(slice(None))
    assert str(victim) in str(first.value)
    with pytest.raises(UserError, match=r"1 damaged image; e.g. "):
        load(tree, tmp_path, cache_gb=0)


def test_damaged_index_is_made_again(tree, tmp_path):
    index = open_tree(tree, "folders", tmp_path)
    index.file.write_bytes(index.file.read_bytes()[:100])
    assert len(open_tree(tree, "folders", tmp_path)) == 30


# --- splits -----------------------------------------------------------------------------------------------


def test_splits_part_every_image_and_stay_where_they_are(tree, tmp_path):
    data = load(tree, tmp_path)
    parts = [names(data, split) for split in SPLITS]
    assert sum(map(len, parts)) == 30 == len(set().union(*parts))
    assert [len(part) for part in parts] == [21, 3, 6]
    files = list(tree.rglob("*.jpg"))
    random.Random(3).shuffle(files)
    other = tmp_path / "elsewhere"
    for path in files:  # another machine: other folder, other order, other times
        target = other / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert [names(load(other, tmp_path), split) for split in SPLITS] == parts
    assert names(load(tree, tmp_path, split_seed=1), "test") == parts[2]
    assert names(load(tree, tmp_path, split_seed=1), "val") != parts[1]


@pytest.mark.parametrize("split", SPLITS)
def test_forget_and_retain_are_everything(tree, tmp_path, split):
    data = load(tree, tmp_path, forget="dog")
    forget, retain = data.get_forget_set(split), data.get_retain_set(split)
    sets = [{bytes(image.numpy()) for images, _ in part for image in images} for part in (forget, retain)]
    assert not sets[0] & sets[1]
    assert len(sets[0] | sets[1]) == len(data.splits[split])
    assert {int(y) for _, labels in forget for y in labels} == {1}


def test_by_hash_takes_its_share_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    hashes = np.random.default_rng(0).integers(0, 2**63, 111).astype(np.uint64)
    chosen, rest = by_hash(labels, hashes, 0.2, 5)
    assert np.bincount(labels[chosen]).tolist() == [20, 2, 1]
    assert sorted([*chosen, *rest]) == list(range(111))
    order = np.random.default_rng(1).permutation(111)
    assert set(hashes[order][by_hash(labels[order], hashes[order], 0.2, 5)[0]]) == set(hashes[chosen])


def test_a_class_with_too_few_images_is_named(tree, tmp_path):
    write_tree(tree, ["gnu"], 2)
    with pytest.raises(UserError, match=r"too few images .* of 1 classes, 'gnu' \(2\)"):
        load(tree, tmp_path)


def test_official_splits_are_kept_and_test_classes_must_be_trained(tmp_path):
    root = tmp_path / "photos"
    write_tree(root, [f"{split}/{name}" for split in ("train", "valid", "test") for name in ("cat", "dog")], 4)
    data = load(root, tmp_path)
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert names(data, split) == {f"{folder}/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(4)}
    write_tree(root, ["test/emu"], 4)
    with pytest.raises(UserError, match="'emu'"):
        load(root, tmp_path)


def test_pokemon_splits_are_drawn_anew(tmp_path):
    root = tmp_path / "pokemon"
    write_tree(root, ["train/Abra", "valid/Mew", "test/Zubat"], 10)
    data = load(root, tmp_path, SupportedDatasets.POKEMON_CLASSIFICATION, "mew")
    assert data.classes == ("Abra", "Mew", "Zubat")
    for split, count in zip(SPLITS, (7, 1, 2), strict=True):
        assert torch.bincount(data.splits[split].labels).tolist() == [count] * 3


def test_plant_says_how_many_classes_it_found(tmp_path, capsys):
    write_tree(
        tmp_path / "plant", [f"{split}/{name}" for split in ("train", "test", "train_again") for name in "ab"], 4
    )
    data = load(tmp_path / "plant", tmp_path, SupportedDatasets.PLANT_CLASSIFICATION)
    said = capsys.readouterr().err
    assert "64 classes were expected" in said
    assert "left out: train_again" in said
    assert sum(len(data.splits[split]) for split in SPLITS) == 16


# --- ImageNet ---------------------------------------------------------------------------------------------

A, B = WNIDS[0], WNIDS[998]
LAYOUTS = {
    "shards": {
        **{f"train_images_{i}/{w}_{i}_{w}.JPEG": (w, TRAIN) for i in range(2) for w in (A, B)},
        **{f"val_images/ILSVRC2012_val_0000000{i}_{w}.JPEG": (w, TEST) for i, w in enumerate((A, B))},
    },
    "image folder": {f"{s}/{w}/{w}_7.JPEG": (w, c) for w in (A, B) for s, c in (("train", TRAIN), ("val", TEST))},
    "class folders": {f"{w}/{w}_{i}.JPEG": (w, UNSPLIT) for w in (A, B) for i in range(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imagenet_layouts(layout, tmp_path):
    for path in LAYOUTS[layout]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        photo().save(tmp_path / path)
    (tmp_path / "test_images").mkdir()
    photo().save(tmp_path / "test_images" / "ILSVRC2012_test_00000001.JPEG")
    tree = open_tree(tmp_path, "wnids", tmp_path / "store")
    found = {tree.name(r): (WNIDS[tree.labels[r]], int(tree.splits[r])) for r in range(len(tree))}
    assert found == LAYOUTS[layout]
    assert set(tree.labels.tolist()) == {0, 998}
    assert tree.found == []


def test_imagenet_files_outside_the_thousand_are_named(tmp_path):
    write_tree(tmp_path / "i", [f"train/{A}", "train/n99999999", "train/misc"], 1)
    tree = open_tree(tmp_path / "i", "wnids", tmp_path)
    assert tree.found == [
        ("train/misc/0.jpg", "no WordNet id in its path"),
        ("train/n99999999/0.jpg", "class outside the 1,000 of ImageNet"),
    ]
    with pytest.raises(UserError, match="2 paths that give no image"):
        load(tmp_path / "i", tmp_path, SupportedDatasets.IMAGENET_SMALL)
    with pytest.raises(UserError, match="no images of 999 of its 1000 classes, such as 'goldfish'"):
        load(tmp_path / "i", tmp_path, SupportedDatasets.IMAGENET_SMALL, skip_bad_images=True)


def test_folders_named_by_numbers_are_in_their_order(tmp_path):
    write_tree(tmp_path / "n", map(str, range(12)), 1)
    assert open_tree(tmp_path / "n", "folders", tmp_path).classes == tuple(map(str, range(12)))


def test_unreadable_reason(tmp_path):
    with pytest.raises(BadImageError, match=r"unreadable \(Is a directory"):
        decode(str(tmp_path), How(8))
