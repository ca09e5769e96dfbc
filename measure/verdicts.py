"""Say in words what a method's scores do not show: no-op, collapsed, suppressed, erased from the features, and so on.

All scores are of test images, in percent. Two models are judged on the same images, so a difference of their scores
counts only beyond the 95 % interval of the paired one (`intervals.paired_difference`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from core.intervals import paired_difference, wilson
from core.observe import visible
from core.records import WORDS

FORGOTTEN = 5.0  # %: below it the published methods count a class as forgotten; chance among ten classes is 10
CLASS_DROP = 10.0  # points of one retained class: retraining costs the worst of Fashion-MNIST 8 in the mean
COLLAPSE_DROP = 10.0  # points of retain score: no method that anyone would use loses as much, retraining gains some
NEAR_CHANCE = 5.0  # points above 100 / C: a broken classifier answers with one or two classes
PROBE_GAP = 3.0  # points of recall: 20 retrained MLPs of Fashion-MNIST differed from others by 2.0 at most
ENTROPY_GAP = 0.25  # of log C: there retrained ones differed by .10 at most, random labels by .55 or more

LEAST_BAND = {
    "probe_layers_gap": 2.0,
    "auc_layers_gap": 1.0,
    "knn_layers_gap": 2.0,
    "forget_auroc": 1.0,
    "fresh_head_10": 2.0,
    "relearn_area_10": 2.0,
}
"""What a word rests on, and how many points from retraining each may be although retrained models lie closer."""
UNTOUCHED, SUPPRESSED, OVER_ERASED, ERASED = WORDS

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Verdict:
    """A short key for tables, and one sentence with the values that it rests on."""

    key: str
    sentence: str


@dataclass(frozen=True)
class Pair:
    """Two models' predictions on the same n images: how many the method loses and gains against the other model."""

    lost: int
    gained: int
    n: int

    def lower(self, level: float = 0.95) -> bool:
        """Return whether the method recognises fewer, beyond the interval of the difference."""
        return self.n > 0 and paired_difference(self.lost, self.gained, self.n, level).low > 0

    def higher(self) -> bool:
        """Return whether the method recognises more, beyond the interval."""
        return self.n > 0 and paired_difference(self.lost, self.gained, self.n).high < 0

    @property
    def points(self) -> float:
        """How much lower the method's score is, in percentage points."""
        return 100 * (self.lost - self.gained) / self.n if self.n else 0.0


@dataclass(frozen=True)
class Other:
    """Another model to compare a method with: its values, and both models' predictions on the same images."""

    values: Values
    forget: Pair
    retain: Pair


@dataclass(frozen=True)
class Band:
    """A value, of one stage or several, beside the retrained models': points above their mean, negative below.

    Args:
        low, high: over stages. width: how far retrained models are from one another, and at least LEAST_BAND.
    """

    low: float
    high: float
    width: float

    @property
    def above(self) -> bool:
        """Whether more is told than by a retrained model."""
        return self.high > self.width

    @property
    def below(self) -> bool:
        """Whether less is."""
        return self.low < -self.width


@dataclass(frozen=True)
class References:
    """All models that a method is compared with; None: not measured.

    Args:
        classes: C, how many the classifier tells apart.
        untouched: the classifier as it was. logit_drop: the trivial answer. random: a random mask of as many weights.
        by_class: of each retained class, the method's answers against the untouched classifier's.
        is_mask: whether a mask is judged. is_retrained: whether a model that never saw the classes is: held against
            others of its kind it may be, but it need not be.
        bands: see `word`. names: of the classes, in the order of their labels; empty: they are called by label.
        retrained: values of a model retrained without the classes. retrained_drop: of each retained class, by how many
            points that model's score is below the untouched one's.
    """

    classes: int
    untouched: Other
    logit_drop: Other | None = None
    random: Other | None = None
    by_class: Mapping[int, Pair] = field(default_factory=dict)
    is_mask: bool = False
    is_retrained: bool = False
    retrained: Values | None = None
    retrained_drop: Mapping[int, float] = field(default_factory=dict)
    bands: Mapping[str, Band] = field(default_factory=dict)
    names: Sequence[str] = ()

    def called(self, label: int) -> str:
        """A class by its label, and by its name where that says more: "5 (sandal)"."""
        name = self.names[label] if self.names else str(label)
        return str(label) if name == str(label) else f"{label} ({visible(name)})"


