"""Metrics of the model itself: relearning from a few images, linear probes of features, distances of features.

Outputs alone do not show whether a class is gone or only left unsaid: a mask or a dropped logit in a late layer gives
perfect scores over features that still hold the class. All of these work on copies, are drawn by seeds derived from
the run's, and compare with the retrained models, which themselves relearn fast and let a probe recognise much.
"""

import copy
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from core.config import derive_seed
from measure.metrics import Evidence, metric, retrained_mean
from model import HookedModel, inspecting, predictions
from training.optimisers import Adam

LEARNING_RATE = 2e-3  # of the stack of linear layers
EMBEDDING_RATE = 1e-4  # of what comes before it, if it has parameters: convolutions collapse at more
BATCH = 32
STEPS = 20  # of relearning from shots, at least; more where they do not make one pass
REGAINED = 0.95  # of the original accuracy
MOST_STEPS = 32  # of regaining
MOST_TAUGHT = 400  # images of D_f for AIN, and as many of D_r
MOST_JUDGED = 128  # images of D_f that AIN is read from at every step
MOST_PROBED = 200  # images of each class that a probe is fitted to
MOST_PROBED_CLASSES = 20  # retained classes among them: a fit to a thousand classes would take minutes for each method
CHUNK = 256


def drawn(labels: Tensor, most: int, seed: int) -> Tensor:
    """Draw at most `most` positions of every class in labels [S]; a larger `most` gives the same and more."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:most] for label in labels.unique()])


def drawn_of_some(labels: Tensor, most: int, seed: int) -> Tensor:
    """Draw as `drawn` does, but of at most MOST_PROBED_CLASSES classes, which are drawn where there are more."""
    classes = labels.unique()
    if len(classes) <= MOST_PROBED_CLASSES:
        return drawn(labels, most, seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "classes"))
    chosen = classes[torch.randperm(len(classes), generator=generator)[:MOST_PROBED_CLASSES]]
    places = torch.isin(labels, chosen).nonzero().flatten()
    return places[drawn(labels[places], most, seed)]


def drawn_of_all(labels: Tensor, most: int, seed: int) -> Tensor:
    """Draw at most `most` positions, whatever the class."""
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:most]


def training_images(e: Evidence, purpose: str, most: int, draw: Callable = drawn) -> tuple[Tensor, Tensor]:
    """Draw images of D_f, then of D_r, and labels [S]: at most `most` of a class (`drawn_of_all`: of a set)."""
    sides = [
        e.images("train", forgotten, partial(draw, most=most, seed=derive_seed(e.seed, purpose, forgotten)))
        for forgotten in (True, False)
    ]
    images, labels = (torch.cat(parts).to(e.device) for parts in zip(*sides, strict=True))
    return images, labels


def accuracy(model: HookedModel, images: Tensor, labels: Tensor) -> float:
    """Compute the accuracy, percent."""
    with torch.inference_mode():
        said = torch.cat([predictions(model(part)) for part in images.split(CHUNK)])
    return 100 * float((said == labels).double().mean())


# --- relearning -------------------------------------------------------------------------------------------


def relearning(
    model: HookedModel, images: Tensor, labels: Tensor, seed: int, rate: float = LEARNING_RATE
) -> Iterator[HookedModel]:
    """A copy of a model as it is, then after every step of fine-tuning it on images [S, C, H, W]; without end.

    Adam without decay on all parameters, frozen ones too, `rate` for the stack and 1e-4 ahead of it; cross-entropy,
    batches of 32 from orders drawn by `seed`; eval mode, so that BatchNorm keeps its statistics.
    """
    learner = copy.deepcopy(model).eval().requires_grad_(True)
    ahead = [value for name, value in learner.named_parameters() if not name.startswith("linears.")]
    groups = [{"params": learner.linears.parameters()}, {"params": ahead, "lr": EMBEDDING_RATE}]
    optimizer = Adam(groups, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    yield learner
    while True:
        for batch in torch.randperm(len(labels), generator=generator).to(labels.device).split(BATCH):
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(learner(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            yield learner


def relearn(e: Evidence, shots: int, rate: float = LEARNING_RATE, start: HookedModel | None = None) -> float | None:
    """Return accuracy on T's forgotten images after fine-tuning on `shots` images of every class, percent.

    None where a forgotten class has fewer training images than that. `start`: fine-tuned in place of the judged model.
    """
    images, labels = training_images(e, "relearn", shots)
    if min(int((labels == label).sum()) for label in e.forget_class) < shots:
        return None
    steps = max(STEPS, -(-len(labels) // BATCH))
    learners = relearning(start or e.model, images, labels, derive_seed(e.seed, "relearn", "order"), rate)
    learner = next(islice(learners, steps, None))
    asked, true = e.images(e.split, True)
    return accuracy(learner, asked.to(e.device), true.to(e.device))


RELEARN_TARGET = "as retrained: what a model without the class needs to learn it"


@metric("relearn_1", "%", "retrain", group="deep", target=RELEARN_TARGET)
def relearn_1(e: Evidence) -> float | None:
    """Accuracy on T's forgotten images after a copy is fine-tuned on 1 training image of every class, forgotten and
    retained: all layers, Adam 2e-3 (1e-4 ahead of the linear stack), 20 steps or one pass, batches of up to 32,
    BatchNorm in eval mode. What an edit puts behind the weights (a dropped logit) stays as it is: 0 here says
    that its guard held, not that the features are gone.
    """
    return relearn(e, 1)


@metric("relearn_10", "%", "retrain", group="deep", target=RELEARN_TARGET)
def relearn_10(e: Evidence) -> float | None:
    """As relearn_1, from 10 training images of every class, which hold the 1."""
    return relearn(e, 10)


@metric("relearn_50", "%", "retrain", group="deep", target=RELEARN_TARGET)
def relearn_50(e: Evidence) -> float | None:
    """As relearn_1, from 50 training images of every class, which hold the 10."""
    return relearn(e, 50)


def steps_until(goal: float, scores: Iterable[float], most: int) -> int:
    """Count the steps until a score reaches the goal; scores are read before the first and after every step."""
    return next((step for step, score in enumerate(islice(scores, most)) if score >= goal), most)


def _judged_by(e: Evidence) -> tuple[Tensor, Tensor]:
    """Return the images of D_f that AIN is read from, and their labels."""
    some = partial(drawn_of_all, most=MOST_JUDGED, seed=derive_seed(e.seed, "AIN", "judged"))
    images, labels = e.images("train", True, some)
    return images.to(e.device), labels.to(e.device)


def _judged_accuracy(e: Evidence) -> float:
    with inspecting(e.model):
        return accuracy(e.model, *_judged_by(e))


def regaining_steps(e: Evidence) -> float:
    """Steps, at most MOST_STEPS, to regain REGAINED of the untouched classifier's accuracy on D_f."""
    goal = REGAINED * (e.original or e).value(_judged_accuracy)
    asked, taught = _judged_by(e), training_images(e, "AIN", MOST_TAUGHT, drawn_of_all)
    learners = relearning(e.model, *taught, derive_seed(e.seed, "AIN", "order"))
    return steps_until(goal, (accuracy(learner, *asked) for learner in learners), MOST_STEPS)


