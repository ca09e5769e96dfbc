"""The records of a run: where they lie, reading them back. No torch, no dataset."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypedDict, cast, get_type_hints

from core.artifacts import SCHEMA, DamagedError, read_json
from core.choices import Objectives
from core.config import PipelineConfig, UserError
from core.hashes import sha256_file
from core.observe import log

Check = Callable[[object], str]
SCORES = ("forget_score", "retain_score")  # always measured: points, verdicts and the answer rest on them
WORDS = ("untouched", "suppressed", "over-erased", "erased to retraining's level")
"""Verdicts that say how far a method goes, not what speaks against it; `measure.verdicts` has the rule."""
MOST = 1e30  # of any value: sums and squares of larger ones are no numbers
Axis = Literal["top_k", "kappa"]  # of a sweep
CHANCE = ("accuracy", "low", "high", "chance")
AXES = {"topK": "top_k", "kappa": "kappa", "seed": "seed"}
"""Word of a record's `axes` -> the field that it speaks of. Records spell one of them in an older way."""

# --- checks of values -------------------------------------------------------------------------------------


def _that(fine: Callable[[Any], bool], otherwise: str) -> Check:
    """A check by a condition."""
    return lambda value: "" if fine(value) else f"is {_short(value)}, {otherwise}"


def _between(kind: Any, least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def number(least: float = -MOST, most: float = MOST) -> Check:
    """A finite number within limits; True is none."""
    return _that(_between(int | float, least, most), f"not a number from {least:g} to {most:g}")


def whole(least: int = 0, most: int = 2**53) -> Check:
    """A whole number within limits; True and 1.0 are none."""
    return _that(_between(int, least, most), f"not a whole number from {least} to {most}")


def text(pattern: str = r"(?s).{0,20000}") -> Check:
    """Text of a shape."""
    return _that(lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)), "no such text")


def one_of(*choices: object) -> Check:
    """One of some values, of the same type."""
    known = [(type(choice), choice) for choice in choices]
    return _that(lambda value: (type(value), value) in known, f"none of {', '.join(map(str, choices))}")


def maybe(inner: Check) -> Check:
    """None, or what another check lets pass."""
    return lambda value: "" if value is None else inner(value)


def either(*checks: Check) -> Check:
    """What one of some checks lets pass; the last one's complaint is given."""
    return lambda value: min((check(value) for check in reversed(checks)), key=bool)


def rows(inner: Check, least: int = 0, most: int = 10**7) -> Check:
    """A list of what another check lets pass."""

    def check(value: object) -> str:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            return f"is {_short(value)}, not a list of at least {least}"
        return next((f"[{place}] {wrong}" for place, one in enumerate(value) if (wrong := inner(one))), "")

    return check


def named(inner: Check, needed: Mapping[str, Check] | None = None, keys: str = r"(?s).{0,2000}") -> Check:
    """A mapping from names to what another check lets pass; some names are needed, and may have checks of their own."""
    shape = re.compile(keys)

    def check(value: object) -> str:
        if not isinstance(value, Mapping):
            return f"is {_short(value)}, not a mapping"
        if missing := [name for name in needed or {} if name not in value]:
            return f"has no {missing[0]}"
        if strange := [name for name in value if not isinstance(name, str) or not shape.fullmatch(name)]:
            return f"has the name {_short(strange[0])}"
        checks = ((name, (needed or {}).get(name, inner)(one)) for name, one in value.items())
        return next((f".{name} {wrong}" for name, wrong in checks if wrong), "")

    return check


def only(**needed: Check) -> Check:
    """A mapping of just these names."""
    inner = named(anything, needed)

    def check(value: object) -> str:
        strange = [name for name in value if name not in needed] if isinstance(value, Mapping) else []
        return f"has {_short(strange[0])}, which is unknown" if strange else inner(value)

    return check


def anything(value: object) -> str:
    """No wish: plain JSON with numbers that are some."""
    return either(rows(anything), named(anything), text(), number(), one_of(True, False, None))(value)


