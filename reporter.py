"""Records -> tables and figures, from the JSON files alone (no torch, no dataset).

Methods, metrics, units and axes are read from the records: a new method or metric shows up by itself.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts import (
    HISTORY,
    MANIFEST,
    code_key,
    key_of,
    read_json,
    read_records,
    sha256_file,
    write_json,
    write_text,
    writing,
)
from config import ReporterConfig, UserError, plain
from observe import log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
MOST_BARS = 20
ARROWS = {"higher": "up", "lower": "down", "retrain": "as retrained"}
METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class Curve:
    """A figure of metrics over kappa: one panel per metric, one line per method (and topK)."""

    name: str
    metrics: tuple[str, ...]


CURVES = (
    Curve("loss_over_kappa", ("forget_loss", "retain_loss")),
    Curve("score_over_kappa", ("forget_score", "retain_score")),
    Curve("forget_probability_over_kappa", ("forget_probability",)),
)


@dataclass(frozen=True)
class Best:
    """A method's chosen point: topK and kappa as far as it depends on them, and its test figures."""

    method: str
    label: str
    top_k: int | None
    kappa: int | None
    values: dict[str, float]
    verdicts: list[dict[str, str]]


def choose(records: Iterable[dict], method: str) -> dict:
    """The record where a method does best on *validation* images.

    That is the smallest Avg Gap to retraining, else (nothing was retrained) the largest retain minus forget score;
    ties go to the smaller kappa, then the smaller topK.
    """

    def rank(record: dict) -> tuple[float, int, int]:
        values = record["validation"][method]
        gap = values.get("avg_gap")
        lost = values["forget_score"] - values["retain_score"] if gap is None else gap
        return lost, record["kappa"], record["top_k"]

    return min((r for r in records if method in r["validation"]), key=rank)


def _verdicts(record: dict, method: str) -> list[dict[str, str]]:
    """What a record says against a method; nothing in records from before there were verdicts."""
    return record.get("verdicts", {}).get(method, [])


def best_points(records: list[dict]) -> list[Best]:
    """Each method's chosen point, in the order of the records."""
    names = dict.fromkeys(name for record in records for name in record["labels"])
    found = []
    for name in names:
        record = choose(records, name)
        axes = record["axes"][name]
        top_k, kappa = (record[key] if axis in axes else None for key, axis in (("top_k", "topK"), ("kappa", "kappa")))
        found.append(Best(name, record["labels"][name], top_k, kappa, record["methods"][name], _verdicts(record, name)))
    return found


def table(records: list[dict]) -> list[list[str]]:
    """Header and one row per method: its chosen point and its test figures, those metrics that are shown first."""
    metrics = {name: about for name, about in records[0]["metrics"].items() if about.get("first", True)}
    head = [f"{name} [{about['unit']}, {ARROWS[about['better']]}]" for name, about in metrics.items()]
    points = best_points(records)
    judged = any(best.verdicts for best in points)
    rows = [["method", "topK", "kappa", *head, "weights changed", "seconds", *["verdict"] * judged]]
    for best in points:
        shown = ["-" if value is None else str(value) for value in (best.top_k, best.kappa)]
        figures = ["-" if best.values[name] is None else f"{best.values[name]:.4g}" for name in metrics]
        said = [", ".join(one["key"] for one in best.verdicts) or "-"] * judged
        cost = [str(best.values["weights_changed"]), f"{best.values['seconds']:.3f}"]
        rows.append([best.label, *shown, *figures, *cost, *said])
    return rows


def remarks(records: list[dict]) -> list[str]:
    """The verdicts in whole sentences, each with the methods that it is on; of faultless ones what was unchecked."""
    said: dict[str, list[str]] = {}
    for best in best_points(records):
        for one in best.verdicts:
            said.setdefault(one["sentence"], []).append(best.label)
    return [f"{', '.join(labels)}: {sentence}." for sentence, labels in said.items() if sentence != "nothing found"]