@metric("AIN", "ratio", "retrain", group="deep", target="1", source="2201.05629")
def anamnesis_index(e: Evidence) -> float | None:
    """Steps to regain 95 % of the untouched classifier's accuracy on D_f, over the mean of the same for the retrained
    models. Steps as in relearn_1, on up to 400 images of D_f and as many of D_r; read from 128 images of D_f before the
    first and after every step; counted up to 32, which stands for "not regained". Below 1: more is left than retraining
    leaves. A dropped logit is regained only by driving all others below it, which a ResNet's steps come to do.
    """
    steps = retrained_mean(e, regaining_steps)
    return e.value(regaining_steps) / steps if steps else None


# --- representations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Input h [S, n] and output W h [S, m] of the target layer (of several: of the first, of the last); labels [S]."""

    input: Tensor
    output: Tensor
    labels: Tensor


def features_of(e: Evidence, images: Tensor, labels: Tensor) -> Features:
    """Compute the target layer's input and output, float64, on the CPU; nothing is trained or changed."""
    places = e.model.layer_indices(e.mask_layer)

    def through(part: Tensor) -> tuple[Tensor, Tensor]:
        h = e.model.prefix(part, e.mask_layer)
        output = e.model.linears[places[0]](h)
        for place in range(places[0] + 1, places[-1] + 1):
            output = e.model.linears[place](e.model.between(output))
        return h, output

    with inspecting(e.model), torch.inference_mode():
        pairs = [through(part.to(e.device)) for part in images.split(CHUNK)]
    read, said = (torch.cat(parts).double().cpu() for parts in zip(*pairs, strict=True))
    return Features(read, said, labels.cpu())


