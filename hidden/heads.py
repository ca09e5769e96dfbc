"""Attacks on the last layer: something is put there by hand, and forgotten classes are answered again, or not."""

from functools import partial

import torch
from torch import Tensor, nn

from core.config import derive_seed
from hidden.outputs import constant, lead, share_above
from measure.metrics import Evidence, Outputs, Undefined, metric
from measure.probes import CHUNK, MOST_PROBED, drawn, drawn_of_some
from model import inspecting, predictions

SHOTS = 10  # images of each forgotten class that an attack has


def last_inputs(e: Evidence, images: Tensor) -> Tensor:
    """What the last layer reads of images [S, C, H, W]. [S, n]."""
    with inspecting(e.model), torch.inference_mode():
        return torch.cat([e.model.prefix(part.to(e.device), -1) for part in images.split(CHUNK)])


def some_forgotten(e: Evidence) -> tuple[Tensor, Tensor]:
    """SHOTS training images of each forgotten class and their labels [S].

    Raises:
        Undefined: a class has fewer.
    """
    choose = partial(drawn, most=SHOTS, seed=derive_seed(e.seed, "attack"))
    images, labels = e.images("train", True, choose)
    if len(labels) < SHOTS * len(e.forget_class):
        raise Undefined(f"a forgotten class has fewer than {SHOTS} training images")
    return images, labels


def recall(logits: Tensor, labels: Tensor) -> float:
    """Percent of images whose label [S] has the largest logit [S, C]."""
    return 100 * float((predictions(logits) == labels.to(logits.device)).double().mean())


def with_prototypes(weight: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    """A last layer [C, n] whose rows of some classes are the mean of their h [S, n], labels [S], as long as the rows
    of the other classes are in the mean; a mean of 0 stays as it is.
    """
    classes = labels.unique().tolist()
    others = [place for place in range(len(weight)) if place not in classes]
    length, changed = weight[others].norm(dim=1).mean(), weight.clone()
    for label in classes:
        changed[label] = nn.functional.normalize(h[labels == label].mean(0), dim=0) * length
    return changed


@metric("prototype_recall", "%", "retrain", group="features", target="as retrained", source="prototypes as classifier")
def prototype_recall(e: Evidence) -> float:
    """Share of T's forgotten images that are taken for a forgotten class once its row of the last layer is the mean of
    what that layer reads of 10 of its training images, scaled to the mean norm of the retained classes' rows, with one
    constant on its logit: such that at most 5 % of up to 200 training images of each retained class are taken for it.
    Without the constant it is 100 of every model, as it is for retained images.
    """
    images, labels = some_forgotten(e)
    weight = with_prototypes(e.model.target(-1).weight.detach(), last_inputs(e, images), labels.to(e.device))
    choose = partial(drawn_of_some, most=MOST_PROBED, seed=derive_seed(e.seed, "prototype"))
    others, asked = (
        lead(Outputs(last_inputs(e, some) @ weight.T, true.to(e.device)), e.forget_class)
        for some, true in (e.images("train", False, choose), e.images(e.split, True))
    )
    return share_above(asked, constant(others))


@metric("head_swap_recall", "%", "retrain", group="features", target="as retrained", source="model stitching")
def head_swap_recall(e: Evidence) -> float:
    """Accuracy on T's forgotten images of the judged model with the untouched classifier's last layer in place of its
    own: forgetting that the last layer does is gone. A model trained from the beginning does not fit that layer.
    """
    asked, true = e.images(e.split, True)
    with torch.inference_mode():
        return recall((e.original or e).model.target(-1)(last_inputs(e, asked)), true)
