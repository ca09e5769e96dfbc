"""The second stage: the graph of each class's images, made from the trained classifier."""

from functools import cached_property
from pathlib import Path

import torch

from core.config import UserError, plain
from core.hashes import code_key, sha256_file
from core.store import sha256_folder
from data import GraphDataset, GraphGenerator
from graphs.layout import WeightGraph
from model import HookedModel, MaskLayer
from stages.classifier import ClassifierStage
from stages.setup import Setup


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


class GraphStage:
    """The graphs of a run, made when first asked for, or given.

    Raises:
        UserError: graphs that are given are of other layers, classes or weights.
    """

    def __init__(self, setup: Setup, classifier: ClassifierStage):
        self.setup, self.classifier = setup, classifier
        if setup.config.graph_dir:
            check_layout(GraphDataset(setup.config.graph_dir), setup.graph, setup.shape[0])
            if setup.config.trained_vision_model_path:
                _ = self.dataset

    def make(self) -> Path:
        """Make the graphs (or take the given ones); returns their folder."""
        if self.setup.config.graph_dir:
            return self.setup.config.graph_dir
        inputs = self.setup.common | {
            "classifier": sha256_file(self.classifier.path),
            "mask_layer": self.setup.layers,
            "graph": plain(self.setup.config.graph),
            "code": code_key("stages.graphs"),
        }

        def fill(folder: Path) -> dict:
            config = self.setup.config
            images, layers = (self.classifier.model, self.setup.data), (config.mask_layer, config.graph)
            return GraphGenerator(*images, *layers, config.seed, self.setup.device).generate(folder)

        return self.setup.keep("graphs", "datasets/Graphs", self.setup.label, inputs, fill)

    @cached_property
    def dataset(self) -> GraphDataset:
        """Open the graphs.

        Raises:
            UserError: they are of another layer, of a classifier with other weights, or of other classes.
        """
        graphs = GraphDataset(self.make())
        check_layout(graphs, self.setup.graph, self.setup.shape[0])
        check_weights(graphs, self.classifier.model, self.setup.config.mask_layer)
        if self.setup.config.graph_dir:
            graphs.check_numbers(self.classifier.model, self.setup.config.mask_layer)
        return graphs

    @cached_property
    def source(self) -> dict:
        """Name the inputs that a GCN learns from, by hash."""
        graphs = self.make()
        keys = {"classifier": sha256_file(self.classifier.path), "graphs": sha256_folder(graphs)}
        return keys | {"mask_layer": self.setup.layers}
