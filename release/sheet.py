"""What a certificate and a model card say, in words: one text, which HTML, PDF and Markdown show alike."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.observe import visible
from release.facts import POINTS, Score

UNMEASURED = "not measured"
MOST_NAMES, MOST_PARAMETERS = 8, 6  # on the page; the JSON has all
MOST_LETTERS = 160  # of one text that comes from a card
HEADS = ("what", "untouched", "with the mask", "95 % interval", "images")
FEATURE_HEADS = {
    "features_before": "untouched",
    "features_may": "expected after retraining",
    "features_now": "with the mask",
}


@dataclass(frozen=True)
class Part:
    """A section: whatever of the following it has, in this order.

    Args:
        pairs: (label, value). table: rows, the first of heads. items: sentences. commands: (what it shows, command).
    """

    title: str
    pairs: tuple[tuple[str, str], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    items: tuple[str, ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sheet:
    """A page.

    Args:
        word: what happened, in a word. said: the same in sentences. foot: below everything.
    """

    title: str
    word: str
    said: tuple[str, ...]
    parts: tuple[Part, ...]
    foot: str


def score_rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """A card's scores as rows of a table: what, of the untouched model, with the mask, interval, images."""

    def number(value: float | None, score: Score) -> str:
        sign = "+" if score.name == POINTS else ""
        return "-" if value is None else f"{value:{sign}.1f} {'points' if score.name == POINTS else '%'}"

    def span(score: Score) -> str:
        sign = "+" if score.name == POINTS else ""
        return "-" if score.low is None else f"{score.low:{sign}.1f} to {score.high:{sign}.1f}"

    return [
        (one.what, number(one.untouched, one), number(one.value, one), span(one), f"{one.images or '-'}")
        for one in scores
    ]