def probed_images(e: Evidence) -> tuple[Tensor, Tensor]:
    """Draw the training images that probes are fitted to, and their labels [S]: up to MOST_PROBED of a class."""
    forgotten = partial(drawn, most=MOST_PROBED, seed=derive_seed(e.seed, "probe", True))
    retained = partial(drawn_of_some, most=MOST_PROBED, seed=derive_seed(e.seed, "probe", False))
    sides = [e.images("train", True, forgotten), e.images("train", False, retained)]
    images, labels = (torch.cat(parts).to(e.device) for parts in zip(*sides, strict=True))
    return images, labels


def _training_features(e: Evidence) -> Features:
    return features_of(e, *probed_images(e))


def _judged_features(e: Evidence) -> Features:
    return features_of(e, *e.images(e.split, True))


def standardised(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [S, d] of several sets less their mean and over their deviation (1 where it is 0) in the first set."""
    deviation, mean = torch.std_mean(train, 0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    return [(values - mean) / scale for values in (train, *others)]


def probe_recall(features: Tensor, labels: Tensor, asked: Tensor, true: Tensor) -> float | None:
    """Percent of `asked` [A, n] whose class `true` [A] a fresh linear probe, fitted to features [S, n], names.

    Multinomial logistic regression (L2, C = 1) on standardised features. None where a feature is not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if not (features.isfinite().all() and asked.isfinite().all()):
        return None
    features, asked = standardised(features, asked)
    probe = LogisticRegression(C=1.0, tol=1e-3, max_iter=1000)
    with warnings.catch_warnings():  # of many classes with an image each, scikit-learn takes labels for quantities
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        probe.fit(features.numpy(), labels.numpy())
    return 100 * float((probe.predict(asked.numpy()) == true.numpy()).mean())


@metric("probe_input", "%", "retrain", group="deep", target="as retrained, not chance", source="1610.01644")
def probe_input(e: Evidence) -> float | None:
    """Recall of the forgotten classes on T by a linear probe on the target layer's input (of several: the first's):
    multinomial logistic regression (C = 1, standardised) fitted to up to 200 training images of every class (of more
    than 20 retained classes: of 20). A mask of the target layer leaves this as it was.
    """
    train, asked = e.value(_training_features), e.value(_judged_features)
    return probe_recall(train.input, train.labels, asked.input, asked.labels)


@metric("probe_output", "%", "retrain", group="deep", target="as retrained, not chance", source="1610.01644")
def probe_output(e: Evidence) -> float | None:
    """The same at the target layer's output (of several: the last's), ahead of the non-linearity."""
    train, asked = e.value(_training_features), e.value(_judged_features)
    return probe_recall(train.output, train.labels, asked.output, asked.labels)


@metric("probe_gap", "points", "lower", group="deep", target="0 or below")
def probe_gap(e: Evidence) -> float | None:
    """probe_output minus its mean over the retrained models: what features tell of the classes beyond what those of
    models tell that never saw them.
    """
    ours, theirs = e.value(probe_output), retrained_mean(e, probe_output)
    return None if ours is None or theirs is None else ours - theirs


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) (arXiv:1905.00414), centred columns.

    Args:
        x, y: features of the same images, [S, n] and [S, m].

    Returns:
        In [0, 1]; None if one of them is the same for all images or not finite.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    scale = float(torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y))
    return float(torch.linalg.norm(y.T @ x) ** 2) / scale if 0 < scale < float("inf") else None


@metric("CKA", "similarity", "retrain", group="deep", target="as retrained", source="1905.00414")
def cka_original(e: Evidence) -> float | None:
    """Linear CKA of the target layer's output on T's forgotten images with the untouched classifier's: 1 is the same
    but for rotation and scale.
    """
    return linear_cka(e.value(_judged_features).output, (e.original or e).value(_judged_features).output)


@metric("CKA_retrain", "similarity", "higher", group="deep", target="as between retrained models", source="1905.00414")
def cka_retrained(e: Evidence) -> float | None:
    """The same with the retrained models', their mean."""
    ours = e.value(_judged_features).output
    values = [linear_cka(ours, r.value(_judged_features).output) for r in e.retrained]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
