"""Every method against every metric, by one rule for all: the tables of rivals in docs/results.md.

    uv run benchmarks/comparison.py                            one class, one seed: 3 minutes on one core
    uv run benchmarks/comparison.py --classes 0 1 2 3 4 5 6 7 8 9 --seeds 0 1 2 3 4 --but cola contrastive pour_d
    uv run benchmarks/comparison.py --model HookedResnet --classes 0 3 8 --references 1
    [--methods NAME ...] [--json PATH] [--markdown PATH] [--output-dir DIR] [--docs]

Fashion-MNIST; MLP: all images, batch 128, 8 epochs; ResNet-18: 12,000 images, 2 epochs. The graph network is the
shipped one, which has seen none of these classifiers. Settings (at most 5 a method) and kappa (5 values) are chosen for
every cell, a class of a classifier, by Avg Gap to the retrained models on validation images and one half of the
training images; results are of test images and the other half. What is measured is kept cell by cell below the output
folder: a second run, or two at once over different seeds, only adds. Metrics that look at features of every layer are
left to benchmarks/features.py.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.classifiers import Recipe, stages_of
from benchmarks.common import Tables, for_pages, keep, parser, publish_all

from core.artifacts import read_json, write_json, write_text
from core.config import PROJECT_ROOT, EvalConfig, PipelineConfig, SupportedDatasets, SupportedVisionModels
from core.hashes import code_key, key_of, provenance, sha256_file
from core.intervals import Cell, against, over_seeds, within_seeds
from eval import Eval
from pipeline import Pipeline
from reporting.sentences import TERMS, saturated
from reporting.tables import SPENT
from reporting.write import as_text
from rivals.compared import METHODS
from training.processes import reuse_freed_memory
from unlearn.registry import Point
from utils_data import UnlearningDataset

GCNS = {
    SupportedVisionModels.HookedMLPClassifier: PROJECT_ROOT / "pretrained" / "gcn_mlp.safetensors",
    SupportedVisionModels.HookedResnet: PROJECT_ROOT / "pretrained" / "gcn_resnet.safetensors",
}
KAPPAS = {
    SupportedVisionModels.HookedMLPClassifier: (64, 128, 200, 256, 400),
    SupportedVisionModels.HookedResnet: (164, 328, 655, 1638, 3277),
}
NAMES = {  # of the tables in docs/results/
    SupportedVisionModels.HookedMLPClassifier: "comparison_mlp",
    SupportedVisionModels.HookedResnet: "comparison_resnet",
}
COLUMNS = {
    "forget_score": "forget %",
    "forget_probability": "p forget",
    "retain_score": "retain %",
    "worst_retained_drop": "worst class",
    "avg_gap": "Avg Gap",
    "ToW": "ToW",
    "KL_forget": "KL",
    "routing_TV": "routing",
    "class_MIA_auc": "MIA AUC",
    "probe_gap": "probe gap",
    "relearn_10": "relearn 10",
    "weights_changed": "weights",
    "seconds": "seconds",
}
PLAIN = ("weights_changed", *SPENT.values())  # said without an interval
SAID_OF_P = (
    "± is the 95 % t interval over seeds, p a t test of the seeds' means, corrected for the number of methods by Holm; "
    "flips is the permutation test that turns the signs of whole seeds, and least the smallest p that it can give."
)


@dataclass(frozen=True)
class Plan:
    """Which cells, and what is measured in each."""

    model: SupportedVisionModels
    references: int
    methods: tuple[str, ...]
    output_dir: Path
    metrics: tuple[str, ...] = ("core", "train", "attack", "retrain", "deep")

    def config(self, seed: int, label: int) -> PipelineConfig:
        """One cell's configuration."""
        config = Recipe(128, seed, SupportedDatasets.FASHION_MNIST, self.model).config(self.output_dir)
        judged = EvalConfig(methods=self.methods, metrics=self.metrics, references=self.references)
        return replace(config, forget_class=(label,), gcn_path=GCNS[self.model], eval=judged)