def inside(value: object) -> str:
    """A relative path that stays below the folder it starts from."""
    wrong = text(r"[^\0]{1,1000}")(value)
    if wrong or not isinstance(value, str):
        return wrong
    path = PurePosixPath(value)
    return f"is {_short(value)}, which leads out of the folder" if path.is_absolute() or ".." in path.parts else ""


def given_or_inside(value: object) -> str:
    """A path: below the output folder, or (what was given by path) an absolute one that says plainly where."""
    absolute = isinstance(value, str) and value.startswith("/") and ".." not in PurePosixPath(value).parts
    return text(r"[^\0]{1,4000}")(value) if absolute else inside(value)


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


# --- the fields -------------------------------------------------------------------------------------------

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,79}"  # of what becomes part of a path
name, key, scalar = text(NAME), text(r"[A-Za-z0-9_-]{1,80}"), either(text(), number(), one_of(True, False, None))
ALWAYS = {**dict.fromkeys(SCORES, number()), "seconds": number(0), "weights_changed": whole()}
NEVER = dict.fromkeys(ALWAYS, one_of(None))
measured = either(named(maybe(number()), NEVER, NAME), named(maybe(number()), ALWAYS, NAME))
"""Figures of a method; one whose training diverged has none of those that every other has."""


def by_method(inner: Check) -> Check:
    """Something about each measured method."""
    return named(inner, keys=NAME)


def each(inner: Check) -> Check:
    """The same, or None where there is nothing to say of a method."""
    return by_method(maybe(inner))


SECTIONS = {one.name for one in fields_of(PipelineConfig) if is_dataclass(one.type)}
plain_setting = either(scalar, rows(scalar))


def configuration(value: object) -> str:
    """Settings by name, in sections as the schema of a run has them."""
    if wrong := named(either(plain_setting, named(plain_setting)), keys=NAME)(value):
        return wrong
    parts = value.items() if isinstance(value, Mapping) else ()
    misplaced = [one for one, part in parts if isinstance(part, Mapping) != (one in SECTIONS)]
    return f".{misplaced[0]} is {'no' if misplaced[0] in SECTIONS else 'a'} section" if misplaced else ""


counts = rows(whole(0, 10**15), least=1)
Values = dict[str, Any]
"""Metric or cost -> number; None: not measured."""


def checks_of(kind: type) -> dict[str, Check]:
    """Field -> check of a typed mapping, each of whose fields is declared with both its type and its check."""
    return {field: hint.__metadata__[0] for field, hint in get_type_hints(kind, include_extras=True).items()}


def fits(kind: type) -> Check:
    """A typed mapping, with all of its fields and no other."""
    return only(**checks_of(kind))


class Metric(TypedDict):
    """What a record says of a metric."""

    unit: Annotated[str, text()]
    better: Annotated[str, one_of("higher", "lower", "retrain")]
    target: Annotated[str, text()]
    definition: Annotated[str, text()]
    first: Annotated[bool, one_of(True, False)]
    """Whether tables show it unasked."""


class Limits(TypedDict):
    """A 95 % interval over n images."""

    value: Annotated[float, number()]
    low: Annotated[float, number()]
    high: Annotated[float, number()]
    n: Annotated[int, whole()]


class Auto(TypedDict):
    """The search for the smallest kappa: its target, and what it tried."""

    method: Annotated[str, name]
    tau: Annotated[float, number()]
    epsilon: Annotated[float, number()]
    confidence: Annotated[float, number(0, 1)]
    achieved: Annotated[bool, one_of(True, False)]
    attempts: Annotated[list[dict], rows(named(anything))]


class Provenance(TypedDict):
    """When, where and by which code a record was made."""

    commit: Annotated[str | None, maybe(text())]
    dirty: Annotated[bool, one_of(True, False)]
    versions: Annotated[dict[str, str], named(text())]
    device: Annotated[str, text()]
    started: Annotated[str, text()]
    seconds: Annotated[dict[str, float], named(number(0))]
    repeatability: Annotated[str, text()]
    plugins: Annotated[dict[str, str], named(key)]


