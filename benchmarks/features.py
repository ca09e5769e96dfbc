"""Do the features forget? Edits beside models that never saw the class, at every stage; Fashion-MNIST, test images.

    uv run benchmarks/features.py                 the short form: one classifier, two classes, 3 minutes
    uv run benchmarks/features.py --full          ten classes x 3 classifiers, rivals on one of them
    [--sections ours rivals gentle curve ablations] [--seeds N ...] [--classes N ...] [--curve PATH] [--json PATH]
    [--methods NAME ...]                          of these sections some methods alone
    [--docs] [--measured PATH]                    tables and curve from what an earlier call kept with --json
    [--classifier resnet] [--models FOLDER]       ResNet-18, judged by fewer metrics; trained ones are kept in a folder

Classifiers are MLPs (784-128-64-10) trained on 15,000 images for ten epochs, or ResNet-18 trained for two, with AdamW
at a one-cycle rate, and so are three models retrained without each class, with seeds of their own. Nothing here was
tuned on test images; the settings of `mimu_deep` were chosen on validation images of seeds 0 and 1, so that seed 2 and
later are classifiers unseen.

Values are distances to the mean of the retrained models: of a metric at every stage, the largest; `mean` is of all of
them. Seconds are of one request, on as many threads as are said.
"""

import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.feature_models import RECIPES, Models

import torch

from core.artifacts import read_json, write_bytes
from core.config import PROJECT_ROOT, derive_seed
from erasing.descent import Schedule
from erasing.erasure import Eraser
from erasing.head import BATCH, EPOCHS, RATE, last_layer, new_rows, reading
from erasing.terms import Weights
from measure.metrics import METRICS, Evidence
from reporting.write import as_text
from rivals.compared import METHODS
from unlearn.methods import deep_edit, eraser_of
from unlearn.registry import Context, Edit, Point, method

