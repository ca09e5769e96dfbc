"""docs/methods.md and docs/metrics.md, generated from the registries; example values from docs/example.json.

    uv run main.py docs [--example RECORD.json]

The example is an extract of one record: without --example the committed one is used again.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from core.artifacts import SCHEMA, read_json, write_json, write_text
from core.config import PROJECT_ROOT, UserError
from measure.integrity import COSTS
from measure.metrics import GROUPS, METRICS, Metric
from measure.verdicts import meanings
from reporting.write import Markdown, as_text, in_markdown
from unlearn.methods import METHODS
from unlearn.registry import BUDGET, Method

DOCS = PROJECT_ROOT / "docs"
ARROWS = {"higher": "up", "lower": "down", "retrain": "as retrained"}
EXAMPLE = "example.json"
ABOUT = ("schema", "model", "dataset", "forget_class", "mask_layer", "top_k", "kappa", "seed")
KEPT = ("methods", "settings", "verdicts")
SHOWN = ("forget_score", "retain_score", "avg_gap", "weights_changed", "edit_bytes", "seconds")  # of a method
BESIDE = ("default", "retrain", "mimu_refined")  # whose values stand beside a metric
DIGITS = 4

Example = Mapping[str, dict]


def _of_shape(value: object, holds: Callable[[object], bool]) -> bool:
    """Tell whether a value is a JSON object and all of its values pass the check."""
    return isinstance(value, dict) and all(holds(item) for item in value.values())


def _sound(record: dict) -> bool:
    """Tell whether a record has every key that the pages read, with values of the right types."""

    def numbers(of: object) -> bool:
        return _of_shape(of, lambda value: value is None or isinstance(value, (int, float)))

    def said(of: object) -> bool:
        return isinstance(of, list) and all(isinstance(one, dict) and {"key", "sentence"} <= set(one) for one in of)

    shapes = {"methods": numbers, "settings": lambda of: of is None or isinstance(of, dict), "verdicts": said}
    return {*ABOUT, *KEPT} <= set(record) and all(_of_shape(record[key], holds) for key, holds in shapes.items())


def extract(path: Path) -> dict:
    """Return the part of a record that the pages use.

    Args:
        path: the record's JSON file.

    Raises:
        UserError: the file is missing, no JSON object, or not a record of this project.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}: name a record below eval/metrics_and_plots/json")
    record = {"settings": {}, "verdicts": {}} | read_json(path, foreign=True)  # records from before there were verdicts
    origin = record.get("provenance")
    if record.get("schema") != SCHEMA or not isinstance(origin, dict) or not _sound(record):
        raise UserError(f"{path} is no {SCHEMA} record: name one below eval/metrics_and_plots/json")
    return {key: record[key] for key in (*ABOUT, *KEPT)} | {"commit": origin.get("commit")}


