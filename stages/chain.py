"""The stages of a run, joined: classifier -> graphs -> GCN, each kept under the hash of all its inputs.

An unchanged stage is not run again, and an interrupted run goes on where it stopped.
"""

from pathlib import Path

import torch

from core.config import Objectives, PipelineConfig
from data import GraphDataset
from model import HookedModel
from stages.classifier import ClassifierStage
from stages.crew import Crew
from stages.gcn import GCNStage
from stages.graphs import GraphStage
from stages.setup import Setup
from unlearn.requests import FrozenHead
from utils_data import UnlearningDataset


class Stages:
    """The products of a run: classifier, graphs, GCN; each is made when it is first asked for.

    Args:
        config: what to do. Products passed in by path (`trained_vision_model_path`, `graph_dir`, `gcn_path`)
            are used instead of computed.

    Raises:
        UserError: the configuration cannot be run; said before anything is trained.
    """

    def __init__(self, config: PipelineConfig):
        self.setup = setup = Setup(config)
        self.crew = Crew(setup)
        self.classifier_stage = ClassifierStage(setup, self.crew)
        self.graph_stage = GraphStage(setup, self.classifier_stage)
        self.gcn_stage = GCNStage(setup, self.classifier_stage, self.graph_stage)

    def run_vision_model_training(self) -> Path:
        """Train the classifier (or take the given one); returns its checkpoint."""
        return self.classifier_stage.train()

    def run_gcn_graph_generation(self) -> Path:
        """Make the graphs (or take the given ones); returns their folder."""
        return self.graph_stage.make()

    def run_gcn_training(self, top_k: int) -> Path:
        """Train the GCN (the ELBO: one for each top_k), or take the given one; returns its file."""
        return self.gcn_stage.train(top_k)

    def take_part(self) -> bool:
        """Help the first process of torchrun's to train; False, at once, in that one and where there is just one."""
        return self.crew.take_part(self.classifier_stage.help_train)

    def dismiss(self) -> None:
        """Let the other processes go; called by the first one at the end."""
        self.crew.dismiss()

    # --- what the stages made ---

    @property
    def config(self) -> PipelineConfig:
        """The configuration with classes resolved to labels."""
        return self.setup.config

    @property
    def device(self) -> torch.device:
        """Where networks are trained and measured."""
        return self.setup.device

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage that was made or found, by name."""
        return self.setup.seconds

    @property
    def data(self) -> UnlearningDataset:
        """The images; may be set, so that runs on the same images read them once."""
        return self.setup.data

    @data.setter
    def data(self, data: UnlearningDataset) -> None:
        self.setup.data = data

    @property
    def classifier(self) -> HookedModel:
        """The trained classifier, eval mode."""
        return self.classifier_stage.model

    @property
    def classifier_path(self) -> Path:
        """The checkpoint behind `classifier`."""
        return self.classifier_stage.path

    def retrained(self, index: int = 0) -> HookedModel:
        """Train by the classifier's own recipe on the images of all other classes; `index` counts training seeds."""
        return self.classifier_stage.retrained(index)

    @property
    def graphs(self) -> GraphDataset:
        """The graphs, checked against the classifier."""
        return self.graph_stage.dataset

    @property
    def objective(self) -> Objectives:
        """What the GCN is trained for."""
        return self.gcn_stage.objective

    @property
    def head(self) -> FrozenHead:
        """The classifier from its first masked layer on, with the images by which requests are answered."""
        return self.gcn_stage.head

    def learn_importance(self, top_k: int) -> torch.Tensor:
        """Compute theta [C, *graph.shape] of every class, as if it alone were to be forgotten."""
        return self.gcn_stage.learn_importance(top_k)
