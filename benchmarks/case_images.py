"""Cases of image folders and archives: which images are meant, what their classes are called, how they are read."""

import base64
import io
import re
import shutil
import unicodedata

from benchmarks import case_inputs as make
from benchmarks.case_outcome import Checkout, Judged, both, case

import numpy as np
from PIL import Image


@case("A", "class names made of digits")
def digits_in_names(b: Checkout) -> Judged:
    trees = {"1": ("1", "2", "3"), "12": tuple(map(str, range(1, 13))), "007": ("007", "7", "10")}
    judged = []
    for typed, classes in trees.items():
        root = make.tree(b.place / f"tree{typed}", classes)
        ended = b.tree(root, "--forget-class", typed, out=f"out{typed}")
        got = b.forgotten(f"out{typed}")
        judged.append((got == [typed], f"{typed} forgets {got[0] if got else ended.last}"))
    return both(*judged)


@case("B", "contents change under the same path: a sweep again")
def contents_decide(b: Checkout) -> Judged:
    root = make.tree(b.place / "tree")
    flags = {"train": "{epochs: 2, batch_size: 16}", "kappa_list": "[200]", "data": "{image_size: 32}"}
    flags |= {"eval": "{methods: [mimu, random, default], references: 0, metrics: [core]}", "tracker": "none"}
    flags |= {
        "vision_dataset": "FOLDER",
        "dataset_path": str(root),
        "output_dir": str(b.place / "out"),
        "forget_class": "[cat]",
    }
    flags |= {"gcn_path": str(b.project / "pretrained/gcn_mlp.safetensors")}
    text = "\n".join(f"{name}: {value}" for name, value in flags.items())
    (b.place / "sweep.yaml").write_text(text + "\nsweep:\n  workers: 1\n  over:\n    seed: [0]\n")
    b.call(["sweep", "--config", b.place / "sweep.yaml"])
    (root / "cat").rename(root / "aside")
    (root / "dog").rename(root / "cat")
    (root / "aside").rename(root / "dog")
    again = b.call(["sweep", "--config", b.place / "sweep.yaml"])
    count = len(b.records())
    return count == 2 and again.code == 0, f"{count} records after the class folders were swapped"


@case("C", "two folders compared, one folder under two paths")
def datasets_by_contents(b: Checkout) -> Judged:
    one, other = make.tree(b.place / "one"), make.tree(b.place / "other", count=12)
    shutil.copytree(one, b.place / "copy")
    for out, root in (("a", one), ("b", other), ("c", b.place / "copy")):
        b.tree(root, "--forget-class", "cat", out=out)
    different = b.call(["report", "--compare", b.place / "a", b.place / "b"])
    same = b.call(["report", "--compare", b.place / "a", b.place / "c"])
    return both(
        (different.refused, f"different images: exit {different.code}"),
        (same.code == 0, f"same images, two paths: exit {same.code}"),
    )


@case("E", "splits and wrappers are no classes")
def splits_are_splits(b: Checkout) -> Judged:
    splits = b.tree(make.tree(b.place / "training", splits=("training", "testing")), "--forget-class", "cat", out="a")
    for split in ("train", "test"):
        make.put(b.place / "flat" / split, 8)
    flat = b.tree(b.place / "flat", out="b")
    wrapped = b.tree(make.tree(b.place / "wrap/dataset").parent, "--forget-class", "cat", out="c")
    zipped = b.place / "zipped"
    zipped.mkdir()
    shutil.make_archive(str(zipped / "photos"), "zip", make.tree(b.place / "base"))
    prepared = b.call(["prepare", "FOLDER", "--dataset-path", zipped, "--output-dir", b.place / "d"])
    after = b.tree(zipped, "--forget-class", "cat", out="d")
    return both(
        (b.forgotten("a") == ["cat"], f"training/testing: exit {splits.code}"),
        (flat.refused, f"images right in train/: exit {flat.code}"),
        (b.forgotten("c") == ["cat"], f"wrapper: exit {wrapped.code}"),
        (b.forgotten("d") == ["cat"], f"prepare: exit {prepared.code}, then {after.code}"),
    )


def _first_sample(b: Checkout, out: str) -> np.ndarray | None:
    records = b.records(out)
    if not records:
        return None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(records[0]["samples"]["images"][0]))).convert("L"))


@case("F", "pixels as a viewer shows them")
def as_shown(b: Checkout) -> Judged:
    b.tree(make.turned(b.place / "exif"), "--forget-class", "owl", out="a")
    turned = _first_sample(b, "a")
    upright = turned is not None and turned[:10].mean() > turned[-10:].mean() + 100
    deep = b.tree(make.twelve_bits(b.place / "dark"), "--forget-class", "owl", out="b")
    said = re.search(r"1[26][- ]bit|bits", deep.err) is not None
    return both(
        (upright, "orientation " + ("applied" if upright else "ignored")), (said, f"12 of 16 bits said: {said}")
    )


@case("G", "the same image for training and test")
def duplicates_are_counted(b: Checkout) -> Judged:
    ended = b.tree(make.same_on_both_sides(b.place / "tree"), "--forget-class", "cat")
    said = re.search(r"same|duplicate|twice", ended.err) is not None
    return ended.code == 0 and said, "said" if said else "not a word"