def as_text(rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it reads well on a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def as_csv(rows: list[list[str]]) -> str:
    """The same rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def classes_of(record: dict) -> str:
    """ "class 0", or "classes 0 and 3"."""
    named = record["forget_class"]
    if not isinstance(named, list):
        return f"class {named}"
    return "classes " + ", ".join(map(str, named[:-1])) + f" and {named[-1]}"


def headline(records: list[dict]) -> str:
    """The run's answer in words, from the chosen point of the method that gives it."""
    record = choose(records, records[0]["answer"])
    after, before = record["methods"][record["answer"]], record["methods"]["default"]
    share = 100 * after["weights_changed"] / record["num_graph_vertices"]
    layers = "masked layers" if isinstance(record["mask_layer"], list) else "layer"
    is_or_are, them = ("are", "them") if isinstance(record["forget_class"], list) else ("is", "it")
    text = (
        f"Switching off {after['weights_changed']} weights ({share:.1f} % of the {layers}), {classes_of(record)} "
        f"{is_or_are} recognised {after['forget_score']:.1f} % of the time (before: "
        f"{before['forget_score']:.1f} %); the other classes score {after['retain_score']:.1f} % "
        f"(before: {before['retain_score']:.1f} %)."
    )
    auto = record["auto"]
    if auto and not auto["achieved"]:
        target = f"forget score <= {auto['tau']} %, retain score at most {auto['epsilon']} points lower"
        text = (
            f"Not achievable: no kappa tried shows {target}, with 95 % intervals on validation images. The best "
            f"trade-off found, not to be taken for {them} forgotten: {text}"
        )
    return text


def is_drawn(folder: Path, key: str) -> bool:
    """Whether a folder's manifest is for `key` and its files are there."""
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return False
    return manifest.get("key") == key and all((folder / name).exists() for name in manifest.get("files", []))


class Reporter:
    """Draws and writes what the records below an output folder say.

    Args:
        output_dir: the folder whose `eval/metrics_and_plots/json` holds the records.
    """

    def __init__(self, output_dir: Path, config: ReporterConfig | None = None):
        self.output_dir, self.config = output_dir, config or ReporterConfig()
        self.plots = output_dir / "eval" / "metrics_and_plots" / "plots"

    def plot(self, records: list[dict] | None = None) -> list[Path]:
        """Tables and figures, one folder per run (records that differ in topK and kappa alone).

        Returns:
            The folders.

        Raises:
            UserError: there are no records.
        """
        records = records if records is not None else read_records(self.output_dir)
        if not records:
            raise UserError(f"there are no records below {self.output_dir}: make some with `uv run main.py`")
        runs: dict[str, list[dict]] = {}
        for record in records:
            runs.setdefault(record["run"], []).append(record)
        return [self._plot_run(run) for run in runs.values()]

    def _plot_run(self, records: list[dict]) -> Path:
        records = sorted(records, key=lambda record: (record["top_k"], record["kappa"]))
        folder = self.plots / self.run_name(records[0])
        histories = self._histories(records)
        inputs = {"records": records, "config": plain(self.config), "code": code_key("reporter.py", "artifacts.py")}
        key = key_of(inputs | {name: sha256_file(path) for name, (path, _) in histories.items()})
        if is_drawn(folder, key):
            log(f"report: unchanged, {folder}")
            return folder
        rows = table(records)
        write_text(folder / "table.md", as_text(rows))
        write_text(folder / "table.csv", as_csv(rows))
        drawn = {curve.name: _draw_curve(records, curve) for curve in CURVES}
        drawn["trade_off"] = _draw_trade_off(records)
        answer = records[0]["answer"]
        if answer in records[0]["labels"]:
            drawn["weight_histogram"] = _draw_histogram(choose(records, answer))
            drawn["class_probability"] = _draw_bars(choose(records, answer))
        drawn |= {name: _draw_history(path, name, terms) for name, (path, terms) in histories.items()}
        for name, figure in drawn.items():
            self._save(figure, folder, name)
        write_json(folder / MANIFEST, {"key": key, "files": sorted(path.name for path in folder.glob("[!.]*.*"))})
        log(f"report: {len(drawn)} figures and tables of {len(records)} points in {folder}")
        return folder

    @staticmethod
    def run_name(record: dict) -> str:
        """Name of a run's folder."""
        named = record["forget_class"]
        classes = "-".join(map(str, named)) if isinstance(named, list) else named
        return f"{record['model']}_{record['dataset']}_class-{classes}_seed-{record['seed']}_{record['run']}"

    def _histories(self, records: list[dict]) -> dict[str, tuple[Path, tuple[str, ...]]]:
        """Training curves that lie beside the classifier and each topK's GCN: name -> (file, what to draw)."""
        kinds = {"training_classifier": (records[0]["classifier_path"], ("loss", "val_loss", "val_score", "grad_norm"))}
        for record in records:
            if record["objective"] == "elbo":
                kinds[f"training_gcn_top-{record['top_k']}"] = (
                    record["gcn_path"],
                    ("loss", "nll", "kl", "temperature"),
                )
            else:
                kinds["training_gcn"] = (record["gcn_path"], ("loss", "forget", "retain", "temperature"))
        paths = {name: (self.output_dir / Path(file).parent / HISTORY, terms) for name, (file, terms) in kinds.items()}
        return {name: (path, terms) for name, (path, terms) in paths.items() if path.exists()}

    def _save(self, figure: "Figure", folder: Path, name: str) -> None:
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "mimu"}):
            for kind in self.config.formats:
                with writing(folder / f"{name}.{kind}") as path:
                    figure.savefig(path, format=kind, dpi=self.config.dpi, metadata=METADATA[kind])


