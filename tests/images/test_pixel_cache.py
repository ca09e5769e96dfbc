"""Kept pixels: the same as decoded ones to the bit, bounded, shared, and never trusted when something is amiss."""

import errno
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import DataConfig, SupportedDatasets, UserError
from images import index, pixel_cache
from images.decode import How, decode
from images.pixel_cache import PixelCache
from tests.helpers.formats import write_tree
from utils_data import SPLITS, get_unlearning_dataset

ROW = 3 * 16 * 16


def load(root, store, **options):
    data = DataConfig(**({"image_size": 16, "num_workers": 2} | options))
    return get_unlearning_dataset(SupportedDatasets.FOLDER, 8, 0, root, datasets_dir=store, data=data)


def pixels(data) -> dict:
    """Every image's pixels by its path."""
    found = {}
    for split in SPLITS:
        part = data.splits[split].pixels
        found |= zip(map(part.tree.name, part.rows.tolist()), part[:].numpy(), strict=True)
    return found


def caches(store) -> list[Path]:
    return sorted(store.rglob("*.pixels"))


@pytest.fixture
def tree(tmp_path):
    """Three classes of ten images."""
    write_tree(tmp_path / "photos", ["cat", "dog", "emu"], 10)
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch):
    """Paths that were decoded, by the check or later."""
    seen = []
    examine = index.examine

    def noted(path, *given, **named):
        seen.append(path)
        return examine(path, *given, **named)

    monkeypatch.setattr("images.index.examine", noted)
    monkeypatch.setattr("images.decode.examine", noted)
    monkeypatch.setattr("images.splits.examine", noted)
    return seen


def test_each_image_is_decoded_once_and_to_the_bit(tree, tmp_path, decoded):
    for _ in range(2):
        data = load(tree, tmp_path)
        for _ in range(2):
            found = pixels(data)
        assert len(decoded) == 30
    assert len(found) == 30
    for name, values in found.items():
        assert (values == decode(str(tree / name), How(16))).all()
    assert caches(tmp_path)[0].stat().st_size == 30 * ROW


def test_without_a_cache_images_are_decoded_each_time_and_this_is_said(tree, tmp_path, decoded, capsys):
    kept = pixels(load(tree, tmp_path / "kept"))
    data = load(tree, tmp_path / "bare", cache_gb=0)
    assert "images are decoded anew in every epoch: data.cache_gb is 0" in capsys.readouterr().err
    for count in (1, 2):
        found = pixels(data)
        assert len(decoded) == 30 + 30 + 30 * count
    assert all((found[name] == kept[name]).all() for name in kept)
    assert caches(tmp_path / "bare") == []


def test_copies_take_one_row_and_other_paths_the_same_pixels(tree, tmp_path):
    shutil.copyfile(tree / "cat/0.jpg", tree / "dog/copy.jpg")
    found = pixels(load(tree, tmp_path))
    assert (found["cat/0.jpg"] == found["dog/copy.jpg"]).all()
    assert caches(tmp_path)[0].stat().st_size == 30 * ROW


def test_a_change_costs_one_image(tree, tmp_path, decoded):
    load(tree, tmp_path)
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tree / "cat/0.jpg")
    found = pixels(load(tree, tmp_path))
    assert len(decoded) == 31
    assert (found["cat/0.jpg"] == 9).all()


def test_a_subset_comes_first_and_the_rest_is_added(tree, tmp_path, decoded):
    load(tree, tmp_path, max_train_samples=9)
    assert 9 <= len(decoded) < 30
    found = pixels(load(tree, tmp_path))
    assert len(decoded) == 30
    assert all((values == decode(str(tree / name), How(16))).all() for name, values in found.items())