def _score(values: Values, name: str) -> float:
    """Return a score that is always measured."""
    value = values[name]
    assert value is not None, name
    return value


def _beside(a: Values, b: Values) -> str:
    """Both scores of a against b's, in words."""
    pairs = (("forget", "forget_score"), ("retain", "retain_score"))
    return ", ".join(f"{word} {a[score]:.1f} % against {b[score]:.1f} %" for word, score in pairs)


def too_few_images(values: Values, r: References) -> str | None:
    """The forgotten classes are recognised less often, but with so few test images of them not even the loss of all
    would be beyond the interval.
    """
    pair = r.untouched.forget
    recognised = round(_score(r.untouched.values, "forget_score") * pair.n / 100)
    if pair.lost <= pair.gained or Pair(recognised, 0, pair.n).lower():
        return None
    return f"{pair.n} test images of the forgotten classes, {recognised} recognised before, can show no forgetting"


def no_op(values: Values, r: References) -> str | None:
    """The forgotten classes are recognised as before: their score is not lower beyond the interval."""
    if r.untouched.forget.lower() or too_few_images(values, r):
        return None
    changed = values["weights_changed"]
    how = "no weight is changed" if changed == 0 else f"{changed:,} weights are changed"
    scores = f"{values['forget_score']:.1f} % against {r.untouched.values['forget_score']:.1f} %"
    return f"{how} and the forgotten classes are recognised as before: {scores}, no less beyond noise"


def half_forgotten(values: Values, r: References) -> str | None:
    """The forgotten classes are recognised less than before, but still FORGOTTEN % of the time or more."""
    score, n = _score(values, "forget_score"), r.untouched.forget.n
    if score < FORGOTTEN or not r.untouched.forget.lower():
        return None
    return (
        f"the forgotten classes are still recognised {score:.1f} % of the time ({round(score * n / 100)} of {n} images)"
    )


def outputs_only(values: Values, r: References) -> str | None:
    """No weight is changed, and yet the forgotten classes are recognised less: the outputs are edited."""
    if values["weights_changed"] != 0 or not r.untouched.forget.lower():
        return None
    return "no weight is changed: what the model answers is edited, what it knows is all there"


def collapsed(values: Values, r: References) -> str | None:
    """The retained score is at most NEAR_CHANCE points above chance (100 / C), or more than COLLAPSE_DROP points below
    the untouched model's.
    """
    score, before = _score(values, "retain_score"), _score(r.untouched.values, "retain_score")
    chance = 100 / r.classes
    if score > chance + NEAR_CHANCE and score >= before - COLLAPSE_DROP:
        return None
    how = f"{before - score:.1f} points below the untouched model, chance is {chance:.1f} %"
    return f"the retained classes score {score:.1f} %, {how}"


def costs_a_class(values: Values, r: References) -> str | None:
    """A retained class is recognised more than CLASS_DROP points less often than by the untouched model, beyond what
    retraining costs that class, and beyond the interval (corrected for how many classes there are); not said of a
    collapsed model.
    """
    if collapsed(values, r) is not None or not r.by_class:
        return None
    excess = {c: pair.points - max(0.0, r.retrained_drop.get(c, 0.0)) for c, pair in r.by_class.items()}
    level = 1 - 0.05 / len(r.by_class)  # Bonferroni: the worst of many classes is below 0 by chance alone
    found = [c for c, pair in r.by_class.items() if excess[c] > CLASS_DROP and pair.lower(level)]
    if not found:
        return None
    worst = max(found, key=lambda c: excess[c])
    more = f", and {len(found) - 1} more classes lose as clearly" if len(found) > 1 else ""
    by = r.by_class[worst].points
    return f"retained class {r.called(worst)} is recognised {by:.1f} points less often than before{more}"


def suppressed(values: Values, r: References) -> str | None:
    """The forget score is below FORGOTTEN % by a change of weights, but no probe has looked at the features: that the
    outputs forget is all that is known.
    """
    forgets = _score(values, "forget_score") < FORGOTTEN and r.untouched.forget.lower()
    looked = values.get("probe_gap") is not None or word(values, r.bands) is not None
    if r.is_retrained or not forgets or values["weights_changed"] == 0 or looked:
        return None
    if values.get("probe_layers_gap") is not None:
        return "outputs only, features not judged: that takes two retrained models, to know how far apart they are"
    return "outputs only, features not checked: probe_gap, which needs a retrained model, was not measured"


