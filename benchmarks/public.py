"""What a public package makes of the same classifiers: `erasus` 0.2.0 as it comes, judged like every method here.

    uv run --with erasus==0.2.0 benchmarks/public.py                       one class, one seed
    uv run --with erasus==0.2.0 benchmarks/public.py --classes 0 1 2 3 4 5 6 7 8 9
    [--strategies NAME ...] [--seeds N ...] [--json PATH] [--output-dir DIR] [--docs]

Its strategies for classifiers get the untouched classifier, loaders of D_f and D_r in batches of 128, and their own
defaults: no setting is tuned, as `fit()` offers no choice by itself. Beside them stands refined MIMU at the kappa that
validation images choose. Classifiers, images and metrics are those of `benchmarks/comparison.py`.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.comparison import Plan, cell, seed_means, table, tables

from torch.utils.data import DataLoader, TensorDataset

from core.config import PROJECT_ROOT, SupportedVisionModels
from reporting.write import as_text
from training.processes import reuse_freed_memory
from unlearn.registry import Context, Edit, Point, method

STRATEGIES = (
    "gradient_ascent",
    "negative_gradient",
    "saliency_unlearning",
    "scrub",
    "fisher_forgetting",
    "amnesiac",
    "knowledge_distillation",
    "neuron_pruning",
    "mask_based",
    "sparse_aware",
)
OURS = ("mimu_refined", "retrain", "default")
BATCH = 128


def loader(context: Context, forgotten: bool) -> DataLoader:
    """D_f or D_r, shuffled."""
    images = context.data.splits["train"]
    part = images.batch((context.data.is_forgotten(images.labels) == forgotten).nonzero().flatten())
    return DataLoader(TensorDataset(*part), batch_size=BATCH, shuffle=True)


def register(strategy: str) -> str:
    """A strategy of the package as a method; returns the method's name."""
    from erasus import ErasusUnlearner  # ty: ignore[import-not-found] - brought by `uv run --with`

    @method(f"erasus_{strategy}", f"erasus: {strategy.replace('_', ' ')}", source="erasus 0.2.0")
    def entering(context: Context, point: Point) -> Edit:
        model = copy.deepcopy(context.model).requires_grad_(True)
        unlearner = ErasusUnlearner(model=model, strategy=strategy, device=str(context.device))
        unlearner.fit(forget_data=loader(context, True), retain_data=loader(context, False))
        return Edit(unlearner.model.eval().requires_grad_(False))

    return f"erasus_{strategy}"


def main() -> None:
    """Parse, measure what is missing, print the table."""
    flags = parser(__doc__)
    flags.add_argument("--classes", type=int, nargs="+", default=[0])
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    flags.add_argument("--output-dir", type=Path, default=PROJECT_ROOT, help="where classifiers and cells are kept")
    for_pages(flags)
    arguments = flags.parse_args()
    try:
        methods = (*OURS, *(register(strategy) for strategy in arguments.strategies))
    except ImportError as error:
        flags.error(f"{error}: call it as `uv run --with erasus==0.2.0 benchmarks/public.py`")
    reuse_freed_memory()
    metrics = ("core", "train", "attack", "retrain")
    plan = Plan(SupportedVisionModels.HookedMLPClassifier, 3, methods, arguments.output_dir, metrics)
    cells = [cell(plan, seed, label) for seed in arguments.seeds for label in arguments.classes]
    print(as_text(table(cells, methods)))
    keep(arguments.json, {"cells": cells})
    publish_all(arguments.docs, tables("public_erasus", cells, methods), seed_means(cells, methods))


if __name__ == "__main__":
    main()