@pytest.mark.parametrize("what", ["flip", "zero row", "swap rows", "cut", "gone", "index", "index flip", "index gone"])
def test_damage_is_noticed_and_mended(tree, tmp_path, what, capsys):
    wanted = pixels(load(tree, tmp_path))
    file = caches(tmp_path)[0]
    index = file.with_name(file.name.removesuffix(".pixels") + ".rows.safetensors")
    data = bytearray(file.read_bytes())
    if what == "flip":
        data[5 * ROW + 77] ^= 1
    elif what == "zero row":
        data[ROW : 2 * ROW] = bytes(ROW)
    elif what == "swap rows":
        data[:ROW], data[ROW : 2 * ROW] = data[ROW : 2 * ROW], data[:ROW]
    elif what == "cut":
        del data[-100:]
    file.write_bytes(data)
    if what == "gone":
        file.unlink()
    elif what == "index":
        index.write_bytes(index.read_bytes()[:50])
    elif what == "index flip":
        spoilt = bytearray(index.read_bytes())
        spoilt[-40] ^= 1
        index.write_bytes(spoilt)
    elif what == "index gone":
        index.unlink()
    capsys.readouterr()
    for again in range(2):
        found = pixels(load(tree, tmp_path))
        assert all((found[name] == wanted[name]).all() for name in wanted)
        assert ("is damaged" in capsys.readouterr().err) == (again == 0 and what != "index gone")
    assert caches(tmp_path)[0].stat().st_size == 30 * ROW


def test_what_is_begun_anew_leaves_a_running_process_its_pixels(tree, tmp_path, monkeypatch):
    """One run finds damage and goes on; the next, interrupted early, must not cut the file that the first has mapped:
    reading pages beyond a file's end kills a process.
    """
    monkeypatch.setattr(index, "SPAN_BYTES", 7 * ROW)
    monkeypatch.setattr(index, "LEAST_SPAN", 7)
    data = load(tree, tmp_path)
    wanted, file = pixels(data), caches(tmp_path)[0]
    before = file.stat().st_ino
    data.splits["train"].pixels.cache.distrust()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index, "_saved", killed)
        patched.setattr(index, "SECONDS_BETWEEN_SAVES", -1)
        with pytest.raises(KeyboardInterrupt):
            load(tree, tmp_path)
    assert file.stat().st_size == 7 * ROW
    assert file.stat().st_ino != before  # the old one lives as long as it is mapped
    found = pixels(data)
    assert all((found[name] == wanted[name]).all() for name in wanted)
    again = pixels(load(tree, tmp_path))
    assert all((again[name] == wanted[name]).all() for name in wanted)


def test_rows_that_were_not_saved_do_not_count(tree, tmp_path, monkeypatch):
    """A process killed between two saves leaves rows behind the last one; the next writes over them."""
    monkeypatch.setattr(index, "SPAN_BYTES", 7 * ROW)
    monkeypatch.setattr(index, "LEAST_SPAN", 7)
    monkeypatch.setattr(index, "SECONDS_BETWEEN_SAVES", -1)
    saves, save = [], PixelCache.save

    def killed(self):
        if len(saves) == 2:
            raise KeyboardInterrupt
        saves.append(1)
        save(self)

    monkeypatch.setattr(PixelCache, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        load(tree, tmp_path)
    assert caches(tmp_path)[0].stat().st_size == 21 * ROW
    assert len(kept_in(tmp_path)) == 14
    monkeypatch.setattr(PixelCache, "save", save)
    found = pixels(load(tree, tmp_path))
    assert all((values == decode(str(tree / name), How(16))).all() for name, values in found.items())
    assert len(kept_in(tmp_path)) == 30


def kept_in(store) -> PixelCache:
    file = caches(store)[0]
    return PixelCache(file.with_name(file.name.rpartition("-16-")[0]), How(16), 1e9)


def test_the_limit_holds_for_all_caches_together(tree, tmp_path, capsys):
    """Room for two caches of 30 images: a third pushes out the one that was used longest ago."""
    room = 70 * ROW / 1e9
    trees = [tree, tmp_path / "b", tmp_path / "c"]
    for place, root in enumerate(trees[1:]):
        write_tree(root, ["cat", "dog", "emu"], 10, f"{place}-{{}}.jpg")
    for age, root in enumerate(trees[:2]):
        load(root, tmp_path, cache_gb=room)
        (new,) = [path for path in caches(tmp_path) if path.name.startswith(f"{root.name}-")]
        os.utime(new, (10**9 + age, 10**9 + age))
    load(tree, tmp_path, cache_gb=room)  # used again: no longer the oldest
    load(trees[2], tmp_path, cache_gb=room)
    assert [path.name.partition("-")[0] for path in caches(tmp_path)] == ["c", "photos"]
    assert "removed" in (said := capsys.readouterr().err)
    assert "b-" in said
    found = pixels(load(trees[1], tmp_path, cache_gb=10 * ROW / 1e9))
    assert "30 images of 16 x 16 take 2.3e-05 GB, data.cache_gb allows 7.68e-06" in capsys.readouterr().err
    assert len(found) == 30
    assert len(caches(tmp_path)) == 2


def test_old_contents_give_way(tree, tmp_path):
    room = 40 * ROW / 1e9
    load(tree, tmp_path, cache_gb=room)
    for path in list(tree.rglob("*.jpg"))[:15]:
        Image.new("RGB", (20, 20), tuple(os.urandom(3))).save(path)
    found = pixels(load(tree, tmp_path, cache_gb=room))
    assert all((values == decode(str(tree / name), How(16))).all() for name, values in found.items())
    assert caches(tmp_path)[0].stat().st_size == 30 * ROW


@pytest.mark.parametrize("when", ["before", "rows", "index"])
def test_a_full_disk_costs_the_cache_and_nothing_else(tree, tmp_path, monkeypatch, capsys, when):
    if when == "before":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 9, 9))
    else:
        write = os.write
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        kinds = {"rows": ".pixels", "index": ".rows.safetensors"}

        def written(file, data):
            if kinds[when] in str(Path(f"/proc/self/fd/{file}").readlink()):
                write(file, data[:9])
                raise full
            return write(file, data)

        monkeypatch.setattr(os, "write", written)
    found = pixels(load(tree, tmp_path))
    assert len(found) == 30
    assert all((values == decode(str(tree / name), How(16))).all() for name, values in found.items())
    assert caches(tmp_path) == []
    said = capsys.readouterr().err
    assert said.count("images are decoded anew in every epoch") == 1