def evaluation_of(config: PipelineConfig) -> Eval:
    """Its evaluation; the images are read once for all cells."""
    pipeline, data = Pipeline(config), stages_of(config).data
    images = UnlearningDataset(data.name, data.splits, config.train.batch_size, config.forget_class, config.seed)
    pipeline.stages.data = images
    return pipeline.evaluation.eval


def measure(evaluation: Eval, name: str, kappas: Sequence[int]) -> dict:
    """A method's test results at the kappa, and with the settings, that validation images choose."""
    seed, begun = evaluation.config.seed, time.perf_counter()
    points = [Point(1, kappa, seed) for kappa in kappas if "kappa" in METHODS[name].axes] or [Point(1, 0, seed)]
    gaps = [evaluation.validation_gap(name, point) for point in points] if len(points) > 1 else [0.0]
    point = points[min(range(len(points)), key=lambda place: gaps[place])]
    values = evaluation.eval_unlearning(name, point)["test"]
    about = evaluation.about[METHODS[name].key(evaluation.context, point)]
    chosen = {"kappa": point.kappa, "settings": about["settings"], "tuning": about["tuning"]}
    return {"test": values, **chosen, "measuring_seconds": time.perf_counter() - begun}


def cell(plan: Plan, seed: int, label: int) -> dict:
    """All methods on one class of one classifier, kept on disk method by method."""
    config = plan.config(seed, label)
    inputs = {
        "config": str(replace(config, output_dir=Path(), eval=EvalConfig())),
        "references": plan.references,
        "metrics": plan.metrics,
    }
    inputs |= {"gcn": sha256_file(GCNS[plan.model]), "code": code_key("stages.evaluation")}
    name = f"{plan.model.value}_seed-{seed}_class-{label}_{key_of(inputs)[:12]}.json"
    path = plan.output_dir / "comparison" / name
    found = read_json(path, foreign=True) if path.exists() else {"seed": seed, "class": label, "methods": {}}
    missing = [name for name in plan.methods if name not in found["methods"]]
    if missing:
        evaluation = evaluation_of(config)
        for name in missing:
            found["methods"][name] = measure(evaluation, name, KAPPAS[plan.model])
            write_json(path, found | {"provenance": provenance()})
    print(f"seed {seed}, class {label}: {len(found['methods'])} methods, {path}", flush=True)
    return found


def values_of(cells: Sequence[dict], method: str, metric: str) -> dict[Cell, float]:
    """A metric's values, where it has some."""
    values = {
        Cell(seed=one["seed"], classes=(one["class"],)): one["methods"][method]["test"].get(metric) for one in cells
    }
    return {cell: value for cell, value in values.items() if value is not None}


def text_of(cells: Sequence[dict], method: str, metric: str) -> str:
    """Mean over classes, then over seeds, with the 95 % t interval over the seeds where there are three or more."""
    values = values_of(cells, method, metric)
    means = within_seeds(values)
    if not values:
        return "-"
    estimate = over_seeds(values) if len(means.values) > 2 and metric not in PLAIN else None
    said = f"{means.mean:,.0f}" if means.mean >= 1000 else f"{means.mean:.3g}"
    return said + (f" ± {estimate.high - means.mean:.2g}" if estimate else "")


def table(cells: Sequence[dict], methods: Sequence[str], columns: Mapping[str, str] = COLUMNS) -> list[list[str]]:
    """A row a method, in the order of their Avg Gap; `columns`: metrics or costs, with their heads."""

    def gap(method: str) -> float:
        values = values_of(cells, method, "avg_gap")
        return within_seeds(values).mean if values else math.inf  # a single retrained model has no like

    rows = [["method", *columns.values()]]
    ordered = sorted(methods, key=gap)
    rows += ([METHODS[method].label, *(text_of(cells, method, metric) for metric in columns)] for method in ordered)
    return rows


