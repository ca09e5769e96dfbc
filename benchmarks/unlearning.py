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
over the classifiers (worst class) / retain score, percent.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.classifiers import PAIRS, SEED, SINGLES, Recipe, Score, Way, classifiers, score
from benchmarks.common import for_pages, keep, parser, publish_all
from benchmarks.unlearning_tables import (
    BATCHES,
    KAPPAS,
    RESNET_KAPPAS,
    SHIPPED,
    SHIPPED_RESNET,
    Row,
    Scope,
    row_of,
    rows_of,
    show,
)
from benchmarks.ways import DROPPED, RETRAINED, TAYLOR, UNTOUCHED, by_gcn, elbo_importances, refined, train

from core.artifacts import copy_file, write_json
from core.config import (
    PROJECT_ROOT,
    Activations,
    AutoConfig,
    FeatureSets,
    ForgetLosses,
    GCNConfig,
    RefineConfig,
    Starts,
    SupportedDatasets,
    SupportedVisionModels,
    TopKSamplers,
)
from eval import Eval
from measure.auto_kappa import search
from reporting.write import as_text
from rivals.compared import mask_of
from training.processes import reuse_freed_memory
from unlearn.registry import Point
from unlearn.requests import Unlearner

FULL_STEPS = 300  # as the graph networks that ship (configs/gcn_mlp.yaml)
NO_MASK = (0,)  # kappa of what switches no weights off


# --- sections: each prints its tables and returns its rows -----------------------------------------------


def main_table(scope: Scope) -> list[Row]:
    """Every method, test images, each recipe by itself."""
    unlearner, rows = Unlearner.load(SHIPPED)[0], []
    ways = {
        "random": Way("noise"),
        "graph network": by_gcn(unlearner),
        "graph network, refined": refined(unlearner),
        "graph network, refined, margin": refined(unlearner, RefineConfig(forget_loss=ForgetLosses.margin)),
        "graph network, refined, match": refined(unlearner, RefineConfig(forget_loss=ForgetLosses.match)),
    }
    ways = {name: replace(way, kl=scope.full) for name, way in ways.items()}
    without = {"untouched": UNTOUCHED, "retrained without the class": RETRAINED, "its logit at -inf": DROPPED}
    without = {name: replace(way, kl=True) for name, way in without.items() if scope.full}
    for size in BATCHES:
        judged = [one for one in scope.judged if one.recipe.batch_size == size]
        found = rows_of(without, judged, NO_MASK)
        found.append(row_of("signed Taylor", TAYLOR, judged, KAPPAS))
        found += rows_of(ways, judged, KAPPAS)
        scope.tables[f"unlearning_{size}"] = show(
            f"Test images, batch {size}, {len(judged)} classifiers x 10 classes", found, KAPPAS, more=True
        )
        rows += [replace(row, name=f"batch {size}: {row.name}") for row in found]
    return rows


def unseen_table(scope: Scope) -> list[Row]:
    """Classes that the graph network was never asked to forget, of classifiers it never saw."""
    folds = ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))[: 3 if scope.full else 1]
    scores: dict[str, list[Score]] = {}
    steps = FULL_STEPS if scope.full else 40
    for fold in folds:
        seen = tuple(label for label in range(10) if label not in fold)
        gcn = by_gcn(train(scope.teachers, GCNConfig(steps=steps, train_classes=seen), scope.output_dir / "trial"))
        for one in scope.judged:
            requests = [(label,) for label in fold]
            scores.setdefault(one.recipe.name, []).extend(one.measure(gcn, KAPPAS, requests, "test"))
    rows = []
    for size in BATCHES:
        part = {name: group for name, group in scores.items() if name.startswith(f"batch {size},")}
        rows.append(Row(f"batch {size}: graph network, classes never asked for", part))
    scope.tables["unlearning_unseen"] = show("Unseen classes of unseen classifiers, test images", rows, KAPPAS)
    return rows


def pairs_table(scope: Scope) -> list[Row]:
    """All 45 pairs of classes, 2 x kappa weights."""
    unlearner, rows, kappas = Unlearner.load(SHIPPED)[0], [], (64, 128, 200)
    pairs = PAIRS if scope.full else PAIRS[::9]
    for size in BATCHES:
        judged = [one for one in scope.judged if one.recipe.batch_size == size]
        for name, way in (("graph network", by_gcn(unlearner)), ("graph network, refined", refined(unlearner))):
            rows.append(row_of(f"batch {size}: {name}", way, judged, kappas, requests=pairs))
        if scope.full:
            name = f"batch {size}: retrained without both, seed 0"
            rows.append(row_of(name, RETRAINED, judged[:1], NO_MASK, requests=pairs))
    scope.tables["unlearning_pairs"] = show(f"{len(pairs)} pairs of classes, twice kappa, test images", rows, kappas)
    return rows


