"""What the features of every stage tell of forgotten classes: probes, neighbours and class means.

A stage is a block of the network (`erasing.stages`); its features are what it reads, the mean over positions where
there are some. Up to 200 training images of a class are looked at, as `measure.probes` draws them, of T all forgotten
images and up to 200 of each retained class.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.config import derive_seed
from erasing.stages import Stages, deep
from measure.attacks import separation
from measure.metrics import Evidence, Undefined, metric
from measure.probes import CHUNK, MOST_PROBED, drawn_of_some, probe_recall, probed_images, standardised
from model import inspecting

NEIGHBOURS = 10
EXAMPLES = 4  # images with which the forward pass is looked at

PerStage = Callable[[Evidence], tuple[float, ...] | None]
"""A value for every stage, in the order of the forward pass; None where a feature is not finite."""


@dataclass(frozen=True)
class Stage:
    """Features of one stage, float64, each less its mean and over its deviation among the training images.

    Args:
        train: [S, d]. labels: of them, [S]. forget: of T's forgotten images, [A, d]. true: labels of these, [A].
        retain: of T's retained images, [B, d].
    """

    train: Tensor
    labels: Tensor
    forget: Tensor
    true: Tensor
    retain: Tensor


def stages_of(e: Evidence, images: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """A function from images [S, C, H, W] to the features of every stage, [S, d] each, float64, on the CPU.

    Args:
        images: a few, with which the forward pass is looked at.
    """
    model = deep(e.model, images[:EXAMPLES].to(e.device), e.model.target(-1).out_features)
    stages = Stages(model)

    def features(images: Tensor) -> list[Tensor]:
        with inspecting(e.model), torch.no_grad():  # inference mode would forbid the gradients that the prefix asks for
            parts = [stages(model.prefix(part.to(e.device)))[0] for part in images.split(CHUNK)]
        return [torch.cat(stage).double().cpu() for stage in zip(*parts, strict=True)]

    return features


def stage_names(e: Evidence) -> tuple[str, ...]:
    """Names of the stages whose features are looked at, in the order of the forward pass."""
    images, _ = probed_images(e)
    return tuple(Stages(deep(e.model, images[:EXAMPLES].to(e.device), e.model.target(-1).out_features)).taps)


def features(e: Evidence) -> tuple[Stage, ...]:
    """Compute the features of every stage.

    Raises:
        Undefined: one is not finite, or no stage but the first has weights.
    """
    images, labels = probed_images(e)
    asked, true = e.images(e.split, True)
    some = partial(drawn_of_some, most=MOST_PROBED, seed=derive_seed(e.seed, "probe", "judged"))
    others, _ = e.images(e.split, False, some)
    of = stages_of(e, images)
    sides = list(zip(of(images), of(asked), of(others), strict=True))
    if not sides:
        raise Undefined("the network has one block with weights, whose features no mask changes")
    if not all(bool(values.isfinite().all()) for side in sides for values in side):
        raise Undefined("a feature is not a finite number")
    plain = starmap(standardised, sides)
    return tuple(Stage(train, labels.cpu(), forget, true.cpu(), retain) for train, forget, retain in plain)


def at_each(e: Evidence, of: Callable[[Stage], float | None]) -> tuple[float, ...]:
    """A value at every stage.

    Raises:
        Undefined: one has none.
    """
    values = [of(stage) for stage in e.needed(features)]
    known = tuple(value for value in values if value is not None)
    if len(known) < len(values):
        raise Undefined("a stage has no such value")
    return known


# --- what is read off one stage ---------------------------------------------------------------------------


def binary_auc(stage: Stage, classes: tuple[int, ...]) -> float:
    """Percent of pairs (T's forgotten, T's retained image) that a probe of "one of these classes" orders rightly."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=1.0, tol=1e-3, max_iter=1000, class_weight="balanced")
    probe.fit(stage.train.numpy(), torch.isin(stage.labels, torch.tensor(classes)).numpy())
    sides = (torch.from_numpy(probe.decision_function(side.numpy())) for side in (stage.forget, stage.retain))
    return 100 * separation(*sides)