def saturated_terms(cells: Sequence[dict], methods: Sequence[str]) -> str:
    """Name the terms of Avg Gap that tell no method that forgets from another, by means over seeds."""
    terms = ("forget_score", *TERMS)
    means = {
        method: {term: within_seeds(values).mean for term in terms if (values := values_of(cells, method, term))}
        for method in methods
    }
    return saturated(means)


def tables(name: str, cells: Sequence[dict], methods: Sequence[str]) -> Tables:
    """Return the table for docs/results.md, with what it averages over."""
    seeds, classes = len({one["seed"] for one in cells}), len({one["class"] for one in cells})
    spread = f"± is the 95 % t-interval over the {seeds} classifiers" if seeds > 2 else "no interval"
    counted = f"{classes} classes x {seeds} classifiers ({len(cells)} cells); {spread}"
    return {name: (counted, table(cells, methods))}


def seed_means(cells: Sequence[dict], methods: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By method and column of the table, the mean over classes of each seed."""
    seeds = sorted({one["seed"] for one in cells})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in methods:
        for metric, column in COLUMNS.items():
            parts = {seed: values_of([one for one in cells if one["seed"] == seed], method, metric) for seed in seeds}
            means = {str(seed): within_seeds(values).mean for seed, values in parts.items() if values}
            found.setdefault(METHODS[method].label, {})[column] = means
    return found


def significance(cells: Sequence[dict], methods: Sequence[str], metric: str) -> list[list[str]]:
    """Every method against refined MIMU on one metric: paired, classes averaged within seeds, Holm-corrected."""
    measured = {method: values_of(cells, method, metric) for method in methods}
    results = {method: values for method, values in measured.items() if len(values) == len(cells)}
    rows = [["method", f"{metric}: it minus MIMU refined", "seeds", "cells", "p", "p (Holm)", "p (flips)", "least"]]
    for method, test in against(results, "mimu_refined").items():
        half = test.high - test.difference
        counts = [f"{test.difference:.3g} ± {half:.2g}", str(test.seeds), str(test.cells)]
        p = [f"{value:.2g}" for value in (test.p, test.p_holm, test.p_flips, test.least)]
        rows.append([METHODS[method].label, *counts, *p])
    return rows


def main() -> None:
    """Parse, measure what is missing, print the tables."""
    flags = parser(__doc__)
    models = list(SupportedVisionModels)
    flags.add_argument("--model", type=SupportedVisionModels, choices=models, default=models[0])
    flags.add_argument("--classes", type=int, nargs="+", default=[0])
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--references", type=int, default=3, help="retrained models, each with a seed of its own")
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags.add_argument("--but", nargs="+", choices=METHODS, default=[], help="methods to leave out")
    flags.add_argument("--markdown", type=Path, help="write the table here")
    flags.add_argument("--output-dir", type=Path, default=PROJECT_ROOT, help="where classifiers and cells are kept")
    for_pages(flags)
    arguments = flags.parse_args()
    reuse_freed_memory()
    begun = time.perf_counter()
    methods = tuple(name for name in arguments.methods if name not in arguments.but)
    plan = Plan(arguments.model, arguments.references, methods, arguments.output_dir)
    cells = [cell(plan, seed, label) for seed in arguments.seeds for label in arguments.classes]
    print(f"\n{len(cells)} cells, {time.perf_counter() - begun:.0f} s\n\n{as_text(table(cells, plan.methods))}")
    print(saturated_terms(cells, plan.methods))
    if len(cells) > 1 and "mimu_refined" in plan.methods:
        for metric in ("avg_gap", "retain_score"):
            print(as_text(significance(cells, plan.methods, metric)))
        print(SAID_OF_P)
    print(as_text(table(cells, plan.methods, {cost: head for head, cost in SPENT.items()})))
    if arguments.markdown:
        write_text(arguments.markdown, as_text(table(cells, plan.methods)))
    keep(arguments.json, {"cells": cells})
    publish_all(arguments.docs, tables(NAMES[plan.model], cells, plan.methods), seed_means(cells, plan.methods))


if __name__ == "__main__":
    main()
