"""Attacks that put something into a model, by hand, and look whether the forgotten classes are answered again."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from core.config import derive_seed
from hidden.outputs import constant, lead, share_above
from measure.metrics import Evidence, Outputs, metric
from measure.probes import CHUNK, MOST_PROBED, accuracy, drawn, drawn_of_some
from model import inspecting, predictions

SHOTS = 10  # images of each forgotten class that an attack has


def last_inputs(e: Evidence, images: Tensor) -> Tensor:
    """What the last layer reads of images [S, C, H, W]. [S, n]."""
    with inspecting(e.model), torch.inference_mode():
        return torch.cat([e.model.prefix(part.to(e.device), -1) for part in images.split(CHUNK)])


def some_forgotten(e: Evidence) -> tuple[Tensor, Tensor] | None:
    """SHOTS training images of each forgotten class and their labels [S]; None where a class has fewer."""
    choose = partial(drawn, most=SHOTS, seed=derive_seed(e.seed, "attack"))
    images, labels = e.images("train", True, choose)
    return (images, labels) if len(labels) == SHOTS * len(e.forget_class) else None


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
def prototype_recall(e: Evidence) -> float | None:
    """Share of T's forgotten images that are taken for a forgotten class once its row of the last layer is the mean of
    what that layer reads of 10 of its training images, scaled to the mean norm of the retained classes' rows, with one
    constant on its logit: such that at most 5 % of up to 200 training images of each retained class are taken for it.
    Without the constant it is 100 of every model, as it is for retained images.
    """
    found = some_forgotten(e)
    if found is None:
        return None
    images, labels = found
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


def switched_off(e: Evidence) -> dict[str, Tensor] | None:
    """Which entries of which parameters are 0 and were not, bool, by name; None unless that is all that differs."""
    if e.original is None:
        return None
    before, found = e.original.model.state_dict(), {}
    for name, value in e.model.state_dict().items():
        differs = value != before[name]
        if bool(differs.any()):
            found[name] = differs
            if bool(value[differs].any()):
                return None
    return found or None


@metric("position_attack", "%", "retrain", group="features", target="0", source="2603.06640")
def position_attack(e: Evidence) -> float | None:
    """Accuracy on T's forgotten images after an attack that knows where a mask's zeros are: each gets the mean
    magnitude of the parameter's other entries, with the sign that lowers the cross-entropy of 10 training images of
    each forgotten class (one gradient; where it is 0 the zero stays). Of a mask alone: of any other edit, and of a
    retrained model, there is no such value.
    """
    zeros, found = switched_off(e), some_forgotten(e)
    if zeros is None or found is None:
        return None
    images, labels = (part.to(e.device) for part in found)
    attacked = copy.deepcopy(e.model).eval().requires_grad_(True)
    values = {name: value for name, value in attacked.named_parameters() if name in zeros}
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(attacked(images), labels)
        gradients = torch.autograd.grad(loss, list(values.values()))
    with torch.no_grad():
        for (name, value), gradient in zip(values.items(), gradients, strict=True):
            size = value[~zeros[name]].abs().mean()
            value[zeros[name]] = -size * gradient[zeros[name]].sign()
    asked, true = e.images(e.split, True)
    return accuracy(attacked, asked.to(e.device), true.to(e.device))
