"""What a mask says of itself: the typed form of `mask_config.json`, its checks, and the card made from it.

The values come from files that others wrote, so every one is checked before it is used, and nothing is ever run.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mimu.errors import MaskError

FORMAT = "mimu-mask"
VERSION, WITH_VALUES = 1, 2  # the second: weights are also replaced, which the first version cannot read
READS = f"{VERSION} or {WITH_VALUES}, which this mimu reads"
TOOL = "mimu 0.1.0"
FRONT_MATTER = (
    "---",
    "library_name: mimu",
    "tags:",
    "- machine-unlearning",
    "- image-classification",
    "---",
    "",
)
"""What a hub of models reads of a card. It has no value of the user's, whose names could mean something in YAML."""
MAX_TEXT = 10_000  # characters of one text: a class name or a path is shorter
Check = Callable[[object], bool]


def _refuse(what: str, found: object, needed: str) -> MaskError:
    shown = json.dumps(found, default=str)[:80]
    return MaskError(
        f"the mask's config has {shown} as {what}, which must be {needed}: it is damaged or of another kind"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_count, value)) and math.prod(value) < 2**63


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_hashes(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_text(key) and _is_hash(item) for key, item in value.items())


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


TEXT, HASH, COUNT = (_is_text, "a text"), (_is_hash, "64 hexadecimal digits"), (_is_count, "a number from 0 upwards")
TABLE = (_or_none(_is_table), "a table or null")
TEXT_OR_NONE, HASH_OR_NONE = (_or_none(_is_text), "a text or null"), (_or_none(_is_hash), f"{HASH[1]} or null")


def _rule(check: tuple[Check, str], **default: Any) -> Any:
    return field(metadata={"check": check}, **default)


class _Checked:
    """A frozen record whose fields are checked as they are set."""

    def __post_init__(self):
        for one in fields(self):  # ty: ignore[invalid-argument-type]
            check, needed = one.metadata["check"]
            if not check(getattr(self, one.name)):
                raise _refuse(one.name, getattr(self, one.name), needed)


def _built(kind: Any, value: object, what: str) -> Any:
    """Build a record from a table.

    Raises:
        MaskError: a key is missing or unknown, or a value is not what its field needs.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _refuse(what, value, "a table")
    known = {one.name for one in fields(kind)}
    if strange := sorted(str(key) for key in set(value) - known):
        raise MaskError(f"the mask's config has an unknown field {strange[0]!r} in {what}: read it with a newer mimu")
    try:
        return kind(**value)
    except TypeError:
        needed = ", ".join(sorted(known - set(value)))
        raise MaskError(
            f"the mask's config lacks fields in {what} (of {needed}): it is damaged or incomplete"
        ) from None


@dataclass(frozen=True)
class Forgotten(_Checked):
    """A class that the mask makes the model forget."""

    index: int = _rule(COUNT)
    name: str = _rule(TEXT)


@dataclass(frozen=True)
class Target(_Checked):
    """One parameter of the parent in which weights are switched off or replaced.

    Args:
        shape: of the parameter; dtype: without "torch.".
        sha256: of its raw bytes in C order.
        name_on_disk: its name in the parent's file, where that differs from the name in memory.
        aliases: other names in memory of the same values (tied weights).
        casts: dtype -> SHA-256 of the bytes after a cast to it.
    """

    shape: tuple[int, ...] = _rule((_is_shape, "a list of sizes"))
    dtype: str = _rule(TEXT)
    sha256: str = _rule(HASH)
    name_on_disk: str | None = _rule(TEXT_OR_NONE, default=None)
    aliases: tuple[str, ...] = _rule((_is_texts, "a list of names"), default=())
    casts: Mapping[str, str] = _rule((_is_hashes, "a table of SHA-256"), default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "aliases", tuple(self.aliases))

    @property
    def size(self) -> int:
        """How many weights the parameter has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parent(_Checked):
    """The model that the mask was made for: how it is loaded, and by what it is known."""

    targets: Mapping[str, Target] = _rule((lambda value: _is_table(value) and bool(value), "a table of parameters"))
    state_sha256: str = _rule(HASH)
    framework: str = _rule(TEXT)
    load: str | None = _rule(TEXT_OR_NONE, default=None)

    def __post_init__(self):
        super().__post_init__()
        targets = {name: _built(Target, value, f"the target {name}") for name, value in self.targets.items()}
        object.__setattr__(self, "targets", targets)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value)


