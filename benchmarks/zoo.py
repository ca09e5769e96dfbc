"""Classifiers of several seeds and recipes, the references retrained without a class, and how masks are judged.

Everything is kept through the project's own stages, so that a second run trains nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from core.config import (
    DataConfig,
    GCNConfig,
    GraphConfig,
    PipelineConfig,
    RefineConfig,
    SupportedDatasets,
    SupportedVisionModels,
    Trackers,
    TrainConfig,
)
from core.observe import Tracker
from model import HookedModel, MaskingGCN
from stages.chain import Stages
from trainer import GCNTrainer
from unlearn.masks import feasibility_score, hard_topk
from unlearn.ours import TAYLOR_LAMBDAS
from unlearn.requests import Checkpoint, Request, Unlearner, UnlearningTrainer, refine
from utils_data import UnlearningDataset

Classes = tuple[int, ...]
CPU = torch.device("cpu")
Theta = Callable[[Checkpoint, Request], Tensor]
SINGLES: tuple[Classes, ...] = tuple((label,) for label in range(10))
PAIRS: tuple[Classes, ...] = tuple((a, b) for a in range(10) for b in range(a + 1, 10))


@dataclass(frozen=True)
class Recipe:
    """How a classifier came to be."""

    batch_size: int
    seed: int
    dataset: SupportedDatasets = SupportedDatasets.FASHION_MNIST
    model: SupportedVisionModels = SupportedVisionModels.HookedMLPClassifier

    @property
    def name(self) -> str:
        """For tables."""
        return f"batch {self.batch_size}, seed {self.seed}"

    def config(self, output_dir: Path) -> PipelineConfig:
        """Its configuration: 8 epochs of AdamW 1e-3 (DIGITS: 30; ResNet-18: 2, on 12,000 images)."""
        resnet = self.model is SupportedVisionModels.HookedResnet
        epochs = 2 if resnet else 30 if self.dataset is SupportedDatasets.DIGITS else 8
        most = (12_000, 4_000) if resnet else (None, None)
        return PipelineConfig(
            model_architecture=self.model,
            vision_dataset=self.dataset,
            seed=self.seed,
            device="cpu",
            output_dir=output_dir,
            data=DataConfig(max_train_samples=most[0], max_test_samples=most[1]),
            train=TrainConfig(epochs=epochs, batch_size=self.batch_size, channels_last=resnet),
            graph=GraphConfig(num_samples=2560 if resnet else 10240),
        )


@lru_cache(maxsize=4)
def _images(dataset: SupportedDatasets, data: DataConfig) -> UnlearningDataset:
    return Stages(PipelineConfig(vision_dataset=dataset, data=data)).data


def stages_of(config: PipelineConfig) -> Stages:
    """The stages of a configuration; runs on the same images share them."""
    stages, data = Stages(config), _images(config.vision_dataset, config.data)
    stages.data = UnlearningDataset(data.name, data.splits, config.train.batch_size, data.forget_class, config.seed)
    return stages


@dataclass(frozen=True)
class Cell:
    """One mask of one checkpoint, judged: scores in percent, the classes' mean probability, KL in nats, seconds."""

    classes: Classes
    kappa: int
    forget: float
    retain: float
    probability: float
    kl: float | None
    seconds: float


