"""Multiply what a configuration asks for by what a piece costs; simulate a sweep; say both in one table."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

from core.config import Objectives, plain
from core.hashes import key_of
from planning.extent import Extent
from planning.units import Cost, Units
from reporting.write import as_text
from training.resume import recipe
from unlearn.requests import MOST_BYTES


@dataclass(frozen=True)
class Stage:
    """What a stage of a run is foreseen to take.

    Args:
        name: as records call it. work: its pieces, in words. cost: of all of them. memory: bytes of the process at
            most, so far. disk: bytes that stay. key: equal for stages that runs share; None: the run's own.
    """

    name: str
    work: str
    cost: Cost
    memory: int
    disk: int
    key: str | None = None


@dataclass(frozen=True)
class SimulatedJob:
    """The stages it shares, in order, as (key, seconds), and the seconds of what is its own."""

    shared: tuple[tuple[str, float], ...]
    own: float


def simulate(jobs: Sequence[SimulatedJob], workers: int, starting: float = 0.0) -> float:
    """Seconds until all jobs are done, taken in order by workers that each take `starting` seconds to be ready."""
    free = [starting] * workers
    made: dict[str, float] = {}
    for job in jobs:
        at = heapq.heappop(free)
        for key, seconds in job.shared:
            at = max(at, made[key]) if key in made else at + seconds
            made.setdefault(key, at)
        heapq.heappush(free, at + job.own)
    return max(free)


def stages(extent: Extent, units: Units) -> list[Stage]:
    """List the stages of a run in their order, with what each is foreseen to take."""
    config, keys, peak = extent.config, _keys(extent), units.peak
    trained, again = extent.trained_images, extent.retrained_images
    images = units.read if extent.tree is None else units.decoded * extent.decodings
    what = f"{extent.decodings:,} decoded" if extent.tree else f"{extent.images:,} read"
    graphs = 0 if config.graph_dir else extent.graphs
    left, steps = _graph_bytes(graphs, units), extent.networks * config.gcn.steps
    learned = units.step * steps + units.head + units.once["gcn"]
    asked = _held(extent, units)
    networks = extent.networks * units.files["gcn"] + round(steps * units.curves["gcn"])
    made = [
        _trained("classifier", trained, units, 1 if trained else 0, keys["classifier"]),
        Stage("graphs", f"{graphs:,} graphs", units.graph * graphs, peak["graphs"], left, keys["graphs"]),
        Stage("gcn", f"{steps:,} steps", learned, peak["gcn"] + asked, networks, keys["gcn"]),
        _trained("retrained", again, units, config.eval.references, keys["retrained"]),
        _evaluation(extent, units),
    ]
    return [
        Stage("start", "imports", units.load, peak["start"], 0),
        Stage("images", what, images, peak["images"], extent.cached_bytes, keys["images"] if extent.tree else None),
        *(replace(one, memory=one.memory + extent.pixel_bytes) for one in made),
    ]


def _trained(name: str, images: int, units: Units, models: int, key: str) -> Stage:
    cost = units.trained * images + units.once.get(name, Cost()) * (models if images else 0)
    disk = models * units.files["classifier"] + round(images * units.curves["classifier"])
    return Stage(name, f"{images:,} training images", cost, units.peak["classifier"], disk, key)


def _held(extent: Extent, units: Units) -> int:
    """Bytes of requests that the graph network's training remembers: of every class and pair, or of the last ones."""
    count = extent.setup.shape[0]
    asked = min(extent.config.gcn.steps * extent.config.gcn.requests_per_step, count * (count + 1) // 2)
    return sum(min(MOST_BYTES, asked * one) for one in units.kept) if extent.networks else 0


def _graph_bytes(count: int, units: Units) -> int:
    return count * units.files["graph"] + units.files["weights"] if count else 0


def _evaluation(extent: Extent, units: Units) -> Stage:
    """All points: methods and metrics, and the passes of images through whole classifiers."""
    judging, points = units.judging, extent.points
    passes = sum(extent.side(*one) for one in judging.passes)
    cost = line(judging.first, extent.images) + line(judging.further, extent.images) * (points - 1)
    activations = 4 * extent.images * extent.setup.graph.shapes[0][1]
    judged = max(judging.first)
    more = activations - 4 * judged * extent.setup.graph.shapes[0][1]
    memory = units.peak["evaluation"] + max(0, more) + _held(extent, units)
    work = f"{points} points x {len(extent.methods)} methods, {passes:,} images seen"
    cost += units.seen * passes + units.once["evaluation"]
    return Stage("evaluation", work, cost, memory, points * judging.files)


def line(measured: Mapping[int, Cost], images: int) -> Cost:
    """Read what so many images cost off the straight line through what was measured for two numbers of images.

    More images never cost less, so that a line that falls is taken to be flat.
    """
    (few, least), (many, most) = min(measured.items()), max(measured.items())
    if images <= many or few == many:
        return most
    by_image = [max(0.0, (b - a) / (many - few)) for a, b in _pairs(least, most)]
    return most + Cost(*by_image) * (images - many)


def _pairs(one: Cost, other: Cost) -> list[tuple[float, float]]:
    return [(one.seconds, other.seconds), (one.processor, other.processor)]


def _keys(extent: Extent) -> dict[str, str]:
    """Name each stage by all that it depends on, as the stages' own hashes do: runs with the same name share it."""
    config = extent.config
    settings = plain(config)
    told: dict[str, Any] = {name: settings[name] for name in ("vision_dataset", "dataset_path", "data")}
    keys = {"images": key_of(told)}
    told |= {name: settings[name] for name in ("model_architecture", "seed", "device", "trained_vision_model_path")}
    told["train"] = recipe(config.train)
    keys["classifier"] = key_of(told)
    keys["retrained"] = key_of(told | {"without": sorted(config.forget_labels), "count": config.eval.references})
    told |= {name: settings[name] for name in ("mask_layer", "graph", "graph_dir")}
    keys["graphs"] = key_of(told)
    told |= {name: settings[name] for name in ("gcn", "gcn_path")}
    elbo = config.gcn.objective is Objectives.elbo
    keys["gcn"] = key_of(told | {"top_k": config.topK_list if elbo else None})
    return keys


@dataclass(frozen=True)
class Forecast:
    """What runs are foreseen to take together.

    Args:
        jobs: the stages of each run, in the order in which runs are begun.
        workers: how many are carried out at a time.
    """

    jobs: Sequence[Sequence[Stage]]
    workers: int = 1

    @property
    def stages(self) -> list[tuple[Stage, int]]:
        """Each stage once, with how often it is made: those that runs share are summed without the repeats."""
        names = [stage.name for stage in self.jobs[0]]
        found = []
        for name in names:
            every = [stage for job in self.jobs for stage in job if stage.name == name]
            once = list({stage.key or place: stage for place, stage in enumerate(every)}.values())
            if name == "start":
                once = once[: min(self.workers, len(self.jobs))]
            cost, memory = reduce(add, (one.cost for one in once)), max(one.memory for one in once)
            work = once[0].work if len(once) == 1 else f"{len(once)} x {once[0].work}"
            found.append((Stage(name, work, cost, memory, sum(one.disk for one in once)), len(once)))
        return found

    @property
    def total(self) -> Stage:
        """All stages together; seconds as if they were made one after the other."""
        found = [stage for stage, _ in self.stages]
        cost, disk = reduce(add, (one.cost for one in found)), sum(one.disk for one in found)
        return Stage("total", "", cost, max(one.memory for one in found), disk)

    @property
    def seconds(self) -> float:
        """Until the last run has ended."""
        jobs = []
        for job in self.jobs:
            shared = tuple((one.key, one.cost.seconds) for one in job if one.key)
            jobs.append(
                SimulatedJob(shared, sum(one.cost.seconds for one in job if not one.key and one.name != "start"))
            )
        return simulate(jobs, min(self.workers, len(jobs)), self.jobs[0][0].cost.seconds)

    def table(self) -> str:
        """Write the stages and their sum as a table."""
        rows = [["stage", "work", "seconds", "processor seconds", "memory, GB", "disk, MB"]]
        for stage in [*(stage for stage, _ in self.stages), self.total]:
            clocks = [_short(stage.cost.seconds), _short(stage.cost.processor)]
            memory = f"{stage.memory / 1e9:.2f}" if stage.memory else "-"
            rows.append([stage.name, stage.work, *clocks, memory, f"{stage.disk / 1e6:,.1f}"])
        return as_text(rows).removesuffix("\n")


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}"
