"""What a user hands in instead of having it computed: a classifier, graphs, a GCN. All is checked before it is used."""

from pathlib import Path

import torch
from torch import Tensor

from core.config import GIVEN, Objectives, PipelineConfig, UserError
from data import FEATURES, GraphDataset
from graphs.gcn import MaskingGCN
from graphs.layout import WeightGraph
from model import HookedModel, MaskLayer
from unlearn.requests import Unlearner


def check_paths(config: PipelineConfig) -> None:
    """Check that what is named is there: two files and a folder.

    Raises:
        UserError: it is not.
    """
    for name in GIVEN:
        path, is_folder = getattr(config, name), name == "graph_dir"
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"there is nothing at {path}: check the path, or leave it out to compute it")
        if path.is_dir() != is_folder:
            found, needed = (
                ("a file", "the folder that holds it")
                if is_folder
                else ("a folder", "the file in it, e.g. its .safetensors")
            )
            raise UserError(f"{path} is {found}: name {needed}")


def given_objective(path: Path) -> Objectives:
    """What the GCN in a file was trained for.

    Raises:
        UserError: it is no GCN, or one that reads other node features than this version makes.
    """
    gcn, facts = MaskingGCN.load(path)
    if facts.get("objective") == Objectives.unlearning:
        Unlearner.load(path)
        return Objectives.unlearning
    if gcn.num_node_features != len(FEATURES):
        raise UserError(f"{path} reads {gcn.num_node_features} node features, graphs have {len(FEATURES)}: train one")
    return Objectives.elbo


def check_layout(graphs: GraphDataset, needed: WeightGraph, num_classes: int) -> None:
    """Check that graphs are of these layers and of all classes.

    Raises:
        UserError: they are not.
    """
    if graphs.graph != needed:
        found, wanted = (f"{', '.join(graph.names)} {list(graph.shapes)}" for graph in (graphs.graph, needed))
        what = f"{graphs.root} holds graphs of another layer ({found}, needed {wanted})"
        raise UserError(f"{what}: leave graph_dir out to make them")
    graphs.check_classes(num_classes)


def check_weights(graphs: GraphDataset, model: HookedModel, mask_layer: MaskLayer) -> None:
    """Check that graphs are of this classifier.

    Raises:
        UserError: its weights are others.
    """
    weights = [weight.detach().cpu() for weight in model.weights(mask_layer)]
    if not torch.equal(graphs.weight, graphs.graph.join(weights)):
        raise UserError(f"{graphs.root} holds graphs of another classifier: leave graph_dir out to make them")


def check_answers(model: HookedModel, images: Tensor, path: Path) -> None:
    """Check that a given classifier [B, C, H, W] -> [B, classes] answers with numbers.

    Raises:
        UserError: it does not.
    """
    with torch.inference_mode():
        finite = bool(model(images).isfinite().all())
    if not finite:
        raise UserError(f"{path} answers with numbers that are not finite: its weights are too large, give others")
