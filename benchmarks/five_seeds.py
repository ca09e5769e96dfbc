"""Every method on five classifiers of a dataset: the boards of a leaderboard as tables of docs/results.md.

    uv run main.py sweep --config configs/comparison.yaml          the runs on DIGITS, in the folder comparison
    uv run benchmarks/public_images.py pictures
    uv run main.py sweep --config configs/comparison.yaml --config configs/comparison_pictures.yaml     on pictures
    (as well with comparison_fashion.yaml: Fashion-MNIST; with comparison_resnet.yaml: ResNet-18 on DIGITS)
    uv run benchmarks/five_seeds.py [--records DIR] [--docs]       a table for each dataset, from their records

A value is the mean over classes of each seed, then over the seeds, with the 95 % t interval over the seeds; weights are
the range over all cells. Methods stand in the order of Avg Gap, retrained and untouched models first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Tables, for_pages, parser, publish_all

from core.choices import SupportedDatasets, SupportedVisionModels
from core.records import read_records
from reporting.families import runs_of
from reporting.tables import budget, estimate, known, shown, values_of
from reporting.write import as_text
from showing.standings import Board, Row, boards

COLUMNS = {
    "forget_score": "forget %",
    "retain_score": "retain %",
    "worst_retained_drop": "worst class",
    "avg_gap": "Avg Gap",
    "probe_layers_gap": "probe",
    "knn_layers_gap": "10-NN",
    "forget_auroc": "logit AUROC",
    "constant_recall": "one constant",
    "relearn_area_10": "relearn 10",
    "fresh_head_10": "fresh head 10",
}
RANK = "avg_gap"


def line(row: Row) -> list[str]:
    """A method's name and values."""
    cells = [shown(estimate(row.points, name)) if known(row.points[0].values.get(name)) else "-" for name in COLUMNS]
    weights = budget([int(value) for value in values_of(row.points, "weights_changed").values()])
    return [row.label, *cells, weights]


def table(board: Board) -> list[list[str]]:
    """Head and body."""
    rows = board.ranked(RANK, board.metrics[RANK]["better"])
    return [["method", *COLUMNS.values(), "weights"], *map(line, rows)]


def name_of(board: Board) -> str:
    """A table's name: that of the MLP on DIGITS has none behind it, a folder tree's is the tree's."""
    dataset, *tree = board.dataset.split()
    other = [] if dataset in (SupportedDatasets.DIGITS, SupportedDatasets.FOLDER) else [dataset.lower()]
    usual = board.model == SupportedVisionModels.HookedMLPClassifier
    model = [] if usual else [board.model.removeprefix("Hooked").lower()]
    return "_".join(["five_seeds", *other, *tree, *model])


def main() -> None:
    """Read, print, publish."""
    flags = parser(__doc__)
    for_pages(flags)
    flags.add_argument("--records", type=Path, default=Path("comparison"), help="the sweep's output folder")
    given = flags.parse_args()
    found: Tables = {}
    for board in boards(runs_of(read_records(given.records))):
        (source,) = board.sources
        count = f"{len(source.classes)} classes x {source.seeds} classifiers; ± is the 95 % t interval over these"
        found[name_of(board)] = count, table(board)
        print(f"{board.dataset}: {count}\n{as_text(table(board))}\n")
    publish_all(given.docs, found)


if __name__ == "__main__":
    main()
