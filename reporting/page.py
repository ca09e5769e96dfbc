"""One HTML page of everything: a single file without references, for `file://`, light and dark, screen and paper.

What must be read without scripts (sentences, tables, provenance, commands) is in the page itself; the slider, the
pickers and the figures are made by the script in `templates/report.js` from the data below. Nothing here needs torch.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup, escape

from core.artifacts import write_text
from core.config import PROJECT_ROOT
from core.observe import visible
from core.records import SCORES, Record, axes_of, record_path
from reporting.families import Run, command, dataset_of, named_classes, told_apart
from reporting.figures import FEATURES, figures_of, forgotten_taken_for
from reporting.panels import Panel, in_style
from reporting.sentences import headline_pieces, is_answered, of_features, remarks, share_changed, warnings
from reporting.tables import caption, choose, grid, known, metrics_of, table, two_digits, without_records
from reporting.write import SHOWN_VALUE, Lead

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = PROJECT_ROOT / "reporting" / "templates"
DIGITS = 4  # significant ones that a value keeps on the page
FIRST, LATER = ("forget_score", "retain_score", "avg_gap"), ("forget_loss", "retain_loss", "forget_probability")
SOME, ON_DEMAND = 3, 4  # metrics that are not in FIRST, of level 3; all other metrics are shown on demand
LEVELS = {"method": 1, "weights changed": 2, "per request": 2, "kappa": 2, "top_k": 3, "verdict": 5}
"""Column -> how much width it needs to be shown (report.css): 1 in any case, 2 and 5 on a tablet, 3 on a desktop."""
ELSEWHERE = ("once per classifier", "one request alone")  # columns that stand below every metric
ACROSS = 6  # columns of values beside each other where all are shown
SECTIONS: tuple[tuple[str, Callable[[str], bool], bool], ...] = (
    ("Over the sweep", lambda name: "_over_" in name and not name.startswith("other_metrics"), True),
    ("What is left inside: probes and relearning, layer by layer", lambda name: name in FEATURES, True),
    ("Classes, weights, time", lambda name: not name.startswith(("other_metrics", "training")), True),
    ("Every other metric over the sweep", lambda name: name.startswith("other_metrics"), False),
    ("Training", lambda name: True, False),
)
"""Title of some figures, which they are (the first that fits counts), whether they are shown at once."""
WORD_OF = {
    "collapsed": "collapsed",
    "too few images": "cannot be told",
    "no-op": "nothing happened",
    "untouched": "nothing happened",
    "half forgotten": "half forgotten",
    "erased to retraining's level": "erased",
    "over-erased": "over-erased",
    "suppressed": "suppressed",
    "head suppression only": "suppressed",
    "outputs only": "suppressed",
}
"""Verdict -> the word that a run's part begins with; of several verdicts the first one here counts."""
NOT_LOOKED = (
    "The answers forget. Whether the features do was not measured in full: for that, run it with --metrics all and "
    "--eval.references 2."
)
ALL_FIGURES = 12  # runs, at most, whose every figure is on the page; of more, those that need no training history


def rounded(value: object) -> object:
    """Round numbers to DIGITS significant digits; a number that is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _pasted(text: str) -> Markup:
    """Text that is copied from the page as it is: parsers of HTML make a line feed of a bare carriage return."""
    return escape(text).replace("\r", Markup("&#13;"))


# --- what the script draws from ---------------------------------------------------------------------------


def sentence(record: Record) -> str:
    """Describe the answer's mask at one point in words."""
    after, before = record["methods"][record["answer"]], record["methods"]["default"]
    if not all(known(values.get(score)) for values in (after, before) for score in SCORES):
        return f"At kappa {record['kappa']:,} there are no values: training diverged, or nothing was measured."
    lost = before["retain_score"] - after["retain_score"]
    verb = "are" if len(record["forget_class"]) > 1 else "is"
    change = f"{'lose' if lost > 0 else 'gain'} {abs(lost):.1f} points" if abs(lost) >= 0.05 else "keep their score"
    return (
        f"At kappa {record['kappa']:,} ({share_changed(record)}) {named_classes(record)} {verb} recognised "
        f"{after['forget_score']:.1f} % of the time; the other classes {change}."
    )


def _map_row(row: Sequence[int], most: int) -> str:
    """Counts as one digit each; scaled down, rounded up, where a cell holds more than 9."""
    return "".join(str(value if most <= 9 else math.ceil(9 * value / most)) for value in row)


