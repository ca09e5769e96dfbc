"""The records of a run: where they lie, reading them back. No torch, no dataset."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from pathlib import Path, PurePosixPath

from core.artifacts import SCHEMA, DamagedError, read_json
from core.choices import Objectives
from core.config import PipelineConfig, UserError
from core.hashes import sha256_file
from core.observe import log

Check = Callable[[object], str]
SCORES = ("forget_score", "retain_score")  # always measured: points, verdicts and the answer rest on them
MOST = 1e30  # of any value: sums and squares of larger ones are no numbers
BETTER = ("higher", "lower", "retrain")
AXES = {"topK": "top_k", "kappa": "kappa", "seed": "seed"}
"""Word of a record's `axes` -> the field that it speaks of. Records spell one of them in an older way."""

# --- checks of values -------------------------------------------------------------------------------------


def number(least: float = -MOST, most: float = MOST) -> Check:
    """A finite number within limits; True is none."""

    def check(value: object) -> str:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        return "" if fine else f"is {_short(value)}, not a number from {least:g} to {most:g}"

    return check


def whole(least: int = 0, most: int = 2**53) -> Check:
    """A whole number within limits; True and 1.0 are none."""

    def check(value: object) -> str:
        fine = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return "" if fine else f"is {_short(value)}, not a whole number from {least} to {most}"

    return check


def text(pattern: str = r"(?s).{0,20000}") -> Check:
    """Text of a shape."""
    shape = re.compile(pattern)

    def check(value: object) -> str:
        return "" if isinstance(value, str) and shape.fullmatch(value) else f"is {_short(value)}, no such text"

    return check


def one_of(*choices: object) -> Check:
    """One of some values, of the same type."""

    def check(value: object) -> str:
        fine = any(type(value) is type(choice) and value == choice for choice in choices)
        return "" if fine else f"is {_short(value)}, none of {', '.join(map(str, choices))}"

    return check


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
    if isinstance(value, Mapping):
        return named(anything)(value)
    if isinstance(value, list | tuple):
        return rows(anything)(value)
    return either(text(), number(), one_of(True, False, None))(value)


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
metric_values = named(maybe(number()), keys=NAME)
ALWAYS = {**dict.fromkeys(SCORES, number()), "seconds": number(0), "weights_changed": whole()}
NEVER = dict.fromkeys(ALWAYS, one_of(None))
measured = either(named(maybe(number()), NEVER, NAME), named(maybe(number()), ALWAYS, NAME))
"""Figures of a method; one whose training diverged has none of those that every other has."""


def by_method(inner: Check) -> Check:
    """Something about each measured method."""
    return named(inner, keys=NAME)


SECTIONS = {one.name for one in fields_of(PipelineConfig) if is_dataclass(one.type)}
plain_setting = either(scalar, rows(scalar))


def configuration(value: object) -> str:
    """Settings by name, in sections as the schema of a run has them."""
    if wrong := named(either(plain_setting, named(plain_setting)), keys=NAME)(value):
        return wrong
    parts = value.items() if isinstance(value, Mapping) else ()
    misplaced = [one for one, part in parts if isinstance(part, Mapping) != (one in SECTIONS)]
    return f".{misplaced[0]} is {'no' if misplaced[0] in SECTIONS else 'a'} section" if misplaced else ""


metric = named(anything, {"unit": text(), "better": one_of(*BETTER), "first": one_of(True, False)})
interval = only(value=number(), low=number(), high=number(), n=whole())
counts = rows(number(0, 1e15), least=1)
EACH = ("axes", "methods", "validation", "verdicts", "intervals", "class_probability", "confusion")  # of every method

FIELDS: dict[str, Check] = {
    "schema": text(),
    "id": key,
    "run": key,
    "model": name,
    "dataset": name,
    "objective": one_of(*(one.value for one in Objectives)),
    "images": key,
    "num_classes": whole(1),
    "split_sizes": named(whole()),
    "classifier_sha256": key,
    "given": only(classifier=maybe(key), graphs=maybe(key), gcn=maybe(key)),
    "code": key,
    "forget_class": rows(whole(), least=1),
    "forget_names": rows(text()),
    "mask_layer": rows(whole(-(10**6)), least=1),
    "num_graph_vertices": whole(1),
    "top_k": whole(1),
    "kappa": whole(1),
    "auto": maybe(
        named(anything, {"method": name, "tau": number(), "epsilon": number(), "achieved": one_of(True, False)})
    ),
    "seed": whole(0, 2**63),
    "classifier_path": given_or_inside,
    "gcn_path": given_or_inside,
    "config": configuration,
    "provenance": named(
        anything,
        {
            "commit": maybe(text()),
            "dirty": one_of(True, False),
            "versions": named(text()),
            "device": text(),
            "started": text(),
            "seconds": named(number(0)),
            "plugins": named(key),
        },
    ),
    "methods": by_method(measured),
    "validation": by_method(measured),
    "answer": name,
    "metrics": named(metric, dict.fromkeys(SCORES, metric), keys=NAME),
    "labels": by_method(text()),
    "axes": by_method(rows(one_of(*AXES))),
    "verdicts": by_method(rows(named(text(), {"key": text(), "sentence": text()}))),
    "intervals": by_method(maybe(named(interval, keys=NAME))),
    "class_probability": by_method(maybe(rows(number(0, 1 + 1e-6), least=1))),
    "confusion": by_method(maybe(rows(counts, least=1))),
    "weight_histogram": only(edges=rows(number(), least=2), kept=counts, switched_off=counts),
    "mask_map": rows(only(layer=text(), shape=rows(whole(1), least=2, most=2), cells=rows(counts, least=1))),
}
"""Every record has these."""

