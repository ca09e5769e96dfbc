"""Membership inference: small classifiers that guess, from a model's outputs, what it was trained on."""

import numpy as np
from torch import Tensor

from config import derive_seed

SVC_SAMPLES = 1000  # of members and of non-members, at most: an SVC takes time quadratic in them


def called_members(members: Tensor, others: Tensor, asked: Tensor) -> float:
    """Share of `asked` that an SVC (RBF, C = 3, gamma auto) calls members (arXiv:2304.04934).

    Args:
        members, others, asked: one figure per image [S]; the first two are cut to the same number.

    Returns:
        A share in [0, 1].
    """
    from sklearn.svm import SVC

    count = min(len(members), len(others), SVC_SAMPLES)
    draw = np.random.default_rng(derive_seed(0, "attack"))
    sides = [values.cpu().numpy()[draw.permutation(len(values))[:count]] for values in (others, members)]
    truth = np.repeat([0, 1], count)
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate(sides)[:, None], truth)
    return float(attack.predict(asked.cpu().numpy()[:, None]).mean())
