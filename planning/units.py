"""Measure, on this machine and now, what one piece of each kind costs: a few steps with the run's own trainers.

Images are noise of the configured size and weights are random: neither changes what a step costs.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.artifacts import HISTORY, appending_array, write_json
from core.choices import UserError
from core.config import Objectives, Trackers
from core.observe import Tracker
from data import FEATURES, GraphDataset, GraphGenerator
from eval import Eval
from images.decode import decode_many
from measure.metrics import Outputs
from model import HookedModel, MaskingGCN
from models.classifier import Classifier
from planning.extent import Extent
from stages.gcn import given_objective
from stages.setup import seed_weights
from trainer import GCNTrainer, Objective, VisionModelTrainer
from unlearn.objectives import Elbo, Unlearning
from unlearn.registry import Context, clock
from unlearn.requests import FrozenHead, Request, Unlearner
from utils_data import SPLITS, UnlearningDataset

ENOUGH = 1.0  # seconds that a unit is measured for, about
BATCHES, MOST_EPOCHS = 40, 100  # of an epoch or of graphs, and epochs, at most
MOST_JUDGED = 4_000  # images
MOST_STORED = 2**26  # numbers in the vectors of graphs
DECODED = 256


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and seconds that processors worked."""

    seconds: float = 0.0
    processor: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.processor + other.processor)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(max(0.0, self.seconds - other.seconds), max(0.0, self.processor - other.processor))

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.seconds * times, self.processor * times)


def taken(work: Callable[[], object]) -> Cost:
    """Carry out some work; return what it took, once the device has finished."""
    begun, used = clock(), time.process_time()
    work()
    return Cost(clock() - begun, time.process_time() - used)


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Judging:
    """What measuring all methods takes, by how many images are judged.

    Args:
        first, further: of the first point and of each further one, by images.
        passes: sets (split, is_forget_set) that go through the whole classifier, each as often as they do.
        files: bytes that a point leaves.
    """

    first: dict[int, Cost] = field(default_factory=dict)
    further: dict[int, Cost] = field(default_factory=dict)
    passes: list[tuple[str, bool]] = field(default_factory=list)
    files: int = 0


@dataclass(frozen=True)
class Units:
    """What one piece of each kind costs.

    Args:
        load: the start of a process. read: images in arrays. decoded: an image of a tree. trained: a training image in
            one epoch, validation included. seen: an image's pass through the classifier. graph: a graph. head: what a
            graph network learns from. step: one of its steps. judging: measuring methods.
        once: what the first piece of a stage takes beyond any other, such as imports. peak: bytes of this process at
            most, by stage. files: bytes that a stage leaves, by stage; of graphs, for each. curves: bytes of training
            curves for each image or step. kept: bytes that a request
            leaves in each memory of recent requests.
        spent: what measuring took.
    """

    load: Cost
    read: Cost
    decoded: Cost
    trained: Cost
    seen: Cost
    graph: Cost
    head: Cost
    step: Cost
    judging: Judging
    once: dict[str, Cost]
    peak: dict[str, int]
    files: dict[str, int]
    curves: dict[str, float]
    kept: tuple[int, ...]
    spent: Cost


class _Judge(Eval):
    """An evaluation on random activations that notes which sets would go through the whole classifier."""

    def __init__(self, context: Context, noted: list[tuple[str, bool]]):
        super().__init__(context)
        self.noted = noted
        self.kept: set[tuple[str, bool]] = set()

    def outputs(
        self, model: Classifier, split: str, is_forget_set: bool, description: str, prefix_unchanged: bool | None = None
    ) -> Outputs:
        """As `Snapshots.outputs`, from activations in any case; what would not be is noted."""
        same = self.prefix_unchanged(model) if prefix_unchanged is None else prefix_unchanged
        one = (split, is_forget_set)
        if not same or one not in self.kept:
            self.noted.append(one)
        if same:
            self.kept.add(one)
        return super().outputs(model, split, is_forget_set, description, True)

    def _checked(self, index: int) -> dict:
        return super()._checked(index) | {"sane": True, "why": None}  # a random network would fail the check


