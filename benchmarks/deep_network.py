"""Does a graph network that says theta of all layers pay, and do messages between weights? Fashion-MNIST, test images.

    uv run benchmarks/deep_network.py [--seeds N ...] [--classes N ...] [--networks DIR] [--json PATH] [--docs] [--ship]

Three networks of one size learn from the loss of descents (`erasing.teaching`) on twelve MLPs of features.py
(784-128-64-10, seeds 200 to 211) and the classes that are not in HELD: one reads every weight by itself, one passes
messages within layers, one across layers, too. They are judged on classifiers of other seeds (2 and later), on the
classes that they learned on and on those that they did not, after 1 to 4 passes and 0 to 100 steps of descent; so is
descent from the first-order start, with its own schedule and with theirs.

Values are means over requests. *retain* is the retain score less that of three retrained models, *worst* what one
retained class loses at most against the untouched classifier, *probe* the largest distance over stages to what a probe
finds in the retrained models; all in points. Seconds are processor time of one request on one thread, the images in
memory. --networks keeps what was trained and takes it from there; --ship writes one network to pretrained/.
"""

import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.feature_models import MLPS, images_of
from benchmarks.features import Row

import torch

from core.artifacts import write_bytes
from core.config import GCNConfig, Trackers, plain
from core.hashes import provenance
from core.observe import Tracker
from erasing.descent import Schedule, guided
from erasing.erasure import SHARE, Eraser
from erasing.guide import PASSES, Guide
from erasing.proxies import Proxies
from erasing.stages import Stages, deep, rows_of
from erasing.teaching import Teaching
from measure.metrics import METRICS
from reporting.write import as_text
from trainer import GCNTrainer
from unlearn.methods import GUIDE, deep_edit, eraser_of
from unlearn.registry import Context, Edit, Point, method

TEACHERS, HELD, LESSONS = range(200, 212), (2, 5, 8), 300
KINDS = {  # messages -> joined layers, and whether any pass, as `Guide.fresh` is told
    "none": ((), False),
    "within layers": ((), True),
    "across layers": ((True, True), True),
}
SHIPPED = "within layers"
ASKED = ("forget_score", "retain_score", "worst_retained_drop", "probe_layers_gap")
MEASURED = ("retain", "worst", "probe")
HEAD = ("start", "passes", "steps", "forget", *MEASURED, *(f"{one}, unseen" for one in MEASURED), "seconds")


# --- learning ---------------------------------------------------------------------------------------------


class Remembering(Proxies):
    """Proxies that are kept: they do not depend on how a mask is sought."""

    def trained(self, without: Sequence[int]) -> Stages:
        """As `Proxies.trained`."""
        kept = self.__dict__.setdefault("kept", {})
        if tuple(without) not in kept:
            kept[tuple(without)] = super().trained(without)
        return kept[tuple(without)]


@cache
def eraser_for(seed: int) -> Eraser:
    """What answers requests about a classifier."""
    pixels, labels = images_of(0).splits["train"].batch(slice(None))
    model = deep(MLPS.trained(seed), pixels[:4], 10)
    return Eraser(model, rows_of(model, [pixels]), labels, seed)


@cache
def teacher(seed: int) -> Eraser:
    """The same, for lessons."""
    made = eraser_for(seed)
    made.proxies = Remembering(made.model, made.h, made.labels, seed)
    return made


def learned(messages: str, folder: Path) -> Guide:
    """A network of a kind, trained, or read from the folder."""
    path = folder / f"{messages.replace(' ', '_')}.safetensors"
    if not path.is_file():
        lessons = [teacher(seed).descent((label,))[0] for seed in TEACHERS for label in range(10) if label not in HELD]
        torch.manual_seed(0)  # of the network's initial weights, which have no argument for it
        guide = Guide.fresh(*KINDS[messages])
        config = GCNConfig(steps=LESSONS, lr=5e-3, requests_per_step=1, temperature_start=0.3, temperature_end=0.05)
        graph = lessons[0].graph
        objective = Teaching(guide, lessons, round(SHARE * graph.num_vertices), config, 0)
        GCNTrainer(objective, Tracker(Trackers.none, "deep_network", {})).train(folder)
        taught = {"seeds": list(TEACHERS), "classes": [label for label in range(10) if label not in HELD]}
        facts = {"shapes": [list(shape) for shape in graph.shapes], "trained_on": taught, "config": plain(config)}
        guide.save(path, facts | {"messages": messages, "versions": provenance()["versions"]})
    return Guide.load(path)[0]


# --- judging ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A line of the table, and its schedule."""

    start: str
    passes: int
    steps: int
    schedule: Schedule