def transfer_table(scope: Scope) -> list[Row]:
    """The graph network of Fashion-MNIST on classifiers of DIGITS."""
    unlearner = Unlearner.load(SHIPPED)[0]
    recipes = [Recipe(32, seed, SupportedDatasets.DIGITS) for seed in range(5 if scope.full else 1)]
    judged, kappas = classifiers(recipes, scope.output_dir), (25, *KAPPAS)
    ways = {"signed Taylor": TAYLOR, "graph network": by_gcn(unlearner), "graph network, refined": refined(unlearner)}
    rows = rows_of(ways, judged, kappas)
    scope.tables["unlearning_transfer"] = show(
        f"DIGITS, {len(judged)} classifiers, the graph network of Fashion-MNIST, test images", rows, kappas
    )
    return rows


def resnet_table(scope: Scope) -> list[Row]:
    """ResNet-18, 12,000 training images, 2 epochs: 65,536 weights."""
    if not scope.full:
        print("\nResNet-18: with --full")
        return []
    fashion, resnet = SupportedDatasets.FASHION_MNIST, SupportedVisionModels.HookedResnet
    judged = classifiers([Recipe(128, seed, fashion, resnet) for seed in (0, 1)], scope.output_dir)
    own, foreign = (Unlearner.load(path)[0] for path in (SHIPPED_RESNET, SHIPPED))
    ways = {
        "signed Taylor": TAYLOR,
        "graph network of MLPs": by_gcn(foreign),
        "graph network of MLPs, refined": refined(foreign),
        "graph network": by_gcn(own),
        "graph network, refined": refined(own),
    }
    rows = [
        row_of("untouched", UNTOUCHED, judged, NO_MASK),
        row_of("retrained without the class, seed 0", RETRAINED, judged[:1], NO_MASK),
        *rows_of(ways, judged, RESNET_KAPPAS),
    ]
    scope.tables["unlearning_resnet"] = show(f"ResNet-18, {len(judged)} classifiers, test images", rows, RESNET_KAPPAS)
    return rows


def auto_table(scope: Scope) -> list[Row]:
    """kappa: auto for every class: how often a target is shown on validation images, and holds on test images."""
    way, rows = refined(Unlearner.load(SHIPPED)[0]), []
    lines = [["target", "shown", "hold on test", "kappa: least, median, most"]]
    for tau, epsilon in ((2.0, 1.0), (1.0, 1.0), (5.0, 0.5))[: 3 if scope.full else 1]:
        target = AutoConfig(method=way.method, tau=tau, epsilon=epsilon)
        hold, scores = 0, {}
        for one in scope.judged:
            for classes in SINGLES:
                evaluation = Eval(one.context(way, classes, target))
                found = search(evaluation.context, 1)
                if found.achieved:
                    masked = score(evaluation, way.method, found.kappa, found.kappa, "test")
                    scores.setdefault(one.recipe.name, []).append(masked)
                    untouched = score(evaluation, "default", 0, 0, "test")
                    hold += masked.forget <= tau and untouched.retain - masked.retain <= epsilon
        kappas = [masked.kappa for group in scores.values() for masked in group]
        shown, total = len(kappas), 10 * len(scope.judged)
        middle = f"{min(kappas)}, {statistics.median(kappas):.0f}, {max(kappas)}" if kappas else "-"
        lines.append([f"forget <= {tau}, drop <= {epsilon}", f"{shown} of {total}", f"{hold} of {shown}", middle])
        rows.append(Row(f"tau {tau}, epsilon {epsilon}", scores))
    print(f"\nkappa: auto, refined masks\n\n{as_text(lines)}", flush=True)
    scope.tables["unlearning_auto"] = (f"10 classes x {len(scope.judged)} classifiers", lines)
    return rows


def ablation_table(scope: Scope) -> list[Row]:
    """One change at a time, graph network only, on validation images."""
    base = GCNConfig(steps=FULL_STEPS if scope.full else 40)
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
    rows = [row_of("signed Taylor, lambda 9", Way("taylor_fixed"), scope.chosen_on, KAPPAS, "val")]
    for name, config in (variants | (more if scope.full else {})).items():
        gcn = by_gcn(train(scope.teachers, config, scope.output_dir / "trial"))
        rows.append(row_of(name, gcn, scope.chosen_on, KAPPAS, "val"))
    blind = train(scope.teachers, base, scope.output_dir / "trial", message_passing=False)
    rows.append(row_of("no message passing", by_gcn(blind), scope.chosen_on, KAPPAS, "val"))
    for count in (1, 2, 4) if scope.full else ():
        gcn = by_gcn(train(scope.teachers[:count], base, scope.output_dir / "trial"))
        rows.append(row_of(f"{count} training classifiers of 8", gcn, scope.chosen_on, KAPPAS, "val"))
    scope.tables["unlearning_ablations"] = show(
        "Ablations of the graph network, validation images, seed 50, both recipes", rows, KAPPAS
    )
    return rows