@dataclass
class Case:
    """A classifier with its graphs, and the activations by which masks are judged."""

    recipe: Recipe
    output_dir: Path
    _judged: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _wholes: dict[Classes, HookedModel] = field(default_factory=dict)

    @cached_property
    def stages(self) -> Stages:
        """Classifier and graphs."""
        return stages_of(self.recipe.config(self.output_dir))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What answers requests."""
        return self.stages.checkpoint

    def inputs(self, split: str) -> tuple[Tensor, Tensor]:
        """h [S, n] of the target layer and labels [S] of a split."""
        if split not in self._judged:
            self._judged[split] = hidden(self.stages.classifier, self.stages.data, split)
        return self._judged[split]

    def judge(self, off: Tensor, classes: Classes, kappa: int, split: str, seconds: float, kl: bool = False) -> Cell:
        """Judge the mask that switches `off` [*graph.shape] bool."""
        weights = self.checkpoint.graph.split(self.checkpoint.weight * ~off)
        h, labels = self.inputs(split)
        with torch.inference_mode():
            logits = self.stages.classifier.head(h, (-2,), weights)
        return self.judge_logits(logits, labels, classes, kappa, split, seconds, kl)

    def judge_logits(
        self, logits: Tensor, labels: Tensor, classes: Classes, kappa: int, split: str, seconds: float, kl: bool
    ) -> Cell:
        """Judge any model by its logits [S, C] on a split."""
        right, forget = logits.argmax(1) == labels, torch.isin(labels, torch.tensor(classes))
        log_p = logits[forget].double().log_softmax(1)
        probability = float(log_p.gather(1, labels[forget, None]).exp().mean())
        distance = kl_divergence(self.retrained_logits(classes, split)[forget], log_p) if kl else None
        scores = (100 * float(right[part].double().mean()) for part in (forget, ~forget))
        return Cell(classes, kappa, *scores, probability, distance, seconds)

    def retrained(self, classes: Classes) -> HookedModel:
        """The same recipe on the images of all other classes."""
        if classes not in self._wholes:
            stages, data = stages_of(self.stages.config), self.stages.data
            stages.data = UnlearningDataset(data.name, data.splits, data.batch_size, classes, data.seed)
            self._wholes[classes] = stages.retrained()
        return self._wholes[classes]

    def retrained_logits(self, classes: Classes, split: str) -> Tensor:
        """Logits [S, C] of the reference on a split."""
        model = self.retrained(classes)
        h, _ = hidden(model, self.stages.data, split)
        with torch.inference_mode():
            return model.head(h, (-2,))

    def run(
        self, theta: Theta, kappas: Iterable[int], requests: Sequence[Classes], split: str, kl: bool = False
    ) -> list[Cell]:
        """Cells of a way to find theta, for every request and kappa; kappa counts per class."""
        cells = []
        for classes in requests:
            for each in kappas:
                kappa, begun = each * len(classes), time.perf_counter()
                off = hard_topk(theta(self.checkpoint, Request(classes, kappa)), kappa)
                cells.append(self.judge(off, classes, each, split, time.perf_counter() - begun, kl))
        return cells


def hidden(model: HookedModel, data: UnlearningDataset, split: str) -> tuple[Tensor, Tensor]:
    """h [S, n] of the target layer and labels [S]."""
    h, labels, images = [], [], data.splits[split]
    with torch.inference_mode():
        for begin in range(0, len(images), 1000):
            batch, true = images.batch(slice(begin, begin + 1000))
            h.append(model.prefix(batch, (-2,)))
            labels.append(true)
    return torch.cat(h), torch.cat(labels)


def kl_divergence(reference: Tensor, log_p: Tensor) -> float:
    """Mean KL(softmax(reference) || p) over samples, nats. [S, C] logits, [S, C] log-probabilities."""
    log_q = reference.double().log_softmax(1)
    return float((log_q.exp() * (log_q - log_p)).sum(1).mean())


def cases(recipes: Iterable[Recipe], output_dir: Path) -> list[Case]:
    """The classifiers of some recipes."""
    return [Case(recipe, output_dir) for recipe in recipes]


def mean(values: Iterable[float]) -> float:
    """Mean of some numbers."""
    return statistics.fmean(values)


# --- ways to find theta ---


def by_gcn(unlearner: Unlearner) -> Theta:
    """One forward pass (of several rounds of correction) of the graph network."""
    return lambda checkpoint, request: unlearner.theta(checkpoint, request).detach()


def by_taylor(weight: float) -> Theta:
    """Signed Taylor with a fixed lambda."""
    return lambda checkpoint, request: checkpoint.statistics.contributions(request.classes).signed_taylor(weight)


def refined(start: Theta, config: RefineConfig | None = None) -> Theta:
    """The same, refined."""
    return lambda checkpoint, request: refine(checkpoint, start(checkpoint, request), request, config or RefineConfig())


def by_taylor_tuned(case: Case, kappas: Sequence[int], requests: Sequence[Classes]) -> list[Cell]:
    """Signed Taylor on test images, lambda chosen for each request on validation images."""
    cells = []
    for classes in requests:
        for each in kappas:
            best, kappa, begun = None, each * len(classes), time.perf_counter()
            for weight in TAYLOR_LAMBDAS:
                off = hard_topk(by_taylor(weight)(case.checkpoint, Request(classes, kappa)), kappa)
                val = case.judge(off, classes, each, "val", 0.0)
                if best is None or val.retain - val.forget > best[0]:
                    best = val.retain - val.forget, off
            seconds = time.perf_counter() - begun
            assert best is not None
            cells.append(case.judge(best[1], classes, each, "test", seconds))
    return cells


def train(teachers: Sequence[Checkpoint], config: GCNConfig, folder: Path, message_passing: bool = True) -> Unlearner:
    """A graph network that learned on these checkpoints."""
    seed = 0
    torch.manual_seed(seed)
    unlearner = Unlearner.fresh(config)
    if not message_passing:
        for matrix in unlearner.gcn.neighbours:
            torch.nn.init.zeros_(matrix.requires_grad_(False))
    folder.mkdir(parents=True, exist_ok=True)
    UnlearningTrainer(unlearner, teachers, config, seed, CPU, Tracker(Trackers.none, "gcn", {})).train(folder)
    return unlearner


def elbo_theta(case: Case, topK: int, config: GCNConfig, folder: Path) -> Theta:
    """A graph network that learned the ELBO on the judged checkpoint itself; ranks by the feasibility of q."""
    stages = case.stages
    torch.manual_seed(0)
    shape = (config.num_message_passing_rounds, config.hidden_dim, config.aggregation)
    gcn = MaskingGCN(4, *shape, config.activation, config.residual)
    folder.mkdir(parents=True, exist_ok=True)
    shared = (gcn, stages.classifier, stages.graphs, (-2,), topK, config, 0, CPU)
    GCNTrainer(*shared, Tracker(Trackers.none, "elbo", {})).train(folder)
    with torch.inference_mode():
        theta = torch.cat([gcn(stages.graphs.class_features(label).unsqueeze(0)) for label in range(10)])
    q = theta.flatten(1).softmax(1).view_as(theta).clone()
    return lambda checkpoint, request: feasibility_score(q, request.classes)