OURS = ("default", "retrain", "head_row_new", "mimu_deep")
RIVALS = ("salun", "scrub", "bad_teacher", "head_retrain", "svd_projection")
AIMED = ("leace", "collapse", "esc", "esc_t", "cola", "cola_and_row_anew", "contrastive", "pour_d")  # at features
SHARES = (0.0006, 0.0012, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
GAPS = {  # metric -> heading; distances to the retrained models' mean
    "probe_layers_gap": "probe",
    "auc_layers_gap": "AUC",
    "knn_layers_gap": "10-NN",
    "forget_auroc": "logit AUROC",
    "constant_recall": "one constant",
    "relearn_area_10": "relearn 10",
    "relearn_area_50": "relearn 50",
    "fresh_head_10": "fresh head 10",
    "fresh_head_50": "fresh head 50",
}
Row = dict[str, Any]


# --- variants that the tables of ablations and sizes need -------------------------------------------------


def variant(name: str, share: float = 0.02, schedule: Schedule | None = None) -> str:
    """Register `mimu_deep` with another share of weights or another schedule; return its name."""

    @method(name, name, axes=("seed",))
    def edit(context: Context, point: Point) -> Edit:
        """`mimu_deep`, with one thing changed."""
        return deep_edit(context, point.seed, share, schedule)

    return name


def rows_anew(context: Context, seed: int, edit: Edit) -> Edit:
    """Of an edited copy, the forgotten classes' rows of the last layer are drawn anew, as `mimu_deep` draws them."""
    eraser, classes = eraser_of(context, seed), context.config.forget_labels
    weights = [edit.model.get_parameter(one.name).reshape(one.matrix) for one in eraser.model.targets]
    rows = new_rows(eraser.stages, weights, eraser.h[_retained(eraser, classes)], classes, seed)
    with torch.no_grad():
        edit.model.get_parameter(eraser.head)[list(classes)] = rows
    return replace(edit, allowed=None)


def layer_anew(context: Context, seed: int, edit: Edit) -> Edit:
    """Of an edited copy, every row of the last layer is drawn anew and trained on D_r alone, biases as they are."""
    eraser = eraser_of(context, seed)
    kept, last = _retained(eraser, context.config.forget_labels), edit.model.get_parameter(eraser.head)
    weights = [edit.model.get_parameter(one.name).reshape(one.matrix) for one in eraser.model.targets]
    _, layer = last_layer(eraser.stages)
    with reading(layer) as heard:
        eraser.stages.logits(eraser.h[kept], weights)
    features, labels = torch.cat(heard), eraser.labels[kept]
    generator = torch.Generator().manual_seed(derive_seed(seed, "every row anew", *context.config.forget_labels))
    rows = (features.shape[1] ** -0.5 * (2 * torch.rand(last.shape, generator=generator) - 1)).requires_grad_()
    optimizer = torch.optim.Adam([rows], RATE)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = torch.nn.functional.linear(features[part], rows, layer.bias)
            torch.nn.functional.cross_entropy(logits, labels[part]).backward()
            optimizer.step()
    with torch.no_grad():
        last.copy_(rows)
    return replace(edit, allowed=None)


def _retained(eraser: Eraser, classes: Sequence[int]) -> torch.Tensor:
    return ~torch.isin(eraser.labels, torch.tensor(classes))


@method("deep_and_last_layer_anew", "deep_and_last_layer_anew", axes=("seed",))
def deep_and_last_layer_anew(context: Context, point: Point) -> Edit:
    """`mimu_deep`, and then every row of the last layer anew."""
    return layer_anew(context, point.seed, deep_edit(context, point.seed))


@method("cola_and_row_anew", "cola_and_row_anew", axes=("seed",), grid=METHODS["cola"].grid)
def cola_and_row_anew(context: Context, point: Point, **settings: Any) -> Edit:
    """`cola`, and then the forgotten classes' rows of the last layer anew."""
    with METHODS["cola"].enter(context, point, **settings) as edit:
        return rows_anew(context, point.seed, replace(edit, seconds=None))


def gentle(name: str, **settings: Any) -> str:
    """Register a rival with settings that keep the retain score, on validation images of seed 0; return its name."""
    made = METHODS[name].function
    assert made is not None

    @method(f"{name}_gentle", f"{name}_gentle", axes=("seed",))
    def edit(context: Context, point: Point) -> Edit:
        """The rival, not tuned by Avg Gap."""
        return made(context, point, **settings)

    return f"{name}_gentle"


GENTLE = (
    gentle("cola", lr=1e-3, collapse=15),
    gentle("contrastive", lr=3e-4, weight=1.0),
    gentle("pour_d", lr=1e-3),
)
CURVE = tuple(variant(f"deep_{share:g}", share) for share in SHARES)
ABLATIONS = (
    variant("without_the_term_of_features", schedule=Schedule(by=Weights(features=0))),
    variant("a_third_of_its_weight", schedule=Schedule(by=Weights(features=7))),
    variant("without_partners", schedule=Schedule(by=Weights(partners=0))),
    variant("cross-entropy_alone_on_retained_images", schedule=Schedule(by=Weights(fit=6, far=0))),
    variant("as_much_in_doubt_as_the_untouched_classifier", schedule=Schedule(sure=False)),
    variant("a_quarter_of_the_forget_term", schedule=Schedule(by=Weights(forget=0.5))),
    variant("100_steps", schedule=Schedule(steps=100)),
    variant("30_steps", schedule=Schedule(steps=30)),
    variant("first_order_alone", schedule=Schedule(steps=0)),
    variant("its_size_from_the_first_step", schedule=Schedule(ramp=0)),
    variant("a_sixth_of_the_weights_takes_part", schedule=Schedule(candidates=8)),
)


# --- measuring --------------------------------------------------------------------------------------------


def cell(models: Models, seed: int, label: int, methods: Sequence[str]) -> list[Row]:
    """Every method on one classifier and class; values of two-sided metrics less the retrained models' mean."""
    judge, point, rows = models.judge(seed, label), Point(0, 0, seed), []
    for name in methods:
        values = judge.eval_unlearning(name, point)["test"]
        if lacking := judge.lacking.get(METHODS[name].key(judge.context, point)):
            print(f"{name}: no values, {lacking.sentence}", flush=True)
            continue
        others = judge.others(name, "test")

        def beside(metric: str, values: Row = values, others: Sequence[Evidence] = others) -> float:
            found = [value for e in others if (value := e.value(METRICS[metric].compute)) is not None]
            return values[metric] - statistics.fmean(found)

        said = judge.verdicts({name: {"test": values}}, point)[name][0]["key"]
        row = {"seed": seed, "class": label, "method": name, "forget": values["forget_score"], "said": said}
        row |= {"retain": beside("retain_score"), "worst": -values["worst_retained_drop"]}
        measured = [one for one in GAPS if one in values]
        row |= {one: values[one] if one.endswith("_gap") else beside(one) for one in measured}
        rows.append(row | {"weights": values["weights_changed"], "seconds": values["seconds"]})
        print(" ".join(f"{one:.2f}" if isinstance(one, float) else str(one) for one in rows[-1].values()), flush=True)
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each method: means over cells of sizes of distances (largest); signed means of scores (worst)."""
    lines = [
        ["method", "n", "forget", "retain", "worst class", *GAPS.values(), "mean", "weights", "seconds", "in a word"]
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]

        def of(key: str, mine: Sequence[Row] = mine) -> list[float]:
            return [row[key] for row in mine if row.get(key) is not None]

        words = [row["said"] for row in mine]
        line = [name, str(len(mine)), f"{statistics.fmean(of('forget')):.2f} ({max(of('forget')):.1f})"]
        line += [f"{statistics.fmean(of(key)):+.2f} ({min(of(key)):+.1f})" for key in ("retain", "worst")]
        for key in GAPS:
            sizes = [abs(value) for value in of(key)]
            line.append(f"{statistics.fmean(sizes):.1f} ({max(sizes):.1f})" if sizes else "-")
        means = [statistics.fmean(abs(row[key]) for key in GAPS if row.get(key) is not None) for row in mine]
        line.append(f"{statistics.fmean(means):.1f} ({max(means):.1f})")
        line += [f"{statistics.fmean(of('weights')):,.0f}", f"{statistics.median(of('seconds') or [0]):.1f}"]
        said = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
        lines.append([*line, ", ".join(said)])
    return lines


def drawn(rows: Sequence[Row]) -> bytes:
    """The size curve: distances to retrained models against the share of weights, mean and range over cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("largest gap over stages, points", ("probe_layers_gap", "knn_layers_gap", "auc_layers_gap")),
        ("recall above retrained, points", ("relearn_area_10", "fresh_head_10", "constant_recall")),
        ("retain score above retrained, points", ("retain",)),
    )
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for ax, (label, keys) in zip(axes, panels, strict=True):
        for key, colour, marker in zip(keys, ("#0072B2", "#D55E00", "#767676"), "osD", strict=False):
            found = [[row[key] for row in rows if row["method"] == name] for name in CURVE]
            weights = [statistics.fmean(row["weights"] for row in rows if row["method"] == name) for name in CURVE]
            ax.fill_between(
                weights, list(map(min, found)), list(map(max, found)), color=colour, alpha=0.12, linewidth=0
            )
            means = list(map(statistics.fmean, found))
            ax.plot(weights, means, marker=marker, color=colour, label=GAPS.get(key, key), markersize=4)
            untouched = statistics.fmean(row[key] for row in rows if row["method"] == "default")
            ax.axhline(untouched, color=colour, linestyle=":", linewidth=1)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xscale("log")
        ax.set(xlabel="numbers changed, of 109,184", ylabel=label)
        ax.margins(y=0.15)
        ax.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    return file.getvalue()