MORE: dict[str, Check] = {
    "num_graph_edges": whole(),
    "mask_path": inside,
    "mask_paths": by_method(inside),
    "mask_sha256": by_method(key),
    "costs": named(text()),
    "references": rows(named(anything, {"index": whole(), "sane": one_of(True, False), "why": maybe(text())})),
    "degradation": by_method(metric_values),
    "mask_efficacy": named(maybe(number())),
    "samples": only(images=rows(text(r"[A-Za-z0-9+/=]{0,100000}")), labels=rows(whole())),
    "said_of_samples": by_method(maybe(rows(rows(number(0), least=2, most=2)))),
    "settings": by_method(maybe(named(anything))),
    "tuning": by_method(maybe(rows(named(anything)))),
    "integrity": by_method(maybe(named(anything))),
    "class_score": by_method(maybe(rows(maybe(number(0, 100)), least=1))),
    "taken_for": by_method(maybe(counts)),
    "skipped_images": rows(anything),
    "duplicates": named(anything),
    "image_notes": rows(text()),
    "footing": only(near_chance=maybe(text()), **dict.fromkeys(("accuracy", "low", "high", "chance"), number(-1, 101))),
}
"""Records may have these, too."""


def complaint(record: Mapping[str, object]) -> str:
    """What is wrong with a record, "" if nothing is."""
    if missing := [field for field in FIELDS if field not in record]:
        return f"it has no {', '.join(missing)}"
    every = FIELDS | MORE
    if unknown := [field for field in record if field not in every]:
        return f"it has {_short(unknown[0])}, which is unknown"
    for field, value in record.items():
        if wrong := every[field](value):
            return f"{field}{'' if wrong[0] in '.[' else ' '}{wrong}"
    return _contradiction(record)


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
        for method, values in record.get(field, {}).items():
            sizes = {len(values), *(len(row) for row in values if isinstance(row, list | tuple))} if values else {count}
            if sizes != {count}:
                return f"{field}.{method} is not of {count} classes"
    bars = record["weight_histogram"]
    if not len(bars["edges"]) - 1 == len(bars["kept"]) == len(bars["switched_off"]):
        return "weight_histogram has not a count between each two edges"
    for layer in record["mask_map"]:
        if len({len(row) for row in layer["cells"]}) > 1:
            return "mask_map has rows of several lengths"
    return _of_samples(record) or _of_masks(record)


def _of_samples(record: Mapping) -> str:
    samples = record.get("samples", {"images": [], "labels": []})
    shown = len(samples["images"])
    said = [one for one in record.get("said_of_samples", {}).values() if one is not None]
    return "" if all(len(one) == shown for one in (samples["labels"], *said)) else "samples are not all spoken of"


def _of_masks(record: Mapping) -> str:
    paths = record.get("mask_paths", {})
    if set(record.get("mask_sha256", {})) != set(paths):
        return "mask_sha256 is of other masks than mask_paths"
    return "" if not paths or record.get("mask_path") in paths.values() else "mask_path is none of mask_paths"


def axes_of(record: Mapping, method: str) -> list[str]:
    """The fields of a record that a method's values depend on, such as `top_k`."""
    return [AXES[word] for word in record["axes"][method]]


def axes_as_written(fields: Sequence[str]) -> list[str]:
    """The same as a record's `axes` says it."""
    words = {field: word for word, field in AXES.items()}
    return [words[field] for field in fields]


RECORDS = Path("eval/metrics_and_plots/json")
SHARED = ("model", "dataset", "objective", "images", "num_classes", "forget_class", "seed", "mask_layer", "answer")
"""What the records of one run have in common, beside their methods and metrics."""


def record_path(output_dir: Path, record: Mapping[str, object]) -> Path:
    """Where a record lies: `<model>_<dataset>_top-{K}_kappa_{kappa}/<id>.json`."""
    point = f"{record['model']}_{record['dataset']}_top-{record['top_k']}_kappa_{record['kappa']}"
    return output_dir / RECORDS / point / f"{record['id']}.json"


def read_record(output_dir: Path, path: Path) -> dict:
    """The record in a file below `output_dir`.

    Raises:
        DamagedError: it is not what was written, or no record of this place.
        UserError, MachineError: it cannot be read.
    """
    record = read_json(path)
    wrong = complaint(record)
    if wrong or record["schema"] != SCHEMA or record_path(output_dir, record) != path:
        raise DamagedError(path, wrong or f"no {SCHEMA} record of this place")
    return record


def read_records(output_dir: Path) -> list[dict]:
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


def read_whole(output_dir: Path, path: Path) -> dict | None:
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


def _of_its_run(record: dict) -> list:
    return [*(record[name] for name in SHARED), *(list(record[name]) for name in ("labels", "metrics"))]
