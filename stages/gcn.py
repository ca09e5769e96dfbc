"""The third stage: train the graph network on the graphs, for requests or (the ELBO) once for each top_k."""

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from core.config import GIVEN, Objectives, UserError, plain
from core.hashes import code_key, provenance
from core.observe import log
from data import FEATURES
from model import MaskingGCN
from stages.classifier import ClassifierStage
from stages.crew import Crew
from stages.graphs import GraphStage
from stages.limits import check_memory
from stages.setup import Setup, seed_weights
from trainer import GCNTrainer
from unlearn.objectives import Elbo, Unlearning
from unlearn.requests import FrozenHead, Request, Unlearner, check_scores
from utils_data import UnlearningDataset

GCN_FILE = "gcn.safetensors"
LEARNED_FROM = ("train", "graph", "gcn")  # sections of the settings


def given_objective(path: Path) -> Objectives:
    """Tell what the GCN in a file was trained for.

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


class GCNStage:
    """The graph network of a run, trained when first asked for, or given.

    Raises:
        UserError: its training cannot fit into memory, or the file that is given holds no graph network.
    """

    def __init__(self, setup: Setup, classifier: ClassifierStage, graphs: GraphStage):
        self.setup, self.classifier, self.graphs = setup, classifier, graphs
        check_memory(setup.config, setup.outline, setup.graph, setup.device)
        given = setup.config.gcn_path
        self.objective = given_objective(given) if given else setup.config.gcn.objective

    def train(self, top_k: int) -> Path:
        """Train the GCN (the ELBO: one for each top_k), or take the given one; returns its file."""
        if self.setup.config.gcn_path:
            return self.setup.config.gcn_path
        elbo = self.objective is Objectives.elbo
        return self._train_elbo(top_k) if elbo else self._train_unlearner()

    def _train_elbo(self, top_k: int) -> Path:
        setup, config = self.setup, self.setup.config.gcn
        inputs = setup.common | self.graphs.source
        inputs |= {"gcn": plain(config), "top_k": top_k, "code": code_key("stages.gcn")}

        def make(folder: Path) -> dict:
            seed_weights(setup.config.seed, "gcn", "weights")
            shape = (config.num_message_passing_rounds, config.hidden_dim, config.aggregation)
            gcn = MaskingGCN(len(FEATURES), *shape, config.activation, config.residual)
            model, graphs, layers = self.classifier.model, self.graphs.dataset, setup.config.mask_layer
            objective = Elbo(gcn, model, graphs, layers, top_k, config, setup.config.seed, setup.device)
            facts = GCNTrainer(objective, setup.tracker(f"gcn_top-{top_k}", *LEARNED_FROM)).train(folder)
            gcn.save(folder / GCN_FILE, facts | {"topK": top_k, "objective": "elbo", "config": plain(config)})
            return facts

        label = f"{setup.label}_top-{top_k}"
        return setup.keep(f"gcn_top-{top_k}", "checkpoints/gcn", label, inputs, make) / GCN_FILE

    def _train_unlearner(self) -> Path:
        setup, config, teachers = self.setup, self.setup.config.gcn, self._teachers
        sources = [teacher.graphs.source for teacher in teachers]
        inputs = setup.common | {"sources": sources, "gcn": plain(config), "code": code_key("stages.gcn")}

        def make(folder: Path) -> dict:
            seed_weights(setup.config.seed, "gcn", "weights")
            unlearner = Unlearner.fresh(config)
            heads, seed = [teacher.head for teacher in teachers], setup.config.seed
            objective = Unlearning(unlearner, heads, config, seed, setup.device)
            facts = GCNTrainer(objective, setup.tracker("gcn", *LEARNED_FROM)).train(folder) | {
                "checkpoints": len(heads)
            }
            trained_on = {name: setup.common[name] for name in ("model", "dataset")} | {"shapes": setup.graph.shapes}
            trained_on["classifiers"] = [
                {"seed": teacher.setup.config.seed, "train": plain(teacher.setup.config.train)} for teacher in teachers
            ]
            made = {
                "config": plain(config),
                "seed": seed,
                "trained_on": trained_on,
                "versions": provenance()["versions"],
            }
            unlearner.gcn.save(folder / GCN_FILE, facts | unlearner.facts | made)
            return facts

        return setup.keep("gcn", "checkpoints/gcn", f"{setup.label}_unlearning", inputs, make) / GCN_FILE

    @cached_property
    def _teachers(self) -> list["GCNStage"]:
        """Stages whose classifiers the GCN learns on: this run's, unless other seeds or batch sizes are named."""
        config, data = self.setup.config, self.setup.data
        if not config.gcn.train_seeds and not config.gcn.train_batch_sizes:
            return [self]
        teachers, given = [], dict.fromkeys(GIVEN)
        for seed in config.gcn.train_seeds or (config.seed,):
            for size in config.gcn.train_batch_sizes or (config.train.batch_size,):
                other = replace(config, seed=seed, train=replace(config.train, batch_size=size), **given)
                setup = Setup(other)
                setup.data = UnlearningDataset(data.name, data.splits, size, data.forget_class, seed)
                classifier = ClassifierStage(setup, Crew(setup))
                teachers.append(GCNStage(setup, classifier, GraphStage(setup, classifier)))
        return teachers

    @cached_property
    def head(self) -> FrozenHead:
        """The classifier from its first masked layer on, with the images by which requests are answered."""
        setup, graphs, begun = self.setup, self.graphs.dataset, time.perf_counter()
        layers, num_classes = setup.config.mask_layer, setup.data.num_classes
        made = FrozenHead.of_graphs(self.classifier.model, graphs, layers, num_classes, setup.device)
        setup.seconds["checkpoint"] = time.perf_counter() - begun
        return made

    @cached_property
    def unlearner(self) -> Unlearner | None:
        """The GCN that answers requests; None if it was trained for the ELBO."""
        if self.objective is Objectives.elbo:
            return None
        unlearner, _ = Unlearner.load(self.train(self.setup.config.topK_list[0]))
        unlearner.given = self.setup.config.gcn_path
        unlearner.gcn.to(self.setup.device).eval()
        return unlearner

    def learn_importance(self, top_k: int) -> torch.Tensor:
        """Compute theta [C, *graph.shape] of every class, as if it alone were to be forgotten."""
        classes = range(self.setup.data.num_classes)
        if self.unlearner:
            with torch.no_grad():
                thetas = [self.unlearner.theta(self.head, Request((label,), top_k)) for label in classes]
            return torch.stack(thetas).cpu()
        gcn, facts = MaskingGCN.load(self.train(top_k))
        if facts.get("topK", top_k) != top_k:
            log(f"GCN: {self.setup.config.gcn_path} was trained for top_k {facts['topK']}, it is used for {top_k}")
        gcn.to(self.setup.device).eval()

        def theta(label: int) -> torch.Tensor:
            features = self.graphs.dataset.class_features(label).unsqueeze(0)
            return gcn(features.to(self.setup.device), self.setup.graph).cpu()

        with torch.inference_mode():
            return check_scores(torch.cat([theta(label) for label in classes]), self.setup.config.gcn_path)
