"""Print, before anything is computed, how a run was understood: data, classes, given files, settings without effect."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from core.config import KappaModes, MaskStrategies, Objectives, PipelineConfig, SupportedDatasets
from core.hashes import plugin
from core.observe import log
from images.specs import SPECS
from stages.chain import Stages
from utils_data import SPLITS, TREE_SETTINGS

MOST_NAMES = 8
ELBO_ALONE = ("prior", "beta", "batch_size")
UNLEARNING_ALONE = (
    *("features", "passes", "taylor_prior", "forget_loss", "lambda_retain", "requests_per_step"),
    *("train_classes", "train_seeds", "train_batch_sizes"),
)


def changed(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that are not at their defaults."""
    fresh = type(config)()
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if is_dataclass(value):
            yield from changed(value, f"{name}.")
        elif value != getattr(fresh, item.name):
            yield name


def _idle(config: PipelineConfig, objective: Objectives, measures: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(why, fields or sections that do nothing) for every reason that holds."""
    learns = config.gcn_path is None
    others = learns and objective is Objectives.unlearning and (config.gcn.train_seeds or config.gcn.train_batch_sizes)
    if config.trained_vision_model_path and not (measures and config.eval.references) and not others:
        yield "the classifier is given and none is retrained", ("train", "resume")
    if config.graph_dir:
        yield "the graphs are given (graph_dir)", ("graph",)
    if not learns:
        yield f"the graph network is given (gcn_path), trained for {objective.value}", ("gcn",)
    elif objective is Objectives.unlearning:
        yield "gcn.objective is unlearning", tuple(f"gcn.{name}" for name in ELBO_ALONE)
    else:
        yield "gcn.objective is elbo", tuple(f"gcn.{name}" for name in UNLEARNING_ALONE)
    if not config.train.use_ddp:
        yield "train.use_ddp is off", ("train.num_workers", "train.ddp_timeout", "train.ddp_restarts")
    if not SPECS[config.vision_dataset].layout:
        yield f"{config.vision_dataset.value} is no folder tree", tuple(f"data.{name}" for name in TREE_SETTINGS)
    if config.vision_dataset is SupportedDatasets.DIGITS:
        yield "DIGITS lies inside scikit-learn", ("dataset_path",)


def _unused(config: PipelineConfig, objective: Objectives) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same for what is measured, and how masks are formed."""
    own = MaskStrategies.direct if objective is Objectives.unlearning else MaskStrategies.feasibility
    strategy = config.eval.mask_strategy or own
    if objective is Objectives.unlearning and strategy is MaskStrategies.direct:
        yield "masks answer the request directly", ("topK_list",)
    if strategy is not MaskStrategies.feasibility:
        yield f"the mask strategy is {strategy.value}", ("eval.importance",)
    if config.kappa is KappaModes.auto:
        yield "kappa is auto", ("kappa_list",)
    else:
        yield "kappa is list", ("auto",)
    for section, method in (("refine", "mimu_refined"), ("sft", "sft")):
        if method not in config.eval.methods:
            yield f"eval.methods lacks {method}", (section,)


def without_effect(config: PipelineConfig, objective: Objectives, measures: bool = True) -> list[str]:
    """Say, in a sentence each, which given settings have no effect, and why.

    Args:
        objective: of the graph network that is used. measures: whether methods are measured (`train-gcn` does not).
    """
    reasons = list(_idle(config, objective, measures))
    if measures:
        reasons += _unused(config, objective)
    else:
        sections = ("eval", "refine", "sft", "auto", "reporter", "kappa_list", "kappa", "forget_class")
        reasons.append(("only the graph network is made", sections))
    said: dict[str, str] = {}
    for why, names in reasons:
        for name in changed(config):
            if name not in said and any(name == one or name.startswith(f"{one}.") for one in names):
                said[name] = why
    by_reason: dict[str, list[str]] = {}
    for name, why in said.items():
        by_reason.setdefault(why, []).append(name)
    return [f"no effect: {', '.join(names)} ({why})" for why, names in by_reason.items()]


def understood(stages: Stages, measures: bool = True) -> list[str]:
    """List what the run will use, a line each; images are read for it, nothing is trained."""
    config, data = stages.config, stages.data
    names = list(data.classes)
    shown = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    where = f" at {config.dataset_path}" if config.dataset_path else ""
    counts = [f"{len(data.splits[split]):,} {split}" for split in SPLITS]
    given = {
        "classifier": config.trained_vision_model_path,
        "graphs": config.graph_dir,
        f"graph network for {stages.objective.value}": config.gcn_path,
    }
    lines = [
        *(f"plugin: {one.path} registers {', '.join(one.registered)}" for one in map(plugin, config.plugins)),
        f"dataset: {data.name.value}{where}, {len(names)} classes ({shown})",
        f"images: {', '.join(counts)}; {_pixels(stages)}",
        *(f"left out: {line}" for line in _left_out(stages)),
    ]
    if measures:
        lines.append(f"to forget: {', '.join(f'{names[label]} (label {label})' for label in config.forget_labels)}")
        lines.append(f"methods: {', '.join(config.eval.methods)}; {config.eval.references} retrained references")
    lines += [f"given: {name} {path}" for name, path in given.items() if path]
    made = ", ".join(name for name, path in given.items() if not path)
    lines += [f"to be made, unless it is there: {made}"] if made else []
    model = f"{config.model_architecture.value}, seed {config.seed}, {stages.device}"
    return [*lines, f"model: {model}", *without_effect(config, stages.objective, measures)]


def _pixels(stages: Stages) -> str:
    """How images enter the classifier; of a tree of files, whose pictures are scaled, also what says so."""
    _, channels, side = stages.setup.shape
    kinds = {1: "grey", 3: "colour"}
    found = f"{side}x{side} px, {kinds.get(channels, f'{channels} channels')}"
    is_tree = bool(SPECS[stages.data.name].layout)
    return f"scaled to {found}: --data.image-size sets the side, and with it the time" if is_tree else found


def _left_out(stages: Stages) -> Iterator[str]:
    """What takes no part, and why."""
    data = stages.config.data
    if skipped := stages.data.skipped_images:
        yield f"{len(skipped)} files that give no image, such as {skipped[0]['path']} ({skipped[0]['reason']})"
    for name in ("max_train_samples", "max_test_samples"):
        if most := getattr(data, name):
            yield f"images beyond data.{name} {most:,}"


def say(stages: Stages, measures: bool = True) -> None:
    """Log the block."""
    for line in understood(stages, measures):
        log(line)
