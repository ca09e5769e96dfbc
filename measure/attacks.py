"""Membership inference: small classifiers and tests that guess, from a model's outputs, what it was trained on.

No attack draws at random, and none depends on the order of the images. Values are rounded to a grid, and each distinct
value enters once with its count as sample weight: an SVC or a logistic regression fits the same function as if every
image entered by itself. Members and non-members weigh the same, so that no attack wins by guessing the larger set.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

GRID = 100  # steps per unit of the value (a probability, or nats): an SVC takes time quadratic in distinct values
FALSE_ALARMS = 0.01  # the false-positive rate at which true positives are counted

Attack = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""(values [N, 1], truth [N] of 0 and 1, weights [N]) -> a function from values [S, 1] to calls [S] of 0 and 1."""


def _counted(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct values [U], rounded to the grid and ascending, and how often each occurs [U]."""
    steps, counts = np.unique(np.rint(values.cpu().double().numpy() * GRID), return_counts=True)
    return steps / GRID, counts


def _share_called(attack: Attack, members: Tensor, others: Tensor, asked: Tensor) -> float:
    """Share of `asked` [S] that an attack fitted on members [M] and others [N] calls members; NaN if any value is."""
    if not all(bool(values.isfinite().all()) for values in (members, others, asked)):
        return math.nan
    each = min(len(members), len(others))
    sides = [_counted(others), _counted(members)]
    values = np.concatenate([side[:, None] for side, _ in sides])
    truth = np.repeat([0, 1], [len(side) for side, _ in sides])
    weights = np.concatenate([each * counts / counts.sum() for _, counts in sides])
    calls = attack(values, truth, weights)
    where, counts = _counted(asked)
    return float(np.average(calls(where[:, None]), weights=counts))


def svc_calls(members: Tensor, others: Tensor, asked: Tensor) -> float:
    """Share of `asked` that an SVC calls members: RBF kernel, C = 3, gamma auto = 1 (arXiv:2304.04934).

    Args:
        members, others, asked: one value per image, [M], [N], [S]. Both sides weigh min(M, N) images.

    Returns:
        A share in [0, 1]; NaN if a value is not finite.
    """
    from sklearn.svm import SVC

    def attack(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> Callable:
        return SVC(C=3, gamma="auto", kernel="rbf").fit(values, truth, sample_weight=weights).predict

    return _share_called(attack, members, others, asked)


def logistic_calls(members: Tensor, others: Tensor, asked: Tensor) -> float:
    """Share of `asked` that a logistic regression (L2 penalty, C = 1, balanced) calls members (arXiv:2205.08096).

    Arguments and result as of `svc_calls`.
    """
    from sklearn.linear_model import LogisticRegression

    def attack(values: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> Callable:
        return LogisticRegression(C=1, max_iter=10_000).fit(values, truth, sample_weight=weights).predict

    return _share_called(attack, members, others, asked)


def roc(members: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve of "the higher the value, the likelier a member": false and true positive rates.

    Equal values make one corner, so that the straight line to it is what guessing among them gives.
    """
    from sklearn.metrics import roc_curve

    values = np.concatenate([others.cpu().numpy(), members.cpu().numpy()])
    truth = np.repeat([0, 1], [len(others), len(members)])
    false, true, _ = roc_curve(truth, values, drop_intermediate=False)
    return false, true


def separation(members: Tensor, others: Tensor) -> float:
    """Compute the area under the ROC curve, P(member > other) + P(equal) / 2; 0.5: they cannot be told apart.

    Args:
        members, others: one value per image, [M] and [N].

    Returns:
        A share in [0, 1]; NaN if a value is not finite.
    """
    from sklearn.metrics import auc

    if not bool(members.isfinite().all() and others.isfinite().all()):
        return math.nan
    return float(auc(*roc(members, others)))


def caught(members: Tensor, others: Tensor, false_alarms: float = FALSE_ALARMS) -> float:
    """Share of members caught at a false-positive rate (arXiv:2112.03570), on the straight line between two corners.

    Arguments and result as of `separation`.
    """
    if not bool(members.isfinite().all() and others.isfinite().all()):
        return math.nan
    false, true = roc(members, others)
    last = int(np.searchsorted(false, false_alarms, side="right")) - 1  # of several corners at one rate, the highest
    if last == len(false) - 1:
        return float(true[last])
    share = (false_alarms - false[last]) / (false[last + 1] - false[last])
    return float(true[last] + share * (true[last + 1] - true[last]))