def _clipped(text: object, most: int = MOST_LETTERS) -> str:
    """A text of a card without line breaks, and not longer than a page bears."""
    whole = visible(str(text))
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def _several(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def forgotten(facts: Mapping[str, Any], outputs: bool = False) -> str:
    """The classes that a mask makes the model forget, in one line."""
    names = [_clipped(one["name"]) + (f" (output {one['index']})" if outputs else "") for one in facts["forgets"]]
    return _several(names, MOST_NAMES)


def _changes(mask: Mapping[str, Any]) -> str:
    """How many weights of which parameters a mask changes."""
    found = []
    for name, one in mask["parameters"].items():
        size, kinds = 1, [f"{one[kind]:,} {said}" for kind, said in CHANGES if one[kind]]
        for length in one["shape"]:
            size *= length
        found.append(f"{_clipped(name)}: {' and '.join(kinds)} of {size:,}")
    return _several(found, MOST_PARAMETERS)


CHANGES = (("switched_off", "switched off"), ("replaced", "replaced"))


# --- sections ---------------------------------------------------------------------------------------------


def _model(facts: Mapping[str, Any]) -> Part:
    parent, mask = facts["parent"], facts["mask"]
    return Part("The model and the mask", (
        ("forgets", forgotten(facts, outputs=True)),
        ("parent", f"{_clipped(parent['load'] or 'not recorded')} ({_clipped(parent['framework'])})"),
        ("SHA-256 of the parent's parameters and buffers", parent["state_sha256"]),
        ("SHA-256 of the mask's content", mask["digest"]),
        ("SHA-256 of mask.safetensors", mask["file_sha256"]),
        ("weights", _changes(mask)),
        ("how they were found", _clipped(mask["method"] or "not recorded", 2 * MOST_LETTERS)),
        ("written by", _clipped(mask["tool"])),
    ))  # fmt: skip


def _measured(facts: Mapping[str, Any]) -> list[Part]:
    scores = [Score(**one) for one in facts["measured"]]
    known, prepared = facts["images"], facts["images"]["preprocessing"]
    of = (
        ("images", "test images: none of them had a part in seeking the mask or choosing its size"),
        ("SHA-256 of all images that were given", known["sha256"] or "not recorded"),
        ("prepared", _prepared(prepared) if prepared else "by the caller; not recorded"),
    )
    if not scores:
        return [Part("What was measured", items=("Nothing was measured with this mask on.",))]
    parts = [Part("What was measured", of, (HEADS, *score_rows(scores)))]
    if facts["features"]:
        columns = {name: dict(_stages(text)) for name, text in facts["features"].items()}
        stages = list(dict.fromkeys(stage for column in columns.values() for stage in column))
        heads = ("what features read by a stage tell of the class, %", *(FEATURE_HEADS[name] for name in columns))
        rows = [(stage, *(column.get(stage, "-") for column in columns.values())) for stage in stages]
        parts.append(Part("What features tell", table=(heads, *rows[:MOST_PARAMETERS])))
    return parts


def _stages(text: str) -> list[tuple[str, str]]:
    """`layer3 98, fc 97` -> pairs; what is no whole number is left out."""
    found = [one.rpartition(" ") for one in text.split(", ")]
    return [(_clipped(stage), number) for stage, _, number in found if re.fullmatch(r"-?\d{1,3}", number)]


def _prepared(known: Mapping[str, Any]) -> str:
    """How images became inputs, in one line."""
    size, source = known.get("size"), known.get("source", "not recorded")
    height = "x".join(map(str, size)) if isinstance(size, list) else str(size)
    numbers = [f"{name} {known[name]}" for name in ("channels", "mean", "std") if name in known]
    return _clipped(f"{height}, {', '.join(numbers)}; from {source}".replace("[", "").replace("]", ""))


UNJUDGED = (
    "What features tell, above, is not counted: no retrained model was there to say how much they would tell if the "
    "class had never been learned."
)


def _word(facts: Mapping[str, Any]) -> Part:
    if not facts["word"]:
        return Part("The word, by rule", items=("No rule says anything of a mask without scores.",))
    said = tuple(f"{one['key']}: {one['sentence']}." for one in facts["word"])
    rules = tuple(f"Rule of {key!r}: {rule}" for key, rule in facts["rules"].items())
    unjudged = (UNJUDGED,) if facts["features"] else ()
    return Part("The word, by rule", items=(*said, *unjudged, *rules))


def _headline(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What happened to the class and to the others, in sentences."""
    known = {one["name"]: Score(**one) for one in facts["measured"]}
    if not {"forget", "retain"} <= set(known):
        return (f"A mask that is to make the model forget {forgotten(facts)}. Its card has no scores.",)
    forget, retain = known["forget"], known["retain"]
    lines = [f"Test images of {forgotten(facts)} are recognised {_said(forget)}; of all others {_said(retain)}."]
    if again := known.get("forget_recalibrated"):
        anew = _said(replace(again, untouched=None))
        lines.append(f"With BatchNorm statistics computed anew, which any user can do, it is {anew}.")
    return tuple(lines)


def _said(score: Score) -> str:
    """A score in words: value, interval, and what it was before."""
    span = f" (95 %: {score.low:.1f} to {score.high:.1f})" if score.low is not None else ""
    before = "" if score.untouched is None else f", {score.untouched:.1f} % without the mask"
    return f"{score.value:.1f} % of the time{span}{before}"


def certificate(facts: Mapping[str, Any], digest: str) -> Sheet:
    """The page of a certificate.

    Args:
        facts: as `release.facts.facts_of` makes them. digest: of the JSON file.
    """
    keys = ", ".join(one["key"] for one in facts["word"]) or UNMEASURED
    commands = tuple((one["shows"], one["command"]) for one in facts["verify"])
    parts = [
        _model(facts),
        *_measured(facts),
        _word(facts),
        Part("What was not checked", items=tuple(facts["not_checked"])),
        Part("How to verify", commands=commands, items=(VERIFYING,)),
        Part("Who can lift it", items=tuple(facts["who_can_lift"])),
    ]
    foot = (
        f"Digest of certificate.json: {digest} (SHA-256 of what it says, by sorted keys). It shows changes and is no "
        "signature: whoever changes a certificate can make a new one, so hold it against the mask and the parent."
    )
    return Sheet("Certificate of a mask", keys, _headline(facts), tuple(parts), foot)


VERIFYING = (
    "MASK is the mask's folder, IMAGES that of the images (with --most, if the mask was made with it). The certificate "
    "was written after the parent's own file had been loaded, its hash found right, and the mask put on and lifted bit "
    "for bit."
)


def model_card(facts: Mapping[str, Any], digest: str) -> Sheet:
    """The same as a model card, of the parent with the mask on it."""
    page, name = certificate(facts, digest), _clipped(facts["parent"]["load"] or "a classifier")
    use = Part("Use", items=(
        "For: classifying images as the parent does, without answering the forgotten classes.",
        "Not for: a claim that training images of these classes had no influence, or that the class cannot be brought "
        "back; a smaller or faster model.",
        "How: mimu.Mask.load(MASK).apply(model) on the parent; or a checkpoint of `seal`, loaded as the parent is.",
    ))  # fmt: skip
    model, *rest = page.parts
    return replace(page, title=f"Model card: {name} without {forgotten(facts)}", parts=(model, use, *rest))