def neighbour_recall(stage: Stage, count: int = NEIGHBOURS) -> float:
    """Percent of T's forgotten images of whose `count` nearest training images most are of their class."""
    near = torch.cdist(stage.forget, stage.train).topk(min(count, len(stage.train)), largest=False).indices
    closeness = torch.linspace(1e-3, 0, near.shape[1], dtype=torch.float64)  # breaks ties, and nothing else
    votes = torch.zeros(len(near), int(max(stage.labels.max(), stage.true.max())) + 1, dtype=torch.float64)
    votes.scatter_add_(1, stage.labels[near], (1 + closeness).expand(near.shape))
    return 100 * float((votes.argmax(1) == stage.true).double().mean())


def nearest_mean_recall(stage: Stage) -> float:
    """Percent of T's forgotten images that the mean of their class is nearest to, of all class means."""
    classes = stage.labels.unique()
    means = torch.stack([stage.train[stage.labels == label].mean(0) for label in classes])
    return 100 * float((classes[torch.cdist(stage.forget, means).argmin(1)] == stage.true).double().mean())


def nearest_similarity(features: Tensor, retained: Tensor) -> Tensor:
    """Cosine of each image's features [S, d] to the most similar ones of retained images [R, d]. [S]."""
    return (normalize(features) @ normalize(retained).T).amax(1)


def retained_rank_of(stage: Stage, classes: tuple[int, ...]) -> float:
    """Share of pairs (T's forgotten, T's retained image) whose forgotten one is the more similar to the retained
    training image that each is most similar to; of as similar ones half.
    """
    retained = stage.train[~torch.isin(stage.labels, torch.tensor(classes))]
    return separation(*(nearest_similarity(side, retained) for side in (stage.forget, stage.retain)))


def probe_recalls(e: Evidence) -> tuple[float, ...]:
    """Recall of the forgotten classes by a probe of all classes, at every stage."""
    return at_each(e, lambda one: probe_recall(one.train, one.labels, one.forget, one.true))


def binary_aucs(e: Evidence) -> tuple[float, ...]:
    """AUC of a probe of the forgotten classes against all others, at every stage."""
    return at_each(e, lambda one: binary_auc(one, e.forget_class))


def neighbour_recalls(e: Evidence) -> tuple[float, ...]:
    """Recall of the forgotten classes by nearest neighbours, at every stage."""
    return at_each(e, neighbour_recall)


def nearest_mean_recalls(e: Evidence) -> tuple[float, ...]:
    """Recall of the forgotten classes by nearest class means, at every stage."""
    return at_each(e, nearest_mean_recall)


def retained_ranks(e: Evidence) -> tuple[float, ...]:
    """Rank of the forgotten images' similarity to retained ones, at every stage."""
    return at_each(e, lambda one: retained_rank_of(one, e.forget_class))


PER_STAGE: dict[str, PerStage] = {
    "probe_layers": probe_recalls,
    "auc_layers": binary_aucs,
    "knn_layers": neighbour_recalls,
    "nearest_mean_layers": nearest_mean_recalls,
    "retained_rank": retained_ranks,
}
"""Metric that is a mean over stages -> what it is the mean of."""


# --- over the stages --------------------------------------------------------------------------------------


def mean_over_stages(e: Evidence, of: PerStage) -> float:
    """Mean of a value over stages.

    Raises:
        Undefined: it has none.
    """
    values = e.needed(of)
    return sum(values) / len(values)


