"""ImageNet-1k with ResNet-50 on 1, 8 and 64 machines, on paper: unit costs that are measured here, multiplied.

    uv run benchmarks/imagenet.py [--root DIR] [--json PATH] [--docs]
    uv run benchmarks/imagenet.py --units PATH [--docs]    from what an earlier --json kept, or another machine's

Nothing of ImageNet is read. Decoding is measured on generated JPEGs of its usual size (500 x 375, scaled to 224), a
step of training and a forward pass on a ResNet-50 with random weights, and a library as `library --plan` does, on a
tree of 1,000 classes whose files are links to a few of these JPEGs. All are processor seconds of one thread; a machine
has CORES cores, and on each a process of one thread. The network between machines is assumed. A shared file system, a
scheduler, and waiting for the slowest process cost nothing.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, keep, parser, peak_memory, publish_all

import numpy as np
import torch
from PIL import Image

from commands.forget import Asking
from commands.inspect import Reading
from commands.library import Block
from core.artifacts import read_json
from core.config import GraphConfig
from forgetting.pictures import open_folder
from imagenet_classes import IMAGENET2012_CLASSES
from images.decode import How, decode_many
from planning.forecast import Forecast
from planning.library import Pieces, measured
from planning.units import Cost
from reporting.write import as_text

IMAGES, CLASSES, SIDE, BATCH = 1_281_167, 1_000, 224, 32
MACHINES, CORES = (1, 8, 64), 2
NETWORK = 10e9 / 8  # bytes/s between machines, assumed
EACH, KAPPA, LAYER = 50, "1%", "fc"  # images of a class that a library is made with; weights of a mask, and where
HEAD = (2_048, 128)  # inputs and outputs of the masked layer, put on top as ResNet-18 has it here
STEPS, TRAINED = 3, 16
JPEGS, QUALITY = 64, 90


@dataclass(frozen=True)
class Units:
    """What pieces cost on one core: processor seconds, and bytes.

    Args:
        decode: a JPEG. train: forward, backward and step of an image, in batches of 16. forward: of an image.
        gradients: bytes that a step exchanges. memory: of a process that trains, at most. library: its pieces.
    """

    decode: float
    train: float
    forward: float
    gradients: int
    memory: int
    library: Pieces


# --- arithmetic -------------------------------------------------------------------------------------------


def exchange(units: Units, machines: int) -> float:
    """Seconds of an epoch that a ring of machines exchanges gradients, none of them hidden behind a computation."""
    steps = IMAGES / (machines * CORES * BATCH)
    return steps * 2 * (machines - 1) / machines * units.gradients / NETWORK


def epoch(units: Units, machines: int) -> float:
    """Seconds of an epoch on all cores; every image is decoded, because 193 GB of pixels are not kept by default."""
    return IMAGES * (units.decode + units.train) / (machines * CORES) + exchange(units, machines)


def graph_count() -> int:
    """How many graphs the default settings ask for."""
    how = GraphConfig()
    return max(how.num_samples, how.min_per_class * CLASSES)


def graphs(units: Units) -> float:
    """Seconds of all graphs, which a single process makes, with the threads of its machine."""
    return graph_count() * (units.decode + units.forward) / CORES


def requests(units: Units, machines: int) -> Forecast:
    """A mask for every class: all processes read the same images, and each makes its share of the masks."""
    jobs = units.library.jobs(EACH * CLASSES, CLASSES, machines * CORES)
    return Forecast(jobs, len(jobs))


# --- measuring --------------------------------------------------------------------------------------------


def processor(work: Callable[[], object], repeats: int = STEPS) -> float:
    """Median processor seconds, after one warm-up."""
    work()
    found = []
    for _ in range(repeats):
        used = time.process_time()
        work()
        found.append(time.process_time() - used)
    return statistics.median(found)


def make_links(root: Path) -> Path:
    """Return a tree of EACH names in each of ImageNet's class folders, all of them links to a few JPEGs."""
    tree, random = root / f"imagenet-{EACH}", np.random.default_rng(0)
    if tree.exists():
        return tree
    part = root / "part"
    files = []
    (root / "jpegs").mkdir(parents=True, exist_ok=True)
    for number in range(JPEGS):
        rough = Image.fromarray(random.integers(0, 256, (24, 32, 3)).astype(np.uint8))
        smooth = np.asarray(rough.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + random.integers(-10, 11, smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(root / "jpegs" / f"{number}.jpg")
        Image.fromarray(noisy).save(files[-1], quality=QUALITY)
    for place, name in enumerate(IMAGENET2012_CLASSES):
        (part / name).mkdir(parents=True)
        for number in range(EACH):
            (part / name / f"{number}.jpg").hardlink_to(files[(place * EACH + number) % JPEGS])
    return part.rename(tree)


def training(_: int) -> tuple[float, int]:
    """Processor seconds of an image in a step of training, and bytes of a process that does nothing else."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model, images = resnet50().train(), torch.randn(TRAINED, 3, SIDE, SIDE)
    labels, optimiser = torch.randint(CLASSES, (TRAINED,)), torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return processor(step) / TRAINED, peak_memory()


def alone(work: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, 0).result()


def measure(root: Path) -> dict:
    """All units, and what they were measured on."""
    from torchvision.models import resnet50

    loaded, tree = time.process_time(), make_links(root)
    index = open_folder(tree)
    paths, stamps = [index.path(row) for row in range(JPEGS)], [index.stamp(row) for row in range(JPEGS)]
    decode = processor(lambda: decode_many(paths, stamps, How(SIDE), 1)) / JPEGS
    torch.manual_seed(0)
    model, images = resnet50().eval(), torch.randn(TRAINED, 3, SIDE, SIDE)
    torch.save(model.state_dict(), root / "resnet50.pt")

    def forward() -> None:
        with torch.no_grad():
            model(images)

    seen, (trained, memory) = processor(forward) / TRAINED, alone(training)
    read = Reading(size=SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    spec, asking = f"torchvision:resnet50@{root / 'resnet50.pt'}", Asking(images=tree, kappa=KAPPA, layer=(LAYER,))
    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        asked = Block(spec, root, asking, read).to_foresee(asking.opened(read, spec), Path(folder))
        pieces = measured(replace(asked, read=JPEGS, tried=2))
    start = loaded + pieces.load.processor - before
    gradients = sum(one.nbytes for one in model.parameters())
    units = Units(decode, trained, seen, gradients, memory, replace(pieces, load=Cost(start, start)))
    return asdict(units) | {"jpeg_kilobytes": statistics.mean(size for size, _ in stamps) / 1e3}


def units_of(kept: dict) -> Units:
    """Units that were written down."""
    pieces = dict(kept["library"])
    for name in ("load", "read", "check", "first", "further"):
        used = pieces[name]["processor"]
        pieces[name] = Cost(used, used)  # a core to itself
    names = ("decode", "train", "forward", "gradients", "memory")
    return Units(*(kept[name] for name in names), Pieces(**pieces))


# --- table ------------------------------------------------------------------------------------------------


def hours(seconds: float) -> str:
    """A time as people say it."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def tables(units: Units) -> Tables:
    """Return the tables of docs/scaling.md."""
    head = ["engine", "what", *(f"{count} machine{'s' * (count > 1)}" for count in MACHINES)]
    vectors = graph_count() * (4 * (HEAD[0] + 2 * HEAD[1]) + 8)
    library = [requests(units, count) for count in MACHINES]
    totals = [one.total for one in library]
    exchanged = ["none", *(hours(exchange(units, count)) for count in MACHINES[1:])]
    reading = hours(units.library.read.seconds * EACH * CLASSES)
    rows = [
        ["torchrun", "an epoch", *(hours(epoch(units, count)) for count in MACHINES)],
        ["torchrun", "of that, exchange of gradients", *exchanged],
        ["torchrun", "64,000 graphs, by rank 0 alone", *[hours(graphs(units))] * len(MACHINES)],
        ["torchrun", "masks for all classes", *["-"] * len(MACHINES)],
        ["Slurm, Ray", "an epoch of one training", *[hours(epoch(units, 1))] * len(MACHINES)],
        ["Slurm, Ray", "64,000 graphs, made once", *[hours(graphs(units))] * len(MACHINES)],
        ["Slurm, Ray", "masks for all classes", *(hours(one.seconds) for one in library)],
        ["Slurm, Ray", f"of that, reading {EACH * CLASSES:,} images", *[reading] * len(MACHINES)],
        ["all", "memory of a machine that trains, GB", *[f"{CORES * units.memory / 1e9:.1f}"] * len(MACHINES)],
        ["all", "memory of a machine that makes masks, GB", *(f"{CORES * one.memory / 1e9:.0f}" for one in totals)],
        ["all", "disk: graphs, saved state, masks, GB",
         *[f"{vectors / 1e9:.1f}, {3 * units.gradients / 1e9:.1f}, {one.disk / 1e9:.2f}" for one in totals]],
    ]  # fmt: skip
    measured_here = [
        ["unit, one core", "value", ""],
        ["decoding a JPEG of 500 x 375 to 224", f"{1e3 * units.decode:.1f} ms", "measured"],
        ["an image trained on, in batches of 16", f"{units.train:.2f} s", "measured"],
        ["an image's forward pass, and a graph", f"{units.forward:.3f} s", "measured; of a graph estimated"],
        ["an image of a library, decoded and passed", f"{units.library.read.seconds:.3f} s", "measured"],
        ["a mask of 1 % of the last layer, 2,048,000 weights: the first, a further one",
         f"{units.library.first.seconds:.1f} s, {units.library.further.seconds:.1f} s", "measured"],
        ["what an image leaves before the masked layer", f"{units.library.row / 1e3:.1f} kB", "measured"],
        ["gradients of a step", f"{units.gradients / 1e6:.0f} MB", "counted"],
        ["network between machines", "10 Gbit/s", "assumed"],
    ]  # fmt: skip
    return {
        "scaling_imagenet": (f"arithmetic; machines of {CORES} cores, a process of one thread on each", [head, *rows]),
        "scaling_imagenet_units": ("1 measurement of each, processor seconds of one thread", measured_here),
    }


def main() -> None:
    """Measure or read units, multiply, show."""
    made = parser(__doc__)
    made.add_argument("--root", type=Path, default=Path("/tmp/mimu-imagenet"))
    made.add_argument("--units", type=Path, help="a file that --json wrote: nothing is measured")
    for_pages(made)
    given: argparse.Namespace = made.parse_args()
    found = read_json(given.units, foreign=True) if given.units else measure(given.root)
    keep(given.json, found)
    made_tables = tables(units_of(found))
    for n, rows in made_tables.values():
        print(as_text(rows) + n)
    publish_all(given.docs, made_tables)


if __name__ == "__main__":
    main()
