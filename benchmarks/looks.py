"""What the other looks at features say: critics, ranks, places of a mask; Fashion-MNIST, test images.

    uv run benchmarks/looks.py                    one classifier, three classes, 4 minutes
    [--seeds N ...] [--classes N ...] [--json PATH] [--docs]

Classifiers, retrained models and methods are those of benchmarks/features.py, which has the looks that words rest on;
here are values, not distances, so that the retrained models' stand beside them.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.feature_models import MLPS
from benchmarks.features import OURS

from unlearn.registry import Point

LOOKS = {  # metric -> heading and digits
    "mlp_probe_layers": ("MLP probe", 1),
    "mlp_probe_layers_gap": ("its gap", 1),
    "information_layers": ("bits", 2),
    "IDI": ("IDI", 2),
    "retained_rank": ("rank (M4)", 2),
    "constant_recall_1": ("one constant, 1 %", 1),
    "relearn_area_1": ("relearn 1", 1),
    "fresh_head_1": ("fresh head 1", 1),
    "prototype_recall": ("prototype", 1),
    "head_swap_recall": ("head swap", 1),
    "position_attack": ("signs", 1),
    "position_attack_random": ("random places", 1),
    "position_relearn": ("trained", 1),
    "position_relearn_random": ("random places", 1),
    "noise_found": ("found in noise", 1),
    "noise_relearn": ("trained there", 1),
}
Row = dict[str, Any]


def cell(seed: int, label: int) -> list[Row]:
    """Every look at every method, of one classifier and class; None where it is not defined."""
    judge, point, rows = MLPS.judge(seed, label), Point(0, 0, seed), []
    for name in OURS:
        values = judge.eval_unlearning(name, point)["test"]
        rows.append({"seed": seed, "class": label, "method": name, "forget": values["forget_score"]})
        rows[-1] |= {look: values[look] for look in LOOKS}
        print(" ".join(f"{one:.2f}" if isinstance(one, float) else str(one) for one in rows[-1].values()), flush=True)
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each method: the mean over cells where a look is defined; in brackets how many, if not all."""
    lines = [["method", "n", "forget", *(heading for heading, _ in LOOKS.values())]]
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        line = [name, str(len(mine)), f"{statistics.fmean(row['forget'] for row in mine):.1f}"]
        for look, (_, digits) in LOOKS.items():
            known = [row[look] for row in mine if row[look] is not None]
            some = f" ({len(known)})" if len(known) < len(mine) else ""
            line.append(f"{statistics.fmean(known):.{digits}f}{some}" if known else "-")
        lines.append(line)
    return lines


def main() -> None:
    """Measure, print, keep."""
    asked = parser(__doc__)
    for_pages(asked)
    asked.add_argument("--seeds", nargs="+", type=int, default=[2], help="of classifiers")
    asked.add_argument("--classes", nargs="+", type=int, default=[5, 6, 9], help="each forgotten by itself")
    given = asked.parse_args()
    rows = [row for label in given.classes for seed in given.seeds for row in cell(seed, label)]
    made = table(rows)
    print("\n".join(" | ".join(line) for line in made))
    publish_all(given.docs, {"looks": (f"{len(given.classes)} classes x {len(given.seeds)} classifiers: mean", made)})
    keep(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