def _point(record: Record, metrics: Sequence[str]) -> dict:
    """Return one point of the sweep, for the slider."""
    answer, layers = record["answer"], record["mask_map"]
    said = record["said_of_samples"]
    bars = forgotten_taken_for([[record]])
    return {
        "kappa": record["kappa"],
        "top_k": record["top_k"],
        "sentence": sentence(record),
        "values": {name: [values.get(m) for m in metrics] for name, values in record["methods"].items()},
        "said": {name: said[name] for name in ("default", answer) if said.get(name)},
        "map": [
            [_map_row(row, max(1, *map(max, layer["cells"]))) for row in layer["cells"]] for layer in layers
        ],
        "bars": _shares(record, bars[0]) if bars else None,
    }  # fmt: skip


def _shares(record: Record, panel: Panel) -> dict:
    """Bars of one point: by class, for each of some methods."""
    methods = [in_style(record)[one.style] for one in panel.series]
    return {"title": panel.title, "ticks": panel.ticks, "methods": methods, "values": [one.y for one in panel.series]}


def _names_of_samples(run: Run) -> dict[str, str]:
    """Names of the classes that the images are of or are taken for at any point, by label, where they say more."""
    names = {label: name for one in run for label, name in one["samples"].get("names", {}).items()}
    return {label: visible(name) for label, name in names.items() if name != label}


def _run_data(run: Run, training: Mapping[str, Sequence[Panel]], every: bool) -> dict:
    first, metrics = run[0], list(metrics_of([run], every=False))
    panels = figures_of([run]) | (dict(training) if every else {})
    best = choose(run, first["answer"]) if first["answer"] in first["labels"] else first
    points = [_point(record, metrics) for record in run] if is_answered(run) else []
    beside_slider = ("mask_map", "forgotten_taken_for") if points else ()
    figures = {name: [_slim(one) for one in found] for name, found in panels.items() if found}
    figures = {name: found for name, found in figures.items() if name not in beside_slider}
    return {
        "id": first["run"],
        "metrics": {name: first["metrics"][name] for name in metrics},
        "levels": levels_of(metrics),
        "labels": {name: first["labels"][name] for name in in_style(first)},
        "swept": [name for name in first["labels"] if "kappa" in axes_of(first, name)],
        "answer": first["answer"],
        "chosen": [best["kappa"], best["top_k"]],
        "points": points,
        "samples": first["samples"] | {"names": _names_of_samples(run)},
        "layers": [[layer["layer"], *layer["shape"]] for layer in first["mask_map"]],
        "figures": figures,
        "groups": _sections([name for name in figures if name != "trade_off"]),
    }


