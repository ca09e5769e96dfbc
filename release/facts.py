"""What a mask's file and card know of it, as plain values: the certificate's JSON, from which its pages are written.

The same mask always gives the same values, to the bit, so that a certificate is checked by making it again. A card may
come from others and its scores are a free table: a value that is not of its kind counts as not measured.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from core.artifacts import read_json
from core.choices import UserError
from measure.verdicts import Other, Pair, References, Verdict, as_facts, meanings, verdict
from mimu import Config, Mask

FORMAT, VERSION = "mimu-certificate", 1
LABELS = {
    "forget": "forget score",
    "retain": "retain score",
    "forget_recalibrated": "forget, BatchNorm anew",
    "retain_recalibrated": "retain, BatchNorm anew",
    "p_forget": "p(forgotten class)",
    "retain_change": "change of retain score",
}
"""What tables call a card's scores; those of test images, which had no part in making the mask."""
FEATURES = ("features_before", "features_may", "features_now")
POINTS = "retain_change"  # in percentage points, of two models; all other scores are percent
MOST = 2**63  # no count of images is as large
JUDGED = ("clean_forget", "clean_retain", "forget", "retain")


@dataclass(frozen=True)
class Score:
    """One score of a card.

    Args:
        name: in the card. what: in tables. unit: "%" or "points".
        low, high: its 95 % interval. images: how many it is of. untouched: the same of the parent. None: not there.
    """

    name: str
    what: str
    unit: str
    value: float
    low: float | None
    high: float | None
    images: int | None
    untouched: float | None


def _is_number(value: object) -> TypeGuard[float]:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_percent(value: Any) -> TypeGuard[float]:
    """Whether it can be percent, or points of a difference."""
    return _is_number(value) and abs(value) <= 100


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _numbers(value: object) -> tuple[float, ...]:
    """The numbers of a list; none where something else is among them."""
    return tuple(value) if isinstance(value, list | tuple) and all(map(_is_number, value)) else ()


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def scores_of(config: Config) -> list[Score]:
    """The scores of a card that are known by name, in the order of LABELS."""
    scores, found = _table(config.scores), []
    spans, counts = _table(scores.get("intervals")), _table(scores.get("n"))
    for name, what in LABELS.items():
        value, span, images = scores.get(name), _numbers(spans.get(name)), counts.get(name)
        if not _is_percent(value):
            continue
        before = scores.get(f"clean_{name.partition('_')[0]}") if name not in ("p_forget", POINTS) else None
        found.append(Score(
            *(name, what, "points" if name == POINTS else "%", float(value)),
            *(map(float, span) if len(span) == 2 and all(map(_is_percent, span)) else (None, None)),
            images=images if _is_count(images) else None,
            untouched=float(before) if _is_percent(before) else None,
        ))  # fmt: skip
    return found


def features_of(config: Config) -> dict[str, str]:
    """Of an erasing mask: what features tell of the class, a percent for each stage, as texts."""
    scores = _table(config.scores)
    return {name: scores[name] for name in FEATURES if isinstance(scores.get(name), str)}


# --- the word ---------------------------------------------------------------------------------------------


def widest_pair(before: int, after: int, images: int) -> Pair:
    """Two models' answers to the same images, where only the counts of right ones are known.

    Of all pairs with these counts the one that makes the widest interval of their difference: the answers agree as
    little as they can. So what is noise is never taken for forgetting; where no image is recognised any more, there is
    but one pair.
    """
    gained = min(after, images - before)
    return Pair(before - after + gained, gained, images)


def words_of(config: Config, changed: int) -> list[Verdict]:
    """What the rules of `measure.verdicts` say of a mask by its card alone; nothing where its scores are not there.

    A card knows of no retrained model, so that nothing of features is judged, and of no single class.

    Args:
        changed: how many weights the mask changes.
    """
    scores = _table(config.scores)
    counts, kept = _table(scores.get("n")), scores.get("classes_retained")
    if not all(_is_percent(scores.get(name)) and scores[name] >= 0 for name in JUDGED) or not _is_count(kept):
        return []
    if not all(_is_count(counts.get(name)) and counts[name] for name in ("forget", "retain")):
        return []
    pairs = []
    for name in ("forget", "retain"):
        images = counts[name]
        before, after = (round(scores[score] * images / 100) for score in (f"clean_{name}", name))
        pairs.append(widest_pair(before, after, images))
    untouched = Other({"forget_score": scores["clean_forget"], "retain_score": scores["clean_retain"]}, *pairs)
    references = References(kept + len(config.forgotten), untouched, is_mask=True)
    now = {"forget_score": scores["forget"], "retain_score": scores["retain"], "weights_changed": changed}
    return verdict(now, references)


# --- what is not known ------------------------------------------------------------------------------------


def not_checked(config: Config) -> list[str]:
    """Name what nobody has measured of a mask, one sentence each."""
    scores = _table(config.scores)
    if not scores:
        joint = "It is composed of masks that were measured one by one. " if config.composition else ""
        return [f"{joint}Nothing was measured with this mask on: `verify` with --images does."]
    kept, absent = scores.get("classes_retained"), scores.get("classes_without_images")
    few = f", of which {kept} had test images" if _is_count(kept) else ""
    found = [_about_features(config), "Relearning: whether training on a few images brings the class back."]
    found += [f"Each retained class by itself: the retain score is one number for all of them{few}."]
    found += [f"The {absent} classes without images."] if absent and _is_count(absent) else []
    if "forget_recalibrated" not in scores:
        found.append("BatchNorm statistics computed anew: no such layer behind the mask, or it was not tried.")
    return [
        *found,
        "Membership: whether one can tell that images of the class were trained on.",
        "Other images than these: another source, damaged images, or images made to bring the class back.",
        "Other copies of the parent: averages over training (EMA), earlier checkpoints, exports, fine-tuned models.",
    ]


