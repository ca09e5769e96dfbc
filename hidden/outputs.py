"""What logits tell of forgotten classes although no answer names them: an edit may lower a logit and keep its order."""

import math

import torch
from torch import Tensor

from measure.attacks import separation
from measure.metrics import Evidence, Outputs, metric

TAKEN_FOR, FEW_TAKEN = 0.05, 0.01  # of other retained images that a constant may turn into the forgotten classes


def lead(outputs: Outputs, classes: tuple[int, ...]) -> Tensor:
    """Largest logit of some classes minus the largest of all others, per image, float64. [S].

    Of log-probabilities, whose differences are those of logits.
    """
    chosen = torch.zeros(outputs.num_classes, dtype=torch.bool)
    chosen[list(classes)] = True
    parts = [block[:, chosen].amax(1) - block[:, ~chosen].amax(1) for block in outputs.log_p()]
    return torch.cat(parts)


def constant(leads: Tensor, share: float = TAKEN_FOR) -> float:
    """The smallest lead [S] that at most a share of all images is above; NaN if one is not finite."""
    if not bool(leads.isfinite().all()):
        return math.nan
    most = int(share * len(leads) + 1e-9)  # 0.05 x 20 is 1, which rounding must not make 0
    return float(leads.sort(descending=True).values[most])


def share_above(leads: Tensor, limit: float) -> float:
    """Percent of images [S] whose lead is above a limit; NaN if one is not finite."""
    if math.isnan(limit) or not bool(leads.isfinite().all()):
        return math.nan
    return 100 * float((leads > limit).double().mean())


@metric("forget_auroc", "%", "retrain", group="features", target="as retrained, not 50", source="2112.03570")
def forget_auroc(e: Evidence) -> float:
    """How well the logit of the forgotten class minus the largest other logit tells T's forgotten images from T's
    retained ones: the area under the ROC curve, 100 P(forgotten > retained) + 50 P(equal). 50: not at all. Of several
    forgotten classes the largest logit counts.
    """
    return 100 * separation(lead(e.forget, e.forget_class), lead(e.retain, e.forget_class))


def recall_after_constant(e: Evidence, share: float) -> float:
    """Percent of T's forgotten images that a constant on their logit brings back: the largest one that turns at most a
    share of retained images into them, of validation where T is test, else of D_r.
    """
    other = "val" if e.split == "test" else "train"
    limit = constant(lead(e.outputs(other, False), e.forget_class), share)
    return share_above(lead(e.forget, e.forget_class), limit)


@metric("constant_recall", "%", "retrain", group="features", target="as retrained", source="ROC curve at 5 %")
def constant_recall(e: Evidence) -> float:
    """Share of T's forgotten images that are taken for a forgotten class after one constant is added to its logit, the
    constant chosen on other images (validation where T is test, else D_r) so that at most 5 % of the retained ones are.
    """
    return recall_after_constant(e, TAKEN_FOR)


@metric("constant_recall_1", "%", "retrain", group="features", target="as retrained", source="ROC curve at 1 %")
def constant_recall_1(e: Evidence) -> float:
    """As constant_recall, but at most 1 % of the retained images may be taken for a forgotten class."""
    return recall_after_constant(e, FEW_TAKEN)