def _sections(names: Sequence[str]) -> list[dict]:
    """Put figures below titles, in the order of SECTIONS."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(next(place for place, (_, fits, _) in enumerate(SECTIONS) if fits(name)), []).append(name)
    return [{"title": SECTIONS[n][0], "names": found[n], "open": SECTIONS[n][2]} for n in sorted(found)]


def _slim(panel: Panel) -> dict:
    """Return a panel without what it does not use."""
    values = asdict(panel)
    values["series"] = [{k: v for k, v in one.items() if v is not None} for one in values["series"]]
    return {name: value for name, value in values.items() if value not in (None, False, [])}


# --- what a run's part begins with ------------------------------------------------------------------------

UNANSWERED = "The answer or the untouched classifier has no values."


def word_of(record: Record, method: str) -> tuple[str, str]:
    """Put in a word what a method did at a point, by WORD_OF; also return what the word rests on, as a sentence.

    A method with none of these verdicts has forgotten the classes. Nothing has shown that the features are rid of them,
    so that it counts as suppression.
    """
    said = {one["key"]: one["sentence"] for one in record["verdicts"][method]}
    key = next((key for key in WORD_OF if key in said), None)
    return (WORD_OF[key], f"{said[key][:1].upper()}{said[key][1:]}.") if key else ("suppressed", NOT_LOOKED)


def costs(record: Record) -> list[tuple[str, str, str]]:
    """List what the answer cost at a point: (what, value, what to hold it against), as far as it was measured."""
    after, before = (record["methods"][name] for name in (record["answer"], "default"))
    retrained = record["methods"].get("retrain", {}).get("seconds")
    versus = f"retraining: {two_digits(retrained)} s" if known(retrained) else "for the mask"
    seconds, prepared = (two_digits(after.get(name)) for name in ("seconds", "seconds_offline"))
    change = after["retain_score"] - before["retain_score"]
    found: list[tuple[str, object, str, str]] = [
        ("weights changed", after["weights_changed"], "{:,}", share_changed(record)),
        ("other classes", change, "{:+.1f} points", f"{before['retain_score']:.1f} to {after['retain_score']:.1f} %"),
        ("worst other class", after.get("worst_retained_drop"), "{:.1f} points", "lost by the one that loses most"),
        ("Avg Gap", two_digits(after.get("avg_gap")), "{} points", "from a retrained model, mean of four percentages"),
        ("time", seconds, "{} s", versus),
        ("before any request", prepared, "{} s", "once for all requests, on this machine"),
        ("size of the change", after.get("edit_bytes"), "{:,} bytes", "to be stored"),
    ]
    return [
        (what, shape.format(value), note)
        for what, value, shape, note in found
        if isinstance(value, str) or known(value)
    ]


def _opening(run: Run) -> dict:
    """Return what the answer did in a word and a sentence, and what it cost, at its chosen point."""
    nothing = {"word": "no values", "sentence": UNANSWERED, "because": "", "costs": [], "features": [], "links": {}}
    if not is_answered(run):
        return nothing
    record = choose(run, run[0]["answer"])
    word, because = word_of(record, record["answer"])
    places = {"mask": Path(record["mask_path"]), "record": record_path(Path(), record)}
    return {
        "word": word,
        "because": because,
        "sentence": headline_pieces(run)[0],
        "features": _bold([of_features(record)])[0],
        "costs": costs(record),
        "links": {name: {"href": quote(os.fsencode(f"../{path}")), "text": path.name} for name, path in places.items()},
    }


# --- tables -----------------------------------------------------------------------------------------------


def _bold(rows: list[list[str]]) -> list[list[tuple[str, bool]]]:
    """Cells, or the pieces of a text, as (text, whether it leads)."""
    return [[(str(cell), isinstance(cell, Lead)) for cell in row] for row in rows]


def levels_of(metrics: Sequence[str]) -> dict[str, int]:
    """Column -> its level (LEVELS), of a table with some metrics."""
    others = [name for name in metrics if name not in FIRST + LATER]
    levels = {**dict.fromkeys(metrics, ON_DEMAND), **dict.fromkeys(others[:SOME], 3), **dict.fromkeys(FIRST, 1)}
    return levels | LEVELS


def sheet(rows: list[list[str]], about: str, levels: Mapping[str, int] | None = None) -> dict:
    """Return a table for the template: columns with their levels, cells with what stands behind their value."""
    of = [1 if levels is None else levels.get(text.partition(" [")[0], 3) for text in rows[0]]
    head = [{"text": text, "level": level} for text, level in zip(rows[0], of, strict=True)]
    body = [[_cell(text) | {"level": level} for text, level in zip(row, of, strict=True)] for row in rows[1:]]
    return {"about": about, "head": head, "rows": body, "more": len(set(of)) > 1}


def _cell(text: str) -> dict:
    """Take a cell apart: its value, its interval if it has one, whether it leads."""
    value, sign, rest = next((text.partition(sign) for sign in (" ±", " [") if sign in text), (text, "", ""))
    if not SHOWN_VALUE.fullmatch(text):
        value, sign, rest = text, "", ""
    return {"text": str(value), "limits": (sign + rest).strip(), "lead": isinstance(text, Lead)}


def by_priority(rows: list[list[str]], metrics: Sequence[str]) -> list[list[str]]:
    """Order a table's columns: scores, other metrics, budgets, cost, verdict; without ELSEWHERE and an empty top_k."""
    names = [text.partition(" [")[0] for text in rows[0]]
    own = [name for name in names if name not in ("method", "kappa", "top_k", *metrics, *ELSEWHERE)]
    others = [name for name in metrics if name not in FIRST + LATER]
    order = ["method", *FIRST, *others, *LATER, "kappa", "top_k", *own]
    places = [names.index(name) for name in order if name in names]
    places = [place for place in places if names[place] != "top_k" or any(row[place] != "-" for row in rows[1:])]
    return [[row[place] for place in places] for row in rows]


def _priority_sheet(runs: Sequence[Run], about: str) -> dict:
    metrics = list(metrics_of(runs, every=False))
    return sheet(by_priority(table(*runs), metrics), about, levels_of(metrics))


