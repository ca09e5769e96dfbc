"""Rivals that train features to forget: contrastive losses, and a teacher whose features lack a direction.

No paper's text or code was at hand: each was written from a summary of its idea, and says what is our own choice. They
have ten times the epochs of `rivals.trained`, so that they see as many images as `mimu_deep` does; batches, optimisers
and the bound on gradients are the same.
"""

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional

from model import HookedModel, capture
from models.classifier import Classifier
from rivals.subspaces import last_inputs_of, without_directions
from rivals.trained import EPOCHS as SHORT
from rivals.trained import adam, tuner
from unlearn.finetuning import RETAINED
from unlearn.registry import Context, Edit, NotApplicable, Point, method

EPOCHS = 10 * SHORT
TEMPERATURE = 0.1  # of contrastive losses
TOGETHER = 2  # batches that are compared with each other: pairs need numbers


def read_inside(model: Classifier, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features, so far as parameters reach them, and logits of images [B, C, H, W].

    Returns:
        What linear layers read, [B, n] each, the last layer's last, and logits [B, classes].

    Raises:
        NotApplicable: it is somebody else's classifier, or no parameter reaches what the last layer reads.
    """
    if not isinstance(model, HookedModel):
        raise NotApplicable("reads what stands between the linear layers that this project's own classifiers end in")
    with ExitStack() as stack:
        records = [stack.enter_context(capture(layer)) for layer in model.linears]
        logits = model(images)
        inputs = [record.take()[0] for record in records]
    if not inputs[-1].requires_grad:
        raise NotApplicable("changes features, and this classifier has no layer ahead of its last")
    return [h for h in inputs if h.requires_grad], logits


# --- losses -----------------------------------------------------------------------------------------------


def _similarities(z: Tensor, temperature: float) -> Tensor:
    """log of the share of each other image in an image's similarities, [B, B]; a column for itself that is -inf."""
    z = functional.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)


def supervised_contrastive(z: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log of the share that an image of the same class has among all others' exp(cos / T), mean over those of the
    same class, then over the images that have one, nats (2004.11362, L_out). z [B, d], labels [B].
    """
    same = (labels[:, None] == labels[None]).fill_diagonal_(False)
    counts = same.sum(1)
    told = _similarities(z, temperature).masked_fill(~same, 0).sum(1)
    return -(told / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def drawn_to_retained(forget: Tensor, retain: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log of the share that a retained image has among all others' exp(cos / T) of a forgotten one, mean over both,
    nats. forget [A, d], retain [B, d].
    """
    shares = _similarities(torch.cat([forget, retain]), temperature)
    return -shares[: len(forget), len(forget) :].mean()


# --- methods ----------------------------------------------------------------------------------------------


@method(
    "cola",
    "COLA",
    axes=("seed",),
    source="2405.17878",
    grid=[
        {"lr": lr, "collapse": epochs} for lr, epochs in ((1e-3, 25), (2e-3, 15), (2e-3, 25), (1e-3, 15), (3e-3, 15))
    ],
)
def cola(context: Context, point: Point, lr: float, collapse: int) -> Edit:
    """Collapse and align, on D_r alone: `collapse` epochs of the supervised contrastive loss at temperature 0.1 on what
    each linear layer reads, so that features fall to retained classes, then cross-entropy for the rest of 30 epochs, by
    Adam. Written from a summary of the paper, not checked against it.
    """
    engine = tuner("cola", context, point, adam(lr))
    for epoch in range(EPOCHS):
        for images, labels in engine.retained(RETAINED + 1, TOGETHER):
            features, logits = read_inside(engine.model, images)
            if epoch < collapse:
                engine.descend(torch.stack([supervised_contrastive(z, labels) for z in features]).mean())
            else:
                engine.descend(functional.cross_entropy(logits, labels))
    return Edit(engine.finished())


@method(
    "contrastive",
    "contrastive unlearning",
    axes=("seed",),
    source="2401.10458",
    grid=[
        {"lr": lr, "weight": weight} for lr, weight in ((1e-3, 1.0), (3e-4, 1.0), (1e-3, 0.1), (2e-3, 0.1), (3e-3, 0.1))
    ],
)
def contrastive(context: Context, point: Point, lr: float, weight: float) -> Edit:
    """Features of D_f, as the last layer reads them, are drawn to those of D_r and away from one another by a
    contrastive loss at temperature 0.1, times `weight`, beside cross-entropy on D_r; 30 epochs of Adam. Written from a
    summary of the paper; in the loss all other images stand below the line, as in supervised contrastive learning.
    """
    engine = tuner("contrastive", context, point, adam(lr))
    for _ in range(EPOCHS):
        for (forget, _), (retain, kept) in engine.paired():
            features, logits = read_inside(engine.model, torch.cat([forget, retain]))
            away = drawn_to_retained(features[-1][: len(forget)], features[-1][len(forget) :])
            engine.descend(weight * away + functional.cross_entropy(logits[len(forget) :], kept))
    return Edit(engine.finished())


def class_directions(forget: Tensor, labels: Tensor, retain: Tensor) -> Tensor:
    """Orthonormal D [n, F]: the span of the forgotten classes' mean features less the mean of all features.

    Args:
        forget: [A, n]. labels: of these, [A]. retain: [B, n].
    """
    centre = torch.cat([forget, retain]).mean(0)
    means = torch.stack([forget[labels == label].mean(0) - centre for label in labels.unique()])
    return torch.linalg.qr(means.T).Q


@method(
    "pour_d",
    "POUR-D",
    axes=("seed",),
    source="2511.19339",
    grid=[{"lr": lr} for lr in (1e-3, 3e-3, 3e-4, 2e-3, 6e-3)],
)
def pour_d(context: Context, point: Point, lr: float) -> Edit:
    """The untouched classifier teaches, its features, as the last layer reads them, projected off the direction of the
    forgotten class (its mean feature less the mean of all): minimise the squared distance to them on D_f and D_r, in
    units of the teacher's mean square, and cross-entropy on D_r, by which the last layer follows; 30 epochs of Adam.
    Written from a summary of the paper; the weights of the terms are our choice.
    """
    (forget, true), (retain, _) = (last_inputs_of(context, side) for side in (True, False))
    kept = without_directions(class_directions(forget, true, retain))
    size = torch.cat([forget, retain]).square().mean()
    engine = tuner("pour_d", context, point, adam(lr))
    for _ in range(EPOCHS):
        for (images, _), (others, labels) in engine.paired():
            both = torch.cat([images, others])
            features, logits = read_inside(engine.model, both)
            with torch.no_grad():
                taught = context.own.prefix(both, -1) @ kept
            far = (features[-1] - taught).square().mean() / size
            engine.descend(far + functional.cross_entropy(logits[len(images) :], labels))
    return Edit(engine.finished())
