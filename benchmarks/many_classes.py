"""What a run takes as classes grow: seconds, processor seconds and peak memory of whole default runs.

    uv run benchmarks/many_classes.py                              MLP, 10, 100 and 1,000 classes of 40 images, 32 px
    uv run benchmarks/many_classes.py --model HookedResnet --size 64 --train-epochs 1
    uv run benchmarks/many_classes.py --plot                       draw docs/many-classes.png from what was published

Trees are generated below --root: a coloured pattern for each class, images that vary it. Each run is a process of its
own, with nothing there but the tree: images are decoded, a classifier, its graphs, a graph network and a retrained
classifier are made, and all default methods are judged by all default metrics. Peak memory is the largest resident size
of a process of the run, which counts pages of kept pixels that the system could take back. The growth exponent is that
of the memory beyond the smallest run's: 1 is linear in classes, and therefore also in images, 40 for each class.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, keep, parser, publish_all
from benchmarks.docs_tables import load
from benchmarks.picture import small_png

import numpy as np
from PIL import Image

from core.artifacts import write_bytes
from core.config import PROJECT_ROOT
from core.records import read_records

PLOT = PROJECT_ROOT / "docs" / "many-classes.png"
EACH, SIDE, ROUGH = 40, 32, 4
SHOWN = ("classifier", "graphs", "gcn", "evaluation")


def make_tree(root: Path, classes: int, each: int = EACH) -> Path:
    """Return class folders of `each` different PNG of 32 x 32, made unless they are there.

    An image is its class's pattern of 4 x 4 colours, scaled up, with a pattern of its own and noise on it.
    """
    target = root / f"classes-{classes}-x-{each}"
    if target.exists():
        return target
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    random = np.random.default_rng(0)
    for label in range(classes):
        folder = part / f"class_{label:04}"
        folder.mkdir(parents=True)
        own = random.integers(0, 256, (ROUGH, ROUGH, 3))
        for number in range(each):
            rough = own + random.integers(-40, 41, own.shape)
            smooth = Image.fromarray(rough.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            noisy = np.asarray(smooth).astype(int) + random.integers(-12, 13, (SIDE, SIDE, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return part.rename(target)


def whole_run(tree: Path, output: Path, flags: Sequence[str]) -> dict:
    """Run `main.py` on a tree into an empty folder; return its seconds, those of its stages, and its peak memory.

    Raises:
        RuntimeError: the run failed; the text is the end of its log.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    where = ("--vision-dataset", "folder", "--dataset-path", str(tree), "--output-dir", str(output))
    command = [sys.executable, str(PROJECT_ROOT / "main.py"), "run", *where, *flags]
    said, begun = output / "log.txt", time.perf_counter()
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{said.read_text()[-2000:]}")
    records = read_records(output)
    stages = records[0]["provenance"]["seconds"]
    evaluation = sum(record["provenance"]["seconds"]["evaluation"] for record in records)
    return {
        "seconds": time.perf_counter() - begun,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "stages": stages | {"evaluation": evaluation},
        "records": len(records),
    }


def exponent(peaks: dict[int, int]) -> float:
    """Growth exponent of the memory beyond the smallest run's, from the second to the largest number of classes."""
    (least, base), (middle, some), (most, all_of_it) = sorted(peaks.items())
    return math.log((all_of_it - base) / (some - base)) / math.log((most - least) / (middle - least))


def tables(results: dict, given: argparse.Namespace) -> Tables:
    """Return the table of docs/speed.md."""
    head = ["classes", "images", "peak memory, GB", "processor seconds", "seconds on the clock"]
    rows = [
        [f"{classes:,}", f"{classes * EACH:,}", f"{one['peak_bytes'] / 1e9:.2f}"]
        + [f"{one[name]:,.0f}" for name in ("processor_seconds", "seconds")]
        for classes, one in results["runs"].items()
    ]
    name = f"speed_many_classes_{'resnet' if 'Resnet' in given.model else 'mlp'}"
    return {name: (f"1 run each; memory grows as classes^{results['exponent']:.2f}", [head, *rows])}


def drawn(table: dict) -> bytes:
    """Memory against classes, of a published table, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes, peaks = ([float(row[place].replace(",", "")) for row in table["rows"]] for place in (0, 2))
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ax = pyplot.subplots(figsize=(5.2, 3), layout="constrained")
    ax.plot(classes, peaks, "o-", color="#0072B2", label="whole default run")
    # What grows in proportion to classes goes through the first two runs; on a logarithmic axis it is a curve.
    slope = (peaks[1] - peaks[0]) / (classes[1] - classes[0])
    steps = np.geomspace(classes[0], classes[-1], 50)
    linear = peaks[0] + slope * (steps - classes[0])
    ax.plot(steps, linear, ":", color="#767676", label="in proportion, after the first two")
    ax.set(xlabel=f"classes of {EACH} images", ylabel="peak memory, GB", xscale="log", ylim=(0, 1.05 * linear[-1]))
    ax.set_xticks(classes, [row[0] for row in table["rows"]])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left")
    return small_png(figure)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--plot", action="store_true", help="draw the memory of the published runs; nothing is run")
    made.add_argument("--root", type=Path, default=Path("/tmp/mimu-classes"))
    made.add_argument("--classes", type=int, nargs=3, default=(10, 100, 1000))
    made.add_argument("--model", default="HookedMLPClassifier")
    made.add_argument("--size", type=int, default=SIDE, help="side that images are scaled to")
    made.add_argument("--train-epochs", type=int, help="of the classifiers, if not the default")
    for_pages(made)
    given: argparse.Namespace = made.parse_args()
    if given.plot:
        write_bytes(PLOT, drawn(load("speed_many_classes_mlp")))
        return
    flags = ["--model-architecture", given.model, "--data.image-size", str(given.size)]
    flags += ["--train.epochs", str(given.train_epochs)] if given.train_epochs else []
    runs = {}
    for classes in given.classes:
        runs[classes] = whole_run(make_tree(given.root, classes), given.root / "run", flags)
        one = runs[classes]
        stages = ", ".join(f"{name} {one['stages'].get(name, 0):.0f}" for name in SHOWN)
        spent = f"{one['seconds']:.1f} s on the clock ({stages}), {one['processor_seconds']:.1f} of the processor"
        print(f"{classes:6,} classes: {one['peak_bytes'] / 1e9:.2f} GB, {spent}", flush=True)
    results = {"runs": runs, "exponent": exponent({classes: one["peak_bytes"] for classes, one in runs.items()})}
    print(f"memory beyond the smallest run's grows as classes^{results['exponent']:.2f}")
    keep(given.json, results)
    publish_all(given.docs, tables(results, given))


if __name__ == "__main__":
    main()
