"""Whether a method did what its scores suggest, in words: no-op, collapsed, suppressed at the head alone, and so on.

Differences of scores count only beyond their 95 % intervals (`intervals.difference`); all scores are of test images,
in percent.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from intervals import Estimate, difference, wilson

FORGOTTEN = 5.0  # %: below it the published methods count a class as forgotten; chance among ten classes is 10
COLLAPSE_DROP = 10.0  # points of retain score: no method that anyone would use loses as much, retraining gains some
NEAR_CHANCE = 5.0  # points above 100 / C: a broken classifier answers with one or two classes
PROBE_GAP = 3.0  # points of recall: 20 retrained MLPs of Fashion-MNIST differed from others by 2.0 at most
ENTROPY_GAP = 0.25  # of log C: there retrained ones differed by .10 at most, random labels by .55 or more

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Verdict:
    """A short key for tables, and one sentence with the figures that it rests on."""

    key: str
    sentence: str


@dataclass(frozen=True)
class References:
    """What a method is held against: figures of other models on the same images; None: not measured.

    Args:
        forget_images, retain_images: how many test images the scores are of.
        classes: C, how many the classifier tells apart.
        is_mask: whether a mask is judged. random: then, a random mask with as many weights.
        retrained: a model retrained without the classes.
    """

    forget_images: int
    retain_images: int
    classes: int
    untouched: Figures
    logit_drop: Figures | None = None
    is_mask: bool = False
    random: Figures | None = None
    retrained: Figures | None = None

    def share(self, figures: Figures, score: str) -> Estimate:
        """`forget_score` or `retain_score` with its interval, in [0, 1]."""
        n = self.forget_images if score == "forget_score" else self.retain_images
        value = figures[score]
        assert value is not None, score
        return wilson(round(value * n / 100), n)

    def higher(self, a: Figures, b: Figures, score: str) -> bool:
        """Whether a's score is higher than b's beyond the interval of their difference."""
        return difference(self.share(a, score), self.share(b, score)).low > 0


def _beside(a: Figures, b: Figures) -> str:
    """Both scores of a against b's, in words."""
    pairs = (("forget", "forget_score"), ("retain", "retain_score"))
    return ", ".join(f"{word} {a[score]:.1f} % against {b[score]:.1f} %" for word, score in pairs)


def no_op(figures: Figures, r: References) -> str | None:
    """The forgotten classes are recognised as before: their score is not lower beyond the interval."""
    if r.higher(r.untouched, figures, "forget_score"):
        return None
    changed = figures["weights_changed"]
    how = "no weight is changed" if changed == 0 else f"{changed:,} weights are changed"
    scores = f"{figures['forget_score']:.1f} % against {r.untouched['forget_score']:.1f} %"
    return f"{how} and the forgotten classes are recognised as before: {scores}, no less beyond noise"


def outputs_only(figures: Figures, r: References) -> str | None:
    """No weight is changed, and yet the forgotten classes are recognised less: the outputs are edited."""
    if figures["weights_changed"] != 0 or not r.higher(r.untouched, figures, "forget_score"):
        return None
    return "no weight is changed: what the model answers is edited, what it knows is all there"


def collapsed(figures: Figures, r: References) -> str | None:
    """The retained score is at most NEAR_CHANCE points above chance (100 / C), or more than COLLAPSE_DROP points below
    the untouched model's.
    """
    score, before, chance = figures["retain_score"], r.untouched["retain_score"], 100 / r.classes
    assert score is not None
    assert before is not None
    if score > chance + NEAR_CHANCE and score >= before - COLLAPSE_DROP:
        return None
    how = f"{before - score:.1f} points below the untouched model, chance is {chance:.1f} %"
    return f"the retained classes score {score:.1f} %, {how}"