class Reference(TypedDict):
    """A retrained model, and whether it may be compared with."""

    index: Annotated[int, whole()]
    sane: Annotated[bool, one_of(True, False)]
    why: Annotated[str | None, maybe(text())]
    forget_score: Annotated[float | None, maybe(number())]
    retain_score: Annotated[float | None, maybe(number())]


class Histogram(TypedDict):
    """Weights that the answer's mask keeps and switches off, between each two edges."""

    edges: Annotated[list[float], rows(number(), least=2)]
    kept: Annotated[list[int], counts]
    switched_off: Annotated[list[int], counts]


class Layer(TypedDict):
    """How many weights of a layer [m, n] are switched off in each block."""

    layer: Annotated[str, text()]
    shape: Annotated[list[int], rows(whole(1), least=2, most=2)]
    cells: Annotated[list[list[int]], rows(counts, least=1)]


SHOWN = {"images": rows(text(r"[A-Za-z0-9+/=]{0,100000}")), "labels": rows(whole())}


class Record(TypedDict):
    """One point of a run, as it lies on the disk: every field with its type and its check. None is optional."""

    schema: Annotated[str, text()]
    id: Annotated[str, key]
    run: Annotated[str, key]
    model: Annotated[str, name]
    dataset: Annotated[str, name]
    objective: Annotated[str, one_of(*(one.value for one in Objectives))]
    images: Annotated[str, key]
    num_classes: Annotated[int, whole(1)]
    split_sizes: Annotated[dict[str, int], named(whole())]
    classifier_sha256: Annotated[str, key]
    given: Annotated[dict[str, str | None], only(**dict.fromkeys(("classifier", "graphs", "gcn"), maybe(key)))]
    """Hashes of the products that were handed in; None: made by the run."""
    code: Annotated[str, key]
    forget_class: Annotated[list[int], rows(whole(), least=1)]
    forget_names: Annotated[list[str], rows(text())]
    mask_layer: Annotated[list[int], rows(whole(-(10**6)), least=1)]
    num_graph_vertices: Annotated[int, whole(1)]
    num_graph_edges: Annotated[int, whole()]
    top_k: Annotated[int, whole(1)]
    kappa: Annotated[int, whole(1)]
    auto: Annotated[Auto | None, maybe(fits(Auto))]
    seed: Annotated[int, whole(0, 2**63)]
    classifier_path: Annotated[str, given_or_inside]
    gcn_path: Annotated[str, given_or_inside]
    config: Annotated[dict[str, Any], configuration]
    mask_path: Annotated[str, inside]
    mask_paths: Annotated[dict[str, str], by_method(inside)]
    mask_sha256: Annotated[dict[str, str], by_method(key)]
    provenance: Annotated[Provenance, fits(Provenance)]
    methods: Annotated[dict[str, Values], by_method(measured)]
    validation: Annotated[dict[str, Values], by_method(measured)]
    answer: Annotated[str, name]
    metrics: Annotated[dict[str, Metric], named(fits(Metric), dict.fromkeys(SCORES, fits(Metric)), keys=NAME)]
    costs: Annotated[dict[str, str], named(text())]
    labels: Annotated[dict[str, str], by_method(text())]
    axes: Annotated[dict[str, list[str]], by_method(rows(one_of(*AXES)))]
    degradation: Annotated[dict[str, Values], by_method(named(maybe(number()), keys=NAME))]
    verdicts: Annotated[dict[str, list[dict[str, str]]], by_method(rows(only(key=text(), sentence=text())))]
    references: Annotated[list[Reference], rows(fits(Reference))]
    mask_efficacy: Annotated[dict[str, float | None], named(maybe(number()))]
    weight_histogram: Annotated[Histogram, fits(Histogram)]
    mask_map: Annotated[list[Layer], rows(fits(Layer))]
    samples: Annotated[dict[str, Any], named(named(text(), keys=r"\d+"), SHOWN, keys="images|labels|names")]
    """Some test images of the forgotten classes, base64 PNG, and their labels; by label, the names of all classes that
    they are of or are taken for, which earlier records lack."""
    settings: Annotated[dict[str, dict | None], each(named(anything))]
    tuning: Annotated[dict[str, list[dict] | None], each(rows(named(anything)))]
    integrity: Annotated[dict[str, dict | None], each(named(anything))]
    intervals: Annotated[dict[str, dict[str, Limits] | None], each(named(fits(Limits), keys=NAME))]
    undefined: Annotated[dict[str, dict[str, str] | None], each(named(text(), keys=NAME))]
    """Why a metric has no value for a method, by metric: "the network has no BatchNorm layer"."""
    by_stage: Annotated[dict[str, dict[str, dict[str, float]] | None], each(named(named(number()), keys=NAME))]
    """Metrics that are means over the network's stages: their value at each, by the stage's name, in order."""
    class_probability: Annotated[dict[str, list[float] | None], each(rows(number(0, 1 + 1e-6), least=1))]
    confusion: Annotated[dict[str, list[list[int]] | None], each(rows(counts, least=1))]
    class_score: Annotated[dict[str, list[float | None] | None], each(rows(maybe(number(0, 100)), least=1))]
    taken_for: Annotated[dict[str, list[int] | None], each(counts)]
    said_of_samples: Annotated[dict[str, list[list[float]] | None], each(rows(rows(number(0), least=2, most=2)))]
    skipped_images: Annotated[list[Any], rows(anything)]
    duplicates: Annotated[dict[str, Any], named(anything)]
    image_notes: Annotated[list[str], rows(text())]
    footing: Annotated[dict[str, Any], only(near_chance=maybe(text()), **dict.fromkeys(CHANCE, number(-1, 101)))]
    """How far the untouched classifier is from chance, percent; near_chance: what is wrong, if it is near."""


