"""Our own methods and the plain controls; `rivals` has those of others, and the list of all.

Each method is one decorated function; its docstring is its definition.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from core.config import PROJECT_ROOT, MaskStrategies, Starts, UserError, derive_seed
from erasing.descent import Schedule, guided
from erasing.erasure import SHARE, Eraser, Erasure
from erasing.guide import Guide
from erasing.head import NoLinearHead, new_rows
from erasing.stages import MANY, deep, rows_of
from model import inspecting
from models.foreign import INSIDE, ForeignClassifier
from training.optimisers import AdamW
from unlearn.features import centred_rank
from unlearn.finetuning import Finetuner
from unlearn.masks import Mask, feasibility_score, random_mask, set_difference_mask, top_mask
from unlearn.registry import Context, Edit, NotApplicable, Point, mask_method, method
from unlearn.requests import CANDIDATES, noise_start, refine, tail_start, taylor_start

GUIDE = PROJECT_ROOT / "pretrained" / "erasing_mlp.safetensors"
"""Written by benchmarks/deep_network.py."""
TAYLOR_LAMBDAS = (0.0, 1.0, 3.0, 9.0)  # what `taylor_mask` chooses from, on validation images


def mimu_score(context: Context, point: Point) -> Tensor:
    """What `mimu` ranks, largest switched off first. [*graph.shape]."""
    if context.strategy is not MaskStrategies.direct:
        return feasibility_score(context.importance(point.top_k), context.config.forget_labels)
    if context.unlearner is None:
        raise UserError("eval.mask_strategy is direct, but the GCN was trained for the ELBO: choose feasibility")
    with torch.no_grad():
        return context.unlearner.theta(context.known_head, context.request(point.kappa))


@mask_method("mimu", "MIMU (ours)", axes=("top_k", "kappa"), learned=True)
def mimu(context: Context, point: Point) -> Mask:
    """Switch off the weights that the graph network finds the forgotten classes depend on."""
    if context.strategy is MaskStrategies.set_difference:
        classes = context.config.forget_labels
        return set_difference_mask(context.importance(point.top_k), classes, point.top_k, context.graph)
    return top_mask(mimu_score(context, point), point.kappa, context.graph)


def _start(context: Context, point: Point) -> Tensor:
    """theta that refinement starts from, as configured. [*graph.shape]."""
    start, request = context.config.refine.start, context.request(point.kappa)
    if start is Starts.taylor:
        return taylor_start(context.known_head, request.classes)
    if start is Starts.taylor_tail:
        return tail_start(context.known_head, request.classes)
    if start is Starts.noise:
        return noise_start(context.known_head, request, point.seed)
    score = mimu_score(context, point)
    direct = context.strategy is MaskStrategies.direct
    return (score if direct else centred_rank(score)).to(context.device)  # q has tails that drown the rest


@mask_method("mimu_refined", "MIMU refined (ours)", axes=("top_k", "kappa", "seed"), learned=True)
def mimu_refined(context: Context, point: Point) -> Mask:
    """The same, improved by a few steps of descent on theta for this request alone."""
    request, config = context.request(point.kappa), context.config.refine
    candidates = CANDIDATES * point.kappa if config.start is Starts.taylor_tail else None
    theta = refine(context.known_head, _start(context, point), request, config, candidates)
    return top_mask(theta, point.kappa, context.graph)


@method("mimu_deep", "MIMU deep (ours)", axes=("seed",))
def mimu_deep(context: Context, point: Point) -> Edit:
    """Switch off 2 % of the weights of the last stages (which hold nine tenths of all), such that the features there
    tell the forgotten classes from the classes that they are to be taken for no better than two small proxies say that
    retraining would leave it; then draw the classes' rows of the last layer anew and train them on D_r alone.
    """
    return deep_edit(context, point.seed)


@method("mimu_deep_network", "MIMU deep, by a network (ours)", axes=("seed",))
def mimu_deep_network(context: Context, point: Point) -> Edit:
    """As `mimu_deep`, but descent starts where a graph network of all layers says, and takes a third of its steps.

    The network that ships learned on MLPs of Fashion-MNIST; on other classifiers its start has not been measured.
    """
    if eraser_of(context, point.seed).model.weight_graph().num_vertices >= MANY:
        raise NotApplicable(f"asks a graph network that learned on small classifiers, of less than {MANY:,} weights")
    guide, _ = Guide.load(GUIDE)
    return deep_edit(context, point.seed, schedule=guided(guide))


@method("head_row_new", "last layer's row anew", axes=("seed",), source="control: what the head alone can hide")
def head_row_new(context: Context, point: Point) -> Edit:
    """Draw the forgotten classes' rows of the last layer anew and train them on D_r alone; no other weight changes."""
    eraser, classes = eraser_of(context, point.seed), context.config.forget_labels
    kept = ~torch.isin(eraser.labels, torch.tensor(classes))
    rows = new_rows(eraser.stages, None, eraser.h[kept], classes, point.seed)
    nothing = torch.zeros(0)
    return _written(context, Erasure(classes, {}, eraser.head, rows, nothing, nothing, nothing))