def head_suppression(values: Values, r: References) -> str | None:
    """The forget score is below FORGOTTEN %, but a linear probe on the target layer's output recognises the classes
    more than PROBE_GAP points more often than on a retrained model's.
    """
    gap, score = values.get("probe_gap"), _score(values, "forget_score")
    if gap is None or gap <= PROBE_GAP or score >= FORGOTTEN:
        return None
    found = f"a linear probe on the features recognises them {gap:.0f} points more than after retraining"
    return f"the classes are answered {score:.1f} % of the time, but {found}"


def worse_than_logit_drop(values: Values, r: References) -> str | None:
    """It forgets less and retains less than the trivial answer, both beyond the intervals."""
    trivial = r.logit_drop
    if trivial is None or not trivial.forget.higher() or not trivial.retain.lower():
        return None
    return f"never answering the classes does better: {_beside(values, trivial.values)}"


def no_better_than_random(values: Values, r: References) -> str | None:
    """It neither forgets nor retains more than a random mask of as many weights, beyond the intervals; not said where
    the test images are too few to tell.
    """
    control = r.random if r.is_mask else None
    if control is None or control.forget.lower() or control.retain.higher() or too_few_images(values, r):
        return None
    against = _beside(values, control.values)
    return f"not told apart from a random mask of as many weights, within the 95 % intervals: {against}"


def too_random(values: Values, r: References) -> str | None:
    """The entropy on the forgotten classes is more than ENTROPY_GAP of log C above a retrained model's: answers so
    uncertain give the forgotten classes away.
    """
    gap, own = values.get("entropy_gap"), values.get("entropy_forget")
    if gap is None or own is None or abs(gap) <= ENTROPY_GAP:
        return None
    other = None if r.retrained is None else r.retrained.get("entropy_forget")
    above = own > other if other is not None else own + abs(gap) > 1  # else retraining's may as well be the larger one
    return f"the entropy on the forgotten classes is {abs(gap):.2f} of log C above retraining's" if above else None


MEANT = {
    UNTOUCHED: "No weight is changed, and the forgotten classes are recognised FORGOTTEN % of the time or more.",
    SUPPRESSED: "The forget score is below FORGOTTEN %, but features, held-back logits or relearning tell more of the "
    "classes than retrained models' do, beyond the band; or by a change of weights, and no probe has looked at the "
    "features: that the outputs forget is all that is known.",
    OVER_ERASED: "The forget score is below FORGOTTEN %, but at some stage a probe or neighbours find the classes less "
    "often than in retrained models, beyond the band; or another value is below its band and none is above.",
    ERASED: f"The forget score is below FORGOTTEN %, and {', '.join(LEAST_BAND)} are all within the band, above and "
    "below: how far retrained models are from one another, and at least 2 points (of areas under a curve 1) and what "
    "two images of the classes make. Said "
    "where all of these were measured, against two retrained models or more.",
}
"""What the words of `word` stand for. One of them is a method's first verdict, where its features were looked at."""


def word(values: Values, bands: Mapping[str, Band]) -> str | None:
    """Return which of `core.records.WORDS` fits a model; None where that was not measured, or where half is forgotten.

    A last layer that is trained against the classes slows relearning down and leaves all features: a value that is not
    of features is called too low only where no other is too high.

    Args:
        values: `forget_score` and `weights_changed`.
        bands: by the names of LEAST_BAND, all of them; else nothing is said.
    """
    if set(bands) != set(LEAST_BAND):
        return None
    if _score(values, "forget_score") >= FORGOTTEN:
        return UNTOUCHED if values["weights_changed"] == 0 else None
    if any(bands[name].below for name in bands if name.endswith("_layers_gap")):
        return OVER_ERASED
    if any(band.above for band in bands.values()):
        return SUPPRESSED
    return OVER_ERASED if any(band.below for band in bands.values()) else ERASED