FIELDS = checks_of(Record)
EACH = (
    *("axes", "methods", "validation", "verdicts", "settings", "tuning", "integrity", "intervals", "undefined"),
    *("by_stage", "class_probability", "confusion", "class_score", "taken_for", "said_of_samples"),
)
"""Fields that say something of every measured method."""


def complaint(record: Mapping[str, object]) -> str:
    """What is wrong with a record, "" if nothing is."""
    if missing := [field for field in FIELDS if field not in record]:
        return f"it has no {', '.join(missing)}"
    if unknown := [field for field in record if field not in FIELDS]:
        return f"it has {_short(unknown[0])}, which is unknown"
    for field, value in record.items():
        if wrong := FIELDS[field](value):
            return f"{field}{'' if wrong[0] in '.[' else ' '}{wrong}"
    return _contradiction(record)


def checked(record: Mapping[str, object]) -> Record:
    """A record that was made here.

    Raises:
        RuntimeError: it does not fit the schema, which is a fault of the program.
    """
    if wrong := complaint(record):
        raise RuntimeError(f"this record does not fit core/records.py: {wrong}")
    return cast(Record, record)


def _contradiction(record: Mapping) -> str:
    """Fields that do not fit each other."""
    methods = set(record["labels"])
    for field in EACH:
        if set(record[field]) != methods:
            return f"{field} is of other methods than labels"
    for method in methods:
        lacking = {record[part][method]["seconds"] is None for part in ("methods", "validation")}
        lacking |= {record["class_probability"][method] is None}
        if len(lacking) > 1 or (lacking == {True} and method in ("default", record["answer"])):
            return f"values of {method} are lacking"
    count, forgotten = record["num_classes"], record["forget_class"]
    if max(forgotten) >= count or len(set(forgotten)) < len(forgotten):
        return f"forget_class is {forgotten}, the dataset has {count} classes"
    if len(record["forget_names"]) != len(forgotten):
        return "forget_names has not a name for each forgotten class"
    for field in ("class_probability", "confusion", "class_score", "taken_for"):
        for method, values in record[field].items():
            sizes = {len(values), *(len(row) for row in values if isinstance(row, list | tuple))} if values else {count}
            if sizes != {count}:
                return f"{field}.{method} is not of {count} classes"
    bars = record["weight_histogram"]
    if not len(bars["edges"]) - 1 == len(bars["kept"]) == len(bars["switched_off"]):
        return "weight_histogram has not a count between each two edges"
    if any(len({len(row) for row in layer["cells"]}) > 1 for layer in record["mask_map"]):
        return "mask_map has rows of several lengths"
    return _of_samples(record) or _of_masks(record)


