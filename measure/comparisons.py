"""Metrics that hold a model against the ones retrained without the classes to forget (and against an untrained one).

With several retrained models each is compared on its own and the values are averaged. A retrained model held against
the others in this very way gives the noise floor: what no method can be asked to fall below. p_u and p_r are the
predicted distributions of the judged and of a retrained model, computed as log-softmax in float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from measure.metrics import (
    Compute,
    Evidence,
    Outputs,
    entropy_forget,
    metric,
    mia_efficacy,
    remaining_accuracy,
    retain_score,
    unlearning_accuracy,
)
from model import NO_ANSWER

Compare = Callable[[Evidence, Evidence], float | None]
AVERAGED: tuple[Compute, ...] = (unlearning_accuracy, remaining_accuracy, retain_score, mia_efficacy)


def mean_over_retrained(e: Evidence, compare: Compare) -> float | None:
    """Mean over the retrained models r of compare(e, r); None if there are none, or if a comparison says None."""
    values = [compare(e, r) for r in e.retrained]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def gap(of: Compute) -> Compare:
    """|m_u - m_r| of a metric; None if either model has none."""

    def compare(u: Evidence, r: Evidence) -> float | None:
        ours, theirs = u.value(of), r.value(of)
        return None if ours is None or theirs is None else abs(ours - theirs)

    return compare


# --- divergences of distributions, one per image ----------------------------------------------------------


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c), nats; classes with p_c = 0 add nothing. [S, C], [S, C] -> [S]."""
    p = log_p.exp()
    return torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, bits: 0 to 1. [S, C], [S, C] -> [S]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / (2 * math.log(2))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV(p, q) = sum_c |p_c - q_c| / 2: 0 to 1. [..., C], [..., C] -> [...]."""
    return (p - q).abs().sum(-1) / 2


def mean_between(measure: Callable[[Tensor, Tensor], Tensor], a: Outputs, b: Outputs) -> float:
    """Mean over a set's images of a measure of two models' log-probabilities there, [S, C], [S, C] -> [S]."""
    pairs = zip(a.log_p(), b.log_p(), strict=True)
    return float(torch.cat([measure(one, other) for one, other in pairs]).mean())


# --- accuracies -------------------------------------------------------------------------------------------


@metric("avg_gap", "points", "lower", group="retrain", target="0", source="2310.12508", first=True)
def avg_gap(e: Evidence) -> float | None:
    """Mean over the retrained models of (|UA_u - UA_r| + |RA_u - RA_r| + |TA_u - TA_r| + |MIA_u - MIA_r|) / 4, with TA
    the retain score and MIA the MIA-efficacy, all in percent.
    """

    def compare(u: Evidence, r: Evidence) -> float | None:
        gaps = [gap(of)(u, r) for of in AVERAGED]
        known = [value for value in gaps if value is not None]
        return sum(known) / len(known) if len(known) == len(gaps) else None  # no smaller mean for a diverged model

    return mean_over_retrained(e, compare)


@metric("ToW", "index", "higher", group="retrain", target="1", source="2406.01257")
def tug_of_war(e: Evidence) -> float | None:
    """Tug of war: (1 - |Acc_u - Acc_r| on D_f) x (the same on D_r) x (the same on T's retained images), accuracies as
    shares; mean over the retrained models.
    """

    def compare(u: Evidence, r: Evidence) -> float:
        pairs = ((u.train_forget, r.train_forget), (u.train_retain, r.train_retain), (u.retain, r.retain))
        return math.prod(1 - abs(ours.score() - theirs.score()) / 100 for ours, theirs in pairs)

    return mean_over_retrained(e, compare)


# --- predicted distributions ------------------------------------------------------------------------------


@metric("KL_forget", "nats", "lower", group="retrain", target="0", source="2205.08096")
def kl_forget(e: Evidence) -> float | None:
    """Mean KL(p_r || p_u) = sum_c p_r (log p_r - log p_u) over T's images of the forgotten classes."""
    return mean_over_retrained(e, lambda u, r: mean_between(kl, r.forget, u.forget))


@metric("KL_test", "nats", "lower", group="retrain", target="0", source="2205.08096")
def kl_test(e: Evidence) -> float | None:
    """Mean KL(p_r || p_u) = sum_c p_r (log p_r - log p_u) over T's images of the retained classes."""
    return mean_over_retrained(e, lambda u, r: mean_between(kl, r.retain, u.retain))


@metric("JS_forget", "bits", "lower", group="retrain", target="0", source="2205.08096")
def js_forget(e: Evidence) -> float | None:
    """Mean JS(p_u, p_r) = (KL(p_u || m) + KL(p_r || m)) / 2, m = (p_u + p_r) / 2, to base 2 (so at most 1), over T's
    images of the forgotten classes.
    """
    return mean_over_retrained(e, lambda u, r: mean_between(js, u.forget, r.forget))


@metric("TV_forget", "share", "lower", group="retrain", target="0", source="total variation distance")
def tv_forget(e: Evidence) -> float | None:
    """Mean total variation sum_c |p_u - p_r| / 2 over T's images of the forgotten classes."""

    def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
        return total_variation(log_p.exp(), log_q.exp())

    return mean_over_retrained(e, lambda u, r: mean_between(distance, u.forget, r.forget))


@metric("activation_distance", "L2", "lower", group="retrain", target="0", source="2205.08096")
def activation_distance(e: Evidence) -> float | None:
    """Mean Euclidean distance ||p_u - p_r|| over D_f (at most sqrt 2)."""

    def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).norm(dim=1)

    return mean_over_retrained(e, lambda u, r: mean_between(distance, u.train_forget, r.train_forget))


