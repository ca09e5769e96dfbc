"""The classifiers of the benchmarks, of several seeds and recipes, and the project's `Eval` on each.

Stages of the pipeline make and keep the classifiers, graphs and retrained references, so that a second run trains
nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from core.config import (
    AutoConfig,
    DataConfig,
    EvalConfig,
    GraphConfig,
    KappaModes,
    PipelineConfig,
    RefineConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TrainConfig,
)
from eval import Eval
from model import HookedModel
from stages.chain import Stages
from unlearn.registry import Context, Point
from unlearn.requests import Unlearner
from utils_data import UnlearningDataset

Classes = tuple[int, ...]
CPU = torch.device("cpu")
SINGLES: tuple[Classes, ...] = tuple((label,) for label in range(10))
PAIRS: tuple[Classes, ...] = tuple((a, b) for a in range(10) for b in range(a + 1, 10))
METRICS = ("forget_probability",)  # beside forget_score and retain_score, which `Eval` measures in any case
SEED = 0  # of the random masks and of the random starts of refinement


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    batch_size: int
    seed: int
    dataset: SupportedDatasets = SupportedDatasets.FASHION_MNIST
    model: SupportedVisionModels = SupportedVisionModels.HookedMLPClassifier

    @property
    def name(self) -> str:
        """For tables."""
        return f"batch {self.batch_size}, seed {self.seed}"

    def config(self, output_dir: Path) -> PipelineConfig:
        """Return the configuration: 8 epochs of AdamW 1e-3 (DIGITS: 30; ResNet-18: 2, on 12,000 images)."""
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
    """Return the stages of a configuration; runs on the same images share them."""
    stages, data = Stages(config), _images(config.vision_dataset, config.data)
    stages.data = UnlearningDataset(data.name, data.splits, config.train.batch_size, data.forget_class, config.seed)
    return stages


def no_importances(top_k: int) -> Tensor:
    """Stand for `Context.learn_importance` where no method asks for it."""
    raise AssertionError("this method needs no class importances")


@dataclass(frozen=True)
class Way:
    """A registered method, and what its context holds.

    Args:
        method: a name in `rivals.compared.METHODS`.
        unlearner: the graph network that answers requests; None: the method asks none.
        refine: of `mimu_refined`.
        importances: top_k -> theta [C, *graph.shape], of a graph network that learned the ELBO.
        kl: whether to measure KL to the classifier that is retrained without the classes, too.
    """

    method: str
    unlearner: Unlearner | None = None
    refine: RefineConfig = field(default_factory=RefineConfig)
    importances: Callable[[int], Tensor] = no_importances
    kl: bool = False


@dataclass(frozen=True)
class Score:
    """A method at one point on one classifier: scores in percent, mean probability of the classes, KL in nats."""

    classes: Classes
    kappa: int
    """For each class; 0: the method has none."""
    forget: float
    retain: float
    probability: float
    kl: float | None
    seconds: float


@dataclass
class TrainedClassifier:
    """A classifier with its graphs, and the contexts in which methods are measured on it."""

    recipe: Recipe
    output_dir: Path
    _inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _retrained: dict[Classes, HookedModel] = field(default_factory=dict)

    @cached_property
    def stages(self) -> Stages:
        """Classifier and graphs."""
        return stages_of(self.recipe.config(self.output_dir))

    def inputs(self, split: str) -> tuple[Tensor, Tensor]:
        """Compute h [S, n] of the target layer and labels [S] of a split; once, for all requests."""
        if split not in self._inputs:
            h, labels, images = [], [], self.stages.data.splits[split]
            with torch.inference_mode():
                for begin in range(0, len(images), 1000):
                    batch, true = images.batch(slice(begin, begin + 1000))
                    h.append(self.stages.classifier.prefix(batch, self.stages.config.mask_layer))
                    labels.append(true)
            self._inputs[split] = torch.cat(h), torch.cat(labels)
        return self._inputs[split]

    def retrained(self, classes: Classes) -> HookedModel:
        """Train the same recipe on the images of all other classes, or find it."""
        if classes not in self._retrained:
            stages, data = stages_of(self.stages.config), self.stages.data
            stages.data = UnlearningDataset(data.name, data.splits, data.batch_size, classes, data.seed)
            self._retrained[classes] = stages.retrained()
        return self._retrained[classes]

    def context(self, way: Way, classes: Classes, auto: AutoConfig | None = None) -> Context:
        """Make what a run works with that forgets these classes; `auto`: as with `kappa: auto`."""
        stages, data = self.stages, self.stages.data
        needs_reference = way.kl or way.method == "retrain"
        metrics = (*METRICS, "KL_forget") if way.kl else METRICS
        measured = EvalConfig(methods=(way.method,), metrics=metrics, references=int(needs_reference))
        config = replace(stages.config, forget_class=classes, refine=way.refine, eval=measured)
        if auto:
            config = replace(config, kappa=KappaModes.auto, auto=auto)
        images = UnlearningDataset(data.name, data.splits, config.eval.batch_size, classes, data.seed)
        retrain = (lambda index: self.retrained(classes)) if needs_reference else None
        shared = (way.importances, stages.head, way.unlearner, retrain)
        context = Context(stages.classifier, images, config, CPU, *shared)
        for split in ("val", "test"):
            h, labels = self.inputs(split)
            forgotten = images.is_forgotten(labels)
            for is_forget_set, chosen in ((True, forgotten), (False, ~forgotten)):
                part = h[chosen], labels[chosen]  # the images pass through the classifier once for all requests
                context.shared.once(("activations", split, is_forget_set), lambda part=part: part, charged=False)
        return context

    def measure(self, way: Way, kappas: Iterable[int], requests: Sequence[Classes], split: str) -> list[Score]:
        """Measure a method for every request and kappa (for each class)."""
        scores = []
        for classes in requests:
            evaluation = Eval(self.context(way, classes))
            scores += [score(evaluation, way.method, each, each * len(classes), split) for each in kappas]
        return scores


def score(evaluation: Eval, method: str, each: int, kappa: int, split: str) -> Score:
    """Measure a method at one kappa; `each`: of it, for each class to forget."""
    found = evaluation.eval_unlearning(method, Point(1, kappa, SEED))[split]
    scores = (found[name] for name in ("forget_score", "retain_score", "forget_probability"))
    return Score(evaluation.config.forget_labels, each, *scores, found.get("KL_forget"), found["seconds"])


def classifiers(recipes: Iterable[Recipe], output_dir: Path) -> list[TrainedClassifier]:
    """Return the classifiers of some recipes."""
    return [TrainedClassifier(recipe, output_dir) for recipe in recipes]
