"""Folder trees of JPEGs against torchvision's ImageFolder and DataLoader, on the same generated files, in one run.

    uv run benchmarks/image_trees.py                      20,000 JPEGs of 500x375 (about 1 GB in the folder --root)
    uv run benchmarks/image_trees.py --million 1280000    the index alone, of so many small files (5 GB)
    uv run benchmarks/image_trees.py --pictures DIR       real pictures at 32 pixels: the first look, and later epochs

Speed: medians of alternating repeats, images/s of whole loaders (decoding to 128x128 and normalising, 2 worker
processes there, 4 threads here), and seconds from nothing to a dataset that knows its paths and labels. `busy`: the
share of the two cores' time left free by other processes that our loader used. Pictures: `first_pass_ratio`, the
first look at some of them (indexed, decoded, hashed, kept) / decoding each of the same once, on the clock and in
seconds of the processor. Then images/s of later epochs, which read kept pixels: 3,072 bytes for each image, whatever
its file, so that a generated tree of 100 x 81 images stands for any other; 8 epochs of an MLP by the run's own trainer,
and reading the same batches without training.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import many_classes
from benchmarks.common import Tables, alternating, for_pages, keep, parser, peak_memory, publish_all, ratio

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from core.choices import SupportedDatasets, SupportedVisionModels, Trackers
from core.config import PROJECT_ROOT, DataConfig, TrainConfig
from core.observe import Tracker
from images.decode import How, decode_many
from images.index import Tree, check, open_tree
from images.splits import LazyPixels
from model import vision_model_loader
from trainer import VisionModelTrainer
from utils_data import Images, get_unlearning_dataset, make_loader

CLASSES, BATCH, SIZE, SMALL = 100, 256, 128, 32
EPOCHS, RUN_BATCHES, SPANS = 8, (32, 512), 8
KEPT = (100, 81)  # classes, and images of each, whose kept pixels are read again: as many as openclipart has
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def make_tree(root: Path, count: int, size: tuple[int, int]) -> Path:
    """`count` JPEGs with the edges and noise of photos, in class folders; 64 different contents."""
    target = root / f"jpegs-{count}-{size[0]}x{size[1]}"
    if target.exists():
        return target
    random = np.random.default_rng(0)
    contents = []
    for _ in range(64):
        rough = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(rough).astype(int) + random.integers(-20, 21, (size[1], size[0], 3))
        path = root / "one.jpg"
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        contents.append(path.read_bytes())
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    classes = min(1000, max(CLASSES, count // 1000))
    for label in range(classes):
        (part / f"class_{label:04}").mkdir(parents=True)
    for number in range(count):
        place = part / f"class_{number % classes:04}" / f"image_{number:08}_of_the_tree.JPEG"
        place.write_bytes(contents[number % 64])
    return part.rename(target)


def busy(function: Callable[[], None]) -> float:
    """Of the processor time that others left free, the share that this process used (1: nothing was left idle)."""

    def spent() -> tuple[float, float]:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()
        return sum(os.times()[:4]), sum(map(int, fields[4:6])) / os.sysconf("SC_CLK_TCK")

    used, idle = spent()
    function()
    used, idle = (after - before for after, before in zip(spent(), (used, idle), strict=True))
    return used / (used + idle)


def loading(root: Path, store: Path, batches: int, repeats: int) -> dict:
    """Images per second of both loaders, and how busy ours keeps two cores."""
    torch.set_num_threads(1)
    steps = [v2.PILToTensor(), v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.ToDtype(torch.float32)]
    folder = ImageFolder(str(root), v2.Compose([*steps, v2.Normalize(MEAN, STD)]))
    theirs = DataLoader(folder, BATCH, shuffle=True, num_workers=2)
    tree = open_tree(root, "folders", store)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = LazyPixels(tree, np.arange(len(tree)), How(SIZE), 4)
    ours = make_loader(Images(pixels, torch.from_numpy(tree.labels.astype(np.int64)), mean, std), BATCH, 0)

    def drain(loader: DataLoader) -> None:
        for _ in islice(iter(loader), batches):
            pass

    slow, fast = alternating([lambda: drain(theirs), lambda: drain(ours)], repeats)
    images = BATCH * batches
    return {
        "images_per_second": images / median(fast),
        "torchvision_images_per_second": images / median(slow),
        "ratio": ratio(slow, fast),
        "busy": busy(lambda: drain(ours)),
        "load_average": os.getloadavg()[0],
    }


def starting(root: Path, store: Path, repeats: int) -> dict:
    """Seconds to know all paths and labels: ImageFolder, the cold index, the cached one."""

    def cold() -> None:
        shutil.rmtree(store, ignore_errors=True)
        open_tree(root, "folders", store)

    theirs, anew, cached = [], [], []
    for _ in range(repeats):
        for function, times in ((lambda: ImageFolder(str(root)), theirs), (cold, anew)):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        open_tree(root, "folders", store)
        begun = time.perf_counter()
        open_tree(root, "folders", store)
        cached.append(time.perf_counter() - begun)
    return {
        "image_folder_seconds": median(theirs),
        "cold_seconds": median(anew),
        "cached_seconds": median(cached),
        "start_ratio": ratio(theirs, cached),
    }


def pictures(root: Path, store: Path, most: int) -> dict:
    """What the first look at pictures costs, against decoding each once: of `most` of them, spread over the tree.

    Both are done to the same SPANS parts of them in turn, the first look with a sync of the disk after each part.
    """
    torch.set_num_threads(1)
    how, threads = How(SMALL), 2 * len(os.sched_getaffinity(0))
    shutil.rmtree(store, ignore_errors=True)
    found: list[Tree] = []
    indexing = clocks(lambda: found.append(open_tree(root, "folders", store)))
    tree = found[0]
    rows = np.random.default_rng(0).permutation(np.unique(np.linspace(0, len(tree) - 1, most).astype(int)))

    def decode_all(rows: np.ndarray) -> None:
        decode_many([tree.path(row) for row in rows], [tree.stamp(row) for row in rows], how, threads)

    bare, first = [], [indexing]

    def look(rows: np.ndarray) -> None:
        check(tree, rows, how, threads, 20e9)

    for place, span in enumerate(np.array_split(rows, SPANS)):
        for path in map(Path, map(tree.path, span)):  # so that neither is the one that waits for the disk
            _ = path.read_bytes() if path.is_file() else b""
        for function, taken in ((decode_all, bare), (look, first))[:: 1 if place % 2 else -1]:
            taken.append(clocks(partial(function, span)))
    wall, processor = (sum(one[part] for one in first) / sum(one[part] for one in bare) for part in (0, 1))
    checked, cache = check(tree, rows, how, threads, 20e9)
    sound = np.setdiff1d(rows, list(checked.bad))
    kept = clocks(lambda: LazyPixels.kept(checked, sound, how, threads, cache)[:])
    decoded = sum(seconds for _, seconds in bare)
    results = {"files": len(tree), "read": len(rows), "first_pass_ratio": wall, "first_pass_processor_ratio": processor}
    return results | {"decode_processor_seconds": decoded, "kept_against_anew": decoded / kept[1]}


def clocks(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, that a call takes."""
    begun = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def epochs_of(root: Path, store: Path, batch: int) -> dict:
    """Images/s of reading kept pixels, and of epochs in which the run's own trainer trains an MLP on them.

    Rates are per second on the clock, and per second of the processor, which other programs do not take.
    """
    config = DataConfig(image_size=SMALL)
    data = get_unlearning_dataset(SupportedDatasets.FOLDER, batch, 0, root, datasets_dir=store, data=config)
    images = len(data.splits["train"])
    model = vision_model_loader(SupportedVisionModels.HookedMLPClassifier, data.num_classes, 3, SMALL)
    tracker = Tracker(Trackers.none, "", {})
    train = TrainConfig(epochs=EPOCHS, batch_size=batch)
    trainer = VisionModelTrainer(model, data, train, torch.device("cpu"), tracker)
    with tempfile.TemporaryDirectory() as folder:
        _, processor = clocks(lambda: trainer.train(Path(folder)))
    rates = [one["images_per_second"] for one in tracker.history if "images_per_second" in one]
    loader = data.get_train_loader()
    read = [clocks(lambda: [None for _ in loader]) for _ in range(EPOCHS)][1:]
    return {
        "images": images,
        "epochs_per_second": median(rates[1:]),
        "epochs_per_processor_second": EPOCHS * images / processor,
        "read_per_second": images / median(wall for wall, _ in read),
        "read_per_processor_second": images / median(seconds for _, seconds in read),
    }