def differences(e: Evidence, of: PerStage) -> tuple[float, ...]:
    """A value minus its mean over the retrained models, at every stage.

    Raises:
        Undefined: it has none, or there is nothing to compare it with.
    """
    ours = e.needed(of)
    theirs = [values for values in (r.value(of) for r in e.retrained) if values is not None]
    if not theirs:
        raise Undefined("there is no retrained model to compare with")
    return tuple(mine - sum(other) / len(theirs) for mine, other in zip(ours, zip(*theirs, strict=True), strict=True))


def largest_gap(e: Evidence, of: PerStage) -> float:
    """Largest distance, over stages, to the retrained models' mean; raises as `differences` does."""
    return max(map(abs, differences(e, of)))


def by_stage(e: Evidence, metrics: Iterable[str]) -> dict[str, dict[str, float]]:
    """Those of some metrics that are means over stages (PER_STAGE): their value at each, by its name.

    One that has no value is left out.
    """
    found = {name: values for name in metrics if name in PER_STAGE and (values := e.value(PER_STAGE[name])) is not None}
    if not found:
        return {}
    names = stage_names(e)
    return {name: dict(zip(names, values, strict=True)) for name, values in found.items()}


TARGET = "as retrained, not chance"


@metric("probe_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def probe_layers(e: Evidence) -> float:
    """Recall of the forgotten classes on T by a linear probe, as in probe_input, on what a stage reads, averaged over
    stages: the last blocks that hold 90 % of the weights, all but the first of them.
    """
    return mean_over_stages(e, probe_recalls)


@metric("probe_layers_gap", "points", "lower", group="features", target="0")
def probe_layers_gap(e: Evidence) -> float:
    """The recall of probe_layers at a stage, its distance to the mean of the retrained models', above or below: the
    largest over stages.
    """
    return largest_gap(e, probe_recalls)


@metric("auc_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def auc_layers(e: Evidence) -> float:
    """The same stages and training images, but a probe of forgotten against retained (logistic regression, C = 1, both
    sides weighing the same): the area under its ROC curve on T (of each retained class up to 200 images), in percent,
    averaged over stages.
    """
    return mean_over_stages(e, binary_aucs)


@metric("auc_layers_gap", "points", "lower", group="features", target="0")
def auc_layers_gap(e: Evidence) -> float:
    """The same of auc_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, binary_aucs)


@metric("knn_layers", "%", "retrain", group="features", target=TARGET, source="k nearest neighbours")
def knn_layers(e: Evidence) -> float:
    """Recall of the forgotten classes on T by the vote of the 10 nearest training images in what a stage reads
    (Euclidean, standardised; of classes with as many votes the one whose images are nearer), averaged over stages.
    """
    return mean_over_stages(e, neighbour_recalls)


@metric("knn_layers_gap", "points", "lower", group="features", target="0")
def knn_layers_gap(e: Evidence) -> float:
    """The same of knn_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, neighbour_recalls)


@metric("nearest_mean_layers", "%", "retrain", group="features", target=TARGET, source="nearest class mean")
def nearest_mean_layers(e: Evidence) -> float:
    """Recall of the forgotten classes on T by the nearest class mean in what a stage reads (Euclidean, standardised),
    averaged over stages.
    """
    return mean_over_stages(e, nearest_mean_recalls)


@metric("nearest_mean_layers_gap", "points", "lower", group="features", target="0")
def nearest_mean_layers_gap(e: Evidence) -> float:
    """The same of nearest_mean_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, nearest_mean_recalls)


@metric(
    "retained_rank", "share", "retrain", group="features", target="as retrained; 0.5 is RULER's", source="2605.27569"
)
def retained_rank(e: Evidence) -> float:
    """After M4 of RULER: an image's similarity is the largest cosine of its features, in what a stage reads
    (standardised), to those of retained training images. Probability that T's forgotten image is more similar than T's
    retained one (of up to 200 a class; equal ones count half), averaged over stages. At 0.5, which needs no retrained
    model, forgotten images lie as close to retained ones as unseen retained images do; retrained models may lie below.
    """
    return mean_over_stages(e, retained_ranks)
