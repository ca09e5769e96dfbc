"""Records -> tables, figures and the HTML page, from the JSON files alone (no torch, no dataset).

In `reporting/`, `tables` chooses points and makes tables, `panels` declares figures, `draw` draws them, `page` writes
the page and `compare` holds runs against each other; this file says what is written where, and what is there already.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from core.artifacts import HISTORY, DamagedError, read_json, write_text
from core.config import ReporterConfig, UserError, plain
from core.hashes import code_key, key_of, load_plugins, loaded_plugins
from core.observe import log, progress, visible, working
from core.records import Record, read_records
from core.store import read_manifest, write_manifest
from reporting.compare import compared, find_side
from reporting.draw import save_all
from reporting.families import Run, families, family_key, runs_of, told_apart
from reporting.figures import figures_of, training
from reporting.page import write_page
from reporting.panels import Panel
from reporting.sentences import answer_of
from reporting.tables import caption, grid, known, metrics_of, table, without_records
from reporting.write import as_csv, as_latex, as_text

PAGE = Path("reports/index.html")


def drawn_in(folder: Path) -> dict:
    """Read what a folder holds and what it was made from; an empty dict, with a line in the log, if it is damaged."""
    try:
        return read_manifest(folder) or {}
    except DamagedError as error:
        log(f"report: {error.found}, so that the folder is drawn anew")
        return {}


def _curves(path: Path) -> list[dict] | None:
    """Read the training curves of a file; None, with a line in the log, if it holds none."""
    try:
        history = read_json(path).get("history")
        sound = isinstance(history, list) and all(isinstance(entry, dict) and "step" in entry for entry in history)
        found = f"{path} holds no training curves"
    except UserError as error:
        sound, history, found = False, None, error.found if isinstance(error, DamagedError) else str(error)
    if not sound:
        log(f"left out: {found}")
    return history if sound else None


def _panels(name: str, history: list[dict]) -> list[Panel]:
    return training(history, "gcn" if "gcn" in name else "classifier", name.removeprefix("training_"))


def write_table(folder: Path, name: str, rows: list[list[str]], about: str) -> None:
    """One table as Markdown, CSV and LaTeX."""
    write_text(folder / f"{name}.md", as_text(rows), lasting=False)
    write_text(folder / f"{name}.csv", as_csv(rows), lasting=False)
    write_text(folder / f"{name}.tex", as_latex(rows, about), lasting=False)


class Reporter:
    """Writes tables, figures and the page from the records below an output folder.

    Args:
        output_dir: the folder whose `eval/metrics_and_plots/json` holds the records.
    """

    def __init__(self, output_dir: Path, config: ReporterConfig | None = None):
        self.output_dir, self.config = output_dir, config or ReporterConfig()
        self.plots = output_dir / "eval" / "metrics_and_plots" / "plots"
        self.page = output_dir / PAGE

    def plot(self, records: Run | None = None) -> list[Path]:
        """Write tables and figures, a folder for each run and each family of several runs; then the grid and the page.

        Args:
            records: of the runs to draw (None: all that are there). Families, grid and page are of all in any case.

        Returns:
            The folders of the runs.

        Raises:
            UserError: there are no records.
        """
        there = read_records(self.output_dir)
        records = records if records is not None else there
        if not records:
            raise UserError(f"there are no records below {self.output_dir}: make some with `uv run main.py`")
        found = {record["id"] for record in there}
        every = runs_of([*there, *(record for record in records if record["id"] not in found)])
        histories = {run[0]["run"]: self._histories(run) for run in every}
        drawn = [
            self._plot([run], self.run_name(run[0]), histories[run[0]["run"]])
            for run in progress(runs_of(records), "report")
        ]
        groups = families(every)
        for runs, apart in zip(groups, told_apart(groups), strict=True):
            if len(runs) > 1:
                self._plot(runs, self.family_name(runs), {}, apart)
        self._plot_grid(groups)
        training = {run: {name: _panels(name, curves) for name, curves in h.items()} for run, h in histories.items()}
        write_page(self.page, groups, training)
        log(f"report: {self.page}")
        return drawn

    def _plot(self, runs: list[Run], name: str, histories: dict[str, list[dict]], apart: str = "") -> Path:
        """Write tables and figures of one run, with its training curves, or of a family; `apart`: from others."""
        folder = self.plots / name
        inputs = {"runs": runs, "apart": apart, "config": plain(self.config), "code": code_key("reporter")}
        plugins = list(load_plugins(loaded_plugins()).values())
        key, made = key_of(inputs | {"histories": histories, "plugins": plugins}), drawn_in(folder)
        if made.get("key") == key:
            log(f"report: unchanged, {folder}")
            return folder
        write_table(folder, "table", table(*runs), caption(*runs, apart=apart))
        write_table(folder, "table_all", table(*runs, every=True), caption(*runs, apart=apart))
        curves = {name: _panels(name, history) for name, history in histories.items()}
        drawn = figures_of(runs) | curves if self.config.formats else {}
        keys = {figure: self._figure_key(panels) for figure, panels in drawn.items()}
        changed = {figure: drawn[figure] for figure in drawn if made.get("figures", {}).get(figure) != keys[figure]}
        with working(f"report: drawing {len(changed)} figures") if changed else nullcontext():
            save_all(changed, folder, self.config)
        write_manifest(folder, {"key": key, "figures": keys})
        kept = f" ({len(drawn) - len(changed)} of them unchanged)" if len(changed) < len(drawn) else ""
        log(f"report: {len(drawn)} figures{kept} and tables of {sum(map(len, runs))} points in {folder}")
        return folder

    def _figure_key(self, panels: Sequence[Panel]) -> str:
        """Hash what a figure's files are made from."""
        shown = [asdict(panel) for panel in panels]
        return key_of({"panels": shown, "config": plain(self.config), "code": code_key("reporting.draw")})

    @staticmethod
    def scores(record: Record) -> dict[str, float]:
        """Return what is shown first of a point: "method: metric" -> value, as far as it is known; and the point."""
        shown = [*metrics_of([[record]], every=False), "weights_changed", "seconds"]
        found = {
            f"{record['labels'][name]}: {metric}": values[metric]
            for name, values in record["methods"].items()
            for metric in shown
            if known(values.get(metric))
        }
        return {"kappa": record["kappa"], "top_k": record["top_k"], **found}

    def final(self, records: Run) -> dict[str, float]:
        """Return the same of the answer at its chosen point: "answer: kappa", "answer: forget_score" and so on."""
        chosen = answer_of(records)
        if chosen is None:
            return {}
        label = chosen["labels"][chosen["answer"]]
        own = {name.removeprefix(f"{label}: "): value for name, value in self.scores(chosen).items()}
        return {f"answer: {name}": value for name, value in own.items() if ": " not in name}

    def compare(self, names: Sequence[str]) -> str:
        """Hold runs against the first one named; the tables go to reports/compare-*.md, .csv and .tex as well.

        Args:
            names: output folders, or ids of runs below this one's; at least two.

        Raises:
            UserError: fewer than two, one that is not there, or nothing in common.
        """
        if len(names) < 2:
            raise UserError(f"compare needs two runs or folders, found {len(names)}: name the other one too")
        first, *others = (find_side(name, self.output_dir) for name in names)
        said = []
        for number, found in enumerate([compared(first, other) for other in others], 1):
            place = self.page.parent / f"compare-{number}"
            write_table(place.parent, place.name, found.rows, found.about)
            said.append(f"{as_text(found.rows)}\n{visible(found.about)}\nwritten to {place}.md, .csv and .tex")
        return "\n\n".join(said)

    def _plot_grid(self, groups: list[list[Run]]) -> None:
        """Every metric that is shown first, over every model and dataset."""
        folder = self.plots / "grid"
        missing = without_records(groups)
        for metric, about in metrics_of([run for runs in groups for run in runs], every=False).items():
            what = f"{metric} [{about['unit']}] over every model and dataset, mean ± 95 % interval over seeds"
            what += f"; no records of: {', '.join(missing)}" if missing else ""
            write_table(folder, metric, grid(groups, metric), what)

    @staticmethod
    def run_name(record: Record) -> str:
        """Name a run's folder."""
        classes = "-".join(map(str, record["forget_class"]))
        return f"{record['model']}_{record['dataset']}_class-{classes}_seed-{record['seed']}_{record['run']}"

    @staticmethod
    def family_name(runs: list[Run]) -> str:
        """Name a family's folder."""
        first = runs[0][0]
        return f"{first['model']}_{first['dataset']}_over-runs_{family_key(runs[0])}"

    def _histories(self, records: Run) -> dict[str, list[dict]]:
        """Training curves that lie beside the classifier and each top_k's GCN."""
        files = {"training_classifier": records[0]["classifier_path"]}
        for record in records:
            name = f"training_gcn_top-{record['top_k']}" if record["objective"] == "elbo" else "training_gcn"
            files[name] = record["gcn_path"]
        paths = {name: self.output_dir / Path(file).parent / HISTORY for name, file in files.items()}
        found = {name: _curves(path) for name, path in paths.items() if path.exists()}
        return {name: curves for name, curves in found.items() if curves is not None}