@dataclass(frozen=True)
class Config(_Checked):
    """Everything a mask says beside its positions; optional where it was not measured or is not known.

    Args:
        forgotten: the classes. parent: the model.
        preprocessing: how images become inputs, with the key "source": where that was taken from.
        scores: measured values, such as clean, forget, retain (percent), n (images), intervals (95 %).
        method: which method chose the weights. kappa: how many it was asked for.
        data_sha256: of the images. tool: name and version of the program.
        composition: of a mask made by `compose`, its parts and how many weights several of them share.
    """

    forgotten: tuple[Forgotten, ...] = _rule((_is_list, "a list of at least one class"))
    parent: Parent = _rule((lambda value: isinstance(value, Mapping | Parent), "a table"))  # noqa: RUF009
    format: str = _rule((lambda value: value == FORMAT, f"{FORMAT!r}"), default=FORMAT)
    version: int = _rule((lambda value: value in (VERSION, WITH_VALUES), READS), default=VERSION)
    preprocessing: Mapping[str, Any] | None = _rule(TABLE, default=None)
    scores: Mapping[str, Any] | None = _rule(TABLE, default=None)
    method: str | None = _rule(TEXT_OR_NONE, default=None)
    kappa: int | None = _rule((_or_none(_is_count), "a number or null"), default=None)
    data_sha256: str | None = _rule(HASH_OR_NONE, default=None)
    tool: str = _rule(TEXT, default=TOOL)
    composition: Mapping[str, Any] | None = _rule(TABLE, default=None)

    def __post_init__(self):
        super().__post_init__()
        forgotten = tuple(_built(Forgotten, one, "forgotten") for one in self.forgotten)
        object.__setattr__(self, "forgotten", forgotten)
        object.__setattr__(self, "parent", _built(Parent, self.parent, "parent"))

    @classmethod
    def read(cls, value: object) -> "Config":
        """Check a table of plain values.

        Raises:
            MaskError: a field is missing, unknown, or not of its kind, or the format is another one.
        """
        if isinstance(value, Mapping) and value.get("format", FORMAT) != FORMAT:
            raise _refuse("format", value["format"], f"{FORMAT!r}")
        if isinstance(value, Mapping) and value.get("version", VERSION) not in (VERSION, WITH_VALUES):
            raise _refuse("version", value["version"], READS)
        config = _built(cls, value, "the config")
        try:
            json.dumps(asdict(config), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise MaskError(f"the mask's config cannot be written as JSON ({error}): give plain values") from None
        return config

    def plain(self) -> dict[str, Any]:
        """Return the config as plain values, as they stand in the file."""
        return json.loads(json.dumps(asdict(self)))


# --- the card ---------------------------------------------------------------------------------------------


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(scores: Mapping[str, Any] | None) -> list[str]:
    """Rows of the card's table: every measured value with its images and interval."""
    if not scores:
        return ["Nothing was measured with this mask."]
    count, intervals = scores.get("n"), scores.get("intervals") or {}
    rows = ["| what | value | 95 % interval | n |", "| --- | --- | --- | --- |"]
    for name, value in scores.items():
        if name in ("n", "intervals"):
            continue
        span = intervals.get(name) if isinstance(intervals, Mapping) else None
        shown = " to ".join(map(_number, span)) if isinstance(span, list | tuple) else "not measured"
        images = count.get(name, "not recorded") if isinstance(count, Mapping) else count
        rows.append(f"| {name} | {_number(value)} | {shown} | {'not recorded' if images is None else images} |")
    return rows


def _weights(parent: Parent, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Rows of the card's table of parameters; it has a column of replaced weights only if there are any."""
    columns = 2 if any(new for _, new in counts.values()) else 1
    rows = [["parameter", "shape", "type", *("switched off", "replaced")[:columns]]]
    rows.append(["---"] * len(rows[0]))
    for name, target in parent.targets.items():
        shape = " x ".join(map(str, target.shape))
        rows.append([name, shape, target.dtype, *(f"{count:,}" for count in counts[name][:columns])])
    return [f"| {' | '.join(row)} |" for row in rows]


def _changed(off: int, new: int) -> str:
    """What is done with (weights that are switched off, weights that are replaced), as a clause after "with"."""
    return f"{off:,} of them at zero and {new:,} replaced by other values" if new else "those weights at zero"


def _reach(config: Config) -> list[str]:
    """Say how far down a mask reaches, which its method's first word tells: an item of a list."""
    if not re.match(r"erase\b", config.method or ""):
        return ["- Whoever has the parent can lift it. It suppresses a class; it does not erase what was learned."]
    measured = [
        "  features_before, features_may (what is expected) and features_now say how far, in percent of a variance, on",
        "  the images that the mask was sought with.",
    ]
    return [
        "- Whoever has the parent can lift it. It does more than suppress a class: what features tell of it was",
        "  brought down towards what two small networks lead one to expect of a model that never learned it.",
        *(measured if "features_now" in (config.scores or {}) else ()),
        "  No retrained model was there to compare with: that the class is erased is not claimed.",
    ]


def card(config: Config, counts: Mapping[str, tuple[int, int]]) -> str:
    """Write a mask's `README.md`.

    Args:
        counts: parameter -> how many of its weights are (switched off, replaced by other values).
    """
    parent, names = config.parent, ", ".join(f"{one.name} (class {one.index})" for one in config.forgotten)
    off, new = (sum(count) for count in zip(*counts.values(), strict=True))
    source = (config.preprocessing or {}).get("source", "not recorded")
    lines = [
        *FRONT_MATTER,
        *(f"# Mask: forgets {names}", ""),
        f"This folder holds no model. It lists {off + new:,} weights of another model, the parent; with",
        f"{_changed(off, new)}, the parent no longer recognises the class.",
        *("", "## Parent", ""),
        f"- load it with: {parent.load or 'not recorded'} ({parent.framework})",
        f"- SHA-256 of all its parameters and buffers: `{parent.state_sha256}`",
        f"- preprocessing taken from: {source}",
        *("", *_weights(parent, counts)),
        *("", "## Scores", "", *_scores(config.scores)),
        "",
        f"Method: {config.method or 'not recorded'}. Weights asked for: {config.kappa or 'not recorded'}."
        f" Written by {config.tool}.",
        *("", "## Use", "", "```python", "from mimu import Mask", "", 'mask = Mask.load("this/folder")'),
        *("with mask.applied(model):", "    ...  # forgotten here", "...  # and here the parent, bit for bit", "```"),
        "",
        "`mask.apply(model)` and `mask.lift(model)` do the same without a block. Both check first that the model is",
        "the parent. `mimu.seal` writes a checkpoint in which the weights are gone.",
        *("", "## What a mask does not do", ""),
        "- It makes the model neither smaller nor faster.",
        *_reach(config),
        "- The scores hold for the images they were measured on.",
    ]
    return "\n".join(lines) + "\n"