# --- drawing ----------------------------------------------------------------------------------------------


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def _name(record: dict, metric: str) -> str:
    about = record["metrics"][metric]
    return f"{metric.replace('_', ' ')} [{about['unit']}], {about['better']} is better"


def _series(records: list[dict], method: str) -> list[tuple[str, list[dict]]]:
    """(label, records in order of kappa) for each line of a method: one per topK if it depends on it."""
    record = records[0]
    label, axes = record["labels"][method], record["axes"][method]
    if "topK" not in axes:
        seen = {r["kappa"]: r for r in records}
        return [(label, [seen[kappa] for kappa in sorted(seen)])]
    return [
        (f"{label}, topK {k:,}", [r for r in records if r["top_k"] == k]) for k in sorted({r["top_k"] for r in records})
    ]


def _lines(records: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(method, label, records) of every line of a figure, in a fixed order."""
    return [(m, label, rs) for m in records[0]["labels"] for label, rs in _series(records, m)]


def _draw_curve(records: list[dict], curve: Curve) -> "Figure":
    figure, axes = _figure(len(curve.metrics))
    for ax, metric in zip(axes, curve.metrics, strict=True):
        for place, (method, label, chosen) in enumerate(_lines(records)):
            colour, values = COLOURS[place % len(COLOURS)], [r["methods"][method][metric] for r in chosen]
            if "kappa" in chosen[0]["axes"][method]:
                marker = MARKERS[place % len(MARKERS)]
                ax.plot([r["kappa"] for r in chosen], values, marker=marker, ms=4, color=colour, label=label)
            else:
                ax.axhline(values[0], color=colour, ls="--", lw=1.2, label=label)
        ax.set_xlabel("kappa (weights switched off)")
        ax.set_title(_name(records[0], metric), fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_trade_off(records: list[dict]) -> "Figure":
    figure, (ax,) = _figure(1)
    for place, (method, label, chosen) in enumerate(_lines(records)):
        points = chosen if "kappa" in chosen[0]["axes"][method] else chosen[:1]
        x, y = ([r["methods"][method][metric] for r in points] for metric in ("forget_score", "retain_score"))
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        ax.plot(x, y, ms=5, lw=1, alpha=0.9, label=label, color=colour, marker=marker)
    ax.set_xlabel(_name(records[0], "forget_score"))
    ax.set_ylabel(_name(records[0], "retain_score"), fontsize=8)
    ax.set_title("trade-off: top left is best", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _draw_histogram(record: dict) -> "Figure":
    figure, (ax,) = _figure(1)
    data = record["weight_histogram"]
    for place, name in enumerate(("kept", "switched_off")):
        ax.stairs(data[name], data["edges"], fill=True, alpha=0.6, color=COLOURS[place], label=name.replace("_", " "))
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("weight W_ij")
    ax.set_ylabel("count")
    ax.set_title(f"the mask of {record['labels'][record['answer']]}, kappa {record['kappa']:,}", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return figure


def _draw_bars(record: dict) -> "Figure":
    """Mean predicted probability of each class on the forget set; beyond MOST_BARS classes the largest ones."""
    names = [name for name in ("default", record["answer"]) if name in record["labels"]]
    data = {name: record["class_probability"][name] for name in names}
    count = len(data[record["answer"]])
    shown = sorted(sorted(range(count), key=lambda c: -max(values[c] for values in data.values()))[:MOST_BARS])
    figure, (ax,) = _figure(1)
    for place, (name, values) in enumerate(data.items()):
        x = [i + 0.4 * place for i in range(len(shown))]
        ax.bar(x, [values[c] for c in shown], width=0.4, color=COLOURS[place], label=record["labels"][name])
    ax.set_xticks([i + 0.2 for i in range(len(shown))], [str(c) for c in shown], fontsize=8)
    ax.set_xlabel("class" if count <= MOST_BARS else f"class (the {MOST_BARS} largest of {count})")
    ax.set_ylabel("mean probability on the forget set")
    ax.set_title(f"where {classes_of(record)} goes", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return figure


def _draw_history(path: Path, name: str, terms: tuple[str, ...]) -> "Figure":
    from json import loads

    history = loads(path.read_text(encoding="utf-8"))
    figure, axes = _figure(len(terms))
    for ax, term in zip(axes, terms, strict=True):
        points = [(entry["step"], entry[term]) for entry in history if term in entry]
        ax.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 20 else None, ms=3)
        ax.set_xlabel("step")
        ax.set_title(f"{name}: {term}", fontsize=9)
    return figure
