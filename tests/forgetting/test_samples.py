"""A user's images as rows in three parts: each image in one of them whatever the order, rows as the model has them."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetting import samples
from forgetting.answers import Answering
from forgetting.pictures import Folder, Loader, open_folder
from forgetting.samples import Parts, foreseen, read_samples
from images.names import TEST, TRAIN, UNSPLIT, VAL
from models.foreign import ForeignClassifier
from tests.helpers.foreign import resnet
from tests.helpers.patterns import NAMES, prepared, write_folder
from unlearn.features import TAYLOR_LAMBDA

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), 20)


def classifier(images: Tensor) -> ForeignClassifier:
    return ForeignClassifier(resnet(), lambda output: output, images, 5)


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 5, (count,), generator=generator)


def folder(photos: Path, most: int | None = None) -> Folder:
    tree = open_folder(photos)
    return Folder(tree, range(len(tree.classes)), prepared, most=most)


def members(parts: Parts, images: Tensor) -> dict[str, set[bytes]]:
    """Each part as a set of its images' bytes."""
    return {name: {images[at].numpy().tobytes() for at in getattr(parts, name).places.tolist()} for name in PARTS}


def test_test_images_that_are_copies_of_others_are_counted_and_said(photos, tmp_path, capsys):
    """The oracle is a comparison of pixels; without copies nothing is said."""
    images = torch.stack([image for batch in folder(photos) for image in batch.images])
    read_samples(classifier(images), folder(photos))
    assert "test images are also" not in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / "photos")
    for number in range(20):
        shutil.copy(photos / NAMES[0] / f"{number}.png", tmp_path / "photos" / NAMES[0] / f"copy-{number}.png")
    source = folder(tmp_path / "photos")
    parts = read_samples(classifier(images), source)
    every = torch.cat([batch.images for batch in source])
    held = members(parts, every)
    test = [every[at].numpy().tobytes() for at in parts.test.places.tolist()]
    again = sum(one in held["train"] | held["val"] for one in test)
    assert again > 0
    assert f"{again} of {len(test)} test images are also among those" in capsys.readouterr().err


def test_a_loaders_equal_images_are_of_one_part():
    """Parts are drawn by the images' values, so that nothing is to be said."""
    images, labels = drawn(30)
    source = Loader([(images, labels), (images, labels)], 5)
    parts = read_samples(classifier(images), source)
    held = members(parts, torch.cat([images, images]))
    crossing = held["test"] & (held["train"] | held["val"])
    assert len(crossing) <= 5, "one of each class at most, where the share ends between two copies"


# --- rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [16, 50])
def test_rows_in_a_file_are_those_in_memory(batch):
    images, labels = drawn(50)
    model = classifier(images)
    source = Loader(list(zip(images.split(batch), labels.split(batch), strict=True)), 5)
    memory, file = read_samples(model, source), read_samples(model, source, most=0)
    with torch.no_grad():
        full = model(images)
    for name in PARTS:
        kept, mapped = getattr(memory, name), getattr(file, name)
        assert torch.equal(kept.h, mapped.h)
        assert kept.places.tolist() == mapped.places.tolist()
        assert torch.equal(mapped.labels, labels[mapped.places])
        assert torch.equal(mapped.logits(model).argmax(1), full[mapped.places].argmax(1))
        assert torch.allclose(mapped.logits(model), full[mapped.places], rtol=1e-5, atol=1e-5)
    assert (memory.digest, memory.counts.tolist()) == (file.digest, file.counts.tolist())
    assert memory.counts.tolist() == torch.bincount(labels, minlength=5).tolist()


def test_a_loader_that_comes_class_by_class_gives_the_same_rows_in_the_same_order():
    """A request retains the first rows alone: of sorted ones these are the first classes."""
    images, labels = drawn(60)
    model, order = classifier(images), labels.argsort()
    usual, ordered = (
        read_samples(model, Loader([(images[at], labels[at])], 5)).train for at in (torch.arange(60), order)
    )
    assert torch.equal(usual.labels, ordered.labels)
    assert torch.allclose(usual.h, ordered.h, rtol=1e-5, atol=1e-5)
    assert len(set(ordered.labels[:10].tolist())) > 2