@case("H", "nothing to read")
def nothing_there(b: Checkout) -> Judged:
    make.put(b.place / "flat", 12)
    (b.place / "empty").mkdir()
    judged = []
    for name in ("flat", "empty"):
        ended = b.tree(b.place / name)
        judged.append((ended.refused, f"{name}: exit {ended.code}{'' if ended.in_one_sentence else ', traceback'}"))
    return both(*judged)


@case("K", "a class folder whose name is no UTF-8")
def odd_bytes(b: Checkout) -> Judged:
    root = make.with_odd_name(b.place / "tree")
    other = b.tree(root, "--forget-class", "cat", out="a")
    itself = b.tree(root, "--forget-class", b"caf\xe9".decode("utf-8", "surrogateescape"), out="b")
    report = b.call(["report", "--output-dir", b.place / "b"])
    return both(
        (other.code == 0, f"beside it: {other.last}"),
        (itself.code == 0 and len(b.records("b")) == 1, f"forgotten: {itself.last}"),
        (report.code == 0, f"report: exit {report.code}"),
    )


@case("T", "a name typed in another Unicode form")
def unicode_forms(b: Checkout) -> Judged:
    root = make.tree(b.place / "tree", (unicodedata.normalize("NFD", "café"), "dog", "owl"))
    ended = b.tree(root, "--forget-class", unicodedata.normalize("NFC", "café"))
    return ended.code == 0, ended.last


@case("W", "what operating systems leave in folders")
def litter(b: Checkout) -> Judged:
    ended = b.tree(make.with_litter(b.place / "tree"), "--forget-class", "cat")
    return ended.code == 0, ended.last


@case("X", "torchvision's own layout")
def torchvision_layout(b: Checkout) -> Judged:
    root = b.place / "root"
    make.mnist(root / "MNIST/raw")
    judged = []
    for number, path in enumerate((root, root / "MNIST", root / "MNIST/raw")):
        ended = b.run(["MNIST", "--dataset-path", path], out=str(number))
        judged.append((ended.code == 0, f"{path.relative_to(b.place)}: exit {ended.code}"))
    return both(*judged)


@case("P", "images too large")
def large_scans(b: Checkout) -> Judged:
    big = b.tree(make.with_scan(b.place / "big", 14000), "--forget-class", "cat", out="a")
    large = b.tree(make.with_scan(b.place / "large", 11000), "--forget-class", "cat", out="b")
    reason = re.search(r"pixels", big.err) is not None
    return both(
        (big.code == 0 or (big.refused and reason), f"14,000 x 14,000: {'the limit' if reason else 'not an image'}"),
        (large.code == 0 and "Warning" not in large.err, f"11,000 x 11,000: exit {large.code}"),
    )


@case("U", "an image is touched between two runs")
def touched(b: Checkout) -> Judged:
    root = make.tree(b.place / "tree")
    b.tree(root, "--forget-class", "cat")
    (root / "cat/img000.jpg").touch()
    ended = b.tree(root, "--forget-class", "cat")
    return ended.code == 0, ended.last


@case("Z", "a folder of large pictures, several epochs")
def decoded_once(b: Checkout) -> Judged:
    wave = np.add.outer(np.arange(1200), np.arange(1200))
    for number, name in enumerate(("cat", "dog", "owl")):
        (b.place / "tree" / name).mkdir(parents=True)
        for image in range(40):
            pixels = np.stack([(wave * (1 + number) + 7 * image + 80 * c) % 256 for c in range(3)], -1)
            Image.fromarray(pixels.astype(np.uint8)).save(b.place / "tree" / name / f"{image}.png")
    ended = b.tree(b.place / "tree", "--forget-class", "cat", "--train.epochs", "6")
    rates = [float(rate) for rate in re.findall(r"epoch 6/6.*?([\d.]+) images/s", ended.err)]
    return bool(rates) and rates[0] > 3000, f"last epoch: {rates[0] if rates else '?'} images/s"


@case("AP", "memory of many classes")
def many_classes(b: Checkout) -> Judged:
    most = {}
    for classes in (250, 1000):
        root = b.place / str(classes)
        for number in range(classes):
            folder = root / f"c{number:04d}"
            folder.mkdir(parents=True)
            for image in range(20):
                make.photo(make.COLOURS[number % 6], 16, 50).save(folder / f"{image}.png")
        methods = ["--eval.methods", "mimu", "taylor_mask", "random", "sft", "logit_drop", "retrain", "default"]
        methods += ["--eval.references", "1", "--eval.metrics", "core", "train", "retrain"]
        ended = b.tree(root, "--data.image-size", "16", "--forget-class", "c0003", *methods, out=f"out{classes}")
        most[classes] = ended.megabytes
        if ended.code:
            return False, ended.last
    grown = (most[1000] - most[250]) / 750
    return grown < 1.0, f"{most[250]:.0f} MB at 250 classes, {most[1000]:.0f} MB at 1,000: {grown:.2f} MB a class"
