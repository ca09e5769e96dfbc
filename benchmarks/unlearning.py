"""How well are classes forgotten? Every table on unlearning in docs/results.md and EXPERIMENTS.md.

    uv run benchmarks/unlearning.py                          the short form, 4 minutes
    uv run benchmarks/unlearning.py --full                   everything, about an hour on 2 cores
    uv run benchmarks/unlearning.py --full --sections main   some tables: main unseen pairs transfer resnet auto
                                                             ablations refinement elbo
    uv run benchmarks/unlearning.py --masks DIR              the main table's masks, with their classifiers
    [--json PATH] [--output-dir DIR] [--docs]

Classifiers are kept below the output folder. The graph network has seen none of those it is judged on: it learns on
seeds 100 to 103, choices are made on validation images of seed 50, and the tables (all but the last three, which are
choices) are of test images of seeds 0 to 4. Each cell: forget score, mean over the classes and its 95 % t-interval
over the checkpoints (worst class) / retain score, percent.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.rows import BATCHES, KAPPAS, RESNET_KAPPAS, SHIPPED, SHIPPED_RESNET, Bench, Row, judged_rows, on, show
from benchmarks.zoo import (
    PAIRS,
    SINGLES,
    Case,
    Cell,
    Classes,
    Recipe,
    Theta,
    by_gcn,
    by_taylor,
    by_taylor_tuned,
    cases,
    elbo_theta,
    refined,
    train,
)

import torch
from torch import Tensor

from core.artifacts import copy_file, write_json
from core.config import (
    PROJECT_ROOT,
    Activations,
    FeatureSets,
    ForgetLosses,
    GCNConfig,
    KappaModes,
    RefineConfig,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
)
from measure.auto_kappa import search
from reporting.write import as_text
from training.processes import reuse_freed_memory
from unlearn.masks import Mask, hard_topk
from unlearn.methods import mask_of
from unlearn.registry import Context, Point
from unlearn.requests import Request, Unlearner, noise_start, taylor_start
from utils_data import UnlearningDataset

CPU = torch.device("cpu")
FULL_STEPS = 300  # as the graph networks that ship (configs/gcn_mlp.yaml)


# --- parts of tables ---


def references(case: Case, requests: Sequence[Classes], kind: str, kl: bool = True) -> list[Cell]:
    """Cells without a mask: the untouched classifier, its logits of the classes at -inf, or one retrained without."""
    cells = []
    for classes in requests:
        h, labels = case.inputs("test")
        with torch.inference_mode():
            logits = case.stages.classifier.head(h, (-2,))
        if kind == "retrained":
            logits = case.retrained_logits(classes, "test")
        if kind == "dropped":  # not -inf, whose KL times 0 would be NaN
            logits = logits.index_fill(1, torch.tensor(classes), -1e4)
        cells.append(case.judge_logits(logits, labels, classes, 0, "test", 0.0, kl))
    return cells


# --- sections: each prints its tables and returns its rows -----------------------------------------------


def main_table(bench: Bench) -> list[Row]:
    """Every method, test images, each recipe by itself."""
    gcn, rows = by_gcn(Unlearner.load(SHIPPED)[0]), []
    names = {"untouched": "untouched", "retrained": "retrained without the class", "dropped": "its logit at -inf"}
    ways = {
        "random": lambda checkpoint, request: noise_start(checkpoint, request, 0),
        "GCN": gcn,
        "GCN, refined": refined(gcn),
        "GCN, refined, margin": refined(gcn, RefineConfig(forget_loss=ForgetLosses.margin)),
        "GCN, refined, match": refined(gcn, RefineConfig(forget_loss=ForgetLosses.match)),
    }
    for size in BATCHES:
        judged = [case for case in bench.judged if case.recipe.batch_size == size]
        kinds = names if bench.full else {}
        found = [
            Row(kinds[kind], on(judged, lambda case, kind=kind: references(case, SINGLES, kind))) for kind in kinds
        ]
        found.append(Row("signed Taylor", on(judged, lambda case: by_taylor_tuned(case, KAPPAS, SINGLES))))
        found += judged_rows(judged, ways, KAPPAS, "test", kl=bench.full)
        bench.tables[f"unlearning_{size}"] = show(
            f"Test images, batch {size}, {len(judged)} checkpoints x 10 classes", found, KAPPAS, more=True
        )
        rows += [replace(row, name=f"batch {size}: {row.name}") for row in found]
    return rows


def unseen_table(bench: Bench) -> list[Row]:
    """Classes that the graph network was never asked to forget, on checkpoints it never saw."""
    folds = ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))[: 3 if bench.full else 1]
    cells: dict[str, list[Cell]] = {}
    steps = FULL_STEPS if bench.full else 40
    for fold in folds:
        seen = tuple(label for label in range(10) if label not in fold)
        gcn = train(bench.teachers, GCNConfig(steps=steps, train_classes=seen), bench.output_dir / "trial")
        for case in bench.judged:
            requests = [(label,) for label in fold]
            cells.setdefault(case.recipe.name, []).extend(case.run(by_gcn(gcn), KAPPAS, requests, "test"))
    rows = []
    for size in BATCHES:
        part = {name: group for name, group in cells.items() if name.startswith(f"batch {size},")}
        rows.append(Row(f"batch {size}: GCN, classes never asked for", part))
    bench.tables["unlearning_unseen"] = show("Unseen classes of unseen checkpoints, test images", rows, KAPPAS)
    return rows


def pairs_table(bench: Bench) -> list[Row]:
    """All 45 pairs of classes, 2 x kappa weights."""
    gcn, rows = by_gcn(Unlearner.load(SHIPPED)[0]), []
    pairs = PAIRS if bench.full else PAIRS[::9]
    for size in BATCHES:
        judged = [case for case in bench.judged if case.recipe.batch_size == size]
        for name, way in (("GCN", gcn), ("GCN, refined", refined(gcn))):
            found = on(judged, lambda case, way=way: case.run(way, (64, 128, 200), pairs, "test"))
            rows.append(Row(f"batch {size}: {name}", found))
        if bench.full:
            first = on(judged[:1], lambda case: references(case, pairs, "retrained", kl=False))
            rows.append(Row(f"batch {size}: retrained without both, seed 0", first))
    bench.tables["unlearning_pairs"] = show(
        f"{len(pairs)} pairs of classes, twice kappa, test images", rows, (64, 128, 200)
    )
    return rows


def transfer_table(bench: Bench) -> list[Row]:
    """The graph network of Fashion-MNIST on classifiers of DIGITS."""
    gcn = by_gcn(Unlearner.load(SHIPPED)[0])
    recipes = [Recipe(32, seed, SupportedDatasets.DIGITS) for seed in range(5 if bench.full else 1)]
    judged, kappas = cases(recipes, bench.output_dir), (25, *KAPPAS)
    rows = [Row("signed Taylor", on(judged, lambda case: by_taylor_tuned(case, kappas, SINGLES)))]
    rows += judged_rows(judged, {"GCN": gcn, "GCN, refined": refined(gcn)}, kappas, "test")
    bench.tables["unlearning_transfer"] = show(
        f"DIGITS, {len(judged)} checkpoints, the GCN of Fashion-MNIST, test images", rows, kappas
    )
    return rows


def resnet_table(bench: Bench) -> list[Row]:
    """ResNet-18, 12,000 training images, 2 epochs: 65,536 weights."""
    if not bench.full:
        print("\nResNet-18: with --full")
        return []
    fashion, resnet = SupportedDatasets.FASHION_MNIST, SupportedVisionModels.HookedResnet
    judged = cases([Recipe(128, seed, fashion, resnet) for seed in (0, 1)], bench.output_dir)
    gcn, foreign = (by_gcn(Unlearner.load(path)[0]) for path in (SHIPPED_RESNET, SHIPPED))
    ways = {"GCN of MLPs": foreign, "GCN of MLPs, refined": refined(foreign), "GCN": gcn, "GCN, refined": refined(gcn)}
    rows = [
        Row("untouched", on(judged, lambda case: references(case, SINGLES, "untouched", kl=False))),
        Row(
            "retrained without the class, seed 0",
            on(judged[:1], lambda case: references(case, SINGLES, "retrained", kl=False)),
        ),
        Row("signed Taylor", on(judged, lambda case: by_taylor_tuned(case, RESNET_KAPPAS, SINGLES))),
        *judged_rows(judged, ways, RESNET_KAPPAS, "test"),
    ]
    bench.tables["unlearning_resnet"] = show(f"ResNet-18, {len(judged)} checkpoints, test images", rows, RESNET_KAPPAS)
    return rows


def auto_table(bench: Bench) -> list[Row]:
    """kappa: auto for every class: how often a target is shown on validation images, and holds on test images."""
    unlearner, lines, rows = (
        Unlearner.load(SHIPPED)[0],
        [["target", "shown", "hold on test", "kappa: least, median, most"]],
        [],
    )
    for tau, epsilon in ((2.0, 1.0), (1.0, 1.0), (5.0, 0.5))[: 3 if bench.full else 1]:
        hold, cells = 0, {}
        for case in bench.judged:
            untouched = references(case, SINGLES, "untouched", kl=False)
            for classes, before in zip(SINGLES, untouched, strict=True):
                context = context_of(case, classes, tau, epsilon, unlearner)
                config = context.config
                found = search(context, 1)
                if found.achieved:
                    mask = mask_of(config.auto.method, context, Point(1, found.kappa, config.seed))
                    cell = case.judge(~mask.keep, classes, found.kappa, "test", 0.0)
                    cells.setdefault(case.recipe.name, []).append(cell)
                    hold += cell.forget <= tau and before.retain - cell.retain <= epsilon
        kappas = [cell.kappa for group in cells.values() for cell in group]
        shown = len(kappas)
        total = len(bench.judged) * 10
        middle = f"{min(kappas)}, {statistics.median(kappas):.0f}, {max(kappas)}" if kappas else "-"
        lines.append([f"forget <= {tau}, drop <= {epsilon}", f"{shown} of {total}", f"{hold} of {shown}", middle])
        rows.append(Row(f"tau {tau}, epsilon {epsilon}", cells))
    print(f"\nkappa: auto, refined masks\n\n{as_text(lines)}", flush=True)
    bench.tables["unlearning_auto"] = (f"10 classes x {len(bench.judged)} classifiers", lines)
    return rows


def context_of(case: Case, classes: Classes, tau: float, epsilon: float, unlearner: Unlearner) -> Context:
    """What a run with `kappa: auto` would work with."""
    config, data = case.stages.config, case.stages.data
    auto = replace(config.auto, tau=tau, epsilon=epsilon)
    config = replace(config, forget_class=classes, kappa=KappaModes.auto, auto=auto)
    data = UnlearningDataset(data.name, data.splits, 256, classes, data.seed)
    return Context(case.stages.classifier, data, config, CPU, _never, case.checkpoint, unlearner)


def _never(topK: int) -> Tensor:
    raise AssertionError("direct masks need no class importances")


def ablation_table(bench: Bench) -> list[Row]:
    """One change at a time, GCN only, on validation images."""
    base = GCNConfig(steps=FULL_STEPS if bench.full else 40)
    variants: dict[str, GCNConfig] = {
        "default": base,
        "features basic": replace(base, features=FeatureSets.basic),
        "features contrast": replace(base, features=FeatureSets.contrast),
        "1 pass": replace(base, passes=1),
        "no Taylor prior": replace(base, taylor_prior=False),
        "sampler threshold": replace(base, sampler=TopKSamplers.threshold),
        "sampler gumbel": replace(base, sampler=TopKSamplers.gumbel),
    }
    more = {
        "no Taylor prior, features basic": replace(base, taylor_prior=False, features=FeatureSets.basic),
        "1 pass, features basic": replace(base, passes=1, features=FeatureSets.basic),
        "2 passes": replace(base, passes=2),
        "4 passes": replace(base, passes=4),
        "forget loss margin": replace(base, forget_loss=ForgetLosses.margin),
        "forget loss match": replace(base, forget_loss=ForgetLosses.match),
        "1 round": replace(base, num_message_passing_rounds=1),
        "5 rounds": replace(base, num_message_passing_rounds=5),
        "width 16": replace(base, hidden_dim=16),
        "width 64": replace(base, hidden_dim=64),
        "sigmoid, no residual": replace(base, activation=Activations.sigmoid, residual=False),
        "lambda 6": replace(base, lambda_retain=6.0),
        "lambda 0.5": replace(base, lambda_retain=0.5),
    }
    rows = judged_rows(bench.chosen_on, {"signed Taylor, lambda 9": by_taylor(9.0)}, KAPPAS, "val")
    for name, config in (variants | (more if bench.full else {})).items():
        gcn = by_gcn(train(bench.teachers, config, bench.output_dir / "trial"))
        rows += judged_rows(bench.chosen_on, {name: gcn}, KAPPAS, "val")
    blind = train(bench.teachers, base, bench.output_dir / "trial", message_passing=False)
    rows += judged_rows(bench.chosen_on, {"no message passing": by_gcn(blind)}, KAPPAS, "val")
    for count in (1, 2, 4) if bench.full else ():
        gcn = by_gcn(train(bench.teachers[:count], base, bench.output_dir / "trial"))
        rows += judged_rows(bench.chosen_on, {f"{count} training checkpoints of 8": gcn}, KAPPAS, "val")
    bench.tables["unlearning_ablations"] = show(
        "Ablations of the GCN, validation images, seed 50, both recipes", rows, KAPPAS
    )
    return rows


def refinement_table(bench: Bench) -> list[Row]:
    """What refinement starts from, and for how long, on validation images."""
    gcn = by_gcn(Unlearner.load(SHIPPED)[0])
    starts: dict[str, Theta] = {
        "GCN": gcn,
        "signed Taylor": lambda checkpoint, request: taylor_start(checkpoint, request.classes),
        "noise": lambda checkpoint, request: noise_start(checkpoint, request, 0),
    }
    rows = judged_rows(bench.chosen_on, {"GCN, not refined": gcn}, KAPPAS, "val")
    for steps in (5, 10, 30, 100) if bench.full else (30,):
        for name, start in starts.items():
            way = refined(start, RefineConfig(steps=steps))
            rows += judged_rows(bench.chosen_on, {f"from {name}, {steps} steps": way}, KAPPAS, "val")
    for weight in (0.1, 1.0, 3.0) if bench.full else ():
        way = refined(gcn, RefineConfig(lambda_retain=weight))
        rows += judged_rows(bench.chosen_on, {f"from GCN, 30 steps, lambda {weight}": way}, KAPPAS, "val")
    show("Refinement, validation images, seed 50, both recipes", rows, KAPPAS)
    return rows


def elbo_table(bench: Bench) -> list[Row]:
    """The ELBO over topK, with both samplers, learned on the very checkpoint that is judged; validation images."""
    base = GCNConfig(activation=Activations.sigmoid, residual=False, steps=200 if bench.full else 40)
    kappas, rows = (*KAPPAS, 800, 1600), []
    for topK in (500, 2000, 4000, 8000) if bench.full else (500,):
        for sampler in (TopKSamplers.gumbel, TopKSamplers.sinkhorn):
            config = replace(base, sampler=sampler)

            def judge(case: Case, topK: int = topK, config: GCNConfig = config) -> list[Cell]:
                return case.run(elbo_theta(case, topK, config, bench.output_dir / "trial"), kappas, SINGLES, "val")

            rows.append(Row(f"ELBO, topK {topK}, {sampler.value}", on(bench.chosen_on, judge)))
    rows += judged_rows(bench.chosen_on, {"unlearning": by_gcn(Unlearner.load(SHIPPED)[0])}, kappas, "val")
    bench.tables["unlearning_elbo"] = show("The ELBO, validation images, seed 50, both recipes", rows, kappas)
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "main": main_table,
    "unseen": unseen_table,
    "pairs": pairs_table,
    "transfer": transfer_table,
    "resnet": resnet_table,
    "auto": auto_table,
    "ablations": ablation_table,
    "refinement": refinement_table,
    "elbo": elbo_table,
}


def write_masks(bench: Bench, folder: Path) -> None:
    """The masks of the main table, each classifier beside its own, and how its images are normalised."""
    gcn = by_gcn(Unlearner.load(SHIPPED)[0])
    images = bench.judged[0].stages.data.splits["test"]
    write_json(folder / "normalisation.json", {"mean": float(images.mean), "std": float(images.std)})
    for case in bench.judged:
        place = folder / case.recipe.name.replace(", ", "_").replace(" ", "-")
        copy_file(case.stages.classifier_path, place / "classifier.safetensors")
        for name, way in (("gcn", gcn), ("refined", refined(gcn))):
            for classes in SINGLES:
                for kappa in KAPPAS:
                    off = hard_topk(way(case.checkpoint, Request(classes, kappa)), kappa)
                    facts = {"method": name, "forget_class": classes[0], "kappa": kappa}
                    path = place / f"{name}_class-{classes[0]}_kappa-{kappa}.safetensors"
                    Mask(~off, case.checkpoint.graph, facts).save(path)
        print(place, flush=True)


def main() -> None:
    """Parse, run the sections, keep the cells."""
    flags = parser(__doc__)
    flags.add_argument("--full", action="store_true", help="all seeds, all training steps, all references")
    flags.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flags.add_argument("--masks", type=Path, help="write the main table's masks here, and nothing else")
    flags.add_argument("--output-dir", type=Path, default=PROJECT_ROOT, help="where classifiers are kept")
    for_pages(flags)
    arguments = flags.parse_args()
    reuse_freed_memory()
    bench = Bench(arguments.output_dir, arguments.full)
    if arguments.masks:
        write_masks(bench, arguments.masks)
        return
    figures: dict[str, object] = {"full": bench.full}
    for name in arguments.sections:
        rows = SECTIONS[name](bench)
        figures[name] = {
            row.name: {key: [asdict(c) for c in cells] for key, cells in row.cells.items()} for row in rows
        }
    keep(arguments.json, figures)
    publish_all(arguments.docs, bench.tables)


if __name__ == "__main__":
    main()