def _about_features(config: Config) -> str:
    if features_of(config):
        return (
            "Features against a retrained model: there was none. The table of features is of images that the mask was "
            "sought with, and of no other probe."
        )
    return "Features: layers may tell the class as well as ever; no retrained model was there to compare with."


def who_can_lift(mask: Mask) -> list[str]:
    """Say who can bring the class back, and with what."""
    more = " The values that it puts in place of others are not the parent's." if mask.replaced else ""
    return [
        "Whoever has the parent: its file is as it was, and the program that put the mask on can lift it, bit for bit.",
        f"Nobody with the mask alone: it lists places and holds no weight of the parent.{more}",
        "Of a checkpoint that `seal` wrote: whoever has the parent, or the file of removed values if one was kept.",
        "Whoever has images of the class can train it again into any model, this one as well.",
    ]


# --- how it is verified -----------------------------------------------------------------------------------


def flags_of(preprocessing: Mapping[str, Any] | None) -> list[str]:
    """The flags of the command line that a card's preprocessing was given by; none where the model's files say it."""
    known = _table(preprocessing)
    source, found = str(known.get("source", "")), list[str]()
    for name in ("size", "mean", "std"):
        values = _numbers(known.get(name))
        if f"--{name}" in source and values:
            found += [f"--{name}", *map(str, values if len(set(values)) > 1 else values[:1])]
    if "--channels" in source and isinstance(known.get("channels"), str):
        found += ["--channels", known["channels"]]
    return found


def how_to_verify(config: Config) -> list[dict[str, str]]:
    """Commands that check a certificate, MASK and IMAGES being folders, and what each of them shows."""
    verify = [
        "uv",
        "run",
        "main.py",
        "verify",
        config.parent.load or "SPEC",
        "MASK",
        "--certificate",
        "certificate.json",
    ]
    told = [("the mask's file, without this project", ["sha256sum", "MASK/mask.safetensors"])]
    told += [("parent, mask, and all that is said here", verify)]
    if config.scores:
        images = ["--images", "IMAGES", *flags_of(config.preprocessing)]
        told += [("the scores as well, with the flags that the mask was made with", verify + images)]
    return [{"shows": what, "command": shlex.join(words)} for what, words in told]


# --- the whole --------------------------------------------------------------------------------------------


def facts_of(mask: Mask, file_sha256: str) -> dict[str, Any]:
    """Everything that a certificate says of a mask, without the digest of its own.

    Args:
        file_sha256: of `mask.safetensors`.
    """
    config, words = mask.config, words_of(mask.config, mask.changed)
    rules = meanings()
    parameters = {
        name: {"shape": list(target.shape), "dtype": target.dtype, "sha256": target.sha256}
        | dict(zip(("switched_off", "replaced"), mask.counts[name], strict=True))
        for name, target in config.parent.targets.items()
    }
    parent = {name: getattr(config.parent, name) for name in ("load", "framework", "state_sha256")}
    made = {name: getattr(config, name) for name in ("method", "kappa", "tool", "composition")}
    counts = {"switched_off": mask.switched_off, "replaced": mask.replaced, "parameters": parameters}
    return json.loads(json.dumps({
        "format": FORMAT,
        "version": VERSION,
        "forgets": [asdict(one) for one in config.forgotten],
        "parent": parent,
        "mask": {"digest": mask.digest, "file_sha256": file_sha256} | counts | made,
        "word": as_facts(words),
        "rules": {one.key: rules[one.key] for one in words},
        "measured": [asdict(one) for one in scores_of(config)],
        "features": features_of(config),
        "images": {"sha256": config.data_sha256, "preprocessing": config.preprocessing},
        "not_checked": not_checked(config),
        "verify": how_to_verify(config),
        "who_can_lift": who_can_lift(mask),
    }))  # fmt: skip


# --- a certificate that is there --------------------------------------------------------------------------


def read_certificate(path: Path) -> dict[str, Any]:
    """Read what a certificate's JSON file says, once its digest is found to be right.

    Raises:
        UserError: there is no such file, it was changed after it was written, or it is of another kind or version.
    """
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} is no certificate of a mask: give the certificate.json that `certificate` wrote")
    if facts.get("version") != VERSION:
        raise UserError(f"{path} is a certificate of version {facts.get('version')}, this MIMU reads {VERSION}: "
                        "read it with the one that wrote it")  # fmt: skip
    return facts


def differing(stored: object, now: object, where: str = "") -> Iterator[str]:
    """Yield where two plain values differ, as dotted names: `measured.0.value`."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in stored if key not in now)]:
            name = f"{where}.{key}" if where else key
            if key in stored and key in now:
                yield from differing(stored[key], now[key], name)
            else:
                yield name
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for place, (one, other) in enumerate(zip(stored, now, strict=True)):
            yield from differing(one, other, f"{where}.{place}")
    elif stored != now or type(stored) is not type(now):
        yield where