MEMORY = """
import sys, time
from pathlib import Path
from images.decode import How
from images.index import open_tree
from images.splits import LazyPixels
from model import vision_model_loader
from images.pixel_cache import PixelCache
begun = time.perf_counter()
tree = open_tree(Path(sys.argv[1]), "folders", Path(sys.argv[2]))
seconds, processor = time.perf_counter() - begun, time.process_time()
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(seconds, processor, len(tree), int(peak) / 1024)
"""


def million(root: Path, store: Path) -> dict:
    """Seconds and peak memory [MiB, imports included] of fresh processes that index a tree and that reopen it."""
    shutil.rmtree(store, ignore_errors=True)
    results: dict[str, float] = {}
    for name in ("cold", "cached"):
        command = [sys.executable, "-c", MEMORY, str(root), str(store)]
        paths = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
        seconds, processor, files, mib = map(float, said.stdout.split())
        results |= {
            f"{name}_seconds": seconds,
            f"{name}_processor_seconds": processor,
            f"{name}_peak_mib": mib,
            "files": files,
        }
    return results


def tables(results: dict, given: argparse.Namespace) -> Tables:
    """Return the table of docs/speed.md that the results belong to."""
    head = ["what", "value"]
    if given.pictures:
        first = f"{results['first_pass_processor_ratio']:.2f} ({results['first_pass_ratio']:.2f} on the clock)"
        rows = [
            head,
            [f"first look at {results['read']:,} of {results['files']:,} real pictures / decoding each once", first],
            ["decoding them again / reading what was kept", f"{results['kept_against_anew']:,.0f}"],
        ]
        for batch in RUN_BATCHES:
            one = results[f"batch {batch}"]
            read, trained = (
                f"{one[f'{name}_per_processor_second']:,.0f} ({one[f'{name}_per_second']:,.0f} on the clock)"
                for name in ("read", "epochs")
            )
            rows.append([f"images/s of later epochs, batches of {batch}: read and normalised", read])
            rows.append(["the same, and an MLP trained on them", trained])
        return {"speed_pictures": (f"1 pass in {SPANS} parts; {EPOCHS} epochs; seconds of the processor", rows)}
    if given.million:
        sizes = {
            name: f"{results[f'{name}_seconds']:.2g} s, {results[f'{name}_peak_mib']:.0f} MiB"
            for name in ("cold", "cached")
        }
        what = f"{given.million / 1e6:g} million images: cold index"
        return {
            "speed_million": (
                "1 run",
                [head, [what, sizes["cold"]], ["the same from the cached index", sizes["cached"]]],
            )
        }
    rates = f"{results['images_per_second']:,.0f} / {results['torchvision_images_per_second']:,.0f}"
    loaded = f"{results['ratio']:.2f} ({rates}), 2 cores {100 * results['busy']:.0f} % busy"
    rows = [
        head,
        [f"folder of {given.count:,} JPEGs: images/s / torchvision's ImageFolder and DataLoader", loaded],
        ["its start-up, ImageFolder / cached index", f"{results['start_ratio']:.0f}"],
    ]
    return {"speed_image_trees": (f"medians of {given.repeats} repeats", rows)}