def refinement_table(scope: Scope) -> list[Row]:
    """What refinement starts from, and for how long, on validation images."""
    unlearner = Unlearner.load(SHIPPED)[0]
    starts = {"graph network": Starts.gcn, "signed Taylor": Starts.taylor, "noise": Starts.noise}
    ways = {"graph network, not refined": by_gcn(unlearner)}
    for steps in (5, 10, 30, 100) if scope.full else (30,):
        for name, start in starts.items():
            ways[f"from {name}, {steps} steps"] = refined(unlearner, RefineConfig(start=start, steps=steps))
    for weight in (0.1, 1.0, 3.0) if scope.full else ():
        ways[f"from the graph network, 30 steps, lambda {weight}"] = refined(
            unlearner, RefineConfig(lambda_retain=weight)
        )
    rows = rows_of(ways, scope.chosen_on, KAPPAS, "val")
    show("Refinement, validation images, seed 50, both recipes", rows, KAPPAS)
    return rows


def elbo_table(scope: Scope) -> list[Row]:
    """The ELBO over top_k, with both samplers, learned on the very classifier that is judged; validation images."""
    base = GCNConfig(activation=Activations.sigmoid, residual=False, steps=200 if scope.full else 40)
    kappas, rows, folder = (*KAPPAS, 800, 1600), [], scope.output_dir / "trial"
    for top_k in (500, 2000, 4000, 8000) if scope.full else (500,):
        for sampler in (TopKSamplers.gumbel, TopKSamplers.sinkhorn):
            config, scores = replace(base, sampler=sampler), {}
            for one in scope.chosen_on:
                way = Way("mimu", importances=elbo_importances(one, top_k, config, folder))
                scores[one.recipe.name] = one.measure(way, kappas, SINGLES, "val")
            rows.append(Row(f"ELBO, top_k {top_k}, {sampler.value}", scores))
    rows.append(row_of("unlearning", by_gcn(Unlearner.load(SHIPPED)[0]), scope.chosen_on, kappas, "val"))
    scope.tables["unlearning_elbo"] = show("The ELBO, validation images, seed 50, both recipes", rows, kappas)
    return rows


SECTIONS: dict[str, Callable[[Scope], list[Row]]] = {
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


def write_masks(scope: Scope, folder: Path) -> None:
    """The masks of the main table, each classifier beside its own, and how its images are normalised."""
    unlearner = Unlearner.load(SHIPPED)[0]
    images = scope.judged[0].stages.data.splits["test"]
    write_json(folder / "normalisation.json", {"mean": float(images.mean), "std": float(images.std)})
    for one in scope.judged:
        place = folder / one.recipe.name.replace(", ", "_").replace(" ", "-")
        copy_file(one.stages.classifier_path, place / "classifier.safetensors")
        for name, way in (("gcn", by_gcn(unlearner)), ("refined", refined(unlearner))):
            for classes in SINGLES:
                context = one.context(way, classes)
                for kappa in KAPPAS:
                    facts = {"method": name, "forget_class": classes[0], "kappa": kappa}
                    path = place / f"{name}_class-{classes[0]}_kappa-{kappa}.safetensors"
                    replace(mask_of(way.method, context, Point(1, kappa, SEED)), facts=facts).save(path)
        print(place, flush=True)


def main() -> None:
    """Parse, run the sections, keep the scores."""
    flags = parser(__doc__)
    flags.add_argument("--full", action="store_true", help="all seeds, all training steps, all references")
    flags.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flags.add_argument("--masks", type=Path, help="write the main table's masks here, and nothing else")
    flags.add_argument("--output-dir", type=Path, default=PROJECT_ROOT, help="where classifiers are kept")
    for_pages(flags)
    arguments = flags.parse_args()
    reuse_freed_memory()
    scope = Scope(arguments.output_dir, arguments.full)
    if arguments.masks:
        write_masks(scope, arguments.masks)
        return
    results: dict[str, object] = {"full": scope.full}
    for name in arguments.sections:
        rows = SECTIONS[name](scope)
        results[name] = {
            row.name: {key: [asdict(score) for score in scores] for key, scores in row.scores.items()} for row in rows
        }
    keep(arguments.json, results)
    publish_all(arguments.docs, scope.tables)


if __name__ == "__main__":
    main()