def test_a_copy_in_another_process_reads_the_file(tree, tmp_path):
    """Workers get the dataset pickled: without the pixels, which they map themselves."""
    images = load(tree, tmp_path, image_size=64).splits["train"]
    wanted, _ = images.batch(slice(None))
    packed = pickle.dumps(images)
    assert len(packed) < 20_000 < wanted.nbytes
    assert torch.equal(pickle.loads(packed).batch(slice(None))[0], wanted)


def _fill(root, store, queue):
    queue.put(load(root, store).fingerprint())


@pytest.mark.slow
def test_processes_that_begin_together_fill_one_cache(tree, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_fill, args=(tree, tmp_path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({queue.get(timeout=100) for _ in workers}) == 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert caches(tmp_path)[0].stat().st_size == 30 * ROW
    found = pixels(load(tree, tmp_path))
    assert all((values == decode(str(tree / name), How(16))).all() for name, values in found.items())


def test_a_bad_image_is_named_with_the_cache_too(tree, tmp_path):
    (tree / "cat/0.jpg").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 not an image; e.g. cat/0.jpg"):
            load(tree, tmp_path)
        assert len(load(tree, tmp_path, skip_bad_images=True).skipped_images) == 1


def test_max_pixels_decides_whatever_an_earlier_run_did(tree, tmp_path):
    """Not what is kept, but the setting says which images take part."""
    Image.new("RGB", (50, 50)).save(tree / "cat/big.png")
    assert "cat/big.png" in pixels(load(tree, tmp_path))
    small = load(tree, tmp_path, max_pixels=2499, skip_bad_images=True)
    assert pixels(small).keys() == {f"{name}/{number}.jpg" for name in ("cat", "dog", "emu") for number in range(10)}
    assert small.skipped_images == [
        {"path": "cat/big.png", "reason": "too many pixels (50 x 50: raise --data.max-pixels to read it)"}
    ]


def test_how_is_part_of_the_key(tree, tmp_path):
    """16-bit levels that are read with another white are other pixels, and another dataset."""
    Image.fromarray(np.full((20, 20), 1000, np.uint16)).save(tree / "cat/0.png")
    plain, told = load(tree, tmp_path), load(tree, tmp_path, sample_bits=10)
    assert (pixels(plain)["cat/0.png"] == 4).all()
    assert (pixels(told)["cat/0.png"] == 249).all()
    assert plain.fingerprint() != told.fingerprint()
    assert plain.image_notes[0].startswith("1 images have levels of 16 bits, of which none uses more than 10")
    assert told.image_notes == []