def head_suppression(figures: Figures, r: References) -> str | None:
    """The forget score is below FORGOTTEN %, but a linear probe on the target layer's output recognises the classes
    more than PROBE_GAP points more often than on a retrained model's.
    """
    gap = figures.get("probe_gap")
    score = figures["forget_score"]
    assert score is not None
    if gap is None or gap <= PROBE_GAP or score >= FORGOTTEN:
        return None
    found = f"a linear probe on the features recognises them {gap:.0f} points more than after retraining"
    return f"the classes are answered {score:.1f} % of the time, but {found}"


def worse_than_logit_drop(figures: Figures, r: References) -> str | None:
    """It forgets less and retains less than the trivial answer, both beyond the intervals."""
    trivial = r.logit_drop
    if trivial is None or not r.higher(figures, trivial, "forget_score"):
        return None
    if not r.higher(trivial, figures, "retain_score"):
        return None
    return f"never answering the classes does better: {_beside(figures, trivial)}"


def no_better_than_random(figures: Figures, r: References) -> str | None:
    """It neither forgets nor retains more than a random mask of as many weights, beyond the intervals."""
    control = r.random if r.is_mask else None
    if control is None or r.higher(control, figures, "forget_score") or r.higher(figures, control, "retain_score"):
        return None
    return f"a random mask of as many weights does no worse: {_beside(figures, control)}"


def too_random(figures: Figures, r: References) -> str | None:
    """The entropy on the forgotten classes is more than ENTROPY_GAP of log C above a retrained model's: answers so
    uncertain give the forgotten classes away.
    """
    gap, own = figures.get("entropy_gap"), figures.get("entropy_forget")
    if gap is None or own is None or abs(gap) <= ENTROPY_GAP:
        return None
    other = None if r.retrained is None else r.retrained.get("entropy_forget")
    above = own > other if other is not None else own + abs(gap) > 1  # else retraining's may as well be the larger one
    return f"the entropy on the forgotten classes is {abs(gap):.2f} of log C above retraining's" if above else None


CHECKS: dict[str, Callable[[Figures, References], str | None]] = {
    "no-op": no_op,
    "outputs only": outputs_only,
    "collapsed": collapsed,
    "head suppression only": head_suppression,
    "worse than logit drop": worse_than_logit_drop,
    "no better than random": no_better_than_random,
    "too random": too_random,
}
"""By key: what there may be to say, the sentence or None."""
FINE = "fine"


def meanings() -> dict[str, str]:
    """Every verdict in general terms, thresholds by value."""
    thresholds = {
        "FORGOTTEN": FORGOTTEN,
        "COLLAPSE_DROP": COLLAPSE_DROP,
        "NEAR_CHANCE": NEAR_CHANCE,
        "PROBE_GAP": PROBE_GAP,
        "ENTROPY_GAP": ENTROPY_GAP,
    }
    texts = {key: " ".join((check.__doc__ or "").split()) for key, check in CHECKS.items()}
    for name, value in thresholds.items():
        texts = {key: text.replace(name, f"{value:g}") for key, text in texts.items()}
    return texts | {FINE: "None of these, as far as the figures that they need were measured."}


def _unmeasured(figures: Figures, r: References) -> list[str]:
    """What could not be checked, for want of which figure."""
    lacking = [name for name in ("probe_gap", "entropy_gap", "entropy_forget") if figures.get(name) is None]
    lacking += ["logit_drop"] * (r.logit_drop is None)
    return lacking + ["random"] * (r.is_mask and r.random is None)


def verdict(figures: Figures, references: References) -> list[Verdict]:
    """Everything there is to say against a method, in the order of CHECKS; "fine" alone if that is nothing.

    Args:
        figures: its test figures; `forget_score`, `retain_score` and `weights_changed` at least, of `probe_gap`,
            `entropy_gap` and `entropy_forget` what is measured.
    """
    found = [Verdict(key, said) for key, check in CHECKS.items() if (said := check(figures, references))]
    if found:
        return found
    lacking = _unmeasured(figures, references)
    return [Verdict(FINE, "nothing found" + (f"; not checked, for want of {', '.join(lacking)}" if lacking else ""))]


def as_facts(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """For records."""
    return [asdict(one) for one in verdicts]