def ways(guides: Mapping[str, Guide]) -> dict[str, Way]:
    """By the name of the method."""
    found = [Way("first order", 0, steps, Schedule(steps=steps)) for steps in (0, 10, 30, 100, 300)]
    found.append(Way("first order, the networks' schedule", 0, 30, guided(None, 30)))
    for messages, guide in guides.items():
        steps_taken = (0, 10, 30, 100) if messages == SHIPPED else (0, 10, 30)
        found += [Way(f"messages {messages}", PASSES, steps, guided(guide, steps)) for steps in steps_taken]
    shipped = guides[SHIPPED]
    for passes in range(1, PASSES):
        fewer = Guide(shipped.gcn, passes, shipped.joined)
        found.append(Way(f"messages {SHIPPED}", passes, 10, guided(fewer, 10)))
    return {f"way_{place}": way for place, way in enumerate(found)}


def register(name: str, schedule: Schedule) -> None:
    """Make a schedule a method, whose proxies are remembered."""

    @method(name, name, axes=("seed",))
    def edit(context: Context, point: Point) -> Edit:
        """`mimu_deep`, sought as a schedule says."""
        eraser = eraser_of(context, point.seed)
        if not isinstance(eraser.proxies, Remembering):
            eraser.proxies = Remembering(eraser.model, eraser.h, eraser.labels, point.seed)
        return deep_edit(context, point.seed, schedule=schedule)


def cell(seed: int, label: int, names: Iterable[str]) -> list[Row]:
    """Every way on one classifier and class, test images."""
    judge, rows = MLPS.judge(seed, label), []
    judge.metrics = {name: METRICS[name] for name in ASKED}
    retain = statistics.fmean(one.retain.score() for one in judge.others("default", "test"))
    for name in names:
        values = judge.eval_unlearning(name, Point(0, 0, seed))["test"]
        row = {"seed": seed, "class": label, "method": name, "forget": values["forget_score"]}
        row |= {"retain": values["retain_score"] - retain, "worst": -values["worst_retained_drop"]}
        rows.append(row | {"probe": values["probe_layers_gap"]})
        print(" ".join(f"{one:.2f}" if isinstance(one, float) else str(one) for one in rows[-1].values()), flush=True)
    return rows


def costs(every: Mapping[str, Way], seed: int, labels: Sequence[int]) -> dict[str, float]:
    """Processor seconds of a request, median over classes, every way in turn: proxies, mask, new row, what is told.

    What serves all requests of a classifier (its answers, the proxy that sees all classes) is there before.
    """
    eraser = eraser_for(seed)
    eraser.descent((labels[0],))
    kappa, found = round(SHARE * eraser.model.weight_graph().num_vertices), {name: [] for name in every}
    for label in labels:
        for name, way in every.items():
            begun = time.process_time()
            eraser.erase((label,), kappa, way.schedule)
            found[name].append(time.process_time() - begun)
    return {name: statistics.median(taken) for name, taken in found.items()}


def table(rows: Sequence[Row], every: Mapping[str, Way], seconds: Mapping[str, float]) -> list[list[str]]:
    """A line for each way: means over the classes of the lessons, then over the others (worst in brackets)."""
    lines = [list(HEAD)]
    for name, way in every.items():
        mine = [row for row in rows if row["method"] == name]
        line = [way.start, str(way.passes), str(way.steps), f"{max(row['forget'] for row in mine):.1f}"]
        for held in (False, True):
            some = [row for row in mine if (row["class"] in HELD) == held]
            for key, shown, worst in (("retain", "+.2f", min), ("worst", "+.1f", min), ("probe", ".1f", max)):
                values = [row[key] for row in some]
                line.append(f"{statistics.fmean(values):{shown}} ({worst(values):{shown}})" if values else "-")
        lines.append([*line, f"{seconds[name]:.2f}"])
    return lines


def main() -> None:
    """Learn, measure, print, keep."""
    asked = parser(__doc__)
    for_pages(asked)
    asked.add_argument("--seeds", nargs="+", type=int, default=[2, 3], help="of classifiers")
    asked.add_argument("--classes", nargs="+", type=int, default=list(range(10)), help="each forgotten by itself")
    asked.add_argument("--networks", type=Path, help="a folder of networks, written where there are none")
    asked.add_argument("--ship", action="store_true", help=f"write the network of {GUIDE.name} to {GUIDE.parent.name}/")
    given = asked.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        guides = {messages: learned(messages, given.networks or Path(folder)) for messages in KINDS}
        if given.ship:
            name = f"{SHIPPED.replace(' ', '_')}.safetensors"
            write_bytes(GUIDE, ((given.networks or Path(folder)) / name).read_bytes())
    every = ways(guides)
    for name, way in every.items():
        register(name, way.schedule)
    rows = [row for label in given.classes for seed in given.seeds for row in cell(seed, label, every)]
    shown = table(rows, every, costs(every, given.seeds[0], given.classes[:2]))
    print(f"\n{as_text(shown)}\n", flush=True)
    unseen = len(set(given.classes) & set(HELD))
    n = f"{len(given.classes)} classes ({unseen} unseen) x {len(given.seeds)} classifiers: mean (worst)"
    publish_all(given.docs, {"deep_network": (n, shown)})
    keep(given.json, {"rows": rows, "table": shown})


if __name__ == "__main__":
    main()
