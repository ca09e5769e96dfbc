"""What the features of every stage tell of forgotten classes: probes, neighbours and class means.

A stage is a block of the network (`erasing.stages`); its features are what it reads, the mean over positions where
there are some. Up to 200 training images of a class are looked at, as `measure.probes` draws them, of T all forgotten
images and up to 200 of each retained class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import torch
from torch import Tensor

from core.config import derive_seed
from erasing.stages import Stages, deep
from measure.attacks import separation
from measure.metrics import Evidence, metric
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


def features(e: Evidence) -> tuple[Stage, ...] | None:
    """Compute the features of every stage; None where one is not finite."""
    images, labels = probed_images(e)
    asked, true = e.images(e.split, True)
    some = partial(drawn_of_some, most=MOST_PROBED, seed=derive_seed(e.seed, "probe", "judged"))
    others, _ = e.images(e.split, False, some)
    of = stages_of(e, images)
    sides = list(zip(of(images), of(asked), of(others), strict=True))
    if not all(bool(values.isfinite().all()) for side in sides for values in side):
        return None
    plain = starmap(standardised, sides)
    return tuple(Stage(train, labels.cpu(), forget, true.cpu(), retain) for train, forget, retain in plain)


def _at_each(e: Evidence, of: Callable[[Stage], float | None]) -> tuple[float, ...] | None:
    values = [of(stage) for stage in e.value(features) or ()]
    known = tuple(value for value in values if value is not None)
    return known if known and len(known) == len(values) else None


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


def probe_recalls(e: Evidence) -> tuple[float, ...] | None:
    """Recall of the forgotten classes by a probe of all classes, at every stage."""
    return _at_each(e, lambda one: probe_recall(one.train, one.labels, one.forget, one.true))


def binary_aucs(e: Evidence) -> tuple[float, ...] | None:
    """AUC of a probe of the forgotten classes against all others, at every stage."""
    return _at_each(e, lambda one: binary_auc(one, e.forget_class))


def neighbour_recalls(e: Evidence) -> tuple[float, ...] | None:
    """Recall of the forgotten classes by nearest neighbours, at every stage."""
    return _at_each(e, neighbour_recall)


def nearest_mean_recalls(e: Evidence) -> tuple[float, ...] | None:
    """Recall of the forgotten classes by nearest class means, at every stage."""
    return _at_each(e, nearest_mean_recall)


# --- over the stages --------------------------------------------------------------------------------------


def mean_over_stages(e: Evidence, of: PerStage) -> float | None:
    """Mean of a value over stages."""
    values = e.value(of)
    return None if values is None else sum(values) / len(values)


def differences(e: Evidence, of: PerStage) -> tuple[float, ...] | None:
    """A value minus its mean over the retrained models, at every stage; None if there is nothing to compare with."""
    ours = e.value(of)
    theirs = [values for values in (r.value(of) for r in e.retrained) if values is not None]
    if ours is None or not theirs:
        return None
    return tuple(mine - sum(other) / len(theirs) for mine, other in zip(ours, zip(*theirs, strict=True), strict=True))


def largest_gap(e: Evidence, of: PerStage) -> float | None:
    """Largest distance, over stages, to the retrained models' mean."""
    found = differences(e, of)
    return None if found is None else max(map(abs, found))


TARGET = "as retrained, not chance"


@metric("probe_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def probe_layers(e: Evidence) -> float | None:
    """Recall of the forgotten classes on T by a linear probe, as in probe_input, on what a stage reads, averaged over
    stages: the last blocks that hold 90 % of the weights, all but the first of them.
    """
    return mean_over_stages(e, probe_recalls)


@metric("probe_layers_gap", "points", "lower", group="features", target="0")
def probe_layers_gap(e: Evidence) -> float | None:
    """The recall of probe_layers at a stage, its distance to the mean of the retrained models', above or below: the
    largest over stages.
    """
    return largest_gap(e, probe_recalls)


@metric("auc_layers", "%", "retrain", group="features", target=TARGET, source="1610.01644")
def auc_layers(e: Evidence) -> float | None:
    """The same stages and training images, but a probe of forgotten against retained (logistic regression, C = 1, both
    sides weighing the same): the area under its ROC curve on T (of each retained class up to 200 images), in percent,
    averaged over stages.
    """
    return mean_over_stages(e, binary_aucs)


@metric("auc_layers_gap", "points", "lower", group="features", target="0")
def auc_layers_gap(e: Evidence) -> float | None:
    """The same of auc_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, binary_aucs)


@metric("knn_layers", "%", "retrain", group="features", target=TARGET, source="k nearest neighbours")
def knn_layers(e: Evidence) -> float | None:
    """Recall of the forgotten classes on T by the vote of the 10 nearest training images in what a stage reads
    (Euclidean, standardised; of classes with as many votes the one whose images are nearer), averaged over stages.
    """
    return mean_over_stages(e, neighbour_recalls)


@metric("knn_layers_gap", "points", "lower", group="features", target="0")
def knn_layers_gap(e: Evidence) -> float | None:
    """The same of knn_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, neighbour_recalls)


@metric("nearest_mean_layers", "%", "retrain", group="features", target=TARGET, source="nearest class mean")
def nearest_mean_layers(e: Evidence) -> float | None:
    """Recall of the forgotten classes on T by the nearest class mean in what a stage reads (Euclidean, standardised),
    averaged over stages.
    """
    return mean_over_stages(e, nearest_mean_recalls)


@metric("nearest_mean_layers_gap", "points", "lower", group="features", target="0")
def nearest_mean_layers_gap(e: Evidence) -> float | None:
    """The same of nearest_mean_layers as probe_layers_gap of probe_layers."""
    return largest_gap(e, nearest_mean_recalls)