def deep_edit(context: Context, seed: int, share: float = SHARE, schedule: Schedule | None = None) -> Edit:
    """As `mimu_deep`, with a share of the weights, and sought as a schedule says."""
    eraser = eraser_of(context, seed)
    kappa = max(1, round(share * eraser.model.weight_graph().num_vertices))
    return _written(context, eraser.erase(context.config.forget_labels, kappa, schedule))


def eraser_of(context: Context, seed: int) -> Eraser:
    """What answers requests to erase, of a context's classifier and training images; made once for a seed."""

    def make() -> Eraser:
        sides = [context.images("train", side) for side in (True, False)]
        first = next(iter(sides[1]))[0][:4].to(context.device)
        with inspecting(context.model):
            model = deep(context.model, first, context.data.num_classes)
            pairs = [(rows_of(model, [images.to(context.device)]), true) for side in sides for images, true in side]
        rows, labels = zip(*pairs, strict=True)
        try:
            return Eraser(model, torch.cat(rows), torch.cat(labels).to(context.device), seed)
        except NoLinearHead as reason:
            raise NotApplicable(f"draws rows of the last layer anew, and {reason}") from None

    return context.shared.once(("eraser", seed), make, standing=True).value


def _written(context: Context, erasure: Erasure) -> Edit:
    """A copy of the classifier with the edit in it."""
    edited = copy.deepcopy(context.model)
    inside = INSIDE if isinstance(edited, ForeignClassifier) else ""
    module = edited.net if isinstance(edited, ForeignClassifier) else edited
    return Edit(edited.eval(), {inside + name: part for name, part in erasure.write(module).items()})


@mask_method("taylor_mask", "signed Taylor", axes=("kappa",), source="first-order saliency, e.g. 1611.06440")
def taylor_mask(context: Context, point: Point) -> Mask:
    """Rank by t_f - lambda max(0, t_r), first-order importances, nothing learned.

    lambda is the one that keeps and forgets most on validation images.
    """
    contributions = context.known_head.statistics.contributions(context.config.forget_labels)
    scores = (contributions.signed_taylor(weight) for weight in TAYLOR_LAMBDAS)
    candidates = [top_mask(score, point.kappa, context.graph) for score in scores]
    return max(candidates, key=lambda mask: context.score(mask, "val", False) - context.score(mask, "val", True))


@mask_method("random", "random mask", axes=("kappa", "seed"), source="control")
def random(context: Context, point: Point) -> Mask:
    """Switch off kappa weights drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(point.seed, "random", point.kappa))
    return random_mask(context.graph, point.kappa, generator)


@method("sft", "SFT randomisation", axes=("seed",), source="control: random labels, target layers alone")
def sft(context: Context, point: Point) -> Edit:
    """Fine-tune the target layers on random labels (or as `sft.mode` says)."""
    config = context.config
    allowed = context.within_targets([torch.ones_like(weight, dtype=torch.bool) for weight in context.weights])
    adamw, images = partial(AdamW, lr=config.sft.lr), (context.model, context.data)
    engine = Finetuner("sft", *images, point.seed, context.device, adamw, free=allowed)
    return Edit(engine.fit_targets(config.mask_layer, config.sft), allowed)


@method("retrain", "retrained", source="the gold standard: same recipe, retained images only")
def retrain(context: Context, point: Point) -> Edit:
    """Trained anew, by the classifier's own recipe, without the classes to forget."""
    if context.retrain is None:
        raise NotApplicable("needs the recipe that the classifier was trained by")
    model = context.retrain(0)
    # The seconds of its training where they are known: the clock sees no more than the reading of its checkpoint.
    return Edit(model, seconds=context.stage_seconds.get("retrained-0"))


@method("default", "untouched", source="control")
def default(context: Context, point: Point) -> Edit:
    """The classifier as it is."""
    return Edit(context.model, allowed={})
