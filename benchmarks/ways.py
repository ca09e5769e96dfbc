"""Ways to forget that the tables on unlearning compare: registered methods, two more controls, and graph networks."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.classifiers import CPU, TrainedClassifier, Way

import torch
from torch import Tensor

from core.config import GCNConfig, RefineConfig, Trackers
from core.observe import Tracker
from model import MaskingGCN
from trainer import GCNTrainer
from unlearn.masks import Mask, top_mask
from unlearn.objectives import Elbo, Unlearning
from unlearn.registry import Context, Point, mask_method
from unlearn.requests import FrozenHead, Unlearner, noise_start

FIXED_LAMBDA = 9.0
UNTOUCHED, RETRAINED, DROPPED, TAYLOR = (Way(name) for name in ("default", "retrain", "logit_drop", "taylor_mask"))


@mask_method("noise", "noise", axes=("kappa", "seed"), source="control")
def noise(context: Context, point: Point) -> Mask:
    """Switch off the kappa weights with the largest entries of the noise that refinement may start from."""
    theta = noise_start(context.known_head, context.request(point.kappa), point.seed)
    return top_mask(theta, point.kappa, context.graph)


@mask_method("taylor_fixed", "signed Taylor, lambda 9", axes=("kappa",), source="control")
def taylor_fixed(context: Context, point: Point) -> Mask:
    """As `taylor_mask`, but with lambda = 9 for every request."""
    contributions = context.known_head.statistics.contributions(context.config.forget_labels)
    return top_mask(contributions.signed_taylor(FIXED_LAMBDA), point.kappa, context.graph)


def by_gcn(unlearner: Unlearner) -> Way:
    """One forward pass (of several rounds of correction) of the graph network."""
    return Way("mimu", unlearner)


def refined(unlearner: Unlearner, config: RefineConfig | None = None) -> Way:
    """The same, refined."""
    return Way("mimu_refined", unlearner, config or RefineConfig())


def train(teachers: Sequence[FrozenHead], config: GCNConfig, folder: Path, message_passing: bool = True) -> Unlearner:
    """Train a graph network on these classifiers."""
    seed = 0
    torch.manual_seed(seed)
    unlearner = Unlearner.fresh(config)
    if not message_passing:
        for matrix in unlearner.gcn.neighbours:
            torch.nn.init.zeros_(matrix.requires_grad_(False))
    folder.mkdir(parents=True, exist_ok=True)
    objective = Unlearning(unlearner, teachers, config, seed, CPU)
    GCNTrainer(objective, Tracker(Trackers.none, "gcn", {})).train(folder)
    return unlearner


def elbo_importances(
    classifier: TrainedClassifier, top_k: int, config: GCNConfig, folder: Path
) -> Callable[[int], Tensor]:
    """Train a graph network for the ELBO on the classifier that is judged; return top_k -> theta [C, *graph.shape]."""
    stages = classifier.stages
    torch.manual_seed(0)
    shape = (config.num_message_passing_rounds, config.hidden_dim, config.aggregation)
    gcn = MaskingGCN(4, *shape, config.activation, config.residual)
    folder.mkdir(parents=True, exist_ok=True)
    shared = (stages.classifier, stages.graphs, stages.config.mask_layer)
    GCNTrainer(Elbo(gcn, *shared, top_k, config, 0, CPU), Tracker(Trackers.none, "elbo", {})).train(folder)
    with torch.inference_mode():
        theta = torch.cat([gcn(stages.graphs.class_features(label).unsqueeze(0)) for label in range(10)])
    return lambda top_k: theta