def show(results: dict, indent: str = "") -> None:
    """Print values by name, nested ones below their name."""
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, "    ")
        else:
            print(f"{indent}{name:32} {value:12.3f}")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("/tmp/mimu-trees"))
    made.add_argument("--count", type=int, default=20_000)
    made.add_argument("--million", type=int, help="index a tree of so many files instead")
    made.add_argument("--pictures", type=Path, help="a folder of class folders with pictures, instead")
    made.add_argument("--most", type=int, default=10**9, help="of the pictures, so many are looked at (default: all)")
    made.add_argument("--batches", type=int, default=8)
    made.add_argument("--repeats", type=int, default=3)
    for_pages(made)
    given: argparse.Namespace = made.parse_args()
    store = given.root / "store"
    if given.pictures:
        results = pictures(given.pictures, store, given.most)
        kept = many_classes.make_tree(given.root, *KEPT)
        results |= {f"batch {batch}": epochs_of(kept, given.root / "kept", batch) for batch in RUN_BATCHES}
    elif given.million:
        results = million(make_tree(given.root, given.million, (32, 24)), store)
    else:
        root = make_tree(given.root, given.count, (500, 375))
        results = starting(root, store, given.repeats) | loading(root, store, given.batches, given.repeats)
        results["peak_bytes"] = peak_memory()
    show(results)
    keep(given.json, results)
    publish_all(given.docs, tables(results, given))


if __name__ == "__main__":
    main()