def test_what_masks_are_sought_with_is_capped_for_each_class_alike(monkeypatch):
    images, labels = drawn(120)
    model = classifier(images)
    whole = read_samples(model, Loader([(images, labels)], 5))
    monkeypatch.setattr(samples, "MOST_TRAIN_BYTES", whole.train.rows[:1].nbytes * 20)
    capped = read_samples(model, Loader([(images, labels)], 5))
    counts = Counter(capped.train.labels.tolist())
    assert set(capped.train.places.tolist()) < set(whole.train.places.tolist())
    assert dict(counts) == dict.fromkeys(range(5), 4)
    assert capped.test.places.tolist() == whole.test.places.tolist()


# --- parts ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(0, 2**32))
def test_every_image_is_in_one_part_and_every_class_in_all(counts, seed):
    """Shares by hand: .3 of a class for test, .4 of the rest for val, at least one each."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    keys = np.random.default_rng(seed + 1).integers(0, 2**63, len(labels)).astype(np.uint64)
    parts = samples._parted(labels, keys, np.full(len(labels), UNSPLIT))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    for label, count in enumerate(counts):
        test = max(1, round(0.3 * count))
        val = max(1, round(0.4 * (count - test)))
        found = [int((labels[parts[name]] == label).sum()) for name in PARTS]
        assert found == [count - test - val, val, test]
        assert min(found) >= 1


def test_order_moves_no_image_and_further_images_few():
    images, labels = drawn(200)
    model = classifier(images)
    before = read_samples(model, Loader([(images, labels)], 5))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    shuffled = read_samples(model, Loader(zip(images[order], labels[order], strict=True), 5))
    assert members(shuffled, images[order]) == members(before, images)
    more, their = drawn(10, seed=7)
    both = torch.cat([images, more])
    after = read_samples(model, Loader([(both, torch.cat([labels, their]))], 5))
    was, now = members(before, images), members(after, both)
    assert sum(len(was[name] - now[name]) for name in PARTS) <= 2 * len(more)


def test_parts_that_the_folder_names_are_kept(tmp_path):
    for part, each in (("train", 9), ("val", 4), ("test", 5)):
        write_folder(tmp_path / part, each)
    source = folder(tmp_path)
    splits = source.tree.splits[source.rows]
    parts = foreseen(source, 4)
    for name, code, each in (("train", TRAIN, 9), ("val", VAL, 4), ("test", TEST, 5)):
        part = getattr(parts, name)
        assert (splits[part.places.numpy()] == code).all()
        assert Counter(part.labels.tolist()) == dict.fromkeys(range(4), each)


@pytest.mark.parametrize(("lacking", "share"), [("val", 0.4), ("test", 0.3)])
def test_a_part_that_the_folder_lacks_is_drawn_from_its_train_images(lacking, share, tmp_path):
    for part in PARTS:
        write_folder(tmp_path / part, 10)
    shutil.rmtree(tmp_path / lacking)
    source = folder(tmp_path)
    parts, splits = foreseen(source, 4), source.tree.splits[source.rows]
    drawn_ = getattr(parts, lacking)
    assert len(drawn_) == 4 * round(10 * share)
    assert (splits[drawn_.places.numpy()] == TRAIN).all()
    assert len(parts.train) == 40 - len(drawn_)


def test_what_is_foreseen_is_what_is_read(photos):
    source = folder(photos)
    model = ForeignClassifier(resnet(), lambda output: output, torch.randn(4, 3, 16, 16), 5)
    seen, read = foreseen(source, 5), read_samples(model, source)
    for name in PARTS:
        assert getattr(seen, name).places.tolist() == getattr(read, name).places.tolist()
        assert getattr(seen, name).labels.tolist() == getattr(read, name).labels.tolist()
    assert seen.counts.tolist() == read.counts.tolist() == [20, 20, 20, 20, 0]


# --- folders ----------------------------------------------------------------------------------------------


def test_the_digest_follows_content_and_class_and_nothing_else(photos, tmp_path):
    def digest(place: Path) -> str:
        source = folder(place)
        assert sum(len(batch.labels) for batch in source) == len(source)
        return source.digest()

    copy = Path(shutil.copytree(photos, tmp_path / "copy"))
    whole = digest(photos)
    for path in sorted((copy / "dots").iterdir()):
        path.rename(path.with_name(f"renamed {path.name}"))
    assert digest(copy) == whole
    one = next((copy / "dots").iterdir())
    shutil.move(one, copy / "rings" / "moved.png")
    assert digest(copy) != whole
    shutil.move(copy / "rings" / "moved.png", one)
    assert digest(copy) == whole
    one.unlink()
    assert digest(copy) != whole


def test_the_digest_of_a_loader_follows_values_and_labels():
    images, labels = drawn(12)

    def digest(images: Tensor, labels: Tensor, batch: int = 5) -> str:
        source = Loader(list(zip(images.split(batch), labels.split(batch), strict=True)), 5)
        assert sum(len(one.labels) for one in source) == 12
        return source.digest()

    whole = digest(images, labels)
    assert digest(images, labels, batch=12) == whole
    assert digest(images, (labels + 1) % 5) != whole
    assert digest(images + 1, labels) != whole


def test_the_same_images_come_in_the_same_order_and_at_most_so_many_of_a_class(photos):
    whole, some = folder(photos), folder(photos, most=7)
    passes = [torch.cat([batch.images for batch in whole]) for _ in range(2)]
    assert torch.equal(*passes)
    labels = torch.cat([batch.labels for batch in some])
    assert Counter(labels.tolist()) == dict.fromkeys(range(len(NAMES)), 7)
    assert set(some.rows.tolist()) <= set(whole.rows.tolist())
    again = folder(photos, most=9)
    assert set(some.rows.tolist()) <= set(again.rows.tolist())


# --- statistics of classes --------------------------------------------------------------------------------


def naive_taylor(model: ForeignClassifier, parts: Parts, forgotten: set[int]) -> Tensor:
    """-W dL/dW of every class by autograd on the whole model, one after the other; then their means on either side."""
    (weight,), graph = model.weights(), model.weight_graph()
    sides: dict[bool, list[Tensor]] = {True: [], False: []}
    for label in range(5):
        rows = parts.train.rows[parts.train.places[parts.train.labels == label]]
        changed = weight.detach().clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model.head(rows, None, [changed]), torch.full((len(rows),), label))
        (gradient,) = torch.autograd.grad(loss, changed)
        sides[label in forgotten].append(-(weight.detach() * gradient).reshape(graph.shapes[0]))
    forget, retain = (graph.join([torch.stack(sides[side]).mean(0)]) for side in (True, False))
    return forget - TAYLOR_LAMBDA * retain.clamp_min(0)


@pytest.mark.parametrize("batch", [7, 256])
def test_scores_in_one_pass_over_all_rows_are_those_of_a_pass_for_each_class(batch, monkeypatch):
    monkeypatch.setattr(samples, "AT_ONCE", batch)
    images, labels = drawn(150)
    labels[labels == 3] = 1  # one class with many images and ...
    labels[:6] = 3  # ... one with few
    model = classifier(images)
    parts = read_samples(model, Loader([(images, labels)], 5))
    statistics = Answering(model, parts).head.statistics
    for classes in ((0,), (3,), (1, 4)):
        expected = naive_taylor(model, parts, set(classes))
        assert torch.allclose(statistics.signed_taylor(classes), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("outputs", [5, 300])
def test_a_class_among_many_costs_what_it_costs_among_few(outputs, monkeypatch):
    """Passes through the head: one over all rows for the first request, then one over the class's own for each."""
    images, labels = drawn(100)
    net = resnet()
    net.fc = torch.nn.Linear(net.fc.in_features, outputs)
    model = ForeignClassifier(net, lambda output: output, images, outputs)
    parts, rows = read_samples(model, Loader([(images, labels)], outputs)), []
    plain = model.head
    monkeypatch.setattr(model, "head", lambda h, *more: rows.append(len(h)) or plain(h, *more))
    statistics = Answering(model, parts).head.statistics
    for label in (0, 1):
        rows.clear()
        statistics.signed_taylor((label,))
        own = int((parts.train.labels == label).sum())
        assert sum(rows) == own + len(parts.train) * (label == 0)
        assert len(rows) == 1 + (label == 0)