def shown(value: object) -> str:
    """A value with DIGITS digits; "-" where there is none."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def source(text: str) -> str:
    """Turn arXiv ids in a text into links."""
    return re.sub(r"\b(?:arXiv:)?(\d{4}\.\d{4,5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def setup(example: Example) -> str:
    """Describe the run of the example values in one sentence."""
    classes = ", ".join(map(str, example["forget_class"]))
    return (
        f"Example values: test images of {example['dataset']}, {example['model']}, forgotten class {classes}, kappa "
        f'{example["kappa"]}, seed {example["seed"]}; one run, no mean. "-": not measured in it.'
    )


def settings(values: Mapping[str, object]) -> str:
    """Write hyper-parameters as `a = 1, b = 2`."""
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "none"


def method_section(entry: Method, example: Example) -> str:
    """Write the section of one method."""
    lines = [f"## `{entry.name}`: {entry.label}", "", entry.definition, "", f"- source: {source(entry.source)}"]
    lines.append(f"- depends on: {', '.join(entry.axes) or 'no sweep axis'}")
    tuned = "; ".join(settings(one) for one in entry.grid)
    lines.append(f"- settings: {tuned}" + (" (the first is the default)" if len(entry.grid) > 1 else ""))
    measured = example["methods"].get(entry.name)
    if measured:
        values = ", ".join(f"{name} {shown(measured.get(name))}" for name in SHOWN)
        used = example["settings"].get(entry.name)
        lines.append(f"- example: {values}" + (f"; with {settings(used)}" if used else ""))
        lines += [f"- verdict: {one['key']} ({one['sentence']})" for one in example["verdicts"].get(entry.name, [])]
    return "\n".join(lines) + "\n"


def methods_page(methods: Mapping[str, Method], example: Example) -> str:
    """Write the text of docs/methods.md."""
    rows = [["method", "label", "source", "settings"]]
    rows += [
        [Markdown(f"`{one.name}`"), one.label, Markdown(source(in_markdown(one.source or "-"))), str(len(one.grid))]
        for one in methods.values()
    ]
    head = (
        "# Methods\n\nGenerated by `uv run main.py docs`; edit the functions, not this page.\n\n"
        f"Every method is tuned over at most {BUDGET} settings, by Avg Gap to retraining on validation images; the "
        f"classifier that it enters with is bit-identical when it leaves. {setup(example)}\n\n"
    )
    return head + as_text(rows) + "\n" + "\n".join(method_section(one, example) for one in methods.values())


def metric_section(entry: Metric, example: Example) -> str:
    """Write the section of one metric."""
    measured = example["methods"]
    present = [name for name in BESIDE if name in measured]
    values = ", ".join(f"{METHODS[name].label} {shown(measured[name].get(entry.name))}" for name in present)
    lines = [f"## `{entry.name}` [{entry.unit}]", "", entry.definition, ""]
    lines.append(f"- better: {ARROWS[entry.better]}; target: {entry.target or '-'}")
    lines.append(f"- group: {entry.group} ({GROUPS[entry.group]})")
    lines += [f"- source: {source(entry.source)}"] * bool(entry.source)
    return "\n".join([*lines, f"- example: {values or '-'}"]) + "\n"


def metrics_page(metrics: Mapping[str, Metric], example: Example) -> str:
    """Write the text of docs/metrics.md."""
    rows = [["metric", "unit", "better", "target", "group"]]
    rows += [
        [Markdown(f"`{one.name}`"), one.unit or "-", ARROWS[one.better], one.target or "-", one.group]
        for one in metrics.values()
    ]
    head = (
        "# Metrics\n\nGenerated by `uv run main.py docs`; edit the functions, not this page.\n\n"
        "D_f and D_r: training images of the classes to forget and of all others. T: the judged split, test images for "
        f"the report and validation images for choices. {setup(example)}\n\n"
    )
    sections = "\n".join(metric_section(one, example) for one in metrics.values())
    said = "".join(f"- **{key}**: {text}\n" for key, text in meanings().items())
    tail = (
        "\n## Intervals and verdicts\n\nA record's `intervals` are 95 % intervals over the images of its one run: "
        "Wilson's for shares, the bootstrap's for the mean probability. They say nothing about other training seeds. "
        "`verdicts` rest on answers to the same images: one score is above another if the interval of the paired "
        "difference excludes 0.\n\n"
    )
    costs = "\n## Costs\n\nBeside the metrics, every record has of each method:\n\n"
    costs += "".join(f"- **{name}**: {text}\n" for name, text in COSTS.items())
    return head + as_text(rows) + "\n" + sections + costs + tail + said


def pages(example: Example) -> dict[str, str]:
    """Write every generated page; file name -> text."""
    return {"methods.md": methods_page(METHODS, example), "metrics.md": metrics_page(METRICS, example)}


def write_docs(record: Path | None = None, folder: Path = DOCS) -> list[Path]:
    """Write the pages into a folder; return their paths.

    Args:
        record: a record whose values become the examples from now on; None keeps those in the folder's example.json.
        folder: where the pages and example.json lie.

    Raises:
        UserError: no example can be read.
    """
    place = folder / EXAMPLE
    if record is None and not place.exists():
        raise UserError(f"there is no {place}: give --example RECORD.json, a record of a run")
    example = read_json(place, foreign=True) if record is None else extract(record)
    if not _sound(example):
        raise UserError(f"{place} is no extract of a record: give --example RECORD.json to make it anew")
    texts = pages(example)
    if record is not None:
        write_json(place, example)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