BESIDE = ("default", "mimu_deep", "deep_and_last_layer_anew")  # on the rivals' cells
SECTIONS = {
    "ours": OURS,
    "rivals": (*BESIDE, *RIVALS, *AIMED),
    "gentle": GENTLE,
    "curve": ("default", *CURVE),
    "ablations": ("mimu_deep", *ABLATIONS),
}


def main() -> None:
    """Measure, print, draw, keep."""
    asked = parser(__doc__)
    for_pages(asked)
    asked.add_argument("--full", action="store_true", help="ten classes, three classifiers")
    asked.add_argument("--classifier", choices=list(RECIPES), default="mlp")
    asked.add_argument("--models", type=Path, help="folder in which trained classifiers are kept for further calls")
    asked.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=["ours"])
    asked.add_argument("--methods", nargs="+", help="of the sections' methods these alone")
    asked.add_argument("--seeds", nargs="+", type=int, help="of classifiers")
    asked.add_argument("--classes", nargs="+", type=int, help="each forgotten by itself")
    asked.add_argument("--curve", type=Path, default=PROJECT_ROOT / "docs" / "size-curve.png")
    asked.add_argument("--measured", type=Path, help="a file of --json; nothing is measured")
    given = asked.parse_args()
    seeds = given.seeds or ([2, 3, 4] if given.full else [2])
    classes = given.classes or (range(10) if given.full else [6, 9])
    models, every = Models(RECIPES[given.classifier], given.models), dict[str, list[Row]]()
    kept = read_json(given.measured) if given.measured else {}
    for section in given.sections:
        pairs = [(seed, label) for label in classes for seed in seeds]
        chosen = [name for name in SECTIONS[section] if name in (given.methods or SECTIONS[section])]
        every[section] = kept.get(section) or [row for pair in pairs for row in cell(models, *pair, chosen)]
        print(f"\n{section}, {torch.get_num_threads()} threads\n{as_text(table(every[section]))}\n", flush=True)
    rows = every.get("curve", [])
    if set(CURVE) <= {row["method"] for row in rows}:
        write_bytes(given.curve, drawn(rows))
    n = f"{len(classes)} classes x {len(seeds)} classifiers: mean (worst)"
    name = "features" if given.classifier == "mlp" else f"features_{given.classifier}"
    publish_all(given.docs, {f"{name}_{section}": (n, table(rows)) for section, rows in every.items()})
    keep(None if kept else given.json, every)


if __name__ == "__main__":
    main()
