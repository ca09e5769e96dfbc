"""One HTML page of everything: a single file without references, for `file://`, light and dark, screen and paper.

What must be read without scripts (sentences, tables, provenance, commands) is in the page itself; the slider, the
pickers and the figures are made by the script in `templates/report.html` from the data below. Nothing here needs torch.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from core.artifacts import write_text
from core.config import PROJECT_ROOT, plain
from core.observe import visible
from core.records import SCORES, Record
from core.yaml_files import load_config
from reporting.families import Run, dataset_of, family_key, told_apart
from reporting.panels import Panel, figures_of, forgotten_taken_for
from reporting.tables import (
    caption,
    choose,
    grid,
    headline_pieces,
    is_answered,
    known,
    metrics_of,
    named_classes,
    remarks,
    share_changed,
    table,
    without_records,
)
from reporting.write import Lead

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = PROJECT_ROOT / "reporting" / "templates" / "report.html"
DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "default.yaml"
DIGITS = 4  # significant ones that a value keeps on the page
NO_FLAGS = ("reporter", "output_dir", "tracker", "resume")  # say nothing about the results
PATHS = ("dataset_path", "trained_vision_model_path", "graph_dir", "gcn_path")
ALL_FIGURES = 12  # runs, at most, whose every figure is on the page; of more, those that need no training history


def rounded(value: object) -> object:
    """Round numbers to DIGITS significant digits; a number that is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


# --- the command that makes a run again -------------------------------------------------------------------


@lru_cache
def _defaults() -> dict:
    return plain(load_config([DEFAULT_CONFIG]))


def _flags(values: Mapping, defaults: Mapping, prefix: str = "") -> list[str]:
    """Command-line flags for every value that is not the default."""
    flags = []
    for name, value in values.items():
        known, flag = defaults.get(name), f"--{prefix}{name.replace('_', '-')}"
        if value == known or name in NO_FLAGS or name not in defaults:
            continue
        if isinstance(value, dict):
            flags += _flags(value, known or {}, f"{prefix}{name.replace('_', '-')}.")
        elif isinstance(value, bool):
            flags.append(flag if value else f"--{prefix}no-{name.replace('_', '-')}")
        else:
            flags += [flag, *(map(str, value) if isinstance(value, list) else [_typed(name, value)])]
    return flags


def _typed(name: str, value: object) -> str:
    """Return a value as it may be typed after its flag."""
    text = str(value)
    if name in PATHS and value is not None and (text[:1] in ("-", "~") or text == "None"):
        return f"./{text}"  # else it would be a flag, the home folder or no path at all
    return text


def command(run: Run) -> str:
    """Return the command that makes a run again, from the commit that its provenance names: text for a POSIX shell."""
    config = dict(run[0]["config"])
    config["topK_list"] = sorted({record["top_k"] for record in run})
    if run[0]["auto"] is None:
        config["kappa_list"] = sorted({record["kappa"] for record in run})
    elif "kappa_list" in _defaults():
        config["kappa_list"] = _defaults()["kappa_list"]
    return " ".join(map(_quoted, ["uv", "run", "main.py", "run", *_flags(config, _defaults())]))


def _quoted(word: str) -> str:
    """Return a word for a shell; bytes that are no UTF-8 are spelled out as bash, zsh and ksh read them."""
    if word.isprintable() or not any("\ud800" <= sign <= "\udfff" for sign in word):
        return shlex.quote(word)
    codes = "".join(f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{codes}'"


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
    change = f"{'lose' if lost >= 0 else 'gain'} {abs(lost):.1f} points"
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
    methods = [list(record["labels"])[one.style] for one in panel.series]
    return {"title": panel.title, "ticks": panel.ticks, "methods": methods, "values": [one.y for one in panel.series]}


def _run_data(run: Run, training: Mapping[str, Sequence[Panel]], every: bool) -> dict:
    first, metrics = run[0], list(metrics_of([run], every=False))
    panels = figures_of([run]) | (dict(training) if every else {})
    best = choose(run, first["answer"]) if first["answer"] in first["labels"] else first
    return {
        "id": first["run"],
        "metrics": {name: first["metrics"][name] for name in metrics},
        "labels": first["labels"],
        "answer": first["answer"],
        "chosen": [best["kappa"], best["top_k"]],
        "points": [_point(record, metrics) for record in run] if is_answered(run) else [],
        "samples": first["samples"],
        "layers": [[layer["layer"], *layer["shape"]] for layer in first["mask_map"]],
        "figures": {name: [_slim(panel) for panel in panels] for name, panels in panels.items() if panels},
    }


def _slim(panel: Panel) -> dict:
    """Return a panel without what it does not use."""
    values = asdict(panel)
    values["series"] = [{k: v for k, v in one.items() if v is not None} for one in values["series"]]
    return {name: value for name, value in values.items() if value not in (None, False, [])}


UNANSWERED = "The answer or the untouched classifier has no values."


def _bold(rows: list[list[str]]) -> list[list[tuple[str, bool]]]:
    """Cells, or the pieces of a text, as (text, whether it leads)."""
    return [[(str(cell), isinstance(cell, Lead)) for cell in row] for row in rows]


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
        "record": ", ".join(record["id"] for record in run[:12]) + (" ..." if len(run) > 12 else ""),
    }
    return {
        "id": first["run"],
        "what": f"{first['model']} on {dataset_of(first)}" + (f" ({apart})" if apart else ""),
        "classes": named_classes(first),
        "seed": first["seed"],
        "headline": _bold([headline_pieces(run) if is_answered(run) else [UNANSWERED]])[0],
        "caption": caption(run, apart=apart),
        "rows": _bold(table(run)),
        "all_rows": _bold(table(run, every=True)),
        "facts": facts,
        "command": command(run),
        "points": len(run),
        "remarks": remarks(run),
    }


def _visible(value: object) -> object:
    """Return what the template shows of a value; its own markup and what it counts with pass as they are."""
    return visible(value) if type(value) is str else value


@lru_cache
def _template() -> "Template":
    """Compile the page's template, once for this process."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["pasted"] = _pasted
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


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
    return _template().render(
        runs=[_run_text(run, differs) for group, differs in apart for run in group],
        families=[
            {"caption": caption(*group, apart=differs), "rows": _bold(table(*group)), "key": family_key(group[0])}
            for group, differs in apart
            if len(group) > 1
        ],
        grids=[(name, about, _bold(grid(groups, name))) for name, about in metrics.items()],
        missing=without_records(groups),
        metrics=metrics_of(runs),
        data=text,
    )


def write_page(path: Path, groups: Sequence[list[Run]], training: Mapping[str, Mapping[str, Sequence[Panel]]]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, as_page(groups, training), lasting=False)