def routes(outputs: Outputs) -> Tensor:
    """Share of images that each class is predicted for, and last of those without an answer. [C + 1]."""
    count = outputs.num_classes
    said = torch.bincount(outputs.predicted.where(outputs.predicted != NO_ANSWER, count), minlength=count + 1)
    return said.double() / said.sum()


@metric("routing_TV", "share", "lower", group="retrain", target="0", source="total variation distance")
def routing_tv(e: Evidence) -> float | None:
    """Where forgotten images go instead: total variation sum_c |n_u - n_r| / 2 between the shares n of T's images of
    the forgotten classes that are predicted as class c (those without an answer are one more class).
    """

    def compare(u: Evidence, r: Evidence) -> float:
        gaps = (routes(u.forget) - routes(r.forget)).abs()
        return float((gaps[:-1].sum() + gaps[-1]) / 2)

    return mean_over_retrained(e, compare)


# --- uncertainty ------------------------------------------------------------------------------------------


@metric("entropy_gap", "share of log C", "lower", group="retrain", target="0", source="Shannon entropy")
def entropy_gap(e: Evidence) -> float | None:
    """|H_u - H_r| of the mean normalised entropies on D_f (entropy_forget): too random is as bad as too confident."""
    return mean_over_retrained(e, gap(entropy_forget))


@metric("ZRF", "index", "retrain", group="retrain", target="as retrained, not 1", source="2205.08096")
def zero_retrain_forgetting(e: Evidence) -> float | None:
    """Zero retrain forgetting: 1 - mean JS(p_u, p_0) over D_f, to base 2, p_0 a freshly initialised model's
    distribution; 1 is a model as ignorant as an untrained one, which retraining is not.
    """
    if e.untrained is None:
        return None
    return 1 - mean_between(js, e.train_forget, e.half(e.untrained("train", True)))


@metric("ZRF_gap", "index", "lower", group="retrain", target="0", source="2205.08096")
def zrf_gap(e: Evidence) -> float | None:
    """|ZRF_u - ZRF_r|, against the same freshly initialised model."""
    return mean_over_retrained(e, gap(zero_retrain_forgetting))