def _in_a_word(values: Values, r: References) -> list[Verdict]:
    """The word with the values that lie outside their bands; nothing of a retrained model, which is what is meant."""
    said = None if r.is_retrained else word(values, r.bands)
    if said is None:
        return []
    found = [
        f"{name} {far:+.1f} points (band {band.width:.1f})"
        for name, band in r.bands.items()
        for far, outside in ((band.high, band.above), (band.low, band.below))
        if outside
    ]
    inside = "probes, neighbours, held-back logits and relearning are within the band"
    return [Verdict(said, f"beside retrained models: {'; '.join(found) or inside}")]


CHECKS: dict[str, Callable[[Values, References], str | None]] = {
    "too few images": too_few_images,
    "no-op": no_op,
    "half forgotten": half_forgotten,
    "outputs only": outputs_only,
    "collapsed": collapsed,
    "costs a class": costs_a_class,
    "suppressed": suppressed,
    "head suppression only": head_suppression,
    "worse than logit drop": worse_than_logit_drop,
    "no better than random": no_better_than_random,
    "too random": too_random,
}
"""By key: what there may be to say, the sentence or None."""
DIVERGED, NOT_APPLICABLE, UNCHECKED, FINE = "diverged", "not applicable", "unchecked", "fine"


def meanings() -> dict[str, str]:
    """Describe every verdict in general terms, with the thresholds' values."""
    thresholds = {
        "FORGOTTEN": FORGOTTEN,
        "CLASS_DROP": CLASS_DROP,
        "COLLAPSE_DROP": COLLAPSE_DROP,
        "NEAR_CHANCE": NEAR_CHANCE,
        "PROBE_GAP": PROBE_GAP,
        "ENTROPY_GAP": ENTROPY_GAP,
    }
    texts = {key: " ".join((check.__doc__ or "").split()) for key, check in CHECKS.items()} | MEANT
    for name, value in thresholds.items():
        texts = {key: text.replace(name, f"{value:g}") for key, text in texts.items()}
    return texts | {
        DIVERGED: "Its training diverged with every setting: there is no model, and there are no values.",
        NOT_APPLICABLE: "It cannot be used on this classifier, for the reason that is given, and there are no values.",
        UNCHECKED: "None of these, but not every value that they need was measured.",
        FINE: "None of these: every check was made and passed.",
    }


def _unmeasured(values: Values, r: References) -> list[str]:
    """Name the missing values without which some verdicts could not be checked."""
    needed = () if r.is_retrained else ("probe_gap", "entropy_gap", "entropy_forget")
    lacking = [name for name in needed if values.get(name) is None]
    lacking += ["per-class answers"] * (not r.by_class)
    lacking += ["logit_drop"] * (r.logit_drop is None and values["weights_changed"] != 0)
    return lacking + ["random"] * (r.is_mask and r.random is None)


def verdict(values: Values, references: References) -> list[Verdict]:
    """What a look at the features comes to, in a word, then all there is to say against a method, by CHECKS.

    If the latter is nothing: "fine" where every check was made, else "unchecked".

    Args:
        values: its test values; `forget_score`, `retain_score` and `weights_changed` at least, of `probe_gap`,
            `entropy_gap` and `entropy_forget` what is measured.
    """
    first = _in_a_word(values, references)
    found = [Verdict(key, said) for key, check in CHECKS.items() if (said := check(values, references))]
    if found:
        return first + found
    lacking = _unmeasured(values, references)
    if lacking:
        return [*first, Verdict(UNCHECKED, f"nothing found; not checked, for want of {', '.join(lacking)}")]
    return [*first, Verdict(FINE, "nothing found")]


def reference_fault(seen: float, images: int, retain_score: float, retained: int) -> str | None:
    """Why a retrained model is no reference for what forgetting looks like; None if it is one.

    Args:
        seen: how many percent of the forgotten classes' training images it recognises, which it was not trained on;
            `images` of them. retain_score: on validation images of the `retained` classes, in percent.
    """
    if 100 * wilson(round(seen * images / 100), images).low > FORGOTTEN:
        return f"it still names the forgotten classes on {seen:.1f} % of {images} images that it was never trained on"
    if retained > 1 and retain_score <= 100 / retained + NEAR_CHANCE:
        by_chance = f"chance is {100 / retained:.1f} %"
        return f"it names the retained classes on {retain_score:.1f} % of validation images, {by_chance}"
    return None


def as_facts(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """For records."""
    return [asdict(one) for one in verdicts]