class Probe:
    """Measures the units of one configuration.

    Args:
        extent: what the run consists of.
        folder: a temporary one, for what trainers write.
    """

    def __init__(self, extent: Extent, folder: Path):
        self.extent, self.folder, self.setup = extent, folder, extent.setup
        self.config, self.device = extent.config, extent.setup.device
        seed_weights(0, "plan")
        self.model: HookedModel = self.setup.network(self.config.trained_vision_model_path).to(self.device).eval()
        self.batches, workers = BATCHES, self.config.data.num_workers
        self.threads = 2 * len(os.sched_getaffinity(0)) if workers is None else workers
        self.peak: dict[str, int] = {"start": peak_bytes()}
        self.once: dict[str, Cost] = {}
        self.curves: dict[str, float] = {}

    def measure(self, load: Cost, read: Cost) -> Units:
        """Measure all units, in the order of the stages."""
        begun, used = clock(), time.process_time()
        decoded = self._marked("images", self.decoding)
        trained = self._marked("classifier", self.training)
        seen = self.seeing()
        graph = self._marked("graphs", self.graphs)
        head, objective = self._learning()
        step = self._marked("gcn", lambda: self.steps(objective))
        judging, many = Judging(), min(self.extent.images, MOST_JUDGED)
        first = self.judge(many // 2, objective, judging)
        for most in (many // 2, many):
            self._marked("evaluation", lambda most=most: self.judge(most, objective, judging))
        self.once["evaluation"] = first - judging.first[many // 2]
        spent, files = Cost(clock() - begun, time.process_time() - used), self._files(objective)
        pieces = (load, read, decoded, trained, seen, graph, head, step, judging)
        return Units(*pieces, self.once, self.peak, files, self.curves, self._kept(objective), spent)

    def _kept(self, objective: Objective) -> tuple[int, ...]:
        """Bytes of a request's samples, and of what its first pass reads."""
        if not isinstance(objective, Unlearning):
            return ()
        classes = self.config.forget_labels
        return self.head.sides(classes).bytes, objective.unlearner.prepare(self.head, classes).bytes

    def _marked(self, stage: str, work: Callable[[], Cost]) -> Cost:
        cost = work()
        self.peak[stage] = peak_bytes()
        return cost

    # --- images and the classifier ---

    def decoding(self) -> Cost:
        """An image of a folder tree."""
        tree = self.extent.tree
        if tree is None:
            return Cost()
        rows = [row for split in SPLITS for row in self.extent.rows[split]]
        chosen = rows[:: max(1, len(rows) // DECODED)][:DECODED]
        paths, stamps = [tree.path(row) for row in chosen], [tree.stamp(row) for row in chosen]
        bad: dict[int, str] = {}

        def work() -> None:
            bad.update(decode_many(paths, stamps, self.extent.how, self.threads)[1])

        decode_many(paths[:1], stamps[:1], self.extent.how, self.threads)  # what is done once
        cost = taken(work) * (1 / len(chosen))
        if bad and not self.config.data.skip_bad_images:
            place, reason = next(iter(bad.items()))
            raise UserError(f"{paths[place]}: {reason}: repair it, or leave such files out with --skip-bad-images")
        return cost

    def _some(self) -> UnlearningDataset:
        """As many training images as `batches` hold, with the share of the other splits."""
        wanted = self.batches * self.config.train.batch_size / len(self.extent.labels["train"])
        return self.extent.drawn(max(1, int(wanted * self.extent.images)))

    def training(self) -> Cost:
        """A training image in one epoch; the judgement of validation images at its end included."""
        self.batches = 1
        first = self._train(self._some(), 1)
        one = self._train(self._some(), 1)
        self.once["classifier"] = first - one
        self.batches = max(1, min(BATCHES, int(ENOUGH / max(one.seconds, 1e-9))))
        data = self._some()
        epochs = max(1, min(MOST_EPOCHS, int(ENOUGH / max(self._train(data, 1).seconds, 1e-9))))
        cost, images = self._train(data, epochs), epochs * len(data.splits["train"])
        self.curves["classifier"] = (self.folder / HISTORY).stat().st_size / images
        return self._together(data, epochs) if self.config.train.use_ddp else cost * (1 / images)

    def _train(self, data: UnlearningDataset, epochs: int, use_ddp: bool = False) -> Cost:
        train = replace(self.config.train, epochs=epochs, use_ddp=use_ddp)
        model = self.setup.network().to(self.device)
        trainer = VisionModelTrainer(model, data, train, self.device, Tracker(Trackers.none, "", {}))
        return taken(lambda: trainer.train(self.folder))

    def _together(self, data: UnlearningDataset, epochs: int) -> Cost:
        """The same by the run's processes; what starts them is kept apart, the first time with the fork server.

        A process of the fork server tells nobody here what it used: all of them are taken to work while they train,
        and one while they are started.
        """
        count = len(data.splits["train"])
        first, one, many = (self._train(data, n, True).seconds for n in (1, 1, 1 + epochs))
        busy = min(self.config.train.num_workers, len(os.sched_getaffinity(0)))
        image = max(0.0, many - one) / (epochs * count)
        for name, seconds in (("classifier", first), ("retrained", one)):
            start = max(0.0, seconds - image * count)
            self.once[name] = Cost(start, start)
        return Cost(image, busy * image)

    def seeing(self) -> Cost:
        """An image's pass through the classifier, as far as its first masked layer."""
        size = min(self.config.eval.batch_size, self.batches * self.config.train.batch_size, self.extent.images)
        images, _ = self.extent.drawn().splits["train"].batch(slice(0, size))

        def work() -> None:
            with torch.inference_mode():
                self.model.prefix(images.to(self.device), self.config.mask_layer)

        work()
        return (taken(work) + taken(work)) * (1 / (2 * len(images)))

    # --- graphs and the graph network ---

    def graphs(self) -> Cost:
        """A graph; leaves as many as the run has, copies of the few that were made."""
        count = min(self.extent.graphs, self.batches * self.config.graph.batch_size)
        config = replace(self.config.graph, num_samples=count, min_per_class=1)
        data, made = self.extent.drawn(), self.folder / "made"
        made.mkdir(exist_ok=True)
        maker = GraphGenerator(self.model, data, self.config.mask_layer, config, 0, self.device)
        cost = taken(lambda: maker.generate(made)) * (1 / len(maker.choose_samples()))
        self._repeat(made)
        return cost

    def _repeat(self, made: Path) -> None:
        """Write graphs in the run's number, with its labels, whose vectors repeat those of a few."""
        found = GraphDataset(made)
        width = sum(found.ins) + 2 * sum(found.outs)
        real = GraphGenerator(self.model, self.extent.drawn(), self.config.mask_layer, self.config.graph, 0)
        labels = self.extent.labels["train"][torch.from_numpy(real.choose_samples())]
        labels = labels[: max(self.extent.setup.shape[0], MOST_STORED // width)]
        missing = torch.from_numpy(np.setdiff1d(np.arange(self.setup.shape[0]), labels.numpy()))
        labels = torch.cat([labels, missing])
        picks = np.arange(len(labels)) % len(found.labels)
        generator = np.random.default_rng(0)
        for name in ("h", "z", "delta"):
            values = np.array(getattr(found, name)[picks])
            values *= generator.uniform(0.5, 1.5, values.shape).astype(np.float32)
            path = made / f"{name}.npy"
            path.unlink()
            with appending_array(path, values.shape) as append:
                append(values)
        (made / "labels.npy").unlink()
        with appending_array(made / "labels.npy", tuple(labels.shape), np.int64) as append:
            append(labels.numpy())

    def _learning(self) -> tuple[Cost, Objective]:
        """What the graph network is trained for on these graphs, and what its preparation costs."""
        config, made = self.config, GraphDataset(self.folder / "made")
        self.dataset, held = made, []

        def work() -> None:
            count, layers = self.setup.shape[0], config.mask_layer
            held.append(FrozenHead.of_graphs(self.model, made, layers, count, self.device))

        cost = taken(work)
        self.head = held[0]
        given, layers = config.gcn_path, config.mask_layer
        how = (config.gcn, 0, self.device)
        if (given_objective(given) if given else config.gcn.objective) is Objectives.unlearning:
            unlearner = Unlearner.load(given)[0] if given else Unlearner.fresh(config.gcn)
            unlearner.gcn.to(self.device)
            return cost, Unlearning(unlearner, [self.head], *how)
        shape = (config.gcn.num_message_passing_rounds, config.gcn.hidden_dim, config.gcn.aggregation)
        fresh = MaskingGCN(len(FEATURES), *shape, config.gcn.activation, config.gcn.residual)
        gcn = MaskingGCN.load(given)[0] if given else fresh
        return cost, Elbo(gcn.to(self.device), self.model, made, layers, config.topK_list[0], *how)

    def steps(self, objective: Objective) -> Cost:
        """A step of the graph network's training; nothing if one is given."""
        if not self.extent.networks:
            self.once["gcn"], self.curves["gcn"] = Cost(), 0.0
            return Cost()

        def some(count: int) -> Cost:
            objective.config = replace(self.config.gcn, steps=count)
            trainer = GCNTrainer(objective, Tracker(Trackers.none, "", {}))
            return taken(lambda: trainer.train(self.folder))

        first, one = some(1), some(1)
        self.once["gcn"] = first - one
        count = max(1, min(self.config.gcn.steps, int(2 * ENOUGH / max(one.seconds, 1e-9))))
        cost = some(count)
        self.curves["gcn"] = (self.folder / HISTORY).stat().st_size / count
        return cost * (1 / count)

    # --- methods and metrics ---

    def _context(self, most: int, objective: Objective) -> Context:
        """What methods read, with random activations in place of those that the classifier would make."""
        extent, size = self.extent, self.extent.config.eval.batch_size
        wanted = replace(self.config.eval, methods=extent.methods or ("default",), metrics=extent.metrics)
        config, data = replace(self.config, eval=wanted), extent.drawn(most, size)
        network = objective.unlearner if isinstance(objective, Unlearning) else None

        def learn_importance(top_k: int) -> Tensor:
            labels = range(self.setup.shape[0])
            with torch.no_grad():
                if network is not None:
                    return torch.stack([network.theta(self.head, Request((one,), top_k)) for one in labels]).cpu()
                rows = (self.dataset.class_features(one).unsqueeze(0).to(self.device) for one in labels)
                return torch.cat([objective.gcn(row, self.setup.graph).cpu() for row in rows])

        def other(index: int = 0) -> HookedModel:
            return self.setup.network().to(self.device).eval()

        seconds = {"graphs": 0.0, "checkpoint": 0.0, "gcn": 0.0, "retrained-0": 0.0}
        shared = (self.model, data, config, self.device, learn_importance, self.head, network)
        context = Context(*shared, other if wanted.references else None, other, seconds)
        width = self.setup.graph.shapes[0][1]
        for split in SPLITS:
            for side in (True, False):
                labels = data.splits[split].labels
                labels = labels[data.is_forgotten(labels) == side].to(self.device)
                h = torch.rand(len(labels), width, device=self.device)
                context.shared.once(("activations", split, side), lambda h=h, y=labels: (h, y), charged=False)
        return context

    def judge(self, most: int, objective: Objective, judging: Judging) -> Cost:
        """Measure all foreseen methods at two points."""
        context, noted = self._context(most, objective), []
        judge, kappas = _Judge(context, noted), [*self.config.kappa_list, *self.config.kappa_list]
        top_k, found = self.config.topK_list[0], []

        def point(kappa: int) -> None:
            found.append(judge.eval(top_k, kappa))
            write_json(self.folder / "record.json", found[-1][0])

        judging.first[most] = taken(lambda: point(kappas[0]))
        judging.passes = list(noted)
        other = next((one for one in kappas if one != kappas[0]), max(1, kappas[0] // 2))
        judging.further[most] = taken(lambda: point(other))
        left, masks = (self.folder / "record.json").stat().st_size, len(found[0][1])
        judging.files = left + masks * self.setup.graph.num_vertices
        return judging.first[most]

    def _files(self, objective: Objective) -> dict[str, int]:
        """Bytes that stages leave."""
        sizes = {
            name: sum(value.nbytes for value in module.state_dict().values())
            for name, module in (("classifier", self.model), ("gcn", objective.gcn))
        }
        shapes = self.setup.graph.shapes
        return sizes | {
            "graph": 4 * sum(n + 2 * m for m, n in shapes) + 8,
            "weights": 4 * self.setup.graph.num_vertices,
        }