def _of_samples(record: Mapping) -> str:
    said = [one for one in record["said_of_samples"].values() if one is not None]
    lengths = {len(one) for one in (record["samples"]["images"], record["samples"]["labels"], *said)}
    return "" if len(lengths) == 1 else "samples are not all spoken of"


def _of_masks(record: Mapping) -> str:
    paths = record["mask_paths"]
    if set(record["mask_sha256"]) != set(paths):
        return "mask_sha256 is of other masks than mask_paths"
    return "" if record["mask_path"] in paths.values() else "mask_path is none of mask_paths"


def axes_of(record: Record, method: str) -> list[str]:
    """The fields of a record that a method's values depend on, such as `top_k`."""
    return [AXES[word] for word in record["axes"][method]]


def axes_as_written(fields: Sequence[str]) -> list[str]:
    """The same as a record's `axes` says it."""
    return [word for field in fields for word in AXES if AXES[word] == field]


RECORDS = Path("eval/metrics_and_plots/json")
SHARED = ("model", "dataset", "objective", "images", "num_classes", "forget_class", "seed", "mask_layer", "answer")
"""What the records of one run have in common, beside their methods and metrics."""


def record_path(output_dir: Path, record: Mapping[str, object]) -> Path:
    """Where a record lies: `<model>_<dataset>_top-{K}_kappa_{kappa}/<id>.json`."""
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / RECORDS / point / f"{record['id']}.json"


def read_record(output_dir: Path, path: Path) -> Record:
    """The record in a file below `output_dir`.

    Raises:
        DamagedError: it is not what was written, or no record of this place.
        UserError, MachineError: it cannot be read.
    """
    wrong = complaint(record := read_json(path))
    if wrong or record["schema"] != SCHEMA or record_path(output_dir, record) != path:
        raise DamagedError(path, wrong or f"no {SCHEMA} record of this place")
    return cast(Record, record)


def read_records(output_dir: Path) -> list[Record]:
    """All records below `output_dir`, in path order; a broken or foreign file is named and left out."""
    records, runs = [], {}
    for path in sorted((output_dir / RECORDS).glob("*/*.json")):
        try:
            record = read_record(output_dir, path)
            if _of_its_run(record) != runs.setdefault(record["run"], _of_its_run(record)):
                raise DamagedError(path, f"it says other things of run {record['run']} than the run's other records")
            records.append(record)
        except UserError as error:
            log(f"left out: {error.found if isinstance(error, DamagedError) else error}")
    return records


def read_whole(output_dir: Path, path: Path) -> Record | None:
    """The record in a file, if it is there and whole, its masks included; damage is said in the log."""
    if not path.exists():
        return None
    try:
        record = read_record(output_dir, path)
        for name, digest in record["mask_sha256"].items():
            mask = output_dir / record["mask_paths"][name]
            if not mask.is_file():
                raise DamagedError(mask, "it is missing")
            if sha256_file(mask) != digest:
                raise DamagedError(mask, f"its content is not what {path.name} says")
    except DamagedError as error:
        log(f"evaluation: {error.found}, so that the point is measured anew")
        return None
    return record


def _of_its_run(record: Mapping) -> list:
    return [*(record[name] for name in SHARED), *(list(record[name]) for name in ("labels", "metrics"))]