def in_parts(rows: list[list[str]], fixed: int, about: str, across: int = ACROSS) -> list[dict]:
    """Cut a wide table into several, each with the first `fixed` columns and `across` others."""
    places = range(fixed, len(rows[0]), across)
    parts = [[row[:fixed] + row[place : place + across] for row in rows] for place in places]
    return [sheet(part, about if not number else f"{about} ({number + 1})") for number, part in enumerate(parts)]


def _every_metric(run: Run) -> list[dict]:
    rows, metrics = table(run, every=True), len(metrics_of([run]))
    costs = [place for place, text in enumerate(rows[0]) if text.partition(" [")[0] in ELSEWHERE]
    return in_parts([[row[0], *row[3 : 3 + metrics], *(row[one] for one in costs)] for row in rows], 1, "every metric")


def _grid_sheets(groups: Sequence[list[Run]], metric: str, about: Mapping) -> dict:
    rows = grid(groups, metric)
    fixed = rows[0].index("runs") + 1
    parts = in_parts(rows, fixed, f"{metric}: {about.get('definition', '')}")
    return {"name": f"{metric} [{about['unit']}]", "parts": parts}


# --- the page ---------------------------------------------------------------------------------------------


def _run_text(run: Run, apart: str) -> dict:
    """Return what the page says of a run in itself; `apart`: what tells its family from others of the same name."""
    first = run[0]
    about = first["provenance"]
    plugins = about["plugins"]
    facts = {
        "commit": f"{about['commit'] or 'unknown'}{' (changed files)' if about['dirty'] else ''}",
        "started": about["started"],
        "device": about["device"],
        "repeatability": about["repeatability"],
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in about["seconds"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in about["versions"].items()),
        **({"plugins": ", ".join(f"{name} (sha256 {value})" for name, value in plugins.items())} if plugins else {}),
        "records": ", ".join(record["id"] for record in run[:12]) + (" ..." if len(run) > 12 else ""),
    }
    return _opening(run) | {
        "id": first["run"],
        "what": f"{first['model']} on {dataset_of(first)}" + (f" ({apart})" if apart else ""),
        "classes": named_classes(first),
        "name": f"seed {first['seed']}",  # runs of the same family and classes differ in nothing else
        "warnings": warnings(run),
        "caption": caption(run, apart=apart),
        "table": _priority_sheet([run], caption(run, apart=apart)),
        "every": _every_metric(run),
        "facts": facts,
        "command": command(run),
        "points": len(run),
        "remarks": remarks(run),
    }


def _visible(value: object) -> object:
    """Return what the template shows of a value; its own markup and what it counts with pass as they are."""
    return visible(value) if type(value) is str else value


@lru_cache
def template(name: str, folder: Path = TEMPLATES) -> "Template":
    """Compile a page's template, once for this process.

    Args:
        folder: where it lies. It may import parts of TEMPLATES; `"X" | verbatim` in it is a file of either folder.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def verbatim(part: str) -> Markup:
        return Markup(next(path for one in folders if (path := one / part).is_file()).read_text("utf-8"))

    folders = (folder, TEMPLATES)
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pasted"] = _pasted
    environment.filters["verbatim"] = verbatim
    return environment.get_template(name)


def as_page(groups: Sequence[list[Run]], training: Mapping[str, Mapping[str, Sequence[Panel]]]) -> str:
    """Return the page, as text.

    Args:
        groups: families of runs. training: run -> name -> panels of training curves.
    """
    runs = [run for group in groups for run in group]
    metrics, apart = metrics_of(runs, every=False), list(zip(groups, told_apart(groups), strict=True))
    data = [_run_data(run, training.get(run[0]["run"], {}), len(runs) <= ALL_FIGURES) for run in runs]
    text = json.dumps(rounded(data), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":  # so that no text in it ends the script element
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    texts = [_run_text(run, differs) for group, differs in apart for run in group]
    one = texts[0]
    return template("report.html").render(
        title=f"MIMU: {one['classes']} {one['word']}" if len(texts) == 1 else f"MIMU: {len(texts)} runs",
        runs=texts,
        families=[_priority_sheet(group, caption(*group, apart=differs)) for group, differs in apart if len(group) > 1],
        grids=[_grid_sheets(groups, name, about) for name, about in metrics.items()] if len(groups) > 1 else [],
        missing=without_records(groups),
        metrics=metrics_of(runs),
        data=text,
    )


def write_page(path: Path, groups: Sequence[list[Run]], training: Mapping[str, Mapping[str, Sequence[Panel]]]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, as_page(groups, training), lasting=False)
